"""python -m pytest tests/test_sources.py: every source of rows; a server plays LLMs and APIs."""
import gzip
import json
import re
import tracemalloc

import numpy as np
import pytest
from conftest import SHARED, SURVEY_MAP, completion, real_data

import data
import synth
from data import encode_rows, load_dataset, load_rows, prompt_text

SPLITS = ("train", "eval", "test")
OPTIONS = ["Very good job", "Somewhat bad", "It's \"fine\" [VOL]", "DK/Refused"]
REPLY = """Here are two styles:

Style 1: Casual and Friendly
Q: So, tell me: how do you rate it? [be honest]
A1: [Very good job] Honestly: A great job: 5 of 5!
A2: [Somewhat bad] Hmm, [sigh] it could be better. Ask A2: never mind.
A3: [It's "fine" [VOL]] It's "fine", I'd say. "Never" is no "word".
A4: [DK/Refused] I'd rather not say.

**Style 2: Formal**
- **Question 2:** "How would you evaluate it?"

- **B.** [somewhat bad.] Rather poor.
- **A:** [VERY GOOD JOB]: "Excellent."
1. [DK/Refused] - No comment.
- **C** : [It’s “fine” [VOL]] Fine.

I hope that these small talks help!
"""


@pytest.fixture
def llm(server, monkeypatch, tmp_path):
    """An LLM that writes as Appendix A asks; .url, .requests, .spoil(reply, prompt) -> reply."""
    monkeypatch.setattr(data, "PAUSE", 0.01)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    server.spoil = lambda reply, prompt: reply

    def answer(r):
        prompt = r.body["messages"][0]["content"]
        if "Choices:" in prompt:
            n = int(re.search(r"generate (\d+) different", prompt)[1])
            options = json.loads(re.search(r"Choices: (.*)", prompt)[1])
            asked = re.search(r"Question: (.*)", prompt)[1]
            number = len(server.requests)
            reply = "\n".join(f"Style {i}: Style\nQ: {asked} ({number}.{i})\n" + "".join(
                f"A{k}: [{o}] In {number}.{i} I say: {o}.\n" for k, o in enumerate(options, 1))
                for i in range(1, n + 1))
        else:
            reply = {"Maybe": "3", "Yes": "4."}.get(re.search("Option: (.*)", prompt)[1], "2")
        return 200, completion(server.spoil(reply, prompt))
    server.answer = answer
    return server


def test_a_reply_is_read_however_it_is_laid_out():
    good, problems = synth.parse_dialogues(REPLY, OPTIONS)
    assert problems == []
    (q1, a1), (q2, a2) = good
    assert q1 == "So, tell me: how do you rate it? [be honest]"
    assert q2 == "How would you evaluate it?"
    assert a1 == ["Honestly: A great job: 5 of 5!",
                  "Hmm, [sigh] it could be better. Ask A2: never mind.",
                  "It's \"fine\", I'd say. \"Never\" is no \"word\".", "I'd rather not say."]
    assert a2 == ["Excellent.", "Rather poor.", "Fine.", "No comment."]


@pytest.mark.parametrize("reply", [
    "Q: a?\n1. [Yes] y\n2. [No] n", "Q1. a?\nA1 - [Yes] y\nA2 - [No] n", "*Q:* a?\n*A1:* [Yes] y\n"
    "*A2:* [No] n", "1. Q: a?\nA-1: [Yes] y\nA-2: [No] n", "q1: a?\na) [Yes] y\nb) [No] n",
    "Question: a?\nAnswer 1: [Yes] y\nAnswer 2: [No] n", "__Q:__ a?\n> [No]: n\n> [yes]: y",
    "Q: \"a?\"\nA1: [\"Yes\"] \"y\"\nA2: [ No ] n"])
def test_common_layouts_are_read(reply):
    assert synth.parse_dialogues(reply, ["Yes", "No"]) == ([("a?", ["y", "n"])], [])


@pytest.mark.parametrize("reply, problem", [
    ("Q: a?\nA1: [Yes] y\nA2: Not certain.\nA3: [No] n", "a line that is neither"),
    ("Q: a?\nA1: [Yes] y\nA2: [No] n\nI hope that helps!", "a line that is neither"),
    ("Q: a?\nA1: [Yes] y\nA2: [No] n\n2. Formal and Polite", "a line that is neither"),
    ("Q: Hey!\nWhat of a?\nA1: [Yes] y\nA2: [No] n", "a line that is neither"),
    ("Q: a?\nA1: [Yes] y\n\nStyle 2: b\nParaphrase: c?\nA1: [Yes] y2\nA2: [No] n2",
     "an answer before any question"),
])
def test_nothing_is_glued_on_and_nothing_leaks_between_styles(reply, problem):
    good, problems = synth.parse_dialogues(reply, ["Yes", "No"])
    assert good == [] and problems[0]["problem"].startswith(problem)


def test_a_broken_style_does_not_take_the_last_one_with_it():
    reply = "Q: How?\nA1: [Yes] a\n\nQ: Why?\nA1: [Yes] b\nA2: [No] c"
    good, problems = synth.parse_dialogues(reply, ["Yes", "No"])
    assert good == [("Why?", ["b", "c"])]
    assert problems == [{"problem": "a style that lacks an answer", "text": "How?"}]


@pytest.mark.parametrize("change, kept, problem", [
    (("A2: [Somewhat bad]", "A2: [Somewhat good]"), 1, "an answer to no option"),
    (("A2: [Somewhat bad] Hmm, [sigh] it", "A2: Hmm, it"), 1, "a style that lacks an answer"),
    (("A4: [DK/Refused] I'd", "A4: [Somewhat bad] I'd"), 1, "a second answer to one option"),
    (("A4: [DK/Refused] I'd rather not say.", "A4: [DK/Refused]"), 1,
     "a style that lacks an answer"),
    (("Q: So, tell me: how do you rate it? [be honest]", "Q:"), 1, "a style that lacks an answer"),
    (("Q: So, tell me: how do you rate it? [be honest]\n", ""), 1, "an answer before any question"),
])
def test_what_does_not_parse_is_listed_and_its_style_left_out(change, kept, problem):
    good, problems = synth.parse_dialogues(REPLY.replace(*change), OPTIONS)
    assert REPLY.count(change[0]) == 1 and len(good) == kept
    assert problem in [p["problem"] for p in problems]


def test_a_reply_cut_off_loses_its_last_style_and_a_refusal_all():
    for ended in ("length", "content_filter"):
        good, problems = synth.parse_dialogues(REPLY, OPTIONS, ended)
        assert len(good) == 1 and problems[0]["problem"] == f"a style cut off ({ended})"
    good, problems = synth.parse_dialogues("I'm sorry, but I can't help with that.", OPTIONS)
    assert good == [] and problems[0]["problem"] == "a reply without a question line"


def opinions(call, llm, tmp_path, *flags, **kwargs):
    return call(synth, "opinions", *flags, "--base_url", llm.url, "--out", tmp_path / "d",
                cwd=tmp_path, **kwargs)


def test_an_llm_writes_the_dialogues(table, llm, tmp_path, call):
    flags = (*table, "--writer", "llm", "--noise", 0, "--pairs_per_question", 90)
    p = opinions(call, llm, tmp_path, *flags)
    assert "3 questions for Chile (rural)" in p.stderr
    assert "Chile (rural), please generate 10 different" in llm.requests[0].body["messages"][0][
        "content"]
    assert len(llm.requests) == 3 * 4                       # 40 paraphrases, 10 to a request
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    assert [len(rows[s]) for s in SPLITS] == [2 * 72, 2 * 9, 2 * 9 + 18]
    assert meta["belief_to_class"]["A lot"] == "5" and meta["llm"]["llm"] == "gpt-3.5-turbo-1106"
    for r in sum(rows.values(), []):                        # the answer is the one to its belief
        assert r["accept_response"].endswith(f": {r['accept_choice']}.")
        assert r["reject_response"].endswith(f": {r['reject_choice']}.")
        styles = {re.search(r"\d+\.\d+", t)[0] for t in (r["prompt"], r["accept_response"],
                                                        r["reject_response"])}
        assert len(styles) == 1
    prompts = [{r["prompt"] for r in rows[s]} for s in SPLITS]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    sent = len(llm.requests)
    (tmp_path / "d").rename(tmp_path / "first")
    opinions(call, llm, tmp_path, *flags)                   # a second run asks nothing
    assert len(llm.requests) == sent
    for s in SPLITS:
        assert ((tmp_path / f"d/{s}.jsonl").read_bytes()
                == (tmp_path / f"first/{s}.jsonl").read_bytes())


def test_what_an_llm_spoils_is_counted_and_listed(table, llm, tmp_path, call):
    def spoil(reply, prompt):
        if "How bad" in prompt:
            return "I'm sorry, I cannot."
        return reply.replace("A1: [Yes]", "A1: [Yep]", 1)
    llm.spoil = spoil
    p = opinions(call, llm, tmp_path, *table, "--writer", "llm", "--holdout_questions", 0)
    assert "4 x a reply without a question line" in p.stderr
    assert "8 x an answer to no option" in p.stderr
    listed = [json.loads(x) for x in (tmp_path / "d/unparsed.jsonl").read_text().splitlines()]
    assert {"group": "Chile (rural)", "question": "1", "problem": "a reply without a question line",
            "text": "I'm sorry, I cannot."} in listed
    assert {r["question_id"] for r in load_rows(tmp_path / "d/train.jsonl", synth.CLASSES)} == {
        "0", "5"}


def test_the_same_wording_twice_is_kept_once(table, llm, tmp_path, call):
    llm.spoil = lambda reply, prompt: re.sub(r"\((\d+)\.(\d+)\)", r"(\2)", reply)
    opinions(call, llm, tmp_path, *table, "--writer", "llm", "--noise", 0)
    prompts = [{r["prompt"] for r in load_rows(tmp_path / f"d/{s}.jsonl", synth.CLASSES)}
               for s in SPLITS]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 2 * 10 + 2


def test_an_option_without_a_class_gets_one(table, llm, tmp_path, call):
    flags = [*table[:2], *table[4:]]                        # no --map
    p = opinions(call, llm, tmp_path, *flags, "--classify", "rules")
    assert "2 questions" in p.stderr and "2 x an option that no rule knows" in p.stderr
    made = json.loads((tmp_path / "d/belief_map.json").read_text())
    assert made == {k: v for k, v in SURVEY_MAP.items() if k != "A bit"} and not llm.requests
    (tmp_path / "map.json").write_text(json.dumps({"No": 1}))
    (tmp_path / "d").rename(tmp_path / "first")
    p = opinions(call, llm, tmp_path, *flags, "--map", tmp_path / "map.json", "--classify", "llm")
    assert "4 questions" in p.stderr
    made = json.loads((tmp_path / "d/belief_map.json").read_text())
    assert made == {"No": 1, "Yes": 4, "Maybe": 3, "Don't know": 2, "A bit": 2, "Not too much": 2,
                    "A lot": 2}
    assert all(r.body["temperature"] == 0 for r in llm.requests) and len(llm.requests) == 6


@pytest.mark.parametrize("text", ["4 or 5", "agree", "", "6", "The class is 4"])
def test_a_class_is_never_guessed(table, llm, tmp_path, call, text):
    llm.spoil = lambda reply, prompt: text if "Option: Maybe" in prompt else reply
    opinions(call, llm, tmp_path, *table, "--classify", "llm", "--holdout_questions", 0)
    assert "Maybe" not in json.loads((tmp_path / "d/belief_map.json").read_text())
    assert json.loads((tmp_path / "d/unparsed.jsonl").read_text())["option"] == "Maybe"


@real_data
def test_the_rules_agree_with_the_published_belief_map():
    published = synth.read_map(SHARED / "option_map.json")
    assert synth.class_by_rule("Very small role") == synth.class_by_rule("Disagree strongly") == 1
    assert synth.class_by_rule("Agree strongly") == 5 and synth.class_by_rule("Unemployed") is None
    made = {t: synth.class_by_rule(t) for t in published}
    known = {t: k for t, k in made.items() if k is not None}
    right = sum(published[t] == k for t, k in known.items())
    assert len(known) >= 295 and right / len(known) >= 0.95         # of 373


def test_two_countries_make_one_set_with_the_group_in_the_prompt(tmp_path, call):
    call(synth, "toy", "--country", "Avalon,Borduria", "--out", tmp_path / "two", "--paraphrases",
         3, cwd=tmp_path)
    meta, rows = load_dataset(str(tmp_path / "two"), SPLITS)
    assert {r["group"] for r in rows["train"]} == {"Avalon", "Borduria"} == set(meta["groups"])
    row = rows["train"][-1]
    assert prompt_text(row, meta["form"]) == f"<G>Borduria<Q>{row['prompt']}<A>"
    tested = {(r["group"], r["question_id"]) for r in rows["test"]} - {
        (r["group"], r["question_id"]) for r in rows["train"]}
    for group in meta["groups"]:                            # held out is held out for all
        assert {(group, q) for _, q in tested} <= tested
    synth.toy(synth.Toy(out=str(tmp_path / "one"), paraphrases=3))
    one = load_rows(tmp_path / "one/train.jsonl", synth.CLASSES)
    both = [{(r["question_id"], *r["probabilities"]) for r in some if r["group"] == "Avalon"}
            for some in (one, rows["train"])]
    assert both[0] == both[1]


def test_sets_are_mixed_if_they_agree(tmp_path):
    for name, country in (("a", "Avalon"), ("b", "Borduria")):
        synth.toy(synth.Toy(out=str(tmp_path / name), country=country, paraphrases=3))
    names = f"{tmp_path}/a,{tmp_path}/b"
    meta, rows = load_dataset(names, SPLITS, "<G>{group}<Q>{prompt}<A>")
    assert len(rows["train"]) == 500 and data.dataset_name(names) == "a+b"
    assert prompt_text(rows["train"][0], meta["form"]).startswith("<G>Avalon<Q>")
    other = json.loads((tmp_path / "b/meta.json").read_text())
    for change, message in (({"classes": ["1", "2", "3", "4", "5"], "off_scale": None,
                              "belief_to_class": {}, "stances": {}}, "its classes"),
                            ({"form": "Q: {prompt} A:"}, "its form .* say --form"),
                            ({"belief_to_class": {"Better": "2"}}, "'Better' has another class")):
        (tmp_path / "b/meta.json").write_text(json.dumps(other | change))
        with pytest.raises(ValueError, match=message):
            load_dataset(names, SPLITS)
    for form in ("<Q>", "<G>{grp}<Q>{prompt}"):
        with pytest.raises(ValueError, match="--form: the prompt's form must be a text that holds"):
            load_dataset(f"{tmp_path}/a", SPLITS, form)
    with pytest.raises(ValueError, match="names a dataset twice"):
        load_dataset(f"{tmp_path}/a,{tmp_path}/a", SPLITS)


# ---------------------------------------------------------------------------------------------
# Reviews

SNAP = """product/productId: P1
review/userId: A
review/profileName: a: b
review/score: {}
review/text: {}

"""
TEXTS = ["Good<br /><br />film &amp; fun. It&#39;s a number {} of all that I have seen.",
         "Bad, bad film, the number {} of the worst: 9 of 10 would leave."]


def snap(path, opener=open):
    with opener(path, "wt") as f:
        for n in range(40):
            record = SNAP.format(f"{5 if n % 4 else 2}.0", TEXTS[not n % 4].format(n))
            f.write(record.replace("P1", f"P{n % 3 > 0:d}"))
        f.write(SNAP.format("5.0", TEXTS[0].format(1)))                 # an edition: the same again
        f.write(SNAP.format("3.5", "half a star is none") + "product/productId: P1\n\n")
        f.write(SNAP.format("4.0", "short") + SNAP.format("1.0", "long " * 600))
        f.write(SNAP.format("4.0", "a product that has no title").replace("P1", "P9"))
    (path.parent / "titles.csv").write_text(
        'P0,"The Ring (2002)"\nP1,The Ring (2002)\nP2,Nowhere\n')


META = {"Title": "The Ring", "Year": "2002", "Genre": "Horror, Mystery", "imdbID": "tt0298130",
        "Director": "Gore Verbinski", "Plot": "A journalist investigates a videotape.",
        "Response": "True"}
PROMPT = ("The Ring, 2002, Gore Verbinski (Genre: Horror, Mystery). A journalist investigates a "
          "videotape.")


@pytest.mark.parametrize("name, opener", [("movies.txt", open), ("movies.txt.gz", gzip.open)])
def test_reviews_become_rows(tmp_path, call, name, opener):
    snap(tmp_path / name, opener)
    older = META | {"Year": "1995", "Plot": "Another ring."}
    (tmp_path / "omdb.jsonl").write_text(json.dumps(older) + "\n" + json.dumps(META) + "\n")
    p = call(synth, "reviews", "--reviews", name, "--titles", "titles.csv", "--metadata",
             "omdb.jsonl", "--out", "d", cwd=tmp_path)
    for reason in ("1 the same user's text again", "2 records that are no review",
                   "2 too short or too long", "1 reviews of a product without a title"):
        assert reason in p.stderr
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    assert meta["classes"] == ["1", "2", "3", "4", "5"]
    every = sum(rows.values(), [])
    assert [len(rows[s]) for s in SPLITS][0] == 32
    for r in every:
        assert r["prompt"] == PROMPT and "accept_choice" not in r
        counts = np.array([1, 10, 0, 1, 30])                # with those of odd length
        assert r["probabilities"] == pytest.approx(counts / 42, abs=1e-6)
        assert r["accept_choice_id"] != r["reject_choice_id"]
        for side in ("accept", "reject"):
            text = r[f"{side}_response"]
            assert text.startswith("Good film & fun. It's" if r[f"{side}_choice_id"] == "5"
                                   else "Bad, bad film")
    train = {r[f"{s}_response"] for r in rows["train"] for s in ("accept", "reject")}
    assert not train & {r["accept_response"] for r in rows["eval"] + rows["test"]}


def test_the_later_amazon_form_and_the_caps(tmp_path, call):
    with open(tmp_path / "r.jsonl", "w") as f:
        for n in range(60):
            f.write(json.dumps({"asin": f"P{n % 3}", "overall": 5.0 - n // 3 % 5, "reviewText":
                                f"review {n} " * 5} if n % 2 else
                               {"parent_asin": f"P{n % 3}", "rating": 5 - n // 3 % 5, "text":
                                f"review {n} " * 5}) + "\n")
        f.write('{"broken\n{"asin": "P0", "overall": 5.0}\n[1]\n')
    (tmp_path / "t.json").write_text(json.dumps({"P0": "Zero", "P1": "One", "P2": "Two"}))
    p = call(synth, "reviews", "--reviews", "r.jsonl", "--titles", "t.json", "--metadata", "none",
             "--max_titles", 2, "--max_reviews", 15, "--out", "d", cwd=tmp_path)
    assert "3 records that are no review" in p.stderr
    rows = sum(load_dataset(str(tmp_path / "d"), SPLITS)[1].values(), [])
    assert {r["prompt"] for r in rows} == {"One.", "Two."} or len({r["prompt"] for r in rows}) == 2
    assert len({r["accept_response"] for r in rows}) <= 30


def some_reviews(path, product, users=60, stars=lambda n: 1 + 4 * (n % 3 > 0)):
    with open(path, "a") as f:
        for n in range(users):
            f.write(json.dumps({"asin": product, "reviewerID": f"U{n}", "overall": stars(n),
                                "reviewText": f"the words of user {n} on the film"}) + "\n")


def run_reviews(call, tmp_path, titles, *flags, **kwargs):
    (tmp_path / "t.csv").write_text(titles)
    p = call(synth, "reviews", "--reviews", "r.jsonl", "--titles", "t.csv", "--out", "d", *flags,
             cwd=tmp_path, **kwargs)
    return p, load_dataset(str(tmp_path / "d"), SPLITS)[1] if not kwargs else None


def test_titles_of_one_film_are_one_and_no_text_is_in_two_splits(tmp_path, call):
    """Two titles, one OMDb record, the same reviews under both products."""
    for product in ("P0", "P1"):
        some_reviews(tmp_path / "r.jsonl", product)
    (tmp_path / "m.json").write_text(json.dumps([META]))            # a list is read as well
    titles = "P0,The Ring (2002)\nP1,The Ring\n"
    _, rows = run_reviews(call, tmp_path, titles, "--metadata", "m.json")
    assert sum(map(len, rows.values())) == 60
    train = {r["accept_response"] for r in rows["train"]}
    assert not train & {r["accept_response"] for r in rows["eval"] + rows["test"]}
    assert rows["train"][0]["probabilities"] == pytest.approx([1 / 3, 0, 0, 0, 2 / 3], abs=1e-6)


def test_equal_words_of_different_users_count_and_a_users_copies_do_not(tmp_path, call):
    with open(tmp_path / "r.jsonl", "w") as f:
        for n in range(100):
            f.write(json.dumps({"asin": f"V{n}", "parent_asin": f"P{n % 2}",
                                "user_id": f"U{n // 2}", "rating": 5 if n < 80 else 1,
                                "text": "Great movie, loved it!!!" if n < 80 else
                                f"not my film, says number {n // 2}"}) + "\n")
    p, rows = run_reviews(call, tmp_path, "P0,Film\nP1,Film\n", "--metadata", "none")
    assert rows["train"][0]["probabilities"] == [0.2, 0, 0, 0, 0.8]
    assert "50 the same user's text again" in p.stderr


def test_text_is_cleaned_whatever_its_form(tmp_path):
    path = tmp_path / "r.txt"
    path.write_bytes("""product/productId: P1\r
review/score: 5.0\r
review/text: Am\xe9lie<BR>is &lt;br /&gt;&amp;quot;good&amp;quot; <p>and <a href="x">so</a>\r
on the next line 3 < 4\r
\r
product/productId: P1
review/score: 1.0
review/text: bad""".encode("latin-1"))
    found = list(synth.read_reviews(path, synth.Counter()))
    assert found == [(["P1"], None, "5", 'Amélie is "good" and so on the next line 3 < 4'),
                     (["P1"], None, "1", "bad")]


@pytest.mark.parametrize("text, message", [
    ("[{}]", "r.jsonl begins with '\\[{}\\]': SNAP"), ("", "begins with ''"),
    ("a,b\n", "begins with 'a,b")])
def test_a_file_of_unknown_form_is_refused(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(synth.read_reviews(tmp_path / "r.jsonl", synth.Counter()))


@pytest.mark.parametrize("titles, message", [
    ("P1,The Good, the Bad\n", "line 1: 'P1,The Good,the Bad' is not product,title"),
    ("P1,\n", "line 1: 'P1,' is not product,title"), ("", "has no lines"),
    ('P1,"open\n', "is not product,title|is no CSV")])
def test_a_broken_table_of_titles_is_refused(tmp_path, titles, message):
    (tmp_path / "t.csv").write_text(titles)
    with pytest.raises(ValueError, match=message):
        synth.read_titles(tmp_path / "t.csv")


def test_a_table_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "t.csv").write_bytes("P1,Amélie\n".encode("utf-8-sig"))
    assert synth.read_titles(tmp_path / "t.csv") == {"P1": "Amélie"}


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Ten times the reviews of the same titles, all of them titled, capped: the same memory."""
    peaks = []
    for size in (2000, 20000):
        with open(tmp_path / "big.txt", "w") as f:
            for n in range(size):
                record = SNAP.format(f"{1 + n % 5}.0", f"text {n} " * 20)
                f.write(record.replace("P1", f"P{n % 100}").replace("userId: A", f"userId: {n}"))
        tracemalloc.start()
        o = synth.Reviews(reviews=str(tmp_path / "big.txt"), max_reviews=10)
        synth.collect_reviews(o, {f"P{n}": f"T{n % 3}" for n in range(100)},
                              np.random.default_rng(0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 20000


def test_omdb_is_asked_once_and_what_it_lacks_is_counted(tmp_path, call, server, monkeypatch):
    monkeypatch.setattr(data, "PAUSE", 0.01)
    monkeypatch.setenv("OMDB_API_KEY", "omdb-secret")
    snap(tmp_path / "m.txt")
    (tmp_path / "titles.csv").write_text("P0,The Ring (2002)\nP1,Unheard Of\n")

    def answer(r):
        if len(server.requests) == 1:
            return 503, "busy"
        if r.query["t"] == "The Ring":
            return 200, META
        return 200, {"Response": "False", "Error": "Movie not found!"}
    server.answer = answer
    flags = ("reviews", "--reviews", "m.txt", "--titles", "titles.csv", "--omdb", server.url,
             "--out", "d")
    p = call(synth, *flags, cwd=tmp_path)
    assert "1 titles without metadata" in p.stderr
    assert {"t": "The Ring", "y": "2002", "plot": "short", "apikey": "omdb-secret"} in [
        r.query for r in server.requests]
    assert {r["prompt"] for r in load_rows(tmp_path / "d/train.jsonl", synth.STARS)} == {PROMPT}
    assert "secret" not in (tmp_path / "d.omdb.jsonl").read_text() + p.stderr
    sent = len(server.requests)
    (tmp_path / "d").rename(tmp_path / "first")
    call(synth, *flags, cwd=tmp_path)
    assert len(server.requests) == sent
    (tmp_path / "d").rename(tmp_path / "second")
    (tmp_path / "d.omdb.jsonl").unlink()
    server.answer = lambda r: (401, {"Response": "False", "Error": "Invalid API key!"})
    p = call(synth, *flags, cwd=tmp_path, check=2)
    assert "Invalid API key!" in p.stderr and "secret" not in p.stderr
    monkeypatch.delenv("OMDB_API_KEY")
    assert "set OMDB_API_KEY" in call(synth, *flags, cwd=tmp_path, check=2).stderr


@real_data
@pytest.mark.parametrize("name, titles", [
    ("amazon_movies_sample.txt", ["B0001G6PZC", "B000063W1R", "0790747324", "B002OHDRF2"]),
    ("amazon_movies_and_tv_5_sample.jsonl", ["0005019281", "0005119367"])])
def test_the_real_reviews_give_rows(tmp_path, call, name, titles):
    (tmp_path / "t.csv").write_text("".join(f"{t},Film {t}\n" for t in titles))
    p = call(synth, "reviews", "--reviews", SHARED / "movies" / name, "--titles", "t.csv",
             "--metadata", "none", "--out", "d", cwd=tmp_path)
    assert "records that are no review" not in p.stderr
    _, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    assert len(rows["train"]) > 60 and {r["question_id"] for r in rows["train"]} == {
        f"Film {t}" for t in titles}
    assert not any("<br" in r["accept_response"] or "&quot;" in r["accept_response"]
                   for r in rows["train"])


@real_data
def test_the_real_omdb_answers_describe_a_film():
    o = synth.Reviews(metadata=str(SHARED / "movies/omdb_responses.jsonl"))
    about = synth.find_metadata(["Iron Man", "iron man (2008)", "Iron Man (1999)", "No Such"], o)
    assert list(about) == ["Iron Man", "iron man (2008)"]
    assert synth.describe(about["Iron Man"]).startswith(
        "Iron Man, 2008, Jon Favreau (Genre: Action, Adventure, Sci-Fi). After being held captive")


def test_a_title_of_several_films_is_none_of_them(tmp_path):
    films = [{"Title": "The Ring", "Year": y, "Response": "True"} for y in ("1995", "2002")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(f) + "\n" for f in films))
    o = synth.Reviews(metadata=str(tmp_path / "m.jsonl"))
    about = synth.find_metadata(["The Ring", "The Ring (1995)"], o)
    assert list(about) == ["The Ring (1995)"] and about["The Ring (1995)"]["Year"] == "1995"


def test_what_was_seen_before_is_told_apart():
    seen = synth.Seen()
    assert not any(seen((k, "text")) for k in range(1000))
    assert all(seen((k, "text")) for k in range(1000)) and not seen(("k", "text"))


# ---------------------------------------------------------------------------------------------
# Mined beliefs

@pytest.fixture
def judge(server, monkeypatch):
    """An LLM that mines: two principles, told by a word of the prompt."""
    monkeypatch.setattr(data, "PAUSE", 0.01)

    def reply(prompt):
        if "State the one" in prompt:
            principle = "Do not harm." if "hurt" in prompt else "Be brief."
            return principle + str(prompt.count("x") % 2)
        if "Group the numbered" in prompt:
            numbers = {k: [n for n, s in re.findall(r"^(\d+)\. (.*)$", prompt, re.M) if s[:5] == k]
                       for k in ("Do no", "Be br")}
            return (f"1. Do not harm :: {', '.join(numbers['Do no'])}\n"
                    f"2. Be brief :: {', '.join(numbers['Be br'])}")
        sides = re.search(r"Answer 1: (.*?)\n\nAnswer 2: (.*?)\n\nDoes", prompt, re.S).groups()
        return "\n".join(
            f"{n}: {'agree' if 'good' in a else 'Neutral' if 'so' in a else 'disagree'}"
            for n, a in enumerate(sides, 1))
    server.answer = lambda r: (200, completion(server.spoil(reply(
        r.body["messages"][0]["content"]), r.body["messages"][0]["content"])))
    server.spoil = lambda reply, prompt: reply
    return server


def hh(path, n=60):
    with gzip.open(path, "wt") as f:
        for i in range(n):
            base = f"\n\nHuman: {'hurt' if i % 2 else 'talk'} {i}?\n\nAssistant: Hm.\n\nHuman: And?"
            say = ["good", "so so"][::-1 if i % 10 == 0 else 1]
            f.write(json.dumps({"chosen": f"{base}\n\nAssistant: {say[0]} {i}", "rejected":
                                f"{base}\n\nAssistant: {say[1] if i % 3 else 'no'} {i}"}) + "\n")


def test_beliefs_are_mined_from_pairs_that_had_none(tmp_path, call, judge):
    hh(tmp_path / "hh.jsonl.gz")
    flags = ("mine", "--pairs", "hh.jsonl.gz", "--base_url", judge.url, "--out", "d")
    call(synth, *flags, cwd=tmp_path)
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    rows = sum(rows.values(), [])
    assert meta["classes"] == ["1", "2", "3"] and len(rows) == 60
    for r in rows:
        i = int(re.search(r"\d+", r["prompt"])[0])
        assert r["prompt"] == f"{'hurt' if i % 2 else 'talk'} {i}?\n\nAssistant: Hm.\n\nHuman: And?"
        assert r["accept_choice"] == ("Do not harm" if i % 2 else "Be brief") == r["reject_choice"]
        assert r["accept_choice_id"] == ("3" if i % 10 else "2")     # whichever stood first
        reject = "1" if i % 3 == 0 else ("2" if i % 10 else "3")
        assert r["reject_choice_id"] == reject
        assert r["probabilities"] == ([0, 0, 1] if i % 2 else [0, 0.2, 0.8])
    sent = len(judge.requests)
    assert sent == 60 + 1 + 60
    (tmp_path / "d").rename(tmp_path / "first")
    call(synth, *flags, cwd=tmp_path)
    assert len(judge.requests) == sent


def test_equal_pairs_are_left_out_and_a_prompt_stays_in_one_split(tmp_path, call, judge):
    with open(tmp_path / "p.jsonl", "w") as f:
        for i in range(60):
            f.write(json.dumps({"prompt": f"talk {i % 6}?", "chosen": f"good {i}",
                                "rejected": f"no {i}" if i < 50 else f"good {i}"}) + "\n\n")
    p = call(synth, "mine", "--pairs", "p.jsonl", "--base_url", judge.url, "--out", "d/",
             cwd=tmp_path)
    assert "60 pairs, of which 10 are left out" in p.stderr
    assert (tmp_path / "d.answers.jsonl").is_file()         # whatever --out ends in
    _, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    prompts = [{r["prompt"] for r in rows[s]} for s in SPLITS]
    assert [len(p) for p in prompts] == [4, 1, 1] and sum(map(len, rows.values())) == 50


def test_no_more_than_max_statements_are_kept(judge, tmp_path):
    client = synth.Client(synth.Chat(base_url=judge.url), tmp_path / "c.jsonl")
    several = ["Do not harm 1", "Do not harm 2", "Be brief 1"]
    of, problems = synth.group_statements(client, several, 1)
    assert set(of.values()) == {"Do not harm"}
    assert problems == [{"problem": "a statement beyond --max_statements", "text": "Be brief",
                         "pairs": 1}]


def test_a_damaged_archive_is_one_line(tmp_path):
    hh(tmp_path / "hh.jsonl.gz")
    (tmp_path / "cut.gz").write_bytes((tmp_path / "hh.jsonl.gz").read_bytes()[:400])
    with pytest.raises(ValueError, match="cut.gz is damaged .*fetch it again"):
        synth.read_pairs(tmp_path / "cut.gz")


def test_statements_are_grouped_in_rounds(judge, tmp_path):
    client = synth.Client(synth.Chat(base_url=judge.url), tmp_path / "c.jsonl")
    several = [f"Do not harm {n}" for n in range(9)] + [f"Be brief {n}" for n in range(9)]
    of, problems = synth.group_statements(client, several, 3, size=6)
    assert of == {s: "Do not harm" if "harm" in s else "Be brief" for s in several}
    assert problems == [] and len(judge.requests) == 4


def test_replies_that_cannot_be_read_are_counted_in_mining(tmp_path, call, judge):
    hh(tmp_path / "hh.jsonl.gz")

    def spoil(reply, prompt):
        if "State the one" in prompt and "talk 4?" in prompt:
            return "I'm sorry.\nI cannot."
        if "Statement:" in prompt and "talk 8?" in prompt:
            return "both agree"
        if "Statement:" in prompt and "talk 14?" in prompt:
            return "1: agree\n2: agree"
        return reply
    judge.spoil = spoil
    p = call(synth, "mine", "--pairs", "hh.jsonl.gz", "--base_url", judge.url, "--out", "d",
             cwd=tmp_path)
    for what in ("a reply that is no statement", "a reply that names no two stances",
                 "a pair whose sides hold the same stance"):
        assert f"1 x {what}" in p.stderr
    assert len(sum(load_dataset(str(tmp_path / "d"), SPLITS)[1].values(), [])) == 57


@real_data
def test_the_real_pairs_are_read():
    pairs = synth.read_pairs(SHARED / "hh_rlhf/helpful-base_test.jsonl.gz")
    assert len(pairs) == 2354
    prompt, chosen, rejected = pairs[0]
    assert prompt.startswith("Do you know why turkeys") and chosen.startswith("To be honest")
    assert rejected.startswith("I know that the American Indians")
    assert not any("\n\nAssistant:" in p[1] and p[1].startswith("\n") for p in pairs)


@pytest.mark.parametrize("text, classes", [
    ("1: agree\n2: disagree", ["3", "1"]), ("Answer 1: **Agrees**.\n2. Neutral", ["3", "2"]),
    ("1: agree or disagree\n2: disagree", None), ("1: disagree/agree\n2: agree", None),
    ("1: agree, neutral or disagree\n2: agree", None), ("1: agree", None), ("", None)])
def test_stances_are_never_guessed(text, classes):
    assert synth.parse_stances(text) == classes


def test_pairs_with_a_prompt_are_read_and_others_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Hi?", "chosen": "a", "rejected": "b"}\n')
    assert synth.read_pairs(path) == [("Hi?", "a", "b")]
    for bad in ('{"chosen": "a"}', '{"chosen": "a", "rejected": "b"}', "[]", "{"):
        path.write_text('{"prompt": "Hi?", "chosen": "a", "rejected": "b"}\n' + bad + "\n")
        with pytest.raises(ValueError, match="line 2: no pair"):
            synth.read_pairs(path)


# ---------------------------------------------------------------------------------------------
# In-context rows

def test_rows_get_shots_of_other_questions_in_the_papers_template(tmp_path, call, world):
    call(synth, "icf", "--data", world, "--shots", 3, "--out", "d", cwd=tmp_path)
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    _, plain = load_dataset(str(world), SPLITS)
    shots = {f"Question: {r['prompt']}, Answer:{r['accept_choice_id']}<{r['accept_choice']}>"
             f"{r['accept_response']}\n\n": r["question_id"] for r in plain["train"]}
    for split in SPLITS:
        for row, old in zip(rows[split], plain[split]):
            assert {k: v for k, v in row.items() if k != "context"} == old
            assert row["context"][0].startswith("You are a helpful assistant and can generate")
            asked = [shots[s] for s in row["context"][1:]]             # training rows, all of them
            assert len(set(row["context"])) == 4 and row["question_id"] not in asked
    assert prompt_text(rows["test"][0], meta["form"]) == \
        f"Question: {rows['test'][0]['prompt']}, Answer:"
    p = call(synth, "icf", "--data", "d", "--out", "e", cwd=tmp_path, check=2)
    assert "has the form 'Question: {prompt}, Answer:' already" in p.stderr
    p = call(synth, "icf", "--data", world, "--shots", 41, "--out", "e", cwd=tmp_path, check=2)
    assert "has not 41 training rows" in p.stderr


def test_a_review_that_begins_with_a_digit_does_not_hide_its_rating():
    row = {"prompt": "Film", "accept_choice_id": "5", "accept_response": "10 out of 10"}
    assert synth.example(row, "Question: {prompt}, Answer:") == \
        "Question: Film, Answer:5 10 out of 10\n\n"


def test_shots_are_dropped_until_the_row_fits(tmp_path, call, world, capsys):
    call(synth, "icf", "--data", world, "--shots", 5, "--out", "d", cwd=tmp_path)
    meta, rows = load_dataset(str(tmp_path / "d"), ("train",))
    tok = data.train_bpe([r["prompt"] + r["accept_response"] for r in rows["train"]], 400)
    whole = encode_rows(rows["train"], tok, meta, 10_000)
    cut = encode_rows(rows["train"], tok, meta, 200)
    assert "40 of 40 rows do not fit 200 tokens with all their shots" in capsys.readouterr().err
    for long, short, row in zip(whole, cut, rows["train"]):
        assert short.length(data.EVAL_BRANCHES) <= 200 < long.length(data.EVAL_BRANCHES)
        text, (first, *shots) = tok.decode(short.prompt), row["context"]
        kept = [s for s in shots if s in text]
        first *= bool(kept)                                 # no shot, no instruction
        assert text == first + "".join(kept) + prompt_text(row, meta["form"])
        assert kept == shots[len(shots) - len(kept):]
        one_more = shots[len(shots) - len(kept) - 1:]
        text = row["context"][0] + "".join(one_more) + prompt_text(row, meta["form"])
        assert len(tok.encode(text)) + short.length(data.EVAL_BRANCHES) - len(short.prompt) > 200


# ---------------------------------------------------------------------------------------------
# Published sets, by the hub's rows API

def published(server, rows, ours=("train", "validation", "test"), long=()):
    """Plays datasets-server: rows {split: [row]}; `long` cells come cut off in pages above 1."""
    def answer(r):
        if r.query.get("dataset") != "Some/set":
            return 404, {"error": "The dataset does not exist."}
        if r.path == "/splits":
            return 200, {"splits": [{"dataset": "Some/set", "config": "default", "split": s}
                                    for s in ours], "pending": [], "failed": []}
        several = rows[r.query["split"]]
        start, length = int(r.query["offset"]), int(r.query["length"])
        assert r.query["config"] == "default" and length <= 100
        out = [{"row_idx": start + i, "row": row, "truncated_cells":
                ["accept_response"] if length > 1 and start + i in long else []}
               for i, row in enumerate(several[start:start + length])]
        return 200, {"features": [], "rows": out, "num_rows_total": len(several),
                     "num_rows_per_page": 100, "partial": False}
    server.answer = answer


def rows_of(n, six=True):
    row = {"prompt": "<Q>How?<A>", "options": "['Good', 'Bad', \"Don't know\"]",
           "accept_choice_id": 4, "accept_choice": "Good", "accept_response": "ok",
           "probabilities": [0.1, 0, 0.3, 0, 0.6, 0],
           "reject_choice_id": "2", "reject_choice": "Bad", "reject_response": "no", "extra": 1}
    if not six:
        row |= {"probabilities": "[0.1, 0.1, 0.2, 0.2, 0.4]", "options": [1, 2, 3, 4, 5],
                "accept_choice": None, "reject_choice": None, "accept_choice_id": 5.0}
    return [row | {"accept_response": f"ok {i}"} for i in range(n)]


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PAUSE", 0.01)
    monkeypatch.setenv("HF_DATASETS_SERVER", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return server


def break_off(hub, offset):
    """A fetch that the hub ends with an error at a row."""
    good = hub.answer
    hub.answer = lambda r: (400, "gone") if r.query.get("offset") == str(offset) else good(r)
    with pytest.raises(ValueError, match="400 .*gone"):
        load_dataset("Some/set", SPLITS)
    hub.answer = good


def test_a_published_set_is_fetched_once(hub):
    rows = {"train": rows_of(250), "validation": rows_of(3), "test": rows_of(2)}
    published(hub, rows, long=[123])
    meta, rows = load_dataset("Some/set", SPLITS)
    assert [len(rows[s]) for s in SPLITS] == [250, 3, 2]
    assert [r["accept_response"] for r in rows["train"]] == [f"ok {i}" for i in range(250)]
    assert rows["train"][0] == {
        "prompt": "How?", "options": ["Good", "Bad", "Don't know"], "accept_choice_id": "4",
        "probabilities": [0.1, 0, 0.3, 0, 0.6, 0], "accept_choice": "Good",
        "accept_response": "ok 0", "reject_choice_id": "2", "reject_choice": "Bad",
        "reject_response": "no", "question_id": rows["train"][9]["question_id"]}
    assert meta["classes"] == synth.CLASSES and meta["off_scale"] == "0"
    assert meta["belief_to_class"] == {"Good": "4", "Bad": "2"}
    sent = len(hub.requests)
    load_dataset("Some/set", SPLITS)
    assert len(hub.requests) == sent


def test_published_rows_know_their_question_and_group(hub):
    """Rows of one question share options and shares; the country is in the set's name."""
    rows = rows_of(3) + rows_of(3)
    for row in rows[3:]:
        row["probabilities"] = [0, 0, 0.5, 0, 0.5, 0]
    published(hub, {s: rows for s in SPLITS}, ours=SPLITS)
    assert len({r["question_id"] for r in load_dataset("Some/set", SPLITS)[1]["train"]}) == 2
    assert data.published_row(rows[0], "Binwei01/mmoqa_pk_large", "x")["group"] == "Pakistan"
    with pytest.raises(ValueError, match="needs a group in every row"):
        load_dataset("Some/set", SPLITS, "<G>{group}<Q>{prompt}<A>")


def test_a_set_that_changed_or_has_several_configurations_is_not_stitched(hub):
    rows = {s: rows_of(250) for s in SPLITS}
    published(hub, rows, ours=SPLITS)
    break_off(hub, 200)
    published(hub, {s: rows_of(150) for s in SPLITS}, ours=SPLITS)
    with pytest.raises(ValueError, match="150 rows on the hub, of which 200 came: it has changed"):
        load_dataset("Some/set", SPLITS)
    assert len(load_dataset("Some/set", SPLITS)[1]["train"]) == 150


@pytest.mark.parametrize("path, answer, message", [
    ("/splits", {"error": "busy"}, "the hub answered"), ("/splits", [], "the hub answered"),
    ("/rows", {"rows": [1], "num_rows_total": 5}, "not a page of rows"),
    ("/rows", {"rows": [], "num_rows_total": 5, "partial": True}, "only a part of its rows"),
    ("/splits", {"splits": [{"config": c, "split": "train"} for c in "ab"]},
     "several configurations"),
    ("/splits", {"splits": [{"config": "default", "split": "train"}]}, "none is called eval or"),
])
def test_odd_answers_of_the_hub_are_one_line(hub, path, answer, message):
    published(hub, {s: rows_of(3) for s in SPLITS}, ours=SPLITS)
    good = hub.answer
    hub.answer = lambda r: (200, answer) if r.path == path else good(r)
    with pytest.raises(ValueError, match=message):
        load_dataset("Some/set", SPLITS)


def test_a_published_row_without_an_answer_is_left_out_aloud(hub, capsys):
    rows = rows_of(120)
    rows[7]["reject_response"] = " "
    rows[8]["prompt"] = rows[9]["accept_choice_id"] = ""
    published(hub, {s: rows for s in SPLITS}, ours=SPLITS)
    assert len(load_dataset("Some/set", SPLITS)[1]["train"]) == 117
    assert "3 rows with an empty text are left out" in capsys.readouterr().err


def test_a_published_set_of_reviews_has_five_classes(hub):
    published(hub, {s: rows_of(5, six=False) for s in SPLITS}, ours=SPLITS)
    meta, rows = load_dataset("Some/set", SPLITS)
    assert meta["classes"] == ["1", "2", "3", "4", "5"] and not meta["off_scale"]
    assert rows["train"][0]["accept_choice_id"] == "5" and "accept_choice" not in rows["train"][0]
    assert rows["train"][0]["options"] == ["1", "2", "3", "4", "5"]


def test_a_broken_off_fetch_goes_on_where_it_was(hub):
    rows = {s: rows_of(450) for s in SPLITS}
    published(hub, rows, ours=SPLITS)
    break_off(hub, 300)
    part = next(data.hub_cache().rglob("train.jsonl.part"))
    assert len(part.read_text().splitlines()) == 300
    with open(part, "a") as f:
        f.write('{"prompt": "half a li')
    sent = len(hub.requests)
    assert [r["accept_response"] for r in load_dataset("Some/set", SPLITS)[1]["train"]] == [
        f"ok {i}" for i in range(450)]
    assert [r.query["offset"] for r in hub.requests[sent:] if r.query.get("split") == "train"] == [
        "300", "400"]


@pytest.mark.parametrize("change, message", [
    ({"prompt": None}, "has no column prompt"),
    ("probabilities", "has no column probabilities; it has accept"),
    ({"options": "Good|Bad"}, "options is no list"),
    ({"probabilities": [0.5, 0.5]}, "probabilities of .* entries: 5 .ratings. or 6"),
    ({"options": 5}, "row 0: options is no list: 5"),
])
def test_a_published_set_of_another_form_stops_with_what_was_found(hub, change, message):
    rows = {s: rows_of(3) for s in SPLITS}
    for row in rows["train"]:
        row.pop(change) if isinstance(change, str) else row.update(change)
    published(hub, rows, ours=SPLITS)
    with pytest.raises(ValueError, match=message):
        load_dataset("Some/set", SPLITS)


def test_a_name_that_is_nowhere_is_one_line(hub, call, tmp_path, monkeypatch):
    import train
    published(hub, {})
    p = call(train, "--data", "Other/set", cwd=tmp_path, check=2)
    assert "no folder Other/set, and the hub has no such dataset" in p.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    p = call(train, "--data", "Other/set", cwd=tmp_path, check=2)
    assert "HF_HUB_OFFLINE is set" in p.stderr


def test_the_survey_table_comes_from_the_hub(table, llm, tmp_path, call, monkeypatch):
    text = (tmp_path / "t.csv").read_text()
    monkeypatch.setenv("HF_ENDPOINT", llm.url)
    paths = []

    def answer(r):
        paths.append(r.path)
        return 200, text, ("ETag", '"abc"'), ("X-Repo-Commit", "c0ffee")
    llm.answer = answer
    llm_flags = [x for x in table if x not in ("--csv", table[1])]
    p = opinions(call, llm, tmp_path, *llm_flags)
    assert "3 questions for Chile" in p.stderr
    assert set(paths) == {"/datasets/Anthropic/llm_global_opinions/resolve/main/data/"
                          "global_opinions.csv"}
