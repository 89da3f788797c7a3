"""Datasets of preference rows, from every source of the paper.

    python synth.py toy --out data/toy                                  # a made-up survey world
    python synth.py opinions --map option_map.json --writer llm --out data/usa     # GlobalOpinionQA
    python synth.py published --name Binwei01/mmoqa_usa --out data/usa  # the authors' own rows
    python synth.py reviews --reviews movies.txt.gz --titles titles.csv --out data/movies    # 5.2
    python synth.py mine --pairs hh.jsonl.gz --out data/hh              # find beliefs, Appendix I
    python synth.py icf --data data/usa --shots 3 --out data/usa-icf    # few-shot, Appendix E

Last in reading order. A writer (templates or an LLM) turns each Question of a survey into
dialogues: a paraphrase and one answer per option. All draws depend on --seed alone. Answers of
servers are kept in a file beside OUT, so a killed run continues where it stopped. A new source is
one function and one entry in COMMANDS.
"""
import ast
import codecs
import csv
import dataclasses
import difflib
import gzip
import hashlib
import html
import io
import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data import (FIELDS, FORM, SPLITS, TEXTS, TRIES, Parser, Refused, TryAgain, add_flags,
                  check_address, hub_file, hub_headers, key_from, load_dataset, normal, progress,
                  prompt_text, question_of, read_json, read_text, request, run, write)

CLASSES = ["0", "1", "2", "3", "4", "5"]  # Appendix B: 1 (least) to 5 (most agreement); 0 off scale
ASSETS = Path(__file__).with_name("assets")
PROMPTS = {path.stem: read_text(path).strip() for path in ASSETS.glob("prompts/*.txt")}


@dataclass
class Question:
    """A survey question and how one group answers it."""
    id: str
    wordings: list                     # ways to ask it
    topic: str                         # a short name for its subject
    options: list                      # (n,) belief texts
    classes: list                      # (n,) the class index of each option
    shares: list                       # (n,) the group's share of each option; they sum to 1


# ---------------------------------------------------------------------------------------------
# Rows, splits, files

def row_of(question, prompt, options, shares, accepted, rejected, **more):
    """A row in data.py's form. A side is (class, belief text or None, response)."""
    row = {"prompt": prompt, "options": options,
           "probabilities": [round(float(p), 6) for p in shares]}
    for name, side in (("accept", accepted), ("reject", rejected)):
        row |= zip((f"{name}_choice_id", f"{name}_choice", f"{name}_response"), side)
    return {k: v for k, v in row.items() if v is not None} | more | {"question_id": question}


def draw_rows(question, part, n, group, rng, noise):
    """Yield n rows of a question, as in section 5.1, from its dialogues in turn. noise: how often
    an answer expresses another option than its belief."""
    k = len(question.options)
    another = lambda option: (option + rng.integers(1, k)) % k
    target = np.zeros(len(CLASSES))
    np.add.at(target, question.classes, question.shares)     # options of one class add up
    for i in range(n):
        (asked, answers), (_, others) = part[i % len(part)], part[i % len(part) - 1]
        accept = rng.choice(k, p=question.shares)
        beliefs = [accept, another(accept)]
        # differs: section 5.1 has no noise. People are not consistent, and without noise the
        # preference term has nothing to teach. Noise on one side alone would favour the losses
        # that raise the likelihood of clean answers, so both sides draw it independently.
        said = [others[another(b)] if rng.random() < noise else answers[b] for b in beliefs]
        if said[0] == said[1]:         # both strayed to the same answer
            said = [answers[b] for b in beliefs]
        sides = [(CLASSES[question.classes[b]], question.options[b], text)
                 for b, text in zip(beliefs, said)]
        yield row_of(question.id, asked, question.options, target, *sides, group=group)


def write_surveys(groups, o, writer, problems=(), **meta):
    """Turn {group: [Question, ...]} into dialogues and rows, and write them to o.out."""
    rng = np.random.default_rng([o.seed, 1])
    every = [q for questions in groups.values() for q in questions]
    held = holdout({q.id for q in every}, o)
    held = {normal(q.wordings[0]) for q in every if q.id in held}    # tables repeat some questions
    splits, problems = {s: [] for s in SPLITS}, list(problems)
    for group, questions in groups.items():
        written, failed = writer(questions, group, o, rng)
        problems += failed
        if not any(written):           # do not ask a server that gives nothing for the next group
            return save_dataset(o, {"train": []}, problems)
        for q, dialogues in zip(questions, written):
            text = q.wordings[0]
            for split, part in split_up(dialogues, normal(text) in held, text, problems).items():
                n = round((o.pairs_per_question or len(dialogues)) * len(part) / len(dialogues))
                splits[split] += draw_rows(q, part, max(1, n), group, rng, o.noise)
    if o.shares == "counted":          # of the classes that a question's training rows accept
        counts = defaultdict(Counter)
        for row in splits["train"]:
            counts[row["group"], row["question_id"]][row["accept_choice_id"]] += 1
        for row in splits["train"] + splits["eval"]:
            n = counts[row["group"], row["question_id"]]
            row["probabilities"] = [round(n[c] / n.total(), 6) for c in CLASSES]
    save_dataset(o, splits, problems, classes=CLASSES, off_scale="0", groups=list(groups),
                 form=FORM if len(groups) == 1 else "<G>{group}" + FORM, belief_to_class={
                     t: CLASSES[k] for q in every for t, k in zip(q.options, q.classes)}, **meta)


def holdout(ids, o):
    """The ids of the questions that train and eval never see."""
    if o.holdout_questions >= max(1, len(ids)):
        raise ValueError(f"--holdout_questions {o.holdout_questions} must leave some of the "
                         f"{len(ids)} questions for training")
    order = np.random.default_rng([o.seed, 2]).permutation(len(ids))[:o.holdout_questions]
    return set(np.array(sorted(ids), object)[order])


def split_up(items, held, question, problems):
    """{split: part} of a question's items: 8 : 1 : 1, or a few for test alone if it is held out."""
    tenth = max(1, round(len(items) / 10))
    if len(items) < 3:                 # each split needs one
        problems.append({"problem": "a question with fewer than 3 texts", "text": question})
        return {}
    if held:
        return {"test": items[:2 * tenth]}
    return {"train": items[:-2 * tenth], "eval": items[-2 * tenth:-tenth], "test": items[-tenth:]}


def save_dataset(o, splits, problems=(), **meta):
    """Write the folder o.out, first under a temporary name. problems: a dict for each thing left
    out; they become unparsed.jsonl, even if there are no rows."""
    out, folder = Path(o.out), Path(f"{o.out}.tmp")
    for problem, n in Counter(p["problem"] for p in problems).most_common():
        print(f"left out: {n} x {problem}", file=sys.stderr)
    if not all(splits.values()):
        write_lines(f"{out}.unparsed.jsonl", problems)
        raise ValueError("too little could be used for rows of train, eval and test" + (
            f"; {out}.unparsed.jsonl says why, first {problems[0]!s:.300}" if problems else ""))
    shutil.rmtree(folder, ignore_errors=True)
    meta = {"made_by": type(o).__name__.lower(), "form": FORM, **meta,
            "options": dataclasses.asdict(o)}
    write(folder / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
    for name, rows in {**splits, "unparsed": problems}.items():
        write_lines(folder / f"{name}.jsonl", rows)
    os.replace(folder, out)            # an error if out is a folder with files in it
    seen, tested = ({r.get("question_id") for r in splits[s]} for s in ("train", "test"))
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{out}: {sizes} rows from {len(seen | tested)} questions "
          f"({len(tested - seen)} of them in test alone)", file=sys.stderr)


def write_lines(path, rows):
    """Write rows as JSON lines, if there are any."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if text:                           # UTF-8 cannot hold the half surrogate pairs of some files
        write(path, text.encode("utf-8", "replace").decode())


# ---------------------------------------------------------------------------------------------
# The template writer. Each response opens with a stance phrase of its class, so a rule can tell
# which opinion it expresses (evaluate.py finds the phrases in meta.json).

WORLD = read_json(ASSETS / "world.json")                     # words, topics, aspects
STANCES = {phrase: c for c, phrases in WORLD["stances"].items() for phrase in phrases}


def template_writer(questions, group, o, rng):
    """For each question a list of dialogues [(paraphrase, [one answer per option]), ...] with
    different paraphrases; and a list of problems, here empty."""
    written = []
    for q in questions:
        asks = [(a, w, c) for a in WORLD["openers"] for w in q.wordings for c in WORLD["closers"]]
        if o.paraphrases > len(asks):
            raise ValueError(f"the template writer knows {len(asks)} paraphrases of a question, "
                             f"not {o.paraphrases}: lower --paraphrases")
        # groups get the same paraphrases, but answers of their own
        order = np.random.default_rng([o.seed, 3, zlib.crc32(q.id.encode())])
        written.append([(" ".join(filter(None, asks[i])),
                         [template_answer(q, k, rng) for k in range(len(q.options))])
                        for i in order.permutation(len(asks))[:o.paraphrases]])
    return written, []


def template_answer(question, k, rng):
    """An answer that expresses option k: lead, stance, tail."""
    pick = lambda texts: texts[rng.integers(len(texts))]
    lead, tail = pick(WORLD["leads"]), pick(WORLD["tails"]).format(topic=question.topic)
    stance = pick(WORLD["stances"][CLASSES[question.classes[k]]])
    if question.topic == "this":       # the options of a real question have words of their own
        stance += f", {question.options[k]}"
    text = f"{lead} {stance}. " if lead else f"{stance[0].upper()}{stance[1:]}. "
    return text + tail[0].upper() + tail[1:]


# ---------------------------------------------------------------------------------------------
# The shipped world, which is made up: 30 topics x 10 aspects, three countries

@dataclass
class Toy:
    out: str = "data/toy"        # folder to write
    country: str = "Avalon"      # whose shares: Avalon, Borduria, Cascadia; more, with commas
    paraphrases: int = 20        # dialogues a question: 8 of 10 to train on, 1 for eval, 1 for test
    pairs_per_question: int = 0  # rows a question; 0: one for each paraphrase
    noise: float = 0.15          # share of answers that express another option than their belief
    shares: Literal["known", "counted"] = "known"  # target: the group's, or counted from train rows
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of the whole world


def toy(o):
    """A made-up survey: every topic under every aspect."""
    groups = defaultdict(list)
    for country in names_in(o.country, WORLD["countries"]):
        rng = np.random.default_rng([o.seed, 0])
        tastes = rng.normal(size=(len(WORLD["topics"]), 3))          # the same for all countries
        noises = iter(rng.spawn(len(WORLD["topics"]) * len(WORLD["aspects"])))
        for topic, taste in zip(WORLD["topics"], tastes):
            for n, aspect in enumerate(WORLD["aspects"]):
                groups[country].append(Question(
                    f"{topic}/{n}", [w.format(t=topic) for w in aspect["wordings"]], topic,
                    list(aspect["options"]), list(aspect["options"].values()),
                    toy_shares(taste, country, aspect, next(noises))))
    write_surveys(groups, o, template_writer, stances=STANCES)


def toy_shares(taste, country, aspect, rng):
    """A group's shares: a softmax over the options, smooth in topic and aspect but for a little
    noise. So they can be learned, and carry over to questions that were never seen."""
    like, heat, unsure = taste @ WORLD["countries"][country], taste[1], taste[2] - 0.8
    classes = np.array(list(aspect["options"].values()))
    degree = (classes - 3) / 2                         # -1 .. 1
    logits = (1.6 * (like + aspect["valence"]) * degree
              + (heat + aspect["extremity"]) * (degree ** 2 - 0.5))
    logits = np.where(classes == 0, unsure - 0.5, logits) + 0.3 * rng.normal(size=len(classes))
    p = np.maximum(np.exp(logits) / np.exp(logits).sum(), 0.01)
    return (p / p.sum()).tolist()


# ---------------------------------------------------------------------------------------------
# Client: OpenAI-compatible servers (chat, embeddings) and other JSON over HTTP

@dataclass
class Chat:
    base_url: str = "https://api.openai.com/v1"  # server; Azure: .../deployments/NAME?api-version=V
    llm: str = "gpt-3.5-turbo-1106"  # model to ask (Appendix A); its key: environment, API_KEY
    temperature: float | None = None  # of its answers; not sent unless given, like the next three
    top_p: float | None = None   # of its answers
    frequency_penalty: float | None = None  # of its answers
    max_tokens: int | None = None  # longest answer
    extra: str = ""              # more fields of a request, as JSON: {"enable_thinking": false}
    concurrency: int = 8         # requests under way at once
    timeout: float = 120.0       # seconds without a byte until a request is tried again
    usd_in: float = 0.0          # price of a million prompt tokens, to show what was spent
    usd_out: float = 0.0         # price of a million answer tokens
    max_usd: float = 0.0         # send nothing more at this cost, cached answers counted; 0: any
    limit: int = 0               # send at most this many requests, then stop; 0: any
    cache: str = ""              # JSON lines of the answers so far; empty: beside OUT


class Reply(NamedTuple):
    """An LLM's answer: its text without the thinking, and how it ended: "stop"; "length", if it was
    cut; or "refused", and then the text holds the server's words instead of an answer."""
    text: str
    ended: str


# What a server's words are about: this one prompt (flagged, or too long), or any request (model,
# key, parameter). Parameters that a model refuses are left out, the first of these first.
FLAGGED = re.compile("content.?(filter|policy|management|exists)|filtered|flagged|refus|safety|"
                     "moderat|inspection|inappropriate|harmful|blocklist|prohibited|recitation|"
                     "spii|sensitive|guardrail|violat|invalid.?prompt", re.I)
TOO_LONG = re.compile("context.{0,20}(length|size|window|exceed)|maximum context|too long|"
                      "too many (input )?tokens|reduce (the|your) (length|prompt|input)", re.I)
OF_ALL = re.compile(r"\bmodel\b|api.?key|parameter|endpoint|support|unknown|unrecogni|extra inputs|"
                    "not permitted|deployment|stream|permission|account|credit|quota|billing", re.I)
PARAMETERS = {"response_format": "response_format|schema|structured|grammar", "stop": r"\bstop\b"}
PARAMETERS |= {name: name for name in ("top_p", "frequency_penalty", "temperature", "max_tokens")}
# Why an answer ended: any name is an end but those of a failure, a refusal or a cut.
FAILED = re.compile("error|abort|cancel|fail|tool|function|timeout|insufficient|interrupt|"
                    "malformed|overload")
CUT = re.compile("length|max.*token|context|incomplete")
TAG = r"(\w+:)?(think|thinking|thought|reasoning)"
THOUGHT = re.compile(rf"(?is)^.*(</{TAG}>|\[/THINK\]|<\|channel\|>final<\|message\|>)")
THINKING = re.compile(rf"(?is)^\s*(<{TAG}>|\[THINK\]|<\|channel\|>analysis).*")     # to the end


class Client:
    """Asks many things at once and keeps every answer in an append-only JSON-lines file, under the
    hash of its request: a killed run goes on where it was, and a second one is free. Keys travel in
    headers and params alone, which are neither hashed nor kept. Failures are never kept."""
    FEW = 5                            # refusals before any answer, at which a run stops

    def __init__(self, o, cache):
        check_address(o.base_url, "--base_url")
        if o.max_usd and not (o.usd_in or o.usd_out):
            raise ValueError("--max_usd needs prices to count by: give --usd_in and --usd_out")
        if o.concurrency < 1 or o.timeout <= 0:
            raise ValueError("--concurrency must be 1 or more, and --timeout more than 0")
        try:
            self.extra = dict(json.loads(o.extra or "{}"))
        except (ValueError, TypeError):
            raise ValueError('--extra must be a JSON object, such as {"seed": 1}') from None
        self.o, self.cache, self.answers = o, Path(o.cache or cache), {}
        self.lock, self.halt, self.error, self.bar = threading.Lock(), threading.Event(), None, None
        self.tokens, self.dearest, self.sent, self.under_way = [0, 0], 0.0, 0, 0
        self.kept, self.fine, self.refused = 0, 0, 0   # answers on disk; good ones; refusals
        self.unfit = set()                             # (model, parameter that it does not take)
        if self.cache.is_file():
            text = self.cache.read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n"):
                try:
                    entry = json.loads(line)
                    self.remember(entry["key"], entry["answer"], entry["tokens"])
                    self.kept += 1
                except (ValueError, KeyError, TypeError):
                    pass                               # the half line of a killed run
            if text and not text.endswith("\n"):
                with open(self.cache, "a", encoding="utf-8") as f:
                    f.write("\n")

    def settings(self):
        """What a dataset's meta.json tells of the server: nothing that could hold a key."""
        names = ("llm", "temperature", "top_p", "frequency_penalty", "max_tokens")
        return {k: getattr(self.o, k) for k in names} | {
            "base_url": self.o.base_url.partition("?")[0]}

    def remember(self, key, answer, tokens):
        self.tokens = [a + b for a, b in zip(self.tokens, tokens, strict=True)]
        self.dearest = max(self.dearest, self.usd(tokens))
        self.answers[key] = answer
        self.fine += not is_refused(answer)

    def usd(self, tokens):
        return (tokens[0] * self.o.usd_in + tokens[1] * self.o.usd_out) / 1e6

    def spent(self):
        """Tokens and cost so far, as the bar shows them."""
        cost = f", ${self.usd(self.tokens):.4f}" if self.o.usd_in or self.o.usd_out else ""
        return f"{self.tokens[0]:,} tokens in, {self.tokens[1]:,} out{cost}" * any(self.tokens)

    def check(self, **settings):
        """Ask one tiny question, so that a wrong key, address or model is known before hours of
        other work. Kept like every answer."""
        [reply] = chat(self, ["Reply with the word yes."], "checking the server",
                       **{"max_tokens": 64} | settings)
        if re.match(r"4\d\d: ", reply.text):
            raise ValueError(f"the server refuses a harmless prompt: {reply.text}")

    def ask(self, method, url, bodies, read, desc, headers=None, params=None, refused=None):
        """The answers to request bodies (JSON to POST, or the query of a GET), in their order.
        read(response) -> (answer, [tokens in, out]), or raises TryAgain. The n-th of equal bodies
        is the n-th answer to it. params: what a query needs besides (a key). refused(e) -> the
        answer that stands for a Refused, or raises it: then the run ends."""
        seen, keys = Counter(), []
        for body in bodies:
            text = json.dumps([url, body], sort_keys=True)
            keys.append(hashlib.sha256(f"{text}{seen[text] or ''}".encode()).hexdigest())
            seen[text] += 1
        jobs = [(k, b) for k, b in zip(keys, bodies) if k not in self.answers]
        get = partial(self.get, method, url, read, headers, params, refused)
        pool, self.error = ThreadPoolExecutor(self.o.concurrency), None
        self.bar = progress(total=len(keys), initial=len(keys) - len(jobs), desc=desc,
                            unit="answer")
        self.bar.set_postfix_str(self.spent())
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.o.max_usd and not self.dearest and jobs:
                self.send(*jobs.pop(0), get)           # the first alone tells what one costs
            for future in as_completed([pool.submit(self.send, *job, get) for job in jobs]):
                future.result()
        except (ValueError, OSError):
            pass                                       # self.error; others may be its echoes
        finally:
            self.finish(pool)
        if self.error:
            raise ConnectionError(f"{self.error}; {self.kept} answers are kept in {self.cache}, "
                                  "the same command goes on from there") from self.error
        return [self.answers[k] for k in keys]

    def finish(self, pool):
        """Wake those who wait to try again, and wait for the answers under way."""
        self.halt.set()
        self.bar.close()
        if self.under_way:
            print(f"waiting for {self.under_way} answers under way (Ctrl-C drops them)",
                  file=sys.stderr)
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            os._exit(130)                              # Python would wait for the threads
        self.halt.clear()

    def send(self, key, body, get):
        """Get one answer and keep it. The first error stops the other threads."""
        try:
            with self.lock:
                self.check_limits()
                self.sent, self.under_way = self.sent + 1, self.under_way + 1
            try:
                answer, tokens = get(body)
            finally:
                with self.lock:
                    self.under_way -= 1
            with self.lock:
                self.remember(key, answer, tokens)
                self.refused += is_refused(answer)
                # Of refusals only those are kept that are about the prompt beyond doubt.
                if not is_refused(answer) or self.fine and FLAGGED.search(answer.text):
                    with open(self.cache, "a", encoding="utf-8", newline="\n") as f:
                        f.write(json.dumps({"key": key, "answer": answer, "tokens": tokens}) + "\n")
                    self.kept += 1
                self.bar.set_postfix_str(self.spent(), refresh=False)
                self.bar.update()
            if not self.fine and self.refused >= self.FEW:
                raise ValueError(f"all of the first {self.refused} were refused: {answer.text}")
            if self.o.max_usd and not any(tokens) and not is_refused(answer):
                raise ValueError("the server tells no usage, so --max_usd cannot be kept")
        except (ValueError, OSError) as e:
            with self.lock:
                self.error = self.error or e
            self.halt.set()
            raise

    def get(self, method, url, read, headers, params, refused, body):
        """One answer, asked for without the parameters that the model has been found to refuse."""
        model = body.get("model")
        while True:
            fit = {k: v for k, v in body.items() if (model, k) not in self.unfit}
            if "max_tokens" in body.keys() - fit.keys():
                fit["max_completion_tokens"] = body["max_tokens"]      # its newer name
            data = {"json": fit} if method == "POST" else {"params": fit | (params or {})}
            try:
                return request(method, url, headers, read, pause=self.pause,
                               timeout=(10, self.o.timeout), allow_redirects=False, **data)
            except Refused as e:
                named = [k for k, words in PARAMETERS.items() if k in fit
                         and re.search(words, e.words)]
                about_prompt = FLAGGED.search(e.words) or TOO_LONG.search(e.words)
                if e.status not in (400, 422) or not named or about_prompt:
                    if refused:
                        return refused(e), [0, 0]
                    raise
                with self.lock:
                    if (model, named[0]) not in self.unfit:
                        self.bar.write(f"{model} refuses {named[0]}, which is left out from here "
                                       f"on: {e.words[:200]}", file=sys.stderr)
                    self.unfit.add((model, named[0]))

    def pause(self, seconds, problem):
        with self.lock:
            self.bar.set_postfix_str(f"waiting {seconds:.0f} s: {problem[:60]}")
        return self.halt.wait(seconds)

    def check_limits(self):
        if self.halt.is_set():
            raise ConnectionAbortedError("stopped")
        if self.o.limit and self.sent >= self.o.limit:
            raise ValueError(f"--limit {self.o.limit} requests are sent")
        ahead = self.usd(self.tokens) + self.dearest * (self.under_way + 1)
        if self.o.max_usd and ahead > self.o.max_usd:
            raise ValueError(f"--max_usd {self.o.max_usd:g} is reached ({self.spent()}, and "
                             f"{self.under_way} answers under way): raise it")


def is_refused(answer):
    return isinstance(answer, (list, tuple)) and len(answer) == 2 and answer[1] == "refused"


def endpoint(o, path):
    """(URL, headers with the key) of an OpenAI-compatible server's path. Azure's form of URL
    (?api-version=) gets its own header."""
    base, _, query = o.base_url.partition("?")
    key = key_from("API_KEY", "OPENAI_API_KEY")
    if not key and "api.openai.com" in base:
        raise ValueError("no key for api.openai.com: set OPENAI_API_KEY, or give --base_url")
    auth = {"api-key": key} if "api-version" in query else {"Authorization": f"Bearer {key}"}
    return f"{base.rstrip('/')}/{path}{'?' if query else ''}{query}", auth if key else {}


def usage_of(answer):
    usage = answer.get("usage")
    values = [usage.get(f"{k}_tokens") if isinstance(usage, dict) else 0
              for k in ("prompt", "completion")]
    return [int(v) if type(v) in (int, float) and 0 <= v < 1e12 else 0 for v in values]


def read_json_answer(response, field):
    """A server's JSON object that has this field; TryAgain for anything else."""
    try:
        answer = json.loads(response.content)
    except ValueError:
        kind = response.headers.get("Content-Type", "of no type")
        raise TryAgain(f"the answer is not JSON but {kind}: {response.text[:200]}",
                       2 if "event-stream" in kind else TRIES) from None
    error = answer.get("error") if isinstance(answer, dict) else None
    if error or not isinstance(answer, dict) or not isinstance(answer.get(field), list):
        code = str(error.get("code")) if isinstance(error, dict) else ""
        raise TryAgain(f"the answer has no {field}: {str(error or answer)[:300]}",
                       TRIES if re.fullmatch("429|5..", code) else 2)
    return answer


def read_chat(response):
    """A chat completion -> (Reply, [tokens in, out]). Whatever failed is asked for again."""
    answer = read_json_answer(response, "choices")
    try:
        choice = (answer["choices"] or [{}])[0]
        message = choice.get("message") or {}
        text, ended = message.get("content"), str(choice.get("finish_reason") or "stop").lower()
        if isinstance(text, list):                     # of parts, some of which may be thinking
            text = "".join(part.get("text") or "" for part in text if part.get("type") in
                           ("text", "output_text", None))
        text = THINKING.sub("", THOUGHT.sub("", text or "")).strip()
        refusal = message.get("refusal")
    except (AttributeError, TypeError, KeyError):
        raise TryAgain(f"no chat completion: {str(answer)[:300]}", 2) from None
    if choice.get("error") or FAILED.search(ended):
        raise TryAgain(f"the answer ended with {ended}: {choice.get('error')}")
    if FLAGGED.search(ended) or not text:
        hint = ": raise --max_tokens, a model that thinks needs more" if CUT.search(ended) else ""
        words = (f"refusal: {refusal}" if refusal else ended if FLAGGED.search(ended) else
                 f"no content, finish_reason {ended}{hint}")
        return Reply(words[:500], "refused"), usage_of(answer)
    text = text.encode("utf-8", "replace").decode()    # half a surrogate pair is no text
    return Reply(text, "length" if CUT.search(ended) else "stop"), usage_of(answer)


def refused_prompt(e):
    """The Reply for a prompt that a server refuses. Raises e if any other request would be refused
    too; where that cannot be told, Client stops if the first few were all refused."""
    about_prompt = FLAGGED.search(e.words) or TOO_LONG.search(e.words)
    if e.status not in (400, 403, 413, 422) or not about_prompt and OF_ALL.search(e.words):
        raise e
    return Reply(f"{e.status}: {e.words}", "refused")


def chat(client, prompts, desc, schema=None, **settings):
    """An LLM's answers to prompts (texts, or lists of messages): [Reply]. schema: the JSON schema
    of an answer, dropped where the server does not know it. settings override the Chat flags of the
    same name (but --max_tokens, if given, holds); others, such as stop, are fields of a request."""
    flags = {f.name for f in dataclasses.fields(Chat)}
    o = dataclasses.replace(client.o, **{k: v for k, v in settings.items() if k in flags})
    url, headers = endpoint(o, "chat/completions")
    body = {"model": o.llm, "temperature": o.temperature, "top_p": o.top_p,
            "frequency_penalty": o.frequency_penalty,
            "max_tokens": client.o.max_tokens or o.max_tokens,
            **{k: v for k, v in settings.items() if k not in flags}}
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {
            "name": "answer", "strict": True, "schema": schema}}
    body = {k: v for k, v in (body | client.extra).items() if v is not None}
    bodies = [body | {"messages": [{"role": "user", "content": p}] if isinstance(p, str) else p}
              for p in prompts]
    replies = [Reply(*r) for r in client.ask("POST", url, bodies, read_chat, desc, headers,
                                             refused=refused_prompt)]
    refused = [r.text for r in replies if r.ended == "refused"]
    if refused:
        print(f"{desc}: {len(refused)} of {len(replies)} prompts were refused, the first: "
              f"{refused[0][:200]}", file=sys.stderr)
    return replies


def read_embeddings(response):
    """An answer with an embedding for each input, in their order -> (vectors, [tokens in, 0])."""
    answer = read_json_answer(response, "data")
    n = len(json.loads(response.request.body)["input"])
    try:
        order = sorted(range(n), key=lambda i: answer["data"][i].get("index") or 0)
        if len({d.get("index") or 0 for d in answer["data"]}) < n:
            order = range(n)                           # it does not number them
        vectors = np.array([answer["data"][i]["embedding"] for i in order])
        if (vectors.dtype.kind in "if" and vectors.ndim == 2 and len(answer["data"]) == n
                and np.isfinite(vectors).all() and vectors.any(1).all()):
            return vectors.tolist(), usage_of(answer)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        pass
    raise TryAgain(f"no embedding of numbers for each input: {response.text[:200]}", 2)


def embed(client, texts, model):
    """Unit vectors (N, C) of texts, by a server's embedding model."""
    url, headers, size = *endpoint(client.o, "embeddings"), 64
    while True:
        bodies = [{"model": model, "input": texts[i:i + size]} for i in range(0, len(texts), size)]
        try:
            parts = client.ask("POST", url, bodies, read_embeddings, "embeddings", headers)
            break
        except ConnectionError as e:                   # some take but 10 inputs at once
            if getattr(e.__cause__, "status", 0) not in (400, 413, 422) or size == 1:
                raise
            size //= 2
    vectors = [v for part in parts for v in part]
    if len(set(map(len, vectors))) > 1:
        raise ValueError(f"{model} gives embeddings of different lengths")
    vectors = np.array(vectors)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# The LLM as writer: Appendix A

EXAMPLE = "What's your stance on defeating terrorism through military force?"      # in the prompt
TEXT = {"type": "string"}


def closed(**fields):
    """The JSON schema of an object that has these fields and no others. [x] is a list of x."""
    fields = {k: {"type": "array", "items": v[0]} if isinstance(v, list) else v
              for k, v in fields.items()}
    return {"type": "object", "properties": fields, "required": list(fields),
            "additionalProperties": False}


STYLES = closed(styles=[closed(question=TEXT, answers=[closed(option=TEXT, answer=TEXT)])])


def llm_writer(client, questions, group, o, rng):
    """Like template_writer, but asks an LLM for --styles dialogues a request. If nothing in the
    first 20 replies can be read, it asks for no more."""
    asked = [(q, min(o.styles, o.paraphrases - done)) for q in questions
             for done in range(0, o.paraphrases, max(1, o.styles))]
    # equal requests get different answers only within one call of chat: keep a question's together
    first = next((n for n in range(20, len(asked)) if asked[n][0] is not asked[n - 1][0]),
                 len(asked))
    dialogues, problems, read = {q.id: {} for q in questions}, [], 0
    for part in filter(None, (asked[:first], asked[first:])):
        prompts = [PROMPTS["dialogues"].format(
            country=group, n=n, k=len(q.options), question=q.wordings[0],
            choices=json.dumps(q.options, ensure_ascii=False)) for q, n in part]
        replies = chat(client, prompts, f"dialogues, {group}", STYLES,
                       max_tokens=4096)
        before = read
        for (q, _), reply in zip(part, replies):
            found, failed = parse_dialogues(reply.text, q.options, reply.ended)
            read += bool(found)
            for paraphrase, answers in found:          # a repeat could be in train and in test
                if normal(paraphrase) in dialogues[q.id]:
                    failed.append({"problem": "a wording given before", "text": paraphrase})
                else:
                    dialogues[q.id][normal(paraphrase)] = paraphrase, answers
            problems += [{"group": group, "question": q.id, **problem} for problem in failed]
        print(f"{group}: {read - before} of {len(part)} replies could be read", file=sys.stderr)
        if not read:
            break
    return [list(d.values())[:o.paraphrases] for d in dialogues.values()], problems


def plain(text):
    """Text to compare options by: without quotes, case, extra spaces and the final period."""
    text = text.translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(text.split()).strip(" .'\"").casefold()


def unquote(text):
    """Text on one line, without marks or quotes around the whole of it."""
    return re.sub(r'^["“]\s*([^"“”]*?)\s*["”]$', r"\1", " ".join(text.split()).strip(" *_"))


QUESTION = re.compile(r"^[ \t*_#>•-]*(?:\d+[.)]\s*)?[*_]*q(?:uestion)?[ *_]*\d*[*_]*\s*[:.)：]",
                      re.I | re.M)


def parse_dialogues(text, options, ended="stop"):
    """An LLM's reply -> ([(paraphrase, [one answer per option]), ...], [problem, ...]). A style is
    a line `Q: ...`, then a line for each option: any label, the option in brackets, the answer.
    Nothing is guessed: a style with any other line, or without an answer, is a problem."""
    if ended == "refused":
        return [], [{"problem": "a prompt that the server refused", "text": text}]
    names = {plain(option): k for k, option in enumerate(options)}
    either = "|".join(re.escape(name).replace("'", "['‘’]").replace('"', '["“”]')
                      .replace(r"\ ", r"\s+") for name in sorted(names, key=len, reverse=True))
    label = r"[\W_]*(?:(?:answer|option|[a-z])[\s*_-]*)?\d*[^\w\[(]*"      # A1:, **B.**, 1), -
    bracket = r"[\[(][\s'\"‘’“”*_]*(?:(?:option|choice)?\s*\d*\s*[.:)]\s*)?"
    answer = re.compile(rf"{label}{bracket}({either})[\s.'\"‘’“”*_]*[\])][\s*_:：–-]*"
                        r"(?:\[\1\]\s*)?(.*)", re.I)
    head, *styles = re.split(f"(?={QUESTION.pattern})", in_words(text), flags=re.I | re.M)
    good, problems = [], []
    if not styles or any(map(answer.match, head.split("\n"))):
        problems.append({"problem": "a reply without a question line", "text": text[:500]})
    for n, style in enumerate(styles, 1):
        asked, *lines = QUESTION.sub("", style, count=1).split("\n")
        end = max((i for i, line in enumerate(lines, 1) if answer.match(line)), default=0)
        found = [answer.match(line) for line in lines[:end] if re.search(r"\w", line)]
        said = {names.get(plain(m[1])): unquote(m[2]) for m in found if m}
        # a line right below the last answer may continue it; after an empty line it does not
        glued = re.match(r"[\W_]*(?!style\b)[^\W_]", "".join(lines[end:end + 1]), re.I)
        if ended == "length" and n == len(styles):
            problem = "a style cut off by the length limit"
        elif normal(asked) == normal(EXAMPLE):
            problem = "the prompt's own example question"
        elif (glued or None in found or len(found) != len(said) or not all(said.values())
              or set(said) != set(range(len(options))) or not unquote(asked)):
            problem = "a style that is not one answer to each option"
        else:
            good.append((unquote(asked), [said[k] for k in range(len(options))]))
            continue
        problems.append({"problem": problem, "text": style.strip()})
    return good, problems


def in_words(text):
    """A reply in JSON (STYLES, perhaps cut off) in the layout of Appendix A; another as it is."""
    lines, one_line = [], lambda value: " ".join(str(value).split())
    for m in re.finditer(r'\{\s*"question"', text):
        try:
            style, _ = json.JSONDecoder(strict=False).raw_decode(text, m.start())
            lines += [f"Q: {one_line(style['question'])}"] + [
                f"[{one_line(a['option'])}] {one_line(a['answer'])}" for a in style["answers"]]
        except (ValueError, KeyError, TypeError):
            lines.append("Q: " + one_line(text[m.start():]))         # has no answers
    return "\n".join(lines) or text


def read_label(text, labels):
    """Which of a few labels a reply gives, or None. Read are 3, **3**., 3.0, 3/5, Rating: 3, The
    rating is 3., {"answer": "3"}; not read are list items (1. The film, 1: France)."""
    try:
        value = json.loads(text)
        text = str(*value.values()) if isinstance(value, dict) else text
    except (ValueError, TypeError):
        pass
    either = "|".join(map(re.escape, labels))
    named = re.fullmatch(rf"[\W_]*(?:[a-z' ]+(?:\bis|[:=])[\W_]*)?(?<!-)({either})"
                         r"(?:\.0+|\s*/\s*\d+)?[\W_]*", text, re.I)
    return next((s for s in labels if named and s.lower() == named[1].lower()), None)


# ---------------------------------------------------------------------------------------------
# GlobalOpinionQA (Durmus et al. 2023), or a survey of your own

@dataclass
class Opinions:
    csv: str = ""                # table, see read_opinions; empty: Anthropic's, from the hub
    country: str = "United States"  # whose shares: any of the table; more, with commas, in one set
    map: str = ""                # JSON {option: class 0..5}: Appendix B, or another set's meta.json
    classify: Literal["", "llm"] = ""  # who gives classes to options that --map lacks
    writer: Literal["template", "llm"] = "template"  # who writes paraphrases and answers
    out: str = ""                # folder to write
    paraphrases: int = 20        # dialogues a question: 8 of 10 to train on, 1 for eval, 1 for test
    styles: int = 10             # dialogues that one request to an LLM asks for
    pairs_per_question: int = 0  # rows a question (paper: 38 small, 472 large); 0: one a paraphrase
    noise: float = 0.0           # share of answers that express another option than their belief
    max_questions: int = 0       # of each country, the first of the table; 0: all
    shares: Literal["known", "counted"] = "known"  # target: the group's, or counted from train rows
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of paraphrases, pairs and split


def read_opinions(path):
    """[(row number, question, options, {country: shares}), ...] from CSV with the columns question,
    options (a list of texts) and selections (a dict: each country's share of each option)."""
    csv.field_size_limit(1 << 30)
    table = []
    for n, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline=""))):
        row = {str(k).strip().lower(): (v or "").strip() for k, v in row.items() if k}
        try:
            # Anthropic's table writes defaultdict(<class 'list'>, {...})
            shares = literal(re.sub(r"^defaultdict\([^{]*|\)$", "", row["selections"]), dict)
            shares = {country: [float(x) for x in p] for country, p in shares.items()}
            options = [str(option) for option in literal(row["options"], list)]
            table.append((n, row["question"], options, shares))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, row {n}: {e}; a survey needs the columns question, options "
                             "(['Yes', 'No']) and selections ({'Chile': [0.6, 0.4]})") from None
    return table


def literal(value, kind):
    """A list or dict that a table may hold as text, in JSON or Python."""
    for parse in (json.loads, ast.literal_eval):
        if isinstance(value, str):
            with suppress(ValueError, SyntaxError):
                value = parse(value)
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}: {str(value)[:80]!r}")
    return value


def read_map(path):
    """{option: class index} from a JSON file of that form, or from a dataset's meta.json."""
    belief_map = read_json(path)
    belief_map = belief_map.get("belief_to_class", belief_map)
    wrong = [option for option, k in belief_map.items() if str(k) not in CLASSES]
    if wrong:
        raise ValueError(f"{path}: the class of {wrong[0]!r} is not one of {CLASSES}")
    return {option: int(k) for option, k in belief_map.items()}


def classify(client, asked_in):
    """({option: class index}, problems) by an LLM. asked_in: {option: its question}."""
    prompts = [PROMPTS["classify"].format(question=q, option=t) for t, q in asked_in.items()]
    replies = chat(client, prompts, "classes of options", closed(answer={"enum": CLASSES}),
                   temperature=0.0, max_tokens=50)
    found = {t: read_label(r.text, CLASSES) for t, r in zip(asked_in, replies) if r.ended == "stop"}
    return {t: int(k) for t, k in found.items() if k}, [
        {"problem": "an option that the LLM gave no class", "option": t, "text": r.text}
        for t, r in zip(asked_in, replies) if not found.get(t)]


def like_named(country, known):
    """Names with the same last word, because the table joins two surveys, which write some names
    differently (S. Korea, South Korea); without any, those of similar letters."""
    country = {"USA": "United States", "UK": "Britain"}.get(country.upper(), country)
    same = [name for name in sorted(known) if country.rpartition(" ")[2] in name]
    return same or difflib.get_close_matches(country, known) or sorted(known)


def names_in(text, known):
    """The countries in a text with commas between them; ValueError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"there is no country {name!r}; there is "
                             f"{', '.join(like_named(name, known))}")
    return names


def opinions(o, flags):
    """Rows from a survey such as GlobalOpinionQA."""
    if not o.map and not o.classify:
        raise ValueError("each option needs a class: give --map FILE, --classify llm, or both")
    client, groups, problems = Client(flags, f"{o.out}.answers.jsonl"), {}, []
    belief_map, most = read_map(o.map) if o.map else {}, o.max_questions or None
    table = read_opinions(o.csv or hub_file("datasets/Anthropic/llm_global_opinions",
                                            "data/global_opinions.csv"))
    known = {name for *_, shares in table for name in shares}
    for country in names_in(o.country, known):
        rows = [(n, text, options, shares[country]) for n, text, options, shares in table
                if country in shares]
        whole = [(n, text, options, p) for n, text, options, p in rows if text
                 and 1 < len(options) == len(set(options)) == len(p) and min(p) >= 0 < sum(p)]
        if o.classify:                 # only what will be used; reversed: a first question counts
            found, failed = classify(client, {
                t: text for _, text, options, _ in reversed(whole[:most])
                for t in options if t not in belief_map})
            belief_map, problems = belief_map | found, problems + failed
        fit = [Question(str(n), [text], "this", options, [belief_map[t] for t in options],
                        [x / sum(p) for x in p])
               for n, text, options, p in whole if set(options) <= belief_map.keys()]
        groups[country] = fit[:most]
        print(f"{len(fit[:most])} questions for {country}, of {len(rows)} rows: "
              f"{len(rows) - len(whole)} lack a text, two different options or their shares, "
              f"{len(whole) - len(fit)} have options without a class. Names like it: "
              f"{', '.join(like_named(country, known))}", file=sys.stderr)
        if not fit:
            raise ValueError(f"no question of {country} has a class for all its options: extend "
                             "--map, or give --classify llm")
    if o.writer == "llm":
        write_surveys(groups, o, partial(llm_writer, client), problems, llm=client.settings())
    else:
        write_surveys(groups, o, template_writer, problems, stances=STANCES)


# ---------------------------------------------------------------------------------------------
# Published sets of rows, through the hub's rows API

@dataclass
class Published:
    name: str = "Binwei01/mmoqa_usa"  # a data set on the hub that has the columns of our rows
    group: str = ""              # whose opinions these are; known for mmoqa_usa, mmoqa_pk, mmoqa_sa
    out: str = ""                # folder to write


GROUP_OF = {"mmoqa_usa": "United States", "mmoqa_pk": "Pakistan", "mmoqa_sa": "S. Africa"}


def published(o):
    """Rows of a set on the hub. Six shares are classes 0..5 (0 off the scale), five are ratings."""
    client = Client(Chat(concurrency=4), f"{o.out}.rows.jsonl")    # keeps every page
    server = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"

    def ask(what, queries):
        return client.ask("GET", f"{server}/{what}", [{"dataset": o.name} | q for q in queries],
                          lambda response: (read_json_answer(response, what), [0, 0]),
                          f"pages of {what}", hub_headers())

    group = o.group or next((g for key, g in GROUP_OF.items() if key in o.name), None)
    listed = [s["split"] for s in ask("splits", [{}])[0]["splits"] if s["config"] == "default"]
    splits, problems = {s: [] for s in SPLITS}, []
    for split, rows in splits.items():
        names = ["eval", "validation", "valid", "dev"] if split == "eval" else [split]
        fit = [name for name in names if name in listed]
        if not fit:
            raise ValueError(f"{o.name} has no split {' or '.join(names)} in a default "
                             f"configuration; it has {listed}")
        query = {"config": "default", "split": fit[0]}
        for n, row in enumerate(hub_rows(ask, query, client.cache)):
            try:
                rows.append(published_row(row, group))
            except (TypeError, ValueError) as e:       # TypeError: a null among numbers
                problems.append({"problem": "a row with an empty or odd cell",
                                 "text": f"{fit[0]}, row {n}: {e}"})
    ratings = any(len(row["probabilities"]) == 5 for row in splits["train"])
    counts = Counter((row[f"{side}_choice"], row[f"{side}_choice_id"]) for rows in splits.values()
                     for row in rows for side in ("accept", "reject") if f"{side}_choice" in row)
    save_dataset(o, splits, problems, off_scale=None if ratings else "0",
                 classes=STARS if ratings else CLASSES,   # the most frequent class of a belief wins
                 belief_to_class=dict(pair for pair, _ in reversed(counts.most_common())))


def hub_rows(ask, query, cache):
    """All rows of a split, 100 to a page. A page of many rows cuts off long cells, so their rows
    are asked for again, one by one."""
    page = lambda start, length: query | {"offset": start, "length": length}
    [first] = ask("rows", [page(0, 100)])
    total = first["num_rows_total"]
    pages = [first, *ask("rows", [page(n, 100) for n in range(100, total, 100)])]
    cut = [r["row_idx"] for p in pages for r in p["rows"] if r.get("truncated_cells")]
    pages += ask("rows", [page(n, 1) for n in cut])
    rows = {r["row_idx"]: r["row"] for p in pages for r in p["rows"]
            if not r.get("truncated_cells")}
    if first.get("partial") or rows.keys() != set(range(total)):
        raise ValueError(f"{len(rows)} of {total} rows of {query['split']} came whole: the hub has "
                         f"only part of them, or they changed; remove {cache} and try again")
    return [rows[n] for n in range(total)]


def published_row(row, group):
    """A published row in our columns; ValueError if a cell is empty. Numbers may be texts, and
    lists literals. Without a question_id, rows of the same options and shares are one question."""
    out = {name: str(row[name]) for name in (*FIELDS, *TEXTS) if row.get(name) not in (None, "")}
    empty = [name for name in FIELDS if not out.get(name, "").strip()]
    if empty:
        raise ValueError(f"no {', '.join(empty)} in a row of {sorted(row)}")
    out |= {name: re.sub(r"\.0+$", "", out[name])      # 4, "4" and 4.0 are one class
            for name in ("accept_choice_id", "reject_choice_id")}
    out["prompt"] = re.sub("^<Q>(.*)<A>$", r"\1", out["prompt"], flags=re.S)
    out["options"] = [str(x) for x in literal(row["options"], list)]
    out["probabilities"] = [x + 0 for x in literal(row["probabilities"], list)]
    if len(out["probabilities"]) not in (5, 6):
        raise ValueError("neither 6 shares (classes 0..5) nor 5 (ratings)")
    question = repr((out["options"], out["probabilities"])).encode()
    out = {"question_id": hashlib.sha256(question).hexdigest()[:12]} | out
    return ({"group": group} if group else {}) | out


# ---------------------------------------------------------------------------------------------
# Movie reviews (section 5.2): the belief is the rating

@dataclass
class Reviews:
    reviews: str = ""            # SNAP's movies.txt, or JSON lines of a later Amazon set; or .gz
    titles: str = ""             # CSV of product,title; "The Ring (2002)" asks for that year's film
    metadata: Literal["omdb", "none"] = "omdb"  # who describes the films; omdb's key: OMDB_API_KEY
    out: str = ""                # folder to write
    min_chars: int = 20          # shorter reviews are left out
    max_chars: int = 2000        # longer reviews are left out
    max_reviews: int = 0         # of each film, drawn evenly; 0: all
    max_titles: int = 0          # the most reviewed ones; 0: all
    holdout_questions: int = 0   # films of which no review is trained on
    seed: int = 0                # of draws and split
    omdb: str = "https://www.omdbapi.com/"  # where metadata is asked for


STARS = CLASSES[1:]
codecs.register_error("cp1252", lambda e: (
    e.object[e.start:e.end].decode("cp1252", "replace"), e.end))


def lines_of(path, errors="strict"):
    """The lines of a text file, plain or .gz. errors="cp1252" reads what is not UTF-8 as that."""
    open_it = gzip.open if str(path).endswith(".gz") else open
    try:
        with open_it(path, "rt", encoding="utf-8-sig", errors=errors, newline="\n") as f:
            yield from f
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is not UTF-8 text, or damaged ({e}): save it with that encoding, "
                         "or fetch it again") from None


def read_reviews(path, skipped):
    """Stream (product ids, user, rating "1".."5", text). SNAP's form has a line for each field,
    such as `product/productId: B00...`, and an empty line after each review."""
    record, first, read = {}, "", 0
    for line in map(str.strip, chain(lines_of(path, "cp1252"), [""])):
        first = first or line
        if line and not line.startswith("{"):
            key, _, value = line.partition(": ")
            record[key] = value
        elif line or record:
            try:
                review = review_of(literal(line, dict) if line else record)
                read += 1
                yield review
            except (IndexError, TypeError, ValueError):
                skipped["that are no review"] += 1
            record = {}
    if not read:
        raise ValueError(f"{path}: no review could be read, neither in SNAP's form (product/"
                         f"productId: ...) nor as JSON lines. It begins with {first[:200]!r}")


def review_of(record):
    """(product ids, user or None, rating, clean text) of a record of any of the sets."""
    pick = lambda *names: [record[n] for n in names if record.get(n) is not None]
    rating = float(pick("review/score", "overall", "rating")[0])
    if rating not in (1, 2, 3, 4, 5):
        raise ValueError(f"a rating of {rating}")
    text = html.unescape(html.unescape(pick("review/text", "reviewText", "text")[0]))
    # tags, [[VIDEOID:...]] and [[ASIN:...]] are no words of the reviewer
    text = re.sub(r"</?[a-zA-Z][^<>]{0,200}>|\[\[[A-Z]+:.*?\]\]", " ", text)
    products = pick("product/productId", "parent_asin", "asin")
    user = next(iter(pick("review/userId", "reviewerID", "user_id")), None)
    return products, user, str(int(rating)), " ".join(text.split())


def collect_reviews(o, titles, skipped):
    """One pass over the file: {title: (5,) counts of ratings} and {title: [a row's side, ...]}.
    skipped counts what is left out, by reason."""
    counts, kept, seen = defaultdict(lambda: np.zeros(5)), defaultdict(list), set()
    for products, user, rating, text in progress(read_reviews(o.reviews, skipped), desc="reviews",
                                                 unit="review"):
        title = next((titles[p] for p in products if p in titles), None)
        copy = hash((user, text))
        if title is None:
            skipped["of a product without a title"] += 1
        elif user and copy in seen:    # the editions of a film repeat its reviews
            skipped["that repeat the same user's text"] += 1
        else:
            seen.add(copy)
            counts[title][STARS.index(rating)] += 1
            if o.min_chars <= len(text) <= o.max_chars:
                kept[title].append((rating, None, text))
            else:
                skipped["too short or too long"] += 1
    return counts, kept


def read_omdb(response):
    """OMDb's answer about a film. JSON with stray backslashes or control characters is mended; if
    that does not help, the film counts as unknown."""
    text = re.sub(r'\\(?!["\\/bfnrtu])', r"\\\\", response.text)
    try:
        answer = json.loads(text, strict=False)
    except ValueError:                 # an answer about no film is asked for again
        answer = {"Error": "not found" if text.startswith('{"Title"') else text[:200]}
    error = str(answer.get("Error"))
    if answer.get("Response") != "True" and "not found" not in error:
        raise TryAgain(f"OMDb: {error}", 1 if "limit" in error else TRIES)
    return answer, [0, 0]


def describe(titles, o):
    """{title: prompt}, as in Table 7: title, year, director (Genre: genre). plot. Films that OMDb
    does not know are absent."""
    if o.metadata == "none":
        return {title: f"{title}." for title in titles}
    named = [re.fullmatch(r"(?s)(.*?)(?: \((\d{4})\))?", title).groups() for title in titles]
    queries = [{"t": t, "plot": "short"} | ({"y": year} if year else {}) for t, year in named]
    films = Client(Chat(concurrency=4), f"{o.out}.omdb.jsonl").ask(
        "GET", o.omdb, queries, read_omdb, "OMDb", params={"apikey": key_from("OMDB_API_KEY")})
    return {t: film_prompt(f) for t, f in zip(titles, films) if f.get("Response") == "True"}


def film_prompt(film):
    """The prompt of OMDb's record, in which N/A means unknown."""
    film = {k: " ".join(str(v).split()) for k, v in film.items() if v not in (None, "N/A")}
    head = ", ".join(film[k] for k in ("Title", "Year", "Director") if k in film)
    genre = f" (Genre: {film['Genre']})" if "Genre" in film else ""
    return f"{head}{genre}. {film.get('Plot', '')}".strip()


def review_rows(title, prompt, shares, part, train, rng):
    """A row for each review of a part, which it accepts. The rejected review has another rating. It
    comes from the same part, so that no text is in two splits, or from train if there is none."""
    for side in part:
        others = [x for x in part if x[0] != side[0]] or [x for x in train if x[0] != side[0]]
        if others:
            other = others[rng.integers(len(others))]
            yield row_of(title, prompt, STARS, shares, side, other)


def reviews(o):
    """Rows from movie reviews: accepted a review, rejected another rating's of the same film."""
    if o.metadata == "omdb" and not key_from("OMDB_API_KEY"):
        raise ValueError("set OMDB_API_KEY (omdbapi.com gives one), or give --metadata none")
    rng, skipped = np.random.default_rng([o.seed, 1]), Counter()
    try:
        rows = csv.reader(io.StringIO(read_text(o.titles), newline=""), skipinitialspace=True)
        titles = dict(row for row in rows if row)
    except (ValueError, csv.Error) as e:
        raise ValueError(f"{o.titles} must have lines of product,title, in UTF-8 and with a title "
                         f"with commas in quotes ({e})") from None
    counts, kept = collect_reviews(o, titles, skipped)
    usable = [t for t in sorted(kept, key=lambda t: (-counts[t].sum(), t)) if len(kept[t]) > 2
              and len({rating for rating, *_ in kept[t]}) > 1]
    prompts, title_of = describe(usable[:o.max_titles or None], o), {}
    problems = [{"problem": "a title without metadata, two ratings or 3 reviews, or beyond "
                 "--max_titles", "text": t} for t in kept if t not in prompts]
    for title, prompt in prompts.items():  # titles of one film are merged: a prompt has one target
        first = title_of.setdefault(prompt, title)
        if first != title:
            counts[first] += counts[title]
            kept[first] += kept[title]
    held, splits = holdout(title_of, o), {s: [] for s in SPLITS}
    for prompt, title in title_of.items():
        shares = counts[title] / counts[title].sum()
        sides = [kept[title][i] for i in rng.permutation(len(kept[title]))]
        parts = split_up(sides[:o.max_reviews or None], prompt in held, title, problems)
        for split, part in parts.items():
            splits[split] += review_rows(title, prompt, shares, part, parts.get("train", ()), rng)
    print("reviews left out: " + ", ".join(f"{n:,} {why}" for why, n in skipped.items()),
          file=sys.stderr)
    save_dataset(o, splits, problems, classes=STARS, off_scale=None)


# ---------------------------------------------------------------------------------------------
# Beliefs mined from pairs that have none: Appendix I

@dataclass
class Mine:
    pairs: str = ""              # JSON lines (or .gz) of chosen, rejected and perhaps prompt
    out: str = ""                # folder to write
    max_pairs: int = 300         # pairs drawn from the file (the paper's number); 0: all
    max_statements: int = 25     # groups of statements (the paper found 23)
    min_pairs: int = 3           # a statement with fewer pairs is left out
    holdout_questions: int = 0   # statements of which no pair is trained on
    seed: int = 0                # of draws and split


STANCES_OF = {"1": "disagree", "2": "neutral", "3": "agree"}
GROUPS = closed(groups=[closed(statement=TEXT, numbers=[{"type": "integer"}])])
TWO_STANCES = closed(**{f"answer_{n}": {"enum": list(STANCES_OF.values())} for n in "12"})


def read_pairs(path):
    """[(prompt, chosen, rejected), ...] from JSON lines; ValueError names the first bad line."""
    pairs = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            if line.strip():
                pairs.append(pair_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, line {number} is not a pair of chosen and rejected in JSON "
                             f"({type(e).__name__}: {e})") from None
    good = [pair for pair in pairs if all(pair) and pair[1] != pair[2]]
    print(f"{len(pairs)} pairs, of which {len(pairs) - len(good)} are left out (an empty text, or "
          "the same answer twice)", file=sys.stderr)
    return good


def pair_of(row):
    """(prompt, chosen, rejected) of HH-RLHF or of TRL's lists of messages. A dialogue that holds
    its prompt is cut before the last turn of the assistant at which both sides agree."""
    def text_of(turns):
        return turns or "" if not isinstance(turns, list) else "".join(    # a null is an empty text
            f"\n\n{'Human' if m['role'] == 'user' else m['role'].title()}: {m['content']}"
            for m in turns)

    prompt, chosen, rejected = map(text_of, (row.get("prompt"), row["chosen"], row["rejected"]))
    inside = not prompt or isinstance(row["chosen"], list) and len(row["chosen"]) > 1
    if inside and chosen and rejected:
        end = os.path.commonprefix([chosen, rejected]).rfind("\n\nAssistant:")
        if end < 0:
            raise KeyError("no common `Assistant:` turn, and no prompt")
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    return tuple(re.sub(r"^\s*(Human|Assistant):", "", text).strip()
                 for text in (prompt, chosen, rejected))


def group_statements(client, statements, most, size=200):
    """{statement: the one that speaks for its group}, by an LLM, `size` statements at a time until
    one request holds them all; and the problems."""
    of, last = {s: s for s in statements}, False
    while of and not last:
        alive = list(dict.fromkeys(of.values()))
        chunks = [alive[i:i + size] for i in range(0, len(alive), size)]
        prompts = [PROMPTS["groups"].format(most=most, statements="\n".join(
            f"{n}. {s}" for n, s in enumerate(chunk, 1))) for chunk in chunks]
        replies = chat(client, prompts, "groups", GROUPS, temperature=0.0, max_tokens=4096)
        named = {chunk[n - 1]: name for chunk, reply in zip(chunks, replies)
                 for name, n in reversed(read_groups(reply.text))   # the first of two groups wins
                 if name and 1 <= n <= len(chunk)}
        of = {s: named[g] for s, g in of.items() if g in named}
        last = len(chunks) == 1 or len(set(of.values())) == len(alive)
    large = dict(Counter(of[s] for s in statements if s in of).most_common(most))
    return {s: g for s, g in of.items() if g in large}, [
        {"problem": "a statement in no group, or beyond --max_statements", "text": s}
        for s in dict.fromkeys(statements) if of.get(s) not in large]


def read_groups(text):
    """[(statement, number), ...] of a reply, in JSON or in lines `statement :: 1, 2`."""
    try:
        return [(str(g["statement"]), int(n)) for g in json.loads(text)["groups"]
                for n in g["numbers"]]
    except (ValueError, KeyError, TypeError):
        groups = re.findall(r"^[\W\d]*(.*?)[*_\s]*::(.*)$", text, re.M)
        return [(name, int(n)) for name, numbers in groups for n in re.findall(r"\d+", numbers)]


def parse_stances(text):
    """The classes of answers 1 and 2 in a reply, in JSON or words, or None."""
    stance = r"\W+(agree|neutral|disagree)s?\W+"
    sides = re.fullmatch(rf"\W*(?:answer.)?1{stance}(?:answer.)?2{stance}", f"{text}.", re.I)
    return sides and [c for side in sides.groups() for c, name in STANCES_OF.items()
                      if name == side.lower()]


def mine(o, flags):
    """Rows from pairs without beliefs. An LLM states what each pair is in conflict about, and which
    side agrees with it: the statement becomes the belief's text, the stance its class."""
    client, rng = Client(flags, f"{o.out}.answers.jsonl"), np.random.default_rng([o.seed, 1])
    pairs = read_pairs(o.pairs)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[:o.max_pairs or None]]
    swaps = rng.random(len(pairs)) < 0.5               # the order of the answers must tell nothing
    shown = [dict(prompt=p, first=r if swap else c, second=c if swap else r)
             for (p, c, r), swap in zip(pairs, swaps)]
    statements, rows_of, problems = {}, defaultdict(list), []
    prompts = [PROMPTS["statement"].format(**x) for x in shown]
    replies = chat(client, prompts, "statements", max_tokens=100)
    for i, reply in enumerate(replies):
        lines = [line.strip(" *\"“”") for line in reply.text.split("\n") if line.strip()]
        if reply.ended == "stop" and len(lines) == 1 and len(lines[0]) <= 200:
            statements[i] = lines[0]
        else:
            problems.append({"problem": f"no statement ({reply.ended})", "text": reply.text})
    of, failed = group_statements(client, list(statements.values()), o.max_statements)
    asked = {i: of[s] for i, s in statements.items() if s in of}
    prompts = [PROMPTS["stances"].format(statement=s, **shown[i]) for i, s in asked.items()]
    replies = chat(client, prompts, "stances", TWO_STANCES, temperature=0.0, max_tokens=60)
    for (i, statement), reply in zip(asked.items(), replies):
        stances = parse_stances(reply.text)
        if stances and stances[0] != stances[1]:
            stances = stances[::-1] if swaps[i] else stances
            rows_of[statement].append(row_of(
                statement, pairs[i][0], ["Disagree", "Neutral", "Agree"], [0, 0, 0],
                *zip(stances, (statement, statement), pairs[i][1:])))
        else:
            problems.append({"problem": f"no two different stances ({reply.ended})",
                             "text": reply.text})
    save_mined(o, rows_of, problems + failed)


def save_mined(o, rows_of, problems):
    """Write {statement: rows}. The target is the distribution of the accepted stances."""
    large = {s: rows for s, rows in rows_of.items() if len(rows) >= o.min_pairs}
    problems += [{"problem": "a statement with fewer than --min_pairs pairs", "text": s}
                 for s in rows_of if s not in large]
    held, splits = holdout(large, o), {s: [] for s in SPLITS}
    for statement, rows in large.items():
        counts = Counter(row["accept_choice_id"] for row in rows)
        by_prompt = defaultdict(list)                  # the pairs of a prompt go to one split
        for row in rows:
            row["probabilities"] = [round(counts[c] / len(rows), 6) for c in STANCES_OF]
            by_prompt[row["prompt"]].append(row)
        parts = split_up(list(by_prompt.values()), statement in held, statement, problems)
        for split, part in parts.items():
            splits[split] += sum(part, [])
    save_dataset(o, splits, problems, classes=list(STANCES_OF), off_scale=None, stance=STANCES_OF)


# ---------------------------------------------------------------------------------------------
# Rows with examples in context: Appendix E

@dataclass
class InContext:
    data: str = ""               # dataset whose rows get examples; or more, with commas
    form: str = ""               # of their prompts; empty: their own
    shots: int = 3               # examples before each prompt (paper: 3 for GPT-2, 5 for Pythia)
    out: str = ""                # folder to write
    seed: int = 0                # of the draws


INSTRUCTION = ("You are a helpful assistant and can generate the same format as the examples in "
               "the context.\n\n")


def example(row, form):
    """A training row as a shot: prompt, accepted belief, answer."""
    # differs: the appendix has a space after `Answer:`, which would make the class another token
    belief = f"<{row['accept_choice']}>" if row.get("accept_choice") else ""
    if not belief and row["accept_response"][:1].isdigit():
        belief = " "                                   # "510 out of 10" would show another class
    text = f"{row['accept_choice_id']}{belief}{row['accept_response']}"
    return prompt_text(row, form) + " ".join(text.split()) + "\n\n"


def icf(o):
    """Rows with a few training rows of the same group before each prompt, none about the same
    question. The shots are a list, so that data.py can drop some to fit the context."""
    meta, splits = load_dataset(o.data, SPLITS, o.form)
    form = meta["form"].replace(FORM, "Question: {prompt}, Answer:")
    if form == meta["form"]:
        raise ValueError(f"{o.data} has the form {form!r} already: it needs one with {FORM!r}")
    rng, pools = np.random.default_rng([o.seed, 3]), defaultdict(list)
    for row in splits["train"]:
        pools[row.get("group")].append(row)
    for row in (row for s in SPLITS for row in splits[s]):
        pool, shots = pools[row.get("group")], {}
        for i in rng.integers(len(pool), size=1000) if pool else ():
            if question_of(pool[i]) != question_of(row):
                shots[i] = example(pool[i], form)
            if len(shots) == o.shots:
                break
        else:
            raise ValueError(f"{o.data} has not {o.shots} training rows about other questions for "
                             "each group: lower --shots")
        row["context"] = [INSTRUCTION, *shots.values()]
    save_dataset(o, splits, **meta | {"form": form, "shots": o.shots})


# ---------------------------------------------------------------------------------------------
# Command line

COMMANDS = {                           # name -> function, its flags
    "toy": (toy, Toy), "opinions": (opinions, Opinions, Chat), "published": (published, Published),
    "reviews": (reviews, Reviews), "mine": (mine, Mine, Chat), "icf": (icf, InContext)}


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (make, *configs) in COMMANDS.items():
        sub = commands.add_parser(name, help=make.__doc__)
        for config in configs:
            add_flags(sub, config)
    flags = vars(parser.parse_args())
    make, *configs = COMMANDS[flags.pop("command")]
    for name in ("out", "reviews", "titles", "pairs", "data", "name"):
        if flags.get(name) == "":
            raise ValueError(f"--{name} is needed")
    out = Path(flags["out"])
    flags["out"] = str(out)                            # without a slash at its end
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty: give another, or remove it first")
    make(*(config(**{f.name: flags[f.name] for f in dataclasses.fields(config)})
           for config in configs))


if __name__ == "__main__":
    run(main)
