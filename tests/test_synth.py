"""python -m pytest tests/test_synth.py"""
import csv
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import SHARED, SURVEY, cli, real_data

import synth
from data import load_meta, load_rows, run
from evaluate import expressed_opinion

CLASSES = synth.CLASSES
SPLITS = ("train", "eval", "test")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "toy"
    synth.toy(synth.Toy(out=str(folder)))
    return folder, load_meta(folder), {s: load_rows(folder / f"{s}.jsonl", CLASSES) for s in SPLITS}


def test_the_same_seed_writes_the_same_bytes(whole, tmp_path):
    cli("synth.py", "toy", "--out", tmp_path / "again", cwd=tmp_path)
    for s in SPLITS:
        assert ((tmp_path / "again" / f"{s}.jsonl").read_bytes()
                == (whole[0] / f"{s}.jsonl").read_bytes())
    synth.toy(synth.Toy(out=str(tmp_path / "other"), seed=1))
    assert (tmp_path / "other/train.jsonl").read_bytes() != (whole[0] / "train.jsonl").read_bytes()


def test_the_world_is_as_large_and_as_split_as_it_says(whole):
    _, _, rows = whole
    seen = {r["question_id"] for r in rows["train"]}
    assert len(seen) == 250 and len(rows["train"]) == 4000 and len(rows["eval"]) == 500
    assert {r["question_id"] for r in rows["eval"]} == seen
    unseen = {r["question_id"] for r in rows["test"]} - seen
    assert len(unseen) == 50
    train = {r["prompt"] for r in rows["train"]}                     # eval and test: new wordings
    assert not train & {r["prompt"] for r in rows["eval"] + rows["test"]}


def test_the_accepted_belief_follows_the_shares_and_the_rejected_is_another(whole):
    _, _, rows = whole
    expected, got = np.zeros(6), np.zeros(6)
    for r in rows["train"]:
        expected += r["probabilities"]
        got[int(r["accept_choice_id"])] += 1
        assert r["accept_choice"] != r["reject_choice"]
        assert r["accept_response"] != r["reject_response"]
        assert abs(sum(r["probabilities"]) - 1) < 1e-4
    sd = np.sqrt(expected)                                           # of counts, roughly
    assert (abs(got - expected) < 4 * sd).all()


def test_the_rule_decides_every_answer_and_finds_the_noise(whole):
    _, meta, rows = whole
    say = lambda side: expressed_opinion(
        [[(r[f"{side}_choice_id"], r[f"{side}_choice"], r[f"{side}_response"])]
         for r in rows["train"]], meta)
    assert say("reject").all()                                       # the rule knows every template
    assert say("accept").mean() == pytest.approx(0.85, abs=0.02)     # --noise 0.15


def test_countries_share_the_questions_and_differ_in_shares(tmp_path, whole):
    synth.toy(synth.Toy(out=str(tmp_path / "b"), country="Borduria"))
    mine = {r["question_id"]: r["probabilities"] for r in whole[2]["train"]}
    theirs = {r["question_id"]: r["probabilities"]
              for r in load_rows(tmp_path / "b/train.jsonl", CLASSES)}
    assert mine.keys() == theirs.keys()
    assert np.mean([np.abs(np.subtract(mine[q], theirs[q])).sum() / 2 for q in mine]) > 0.2


def test_a_survey_table_becomes_rows(table, tmp_path):
    p = cli("synth.py", "opinions", *table, "--out", tmp_path / "d", cwd=tmp_path)
    assert "3 questions for Chile (rural)" in p.stderr
    for reason in ("1 shares that sum to nothing", "1 options without a class",
                   "1 no question text"):
        assert reason in p.stderr
    meta = load_meta(tmp_path / "d")
    rows = sum((load_rows(tmp_path / f"d/{s}.jsonl", CLASSES) for s in SPLITS), [])
    by_question = {r["question_id"]: r for r in rows}
    assert by_question["0"]["probabilities"] == pytest.approx([0.3, 0, 0.1, 0, 0.6, 0])
    assert by_question["1"]["probabilities"] == pytest.approx(
        [0, 0, 0.5, 0, 0, 0.5])                                      # classes add up
    assert all("Is it so?" in r["prompt"] for r in rows if r["question_id"] == "0")
    assert all(r["accept_choice"] in by_question[r["question_id"]]["options"] for r in rows)
    said = [[(r["reject_choice_id"], r["reject_choice"], r["reject_response"])] for r in rows]
    assert expressed_opinion(said, meta).all()


@pytest.mark.parametrize("change, message", [
    (["--country", "Chilli"], "no country 'Chilli' in"),
    (["--writer", "poet"], "--writer template or llm"),
    (["--writer", "llm"], "no key for api.openai.com: set OPENAI_API_KEY"),
    (["--writer", "llm", "--base_url", "localhost"], "is no http(s) address"),
    (["--max_usd", 1], "--max_usd needs prices"),
    (["--csv", "no.csv"], "No such file or directory: 'no.csv'"),
    (["--holdout_questions", 3], "must leave some of the 3 questions"),
    (["--paraphrases", 1000], "knows 48 paraphrases of a question, not 1000"),
    (["--paraphrases", 2], "--paraphrases must be from 3 to 100000"),
    (["--map", ""], "what class has an option? Give --map FILE"),
    (["--classify", "magic"], "--classify must be rules or llm"),
    (["--noise", "nan"], "--noise must be from 0 to 1"),
    (["--seed", -1], "--seed must be from 0"),
])
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(
        table, tmp_path, change, message, monkeypatch, capsys):
    for name in ("API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    flags = ["synth.py", "opinions", *table, "--out", tmp_path / "d", *change]
    monkeypatch.setattr(sys, "argv", [str(x) for x in flags])
    with pytest.raises(SystemExit) as e:
        run(synth.main)
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and message in err[-1] and err[-1].startswith("synth.py: error: ")
    assert not list(tmp_path.glob("d*"))


@pytest.mark.parametrize("cell, column, message", [
    ("{'Chile (rural)': ['a', 0.5]}", 1, "data row 0: the shares of Chile"),
    ("{'Chile (rural)': 0.5}", 1, "data row 0: the shares of Chile"),
    ("{'Chile (rural)': [-0.5, 1.5]}", 1, "data row 0: the shares of Chile"),
    ("", 1, "data row 0: not a Python dict"), ("Yes", 2, "data row 0: not a Python list"),
])
def test_a_broken_cell_of_the_table_is_named(tmp_path, cell, column, message):
    row = list(SURVEY[0])
    row[column] = cell
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows([["question", "selections", "options", "source"], row])
    with pytest.raises(ValueError, match=message):
        synth.read_opinions(tmp_path / "t.csv")


def test_a_folder_that_holds_something_is_not_overwritten(table, tmp_path, call):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/precious").write_text("x")
    p = call(synth, "toy", "--out", tmp_path / "d", cwd=tmp_path, check=2)
    assert "is not empty: give another, or remove it first" in p.stderr
    p = cli("synth.py", "opinions", *table, "--out", tmp_path / "d", cwd=tmp_path, check=2)
    assert ("is not empty" in p.stderr
            and [x.name for x in (tmp_path / "d").iterdir()] == ["precious"])


@real_data
def test_the_real_table_gives_the_known_numbers_of_questions():
    belief_map = synth.read_map(SHARED / "option_map.json")
    table = synth.read_opinions(SHARED / "goqa/global_opinions.csv")
    assert len({c for *_, shares in table for c in shares}) == 138
    found = {c: {q.id for q in synth.questions_of(c, table, belief_map)[0]}
             for c in ("United States", "Pakistan", "S. Africa")}
    us = found["United States"]
    assert (len(us), len(us & found["Pakistan"]), len(us & found["S. Africa"])) == (668, 283, 261)
    assert Counter(belief_map.values()) == {0: 4, 1: 42, 2: 118, 3: 33, 4: 126, 5: 50}   # Table 5
