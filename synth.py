"""Rows of preference data from survey tables: a made-up world, or GlobalOpinionQA.

    python synth.py toy --out data/toy
    python synth.py opinions --csv global_opinions.csv --country "United States" \
        --map option_map.json --writer template --out data/usa

Last in reading order. Both make Questions (text, options, classes, a group's shares), have a writer
turn each into dialogues (a paraphrase and one answer per option), and draw pairs from them as in
section 5.1: the accepted belief from the group's shares, the rejected one evenly from the others.
Everything is a pure function of --seed. Left out here: an LLM as the writer (WRITERS has its
place).
"""
import ast
import csv
import dataclasses
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Parser, SPLITS, add_flags, check_ranges, read_json, run

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


def template_writer(question, n, rng, quote):
    """n dialogues about a question: [(paraphrase, [one answer per option]), ...], all paraphrases
    different. quote: put the option's own text into the answer."""
    asks = [(o, w, c) for o in OPENERS for w in question.wordings for c in CLOSERS]
    if n > len(asks):
        raise ValueError(f"the template writer knows {len(asks)} paraphrases of a question, "
                         f"not {n}")
    return [(" ".join(filter(None, asks[i])),
             [template_answer(question, k, rng, quote) for k in range(len(question.options))])
            for i in rng.permutation(len(asks))[:n]]


def template_answer(question, k, rng, quote):
    lead, tail = LEADS[rng.integers(len(LEADS))], TAILS[rng.integers(len(TAILS))]
    stances = STANCES[CLASSES[question.classes[k]]]
    stance = stances[rng.integers(len(stances))] + (f", {question.options[k]}" if quote else "")
    text = f"{lead} {stance}. " if lead else f"{stance[0].upper()}{stance[1:]}. "
    tail = tail.format(topic=question.topic)
    return text + tail[0].upper() + tail[1:]


WRITERS = {"template": template_writer}


# ---------------------------------------------------------------------------------------------
# Pairs

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
    said = others[stray] if rng.random() < noise else answers[accept]
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


def write_dataset(questions, unseen, o, group, made_by):
    """Rows of all questions into o.out: paraphrases 1..train of a question go to train.jsonl, the
    next to eval and test; those of the `unseen` questions go to test alone."""
    rng = np.random.default_rng([o.seed, 1])
    splits = {s: [] for s in SPLITS}
    quote = made_by == "opinions"
    for q in questions:
        dialogues = WRITERS[o.writer](q, o.train + o.eval + o.test, rng, quote)
        rows = [make_row(q, *d, dialogues[n - 1][1], group, rng, o.noise)
                for n, d in enumerate(dialogues)]
        if q.id in unseen:
            splits["test"] += rows[:2 * o.test]
            continue
        splits["train"] += rows[:o.train]
        splits["eval"] += rows[o.train:o.train + o.eval]
        splits["test"] += rows[o.train + o.eval:]
    meta = {"classes": CLASSES, "off_scale": "0", "made_by": made_by, "group": group,
            "belief_to_class": {t: CLASSES[k] for q in questions
                                for t, k in zip(q.options, q.classes)},
            "options": dataclasses.asdict(o), "n_questions": len(questions),
            "n_unseen": len(unseen)}
    if o.writer == "template":
        meta["stances"] = {phrase: c for c, phrases in STANCES.items() for phrase in phrases}
    save_dataset(Path(o.out), splits, meta)


def save_dataset(out, splits, meta):
    """Write the whole folder under a temporary name, then rename it."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another --out, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        for split, rows in splits.items():
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n",
                                          encoding="utf-8")
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{out}: {counts} rows from {meta['n_questions']} questions "
          f"({meta['n_unseen']} of them in test alone)", file=sys.stderr)


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
    train: int = 16              # training paraphrases a question, one pair each
    eval: int = 2                # held-out paraphrases for eval
    test: int = 2                # held-out paraphrases for test (twice as many of unseen questions)
    noise: float = 0.15          # share of accepted answers that express another option
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of the whole world


def toy(o):
    """The made-up world: every topic under every aspect, answered by one country."""
    if o.country not in COUNTRIES:
        raise ValueError(f"--country {o.country!r} is not in this world: {', '.join(COUNTRIES)}")
    rng = np.random.default_rng([o.seed, 0])
    tastes = rng.normal(size=(len(TOPICS), 3))         # drawn before, hence the same for, countries
    noises = rng.spawn(len(TOPICS) * len(ASPECTS))
    questions = []
    for topic, taste in zip(TOPICS, tastes):
        for a, (wordings, options, bend) in enumerate(ASPECTS):
            classes = list(options.values())
            shares = toy_shares(taste, o.country, bend, classes, noises[len(questions)])
            questions.append(Question(f"{topic}/{a}", [w.format(t=topic) for w in wordings], topic,
                                      list(options), classes, shares))
    write_dataset(questions, holdout(questions, o), o, o.country, "toy")


def holdout(questions, o):
    if not 0 <= o.holdout_questions < len(questions):
        raise ValueError(f"--holdout_questions {o.holdout_questions} must leave some of the "
                         f"{len(questions)} questions for training")
    rng = np.random.default_rng([o.seed, 2])
    return {questions[i].id for i in rng.permutation(len(questions))[:o.holdout_questions]}


# ---------------------------------------------------------------------------------------------
# GlobalOpinionQA (Durmus et al. 2023): question, selections by country, options

@dataclass
class Opinions:
    csv: str = ""                # global_opinions.csv of Anthropic/llm_global_opinions
    country: str = "United States"  # any country of the table
    map: str = ""                # JSON {option: class 0..5}, Appendix B; other questions left out
    writer: str = "template"     # who writes paraphrases and answers
    out: str = ""                # folder to write
    train: int = 16              # training paraphrases a question, one pair each
    eval: int = 2                # held-out paraphrases for eval
    test: int = 2                # held-out paraphrases for test (twice as many of unseen questions)
    noise: float = 0.15          # share of accepted answers that express another option
    holdout_questions: int = 50  # questions of which no paraphrase is trained on
    seed: int = 0                # of paraphrases, pairs and split


def read_opinions(path, country, belief_map):
    """Questions of the table that `country` answered and whose options all stand in the map.
    Returns them and {reason: number of rows left out}."""
    csv.field_size_limit(1 << 30)
    with open(path, newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        if not {"question", "selections", "options"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns question, selections, options; "
                             f"it has {reader.fieldnames}")
        rows = list(reader)
    questions, countries, skipped = [], set(), {}
    for n, row in enumerate(rows):
        shares, options = (parse_selections(row["selections"], path, n),
                           parse_list(row["options"], path, n))
        countries |= set(shares)
        p = shares.get(country)
        reason = ("another country's" if p is None
                  else "no question text" if not (row["question"] or "").strip()
                  else "options not in the map" if not set(options) <= set(belief_map)
                  else "shares and options of different number" if len(p) != len(options)
                  else "shares that sum to nothing" if sum(p) <= 0
                  else "fewer than two options" if len(options) < 2 else None)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        questions.append(Question(str(n), [row["question"].strip()], "this", options,
                                  [int(belief_map[t]) for t in options], [x / sum(p) for x in p]))
    if country not in countries:
        near = ([c for c in sorted(countries) if country.lower()[:4] in c.lower()]
                or sorted(countries))
        raise ValueError(f"no country {country!r} in {path}; it has, among {len(countries)}: "
                         f"{', '.join(near[:8])}")
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
    return belief_map


def opinions(o):
    """Rows from the GlobalOpinionQA table for one country."""
    for name in ("csv", "map", "out"):
        if not getattr(o, name):
            raise ValueError(f"--{name} is needed")
    questions, skipped = read_opinions(o.csv, o.country, read_map(o.map))
    why = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
    print(f"{len(questions)} questions for {o.country}; left out: {why}", file=sys.stderr)
    if not questions:
        raise ValueError(f"no question of {o.country} has all its options in {o.map}: "
                         "extend the map")
    write_dataset(questions, holdout(questions, o), o, o.country, "opinions")


COMMANDS = {"toy": (toy, Toy), "opinions": (opinions, Opinions)}


def main():
    parser = Parser(description="Make a dataset of preference rows.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (make, config) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=make.__doc__), config)
    flags = vars(parser.parse_args())
    make, config = COMMANDS[flags.pop("command")]
    if flags["writer"] not in WRITERS:
        raise ValueError(f"--writer {flags['writer']!r} is unknown; there is: {', '.join(WRITERS)}")
    check_ranges(config(**flags), train=(1, 1000), eval=(1, 1000), test=(1, 1000), noise=(0, 1),
                 holdout_questions=(0, 1 << 30), seed=(0, 1 << 40))
    make(config(**flags))


if __name__ == "__main__":
    run(main)
