"""Rows of preference data -> pieces of tokens -> batches. Numpy only: train.py makes the tensors.

Second in reading order. A row is one JSON object a line (see load_rows). It is never tokenized as
one string and searched for its parts: prompt, belief and response are tokenized apart and joined,
    <Q>{prompt}<A> | {class}<{belief text}> | {response}<|endoftext|>      (reviews: {class} alone)
and every scored token carries the piece it belongs to, so that every loss is a selection. The
prompt's form is the dataset's own (`form` in meta.json): another puts the group before it.

Left out on purpose: streaming and worker processes (the largest published set fits in memory).
At the end of the file: checkpoints and rows from the hub, HTTP, and what the scripts share at their
boundary (flags, files, one-line errors).
"""
import argparse
import ast
import dataclasses
import fcntl
import hashlib
import inspect
import json
import os
import random
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Rows

FIELDS = {"prompt": str, "options": list, "probabilities": list, "accept_choice_id": (str, int),
          "accept_response": str, "reject_choice_id": (str, int), "reject_response": str}
TEXTS = ("accept_choice", "reject_choice", "group", "question_id")               # optional fields
SPLITS = ("train", "eval", "test")
FORM = "<Q>{prompt}<A>"                # of the prompt, where meta.json names no other


def check_row(row, classes):
    """Raise ValueError for the first thing wrong with a row, in words that say what to change."""
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    for name, kind in FIELDS.items():
        if name not in row:
            raise ValueError(f"field {name!r} is missing; the row has {sorted(row)}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"field {name!r} has the wrong type: {row[name]!r}")
    for name in TEXTS:
        if row.get(name) is not None and not isinstance(row[name], str):
            raise ValueError(f"field {name!r} must be text, got {row[name]!r}")
    context = row.get("context") or ""
    if not isinstance(context, str) and not (
            isinstance(context, list) and all(isinstance(shot, str) for shot in context)):
        raise ValueError(f"field 'context' must be text, or a list of texts, got {context!r}")
    options = row["options"]
    if len(options) < 2 or len(set(map(str, options))) < len(options):
        raise ValueError(f"options must be two or more different beliefs, got {options}")
    p = row["probabilities"]
    if len(p) != len(classes):
        raise ValueError(f"probabilities has {len(p)} entries for the {len(classes)} classes "
                         f"{classes} of meta.json")
    if not all(type(x) in (int, float) and 0 <= x <= 1.02 for x in p) or abs(sum(p) - 1) > 0.02:
        raise ValueError(f"probabilities must be shares that sum to 1 (within 0.02), got {p}")
    for side in ("accept", "reject"):
        if str(row[f"{side}_choice_id"]) not in classes:
            raise ValueError(f"{side}_choice_id {row[f'{side}_choice_id']!r} is not one of "
                             f"{classes}")
        if not row[f"{side}_response"].strip():
            raise ValueError(f"{side}_response is empty: leave the row out")
    if bool(row.get("accept_choice")) != bool(row.get("reject_choice")):
        raise ValueError("accept_choice and reject_choice: give both belief texts or neither")
    if not row["prompt"].strip():
        raise ValueError("prompt is empty: leave the row out")


def load_rows(path, classes):
    """The rows of a JSON-lines file, each checked against FIELDS and the class labels.
    ValueError names the file and the line of the first broken row."""
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode())
                    check_row(row, classes)
                    if b"\\ud" in line.lower():         # half of a surrogate pair is no text
                        json.dumps(row, ensure_ascii=False).encode()
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
        raise FileNotFoundError(f"no dataset in {folder} (no meta.json): make one with "
                                "`python synth.py toy --out DIR`, or correct --data")
    meta = read_json(path)
    classes = meta.get("classes")
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)
            and len(set(classes)) == len(classes) > 1):
        raise ValueError(f"{path}: 'classes' must list the class labels as strings, two at least, "
                         f"got {classes!r}")
    if meta.get("off_scale") not in (None, *classes):
        raise ValueError(f"{path}: 'off_scale' {meta['off_scale']!r} is not one of {classes}")
    for name in ("belief_to_class", "stances"):
        texts = meta.get(name) or {}
        if not isinstance(texts, dict) or not all(str(c) in classes for c in texts.values()):
            raise ValueError(f"{path}: {name!r} must map texts to classes of {classes}")
    check_form(meta.setdefault("form", FORM), path)
    return meta


def check_form(form, where):
    if not isinstance(form, str) or form.count("{prompt}") != 1 or set(
            re.findall(r"\{(\w+)\}", form)) - {"prompt", "group"}:
        raise ValueError(f"{where}: the prompt's form must be a text that holds {{prompt}} once "
                         f"(and {{group}} perhaps), got {form!r}")


def load_dataset(names, splits, form=""):
    """(meta, {split: rows}) of one dataset or of several, mixed: folders or names on the hub, with
    commas between. They must agree on what their rows mean; form: instead of their own.
    ValueError, FileNotFoundError: one line, what to change."""
    folders = [find_dataset(name) for name in names.split(",")]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--data {names} names a dataset twice")
    meta = load_meta(folders[0])
    for folder in folders[1:]:
        meta = mix(meta, load_meta(folder), folder, form)
    if form:
        check_form(form, "--form")
        meta["form"] = form
    rows = {s: [row for folder in folders for row in load_rows(folder / f"{s}.jsonl",
                                                               meta["classes"])] for s in splits}
    print_odd(rows, meta, names)
    groups = {row.get("group") or "" for several in rows.values() for row in several}
    if "{group}" in meta["form"] and "" in groups:
        raise ValueError(f"{names}: the form {meta['form']!r} needs a group in every row, and some "
                         "have none: add the field, or give another --form")
    if "{group}" not in meta["form"] and len(groups) > 1:
        print(f"{names}: {len(groups)} groups whose prompts do not tell them apart; --form "
              f"\"<G>{{group}}{FORM}\" does", file=sys.stderr)
    return meta, rows


def print_odd(rows, meta, names):
    """Count aloud the rows that are well formed and cannot be meant."""
    known, odd = meta.get("belief_to_class") or {}, Counter()
    for row in (row for several in rows.values() for row in several):
        for side in ("accept", "reject"):
            k, text = str(row[f"{side}_choice_id"]), row.get(f"{side}_choice")
            odd["a belief that is none of the options"] += bool(text) and text not in row["options"]
            odd["a belief of another class than meta.json's"] += str(known.get(text, k)) != k
        accept = meta["classes"].index(str(row["accept_choice_id"]))
        odd["an accepted belief that nobody in the group has"] += row["probabilities"][accept] == 0
        odd["the same answer accepted and rejected"] += all(
            row.get(f"accept_{k}") == row.get(f"reject_{k}") for k in ("choice_id", "response"))
    for what, n in odd.items():
        if n:
            print(f"{names}: {n} times {what}: look at these rows", file=sys.stderr)


def mix(meta, other, folder, form):
    """The meta of two datasets together; ValueError where they contradict each other."""
    for key in ("classes", "off_scale") + (() if form else ("form",)):
        if other.get(key) != meta.get(key):
            raise ValueError(f"{folder}: its {key} {other.get(key)!r} differ from the others' "
                             f"{meta.get(key)!r}, so that they cannot be mixed"
                             + (": say --form" if key == "form" else ""))
    merged = {}
    for key in ("belief_to_class", "stances"):
        texts = meta.get(key) or {}
        odd = [t for t, c in (other.get(key) or {}).items() if str(texts.get(t, c)) != str(c)]
        if odd:
            raise ValueError(f"{folder}: {odd[0]!r} has another class there than in the others: "
                             f"correct one of their {key}")
        merged[key] = texts | (other.get(key) or {})
    return meta | merged


def dataset_name(names):
    """"data/usa,data/pk" -> "usa+pk", to name a run's folder by."""
    return "+".join(Path(name).name for name in names.split(","))


def prompt_text(row, form):
    """The prompt as the model reads it, without few-shot context. The group stands in it where the
    form has {group}."""
    before, after = form.split("{prompt}")
    group = row.get("group") or ""
    return before.replace("{group}", group) + row["prompt"] + after.replace("{group}", group)


# ---------------------------------------------------------------------------------------------
# Tokens: GPT-2's byte-level BPE, on tiktoken; our own small vocabularies have the same form

EOS = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_names():
    """byte -> the printable character that stands for it in vocab.json and merges.txt."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in shown}
    hidden = (b for b in range(256) if b not in names)
    return names | {b: chr(256 + n) for n, b in enumerate(hidden)}


NAMES = byte_names()
BYTES = {c: b for b, c in NAMES.items()}


def spell(token):
    return "".join(NAMES[b] for b in token)


class Tokenizer:
    """Byte-level BPE on tiktoken: GPT-2's, Pythia's, and small ones of our own.

    vocab {token as spelled in vocab.json: id}, merges [(a, b), ...] as spelled, in order; added
    {text: id}: <|endoftext|>, and Pythia's <|padding|> and runs of spaces. ValueError unless the
    ids rise in the order of the merges, for tiktoken merges by id. files {name: text} is what
    save() writes: the very files that the tokenizer came from."""

    def __init__(self, vocab, merges, added, nfc=False, files=None):
        self.eos, self.nfc, self.files = added[EOS], nfc, files
        self.runs = {text: i for text, i in added.items() if text.strip(" ") == ""}
        self.cut = re.compile(f"( {{{min(map(len, self.runs))},{max(map(len, self.runs))}}})"
                              if self.runs else "(?!)")
        single, order = [vocab[c] for c in BYTES if c in vocab], [vocab[a + b] for a, b in merges]
        if (order != sorted(order) or len(vocab) != len(single) + len(order)
                or max(single) > min(order)):
            raise ValueError("the ids do not follow the order of the merges")
        ranks = {bytes(BYTES[c] for c in token): i for token, i in vocab.items()}
        self.n_tokens = len(ranks) + len(added)
        self.bpe = tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks,
                                     special_tokens=added, explicit_n_vocab=self.n_tokens)

    def encode(self, text):
        """Text -> ids. <|endoftext|> in data is plain text. A run of spaces that has its own id is
        cut out first, and each stretch between is encoded by itself, as Hugging Face does."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [i for part in self.cut.split(text) for i in (
            [self.runs[part]] if part in self.runs else self.bpe.encode_ordinary(part))]

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.eos])

    def save(self, folder):
        for name, text in self.files.items():
            write(Path(folder) / name, text)

    @classmethod
    def load(cls, folder):
        """From tokenizer.json, or vocab.json + merges.txt, or OpenAI's encoder.json + vocab.bpe."""
        folder = Path(folder)
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt"),
                      ("encoder.json", "vocab.bpe")):
            if all((folder / name).is_file() for name in names):
                break
        else:
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs tokenizer.json, or "
                                    "vocab.json and merges.txt (or encoder.json and vocab.bpe)")
        texts = [(folder / name).read_text(encoding="utf-8") for name in names]
        try:
            return from_tokenizer_json(*texts) if len(texts) == 1 else from_vocab_and_merges(*texts)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as e:
            raise ValueError(f"{folder / names[-1]}: not a byte-level BPE that is read here: "
                             f"{e}") from None


def from_vocab_and_merges(vocab, merges):
    """GPT-2's two files, as texts -> Tokenizer."""
    pairs = [tuple(line.split(" ")) for line in merges.split("\n")
             if line and not line.startswith("#version")]
    ids = json.loads(vocab)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": EOS, "eos_token": EOS,
              "unk_token": EOS}
    return Tokenizer({t: i for t, i in ids.items() if t != EOS}, pairs, {EOS: ids[EOS]}, files={
        "vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": json.dumps(config)})


def from_tokenizer_json(text):
    """Hugging Face's one file, of GPT-2 or Pythia, as text -> Tokenizer."""
    t = json.loads(text)
    model, splitter, after = t["model"], t.get("pre_tokenizer") or {}, t.get("post_processor") or {}
    normalizer = (t.get("normalizer") or {}).get("type")
    if model.get("type", "BPE") != "BPE" or splitter.get("type") != "ByteLevel" \
            or splitter.get("add_prefix_space") or not splitter.get("use_regex", True) \
            or normalizer not in (None, "NFC") or after.get("type", "ByteLevel") != "ByteLevel" \
            or model.get("dropout") or t.get("truncation"):
        raise ValueError(f"model {model.get('type')}, dropout {model.get('dropout')}, "
                         f"pre_tokenizer {splitter}, normalizer {normalizer}, post_processor "
                         f"{after.get('type')}, truncation {t.get('truncation')}")
    added = {EOS: model["vocab"].get(EOS)} | {a["content"]: a["id"] for a in t["added_tokens"]}
    odd = [a["content"] for a in t["added_tokens"]
           if a["content"].strip(" ") and a["content"] not in (EOS, "<|padding|>")
           or a.get("single_word") or a.get("lstrip") or a.get("rstrip")]
    if odd:
        raise ValueError(f"added tokens {odd[:3]}")
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS,
              "unk_token": EOS}
    return Tokenizer({k: i for k, i in model["vocab"].items() if k not in added}, pairs, added,
                     nfc=normalizer == "NFC",
                     files={"tokenizer.json": text, "tokenizer_config.json": json.dumps(config)})


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
    spelled = [(spell(a), spell(b)) for a, b in merges]
    tokens = [*NAMES.values(), *(a + b for a, b in spelled), EOS]
    return from_vocab_and_merges(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False),
        "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in spelled), ""]))


def merge(parts, pair):
    """Join every neighbouring `pair` in a list of byte strings."""
    out = []
    for p in parts:
        if out and (out[-1], p) == pair:
            out[-1] += p
        else:
            out.append(p)
    return out


class WordPiece:
    """BERT's uncased tokenizer, for sentence encoders: words and marks apart, lower case without
    accents; then the longest pieces of the vocabulary, those within a word with ## before them."""
    def __init__(self, folder, max_length=256):
        self.ids = read_json(Path(folder) / "tokenizer.json")["model"]["vocab"]
        self.max_length = max_length

    def encode(self, text):
        """Text -> ids with [CLS] and [SEP], max_length at most."""
        ids = [i for word in self.words(text) for i in self.pieces(word)]
        return [self.ids["[CLS]"], *ids[:self.max_length - 2], self.ids["[SEP]"]]

    @staticmethod
    def words(text):
        out = []
        for c in unicodedata.normalize("NFD", "".join(c.lower() for c in text)):
            kind, code = unicodedata.category(c), ord(c)
            if c in "\t\n\r" or kind == "Zs":
                out.append(" ")
            elif kind[0] == "C" or kind == "Mn" or code == 0xFFFD:
                continue                               # control characters and accents
            elif kind[0] == "P" or c in "$+<=>^`|~" or 0x4E00 <= code <= 0x9FFF \
                    or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF \
                    or 0x20000 <= code <= 0x2CEAF or 0x2F800 <= code <= 0x2FA1F:
                out.append(f" {c} ")                   # marks, Chinese characters: by themselves
            else:
                out.append(c)
        return "".join(out).split()

    def pieces(self, word):
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1)
                        if prefix + word[start:e] in self.ids), None)
            if end is None or len(word) > 100:
                return [self.ids["[UNK]"]]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids


# ---------------------------------------------------------------------------------------------
# Pieces and batches

BELIEF, CLOSE, RESPONSE = range(3)     # belief without its closing token | that token | response
BRANCHES = {                           # name -> belief and response: 0 accepted, 1 rejected
    "chosen": (0, 0),
    "own": (1, 1),                     # rejected response after its own belief (DPO)
    "given": (0, 1),                   # rejected response after the accepted belief (GDPO Eq. 7)
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
    accept: int                        # class index of the accepted belief
    n_options: int
    kind: str                          # "majority", "minority" or "other": of the accepted belief
    question: str
    group: str

    def length(self, branches):
        pairs = [BRANCHES[b] for b in branches]
        return len(self.prompt) + max(len(self.beliefs[b]) + len(self.responses[r])
                                      for b, r in pairs)


def kind_of(target, accept):
    """Section 3: majority if the accepted class has the largest share, minority if the smallest
    (of the shares that are not zero, for no pair accepts another); ties are "other"."""
    shares = [p for p in target if p > 0]
    p = target[accept]
    if shares.count(p) == 1 and len(shares) > 1:
        return "majority" if p == max(shares) else "minority" if p == min(shares) else "other"
    return "other"


def class_ids(tokenizer, classes):
    """The token id of each class label; ValueError unless each is one token."""
    ids = [tokenizer.encode(c) for c in classes]
    for c, i in zip(classes, ids):
        if len(i) != 1:
            raise ValueError(f"class {c!r} is {len(i)} tokens, but the belief distribution is read "
                             "at one token: rename the classes in meta.json, to 0..9 say")
    return [i[0] for i in ids]


def encode_rows(rows, tokenizer, meta, max_length, overlong="error", name="data"):
    """Rows -> Items of at most max_length tokens. A row whose context is a list of shots loses the
    second of them (the first is the instruction) until it fits. A row still too long is an error,
    is dropped, or is trimmed: the prompt's middle goes first (down to half of max_length; <Q> and
    <A> stay), then the response's end, and with it EOS. All is counted aloud. name: for
    messages."""
    encode = lru_cache(200_000)(tokenizer.encode)      # texts repeat
    answer = lru_cache(200_000)(lambda text: tokenizer.encode(text) + [tokenizer.eos])
    form = meta.get("form", FORM)
    class_ids(tokenizer, meta["classes"])
    items, dropped, trimmed, fewer = [], 0, 0, 0
    for n, row in enumerate(rows):
        shots, prompt = row.get("context") or "", prompt_text(row, form)
        shots = [shots] if isinstance(shots, str) else list(shots)
        item = make_item(n, row, meta["classes"], encode("".join(shots) + prompt), encode, answer)
        fewer += item.length(EVAL_BRANCHES) > max_length and len(shots) > 1
        while item.length(EVAL_BRANCHES) > max_length and len(shots) > 1:
            shots = [shots[0], *shots[2:]] if len(shots) > 2 else []     # no shot: no instruction
            item.prompt = encode("".join(shots) + prompt)
        if item.length(EVAL_BRANCHES) > max_length:
            if overlong == "error":
                raise ValueError(
                    f"{name}, row {n + 1}: {item.length(EVAL_BRANCHES)} tokens "
                    f"({len(item.prompt)} of them the prompt) do not fit the context of "
                    f"{max_length}: raise --max_length (up to the model's context), or say "
                    "--overlong trim or --overlong drop")
            if overlong == "drop" or not trim(item, max_length):
                dropped += 1
                continue
            trimmed += 1
        items.append(item)
    if dropped or trimmed:
        print(f"{name}: of {len(rows)} rows {trimmed} trimmed and {dropped} dropped, "
              f"longer than {max_length} tokens", file=sys.stderr)
    if fewer:
        print(f"{name}: {fewer} of {len(rows)} rows do not fit {max_length} tokens with all their "
              "shots, and keep those that do", file=sys.stderr)
    if not items:
        raise ValueError(f"{name}: no row fits {max_length} tokens: raise --max_length")
    return items


def make_item(n, row, classes, prompt, encode, answer):
    """Row n as an Item; encode and answer (with EOS) turn texts into ids."""
    sides = [(str(row[f"{s}_choice_id"]), row.get(f"{s}_choice")) for s in ("accept", "reject")]
    target, accept = row["probabilities"], classes.index(sides[0][0])
    return Item(
        row=n, prompt=prompt,
        beliefs=tuple(encode(f"{c}<{text}>" if text else c) for c, text in sides),
        responses=tuple(answer(row[f"{s}_response"]) for s in ("accept", "reject")),
        has_close=bool(sides[0][1]), target=target, accept=accept,
        n_options=len(row["options"]), kind=kind_of(target, accept), question=question_of(row),
        group=str(row.get("group") or ""))


def question_of(row):
    """What tells whether two rows are wordings of one question."""
    return str(row.get("question_id") or row["prompt"])


def trim(item, max_length):
    """Cut an Item to max_length in place; False if a branch would keep no response token."""
    over = item.length(EVAL_BRANCHES) - max_length
    keep = max(len(item.prompt) - over, min(len(item.prompt), max_length // 2))
    head, tail = (keep + 1) // 2, keep // 2
    item.prompt = item.prompt[:head] + item.prompt[len(item.prompt) - tail:]
    room = max_length - len(item.prompt) - max(map(len, item.beliefs))
    item.responses = tuple(r[:room] if room > 0 else [] for r in item.responses)
    return room > 0


def mismatch(items, max_length, seed):
    """Give every item the accepted answer of another row whose prompt is different, for the branch
    "mismatch", in place. Each answer is given once: a shift by the largest group of equal prompts,
    in an order that keeps groups together. Fixed for a dataset, so that a reference can be kept for
    these pairs, while batches go on being shuffled. ValueError where no such pairing is."""
    groups = defaultdict(list)
    for item in items:
        groups[tuple(item.prompt)].append(item)
    shift, rng = max(map(len, groups.values())), np.random.default_rng([seed, 5])
    if 2 * shift > len(items):
        raise ValueError(f"{shift} of {len(items)} rows have the same prompt, so that KTO's "
                         "mismatched pairs cannot be made: give more rows, or another --loss")
    several = list(groups.values())
    order = [item for g in rng.permutation(len(several)) for item in several[g]]
    for k, item in enumerate(order):
        other = order[(k + shift) % len(order)]
        room = max_length - len(item.prompt)           # it may be longer than the row's own
        belief = other.beliefs[0][:room - 1]
        item.beliefs = (*item.beliefs[:2], belief)
        item.responses = (*item.responses[:2], other.responses[0][:room - len(belief)])


def epoch_batches(lengths, batch_size, seed, epoch, window=16):
    """The batches of one epoch: a list of lists of indices, each index once. A pure function of its
    arguments. A shuffled order is cut into windows of `window` batches, each window sorted by
    length, so that a batch holds rows of like length, and its batches shuffled again."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches, lengths = [], np.asarray(lengths)
    for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut = [part[i:i + batch_size].tolist() for i in range(0, len(part), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def lay_out(sequences):
    """Token sequences as paths in a tree in which no common beginning stands twice: (tokens, the
    places in it of each sequence's tokens)."""
    tokens, paths, last, path = [], {}, [], []
    for s in sorted(range(len(sequences)), key=sequences.__getitem__):    # neighbours share most
        now = sequences[s]
        same = next((t for t, (a, b) in enumerate(zip(last, now)) if a != b),
                    min(len(last), len(now)))
        path = path[:same] + list(range(len(tokens), len(tokens) + len(now) - same))
        tokens += now[same:]
        paths[s], last = path, now
    return tokens, [paths[s] for s in range(len(sequences))]


def sequence(item, branch):
    belief, response = (pieces[i] for pieces, i in zip((item.beliefs, item.responses),
                                                       BRANCHES[branch]))
    return item.prompt + belief + response


def cost(item, branches):
    """Tokens that a row costs in a batch."""
    return len(lay_out([sequence(item, b) for b in branches])[0])


def pack(rows):
    """Rows of sequences -> the tokens of all, one after the other: what the sequences of a row have
    in common stands once, and nothing is padded. Attention alone needs whole sequences, and finds
    them by `paths`. Returns the lengths of the R sequences beside a dict of arrays:

    ids (N,)       the tokens
    paths (R, T)   the places in ids of each sequence's tokens, its last one repeated up to T
    places (N,)    the way back: where each token stands in the flat (R, T) table. A token of
                   several sequences stands in several places, with one past: any of them will do
    """
    ids, paths = [], []
    for sequences in rows:
        tokens, several = lay_out(sequences)
        paths += [len(ids) + np.array(path) for path in several]
        ids += tokens
    lengths = np.array([len(path) for path in paths])
    places = np.zeros(len(ids), np.int64)
    for r, path in enumerate(paths):
        places[path] = r * lengths.max() + np.arange(len(path))
    paths = np.stack([np.pad(p, (0, lengths.max() - len(p)), "edge") for p in paths])
    return {"ids": np.array(ids), "paths": paths, "places": places}, lengths


def collate(items, branches, classes, share=True):
    """Items -> one batch: what a row's S branches have in common (the prompt; in "given" the belief
    too) stands once. share=False: each branch by itself. classes: ids of the K class tokens.
    Returns a dict of arrays:

    ids, places (N,), paths (R, T)  see pack; R is B * S
    at (M,)        places in ids whose hidden state predicts a scored token
    tokens (M, 1+K)  the scored token's id, then the class ids: the columns to read there
    slot (M,)      where its log-prob adds up: index into the flat (B, S, 3) table
    first (B,)     which of the M is the chosen branch's class token (its columns 1.. are p(b|x))
    counts (B, S, 3)  scored tokens of each piece
    target (B, K), n_options (B,)

    Scored: belief and response of a branch, but in "given" the response alone, for its belief is
    the chosen branch's, and scored there.
    """
    packed, lengths = pack([[sequence(i, b) for b in part] for i in items
                            for part in ([branches] if share else [[b] for b in branches])])
    counts = np.zeros((len(items), len(branches), 3), np.int64)
    at, tokens, slot = [], [], []
    for b, item in enumerate(items):
        for s, branch in enumerate(branches):
            belief, n = item.beliefs[BRANCHES[branch][0]], b * len(branches) + s
            close = int(item.has_close and len(belief) > 1)
            start, path = len(item.prompt), packed["paths"][n, :lengths[n]]
            counts[b, s] = len(belief) - close, close, len(path) - start - len(belief)
            if branch == "given":
                counts[b, s, :RESPONSE], start = 0, start + len(belief)
            tokens.append(packed["ids"][path[start:]])
            at.append(path[start - 1:-1])
            slot.append(3 * n + np.repeat(np.arange(3), counts[b, s]))
    tokens, scored = np.concatenate(tokens), counts.sum((1, 2))
    columns = np.broadcast_to(np.asarray(classes), (len(tokens), len(classes)))
    return {**packed, "at": np.concatenate(at), "slot": np.concatenate(slot),
            "tokens": np.concatenate([tokens[:, None], columns], 1),
            "first": scored.cumsum() - scored, "counts": counts,
            "target": np.array([i.target for i in items], np.float32),
            "n_options": np.array([i.n_options for i in items], np.float32)}


# ---------------------------------------------------------------------------------------------
# From the hub: plain HTTP, into Hugging Face's own cache folder

CHECKPOINT = [  # files of a checkpoint: of each line, the first that is there
    ["config.json"], ["tokenizer.json", "vocab.json"], ["merges.txt", "tokenizer.json"],
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
     "pytorch_model.bin.index.json"]]


TIMEOUT, PAUSE, TRIES = 30, 1.0, 5     # seconds without a byte; first wait; attempts


def find_checkpoint(name, weights=True):
    """A checkpoint folder for --model: a local folder, or a name on the hub ("gpt2",
    "EleutherAI/pythia-70m"), fetched file by file where the cache does not hold it, all of one
    commit. HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured.
    weights=False: config.json alone. OSError or ValueError, one line, where that cannot be."""
    if name and (Path(name) / "metrics.jsonl").is_file():
        raise ValueError(f"{name} is a run: say which of its weights, {name}/best or {name}/last")
    if name and Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", name):
        raise FileNotFoundError(f"no folder {name}, and that is no name on the hub "
                                "(gpt2, ORG/MODEL)")
    repo, commit = hub_cache() / f"models--{name.replace('/', '--')}", None
    for choices in CHECKPOINT if weights else CHECKPOINT[:1]:
        tries = (find(repo, name, file, commit) for find in (cached, fetch) for file in choices)
        path = next(filter(None, tries), None)
        if path is None:
            raise ValueError(f"{name} on the hub has no {' or '.join(choices)}")
        commit = path.parent.name
        if path.name.endswith(".index.json"):
            for shard in sorted(set(shards_of(path).values())):
                if not (cached(repo, name, shard, commit) or fetch(repo, name, shard, commit)):
                    raise ValueError(f"{path}: shard {shard!r} is not beside it on the hub")
    return path.parent


def hub_cache():
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def offline():
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def cached(repo, name, file, commit):
    """The path of a file that the cache holds, or None. commit None: the one last fetched."""
    main = repo / "refs" / "main"
    commit = commit or (main.read_text().strip() if main.is_file() else "none")
    path = repo / "snapshots" / commit / file
    return path if path.is_file() else None


def fetch(repo, name, file, commit):
    """One file of a hub repository -> its path in the cache; None if the hub has no such file.
    It is fetched into blobs/ETAG.incomplete, from where an earlier try broke off, its size and, if
    the hub tells it, its sha256 are checked, and it is renamed. A lock keeps other processes
    out."""
    if offline():
        raise FileNotFoundError(f"{name}: {file} is not in {repo} and HF_HUB_OFFLINE is set")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url, token = f"{endpoint}/{name}/resolve/{commit or 'main'}/{file}", os.environ.get("HF_TOKEN")
    headers = {"Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    head = request("HEAD", url, headers)
    if head.status_code == 404:
        return None
    known = {}                                         # first to say it: the hub, not its storage
    for answer in [*head.history, head]:
        for key in ("X-Repo-Commit", "X-Linked-ETag", "X-Linked-Size", "ETag"):
            if answer.headers.get(key):
                known.setdefault(key, answer.headers[key])
    etag = (known.get("X-Linked-ETag") or known.get("ETag") or "").removeprefix("W/").strip('"')
    commit = known.get("X-Repo-Commit", "")
    if not re.fullmatch(r"[\w.-]+", etag) or not re.fullmatch(r"\w+", commit):
        raise ValueError(f"{url}: the answer names no commit or no ETag to keep the file by "
                         f"({commit!r}, {etag!r}): is HF_ENDPOINT right?")
    size = int(known.get("X-Linked-Size") or head.headers.get("Content-Length") or -1)
    blob, link = repo / "blobs" / etag, repo / "snapshots" / commit / file
    blob.parent.mkdir(parents=True, exist_ok=True)
    with alone(repo / ".lock"):
        if not blob.is_file():
            download(url, headers, Path(f"{blob}.incomplete"), size, f"{name}/{file}")
            check_blob(Path(f"{blob}.incomplete"), etag, size, url)
            os.replace(f"{blob}.incomplete", blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        write(repo / "refs" / "main", commit)
    return link


FILTERED = re.compile("content_(filter|policy_violation)")     # how a server refuses a prompt


def request(method, url, headers=None, read=None, tries=None, pause=lambda seconds, problem:
            time.sleep(seconds), **kwargs):
    """One HTTP answer, of 2xx or 404 (400 where a prompt is refused), or read(it). 429, 5xx,
    timeouts, cut connections and answers that cannot be read are asked again, after Retry-After or
    a jittered, doubling wait; another 4xx is an error with the server's words at once, and so is,
    without tries, a server out of reach (with them, soon). pause may return True to give up. No
    message shows a key."""
    for attempt in range(1, (tries or TRIES) + 1):
        wait = min(60, PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
        final = attempt == (tries or TRIES)
        try:
            answer = requests.request(method, url, headers=headers,
                                      auth=lambda r: r,  # else ~/.netrc overrides the headers
                                      **{"timeout": (10, TIMEOUT)} | kwargs)
            if answer.status_code < 300 or answer.status_code == 404 or (
                    read and answer.status_code == 400 and FILTERED.search(answer.text)):
                return read(answer) if read else answer
            words = " ".join(answer.text.split()) if method != "HEAD" else ""
            problem = f"the server answered {answer.status_code} {answer.reason} {words}".strip()
            if answer.status_code in (401, 403) and method == "HEAD":
                raise ValueError(f"{url}: {answer.status_code}: no such repository, or it wants an "
                                 "HF_TOKEN")
            if answer.status_code != 429 and answer.status_code < 500:
                raise ValueError(f"{url}: {hide(problem, headers, kwargs)}")
            wait = retry_after(answer.headers.get("Retry-After")) or wait
        except requests.RequestException as e:
            problem = type(e).__name__
            if isinstance(e, requests.exceptions.InvalidJSONError):
                problem += f" {e}"
            elif isinstance(e, ValueError):            # a header or address that cannot be sent
                raise ValueError(f"{url}: {hide(str(e), headers, kwargs)}") from None
            if "Max retries" in str(e):
                problem += ": give a local folder, or check the network and HF_ENDPOINT" if (
                    not tries) else ": is the address right, and the server up?"
                final = final or not tries or attempt > 3
        if final:
            break
        if pause(wait, hide(problem, headers, kwargs)):
            raise ConnectionAbortedError(url)
    raise ConnectionError(f"{url}: {hide(problem, headers, kwargs)}"
                          + (f", {attempt} times" if attempt > 1 else ""))


def retry_after(value):
    """Seconds that a Retry-After header asks for, a number or a date; 0 where it says neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            seconds = 0
    return max(0, min(600, seconds))


def hide(words, headers, kwargs):
    """Words of at most 500 characters without the keys that were sent."""
    sent = [(headers or {}).get(k) for k in ("Authorization", "api-key")]
    for key in filter(None, [*sent, (kwargs.get("params") or {}).get("apikey")]):
        words = words.replace(key.removeprefix("Bearer "), "***")
    return words[:500]


def download(url, headers, path, size, name):
    """GET url into path, going on from what is there; after a cut or a stall, again."""
    for attempt in range(TRIES):
        have = path.stat().st_size if path.exists() else 0
        if have >= size >= 0:
            return
        ranged = headers | {"Range": f"bytes={have}-"} if have else headers
        try:
            answer = request("GET", url, ranged, stream=True)
            if answer.status_code == 404:
                raise ValueError(f"{url}: gone between two requests: run the command again")
            if answer.status_code != 206:              # a server that knows no ranges sends it all
                have = 0
            with answer, open(path, "ab" if have else "wb") as f, tqdm(
                    desc=f"fetching {name}", total=max(size, 0) or None, initial=have, unit="B",
                    unit_scale=True, delay=1, dynamic_ncols=True) as bar:
                for chunk in answer.iter_content(1 << 16):
                    f.write(chunk)
                    bar.update(len(chunk))
            if size < 0 or path.stat().st_size >= size:
                return
            problem = "closed before the end"
        except (requests.RequestException, ConnectionError) as e:
            problem = type(e).__name__
        time.sleep(PAUSE * 2 ** attempt)
    raise ConnectionError(f"{url}: broken off {TRIES} times ({problem}); what came is kept, run "
                          "the command again to go on")


def check_blob(path, etag, size, url):
    """ValueError, and the file gone, if it is not what the hub announced."""
    good = size < 0 or path.stat().st_size == size
    if good and re.fullmatch("[0-9a-f]{64}", etag):    # large files: the ETag is the sha256
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
        good = digest.hexdigest() == etag
    if not good:
        path.unlink()
        raise ValueError(f"{url}: what came is not the file that the hub announced (size or sha256 "
                         "differ); it was thrown away, run the command again")


def find_dataset(name):
    """A dataset's folder for --data: a local one, or a published set by its name on the hub
    ("Binwei01/mmoqa_usa"), whose rows are then fetched once and kept beside the checkpoints."""
    if not name:
        raise ValueError("a name in --data is empty")
    if Path(name).is_dir() or Path(name).parent.is_dir() or not re.fullmatch(
            r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name):
        return Path(name)                              # a local one, perhaps not there
    folder = hub_cache() / f"rows--{name.replace('/', '--')}"
    if not (folder / "meta.json").is_file():
        if offline():
            raise FileNotFoundError(f"{name} is not in {folder} and HF_HUB_OFFLINE is set")
        with alone(folder / ".lock"):
            if not (folder / "meta.json").is_file():
                fetch_rows(name, folder)
    return folder


PAGE = 100                             # rows of an answer: the most that the hub gives


def fetch_rows(name, folder):
    """All rows of a published dataset into folder, by the hub's rows API. meta.json comes last, and
    tells that they are complete."""
    listed = ask_hub(name, "splits", "splits")["splits"]
    configs = {s["config"] for s in listed}
    if len(configs) > 1 and "default" not in configs:
        raise ValueError(f"{name} has several configurations {sorted(configs)}: fetch the one that "
                         "is meant into a folder of your own")
    config = "default" if "default" in configs else configs.pop() if configs else None
    theirs = {s["split"] for s in listed if s["config"] == config}
    names = {"train": ["train"], "eval": ["eval", "validation", "valid", "dev"], "test": ["test"]}
    for ours, known in names.items():
        split = next((n for n in known if n in theirs), None)
        if split is None:
            raise ValueError(f"{name} has the splits {sorted(theirs)}: none is called "
                             f"{' or '.join(known)}")
        if not (folder / f"{ours}.jsonl").is_file():
            fetch_split(name, config, split, folder / f"{ours}.jsonl")
    write(folder / "meta.json", json.dumps(published_meta(name, folder), indent=1) + "\n")


def fetch_split(name, config, split, path):
    """One split, page after page, into PATH.part, from where an earlier try broke off. A row with
    an empty text is left out; its line stays empty."""
    part, done, empty = Path(f"{path}.part"), 0, 0
    if part.is_file():
        lines = part.read_bytes().split(b"\n")[:-1]    # without the half line of a killed fetch
        part.write_bytes(b"".join(line + b"\n" for line in lines))
        done = len(lines)
    with progress(desc=f"fetching {name}, {split}", unit="row", initial=done) as bar, \
            open(part, "a", encoding="utf-8", errors="replace") as f:
        while bar.total is None or done < bar.total:
            rows, total = page(name, config, split, done, PAGE)
            if done > total or not rows and done < total:
                part.unlink()
                raise ValueError(f"{name}, {split}: {total} rows on the hub, of which {done} came: "
                                 "it has changed; run the command again")
            for n, row in enumerate(rows, done):
                row = published_row(row, name, f"{name}, {split}, row {n}")
                f.write((json.dumps(row, ensure_ascii=False) if row else "") + "\n")
                empty += row is None
            f.flush()
            done, bar.total = done + len(rows), total
            bar.update(len(rows))
    if empty:
        print(f"{name}, {split}: {empty} rows with an empty text are left out", file=sys.stderr)
    part.rename(path)


def page(name, config, split, offset, length):
    """(rows from offset on, how many there are in all). Where long cells come cut off, the page is
    asked for again in halves."""
    answer = ask_hub(name, "rows", "rows", config=config, split=split, offset=offset, length=length)
    if answer.get("partial"):
        raise ValueError(f"{name}: the hub serves only a part of its rows: fetch it in another way")
    try:
        rows, total = [r["row"] for r in answer["rows"]], int(answer["num_rows_total"])
        cut = [r["truncated_cells"] for r in answer["rows"] if r.get("truncated_cells")]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{name}: not a page of rows: {str(answer)[:200]}") from None
    if not cut:
        return rows, total
    if length == 1:
        raise ValueError(f"{name}, {split}, row {offset}: the hub cuts {cut[0]} off: fetch the "
                         "dataset in another way")
    half = length // 2
    return (page(name, config, split, offset, half)[0]
            + page(name, config, split, offset + half, length - half)[0], total)


def ask_hub(name, what, key, **query):
    """The rows API's answer to one request, a dict whose `key` is a list."""
    server = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    status, answer = request("GET", f"{server.rstrip('/')}/{what}", headers,
                             read=lambda r: (r.status_code, r.json()),
                             params={"dataset": name} | query)
    if status == 404:
        raise ValueError(f"no folder {name}, and the hub has no such dataset ({answer}): make one "
                         "with synth.py, or correct --data")
    if not isinstance(answer, dict) or not isinstance(answer.get(key), list):
        raise ValueError(f"{name}: the hub answered {str(answer)[:200]}")
    return answer


GROUPS = {"usa": "United States", "pk": "Pakistan", "sa": "S. Africa"}   # in Binwei01/mmoqa_...


def published_row(row, name, where):
    """A published row in our columns (numbers may be texts, lists may be literals), or None where a
    text is empty that must not be. Where it has no question_id, rows of the same options and shares
    are one question; where it has no group, the set's name may tell."""
    lacking = [k for k in FIELDS if row.get(k) is None]
    if lacking:
        raise ValueError(f"{where} has no column {', '.join(lacking)}; it has "
                         f"{', '.join(sorted(row))}")
    if not all(str(row[k]).strip() for k in FIELDS):
        return None
    out = {k: row[k] for k in (*FIELDS, *TEXTS) if row.get(k) not in (None, "")}
    for key in ("options", "probabilities"):
        try:
            out[key] = ast.literal_eval(row[key]) if isinstance(row[key], str) else row[key]
            out[key] = [x if key == "probabilities" else str(x) for x in out[key]]
        except (ValueError, SyntaxError, TypeError):
            raise ValueError(f"{where}: {key} is no list: {str(row[key]):.80}") from None
    for key in set(out) - {"options", "probabilities"}:
        out[key] = str(out[key])
        if key.endswith("_choice_id"):                 # 4, "4" and 4.0 are one class
            out[key] = re.sub(r"\.0+$", "", out[key])
    if out["prompt"].startswith("<Q>") and out["prompt"].endswith("<A>"):
        out["prompt"] = out["prompt"][3:-3]
    question = repr((out["options"], out["probabilities"])).encode()
    out.setdefault("question_id", hashlib.sha256(question).hexdigest()[:12])
    told = re.search(r"mmoqa_(usa|pk|sa)(_large)?$", name)
    if told:
        out.setdefault("group", GROUPS[told[1]])
    return out


def published_meta(name, folder):
    """meta.json of a published set from its rows: six shares are classes 0..5, 0 off the scale,
    and five are ratings 1..5; a belief's class is the one that rows give it most often."""
    seen, sizes = defaultdict(Counter), Counter()
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", encoding="utf-8") as f:
            for row in map(json.loads, filter(str.strip, f)):
                sizes[len(row["probabilities"])] += 1
                for side in ("accept", "reject"):
                    if row.get(f"{side}_choice"):
                        seen[row[f"{side}_choice"]][row[f"{side}_choice_id"]] += 1
    if len(sizes) != 1 or not set(sizes) <= {5, 6}:
        raise ValueError(f"{name}: probabilities of {sorted(sizes)} entries: 5 (ratings) or 6 "
                         "(opinions) are known here")
    six = set(sizes) == {6}
    odd = sum(len(c) > 1 for c in seen.values())
    if odd:
        print(f"{name}: {odd} of {len(seen)} belief texts occur under several classes; each counts "
              "for its most frequent one", file=sys.stderr)
    return {"classes": [str(k) for k in range(0 if six else 1, 6)],
            "off_scale": "0" if six and seen else None, "made_by": "published", "from": name,
            "belief_to_class": {t: c.most_common(1)[0][0] for t, c in seen.items()}}


# ---------------------------------------------------------------------------------------------
# The boundary that all scripts share: flags, files, one-line errors

def add_flags(parser, config, names=None):
    """argparse flags generated from a flat dataclass: one per field (or per name), the trailing
    comment of the field's line is the help text."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    for field in dataclasses.fields(config):
        if names and field.name not in names:
            continue
        kind = type(field.default)
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", default=field.default, help=help_of[field.name],
                            **action)


def help_first(name, flags):
    """Answer --help of the script that is run (name: its __name__) at once; flags makes its parser.
    A script calls this above its slow imports."""
    if name == "__main__" and {"-h", "--help"} & set(sys.argv):
        flags().parse_args()


class Parser(argparse.ArgumentParser):
    """No abbreviations, and a mistyped flag or value is one line."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def run(main):
    """Call main(); what a user gave wrong becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as e:
        if os.environ.get("RANK", "0") == "0":         # under torchrun every rank says the same
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_ranges(o, **ranges):
    """ValueError, naming the flag, for a field of o outside (low, high), or no number."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(o, name) <= high:        # NaN is in no range
            raise ValueError(f"--{name} must be from {low:g} to {high:g}, got {getattr(o, name)}")


def progress(*args, **kwargs):
    """A progress bar; where nobody watches (a log file), a line every 30 seconds."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 30, dynamic_ncols=True, **kwargs)


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`; ValueError with its path if it does not."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}): make or fetch it again") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, not a {type(value).__name__}")
    return value


def shards_of(path):
    """{tensor: shard} of a checkpoint's index; every shard a plain name, in the same folder."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path} has no weight_map: fetch it again")
    for shard in where.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path}: shard {shard!r} is not a file of this folder")
    return where


@contextmanager
def alone(lock):
    """What stands under it is done by one process at a time, the others wait. lock: a file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process at work in {lock.parent}", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def write(path, text):
    """Write a text file under a temporary name, then rename: never half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
