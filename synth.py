"""Datasets of preference rows, from every source of the paper.

    python synth.py toy --out data/toy                                  # a made-up survey world
    python synth.py opinions --country "United States" --map option_map.json --writer llm \
        --out data/usa                                                  # GlobalOpinionQA, 5.1
    python synth.py published --name Binwei01/mmoqa_usa --out data/usa  # the authors' own rows
    python synth.py reviews --reviews movies.txt.gz --titles titles.csv --out data/movies    # 5.2
    python synth.py mine --pairs hh.jsonl.gz --out data/hh              # find beliefs, Appendix I
    python synth.py icf --data data/usa --shots 3 --out data/usa-icf    # few-shot, Appendix E

Last in reading order. A survey is a list of Questions. A writer (templates or an LLM) turns each
into dialogues: a paraphrase of the question and one answer per option. Pairs are drawn as in
section 5.1: the accepted belief from the group's shares, the rejected one uniformly from the other
options. All draws depend on --seed alone. Answers of servers are kept in a file beside OUT, so a
killed run continues where it stopped. A new source is one function and one entry in COMMANDS.
Prompts and the words of the made-up world lie in assets/.
"""
import ast
import codecs
import csv
import dataclasses
import gzip
import hashlib
import html
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
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
    for side, values in (("accept", accepted), ("reject", rejected)):
        row |= {f"{side}_{name}": value for name, value
                in zip(("choice_id", "choice", "response"), values) if value is not None}
    return row | more | {"question_id": question}


def make_row(question, paraphrase, answers, others, group, rng, noise):
    """One row as in section 5.1. answers: a dialogue's, one per option; others: another dialogue's.
    noise: how often an answer expresses another option than its belief."""
    n = len(question.options)
    another = lambda k: (k + rng.integers(1, n)) % n
    accept = rng.choice(n, p=question.shares)
    reject = another(accept)
    # differs: section 5.1 has no noise. People are not consistent, and without noise the preference
    # term has nothing to teach. Both answers get it, by independent draws, because clean answers on
    # one side would favour the losses that raise their likelihood.
    said = [others[another(k)] if rng.random() < noise else answers[k] for k in (accept, reject)]
    if said[0] == said[1]:             # both strayed to the same answer
        said = answers[accept], answers[reject]
    target = np.zeros(len(CLASSES))
    np.add.at(target, question.classes, question.shares)     # options of one class add up
    sides = [(CLASSES[question.classes[k]], question.options[k], text)
             for k, text in zip((accept, reject), said)]
    return row_of(question.id, paraphrase, question.options, target, *sides, group=group)


def write_surveys(groups, o, writer, problems=(), **meta):
    """Turn {group: [Question, ...]} into dialogues and rows, and write them to o.out."""
    rng = np.random.default_rng([o.seed, 1])
    every = [q for questions in groups.values() for q in questions]
    held = holdout(sorted({q.id for q in every}), o)
    held = {normal(q.wordings[0]) for q in every if q.id in held}    # tables repeat some questions
    splits, problems = {s: [] for s in SPLITS}, list(problems)
    for group, questions in groups.items():
        written, failed = writer(questions, group, o, rng)
        problems += failed
        for q, dialogues in zip(questions, written):
            parts = split_up(dialogues, normal(q.wordings[0]) in held, q.wordings[0], problems)
            for split, part in parts.items():
                n = round((o.pairs_per_question or len(dialogues)) * len(part) / len(dialogues))
                for i in range(max(1, n)):
                    (ask, answers), (_, others) = part[i % len(part)], part[i % len(part) - 1]
                    splits[split].append(make_row(q, ask, answers, others, group, rng, o.noise))
        if o.shares == "counted":
            count_shares(splits["train"] + splits["eval"], splits["train"])
        if not any(written):           # nothing for this group: ask no server for the next
            splits = dict.fromkeys(SPLITS)
            break
    form = FORM if len(groups) == 1 else "<G>{group}" + FORM
    belief_to_class = {t: CLASSES[k] for q in every for t, k in zip(q.options, q.classes)}
    save_dataset(o, splits, problems, classes=CLASSES, off_scale="0", form=form,
                 groups=list(groups), belief_to_class=belief_to_class, **meta)


def count_shares(rows, trained):
    """Replace the target of rows, in place, by what the training rows of a question tell: how often
    each class is accepted."""
    counts = defaultdict(Counter)
    for row in trained:
        counts[row["group"], row["question_id"]][row["accept_choice_id"]] += 1
    for row in rows:
        n = counts[row["group"], row["question_id"]]
        row["probabilities"] = [round(n[c] / n.total(), 6) for c in CLASSES]


def holdout(ids, o):
    """The ids of the questions that train and eval never see."""
    if o.holdout_questions >= max(1, len(ids)):
        raise ValueError(f"--holdout_questions {o.holdout_questions} must leave some of the "
                         f"{len(ids)} questions for training")
    rng = np.random.default_rng([o.seed, 2])
    return {ids[i] for i in rng.permutation(len(ids))[:o.holdout_questions]}


def split_up(items, held, question, problems):
    """{split: part} of a question's items: 8 : 1 : 1, or a few for test alone if it is held out."""
    tenth = max(1, round(len(items) / 10))
    if len(items) < 3:                 # one for each split
        problems.append({"problem": "a question with fewer than 3 texts", "text": question})
        return {}
    if held:
        return {"test": items[:2 * tenth]}
    return {"train": items[:-2 * tenth], "eval": items[-2 * tenth:-tenth], "test": items[-tenth:]}


def save_dataset(o, splits, problems=(), **meta):
    """Write the folder o.out, first under a temporary name. problems: a dict for each thing left
    out; they become unparsed.jsonl, even if there are no rows."""
    out = Path(o.out)
    for problem, n in Counter(p["problem"] for p in problems).most_common():
        print(f"left out: {n} x {problem}", file=sys.stderr)
    if not all(splits.values()):
        write_lines(f"{out}.unparsed.jsonl", problems)
        raise ValueError("too little could be used for rows of train, eval and test" + (
            f"; the first problem is {problems[0]['problem']}: {problems[0].get('text')!r:.300} "
            f"(all are in {out}.unparsed.jsonl)" if problems else ""))
    folder = out.with_name(out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    meta = {"made_by": type(o).__name__.lower(), "form": FORM, **meta,
            "options": dataclasses.asdict(o)}
    write(folder / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
    for name, rows in {**splits, "unparsed": problems}.items():
        write_lines(folder / f"{name}.jsonl", rows)
    if out.exists():
        out.rmdir()                    # an empty folder, or an error
    os.replace(folder, out)
    seen, tested = ({r.get("question_id") for r in splits[s]} for s in ("train", "test"))
    print(f"{out}: {', '.join(f'{len(rows)} {s}' for s, rows in splits.items())} rows from "
          f"{len(seen | tested)} questions ({len(tested - seen)} of them in test alone)",
          file=sys.stderr)


def write_lines(path, rows):
    """Write rows as JSON lines, if there are any."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if text:                           # some files hold half a surrogate pair, which is no text
        write(path, text.encode("utf-8", "replace").decode())


# ---------------------------------------------------------------------------------------------
# The template writer. Each response opens with a stance phrase of its class, so a rule can tell
# which opinion it expresses (evaluate.py finds the phrases in meta.json).

WORLD = read_json(Path(__file__).with_name("assets") / "world.json")   # words, topics, aspects
STANCES = {phrase: c for c, phrases in WORLD["stances"].items() for phrase in phrases}


def template_writer(questions, group, o, rng):
    """A list of dialogues for each question: [(paraphrase, [one answer per option]), ...], all
    paraphrases different. Also a list of problems, here always empty."""
    written = []
    for q in questions:
        asks = [(a, w, c) for a in WORLD["openers"] for w in q.wordings for c in WORLD["closers"]]
        if o.paraphrases > len(asks):
            raise ValueError(f"the template writer knows {len(asks)} paraphrases of a question, "
                             f"not {o.paraphrases}: lower --paraphrases")
        # each group gets the same paraphrases, and answers of its own
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
    if question.topic == "this":       # a real question, whose options have words of their own
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
    groups = {}
    for country in names_in(o.country, WORLD["countries"]):
        rng = np.random.default_rng([o.seed, 0])
        tastes = rng.normal(size=(len(WORLD["topics"]), 3))          # the same for all countries
        noises = rng.spawn(len(WORLD["topics"]) * len(WORLD["aspects"]))
        questions = groups[country] = []
        for topic, taste in zip(WORLD["topics"], tastes):
            for n, aspect in enumerate(WORLD["aspects"]):
                shares = toy_shares(taste, country, aspect, noises[len(questions)])
                questions.append(Question(
                    f"{topic}/{n}", [w.format(t=topic) for w in aspect["wordings"]], topic,
                    list(aspect["options"]), list(aspect["options"].values()), shares))
    write_surveys(groups, o, template_writer, stances=STANCES)


def toy_shares(topic, country, aspect, rng):
    """A group's shares: a softmax over the options, smooth in topic and aspect but for a little
    noise. So they can be learned, and carry over to questions that were never seen."""
    like, heat, unsure = topic @ WORLD["countries"][country], topic[1], topic[2] - 0.8
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
    temperature: float | None = None  # of its answers; not sent unless given
    max_tokens: int | None = None  # longest answer
    extra: str = ""              # more fields of a request, as JSON: {"top_p": 0.9, "seed": 1}
    concurrency: int = 8         # requests under way at once
    timeout: float = 120.0       # seconds without a byte until a request is tried again
    usd_in: float = 0.0          # price of a million prompt tokens, to show what was spent
    usd_out: float = 0.0         # price of a million answer tokens
    max_usd: float = 0.0         # send nothing more once this is spent, cached answers too; 0: any
    limit: int = 0               # send at most this many requests, then stop; 0: any
    cache: str = ""              # JSON lines of the answers so far; empty: beside OUT


class Reply(NamedTuple):
    """An LLM's answer without its thinking, and how it ended: "stop"; "length", if it was cut off;
    or "refused", and then the text holds the server's words instead of an answer."""
    text: str
    ended: str


# A server's error is about this one prompt (flagged, or too long), about a parameter that can be
# left out, or about any request (model, key, endpoint).
FLAGGED = re.compile("content.?(policy|management|exists)|filter|flagged|refus|safety|moderat|spii|"
                     "inspect|inappropriate|harmful|prohibit|blocklist|recitation|sensitive|violat|"
                     "guardrail|invalid.?prompt", re.I)
TOO_LONG = re.compile("context.{0,20}(length|size|window|exceed)|too (long|many.{0,9}tokens)", re.I)
PARAMETERS = {"response_format": "response_format|schema|structured|grammar"} | {
    name: name for name in ("top_p", "frequency_penalty", "temperature", "max_tokens")}
OF_ALL = re.compile(r"\bmodel\b|api.?key|parameter|endpoint|support|unknown|unrecogni|extra inputs|"
                    "not permitted|deployment|stream|permission|account|credit|quota|billing", re.I)
# Finish reasons of failures and of cuts. FLAGGED finds refusals; any other is a good end.
FAILED = re.compile("error|abort|cancel|fail|tool|function|timeout|insufficient|malformed|overload")
CUT = re.compile("length|max.*token|context|incomplete")
# Thinking ends at its last closing tag; if it was never closed, at the end of the text.
TAG = r"(\w+:)?(think|thinking|thought|reasoning)>"
THINKING = re.compile(rf"(.*(</{TAG}|\[/THINK\]|<\|channel\|>final<\|message\|>))?"
                      rf"(\s*(<{TAG}|\[THINK\]|<\|channel\|>analysis).*)?", re.I | re.S)


class Client:
    """Asks many things at once and appends every good answer to a JSON-lines file, under the hash
    of its request: a killed run continues where it stopped, and repeating it is free. Keys travel
    in headers and params, which are neither hashed nor kept."""
    def __init__(self, o, cache):
        check_address(o.base_url, "--base_url")
        if o.concurrency < 1 or o.max_usd and not (o.usd_in or o.usd_out):
            raise ValueError("--concurrency must be 1 or more, and --max_usd needs prices to count "
                             "by: --usd_in and --usd_out")
        try:
            self.extra = dict(json.loads(o.extra or "{}"))
        except (ValueError, TypeError):
            raise ValueError('--extra must be a JSON object, such as {"seed": 1}') from None
        self.o, self.cache, self.answers = o, Path(o.cache or cache), {}
        self.tokens, self.sent, self.refused = np.zeros(2, int), 0, 0      # tokens in and out
        self.unfit, self.lock = set(), threading.Lock()    # (model, parameter it does not take)
        lines = self.cache.read_bytes().split(b"\n") if self.cache.is_file() else [b""]
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):    # the half line of a killed run
                entry = json.loads(line)
                self.answers[entry["key"]] = entry["answer"]
                self.tokens += entry["tokens"]
        if lines[-1]:
            with open(self.cache, "a") as f:
                f.write("\n")

    def settings(self):
        """What meta.json records about the server: nothing that could hold a key."""
        return {"base_url": self.o.base_url.partition("?")[0], "llm": self.o.llm,
                "temperature": self.o.temperature, "max_tokens": self.o.max_tokens}

    def usd(self):
        return self.tokens @ (self.o.usd_in, self.o.usd_out) / 1e6

    def spent(self):
        """Tokens and cost so far, as the bar shows them."""
        cost = f", ${self.usd():.4f}" if self.o.usd_in or self.o.usd_out else ""
        return f"{self.tokens[0]:,} tokens in, {self.tokens[1]:,} out{cost}" * any(self.tokens)

    def check(self, **settings):
        """Ask one tiny question, to find a wrong key, address or model before hours of work."""
        [reply] = chat(self, ["Reply with yes."], "checking the server", max_tokens=64, **settings)
        if re.match(r"4\d\d: ", reply.text):
            raise ValueError(f"the server refuses a harmless prompt: {reply.text}")

    def ask(self, method, url, bodies, read, desc, headers=None, params=None):
        """The answers to request bodies (JSON to POST, or the query of a GET), in their order; the
        n-th of equal bodies gets the n-th answer. read(response) -> (answer, [tokens in, out]), or
        raises TryAgain. params: the rest of a query, such as a key."""
        jobs, seen = {}, Counter()
        for body in bodies:
            text = json.dumps([url, body], sort_keys=True)
            jobs[hashlib.sha256(f"{text}{seen[text] or ''}".encode()).hexdigest()] = body
            seen[text] += 1
        found = {key: self.answers[key] for key in jobs if key in self.answers}
        new = [job for job in jobs.items() if job[0] not in found]
        send = partial(self.send, lambda body: request(
            method, url, headers, read, pause=self.pause, timeout=(10, self.o.timeout),
            allow_redirects=False, json=body if method == "POST" else None,
            params=None if method == "POST" else body | (params or {})))
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        self.bar = progress(total=len(jobs), initial=len(found), desc=desc, unit="answer")
        self.halt, self.error = threading.Event(), None
        try:
            with self.bar, ThreadPoolExecutor(self.o.concurrency) as pool:
                try:
                    found |= pool.map(send, new)
                except KeyboardInterrupt:
                    print("waiting for answers under way (Ctrl-C drops them)", file=sys.stderr)
                    signal.signal(signal.SIGINT, signal.SIG_DFL)
                    raise
                finally:
                    self.halt.set()
        except (ValueError, OSError):                  # perhaps an echo of self.error
            raise ConnectionError(f"{self.error}; {len(self.answers)} answers are kept in "
                                  f"{self.cache}, run the same command to go on") from self.error
        return [found[key] for key in jobs]

    def send(self, get, job):
        """(key, answer) of one job, kept in the cache. The first error stops the other threads."""
        key, body = job
        try:
            with self.lock:
                if self.halt.is_set():
                    raise ConnectionAbortedError("stopped")
                if self.o.limit and self.sent >= self.o.limit:
                    raise ValueError(f"--limit {self.o.limit} requests are sent")
                if self.o.max_usd and self.usd() >= self.o.max_usd:
                    raise ValueError(f"--max_usd {self.o.max_usd:g} is reached ({self.spent()})")
                self.sent += 1
            answer, tokens = self.fetch(get, body)
            with self.lock:
                self.keep(key, answer, tokens)
        except Exception as e:
            self.error = self.error or e
            self.halt.set()
            raise
        return key, answer

    def keep(self, key, answer, tokens):
        """Count an answer and append it to the cache. A refusal is kept only if it is clearly about
        the prompt and a good answer came before; five refusals before any end the run."""
        self.tokens += tokens
        refused = isinstance(answer, Reply) and answer.ended == "refused"
        self.refused += refused
        if not refused or self.answers and FLAGGED.search(answer.text):
            self.answers[key] = answer
            with open(self.cache, "a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps({"key": key, "answer": answer, "tokens": tokens}) + "\n")
        if not self.answers and self.refused >= 5:
            raise ValueError(f"all of the first {self.refused} were refused: {answer.text}")
        if self.o.max_usd and not refused and not any(tokens):
            raise ValueError("the server reports no usage, so --max_usd cannot hold")
        self.bar.set_postfix_str(self.spent(), refresh=False)
        self.bar.update()

    def fetch(self, get, body):
        """One answer, asked for without the parameters that the model has refused before."""
        model = body.get("model")
        fit = {k: v for k, v in body.items() if (model, k) not in self.unfit}
        if "max_tokens" in body.keys() - fit.keys():
            fit["max_completion_tokens"] = body["max_tokens"]          # its newer name
        try:
            return get(fit)
        except Refused as e:
            culprit = culprit_of(e, fit)
            if culprit == "messages":
                return Reply(f"{e.status}: {e.words}", "refused"), [0, 0]
            if not culprit:
                raise
            with self.lock:
                if (model, culprit) not in self.unfit:
                    self.bar.write(f"{model} refuses {culprit}, which is left out from here on: "
                                   f"{e.words[:200]}", file=sys.stderr)
                self.unfit.add((model, culprit))
        return self.fetch(get, body)

    def pause(self, seconds, problem):
        self.bar.set_postfix_str(f"waiting {seconds:.0f} s: {problem[:60]}")
        return self.halt.wait(seconds)


def culprit_of(e, body):
    """The field of a request's body that a Refused is about: a parameter, or a chat's messages.
    None if any request would be refused. In doubt it is the messages: see Client.keep."""
    culprit = next((k for k in PARAMETERS if k in body and re.search(PARAMETERS[k], e.words)), None)
    about_prompt = FLAGGED.search(e.words) or TOO_LONG.search(e.words)
    if about_prompt or not culprit and not OF_ALL.search(e.words):
        culprit = "messages"
    return culprit if culprit in body and e.status in (400, 403, 413, 422) else None


def endpoint(o, path):
    """(URL, headers with the key) of a server's path. Azure's URLs have a query (?api-version=),
    and its keys a header of their own."""
    base, mark, query = o.base_url.partition("?")
    key = key_from("API_KEY", "OPENAI_API_KEY")
    if not key and "api.openai.com" in base:
        raise ValueError("no key for api.openai.com: set OPENAI_API_KEY, or give --base_url")
    auth = {"api-key": key} if "api-version" in query else {"Authorization": f"Bearer {key}"}
    return f"{base.rstrip('/')}/{path}{mark}{query}", auth if key else {}


def read_json_answer(response, field):
    """A server's JSON object in which `field` is a list; TryAgain for anything else."""
    tries, kind = TRIES, response.headers.get("Content-Type", "no type")
    with suppress(ValueError, AttributeError):         # half an answer, a page of HTML
        answer = json.loads(response.content)
        if isinstance(answer.get(field), list) and not answer.get("error"):
            return answer
        if not re.search(r'"code": ?"?(429|5\d\d)\b', response.text):  # other errors do not pass
            tries = 2
    raise TryAgain(f"no {field} in the answer ({kind}): {response.text[:300]}", tries)


def read_chat(response):
    """A chat completion -> (Reply, [tokens in, out]). TryAgain for one that failed."""
    answer = read_json_answer(response, "choices")
    try:
        choice, usage = (answer["choices"] or [{}])[0], answer.get("usage") or {}
        tokens = [int(usage.get(f"{k}_tokens") or 0) for k in ("prompt", "completion")]
        ended, message = choice.get("finish_reason") or "stop", choice.get("message") or {}
        text, refusal = message.get("content") or "", message.get("refusal")
        if isinstance(text, list):                     # of parts, some of which may be thinking
            text = "".join(p["text"] for p in text if "text" in p.get("type", "text"))
        text = THINKING.sub("", text, count=1).strip()
    except (AttributeError, TypeError, KeyError, ValueError):
        raise TryAgain(f"no chat completion: {str(answer)[:300]}", 2) from None
    ended = str(ended).lower()
    if choice.get("error") or FAILED.search(ended):
        raise TryAgain(f"the answer ended with {ended}: {choice.get('error')}")
    if text and not FLAGGED.search(ended):
        text = text.encode("utf-8", "replace").decode()    # no file can hold half a surrogate pair
        return Reply(text, "length" if CUT.search(ended) else "stop"), tokens
    hint = ": raise --max_tokens, a model that thinks needs more" if CUT.search(ended) else ""
    words = f"refusal: {refusal}" if refusal else f"no content, finish_reason {ended}{hint}"
    return Reply(words[:500], "refused"), tokens


def chat(client, prompts, desc, schema=None, **settings):
    """An LLM's answers to prompts: [Reply]. schema: the JSON schema of an answer, dropped if the
    server does not know it. settings replace the Chat flags of the same name, but --max_tokens
    holds if it is given."""
    o = dataclasses.replace(client.o, **settings)
    body = {"model": o.llm, "temperature": o.temperature,
            "max_tokens": client.o.max_tokens or o.max_tokens}
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {
            "name": "answer", "strict": True, "schema": schema}}
    body = {k: v for k, v in (body | client.extra).items() if v is not None}
    bodies = [body | {"messages": [{"role": "user", "content": p}]} for p in prompts]
    url, headers = endpoint(o, "chat/completions")
    replies = [Reply(*r) for r in client.ask("POST", url, bodies, read_chat, desc, headers)]
    refused = [r.text for r in replies if r.ended == "refused"]
    if refused:
        print(f"{desc}: {len(refused)} of {len(replies)} prompts were refused, the first: "
              f"{refused[0][:200]}", file=sys.stderr)
    return replies


def read_embeddings(response):
    """An answer with an embedding for each input -> (vectors in their order, [tokens in, 0])."""
    answer, n = read_json_answer(response, "data"), len(json.loads(response.request.body)["input"])
    with suppress(KeyError, TypeError, AttributeError, ValueError):
        # Some servers leave out an index of 0, some number nothing: the sort is stable.
        items = sorted(answer["data"], key=lambda item: item.get("index") or 0)
        vectors = np.array([item["embedding"] for item in items])
        if (vectors.dtype.kind in "if" and vectors.shape[:-1] == (n,)
                and np.isfinite(vectors).all() and vectors.any(1).all()):
            return vectors.tolist(), [(answer.get("usage") or {}).get("prompt_tokens") or 0, 0]
    raise TryAgain(f"no embedding of numbers for each input: {response.text[:200]}", 2)


def embed(client, texts, model, size=64):
    """Unit vectors (N, C) of texts by a server's embedding model, `size` texts to a request."""
    url, headers = endpoint(client.o, "embeddings")
    bodies = [{"model": model, "input": texts[i:i + size]} for i in range(0, len(texts), size)]
    try:
        parts = client.ask("POST", url, bodies, read_embeddings, "embeddings", headers)
    except ConnectionError as e:                       # some servers take only 10 inputs at once
        if size == 1 or getattr(e.__cause__, "status", 0) not in (400, 413, 422):
            raise
        return embed(client, texts, model, size // 2)
    vectors = np.array([vector for part in parts for vector in part])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# The LLM as writer: Appendix A

TEXT = {"type": "string"}


def closed(**fields):
    """The JSON schema of an object that has these fields and no others. [x] is a list of x."""
    fields = {k: {"type": "array", "items": v[0]} if isinstance(v, list) else v
              for k, v in fields.items()}
    return {"type": "object", "properties": fields, "required": list(fields),
            "additionalProperties": False}


EXAMPLE = "What's your stance on defeating terrorism through military force?"      # in the prompt
STYLES = closed(styles=[closed(question=TEXT, answers=[closed(option=TEXT, answer=TEXT)])])


def llm_writer(client, questions, group, o, rng):
    """Like template_writer, but asks an LLM for --styles dialogues a request. If nothing in the
    first 20 replies can be read, it asks for no more."""
    sizes = [min(o.styles, o.paraphrases - n) for n in range(0, o.paraphrases, max(1, o.styles))]
    asked = [(q, n) for q in questions for n in sizes]
    prompts = [PROMPTS["dialogues"].format(
        country=group, n=n, k=len(q.options), question=q.wordings[0],
        choices=json.dumps(q.options, ensure_ascii=False)) for q, n in asked]
    write = partial(chat, client, desc=f"dialogues, {group}", schema=STYLES, max_tokens=4096)
    # Equal requests get different answers within one call only: keep a question's together.
    first = len(sizes) * max(1, 20 // max(1, len(sizes)))
    replies = write(prompts[:first])
    if prompts[first:] and any(parse_dialogues(reply.text, q.options)[0]
                               for (q, _), reply in zip(asked, replies)):
        replies += write(prompts[first:])
    dialogues, problems, read = {q.id: {} for q in questions}, [], 0
    for (q, _), reply in zip(asked, replies):
        found, failed = parse_dialogues(reply.text, q.options, reply.ended)
        read += bool(found)
        for paraphrase, answers in found:              # a repeat could be in train and in test
            new = paraphrase, answers
            if dialogues[q.id].setdefault(normal(paraphrase), new) is not new:
                failed.append({"problem": "a wording given before", "text": paraphrase})
        problems += [{"group": group, "question": q.id, **problem} for problem in failed]
    print(f"{group}: {read} of {len(replies)} replies could be read", file=sys.stderr)
    return [list(d.values())[:o.paraphrases] for d in dialogues.values()], problems


def one_line(text):
    """Text with straight quotes and single spaces."""
    return " ".join(str(text).translate(str.maketrans("‘’“”", "''\"\"")).split())


def plain(text):
    """Text to compare options by: without quotes, case, extra spaces and the final period."""
    return one_line(text).strip(" .'\"").casefold()


def unquote(text):
    """Text without marks or quotes around all of it."""
    return re.sub(r'^"\s*([^"]*?)\s*"$', r"\1", text.strip(" *_"))


QUESTION = re.compile(r"^[ *_#>•-]*(?:\d+[.)] ?)?[*_]*q(?:uestion)?[ *_]*\d*[*_]* ?[:.)：] ?",
                      re.I | re.M)
LABEL = r"[\W_]*(?:(?:answer|option|[a-z])[ *_-]*)?\d*[^\w\[(]*"        # A1:, **B.**, 1), -
BRACKET = r"[\[(][ '\"*_]*(?:(?:option|choice)? ?\d* ?[.:)] ?)?"        # [, (, [1. , [Option:


def parse_dialogues(text, options, ended="stop"):
    """An LLM's reply -> ([(paraphrase, [one answer per option]), ...], [problem, ...]). A style is
    a line `Q: ...`, then a line for each option: any label, the option in brackets, the answer.
    Nothing is guessed: a style with any other line, or without an answer, is a problem."""
    if ended == "refused":
        return [], [{"problem": "a prompt that the server refused", "text": text}]
    names, good, problems = {plain(option): k for k, option in enumerate(options)}, [], []
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    read = re.compile(rf"{LABEL}{BRACKET}({either})[ .'\"*_]*[\])][ *_:：–-]*(?:\[\1\] ?)?(.*)",
                      re.I).match
    layout = "\n".join(map(one_line, in_words(text).split("\n")))
    head, *styles = re.split(f"(?={QUESTION.pattern})", layout, flags=QUESTION.flags)
    if not styles or any(map(read, head.split("\n"))):
        problems.append({"problem": "a reply without a question line", "text": text[:500]})
    for n, style in enumerate(styles, 1):
        asked, *lines = map(unquote, QUESTION.sub("", style, count=1).split("\n"))
        end = max((i for i, line in enumerate(lines, 1) if read(line)), default=0)
        found = [read(line) for line in lines[:end] if re.search(r"\w", line)]
        answers = {names.get(plain(m[1])): unquote(m[2]) for m in found if m and unquote(m[2])}
        # A line right below the last answer may continue it; below an empty line it does not.
        continued = re.match(r"[\W_]*(?!style\b)[^\W_]", "".join(lines[end:end + 1]), re.I)
        if ended == "length" and n == len(styles):
            problem = "a style cut off by the length limit"
        elif normal(asked) == normal(EXAMPLE):
            problem = "the prompt's own example question"
        elif (continued or not asked or len(found) != len(options)
              or answers.keys() != set(range(len(options)))):
            problem = "a style that is not one answer to each option"
        else:
            good.append((asked, [answers[k] for k in range(len(options))]))
            continue
        problems.append({"problem": problem, "text": style.strip()})
    return good, problems


def in_words(text):
    """A reply in JSON (STYLES, perhaps cut off) in the layout of Appendix A; another as it is."""
    layout = {"question": "\nQ: {}", "option": "\n[{}] ", "answer": "{}"}
    string = r'"(?:[^"\\]|\\["\\/bfnrt]|\\u[\da-fA-F]{4})*"'
    found = re.findall(rf'"({"|".join(layout)})"\s*:\s*({string})', text)
    return "".join(layout[field].format(one_line(json.loads(value, strict=False)))
                   for field, value in found) or text


def read_label(text, labels):
    """Which of a few labels a reply gives, or None. Read are 3, **3**., 3.0, 3/5, Rating: 3, The
    rating is 3., {"answer": "3"}; not read are list items (1. The film, 1: France)."""
    either = "|".join(map(re.escape, labels))
    named = re.fullmatch(rf"[\W_]*(?:[a-z_' ]+(?:\bis|\"?[:=])[\W_]*)?(?<!-)({either})"
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
    """The rows of a survey in CSV: [(row number, question, options, {country: shares}), ...].
        question    the text, such as Is it so?
        options     a list of texts, such as ['Yes', 'No', 'DK/Refused']
        selections  each country's share of each option, such as {'Chile': [0.6, 0.3, 0.1]}
    Lists are written as in Python or JSON; shares need not sum to 1; other columns are ignored."""
    csv.field_size_limit(1 << 30)
    table = []
    for n, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline=""))):
        row, where = {str(k).strip().lower(): v or "" for k, v in row.items()}, f"{path}, row {n}"
        if not {"question", "options", "selections"} <= set(row):
            raise ValueError(f"{path} needs the columns question, options, selections; it has "
                             f"{', '.join(row)}")
        # Anthropic's table writes defaultdict(<class 'list'>, {...})
        shares = re.sub(r"^defaultdict\([^{]*|\)$", "", row["selections"].strip())
        shares = literal(shares, dict, where)
        for country, p in shares.items():
            if not (isinstance(p, list) and all(type(x) in (int, float) and 0 <= x < 2 for x in p)):
                raise ValueError(f"{where}: the shares of {country} are {p!s:.60}")
        options = [str(option) for option in literal(row["options"], list, where)]
        table.append((n, row["question"].strip(), options, shares))
    return table


def literal(value, kind, where):
    """A list or dict that a table may hold as text, in JSON or Python, or with numpy's scalars."""
    if isinstance(value, str):
        value = re.sub(r"\bnp\.\w+\(([^()]*)\)", r"\1", value)
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = parse(value)
                break
    if not isinstance(value, kind):
        raise ValueError(f"{where}: not a {kind.__name__}: {str(value)[:80]!r}")
    return value


def read_map(path):
    """{option: class index} from a JSON file of that form, or from a dataset's meta.json."""
    belief_map = read_json(path)
    belief_map = belief_map.get("belief_to_class", belief_map)
    for option, k in belief_map.items():
        if str(k) not in CLASSES:
            raise ValueError(f"{path}: {option!r} has class {k!r}, not one of {CLASSES}")
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
    """Known names that look like a country's. GlobalOpinionQA joins two surveys, which write some
    names differently (Britain, Great Britain)."""
    country = {"usa": "United States", "us": "United States", "uk": "Britain"}.get(
        country.lower(), country)
    words = lambda name: re.findall(r"\b(?!North|South|United)[^\W\d_]{5,}",
                                    name.title().partition("(")[0])
    return [name for name in sorted(known) if any(
        a.startswith(b) or b.startswith(a) for a in words(name) for b in words(country))]


def names_in(text, known):
    """The countries in a text with commas between them; ValueError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"there is no country {name!r}; there is "
                             f"{', '.join(like_named(name, known) or sorted(known)[:8])}")
    return names


def opinions(o, flags):
    """Rows from a survey such as GlobalOpinionQA."""
    if not o.map and not o.classify:
        raise ValueError("each option needs a class: give --map FILE (Appendix B), --classify llm, "
                         "or both")
    client, groups, problems = Client(flags, f"{o.out}.answers.jsonl"), {}, []
    belief_map, most = read_map(o.map) if o.map else {}, o.max_questions or None
    table = read_opinions(o.csv or hub_file("datasets/Anthropic/llm_global_opinions",
                                            "data/global_opinions.csv"))
    known = {name for *_, shares in table for name in shares}
    for country in names_in(o.country, known):
        rows = [(n, text, options, shares[country]) for n, text, options, shares in table
                if country in shares]
        whole = [(n, text, options, p) for n, text, options, p in rows
                 if text and 1 < len(options) == len(set(options)) == len(p) and sum(p)]
        if o.classify:                 # only what will be used
            found, failed = classify(client, {
                t: text for _, text, options, _ in reversed(whole[:most])
                for t in options if t not in belief_map})
            belief_map, problems = belief_map | found, problems + failed
        fit = [Question(str(n), [text], "this", options, [belief_map[t] for t in options],
                        [x / sum(p) for x in p])
               for n, text, options, p in whole if set(options) <= set(belief_map)]
        groups[country] = fit[:most]
        like = [name for name in like_named(country, known) if name != country]
        print(f"{len(groups[country])} questions for {country}, of {len(rows)} rows: "
              f"{len(rows) - len(whole)} lack a text, two different options or their shares, "
              f"{len(whole) - len(fit)} have options without a class"
              + f". The table also has {', '.join(like)}" * bool(like), file=sys.stderr)
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


def ask_hub(client, what, queries):
    """Answers of the rows API to /splits or /rows; environment: HF_DATASETS_SERVER, HF_TOKEN."""
    server = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"
    return client.ask("GET", f"{server.rstrip('/')}/{what}", queries, lambda response: (
        read_json_answer(response, what), [0, 0]), f"pages of {what}", hub_headers())


def hub_rows(client, query, spans):
    """The rows of these (offset, length) spans. Long cells come cut off from a page of many rows,
    which is then asked for again in halves."""
    rows, queries = [], [query | {"offset": start, "length": n} for start, n in spans]
    for (start, n), page in zip(spans, ask_hub(client, "rows", queries)):
        if not any(r.get("truncated_cells") for r in page["rows"]):
            rows += [r["row"] for r in page["rows"]]
        elif n > 1:
            rows += hub_rows(client, query, [(start, n // 2), (start + n // 2, n - n // 2)])
        else:
            raise ValueError(f"the hub cuts off the texts of row {start} of {query['split']}")
    return rows


def published(o):
    """Rows of a set on the hub. Six shares are classes 0..5 (0 off the scale), five are ratings."""
    client = Client(Chat(concurrency=4), f"{o.out}.rows.jsonl")    # keeps every page
    [answer] = ask_hub(client, "splits", [{"dataset": o.name}])
    listed = [(s["config"], s["split"]) for s in answer["splits"]]
    config, *more = sorted({c for c, _ in listed}, key=lambda c: (c != "default", c))
    if more and config != "default":
        raise ValueError(f"{o.name} has no default among its configurations {config}, "
                         f"{', '.join(more)}: copy one into a folder of your own")
    splits, problems, classes_of = {s: [] for s in SPLITS}, [], defaultdict(Counter)
    for split in SPLITS:
        names = ("eval", "validation", "valid", "dev") if split == "eval" else (split,)
        name = next((n for n in names if (config, n) in listed), None)
        if name is None:
            raise ValueError(f"{o.name} has no split {' or '.join(names)}; it has {listed}")
        query = {"dataset": o.name, "config": config, "split": name}
        [first] = ask_hub(client, "rows", [query | {"offset": 0, "length": 100}])
        rows = hub_rows(client, query, [(n, 100) for n in range(0, first["num_rows_total"], 100)])
        if first.get("partial") or len(rows) != first["num_rows_total"]:
            raise ValueError(f"{o.name}: the hub gave only part of {name}, or the set has changed: "
                             f"remove {client.cache} and try again")
        for n, row in enumerate(rows):
            row = published_row(row, o, f"{o.name}, {name}, row {n}")
            if row is None:
                problems.append({"problem": "a row with an empty cell", "text": f"{name}, row {n}"})
                continue
            splits[split].append(row)
            for side in ("accept", "reject"):
                classes_of[row.get(f"{side}_choice")][row[f"{side}_choice_id"]] += 1
    classes_of.pop(None, None)                         # reviews have no belief texts
    sizes = {len(row["probabilities"]) for rows in splits.values() for row in rows} or {6}
    if sizes not in ({5}, {6}):
        raise ValueError(f"{o.name}: rows of {sorted(sizes)} shares; 5 (ratings) or 6 are known")
    save_dataset(o, splits, problems, classes=CLASSES[-max(sizes):],
                 off_scale="0" if classes_of else None,
                 belief_to_class={t: c.most_common(1)[0][0] for t, c in classes_of.items()})


def published_row(row, o, where):
    """A published row in our columns, or None if a cell is empty. Numbers may be texts, and lists
    literals. Without a question_id, rows of the same options and shares are about one question."""
    lacking = [name for name in FIELDS if name not in row]
    if lacking:
        raise ValueError(f"{where} has no column {', '.join(lacking)}; it has {sorted(row)}")
    if not all(str(row[name] or "").strip() for name in FIELDS):
        return None
    out = {name: str(row[name]) for name in (*FIELDS, *TEXTS) if row.get(name) not in (None, "")}
    out["options"] = [str(x) for x in literal(row["options"], list, where)]
    out["probabilities"] = literal(row["probabilities"], list, where)
    if None in out["probabilities"]:
        return None
    for name in ("accept_choice_id", "reject_choice_id"):
        out[name] = re.sub(r"\.0+$", "", out[name])    # 4, "4" and 4.0 are one class
    out["prompt"] = re.sub("^<Q>(.*)<A>$", r"\1", out["prompt"], flags=re.S)
    question = repr((out["options"], out["probabilities"])).encode()
    country = re.search("mmoqa_(usa|pk|sa)(_large)?$", o.name)
    group = o.group or country and {"usa": "United States", "pk": "Pakistan", "sa": "S. Africa"}[
        country[1]]
    return {"question_id": hashlib.sha256(question).hexdigest()[:12],
            **({"group": group} if group else {}), **out}


# ---------------------------------------------------------------------------------------------
# Movie reviews (section 5.2): the belief is the rating

STARS = CLASSES[1:]


@dataclass
class Reviews:
    reviews: str = ""            # SNAP's movies.txt, or JSON lines of a later Amazon set; or .gz
    titles: str = ""             # CSV of product,title; "The Ring (2002)" asks for that year's film
    metadata: str = "omdb"       # omdb (key: OMDB_API_KEY), none, or JSON lines of OMDb's answers
    out: str = ""                # folder to write
    min_chars: int = 20          # shorter reviews are left out
    max_chars: int = 2000        # longer reviews are left out
    max_reviews: int = 0         # of each title, drawn evenly; 0: all
    max_titles: int = 0          # the most reviewed ones; 0: all
    holdout_questions: int = 0   # films of which no review is trained on
    seed: int = 0                # of draws and split
    omdb: str = "https://www.omdbapi.com/"  # where metadata is asked for


codecs.register_error("cp1252", lambda e: (
    e.object[e.start:e.end].decode("cp1252", "replace"), e.end))


def lines_of(path, errors="strict"):
    """The lines of a text file, plain or .gz, one at a time. errors: "cp1252" reads what is not
    UTF-8 in that encoding."""
    try:
        open_it = gzip.open if str(path).endswith(".gz") else open
        with open_it(path, "rt", encoding="utf-8-sig", errors=errors, newline="\n") as f:
            yield from f
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it with that encoding") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is damaged ({e}): fetch it again") from None


def json_lines(path, read, what):
    """read(object) for each object of a JSON-lines file; ValueError names the first bad line."""
    found = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            if line.strip():
                found.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, line {number} is not {what} in JSON "
                             f"({type(e).__name__}: {e})") from None
    return found


def read_reviews(path, skipped):
    """Stream (product ids, user, rating "1".."5", text). SNAP's form has a line for each field,
    such as `product/productId: B00...`, and an empty line after each review."""
    record, read, first = {}, 0, ""
    for line in map(str.strip, chain(lines_of(path, "cp1252"), [""])):
        first, field = first or line, re.match(r"((?:product|review)/\w+):(?: (.*))?$", line)
        if field:
            record[field[1]] = field[2] or ""
        elif line and not line.startswith("{"):        # the text goes on
            record["review/text"] = f"{record.get('review/text', '')} {line}"
        elif line or record:
            try:
                yield review_of(literal(line, dict, path) if line else record)
                read += 1
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
    # without tags, [[VIDEOID:...]] and [[ASIN:...]]
    text = re.sub(r"</?[a-zA-Z][^<>]{0,200}>|\[\[[A-Z]+:.*?\]\]", " ", text)
    return (pick("product/productId", "parent_asin", "asin"),
            (pick("review/userId", "reviewerID", "user_id") or [None])[0],
            str(int(rating)), " ".join(text.split()))


def read_titles(path):
    """{product: title} from CSV."""
    rows = [[cell.strip() for cell in row]
            for row in csv.reader(io.StringIO(read_text(path), newline="")) if row]
    for row in rows or [[]]:
        if len(row) != 2 or not all(row):
            raise ValueError(f"{path} must have lines of product,title (a title with commas in "
                             f"quotes), not {','.join(row)!r}")
    return dict(rows)


def read_omdb(response):
    """OMDb's answer about a film. JSON with stray backslashes or control characters is mended; if
    that does not help, the film counts as unknown."""
    text = re.sub(r'\\(?!["\\/bfnrtu])', r"\\\\", response.text)
    try:
        answer = json.loads(text, strict=False)
    except ValueError:                 # an answer about no film is asked for again
        answer = {"Error": "not found" if text.startswith('{"Title"') else text[:200]}
    error = str(answer.get("Error"))
    if "limit" in error:
        raise ValueError(f"OMDb: {error}")
    if answer.get("Response") != "True" and "not found" not in error:
        raise TryAgain(f"OMDb: {error}")
    return answer, [0, 0]


def find_metadata(titles, o, records):
    """{title: OMDb's record}, without unknown films. records: those of a file, from which a title
    without a year must be one film's."""
    if o.metadata == "none":
        return {title: {"Title": title} for title in titles}
    named = [re.fullmatch(r"(.*?)(?: \((\d{4})\))?", title).groups() for title in titles]
    if o.metadata == "omdb":
        queries = [{"t": t, "plot": "short"} | ({"y": year} if year else {}) for t, year in named]
        answers = Client(Chat(concurrency=4), f"{o.out}.omdb.jsonl").ask(
            "GET", o.omdb, queries, read_omdb, "OMDb", params={"apikey": key_from("OMDB_API_KEY")})
        return {t: r for t, r in zip(titles, answers) if r.get("Response") == "True"}
    films = defaultdict(dict)
    for r in records:
        films[plain(str(r.get("Title")))][str(r.get("Year"))[:4]] = r
    fits = [[r for y, r in films[plain(t)].items() if year in (None, y)] for t, year in named]
    return {t: fit[0] for t, fit in zip(titles, fits) if len(fit) == 1}


def describe(r):
    """The prompt, as in Table 7: title, year, director (Genre: genre). plot"""
    get = lambda name: "" if r.get(name) in (None, "N/A") else " ".join(str(r[name]).split())
    head = ", ".join(filter(None, map(get, ("Title", "Year", "Director"))))
    return (head + f" (Genre: {get('Genre')})" * bool(get("Genre")) + ". " + get("Plot")).strip()


def collect_reviews(o, titles, rng):
    """One pass over the file: {title: (5,) counts of ratings}, {title: [(rating, text, user), ...]}
    with at most --max_reviews each, and {reason: number left out}."""
    counts, kept = defaultdict(lambda: np.zeros(5)), defaultdict(list)
    fit, seen, skipped = Counter(), set(), Counter()
    for products, user, rating, text in progress(read_reviews(o.reviews, skipped), desc="reviews",
                                                 unit="review"):
        title = next((titles[p] for p in products if p in titles), None)
        same = hash((title, user, text))
        if title is None:
            skipped["of a product without a title"] += 1
        elif user and same in seen:    # editions of a film repeat its reviews
            skipped["that repeat the same user's text"] += 1
        else:
            seen.add(same)
            counts[title][int(rating) - 1] += 1
            if not o.min_chars <= len(text) <= o.max_chars:
                skipped["too short or too long"] += 1
                continue
            fit[title] += 1            # reservoir sampling: each review has the same chance
            full = 0 < o.max_reviews <= len(kept[title])
            place = rng.integers(fit[title]) if full else len(kept[title])
            if not full or place < o.max_reviews:
                kept[title][place:place + 1] = [(rating, text, user)]
    return counts, kept, skipped


def reviews(o):
    """Rows from movie reviews: accepted a review, rejected another rating's of the same film."""
    if o.metadata == "omdb" and not key_from("OMDB_API_KEY"):
        raise ValueError("OMDb needs a key: set OMDB_API_KEY (omdbapi.com gives one), or give "
                         "--metadata FILE or --metadata none")
    records = [] if o.metadata in ("omdb", "none") else json_lines(o.metadata, dict, "a film")
    rng = np.random.default_rng([o.seed, 1])
    counts, kept, skipped = collect_reviews(o, read_titles(o.titles), rng)
    usable = [t for t in sorted(kept, key=lambda t: (-counts[t].sum(), t)) if len(kept[t]) > 2
              and len({rating for rating, *_ in kept[t]}) > 1][:o.max_titles or None]
    skipped["of titles with too few reviews or one rating alone, or beyond --max_titles"] = sum(
        len(kept[t]) for t in kept.keys() - set(usable))
    about, films = find_metadata(usable, o, records), {}
    problems = [{"problem": "a title without metadata", "text": t}
                for t in usable if t not in about]
    for title, record in about.items():    # titles of one film are merged: a prompt has one target
        ratings, texts, _ = films.setdefault(describe(record), (np.zeros(5), {}, title))
        ratings += counts[title]
        texts.update({(user or (title, n), text): (rating, None, text)
                      for n, (rating, text, user) in enumerate(kept[title])})
    held, splits = holdout(sorted(films), o), {s: [] for s in SPLITS}
    for prompt, (ratings, texts, title) in films.items():
        sides = [list(texts.values())[i] for i in rng.permutation(len(texts))]
        parts = split_up(sides, prompt in held, title, problems)
        for split, part in parts.items():
            for side in part:          # rejected: from the same split, so that no text is in two
                others = ([x for x in part if x[0] != side[0]]
                          or [x for x in parts.get("train", ()) if x[0] != side[0]])
                skipped["without another rating to reject"] += not others
                if others:
                    splits[split].append(row_of(title, prompt, STARS, ratings / ratings.sum(), side,
                                                others[rng.integers(len(others))]))
    print("reviews left out: " + (", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n)
                                  or "none"), file=sys.stderr)
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


STANCE_CLASSES = {"disagree": "1", "neutral": "2", "agree": "3"}
GROUPS = closed(groups=[closed(statement=TEXT, numbers=[{"type": "integer"}])])
TWO_STANCES = closed(**{f"answer_{n}": {"enum": list(STANCE_CLASSES)} for n in "12"})


def pair_of(row):
    """(prompt, chosen, rejected) of HH-RLHF or of TRL's lists of messages. A dialogue that holds
    its prompt is cut before the last turn of the assistant at which both sides agree."""
    def text_of(turns):
        return turns or "" if not isinstance(turns, list) else "".join(
            f"\n\n{'Human' if m['role'] == 'user' else m['role'].title()}: {m['content']}"
            for m in turns)

    prompt, chosen, rejected = map(text_of, (row.get("prompt"), row["chosen"], row["rejected"]))
    inside = not prompt or isinstance(row["chosen"], list) and len(row["chosen"]) > 1
    if inside and chosen and rejected:                 # a null is an empty text
        end = os.path.commonprefix([chosen, rejected]).rfind("\n\nAssistant:")
        if end < 0:
            raise KeyError("no common `Assistant:` turn, and no prompt")
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    return tuple(re.sub(r"^\s*(Human|Assistant):", "", text).strip()
                 for text in (prompt, chosen, rejected))


def group_statements(client, statements, most, size=200):
    """{statement: the one that speaks for its group}, by an LLM, `size` statements at a time until
    one request holds them all; and the problems."""
    of, alive, before = {s: s for s in statements}, list(dict.fromkeys(statements)), 0
    while alive and len(alive) != before:
        chunks = [alive[i:i + size] for i in range(0, len(alive), size)]
        prompts = [PROMPTS["groups"].format(most=most, statements="\n".join(
            f"{n}. {s}" for n, s in enumerate(chunk, 1))) for chunk in chunks]
        replies = chat(client, prompts, "groups", GROUPS, temperature=0.0,
                       max_tokens=4096)
        named = {chunk[n - 1]: name for chunk, reply in zip(chunks, replies)
                 for name, numbers in reversed(read_groups(reply.text)) for n in numbers
                 if 1 <= n <= len(chunk) and name}     # reversed: the first group named counts
        of = {s: named[g] for s, g in of.items() if g in named}
        before, alive = len(alive), list(dict.fromkeys(of.values()))
        if len(chunks) == 1:
            break
    large = dict(Counter(of[s] for s in statements if s in of).most_common(most))
    return {s: g for s, g in of.items() if g in large}, [
        {"problem": "a statement beyond --max_statements" if s in of else
         "a statement in no group", "text": s} for s in dict.fromkeys(statements)
        if of.get(s) not in large]


def read_groups(text):
    """[(statement, numbers), ...] of a reply, in JSON or in lines `statement :: 1, 2`."""
    try:
        return [(str(g["statement"]), [int(n) for n in g["numbers"]])
                for g in json.loads(text)["groups"]]
    except (ValueError, KeyError, TypeError):
        found = re.findall(r"^[\W\d]*(.*?)[*_\s]*::(.*)$", text, re.M)
        return [(name, [int(n) for n in re.findall(r"\d+", numbers)]) for name, numbers in found]


def parse_stances(text):
    """The classes of answers 1 and 2 in a reply, or None."""
    try:
        sides = [json.loads(text)[f"answer_{n}"] for n in "12"]
    except (ValueError, KeyError, TypeError):
        sides = [m and m[1] for m in (re.search(
            rf"^\W*(?:answer )?{n}\W+(agree|neutral|disagree)s?\W*$", text, re.I | re.M)
            for n in "12")]
    classes = [STANCE_CLASSES.get(str(side).lower()) for side in sides]
    return classes if all(classes) else None


def mine(o, flags):
    """Rows from pairs without beliefs. An LLM states what each pair is in conflict about, and which
    side agrees with it: the statement becomes the belief's text, the stance its class."""
    client, rng = Client(flags, f"{o.out}.answers.jsonl"), np.random.default_rng([o.seed, 1])
    pairs = json_lines(o.pairs, pair_of, "a pair of chosen and rejected")
    good = [pair for pair in pairs if all(pair) and pair[1] != pair[2]]
    print(f"{len(pairs)} pairs, of which {len(pairs) - len(good)} are left out (an empty text, or "
          "the same answer twice)", file=sys.stderr)
    pairs = [good[i] for i in rng.permutation(len(good))[:o.max_pairs or None]]
    swaps = rng.random(len(pairs)) < 0.5               # the order of the answers must tell nothing
    shown = [dict(prompt=p, first=r if swap else c, second=c if swap else r)
             for (p, c, r), swap in zip(pairs, swaps)]
    statements, found, problems = {}, defaultdict(list), []

    def problem(reply, what):
        problems.append({"problem": "a prompt that the server refused" if reply.ended == "refused"
                         else what, "text": reply.text})

    replies = chat(client, [PROMPTS["statement"].format(**x) for x in shown], "statements",
                   max_tokens=100)
    for i, reply in enumerate(replies):
        lines = [line.strip(" *\"“”") for line in reply.text.split("\n") if line.strip()]
        if reply.ended == "stop" and len(lines) == 1 and len(lines[0]) <= 200:
            statements[i] = lines[0]
        else:
            problem(reply, "a reply that is no statement")
    of, failed = group_statements(client, list(statements.values()), o.max_statements)
    asked = {i: of[s] for i, s in statements.items() if s in of}
    prompts = [PROMPTS["stances"].format(statement=s, **shown[i]) for i, s in asked.items()]
    replies = chat(client, prompts, "stances", TWO_STANCES, temperature=0.0,
                   max_tokens=60)
    for i, reply in zip(asked, replies):
        stances = parse_stances(reply.text)
        if stances and stances[0] != stances[1]:
            found[asked[i]].append((pairs[i], stances[::-1] if swaps[i] else stances))
        else:
            problem(reply, "a pair whose sides hold the same stance" if stances else
                    "a reply that names no two stances")
    save_mined(o, found, problems + failed)


def save_mined(o, found, problems):
    """Rows of {statement: [(pair, (accepted class, rejected class)), ...]}. The target is the
    distribution of the accepted stances."""
    large = {s: items for s, items in found.items() if len(items) >= o.min_pairs}
    problems += [{"problem": "a statement with fewer than --min_pairs pairs", "text": s}
                 for s in found if s not in large]
    held, splits, labels = holdout(sorted(large), o), {s: [] for s in SPLITS}, ["1", "2", "3"]
    for statement, items in large.items():
        shares = [sum(stances[0] == c for _, stances in items) / len(items) for c in labels]
        by_prompt = defaultdict(list)                  # the pairs of a prompt go to one split
        for (prompt, *responses), stances in items:
            by_prompt[prompt].append(zip(stances, (statement, statement), responses))
        parts = split_up(list(by_prompt.items()), statement in held, statement, problems)
        for split, part in parts.items():
            splits[split] += [row_of(statement, prompt, ["Disagree", "Neutral", "Agree"], shares,
                                     *sides) for prompt, same in part for sides in same]
    save_dataset(o, splits, problems, classes=labels, off_scale=None,
                 stance={c: s for s, c in STANCE_CLASSES.items()})


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
    flags["out"] = str(Path(flags["out"]))             # without a slash at its end
    out = Path(flags["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty: give another, or remove it first")
    make(*(config(**{f.name: flags[f.name] for f in dataclasses.fields(config)})
           for config in configs))


if __name__ == "__main__":
    run(main)
