"""Measure runs: how close the model's beliefs are to the group's, and what its answers express.

    python evaluate.py out/toy-gdpo-seed0 [OUT ...]                 # a table over runs
    python evaluate.py out/* --judge gpt-4o-mini --embeddings sentence-transformers/all-MiniLM-L6-v2
    python evaluate.py gpt2-large --data data/usa-icf               # few-shot prompting
    python evaluate.py chat:gpt-4o --data data/usa-icf              # the same over HTTP
    python evaluate.py --figures figures out/*                      # Figures 2 to 5, Tables 2 and 3

Fifth in reading order. Prints tables over runs and writes the same numbers, with intervals, to
OUT/eval.json; sampled answers are kept in OUT/samples.jsonl, so that a killed evaluation goes on.
Metrics as in section 5.1.1 of the paper, and more; all intervals are 95% bootstrap intervals over
survey questions. Works under torchrun. train.py uses the first half of this file while it trains.
"""
import hashlib
import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

from data import (EVAL_BRANCHES, Parser, SPLITS, Tokenizer, WordPiece, add_flags, check_ranges,
                  class_ids, collate, cost, dataset_name, encode_rows, find_checkpoint, help_first,
                  load_dataset, make_item, progress, prompt_text, question_of, read_json, run,
                  write)
from synth import Chat, Client, chat, endpoint, unreadable, usage_of


@dataclass
class Config:
    split: str = "test"          # which rows: train, eval or test
    checkpoint: str = "best"     # which weights of a run: best or last
    data: str = ""               # dataset, or several; empty: the one the run was trained on
    form: str = ""               # of the prompt; empty: the run's own, or the data's
    samples: int = 8             # answers sampled for each row (the authors' number); 0: none
    max_new_tokens: int = 64     # longest sampled answer
    seed: int = 0                # of the samples
    device: str = "auto"         # auto, cpu or cuda
    judge: str = ""              # LLM that judges the answers (BPC), gpt-4o-mini say; its server:
    judge_check: int = 0         # first ask it for the ratings of so many labelled reviews
    embeddings: str = ""         # RS by all-MiniLM-L6-v2 (folder or hub name), or by api:MODEL
    against: str = ""            # a run: also print the paired differences of the others to it
    figures: str = ""            # folder: draw the figures of runs already evaluated, and stop


SERVER = ("base_url", "concurrency", "timeout", "usd_in", "usd_out", "max_usd", "limit", "cache")


def flags():
    parser = Parser(description="Measure runs: tables over all of them.")
    parser.add_argument("OUT", nargs="+", help="run folders of train.py, or, with --data, "
                                               "checkpoints and chat:MODEL")
    add_flags(parser, Config)
    add_flags(parser, Chat, SERVER)
    return parser


help_first(__name__, flags)                            # before torch, which takes a second

import numpy as np
import scipy.special
import torch
import torch.distributed as dist

from losses import ANSWER, LOSSES, RESPONSE, Scores, logratios, margin, score
from model import SentenceEncoder, fingerprint, load_model

VOLATILE = ("out", "resume", "overwrite", "device", "micro_batch", "log_every", "compile",
            "checkpointing", "dry_run", "shard_optimizer")     # flags that leave a run what it is
KINDS = ("majority", "minority", "other")


# ---------------------------------------------------------------------------------------------
# Scoring rows with a model (used by train.py too)

def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def setup(device):
    """Join the process group under torchrun; returns this process's torch.device."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=timedelta(hours=3))   # others wait while one fetches
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
    return (torch.device("cuda", torch.cuda.current_device()) if device == "cuda"
            else torch.device("cpu"))


def leave():
    """The end of a process of torchrun: all wait for each other, then it is gone at once, for
    torch's threads abort a process now and then while Python takes leave of them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def on_first_rank(action):
    """Run `action` on rank 0 while the others wait; all get its result, or raise its error."""
    outcome = [None, None]
    if rank_and_size()[0] == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as e:
            outcome[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise ValueError(outcome[1])
    return outcome[0]


def gather(values):
    """The processes' lists as one, on all of them."""
    everyone = [None] * rank_and_size()[1]
    if not dist.is_initialized():
        return values
    dist.all_gather_object(everyone, values)
    return sum(everyone, [])


def device_of(name):
    """"auto", "cpu" or "cuda" -> the device that is there; ValueError if it is not."""
    if name not in ("auto", "cpu", "cuda") or name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} is not here: say --device cpu, or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def load_torch(path):
    """A file of torch.save, weights alone, on the CPU; ValueError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as e:                             # of many kinds, by how the file is broken
        raise ValueError(f"{path} is damaged ({type(e).__name__}): begin the run again with "
                         "--overwrite") from None


def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def to_tensors(batch, device):
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()}


@torch.no_grad()
def score_rows(model, items, branches, classes, dtype="float32", desc="scoring", tokens=16384):
    """Scores of all items, in their order, on the CPU: batches of like length, of about `tokens`
    tokens, dealt out over the ranks and gathered; every row once, however uneven the shares."""
    rank, size = rank_and_size()
    device = model.head.device
    lengths = [cost(i, branches) for i in items]
    mine = sorted(range(len(items)), key=lambda i: (lengths[i], i))[rank::size]
    parts, start = [], 0
    bar = progress(total=len(mine), desc=desc, unit="row", leave=False, disable=rank > 0, delay=1)
    while start < len(mine):
        stop = start + 1
        while (stop < len(mine)
               and (stop + 1 - start) * lengths[mine[stop]] <= tokens):
            stop += 1
        index = mine[start:stop]
        batch = to_tensors(collate([items[i] for i in index], branches, classes), device)
        with autocast(device, dtype):
            s = score(model, model.head, batch)
        parts.append((index, {f.name: getattr(s, f.name).float().cpu() for f in fields(s)
                              if getattr(s, f.name) is not None}))
        bar.update(stop - start)
        start = stop
    bar.close()
    parts = gather(parts)
    place = torch.tensor([i for index, _ in parts for i in index]).argsort()
    return Scores(**{k: torch.cat([p[k] for _, p in parts])[place] for k in parts[0][1]})


def jsd(p, q):
    """Jensen-Shannon distance of distributions along the last axis: square root, natural log,
    float64, both normalised to 1; between 0 and sqrt(log 2) = 0.8326."""
    p, q = (np.asarray(x, np.float64) for x in (p, q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    m = (p + q) / 2
    divergence = (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m)).sum(-1) / 2
    return np.sqrt(np.maximum(divergence, 0))          # scipy's own gives NaN where p is nearly q


def belief_metrics(s):
    """JSD of the model's class distribution to the target, and its class mass: {name: (B,)}."""
    q = s.class_logps.double().exp().numpy()
    if not np.isfinite(q).all():
        raise FloatingPointError("the model's log-probs are not finite: its training diverged")
    return {"jsd": jsd(q, s.target.numpy()), "class_mass": q.sum(-1)}


def ordinal_metrics(q, p, meta):
    """What JSD does not see: {name: (B,)} of distributions q (model) and p (target), (B, K).
    w1: Wasserstein distance over the ordered classes, of what is on the scale, 0 to 1; off_gap:
    distance of the shares off the scale; minority: the model's share of the smallest class of the
    target, as a ratio to the target's. NaN where there is none."""
    q, p = (np.asarray(x, np.float64) for x in (q, p))
    on = np.array([c != meta.get("off_scale") for c in meta["classes"]])
    with np.errstate(invalid="ignore", divide="ignore"):
        q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
        cdf = [(x[:, on] / x[:, on].sum(-1, keepdims=True)).cumsum(-1) for x in (q, p)]
    out = {"w1": np.abs(cdf[0] - cdf[1]).sum(-1) / (on.sum() - 1)}
    if not on.all():
        out["off_gap"] = np.abs((q - p)[:, ~on]).sum(-1)
    smallest = np.where(p > 0, p, np.inf).argmin(-1)[:, None]
    return out | {"minority": (np.take_along_axis(q, smallest, 1)
                               / np.take_along_axis(p, smallest, 1))[:, 0]}


def recalibrated(fit_logq, fit_p, logq, p):
    """What recalibration without training reaches: JSD (B,) to p of the class distribution logq
    (B, K), after one temperature, and after a temperature and a bias for each class, which are
    fitted by cross-entropy on other rows (fit_logq, fit_p)."""
    def adjusted(x, logq):
        return scipy.special.log_softmax(logq / np.exp(x[0]) + np.append(x[1:], 0)[-logq.shape[1]:],
                                         axis=-1)

    def cost(x):
        return -(fit_p * adjusted(x, fit_logq)).sum(-1).mean()
    from scipy import optimize                         # here: it would slow every start
    fit_p, K = fit_p / fit_p.sum(-1, keepdims=True), logq.shape[1]
    one = optimize.minimize_scalar(lambda t: cost(np.append(t, np.zeros(K))),
                                         bounds=(-5, 5), method="bounded").x
    both = optimize.minimize(cost, np.append(one, np.zeros(K))).x
    return {"jsd_t": jsd(np.exp(adjusted(np.append(one, np.zeros(K)), logq)), p),
            "jsd_bias": jsd(np.exp(adjusted(both, logq)), p)}


def margin_metrics(s, beta):
    """Reward margins (B,) in nats of the two kinds: "joint", belief and answer together, each with
    its own belief, as DPO trains them; "given", the answer alone after the accepted belief, as GDPO
    does. s has the branches of EVAL_BRANCHES and a reference."""
    joint, given = logratios(s, ANSWER), logratios(s, [RESPONSE])
    return {"joint": margin(joint[:, 0], joint[:, 1], beta).double().numpy(),
            "given": margin(given[:, 0], given[:, 2], beta).double().numpy()}


def by_kind(metrics, items):
    """{name: (B,)} -> {name_majority, name_minority, name_other: (B,)}, NaN where not that kind."""
    kinds = np.array([i.kind for i in items])
    return {f"{name}_{kind}": np.where(kinds == kind, values, np.nan)
            for name, values in metrics.items() for kind in KINDS}


def eval_metrics(s, items, loss, o):
    """Means over the eval split for the log: the loss and its parts, JSD, class mass, margins."""
    at = [EVAL_BRANCHES.index(b) for b in loss.branches]
    values, parts = loss.objective(replace(s, logps=s.logps[:, at], counts=s.counts[:, at],
                                           ref=None if s.ref is None else s.ref[:, at]), o)
    rows = {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1)}
    rows = {k: v.double().numpy() for k, v in rows.items()} | belief_metrics(s)
    if s.ref is not None:
        rows |= by_kind(margin_metrics(s, o.beta), items)
    return {k: mean(v) for k, v in rows.items()}


def mean(values):
    """Mean of the entries that are numbers, or None where there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


# ---------------------------------------------------------------------------------------------
# The reference distributions of Figure 4

def reference_distributions(target):
    """name -> (B, K): what a model without training would say. target (B, K) float64."""
    target = np.asarray(target, np.float64)
    B, K = target.shape
    rows, top, bottom = np.arange(B), target.argmax(-1), target.argmin(-1)
    majority = np.zeros_like(target)
    majority[rows, top] = 1
    order, reverse = np.argsort(target, -1, kind="stable"), np.empty_like(target)
    # differs: the authors' code sorts the shares; as in the text, the largest is swapped with the
    # smallest, the second largest with the second smallest, and so on.
    for i in range(K):
        reverse[rows, order[:, i]] = target[rows, order[:, K - 1 - i]]
    out = {"majority": majority, "reverse": reverse, "uniform": np.full_like(target, 1 / K)}
    for level in (0.05, 0.1):
        noisy = target.copy()
        noisy[rows, top] -= level
        noisy[rows, bottom] += level
        out[f"noise({level})"] = noisy
    return out


# ---------------------------------------------------------------------------------------------
# Sampled answers

def batch_rows(model, tokens, dtype, most=512):
    """How many rows of so many tokens to sample at once: their keys and values take half of the
    GPU's free memory, or 4 GB of a CPU's, at most."""
    room = torch.cuda.mem_get_info()[0] / 2 if model.head.is_cuda else 4e9
    token = 2 * model.cfg.n_layer * model.cfg.n_embd * (2 if dtype == "bfloat16" else 4)
    return max(1, min(most, int(room / (tokens * token))))


@torch.no_grad()
def sample_rows(model, items, tokenizer, o, dtype, path):
    """o.samples answers to every item's prompt, at temperature 1 from all tokens (section 5.1.1): a
    list of lists of texts. Dealt out over the ranks; an answer's randomness depends on the seed,
    its row and its number alone. path: where answers are kept, for a killed evaluation to go on."""
    rank, size = rank_and_size()
    same = [fingerprint(model), [(i.row, i.prompt) for i in items], o.max_new_tokens, o.seed, dtype]
    key = hashlib.sha256(repr(same).encode()).hexdigest()[:16]
    kept = on_first_rank(lambda: kept_answers(path, lambda theirs: theirs == key))
    known = {(i, k): text for _, i, k, text in kept}
    order = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), i))
    jobs = [[(i, k) for k in range(o.samples) if (i, k) not in known] for i in order]
    jobs = [several for several in jobs if several]    # a row's answers stay together: one prefill
    mine, new = [job for several in jobs[rank::size] for job in several], []
    longest = max(len(i.prompt) for i in items) + o.max_new_tokens
    batch = batch_rows(model, min(longest, model.cfg.n_ctx), dtype)
    batch = max(batch - batch % o.samples, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = progress(total=len(mine), desc="sampling", unit="answer", leave=False, delay=1,
                   disable=rank > 0)
    with open(f"{path}.{rank}", "a") if mine else nullcontext() as f:
        for start in range(0, len(mine), batch):
            part = mine[start:start + batch]
            with autocast(model.head.device, dtype):
                ids = model.generate([items[i].prompt for i, _ in part], o.max_new_tokens, 1.0,
                                     tokenizer.eos, [(o.seed, items[i].row, k) for i, k in part],
                                     tokenizer.n_tokens)
            several = [(job, tokenizer.decode(x)) for job, x in zip(part, ids)]
            new += several
            f.writelines(json.dumps([key, *job, text]) + "\n" for job, text in several)
            f.flush()
            bar.update(len(part))
    bar.close()
    known |= dict(gather(new))
    if jobs and rank == 0:
        others = kept_answers(path, lambda theirs: theirs != key)     # another split, say
        write(path, "".join(json.dumps(line) + "\n" for line in others
                            + [[key, *job, known[job]] for job in sorted(known)]))
        for half in path.parent.glob(f"{path.name}.[0-9]*"):
            half.unlink()
    return [[known[i, k] for k in range(o.samples)] for i in range(len(items))]


def kept_answers(path, wanted):
    """[[key, item, number, text], ...] that earlier evaluations left under the wanted keys."""
    found = []
    for file in (path, *path.parent.glob(f"{path.name}.[0-9]*")):
        for line in file.read_text().split("\n") if file.is_file() else ():
            try:
                key, i, k, text = json.loads(line)
                if wanted(key):
                    found.append([key, i, k, text])
            except ValueError:
                pass                                   # the half line of a killed evaluation
    return found


def parse_answer(text, meta):
    """(class label, belief text, response) of a sampled answer; None for a part that is not there.
    The belief is one that the dataset knows, or whatever stands before the first `>`."""
    labels = sorted(meta["classes"], key=len, reverse=True)
    label = next((c for c in labels if text.startswith(c)), None)
    rest = text[len(label or ""):]
    known = [t for t in meta.get("belief_to_class") or () if rest.startswith(f"<{t}>")]
    belief = max(known, key=len) if known else (re.match("<(.*?)>", rest, re.S) or [None, None])[1]
    return label, belief, rest if belief is None else rest[len(belief) + 2:]


def sampled_counts(answers, meta):
    """How often each class begins the answers: (B, K). An answer that begins with no class label
    counts for the class off the scale, or for none where there is no such class."""
    classes = meta["classes"]
    counts = np.zeros((len(answers), len(classes)))
    for row, several in enumerate(answers):
        for label, _, _ in several:
            label = label or meta.get("off_scale")
            if label is not None:
                counts[row, classes.index(label)] += 1
    return counts


def class_belief_consistency(answers, meta):
    """CBC of section 5.1.1 (B,): how often the belief's text maps back to the class before it."""
    to_class = meta["belief_to_class"]
    return np.array([np.mean([label is not None and str(to_class.get(belief)) == label
                              for label, belief, _ in several]) for several in answers])


def expressed_opinion(answers, meta):
    """Whether each response expresses the class that the model announced (B, k), by the rule of the
    templates: the first stance phrase in it is one of that class's. No phrase: not expressed."""
    stances = {phrase.lower(): label for phrase, label in meta["stances"].items()}
    longest = sorted(stances, key=len, reverse=True)
    find = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in longest))

    def expresses(label, response):
        phrase = find.search(response.lower())
        return phrase is not None and stances[phrase[0]] == label
    return np.array([[float(expresses(label, response)) for label, _, response in several]
                     for several in answers])


def coverage(counts, target, k):
    """Coverage@k (B,): how many of the classes that the group holds occur among k answers, counted
    in counts (B, K), as a ratio to what a perfect sampler's k answers would cover."""
    p = target / target.sum(-1, keepdims=True)
    return ((counts > 0) & (p > 0)).sum(-1) / (1 - (1 - p) ** k).sum(-1)


def sampling_floor(target, n_samples, draws=64):
    """JSD (B,) that n_samples answers of a perfect model would score: the mean over `draws`
    multinomial draws from the target itself."""
    rng = np.random.default_rng(0)
    p = target / target.sum(-1, keepdims=True)
    return np.mean([jsd(rng.multinomial(n_samples, p), p) for _ in range(draws)], axis=0)


def answer_metrics(answers, target, meta):
    """{name: (B,)} of parsed answers [[(label, belief, response), ...], ...]; target (B, K). An
    answer without a class, where none is off the scale, is one of a class that nobody holds."""
    counts, k = sampled_counts(answers, meta), len(answers[0])
    none = k - counts.sum(-1, keepdims=True)
    out = {"sampled_jsd": jsd(np.append(counts, none, 1), np.pad(target, ((0, 0), (0, 1)))),
           "sampling_floor": sampling_floor(target, k), "coverage": coverage(counts, target, k),
           "no_class": np.array([np.mean([label is None for label, *_ in several])
                                 for several in answers])}
    if meta.get("belief_to_class"):
        out["cbc"] = class_belief_consistency(answers, meta)
    if meta.get("stances"):
        out["opinion"] = expressed_opinion(answers, meta).mean(-1)
    return out


# ---------------------------------------------------------------------------------------------
# Judges of the responses: an LLM (BPC), a sentence encoder (RS)

BPC = """For the following QA pair, does the answer express the opinion of the selection: {belief}

Question: {question}

Answer: {answer}

Response in the following format:
Yes or No
One Sentence Explanation"""
RATING = """You are a film critic. Read the following comment carefully and predict the rating the \
viewer would give to the film. The rating should be a single number between 1 and 3, where:
1 means they disliked the film,
2 means they thought the film was okay or average,
3 means they loved the film.
Only provide the rating without any additional explanation. Here is the comment: {answer}"""
MOST_FAILURES = 0.05                   # above this share of unreadable judgements no mean is given


def three_classes(label):
    """Appendix H: ratings 1 and 2, 3, 4 and 5 as classes 1, 2, 3."""
    return {"1": 1, "2": 1, "3": 2, "4": 3, "5": 3}.get(label)


YES_OR_NO = re.compile(r"[\W_]*(?:answer[\W_]+)?(yes|no)\b(?![\s,]*(/|or\b|and\b|yes\b|no\b))",
                       re.I)


def judge(client, model, asked, desc="judging"):
    """What an LLM says of [(question, belief or None, answer), ...]: 1.0 or 0.0 where the answer
    has a belief to express, the rating 1.0 to 3.0 of a review otherwise; NaN where its reply cannot
    be read or is a refusal. Appendix H's prompts."""
    prompts = [BPC.format(question=q, belief=b, answer=a) if b else RATING.format(answer=a)
               for q, b, a in asked]
    said = []
    for (_, belief, _), (text, ended) in zip(asked, chat(client, prompts, desc, llm=model,
                                                         temperature=0.0)):
        text = re.sub(r"(?s)^\s*<think>.*</think>", "", text)
        yes, rating = YES_OR_NO.match(text), re.fullmatch(r"[^\w-]*([123])\W*", text)
        said.append(np.nan if ended == "refusal" else
                    float(yes[1].lower() == "yes") if belief and yes else
                    float(rating[1]) if rating and not belief else np.nan)
    return np.array(said)


def belief_preference_consistency(answers, rows, client, model):
    """BPC (B, k): whether an LLM finds the announced belief in the response; and which of them it
    was asked, (B, k). An answer without a belief or a response is inconsistent, unasked; a failed
    judgement is NaN."""
    out, asked, where = np.zeros((len(answers), len(answers[0]))), [], []
    for i, (row, several) in enumerate(zip(rows, answers)):
        for k, (label, belief, response) in enumerate(several):
            has_text = bool(row.get("accept_choice"))
            if (belief if has_text else label) and response.strip():
                asked.append((row["prompt"], belief if has_text else None, response))
                where.append((i, k, label))
    was_asked = np.zeros(out.shape, bool)
    for (i, k, label), (_, belief, _), value in zip(where, asked, judge(client, model, asked)):
        was_asked[i, k] = True
        out[i, k] = value if belief or np.isnan(value) else value == three_classes(label)
    return out, was_asked


def too_many(failed):
    """Whether so many judgements failed, a boolean array, that no mean may be given."""
    return bool(len(failed)) and failed.mean() > MOST_FAILURES


def check_judge(rows, client, model, n):
    """How well the judge tells the ratings of n labelled reviews (Appendix H): a line."""
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]
    truth = np.array([three_classes(str(r["accept_choice_id"])) for r in rows], float)
    if np.isnan(truth).any() or rows[0].get("accept_choice"):
        raise ValueError("--judge_check is for reviews, whose classes are the ratings 1 to 5")
    said = judge(client, model, [("", None, r["accept_response"]) for r in rows], "checking judge")
    good = ~np.isnan(said)
    if too_many(~good):
        return (f"{model} on labelled reviews: {(~good).sum()} of {len(rows)} judgements failed, "
                f"more than {MOST_FAILURES:.0%}: no accuracy is given")
    f1 = 0.0
    for c in (1, 2, 3):                                # weighted by how often a class is true
        hits, true, told = (x[good].sum() for x in ((said == c) & (truth == c), truth == c,
                                                    said == c))
        f1 += 2 * hits / max(1, true + told) * true / good.sum()
    return (f"{model} on {good.sum()} labelled reviews in 3 classes: accuracy "
            f"{(said == truth)[good].mean():.3f}, weighted F1 {f1:.3f}; {(~good).sum()} failed")


def embedder(o, client, device):
    """A function from texts to unit vectors (N, C): --embeddings is api:MODEL, or an encoder."""
    if o.embeddings.startswith("api:"):
        url, headers = endpoint(client.o, "embeddings")

        def read(response):
            try:
                answer = response.json()
                found = {d["index"]: d["embedding"] for d in answer["data"]}
                n = len(json.loads(response.request.body)["input"])
                return [found[i] for i in range(n)], usage_of(answer)
            except (KeyError, TypeError, AttributeError):
                raise unreadable("an embedding of each input", response.text) from None

        def embed(texts):
            bodies = [{"model": o.embeddings[4:], "input": texts[i:i + 64]}
                      for i in range(0, len(texts), 64)]
            vectors = np.array(sum(client.ask("POST", url, bodies, read, "embeddings",
                                              headers=headers), []))
            return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        return embed
    folder = find_checkpoint(o.embeddings)
    encoder, tokenizer = SentenceEncoder.load(folder, device), WordPiece(folder)
    return lambda texts: encode_texts(encoder, tokenizer, texts, device)


@torch.no_grad()
def encode_texts(encoder, tokenizer, texts, device, batch=64):
    ids = [torch.tensor(tokenizer.encode(t)) for t in texts]
    order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
    for start in range(0, len(order), batch):
        part = [ids[i] for i in order[start:start + batch]]
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        out.append(encoder(padded, torch.tensor([len(x) for x in part], device=device)).cpu())
    return torch.cat(out)[np.argsort(order)].numpy()


def response_similarity(answers, rows, embed):
    """RS (B, k): cosine of each response to one of the dataset that expresses the announced belief
    on the same question: the row's own if it has it, else the first. 0 where the belief is none of
    the question's or nothing is said; NaN where the dataset has no such response."""
    references = {}
    for row in rows:
        for side in ("accept", "reject"):
            known = references.setdefault((question_of(row), row.get(f"{side}_choice")), {})
            known.setdefault(row["prompt"], row[f"{side}_response"])
    pairs, out = [], np.zeros((len(answers), len(answers[0])))
    for i, (row, several) in enumerate(zip(rows, answers)):
        for k, (_, belief, response) in enumerate(several):
            known = references.get((question_of(row), belief))
            if belief in row["options"] and response.strip():
                if known:
                    pairs.append((i, k, response, known.get(row["prompt"],
                                                            next(iter(known.values())))))
                else:
                    out[i, k] = np.nan
    texts = list(dict.fromkeys(t for *_, a, b in pairs for t in (a, b)))
    vectors = dict(zip(texts, embed(texts))) if texts else {}
    for i, k, a, b in pairs:
        out[i, k] = vectors[a] @ vectors[b]
    return out


def mean_over_answers(values):
    """(B, k) -> (B,), failures (NaN) aside."""
    n = (~np.isnan(values)).sum(-1)
    return np.where(n > 0, np.nansum(values, -1) / np.maximum(n, 1), np.nan)


# ---------------------------------------------------------------------------------------------
# One run on one dataset

def read_run(out, o):
    """The flags of the run in OUT; of a checkpoint that is no run (a folder, a name on the hub),
    the few that stand for them."""
    if (Path(out) / "metrics.jsonl").is_file():
        config = read_json(Path(out) / "config.json")
        missing = {"loss", "data", "init", "beta", "dtype", "max_length", "overlong"} - set(config)
        if missing:
            raise ValueError(f"{out}/config.json lacks {sorted(missing)}: it is no run's")
        return config
    if not o.data:
        raise ValueError(f"{out} is not the folder of a run (no metrics.jsonl): give the OUT of "
                         "train.py, or, for a checkpoint or chat:MODEL, --data DIR as well")
    return {"loss": "", "model": out, "init": "", "data": o.data, "form": o.form, "max_length": 0,
            "overlong": "error", "dtype": "bfloat16" if o.device == "cuda" else "float32"}


def home(out, config, data):
    """Where results are kept: the run's folder; of a checkpoint or chat:MODEL one of its own."""
    if config["loss"]:
        return Path(out)
    return Path("out") / f"{dataset_name(data)}-{re.sub('[/:]+', '-', out.strip('/'))}"


class Evaluation:
    """What runs on one dataset share: its rows, and the reference's log-probs by checkpoint."""
    def __init__(self, data, form, split):
        self.meta, rows = load_dataset(data, dict.fromkeys(("train", "eval", split)), form)
        self.name, self.rows, self.eval_rows = f"{data}/{split}.jsonl", rows[split], rows["eval"]
        self.data, self.references = data, {}
        self.trained = {data: {question_of(r) for r in rows["train"]}}

    def trained_on(self, data, form):
        """The questions of another dataset's training split."""
        if data not in self.trained:
            rows = load_dataset(data, ("train",), form)[1]["train"]
            self.trained[data] = {question_of(r) for r in rows}
        return self.trained[data]

    def score(self, folder, device, run_config):
        """(model, tokenizer, items, Scores over EVAL_BRANCHES, Scores of the eval split)."""
        folder = find_checkpoint(str(folder))
        model, tokenizer = load_model(folder, device), Tokenizer.load(folder)
        ids = class_ids(tokenizer, self.meta["classes"])
        limit = min(run_config["max_length"] or model.cfg.n_ctx, model.cfg.n_ctx)
        dtype, scores = run_config["dtype"], []
        for rows, branches in ((self.rows, EVAL_BRANCHES), (self.eval_rows, ("chosen",))):
            items = encode_rows(rows, tokenizer, self.meta, limit, run_config["overlong"],
                                self.name)
            scores.append((items, score_rows(model, items, branches, ids, dtype)))
        return model, tokenizer, *scores[0], scores[1][1]

    def measure(self, out, o, run_config, device):
        """({metric: (B,)} of one run, its items, its answers)."""
        is_run = bool(run_config["loss"])
        folder = Path(out) / o.checkpoint if is_run else out
        if is_run and not folder.is_dir():
            raise FileNotFoundError(f"{out} has no {o.checkpoint}/ yet: finish the run with "
                                    "--resume")
        model, tokenizer, items, s, fit = self.score(folder, device, run_config)
        metrics = belief_metrics(s) | ordinal_metrics(s.class_logps.exp(), s.target, self.meta)
        metrics |= recalibrated(*(x.double().numpy() for x in (
            fit.class_logps, fit.target, s.class_logps, s.target)))
        if run_config["init"]:
            s.ref = self.reference(out, device, run_config)
            metrics |= by_kind(margin_metrics(s, run_config["beta"]), items)
        answers = None
        if o.samples:
            texts = sample_rows(model, items, tokenizer, o, run_config["dtype"],
                                home(out, run_config, self.data) / "samples.jsonl")
            answers = [[parse_answer(t, self.meta) for t in several] for several in texts]
            metrics |= answer_metrics(answers, s.target.double().numpy(), self.meta)
        return metrics, items, answers

    def measure_chat(self, model, client):
        """The same of a chat model, prompted with the rows' few-shot context as in Appendix E, at
        temperature 0: one answer a row."""
        if not all(r.get("context") for r in self.rows):
            raise ValueError(f"{self.name} has no few-shot context: make it with `synth.py icf`")
        prompts = ["".join(r["context"]) + prompt_text(r, self.meta["form"]) for r in self.rows]
        texts = chat(client, prompts, model, llm=model, temperature=0.0)
        answers = [[parse_answer(text.strip(), self.meta)] for text, _ in texts]
        target = np.array([r["probabilities"] for r in self.rows])
        items = [make_item(n, r, self.meta["classes"], [], list, list)
                 for n, r in enumerate(self.rows)]
        metrics = answer_metrics(answers, target, self.meta)
        return metrics | ordinal_metrics(sampled_counts(answers, self.meta), target,
                                         self.meta), items, answers

    def judged(self, metrics, items, answers, o, client, embed):
        """Adds BPC and RS to metrics, as far as they are asked for; returns the numbers of
        judgements, for eval.json, and what is to be said of them."""
        rows = [self.rows[i.row] for i in items]
        if embed and all(r.get("accept_choice") for r in rows):
            metrics["rs"] = mean_over_answers(response_similarity(answers, rows, embed))
        if not o.judge:
            return {}, []
        bpc, asked = belief_preference_consistency(answers, rows, client, o.judge)
        failed = np.isnan(bpc[asked])
        counts = {"judge": o.judge, "answers": bpc.size, "asked": int(asked.sum()),
                  "failed": int(failed.sum())}
        note = f"BPC by {o.judge}: {failed.sum()} of {asked.sum()} judgements failed"
        if too_many(failed):
            note += f", more than {MOST_FAILURES:.0%}: no mean is given"
            bpc[:] = np.nan
        metrics["bpc"] = mean_over_answers(bpc)
        read = asked & ~np.isnan(bpc)
        if self.meta.get("stances") and read.any():
            counts["agreement"] = float((bpc == expressed_opinion(answers, self.meta))[read].mean())
            note += (f"; it agrees with the templates' rule on {counts['agreement']:.1%} of "
                     f"{read.sum()}")
        return counts, [note]

    def reference(self, out, device, run_config):
        """Log-probs under the checkpoint that the run in OUT began with, which must still be it."""
        init = run_config["init"]
        key = (init, run_config["dtype"], run_config["max_length"], run_config["overlong"])
        if key not in self.references:
            model, _, _, s, _ = self.score(init, device, run_config)
            self.references[key] = s.logps, fingerprint(model)
        logps, now = self.references[key]
        if load_torch(Path(out) / "reference.pt")["init"] != now:
            raise ValueError(f"{init} is not any more the checkpoint that {out} began with: train "
                             "the run again, or put that checkpoint back")
        return logps

    def samples(self, items, answers, n=3):
        """Of n rows what the model was asked, the group's shares, and an answer: for Table 3."""
        if not answers:
            return []
        several = [len(items) * k // n for k in range(n)]
        return [{k: self.rows[items[i].row][k] for k in ("prompt", "options", "probabilities")}
                | dict(zip(("class", "belief", "response"), answers[i][0])) for i in several]


# ---------------------------------------------------------------------------------------------
# Tables over runs

LESS_IS_BETTER = ("jsd", "jsd_t", "jsd_bias", "w1", "off_gap", "sampled_jsd", "sampling_floor",
                  "no_class")
BELIEFS = {"jsd": "JSD", "jsd_t": "JSD, T fit", "jsd_bias": "JSD, T+b fit", "w1": "W1",
           "off_gap": "off-scale gap", "minority": "minority mass", "class_mass": "mass"}
ANSWERS = {"sampled_jsd": "sampled JSD", "sampling_floor": "its floor", "coverage": "coverage",
           "no_class": "no class", "cbc": "CBC", "bpc": "BPC", "rs": "RS", "opinion": "opinion"}
MARGINS = {f"{kind}_{k}": f"{kind} {k}" for kind in ("joint", "given") for k in KINDS}


def interval(values, questions):
    """(mean, low, high): 95% bootstrap interval over questions, each with all its rows."""
    good = ~np.isnan(values)
    if not good.any():
        return None
    _, index = np.unique(np.asarray(questions)[good], return_inverse=True)
    sums, counts = np.bincount(index, values[good]), np.bincount(index)
    ratio = lambda s, c, axis=-1: s.sum(axis) / c.sum(axis)
    if len(sums) < 2:
        return [float(ratio(sums, counts))] * 3
    from scipy import stats                            # here: it would slow every start
    b = stats.bootstrap((sums, counts), ratio, paired=True, vectorized=True, n_resamples=2000,
                              method="percentile", random_state=0).confidence_interval
    return [float(ratio(sums, counts)), float(b.low), float(b.high)]


def summary(metrics, items, trained):
    """{part: {metric: [mean, low, high]}}: "seen", questions with a paraphrase in training, and
    "unseen", never trained on; of several groups also each, and for each metric the worst."""
    questions, groups = (np.array([getattr(i, k) for i in items]) for k in ("question", "group"))
    seen = np.array([q in trained for q in questions])
    parts = {"seen": seen, "unseen": ~seen}
    if len(set(groups)) > 1:
        parts |= {f"group {g}": groups == g for g in sorted(set(groups))}
    out = {name: {"rows": int(mask.sum()), "questions": len(set(questions[mask])),
                  **{k: interval(v[mask], questions[mask]) for k, v in metrics.items()}}
           for name, mask in parts.items() if mask.any()}
    several = [v for name, v in out.items() if name.startswith("group ")]
    if several:
        out["worst group"] = {k: worst(k, [v[k] for v in several if v[k]]) for k in metrics}
    return out


def worst(metric, values):
    """Of [[mean, low, high], ...] the worst: the largest distance, the ratio farthest from 1, or
    the smallest of a metric where more is better."""
    how_bad = (lambda v: abs(v[0] - 1)) if metric in ("minority", "coverage") else (
        lambda v: v[0] if metric in LESS_IS_BETTER else -v[0])
    return max(values, key=how_bad, default=None)


def difference(metrics, base, questions):
    """{metric: [mean, low, high]} of what a run has more than another on the same rows."""
    return {k: interval(metrics[k] - base[k], questions) for k in metrics if k in base}


def table(results, part, columns):
    """One line per run of mean and half-width of its interval, or per loss where seeds repeat."""
    width = max(map(len, results))
    lines = [f"{'':{width}}" + "".join(f"{text:>15}" for text in columns.values())]
    for name, result in results.items():
        cells = [result.get(part, {}).get(k) for k in columns]
        lines.append(f"{name:{width}}" + "".join(
            f"{'-' if c is None else f'{c[0]:.3f} ±{(c[2] - c[1]) / 2:.3f}':>15}" for c in cells))
    return "\n".join(lines)


def over_seeds(results, configs):
    """Results of runs that differ in their seed alone -> {name (n seeds): mean and spread}, the
    spread one standard deviation over seeds, shown in the place of the interval."""
    groups = {}
    for out, result in results.items():
        same = {k: v for k, v in configs[out].items() if k not in (*VOLATILE, "seed", "init")}
        group = groups.setdefault(json.dumps(same, sort_keys=True), {})
        group.setdefault(configs[out].get("seed"), (out, result))
    merged = {}
    for key, by_seed in groups.items():
        several = [result for _, result in by_seed.values()]
        if len(several) > 1:
            first = next(iter(by_seed.values()))[0]
            merged[f"{re.sub('-?seed[0-9]+$', '', first)} ({len(several)} seeds)"] = {part: {
                k: spread([r[part][k][0] for r in several]) for k in several[0][part]
                if k not in ("rows", "questions") and all(r.get(part, {}).get(k) for r in several)}
                for part in several[0]}
    return merged


def spread(values):
    m, sd = np.mean(values), np.std(values, ddof=1)
    return [m, m - sd, m + sd]


LEGEND = """± half of the 95% bootstrap interval over questions. JSD, T fit: of the same model after
one temperature, or a temperature and biases (T+b), fitted on the eval split. W1: Wasserstein over
the ordered classes, 0 to 1. minority mass: the model's share of the smallest class, as a ratio to
the group's. its floor: the sampled JSD of a perfect model. coverage: of the group's classes among
the samples, as a ratio to a perfect sampler's. no class: answers that begin with no class.
joint: belief and answer, each with its own belief; given: the answer after the accepted belief."""


def report(results, configs, evaluations, o):
    merged = over_seeds(results, configs)
    for part in dict.fromkeys(part for r in results.values() for part in r):
        sizes = {(r[part]["rows"], r[part]["questions"]) for r in results.values()
                 if "rows" in r.get(part, {})}
        counts = " and ".join(f"{n} {o.split} rows, {q} questions" for n, q in sorted(sizes))
        counts = f": {counts}" if counts else ", metric by metric"
        name = {"seen": "seen questions (other wordings are in the training split)",
                "unseen": "unseen questions"}.get(part, part)
        print(f"\n{name}{counts}; the runs' {o.checkpoint} weights"
              + f"; {o.samples} samples a row" * bool(o.samples))
        for columns in (BELIEFS, ANSWERS, MARGINS):
            columns = {k: v for k, v in columns.items()
                       if any(r.get(part, {}).get(k) for r in results.values())}
            if columns:
                print(table(results, part, columns))
                if merged:
                    print("mean ± standard deviation over seeds\n" + table(merged, part, columns))
    for (data, _), e in evaluations.items():           # Figure 4's reference distributions
        target = np.array([r["probabilities"] for r in e.rows])
        print(f"\n{data}: JSD without training: " + ", ".join(
            f"{name} {jsd(q, target).mean():.3f}"
            for name, q in reference_distributions(target).items()))
    print(LEGEND)


def print_differences(rows, base):
    """The paired differences of all runs to one, where they have the same rows."""
    metrics, questions, same = rows[base]
    shown = {k: v for columns in (BELIEFS, ANSWERS) for k, v in columns.items() if k in metrics}
    found = {out: {"all": difference(m, metrics, questions)} for out, (m, _, r) in rows.items()
             if out != base and r == same}
    if found:
        print(f"\ndifference to {base} on the same rows\n" + table(found, "all", shown))
    for out in set(rows) - set(found) - {base}:
        print(f"{out} was measured on other rows than {base}: no difference")


# ---------------------------------------------------------------------------------------------
# Figures and tables of the paper, from metrics.jsonl and eval.json alone

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
DASHES = ["-", "--", "-.", ":"]


def read_history(out):
    """(config, {examples: eval metrics}, {name: JSD without training}, eval.json or None) of a run,
    or of a checkpoint that was evaluated, which has no history."""
    config, log = read_json(Path(out) / "config.json"), Path(out) / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []      # a half one is no line
    lines = [json.loads(x) for x in lines]
    evals = {x["step"] * config["batch_size"]: x["eval"] for x in lines if "eval" in x}
    reference = next((x["reference_jsd"] for x in lines if "reference_jsd" in x), {})
    measured = Path(out) / "eval.json"
    return config, evals, reference, read_json(measured) if measured.is_file() else None


def methods(outs):
    """Runs that differ in their seed alone are one method: {(data, label): [history, ...]}."""
    groups = {}
    for out in outs:
        if not (Path(out) / "config.json").is_file():
            raise ValueError(f"{out} is not the folder of a run (no config.json)")
        history = read_history(out)
        same = {k: v for k, v in history[0].items() if k not in (*VOLATILE, "seed", "init")}
        _, several = groups.setdefault(json.dumps(same, sort_keys=True), (out, []))
        if all(h[0].get("seed") != history[0].get("seed") for h in several):
            several.append(history)
    several_models = len({h[0][0]["model"] for _, h in groups.values() if h[0][0]["loss"]}) > 1
    found = {}
    for out, histories in groups.values():
        config, result = histories[0][0], histories[0][3]
        label = config["loss"] or Path(config["model"]).name
        label += f" ({Path(config['model']).name})" * (several_models and bool(config["loss"]))
        data = dataset_name(result["data"] if result else config["data"])
        found.setdefault((data, label), []).append((out, histories))
    named = {}
    for (data, label), several in found.items():
        for out, histories in several:
            odd = settings(histories, [h for _, h in several], [h for _, h in groups.values()])
            named[data, label + odd] = histories
    if len(named) < len(groups):
        raise ValueError("two of these runs differ in nothing that a label could show")
    how = {tuple(h[3][k] for k in ("split", "checkpoint")) for hs in named.values() for h in hs
           if h[3]}
    if len(how) > 1:
        raise ValueError(f"these runs were evaluated in different ways ({sorted(how)}): evaluate "
                         "them again in one command")
    return named


def settings(histories, same, all_runs):
    """What tells a method from others of the same loss: the flags in which these differ, where it
    has not what most runs have."""
    config, text = histories[0][0], ""
    for k in config:
        told = {str(h[0][0].get(k)) for h in same}
        if len(told) > 1 and k not in (*VOLATILE, "seed", "init", "pref"):
            values = [str(h[0][0].get(k)) for h in all_runs]
            if str(config[k]) != max(values, key=values.count):
                text += f", {k} {config[k]}"
    return text


def by_data(runs):
    """{data: {label: histories}}."""
    return {data: {label: h for (d, label), h in runs.items() if d == data}
            for data in dict.fromkeys(d for d, _ in runs)}


def curve(histories, metric):
    """(examples, mean over seeds, lowest, highest) of an eval metric over training."""
    steps = sorted(set.intersection(*(set(h[1]) for h in histories)))
    values = np.array([[h[1][x].get(metric) for x in steps] for h in histories], float)
    return steps, values.mean(0), values.min(0), values.max(0)


def draw(folder, outs):
    """Figures 2 and 3 (margins), 4 (JSD over training), 5 (bars), and Tables 2 and 3."""
    runs, folder = methods(outs), Path(folder)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, make in (("margins", draw_margins), ("jsd", draw_jsd), ("bars", draw_bars)):
        figure = make(pyplot, runs)
        if figure:
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
            pyplot.close(figure)
            drawn.append(f"{name}.png")
    text = paper_tables(runs)
    if text:
        write(folder / "tables.md", text)
        drawn.append("tables.md")
    print("\n".join(f"{folder}/{name}" for name in drawn))
    missing = [" ".join(name) for name, h in runs.items() if not all(x[3] for x in h)]
    if missing:
        print(f"not in bars and tables, for they are not evaluated yet: {', '.join(missing)}")


def draw_margins(pyplot, runs):
    """Figures 2 and 3: a panel a method, majority against minority."""
    titles = {name: name[1] + f" ({name[0]})" * (len(by_data(runs)) > 1) for name in runs}
    shown = {titles[name]: h for name, h in runs.items()
             if any("joint_majority" in m for m in h[0][1].values())}
    if not shown:
        return None
    width = min(3, len(shown))
    rows = -(-len(shown) // width)
    figure, axes = pyplot.subplots(rows, width, figsize=(3.6 * width, 2.8 * rows), squeeze=False)
    for ax in axes.flat[len(shown):]:
        ax.axis("off")
    for ax, (label, histories) in zip(axes.flat, shown.items()):
        given = "given" in LOSSES[histories[0][0]["loss"]].branches
        for kind, colour, dash in zip(("majority", "minority"), COLOURS, DASHES):
            x, mean, low, high = curve(histories, f"{'given' if given else 'joint'}_{kind}")
            ax.plot(x, mean, dash, color=colour, label=kind)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.set_title(f"{label}: " + ("answer given the belief" if given else "belief and answer"),
                     fontsize=9)
        ax.set_xlabel("training examples")
        ax.set_ylabel("reward margin (nats)")
    axes.flat[0].legend()
    return figure


def draw_jsd(pyplot, runs):
    """Figure 4: JSD over training, for each dataset a panel of SFT and one of what starts from it;
    dashed: distributions without training."""
    panels = {}
    for (data, label), h in runs.items():
        if h[0][1]:
            title = f"{data}: {'from the SFT checkpoint' if h[0][0]['init'] else 'SFT'}"
            panels.setdefault(title, {})[label] = h
    if not panels:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False,
                                   sharey=True)
    for ax, (title, several) in zip(axes.flat, sorted(panels.items())):
        for n, (label, histories) in enumerate(several.items()):
            x, mean, low, high = curve(histories, "jsd")
            colour, dash = COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS) % len(DASHES)]
            ax.plot(x, mean, dash, marker="osD^v<>*"[n % 8], markevery=max(1, len(x) // 6),
                    markersize=4, color=colour, label=label)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        for name, value in next(iter(several.values()))[0][2].items():
            ax.axhline(value, color="0.5", linestyle="--", linewidth=0.8)
            ax.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), fontsize=8,
                        color="0.3", xytext=(3, 0), textcoords="offset points", va="center")
        ax.set_xlabel("training examples")
        ax.set_ylabel("mean Jensen-Shannon distance (eval split)")
        ax.set_title(title, fontsize=9)
        ax.set_ylim(0)
        ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def measured(histories):
    """{metric: (value, error)} of an evaluated method on seen questions, or else unseen ones: of
    several seeds the mean and the standard deviation, of one the value and half of its interval. A
    metric that a seed lacks is left out."""
    parts = [h[3].get("seen") or h[3].get("unseen") for h in histories if h[3]]
    out = {}
    for k in (parts[0] if len(parts) == len(histories) else ()):
        values = [part.get(k) for part in parts]
        if all(isinstance(v, list) for v in values):
            means = [v[0] for v in values]
            out[k] = (float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1
                      else (values[0][2] - values[0][1]) / 2)
    return out


def draw_bars(pyplot, runs):
    """Figure 5: JSD, and how often the answer expresses its belief (BPC, or the rule's)."""
    values = {name: measured(h) for name, h in runs.items()}
    names = {"jsd": "JSD (lower is better)", "bpc": "BPC (higher is better)",
             "opinion": "opinion expressed (higher is better)", "cbc": "CBC (higher is better)"}
    names = {k: v for k, v in names.items() if any(k in m for m in values.values())}
    if not names:
        return None
    panels = by_data(runs)
    figure, axes = pyplot.subplots(len(panels), len(names), squeeze=False,
                                   figsize=(1 + 3 * len(names), 3.2 * len(panels)))
    for row, (data, several) in zip(axes, panels.items()):
        for ax, (k, title) in zip(row, names.items()):
            shown = {label: values[data, label][k] for label in several if k in values[data, label]}
            ax.bar(range(len(shown)), [v for v, _ in shown.values()], color=COLOURS[0], width=0.7,
                   yerr=[e for _, e in shown.values()], capsize=3)
            ax.set_xticks(range(len(shown)), shown, rotation=45, ha="right", fontsize=8)
            ax.set_ylim(0, None if k == "jsd" else 1)
            ax.set_title(title + f", {data}" * (len(panels) > 1), fontsize=9)
    return figure


def paper_tables(runs):
    """Table 2 (data and metric by method) and Table 3 (answers to the same questions), Markdown."""
    values = {name: measured(h) for name, h in runs.items()}
    labels = list(dict.fromkeys(label for (_, label), m in values.items() if m))
    if not labels:
        return ""
    lines = ["Table 2. Seen questions (unseen ones where there are no others); ± standard "
             "deviation over seeds, or half of the 95% interval.", "",
             "| | | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]
    for data, several in by_data(runs).items():
        for k, name in (BELIEFS | ANSWERS).items():
            cells = [values.get((data, label), {}).get(k) for label in labels]
            if any(cells):
                lines.append(f"| {data} | {name} | " + " | ".join(
                    f"{c[0]:.3f} ± {c[1]:.3f}" if c else "" for c in cells) + " |")
        judged = [next((h[3]["judged"] for h in several.get(label, ()) if h[3]
                        and h[3].get("judged")), None) for label in labels]
        if any(judged):
            lines.append(f"| {data} | BPC: failed of asked | " + " | ".join(
                f"{j['failed']} of {j['asked']}" if j else "" for j in judged) + " |")
    lines += ["", "Table 3. The first sampled answer to the same questions."]
    for several in by_data(runs).values():
        lines += answers_table({label: h[0][3]["answers"] for label, h in several.items()
                                if h[0][3] and h[0][3].get("answers")})
    return "\n".join(lines) + "\n"


def answers_table(answers):
    """Lines of Table 3: {label: the answers of eval.json}, of methods on one dataset."""
    lines, clean = [], lambda text: " ".join(str(text).split()).replace("|", "\\|")
    for question in {a["prompt"]: a for several in answers.values() for a in several}.values():
        lines += ["", "| method | answer |", "|---|---|"]
        for label, several in answers.items():
            for a in several:
                if a["prompt"] == question["prompt"]:
                    belief = f"<{a['belief']}>" if a["belief"] else ""
                    lines.append(f"| {label} | {a['class'] or '(no class)'}{clean(belief)} "
                                 f"{clean(a['response'])} |")
        shares = ", ".join(f"{p:g}" for p in question["probabilities"])
        lines += [f"| *question* | {clean(question['prompt'])} |",
                  f"| *beliefs* | {clean(', '.join(question['options']))} |",
                  f"| *shares of the classes* | {shares} |"]
    return lines


# ---------------------------------------------------------------------------------------------
# The command line

def main():
    given = vars(flags().parse_args())
    outs = [x if x.startswith("chat:") else str(Path(x)) for x in given.pop("OUT")]
    outs = list(dict.fromkeys(x for x in outs if not Path(x).is_file()))     # of out/*, say
    server = Chat(**{k: given.pop(k) for k in SERVER})
    o = Config(**given)
    check_ranges(o, samples=(0, 10000), max_new_tokens=(1, 100000), seed=(0, 2 ** 63),
                 judge_check=(0, 1 << 40))
    for name, allowed in (("split", SPLITS), ("checkpoint", ("best", "last"))):
        if getattr(o, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}")
    if (o.judge or o.embeddings) and not o.samples:
        raise ValueError("--judge and --embeddings need --samples")
    if o.judge_check and not o.judge:
        raise ValueError("--judge_check needs a --judge")
    if "chat:" in outs:
        raise ValueError("chat: needs the name of a model, chat:gpt-4o say")
    o.against = o.against and str(Path(o.against))
    if o.against and o.against not in outs:
        raise ValueError(f"--against {o.against} is none of the runs to measure")
    if o.figures:
        return draw(o.figures, list(dict.fromkeys(outs)))
    o.device = device_of(o.device)
    client = Client(server, Path(outs[0]).parent / "answers.jsonl")
    measure_all(list(dict.fromkeys(outs)), o, client, setup(o.device))
    leave()


def measure_all(outs, o, client, device):
    """Measure each run, write its eval.json, print the tables (rank 0)."""
    first = rank_and_size()[0] == 0
    configs = {out: read_run(out, o) for out in outs}
    embed = embedder(o, client, device) if o.embeddings and first else None
    evaluations, results, rows, notes = {}, {}, {}, []
    for out in progress(outs, desc="runs", unit="run", disable=len(outs) == 1 or not first):
        config = configs[out]
        data = o.data or config["data"], o.form or config.get("form", "")
        if data not in evaluations:
            evaluations[data] = e = Evaluation(*data, o.split)
            if o.judge_check and first:
                notes.append(check_judge(e.rows, client, o.judge, o.judge_check))
        e = evaluations[data]
        if out.startswith("chat:"):
            if first:
                metrics, items, answers = e.measure_chat(out[5:], client)
        else:
            metrics, items, answers = e.measure(out, o, config, device)
        if not first:
            continue
        counts, more = e.judged(metrics, items, answers, o, client, embed) if answers else ({}, [])
        notes += [f"{out}: {note}" for note in more]
        results[out] = summary(metrics, items, e.trained_on(config["data"],
                                                                      config.get("form", "")))
        rows[out] = metrics, [i.question for i in items], (data, [i.row for i in items])
        folder = home(out, config, data[0])
        if not config["loss"]:
            write(folder / "config.json", json.dumps(config, indent=1) + "\n")
        write(folder / "eval.json", json.dumps({
            "split": o.split, "checkpoint": o.checkpoint, "data": data[0],
            "samples": len(answers[0]) if answers else 0, "judged": counts,
            "embeddings": o.embeddings, **results[out],
            "answers": e.samples(items, answers)}, indent=1) + "\n")
    if first:
        report(results, configs, evaluations, o)
        if o.against:
            print_differences(rows, o.against)
        print("\n".join(notes))


if __name__ == "__main__":
    run(main)
