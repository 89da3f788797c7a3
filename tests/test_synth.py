"""python -m pytest tests/test_synth.py: the shipped world, and surveys with the template writer"""
import csv
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import SHARED, SURVEY, cli, real_data

import synth
from data import load_meta, load_rows, prompt_text, run
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
    assert len({r["question_id"] for r in rows["test"]} - seen) == 50
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
    assert (abs(got - expected) < 4 * np.sqrt(expected)).all()       # sd of counts, roughly


def test_accepted_and_rejected_answers_are_noisy_alike_and_independently(whole, tmp_path):
    """--noise 0.15: the share of answers whose stance is not their belief's, on either side."""
    _, meta, rows = whole
    fits = {side: expressed_opinion(
        [[(r[f"{side}_choice_id"], r[f"{side}_choice"], r[f"{side}_response"])]
         for r in rows["train"]], meta)[:, 0] for side in ("accept", "reject")}
    # a stray answer can express another option of the same class: nearly none here
    assert 1 - fits["accept"].mean() == pytest.approx(0.15, abs=0.015)     # sd 0.0056
    assert 1 - fits["reject"].mean() == pytest.approx(0.15, abs=0.015)
    both = ((1 - fits["accept"]) * (1 - fits["reject"])).mean()
    assert both == pytest.approx(0.15 ** 2, abs=0.008)
    synth.toy(synth.Toy(out=str(tmp_path / "clean"), noise=0.0, paraphrases=3))
    rows = load_rows(tmp_path / "clean/train.jsonl", CLASSES)
    assert expressed_opinion([[(r[f"{side}_choice_id"], r[f"{side}_choice"], r[f"{side}_response"])]
                              for r in rows for side in ("accept", "reject")], meta).all()


def test_countries_share_the_questions_and_differ_in_shares(tmp_path, whole):
    synth.toy(synth.Toy(out=str(tmp_path / "b"), country="Borduria"))
    one = {r["question_id"]: r["probabilities"] for r in whole[2]["train"]}
    other = {r["question_id"]: r["probabilities"]
             for r in load_rows(tmp_path / "b/train.jsonl", CLASSES)}
    assert one.keys() == other.keys()
    assert np.mean([np.abs(np.subtract(one[q], other[q])).sum() / 2 for q in one]) > 0.2


def test_two_countries_make_one_set_with_the_group_in_the_prompt(tmp_path, whole):
    synth.toy(synth.Toy(out=str(tmp_path / "two"), country="Avalon, Borduria", paraphrases=3))
    meta = load_meta(tmp_path / "two")
    rows = {s: load_rows(tmp_path / f"two/{s}.jsonl", CLASSES) for s in SPLITS}
    assert {r["group"] for r in rows["train"]} == {"Avalon", "Borduria"} == set(meta["groups"])
    row = rows["train"][-1]
    assert prompt_text(row, meta["form"]) == f"<G>Borduria<Q>{row['prompt']}<A>"
    seen, tested = ({(r["group"], r["question_id"]) for r in rows[s]} for s in ("train", "test"))
    for group in meta["groups"]:                            # held out is held out for all
        assert {(group, q) for _, q in tested - seen} <= tested - seen
    both = [{(r["question_id"], *r["probabilities"]) for r in some if r["group"] == "Avalon"}
            for some in (whole[2]["train"], rows["train"])]
    assert both[0] == both[1]


def test_a_survey_table_becomes_rows(table, tmp_path, call):
    p = call(synth, "opinions", *table, "--out", tmp_path / "d/", cwd=tmp_path)
    assert ("3 questions for Chile (rural), of 6 rows: 2 lack a text, two different options or "
            "their shares, 1 have options without a class") in p.stderr
    meta = load_meta(tmp_path / "d")
    rows = sum((load_rows(tmp_path / f"d/{s}.jsonl", CLASSES) for s in SPLITS), [])
    by_question = {r["question_id"]: r for r in rows}
    assert by_question["0"]["probabilities"] == pytest.approx([0.3, 0, 0.1, 0, 0.6, 0])
    assert by_question["1"]["probabilities"] == pytest.approx(
        [0, 0, 0.5, 0, 0, 0.5])                                      # classes add up
    assert all("Is it so?" in r["prompt"] for r in rows if r["question_id"] == "0")
    assert all(r["accept_choice"] in by_question[r["question_id"]]["options"] for r in rows)
    assert all(any(t in r["reject_response"] for t in r["options"]) for r in rows)
    said = [[(r["reject_choice_id"], r["reject_choice"], r["reject_response"])] for r in rows]
    assert 0.7 < expressed_opinion(said, meta).mean() < 1            # --noise 0.15
    again = call(synth, "opinions", *table, "--map", tmp_path / "d/meta.json", "--out",
                 tmp_path / "e", cwd=tmp_path)                       # one set's map for the next
    assert "3 questions" in again.stderr


def test_a_question_that_the_table_repeats_is_held_out_in_both_rows(tmp_path):
    questions = {"X": [synth.Question(str(n), [text], "this", ["Yes", "No"], [4, 2], [0.5, 0.5])
                       for n, text in enumerate(["Is it so?", "is it so", "Why not?", "And now?"])]}
    for seed in range(8):
        o = synth.Opinions(out=str(tmp_path / f"d{seed}"), holdout_questions=1, paraphrases=10,
                           seed=seed)
        synth.write_surveys(questions, o, synth.template_writer)
        trained = {r["question_id"] for r in load_rows(tmp_path / f"d{seed}/train.jsonl", CLASSES)}
        assert trained in ({"0", "1", "2"}, {"0", "1", "3"}, {"2", "3"})


@pytest.mark.parametrize("change, message", [
    (["--country", "Chilli"], "no country 'Chilli'; there is Chile (rural), Côte d'Ivoire"),
    (["--writer", "poet"], "invalid choice: 'poet'"),
    (["--writer", "llm"], "no key for api.openai.com: set OPENAI_API_KEY"),
    (["--writer", "llm", "--base_url", "localhost"], "is no http(s) address"),
    (["--max_usd", 1], "--max_usd needs prices"),
    (["--csv", "no.csv"], "no.csv"),
    (["--holdout_questions", 3], "must leave some of the 3 questions"),
    (["--paraphrases", 1000], "knows 48 paraphrases of a question, not 1000"),
    (["--paraphrases", 2], "a question with fewer than 3 texts"),
    (["--map", ""], "each option needs a class: give --map FILE"),
    (["--classify", "magic"], "invalid choice: 'magic'"),
    (["--noise", "nan"], "--noise"), (["--seed", -1], "--seed"), (["--seed", "x"], "--seed"),
    (["--out", ""], "--out is needed"), (["--colour", "red"], "unrecognized arguments"),
])
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(
        table, tmp_path, change, message, monkeypatch, capsys):
    for name in ("API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")                    # left over in the environment: still heard
    monkeypatch.chdir(tmp_path)
    flags = ["synth.py", "opinions", *table, "--out", tmp_path / "d", *change]
    monkeypatch.setattr(sys, "argv", [str(x) for x in flags])
    with pytest.raises(SystemExit) as e:
        run(synth.main)
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and message in err[-1] and err[-1].startswith("synth.py: error: ")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("cell, column, message", [
    ("{'Chile (rural)': ['a', 0.5]}", 1, "row 0: the shares of Chile"),
    ("{'Chile (rural)': 0.5}", 1, "row 0: the shares of Chile"),
    ("{'Chile (rural)': [-0.5, 1.5]}", 1, "row 0: the shares of Chile"),
    ("", 1, "row 0: not a dict"), ("Yes", 2, "row 0: not a list"), ("None", 1, "row 0: not a dict"),
])
def test_a_broken_cell_of_the_table_is_named(tmp_path, cell, column, message):
    row = list(SURVEY[0])
    row[column] = cell
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows([["question", "selections", "options", "source"], row])
    with pytest.raises(ValueError, match=message):
        synth.read_opinions(tmp_path / "t.csv")


@pytest.mark.parametrize("encoding, selections, options", [
    ("utf-8-sig", "{'Chile': [0.6, 0.4]}", "['Sí', 'No']"),
    ("utf-8", '{"Chile": [0.6, 0.4]}', '["Sí", "No"]'),              # one's own, in JSON
    ("utf-8", "{'Chile': [np.float64(0.6), np.float64(0.4)]}", "['Sí', 'No']"),
    ("cp1252", "{'Chile': [0.6, 0.4]}", "['Sí', 'No']"), ("utf-16", "{}", "[]")])
def test_a_survey_of_ones_own_is_read_if_it_is_utf8(tmp_path, encoding, selections, options):
    with open(tmp_path / "t.csv", "w", newline="", encoding=encoding) as f:
        csv.writer(f).writerows([["Question", "Selections", "Options"],
                                 ["¿Así?", selections, options]])
    if encoding.startswith("utf-8"):
        assert synth.read_opinions(tmp_path / "t.csv") == [
            (0, "¿Así?", ["Sí", "No"], {"Chile": [0.6, 0.4]})]
    else:
        with pytest.raises(ValueError, match="t.csv is not UTF-8"):
            synth.read_opinions(tmp_path / "t.csv")
    (tmp_path / "u.csv").write_text("question,answers\na,b\n")
    with pytest.raises(ValueError, match="u.csv needs the columns question, options, selections"):
        synth.read_opinions(tmp_path / "u.csv")


@pytest.mark.parametrize("country, like", [
    ("S. Korea", ["S. Korea", "South Korea"]), ("Great Britain", ["Britain", "Great Britain"]),
    ("Czechia", ["Czech Rep.", "Czechia"]), ("USA", ["United States"]), ("uk", ["Britain",
     "Great Britain"]), ("South Africa", ["S. Africa"]), ("North Macedonia", ["North Macedonia"]),
    ("India", ["India (Old national sample)"]), ("Narnia", [])])
def test_like_named_countries_are_found(country, like):
    known = ["S. Korea", "South Korea", "S. Africa", "Britain", "Great Britain", "Czech Rep.",
             "Czechia", "United States", "North Macedonia", "Northern Ireland",
             "India (Old national sample)", "Angola (Non-national sample)"]
    assert synth.like_named(country, known) == sorted(like)
    if country not in known:
        with pytest.raises(ValueError) as e:
            synth.names_in(f"Czechia, {country}", known)
        assert f"no country {country!r}; there is {(like or ['Angola'])[0]}" in str(e.value)


def test_a_folder_that_holds_something_is_not_overwritten(table, tmp_path, call):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/precious").write_text("x")
    p = call(synth, "toy", "--out", tmp_path / "d", cwd=tmp_path, check=2)
    assert "is not empty: give another, or remove it first" in p.stderr
    with pytest.raises(OSError):                       # nor by who calls the function
        synth.toy(synth.Toy(out=str(tmp_path / "d"), paraphrases=3))
    assert [x.name for x in (tmp_path / "d").iterdir()] == ["precious"]


@real_data
def test_the_real_table_gives_the_known_numbers_of_questions(tmp_path, call):
    belief_map = synth.read_map(SHARED / "option_map.json")
    assert Counter(belief_map.values()) == {0: 4, 1: 42, 2: 118, 3: 33, 4: 126, 5: 50}   # Table 5
    table = synth.read_opinions(SHARED / "goqa/global_opinions.csv")
    assert len({c for *_, shares in table for c in shares}) == 138
    call(synth, "opinions", "--csv", SHARED / "goqa/global_opinions.csv", "--map",
         SHARED / "option_map.json", "--paraphrases", 3, "--out", "d", "--country",
         "United States, Pakistan, S. Africa", cwd=tmp_path)
    found = {(r["group"], r["question_id"]) for s in SPLITS
             for r in load_rows(tmp_path / f"d/{s}.jsonl", CLASSES)}
    ids = {c: {q for g, q in found if g == c} for c in ("United States", "Pakistan", "S. Africa")}
    us = ids["United States"]
    assert (len(us), len(us & ids["Pakistan"]), len(us & ids["S. Africa"])) == (668, 283, 261)


def test_counted_shares_are_those_of_the_training_rows_and_test_keeps_the_known(whole, tmp_path):
    synth.toy(synth.Toy(out=str(tmp_path / "counted"), shares="counted"))
    counted = {s: load_rows(tmp_path / f"counted/{s}.jsonl", CLASSES) for s in ("train", "test")}
    assert counted["test"] == whole[2]["test"]
    rows = [r for r in counted["train"] if r["question_id"] == counted["train"][0]["question_id"]]
    shares = [sum(r["accept_choice_id"] == c for r in rows) / len(rows) for c in CLASSES]
    assert rows[0]["probabilities"] == pytest.approx(shares, abs=1e-6)
    assert rows[0]["probabilities"] != whole[2]["train"][0]["probabilities"]
