"""Rows of preference data -> pieces of tokens -> batches. Numpy only: train.py makes the tensors.

Second in reading order. A row is one JSON object a line (see load_rows). It is never tokenized as
one string and searched for its parts: prompt, belief and response are tokenized apart and joined,
    <Q>{prompt}<A> | {class}<{belief text}> | {response}<|endoftext|>        (reviews: {class} alone)
and every scored token carries the piece it belongs to, so that every loss is a selection.

Left out on purpose: streaming and worker processes (the largest published set fits in memory).
At the end of the file: what the scripts share at their boundary (flags, files, one-line errors).
"""
import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

# ---------------------------------------------------------------------------------------------
# Rows

FIELDS = {"prompt": str, "options": list, "probabilities": list, "accept_choice_id": (str, int),
          "accept_response": str, "reject_choice_id": (str, int), "reject_response": str}
TEXTS = ("accept_choice", "reject_choice", "group", "question_id", "context")    # optional fields
SPLITS = ("train", "eval", "test")


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
        if not isinstance(row.get(name) or "", (str, int)):
            raise ValueError(f"field {name!r} must be text, got {row[name]!r}")
    p = row["probabilities"]
    if len(p) != len(classes):
        raise ValueError(f"probabilities has {len(p)} entries for the {len(classes)} classes "
                         f"{classes} of meta.json")
    if not all(isinstance(x, (int, float)) and 0 <= x <= 1.02 for x in p) or abs(sum(p) - 1) > 0.02:
        raise ValueError(f"probabilities must be shares that sum to 1 (within 0.02), got {p}")
    for side in ("accept", "reject"):
        if str(row[f"{side}_choice_id"]) not in classes:
            raise ValueError(f"{side}_choice_id {row[f'{side}_choice_id']!r} is not one of {classes}")
        if not row[f"{side}_response"].strip():
            raise ValueError(f"{side}_response is empty: leave the row out")
    if (row.get("accept_choice") is None) != (row.get("reject_choice") is None):
        raise ValueError("accept_choice and reject_choice: give both belief texts or neither")
    if not row["prompt"].strip():
        raise ValueError("prompt is empty: leave the row out")


def load_rows(path, classes):
    """The rows of a JSON-lines file, each checked against FIELDS and the class labels.
    ValueError names the file and the line of the first broken row."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    check_row(row, classes)
                except ValueError as e:
                    raise ValueError(f"{path}, line {number}: {e}") from None
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
    meta = json.loads(path.read_text(encoding="utf-8"))
    classes = meta.get("classes")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)
            and len(set(classes)) == len(classes)):
        raise ValueError(f"{path}: 'classes' must list the class labels as strings, got {classes!r}")
    return meta


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


def spell(token):
    return "".join(NAMES[b] for b in token)


class Tokenizer:
    """Byte-pair encoding from an ordered list of merges [(bytes, bytes), ...]. ids: the 256 bytes
    in GPT-2's order, then one id per merge, then <|endoftext|>."""

    def __init__(self, merges, name="gpt2"):
        self.merges = merges
        self.tokens = [bytes([b]) for b in NAMES] + [a + b for a, b in merges]
        ranks = {t: i for i, t in enumerate(self.tokens)}
        if len(ranks) != len(self.tokens):
            raise ValueError("the merges make one token twice")
        self.eos, self.n_tokens = len(ranks), len(ranks) + 1
        self.bpe = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                                     special_tokens={EOS: self.eos}, explicit_n_vocab=self.n_tokens)

    def encode(self, text):
        return self.bpe.encode_ordinary(text)          # <|endoftext|> in data is plain text

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.eos])

    def save(self, folder):
        """vocab.json and merges.txt, as GPT-2's checkpoints have them."""
        write(Path(folder) / "vocab.json", json.dumps(self.vocab(), ensure_ascii=False))
        lines = [f"{spell(a)} {spell(b)}" for a, b in self.merges]
        write(Path(folder) / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))

    def vocab(self):
        return {spell(t): i for i, t in enumerate(self.tokens)} | {EOS: self.eos}

    @classmethod
    def load(cls, folder):
        """From vocab.json + merges.txt, or OpenAI's encoder.json + vocab.bpe."""
        folder = Path(folder)
        for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
            if (folder / vocab).is_file() and (folder / merges).is_file():
                break
        else:
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json and merges.txt "
                                    "(or encoder.json and vocab.bpe) beside the weights")
        byte = {c: b for b, c in NAMES.items()}
        lines = (folder / merges).read_text(encoding="utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        try:
            tokenizer = cls([tuple(bytes(byte[c] for c in part) for part in (a, b)) for a, b in pairs])
        except (KeyError, ValueError) as e:
            raise ValueError(f"{folder / merges} is not a list of merges: {e}") from None
        if json.loads((folder / vocab).read_text(encoding="utf-8")) != tokenizer.vocab():
            raise ValueError(f"{folder / vocab}: the ids do not follow the order of {merges}")
        return tokenizer


def train_bpe(texts, vocab_size):
    """Learn merges from texts: the most frequent pair first, ties to the smallest bytes, until the
    vocabulary is full or no pair occurs twice. Deterministic."""
    words = Counter(w for t in texts for w in re.findall(r" ?[^\W\d_]+| ?[^\s\w]+", t))
    words = [([bytes([b]) for b in w.encode()], n) for w, n in sorted(words.items())]
    merges = []
    while len(merges) < vocab_size - 257:              # 256 bytes, the merges, <|endoftext|>
        pairs = Counter()
        for parts, n in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best, n = max(pairs.items(), key=lambda item: (item[1], item[0]))
        if n < 2:
            break
        merges.append(best)
        words = [(merge(parts, best), n) for parts, n in words]
    return Tokenizer(merges, "own")


def merge(parts, pair):
    """Join every neighbouring `pair` in a list of byte strings."""
    if pair[0] not in parts:
        return parts
    out = []
    for p in parts:
        if out and (out[-1], p) == pair:
            out[-1] = out[-1] + p
        else:
            out.append(p)
    return out


# ---------------------------------------------------------------------------------------------
# Pieces and batches

BELIEF, CLOSE, RESPONSE = range(3)     # belief without its closing token | that token | response
BRANCHES = {                           # name -> which belief and which response (0 accepted, 1 rejected)
    "chosen": (0, 0),
    "own": (1, 1),                     # rejected response after its own belief (DPO)
    "given": (0, 1),                   # rejected response after the accepted belief (GDPO Eq. 7)
}


@dataclasses.dataclass
class Item:
    """One row in tokens. beliefs and responses: (accepted, rejected); responses end in EOS."""
    row: int                           # its place in the split, for messages and caches
    prompt: list
    beliefs: tuple
    responses: tuple
    has_close: bool                    # False for reviews, whose belief is the class alone
    target: list                       # (K,) shares, as given
    accept: int                        # class index of the accepted belief
    n_options: int
    kind: str                          # "majority", "minority" or "other": of the accepted belief
    question: str
    group: str

    def length(self, branches):
        pairs = [BRANCHES[b] for b in branches]
        return len(self.prompt) + max(len(self.beliefs[b]) + len(self.responses[r]) for b, r in pairs)


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


def encode_rows(rows, tokenizer, classes, max_length, overlong="error", name="data"):
    """Rows -> Items of at most max_length tokens. A longer row is an error, is dropped, or is
    trimmed: the prompt's middle goes first (down to half of max_length; <Q> and <A> stay), then the
    response's end, and with it EOS. Drops are counted aloud. name: for messages."""
    encode = lru_cache(100_000)(tokenizer.encode)      # prompts and beliefs repeat
    class_ids(tokenizer, classes)
    items, dropped, trimmed = [], 0, 0
    for n, row in enumerate(rows):
        sides = [(str(row[f"{s}_choice_id"]), row.get(f"{s}_choice")) for s in ("accept", "reject")]
        target, accept = row["probabilities"], classes.index(sides[0][0])
        item = Item(
            row=n, prompt=encode((row.get("context") or "") + f"<Q>{row['prompt']}<A>"),
            beliefs=tuple(encode(c if text is None else f"{c}<{text}>") for c, text in sides),
            responses=tuple(tokenizer.encode(row[f"{s}_response"]) + [tokenizer.eos]
                            for s in ("accept", "reject")),
            has_close=sides[0][1] is not None, target=target, accept=accept,
            n_options=len(row["options"]), kind=kind_of(target, accept),
            question=str(row.get("question_id") or row["prompt"]), group=str(row.get("group") or ""))
        if item.length(BRANCHES) > max_length:
            if overlong == "error":
                raise ValueError(
                    f"{name}, row {n + 1}: {item.length(BRANCHES)} tokens ({len(item.prompt)} of them "
                    f"the prompt) do not fit the context of {max_length}: raise --max_length (up to the "
                    "model's context), or say --overlong trim or --overlong drop")
            if overlong == "drop" or not trim(item, max_length):
                dropped += 1
                continue
            trimmed += 1
        items.append(item)
    if dropped or trimmed:
        print(f"{name}: of {len(rows)} rows {trimmed} trimmed and {dropped} dropped, "
              f"longer than {max_length} tokens", file=sys.stderr)
    if not items:
        raise ValueError(f"{name}: no row fits {max_length} tokens: raise --max_length")
    return items


def trim(item, max_length):
    """Cut an Item to max_length in place; False if a branch would keep no response token."""
    over = item.length(BRANCHES) - max_length
    keep = max(len(item.prompt) - over, min(len(item.prompt), max_length // 2))
    head, tail = (keep + 1) // 2, keep // 2
    item.prompt = item.prompt[:head] + item.prompt[len(item.prompt) - tail:]
    room = max_length - len(item.prompt) - max(map(len, item.beliefs))
    item.responses = tuple(r[:room] if room > 0 else [] for r in item.responses)
    return room > 0


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


def collate(items, branches, classes):
    """Items -> one batch of B * S right-padded sequences, row by row, branch by branch.
    classes: ids of the K class tokens. Returns a dict of arrays:

    ids (B*S, T)   right-padded; under the causal mask no row sees its pads
    at (M,)        flat positions in ids whose hidden state predicts a scored token
    tokens (M, 1+K)  the scored token's id, then the class ids: the columns to read there
    slot (M,)      where its log-prob adds up: index into the flat (B, S, 3) table
    first (B,)     which of the M is the chosen branch's class token (its columns 1.. are p(b|x))
    counts (B, S, 3)  scored tokens of each piece
    target (B, K), n_options (B,)

    Scored: belief and response of a branch, but in "given" the response alone, for its belief is
    the chosen branch's, and scored there.
    """
    T = max(i.length(branches) for i in items)
    ids = np.zeros((len(items) * len(branches), T), np.int64)
    counts = np.zeros((len(items), len(branches), 3), np.int64)
    at, tokens, slot, first, scored = [], [], [], [], 0
    for b, item in enumerate(items):
        for s, branch in enumerate(branches):
            belief, response = (pieces[i] for pieces, i in
                                zip((item.beliefs, item.responses), BRANCHES[branch]))
            sequence, n = item.prompt + belief + response, b * len(branches) + s
            ids[n, :len(sequence)] = sequence
            close = int(item.has_close)
            counts[b, s] = len(belief) - close, close, len(response)
            start = len(item.prompt)
            if branch == "given":
                counts[b, s, :RESPONSE], start = 0, start + len(belief)
            if s == 0:
                first.append(scored)
            scored += len(sequence) - start
            tokens.append(sequence[start:])
            at.append(n * T + np.arange(start - 1, len(sequence) - 1))
            slot.append(3 * n + np.repeat(np.arange(3), counts[b, s]))
    tokens = np.concatenate(tokens)
    columns = np.broadcast_to(np.asarray(classes), (len(tokens), len(classes)))
    return {"ids": ids, "at": np.concatenate(at), "slot": np.concatenate(slot),
            "tokens": np.concatenate([tokens[:, None], columns], 1), "first": np.array(first),
            "counts": counts, "target": np.array([i.target for i in items], np.float32),
            "n_options": np.array([i.n_options for i in items], np.float32)}


# ---------------------------------------------------------------------------------------------
# The boundary that all scripts share: flags, files, one-line errors

def add_flags(parser, config):
    """argparse flags generated from a flat dataclass: one per field, the trailing comment of the
    field's line is the help text."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    for field in dataclasses.fields(config):
        kind = type(field.default)
        action = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", default=field.default, help=help_of[field.name],
                            **action)


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
    except (ValueError, OSError) as e:
        if os.environ.get("RANK", "0") == "0":         # under torchrun every rank says the same
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write(path, text):
    """Write a text file under a temporary name, then rename: never half a file."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
