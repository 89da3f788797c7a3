"""Rows of preference data -> pieces of tokens -> batches. No torch here: train.py makes tensors.

Second in reading order. A row is one line with a JSON object (see check_row). Prompt, belief and
response are tokenized as three separate pieces and then joined,
    <Q>{prompt}<A> | {class}<{belief text}> | {response}<|endoftext|>      (reviews: {class} alone)
and every scored token knows its piece. No piece has to be searched for, and a loss simply selects
the pieces it needs. meta.json can change the prompt's form, for example to name the group.

Left out on purpose: streaming and worker processes (the largest published set fits in memory).
"""
import argparse
import errno
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
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Rows

FIELDS = {"prompt": str, "options": list, "probabilities": list, "accept_choice_id": (str, int),
          "accept_response": str, "reject_choice_id": (str, int), "reject_response": str}
TEXTS = ("accept_choice", "reject_choice", "group", "question_id")     # optional fields
SPLITS = ("train", "eval", "test")
FORM = "<Q>{prompt}<A>"                # the prompt's form, unless meta.json has its own


def prompt_text(row, form):
    """The prompt as the model reads it, without few-shot context."""
    before, after = form.split("{prompt}")             # a group's name may contain braces
    group = row.get("group") or ""
    return before.replace("{group}", group) + row["prompt"] + after.replace("{group}", group)


def normal(text):
    """Reduce text to lower-case words, to compare questions."""
    return " ".join(re.findall(r"\w+", text.lower()))


def question_of(row):
    """A key for the row's question: rows that share it are wordings of one question."""
    return row.get("question_id") or normal(row["prompt"]) or row["prompt"]


# ---------------------------------------------------------------------------------------------
# Pieces

# A scored token belongs to piece 0 (the belief without its closing token), 1 (that token) or 2 (the
# response): BELIEF, CLOSE and RESPONSE in losses.py.
BRANCHES = {                           # name -> belief and response: 0 accepted, 1 rejected
    "chosen": (0, 0),
    "own": (1, 1),                     # rejected response after its own belief (DPO)
    "given": (0, 1),                   # rejected response after the accepted belief (GDPO Eq. 7)
    "flip": (1, 0),                    # accepted response after the rejected belief (a metric)
    "mismatch": (2, 2),                # another row's accepted answer (KTO's z0); see mismatch()
}
EVAL_BRANCHES = ("chosen", "own", "given")             # what margins() compares


@dataclass
class Item:
    """One tokenized row."""
    row: int                           # its index in the split, for messages and caches
    prompt: list
    beliefs: tuple                     # (accepted, rejected); mismatch() adds another row's
    responses: tuple                   # likewise; each ends in EOS
    has_close: bool                    # False for reviews, whose belief is the class alone
    target: list                       # (K,) the group's shares, as given
    accept: int                        # class index of the accepted belief
    reject: int                        # and of the rejected one
    n_options: int                     # of the question
    kind: str                          # of the accepted belief: "majority", "minority" or "other"
    question: str
    group: str


def kind_of(target, accept):
    """Paper, section 3: majority if the accepted class has the largest share, minority if it has
    the smallest above zero (no pair accepts a class that nobody holds); else, or on ties, other."""
    shares, share = [p for p in target if p > 0], target[accept]
    if len(shares) == 1 or shares.count(share) != 1:
        return "other"
    return {max(shares): "majority", min(shares): "minority"}.get(share, "other")


def class_ids(tokenizer, classes):
    """The token id of each class label. ValueError unless each is one token, even before `<`."""
    ids = [tokenizer.encode(c) for c in classes]
    for c, i in zip(classes, ids):
        if len(i) != 1 or tokenizer.encode(f"{c}<")[:1] != i:
            raise ValueError(f"class {c!r} is not a token of its own: rename it in meta.json")
    return [i[0] for i in ids]


def make_item(n, row, meta, prompt, encode, answer):
    """Turn row n into an Item. encode and answer (which adds EOS) turn texts into ids."""
    sides = [(str(row[f"{s}_choice_id"]), row.get(f"{s}_choice")) for s in ("accept", "reject")]
    accept, reject = (meta["classes"].index(c) for c, _ in sides)
    return Item(
        row=n, prompt=prompt,
        beliefs=tuple(encode(f"{c}<{text}>" if text else c) for c, text in sides),
        responses=(answer(row["accept_response"]), answer(row["reject_response"])),
        has_close=bool(sides[0][1]), target=row["probabilities"], accept=accept, reject=reject,
        n_options=len(row["options"]), kind=kind_of(row["probabilities"], accept),
        question=question_of(row), group=row.get("group") or "")


def longest(item):
    """Number of tokens in an Item's longest sequence."""
    return len(item.prompt) + max(map(len, item.beliefs)) + max(map(len, item.responses))


def encode_rows(rows, tokenizer, meta, max_length, overlong="error", name="data"):
    """Rows -> Items of at most max_length tokens. Few-shot context loses shots until the row fits.
    A row that is still too long raises ValueError or is dropped. name: the data's, for messages."""
    encode = lru_cache(200_000)(tokenizer.encode)      # many rows share texts
    answer = lru_cache(200_000)(lambda text: tokenizer.encode(text) + [tokenizer.eos])
    class_ids(tokenizer, meta["classes"])              # fails early if a class is not one token
    items, fewer = [], 0
    for n, row in enumerate(rows):
        shots, prompt = row.get("context") or "", prompt_text(row, meta.get("form", FORM))
        shots = [shots] if isinstance(shots, str) else shots
        item = make_item(n, row, meta, encode("".join(shots) + prompt), encode, answer)
        fewer += longest(item) > max_length and len(shots) > 1
        while longest(item) > max_length and len(shots) > 1:
            shots = [shots[0], *shots[2:]] if len(shots) > 2 else []  # shots[0] is the instruction
            item.prompt = encode("".join(shots) + prompt)
        if longest(item) <= max_length:
            items.append(item)
        elif overlong == "error":
            raise ValueError(f"{name}, row {n + 1}: its {longest(item)} tokens do not fit the "
                             f"context of {max_length}: raise --max_length, or set --overlong drop")
    for count, what in (fewer, "given fewer shots"), (len(rows) - len(items), "dropped"):
        if count:
            print(f"{name}: {count} of {len(rows)} rows {what}: longer than {max_length} tokens",
                  file=sys.stderr)
    if not items:
        raise ValueError(f"{name}: no row fits {max_length} tokens: raise --max_length")
    return items


def mismatch(items, max_length, seed):
    """Add to every item, in place, the accepted answer of a row with another prompt, for the branch
    "mismatch". Each answer is used once. The pairing does not depend on the batches, so that the
    reference's log-probs can be cached."""
    groups = defaultdict(list)
    for item in items:
        groups[tuple(item.prompt)].append(item)
    # Equal prompts are adjacent, so a shift by the largest group's size always leaves the group
    shift, rng = max(map(len, groups.values())), np.random.default_rng([seed, 5])
    if 2 * shift > len(items):
        raise ValueError(f"{shift} of {len(items)} rows have the same prompt, so KTO has no "
                         "mismatched pairs: use more rows or another --loss")
    groups = list(groups.values())
    order = [item for g in rng.permutation(len(groups)) for item in groups[g]]
    for k, item in enumerate(order):
        other = order[(k + shift) % len(order)]
        room = max_length - len(item.prompt)           # cut the other answer to fit
        belief = other.beliefs[0][:room - 1]
        item.beliefs = (*item.beliefs[:2], belief)
        item.responses = (*item.responses[:2], other.responses[0][:room - len(belief)])


# ---------------------------------------------------------------------------------------------
# Batches

def epoch_batches(lengths, batch_size, seed, epoch, window=16):
    """The batches of one epoch: lists of indices, each index once. A pure function of its
    arguments. Each window of the shuffled rows is sorted by length, so that a batch holds rows of
    similar length; the window's batches are then shuffled."""
    rng = np.random.default_rng([seed, epoch])
    order, lengths, batches = rng.permutation(len(lengths)), np.asarray(lengths), []
    for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")].tolist()
        cut = [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


# One GDPO row in a batch, with branches "chosen" and "given". Every piece is stored once; `paths`
# lists the places that make up each sequence, `at` the hidden states that predict a scored token:
#
#   ids     <Q>How good is tea?<A>  4<Good>  I love it.<eos>  Too bitter.<eos>
#   place   0 ................. 6   7 .. 10  11 ........ 15   16 ......... 20
#   paths   0 ................. 6   7 .. 10  11 ........ 15                        chosen
#           0 ................. 6   7 .. 10                   16 ......... 20      given
#   at                          6   7 ....................14                       chosen: 9 scored
#                                        10                   16 ........ 19       given: 5 scored

def collate(items, branches, classes):
    """Items -> one batch. A row is a small tree, prompt -> belief -> response. A piece is stored
    once, however many of its S branches use it. Attention alone sees padding, in its (R, T) table.
    classes: ids of the K class tokens. Returns a dict of arrays:

    ids (N,)         the tokens of all pieces, one after the other
    paths (R, T)     the places in ids of each sequence's tokens, its last one repeated up to T;
                     R is B * S
    cells (N,)       the way back: each token's cell in the flat (R, T) table. A token that is in
                     more than one sequence has the same past in each, so any of its cells will do
    at (M,)          places in ids whose hidden state predicts a scored token
    tokens (M, 1+K)  the scored token's id, then the class ids: the columns to read there
    slot (M,)        where its log-prob adds up: index into the flat (B, S, 3) table
    first (B,)       which of the M is the chosen branch's class token (its columns 1.. are p(b|x))
    counts (B, S, 3) scored tokens of each piece
    target (B, K), n_options (B,), and pair (B, 2): shares of the accepted and rejected class

    A branch's belief and response are scored. A belief that an earlier branch of the row has used
    is scored only there, so "given" scores only its response.
    """
    ids, paths, at, scored, slot, first = [], [], [], [], [], []
    for item in items:
        spans = {}                                     # "prompt", k or (k, r) -> places in ids
        first.append(len(at))                          # the first branch's class token
        for branch in branches:
            k, r = BRANCHES[branch]
            belief, response = item.beliefs[k], item.responses[r]
            close = int(item.has_close and len(belief) > 1)              # tokens of the final `>`
            n = [0, 0] if k in spans else [len(belief) - close, close]   # a belief counts once
            n.append(len(response))
            path = []
            for key, piece in ("prompt", item.prompt), (k, belief), ((k, r), response):
                if key not in spans:
                    spans[key] = range(len(ids), len(ids) + len(piece))
                    ids += piece
                path += spans[key]
            scored += path[-sum(n):]
            at += path[-sum(n) - 1:-1]                 # each is predicted one place earlier
            slot += [3 * len(paths) + piece for piece in range(3) for _ in range(n[piece])]
            paths.append(path)
    T, ids = max(map(len, paths)), np.array(ids)
    cells = np.zeros_like(ids)
    for r, path in enumerate(paths):
        cells[path] = r * T + np.arange(len(path))
        path += path[-1:] * (T - len(path))            # attention is causal: no token sees these
    columns = np.tile(classes, (len(at), 1))           # (M, K)
    counts = np.bincount(slot, minlength=3 * len(paths)).reshape(len(items), len(branches), 3)
    return {"ids": ids, "paths": np.array(paths), "cells": cells, "at": np.array(at),
            "tokens": np.column_stack([ids[scored], columns]), "slot": np.array(slot),
            "first": np.array(first), "counts": counts,
            "target": np.array([i.target for i in items], np.float32),
            "pair": np.array([[i.target[i.accept], i.target[i.reject]] for i in items], np.float32),
            "n_options": np.array([i.n_options for i in items], np.float32)}


def cost(item, branches):
    """Number of tokens a row adds to a batch: prompt, beliefs and responses, each counted once."""
    pairs = {BRANCHES[b] for b in branches}
    beliefs = sum(len(item.beliefs[k]) for k in {k for k, _ in pairs})
    return len(item.prompt) + beliefs + sum(len(item.responses[r]) for _, r in pairs)


# =============================================================================================
# Plumbing: dataset folders and text files; then HTTP, the hub, flags and one-line errors

META = {"classes": list, "form": str, "belief_to_class": dict, "stances": dict}    # of meta.json
KINDS = FIELDS | dict.fromkeys(TEXTS, (str, type(None))) | {"context": (str, list, type(None))}


def check_row(row, classes):
    """Raise ValueError with the first reason why a row cannot be trained on."""
    for name, kind in KINDS.items():
        value = row.get(name)
        if not isinstance(value, kind) or name in FIELDS and str(value).strip() in ("", "[]"):
            raise ValueError(f"field {name!r} is missing, empty or of the wrong type: {value!r}")
        if name.endswith("choice_id") and str(value) not in classes:
            raise ValueError(f"{name} {value!r} is not one of {classes}")
    if {*map(type, row.get("context") or ())} - {str}:
        raise ValueError(f"field 'context' must be text or a list of texts: {row['context']!r}")
    shares = row["probabilities"]
    if len(shares) != len(classes) or min(shares) < 0 or not abs(sum(shares) - 1) <= 0.02:
        raise ValueError(f"probabilities must be a share for each of {classes}, with the sum 1")
    if bool(row.get("accept_choice")) != bool(row.get("reject_choice")):
        raise ValueError("accept_choice and reject_choice: give both belief texts or neither")


def load_rows(path, classes):
    """Read and check the rows of a JSON-lines file. ValueError names the file and the bad line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
            check_row(rows[-1], classes)
        except (ValueError, TypeError) as e:           # TypeError: of shares that are no numbers
            raise ValueError(f"{path}, line {number}: {e}") from None
    if not rows:
        raise ValueError(f"{path} has no rows: make it again with synth.py")
    return rows


def load_meta(folder, form=""):
    """Read a dataset's meta.json: class labels, the off-scale class, the prompt's form (replaced by
    `form` if given), and maps from belief texts and stances to classes."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"no dataset in {folder} (no meta.json): make one with synth.py")
    meta = {"off_scale": None, "belief_to_class": {}, "stances": {}} | read_json(path)
    meta["form"] = form or meta.get("form", FORM)
    for name, kind in META.items():
        if not isinstance(meta.get(name), kind):
            raise ValueError(f"{path}: {name!r} is missing or of the wrong type: {meta.get(name)}")
    names, classes = re.findall(r"\{(\w+)\}", meta["form"]), meta["classes"]
    if {*map(type, classes)} != {str} or not 1 < len(classes) == len({*classes}):
        raise ValueError(f"{path}: 'classes' must list two or more different labels as strings")
    used = {meta["off_scale"], *meta["belief_to_class"].values(), *meta["stances"].values()}
    if used - {None, *classes}:
        raise ValueError(f"{path}: {used - {None, *classes}} are not among its classes {classes}")
    if names.count("prompt") != 1 or {*names} - {"prompt", "group"}:
        raise ValueError(f"{path}: its form needs {{prompt}} once, {{group}} optional: {names}")
    return meta


def load_dataset(names, splits, form=""):
    """Dataset folders, separated by commas -> (meta, {split: rows}). form: as in load_meta."""
    folders = [Path(name) for name in names.split(",")]
    meta, *others = (load_meta(folder, form) for folder in folders)
    for other in others:
        for key in ("classes", "off_scale", "form"):
            if other[key] != meta[key]:
                raise ValueError(f"{names}: {key} differs: {meta[key]!r} and {other[key]!r}")
        for key in ("belief_to_class", "stances"):
            if meta[key] | other[key] != other[key] | meta[key]:
                raise ValueError(f"{names}: {key} of one contradicts another's: fix one")
            meta[key] |= other[key]
    rows = {split: sum((load_rows(folder / f"{split}.jsonl", meta["classes"])
                        for folder in folders), []) for split in splits}
    groups = {row.get("group") or "" for row in sum(rows.values(), [])}
    if "{group}" in meta["form"] and "" in groups:
        raise ValueError(f"{names}: the form {meta['form']!r} needs a group in every row")
    if "{group}" not in meta["form"] and len(groups) > 1:
        print(f"{names}: prompts do not name their group: see --form", file=sys.stderr)
    return meta, rows


def dataset_name(names):
    """"data/usa,data/pk" -> "usa+pk", as used in the name of a run folder."""
    return "+".join(Path(name).name for name in names.split(","))


def read_text(path):
    """Read a UTF-8 file, without its byte-order mark if it has one."""
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    if re.search("[\0\udc80-\udcff]", text):           # zeros in UTF-16, bytes not in UTF-8
        raise ValueError(f"{path} is not UTF-8 text: save it with that encoding")
    return text


def read_json(path):
    """Read a file that must hold a JSON object. ValueError with its path if it does not."""
    try:
        return dict(json.loads(read_text(path)))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is not a JSON object ({e}): make or fetch it again") from None


def write(path, text):
    """Write a text file under a name of this process, then rename it: path never holds a half."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # no file holds lone surrogates
        os.replace(temporary, path)
    except OSError as e:                               # a full-disk error names no file
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# HTTP: one session, retries; keys never appear in messages

PAUSE, TRIES = 1.0, 8                  # seconds before the second attempt; attempts
SESSION = requests.Session()           # keeps connections open: a new one costs 20 ms over TLS
SESSION.auth = lambda r: r             # without it, ~/.netrc would override the headers
for scheme in ("http://", "https://"):
    SESSION.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=1000))
BUSY = {408, 425, 429, *range(500, 600)} - {501}       # statuses worth another try
LASTING = re.compile("(insufficient|exceeded_current)_quota|parse grammar")  # ... but not with this
ANSWERED = set()                       # hosts that have answered, so worth waiting for
SECRETS = set()                        # the keys in use: hide() masks them
SLOW = ": raise --timeout, or lower --concurrency, --styles or --max_tokens"


class Refused(ValueError):
    """The server rejects a request and would again. status: the HTTP code; words: its message."""
    def __init__(self, url, status, words):
        super().__init__(f"{url}: the server answered {status}: {words}")
        self.status, self.words = status, words


class TryAgain(Exception):
    """Raised by a `read` that cannot use an answer: TryAgain(problem, maximum tries)."""


def request(method, url, headers=None, read=None, pause=None, **kwargs):
    """Send a request; return the 2xx answer, or read(answer). Retries 429, 5xx, timeouts, dropped
    connections and TryAgain, with exponential backoff or after the wait the server asks for. Any
    other status raises Refused. pause(seconds, problem) may return True to give up."""
    check_address(url)
    SECRETS.update(re.findall(r"[?&]\w*key=([^&]+)", url))
    host, shown, spent = url.split("/")[2], url.partition("?")[0], 0
    pause = pause or (lambda seconds, problem: time.sleep(seconds))
    for attempt in range(1, TRIES + 1):
        wait, most = min(60, PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5), TRIES
        try:                                           # a timeout is 30 s without a byte
            answer = SESSION.request(method, url, headers=headers, **{"timeout": (10, 30)} | kwargs)
            ANSWERED.add(host)
            if answer.status_code < 300:
                return read(answer) if read else answer
            problem = hide(answer.text or answer.reason)
            if answer.status_code not in BUSY or LASTING.search(answer.text):
                raise Refused(shown, answer.status_code, problem)
            problem = f"the server answered {answer.status_code}: {problem}"
            wait = wait_of(answer) or wait
        except TryAgain as e:
            problem, most = (*e.args, TRIES)[:2]
        except requests.RequestException as e:         # its text may contain a header
            problem = type(e).__name__
            if "Read timed out" in str(e):
                problem, most = problem + SLOW * (method == "POST"), 3
            elif host not in ANSWERED:
                problem, most = f"{problem}: is the address right, and the server up?", 4
        problem = hide(problem)
        spent += 1 / most                              # of our patience with all problems
        if spent >= 1:
            break
        if pause(wait, problem):
            raise ConnectionAbortedError(shown)
    raise ConnectionError(f"{shown}: {problem}" + f", {attempt} times" * (attempt > 1))


def wait_of(answer):
    """Seconds that a busy server asks us to wait, at most 600; 0 if it does not say."""
    asked = answer.headers.get("Retry-After") or answer.headers.get("ratelimit", "")
    seconds = re.fullmatch(r"(\d+)", asked) or re.search(r"\bt=(\d+)", asked)     # t=: the hub's
    return min(600, int(seconds[1])) if seconds else 0


def hide(words):
    """One line of at most 500 characters without our keys; a dummy key such as "x" may stay."""
    for key in SECRETS:
        words = words.replace(key, "***") if len(key) > 5 else words
    return " ".join(words.split())[:500]


def key_from(*names):
    """The key from the first of these (environment variables, files) that has one, else "".
    ValueError if no header can carry it, because requests' own error would show the key."""
    for name in names:
        text = read_text(name) if isinstance(name, Path) and name.is_file() else ""
        key = (text or os.environ.get(str(name), "")).strip()
        if not re.fullmatch("[!-~]*", key):
            raise ValueError(f"{name} holds a line break or another character that no key can have")
        if key:
            SECRETS.add(key)
            return key
    return ""


def check_address(url, where="the address"):
    """ValueError if url is not http(s), or holds a password, which would be stored."""
    if "@" in url.partition("?")[0] or not re.match("https?://[^/]", url):
        raise ValueError(f"{where} is not an http(s) address, or holds user:password@: remove it")


# ---------------------------------------------------------------------------------------------
# The hub: plain HTTP, into Hugging Face's own cache folder; its variables HF_... are honoured

HF_HOME = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"))


def find_checkpoint(name):
    """Return a checkpoint folder: a local one, or that of a model on the hub ("gpt2",
    "EleutherAI/pythia-70m"), after fetching its missing files, all from one commit."""
    path = Path(name)
    if (path / "metrics.jsonl").is_file():
        raise ValueError(f"{name} is a run: give one of its checkpoints, such as {name}/best")
    if path.is_dir():
        return path
    local = path.exists() or "/" in name and path.parent.is_dir()
    if local or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"no folder {name} (nor a hub name, such as gpt2 or ORG/MODEL)")
    try:
        for files in (["tokenizer_config.json", "config.json"], ["tokenizer.json", "vocab.json"],
                      ["merges.txt", "tokenizer.json"], ["config.json"]):
            hub_file(name, *files)
        weights = hub_file(name, "model.safetensors", "model.safetensors.index.json")
        if weights.suffix == ".json":
            for shard in {*re.findall(r'"(\w[\w.-]*\.safetensors)"', read_text(weights))}:
                hub_file(name, shard)
    except (ValueError, OSError) as e:
        raise ValueError(f"there is no folder {name}; on the hub: {e}") from None
    return weights.parent


def hub_file(repo, *files):
    """Return the path of the first of these files that a hub repository ("datasets/ORG/NAME" for a
    dataset) has, fetching it into the cache if needed."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or HF_HOME / "hub")
    folder = cache / (repo if repo.startswith("datasets/") else f"models/{repo}").replace("/", "--")
    main = folder / "refs/main"                        # names the commit fetched last
    commit = read_text(main).strip() if main.is_file() else "main"
    for file in files:
        if (folder / "snapshots" / commit / file).is_file():
            return folder / "snapshots" / commit / file
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise FileNotFoundError(f"{repo}: {files[0]} is not in {folder} and HF_HUB_OFFLINE is set")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for file in files:
        try:
            return fetch(f"{endpoint}/{repo}/resolve/{commit}/{file}", folder, file)
        except Refused as e:
            if e.status != 404:
                raise ValueError(f"{e} (no such repository, or it needs an HF_TOKEN)") from None
    raise FileNotFoundError(f"{repo} on the hub has no {' or '.join(files)}")


def hub_headers():
    """The hub's key as a header: HF_TOKEN, or the one that `hf auth login` saved."""
    token = key_from("HF_TOKEN", HF_HOME / "token")
    return {"Authorization": f"Bearer {token}"} if token else {}


def fetch(url, folder, file):
    """Download a hub file into the cache and return its path. An interrupted download is kept, and
    the next try resumes it. The sha256 is checked if the hub gives one."""
    part = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.incomplete"
    have = part.stat().st_size if part.is_file() else 0
    ranged = {"Range": f"bytes={have - 1}-"} if have else {}       # the end itself is refused
    headers = {"Accept-Encoding": "identity"} | hub_headers() | ranged
    answer = request("GET", url, headers, stream=True)
    # The hub redirects to a storage server: its own headers are then in the history.
    told = next((x for x in answer.history if "x-repo-commit" in x.headers), answer).headers
    commit, sha = told.get("x-repo-commit", ""), told.get("x-linked-etag", "").strip('"')
    if not re.fullmatch(r"\w+", commit):
        raise ValueError(f"{url}: the answer names no commit: is HF_ENDPOINT right?")
    start = have - 1 if answer.status_code == 206 else 0
    size = start + int(answer.headers.get("content-length", 0))
    bar = progress(desc=file, total=size, initial=start, unit="B", unit_scale=True)
    if not have:                       # else part exists, unless another process has completed it
        folder.mkdir(parents=True, exist_ok=True)
        part.touch()
    with answer, bar, open(part, "r+b") as f, suppress(requests.RequestException):
        f.seek(start)
        for chunk in answer.iter_content(1 << 16):
            bar.update(f.write(chunk))
    if have < part.stat().st_size < size:              # it broke off on the way
        return fetch(url, folder, file)
    if part.stat().st_size < size:
        raise ConnectionError(f"{url} broke off: run the command again to resume it")
    if len(sha) == 64 and sha != hashlib.sha256(np.memmap(part, mode="r")).hexdigest():
        part.unlink()
        raise ValueError(f"{url}: its sha256 differs from the hub's: run the command again")
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, path)
    write(folder / "refs/main", commit)
    return path


# ---------------------------------------------------------------------------------------------
# What all scripts share: flags, progress, one-line errors

def add_flags(parser, config, names=None, skip=()):
    """Add a flag for each field of a flat dataclass, with its type (a Literal gives the choices)
    and default. The comment at the end of its line becomes the help."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
    for field in fields(config):
        if field.name in skip or names and field.name not in names:
            continue
        kind, *others = typing.get_args(field.type) or [field.type]    # float | None -> float
        how = {"type": kind} if isinstance(kind, type) else {"choices": [kind, *others]}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = help_of[field.name].replace("%", "%%")
        shown = f" [{field.default}]" if field.default not in (None, "") else ""
        parser.add_argument(f"--{field.name}", default=field.default, help=text + shown, **how)


class Parser(argparse.ArgumentParser):
    """No abbreviated flags, no negative numbers or NaN; a mistake is a one-line error."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None):
        flags = super().parse_args(args)
        for name, value in vars(flags).items():
            if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
                self.error(f"argument --{name}: {value} is not a finite number >= 0")
        return flags

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def help_first(name, flags):
    """Called by the script `name` above its slow imports, during which Ctrl-C simply ends it.
    Answers --help at once. flags: a function that makes the parser."""
    if name == "__main__":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if {"-h", "--help"} & {*sys.argv}:
            run(lambda: flags().parse_args())


CAUSES = {                             # pattern in torch's error -> what it means
    "MemoryError|of memory|alloc": "out of memory: lower --micro_batch, add --checkpointing, or "
                                   "lower --samples",
    "inline_container|PytorchStreamWriter": "cannot write state.pt (is the disk full?)",
    "gloo|nccl|connection": "another process of the run is gone: see its message",
}


def run(main):
    """Call main(). A user's mistake or a failure of the machine becomes one line on stderr and exit
    code 2. Under torchrun every process hits a user's mistake, but only the first prints it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)       # see help_first
    for stream in (sys.stdout, sys.stderr):            # a terminal without ± shows a ?
        stream.reconfigure(errors="replace")
    parallel = "TORCHELASTIC_RUN_ID" in os.environ
    speaks = not parallel or os.environ.get("RANK") == "0"
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                            # `| head` has read enough
        os._exit(141)
    except (ValueError, OSError, FloatingPointError) as e:
        words = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        if getattr(e, "errno", None) == errno.ENOSPC:
            words += ": free some space and run again (train.py: with --resume)"
    except (RuntimeError, MemoryError) as e:           # from torch, in one process
        causes = [CAUSES[x] for x in CAUSES if re.search(x, f"{type(e).__name__}: {e}", re.I)]
        if not causes:
            raise                                      # a bug of ours
        words, speaks = f"{causes[0]}; --resume continues from the last saved state", True
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    if speaks:
        words = f"{Path(sys.argv[0]).name}: error: {' '.join(words.split())}"
        print(words, file=sys.stderr, flush=True)
    if parallel:                                       # torch's threads may abort a plain exit
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)


def progress(*args, **kwargs):
    """A progress bar; if stderr is a log file, it prints a line every 30 seconds."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 30, dynamic_ncols=True, **kwargs)
