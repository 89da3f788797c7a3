"""python -m pytest tests/test_evaluate.py"""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, cli, golden

import evaluate
import train
from data import run
from evaluate import (by_kind, class_belief_consistency, expressed_opinion, interval, jsd,
                      margin_metrics, over_seeds, parse_answer, reference_distributions,
                      sampled_counts, sampling_floor, summary)
from losses import Scores

BASELINES, SAMPLED = golden("11")
META = {"classes": [str(k) for k in range(6)], "off_scale": "0",
        "belief_to_class": {k: str(v) for k, v in SAMPLED["belief_map"].items()}}


@pytest.mark.parametrize("theirs, ours", [
    ("uniform", "uniform"), ("majority", "majority"), ("noise_0_05", "noise(0.05)"),
    ("noise_0_1", "noise(0.1)"), ("reverse_as_in_paper_text", "reverse")])
def test_reference_distributions_agree_with_golden_11(theirs, ours):
    target, expected = np.array(BASELINES["probabilities"]), np.array(BASELINES[theirs])
    got = jsd(reference_distributions(target)[ours], target)
    if theirs == "noise_0_1":
        # row 3: the authors' number is of the sorted vectors, where the noise makes
        # 0.2 0.2 0.2 0.2 0.1 0.1 of itself; in place it is not
        assert got[3] > 0.1
        got, expected = np.delete(got, 3), np.delete(expected, 3)
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_sampled_beliefs_and_cbc_agree_with_golden_11():
    answers = [[parse_answer(t, META) for t in row] for row in zip(*SAMPLED["samples"])]
    counts = sampled_counts(answers, META)
    np.testing.assert_allclose(counts / 3, SAMPLED["sampled_class_distribution"], atol=1e-9)
    np.testing.assert_allclose(jsd(counts, SAMPLED["probabilities"]), SAMPLED["sampled_jsd"],
                               atol=1e-9)
    assert class_belief_consistency(answers, META).mean() == pytest.approx(SAMPLED["cbc"])


def test_jsd_is_the_distance_between_0_and_root_log_2():
    p = np.array([[0.3, 0.7, 0.0], [1.0, 0, 0]])
    assert jsd(p, p).tolist() == [0, 0]
    assert jsd([1.0, 0], [0, 1.0]) == pytest.approx(np.sqrt(np.log(2)))
    near = np.float32([[0.1, 0.2, 0.7]]) * np.float32(1 + 1e-7)
    assert not np.isnan(jsd(near, [[0.1, 0.2, 0.7]])).any()          # where scipy's is NaN


def test_the_sampling_floor_is_that_of_a_perfect_sampler():
    target = np.tile([0.1, 0.2, 0.3, 0.4], (400, 1))
    floors = [sampling_floor(target, n).mean() for n in (8, 64, 256)]
    assert floors[0] > floors[1] > floors[2] > 0
    rng = np.random.default_rng(9)
    assert jsd(rng.multinomial(64, target), target).mean() == pytest.approx(floors[1], rel=0.05)


def test_both_margins_are_read_from_their_own_branches():
    """Branches chosen, own, given: joint = chosen - own, all pieces; given = chosen - given,
    responses."""
    s = Scores(torch.tensor([[[1., 2, 4], [10, 20, 40], [0, 0, 400]]]), None, None, None, None,
               torch.zeros(1, 3, 3))
    m = margin_metrics(s, beta=0.5)
    assert m["joint"].tolist() == [0.5 * (7 - 70)] and m["given"].tolist() == [0.5 * (4 - 400)]
    kinds = [SimpleNamespace(kind="minority")]
    split = by_kind(m, kinds)
    assert split["joint_minority"].tolist() == [-31.5] and np.isnan(split["joint_majority"]).all()


def test_the_opinion_rule_takes_the_first_stance_phrase():
    meta = META | {"stances": {"not at all": "1", "mostly": "4"}}
    texts = [("4<Yes>Mostly. Not at all a burden.", "4<Yes>Well, not at all.", "4<Yes>Hm.",
              "Mostly")]
    answers = [[parse_answer(t, meta) for t in row] for row in texts]
    assert expressed_opinion(answers, meta).tolist() == [[1, 0, 0, 0]]


def test_answers_are_cut_where_label_and_belief_end():
    meta = {"classes": ["Well", "We", "4"], "belief_to_class": {"a > b": "4", "a": "We"}}
    assert parse_answer("Well<a>b", meta) == ("Well", "a", "b")
    assert parse_answer("4<a > b>so <i>", meta) == ("4", "a > b", "so <i>")
    assert parse_answer("4<who knows>x", meta) == ("4", "who knows", "x")
    assert parse_answer("4 stars", meta) == ("4", None, " stars")
    assert parse_answer("<a>", meta) == (None, "a", "")


def test_the_bootstrap_resamples_questions_not_rows():
    """Ten rows of one question tell no more than one row of it."""
    rng = np.random.default_rng(0)
    values, questions = rng.normal(size=50), np.arange(50)
    _, low, high = interval(values, questions)
    mean10, low10, high10 = interval(np.repeat(values, 10), np.repeat(questions, 10))
    assert mean10 == pytest.approx(values.mean())
    assert high10 - low10 == pytest.approx(high - low, rel=0.05)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(50), rel=0.15)
    assert interval(np.array([np.nan, np.nan]), np.array([1, 2])) is None


def test_seen_and_unseen_questions_are_kept_apart():
    items = [SimpleNamespace(question=q, group="") for q in "aabc"]
    out = summary({"jsd": np.array([1.0, 1, 1, 5])}, items, {"a", "b"})
    assert out["seen"]["rows"] == 3 and out["seen"]["questions"] == 2 and out["seen"]["jsd"][0] == 1
    assert out["unseen"]["jsd"][0] == 5


def test_runs_that_differ_in_their_seed_are_averaged():
    results = {str(n): {"seen": {"rows": 1, "questions": 1, "jsd": [v, v, v]}}
               for n, v in enumerate((1., 3.))}
    configs = {n: {"data": "d", "loss": "gdpo", "seed": int(n)} for n in results}
    [(name, merged)] = over_seeds(results, configs).items()
    assert merged["seen"]["jsd"] == pytest.approx([2, 2 - np.sqrt(2), 2 + np.sqrt(2)])
    assert name.endswith("(2 seeds)")
    configs["1"]["beta"] = 3                             # another setting is no other seed
    assert over_seeds(results, configs) == {}
    assert over_seeds(results, {n: {"seed": 0} for n in results}) == {}


def test_the_command_prints_a_table_and_writes_the_same_numbers(world, tmp_path, call):
    call(train, "--loss", "gdpo", "--data", world, "--epochs", 1, *SMALL, cwd=tmp_path)
    runs = [f"out/{world.name}-{loss}-seed0" for loss in ("sft", "gdpo")]
    p = cli("evaluate.py", *runs, "--samples", 2, "--max_new_tokens", 12, cwd=tmp_path)
    for out in runs:
        saved = json.loads((tmp_path / out / "eval.json").read_text())
        [line] = [x for x in p.stdout.splitlines() if x.startswith(out)][:1]
        assert f"{saved['seen']['jsd'][0]:.3f}" == line.split()[1]
        assert saved["seen"]["jsd"][1] <= saved["seen"]["jsd"][0] <= saved["seen"]["jsd"][2]
    assert "given majority" in p.stdout and "JSD without training: majority" in p.stdout
    assert saved["seen"]["given_majority"] and saved["seen"]["cbc"] and saved["seen"]["opinion"]
    again = call(evaluate, runs[1], "--samples", 2, "--max_new_tokens", 12, cwd=tmp_path)
    assert json.loads((tmp_path / runs[1] / "eval.json").read_text()) == saved and again.stdout
    call(train, "--loss", "sft", "--data", world, "--epochs", 2, *SMALL, "--overwrite",
         cwd=tmp_path)
    p = call(evaluate, runs[1], "--samples", 0, cwd=tmp_path, check=2)   # another reference now
    assert "is not any more the checkpoint that" in p.stderr


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "nowhere is not the folder of a run"),
    ([], "the following arguments are required: OUT"),
    (["x", "--samples", "many"], "invalid int value"),
    (["x", "--samples", "-1"], "--samples must be from 0 to 10000"),
    (["x", "--device", "mars"], "--device mars is not here"),
])
def test_bad_input_is_one_line_and_exit_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *args])
    with pytest.raises(SystemExit) as e:
        run(evaluate.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and len(err.strip().splitlines()) == 1
