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


def write_surveys(groups, o, made_by, client=None, problems=(), **files):
    """Rows of {group: questions} into o.out: a question's dialogues go to train, eval and test by
    8 : 1 : 1; of the questions held out, in every group, a few go to test alone."""
    rng = np.random.default_rng([o.seed, 1])
    unseen = holdout(sorted({q.id for several in groups.values() for q in several}), o)
    splits, problems, options = {s: [] for s in SPLITS}, list(problems), {}
    for group, questions in groups.items():
        dialogues, failed = WRITERS[o.writer](questions, group, o, rng, client)
        problems += failed
        for q, several in zip(questions, dialogues):
            if len(several) < 3:                       # one for each split
                problems.append({"group": group, "question": q.id, "text": q.wordings[0],
                                 "problem": "a question with less than 3 dialogues"})
                continue
            options |= {t: CLASSES[k] for t, k in zip(q.options, q.classes)}
            for n in range(o.pairs_per_question or len(several)):
                i = n % len(several)
                row = make_row(q, *several[i], several[i - 1][1], group, rng, o.noise)
                if split := split_of(i, len(several), q.id in unseen):
                    splits[split].append(row)
    if not splits["train"]:
        raise ValueError(f"no dialogue could be read: see {problems[0] if problems else o.out}")
    meta = {"classes": CLASSES, "off_scale": "0", "made_by": made_by, "groups": list(groups),
            "form": FORM if len(groups) == 1 else "<G>{group}" + FORM,
            "belief_to_class": options, "options": dataclasses.asdict(o)}
    if o.writer == "template":
        meta["stances"] = {phrase: c for c, phrases in STANCES.items() for phrase in phrases}
    save_dataset(Path(o.out), splits, meta, problems, **files)


def holdout(ids, o):
    """The ids of the questions that no row of train and eval is about."""
    if not 0 <= o.holdout_questions < len(ids):
        raise ValueError(f"--holdout_questions {o.holdout_questions} must leave some of the "
                         f"{len(ids)} questions for training")
    rng = np.random.default_rng([o.seed, 2])
    return {ids[i] for i in rng.permutation(len(ids))[:o.holdout_questions]}


def split_of(i, n, unseen):
    """The split of the i-th of a question's n dialogues; None for some of a question held out."""
    tenth = max(1, round(n / 10))
    if unseen:
        return "test" if i < 2 * tenth else None
    return "test" if n - i <= tenth else "eval" if n - i <= 2 * tenth else "train"


def check_free(out):
    """ValueError where a dataset cannot be written, before work is spent on it."""
    if not str(out) or Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"--out {out} is not empty: give another, or remove it first" if str(out)
                         else "--out is needed: the folder to write")


def save_dataset(out, splits, meta, problems=(), **files):
    """Write the whole folder under a temporary name, then rename it. problems: what was left out,
    a dict each, listed in unparsed.jsonl; files: name -> JSON of further files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        for split, rows in splits.items():
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, value in {"meta": meta, **files}.items():
            (folder / f"{name}.json").write_text(
                json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if problems:
            (folder / "unparsed.jsonl").write_text(
                "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems), "utf-8")
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
        written.append([(" ".join(filter(None, asks[i])),
                         [template_answer(q, k, rng, quote) for k in range(len(q.options))])
                        for i in rng.permutation(len(asks))[:o.paraphrases]])
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
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        self.lock, self.halt = threading.Lock(), threading.Event()
        self.tokens, self.dearest, self.sent, self.under_way = [0, 0], 0.0, 0, 0
        self.error = None                              # what ended the run, before its echoes
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

    def keep(self, key, answer, tokens):
        self.answers[key] = answer
        self.tokens = [a + b for a, b in zip(self.tokens, tokens)]
        self.dearest = max(self.dearest, self.usd(tokens))

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
        futures = [pool.submit(self.send, k, method, url, b, read, secret)
                   for k, b in missing.items()]
        bar = progress(total=len(keys), initial=len(keys) - len(missing), desc=desc, unit="answer")
        bar.set_postfix_str(self.spent())
        try:
            for future in as_completed(futures):
                future.result()
                bar.set_postfix_str(self.spent(), refresh=False)
                bar.update()
        except OSError:
            raise self.error
        finally:
            self.halt.set()                            # whoever waits to try again gives up
            pool.shutdown(cancel_futures=True)         # answers under way are waited for, and kept
            self.halt.clear()
            bar.close()
        return [self.answers[k] for k in keys]

    def send(self, key, method, url, body, read, secret):
        kind = "json" if method == "POST" else "params"
        try:
            with self.lock:
                self.check_limits()
                self.sent, self.under_way = self.sent + 1, self.under_way + 1
            try:
                answer, tokens = request(
                    method, url, secret.get("headers"), read, self.TRIES, self.halt.wait,
                    timeout=(10, self.o.timeout), **{kind: body | secret.get(kind, {})})
            finally:
                self.under_way -= 1
            with self.lock, open(self.cache, "a", encoding="utf-8") as f:
                self.keep(key, answer, tokens)
                f.write(json.dumps({"key": key, "answer": answer, "tokens": tokens}) + "\n")
        except (ValueError, OSError) as e:
            words = str(e)
            for value in [v for part in secret.values() for v in part.values()]:
                words = words.replace(value.removeprefix("Bearer "), "***")
            self.error = self.error or ConnectionError(
                f"{words}; {len(self.answers)} answers are kept in {self.cache}, the same command "
                "goes on from there")
            self.halt.set()
            raise self.error from None

    def check_limits(self):
        ahead = self.usd(self.tokens) + self.dearest * (self.under_way + 1)
        if self.halt.is_set():
            raise ConnectionAbortedError("stopped")
        if self.o.limit and self.sent >= self.o.limit:
            raise ValueError(f"--limit {self.o.limit} requests are sent")
        if self.o.max_usd and ahead > self.o.max_usd:
            raise ValueError(f"--max_usd {self.o.max_usd:g} is reached ({self.spent()}): raise it")


def endpoint(o, path):
    """(URL, headers with the key) of an OpenAI-compatible server's path. The key is API_KEY's, or
    OPENAI_API_KEY's; Azure's form of URL (?api-version=) gets its header."""
    base, _, query = o.base_url.partition("?")
    key = os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY")
    if not key and "api.openai.com" in base:
        raise ValueError("no key for api.openai.com: set OPENAI_API_KEY, or say --base_url")
    if not re.match("https?://", base):
        raise ValueError(f"--base_url {o.base_url!r} is no http(s) address")
    auth = {"api-key": key} if "api-version" in query else {"Authorization": f"Bearer {key}"}
    return f"{base.rstrip('/')}/{path}{'?' if query else ''}{query}", auth if key else {}


def usage_of(answer):
    usage = answer.get("usage") or {}
    return [usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0]


def unreadable(what, answer):
    return requests.exceptions.InvalidJSONError(f"{what} is not in {str(answer)[:200]}")


def read_chat(response):
    """A chat completion -> ((text, why it ended), tokens). An empty text is a refusal."""
    if response.status_code == 404:
        raise ValueError(f"{response.url}: 404: {' '.join(response.text.split())[:500]}")
    answer = response.json()
    try:
        choice = answer["choices"][0]
        return (choice["message"]["content"] or "", choice.get("finish_reason")), usage_of(answer)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise unreadable("choices[0].message.content", answer) from None


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
        found, failed = parse_dialogues(text, q.options, cut=ended == "length")
        for paraphrase, answers in found:              # the same wording twice: one may be in test
            dialogues[q.id].setdefault(paraphrase.casefold(), (paraphrase, answers))
        problems += [{"group": group, "question": q.id, **f} for f in failed]
    return [list(d.values())[:o.paraphrases] for d in dialogues.values()], problems


def plain(text):
    """Text to compare options by: quotes, spaces, case and a closing period do not count."""
    text = text.translate(str.maketrans("‘’“”", "''\"\""))
    return " ".join(text.split()).strip(" .'\"").casefold()


def parse_dialogues(text, options, cut=False):
    """An LLM's reply -> ([(paraphrase, [one answer per option]), ...], [problem, ...]). A line that
    is asked for begins with Q, or with [one of the options] after any label (A1:, B.). A style that
    lacks an answer is left out. cut: the text ends in the middle, and with it its last style.
    Nothing is guessed: an answer that names no option is a problem."""
    names = {plain(option): k for k, option in enumerate(options)}
    styles, problems, last = [], [], None
    for line in text.splitlines():
        line = re.sub(r"^[\s*#>•-]+|\*\*|\s+$", "", line)
        label = re.match(r"(question|answer|[a-z])\s*\d*\s*[:.)]\s*", line, re.I)
        rest = line[label.end():] if label else line
        if label and label[1][0] in "qQ":
            styles.append((rest.strip(" \"“”"), {}))
            last = None
        elif rest.startswith("["):
            ends = [m.start() for m in re.finditer("]", rest) if plain(rest[1:m.start()]) in names]
            if not ends or not styles:
                problems.append({"problem": "an answer to no option" if styles else
                                 "an answer before any question", "text": line})
                last = None
                continue
            last = names[plain(rest[1:ends[-1]])]
            if last in styles[-1][1]:
                problems.append({"problem": "a second answer to one option", "text": line})
                last = None
            else:
                styles[-1][1][last] = rest[ends[-1] + 1:].strip(" :-–\"“”")
        elif not line or re.match(r"style\b", line, re.I):
            last = None
        elif last is not None:                         # an answer of several lines
            styles[-1][1][last] += " " + line
        elif label or styles:
            problems.append({"problem": "a line that is no answer", "text": line})
    if not styles:
        problems.append({"problem": "a reply without a question line", "text": text[:500]})
    good = []
    for n, (paraphrase, answers) in enumerate(styles):
        if cut and n + 1 == len(styles):
            problems.append({"problem": "a style cut off by the length limit", "text": paraphrase})
        elif not paraphrase or not all(answers.get(k) for k in range(len(options))):
            problems.append({"problem": "a style that lacks an answer", "text": paraphrase})
        else:
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
    writer: str = "template"     # who writes paraphrases and answers
    paraphrases: int = 20        # dialogues a question: 8 of 10 to train on, 1 for eval, 1 for test
    pairs_per_question: int = 0  # rows a question; 0: one a paraphrase
    noise: float = 0.15          # share of accepted answers that express another option
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of the whole world


def toy(o):
    """The made-up world: every topic under every aspect, answered by one country, or several."""
    groups = {}
    for country in o.country.split(","):
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
    write_surveys(groups, o, "toy")


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
        return [(n, (row["question"] or "").strip(), parse_list(row["options"], path, n),
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


def parse_list(text, path, n):
    return [str(x) for x in literal(text, list, path, n)]


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
AGAINST = (r"(not |no\b|dis|un(?!i)|oppose|bad|worse|less|few|harm|hurt|difficult|wrong|negative|"
           r"decreas|reject|weak|poor|fail|declin)")
SCALES = [  # class, the option texts it takes; the first that matches counts
    (0, r"(dk\b|don't know|refused|no answer|no opinion|never heard|haven't heard|unsure|can't |"
        r"missing|other\b|not (asked|applicable|a moral issue)|cannot choose|hard to say|"
        r"none of (these|the above))"),
    (1, rf"(not .*at all|.*\bat all$|{STRONG} (more )?{AGAINST}|{AGAINST}.* a lot|never|none|"
        r"(the )?worst|poor$|terrible|nothing|no (confidence|trust|priority)|hardly ever)"),
    (3, r"(neither|neutral|depends|(stay|remain|keep)?\w*\s?(about )?the same|same$|about (the )?"
        r"right|average$|no (change|difference|effect|impact)|not (much )?(change|difference)|"
        r"undecided|both\b|in between|has not changed|unchanged)"),
    (2, rf"((somewhat|mostly|fairly|probably|quite|rather|morally|generally|a little|change for "
        rf"the) (more )?{AGAINST}|{AGAINST}|rarely|seldom|only |too little|small|below average|"
        r"pessimistic|(should|will|has|have|could|did|do|does|is|are) not\b)"),
    (5, rf"({STRONG}|excellent|top priority|always|often|(the )?best$|major|all of|great deal|"
        r"entirely|fully|most( of them)?$|improve.* a lot)"),
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
    check_free(o.out)
    if not o.map and not o.classify:
        raise ValueError("what class has an option? Give --map FILE (Appendix B), --classify rules "
                         "or llm, or both")
    if o.classify not in ("", "rules", "llm") or o.writer not in WRITERS:
        raise ValueError(f"--classify must be rules or llm, --writer {' or '.join(WRITERS)}")
    client = Client(chat_flags, f"{o.out}.answers.jsonl")
    table = read_opinions(o.csv or hub_file("datasets/Anthropic/llm_global_opinions",
                                            "data/global_opinions.csv"))
    known, countries = {c for *_, shares in table for c in shares}, o.country.split(",")
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
    write_surveys(groups, o, "opinions", client, problems, belief_map=belief_map)


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
    """The lines of a text file, plain or .gz, one at a time."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8",
                                                            errors="replace") as f:
        yield from f


def read_reviews(path, bad):
    """(product, rating "1".."5", text) of each review, streamed; bad counts what is none."""
    lines = lines_of(path)
    first = next(lines, "")
    records = map(json_record, joined([first], lines)) if first.lstrip().startswith("{") \
        else snap_records(joined([first], lines))
    for r in records:
        try:
            rating = float(r["score"])
            text = " ".join(html.unescape(re.sub(r"<br\s*/?>", " ", r["text"])).split())
            if not rating.is_integer() or not 1 <= rating <= 5:
                raise ValueError
            yield r["product"], str(int(rating)), text
        except (KeyError, TypeError, ValueError):
            bad["records that are no review"] += 1


def json_record(line):
    try:
        r = json.loads(line)
        return {"product": r.get("asin") or r.get("parent_asin"),
                "score": r["overall"] if "overall" in r else r.get("rating"),
                "text": r["reviewText"] if "reviewText" in r else r.get("text")}
    except (ValueError, AttributeError):
        return {}


def snap_records(lines):
    """SNAP's text form: `product/productId: B00...` and so on, records parted by an empty line."""
    names = {"product/productId": "product", "review/score": "score", "review/text": "text"}
    record = {}
    for line in lines:
        key, colon, value = line.partition(": ")
        if key in names and colon:
            record[names[key]] = value.strip()
        elif not line.strip() and record:
            yield record
            record = {}
    if record:
        yield record


def read_titles(path):
    """{product: title}."""
    if Path(path).suffix == ".json":
        return {str(k): str(v) for k, v in read_json(path).items()}
    with open(path, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.reader(f) if len(row) >= 2]
    if not rows:
        raise ValueError(f"{path} has no lines of product,title")
    return {product.strip(): title.strip() for product, title, *_ in rows}


def find_metadata(titles, o):
    """{title: its OMDb answer}; one that OMDb does not know is absent. "The Ring (2002)" asks for
    that year's."""
    if o.metadata == "none":
        return {title: {"Title": title} for title in titles}
    split = {t: re.fullmatch(r"(.*?)(?: \((\d{4})\))?", t).groups() for t in titles}
    if o.metadata != "omdb":
        known = defaultdict(dict)
        for line in lines_of(o.metadata):
            record = json.loads(line) if line.strip() else {}
            if record.get("Title"):
                known[plain(record["Title"])][str(record.get("Year"))[:4]] = record
        found = {t: known[plain(name)].get(year) if year else
                 next(iter(known[plain(name)].values()), None) for t, (name, year) in split.items()}
    else:
        key = os.environ.get("OMDB_API_KEY")
        if not key:
            raise ValueError("no key for OMDb: set OMDB_API_KEY (omdbapi.com gives one), or say "
                             "--metadata FILE or --metadata none")
        client = Client(Chat(concurrency=4), f"{o.out}.omdb.jsonl")
        queries = [{"t": name, "plot": "short"} | ({"y": year} if year else {})
                   for name, year in split.values()]
        answers = client.ask("GET", o.omdb, queries, read_omdb, "OMDb", params={"apikey": key})
        found = dict(zip(titles, answers))
    return {t: r for t, r in found.items() if r}


def read_omdb(response):
    answer = response.json()
    if not isinstance(answer, dict) or answer.get("Response") not in ("True", "False"):
        raise unreadable("Response", answer)
    if answer["Response"] == "False" and "not found" not in answer.get("Error", ""):
        raise ValueError(f"OMDb: {answer.get('Error')}")
    return (answer if answer["Response"] == "True" else None), [0, 0]


def describe(r):
    """The prompt, as in Table 7: title, year, director (Genre: genre). plot"""
    get = lambda name: "" if r.get(name) in (None, "N/A") else str(r[name])
    head = ", ".join(filter(None, map(get, ("Title", "Year", "Director"))))
    return (head + f" (Genre: {get('Genre')})" * bool(get("Genre")) + ". " + get("Plot")).strip()


def collect_reviews(o, titles, rng):
    """One pass over the file, in the memory of what is kept: {title: (5,) ratings}, {title:
    [(rating, text), ...] at most --max_reviews}, {reason: number left out}."""
    counts, kept = defaultdict(lambda: np.zeros(5)), defaultdict(list)
    numbers, seen, skipped = Counter(), set(), Counter()
    for product, rating, text in progress(read_reviews(o.reviews, skipped), desc="reviews",
                                          unit="review"):
        title = titles.get(product)
        mark = hash((title, text))
        reason = ("reviews of a product without a title" if title is None else
                  "the same text again" if mark in seen else None)
        if not reason:
            seen.add(mark)
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
            kept[title][place:place + 1] = [(rating, text)]
    return counts, kept, skipped


def reviews(o):
    """Rows from movie reviews: accepted a review, rejected another rating's of the same title."""
    check_free(o.out)
    for name in ("reviews", "titles"):
        if not getattr(o, name):
            raise ValueError(f"--{name} is needed")
    rng = np.random.default_rng([o.seed, 1])
    counts, kept, skipped = collect_reviews(o, read_titles(o.titles), rng)
    usable = sorted((t for t in kept if len({rating for rating, _ in kept[t]}) > 1),
                    key=lambda t: (-counts[t].sum(), t))[:o.max_titles or None]
    about = find_metadata(usable, o)
    skipped += {"titles whose reviews all give one rating": len(kept) - len(usable),
                "titles without metadata": len(usable) - len(about)}
    usable, splits = [t for t in usable if t in about], {s: [] for s in SPLITS}
    if usable:
        unseen = holdout(sorted(usable), o)
        for title in usable:
            texts = [kept[title][i] for i in rng.permutation(len(kept[title]))]
            of_split = defaultdict(list)
            for i, review in enumerate(texts):
                of_split[split_of(i, len(texts), title in unseen)].append(review)
            for split in SPLITS:
                rows = review_rows(title, of_split[split], of_split["train"], about[title],
                                   counts[title], rng)
                skipped[f"{split} reviews without another rating to reject"] += (
                    len(of_split[split]) - len(rows))
                splits[split] += rows
    print("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in skipped.items() if n),
          file=sys.stderr)
    for split in SPLITS:
        if not splits[split]:
            raise ValueError(f"no rows for {split}: more --titles, or more reviews, are needed")
    save_dataset(Path(o.out), splits, {"classes": STARS, "off_scale": None, "made_by": "reviews",
                                       "form": FORM, "options": dataclasses.asdict(o)})


def review_rows(title, texts, trained, about, counts, rng):
    """Each of a title's reviews [(rating, text), ...] in one split, against one of another rating:
    of the same split, so that training meets no text of eval and test; else one of training's."""
    rows = []
    for rating, text in texts:
        others = ([r for r in texts if r[0] != rating]
                  or [r for r in trained if r[0] != rating])
        if others:
            other, said = others[rng.integers(len(others))]
            rows.append({"prompt": describe(about), "options": STARS,
                         "probabilities": (counts / counts.sum()).round(6).tolist(),
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
                        now.setdefault(chunk[n - 1], re.sub(r"^[\W\d]+", "", name).strip())
        problems += [{"problem": "a statement in no group", "text": s} for s in alive
                     if not now.get(s)]
        of = {s: now[g] for s, g in of.items() if now.get(g)}
        if len(chunks) == 1 or not of or len(set(of.values())) >= len(alive):
            return of, problems
        alive = list(dict.fromkeys(of.values()))


def mine(o, chat_flags):
    """Rows from pairs without beliefs: an LLM states what each pair is in conflict about."""
    check_free(o.out)
    if not o.pairs:
        raise ValueError("--pairs is needed")
    rng = np.random.default_rng([o.seed, 1])
    client, pairs, problems = Client(chat_flags, f"{o.out}.answers.jsonl"), read_pairs(o.pairs), []
    good = [i for i in rng.permutation(len(pairs)) if all(pairs[i]) and pairs[i][1] != pairs[i][2]]
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
    sides = [re.search(rf"^\W*(?:answer )?{n}\W+(agree|neutral|disagree)\b", text, re.I | re.M)
             for n in "12"]
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
        for i, ((prompt, chosen, rejected), accept, reject) in enumerate(several):
            if split := split_of(i, len(several), statement in unseen):
                splits[split].append({
                    "prompt": prompt, "options": [s.capitalize() for s in STANCE_LABELS],
                    "probabilities": shares, "accept_choice_id": accept,
                    "accept_choice": statement, "accept_response": chosen,
                    "reject_choice_id": reject, "reject_choice": statement,
                    "reject_response": rejected, "question_id": statement})
    save_dataset(Path(o.out), splits, {
        "classes": labels, "off_scale": None, "made_by": "mine", "form": FORM,
        "stance": {c: s for s, c in STANCE_LABELS.items()}, "options": dataclasses.asdict(o)},
        problems)


# ---------------------------------------------------------------------------------------------
# In-context rows: Appendix E

@dataclass
class InContext:
    data: str = ""               # dataset to put in context
    shots: int = 3               # examples before each prompt (paper: 3 for GPT-2, 5 for Pythia)
    out: str = ""                # folder to write
    seed: int = 0                # of the draws


INSTRUCTION = ("You are a helpful assistant and can generate the same format as the examples in "
               "the context.\n\n")


def example(row, form):
    """A training row as a shot: prompt, accepted belief and answer."""
    # differs: the appendix has a space after `Answer:`; the class would be another token with it.
    belief = f"<{row['accept_choice']}>" if row.get("accept_choice") else ""
    text = f"{row['accept_choice_id']}{belief}{row['accept_response']}"
    return prompt_text(row, form) + " ".join(text.split()) + "\n\n"


def icf(o):
    """Rows with a few training rows of the same group before each prompt, never the row itself or
    another wording of its question. The shots are a list, so that data.py can drop some to fit."""
    check_free(o.out)
    meta, rows = load_dataset(o.data, SPLITS)
    form = meta["form"].replace(FORM, "Question: {prompt}, Answer:")
    if form == meta["form"]:
        raise ValueError(f"{o.data} has the form {form!r} already: give one of the form {FORM!r}")
    rng, of_group = np.random.default_rng([o.seed, 3]), defaultdict(list)
    same = lambda row: row.get("question_id") or row["prompt"]
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
    o = config(**flags)
    check_ranges(o, **{k: v for k, v in RANGES.items() if hasattr(o, k)})
    make(o, *([Chat(**chat_flags)] if asks else []))


if __name__ == "__main__":
    run(main)
