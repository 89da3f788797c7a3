"""Measure runs, and ask them what they believe and say.

    python evaluate.py out/toy-gdpo-seed0 [OUT ...]                   # tables over runs
    python evaluate.py out/toy-gdpo-seed0 --ask "How do you rate night buses?"
    python evaluate.py out/* --judge gpt-4o-mini --embeddings sentence-transformers/all-MiniLM-L6-v2
    python evaluate.py gpt2-large chat:gpt-4o --data data/usa-icf     # few-shot prompting

Fifth in reading order. Prints tables, and writes their numbers to OUT/eval.json and the sampled
answers to OUT/samples.jsonl. Works under torchrun. A new metric is an array with one value per row
and a name in METRICS. Letters: B rows, K belief classes, k answers per row. NaN: does not apply.
"""
import json
import re
import sys
import textwrap
import unicodedata
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Literal

from data import (FORM, Parser, add_flags, class_ids, dataset_name, encode_rows,
                  find_checkpoint, help_first, load_dataset, normal, progress, prompt_text,
                  question_of, read_json, read_text, run, write)
from synth import HARMLESS, PROMPTS, Chat, Client, chat, closed, embed, read_label


@dataclass
class Config:
    split: Literal["train", "eval", "test"] = "test"  # rows to measure
    checkpoint: Literal["best", "last"] = "best"  # which of a run's checkpoints
    data: str = ""               # dataset, or several joined by commas; empty: the run's own
    samples: int = None          # answers per row (8, like the authors); --ask: per class (1)
    max_new_tokens: int = 64     # maximum length of an answer
    seed: int = 0                # seed for sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    against: str = ""            # baseline run: also print the others' paired differences to it
    judge: str = ""              # LLM that judges the answers (BPC), e.g. gpt-4o-mini
    judge_check: int = 0         # first test the judge on this many labelled reviews
    embeddings: str = ""         # RS encoder: all-MiniLM-L6-v2 (folder or hub name) or api:MODEL
    belief: str = ""             # --ask: answer with this belief, e.g. "4<Somewhat good>" or 4
    shares: str = ""             # --ask: draw classes from these shares, e.g. 0,0,0,0,0.5,0.5
    group: str = ""              # --ask: the group to speak for
    json: bool = False           # --ask: one JSON object per question
    ask: list = None             # questions to ask; if none is given, the lines of standard input


SERVER = [field.name for field in fields(Chat) if field.name not in ("llm", "temperature")]


def flags():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("OUT", nargs="+", help="runs; with --ask or --data also checkpoints; with "
                        "--data also chat:MODEL")
    parser.add_argument("--ask", action="append", nargs="?", const="-", metavar="QUESTION",
                        help="print beliefs and answers; without QUESTION, read stdin line by line")
    add_flags(parser, Config, skip=("ask",))
    add_flags(parser, Chat, SERVER)
    return parser


help_first(__name__, flags)            # answers --help without waiting for torch

import numpy as np
import regex                           # comes with tiktoken
import torch
import torch.nn.functional as F

from losses import RESPONSE
from model import fingerprint, read_weights
from train import (Config as Flags, autocast, belief_metrics, device_of, gather, jsd, leave,
                   load_checkpoint, margins, on_first_rank, rank_and_size, say, score_rows, setup)


# ---------------------------------------------------------------------------------------------
# Metrics computed from probabilities and from sampled answers

def ordinal_metrics(q, p, meta):
    """What JSD misses about distributions q (model) and p (target), (B, K). w1 (B,): Wasserstein
    distance over the ordered classes on the scale, 0 to 1. minority (B, 2): the model's and the
    group's share of the group's smallest class; we report the ratio of their sums."""
    q, p = (x / x.sum(-1, keepdims=True) for x in np.array([q, p], np.float64))
    on = np.array([c != meta.get("off_scale") for c in meta["classes"]])    # (K,)
    with np.errstate(invalid="ignore"):                # 0 / 0: no mass is on the scale
        cdf = [(x[:, on] / x[:, on].sum(-1, keepdims=True)).cumsum(-1) for x in (q, p)]
    smallest = np.where(p > 0, p, np.inf).argmin(-1)[:, None]          # (B, 1), of the held classes
    return {"w1": np.abs(cdf[0] - cdf[1]).sum(-1) / max(1, on.sum() - 1),
            "minority": np.hstack([np.take_along_axis(x, smallest, 1) for x in (q, p)])}


def preference_metrics(s, items, beta):
    """Do preferences follow from beliefs? {name: (B,)}; NaN where both beliefs share a class.
    h_b: the accepted answer's log-prob minus the rejected one's, given belief b; flip_r and vote_r
    use rewards instead. flip: h > 0 given the accepted belief and h < 0 given the rejected one.
    vote: (sum_b pi(b|x) sigmoid(h_b) - p_w / (p_w + p_l)) squared (arXiv 2506.06298)."""
    pair, out = torch.tensor([[i.accept, i.reject] for i in items]), {}           # (B, 2)
    belief = s.class_logps.double().gather(1, pair).softmax(-1)                       # (B, 2)
    scores = {"": s.logps} | ({} if s.ref is None else {"_r": beta * (s.logps - s.ref)})
    for name, values in scores.items():
        chosen, own, given, flip = values[..., RESPONSE].double().T                   # (B,) each
        h = torch.stack([chosen - given, flip - own], 1)                              # (B, 2)
        votes = (belief * torch.sigmoid(h)).sum(-1)
        out["flip" + name] = ((h[:, 0] > 0) & (h[:, 1] < 0)).double()
        out["vote" + name] = (votes - s.pair[:, 0] / s.pair.sum(-1)) ** 2
    same = pair[:, 0] == pair[:, 1]                    # (B,): nothing to flip
    return {k: v.masked_fill(same, torch.nan).numpy() for k, v in out.items()}


def reference_distributions(target):
    """{name: (B, K)}: baselines that need no training (Figure 4). target (B, K)."""
    top, bottom = (np.eye(target.shape[1])[at] for at in (target.argmax(-1), target.argmin(-1)))
    # differs: the authors' code sorts the shares. Like the paper's text, we swap the largest with
    # the smallest, the second largest with the second smallest, and so on.
    order, reverse = np.argsort(target, -1, kind="stable"), np.empty_like(target)
    np.put_along_axis(reverse, order, np.take_along_axis(target, order[:, ::-1], 1), 1)
    return {"majority": top, "reverse": reverse, "uniform": np.ones_like(target),
            **{f"noise({x})": target + x * bottom - x * top for x in (0.05, 0.1)}}


@torch.no_grad()
def sample_rows(model, items, tokenizer, o, dtype):
    """Sample o.samples answers per item, at temperature 1 from all tokens (section 5.1.1): a list
    of lists of texts. An answer's randomness depends only on the seed, its row and its number."""
    rank, size = rank_and_size()
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))[rank::size]
    jobs, texts = [(i, k) for i in order for k in range(o.samples)], {}
    # The key/value cache may take half of the GPU's free memory, or 4 GB on a CPU.
    room = torch.cuda.mem_get_info()[0] / 2 if model.head.is_cuda else 4e9
    longest = max(len(i.prompt) for i in items) + o.max_new_tokens
    batch = int(room / (8 * model.cfg.n_layer * model.cfg.n_embd * longest))   # K, V: 4 bytes each
    batch = max(1, min(512, batch) // o.samples) * o.samples   # a row's answers share a prefill
    for start in progress(range(0, len(jobs), batch), desc="sampling", disable=rank > 0, delay=1):
        part = jobs[start:start + batch]
        with autocast(model.head.device, dtype):
            ids = model.generate([items[i].prompt for i, _ in part], o.max_new_tokens, 1.0,
                                 tokenizer.eos, [(o.seed, items[i].row, k) for i, k in part],
                                 tokenizer.n_tokens)
        texts |= zip(part, map(tokenizer.decode, ids))
    texts = dict(gather([*texts.items()]))
    return [[texts[i, k] for k in range(o.samples)] for i in range(len(items))]


def either(texts):
    """A regular expression that matches any of these texts, the longest that fits."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def answer_parser(meta):
    """Return parse(text, few_shot=False) -> (class label, belief text, response) of an answer; a
    missing label or belief is None. The belief is one that the dataset knows, or else the text
    before the first `>`. A few-shot answer ends at an empty line or the next "Question:"."""
    belief = rf"<({either(meta.get('belief_to_class') or ())}|.*?)>"
    # "10 out of 10" and "4.5 stars" do not begin with a label
    form = re.compile(rf"(?:({either(meta['classes'])})(?![.,]?[0-9]))?(?:{belief})?(.*)", re.S)

    def parse(text, few_shot=False):
        if few_shot:
            text = re.split(r"\n\s*\n|Question:", text.strip())[0].strip()
        return form.match(text).groups()
    return parse


def expressed_opinion(answers, meta):
    """Whether each response expresses the class that the model announced, (B, k). The templates'
    rule: its first stance phrase must belong to that class. No phrase: not expressed."""
    stances = {phrase.lower(): str(label) for phrase, label in meta["stances"].items()}
    find = re.compile(rf"\b({either(stances)})\b|$")
    stances[""] = ""                                   # no phrase: no class
    return np.array([[float(stances[find.search(text.lower())[0]] == label)
                      for label, _, text in x] for x in answers])


def answer_metrics(answers, target, meta):
    """{name: (B,)} of parsed answers [[(label, belief, response), ...], ...]; target (B, K)."""
    k, p, rng = len(answers[0]), target / target.sum(-1, keepdims=True), np.random.default_rng(0)
    # An answer without a label counts as off the scale or, if no class is, as one nobody holds.
    labels = [[label or meta.get("off_scale") for label, _, _ in x] for x in answers]
    counts = np.array([[x.count(c) for c in (*meta["classes"], None)] for x in labels])  # (B, K+1)
    out = {"sampled_jsd": jsd(counts, np.pad(p, ((0, 0), (0, 1)))),
           "sampling_floor": np.mean([jsd(rng.multinomial(k, p), p) for _ in range(64)], axis=0)}
    if to_class := meta.get("belief_to_class"):        # CBC, section 5.1.1
        out["cbc"] = np.array([np.mean([str(to_class.get(belief, "")) == label
                                        for label, belief, _ in x]) for x in answers])
    if meta.get("stances"):
        out["opinion"] = expressed_opinion(answers, meta).mean(-1)
    return out


# ---------------------------------------------------------------------------------------------
# Judges of the responses: an LLM (BPC), a sentence encoder (RS)

YES_OR_NO = re.compile(r"(?i)[\W_]*(?:answer[\W_]+)?(yes|no)\b(?![\s,]*(/|or\b|and\b|yes\b|no\b))")
THREE = dict(zip("12345", "11233"))    # Appendix H: ratings 1 to 5 as three classes


def judge(client, model, prompts, labels):
    """Ask an LLM for a label per prompt, None where it failed (everywhere, if over 5% failed).
    Returns the labels and a summary line. Stops after 20 prompts if no reply can be read."""
    found, failed = [], []
    for part in filter(None, (prompts[:20], prompts[20:])):
        for text, ended in chat(client, part, "judging", closed(answer={"enum": labels}), llm=model,
                                temperature=0.0, max_tokens=64):
            words = YES_OR_NO.match(text)
            label = read_label(text, labels) or words and words[1].title()
            found.append(label if label in labels and ended != "refused" else None)
            failed += [text] if found[-1] is None else []
        if not any(found):
            break
    line = f"{model}: {len(failed)} of {len(found)} judgements failed"
    line += f" (one: {failed[0]!r:.80})" if failed else ""
    if len(failed) > 0.05 * len(found):
        return [None] * len(prompts), f"{line}, more than 5%: no mean is given"
    return found, line


def belief_preference_consistency(answers, rows, client, model):
    """BPC (B, k): does an LLM find the announced belief (for reviews, the class) in the response?
    NaN where the judge failed; 0, without asking, if either is missing. And a summary line."""
    reviews, asked = not rows[0].get("accept_choice"), {}
    form, labels = ("rating", ["1", "2", "3"]) if reviews else ("expresses", ["Yes", "No"])
    for i, (row, parsed) in enumerate(zip(rows, answers)):
        for k, (label, belief, response) in enumerate(parsed):
            expected = THREE.get(label) if reviews else belief and "Yes"
            if expected and response.strip():
                asked[i, k] = expected, PROMPTS[form].format(question=row["prompt"], belief=belief,
                                                             answer=response)
    found, line = judge(client, model, [prompt for _, prompt in asked.values()], labels)
    bpc = np.full((len(answers), len(answers[0])), np.nan if {*found} == {None} else 0.0)
    for (at, (expected, _)), label in zip(asked.items(), found):
        bpc[at] = label == expected if label else np.nan
    return bpc, line


def check_judge(rows, client, model, n):
    """Compare the judge with the ratings of n labelled reviews (Appendix H): a line to print."""
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]
    truth = [THREE.get(str(row["accept_choice_id"])) for row in rows]
    if None in truth or rows[0].get("accept_choice"):
        raise ValueError("--judge_check is for reviews, whose classes are the ratings 1 to 5")
    prompts = [PROMPTS["rating"].format(answer=row["accept_response"]) for row in rows]
    found, line = judge(client, model, prompts, ["1", "2", "3"])
    if not any(found):
        return line
    said, true = np.array([pair for pair in zip(found, truth) if pair[0]]).T
    f1 = 0.0
    for c in "123":                    # each class weighs as much as its true frequency
        told, held = said == c, true == c
        f1 += held.mean() * 2 * (told & held).sum() / max(1, told.sum() + held.sum())
    return f"{line}; in 3 classes accuracy {(said == true).mean():.3f}, weighted F1 {f1:.3f}"


def response_similarity(answers, rows, encode):
    """RS (B, k): cosine of each response to the dataset's for the announced belief, of its own row
    if possible. 0 if the belief is not an option or the response empty; NaN if there is none."""
    known, pairs, rs = {}, {}, np.zeros((len(answers), len(answers[0])))
    for row, side in product(rows, ("accept", "reject")):
        for key in (row["prompt"], question_of(row)):
            known.setdefault((key, row.get(f"{side}_choice")), row[f"{side}_response"])
    for i, (row, parsed) in enumerate(zip(rows, answers)):
        for k, (_, belief, response) in enumerate(parsed):
            if belief in row["options"] and response.strip():
                other = known.get((question_of(row), belief))          # of any wording
                pairs[i, k] = response, known.get((row["prompt"], belief), other)
    texts = list(dict.fromkeys(text for pair in pairs.values() for text in pair if text))
    vectors = dict(zip(texts, encode(texts))) if texts else {}
    for at, (response, theirs) in pairs.items():
        rs[at] = vectors[response] @ vectors[theirs] if theirs else np.nan   # unit vectors
    return rs


@torch.no_grad()
def encode(texts, name, client=None, device="cpu"):
    """Embed texts as unit vectors (N, C), with a server's model (api:NAME) or all-MiniLM-L6-v2, a
    small BERT whose last layer is averaged over each text's tokens."""
    if name.startswith("api:"):
        return embed(client, texts, name[4:])
    folder = find_checkpoint(name)
    c = read_json(folder / "config.json")
    if (c.get("model_type"), c.get("hidden_act")) != ("bert", "gelu"):
        raise ValueError(f"{folder} is not a BERT with exact GELUs, as all-MiniLM-L6-v2 is")
    vocab = read_json(folder / "tokenizer.json")["model"]["vocab"]
    w = {k.removeprefix("bert."): v.float().to(device) for k, v in read_weights(folder).items()}
    both = lambda name: (w[f"{name}.weight"], w[f"{name}.bias"])
    linear = lambda x, name: F.linear(x, *both(name))
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], *both(name), c["layer_norm_eps"])
    heads = lambda x: x.unflatten(1, (c["num_attention_heads"], -1)).transpose(0, 1)  # (H, T, D)
    word, position, kind = (w[f"embeddings.{k}_embeddings.weight"]
                            for k in ("word", "position", "token_type"))
    vectors = []
    for text in texts:                                 # one at a time, so nothing is padded
        ids = wordpiece(text, vocab)
        x = norm(word[ids] + position[:len(ids)] + kind[0], "embeddings.LayerNorm")     # (T, C)
        for at in (f"encoder.layer.{i}." for i in range(c["num_hidden_layers"])):
            qkv = (heads(linear(x, f"{at}attention.self.{k}")) for k in ("query", "key", "value"))
            y = F.scaled_dot_product_attention(*qkv).transpose(0, 1).flatten(1)           # (T, C)
            y = linear(y, f"{at}attention.output.dense")
            x = norm(x + y, f"{at}attention.output.LayerNorm")
            y = F.gelu(linear(x, f"{at}intermediate.dense"))
            x = norm(x + linear(y, f"{at}output.dense"), f"{at}output.LayerNorm")
        vectors.append(F.normalize(x.mean(0), dim=0).cpu())
    return torch.stack(vectors).numpy()


MARK = r"[\p{P}$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]"


def wordpiece(text, vocab, most=256):
    """BERT's uncased tokenizer, at most `most` ids: lower-cases, strips accents, and splits each
    word greedily into the longest pieces in the vocabulary; pieces inside a word begin with ##."""
    text = unicodedata.normalize("NFD", "".join(c.lower() for c in text))
    text = regex.sub(r"(?V1)\p{Mn}|[\p{C}--[\t\n\r]]|\ufffd", "", text)  # no accents, controls
    ids = [vocab["[CLS]"]]
    for word in regex.findall(rf"{MARK}|(?:(?!{MARK})\S)+", text):
        pieces, prefix = [], ""
        while word:
            ends = (n for n in range(len(word), 0, -1) if prefix + word[:n] in vocab)
            end = next(ends, None)
            if not end or len(word) > 100:             # as in BERT
                pieces = [vocab["[UNK]"]]
                break
            pieces.append(vocab[prefix + word[:end]])
            word, prefix = word[end:], "##"
        ids += pieces
    return ids[:most - 1] + [vocab["[SEP]"]]


# ---------------------------------------------------------------------------------------------
# Runs, intervals and tables

load_once = lru_cache(load_dataset)    # the runs of a study share their dataset
SEED = re.compile(r"-seed\d+$")        # runs that differ only in this suffix are one method


def read_run(out, o):
    """The flags of a run (defaults for a bare checkpoint or a chat model). Adds the folder of its
    `weights`, a `folder` for results, `meta` and `splits` to measure, rows it was `trained` on."""
    r = Flags(data=o.data, dtype="bfloat16" if device_of(o.device) == "cuda" else "float32")
    r.folder = Path(f"out/{dataset_name(o.data)}-{re.sub('[/:]+', '-', out.strip('/'))}")
    r.weights, folder, weights = out, Path(out), Path(out, o.checkpoint)
    if o.ask and (folder / "../metrics.jsonl").is_file():      # OUT/best
        folder, weights = folder.parent, folder
    if (folder / "metrics.jsonl").is_file():
        try:
            first = dict(json.loads(read_text(folder / "metrics.jsonl").split("\n")[0]))
        except (ValueError, TypeError):
            raise ValueError("its metrics.jsonl is empty or damaged: --resume mends it") from None
        vars(r).update(read_json(folder / "config.json"), folder=folder, weights=weights,
                       began=first.get("init"))        # the reference's fingerprint
    elif not (o.data or o.ask):
        raise ValueError("it is no run of train.py; a checkpoint or chat:MODEL needs --data")
    r.meta, r.splits = {"classes": list("012345"), "form": FORM}, {}       # if there is no data
    if o.data or r.data:
        splits = ("train", "eval", o.split)
        r.meta, r.splits = load_once(o.data or r.data, splits, r.form)
        r.trained = load_once(r.data, splits, r.form)[1]["train"]
    r.parse = answer_parser(r.meta)
    return r


def measure(out, o, client, device):
    """Compute and save every metric that needs no judge. Returns the run (see read_run) with its
    rows; metrics {name: (B,), or (B, 2) for a ratio of sums}; answers [[(label, belief, response),
    ...], ...]; seen (B,), whether training rows ask the question; about, the rest of eval.json."""
    r = read_run(out, o)
    r.rows, r.metrics = r.splits[o.split], {}
    if out.startswith("chat:"):
        texts = chat_answers(out[5:], r, o, client)
    else:
        texts = measure_weights(out, r, o, device)
    r.answers = [[r.parse(text, few_shot=bool(row.get("context"))) for text in k]
                 for row, k in zip(r.rows, texts)]
    target, known = (np.array([row["probabilities"] for row in rows])
                     for rows in (r.rows, r.splits["eval"]))
    if r.answers:
        r.metrics |= answer_metrics(r.answers, target, r.meta)
    wordings = lambda row: {question_of(row), normal(row["prompt"])}
    trained = set().union(*map(wordings, r.trained))
    r.seen = np.array([bool(wordings(row) & trained) for row in r.rows])     # (B,)
    reference = {k: float(jsd(q, known).mean()) for k, q in reference_distributions(known).items()}
    r.about = {"split": o.split, "checkpoint": o.checkpoint, "data": o.data or r.data,
               "reference_jsd": reference}
    if rank_and_size()[0] == 0:
        lines = [{"prompt": row["prompt"], "answers": k} for row, k in zip(r.rows, texts)]
        write(r.folder / "samples.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        save(r)
    return r


def chat_answers(model, r, o, client):
    """A chat model's answers after few-shot context (Appendix E); empty where it refused."""
    if not all(row.get("context") for row in r.rows):
        raise ValueError("the rows have no few-shot context: make them with `synth.py icf`")
    prompts = ["".join(row["context"]) + prompt_text(row, r.meta["form"]) for row in r.rows]
    replies = on_first_rank(lambda: chat(client, prompts, model, llm=model, temperature=0.0,
                                         max_tokens=o.max_new_tokens))
    return [["" if ended == "refused" else text] for text, ended in replies]


def measure_weights(out, r, o, device):
    """Score the rows that fit the model's context (they become r.rows) and compute the metrics of
    its probabilities; returns its sampled answers as texts."""
    model, tokenizer = load_checkpoint(r.weights, device)
    limit = min(r.max_length or model.cfg.n_ctx, model.cfg.n_ctx)
    items = encode_rows(r.rows, tokenizer, r.meta, limit, r.overlong, f"{out}, {o.split} rows")
    r.rows = [r.rows[i.row] for i in items]
    score = lambda model: score_rows(model, items, ("chosen", "own", "given", "flip"),
                                     class_ids(tokenizer, r.meta["classes"]), r.dtype)
    s = score(model)
    q = s.class_logps.double().exp().numpy()           # (B, K), sums to the class mass
    r.metrics = belief_metrics(s) | ordinal_metrics(q, s.target.numpy(), r.meta)
    if r.init:
        try:
            reference, _ = load_checkpoint(r.init, device)
            if fingerprint(reference) != r.began:
                raise ValueError(f"{r.init} has been retrained since")
            s.ref = score(reference).logps             # (B, branches, pieces)
            r.metrics |= margins(s, items, r.beta)
        except (ValueError, OSError) as e:
            say(f"{out}: no reference, no margins: {e}")
    r.metrics |= preference_metrics(s, items, r.beta)
    return sample_rows(model, items, tokenizer, o, r.dtype) if o.samples else []


def save(r):
    write(r.folder / "eval.json", json.dumps(r.about | summary(r), indent=1) + "\n")


METRICS = {  # name: (header, whose arrow points to better; explanation for the legend)
    "jsd": ("JSD ↓", "Jensen-Shannon distance of class distributions, 0 to 0.833"),
    "opinion": ("opinion ↑", "share of responses expressing the announced class (templates' rule)"),
    "cbc": ("CBC ↑", "share of beliefs that belong to the class announced before them"),
    "bpc": ("BPC ↑", "share of responses in which the judge finds the announced belief"),
    "rs": ("RS ↑", "cosine between the response and the dataset's for the announced belief"),
    "flip": ("flip ↑", "the accepted answer wins given its belief and loses given the other"),
    "vote": ("vote ↓", "squared error of the vote share that beliefs and answers imply"),
    "flip_r": ("flip r ↑", "flip by rewards, i.e. by the gain over the reference"),
    "vote_r": ("vote r ↓", "vote by rewards"),
    "w1": ("W1 ↓", "Wasserstein distance over the ordered classes, 0 to 1"),
    "minority": ("minority →1", "the model's mass on the smallest classes divided by the group's"),
    "class_mass": ("mass ↑", "total probability of the class tokens"),
    "sampled_jsd": ("sampled ↓", "JSD of the sampled classes"),
    "sampling_floor": ("its floor", "the sampled JSD of a perfect model"),
    "given_majority": ("given maj ↑", "margin (nats) given the majority's belief; GDPO trains it"),
    "given_minority": ("given min ↑", "the same given the minority's belief"),
    "joint_majority": ("joint maj", "margin of the majority's belief and answer; DPO trains it"),
    "joint_minority": ("joint min", "the same for the minority; GDPO may lower both")}


def interval(values, questions):
    """[value, low, high]: the mean of values (B,), or the ratio of sums of values (B, 2), and its
    95% bootstrap interval over questions, each drawn with all its rows; None if all are NaN."""
    pairs = values if values.ndim == 2 else np.stack([values, np.ones(len(values))], 1)
    good = ~np.isnan(pairs).any(1)                     # the metric applies to these rows
    if not good.any():
        return None
    _, index = np.unique(np.asarray(questions)[good], return_inverse=True)   # row -> question
    top, bottom = (np.bincount(index, x) for x in pairs[good].T)      # sums by question
    n, value = len(top), float(top.sum() / bottom.sum())
    if n < 20:                                         # the interval would be too narrow
        return [value, None, None]
    picks = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)     # (2000, n)
    return [value, *np.percentile((picks @ top) / (picks @ bottom), [2.5, 97.5]).tolist()]


def summary(r, base=None, name=""):
    """{part: {metric: [value, low, high]}}. The parts are questions "unseen" and "seen" in
    training; if there are several groups, each of them, and the worst value of each metric; and
    the paired differences to a baseline run `base` on the same rows."""
    questions = np.array([question_of(row) for row in r.rows])
    groups = np.array([row.get("group") or "" for row in r.rows])
    parts, names = {"unseen": ~r.seen, "seen": r.seen}, sorted(set(groups))

    def intervals(metrics, mask):
        return {"rows": int(mask.sum()), "questions": len(set(questions[mask]))} | {
            k: interval(metrics[k][mask], questions[mask]) for k in METRICS if k in metrics}
    if len(names) > 1:
        parts |= {f"group {g}": groups == g for g in names}
    out = {part: intervals(r.metrics, mask) for part, mask in parts.items() if mask.any()}
    for k in METRICS if len(names) > 1 else ():
        worst = max if "↓" in METRICS[k][0] else min
        values = filter(None, [out[f"group {g}"].get(k) for g in names])
        out.setdefault("worst group", {})[k] = worst(values, key=lambda v: v[0], default=None)
    if base and base is not r and base.rows == r.rows:
        # For a ratio of sums: the difference of the numerators over the same denominator.
        gains = {k: v - base.metrics[k] * (1 if v.ndim == 1 else [1, 0])
                 for k, v in r.metrics.items() if k in base.metrics}
        out |= {f"{part}, difference to {name}": intervals(gains, parts[part])
                for part in ("unseen", "seen") if part in out}
    return out


def mean_over_seeds(values):
    """Average [value, low, high] over seeds; None if any seed has none. The half-width is the
    larger of the values' standard deviation and the mean half-width of their intervals."""
    if not values or not all(values):
        return None
    means, halves = [v[0] for v in values], [(v[2] - v[1]) / 2 for v in values if v[1] is not None]
    half = max(np.std(means, ddof=int(len(means) > 1)), np.mean(halves or [0]))
    return [np.mean(means), np.mean(means) - half, np.mean(means) + half]


def cell(runs, part, k):
    """A metric of a run, or its mean over the seeds of a method, as printed in the tables."""
    values = [r.get(part, {}).get(k) for r in runs]
    v = mean_over_seeds(values) if len(values) > 1 else values[0]
    if not v:
        return "-"
    return f"{v[0]:.3f} {'*':6}" if v[1] is None else f"{v[0]:.3f} ±{(v[2] - v[1]) / 2:.3f}"


def print_report(results):
    """Print a line per method (or run) for each part, in blocks 100 characters wide; a legend."""
    methods, shown = {}, {}
    for name in results:
        methods.setdefault(SEED.sub("", name), []).append(name)
    methods = {f"{method} ({len(names)} seeds)" if names[1:] else names[0]: [
        results[name] for name in names] for method, names in methods.items()}
    width = min(30, max(map(len, methods)))
    per_block = (100 - width) // 14                    # each column takes 14 characters
    for part in dict.fromkeys(part for rs in methods.values() for part in rs[0]):
        runs = {name: rs for name, rs in methods.items() if part in rs[0]}
        every = [r.get(part, {}) for rs in runs.values() for r in rs]
        columns = [k for k in METRICS if any(values.get(k) for values in every)]
        shown |= dict.fromkeys(columns)
        first = next(iter(runs.values()))[0][part]     # the worst group has no rows of its own
        size = f": {first['rows']} rows, {first['questions']} questions" if "rows" in first else ""
        print(f"\n{part}{size}")
        for block in (columns[n:n + per_block] for n in range(0, len(columns), per_block)):
            print("\n" + " " * width + "".join(f" {METRICS[k][0]:>13}" for k in block))
            for name, rs in runs.items():
                cells = "".join(f" {cell(rs, part, k):>13}" for k in block)
                print(f"{name[-width:]:{width}}{cells}")
    print("\nunseen: questions that no training row asks in any wording; seen: the others\n"
          "±: half of the 95% bootstrap interval over questions, or the standard deviation "
          "over seeds\nif that is larger; *: fewer than 20 questions, too few for an interval")
    for k in shown:
        print(textwrap.fill(": ".join(METRICS[k]), 100))


# ---------------------------------------------------------------------------------------------
# The command: ask models, or print tables over runs

def ask(outs, o):
    """Ask each model the questions; print bars and answers, or JSON."""
    runs = {out: read_run(out, o) for out in outs}     # a bare checkpoint counts as an opinion run
    for out, r in runs.items():
        if o.belief and not re.fullmatch(f"({either(r.meta['classes'])})(<.+>)?", o.belief):
            raise ValueError(f"--belief must be a class, alone or as in \"4<Yes>\", of "
                             f"{', '.join(r.meta['classes'])}")
        r.rows = sum(r.splits.values(), [])
        groups = {row["group"] for row in r.rows if row.get("group")}
        if (o.group or "{group}" in r.meta["form"]) and o.group not in groups:
            raise ValueError(f"--group must be one that {out} was trained for: "
                             f"{', '.join(sorted(groups)) or 'there is none'}")
        r.model, r.tokenizer = load_checkpoint(r.weights, device_of(o.device))
    lines = (line.strip() for text in o.ask for line in (sys.stdin if text == "-" else [text]))
    for question in filter(None, lines):
        found = {out: opinion_of(question, r, o) for out, r in runs.items()}
        if o.json:
            print(json.dumps({"question": question, "group": o.group, "models": found}), flush=True)
        else:
            print_opinions(question, found)


@torch.no_grad()
def opinion_of(question, r, o):
    """What a model believes about a question (in float32) and what it says: a dict."""
    model, tokenizer, classes = r.model, r.tokenizer, r.meta["classes"]
    prompt = tokenizer.encode(prompt_text({"prompt": question, "group": o.group}, r.meta["form"]))

    def generate(starts, temperature):
        ids = model.generate([prompt + tokenizer.encode(x) for x in starts], o.max_new_tokens,
                             temperature, tokenizer.eos, [(o.seed, n) for n in range(len(starts))],
                             tokenizer.n_tokens)
        return [" ".join(tokenizer.decode(x).split()) for x in ids]

    hidden = model(torch.tensor([prompt], device=model.head.device))[0, -1]           # (C,)
    logps = F.linear(hidden, model.head).log_softmax(-1).double().cpu()               # (V,)
    logps = logps[class_ids(tokenizer, classes)]                                      # (K,)
    # The likeliest belief text of a class is what the model writes greedily after it.
    texts = [r.parse(c + x)[1] for c, x in zip(classes, generate(classes, 0))]
    beliefs = {c: f"{c}<{text}>" if text else c for c, text in zip(classes, texts)}
    starts = [c for c in classes for _ in range(o.samples)]
    if o.belief:                       # a class (for its likeliest belief), or class and belief
        starts = [o.belief] * o.samples
    elif o.shares:
        p, rng = np.genfromtxt([o.shares], delimiter=",", ndmin=1), np.random.default_rng(o.seed)
        if len(p) != len(classes) or min(p) < 0 or not abs(p.sum() - 1) < 0.01:   # words: NaN
            raise ValueError(f"--shares {o.shares} must be {len(classes)} numbers that sum to 1, "
                             f"for the classes {', '.join(classes)}")
        starts = sorted(rng.choice(classes, len(starts), p=p / p.sum()).tolist())
    starts = [beliefs.get(x, x) for x in starts]
    shares, group = logps.softmax(-1).tolist(), group_shares(question, r.rows, o.group)
    return {"classes": classes, "beliefs": texts, "shares": shares, "group_shares": group,
            "class_mass": float(logps.exp().sum()), "jsd": group and float(jsd(shares, group)),
            "answers": [*zip(starts, generate(starts, 1.0))]}


def group_shares(question, rows, group):
    """The group's shares for the one question in the dataset that contains these words, whatever
    comes before and after them. None if no question does, or more than one."""
    words = f" {normal(question)} "
    fit = {tuple(row["probabilities"]) for row in rows
           if group in ("", row.get("group")) and words in f" {normal(row['prompt'])} "}
    return [*fit.pop()] if len(fit) == 1 and len(words.split()) > 2 else None


def print_opinions(question, found):
    """Print, in 80 columns, a line per class for the group and each model, then the answers."""
    if len({str(f["classes"]) for f in found.values()}) > 1:
        raise ValueError("these models have different classes: ask them one at a time")
    clean = lambda text: "".join(c if c.isprintable() else " " for c in text)
    print("\n" + textwrap.fill(clean(question), 80))
    for i, label in enumerate(next(iter(found.values()))["classes"]):
        lines = {}                                     # show a shared group's line once
        for out, f in found.items():
            if f["group_shares"]:
                lines["the group", f["group_shares"][i]] = ""
            lines[str(Path(*Path(out).parts[-2:]))[-20:], f["shares"][i]] = f["beliefs"][i] or ""
        for (name, share), text in lines.items():
            print(f"{label:6.6} {name:20} {share:.2f} {'█' * round(20 * share):20} "
                  f"{clean(text):.26}".rstrip())
            label = ""
    for out, f in found.items():
        print(f"\n{out}" + (f", JSD to the group {f['jsd']:.3f}:" if f["group_shares"] else ":"))
        for answer in f["answers"]:
            print(textwrap.fill("  " + clean(" ".join(answer)), 80, subsequent_indent=" " * 6))


def check_servers(outs, o, client, device):
    """Check that the judge and the encoder work before hours of other work."""
    if o.judge:
        chat(client, [HARMLESS], "checking the server", llm=o.judge, max_tokens=64)
    if o.embeddings:
        encode(["test"], o.embeddings, client, device)
    if o.judge_check:
        out = next((x for x in outs if Path(x, "metrics.jsonl").is_file()), outs[0])
        print(check_judge(read_run(out, o).splits[o.split], client, o.judge, o.judge_check))


def finish(runs, o, client, device):
    """Add RS and BPC if requested, and print all tables, even if a judge fails."""
    mean = lambda values: np.ma.masked_invalid(values).mean(-1).filled(np.nan)    # (B, k) -> (B,)
    vectors = lambda texts: encode(texts, o.embeddings, client, device)           # (N, C)
    try:
        for r in runs.values():
            if o.embeddings and all(row.get("accept_choice") for row in r.rows):
                r.metrics["rs"] = mean(response_similarity(r.answers, r.rows, vectors))
                save(r)
        for out, r in runs.items() if o.judge else ():
            bpc, line = belief_preference_consistency(r.answers, r.rows, client, o.judge)
            r.metrics["bpc"], r.about["judged"] = mean(bpc), line
            print(f"{out}: BPC by {line}")
            save(r)
    finally:
        print_report({out: summary(r, runs.get(o.against), o.against) for out, r in runs.items()})


def main():
    given = vars(flags().parse_args())
    outs = [x if x.startswith("chat:") else str(Path(x)) for x in given.pop("OUT")]
    outs = list(dict.fromkeys(x for x in outs if not Path(x).is_file()))     # e.g. in out/*
    server = Chat(**{k: given.pop(k) for k in SERVER})
    o, runs = Config(**given), {}
    o.against = o.against and str(Path(o.against))
    o.samples = (1 if o.ask else 8) if o.samples is None else o.samples
    for wrong, words in (
            (not outs, "OUT must name folders or a model such as chat:gpt-4o"),
            ((o.judge or o.embeddings) and not o.samples, "--judge, --embeddings need --samples"),
            (o.judge_check and not o.judge, "--judge_check needs a --judge"),
            (o.against and o.against not in outs, f"--against {o.against} is not one of the runs"),
            ("" in map(str.strip, o.ask or ()), "--ask: a question is empty"),
            (o.belief and o.shares, "--belief fixes the belief, --shares draws it: give one"),
            ((o.belief or o.shares or o.group or o.json) and not o.ask,
             "--belief, --shares, --group and --json need --ask")):
        if wrong:
            raise ValueError(words)
    if o.ask:
        return ask(outs, o)
    device = setup(device_of(o.device))
    client = Client(server, Path(outs[0]).parent / "answers.jsonl")
    on_first_rank(lambda: check_servers(outs, o, client, device))
    for out in outs:
        try:
            runs[out] = measure(out, o, client, device)
        except (ValueError, OSError, FloatingPointError) as e:
            say(f"left out: {out}: {e}")
    if not runs:
        raise ValueError("nothing could be measured")
    on_first_rank(lambda: finish(runs, o, client, device))
    leave()


if __name__ == "__main__":
    run(main)
