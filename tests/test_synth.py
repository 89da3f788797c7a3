"""python -m pytest tests/test_synth.py: the shipped world, and surveys with the template writer"""
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import SHARED, cli, real_data

import synth
from data import SPLITS, load_dataset, prompt_text, read_json
from evaluate import expressed_opinion


def toy(folder, **flags):
    """Make a world in a folder -> its meta, {split: rows}."""
    synth.toy(synth.Toy(out=str(folder), **flags))
    return load_dataset(str(folder), SPLITS)


def fits(rows, side, meta):
    """Whether each row's answer of a side expresses its belief."""
    return expressed_opinion([[(r[f"{side}_choice_id"], r[f"{side}_choice"], r[f"{side}_response"])]
                              for r in rows], meta)[:, 0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return toy(tmp_path_factory.mktemp("whole") / "toy")


def test_the_same_seed_writes_the_same_rows_and_over_no_others(whole, tmp_path):
    cli("synth.py", "toy", "--out", "again", cwd=tmp_path)
    with pytest.raises(OSError):                       # by who calls the function
        toy(tmp_path / "again", seed=1, paraphrases=3)
    assert [*tmp_path.iterdir()] == [tmp_path / "again"]
    assert load_dataset(str(tmp_path / "again"), SPLITS)[1] == whole[1]
    assert toy(tmp_path / "other", seed=1, paraphrases=3)[1]["train"][0] != whole[1]["train"][0]


def test_the_world_is_split_as_it_says_and_its_beliefs_follow_the_shares(whole):
    rows = whole[1]
    seen, tried, tested = ({r["question_id"] for r in rows[s]} for s in SPLITS)
    assert tried == seen and len(seen) == 250 and len(tested - seen) == 50
    assert [len(rows[s]) for s in SPLITS] == [4000, 500, 700]
    train = {r["prompt"] for r in rows["train"]}                     # eval and test: new wordings
    assert not train & {r["prompt"] for r in rows["eval"] + rows["test"]}
    for what in ("choice", "response"):
        assert all(r[f"accept_{what}"] != r[f"reject_{what}"] for r in rows["train"])
    expected = sum(np.array(r["probabilities"]) for r in rows["train"])
    got = np.bincount([int(r["accept_choice_id"]) for r in rows["train"]], minlength=6)
    assert (abs(got - expected) < 4 * np.sqrt(expected)).all()       # sd of counts, roughly


def test_accepted_and_rejected_answers_are_noisy_alike_and_independently(whole, tmp_path):
    """--noise 0.15: the share of answers whose stance is not their belief's, on either side."""
    meta, rows = whole
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
    assert one["train"] == {r["question_id"]: r["probabilities"] for r in whole[1]["train"]}
    difference = [np.subtract(one["train"][q], other["train"][q]) for q in one["train"]]
    assert np.mean([np.abs(d).sum() / 2 for d in difference]) > 0.2


def test_counted_shares_are_those_of_the_training_rows_and_test_keeps_the_known(whole, tmp_path):
    _, counted = toy(tmp_path / "counted", shares="counted")
    assert counted["test"] == whole[1]["test"]
    first = counted["train"][0]
    of = Counter(r["accept_choice_id"] for r in counted["train"]
                 if r["question_id"] == first["question_id"])
    shares = pytest.approx([of[c] / of.total() for c in synth.CLASSES], abs=1e-6)
    assert first["probabilities"] == shares == counted["eval"][0]["probabilities"]
    assert shares != whole[1]["train"][0]["probabilities"]


def test_a_survey_table_becomes_rows(table, tmp_path, call):
    call(synth, "opinions", *table, "--out", "d", cwd=tmp_path)
    meta, rows = load_dataset(str(tmp_path / "d"), SPLITS)
    rows = sum(rows.values(), [])
    shares = {r["question_id"]: r["probabilities"] for r in rows}
    assert shares["0"] == pytest.approx([0.3, 0, 0.1, 0, 0.6, 0])
    assert shares["1"] == pytest.approx([0, 0, 0.5, 0, 0, 0.5])      # classes add up
    for r in rows:
        assert "Is it so?" in r["prompt"] or r["question_id"] != "0"
        assert any(text in r["reject_response"] for text in r["options"])
    assert 0.7 < fits(rows, "reject", meta).mean() < 1               # --noise 0.15
    again = call(synth, "opinions", *table, "--map", "d/meta.json", "--out", "e", cwd=tmp_path)
    assert "Chile (rural): 3 of 4 questions have classes" in again.stderr   # one map for the next


def test_a_question_that_the_table_repeats_is_held_out_in_both_rows(tmp_path):
    questions = {"X": [synth.Question(str(n), [text], "this", ["Yes", "No"], [4, 2], [0.5, 0.5])
                       for n, text in enumerate(["Is it so?", "is it so", "Why not?", "\ud83d?"])]}
    for seed in range(8):
        o = synth.Opinions(out=str(tmp_path / f"d{seed}"), holdout_questions=1, seed=seed)
        synth.write_surveys(questions, o, synth.template_writer)
        trained = {r["question_id"] for r in load_dataset(o.out, SPLITS)[1]["train"]}
        assert trained in ({"0", "1", "2"}, {"0", "1", "3"}, {"2", "3"})


@pytest.mark.parametrize("change, message", [
    (["--country", "Chilli"], "no country 'Chilli'; there is Chile (rural), Côte d'Ivoire"),
    (["--writer", "llm"], "no key for api.openai.com: set OPENAI_API_KEY"),
    (["--holdout_questions", 3], "must leave some of the 3 for training"),
    (["--paraphrases", 1000], "the templates give 48 different --paraphrases at most"),
    (["--paraphrases", 2], "a question with fewer than 3 texts"), (["--csv", "no.csv"], "no.csv"),
    (["--map", ""], "each option needs a class: give --map FILE"),
    (["--out", ""], "--out is needed"), (["--out", ".."], "is not empty: give another")])
def test_bad_input_is_one_line_and_no_rows(table, tmp_path, change, message, monkeypatch, call):
    for name in ("API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    p = call(synth, "opinions", *table, "--out", "d", *change, cwd=tmp_path, check=2)
    assert message in p.stderr.strip().splitlines()[-1] and not (tmp_path / "d").exists()


@pytest.mark.parametrize("encoding, selections, options, message", [
    ("utf-8-sig", "{'Chile': [3, 2]}", "['Sí', 'No']", ""),
    ("utf-8", '{""Chile"": [0.6, 0.4]}', '[""Sí"", ""No""]', ""),    # one's own, in JSON
    ("cp1252", "{'Chile': [0.6, 0.4]}", "['Sí', 'No']", "t.csv is not UTF-8"),
    ("utf-8", "", "['Sí', 'No']", "t.csv, row 0: not a dict.*needs the columns"),
    ("utf-8", "{'Chile': 0.5}", "['Sí', 'No']", "not iterable"),
    ("utf-8", "{'Chile': [0.6, 0.4]}", "Yes", "row 0: not a list")])
def test_a_survey_of_ones_own_is_read_or_one_line(tmp_path, encoding, selections, options, message):
    path = tmp_path / "t.csv"
    path.write_text(f'Question,Selections,Options\n¿Así?,"{selections}","{options}"\n', encoding)
    asked = synth.Question("0", ["¿Así?"], "this", ["Sí", "No"], [], [0.6, 0.4])
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        assert synth.read_opinions(path) == {"Chile": [asked]}


def test_like_named_countries_are_shown(capsys):
    known = ["S. Korea", "South Korea", "India (Old national sample)", "India"]
    assert synth.names_in("S. Korea,India, S. Korea", known) == ["S. Korea", "India"]
    assert capsys.readouterr().err == ("S. Korea: the survey also has South Korea\n"
                                       "India: the survey also has India (Old national sample)\n")
    with pytest.raises(ValueError, match="no country 'Korea'; there is S. Korea, South Korea"):
        synth.names_in("India, Korea", known)


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
