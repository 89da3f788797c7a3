"""Measure runs, and ask them what they believe and say.

    python evaluate.py out/toy-gdpo-seed0 [OUT ...]                   # tables over runs
    python evaluate.py out/toy-gdpo-seed0 --ask "How do you rate night buses?"
    python evaluate.py out/* --judge gpt-4o-mini --embeddings sentence-transformers/all-MiniLM-L6-v2
    python evaluate.py gpt2-large chat:gpt-4o --data data/usa-icf     # few-shot prompting

Fifth in reading order. Prints tables, and writes the same numbers to OUT/eval.json and the sampled
answers to OUT/samples.jsonl. A new metric is an array by row and a name in METRICS. Works under
torchrun. Letters: B rows, K belief classes, k answers to a row. NaN: not for this row.
"""
import codecs
import json
import re
import sys
import textwrap
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from data import (FORM, SPLITS, Parser, add_flags, class_ids, dataset_name, encode_rows,
                  find_checkpoint, help_first, load_dataset, make_item, normal, progress,
                  prompt_text, question_of, read_json, read_text, run, write)
from synth import PROMPTS, Chat, Client, chat, closed, embed, read_label


@dataclass
class Config:
    split: Literal["train", "eval", "test"] = "test"  # which rows
    checkpoint: Literal["best", "last"] = "best"  # which weights of a run
    data: str = ""               # dataset, or more with commas; empty: the one the run trained on
    form: str = ""               # of the prompt; empty: the run's own, or the data's
    samples: int = None          # answers per row, 8 (the authors' number); --ask: per class, 1
    max_new_tokens: int = 64     # longest answer
    seed: int = 0                # of the samples
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    against: str = ""            # a run: also print how the others differ from it, row by row
    judge: str = ""              # LLM that judges the answers (BPC), as gpt-4o-mini
    judge_check: int = 0         # first ask it for the ratings of this many labelled reviews
    embeddings: str = ""         # RS by all-MiniLM-L6-v2 (folder or hub name), or by api:MODEL
    ask: list = None             # questions to ask; without one: the lines of standard input
    belief: str = ""             # --ask: answers with this belief, "4<Somewhat good>" or 4
    shares: str = ""             # --ask: draw the classes from these shares, as 0,0,0,0,0.5,0.5
    group: str = ""              # --ask: the group to speak for
    json: bool = False           # --ask: one JSON object per question


SERVER = ("base_url", "concurrency", "timeout", "max_tokens", "extra", "usd_in", "usd_out",
          "max_usd", "limit", "cache")


def flags():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("OUT", nargs="+", help="runs; with --data also checkpoints and chat:MODEL")
    parser.add_argument("--ask", action="append", nargs="?", const="-", metavar="QUESTION")
    add_flags(parser, Config, skip=("ask",))
    add_flags(parser, Chat, SERVER)
    return parser


help_first(__name__, flags)                            # before torch, which takes a second

import numpy as np
import torch
import torch.nn.functional as F

from losses import RESPONSE
from model import fingerprint, read_weights
from train import (autocast, belief_metrics, device_of, gather, jsd, leave, load_checkpoint,
                   margins, on_first_rank, rank_and_size, say, score_rows, setup)

BRANCHES = ("chosen", "own", "given", "flip")


# ---------------------------------------------------------------------------------------------
# Beliefs: the class distribution that the model gives at the class token

def ordinal_metrics(q, p, meta):
    """What JSD does not see, of distributions q (model) and p (target), (B, K) -> {name: (B,)}. w1:
    Wasserstein distance over the ordered classes on the scale, 0 to 1. off_gap: distance of the
    shares off the scale. minority (B, 2): model's and group's share of the smallest class."""
    q, p = (np.asarray(x, np.float64) for x in (q, p))
    on = np.array([c != meta.get("off_scale") for c in meta["classes"]])
    with np.errstate(invalid="ignore"):                # 0 / 0: nothing is on the scale
        q, p = (x / x.sum(-1, keepdims=True) for x in (q, p))
        cdf = [(x[:, on] / x[:, on].sum(-1, keepdims=True)).cumsum(-1) for x in (q, p)]
    out = {"w1": np.abs(cdf[0] - cdf[1]).sum(-1) / max(1, on.sum() - 1)}
    if not on.all():
        out["off_gap"] = np.abs((q - p)[:, ~on]).sum(-1)
    smallest = np.where(p > 0, p, np.inf).argmin(-1)[:, None]
    return out | {"minority": np.hstack([np.take_along_axis(x, smallest, 1) for x in (q, p)])}


def recalibrated(fit_logq, fit_p, logq, p):
    """JSD (B,) to p of the class distribution logq (B, K) after one temperature (jsd_t), and after
    a temperature and a bias per class (jsd_bias): what needs no training. Both are fitted by
    cross-entropy, a convex problem, on other rows (fit_logq, fit_p)."""
    from scipy import optimize, special                # here: slow to import
    K, out = logq.shape[1], {}

    def adjusted(x, logq):                             # x: inverse temperature, perhaps biases
        return special.log_softmax(x[0] * logq + np.append(x[1:], np.zeros(K))[:K], axis=-1)
    for name, start in (("jsd_t", np.ones(1)), ("jsd_bias", np.append(1, np.zeros(K)))):
        x = optimize.minimize(lambda x: -(fit_p * adjusted(x, fit_logq)).sum(-1).mean(), start).x
        out[name] = jsd(np.exp(adjusted(x, logq)), p)
    return out


def preference_metrics(s, items, beta):
    """Do preferences follow from beliefs? {name: (B,)}, s over BRANCHES; NaN where both beliefs are
    of one class. h_b is the accepted answer's score less the rejected one's, both after belief b.
    flip: 1 if h > 0 after the accepted belief and h < 0 after the rejected one. vote: the squared
    error of sum_b pi(b|x) sigmoid(h_b), over the row's two beliefs, as a vote share: the group's is
    p_w / (p_w + p_l) (arXiv 2506.06298). Scores are log-probs; in flip_r and vote_r rewards."""
    pair, out = torch.tensor([[i.accept, i.reject] for i in items]), {}
    belief = s.class_logps.double().gather(1, pair).softmax(-1)                       # (B, 2)
    scores = {"": s.logps} | ({} if s.ref is None else {"_r": beta * (s.logps - s.ref)})
    for name, score in scores.items():
        chosen, own, given, flip = score[..., RESPONSE].double().T                    # (B,) each
        h = torch.stack([chosen - given, flip - own], 1)                              # (B, 2)
        vote = (belief * torch.sigmoid(h)).sum(-1)
        out["flip" + name] = ((h[:, 0] > 0) & (h[:, 1] < 0)).double()
        out["vote" + name] = (vote - s.pair[:, 0] / s.pair.sum(-1)) ** 2
    return {k: torch.where(pair[:, 0] == pair[:, 1], torch.nan, v).numpy() for k, v in out.items()}


def reference_distributions(target):
    """name -> (B, K): what a model without training would say (Figure 4). target (B, K)."""
    rows, top, bottom = np.arange(len(target)), target.argmax(-1), target.argmin(-1)
    majority, reverse = np.zeros_like(target), np.empty_like(target)
    majority[rows, top] = 1
    # differs: the authors' code sorts the shares; as in the text, the largest is swapped with the
    # smallest, the second largest with the second smallest, and so on.
    order = np.argsort(target, -1, kind="stable")
    np.put_along_axis(reverse, order, np.take_along_axis(target, order[:, ::-1], 1), 1)
    out = {"majority": majority, "reverse": reverse, "uniform": np.ones_like(target)}
    for level in (0.05, 0.1):
        out[f"noise({level})"] = noisy = target.copy()
        noisy[rows, top] -= level
        noisy[rows, bottom] += level
    return out


# ---------------------------------------------------------------------------------------------
# Sampled answers

@torch.no_grad()
def sample_rows(model, items, tokenizer, o, dtype):
    """o.samples answers to every item's prompt, at temperature 1 from all tokens (section 5.1.1): a
    list of lists of texts, the same on any number of processes, because an answer's randomness
    depends only on the seed, its row and its number."""
    rank, size = rank_and_size()
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))[rank::size]
    jobs, new = [(i, k) for i in order for k in range(o.samples)], []
    # Keys and values may take half of the GPU's free memory, or 4 GB of a CPU's.
    room = torch.cuda.mem_get_info()[0] / 2 if model.head.is_cuda else 4e9
    tokens = min(max(len(i.prompt) for i in items) + o.max_new_tokens, model.cfg.n_ctx)
    row = 2 * model.cfg.n_layer * model.cfg.n_embd * tokens * (2 if dtype == "bfloat16" else 4)
    batch = max(1, min(512, int(room / row)) // o.samples) * o.samples     # a row's share a prefill
    for start in progress(range(0, len(jobs), batch), desc="sampling", disable=rank > 0, delay=1):
        part = jobs[start:start + batch]
        seeds = [(o.seed, items[i].row, k) for i, k in part]
        with autocast(model.head.device, dtype):
            ids = model.generate([items[i].prompt for i, _ in part], o.max_new_tokens, 1.0,
                                 tokenizer.eos, seeds, tokenizer.n_tokens)
        new += zip(part, map(tokenizer.decode, ids))
    known = dict(gather(new))
    return [[known[i, k] for k in range(o.samples)] for i in range(len(items))]


def parse_answer(text, meta, few_shot=False):
    """(class label, belief text, response) of an answer; None for a part that is missing. A label
    that goes on as a number ("10 out of 10", "4.5 stars") is none. The belief is one that the
    dataset knows, or what comes before the first `>`. few_shot: the answer ends at an empty line,
    or where the model goes on with a question of its own."""
    text = re.split(r"\n\s*\n|Question:", text.strip())[0].strip() if few_shot else text
    labels = "|".join(map(re.escape, sorted(meta["classes"], key=len, reverse=True)))
    label = (re.match(f"({labels})(?![.,]?[0-9])", text) or [None, None])[1]
    rest = text[len(label or ""):]
    known = [t for t in meta.get("belief_to_class") or () if rest.startswith(f"<{t}>")]
    belief = max(known, key=len) if known else (re.match("<(.*?)>", rest, re.S) or [None, None])[1]
    return label, belief, rest if belief is None else rest[len(belief) + 2:]


def sampled_counts(answers, meta):
    """How often each class begins the answers, (B, K). An answer that begins with no class label
    counts for the class off the scale, or for none where there is no such class."""
    labels = [[label or meta.get("off_scale") for label, _, _ in x] for x in answers]
    return np.array([[x.count(c) for c in meta["classes"]] for x in labels], float)


def expressed_opinion(answers, meta):
    """Whether each response expresses the class that the model announced, (B, k), by the rule of
    the templates: its first stance phrase is one of that class. No phrase: not expressed."""
    stances = {phrase.lower(): str(label) for phrase, label in meta["stances"].items()}
    find = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in sorted(stances, key=len)[::-1]))
    found = [[(label, find.search(text.lower())) for label, _, text in x] for x in answers]
    return np.array([[float(m is not None and stances[m[0]] == c) for c, m in x] for x in found])


def sampling_floor(target, k, draws=64):
    """JSD (B,) that k answers of a perfect model would have: the mean over multinomial draws."""
    rng, p = np.random.default_rng(0), target / target.sum(-1, keepdims=True)
    return np.mean([jsd(rng.multinomial(k, p), p) for _ in range(draws)], axis=0)


def answer_metrics(answers, target, meta):
    """{name: (B,)} of parsed answers [[(label, belief, response), ...], ...]; target (B, K). An
    answer without a class, where none is off the scale, counts for a class that nobody holds.
    coverage: of the group's classes, as a ratio to a perfect sampler's. cbc (section 5.1.1): how
    often the belief's text maps back to the class before it."""
    counts, k = sampled_counts(answers, meta), len(answers[0])
    p, none = target / target.sum(-1, keepdims=True), k - counts.sum(-1, keepdims=True)
    share = lambda f: np.array([np.mean([f(*answer) for answer in x]) for x in answers])
    out = {"sampled_jsd": jsd(np.append(counts, none, 1), np.pad(p, ((0, 0), (0, 1)))),
           "sampling_floor": sampling_floor(target, k),
           "coverage": ((counts > 0) & (p > 0)).sum(-1) / (1 - (1 - p) ** k).sum(-1),
           "no_class": share(lambda label, *_: label is None)}
    if to_class := meta.get("belief_to_class"):
        out["cbc"] = share(lambda label, belief, _: str(to_class.get(belief, "")) == label)
    if meta.get("stances"):
        out["opinion"] = expressed_opinion(answers, meta).mean(-1)
    return out


# ---------------------------------------------------------------------------------------------
# Judges of the responses: an LLM (BPC), a sentence encoder (RS)

YES_OR_NO = re.compile(r"(?i)[\W_]*(?:answer[\W_]+)?(yes|no)\b(?![\s,]*(/|or\b|and\b|yes\b|no\b))")
THREE = {"1": 1, "2": 1, "3": 2, "4": 3, "5": 3}       # Appendix H: ratings in three classes
MOST_FAILURES = 0.05                   # above this share of failed judgements no mean is given


def judge(client, model, asked, desc="judging"):
    """What an LLM says of [(question, belief or None, answer), ...], all with a belief or none: 1.0
    or 0.0, whether the answer expresses the belief; a review's rating, 1.0 to 3.0. NaN where it
    refuses or its reply cannot be read. (values (n,), such a reply.) Prompts of Appendix H."""
    name, values = ("expresses", {"Yes": 1, "No": 0}) if asked and asked[0][1] else (
        "rating", {"1": 1, "2": 2, "3": 3})
    prompts = [PROMPTS[name].format(question=q, belief=b, answer=a) for q, b, a in asked]
    usd = sum(len(p) / 4 * client.o.usd_in + 16 * client.o.usd_out for p in prompts) / 1e6
    say(f"{desc}: {len(prompts):,} requests to {model}" + f", about ${usd:.2f}" * (usd > 0))
    schema, said, failed = closed(answer={"enum": [*values]}), [], ""
    for text, ended in chat(client, prompts, desc, schema, llm=model, temperature=0.0,
                            max_tokens=64):
        words = YES_OR_NO.match(text) if name == "expresses" else None
        label = read_label(text, [*values]) or words and words[1].title()
        said.append(values[label] if label and ended != "refused" else np.nan)
        failed = text or "(empty)" if np.isnan(said[-1]) else failed
    return np.array(said, float), failed


def belief_preference_consistency(answers, rows, client, model):
    """BPC (B, k): whether an LLM finds the announced belief in the response, NaN where that failed;
    which (row, number) it was asked about; a failed reply. An answer without a belief or a
    response is inconsistent, without asking."""
    texts, bpc = bool(rows[0].get("accept_choice")), np.zeros((len(answers), len(answers[0])))
    asked = {(i, k): (row["prompt"], belief if texts else None, response)
             for i, (row, parsed) in enumerate(zip(rows, answers))
             for k, (label, belief, response) in enumerate(parsed)
             if (belief if texts else label) and response.strip()}
    values, failed = judge(client, model, [*asked.values()])
    for (i, k), value in zip(asked, values):
        right = value if texts else float(value == THREE.get(answers[i][k][0]))
        bpc[i, k] = np.nan if np.isnan(value) else right
    return bpc, [*asked], failed


def check_judge(rows, client, model, n):
    """How well the judge tells the ratings of n labelled reviews (Appendix H): a line to print."""
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]
    truth = np.array([THREE.get(str(r["accept_choice_id"]), 0) for r in rows])
    if 0 in truth or rows[0].get("accept_choice"):
        raise ValueError("--judge_check is for reviews, whose classes are the ratings 1 to 5")
    said, reply = judge(client, model, [("", None, r["accept_response"]) for r in rows], "checking")
    good, f1 = ~np.isnan(said), 0.0
    line = f"{model} on labelled reviews: {(~good).sum()} of {len(rows)} judgements failed"
    if (~good).mean() > MOST_FAILURES:
        return line + f" (one: {reply:.80}), more than {MOST_FAILURES:.0%}: no accuracy is given"
    for c in (1, 2, 3):                                # weighted by how often a class is true
        told, true = said[good] == c, truth[good] == c
        f1 += 2 * (told & true).sum() / max(1, told.sum() + true.sum()) * true.mean()
    accuracy = (said == truth)[good].mean()
    return f"{line}; in 3 classes accuracy {accuracy:.3f}, weighted F1 {f1:.3f}"


def response_similarity(answers, rows, encode):
    """RS (B, k): cosine of each response to one of the dataset that expresses the announced belief
    on the same question: the row's own if it has it, else the first. 0 where the belief is none of
    the question's or nothing is said; NaN where the dataset has no such response."""
    known, pairs, out = {}, {}, np.zeros((len(answers), len(answers[0])))
    for row in rows:
        for side in ("accept", "reject"):
            belief, response = row.get(f"{side}_choice"), row[f"{side}_response"]
            for key in ((row["prompt"], belief), (question_of(row), None, belief)):
                known.setdefault(key, response)
    for i, (row, parsed) in enumerate(zip(rows, answers)):
        for k, (_, belief, response) in enumerate(parsed):
            if belief in row["options"] and response.strip():
                other = known.get((question_of(row), None, belief))
                pairs[i, k] = response, known.get((row["prompt"], belief), other)
    texts = list(dict.fromkeys(text for pair in pairs.values() for text in pair if text))
    vectors = dict(zip(texts, encode(texts))) if texts else {}
    for (i, k), (a, b) in pairs.items():
        out[i, k] = vectors[a] @ vectors[b] if b else np.nan
    return out


# ---------------------------------------------------------------------------------------------
# Asking: what a model believes about a question, and what it says

def ask(outs, o):
    """Put the questions of --ask to each model; print bars and answers, or JSON."""
    models = {out: open_model(out, o) for out in outs}
    if len({str(meta["classes"]) for _, _, meta, *_ in models.values()}) > 1:
        raise ValueError("these models have different classes: ask them one by one")
    for question in (q.strip() for text in o.ask for q in (sys.stdin if text == "-" else [text])):
        if not question:
            raise ValueError("--ask: a question is empty")
        found = {out: opinion_of(question, *model, o) for out, model in models.items()}
        if o.json:
            print(json.dumps({"question": question, "group": o.group, "models": found}), flush=True)
        else:
            print_opinions(question, found)


def open_model(out, o):
    """(model, tokenizer, meta, rows, beliefs to speak) of a run or a checkpoint. A checkpoint
    without --data is asked as if for the opinion task."""
    config, meta, rows = read_run(out, o), {"classes": list("012345"), "form": o.form or FORM}, []
    if config["data"]:
        meta, splits = load_dataset(config["data"], SPLITS, o.form or config["form"])
        rows = sum(splits.values(), [])
    groups = {r["group"] for r in rows if r.get("group")}
    if o.group and rows and o.group not in groups or "{group}" in meta["form"] and not o.group:
        raise ValueError(f"--group must be one that {out} knows: {', '.join(sorted(groups))}")
    speak = beliefs_to_speak(meta["classes"], meta, o)
    checkpoint = Path(out) / o.checkpoint if config["loss"] else out
    return *load_checkpoint(checkpoint, device_of(o.device)), meta, rows, speak


def beliefs_to_speak(classes, meta, o):
    """[(class, belief text, or None for the likeliest), ...], one for each answer to sample: every
    class alike, or the one of --belief, or classes drawn from --shares."""
    spoken, names = [(c, None) for c in classes for _ in range(o.samples)], ", ".join(classes)
    if o.belief:
        label, text, rest = parse_answer(o.belief.strip(), meta)
        if label is None or rest:
            raise ValueError(f"--belief {o.belief!r} must be one of the classes {names}, alone or "
                             f"followed by a text, as \"{classes[-1]}<Yes>\"")
        spoken = [(label, text)] * o.samples
    if o.shares:
        number = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*")
        p = np.array([float(x) if number.fullmatch(x) else np.nan for x in o.shares.split(",")])
        if len(p) != len(classes) or not abs(p.sum() - 1) < 0.01:
            raise ValueError(f"--shares {o.shares} must be {len(classes)} numbers that sum to 1, "
                             f"for the classes {names}")
        drawn = np.random.default_rng(o.seed).choice(len(p), len(spoken), p=p / p.sum())
        spoken = [(classes[i], None) for i in sorted(drawn)]
    return spoken


@torch.no_grad()
def opinion_of(question, model, tokenizer, meta, rows, speak, o):
    """What a model believes about a question, read in float32, and what it says: a dict."""
    prompt = tokenizer.encode(prompt_text({"prompt": question, "group": o.group}, meta["form"]))

    def generate(starts, temperature):
        ids = model.generate([prompt + tokenizer.encode(x) for x in starts], o.max_new_tokens,
                             temperature, tokenizer.eos, [(o.seed, n) for n in range(len(starts))],
                             tokenizer.n_tokens)
        return [" ".join(tokenizer.decode(x).split()) for x in ids]

    hidden = model(torch.tensor([prompt], device=model.head.device))[0, -1]           # (C,)
    logps = F.linear(hidden, model.head).log_softmax(-1).double().cpu()               # (V,)
    logps = logps[class_ids(tokenizer, meta["classes"])]                              # (K,)
    if not torch.isfinite(logps).all():
        raise FloatingPointError("the model's log-probs are not finite: its training diverged")
    likeliest = {c: parse_answer(c + text, meta)[1]    # greedily, from each class token on
                 for c, text in zip(meta["classes"], generate(meta["classes"], 0))}
    spoken = [(c, text or likeliest[c]) for c, text in speak]
    spoken = [f"{c}<{text}>" if text else c for c, text in spoken]
    shares, group = logps.softmax(-1).tolist(), group_shares(question, rows, o.group)
    return {"classes": meta["classes"], "beliefs": [*likeliest.values()], "shares": shares,
            "class_mass": float(logps.exp().sum()), "group_shares": group,
            "jsd": group and float(jsd(shares, group)),
            "answers": [*zip(spoken, generate(spoken, 1.0))]}


def group_shares(question, rows, group):
    """The group's shares of the question with these words, perhaps within the dataset's wording (an
    opening, say). None if the dataset does not know it, or has different ones that fit."""
    asked, fit = normal(question), {True: set(), False: set()}
    for row in rows:
        text = normal(row["prompt"])
        if f" {asked} " in f" {text} " and group in ("", row.get("group")):
            fit[text == asked].add(tuple(row["probabilities"]))
    found = fit[True] or (fit[False] if asked.count(" ") > 1 else ())
    return [*found.pop()] if len(found) == 1 else None


def print_opinions(question, found):
    """One question in 80 columns: a line per class for the group and each model, then answers."""
    clean = lambda text: "".join(c if c.isprintable() else " " for c in text)
    columns = {}                                       # models of one group: its line once
    for out, f in found.items():
        if f["group_shares"]:
            columns["the group", *f["group_shares"]] = [""] * len(f["classes"])
        columns[Path(out).name, *f["shares"]] = f["beliefs"]
    print("\n" + textwrap.fill(clean(question), 80))
    for i, label in enumerate(f["classes"]):
        for (name, *shares), texts in columns.items():
            print(f"{label:6.6} {name[-20:]:20} {shares[i]:.2f} {'█' * round(20 * shares[i]):20} "
                  f"{clean(texts[i] or ''):.26}".rstrip())
            label = ""
    for out, f in found.items():
        print(f"\n{out}" + (f", JSD to the group {f['jsd']:.3f}" if f["jsd"] is not None else "")
              + f", only {f['class_mass']:.2f} on the classes" * (f["class_mass"] < 0.9) + ":")
        for answer in f["answers"]:
            print(textwrap.fill(clean(" ".join(answer)), 80, initial_indent="  ",
                                subsequent_indent="      "))


# ---------------------------------------------------------------------------------------------
# One run on one dataset

@dataclass
class Run:
    """What was measured of a run, a checkpoint or a chat model, on B rows."""
    folder: Path                       # of its results
    data: str
    meta: dict
    rows: list
    items: list
    metrics: dict                      # name -> (B,), or (B, 2) for a ratio of sums
    answers: list                      # k (label, belief, response) to each row
    seen: np.ndarray                   # (B,) whether the training rows hold the question,
    same: np.ndarray                   # and the very prompt
    reference_jsd: dict                # of what could be said without training, on the eval split
    judged: dict = field(default_factory=dict)


FLAGS = {"loss": str, "data": str, "form": str, "init": str, "beta": float, "dtype": str,
         "max_length": int, "overlong": str}           # of a run, as far as they are needed here


def read_run(out, o):
    """These flags of the run in OUT, and "began", the fingerprint of the weights it began with; or
    what takes their place for a checkpoint that is no run. ValueError for what is not finished."""
    log = Path(out) / "metrics.jsonl"
    if not log.is_file():
        if not (o.data or o.ask):
            raise ValueError(f"{out} is not the folder of a run (no metrics.jsonl): give one of "
                             "train.py's or, with a checkpoint or chat:MODEL, --data DIR")
        return dict.fromkeys(FLAGS, "") | {
            "data": o.data, "beta": 1.0, "max_length": 0, "overlong": "error", "began": None,
            "dtype": "bfloat16" if device_of(o.device) == "cuda" else "float32"}
    try:
        config = read_json(log.parent / "config.json")
        config = {k: kind(config[k] or kind()) for k, kind in FLAGS.items()}
        config["began"] = json.loads(read_text(log).split("\n")[0])["init"]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{out} is no finished run of train.py (its config.json or metrics.jsonl: "
                         f"{e!r}): train it again") from None
    if not (Path(out) / o.checkpoint / "config.json").is_file():
        raise ValueError(f"{out} has no {o.checkpoint}/ yet: finish the run with --resume")
    return config


def measure(out, o, device, client):
    """All metrics of one OUT that need no judge: a Run, whose files rank 0 writes."""
    config = read_run(out, o)
    data, form = o.data or config["data"], o.form or config["form"]
    meta, splits = load_dataset(data, dict.fromkeys(("train", "eval", o.split)), form)
    if out.startswith("chat:"):
        found = on_first_rank(lambda: measure_chat(out[5:], splits[o.split], meta, o, client))
    else:
        found = measure_weights(out, data, meta, splits, config, o, device)
    metrics, items, texts = found
    rows, trained = [splits[o.split][i.row] for i in items], splits["train"]
    answers = [[parse_answer(text, meta, few_shot=bool(row.get("context"))) for text in k]
               for row, k in zip(rows, texts)]
    if answers:
        target = np.array([row["probabilities"] for row in rows])
        metrics = answer_metrics(answers, target, meta) | (
            metrics or ordinal_metrics(sampled_counts(answers, meta), target, meta))
    if data != config["data"]:
        trained = load_dataset(config["data"], ("train",), form)[1]["train"]
    questions, prompts = ({f(row) for row in trained} for f in (question_of, wording))
    same = np.array([wording(row) in prompts for row in rows])
    seen = same | [question_of(row) in questions for row in rows]
    target = np.array([row["probabilities"] for row in splits["eval"]])
    r = Run(Path(out), data, meta, rows, items, metrics, answers, seen, same, {
        k: float(jsd(q, target).mean()) for k, q in reference_distributions(target).items()})
    if not config["loss"]:
        r.folder = Path("out", f"{dataset_name(data)}-{re.sub('[/:]+', '-', out.strip('/'))}")
    if rank_and_size()[0] == 0:
        lines = [{"prompt": row["prompt"], "answers": k} for row, k in zip(rows, texts)]
        write(r.folder / "samples.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        save(r, o)
    return r


def wording(row):
    return normal(row["prompt"])


def measure_weights(out, data, meta, splits, config, o, device):
    """({metric: values}, items, texts) of a run, or of a checkpoint as it is."""
    def scored(model, tokenizer, split, branches):
        limit = min(config["max_length"] or model.cfg.n_ctx, model.cfg.n_ctx)
        items = encode_rows(splits[split], tokenizer, meta, limit, config["overlong"],
                            f"{data}/{split}.jsonl")
        classes = class_ids(tokenizer, meta["classes"])
        return items, score_rows(model, items, branches, classes, config["dtype"])

    model, tokenizer = load_checkpoint(
        Path(out) / o.checkpoint if config["loss"] else out, device)
    _, fit = scored(model, tokenizer, "eval", ("chosen",))
    items, s = scored(model, tokenizer, o.split, BRANCHES)
    metrics = belief_metrics(s) | ordinal_metrics(s.class_logps.double().exp(), s.target, meta)
    metrics |= recalibrated(*(x.double().numpy().clip(-1e4) for x in (
        fit.class_logps, fit.target, s.class_logps, s.target)))
    texts = sample_rows(model, items, tokenizer, o, config["dtype"]) if o.samples else []
    if config["init"]:
        try:
            reference = load_checkpoint(config["init"], device)
            if fingerprint(reference[0]) != config["began"]:
                raise ValueError(f"{config['init']} was trained again since")
            s.ref = scored(*reference, o.split, BRANCHES)[1].logps
            metrics |= margins(s, items, config["beta"])
        except (ValueError, OSError) as e:
            say(f"{out}: no reference, no margins: {e}")
    return metrics | preference_metrics(s, items, config["beta"]), items, texts


def measure_chat(model, rows, meta, o, client):
    """The same of a chat model, prompted with the rows' few-shot context as in Appendix E, at
    temperature 0: one answer per row, and no metrics yet."""
    if not all(row.get("context") for row in rows):
        raise ValueError("the rows have no few-shot context: make them with `synth.py icf`")
    prompts = ["".join(row["context"]) + prompt_text(row, meta["form"]) for row in rows]
    replies = chat(client, prompts, model, llm=model, temperature=0.0, max_tokens=o.max_new_tokens)
    texts = [["" if ended == "refused" else text] for text, ended in replies]
    return {}, [make_item(n, row, meta, [], list, list) for n, row in enumerate(rows)], texts


def judge_answers(r, o, client, encode):
    """Add BPC and RS to a Run's metrics, as far as they are asked for; returns a line to print."""
    mean = lambda values: np.ma.masked_invalid(values).mean(-1).filled(np.nan)    # (B, k) -> (B,)
    if encode and all(row.get("accept_choice") for row in r.rows):
        r.metrics["rs"] = mean(response_similarity(r.answers, r.rows, encode))
    if not o.judge:
        return ""
    bpc, asked, reply = belief_preference_consistency(r.answers, r.rows, client, o.judge)
    n, failed = len(asked), int(np.isnan(bpc).sum())
    r.judged = {"judge": o.judge, "answers": bpc.size, "asked": n, "failed": failed}
    line = f"BPC by {o.judge}: {failed} of {n} judgements failed"
    line += f" (one: {reply!r:.80})" * (failed > 0)
    if failed > MOST_FAILURES * n:
        line += f", more than {MOST_FAILURES:.0%}: no mean is given"
        bpc[:] = np.nan
    elif r.meta["stances"] and n:
        rule = expressed_opinion(r.answers, r.meta)
        same = float(np.mean([bpc[at] == rule[at] for at in asked if not np.isnan(bpc[at])]))
        r.judged["agreement"], line = same, line + f"; {same:.1%} agree with the templates' rule"
    r.metrics["bpc"] = mean(bpc)
    return line


# ---------------------------------------------------------------------------------------------
# Intervals

@lru_cache(4)
def resamples(n):
    """2,000 bootstrap resamples of n questions: how often each is drawn, (2000, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000).astype(float)


def interval(values, questions):
    """[value, low, high]: the mean of values (B,), or the ratio of sums of values (B, 2), and its
    95% bootstrap interval over questions, each drawn with all its rows. Under 20 questions low and
    high are None, because the bootstrap is too narrow there. None if all values are NaN."""
    pairs = values if values.ndim == 2 else np.stack([values, np.ones(len(values))], 1)
    good = ~np.isnan(pairs).any(1)
    if not good.any():
        return None
    _, index = np.unique(np.asarray(questions)[good], return_inverse=True)
    top, bottom = (np.bincount(index, x) for x in pairs[good].T)      # sums by question
    value, low, high = float(top.sum() / bottom.sum()), None, None
    if len(top) >= 20:
        picks = resamples(len(top))
        low, high = np.percentile((picks @ top) / (picks @ bottom), [2.5, 97.5]).tolist()
    return [value, low, high]


def summary(metrics, r):
    """{part: {metric: [value, low, high]}} of a Run's rows: "unseen" questions, which no training
    row asks, "seen" ones and, if there is more than one group, each group and the worst of them."""
    questions, groups = (np.array([getattr(i, k) for i in r.items]) for k in ("question", "group"))
    parts = {"unseen": ~r.seen, "seen": r.seen}
    if len(set(groups)) > 1:
        parts |= {f"group {g}": groups == g for g in sorted(set(groups))}
    out = {name: {"rows": int(mask.sum()), "questions": len(set(questions[mask])),
                  "word_for_word": int(r.same[mask].sum()),
                  **{k: interval(v[mask], questions[mask]) for k, v in metrics.items()}}
           for name, mask in parts.items() if mask.any()}
    if len(set(groups)) > 1:
        out["worst group"] = {k: worst(k, [v[k] for name, v in out.items()
                                           if name.startswith("group ") and v[k]]) for k in metrics}
    return out


def worst(metric, values):
    """Of [[value, low, high], ...] the worst, by the arrow in the metric's header."""
    bad = {"↓": lambda v: v[0], "1": lambda v: abs(v[0] - 1)}.get(METRICS[metric][-1])
    return max(values, key=bad or (lambda v: -v[0]), default=None)


def over_seeds(results):
    """Runs whose folders differ only in -seedN -> one method: the mean over seeds; its interval is
    the larger of their standard deviation and the mean half-width of their intervals."""
    methods, out = {}, {}
    for name, result in results.items():
        methods.setdefault(re.sub(r"-seed\d+$", "", name), {})[name] = result

    def merged(values):
        halves = [(high - low) / 2 for _, low, high in values if low is not None]
        m, sd = np.mean([v[0] for v in values]), np.std([v[0] for v in values], ddof=1)
        half = max(sd, np.mean(halves or [0]))
        return [m, m - half, m + half]

    for method, runs in methods.items():
        first, *others = runs.values()
        out |= runs if not others else {f"{method} ({len(runs)} seeds)": {part: first[part] | {
            k: merged([r[part][k] for r in runs.values()]) for k in METRICS
            if all(r.get(part, {}).get(k) for r in runs.values())} for part in first}}
    return out


# ---------------------------------------------------------------------------------------------
# Tables

METRICS = {  # name -> header; the arrow says what is better
    "jsd": "JSD ↓", "opinion": "opinion ↑", "cbc": "CBC ↑", "bpc": "BPC ↑", "rs": "RS ↑",
    "flip": "flip ↑", "vote": "vote ↓", "flip_r": "flip r ↑", "vote_r": "vote r ↓",
    "jsd_t": "JSD T ↓", "jsd_bias": "JSD T+b ↓", "w1": "W1 ↓", "off_gap": "off-scale ↓",
    "minority": "minority →1", "class_mass": "mass ↑", "sampled_jsd": "sampled ↓",
    "sampling_floor": "its floor", "coverage": "coverage →1", "no_class": "no class ↓",
    "given_majority": "given maj ↑", "given_minority": "given min ↑", "given_other": "given oth ↑",
    "joint_majority": "joint maj", "joint_minority": "joint min", "joint_other": "joint oth"}
LEGEND = """±: half of the 95% bootstrap interval over questions; for seeds, the larger of that and
their standard deviation. *: fewer than 20 questions, too few for an interval. JSD: Jensen-Shannon
distance of class distributions, 0 to 0.833. T, T+b: after a temperature, or a temperature and
biases, fitted on the eval split. W1: Wasserstein distance over the ordered classes, 0 to 1.
off-scale: distance of the shares off the scale. minority: the model's mass on the rows' smallest
classes over the group's. mass: of all class tokens. flip: the accepted answer beats the rejected
one after its belief, and loses after the other. vote: squared error of the vote share that beliefs
and answers imply. r: the same by rewards, not log-probs. opinion: responses that express the
announced class, by the templates' rule. CBC: beliefs that belong to the class before them. BPC:
responses in which the judge finds the belief. RS: cosine of the response to the dataset's for that
belief. sampled: JSD of sampled classes; its floor: that of a perfect model. coverage: the group's
classes among the samples, over a perfect sampler's. no class: answers that begin with none. given:
reward margin in nats of the answer after the accepted belief, which GDPO trains; joint: of belief
and answer, which DPO trains and GDPO may lower; where the accepted belief is the group's largest
(maj), smallest (min) or another (oth)."""


def print_tables(results, part):
    """A line per run, in blocks of as many columns as fit 100 characters."""
    results = {name: r[part] for name, r in results.items() if part in r}
    columns = [k for k in METRICS if any(r.get(k) for r in results.values())]
    width = min(30, max(map(len, results)))
    for start in range(0, len(columns), (100 - width) // 14):
        block = columns[start:start + (100 - width) // 14]
        print("\n" + " " * width + "".join(f" {METRICS[k]:>13}" for k in block))
        for name, r in results.items():
            print(f"{name[-width:]:{width}}" + "".join(f" {cell(r.get(k)):>13}" for k in block))


def cell(v):
    if not v:
        return "-"
    return f"{v[0]:.3f} " + (f"{'*':6}" if v[1] is None else f"±{(v[2] - v[1]) / 2:.3f}")


def print_report(results, o):
    """All tables, questions that were not trained on first, and what the columns mean."""
    words = {"unseen": "unseen questions, which no training row asks",
             "seen": "seen questions, of which the training rows hold other wordings"}
    results = over_seeds(results)
    for part in dict.fromkeys(part for r in results.values() for part in r):
        of = next(r[part] for r in results.values() if part in r)
        if part == "seen" and of["word_for_word"]:
            words["seen"] = (f"seen questions, {of['word_for_word']} of {of['rows']} prompts word "
                             "for word as in the training rows")
        size = f": {of['rows']} {o.split} rows, {of['questions']} questions" if "rows" in of else ""
        print(f"\n{words.get(part, part)}{size}")
        print_tables(results, part)
    print(f"\n{LEGEND}")


def print_differences(runs, against):
    """How the runs differ from one of them, where they have the same rows."""
    base, found = runs[against], {}
    for out, r in runs.items():
        if r is not base and r.rows == base.rows:      # of a ratio, the numerators' difference
            found[out] = summary({k: v - base.metrics[k] * (1 if v.ndim == 1 else [1, 0])
                                  for k, v in r.metrics.items() if k in base.metrics}, base)
        elif r is not base:
            print(f"{out} was measured on other rows than {against}: no difference")
    for part in ("unseen", "seen"):
        if any(part in r for r in found.values()):
            print(f"\ndifference to {against}, {part} questions")
            print_tables(found, part)


# =============================================================================================
# Plumbing: the sentence encoder, the command line

def sentence_encoder(folder, device="cpu"):
    """all-MiniLM-L6-v2, a small BERT -> a function from texts to unit vectors (N, C), the mean of
    the last layer over a sentence's tokens. ValueError for another kind of model."""
    c, vocab = (read_json(Path(folder) / f"{name}.json") for name in ("config", "tokenizer"))
    w = {k.removeprefix("bert."): v.float().to(device)
         for k, v in read_weights(Path(folder)).items()}
    layers = {int(k.split(".")[2]) for k in w if k.startswith("encoder.layer.")}
    if (c.get("model_type"), c.get("hidden_act"), c.get("num_hidden_layers")) != (
            "bert", "gelu", len(layers)):
        raise ValueError(f"{folder} is no BERT with exact GELUs: all-MiniLM-L6-v2 is one")
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"],
                                        c["layer_norm_eps"])

    @torch.no_grad()
    def vectors(ids):                                  # (B, T), padded with -1 -> (B, C)
        real = ids >= 0
        words, places, kinds = (w[f"embeddings.{x}_embeddings.weight"]
                                for x in ("word", "position", "token_type"))
        x = norm(words[ids.clamp(min=0)] + places[:ids.shape[1]] + kinds[0], "embeddings.LayerNorm")
        for i in range(c["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            q, k, v = (linear(x, f"{at}attention.self.{name}").unflatten(
                -1, (c["num_attention_heads"], -1)).transpose(1, 2)
                       for name in ("query", "key", "value"))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
            y = linear(y.transpose(1, 2).flatten(2), f"{at}attention.output.dense")
            x = norm(x + y, f"{at}attention.output.LayerNorm")
            y = linear(F.gelu(linear(x, f"{at}intermediate.dense")), f"{at}output.dense")
            x = norm(x + y, f"{at}output.LayerNorm")
        return F.normalize((x * real[..., None]).sum(1), dim=-1)

    def encode(texts, batch=64):
        ids = [torch.tensor(wordpiece(text, vocab["model"]["vocab"])) for text in texts]
        order, out = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
        for start in range(0, len(order), batch):
            part = [ids[i] for i in order[start:start + batch]]
            out.append(vectors(torch.nn.utils.rnn.pad_sequence(part, True, -1).to(device)).cpu())
        return torch.cat(out)[np.argsort(order)].numpy()
    return encode


def wordpiece(text, vocab, most=256):
    """BERT's uncased tokenizer: words and marks in lower case without accents; each word as the
    longest pieces of the vocabulary, those within it with ## before them. At most `most` ids."""
    spaced, ids = "", [vocab["[CLS]"]]
    for c in unicodedata.normalize("NFD", "".join(c.lower() for c in text)):
        kind = unicodedata.category(c)
        if c in "\t\n\r" or kind == "Zs":
            spaced += " "
        elif kind[0] == "P" or c in "$+<=>^`|~" or CHINESE.match(c):
            spaced += f" {c} "
        elif kind[0] != "C" and kind != "Mn" and c != "\ufffd":      # no controls, no accents
            spaced += c
    for word in spaced.split():
        pieces, start = [], 0
        while start < len(word) <= 100:
            ends = (e for e in range(len(word), start, -1)
                    if "##" * (start > 0) + word[start:e] in vocab)
            end = next(ends, 101)
            pieces.append(vocab.get("##" * (start > 0) + word[start:end]))
            start = end
        ids += pieces if pieces and None not in pieces else [vocab["[UNK]"]]
    return ids[:most - 1] + [vocab["[SEP]"]]


CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf"
                     "\U0002f800-\U0002fa1f]")


def try_servers(o, client, device):
    """Try the judge's and the encoder's key, server and weights before hours of other work; returns
    the function from texts to vectors, or None."""
    if o.judge:
        client.check(llm=o.judge)
    if o.embeddings.startswith("api:"):
        embed(client, ["test"], o.embeddings[4:])
        return lambda texts: embed(client, texts, o.embeddings[4:])
    return sentence_encoder(find_checkpoint(o.embeddings), device) if o.embeddings else None


def measure_all(outs, o, client, device):
    """Measure the runs, and all that follows. What cannot be measured is left out with a line."""
    runs, problems, tools = {}, [], {}
    on_first_rank(lambda: tools.update(encode=try_servers(o, client, device)))
    for out in progress(outs, desc="runs", disable=len(outs) == 1 or rank_and_size()[0] > 0):
        try:
            runs[out] = measure(out, o, device, client)
        except (ValueError, OSError, FloatingPointError) as e:
            problems.append(f"{out}: {e}")
    if not runs:
        raise ValueError(problems[0])
    for problem in problems:
        say("left out:", problem)
    on_first_rank(lambda: finish(runs, o, client, tools["encode"]))


def finish(runs, o, client, encode):
    """Judge the answers, write eval.json again, print the tables. What was measured is shown even
    if a judge fails, which is an error at the end."""
    failed = None
    try:
        if o.judge_check:
            print(check_judge(next(iter(runs.values())).rows, client, o.judge, o.judge_check))
        for out, r in runs.items() if o.judge or encode else ():
            print(f"{out}: {judge_answers(r, o, client, encode)}")
            save(r, o)
    except (ValueError, OSError) as e:
        failed = e
    print_report({out: summary(r.metrics, r) for out, r in runs.items()}, o)
    if o.against in runs:
        print_differences(runs, o.against)
    if failed:
        raise failed


def save(r, o):
    """Write a Run's eval.json."""
    at = np.arange(len(r.rows)) if r.seen.all() else np.flatnonzero(~r.seen)
    at = [at[len(at) * k // 3] for k in range(3)] if r.answers else []     # for Table 3
    write(r.folder / "eval.json", json.dumps({
        "split": o.split, "checkpoint": o.checkpoint, "data": r.data,
        "samples": len(r.answers[0]) if r.answers else 0, "judged": r.judged,
        "embeddings": o.embeddings, **summary(r.metrics, r), "reference_jsd": r.reference_jsd,
        "answers": [{k: r.rows[i][k] for k in ("prompt", "options", "probabilities")}
                    | dict(zip(("class", "belief", "response"), r.answers[i][0])) for i in at]},
        indent=1) + "\n")


SIGNS = {"±": "+-", "↓": "v", "↑": "^", "→": ">", "█": "#"}     # for a terminal without UTF-8


def main():
    codecs.register_error("signs", lambda e: (SIGNS.get(e.object[e.start], "?"), e.start + 1))
    sys.stdout.reconfigure(errors="signs")
    given = vars(flags().parse_args())
    outs = [x if x.startswith("chat:") else str(Path(x)) for x in given.pop("OUT")]
    outs = list(dict.fromkeys(x for x in outs if not Path(x).is_file()))       # of out/*, say
    server = Chat(**{k: given.pop(k) for k in SERVER})
    o = Config(**given)
    o.samples = (1 if o.ask else 8) if o.samples is None else o.samples
    o.against = o.against and str(Path(o.against))
    steers, chats = o.belief or o.shares or o.group or o.json, [x for x in outs if x[:5] == "chat:"]
    for wrong, words in (
            (not outs or "chat:" in outs, "OUT must name folders, or a model as in chat:gpt-4o"),
            ((o.judge or o.embeddings) and not o.samples, "--judge, --embeddings need --samples"),
            (o.judge_check and not o.judge, "--judge_check needs a --judge"),
            (o.against and o.against not in outs, f"--against {o.against} is none of the runs"),
            (steers and not o.ask, "--belief, --shares, --group and --json need --ask"),
            (o.belief and o.shares, "--belief holds a belief, --shares draws it: give one"),
            (o.ask and chats, "--ask reads probabilities, which chat:MODEL does not give")):
        if wrong:
            raise ValueError(words)
    if o.ask:
        return ask(outs, o)
    client = Client(server, Path(outs[0]).parent / "answers.jsonl")
    measure_all(outs, o, client, setup(device_of(o.device)))
    leave()


if __name__ == "__main__":
    run(main)
