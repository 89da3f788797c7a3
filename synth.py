"""Datasets of preference rows, from every source of the paper.

    python synth.py toy --out data/toy                                 # a made-up survey world
    python synth.py opinions --country "United States" --map option_map.json --writer llm \
        --out data/usa                                                 # GlobalOpinionQA, 5.1
    python synth.py reviews --reviews movies.txt.gz --titles titles.csv --out data/movies    # 5.2
    python synth.py mine --pairs hh.jsonl.gz --out data/hh             # beliefs mined, Appendix I
    python synth.py icf --data data/usa --shots 3 --out data/usa-icf   # rows in context, Appendix E

Last in reading order. Surveys become Questions (text, options, classes, a group's shares); a
writer, of templates or an LLM, turns each into dialogues (a paraphrase and one answer per option),
and pairs are drawn as in section 5.1: the accepted belief from the group's shares, the rejected one
evenly from the others. Draws are a pure function of --seed; an LLM's answers are kept beside OUT,
so that a killed run goes on where it was and a second one costs nothing.
"""
import ast
import csv
import dataclasses
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain as joined
from pathlib import Path

import numpy as np
import requests

from data import (FORM, Parser, SPLITS, add_flags, cached, check_ranges, fetch, hub_cache,
                  load_dataset, progress, prompt_text, read_json, request, run)

CLASSES = ["0", "1", "2", "3", "4", "5"]  # Appendix B: 1 (least) to 5 (most agreement); 0 off scale


@dataclass
class Question:
    """A survey question and how one group answers it."""
    id: str
    wordings: list                     # ways of asking it
    topic: str                         # a short name to speak of it
    options: list                      # belief texts
    classes: list                      # class index of each option
    shares: list                       # the group's share of each option; they sum to 1


# ---------------------------------------------------------------------------------------------
# Pairs, splits, files

def make_row(question, paraphrase, answers, others, group, rng, noise):
    """One row as in section 5.1. answers: one per option; others: another dialogue's.
    noise: how often the accepted answer expresses another option than its belief."""
    # differs: section 5.1 has no noise. People are not consistent, and without it the preference
    # term has nothing to mend. The stray answer comes from another dialogue, so that it is not
    # the very text that is rejected.
    n = len(question.options)
    accept = rng.choice(n, p=question.shares)
    rest = [k for k in range(n) if k != accept]
    reject, stray = rest[rng.integers(n - 1)], rest[rng.integers(n - 1)]
    noisy = rng.random() < noise and others[stray] != answers[reject]
    said = others[stray] if noisy else answers[accept]
    target = np.zeros(len(CLASSES))
    np.add.at(target, question.classes, question.shares)     # options that share a class add up
    return {
        "prompt": paraphrase, "options": question.options,
        "probabilities": [round(float(p), 6) for p in target],
        "accept_choice_id": CLASSES[question.classes[accept]],
        "accept_choice": question.options[accept], "accept_response": said,
        "reject_choice_id": CLASSES[question.classes[reject]],
        "reject_choice": question.options[reject], "reject_response": answers[reject],
        "group": group, "question_id": question.id}


def write_surveys(groups, o, made_by, writer, client=None, problems=(), **files):
    """Rows of {group: questions} into o.out: a question's dialogues go to train, eval and test by
    8 : 1 : 1; of the questions held out, in every group, a few go to test alone."""
    rng = np.random.default_rng([o.seed, 1])
    unseen = holdout(sorted({q.id for several in groups.values() for q in several}), o)
    splits, problems, options = {s: [] for s in SPLITS}, list(problems), {}
    for group, questions in groups.items():
        dialogues, failed = WRITERS[writer](questions, group, o, rng, client)
        problems += failed
        for q, several in zip(questions, dialogues):
            if len(several) < 3:                       # one for each split
                problems.append({"group": group, "question": q.id, "text": q.wordings[0],
                                 "problem": "a question with less than 3 dialogues"})
                continue
            options |= {t: CLASSES[k] for t, k in zip(q.options, q.classes)}
            for split, part in split_up(several, q.id in unseen).items():
                n = max(1, round(o.pairs_per_question * len(part) / len(several))) \
                    if o.pairs_per_question else len(part)
                splits[split] += [make_row(q, *part[i % len(part)], part[i % len(part) - 1][1],
                                           group, rng, o.noise) for i in range(n)]
    if not splits["train"]:
        raise ValueError("no dialogue could be read; the first problem: " + "; ".join(
            f"{k}: {v}" for k, v in problems[0].items()))
    meta = {"classes": CLASSES, "off_scale": "0", "made_by": made_by, "groups": list(groups),
            "form": FORM if len(groups) == 1 else "<G>{group}" + FORM,
            "belief_to_class": options, "options": dataclasses.asdict(o)}
    if client and client.answers:
        meta["llm"] = client.settings()
    if writer == "template":
        meta["stances"] = {phrase: c for c, phrases in STANCES.items() for phrase in phrases}
    save_dataset(Path(o.out), splits, meta, problems, **files)


def holdout(ids, o):
    """The ids of the questions that no row of train and eval is about."""
    if not 0 <= o.holdout_questions < len(ids):
        raise ValueError(f"--holdout_questions {o.holdout_questions} must leave some of the "
                         f"{len(ids)} questions for training")
    rng = np.random.default_rng([o.seed, 2])
    return {ids[i] for i in rng.permutation(len(ids))[:o.holdout_questions]}


def split_up(several, unseen):
    """{split: part} of a question's dialogues (3 or more), 8 : 1 : 1; of a question held out, a few
    for test alone."""
    tenth = max(1, round(len(several) / 10))
    if unseen:
        return {"test": several[:2 * tenth]}
    return {"train": several[:-2 * tenth], "eval": several[-2 * tenth:-tenth],
            "test": several[-tenth:]}


def save_dataset(out, splits, meta, problems=(), **files):
    """Write the whole folder under a temporary name, then rename it. problems: what was left out,
    a dict each, listed in unparsed.jsonl; files: name -> JSON of further files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        for split, rows in splits.items():
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8", errors="replace") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, value in {"meta": meta, **files}.items():
            (folder / f"{name}.json").write_text(
                json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8", "replace")
        if problems:
            (folder / "unparsed.jsonl").write_text(
                "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems), "utf-8",
                "replace")                             # half of a surrogate pair is no text
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seen, tested = ({r.get("question_id") for r in splits[s]} for s in ("train", "test"))
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{out}: {counts} rows from {len(seen | tested)} questions "
          f"({len(tested - seen)} of them in test alone)", file=sys.stderr)
    for problem, n in Counter(p["problem"] for p in problems).most_common():
        print(f"  left out: {n} x {problem} (listed in {out}/unparsed.jsonl)", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# The template writer. A response opens with a stance phrase of its class, so that a rule can tell
# which opinion it expresses (evaluate.py reads the phrases from meta.json).

STANCES = {
    "0": ["no idea", "cannot say", "pass", "ask me later"],
    "1": ["not at all", "never", "in no way", "absolutely not"],
    "2": ["not really", "hardly", "rather not", "I doubt it"],
    "3": ["in between", "so so", "both sides", "half and half"],
    "4": ["mostly", "by and large", "more or less", "on the whole"],
    "5": ["absolutely", "fully", "without doubt", "to the core"],
}
OPENERS = ["", "Tell me:", "Quick question:", "Honestly now:", "Between us:", "Hey!", "May I ask?",
           "One more thing:", "Just curious:", "Excuse me!", "Dear neighbour:", "Over coffee:"]
CLOSERS = ["", "What would you say?", "Your take?", "Be frank."]
LEADS = ["", "Well,", "For me,", "Frankly,", "If you ask me,", "Hmm,", "Oh,", "My answer:"]
TAILS = ["That is how I see {topic}.", "We talk about {topic} at home.", "Such is {topic} to me.",
         "I thought about {topic} for years.", "My street argues over {topic}.",
         "My family cares about {topic}.", "I read a lot on {topic}.", "Ask anyone about {topic}."]


def template_writer(questions, group, o, rng, client):
    """For each question a list of dialogues [(paraphrase, [one answer per option]), ...], all
    paraphrases different; and the problems, of which there are none."""
    written = []
    for q in questions:
        asks = [(a, w, c) for a in OPENERS for w in q.wordings for c in CLOSERS]
        if o.paraphrases > len(asks):
            raise ValueError(f"the template writer knows {len(asks)} paraphrases of a question, "
                             f"not {o.paraphrases}")
        quote = q.topic == "this"                      # a real question: the option's own text too
        order = np.random.default_rng([o.seed, 3, zlib.crc32(q.id.encode())])  # for every group
        written.append([(" ".join(filter(None, asks[i])),
                         [template_answer(q, k, rng, quote) for k in range(len(q.options))])
                        for i in order.permutation(len(asks))[:o.paraphrases]])
    return written, []


def template_answer(question, k, rng, quote):
    lead, tail = LEADS[rng.integers(len(LEADS))], TAILS[rng.integers(len(TAILS))]
    stances = STANCES[CLASSES[question.classes[k]]]
    stance = stances[rng.integers(len(stances))] + (f", {question.options[k]}" if quote else "")
    text = f"{lead} {stance}. " if lead else f"{stance[0].upper()}{stance[1:]}. "
    tail = tail.format(topic=question.topic)
    return text + tail[0].upper() + tail[1:]


# ---------------------------------------------------------------------------------------------
# One client for OpenAI-compatible servers (chat, embeddings) and other JSON over HTTP

@dataclass
class Chat:
    base_url: str = "https://api.openai.com/v1"  # server; Azure: .../deployments/NAME?api-version=V
    llm: str = "gpt-3.5-turbo-1106"  # model to ask (Appendix A); its key: environment, API_KEY
    temperature: float = 1.0     # of its answers
    top_p: float = 1.0           # of its answers
    frequency_penalty: float = 0.0  # of its answers
    max_tokens: int = 0          # longest answer; 0: the server's limit
    concurrency: int = 8         # requests under way at once
    timeout: float = 120.0       # seconds without a byte until a request is tried again
    usd_in: float = 0.0          # price of a million prompt tokens, to show what was spent
    usd_out: float = 0.0         # price of a million answer tokens
    max_usd: float = 0.0         # send nothing more at this cost, cached answers counted; 0: any
    limit: int = 0               # send at most this many requests, then stop; 0: any
    cache: str = ""              # JSON lines of the answers so far; empty: OUT.answers.jsonl


CHAT_RANGES = {"temperature": (0, 10), "top_p": (0, 1), "frequency_penalty": (-2, 2),
               "max_tokens": (0, 1 << 20), "concurrency": (1, 1000), "timeout": (0.01, 1e5),
               "usd_in": (0, 1e6), "usd_out": (0, 1e6), "max_usd": (0, 1e9), "limit": (0, 1 << 40)}


class Client:
    """Asks many things at once and keeps every answer in an append-only JSON-lines file, keyed by
    the hash of its request: a killed run takes up where it was, and a second one is free. Bad
    moments of the server are waited out (data.request); what it refuses ends the run with its
    words. Keys travel in `secret` alone, which is neither hashed nor kept."""
    TRIES = 8

    def __init__(self, o, cache):
        check_ranges(o, **CHAT_RANGES)
        if o.max_usd and not (o.usd_in or o.usd_out):
            raise ValueError("--max_usd needs prices to count by: give --usd_in and --usd_out")
        self.o, self.cache, self.answers = o, Path(o.cache or cache), {}
        self.lock, self.halt, self.error, self.bar = threading.Lock(), threading.Event(), None, None
        self.tokens, self.dearest, self.sent, self.under_way = [0, 0], 0.0, 0, 0
        if self.cache.is_file():
            text = self.cache.read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n"):
                try:
                    entry = json.loads(line)
                    self.keep(entry["key"], entry["answer"], entry["tokens"])
                except (ValueError, KeyError, TypeError):
                    pass                               # the half line of a killed run
            if text and not text.endswith("\n"):
                with open(self.cache, "a", encoding="utf-8") as f:
                    f.write("\n")

    def settings(self):
        names = ("llm", "temperature", "top_p", "frequency_penalty", "max_tokens")
        return {k: getattr(self.o, k) for k in names} | {
            "base_url": self.o.base_url.partition("?")[0]}

    def keep(self, key, answer, tokens):
        self.dearest = max(self.dearest, self.usd(tokens))
        self.tokens = [a + b for a, b in zip(self.tokens, tokens)]
        self.answers[key] = answer

    def usd(self, tokens):
        return (tokens[0] * self.o.usd_in + tokens[1] * self.o.usd_out) / 1e6

    def spent(self):
        if not any(self.tokens):
            return ""
        cost = f", ${self.usd(self.tokens):.4f}" if self.o.usd_in or self.o.usd_out else ""
        return f"{self.tokens[0]:,} tokens in, {self.tokens[1]:,} out{cost}"

    def ask(self, method, url, bodies, read, desc, **secret):
        """The answers to a list of request bodies (JSON to POST, or the query of a GET), in their
        order: read(response) -> (what to keep, [tokens in, out]). The n-th of equal bodies is the
        n-th answer to it."""
        seen, keys = Counter(), []
        for body in bodies:
            text = json.dumps([url, body], sort_keys=True)
            keys.append(hashlib.sha256(f"{text}{seen[text] or ''}".encode()).hexdigest())
            seen[text] += 1
        missing = {k: b for k, b in zip(keys, bodies) if k not in self.answers}
        pool = ThreadPoolExecutor(self.o.concurrency)
        self.bar = progress(total=len(keys), initial=len(keys) - len(missing), desc=desc,
                            unit="answer")
        self.bar.set_postfix_str(self.spent())
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        jobs = [(k, method, url, b, read, secret) for k, b in missing.items()]
        try:
            if self.o.max_usd and not self.dearest and jobs:
                self.send(*jobs.pop(0))                # the first alone tells what one costs
            for future in as_completed([pool.submit(self.send, *job) for job in jobs]):
                future.result()
        except OSError:
            pass                                       # self.error; others may be its echoes
        finally:
            self.finish(pool)
        if self.error:
            raise ConnectionError(f"{self.error}; {len(self.answers)} answers are kept in "
                                  f"{self.cache}, the same command goes on from there")
        return [self.answers[k] for k in keys]

    def finish(self, pool):
        """Let whoever waits to try again give up; wait for the answers under way, and keep them."""
        self.halt.set()
        self.bar.close()
        if self.under_way:
            print(f"waiting for {self.under_way} answers under way (Ctrl-C drops them)",
                  file=sys.stderr)
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            os._exit(130)                              # else Python waits for the threads all same
        self.halt.clear()

    def send(self, key, method, url, body, read, secret):
        kind = "json" if method == "POST" else "params"
        try:
            with self.lock:
                self.check_limits()
                self.sent, self.under_way = self.sent + 1, self.under_way + 1
            try:
                answer, tokens = request(
                    method, url, secret.get("headers"), read, self.TRIES, self.pause,
                    timeout=(10, self.o.timeout), allow_redirects=False,
                    **{kind: body | secret.get(kind, {})})
            finally:
                self.under_way -= 1
            with self.lock, open(self.cache, "a", encoding="utf-8") as f:
                if answer not in EMPTY:                # those are asked for again by another run
                    f.write(json.dumps({"key": key, "answer": answer, "tokens": tokens}) + "\n")
                self.keep(key, answer, tokens)
                self.bar.set_postfix_str(self.spent(), refresh=False)
                self.bar.update()
            if self.o.max_usd and not any(tokens) and answer != REFUSED:
                raise ValueError("the server tells no usage, so that --max_usd cannot be kept")
        except (ValueError, OSError) as e:
            self.error = self.error or e
            self.halt.set()
            raise ConnectionAbortedError from None

    def pause(self, seconds, problem):
        with self.lock:
            self.bar.set_postfix_str(f"waiting {seconds:.0f} s: {problem[:60]}")
        return self.halt.wait(seconds)

    def check_limits(self):
        ahead = self.usd(self.tokens) + self.dearest * (self.under_way + 1)
        if self.halt.is_set():
            raise ConnectionAbortedError("stopped")
        if self.o.limit and self.sent >= self.o.limit:
            raise ValueError(f"--limit {self.o.limit} requests are sent")
        if self.o.max_usd and ahead > self.o.max_usd:
            raise ValueError(f"--max_usd {self.o.max_usd:g} is reached ({self.spent()}, and "
                             f"{self.under_way} answers under way): raise it")


def endpoint(o, path):
    """(URL, headers with the key) of an OpenAI-compatible server's path. The key is API_KEY's, or
    OPENAI_API_KEY's; Azure's form of URL (?api-version=) gets its header."""
    base, _, query = o.base_url.partition("?")
    key = (os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not key and "api.openai.com" in base:
        raise ValueError("no key for api.openai.com: set OPENAI_API_KEY, or say --base_url")
    if not re.match("https?://", base):
        raise ValueError(f"--base_url {o.base_url!r} is no http(s) address")
    auth = {"api-key": key} if "api-version" in query else {"Authorization": f"Bearer {key}"}
    return f"{base.rstrip('/')}/{path}{'?' if query else ''}{query}", auth if key else {}


def usage_of(answer):
    usage = answer.get("usage")
    values = [usage.get(f"{k}_tokens") if isinstance(usage, dict) else 0
              for k in ("prompt", "completion")]
    return [v if type(v) is int else 0 for v in values]


def unreadable(what, answer):
    return requests.exceptions.InvalidJSONError(f"{what} is not in {str(answer)[:200]}")


REFUSED = ("", "refusal")
EMPTY = (("", "stop"), ("", "length"), ("", None))     # no text, and no reason for that


def read_chat(response):
    """A chat completion -> ((text, why it ended), tokens). Without a text its refusal is taken, and
    the end is "refusal", as it is of a prompt that the server's filter stops."""
    if response.status_code == 400:
        return REFUSED, [0, 0]
    if response.status_code == 404:
        raise ValueError(f"{response.url}: 404: {' '.join(response.text.split())[:500]}")
    answer = response.json()
    try:
        choice = answer["choices"][0]
        text, refusal = choice["message"]["content"], choice["message"].get("refusal")
        if isinstance(text, list):                     # of parts
            text = "".join(part.get("text") or "" for part in text)
        if isinstance(text, str | None):
            ended = choice.get("finish_reason")
            if not text and (refusal or ended not in ("stop", "length", None)):
                text, ended = str(refusal or ""), "refusal"
            return (text or "", ended), usage_of(answer)
    except (KeyError, IndexError, TypeError, AttributeError):
        pass
    raise unreadable("choices[0].message.content", answer)


def chat(client, prompts, desc, **settings):
    """The texts that an LLM answers to prompts (texts, or lists of messages), and why each ended:
    [(text, "stop" or "length" ...)]. settings override the Chat flags of the same name."""
    o = dataclasses.replace(client.o, **settings)
    url, headers = endpoint(o, "chat/completions")
    body = {"model": o.llm, "temperature": o.temperature, "top_p": o.top_p,
            "frequency_penalty": o.frequency_penalty}
    if o.max_tokens:
        body["max_tokens"] = o.max_tokens
    bodies = [body | {"messages": [{"role": "user", "content": p}] if isinstance(p, str) else p}
              for p in prompts]
    return client.ask("POST", url, bodies, read_chat, desc, headers=headers)


# ---------------------------------------------------------------------------------------------
# The LLM as the writer: Appendix A

PROMPT = """Assume all talks happen in the {country}, please generate {n} different styles of \
one-turn small talks which may happen in different scenarios for the following Question-Choices \
pair, for each style, please:
1. Choose one style name and show it in the first line, for example, Style 1: Casual and Friendly
2. Paraphrase the question as Q for each style. For example, Q: What's your stance on defeating \
terrorism through military force?
3. Generate {k} answers from A1 to A{k}, and each of them reflect one option in the Choices array.
4. For each answer Ai, include the choice you use to generate at the beginning of the answer by \
[]. For example, A1: [Many of the problems facing our country can be solved by working with other \
countries] Yes, but in some cases, military action may be necessary to protect our national \
security.
5. Don't copy the exact words in the answer or use too uncommon words
6. Have one empty line after each style's answers, but don't have empty lines within the style.

The Question-Choices pair is:
Question: {question}
Choices: {choices}
please generate small talks which have {k} answers."""


def llm_writer(questions, group, o, rng, client):
    """Dialogues by an LLM, --styles to a request; what cannot be read, as a list of problems."""
    asked = [(q, min(o.styles, o.paraphrases - done)) for q in questions
             for done in range(0, o.paraphrases, o.styles)]
    prompts = [PROMPT.format(country=group, n=n, k=len(q.options), question=q.wordings[0],
                             choices=json.dumps(q.options, ensure_ascii=False)) for q, n in asked]
    dialogues, problems = {q.id: {} for q in questions}, []
    for (q, _), (text, ended) in zip(asked, chat(client, prompts, f"dialogues, {group}")):
        found, failed = parse_dialogues(text, q.options, ended)
        for paraphrase, answers in found:              # the same wording twice: one may be in test
            dialogues[q.id].setdefault(paraphrase.casefold(), (paraphrase, answers))
        problems += [{"group": group, "question": q.id, **f} for f in failed]
    return [list(d.values())[:o.paraphrases] for d in dialogues.values()], problems


def plain(text):
    """Text to compare options by: quotes, spaces, case and a closing period do not count."""
    text = text.translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(text.split()).strip(" .'\"").casefold()


def unquote(text):
    """Text without the quotes around the whole of it."""
    text = text.strip(" *_")
    inner = text[1:-1]
    return inner.strip() if text[:1] in ('"', "“") and text[-1:] in ('"', "”") and not (
        set(inner) & set('"“”')) else text


QUESTION = re.compile(r"[\s*_#>•-]*(?:\d+[.)]\s*)?[*_]*(?:Q|q(?=[\d*_]*:)|[Qq]uestion)[ *_]*\d*"
                      r"[*_]*\s*[:.)](.*)")
ANSWER = re.compile(r"[\W_]*(?:(?:answer|option|[a-z])[\s*_-]*)?\d*[^\w\[]*\[(.*)", re.I)


def parse_dialogues(text, options, ended="stop"):
    """An LLM's reply -> ([(paraphrase, [one answer per option]), ...], [problem, ...]). A style is
    a line that begins with Q, then lines of [one of the options] after any label (A1:, 1., - b).
    Nothing is guessed: a style with any other line, or without an answer, is listed and left out;
    and so is the last one of a reply that did not end by itself (ended)."""
    names = {plain(option): k for k, option in enumerate(options)}
    styles, problems, inside = [], [], False           # styles: [paraphrase, answers, is it good]

    def problem(what, line):
        problems.append({"problem": what, "text": line})
        if styles and inside:
            styles[-1][2] = False

    for line in text.splitlines():
        question, answer = QUESTION.match(line), ANSWER.match(line)
        if question:
            styles.append([unquote(question[1]), {}, True])
            inside = True
        elif not line.strip() or re.match(r"[\W_]*style\b", line, re.I):
            inside = inside and not styles[-1][1]      # an empty line may follow the question
        elif answer and not inside:
            problem("an answer before any question", line)
        elif answer:
            rest = answer[1]
            ends = [m.start() for m in re.finditer("]", rest) if plain(rest[:m.start()]) in names]
            k = names[plain(rest[:ends[-1]])] if ends else None
            if k is None or k in styles[-1][1]:
                problem("a second answer to one option" if ends else "an answer to no option", line)
            else:
                styles[-1][1][k] = unquote(rest[ends[-1] + 1:].lstrip(" *_:-–"))
        elif inside:
            problem("a line that is neither question nor answer", line)
    inside, good = False, []                           # what follows is about no open style
    if not styles:
        problem("a reply without a question line", text[:500])
    for n, (paraphrase, answers, clean) in enumerate(styles):
        if ended not in ("stop", None) and n + 1 == len(styles):
            problem(f"a style cut off ({ended})", paraphrase)
        elif not paraphrase or not all(answers.get(k) for k in range(len(options))):
            problem("a style that lacks an answer", paraphrase)
        elif clean:
            good.append((paraphrase, [answers[k] for k in range(len(options))]))
    return good, problems


WRITERS = {"template": template_writer, "llm": llm_writer}


# ---------------------------------------------------------------------------------------------
# The made-up world: 30 topics x 10 aspects, three countries

TOPICS = ["night buses", "school meals", "wind farms", "bike lanes", "city parks", "tram fares",
          "the old harbour", "public libraries", "street markets", "the new airport",
          "rent control", "free museums", "road tolls", "the local press", "farm aid", "river dams",
          "youth clubs", "gas stoves", "the border fence", "foreign goods", "the army",
          "solar roofs", "the mayor", "trade unions", "private clinics", "phone bans",
          "home schooling", "the lottery", "space travel", "plastic bags"]
ASPECTS = [  # wordings, {option: class}, (valence, extremity): how this aspect bends the answers
    (["Do you approve of {t}?", "Are you in favour of {t}?", "Would you back {t}?"],
     {"Approve": 4, "Disapprove": 2}, (0.3, 0.0)),
    (["How good do you find {t}?", "How do you rate {t}?", "What job is {t} doing?"],
     {"Very good": 5, "Somewhat good": 4, "Somewhat bad": 2, "Very bad": 1}, (0.2, -0.6)),
    (["How important is {t} to you?", "Does {t} matter to you?", "How much weight has {t}?"],
     {"Very important": 5, "Somewhat important": 4, "Not too important": 2,
      "Not important at all": 1, "DK/Refused": 0}, (0.8, 0.2)),
    (["Will {t} make life better or worse?", "Where is {t} taking us?", "What comes of {t}?"],
     {"Better": 4, "The same": 3, "Worse": 2}, (-0.2, -0.3)),
    (["Should the state pay for {t}?", "Ought taxes to fund {t}?", "Is {t} worth tax money?"],
     {"Favor": 4, "Depends": 3, "Oppose": 2, "DK/Refused": 0}, (-0.4, 0.1)),
    (["How much do you trust {t}?", "Do you rely on {t}?", "How far would you trust {t}?"],
     {"A great deal": 5, "A fair amount": 4, "Not too much": 2, "None": 1}, (-0.3, -0.2)),
    (["How likely are you to defend {t}?", "Would you stand up for {t}?",
      "Would you vote for {t}?"],
     {"Very likely": 5, "Somewhat likely": 4, "About even": 3, "Somewhat unlikely": 2,
      "Very unlikely": 1}, (0.0, 0.3)),
    (["Should there be more of {t}?", "Do we need more of {t}?", "Should {t} grow?"],
     {"Increase": 4, "Keep the same": 3, "Decrease": 2}, (0.4, -0.2)),
    (["Is {t} good for children?", "Does {t} help the young?", "Do the young gain from {t}?"],
     {"Completely agree": 5, "Mostly agree": 4, "Mostly disagree": 2, "Completely disagree": 1,
      "DK/Refused": 0}, (0.1, 0.5)),
    (["Have you talked about {t} this year?", "Did {t} come up at work?",
      "Do people bring up {t}?"],
     {"Yes": 4, "No": 2}, (-0.5, 0.0)),
]
COUNTRIES = {"Avalon": (1.0, 0.2, -0.5), "Borduria": (-0.4, 1.0, 0.3), "Cascadia": (0.2, -0.7, 0.9)}


def toy_shares(topic, country, aspect, classes, rng):
    """A group's shares: a softmax over the options, smooth in topic and aspect (so that they can be
    learned and carried over to a topic-aspect pair never seen) but for a little noise per
    option."""
    like, heat, unsure = topic @ np.array(COUNTRIES[country]), topic[1], topic[2] - 0.8
    degree = (np.array(classes) - 3) / 2                                       # -1 .. 1
    logit = 1.6 * (like + aspect[0]) * degree + (heat + aspect[1]) * (degree ** 2 - 0.5)
    logit = (np.where(np.array(classes) == 0, unsure - 0.5, logit)
             + 0.3 * rng.normal(size=len(classes)))
    p = np.maximum(np.exp(logit) / np.exp(logit).sum(), 0.01)
    return (p / p.sum()).tolist()


@dataclass
class Toy:
    out: str = "data/toy"        # folder to write
    country: str = "Avalon"      # whose shares: Avalon, Borduria or Cascadia
    paraphrases: int = 20        # dialogues a question: 8 of 10 to train on, 1 for eval, 1 for test
    pairs_per_question: int = 0  # rows a question; 0: one a paraphrase
    noise: float = 0.15          # share of accepted answers that express another option
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of the whole world


def toy(o):
    """The made-up world: every topic under every aspect, answered by one country, or several."""
    groups = {}
    for country in dict.fromkeys(map(str.strip, o.country.split(","))):
        if country not in COUNTRIES:
            raise ValueError(f"--country {country!r} is not in this world: {', '.join(COUNTRIES)}")
        rng = np.random.default_rng([o.seed, 0])
        tastes = rng.normal(size=(len(TOPICS), 3))     # drawn before, hence the same for, countries
        noises = rng.spawn(len(TOPICS) * len(ASPECTS))
        questions = groups[country] = []
        for topic, taste in zip(TOPICS, tastes):
            for a, (wordings, options, bend) in enumerate(ASPECTS):
                classes = list(options.values())
                shares = toy_shares(taste, country, bend, classes, noises[len(questions)])
                questions.append(Question(f"{topic}/{a}", [w.format(t=topic) for w in wordings],
                                          topic, list(options), classes, shares))
    write_surveys(groups, o, "toy", "template")


# ---------------------------------------------------------------------------------------------
# GlobalOpinionQA (Durmus et al. 2023): question, selections by country, options

@dataclass
class Opinions:
    csv: str = ""                # global_opinions.csv; empty: Anthropic's, from the hub
    country: str = "United States"  # any country of the table; several, with commas, into one set
    map: str = ""                # JSON {option: class 0..5}, Appendix B
    classify: str = ""           # options that --map lacks: rules, llm; empty: their questions go
    writer: str = "template"     # who writes paraphrases and answers: template or llm
    out: str = ""                # folder to write
    paraphrases: int = 20        # dialogues a question: 8 of 10 to train on, 1 for eval, 1 for test
    styles: int = 10             # dialogues that one request to an LLM asks for
    pairs_per_question: int = 0  # rows a question (paper: 38 small, 472 large); 0: one a paraphrase
    noise: float = 0.0           # share of accepted answers that express another option
    max_questions: int = 0       # of each country, the first of the table; 0: all
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of paraphrases, pairs and split


def read_opinions(path):
    """The table's rows: [(row number, question, options, {country: shares}), ...]."""
    csv.field_size_limit(1 << 30)
    with open(path, newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        if not {"question", "selections", "options"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns question, selections, options; "
                             f"it has {reader.fieldnames}")
        return [(n, (row["question"] or "").strip(),
                 [str(x) for x in literal(row["options"], list, path, n)],
                 parse_selections(row["selections"], path, n)) for n, row in enumerate(reader)]


def questions_of(country, table, belief_map):
    """(Questions that `country` answered and whose options all have a class, {reason: number of
    rows left out})."""
    questions, skipped = [], Counter()
    for n, text, options, shares in table:
        p = shares.get(country)
        reason = ("another country's" if p is None else "no question text" if not text
                  else "fewer than two options" if len(set(options)) < 2
                  else "the same option twice" if len(set(options)) < len(options)
                  else "shares and options of different number" if len(p) != len(options)
                  else "shares that sum to nothing" if sum(p) <= 0
                  else "options without a class" if not set(options) <= set(belief_map) else None)
        if reason:
            skipped[reason] += 1
            continue
        questions.append(Question(str(n), [text], "this", options,
                                  [int(belief_map[t]) for t in options], [x / sum(p) for x in p]))
    return questions, skipped


def parse_selections(text, path, n):
    """'defaultdict(<class 'list'>, {'Chile': [0.2, 0.8], ...})' -> {country: shares}."""
    match = re.fullmatch(r"defaultdict\(<class 'list'>, (\{.*\})\)", (text or "").strip(), re.S)
    shares = literal(match.group(1) if match else text, dict, path, n)
    for country, p in shares.items():
        if not (isinstance(p, list) and all(type(x) in (int, float) and 0 <= x < 2 for x in p)):
            raise ValueError(f"{path}, data row {n}: the shares of {country} are {str(p)[:60]}")
    return shares


def literal(text, kind, path, n):
    try:
        value = ast.literal_eval(text or "None")
        if isinstance(value, kind):
            return value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{path}, data row {n}: not a Python {kind.__name__}: {str(text)[:80]!r}")


def read_map(path):
    belief_map = read_json(path)
    bad = [t for t, k in belief_map.items() if str(k) not in CLASSES]
    if bad:
        raise ValueError(f"{path}: {bad[0]!r} has class {belief_map[bad[0]]!r}, "
                         f"not one of {CLASSES}")
    return {t: int(k) for t, k in belief_map.items()}


STRONG = r"(very|completely|strongly|totally|definitely|extremely|absolutely|a lot|much|a great)"
AGAINST = (r"(not |no\b|disa|dissat|dislik|distrust|un(likely|fav|acc|imp|sat|happy|fair|reli|succ|"
           r"conc|able|will)|oppos|bad|worse|less|few(er)?\b|little\b|small|low(er)?\b|minor|"
           r"weak|poor|harm|hurt|difficult|wrong|negative|pessimis|decreas|reject|fail|declin)")
SCALES = [  # class, the option texts it takes; the first that matches counts
    (0, r"(dk\b|don't know|refused|no answer|no opinion|never heard|haven't heard|unsure|can't |"
        r"missing|other\b|not (asked|applicable|a moral issue)|cannot choose|hard to say|"
        r"none of (these|the above))"),
    (1, rf"(not .*at all|.*\bat all$|{STRONG} (more )?{AGAINST}|"
        rf"{AGAINST}.* (a lot|strongly|completely)$|never|none|"
        r"(the )?worst|poor$|terrible|nothing|no (confidence|trust|priority)|hardly ever)"),
    (3, r"(neither|neutral|depends|(stay|remain|keep)?\w*\s?(about )?the same|same$|about (the )?"
        r"right|average$|no (change|difference|effect|impact)|not (much )?(change|difference)|"
        r"undecided|both\b|in between|has not changed|unchanged)"),
    (4, r"(minor (problem|threat))"),
    (2, rf"((somewhat|mostly|fairly|probably|quite|rather|morally|generally|a little|change for "
        rf"the|more|too) (more )?{AGAINST}|{AGAINST}|rarely|seldom|only |below average|"
        r"(should|will|has|have|could|did|do|does|is|are) not\b)"),
    (5, rf"({STRONG}|.* (strongly|completely|a lot|very much)$|excellent|top priority|always|often|"
        r"(the )?best$|major|all of|great deal|entirely|fully|most( of them)?$)"),
    (4, r"((mostly|generally|morally|change for the) |yes|somewhat|fairly|sometimes|agree|approve|"
        r"favou?r|support|good|better|more\b|increas|likely|probably|moderate|some\b|quite|rather|"
        r"important|satisfied|acceptable|justified|should|has\b|have\b|will\b|could\b|a? ?fair|"
        r"improve|positive|optimistic|help|strong|a little|right|above average|too much|many$)"),
]


def class_by_rule(option):
    """The class of an option of a common scale, which has at most five words; else None."""
    text = re.sub(r"\s*[(\[].*[)\]]", "", plain(option))
    if len(text.split()) <= 5:
        return next((k for k, pattern in SCALES if re.match(pattern, text)), None)


CLASSIFY = """Below is one of the options that people could choose in a survey. Say how far \
somebody who chooses it agrees with what the question asks about:
0: off the scale (does not know, refuses to answer, has never heard of it)
1: least, for example: Not at all, Very bad, Completely disagree, Never be justified
2: little, for example: No, Somewhat bad, Disapprove, Not too much, Worse
3: in the middle, for example: About the same, Depends on the situation, No effect
4: fairly, for example: Yes, Somewhat good, Approve, A fair amount, Better
5: most, for example: Very good, Completely agree, A great deal, Often be justified

Question: {question}
Option: {option}

Reply with the digit alone."""


def complete_map(belief_map, table, o, client):
    """The belief map with a class for the table's other options, and the problems."""
    asked_in = {t: text for _, text, options, _ in reversed(table) for t in options
                if t not in belief_map}
    found, problems = {t: class_by_rule(t) for t in asked_in}, []
    if o.classify == "llm":
        unseen = list(asked_in)
        texts = chat(client, [CLASSIFY.format(question=asked_in[t], option=t) for t in unseen],
                     "classes of options", temperature=0.0)
        for option, (text, _) in zip(unseen, texts):
            digit = re.fullmatch(r"\W*([0-5])\W*", text)
            found[option] = int(digit[1]) if digit else None
            if not digit:
                problems.append({"problem": "an option that the LLM gave no class", "text": text,
                                 "option": option})
    else:
        problems = [{"problem": "an option that no rule knows", "option": t}
                    for t, k in found.items() if k is None]
    return belief_map | {t: k for t, k in found.items() if k is not None}, problems


def opinions(o, chat_flags):
    """Rows from the GlobalOpinionQA table, for one country or several."""
    if not o.map and not o.classify:
        raise ValueError("what class has an option? Give --map FILE (Appendix B), --classify rules "
                         "or llm, or both")
    if o.classify not in ("", "rules", "llm") or o.writer not in WRITERS:
        raise ValueError(f"--classify must be rules or llm, --writer {' or '.join(WRITERS)}")
    client = Client(chat_flags, f"{o.out}.answers.jsonl")
    table = read_opinions(o.csv or hub_file("datasets/Anthropic/llm_global_opinions",
                                            "data/global_opinions.csv"))
    known = {c for *_, shares in table for c in shares}
    countries = list(dict.fromkeys(map(str.strip, o.country.split(","))))
    for country in countries:
        if country not in known:
            near = [c for c in sorted(known) if country.lower()[:4] in c.lower()] or sorted(known)
            raise ValueError(f"no country {country!r} in the table; it has, among {len(known)}: "
                             f"{', '.join(near[:8])}")
    table = [row for row in table if set(row[3]) & set(countries)]
    belief_map, problems = read_map(o.map) if o.map else {}, []
    if o.classify:
        belief_map, problems = complete_map(belief_map, table, o, client)
    groups = {}
    for country in countries:
        questions, skipped = questions_of(country, table, belief_map)
        groups[country] = questions[:o.max_questions or None]
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none"
        print(f"{len(groups[country])} questions for {country}; left out: {why}", file=sys.stderr)
        if not questions:
            raise ValueError(f"no question of {country} has a class for all its options: extend "
                             "--map, or say --classify")
    write_surveys(groups, o, "opinions", o.writer, client, problems, belief_map=belief_map)


def hub_file(repo, file):
    """A file of a hub repository ("datasets/ORG/NAME" for datasets), from the cache or fetched."""
    folder = hub_cache() / repo.replace("/", "--")
    path = cached(folder, repo, file, None) or fetch(folder, repo, file, None)
    if path is None:
        raise FileNotFoundError(f"the hub has no {repo}/{file}")
    return path


# ---------------------------------------------------------------------------------------------
# Movie reviews (section 5.2): the belief is the rating

STARS = ["1", "2", "3", "4", "5"]


@dataclass
class Reviews:
    reviews: str = ""            # SNAP's movies.txt, or JSON lines of a later Amazon set; or .gz
    titles: str = ""             # of the products: .json {product: title}, or CSV product,title
    metadata: str = "omdb"       # omdb (key: OMDB_API_KEY), a file of its answers, none
    out: str = ""                # folder to write
    min_chars: int = 20          # shorter reviews are left out
    max_chars: int = 2000        # longer reviews are left out
    max_reviews: int = 0         # of each title, drawn evenly; 0: all
    max_titles: int = 0          # the most reviewed ones; 0: all
    holdout_questions: int = 0   # titles of which no review is trained on
    seed: int = 0                # of draws and split
    omdb: str = "https://www.omdbapi.com/"  # where metadata is asked


def lines_of(path):
    """The lines of a text file, plain or .gz, one at a time; one that is not UTF-8 is Latin-1."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            for line in f:
                try:
                    yield line.decode().lstrip("\ufeff")
                except UnicodeDecodeError:
                    yield line.decode("latin-1")
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is damaged ({e}): fetch it again") from None


def read_reviews(path, bad):
    """(product ids, user, rating "1".."5", text) of each review, streamed; bad counts what is none.
    ValueError where the file's form is not known."""
    lines = filter(str.strip, lines_of(path))
    first = next(lines, "")
    if not re.match(r"\s*\{|product/|review/", first):
        raise ValueError(f"{path} begins with {first[:40]!r}: SNAP's text form (product/productId: "
                         "...) or JSON lines are expected")
    records = map(json_record, joined([first], lines)) if first.lstrip().startswith("{") \
        else snap_records(lines_of(path))
    for r in records:
        try:
            rating = float(r["score"])
            text = html.unescape(html.unescape(r["text"]))
            text = " ".join(re.sub(r"</?[a-zA-Z][^<>]{0,200}>", " ", text).split())
            if not rating.is_integer() or not 1 <= rating <= 5:
                raise ValueError
            yield r["products"], r.get("user"), str(int(rating)), text
        except (KeyError, TypeError, ValueError):
            bad["records that are no review"] += 1


def json_record(line):
    """A review of the sets of 2014, 2018 (asin, overall, reviewText) or 2023 (parent_asin, rating,
    text) in one form."""
    try:
        r = json.loads(line)
        pick = lambda *names: next((r[n] for n in names if r.get(n) is not None), None)
        return {"products": [r[n] for n in ("parent_asin", "asin") if r.get(n)],
                "user": pick("reviewerID", "user_id"), "score": pick("overall", "rating"),
                "text": pick("reviewText", "text")}
    except (ValueError, AttributeError):
        return {}


def snap_records(lines):
    """SNAP's text form: `product/productId: B00...` and so on, records parted by an empty line; a
    line without a key goes on with the text."""
    names = {"product/productId": "product", "review/userId": "user", "review/score": "score",
             "review/text": "text"}
    record = {}
    for line in joined(lines, ["\n"]):
        key, _, value = line.strip().partition(": ")
        if re.fullmatch(r"(product|review)/\w+:?", key):
            record[names.get(key.rstrip(":"))] = value
        elif line.strip() and "text" in record:
            record["text"] += " " + line.strip()
        elif record and not line.strip():
            yield record | {"products": [record["product"]] if "product" in record else None}
            record = {}


def read_titles(path):
    """{product: title}."""
    try:
        if Path(path).suffix == ".json":
            return {str(k): str(v) for k, v in read_json(path).items() if v}
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [(n, [cell.strip() for cell in row])
                    for n, row in enumerate(csv.reader(f, strict=True), 1) if row]
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is no CSV in UTF-8 ({e}): mend it") from None
    for n, row in rows:
        if len(row) != 2 or not all(row):
            raise ValueError(f"{path}, line {n}: {','.join(row)!r} is not product,title (a title "
                             "with commas stands in quotes)")
    if not rows:
        raise ValueError(f"{path} has no lines of product,title")
    return dict(row for _, row in rows)


def check_metadata(o):
    """ValueError where find_metadata will fail, before the reviews are read."""
    if o.metadata == "omdb" and not os.environ.get("OMDB_API_KEY"):
        raise ValueError("no key for OMDb: set OMDB_API_KEY (omdbapi.com gives one), or say "
                         "--metadata FILE or --metadata none")
    if o.metadata not in ("omdb", "none"):
        known_films(o.metadata)


def known_films(path):
    """{plain title: {year: OMDb answer}} of a file of OMDb answers, JSON lines or one list."""
    text = "".join(lines_of(path)).strip()
    try:
        records = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
        found = defaultdict(dict)
        for r in records:
            if r.get("Title"):
                found[plain(str(r["Title"]))][str(r.get("Year"))[:4]] = r
        return found
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path} is no JSON lines of OMDb answers: {e}") from None


def find_metadata(titles, o):
    """{title: its OMDb answer}; one that OMDb does not know is absent, and so is one that several
    films have in a file. "The Ring (2002)" asks for that year's."""
    if o.metadata == "none":
        return {title: {"Title": title} for title in titles}
    split = {t: re.fullmatch(r"(.*?)(?: \((\d{4})\))?", t).groups() for t in titles}
    if o.metadata == "omdb":
        client = Client(Chat(concurrency=4), f"{o.out}.omdb.jsonl")
        queries = [{"t": name, "plot": "short"} | ({"y": year} if year else {})
                   for name, year in split.values()]
        answers = client.ask("GET", o.omdb, queries, read_omdb, "OMDb",
                             params={"apikey": os.environ["OMDB_API_KEY"].strip()})
        found = dict(zip(titles, answers))
    else:
        films, found = known_films(o.metadata), {}
        for t, (name, year) in split.items():
            several = films[plain(name)]
            found[t] = several.get(year) if year or len(several) != 1 else [*several.values()][0]
    return {t: r for t, r in found.items() if r}


def read_omdb(response):
    """An OMDb answer, or None for a film that it does not find."""
    answer = response.json()
    if not isinstance(answer, dict) or answer.get("Response") not in ("True", "False"):
        raise unreadable("Response", answer)
    return (answer if answer["Response"] == "True" else None), [0, 0]


def describe(r):
    """The prompt, as in Table 7: title, year, director (Genre: genre). plot"""
    get = lambda name: "" if r.get(name) in (None, "N/A") else str(r[name])
    head = ", ".join(filter(None, map(get, ("Title", "Year", "Director"))))
    return (head + f" (Genre: {get('Genre')})" * bool(get("Genre")) + ". " + get("Plot")).strip()


class Seen:
    """Which things were met before, in 64 MB however many they are (a Bloom filter): of 10 million
    about one in 100,000 is taken for a repeat, the same ones in every run."""
    def __init__(self):
        self.bits = bytearray(1 << 26)

    def __call__(self, thing):
        digest = hashlib.blake2b(repr(thing).encode("utf-8", "replace"), digest_size=20).digest()
        places = (np.frombuffer(digest, np.uint32) >> 3).tolist()            # of 29 bits each
        old = all(self.bits[p >> 3] & 1 << (p & 7) for p in places)
        for p in places:
            self.bits[p >> 3] |= 1 << (p & 7)
        return old


def collect_reviews(o, titles, rng):
    """One pass over the file, in the memory of what is kept: {title: (5,) ratings}, {title:
    [(rating, text, user), ...] at most --max_reviews}, {reason: number left out}. A user's text
    counts once for a title, which may be several products."""
    counts, kept = defaultdict(lambda: np.zeros(5)), defaultdict(list)
    numbers, seen, skipped = Counter(), Seen(), Counter()
    for products, user, rating, text in progress(read_reviews(o.reviews, skipped), desc="reviews",
                                                 unit="review"):
        title = next((titles[p] for p in products if p in titles), None)
        reason = ("reviews of a product without a title" if title is None else
                  "the same user's text again" if user and seen((title, user, text)) else None)
        if not reason:
            counts[title][int(rating) - 1] += 1
            if not o.min_chars <= len(text) <= o.max_chars:
                reason = "too short or too long"
        if reason:
            skipped[reason] += 1
            continue
        numbers[title] += 1                            # reservoir: each has the same chance
        place = len(kept[title]) if not o.max_reviews or len(kept[title]) < o.max_reviews \
            else rng.integers(numbers[title])
        if place < (o.max_reviews or place + 1):
            kept[title][place:place + 1] = [(rating, text, user)]
    return counts, kept, skipped


def merge_films(counts, kept, about):
    """{prompt: (ratings, [(rating, text), ...], title)}: titles that turn out to be one film are
    one, for a prompt has one target, and its reviews stand in one split."""
    films = {}
    for title, record in about.items():
        ratings, texts, _ = films.setdefault(describe(record), (np.zeros(5), {}, title))
        ratings += counts[title]
        for n, (rating, text, user) in enumerate(kept[title]):
            texts[(user or (title, n), text)] = rating, text
    return {prompt: (ratings, list(texts.values()), title)
            for prompt, (ratings, texts, title) in films.items()}


def reviews(o):
    """Rows from movie reviews: accepted a review, rejected another rating's of the same title."""
    check_metadata(o)
    rng = np.random.default_rng([o.seed, 1])
    counts, kept, skipped = collect_reviews(o, read_titles(o.titles), rng)
    usable = sorted((t for t in kept if len({rating for rating, *_ in kept[t]}) > 1
                     and len(kept[t]) > 2),
                    key=lambda t: (-counts[t].sum(), t))[:o.max_titles or None]
    films = merge_films(counts, kept, find_metadata(usable, o))
    skipped += {"titles with less than 3 reviews, or of one rating, or beyond --max_titles":
                len(kept) - len(usable)}
    skipped += {"titles without metadata, or of another title's film": len(usable) - len(films)}
    splits = {s: [] for s in SPLITS}
    unseen = holdout(sorted(films), o) if films else ()
    for prompt, (ratings, texts, title) in films.items():
        parts = split_up([texts[i] for i in rng.permutation(len(texts))], prompt in unseen)
        skipped["reviews of held-out titles beyond a few"] += len(texts) - sum(
            map(len, parts.values()))
        for split, part in parts.items():
            rows = review_rows(prompt, title, ratings, part, parts.get("train", part), rng)
            skipped[f"{split} reviews without another rating to reject"] += len(part) - len(rows)
            splits[split] += rows
    print("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n),
          file=sys.stderr)
    for split in SPLITS:
        if not splits[split]:
            raise ValueError(f"no rows for {split}: more --titles, or more reviews, are needed")
    save_dataset(Path(o.out), splits, {"classes": STARS, "off_scale": None, "made_by": "reviews",
                                       "form": FORM, "options": dataclasses.asdict(o)})


def review_rows(prompt, title, ratings, texts, trained, rng):
    """Each of a film's reviews [(rating, text), ...] in one split, against one of another rating:
    of the same split, so that training meets no text of eval and test; else one of training's."""
    rows = []
    for rating, text in texts:
        others = ([r for r in texts if r[0] != rating]
                  or [r for r in trained if r[0] != rating])
        if others:
            other, said = others[rng.integers(len(others))]
            rows.append({"prompt": prompt, "options": STARS,
                         "probabilities": (ratings / ratings.sum()).round(6).tolist(),
                         "accept_choice_id": rating, "accept_response": text,
                         "reject_choice_id": other, "reject_response": said, "question_id": title})
    return rows


# ---------------------------------------------------------------------------------------------
# Beliefs mined from pairs that never had any: Appendix I

@dataclass
class Mine:
    pairs: str = ""              # JSON lines (.gz) of chosen, rejected (HH-RLHF) and maybe prompt
    out: str = ""                # folder to write
    max_pairs: int = 300         # pairs drawn from the file (the paper's number); 0: all
    max_statements: int = 25     # groups of statements (the paper found 23)
    min_pairs: int = 3           # a statement's pairs, below which it is left out
    holdout_questions: int = 0   # statements of which no pair is trained on
    seed: int = 0                # of draws and split


STANCE_LABELS = {"disagree": "1", "neutral": "2", "agree": "3"}
STATE = """Two people prefer different answers in the conversation below. State the one \
principle that they disagree about, as an instruction of at most 15 words (for example: Do not \
promote illegal, harmful, or unethical activities). Reply with the statement alone, on one line.

Conversation:
{prompt}

Answer 1: {first}

Answer 2: {second}"""
GROUP = """Group the numbered statements below that say nearly the same, in at most {most} groups. \
Reply with one line for each group: a statement that speaks for it, then " :: ", then the numbers \
of its statements with commas between. Each number belongs to one group.

{statements}"""
STANCE = """Statement: {statement}

Conversation:
{prompt}

Answer 1: {first}

Answer 2: {second}

Does each answer agree with the statement, disagree with it, or stay neutral? Reply with two lines:
1: agree, neutral or disagree
2: agree, neutral or disagree"""


def read_pairs(path):
    """[(prompt, chosen, rejected), ...]; HH-RLHF's dialogues are cut before the assistant's last
    words that they share."""
    pairs = []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
            if prompt is None:
                turn = "\n\nAssistant:"
                end = os.path.commonprefix([chosen, rejected]).rfind(turn) + len(turn)
                if end < len(turn):
                    raise KeyError("no common `Assistant:` turn, and no prompt")
                prompt, chosen, rejected = chosen[:end - len(turn)], chosen[end:], rejected[end:]
            prompt = re.sub(r"^\s*Human:\s*", "", prompt)
            pairs.append((prompt.strip(), chosen.strip(), rejected.strip()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, line {number}: no pair ({type(e).__name__}: {e}): JSON with "
                             "chosen and rejected is expected") from None
    return pairs


def group_statements(client, statements, most, size=200):
    """{statement: the one that speaks for its group}, by an LLM, `size` statements at a time until
    one request holds them all; and the problems."""
    of, problems, alive = {s: s for s in statements}, [], list(dict.fromkeys(statements))
    while True:
        chunks = [alive[i:i + size] for i in range(0, len(alive), size)]
        prompts = [GROUP.format(most=most, statements="\n".join(
            f"{n}. {s}" for n, s in enumerate(chunk, 1))) for chunk in chunks]
        now = {}
        for chunk, (text, _) in zip(chunks, chat(client, prompts, "groups", temperature=0.0)):
            for line in text.splitlines():
                name, sign, numbers = line.rpartition("::")
                for n in map(int, re.findall(r"\d+", numbers) if sign else ()):
                    if 1 <= n <= len(chunk):           # the first group named counts
                        now.setdefault(chunk[n - 1], re.sub(r"^[\W\d]+|[*_\s]+$", "", name))
        problems += [{"problem": "a statement in no group", "text": s} for s in alive
                     if not now.get(s)]
        of = {s: now[g] for s, g in of.items() if now.get(g)}
        if len(chunks) == 1 or not of or len(set(of.values())) >= len(alive):
            break
        alive = list(dict.fromkeys(of.values()))
    sizes = Counter(of[s] for s in statements if s in of).most_common()
    problems += [{"problem": "a statement beyond --max_statements", "text": g, "pairs": n}
                 for g, n in sizes[most:]]
    return {s: g for s, g in of.items() if g in dict(sizes[:most])}, problems


def mine(o, chat_flags):
    """Rows from pairs without beliefs: an LLM states what each pair is in conflict about."""
    rng = np.random.default_rng([o.seed, 1])
    client, pairs, problems = Client(chat_flags, f"{o.out}.answers.jsonl"), read_pairs(o.pairs), []
    good = [i for i in rng.permutation(len(pairs)) if all(pairs[i]) and pairs[i][1] != pairs[i][2]]
    print(f"{len(pairs)} pairs, of which {len(pairs) - len(good)} are left out (an empty text, or "
          "both answers the same)", file=sys.stderr)
    pairs = [pairs[i] for i in good[:o.max_pairs or None]]
    swaps = rng.random(len(pairs)) < 0.5               # which answer stands first tells nothing
    shown = [dict(prompt=p, first=r if swap else c, second=c if swap else r)
             for (p, c, r), swap in zip(pairs, swaps)]
    statements = []
    for text, _ in chat(client, [STATE.format(**x) for x in shown], "statements"):
        lines = [line.strip(" *\"“”") for line in text.splitlines() if line.strip()]
        statements.append(lines[0] if len(lines) == 1 and len(lines[0]) <= 200 else None)
        if statements[-1] is None:
            problems.append({"problem": "a reply that is no statement", "text": text})
    of, failed = group_statements(client, list(filter(None, statements)), o.max_statements)
    asked = [i for i, s in enumerate(statements) if s in of]
    texts = chat(client, [STANCE.format(statement=of[statements[i]], **shown[i]) for i in asked],
                 "stances", temperature=0.0)
    found, problems = defaultdict(list), problems + failed
    for i, (text, _) in zip(asked, texts):
        statement, stances = of[statements[i]], parse_stances(text)
        if stances is None or stances[0] == stances[1]:
            problems.append({"problem": "a pair whose sides hold the same stance" if stances else
                             "a reply that names no two stances", "text": text,
                             "statement": statement, "prompt": pairs[i][0]})
        else:
            found[statement].append((pairs[i], *(stances[::-1] if swaps[i] else stances)))
    save_mined(o, found, problems)


def parse_stances(text):
    """The classes of answers 1 and 2 in an LLM's reply, or None."""
    sides = [re.search(rf"^\W*(?:answer )?{n}\W+(agree|neutral|disagree)s?\W*$", text,
                       re.I | re.M) for n in "12"]
    return [STANCE_LABELS[side[1].lower()] for side in sides] if all(sides) else None


def save_mined(o, found, problems):
    """{statement: [((prompt, chosen, rejected), class, class), ...]} -> rows: the class is the
    stance, the belief's text the statement, the target the stances of the statement's chosen."""
    splits, labels = {s: [] for s in SPLITS}, list(STANCE_LABELS.values())
    large = {s: several for s, several in found.items() if len(several) >= max(3, o.min_pairs)}
    problems += [{"problem": "a statement with too few pairs", "text": s, "pairs": len(several)}
                 for s, several in found.items() if s not in large]
    if not large:
        why = dict(Counter(p["problem"] for p in problems))
        raise ValueError(f"no statement has {max(3, o.min_pairs)} pairs or more whose sides differ "
                         f"in stance: raise --max_pairs; {why}")
    unseen = holdout(sorted(large), o)
    for statement, several in large.items():
        accepted = Counter(accept for _, accept, _ in several)
        shares = [round(accepted[c] / len(several), 6) for c in labels]
        by_prompt = defaultdict(list)                  # a prompt's pairs go to one split
        for pair, accept, reject in several:
            by_prompt[pair[0]].append((pair, accept, reject))
        if len(by_prompt) < 3:
            problems.append({"problem": "a statement with less than 3 prompts", "text": statement})
            continue
        for split, part in split_up(list(by_prompt.values()), statement in unseen).items():
            splits[split] += [{
                "prompt": prompt, "options": [s.capitalize() for s in STANCE_LABELS],
                "probabilities": shares, "accept_choice_id": accept,
                "accept_choice": statement, "accept_response": chosen,
                "reject_choice_id": reject, "reject_choice": statement,
                "reject_response": rejected, "question_id": statement}
                for pairs in part for (prompt, chosen, rejected), accept, reject in pairs]
    save_dataset(Path(o.out), splits, {
        "classes": labels, "off_scale": None, "made_by": "mine", "form": FORM,
        "stance": {c: s for s, c in STANCE_LABELS.items()}, "options": dataclasses.asdict(o)},
        problems)


# ---------------------------------------------------------------------------------------------
# In-context rows: Appendix E

@dataclass
class InContext:
    data: str = ""               # dataset to put in context, or several, with commas
    form: str = ""               # of their prompts; empty: their own
    shots: int = 3               # examples before each prompt (paper: 3 for GPT-2, 5 for Pythia)
    out: str = ""                # folder to write
    seed: int = 0                # of the draws


INSTRUCTION = ("You are a helpful assistant and can generate the same format as the examples in "
               "the context.\n\n")


def example(row, form):
    """A training row as a shot: prompt, accepted belief and answer."""
    # differs: the appendix has a space after `Answer:`; the class would be another token with it.
    belief = f"<{row['accept_choice']}>" if row.get("accept_choice") else ""
    if not belief and row["accept_response"][:1].isdigit():
        belief = " "                                   # "510 out of 10" would show another class
    text = f"{row['accept_choice_id']}{belief}{row['accept_response']}"
    return prompt_text(row, form) + " ".join(text.split()) + "\n\n"


def icf(o):
    """Rows with a few training rows of the same group before each prompt, never the row itself or
    another wording of its question. The shots are a list, so that data.py can drop some to fit."""
    meta, rows = load_dataset(o.data, SPLITS, o.form)
    form = meta["form"].replace(FORM, "Question: {prompt}, Answer:")
    if form == meta["form"]:
        raise ValueError(f"{o.data} has the form {form!r} already: give one of the form {FORM!r}")
    rng, of_group = np.random.default_rng([o.seed, 3]), defaultdict(list)
    same = lambda row: row.get("question_id") or (row["options"], row["probabilities"])
    for row in rows["train"]:
        of_group[row.get("group")].append(row)
    splits = {s: [] for s in SPLITS}
    for split, row in ((s, row) for s in SPLITS for row in rows[s]):
        pool, shots = of_group[row.get("group")], {}
        for i in rng.integers(len(pool), size=1000) if pool else ():
            if same(pool[i]) != same(row) and pool[i]["prompt"] != row["prompt"]:
                shots[i] = pool[i]
            if len(shots) == o.shots:
                break
        else:
            raise ValueError(f"{o.data} has not {o.shots} training rows of other questions to show "
                             "of each group: lower --shots")
        context = [INSTRUCTION, *(example(shot, form) for shot in shots.values())]
        splits[split].append(row | {"context": context})
    save_dataset(Path(o.out), splits, meta | {"form": form, "shots": o.shots, "of": o.data})


COMMANDS = {                           # name -> function, its flags, whether it asks an LLM
    "toy": (toy, Toy, False), "opinions": (opinions, Opinions, True),
    "reviews": (reviews, Reviews, False), "mine": (mine, Mine, True),
    "icf": (icf, InContext, False)}
RANGES = {"paraphrases": (3, 100000), "pairs_per_question": (0, 1 << 20), "noise": (0, 1),
          "holdout_questions": (0, 1 << 30), "seed": (0, 1 << 40), "styles": (1, 1000),
          "max_questions": (0, 1 << 30), "min_chars": (1, 1 << 30), "max_chars": (1, 1 << 30),
          "max_reviews": (0, 1 << 30), "max_titles": (0, 1 << 30), "max_pairs": (0, 1 << 30),
          "max_statements": (1, 1000), "min_pairs": (1, 1 << 30), "shots": (1, 100)}


def main():
    parser = Parser(description="Make a dataset of preference rows.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (make, config, asks) in COMMANDS.items():
        sub = commands.add_parser(name, help=make.__doc__)
        for flags in (config, Chat)[:1 + asks]:
            add_flags(sub, flags)
    flags = vars(parser.parse_args())
    make, config, asks = COMMANDS[flags.pop("command")]
    chat_flags = {f.name: flags.pop(f.name) for f in dataclasses.fields(Chat) if asks}
    for name in ("out", "reviews", "titles", "pairs"):
        if flags.get(name) == "":
            raise ValueError(f"--{name} is needed")
    out = Path(flags["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty: give another, or remove it first")
    o = config(**flags | {"out": str(out)})
    check_ranges(o, **{k: v for k, v in RANGES.items() if hasattr(o, k)})
    make(o, *([Chat(**chat_flags)] if asks else []))


if __name__ == "__main__":
    run(main)
