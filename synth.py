"""Build datasets of preference rows from every source that the paper uses.

    python synth.py toy --out data/toy                                  # a made-up survey world
    python synth.py opinions --map option_map.json --writer llm --out data/usa     # GlobalOpinionQA
    python synth.py published --name Binwei01/mmoqa_usa --out data/usa  # the authors' own rows
    python synth.py reviews --reviews movies.txt.gz --titles titles.csv --out data/movies    # 5.2
    python synth.py mine --pairs hh.jsonl.gz --out data/hh              # find beliefs, Appendix I
    python synth.py icf --data data/usa --shots 3 --out data/usa-icf    # few-shot, Appendix E

Last in reading order. A writer (templates or an LLM) turns each survey Question into dialogues: a
paraphrase of the question and one answer per option. Every random draw depends only on --seed.
Server answers are cached in a file beside OUT, so a killed run resumes where it stopped. To add a
source, write one function and add it to COMMANDS.
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
from itertools import chain, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data import (FIELDS, FORM, SPLITS, TEXTS, TRIES, Parser, Refused, TryAgain, add_flags,
                  check_address, check_row, hub_file, hub_headers, key_from, load_dataset, normal,
                  progress, prompt_text, question_of, read_json, read_text, request, run, write)

CLASSES = ["0", "1", "2", "3", "4", "5"]  # Appendix B: 1 (least) to 5 (most agreement); 0 off scale
ASSETS = Path(__file__).with_name("assets")
PROMPTS = {path.stem: read_text(path).strip() for path in ASSETS.glob("prompts/*.txt")}


@dataclass
class Question:
    """A survey question, and how one group answers it."""
    id: str
    wordings: list                     # different ways to ask it
    topic: str                         # short name of its subject
    options: list                      # (n,) belief texts
    classes: list                      # (n,) class index of each option
    shares: list                       # (n,) share of the group that chooses it; they sum to 1


# ---------------------------------------------------------------------------------------------
# Rows, splits, files

def row_of(question, prompt, options, shares, accepted, rejected, **more):
    """Build a row in data.py's format. A side is (class, belief text or None, response)."""
    row = {"prompt": prompt, "options": options,
           "probabilities": [round(float(p), 6) for p in shares]}
    for name, side in (("accept", accepted), ("reject", rejected)):
        row |= zip((f"{name}_choice_id", f"{name}_choice", f"{name}_response"), side)
    return {k: v for k, v in row.items() if v is not None} | more | {"question_id": question}


def draw_rows(question, part, n, group, rng, noise):
    """Yield n rows for a question (section 5.1), cycling through its dialogues. noise: probability
    that an answer expresses an option other than its belief."""
    k = len(question.options)
    another = lambda option: (option + rng.integers(1, k)) % k
    target = np.zeros(len(CLASSES))
    np.add.at(target, question.classes, question.shares)     # options that share a class add up
    for i in range(n):
        (asked, answers), (_, others) = part[i % len(part)], part[i % len(part) - 1]  # for noise
        accept = rng.choice(k, p=question.shares)
        beliefs = [accept, another(accept)]
        # differs: section 5.1 has no noise. People are not consistent, and without noise the
        # preference term has nothing to teach. Noise on one side alone would favour the losses
        # that raise the likelihood of clean answers, so both sides draw it independently.
        said = [others[another(b)] if rng.random() < noise else answers[b] for b in beliefs]
        if said[0] == said[1]:         # both drew the same answer
            said = [answers[b] for b in beliefs]
        sides = [(CLASSES[question.classes[b]], question.options[b], text)
                 for b, text in zip(beliefs, said)]
        yield row_of(question.id, asked, question.options, target, *sides, group=group)


def write_surveys(groups, o, writer, problems=(), **meta):
    """Turn {group: [Question, ...]} into dialogues and rows, and write them to o.out."""
    rng = np.random.default_rng([o.seed, 1])
    every = [q for questions in groups.values() for q in questions]
    held = holdout({q.id for q in every}, o)                         # the same for all groups
    held = {normal(q.wordings[0]) for q in every if q.id in held}    # tables repeat some questions
    splits, problems = {s: [] for s in SPLITS}, list(problems)
    written = ((group, q, dialogues) for group, questions in groups.items()
               for q, dialogues in zip(questions, writer(questions, group, o, rng, problems)))
    for group, q, dialogues in written:
        text, each = q.wordings[0], o.pairs_per_question or len(dialogues)
        parts = split_up(dialogues, normal(text) in held, text, problems)
        for split, part in parts.items():
            n = max(1, round(each * len(part) / len(dialogues)))
            parts[split] = list(draw_rows(q, part, n, group, rng, o.noise))
        if o.shares == "counted" and "train" in parts:
            n = Counter(row["accept_choice_id"] for row in parts["train"])
            for row in parts["train"] + parts["eval"]:
                row["probabilities"] = [round(n[c] / n.total(), 6) for c in CLASSES]
        for split, rows in parts.items():
            splits[split] += rows
    save_dataset(o, splits, problems, classes=CLASSES, off_scale="0", groups=list(groups),
                 form=FORM if len(groups) == 1 else "<G>{group}" + FORM, belief_to_class={
                     t: CLASSES[k] for q in every for t, k in zip(q.options, q.classes)}, **meta)


def holdout(ids, o):
    """Draw the ids of the questions that train and eval never see."""
    if o.holdout_questions >= max(1, len(ids)):
        raise ValueError(f"--holdout_questions must leave some of the {len(ids)} for training")
    order = np.random.default_rng([o.seed, 2]).permutation(len(ids))[:o.holdout_questions]
    return set(np.array(sorted(ids), object)[order])


def split_up(items, held, question, problems):
    """Split a question's items 8:1:1 -> {split: items}; one held out gives a few to test."""
    tenth = max(1, round(len(items) / 10))
    if len(items) < 3:                 # each split needs one
        problems.append({"problem": "a question with fewer than 3 texts", "text": question})
        return {}
    if held:
        return {"test": items[:2 * tenth]}
    return {"train": items[:-2 * tenth], "eval": items[-2 * tenth:-tenth], "test": items[-tenth:]}


def save_dataset(o, splits, problems=(), **meta):
    """Write the dataset folder o.out, all of it or nothing. problems: a dict for each thing left
    out; they go to unparsed.jsonl, even if there are no rows."""
    meta = {"made_by": type(o).__name__.lower(), "form": FORM, **meta,
            "options": dataclasses.asdict(o)}
    texts = {"meta.json": json.dumps(meta, ensure_ascii=False, indent=1) + "\n"} | {
        f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in {**splits, "unparsed": problems}.items()}
    for problem, n in Counter(p["problem"] for p in problems).most_common():
        print(f"left out: {n} x {problem}", file=sys.stderr)
    if not all(splits.values()):
        write(f"{o.out}.unparsed.jsonl", texts["unparsed.jsonl"])
        raise ValueError("too little could be used to fill train, eval and test; "
                         f"{o.out}.unparsed.jsonl says why, first {problems[:1]!s:.300}")
    folder = Path(f"{o.out}.tmp{os.getpid()}")
    try:
        for name, text in texts.items():
            if text:
                write(folder / name, text)
        os.replace(folder, o.out)      # an error if it is a folder with files in it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{o.out}: {sizes} rows", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# The template writer. Each response opens with a stance phrase of its class, so that evaluate.py
# can tell which opinion it expresses (it reads the phrases from meta.json).

WORLD = read_json(ASSETS / "world.json")                     # words, topics, aspects
STANCES = {phrase: c for c, phrases in WORLD["stances"].items() for phrase in phrases}


def template_writer(questions, group, o, rng, problems):
    """Write a list of dialogues [(paraphrase, [one answer per option]), ...] for each question, all
    with different paraphrases. A writer adds what it had to leave out to problems: here nothing."""
    written = []
    for q in questions:
        asks = [" ".join(filter(None, words))
                for words in product(WORLD["openers"], q.wordings, WORLD["closers"])]
        if o.paraphrases > len(asks):
            raise ValueError(f"the templates give {len(asks)} different --paraphrases at most")
        # all groups get the same paraphrases, but each gets its own answers
        order = np.random.default_rng([o.seed, 3, zlib.crc32(q.id.encode())])
        written.append([(asks[i], [template_answer(q, k, rng) for k in range(len(q.options))])
                        for i in order.permutation(len(asks))[:o.paraphrases]])
    return written


def template_answer(question, k, rng):
    """Write an answer that expresses option k: lead, stance, tail."""
    pick = lambda texts: texts[rng.integers(len(texts))]
    lead, tail = pick(WORLD["leads"]), pick(WORLD["tails"]).format(topic=question.topic)
    stance = pick(WORLD["stances"][CLASSES[question.classes[k]]])
    if question.topic == "this":       # a real question: its options say more than a stance
        stance += f", {question.options[k]}"
    text = f"{lead} {stance}" if lead else stance
    return ". ".join(s[0].upper() + s[1:] for s in (text, tail))


# ---------------------------------------------------------------------------------------------
# The shipped world, a made-up survey: 30 topics x 10 aspects, three countries

@dataclass
class Toy:
    out: str = "data/toy"        # folder to write
    country: str = "Avalon"      # Avalon, Borduria, Cascadia, or more than one, with commas
    paraphrases: int = 20        # dialogues per question, split 8:1:1 into train, eval and test
    pairs_per_question: int = 0  # rows per question; 0: one per paraphrase
    noise: float = 0.15          # chance that an answer expresses another option than its belief
    shares: Literal["known", "counted"] = "known"  # target: the survey's, or counted in train rows
    holdout_questions: int = 50  # questions kept for test only
    seed: int = 0                # seed of the whole world


def toy(o):
    """Make up a survey: every topic under every aspect."""
    groups = defaultdict(list)
    for country in names_in(o.country, WORLD["countries"]):
        rng = np.random.default_rng([o.seed, 0])
        tastes = rng.normal(size=(len(WORLD["topics"]), 3))          # all countries share these
        noises = iter(rng.spawn(len(WORLD["topics"]) * len(WORLD["aspects"])))
        for topic, taste in zip(WORLD["topics"], tastes):
            for n, aspect in enumerate(WORLD["aspects"]):
                groups[country].append(Question(
                    f"{topic}/{n}", [w.format(t=topic) for w in aspect["wordings"]], topic,
                    list(aspect["options"]), list(aspect["options"].values()),
                    toy_shares(taste, country, aspect, next(noises))))
    write_surveys(groups, o, template_writer, stances=STANCES)


def toy_shares(taste, country, aspect, rng):
    """A group's shares: a softmax over the options, smooth in topic and aspect, plus some noise.
    A model can therefore learn them and generalise to questions it has never seen."""
    like, heat, unsure = taste @ WORLD["countries"][country], taste[1], taste[2] - 0.8
    classes = np.array(list(aspect["options"].values()))
    degree = (classes - 3) / 2                         # -1 .. 1
    logits = (1.6 * (like + aspect["valence"]) * degree
              + (heat + aspect["extremity"]) * (degree ** 2 - 0.5))
    logits = np.where(classes == 0, unsure - 0.5, logits) + 0.3 * rng.normal(size=len(classes))
    p = np.maximum(np.exp(logits) / np.exp(logits).sum(), 0.01)
    return (p / p.sum()).tolist()


# ---------------------------------------------------------------------------------------------
# Client for OpenAI-compatible servers (chat, embeddings) and other JSON over HTTP

@dataclass
class Chat:
    base_url: str = "https://api.openai.com/v1"  # server; Azure: .../deployments/NAME?api-version=V
    llm: str = "gpt-3.5-turbo-1106"  # model to ask (Appendix A); set its key in API_KEY
    temperature: float | None = None  # sampling temperature; not sent unless given
    max_tokens: int | None = None  # longest answer
    extra: str = ""              # extra request fields as JSON, such as {"top_p": 0.9, "seed": 1}
    concurrency: int = 8         # requests in flight at once
    timeout: float = 120.0       # seconds without a byte before a request is retried
    usd_in: float = 0.0          # price of a million prompt tokens, to show the cost
    usd_out: float = 0.0         # price of a million answer tokens
    max_usd: float = 0.0         # stop once this much is spent, cached answers included; 0: no cap


class Reply(NamedTuple):
    """An LLM's answer without its thinking, and how it ended: "stop", "length" (it was cut off) or
    "refused" (the text is then what the server says instead of an answer)."""
    text: str
    ended: str


HARMLESS = "Reply with yes."
OF_PROMPT = (400, 403, 413, 422, 451)  # statuses that may be about one prompt: flagged or too long
# How servers name a parameter that they do not take, if not as we do.
ALIASES = {"response_format": "response_format|schema|structured|grammar|json.?mode|guided"}
# What finish reasons say if an answer was refused, failed or cut off. The rest are good endings.
REFUSED = re.compile("filter|flagged|content.?policy|moderat|safety|unsafe|refus|recitation|violat|"
                     "inappropriate|harmful|sensitive|prohibit|block|spii|guardrail")
FAILED = re.compile("error|abort|cancel|fail|tool|function|timeout|insufficient|malformed|overload|"
                    "interrupt|exception|unavail|other|unknown|preempt|kill|disconnect|reject")
CUT = re.compile("length|max.*token|context|incomplete|time_limit")
# Thinking runs to its last closing tag, or to the end of the text if it is never closed.
TAG = r"(\w+:)?(think|thinking|thought|reasoning|scratchpad)\s*>"
OPENED = rf"<{TAG}|\[THINK\]|<\|channel\|>analysis"
CLOSED = rf"</{TAG}|\[/THINK\]|<\|channel\|>final<\|message\|>|assistantfinal"
THINKING = re.compile(rf"(.*({CLOSED}))?(\s*({OPENED}).*)?", re.I | re.S)


class Client:
    """Sends many requests at once and appends each answer to a JSON-lines file, keyed by the hash
    of its request, so a killed run resumes where it stopped and a repeated one costs nothing.
    Refused prompts are not kept: the next run asks them again. API keys travel in headers and
    params, which are neither hashed nor stored."""
    def __init__(self, o, cache):
        check_address(o.base_url, "--base_url")
        self.tokens, self.prices = np.zeros(2, int), np.array([o.usd_in, o.usd_out]) / 1e6
        if o.max_usd and not any(self.prices):
            raise ValueError("--max_usd needs prices: --usd_in and --usd_out")
        try:
            self.extra = dict(json.loads(o.extra or "{}"))
        except (ValueError, TypeError):
            raise ValueError('--extra must be a JSON object, such as {"seed": 1}') from None
        self.o, self.cache, self.answers = o, Path(cache), {}
        self.refused, self.unfit = 0, set()    # refusals in a row; (model, parameter to leave out)
        self.lock = threading.Lock()
        lines = self.cache.read_bytes().split(b"\n") if self.cache.is_file() else [b""]
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):    # the half line of a killed run
                entry = json.loads(line)
                self.tokens += entry["tokens"]
                self.answers[entry["key"]] = entry["answer"]       # a refusal has only its cost
        if lines[-1]:
            with open(self.cache, "a") as f:
                f.write("\n")

    def settings(self):
        """What meta.json records about the server; nothing here can hold a key."""
        return {"base_url": self.o.base_url.partition("?")[0], "llm": self.o.llm,
                "temperature": self.o.temperature, "max_tokens": self.o.max_tokens}

    def spent(self):
        """Tokens and cost so far, for the progress bar."""
        cost = f", ${self.tokens @ self.prices:.4f}" if any(self.prices) else ""
        return f"{self.tokens[0]:,} tokens in, {self.tokens[1]:,} out{cost}" * any(self.tokens)

    def ask(self, method, url, bodies, read, desc, headers=None, params=None):
        """Answer request bodies (JSON to POST, or the query of a GET) in their order; the n-th of
        equal bodies gets the n-th answer. read(response) returns (answer, [tokens in, out]) or
        raises TryAgain. params: more of the query, such as a key (so no redirect is followed)."""
        def get(body):
            sent = {"json": body} if method == "POST" else {"params": body | (params or {})}
            return request(method, url, headers, partial(read_or_retry, read), self.pause,
                           timeout=(10, self.o.timeout), allow_redirects=False, **sent)

        jobs, seen = {}, Counter()                         # {hash: body}; copies of each body
        for body in bodies:
            text = json.dumps([url, body], sort_keys=True)
            jobs[hashlib.sha256(f"{text}{seen[text] or ''}".encode()).hexdigest()] = body
            seen[text] += 1
        new = [job for job in jobs.items() if job[0] not in self.answers]
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        self.halt, self.error = threading.Event(), None    # halt wakes threads that wait to retry
        self.bar = progress(total=len(jobs), initial=len(jobs) - len(new), desc=desc, unit="answer")
        with self.bar, ThreadPoolExecutor(self.o.concurrency) as pool:
            try:
                list(pool.map(partial(self.send, get), new))
            except KeyboardInterrupt:
                self.halt.set()
                print("waiting for answers in flight (Ctrl-C drops them)", file=sys.stderr)
                signal.signal(signal.SIGINT, signal.SIG_DFL)   # a second one ends at once
                raise
        if self.error:
            raise ConnectionError(f"{self.error}; the answers so far are kept in {self.cache}, "
                                  "run the same command to go on") from self.error
        return [self.answers[key] for key in jobs]

    def send(self, get, job):
        """Get and keep the answer to one job. The first error stops all threads. Five refusals in
        a row may not be about the prompts: if a harmless one is refused too, the run ends."""
        key, body = job
        try:
            if self.halt.is_set():
                return
            if 0 < self.o.max_usd <= self.tokens @ self.prices:
                raise ValueError(f"--max_usd {self.o.max_usd:g} is reached ({self.spent()})")
            answer, tokens = self.fetch(get, body)
            refused = self.keep(key, answer, tokens)
            harmless = body | {"messages": [{"role": "user", "content": HARMLESS}]}
            if refused and body == harmless:
                raise ValueError(f"even a harmless prompt is refused: {answer.text}")
            if refused == 5:
                self.send(get, (None, harmless))
        except (ValueError, OSError) as e:
            self.error = self.error or e
            self.halt.set()

    def keep(self, key, answer, tokens):
        """Append an answer to the cache, but only the cost of a refusal. Returns the number of
        refusals in a row."""
        refused = isinstance(answer, Reply) and answer.ended == "refused"
        entry = {"tokens": tokens} | ({} if refused else {"key": key, "answer": answer})
        with self.lock:
            self.tokens += tokens
            self.answers[key] = answer
            self.refused = in_a_row = self.refused + 1 if refused else 0
            self.bar.set_postfix_str(self.spent(), refresh=False)
            self.bar.update()
            with open(self.cache, "a", newline="\n") as f:
                f.write(json.dumps(entry) + "\n")
        if self.o.max_usd and not refused and not any(tokens):
            raise ValueError("the server reports no usage, so --max_usd cannot hold")
        return in_a_row

    def fetch(self, get, body):
        """Get one answer, leaving out the parameters that this model has refused before."""
        model = body.get("model")
        fit = {k: v for k, v in body.items() if (model, k) not in self.unfit}
        if "max_tokens" in body.keys() - fit and (model, "max_completion_tokens") not in self.unfit:
            fit.setdefault("max_completion_tokens", body["max_tokens"])        # its newer name
        try:
            return get(fit)
        except Refused as e:
            if "messages" not in body:                 # not a chat
                raise
            named = [k for k in fit if k not in ("model", "messages")
                     and re.search(ALIASES.get(k, rf"\b{k}\b"), e.words, re.I)]
            if re.search("context (length|window)", e.words, re.I):
                named = []             # the prompt is too long, even if max_tokens is named
            if not named and e.status in OF_PROMPT:
                return Reply(f"{e.status}: {e.words}", "refused"), [0, 0]
            if not named:
                raise
            # the last one is of --extra rather than ours; max_tokens is named with its new name
            culprit = model, "max_tokens" if "max_tokens" in named else named[-1]
            if culprit not in self.unfit:              # the threads may all find out at once
                self.unfit.add(culprit)
                self.bar.write(f"{model} refuses {culprit[1]}, which is left out from now on: "
                               f"{e.words[:200]}", file=sys.stderr)
        return self.fetch(get, body)

    def pause(self, seconds, problem):
        self.bar.set_postfix_str(f"waiting {seconds:.0f} s: {problem[:60]}")
        return self.halt.wait(seconds)


def endpoint(o, path):
    """The URL of a server's path, and headers with the key. Azure has a query in its URLs
    (?api-version=) and a header of its own for keys."""
    base, mark, query = o.base_url.partition("?")
    key = key_from("API_KEY", "OPENAI_API_KEY")
    if not key and "api.openai.com" in base:
        raise ValueError("no key for api.openai.com: set OPENAI_API_KEY, or give --base_url")
    auth = {"api-key": key} if "api-version" in query else {"Authorization": f"Bearer {key}"}
    return f"{base.rstrip('/')}/{path}{mark}{query}", auth if key else {}


def read_or_retry(read, response):
    """read(response). Asks again for what it cannot read: once for a complete answer of another
    form, which will hardly change; with all tries for half an answer or a web page."""
    try:
        return read(response)
    except (ValueError, TypeError, KeyError, AttributeError):
        tries = 2 if response.text.startswith(("{", "[", "data:")) else TRIES
        raise TryAgain(f"unreadable answer: {response.text[:300]!r}", tries) from None


def read_json_answer(response, field):
    """A server's JSON object, in which `field` must be a list."""
    answer = json.loads(response.content)
    if not isinstance(answer[field], list):
        raise TypeError(f"{field} is not a list")
    return answer


def tokens_of(answer):
    """[tokens in, tokens out] of an answer; 0 where the server does not count them."""
    usage = answer.get("usage") or {}
    counts = [usage.get(f"{k}_tokens") for k in ("prompt", "completion")]
    return [int(n) if isinstance(n, (int, float)) and n == n else 0 for n in counts]


def read_chat(response):
    """A chat completion -> (Reply, [tokens in, out]). Raises TryAgain if it failed."""
    answer = json.loads(response.content)
    choice = (answer.get("choices") or [None])[0] or {}
    message = choice.get("message") or {}
    ended = str(choice.get("finish_reason") or "stop").lower()
    error = answer.get("error") or choice.get("error")         # despite the status 200
    code = error.get("code") if isinstance(error, dict) else None
    flagged = code in OF_PROMPT or REFUSED.search(str(error or "").lower())
    if (error or FAILED.search(ended)) and not flagged:
        tries = 2 if error and not code else TRIES     # a mere text will hardly change
        raise TryAgain(f"the answer ended with {error or ended}"[:300], tries)
    text = message.get("content") or ""
    if isinstance(text, list):                         # of parts, some of which may be thinking
        text = "".join(p["text"] for p in text if p.get("type", "text") == "text")
    text = THINKING.sub("", text, count=1).strip()
    text = re.sub(r"^```\w*\n(.*?)\n?```$", r"\1", text, flags=re.S)         # fenced as a whole
    if text and not error and not REFUSED.search(ended):
        return Reply(text, "length" if CUT.search(ended) else "stop"), tokens_of(answer)
    hint = " (raise --max_tokens: a model that thinks needs more)" if CUT.search(ended) else ""
    said = message.get("refusal") or error or message or answer
    words = f"no content, finish_reason {ended}{hint}: {said}"
    return Reply(words[:500], "refused"), tokens_of(answer)


def chat(client, prompts, desc, schema=None, llm=None, temperature=None, max_tokens=None):
    """Ask an LLM prompts -> [Reply]. schema: the JSON schema of the answers, or a list with one per
    prompt; dropped if the server does not support it. llm and temperature override the flags;
    max_tokens is for where --max_tokens is not given."""
    o, bodies = client.o, []
    schemas = schema if isinstance(schema, list) else [schema] * len(prompts)
    for prompt, form in zip(prompts, schemas):
        body = {"model": llm or o.llm, "max_tokens": o.max_tokens or max_tokens,
                "temperature": o.temperature if temperature is None else temperature,
                "messages": [{"role": "user", "content": prompt}]}
        if form:
            body["response_format"] = {"type": "json_schema", "json_schema": {
                "name": "answer", "strict": True, "schema": form}}
        bodies.append({k: v for k, v in (body | client.extra).items() if v is not None})
    url, headers = endpoint(o, "chat/completions")
    replies = [Reply(*r) for r in client.ask("POST", url, bodies, read_chat, desc, headers)]
    refused = [r.text for r in replies if r.ended == "refused"]
    if refused:
        print(f"{desc}: {len(refused)} of {len(replies)} prompts were refused, the first: "
              f"{refused[0][:200]}", file=sys.stderr)
    return replies


def read_embeddings(response):
    """An answer with one embedding per input -> (vectors in input order, [tokens in, 0])."""
    answer, n = json.loads(response.content), len(json.loads(response.request.body)["input"])
    # Some servers omit an index of 0, some give none at all: the sort is stable.
    items = sorted(answer["data"], key=lambda item: item.get("index") or 0)
    vectors = np.array([item["embedding"] for item in items], float)
    norms = np.linalg.norm(vectors, axis=-1)
    if norms.shape != (n,) or not np.isfinite(norms).all() or not norms.all():
        raise ValueError("not one vector of numbers for each input")
    return vectors.tolist(), tokens_of(answer)


def embed(client, texts, model, size=64):
    """Embed texts with a server's model, `size` to a request -> unit vectors (N, C)."""
    url, headers = endpoint(client.o, "embeddings")
    bodies = [{"model": model, "input": texts[i:i + size]} for i in range(0, len(texts), size)]
    try:
        parts = client.ask("POST", url, bodies, read_embeddings, "embeddings", headers)
    except ConnectionError as e:                       # some servers take only 10 at once
        if size > 1 and getattr(e.__cause__, "status", 0) in (400, 413, 422):
            return embed(client, texts, model, size // 2)
        raise
    vectors = np.concatenate(parts)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------
# The LLM writer: Appendix A

TEXT = {"type": "string"}
STRAIGHT = str.maketrans("‘’“”：［］（）【】", "''\"\":[]()[]")
QUESTION = r"(?im)^[^a-z\n]*q(?:uestion)?[^a-z\n]*?[:.)]"       # Q:, **Question 2:**, 1. Q1.
LABEL = r"[^a-z\n]*(?:answer|option|[a-z])?[^a-z\[(\n]*"        # A1:, **B.**, (1), -
NUMBER = r"[ '\"*_]*(?:(?:option|choice)? ?(?:\d*|[a-z]) ?[.:)] ?)?"    # of [1. Yes], [A. Yes]


def closed(**fields):
    """The JSON schema of an object with exactly these fields. [x] means a list of x."""
    fields = {k: {"type": "array", "items": v[0]} if isinstance(v, list) else TEXT | v
              for k, v in fields.items()}
    return {"type": "object", "properties": fields, "required": list(fields),
            "additionalProperties": False}


def llm_writer(client, questions, group, o, rng, problems):
    """Like template_writer, but asks an LLM for --styles dialogues per request. Gives up if no
    reply about the first questions (some 20 requests) can be read."""
    sizes = [min(o.styles, o.paraphrases - n) for n in range(0, o.paraphrases, o.styles)]
    few = max(1, 20 // max(1, len(sizes)))
    dialogues, read = {q.id: {} for q in questions}, Counter()
    for part in filter(None, (questions[:few], questions[few:])):
        asked = [(q, n) for q in part for n in sizes]
        prompts = [PROMPTS["dialogues"].format(
            country=group, n=n, k=len(q.options), question=q.wordings[0],
            choices=json.dumps(q.options, ensure_ascii=False)) for q, n in asked]
        # each option is a field, so that even a weak model cannot forget one
        schemas = [closed(styles=[closed(
            question=TEXT, answers=closed(**dict.fromkeys(q.options, TEXT)))]) for q, _ in asked]
        replies = chat(client, prompts, f"dialogues, {group}", schemas, max_tokens=4096)
        for (q, _), reply in zip(asked, replies):
            found, failed = parse_dialogues(reply.text, q.options, reply.ended)
            read[bool(found)] += 1
            for new in found:          # a repeat could end up in train and in test
                if dialogues[q.id].setdefault(normal(new[0]), new) is not new:
                    failed.append({"problem": "a wording given before", "text": new[0]})
            problems += [{"group": group, "question": q.id, **problem} for problem in failed]
        if not read[True]:
            break
    print(f"{group}: {read[True]} of {read.total()} replies could be read", file=sys.stderr)
    return [list(d.values())[:o.paraphrases] for d in dialogues.values()]


def one_line(text):
    """Text with straight quotes and single spaces."""
    return " ".join(text.translate(STRAIGHT).split())


def layout_of(text):
    """A reply in Appendix A's layout, which a JSON reply (perhaps cut off) is put into."""
    string = r'("(?:[^"\\]|\\["\\/bfnrt]|\\u[\da-fA-F]{4})*")'
    lines = []
    for pair in re.findall(rf"{string}\s*:\s*{string}", text):
        name, value = (json.loads(x, strict=False) for x in pair)
        lines.append(f"Q: {value}" if name == "question" else f"[{name}] {value}")
    layout = "\n".join(map(one_line, lines or text.split("\n")))
    return re.sub(r"\n[\W_]*\n", "\n\n", layout)          # a line of marks is an empty line


def parse_dialogues(text, options, ended="stop"):
    """An LLM's reply -> ([(paraphrase, [one answer per option]), ...], [problem, ...]). A style is
    a line `Q: ...`, then one line per option: any label, the option in brackets, the answer.
    Nothing is guessed: a style with any other line, or with an answer missing, is a problem."""
    unquote = lambda text: re.sub(r'^"\s*([^"]*?)\s*"$', r"\1", text.strip(" *_"))
    names = {one_line(option).strip(" .'\"").casefold(): k for k, option in enumerate(options)}
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    answer = re.compile(rf"{LABEL}[\[(]{NUMBER}({either})[ .'\"*_]*[\])][ *_:–-]*(?:\[\1\] ?)?"
                        r"(.*\w.*)", re.I)
    # an empty line ends a style, but before an answer it is only space
    layout = re.sub(rf"\n\n(?={answer.pattern})", "\n", layout_of(text), flags=re.I)
    styles, good, problems = re.split(QUESTION, layout)[1:] or ["\n" + layout], [], []
    for n, style in enumerate(styles, 1):              # without a question line, it is empty
        asked, *lines = re.split(r"(?i)\n[\W_]*(?:\n|$|style\b)", style)[0].split("\n")
        asked, found = unquote(asked), [answer.fullmatch(line) for line in lines]
        answers = {names.get(m[1].casefold()): unquote(m[2]) for m in found if m}
        said = [answers.get(k) for k in range(len(options))]
        copied = asked in PROMPTS["dialogues"]         # as its example is, and an empty question
        cut = ended == "length" and n == len(styles)
        if copied or cut or not all(found + said) or len(found) != len(said):
            problems.append({"problem": "a style without a question of its own and one answer to "
                             f"each option ({ended})", "text": style.strip()})
        else:
            good.append((asked, said))
    return good, problems


def read_label(text, labels):
    """Which of a few labels a reply gives, or None. Reads 3, **3**., 3.0, 3/5, Rating: 3, The
    rating is 3., {"answer": "3"}; does not read list items (1. The film, 1: France)."""
    either = "|".join(map(re.escape, labels))
    named = re.fullmatch(rf"[\W_]*(?:[a-z_' ]+(?:\bis|[*\"\s]*[:=])[\W_]*)?(?<!-)({either})"
                         rf"(?:\.0+|\s*(?:/|out of)\s*(?=\d){re.escape(labels[-1])})?[\W_]*",
                         text, re.I)
    return next((s for s in labels if named and s.lower() == named[1].lower()), None)


# ---------------------------------------------------------------------------------------------
# GlobalOpinionQA (Durmus et al. 2023), or a survey of your own

@dataclass
class Opinions:
    csv: str = ""                # survey table, see read_opinions; empty: Anthropic's, from the hub
    country: str = "United States"  # whose answers; for more than one country, use commas
    map: str = ""                # JSON {option: class 0..5}: Appendix B, or a dataset's meta.json
    classify: Literal["", "llm"] = ""  # llm: let it classify the options that --map lacks
    writer: Literal["template", "llm"] = "template"  # what writes paraphrases and answers
    out: str = ""                # folder to write
    paraphrases: int = 20        # dialogues per question, split 8:1:1 into train, eval and test
    styles: int = 10             # dialogues to ask an LLM for in one request
    pairs_per_question: int = 0  # rows per question (paper: 38 or 472); 0: one per paraphrase
    noise: float = 0.0           # chance that an answer expresses another option than its belief
    max_questions: int = 0       # use only the first questions of each country; 0: all
    shares: Literal["known", "counted"] = "known"  # target: the survey's, or counted in train rows
    holdout_questions: int = 50  # questions kept for test only
    seed: int = 0                # seed of paraphrases, pairs and split


def read_opinions(path):
    """Read {country: [Question without classes, ...]} from CSV with the columns question, options
    (a list of texts) and selections (a dict of each country's shares)."""
    groups = defaultdict(list)
    for n, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline=""))):
        row = {str(k).strip().lower(): (v or "").strip() for k, v in row.items() if k}
        try:
            # Anthropic's table writes defaultdict(<class 'list'>, {...})
            shares = literal(re.sub(r"^defaultdict\([^{]*|\)$", "", row["selections"]), dict)
            options = [str(option) for option in literal(row["options"], list)]
            for country, p in shares.items():
                p, questions = [float(x) for x in p], groups[country]
                if (row["question"] and 1 < len(options) == len(set(options)) == len(p)
                        and min(p) >= 0 < sum(p)):
                    questions.append(Question(str(n), [row["question"]], "this", options, [],
                                              [x / sum(p) for x in p]))
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, row {n}: {e}; a survey needs the columns question, options "
                             "(['Yes', 'No']) and selections ({'Chile': [0.6, 0.4]})") from None
    return groups


def literal(value, kind):
    """Parse a list or dict that a table may hold as text, in JSON or Python syntax."""
    for parse in (json.loads, ast.literal_eval):
        if isinstance(value, str):
            with suppress(ValueError, SyntaxError):
                value = parse(value)
    if not isinstance(value, kind):
        raise ValueError(f"not a {kind.__name__}: {str(value)[:80]!r}")
    return value


def classify(client, questions, belief_map):
    """Let an LLM classify the options that belief_map lacks, and add them. Returns problems."""
    asked = {t: q.wordings[0] for q in reversed(questions)      # the first question wins, so that
             for t in q.options if t not in belief_map}         # more questions ask nothing again
    prompts = [PROMPTS["classify"].format(question=q, option=t) for t, q in asked.items()]
    replies = chat(client, prompts, "classes of options", closed(answer={"enum": CLASSES}),
                   temperature=0.0, max_tokens=50)
    labels = {t: read_label(reply.text, CLASSES) for t, reply in zip(asked, replies)}
    belief_map |= {t: label for t, label in labels.items() if label}
    return [{"problem": "an option that the LLM gave no class", "option": t, "text": reply.text}
            for t, reply in zip(asked, replies) if not labels[t]]


def names_in(text, known):
    """Split a list of countries at its commas. GlobalOpinionQA joins two surveys that spell some
    names differently (S. Korea, South Korea): show those with the same last word."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        like = [x for x in sorted(known) if name.rpartition(" ")[2] in x and x != name]
        if name not in known:
            raise ValueError(f"no country {name!r}; there is {', '.join(like or sorted(known))}")
        if like:
            print(f"{name}: the survey also has {', '.join(like)}", file=sys.stderr)
    return names


def opinions(o, flags):
    """Make rows from a survey such as GlobalOpinionQA."""
    client, problems, most = Client(flags, f"{o.out}.answers.jsonl"), [], o.max_questions or None
    belief_map = read_json(o.map) if o.map else {}             # {option: class}
    belief_map = belief_map.get("belief_to_class", belief_map)
    if {*map(str, belief_map.values())} - {*CLASSES}:
        raise ValueError(f"{o.map} must map options to the classes {', '.join(CLASSES)}")
    table = read_opinions(o.csv or hub_file("datasets/Anthropic/llm_global_opinions",
                                            "data/global_opinions.csv"))
    groups = {country: table[country] for country in names_in(o.country, table)}
    for country, questions in groups.items():
        if o.classify:
            problems += classify(client, questions[:most], belief_map)
        fit = [q for q in questions if set(q.options) <= belief_map.keys()]
        print(f"{country}: {len(fit)} of {len(questions)} questions have classes", file=sys.stderr)
        if not fit:
            raise ValueError("each option needs a class: give --map FILE, --classify llm, or both")
        groups[country] = fit[:most]
        for q in fit:
            q.classes = [CLASSES.index(str(belief_map[t])) for t in q.options]
    if o.writer == "llm":
        write_surveys(groups, o, partial(llm_writer, client), problems, llm=client.settings())
    else:
        write_surveys(groups, o, template_writer, problems, stances=STANCES)


# ---------------------------------------------------------------------------------------------
# Published sets of rows, through the hub's rows API

@dataclass
class Published:
    name: str = "Binwei01/mmoqa_usa"  # a dataset on the hub with the columns of our rows
    group: str = ""              # whose opinions these are; filled in for mmoqa_usa, _pk and _sa
    out: str = ""                # folder to write


GROUP_OF = {"mmoqa_usa": "United States", "mmoqa_pk": "Pakistan", "mmoqa_sa": "S. Africa"}


def published(o):
    """Fetch a dataset's rows. Six shares are classes 0..5 (0 off the scale), five are ratings."""
    client = Client(Chat(concurrency=4), f"{o.out}.rows.jsonl")    # keeps every page
    server = os.environ.get("HF_DATASETS_SERVER") or "https://datasets-server.huggingface.co"

    def ask(what, queries):
        return client.ask("GET", f"{server}/{what}", [{"dataset": o.name} | q for q in queries],
                          lambda response: (read_json_answer(response, what), [0, 0]),
                          f"pages of {what}", hub_headers())

    group = o.group or next((g for key, g in GROUP_OF.items() if key in o.name), "")
    listed = {s["split"] for s in ask("splits", [{}])[0]["splits"]}
    splits, problems, counts = {s: [] for s in SPLITS}, [], Counter()
    for split, rows in splits.items():
        names = ["eval", "validation", "valid", "dev"] if split == "eval" else [split]
        name = next((name for name in names if name in listed), split)
        for n, record in enumerate(hub_rows(ask, name, client.cache)):
            try:
                rows.append(published_row(record, group))
            except (KeyError, TypeError, ValueError) as e:
                problems.append({"problem": "a row with an empty or odd cell",
                                 "text": f"{name}, row {n}: {e!r}"})
        counts.update((row.get(f"{side}_choice"), row[f"{side}_choice_id"])
                      for row in rows for side in ("accept", "reject"))
    ratings = any(len(row["probabilities"]) == 5 for row in splits["train"])
    save_dataset(o, splits, problems, off_scale=None if ratings else "0",
                 classes=STARS if ratings else CLASSES,   # the most frequent class of a belief wins
                 belief_to_class={t: c for (t, c), _ in reversed(counts.most_common()) if t})


def hub_rows(ask, split, cache):
    """All records of a split, 100 to a request; those with long cells cut off again, one by one."""
    page = lambda start, n=100: {"config": "default", "split": split, "offset": start, "length": n}
    [first] = ask("rows", [page(0)])
    total = first["num_rows_total"]
    pages = [first, *ask("rows", [page(start) for start in range(100, total, 100)])]
    cut = [page(r["row_idx"], 1) for p in pages for r in p["rows"] if r.get("truncated_cells")]
    found = {r["row_idx"]: r for p in [*pages, *ask("rows", cut)] for r in p["rows"]}
    if len(found) != total or first.get("partial"):
        raise ValueError(f"{len(found)} of {total} rows of {split} came: the hub has only a part, "
                         f"or the set has changed; remove {cache} and try again")
    return [found[n] for n in sorted(found)]


def published_row(record, group):
    """Convert a record of the hub; KeyError or ValueError if it is not whole. Numbers may come as
    text, lists as literals. The same options and shares are one question, unless it has an id."""
    row = {"group": group} if group else {}
    row |= {name: str(value) for name, value in record["row"].items()
            if name in (*FIELDS, *TEXTS) and value not in (None, "")}
    for name in ("accept_choice_id", "reject_choice_id"):
        row[name] = re.sub(r"\.0+$", "", row[name])    # 4, "4" and 4.0 are one class
    row["prompt"] = row["prompt"].removeprefix("<Q>").removesuffix("<A>")
    row["options"] = [str(x) for x in literal(row["options"], list)]
    row["probabilities"] = literal(row["probabilities"], list)
    question = repr((row["options"], row["probabilities"])).encode()
    row.setdefault("question_id", hashlib.sha256(question).hexdigest()[:12])
    check_row(row, STARS if len(row["probabilities"]) == 5 else CLASSES)
    if record.get("truncated_cells"):
        raise ValueError("its long cells are cut off")
    return row


# ---------------------------------------------------------------------------------------------
# Movie reviews (section 5.2): the belief is the rating

@dataclass
class Reviews:
    reviews: str = ""            # SNAP's movies.txt, or JSON lines of a later Amazon set, or .gz
    titles: str = ""             # CSV of product,title; "The Ring (2002)" looks up that year's film
    metadata: Literal["omdb", "none"] = "omdb"  # what describes the films; needs OMDB_API_KEY
    out: str = ""                # folder to write
    min_chars: int = 20          # leave out shorter reviews
    max_chars: int = 2000        # leave out longer reviews
    max_reviews: int = 0         # draw at most this many per film; 0: all
    max_titles: int = 0          # use only the most reviewed films; 0: all
    holdout_questions: int = 0   # films kept for test only
    seed: int = 0                # seed of draws and split
    omdb: str = "https://www.omdbapi.com/"  # address of OMDb or a mirror


STARS = CLASSES[1:]
NAMES = {                              # of a field in SNAP's set, 2014's and 2018's, 2023's -> ours
    "product/productId": "product", "asin": "product", "parent_asin": "parent",
    "review/userId": "user", "reviewerID": "user", "user_id": "user",
    "review/score": "rating", "overall": "rating", "rating": "rating",
    "review/text": "text", "reviewText": "text", "text": "text"}
codecs.register_error("cp1252", lambda e: (
    e.object[e.start:e.end].decode("cp1252", "replace"), e.end))


def records_in(path, errors="strict"):
    """Yield the records of a file, plain or .gz: JSON lines as text, and as a dict SNAP's lines of
    one field each (`product/productId: B00...`) up to an empty line. errors: for bytes that are
    not UTF-8, "cp1252" to decode them as that."""
    open_it, record = gzip.open if str(path).endswith(".gz") else open, {}
    lines = open_it(path, "rt", encoding="utf-8-sig", errors=errors, newline="\n")
    try:
        for line in chain(map(str.strip, lines), [""]):
            if line and not line.startswith("{"):
                key, _, value = line.partition(": ")
                record[key] = value
            elif line or record:
                yield line or record
                record = {}
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is not UTF-8 text, or damaged ({e}): save it with that encoding, "
                         "or fetch it again") from None


def review_of(record):
    """A record's fields under our names, with the rating as "1".."5" and clean text."""
    review = {NAMES[k]: v for k, v in literal(record, dict).items() if k in NAMES}
    rating, text = f"{float(review['rating']):g}", html.unescape(html.unescape(review["text"]))
    if rating not in STARS:
        raise ValueError(f"a rating of {rating}")
    # the reviewer did not write tags, [[VIDEOID:...]] and [[ASIN:...]]
    text = re.sub(r"</?[a-zA-Z][^<>]{0,200}>|\[\[[A-Z]+:.*?\]\]", " ", text)
    return review | {"rating": rating, "text": " ".join(text.split())}


def collect_reviews(o, titles):
    """Read the file once -> {title: [a row's side, ...]}. The text is None if its length is not
    wanted: the rating counts."""
    sides, seen, skipped = defaultdict(list), set(), Counter()
    for record in progress(records_in(o.reviews, "cp1252"), desc="reviews", unit="review"):
        try:
            review = review_of(record)
        except (KeyError, TypeError, ValueError):
            skipped["that are no review"] += 1
            continue
        title = titles.get(review.get("parent")) or titles.get(review.get("product"))
        user, text = review.get("user"), review["text"]
        if not title:
            skipped["of a product without a title"] += 1
        elif user and hash((user, text)) in seen:      # editions of a film repeat its reviews
            skipped["that repeat the same user's text"] += 1
        else:
            seen.add(hash((user, text)))
            fits = o.min_chars <= len(text) <= o.max_chars
            skipped["too short or too long"] += not fits
            sides[title].append((review["rating"], None, text if fits else None))
    print("reviews left out: " + ", ".join(f"{n:,} {why}" for why, n in skipped.items() if n),
          file=sys.stderr)
    if not sides:
        first = str(next(records_in(o.reviews, "cp1252"), ""))
        raise ValueError(f"{o.reviews} has no review (in SNAP's form or as JSON lines) of any "
                         f"product in {o.titles}. It begins with {first[:200]!r}")
    return sides


def read_omdb(response):
    """Read OMDb's answer -> the film's prompt as in Table 7: title, year, director (Genre: genre).
    plot. It is empty if OMDb does not know the film, or its JSON is broken for good."""
    # plots have stray backslashes: double those that escape nothing
    text = re.sub(r'(\\["\\/bfnrtu])|\\', lambda m: m[1] or r"\\", response.text)
    whole = re.fullmatch(r'\{"Title".*\}\s*', text, re.S)
    film = {"Error": "Movie not found!" if whole else text[:200]}
    with suppress(TypeError, ValueError):
        film = dict(json.loads(text, strict=False))    # and control characters
    error = str(film.get("Error"))
    if film.get("Response") != "True":
        if re.fullmatch(r"\w+ not found!?", error):
            return "", [0, 0]
        raise TryAgain(f"OMDb: {error}", 1 if re.search("limit|key", error) else TRIES)
    film = {k: " ".join(str(v).split()) for k, v in film.items() if v not in (None, "N/A")}
    head = ", ".join(film[k] for k in ("Title", "Year", "Director") if k in film)
    genre = f" (Genre: {film['Genre']})" if "Genre" in film else ""
    return f"{head}{genre}. {film.get('Plot', '')}".strip(), [0, 0]


def review_rows(title, prompt, shares, part, train, rng):
    """Yield a row for each review in a part, which it accepts. The rejected review has another
    rating. It comes from the same part, so that no text is in two splits, or else from train."""
    for side in part:
        others = [x for x in part if x[0] != side[0]] or [x for x in train if x[0] != side[0]]
        if others:
            other = others[rng.integers(len(others))]
            yield row_of(title, prompt, STARS, shares, side, other)


def reviews(o):
    """Make rows from movie reviews: accept one, reject one of the same film with another rating."""
    if "?" in o.omdb or o.metadata == "omdb" and not key_from("OMDB_API_KEY"):
        raise ValueError("set OMDB_API_KEY (omdbapi.com gives one) or give --metadata none, and "
                         "--omdb an address without a key")    # since meta.json will hold it
    table = csv.reader(read_text(o.titles).splitlines(), skipinitialspace=True)
    titles = {row[0]: ", ".join(row[1:]) for row in table if row}      # a title may have commas
    sides = collect_reviews(o, titles)
    usable = [t for t in sorted(sides, key=lambda t: (-len(sides[t]), t))
              if len({rating for rating, _, text in sides[t] if text}) > 1][:o.max_titles or None]
    prompts = {title: f"{title}." for title in usable}
    if o.metadata == "omdb":
        named = re.compile(r"(?P<t>.*?)(?: \((?P<y>\d{4})\))?")
        queries = [named.fullmatch(t).groupdict() | {"plot": "short", "r": "json"} for t in usable]
        answers = Client(Chat(concurrency=4), f"{o.out}.omdb.jsonl").ask(
            "GET", o.omdb, queries, read_omdb, "OMDb", params={"apikey": key_from("OMDB_API_KEY")})
        prompts = {title: prompt for title, prompt in zip(usable, answers) if prompt}
    problems = [{"problem": "a title without metadata or two ratings, or beyond --max_titles",
                 "text": t} for t in sides if t not in prompts]
    films, title_of = defaultdict(list), {p: t for t, p in reversed(prompts.items())}
    for title, prompt in prompts.items():              # titles of one film are one question
        films[prompt] += sides[title]
    held, splits = holdout(films, o), {s: [] for s in SPLITS}
    rng = np.random.default_rng([o.seed, 1])
    for prompt, every in films.items():
        title, ratings = title_of[prompt], Counter(rating for rating, *_ in every)
        shares = [ratings[c] / len(every) for c in STARS]
        texts = [side for side in every if side[2]]
        drawn = [texts[i] for i in rng.permutation(len(texts))[:o.max_reviews or None]]
        parts = split_up(drawn, prompt in held, title, problems)
        for split, part in parts.items():
            splits[split] += review_rows(title, prompt, shares, part, parts.get("train", ()), rng)
    save_dataset(o, splits, problems, classes=STARS, off_scale=None)


# ---------------------------------------------------------------------------------------------
# Mining beliefs from pairs that have none: Appendix I

@dataclass
class Mine:
    pairs: str = ""              # JSON lines (or .gz) with chosen, rejected and perhaps prompt
    out: str = ""                # folder to write
    max_pairs: int = 300         # pairs to draw from the file (300 in the paper); 0: all
    max_statements: int = 25     # groups of statements to keep (the paper found 23)
    min_pairs: int = 3           # leave out statements with fewer pairs
    holdout_questions: int = 0   # statements kept for test only
    seed: int = 0                # seed of draws and split


CLASS_OF = {"disagree": "1", "neutral": "2", "agree": "3"}
TWO_STANCES = closed(answer_1={"enum": list(CLASS_OF)}, answer_2={"enum": list(CLASS_OF)})


def read_pairs(path):
    """Read [(prompt, chosen, rejected), ...] from JSON lines."""
    records, pairs = list(records_in(path)), []
    for record in records:
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            pairs.append(pair_of(literal(record, dict)))
    good = [pair for pair in pairs if all(pair) and pair[1] != pair[2]]
    print(f"{len(records)} pairs, of which {len(records) - len(good)} are left out (not JSON, an "
          "empty text, or the same answer twice)", file=sys.stderr)
    if not good:
        raise ValueError(f"{path} has no JSON lines with chosen and rejected")
    return good


def pair_of(row):
    """(prompt, chosen, rejected) of a row in HH-RLHF's form or TRL's lists of messages. Dialogues
    that include their prompt are cut before the last assistant turn that both share."""
    def text_of(turns):
        if isinstance(turns, list):
            turns = "".join(f"\n\n{'Human' if turn['role'] == 'user' else turn['role'].title()}: "
                            + turn["content"] for turn in turns)
        return turns or ""

    prompt, chosen, rejected = map(text_of, (row.get("prompt"), row["chosen"], row["rejected"]))
    end = os.path.commonprefix([chosen, rejected]).rfind("\n\nAssistant:")
    if end > 0:
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    return tuple(re.sub(r"^\s*(Human|Assistant):", "", text).strip()
                 for text in (prompt, chosen, rejected))


def group_statements(client, statements, most, size=50):
    """Let an LLM group similar statements -> {statement: the one that represents its group}. Each
    request shows the groups so far and `size` more; if it is refused, these have no group."""
    texts, of = list(dict.fromkeys(statements)), {}
    for start in range(0, len(texts), size):
        part = [*dict.fromkeys(of.values()), *texts[start:start + size]]
        listed = "\n".join(f"{n}. {text}" for n, text in enumerate(part, 1))
        [reply] = chat(client, [PROMPTS["groups"].format(most=most, statements=listed)], "groups",
                       closed(groups=[TEXT]), temperature=0.0, max_tokens=4096)
        lines = reply.text             # `statement :: 1, 2`, perhaps in JSON
        with suppress(ValueError, KeyError, TypeError):
            lines = "\n".join(json.loads(lines)["groups"])
        groups = re.findall(r"^[\W\d]*(\w.*?)[*_\s]*::(.*)$", lines, re.M)
        new = {part[int(n) - 1]: name for name, numbers in reversed(groups)    # the first one wins
               for n in re.findall(r"\d+", numbers) if 1 <= int(n) <= len(part)}
        of = {text: new.get(group, group) for text, group in of.items()} | new
    return of


def parse_stances(text):
    """The classes of answers 1 and 2 in a reply, in JSON or words, or None."""
    stance = r"\W+(agree|neutral|disagree)s?\W+"
    sides = re.fullmatch(rf"\W*(?:answer.)?1{stance}(?:answer.)?2{stance}", f"{text}.", re.I)
    return sides and [CLASS_OF[side.lower()] for side in sides.groups()]


def mine(o, flags):
    """Make rows from pairs without beliefs. An LLM states what each pair disagrees about and which
    side agrees with that: the statement becomes the belief text, the stance its class."""
    client, rng = Client(flags, f"{o.out}.answers.jsonl"), np.random.default_rng([o.seed, 1])
    pairs, problems = read_pairs(o.pairs), []
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[:o.max_pairs or None]]
    swaps = rng.random(len(pairs)) < 0.5               # their order must reveal nothing
    shown = [dict(prompt=p, first=r if swap else c, second=c if swap else r)
             for (p, c, r), swap in zip(pairs, swaps)]
    leave_out = lambda problem, text: problems.append({"problem": problem, "text": text})

    # 1. What is each pair in conflict about?
    said, prompts = {}, [PROMPTS["statement"].format(**x) for x in shown]
    for i, reply in enumerate(chat(client, prompts, "statements", max_tokens=100)):
        said[i] = reply.text.strip(" \n*\"“”")
        if reply.ended != "stop" or not re.fullmatch(".{1,200}", said[i]):
            leave_out(f"no statement ({reply.ended})", said.pop(i))

    # 2. Which of these statements say the same?
    of = group_statements(client, said.values(), o.max_statements)
    counts = Counter(of[s] for s in said.values() if s in of).most_common(o.max_statements)
    asked = {i: of[s] for i, s in said.items() if of.get(s) in dict(counts)}
    for i in said.keys() - asked.keys():
        leave_out("a statement in no group, or beyond --max_statements", said[i])

    # 3. Which side of each pair agrees?
    prompts = [PROMPTS["stances"].format(statement=s, **shown[i]) for i, s in asked.items()]
    replies = chat(client, prompts, "stances", TWO_STANCES, temperature=0.0, max_tokens=60)
    sides_of = defaultdict(list)                       # {statement: [(prompt, accepted, rejected)]}
    for (i, statement), reply in zip(asked.items(), replies):
        stances = parse_stances(reply.text)
        if stances and stances[0] != stances[1]:
            stances = reversed(stances) if swaps[i] else stances
            sides = zip(stances, (statement, statement), pairs[i][1:])
            sides_of[statement].append((pairs[i][0], *sides))
        else:
            leave_out(f"no two different stances ({reply.ended})", reply.text)
    save_mined(o, sides_of, problems)


def save_mined(o, sides_of, problems):
    """Make rows of {statement: [(prompt, accepted side, rejected side), ...]} and write them. The
    target is how often each stance is accepted."""
    enough = {s: sides for s, sides in sides_of.items() if len(sides) >= o.min_pairs}
    problems += [{"problem": "a statement with fewer than --min_pairs pairs", "text": s}
                 for s in sides_of if s not in enough]
    held, splits = holdout(enough, o), {s: [] for s in SPLITS}
    for statement, sides in enough.items():
        accepted = Counter(side[0] for _, side, _ in sides)
        shares = [accepted[c] / len(sides) for c in CLASS_OF.values()]
        prompts = list({prompt: None for prompt, *_ in sides})     # each stays in one split
        for split, part in split_up(prompts, statement in held, statement, problems).items():
            splits[split] += [
                row_of(statement, prompt, ["Disagree", "Neutral", "Agree"], shares, *two)
                for prompt, *two in sides if prompt in part]
    save_dataset(o, splits, problems, classes=list(CLASS_OF.values()), off_scale=None)


# ---------------------------------------------------------------------------------------------
# Rows with examples in context: Appendix E

@dataclass
class InContext:
    data: str = ""               # dataset whose rows get examples, or more than one, with commas
    form: str = ""               # prompt template to use instead of the dataset's
    shots: int = 3               # examples before each prompt (paper: 3 for GPT-2, 5 for Pythia)
    out: str = ""                # folder to write
    seed: int = 0                # seed of the draws


INSTRUCTION = ("You are a helpful assistant and can generate the same format as the examples in "
               "the context.\n\n")


def example(row, form):
    """Write a training row as a shot: prompt, accepted belief, answer."""
    # differs: the appendix has a space after `Answer:`, which would change the class token
    belief = f"<{row['accept_choice']}>" if row.get("accept_choice") else ""
    if not belief and row["accept_response"][:1].isdigit():
        belief = " "                                   # or "10 out of 10" becomes "510 out of 10"
    text = f"{row['accept_choice_id']}{belief}{row['accept_response']}"
    return prompt_text(row, form) + " ".join(text.split()) + "\n\n"


def icf(o):
    """Put a few training rows before each prompt: of the same group, about other questions. The
    shots are a list, so that data.py can drop some to fit the context."""
    meta, splits = load_dataset(o.data, SPLITS, o.form)
    form = meta["form"].replace(FORM, "Question: {prompt}, Answer:")
    if form == meta["form"]:
        raise ValueError(f"{o.data} has the form {form!r} already: it needs one with {FORM!r}")
    rng, pools = np.random.default_rng([o.seed, 3]), defaultdict(list)
    for row in splits["train"]:
        pools[row.get("group")].append(row)
    for row in chain(*splits.values()):
        pool, shots = pools[row.get("group")], {}
        for i in rng.integers(len(pool), size=1000) if pool else ():
            if len(shots) == o.shots:
                break
            if question_of(pool[i]) != question_of(row):
                shots[i] = example(pool[i], form)
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
    if out.is_file() or any(out.glob("*")):
        raise ValueError(f"--out {out} is not empty: give another, or remove it first")
    make(*(config(**{f.name: flags[f.name] for f in dataclasses.fields(config)})
           for config in configs))


if __name__ == "__main__":
    run(main)
