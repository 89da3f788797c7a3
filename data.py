"""Rows of preference data -> pieces of tokens -> batches. Numpy only: train.py makes the tensors.

Second in reading order. A row is one JSON object a line (see check_row). Prompt, belief and
response are tokenized as three separate pieces and then joined,
    <Q>{prompt}<A> | {class}<{belief text}> | {response}<|endoftext|>      (reviews: {class} alone)
and every scored token knows its piece. No piece has to be searched for, and every loss is a
selection of pieces. meta.json can give the prompt another form, such as one that names the group.

Left out on purpose: streaming and worker processes (the largest published set fits in memory).
"""
import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import random
import re
import signal
import sys
import time
import typing
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import regex                           # comes with tiktoken
import requests
import tiktoken
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Rows

FIELDS = {"prompt": str, "options": list, "probabilities": list, "accept_choice_id": (str, int),
          "accept_response": str, "reject_choice_id": (str, int), "reject_response": str}
TEXTS = ("accept_choice", "reject_choice", "group", "question_id")     # optional fields
SPLITS = ("train", "eval", "test")
FORM = "<Q>{prompt}<A>"                # of the prompt, unless meta.json names another


def prompt_text(row, form):
    """The prompt as the model reads it, without few-shot context."""
    before, after = form.split("{prompt}")             # a group's name may hold braces
    group = row.get("group") or ""
    return before.replace("{group}", group) + row["prompt"] + after.replace("{group}", group)


def normal(text):
    """Text to compare questions by: lower case, words only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def question_of(row):
    """Rows with the same value are wordings of one question."""
    return row.get("question_id") or normal(row["prompt"]) or row["prompt"]


# ---------------------------------------------------------------------------------------------
# Pieces

BELIEF, CLOSE, RESPONSE = range(3)     # belief without its closing token | that token | response
BRANCHES = {                           # name -> belief and response: 0 accepted, 1 rejected
    "chosen": (0, 0),
    "own": (1, 1),                     # rejected response after its own belief (DPO)
    "given": (0, 1),                   # rejected response after the accepted belief (GDPO Eq. 7)
    "flip": (1, 0),                    # accepted response after the rejected belief (a metric)
    "mismatch": (2, 2),                # another row's accepted answer (KTO's z0); see mismatch()
}
EVAL_BRANCHES = ("chosen", "own", "given")


@dataclasses.dataclass
class Item:
    """One row in tokens."""
    row: int                           # its place in the split, for messages and caches
    prompt: list
    beliefs: tuple                     # (accepted, rejected), and another row's after mismatch()
    responses: tuple                   # the same; they end in EOS
    has_close: bool                    # False for reviews, whose belief is the class alone
    target: list                       # (K,) shares, as given
    accept: int                        # class index of the accepted belief, and of the rejected
    reject: int
    n_options: int
    kind: str                          # "majority", "minority" or "other": of the accepted belief
    question: str
    group: str


def kind_of(target, accept):
    """Section 3 of the paper: majority if the accepted class has the largest share, minority if it
    has the smallest share above zero (no pair accepts a class that nobody holds); ties: other."""
    shares = [p for p in target if p > 0]
    p = target[accept]
    if shares.count(p) == 1 and len(shares) > 1:
        return "majority" if p == max(shares) else "minority" if p == min(shares) else "other"
    return "other"


def class_ids(tokenizer, classes):
    """The token id of each class label. ValueError unless each is one token, also before `<`."""
    ids = [tokenizer.encode(c) for c in classes]
    for c, i in zip(classes, ids):
        if len(i) != 1 or tokenizer.encode(f"{c}<")[:1] != i:
            raise ValueError(f"class {c!r} is not one token of its own, but beliefs are read at "
                             "one token: rename the classes in meta.json, to 0..9 for example")
    return [i[0] for i in ids]


def make_item(n, row, meta, prompt, encode, answer):
    """Row n as an Item. encode and answer (which adds EOS) turn texts into ids."""
    sides = [(str(row[f"{s}_choice_id"]), row.get(f"{s}_choice")) for s in ("accept", "reject")]
    target = row["probabilities"]
    accept, reject = (meta["classes"].index(c) for c, _ in sides)
    return Item(
        row=n, prompt=prompt,
        beliefs=tuple(encode(f"{c}<{text}>" if text else c) for c, text in sides),
        responses=tuple(answer(row[f"{s}_response"]) for s in ("accept", "reject")),
        has_close=bool(sides[0][1]), target=target, accept=accept, reject=reject,
        n_options=len(row["options"]), kind=kind_of(target, accept), question=question_of(row),
        group=row.get("group") or "")


def longest(item):
    """Tokens of an Item's longest sequence."""
    return len(item.prompt) + max(map(len, item.beliefs)) + max(map(len, item.responses))


def encode_rows(rows, tokenizer, meta, max_length, overlong="error", name="data"):
    """Rows -> Items of at most max_length tokens. Few-shot context loses shots until the row fits.
    A row that is still too long is an error, is dropped, or is trimmed. Every change is reported;
    name stands in the messages."""
    encode = lru_cache(200_000)(tokenizer.encode)      # texts repeat
    answer = lru_cache(200_000)(lambda text: tokenizer.encode(text) + [tokenizer.eos])
    class_ids(tokenizer, meta["classes"])
    items, changed = [], Counter()
    for n, row in enumerate(rows):
        shots, prompt = row.get("context") or "", prompt_text(row, meta.get("form", FORM))
        shots = [shots] if isinstance(shots, str) else list(shots)
        item = make_item(n, row, meta, encode("".join(shots) + prompt), encode, answer)
        changed["given fewer shots"] += longest(item) > max_length and len(shots) > 1
        while longest(item) > max_length and len(shots) > 1:
            shots = [shots[0], *shots[2:]] if len(shots) > 2 else []  # no shot left: no instruction
            item.prompt = encode("".join(shots) + prompt)
        if longest(item) > max_length and overlong == "error":
            raise ValueError(f"{name}, row {n + 1}: {longest(item)} tokens ({len(item.prompt)} of "
                             f"them the prompt) do not fit the context of {max_length}: raise "
                             "--max_length (up to the model's context), or say --overlong trim or "
                             "--overlong drop")
        if longest(item) > max_length:
            fits = overlong == "trim" and trim(item, max_length)
            changed["trimmed" if fits else "dropped"] += 1
            if not fits:
                continue
        items.append(item)
    for what, n in changed.items():
        if n:
            print(f"{name}: {n} of {len(rows)} rows {what}, longer than {max_length} tokens",
                  file=sys.stderr)
    if not items:
        raise ValueError(f"{name}: no row fits {max_length} tokens: raise --max_length")
    return items


def trim(item, max_length):
    """Cut an Item to max_length tokens in place: first the middle of its prompt, down to half of
    max_length, then the responses' ends and with them EOS. False if no response token is left."""
    over = longest(item) - max_length
    keep = max(len(item.prompt) - over, min(len(item.prompt), max_length // 2))
    head, tail = (keep + 1) // 2, keep // 2
    item.prompt = item.prompt[:head] + item.prompt[len(item.prompt) - tail:]
    room = max_length - len(item.prompt) - max(map(len, item.beliefs))
    item.responses = tuple(r[:max(room, 0)] for r in item.responses)
    return room > 0


def mismatch(items, max_length, seed):
    """Give every item, in place, the accepted answer of a row with another prompt: the branch
    "mismatch". Each answer is given once. The pairing is fixed for a dataset, so that a reference
    can be kept for it while batches are shuffled. ValueError where no such pairing exists."""
    groups = defaultdict(list)
    for item in items:
        groups[tuple(item.prompt)].append(item)
    # In an order that keeps equal prompts together, a shift by the largest group leaves its own
    shift, rng = max(map(len, groups.values())), np.random.default_rng([seed, 5])
    if 2 * shift > len(items):
        raise ValueError(f"{shift} of {len(items)} rows have the same prompt, so KTO's mismatched "
                         "pairs cannot be made: give more rows, or another --loss")
    groups = list(groups.values())
    order = [item for g in rng.permutation(len(groups)) for item in groups[g]]
    for k, item in enumerate(order):
        other = order[(k + shift) % len(order)]
        room = max_length - len(item.prompt)           # it may be longer than the row's own
        belief = other.beliefs[0][:room - 1]
        item.beliefs = (*item.beliefs[:2], belief)
        item.responses = (*item.responses[:2], other.responses[0][:room - len(belief)])


# ---------------------------------------------------------------------------------------------
# Batches

def epoch_batches(lengths, batch_size, seed, epoch, window=16):
    """The batches of one epoch: lists of indices, each index once. A pure function of its
    arguments. Windows of a shuffled order are sorted by length, so that a batch holds rows of like
    length; the batches of a window are then shuffled again."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches, lengths = [], np.asarray(lengths)
    for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut = [part[i:i + batch_size].tolist() for i in range(0, len(part), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


# One row of GDPO in a batch, branches "chosen" and "given". Every piece is laid down once; `paths`
# says which places make each sequence, and `at` which hidden states predict a scored token:
#
#   ids     <Q>How good is tea?<A>  4<Good>  I love it.<eos>  Too bitter.<eos>
#   place   0 ................. 6   7 .. 10  11 ........ 15   16 ......... 20
#   paths   0 ................. 6   7 .. 10  11 ........ 15                        chosen
#           0 ................. 6   7 .. 10                   16 ......... 20      given
#   at                          6   7 ....................14                       chosen: 9 scored
#                                        10                   16 ........ 19       given: 5 scored

def collate(items, branches, classes):
    """Items -> one batch. A row is a small tree, prompt -> belief -> response; whatever number of
    its S branches runs through a piece, the piece is laid down once and nothing is padded.
    classes: ids of the K class tokens. Returns a dict of arrays:

    ids (N,)         the tokens of all pieces, one after the other
    paths (R, T)     the places in ids of each sequence's tokens, its last one repeated up to T;
                     R is B * S
    places (N,)      the way back: where each token stands in the flat (R, T) table. A token of
                     more than one sequence stands in several places, with one past: any will do
    at (M,)          places in ids whose hidden state predicts a scored token
    tokens (M, 1+K)  the scored token's id, then the class ids: the columns to read there
    slot (M,)        where its log-prob adds up: index into the flat (B, S, 3) table
    first (B,)       which of the M is the chosen branch's class token (its columns 1.. are p(b|x))
    counts (B, S, 3) scored tokens of each piece
    target (B, K), n_options (B,), and pair (B, 2): shares of the accepted and rejected class

    Scored: belief and response of a branch. A belief that an earlier branch of the row went through
    is scored there alone, so "given" scores its response only.
    """
    ids, paths, at, tokens, slot, first = [], [], [], [], [], []
    counts = np.zeros((len(items), len(branches), 3), np.int64)
    for b, item in enumerate(items):
        spans = {}                                     # piece -> its places in ids
        first.append(len(at))
        for s, branch in enumerate(branches):
            k, r = BRANCHES[branch]
            belief, response = item.beliefs[k], item.responses[r]
            close = int(item.has_close and len(belief) > 1)
            n = [0, 0] if k in spans else [len(belief) - close, close]
            path = []
            for key, piece in ("prompt", item.prompt), (k, belief), ((k, r), response):
                if key not in spans:
                    spans[key] = range(len(ids), len(ids) + len(piece))
                    ids += piece
                path += spans[key]
            n = counts[b, s] = [*n, len(response)]
            scored = path[-sum(n):]
            tokens += [ids[i] for i in scored]
            at += path[-sum(n) - 1:-1]
            slot += [3 * len(paths) + piece for piece in range(3) for _ in range(n[piece])]
            paths.append(path)
    T = max(map(len, paths))
    places = np.zeros(len(ids), np.int64)
    for r, path in enumerate(paths):
        places[path] = r * T + np.arange(len(path))
        path += path[-1:] * (T - len(path))
    columns = np.broadcast_to(np.asarray(classes), (len(at), len(classes)))
    return {"ids": np.array(ids), "paths": np.array(paths), "places": places, "at": np.array(at),
            "tokens": np.column_stack([tokens, columns]), "slot": np.array(slot),
            "first": np.array(first), "counts": counts,
            "target": np.array([i.target for i in items], np.float32),
            "pair": np.array([[i.target[i.accept], i.target[i.reject]] for i in items], np.float32),
            "n_options": np.array([i.n_options for i in items], np.float32)}


def cost(item, branches):
    """Tokens that a row costs in a batch."""
    pairs = {BRANCHES[b] for b in branches}
    return len(item.prompt) + sum(len(item.beliefs[k]) for k in {k for k, _ in pairs}) + sum(
        len(item.responses[r]) for _, r in pairs)


# =============================================================================================
# Plumbing: tokenizers, text files, HTTP and the hub, flags and one-line errors

# ---------------------------------------------------------------------------------------------
# Dataset folders, checked

def check_row(row, classes):
    """Raise ValueError for the first thing that is wrong with a row, saying what to change."""
    def need(fine, what):
        if not fine:
            raise ValueError(what)

    need(isinstance(row, dict), "the line is not a JSON object")
    for name, kind in FIELDS.items():
        need(name in row, f"field {name!r} is missing; the row has {sorted(row)}")
        need(isinstance(row[name], kind) and not isinstance(row[name], bool),
             f"field {name!r} has the wrong type: {row[name]!r}")
    for name in TEXTS:
        need(row.get(name) is None or isinstance(row[name], str),
             f"field {name!r} must be text, got {row.get(name)!r}")
    shots = row.get("context") or ""
    need(isinstance(shots, str) or isinstance(shots, list) and {*map(type, shots)} <= {str},
         f"field 'context' must be text or a list of texts, got {shots!r}")
    options, p = row["options"], row["probabilities"]
    need(all(isinstance(x, str) for x in options) and 1 < len(options) == len(set(options)),
         f"options must be two or more different texts, got {options}")
    need(len(p) == len(classes), f"probabilities has {len(p)} entries for the {len(classes)} "
                                 f"classes {classes} of meta.json")
    need(all(type(x) in (int, float) and 0 <= x <= 1.02 for x in p) and abs(sum(p) - 1) <= 0.02,
         f"probabilities must be shares that sum to 1 (within 0.02), got {p}")
    for side in ("accept", "reject"):
        need(str(row[f"{side}_choice_id"]) in classes,
             f"{side}_choice_id {row[f'{side}_choice_id']!r} is not one of {classes}")
        need(row[f"{side}_response"].strip(), f"{side}_response is empty: leave the row out")
    need(bool(row.get("accept_choice")) == bool(row.get("reject_choice")),
         "accept_choice and reject_choice: give both belief texts or neither")
    need(row["prompt"].strip(), "prompt is empty: leave the row out")


def load_rows(path, classes):
    """The checked rows of a JSON-lines file. ValueError names the file and line of a broken one."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                check_row(row, classes)
                json.dumps(row, ensure_ascii=False).encode()       # half a surrogate pair fails
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}, line {number}: {e}: mend or remove it") from None
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows: make it again with synth.py")
    return rows


def load_meta(folder):
    """meta.json of a dataset: class labels, the class off the scale, the belief -> class map."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"no dataset in {folder} (no meta.json): make one with synth.py "
                                "(`python synth.py --help`), or correct --data")
    meta = read_json(path)
    classes = meta.get("classes")
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and len(set(classes)) == len(classes) > 1):
        raise ValueError(f"{path}: 'classes' must list two or more class labels as strings, "
                         f"got {classes!r}")
    if meta.get("off_scale") not in (None, *classes):
        raise ValueError(f"{path}: 'off_scale' {meta['off_scale']!r} is not one of {classes}")
    for name in ("belief_to_class", "stances"):
        texts = meta.setdefault(name, {})
        if not isinstance(texts, dict) or not {str(c) for c in texts.values()} <= set(classes):
            raise ValueError(f"{path}: {name!r} must map texts to classes of {classes}")
    return meta


def load_dataset(names, splits, form=""):
    """(meta, {split: rows}) of one dataset folder, or of a mix of them with commas between.
    form replaces the datasets' own form of the prompt. ValueError, FileNotFoundError: one line."""
    folders = [Path(name) for name in names.split(",")]
    if len(set(folders)) < len(folders) or "" in names.split(","):
        raise ValueError(f"--data {names!r} names a dataset twice or has an empty name")
    metas = [load_meta(folder) for folder in folders]
    meta = metas[0] | {"form": form or metas[0].get("form", FORM)}
    for folder, other in zip(folders[1:], metas[1:]):
        mix(meta, other | {"form": form or other.get("form", FORM)}, folder)
    if not isinstance(meta["form"], str) or meta["form"].count("{prompt}") != 1 or set(
            re.findall(r"\{(\w+)\}", meta["form"])) - {"prompt", "group"}:
        raise ValueError(f"{names}: the prompt's form must hold {{prompt}} once, and may hold "
                         f"{{group}}, got {meta['form']!r}")
    rows = {s: [row for folder in folders for row in load_rows(folder / f"{s}.jsonl",
                                                               meta["classes"])] for s in splits}
    warn_about([row for part in rows.values() for row in part], meta, names)
    return meta, rows


def mix(meta, other, folder):
    """Merge another dataset's belief maps into meta. ValueError where the two contradict."""
    for key in ("classes", "off_scale", "form"):
        if other.get(key) != meta.get(key):
            raise ValueError(f"{folder}: its {key} {other.get(key)!r} is not {meta.get(key)!r} as "
                             "in the first dataset, so the two cannot be mixed"
                             + " unless you give --form" * (key == "form"))
    for key in ("belief_to_class", "stances"):
        for text, c in other[key].items():
            if str(meta[key].setdefault(text, c)) != str(c):
                raise ValueError(f"{folder}: {text!r} has class {c} there and {meta[key][text]} in "
                                 f"another dataset: correct one of their {key}")


def warn_about(rows, meta, names):
    """Warn about rows that pass the checks but look like mistakes, and refuse a form that needs a
    group where rows have none."""
    odd = Counter()
    for row in rows:
        for side in ("accept", "reject"):
            k, text = str(row[f"{side}_choice_id"]), row.get(f"{side}_choice")
            odd["a belief that is not an option"] += bool(text) and text not in row["options"]
            odd["a belief whose class is not meta.json's"] += str(
                meta["belief_to_class"].get(text, k)) != k
        share = row["probabilities"][meta["classes"].index(str(row["accept_choice_id"]))]
        odd["an accepted belief that nobody in the group holds"] += share == 0
        odd["the same answer accepted and rejected"] += all(
            row.get(f"accept_{k}") == row.get(f"reject_{k}") for k in ("choice_id", "response"))
    for what, n in odd.items():
        if n:
            print(f"{names}: {what} ({n} times): look at these rows", file=sys.stderr)
    groups = {row.get("group") or "" for row in rows}
    if "{group}" in meta["form"] and "" in groups:
        raise ValueError(f"{names}: the form {meta['form']!r} needs a group in every row, and some "
                         "rows have none: add the field, or give another --form")
    if "{group}" not in meta["form"] and len(groups) > 1:
        print(f"{names}: {len(groups)} groups, but the prompts do not say which: "
              f"--form \"<G>{{group}}{FORM}\" does", file=sys.stderr)


def dataset_name(names):
    """"data/usa,data/pk" -> "usa+pk", for the name of a run's folder."""
    return "+".join(Path(name).name for name in names.split(","))


# ---------------------------------------------------------------------------------------------
# Tokens: byte-level BPE, on tiktoken

EOS = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"    # GPT-2's
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in SHOWN]
# byte -> the printable character that stands for it in the tokenizer's files
NAMES = {b: chr(b) for b in SHOWN} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
BYTES = {c: b for b, c in NAMES.items()}


class Tokenizer:
    """Byte-level BPE: GPT-2, Pythia, Llama 3, Qwen2, SmolLM2, and small ones of our own.

    files {name: text}: tokenizer.json, or vocab.json and merges.txt; and tokenizer_config.json.
    save() writes these very texts. encode adds no special token, and one in the data is plain text,
    so templates, padding and truncation in the files change nothing. eos: the id that config.json
    names, if it does. ValueError for another kind of tokenizer."""

    def __init__(self, files, eos=None):
        t = json.loads(files.get("tokenizer.json", "{}")) or gpt2_form(files)
        *cuts, last = split_patterns(t)
        vocab, added = t["model"]["vocab"], {a["content"]: a["id"] for a in t["added_tokens"]}
        merges = [m.split(" ") if isinstance(m, str) else m for m in t["model"]["merges"]]
        # tiktoken merges by rank and returns ranks. Ours follow the merges, and ids maps them back.
        # A byte without a token has no id and is dropped, as Hugging Face does.
        tokens = list(dict.fromkeys([*BYTES, *(a + b for a, b in merges)]))
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        if any(max(rank_of[a], rank_of[b]) > rank_of[a + b] for a, b in merges):
            raise ValueError("a merge comes before those of its parts")
        ranks = {bytes(BYTES[c] for c in token): rank for token, rank in rank_of.items()}
        self.ids = [vocab.get(c) for c in BYTES] + [vocab[token] for token in tokens[256:]]
        every = f"{last}|(?:(?!{last})(?s:.))+"        # tiktoken would drop what has no match
        self.bpe = tiktoken.Encoding("bpe", pat_str=every, mergeable_ranks=ranks, special_tokens={})
        # Pythia's runs of spaces have their own ids and are looked for first, the longest first.
        self.runs = {text: i for text, i in added.items() if text.isspace()}
        runs = "|".join(sorted(self.runs, key=len, reverse=True))
        self.cuts = [regex.compile(cut) for cut in (runs, *cuts) if cut]
        self.nfc = bool(t.get("normalizer"))
        self.bytes = dict(zip(self.ids, ranks)) | {i: text.encode() for text, i in added.items()}
        self.bytes.pop(None, None)
        self.n_tokens = max(self.bytes) + 1
        named = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        self.eos = added.get(named, eos if eos in self.bytes else added.get(EOS))
        if self.eos is None:
            raise ValueError("no end-of-text token: name it as eos_token in tokenizer_config.json")
        end = self.bytes[self.eos].decode()
        kind = "PreTrainedTokenizerFast" if "tokenizer.json" in files else "GPT2Tokenizer"
        self.files = {"tokenizer_config.json": json.dumps({
            "tokenizer_class": kind, "bos_token": end, "eos_token": end, "unk_token": end})} | files

    def encode(self, text):
        """Text -> ids."""
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for cut in self.cuts:
            pieces = [x for piece in pieces for x in (
                [piece] if piece in self.runs else isolate(cut, piece))]
        ids = [i for piece in pieces for i in (
            [self.runs[piece]] if piece in self.runs else
            map(self.ids.__getitem__, self.bpe.encode_ordinary(piece)))]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        """Ids -> text, without the end of text and ids that have no token."""
        text = b"".join(self.bytes.get(i, b"") for i in ids if i != self.eos)
        return text.decode("utf-8", "replace")

    def save(self, folder):
        for name, text in self.files.items():
            write(Path(folder) / name, text)

    @classmethod
    def load(cls, folder):
        """From tokenizer.json, or vocab.json and merges.txt."""
        names = (["tokenizer.json"] if (Path(folder) / "tokenizer.json").is_file()
                 else ["vocab.json", "merges.txt"])
        if not all((Path(folder) / name).is_file() for name in names):
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs tokenizer.json, or "
                                    "vocab.json and merges.txt")
        paths = [Path(folder) / name for name in (*names, "tokenizer_config.json", "config.json")]
        files = {path.name: read_text(path) for path in paths if path.is_file()}
        try:
            eos = json.loads(files.pop("config.json", "{}")).get("eos_token_id")
            return cls(files, eos[0] if isinstance(eos, list) else eos)
        except (LookupError, TypeError, ValueError, AttributeError, regex.error) as e:
            raise ValueError(f"{paths[0]} is not a byte-level BPE that can be read here: "
                             f"{e}") from None


def gpt2_form(files):
    """GPT-2's older two files in the form of tokenizer.json."""
    vocab, lines = json.loads(files["vocab.json"]), files["merges.txt"].splitlines()
    return {"model": {"vocab": vocab, "merges": [
                line for line in lines if line and not line.startswith("#version")]},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "added_tokens": [{"content": EOS, "id": vocab[EOS]}]}


def split_patterns(t):
    """The regexes that cut text before bytes are merged, each within the cuts of those before it.
    ValueError, naming the part of tokenizer.json, for what is not byte-level BPE."""
    model, normalizer = t["model"], (t.get("normalizer") or {}).get("type")
    odd = {k: model[k] for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                 "byte_fallback") if model.get(k)}
    if model.get("type", "BPE") != "BPE" or normalizer not in (None, "NFC") or odd:
        raise ValueError(f"model {model.get('type')} with {odd}, normalizer {normalizer}")
    splitter, patterns = t.get("pre_tokenizer") or {}, []
    for step in splitter.get("pretokenizers", [splitter]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [PATTERN] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": each}:
                patterns.append(r"\p{N}" if each else r"\p{N}+")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                  "invert": False}:
                patterns.append(pattern)
            case _:
                raise ValueError(f"pre_tokenizer {step}")
    if step["type"] != "ByteLevel" or not patterns:    # what follows it would see bytes, not text
        raise ValueError(f"pre_tokenizer {splitter}")
    return patterns


def isolate(pattern, text):
    """Text cut before and after every match of a pattern."""
    ends = sorted({0, len(text), *(e for m in pattern.finditer(text) for e in m.span())})
    return [text[a:b] for a, b in zip(ends, ends[1:])]


def train_bpe(texts, vocab_size):
    """Learn merges from texts: the most frequent pair first, ties to the largest bytes, until the
    vocabulary is full or no pair occurs twice. Deterministic."""
    words = Counter(w for t in texts for w in re.findall(r" ?[^\W\d_]+| ?[^\s\w]+", t))
    words = [([bytes([b]) for b in w.encode()], n) for w, n in sorted(words.items())]
    pairs, where, merges = Counter(), defaultdict(set), []   # where: pair -> words that have/had it

    def count(i, sign):
        parts, n = words[i]
        for pair in zip(parts, parts[1:]):
            pairs[pair] += sign * n
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    while len(merges) < max(1, vocab_size - 257):      # 256 bytes, the merges, <|endoftext|>
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for i in where.pop(best):
            count(i, -1)
            words[i] = (merge(words[i][0], best), words[i][1])
            count(i, 1)
        del pairs[best]
    spelled = [["".join(NAMES[b] for b in token) for token in pair] for pair in merges]
    tokens = [*NAMES.values(), *map("".join, spelled), EOS]
    return Tokenizer({
        "vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, spelled), ""])})


def merge(parts, pair):
    """Join every neighbouring `pair` in a list of byte strings."""
    out = []
    for p in parts:
        if out and (out[-1], p) == pair:
            out[-1] += p
        else:
            out.append(p)
    return out


# ---------------------------------------------------------------------------------------------
# Text files

def read_text(path):
    """The text of a UTF-8 file, without the byte-order mark that it may begin with."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:                                   # UTF-16 has zeros
        raise ValueError(f"{path} is not UTF-8 text: save it with that encoding")
    return text


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`; ValueError with its path if it does not."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}): make or fetch it again") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, not a {type(value).__name__}")
    return value


@contextmanager
def replacing(path, mark=""):
    """A temporary name to write a file under: renamed to path if the body succeeds, removed if not,
    so that path never holds half a file."""
    temporary = Path(f"{path}.tmp{mark}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:                               # a full disk names no file
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write(path, text):
    """Write a text file, whole or not at all, whatever other processes do."""
    with replacing(path, os.getpid()) as temporary:
        temporary.write_bytes(text.encode())


# ---------------------------------------------------------------------------------------------
# HTTP: one session, retries, and keys that no message shows

TIMEOUT, PAUSE, TRIES = 30, 1.0, 8     # seconds without a byte; first wait; attempts
SESSION = requests.Session()           # keeps connections open: a new one costs 20 ms over TLS
for scheme in ("http://", "https://"):
    SESSION.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=1000))
ANSWERED = set()                       # servers that have answered: worth waiting for
SLOW = (": raise --timeout, or lower --concurrency, --styles or --max_tokens (a server that does "
        "not stream sends nothing until an answer is complete)")


class Refused(ValueError):
    """A server refuses a request, and would again. status: of HTTP; words: the server's."""
    def __init__(self, url, status, words):
        super().__init__(f"{url}: the server answered {status}: {words}")
        self.status, self.words = status, words


class TryAgain(Exception):
    """What `read` raises for an answer to ask for again: (the problem, tries at most while it stays
    the same)."""


def key_from(*names):
    """The key in the first of these environment variables that is set, or ""."""
    return next(filter(None, (sendable(os.environ.get(name, ""), name) for name in names)), "")


def sendable(key, where):
    """A key without white space around it. ValueError if no header can carry it; the value is not
    shown."""
    if not re.fullmatch("[!-~]*", key.strip()):
        raise ValueError(f"{where} holds a line break or another character that no key has")
    return key.strip()


def check_address(url, where="the address"):
    """ValueError for what is no http address, or holds user:password@, which would be kept."""
    if "@" in url.partition("?")[0]:
        raise ValueError(f"{where} holds user:password@: give a key by the environment instead")
    if not re.match("https?://[^/]", url):
        raise ValueError(f"{where} {url!r} is no http(s) address")


def sleep(seconds, problem):
    if seconds > 5:
        print(f"waiting {seconds:.0f} s: {problem[:80]}", file=sys.stderr)
    time.sleep(seconds)


def request(method, url, headers=None, read=None, tries=None, pause=sleep, **kwargs):
    """One HTTP answer of status 2xx, or read(it). 429, 5xx, timeouts, cut connections and what
    `read` raises TryAgain for are asked again, after the wait that the server names or a doubling
    one. Another status raises Refused. pause(seconds, problem) may return True to give up."""
    check_address(url)
    host, shown, seen = urlsplit(url).netloc, url.partition("?")[0], Counter()
    for attempt in range(1, (tries or TRIES) + 1):
        wait, most = min(60, PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5), TRIES
        try:
            answer = SESSION.request(method, url, headers=headers,
                                     auth=lambda r: r,  # else ~/.netrc overrides the headers
                                     **{"timeout": (10, TIMEOUT)} | kwargs)
            ANSWERED.add(host)
            status = answer.status_code
            if status < 300:
                return read(answer) if read else answer
            problem = hide(answer.text or answer.reason, headers, kwargs)
            busy = status in (408, 425, 429) or status >= 500 and status != 501
            if not busy or "insufficient_quota" in answer.text:
                raise Refused(shown, status, problem)
            problem, wait = f"the server answered {status}: {problem}", wait_of(answer) or wait
        except TryAgain as e:
            problem, most = (*e.args, TRIES)[:2]
            problem = hide(problem, headers, kwargs)
        except requests.RequestException as e:         # its own text may hold a header
            problem, most = type(e).__name__, TRIES
            if "Read timed out" in str(e):
                problem, most = problem + SLOW * (method == "POST"), 3
            elif host not in ANSWERED:
                problem, most = f"{problem}: is the address right, and the server up?", 4
        seen[problem] += 1
        if seen[problem] >= most or attempt == (tries or TRIES):
            raise ConnectionError(f"{shown}: {problem}" + f", {attempt} times" * (attempt > 1))
        if pause(wait, problem):
            raise ConnectionAbortedError(shown)


def wait_of(answer):
    """Seconds that a busy server asks to wait, 0 if it names none: Retry-After (a number or a
    date), the hub's `ratelimit: "api";r=0;t=40`, Gemini's retryDelay."""
    after, hub = (answer.headers.get(name, "") for name in ("Retry-After", "ratelimit"))
    told = re.fullmatch(r"(\d+\.?\d*)", after) or re.search(r"\bt=(\d+)", hub) or re.search(
        r'"retryDelay": *"(\d+\.?\d*)s"', answer.text)
    try:
        seconds = float(told[1]) if told else parsedate_to_datetime(after).timestamp() - time.time()
    except (ValueError, TypeError):
        seconds = 0
    return max(0, min(600, seconds))


def hide(words, headers, kwargs):
    """Words on one line, 500 characters at most, without the keys that were sent."""
    sent = [(headers or {}).get(k) for k in ("Authorization", "api-key")]
    for key in filter(None, [*sent, (kwargs.get("params") or {}).get("apikey")]):
        words = words.replace(key.removeprefix("Bearer "), "***")
    return " ".join(words.split())[:500]


# ---------------------------------------------------------------------------------------------
# The hub: plain HTTP, into Hugging Face's own cache folder

CHECKPOINT = [  # files of a checkpoint: of each line, the first that is there
    ["tokenizer_config.json", "config.json"], ["config.json"],
    ["tokenizer.json", "vocab.json"], ["merges.txt", "tokenizer.json"],
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
     "pytorch_model.bin.index.json"]]


def find_checkpoint(name, weights=True):
    """A checkpoint folder: a local one, or a model on the hub ("gpt2", "EleutherAI/pythia-70m"),
    whose missing files are fetched, all of one commit. HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE
    and HF_HUB_OFFLINE are honoured. weights=False: without them. OSError, ValueError: one line."""
    path = Path(name)
    if name and (path / "metrics.jsonl").is_file():
        raise ValueError(f"{name} is a run: give one of its checkpoints, such as {name}/best")
    if name and path.is_dir():
        return path
    if path.parent != Path() and path.parent.is_dir() or not re.fullmatch(
            r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", name):
        raise FileNotFoundError(f"no folder {name} (and no name on the hub: gpt2, ORG/MODEL)")
    for choices in CHECKPOINT if weights else CHECKPOINT[:2]:
        path = hub_file(name, *choices)
    if path.name.endswith(".index.json"):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(s)).name != s for s in shards.values()):
            raise ValueError(f"{path}: weight_map must name files of this folder")
        for shard in sorted(set(shards.values())):
            hub_file(name, shard)
    return path.parent


def hub_file(repo, *files):
    """Path of the first of these files that a hub repository ("datasets/ORG/NAME" for a dataset)
    has: from the cache, or fetched into it. FileNotFoundError if it has none."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub")
    folder = cache / (repo if repo.startswith("datasets/") else f"models/{repo}").replace("/", "--")
    main = folder / "refs/main"                        # holds the commit that was fetched last
    commit = read_text(main).strip() if main.is_file() else "main"
    for file in files:
        if (folder / "snapshots" / commit / file).is_file():
            return folder / "snapshots" / commit / file
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise FileNotFoundError(f"{repo}: {files[0]} is not in {folder} and HF_HUB_OFFLINE is set")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for file in files:
        path = fetch(f"{endpoint}/{repo}/resolve/{commit}/{file}", folder, file)
        if path:
            return path
    raise FileNotFoundError(f"{repo} on the hub has no {' or '.join(files)}")


def hub_home():
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def hub_headers():
    """The hub's key as a header: HF_TOKEN, or what `hf auth login` wrote."""
    file = hub_home() / "token"
    token = key_from("HF_TOKEN") or file.is_file() and sendable(read_text(file), file)
    return {"Authorization": f"Bearer {token}"} if token else {}


def fetch(url, folder, file):
    """A file of the hub into the cache -> its path, or None if there is no such file. Size and
    sha256 are checked where the hub names them."""
    headers, told = {"Accept-Encoding": "identity"} | hub_headers(), {}
    try:
        head = request("HEAD", url, headers, allow_redirects=True)
    except Refused as e:
        if e.status == 404:
            return None
        hint = "; no such folder or repository, or it wants an HF_TOKEN"
        raise ValueError(f"{e}" + hint * (e.status in (401, 403))) from None
    for answer in [head, *reversed(head.history)]:     # the hub's own answer before its storage's
        told |= {k.lower(): v for k, v in answer.headers.items()}
    commit, sha = told.get("x-repo-commit", ""), told.get("x-linked-etag", "").strip('"')
    size = int(told.get("x-linked-size") or head.headers.get("Content-Length") or -1)
    if not re.fullmatch(r"\w+", commit):
        raise ValueError(f"{url}: the answer names no commit: is HF_ENDPOINT right?")
    path = folder / "snapshots" / commit / file
    try:
        download(url, headers, path, size, sha)
    except FileNotFoundError:                          # another process was faster
        if not path.is_file():
            raise
    write(folder / "refs/main", commit)
    return path


def download(url, headers, path, size, sha):
    """GET url into path, from where an earlier try broke off. Each byte is written at its own
    place, so two processes at the same file write the same and do not disturb each other."""
    part = Path(f"{path}.incomplete")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    for attempt in range(TRIES):
        have = part.stat().st_size
        if have >= size >= 0:
            break
        ranged = headers | {"Range": f"bytes={have}-"} if have else headers
        try:
            with request("GET", url, ranged, stream=True) as answer, open(part, "r+b") as f, \
                    progress(desc=f"fetching {path.name}", total=max(size, 0) or None, initial=have,
                             unit="B", unit_scale=True, delay=1) as bar:
                f.seek(have if answer.status_code == 206 else 0)
                for chunk in answer.iter_content(1 << 16):
                    bar.update(f.write(chunk))
            if size < 0:
                break
        except requests.RequestException:
            time.sleep(PAUSE * 2 ** attempt)
    else:
        raise ConnectionError(f"{url}: broken off {TRIES} times; what came is kept, run the "
                              "command again to go on")
    if 0 <= size != part.stat().st_size or (
            len(sha) == 64 and hashlib.sha256(np.memmap(part, mode="r")).hexdigest() != sha):
        part.unlink()
        raise ValueError(f"{url}: what came is not the file that the hub announced (size or sha256 "
                         "differ); it was thrown away, run the command again")
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------
# What all scripts share: flags, progress, one-line errors

def add_flags(parser, config, names=None, skip=()):
    """A flag for each field of a flat dataclass: its type (a Literal gives the choices), its
    default, and as help the comment at the end of its line."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    for field in dataclasses.fields(config):
        if field.name in skip or names and field.name not in names:
            continue
        kinds = [x for k in typing.get_args(field.type) or [field.type] if k is not type(None)
                 for x in typing.get_args(k) or [k]]
        if kinds[0] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kinds[0], type):
            how = {"type": lambda text, kind=kinds[0]: parse(text, kind)}
        else:
            how = {"choices": kinds}
        text = help_of[field.name].replace("%", "%%")
        if "{LOSSES}" in text:
            text = text.replace("{LOSSES}", loss_names())
        shown = f" [{field.default}]" if field.default not in (None, "") else ""
        parser.add_argument(f"--{field.name}", default=field.default, help=text + shown, **how)


def parse(text, kind):
    """A flag's value, or an argparse error, which becomes one line."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
    if kind is not str and not 0 <= value < float("inf"):          # NaN is not, either
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def loss_names():
    """The names in losses.py, from its text: importing it would import torch."""
    text = read_text(Path(__file__).with_name("losses.py"))
    losses, prefs = (re.findall(r'^    "([\w-]+)":', re.search(
        rf"(?ms)^{name} = \{{$.*?^\}}", text)[0], re.M) for name in ("LOSSES", "PREFS"))
    return ", ".join([*losses, *prefs, *(f"gdpo-{name}" for name in prefs if name != "dpo")])


def help_first(name, flags):
    """Answer --help of the script that is run (name: its __name__) at once; flags makes its parser.
    A script calls this above its slow imports, during which Ctrl-C just ends it."""
    if name == "__main__":
        if {"-h", "--help"} & set(sys.argv):
            flags().parse_args()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """No abbreviations, and a mistyped flag or value is one line."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def run(main):
    """Call main(). What a user gave wrong, or the machine refuses, is one line on stderr and exit
    code 2. Under torchrun only the first process speaks."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:          # see help_first
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):            # a terminal that knows no ± shows a ?
        getattr(stream, "reconfigure", lambda **kwargs: None)(errors="replace")
    parallel = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as e:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        words = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        if isinstance(e, requests.RequestException):   # its text may hold a key
            words = type(e).__name__
        if not parallel or os.environ.get("RANK") == "0":
            words = " ".join(words.split())
            print(f"{Path(sys.argv[0]).name}: error: {words}", file=sys.stderr)
        if parallel:                                   # torch's threads may abort a plain exit
            sys.stdout.flush()
            os._exit(2)
        sys.exit(2)


def progress(*args, **kwargs):
    """A progress bar; where nobody watches (a log file), a line every 30 seconds."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 30, dynamic_ncols=True, **kwargs)
