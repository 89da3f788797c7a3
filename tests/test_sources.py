"""python -m pytest tests/test_sources.py: every source of rows; a server plays LLMs and APIs."""
import gzip
import json
import re
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import SHARED, completion, real_data

import data
import model
import synth
from data import SPLITS, encode_rows, load_dataset, prompt_text


@pytest.fixture
def make(call, tmp_path):
    """make(command, *flags) writes tmp_path/d anew -> (what it said, meta, {split: rows}); with
    check=2 it fails, and only what it said comes back."""
    def make(*flags, check=0):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        err = call(synth, *flags, "--out", "d/", cwd=tmp_path, check=check).stderr
        return err if check else (err, *load_dataset(str(tmp_path / "d"), SPLITS))
    return make


@pytest.fixture
def llm(server, make):
    """Writes as Appendix A asks, gives classes, and mines two principles, told by a word of the
    prompt. .spoil: {pattern of prompts: another reply, or (status, answer)}. .make: a command."""
    server.spoil = {}
    server.make = lambda *flags, **kw: make(*flags, "--base_url", server.url, **kw)

    def reply(prompt):
        if "Choices:" in prompt:
            n, asked, options = re.search(r"generate (\d+) different.*Question: (.*?)\n"
                                          r"Choices: (.*?)\n", prompt, re.S).groups()
            dialogue = f"Style 1: Style\nQ: {asked} (@)\n" + "".join(
                f"A{k}: [{o}] In @ I say: {o}.\n" for k, o in enumerate(json.loads(options), 1))
            return "\n".join(dialogue.replace("@", f"{len(server.requests)}.{i}")
                             for i in range(int(n)))
        if option := re.search("Option: (.*)", prompt):
            return {"Maybe": "The class is 3.", "Yes": '{"answer": "4"}'}.get(option[1], "2")
        if "State the one" in prompt:
            return f'{"Do not harm" if "hurt" in prompt else "Be brief"}.{prompt.count("x") % 2}'
        if "Group the numbered" in prompt:
            listed = re.findall(r"^(\d+)\. (.*)$", prompt, re.M)
            return "\n".join(f"- {k} :: " + ", ".join(n for n, s in listed if s[:5] == k[:5])
                             for k in ("Do not harm", "Be brief"))
        sides = re.search(r"Answer 1: (.*?)\n\nAnswer 2: (.*?)\n\nDoes", prompt, re.S).groups()
        return "1: {}\n2: {}".format(*(
            "agree" if "good" in x else "neutral" if "so" in x else "disagree" for x in sides))

    def answer(r):
        prompt = r.body["messages"][0]["content"]
        found = [new for words, new in server.spoil.items() if re.search(words, prompt, re.S)]
        said = found[0] if found else reply(prompt)
        return said if isinstance(said, tuple) else (200, completion(said))
    server.answer = answer
    return server


def save(path, *records):
    """Write texts and JSON, with empty lines between them, plain or as .gz."""
    text = "\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


# --- The LLM as writer -----------------------------------------------------------------------
REPLY = """Here are two styles:

Style 1: Casual and Friendly
Q: So, tell me: how do you rate it? [be honest]
A1: [Yes] Honestly: a great job: 5 of 5! Ask A2: [sigh] never mind.
A2: [DK/It's "fine" [VOL]] It's "fine", I'd say. "Never" is no "word".

**Style 2: Formal**
- **Question 2:** "How would you evaluate it?"

- **C** : [dk/it’s “fine” [VOL].] - Fine.
1. [YES]: "Excellent."

I hope that these small talks help!
"""
STYLES = {"styles": [{"question": "a?", "answers": {"Yes": "y", "no.": "[No] n"}}]}
YES = "Q: a?\nA1: [Yes] y"
GOOD = f"{YES}\nA2: [No] n"


def test_a_reply_is_read_however_it_is_laid_out():
    assert synth.parse_dialogues(REPLY, ["Yes", 'DK/It\'s "fine" [VOL]']) == ([
        ("So, tell me: how do you rate it? [be honest]", [
            "Honestly: a great job: 5 of 5! Ask A2: [sigh] never mind.",
            "It's \"fine\", I'd say. \"Never\" is no \"word\"."]),
        ("How would you evaluate it?", ["Excellent.", "Fine."])], [])
    for reply in (
            GOOD, "Q1. a?\n1. [Yes] y\n2. [No] n", "*Q:* a?\n*A1:* [Yes] y\n*A2 -* [No] n",
            "1. Q: a?\n- **B.** [Yes] y\n- **A:** [No] n", "q1: a?\n(1) [Yes] y\nA-2: [No] n",
            "Question: a?\nAnswer 1: [Yes] y\nb) [No] n", "__Q:__ a?\n> [No]: n\n> [yes]: y",
            "Q: \"a?\"\nA1: [\"Yes\"] \"y\"\nA2: [ No ] n", f"```\n{GOOD}\n```",
            f"{GOOD}\nStyle 2: b", "Q: a?\n\nA1: [Yes] y\n---\nA2: [No] n\n\nBye!",
            "Q: a?\r\nA1: (1. Yes) y\r\nA2: [B. No] n\r\n", "Q:\u00a0a?\nA1:\u00a0[Yes] y\n[No] n",
            "Q： a?\nA1： 【Yes】 y\nA2： [Option: No] n", json.dumps(STYLES),
            json.dumps(STYLES, indent=1)):
        assert synth.parse_dialogues(reply, ["Yes", "No"]) == ([("a?", ["y", "n"])], [])


@pytest.mark.parametrize("ended, reply", [
    *[("stop", reply) for reply in (
        f"{YES}\nA2: Not certain.\nA3: [No] n", f"{GOOD}\n2. I hope that helps!", YES,
        "Q: Hey!\nWhat of a?\nA1: [Yes] y\nA2: [No] n", f"{GOOD}\nA3: [Yes] y3",
        f"{YES}\n\nStyle 2: b\nParaphrase: c?\nA1: [Yes] y2\nA2: [No] n2",
        f"{YES}\u2028A2: [No] n", "Q:\nA1: [Yes] y\nA2: [No] n", "Q: a?\nA1: [Yes]\nA2: [No] n",
        "Q: a?\nA1: Well (yes) y\nA2: [No] n", GOOD.replace(
            "a?", "What’s your stance on defeating terrorism through military force?"),
        '{"styles": [{"question": "a?", "answers": ["Yes"]}]}')],
    ("stop", "A1: [Yes] y"), ("refused", "I can't."), ("length", GOOD),
    ("length", json.dumps(STYLES)[12:-40])])
def test_a_broken_style_is_listed_and_takes_no_other_with_it(ended, reply):
    found, [problem] = synth.parse_dialogues(reply, ["Yes", "No"], ended)
    assert not found and "a style without" in problem["problem"] and ended in problem["problem"]
    if "?" in reply:
        first = json.dumps(STYLES) if reply[0] == "{" else GOOD
        assert synth.parse_dialogues(f"{first}\n\n{reply}", ["Yes", "No"], ended) == (
            [("a?", ["y", "n"])], [problem])


@pytest.mark.parametrize("labels, found, texts", [
    ("12345", "3", [
        "The rating is 3.", "3 out of 5", "3.0", "**3**", "The predicted rating is: **3**", "[3",
        '{"rating": 3}', " 3.\n", "Answer: 3", '{\n\n"answer"\n\n:\n"3"}']),
    ("12345", None, ["1. The film is dull", "1: France", "4 or 5", "2/3", "10", "-3", "", "{}",
                     "agree", "1\n2", '{"a": 1, "b": 2}']),
    (["Yes", "No"], "Yes", ["answer: yes"]), ("stances", ["3", "1"], ["1: agree\n2: disagree"]),
    ("stances", ["3", "2"], ["Answer 1: **Agrees**.\n2. Neutral",
                             '{"answer_1": "agree", "answer_2": "neutral"}']),
    ("stances", None, ["1: agree or disagree\n2: disagree", "1: agree", '{"answer_1": "agree"}',
                       '{"answer_1": "agree", "answer_2": "maybe"}'])])
def test_labels_and_stances_are_read_and_never_guessed(labels, found, texts):
    read = synth.parse_stances if labels == "stances" else partial(synth.read_label, labels=labels)
    assert [read(text) for text in texts] == [found] * len(texts)


def test_an_llm_writes_the_dialogues(table, llm):
    flags = ("opinions", *table, "--writer", "llm", "--noise", 0, "--pairs_per_question", 90)
    err, meta, rows = llm.make(*flags)
    assert "Chile (rural): 12 of 12 replies could be read" in err
    body = llm.requests[0].body
    assert "Chile (rural), please generate 10 different" in body["messages"][0]["content"]
    assert body["max_tokens"] == 4096 and body["response_format"]["type"] == "json_schema"
    assert [len(rows[s]) for s in SPLITS] == [2 * 72, 2 * 9, 2 * 9 + 18]
    assert meta["belief_to_class"]["A lot"] == "5" and meta["llm"]["llm"] == "gpt-3.5-turbo-1106"
    for r in sum(rows.values(), []):                        # the answer is the one to its belief
        for side in ("accept", "reject"):
            assert r[f"{side}_response"].endswith(f": {r[f'{side}_choice']}.")
        texts = r["prompt"], r["accept_response"], r["reject_response"]
        assert len({re.search(r"\d+\.\d+", t)[0] for t in texts}) == 1       # of one style
    assert llm.make(*flags)[2] == rows and len(llm.requests) == 3 * 4  # then it asks nothing


def test_what_an_llm_spoils_is_counted_and_a_writer_of_nothing_is_stopped(table, llm, tmp_path):
    flagged = {"error": {"message": "Your prompt was flagged", "code": "invalid_prompt"}}
    same = "".join(f"Q: So {n}?\n[Yes] y\n[Don't know] d\n[No] n\n" for n in range(10))
    llm.spoil = {"How bad": "I'm sorry, I cannot.", "Third": (400, flagged), "Is it so": same}
    err, _, rows = llm.make("opinions", *table, "--writer", "llm", "--holdout_questions", 0)
    problem = "a style without a question of its own and one answer to each option"
    for what in (f"4 x {problem} (stop)", f"4 x {problem} (refused)",
                 "30 x a wording given before", "2 x a question with fewer than 3 texts"):
        assert what in err
    assert "I'm sorry, I cannot." in (tmp_path / "d/unparsed.jsonl").read_text()
    prompts = [(r["question_id"], r["prompt"]) for r in sum(rows.values(), [])]
    assert len(prompts) == len({*prompts}) == 10 and {q for q, _ in prompts} == {"0"}
    llm.spoil = {"": "As an AI model I have no opinion."}
    llm.requests.clear()
    err = llm.make("opinions", *table, "--writer", "llm", "--styles", 2, check=2)
    assert len(llm.requests) == 20 and "0 of 20 replies could be read" in err
    assert "As an AI model I have no opinion." in err.splitlines()[-1]
    assert (tmp_path / "d.unparsed.jsonl").read_text().count("\n") >= 20
    assert not (tmp_path / "d").exists()


def test_an_option_of_a_used_question_without_a_class_gets_one(table, llm, tmp_path):
    llm.make("opinions", *table, "--map", "", "--classify", "llm", "--max_questions", 1,
             "--holdout_questions", 0)
    body = llm.requests[0].body
    assert len(llm.requests) == 3 and body["temperature"] == 0 and body["max_tokens"] == 50
    assert body["response_format"]["json_schema"]["schema"]["properties"] == {
        "answer": {"type": "string", "enum": synth.CLASSES}}
    save(tmp_path / "map.json", {"No": 1})
    llm.spoil = {"A bit": "1. Unsure"}
    err, meta, _ = llm.make("opinions", *table, "--classify", "llm")   # and what --map lacks
    assert "3 of 4 questions" in err and "1 x an option that the LLM gave no class" in err
    assert len(llm.requests) == 3 + 6 - 2 and meta["belief_to_class"] == {
        "No": "1", "Yes": "4", "Maybe": "3", "Don't know": "2"}


def test_the_survey_table_comes_from_the_hub(table, server, make, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    text = (tmp_path / "t.csv").read_text()
    server.answer = lambda r: (200, text, ("ETag", '"abc"'), ("X-Repo-Commit", "c0ffee"))
    assert "3 of 4 questions" in make("opinions", *table[2:])[0]                       # no --csv
    assert {r.path for r in server.requests} == {
        "/datasets/Anthropic/llm_global_opinions/resolve/main/data/global_opinions.csv"}


# --- Published sets, by the hub's rows API ---------------------------------------------------
def published_rows(n, **change):
    row = {"prompt": "<Q>How?<A>", "options": "['Good', 'Bad', \"Don't know\"]", "extra": 1,
           "probabilities": [.1, 0, .3, 0, .6, 0], "accept_choice_id": 4, "accept_choice": "Good",
           "reject_choice_id": "2", "reject_choice": "Bad", "reject_response": "no"}
    return [row | {"accept_response": f"ok {i}"} | change for i in range(n)]


@pytest.fixture
def hub(server, monkeypatch, make):
    """Plays datasets-server: .rows {split: [row]}, of which number 123 comes cut off in pages of
    more than one row. .fetch(*flags) runs the command."""
    monkeypatch.setenv("HF_DATASETS_SERVER", server.url)
    server.fetch = partial(make, "published", "--name", "Some/set")

    def answer(r):
        assert r.query["dataset"].startswith("Some/")
        if r.path == "/splits":
            return 200, {"splits": [{"config": "default", "split": s} for s in server.rows]}
        if r.query["split"] not in server.rows or r.query["config"] != "default":
            return 404, {"error": f"no split {r.query['split']}"}
        rows, start, n = server.rows[r.query["split"]], int(r.query["offset"]), r.query["length"]
        return 200, {"features": [], "num_rows_total": len(rows), "partial": False, "rows": [
            {"row_idx": i, "row": row, "truncated_cells": ["x"] * (n != "1" and i == 123)}
            for i, row in enumerate(rows[start:start + min(int(n), 100)], start)]}
    server.answer = answer
    return server


def test_a_published_set_is_fetched_and_its_rows_know_their_question_and_group(hub):
    odd = [published_rows(1, **change)[0] for change in (
        {"reject_response": " "}, {"prompt": ""}, {"accept_choice_id": ""}, {"options": None},
        {"accept_response": None}, {"probabilities": "[0, 0, 0.4, null, 0.6, 0]"})]
    other = published_rows(3, probabilities="[0, 0, 0.5, 0, 0.5, 0]", accept_choice_id=5,
                           reject_choice_id=0)              # which is no empty cell
    hub.rows = {"train": published_rows(250) + odd + other, "validation": published_rows(3) + odd,
                "test": published_rows(2)}
    err, meta, rows = hub.fetch("--name", "Some/mmoqa_pk_large")
    train = rows["train"]
    assert [len(rows[s]) for s in SPLITS] == [253, 3, 2]
    assert "12 x a row with an empty or odd cell" in err
    assert [r["accept_response"] for r in train[:250]] == [f"ok {i}" for i in range(250)]
    assert train[0] | {"extra": 1} == published_rows(1)[0] | {
        "prompt": "How?", "options": ["Good", "Bad", "Don't know"], "accept_choice_id": "4",
        "group": "Pakistan", "question_id": train[9]["question_id"]}
    assert len({r["question_id"] for r in train}) == 2 and train[-1]["reject_choice_id"] == "0"
    assert meta["classes"] == synth.CLASSES and meta["off_scale"] == "0"
    assert meta["belief_to_class"] == {"Good": "4", "Bad": "2"}            # the most frequent ones
    rows = published_rows(5, probabilities="[0.1, 0.1, 0.2, 0.2, 0.4]", options=[1, 2, 3, 4, 5],
                          accept_choice=None, reject_choice=None, accept_choice_id=5.0)
    hub.rows = dict.fromkeys(("train", "dev", "test"), rows)               # reviews: five classes
    _, meta, rows = hub.fetch()
    row = rows["train"][0]
    assert meta["classes"] == row["options"] == [*"12345"] and not meta["off_scale"]
    assert row["accept_choice_id"] == "5" and not {"accept_choice", "group"} & row.keys()


def test_a_killed_fetch_goes_on_where_it_was_unless_the_set_has_changed(hub):
    hub.rows, good = {s: published_rows(450) for s in SPLITS}, hub.answer
    hub.answer = lambda r: (400, "gone") if r.query.get("offset") == "300" else good(r)
    assert "400" in hub.fetch(check=2)
    hub.answer, sent = good, len(hub.requests)
    hub.rows = {s: published_rows(150) for s in SPLITS}
    assert "remove d.rows.jsonl and try again" in hub.fetch(check=2)
    again = [r.query["offset"] for r in hub.requests[sent:] if r.query.get("split") == "train"]
    assert "300" in again and "0" not in again and len(again) <= 3


@pytest.mark.parametrize("path, answer, message", [
    ("/splits", {"error": "busy"}, "busy"), ("/splits", {"splits": []}, "no split eval"),
    ("/splits", [], "unreadable answer"),
    ("/rows", {"rows": [], "num_rows_total": 5}, "0 of 5 rows of train came"),
    ("options", "Good|Bad", "not a list: 'Good|Bad'"),
    ("probabilities", [0.5, 0.5], "a share for each of")])
def test_an_odd_answer_or_set_of_the_hub_is_one_line(hub, path, answer, message):
    rows, good = published_rows(3, **{path: answer}), hub.answer
    hub.rows = {"train": rows, "dev": rows, "test": rows}
    hub.answer = lambda r: (200, answer) if r.path == path else good(r)
    assert message in hub.fetch(check=2).replace("\\", "").splitlines()[-1]


# --- Reviews ---------------------------------------------------------------------------------
SNAP = ("product/productId: P{:d}\nreview/userId: A\nreview/profileName: a: b\n"
        "review/score: {:.1f}\nreview/text: {}")
GREAT = "Good<br /><br />film &amp; fun. It&#39;s a number {} of all that I have seen."
POOR = "Bad, bad film, the number {} of the worst: 9 of 10 would leave."
META = {"Title": "The Ring", "Year": "2002", "Genre": "Horror, Mystery", "imdbID": "tt0298130",
        "Director": "Gore Verbinski", "Plot": "A videotape.", "Response": "True"}
PROMPT = "The Ring, 2002, Gore Verbinski (Genre: Horror, Mystery). A videotape."


@pytest.fixture
def reviews(make, tmp_path, monkeypatch):
    """reviews(file, titles, *flags) runs the command. m.txt.gz has 40 reviews of products P0 and P1
    and 6 to be left out: the same again, half a star, no text, too short, too long, no title."""
    monkeypatch.setenv("OMDB_API_KEY", "omdb-secret")
    save(tmp_path / "m.txt.gz", *(
        SNAP.format(n % 3 > 0, 5 if n % 4 else 2, (GREAT if n % 4 else POOR).format(n))
        for n in range(40)),
        SNAP.format(1, 5, GREAT.format(1)), SNAP.format(1, 3.5, "half a star is none"),
        "product/productId: P1", SNAP.format(1, 4, "short"), SNAP.format(1, 1, "long " * 600),
        SNAP.format(9, 4, "a product that has no title"))

    def reviews(name, titles, *flags, check=0):
        save(tmp_path / "t.csv", titles)
        return make("reviews", "--reviews", name, "--titles", "t.csv", *flags, check=check)
    return reviews


def test_reviews_of_a_film_become_rows_and_omdb_is_asked_once(tmp_path, reviews, server):
    busy = [(503, "busy"), (200, {"Response": "False", "Error": "Error getting data."})]
    server.answer = lambda r: busy.pop() if busy else (200, META)
    flags = "m.txt.gz", 'P0,"The Ring (2002)"\n\nP1, The Ring\n', "--omdb", server.url   # one film
    err, _, rows = reviews(*flags)
    assert {*re.search("left out: (.*)", err)[1].split(", ")} == {
        "1 that repeat the same user's text", "2 that are no review", "2 too short or too long",
        "1 of a product without a title"}
    assert len(rows["train"]) == 32
    for r in sum(rows.values(), []):
        assert r["prompt"] == PROMPT and "accept_choice" not in r
        assert r["probabilities"] == pytest.approx([n / 42 for n in (1, 10, 0, 1, 30)], abs=1e-6)
        assert {(r[f"{side}_choice_id"], r[f"{side}_response"][:11])
                for side in ("accept", "reject")} == {("5", "Good film &"), ("2", "Bad, bad fi")}
    train = {r[f"{s}_response"] for r in rows["train"] for s in ("accept", "reject")}
    assert not train & {r["accept_response"] for r in rows["eval"] + rows["test"]}
    assert {"t": "The Ring", "y": "2002", "plot": "short", "r": "json",
            "apikey": "omdb-secret"} in [r.query for r in server.requests]
    assert "secret" not in (tmp_path / "d.omdb.jsonl").read_text() + err
    assert reviews(*flags)[2] == rows and len(server.requests) == 4     # two films, two tried again


def test_an_unknown_film_is_counted_and_a_failure_is_none(tmp_path, reviews, server, monkeypatch):
    flags = "m.txt.gz", "P0,The Ring (2002)\nP1,Heard, But Not Seen\n", "--omdb", server.url
    for status, words in ((401, "Invalid API key!"), (200, "Request limit reached!")):
        server.answer = lambda r: (status, {"Response": "False", "Error": words})
        err = reviews(*flags, check=2)
        assert words in err and "secret" not in err and not (tmp_path / "d.omdb.jsonl").exists()
    server.answer = lambda r: (200, META if r.query["t"] == "The Ring" else {
        "Response": "False", "Error": "Movie not found!"})
    err, _, rows = reviews(*flags)
    assert "1 x a title without metadata" in err
    assert '"Heard, But Not Seen"' in (tmp_path / "d/unparsed.jsonl").read_text()
    assert {r["prompt"] for r in rows["train"]} == {PROMPT}
    err = reviews(*flags[:-1], server.url + "/?apikey=omdb-secret", check=2)
    assert "address without a key" in err and "secret" not in err
    monkeypatch.delenv("OMDB_API_KEY")
    assert "set OMDB_API_KEY" in reviews(*flags, check=2)


@pytest.mark.parametrize("text, prompt", [
    (r'{"Title":"T","Plot":"in\spiritual \"a\\b\"","Response":"True"}', 'T. in\\spiritual "a\\b"'),
    ('{"Title":"T","Year":"N/A","Plot":"The\x1f joy.\tSo.","Response":"True"}', "T. The joy. So."),
    ('{"Title":"T","Plot":"say "yes""}', ""), ('{"Title":"T","Plot":"half a', None),
    ("<html>", None), ("[]", None), ('{"Response":"False"}', None)])
def test_broken_json_of_one_film_is_mended_or_its_title_left_out(text, prompt):
    with pytest.raises(data.TryAgain) if prompt is None else nullcontext():
        assert synth.read_omdb(SimpleNamespace(text=text))[0] == prompt


def test_the_later_amazon_forms_the_caps_and_equal_words_of_two_users(tmp_path, reviews):
    records = [
        {"asin": f"P{n % 3}", "overall": 5 - n // 3 % 5, "reviewText": "the same " * 5,
         "reviewerID": n} if n % 2 else
        {"asin": f"V{n}", "parent_asin": f"P{n % 3}", "rating": 5 - n // 3 % 5, "text": f"{n} " * 5,
         "user_id": n // 4} for n in range(60)]
    save(tmp_path / "r.jsonl", *records, records[1], '{"broken', {"asin": "P0", "overall": 5.0}, {})
    err, _, rows = reviews("r.jsonl", "P0,Zero\nP1,One\nP2,Two\n", "--metadata", "none",
                           "--max_titles", 2, "--max_reviews", 15, "--min_chars", 1)
    rows = sum(rows.values(), [])
    assert "3 that are no review" in err and "1 that repeat the same user's text" in err
    assert "1 x a title without metadata or two ratings, or beyond --max_titles" in err
    assert {r["prompt"] for r in rows} == {"One.", "Two."}
    assert len(rows) == 30 and rows[0]["probabilities"] == [0.2] * 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_text_is_cleaned_whatever_its_form(tmp_path, encoding):
    (tmp_path / "r.txt").write_bytes("""product/productId: P1\r
review/score: 5.0\r
review/text: Amélie<BR>is &lt;br /&gt;&amp;quot;good&amp;quot; <p>and <a href="x">so</a> \
on the next 3 < 4 “” [[VIDEOID:f6a7]] [[ASIN:B00 The Film]]\r
\r
{'asin': 'P1', 'overall': 4, 'reviewText': 'it\\'s "o"'}""".encode(encoding))   # 2014's set
    assert [*map(synth.review_of, synth.records_in(tmp_path / "r.txt", "cp1252"))] == [
        {"product": "P1", "rating": "5", "text": 'Amélie is "good" and so on the next 3 < 4 “”'},
        {"product": "P1", "rating": "4", "text": "it's \"o\""}]


@pytest.mark.parametrize("text", ["[{}]", "", '{\n "asin": "P1",\n "overall": 5.0\n}\n'])
def test_a_file_without_readable_reviews_and_half_a_download_are_one_line(reviews, tmp_path, text):
    half = tmp_path / "m.txt.gz"
    half.write_bytes(half.read_bytes()[:400])
    last = reviews(half, "P1,One", "--metadata", "none", check=2).splitlines()[-1]
    assert "m.txt.gz is not UTF-8 text, or damaged" in last
    save(tmp_path / "r.jsonl", text)
    last = reviews("r.jsonl", "P1,One", "--metadata", "none", check=2).splitlines()[-1]
    assert "r.jsonl has no review" in last and text[:1] in last.partition("It begins with")[2]


@real_data
@pytest.mark.parametrize("name, products", [
    ("amazon_movies_sample.txt", {"B0001G6PZC", "B000063W1R", "0790747324", "B002OHDRF2"}),
    ("amazon_movies_and_tv_5_sample.jsonl", {"0005019281", "0005119367"})])
def test_the_real_reviews_give_rows(reviews, name, products):
    err, _, rows = reviews(SHARED / "movies" / name, "".join(f"{p},{p}\n" for p in products),
                           "--metadata", "none")
    assert "that are no review" not in err and len(rows["train"]) > 60
    assert {r["question_id"] for r in rows["train"]} == products
    assert not any(re.search("<br|&quot;", r["accept_response"]) for r in rows["train"])


# --- Mined beliefs ---------------------------------------------------------------------------
asked = lambda i: f"{'hurt' if i % 2 else 'talk'} {i % 30}?\n\nAssistant: Hm.\n\nHuman: And?"


@pytest.fixture
def pairs(tmp_path):
    """60 pairs in the form of HH-RLHF, two of each prompt, and 10 of equal answers."""
    path, rows = tmp_path / "hh.jsonl.gz", []
    for i in range(70):
        chosen, rejected = ("good", "so so") if i % 10 else ("so so", "good")
        rejected = chosen if i >= 60 else rejected if i % 3 else "no"
        start = f"\n\nHuman: {asked(i)}\n\nAssistant: "
        rows.append({"chosen": f"{start}{chosen} {i}", "rejected": f"{start}{rejected} {i}"})
    save(path, *rows)
    return path


def test_beliefs_are_mined_from_pairs_that_had_none(llm, pairs):
    err, meta, rows = llm.make("mine", "--pairs", pairs)
    assert "70 pairs, of which 10 are left out" in err and meta["classes"] == ["1", "2", "3"]
    prompts = [{r["prompt"] for r in rows[s]} for s in SPLITS]         # each in one split
    assert [len(p) for p in prompts] == [22, 4, 4] and sum(map(len, rows.values())) == 60
    for r in sum(rows.values(), []):
        i = int(re.search(r"\d+", r["accept_response"])[0])
        assert r["prompt"] == asked(i)
        assert r["accept_choice"] == ("Do not harm" if i % 2 else "Be brief") == r["reject_choice"]
        assert r["accept_choice_id"] == ("3" if i % 10 else "2")     # whichever stood first
        assert r["reject_choice_id"] == ("1" if i % 3 == 0 else "2" if i % 10 else "3")
        assert r["probabilities"] == ([0, 0, 1] if i % 2 else [0, 0.2, 0.8])
    assert [r.body["max_tokens"] for r in llm.requests] == [100] * 60 + [4096] + [60] * 60
    assert ["response_format" in r.body for r in llm.requests] == [False] * 60 + [True] * 61
    assert llm.make("mine", "--pairs", pairs)[2] == rows and len(llm.requests) == 121    # all kept


def test_what_cannot_be_used_costs_one_pair_and_is_counted(llm, pairs, tmp_path):
    flagged = 400, {"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}}
    llm.spoil = {"State.*good 35": "I'm sorry.\nI cannot.", "State the.*good 37": flagged,
                 "Statement:.*good 36": flagged, "Statement:.*good 38": "both agree",
                 "Statement:.*good 44": "1: agree\n2: agree"}
    err, _, rows = llm.make("mine", "--pairs", pairs, "--max_statements", 1)
    for what in ("1 x no statement (stop)", "2 x no two different stances (stop)",
                 "1 x no statement (refused)", "1 x no two different stances (refused)",
                 "28 x a statement in no group, or beyond --max_statements"):
        assert what in err
    rows = sum(rows.values(), [])
    assert len(rows) == 27 and {r["accept_choice"] for r in rows} == {"Be brief"}
    assert (tmp_path / "d/unparsed.jsonl").read_text().count("\n") == 5 + 28


def test_statements_are_grouped_in_parts_and_a_refused_part_costs_no_other(llm, tmp_path):
    client = synth.Client(synth.Chat(base_url=llm.url), tmp_path / "c.jsonl")
    many = [f"Do not harm {n}" for n in range(9)] + [f"Be brief {n}" for n in range(8)]
    group = lambda size: synth.group_statements(client, many, 3, size)
    found = {s: "Do not harm" if "harm" in s else "Be brief" for s in many}
    assert group(6).items() >= found.items() and len(llm.requests) == 3
    llm.spoil = {"brief 7": (400, "flagged")}
    of = group(8)
    assert many[16] not in of and of[many[15]] == "Be brief"
    llm.spoil = {"": '{"groups": ["a :: 2, 1, 99", "- **b** :: 1"]}'}
    assert group(20) == dict.fromkeys(many[:2], "a")        # the first group wins


USER = {"role": "user", "content": "Hi?"}
A, B = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"prompt": "Hi?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("row", [
    PAIR, {"prompt": [USER], "chosen": [A], "rejected": [B]},
    {"chosen": "\n\nHuman: Hi?\n\nAssistant: a", "rejected": "\n\nHuman: Hi?\n\nAssistant: b"},
    {"chosen": [USER, A], "rejected": [USER, B]},
    {"prompt": "Hi?", "chosen": [USER, A], "rejected": [USER, B]}])
def test_pairs_of_any_form_are_read_and_others_left_out(row, tmp_path, capsys):
    odd = [row | {"chosen": None}, {"chosen": "a"}, {"chosen": "a", "rejected": "b"}, "{",
           PAIR | {"chosen": [1]}]
    save(tmp_path / "p.jsonl", "\ufeff" + json.dumps(row), *odd)
    assert synth.read_pairs(tmp_path / "p.jsonl") == [("Hi?", "a", "b")]
    assert "6 pairs, of which 5 are left out" in capsys.readouterr().err
    save(tmp_path / "p.jsonl", *odd)
    with pytest.raises(ValueError, match="p.jsonl has no JSON lines"):
        synth.read_pairs(tmp_path / "p.jsonl")


@real_data
def test_the_real_pairs_are_read():
    pairs = synth.read_pairs(SHARED / "hh_rlhf/helpful-base_test.jsonl.gz")
    assert len(pairs) == 2348 and [text[:20] for text in pairs[0]] == [
        "Do you know why turk", "To be honest, I don’", "I know that the Amer"]


# --- In-context rows -------------------------------------------------------------------------
def test_rows_get_shots_of_other_questions_in_the_papers_template(tmp_path, make, world):
    _, meta, rows = make("icf", "--data", world, "--shots", 3)
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
    (tmp_path / "d").rename(tmp_path / "shot")
    err = make("icf", "--data", "shot", check=2)
    assert "has the form 'Question: {prompt}, Answer:' already" in err
    assert "has not 41 training rows" in make("icf", "--data", world, "--shots", 41, check=2)
    row = {"prompt": "F", "accept_choice_id": "5", "accept_response": "10 out of 10"}
    assert synth.example(row, "{prompt}:") == "F:5 10 out of 10\n\n"          # no rating of 510


def test_shots_are_dropped_until_the_row_fits(make, world, capsys):
    _, meta, rows = make("icf", "--data", world, "--shots", 5)
    tok = model.train_bpe([r["prompt"] + r["accept_response"] for r in rows["train"]], 400)
    whole = encode_rows(rows["train"], tok, meta, 10_000)
    cut = encode_rows(rows["train"], tok, meta, 200)
    assert "40 of 40 rows given fewer shots: longer than 200 tokens" in capsys.readouterr().err
    for long, short, row in zip(whole, cut, rows["train"]):
        assert data.longest(short) <= 200 < data.longest(long)
        text, (first, *shots) = tok.decode(short.prompt), row["context"]
        kept = [s for s in shots if s in text]              # no shot, no instruction
        assert text == first * bool(kept) + "".join(kept) + prompt_text(row, meta["form"])
        one_more = [first, *shots[len(shots) - len(kept) - 1:], prompt_text(row, meta["form"])]
        size = len(tok.encode("".join(one_more)))
        assert size + data.longest(short) - len(short.prompt) > 200
