"""python -m pytest tests/test_synth.py: the shipped world, and surveys with the template writer"""
import re
from collections import Counter

import numpy as np
import pytest
from conftest import SHARED, cli, real_data

import synth
from data import SPLITS, load_dataset, prompt_text, read_json
from evaluate import expressed_opinion


def toy(folder, **flags):
    synth.toy(synth.Toy(out=str(folder), **flags))
    return load_dataset(str(folder), SPLITS)


def fits(rows, side, meta):
    """Whether each row's answer of a side expresses its belief."""
    return expressed_opinion([[(r[f"{side}_choice_id"], r[f"{side}_choice"], r[f"{side}_response"])]
                              for r in rows], meta)[:, 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "toy"
    return folder, *toy(folder)


def test_the_same_seed_writes_the_same_bytes(whole, tmp_path):
    folder, _, rows = whole
    cli("synth.py", "toy", "--out", "again", cwd=tmp_path)
    for name in (f"{s}.jsonl" for s in SPLITS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert toy(tmp_path / "other", seed=1, paraphrases=3)[1]["train"][0] != rows["train"][0]


def test_the_world_is_split_as_it_says_and_its_beliefs_follow_the_shares(whole):
    _, _, rows = whole
    seen, tried, tested = ({r["question_id"] for r in rows[s]} for s in SPLITS)
    assert len(seen) == 250 and len(rows["train"]) == 4000 and len(rows["eval"]) == 500
    assert tried == seen and len(tested - seen) == 50
    train = {r["prompt"] for r in rows["train"]}                     # eval and test: new wordings
    assert not train & {r["prompt"] for r in rows["eval"] + rows["test"]}
    for what in ("choice", "response"):
        assert all(r[f"accept_{what}"] != r[f"reject_{what}"] for r in rows["train"])
    expected = sum(np.array(r["probabilities"]) for r in rows["train"])
    got = np.bincount([int(r["accept_choice_id"]) for r in rows["train"]], minlength=6)
    assert (abs(got - expected) < 4 * np.sqrt(expected)).all()       # sd of counts, roughly


def test_accepted_and_rejected_answers_are_noisy_alike_and_independently(whole, tmp_path):
    """--noise 0.15: the share of answers whose stance is not their belief's, on either side."""
    _, meta, rows = whole
    accept, reject = (1 - fits(rows["train"], side, meta) for side in ("accept", "reject"))
    # a stray answer can express another option of the same class: nearly none here
    assert [accept.mean(), reject.mean()] == pytest.approx([0.15, 0.15], abs=0.015)    # sd 0.0056
    assert (accept * reject).mean() == pytest.approx(0.15 ** 2, abs=0.008)
    clean = toy(tmp_path / "clean", noise=0.0, paraphrases=3)[1]["train"]
    assert fits(clean, "accept", meta).all() and fits(clean, "reject", meta).all()


def test_two_countries_make_one_set_with_the_group_in_the_prompt(tmp_path, whole):
    meta, rows = toy(tmp_path / "two", country="Avalon, Borduria", paraphrases=3)
    row = rows["train"][-1]
    assert prompt_text(row, meta["form"]) == f"<G>Borduria<Q>{row['prompt']}<A>"
    one, other = ({split: {r["question_id"]: r["probabilities"] for r in rows[split]
                           if r["group"] == group} for split in rows} for group in meta["groups"])
    assert {s: one[s].keys() for s in one} == {s: other[s].keys() for s in other}   # held out alike
    assert one["train"] == {r["question_id"]: r["probabilities"] for r in whole[2]["train"]}
    difference = [np.subtract(one["train"][q], other["train"][q]) for q in one["train"]]
    assert np.mean([np.abs(d).sum() / 2 for d in difference]) > 0.2


def test_counted_shares_are_those_of_the_training_rows_and_test_keeps_the_known(whole, tmp_path):
    _, counted = toy(tmp_path / "counted", shares="counted")
    assert counted["test"] == whole[2]["test"]
    for first in counted["train"][0], counted["eval"][0]:
        of = Counter(r["accept_choice_id"] for r in counted["train"]
                     if r["question_id"] == first["question_id"])
        shares = [of[c] / of.total() for c in synth.CLASSES]
        assert first["probabilities"] == pytest.approx(shares, abs=1e-6)
    assert shares != whole[2]["train"][0]["probabilities"]


def test_a_survey_table_becomes_rows(table, tmp_path, call):
    p = call(synth, "opinions", *table, "--out", "d", cwd=tmp_path)
    assert "Chile (rural): 3 of 4 questions have classes" in p.stderr    # 2 more are not whole
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    rows = sum(rows.values(), [])
    shares = {r["question_id"]: r["probabilities"] for r in rows}
    assert shares["0"] == pytest.approx([0.3, 0, 0.1, 0, 0.6, 0])
    assert shares["1"] == pytest.approx([0, 0, 0.5, 0, 0, 0.5])      # classes add up
    assert all("Is it so?" in r["prompt"] for r in rows if r["question_id"] == "0")
    assert all(any(t in r["reject_response"] for t in r["options"]) for r in rows)
    assert 0.7 < fits(rows, "reject", meta).mean() < 1               # --noise 0.15
    again = call(synth, "opinions", *table, "--map", "d/meta.json", "--out", "e", cwd=tmp_path)
    assert "3 of 4 questions" in again.stderr               # one set's map for the next


def test_a_question_that_the_table_repeats_is_held_out_in_both_rows(tmp_path):
    questions = {"X": [synth.Question(str(n), [text], "this", ["Yes", "No"], [4, 2], [0.5, 0.5])
                       for n, text in enumerate(["Is it so?", "is it so", "Why not?", "And now?"])]}
    for seed in range(8):
        o = synth.Opinions(out=str(tmp_path / f"d{seed}"), holdout_questions=1, seed=seed)
        synth.write_surveys(questions, o, synth.template_writer)
        trained = {r["question_id"] for r in load_dataset(o.out, SPLITS)[1]["train"]}
        assert trained in ({"0", "1", "2"}, {"0", "1", "3"}, {"2", "3"})


@pytest.mark.parametrize("change, message", [
    (["--country", "Chilli"], "no country 'Chilli'; there is Chile (rural), Côte d'Ivoire"),
    (["--writer", "llm"], "no key for api.openai.com: set OPENAI_API_KEY"),
    (["--writer", "llm", "--base_url", "localhost"], "is not an http(s) address"),
    (["--max_usd", 1], "--max_usd needs prices"), (["--csv", "no.csv"], "no.csv"),
    (["--holdout_questions", 3], "must leave some of the 3 for training"),
    (["--paraphrases", 1000], "the templates give 48 different --paraphrases at most"),
    (["--paraphrases", 2], "a question with fewer than 3 texts"),
    (["--map", ""], "each option needs a class: give --map FILE"), (["--seed", -1], "--seed"),
    (["--out", ""], "--out is needed"), (["--out", ".."], "is not empty: give another")])
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(
        table, tmp_path, change, message, monkeypatch, call):
    for name in ("API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")                    # left over in the environment
    p = call(synth, "opinions", *table, "--out", "d", *change, cwd=tmp_path, check=2)
    last = p.stderr.strip().splitlines()[-1]
    assert message in last and last.startswith("synth.py: error: ")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("encoding, selections, options, message", [
    ("utf-8-sig", "{'Chile': [3, 2]}", "['Sí', 'No']", ""),
    ("utf-8", '{""Chile"": [0.6, 0.4]}', '[""Sí"", ""No""]', ""),    # one's own, in JSON
    ("cp1252", "{'Chile': [0.6, 0.4]}", "['Sí', 'No']", "t.csv is not UTF-8"),
    ("utf-8", "", "['Sí', 'No']", "t.csv, row 0: not a dict.*needs the columns"),
    ("utf-8", "{'Chile': ['a', 0.5]}", "['Sí', 'No']", "row 0: could not convert string"),
    ("utf-8", "{'Chile': 0.5}", "['Sí', 'No']", "row 0: .*not iterable"),
    ("utf-8", "{'Chile': [0.6, 0.4]}", "Yes", "row 0: not a list")])
def test_a_survey_of_ones_own_is_read_or_what_is_wrong_with_it_is_named(
        tmp_path, encoding, selections, options, message):
    path = tmp_path / "t.csv"
    path.write_text(f'Question,Selections,Options\n¿Así?,"{selections}","{options}"\n', encoding)
    if message:
        with pytest.raises(ValueError, match=message):
            synth.read_opinions(path)
    else:
        asked = synth.Question("0", ["¿Así?"], "this", ["Sí", "No"], [], [0.6, 0.4])
        assert synth.read_opinions(path) == {"Chile": [asked]}


def test_like_named_countries_are_shown(capsys):
    known = ["S. Korea", "South Korea", "United States", "India (Old national sample)", "India"]
    assert synth.names_in("S. Korea,India, S. Korea", known) == ["S. Korea", "India"]
    assert capsys.readouterr().err == ("S. Korea: the survey also has South Korea\n"
                                       "India: the survey also has India (Old national sample)\n")
    for name, like in ("Korea", "S. Korea, South Korea"), ("USA", ", ".join(sorted(known))):
        with pytest.raises(ValueError, match=re.escape(f"no country '{name}'; there is {like}")):
            synth.names_in(f"India, {name}", known)


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    for name in ("d", "e.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    toy(tmp_path / "e", paraphrases=3)
    with pytest.raises(OSError):                       # by who calls the function
        toy(tmp_path / "d", paraphrases=3)
    assert sorted(str(x.relative_to(tmp_path)) for x in tmp_path.glob("*/precious")) == [
        "d/precious", "e.tmp/precious"]


@real_data
def test_the_real_table_gives_the_known_numbers_of_questions(tmp_path, call):
    classes = Counter(read_json(SHARED / "option_map.json").values())
    assert classes == {0: 4, 1: 42, 2: 118, 3: 33, 4: 126, 5: 50}            # Table 5
    call(synth, "opinions", "--csv", SHARED / "goqa/global_opinions.csv", "--map",
         SHARED / "option_map.json", "--paraphrases", 3, "--out", "d", "--country",
         "United States, Pakistan, S. Africa", cwd=tmp_path)
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    us, pk, sa = ({r["question_id"] for r in sum(rows.values(), []) if r["group"] == country}
                  for country in meta["groups"])
    assert (len(us), len(us & pk), len(us & sa)) == (668, 283, 261)
