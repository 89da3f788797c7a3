"""python -m pytest tests/test_ask.py: evaluate.py --ask."""
import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import cli
from test_evaluate import runs  # noqa: F401

import evaluate
from data import Tokenizer, class_ids, load_dataset, prompt_text
from evaluate import group_shares
from model import load_model
from train import jsd

QUESTION = "How do you rate night buses?"


@pytest.fixture
def ask(runs, call):  # noqa: F811
    """The objects that `evaluate.py OUT --ask ... --json` prints for the SFT run."""
    def ask(*flags, question=QUESTION, out=(runs[1][0],), check=0):
        p = call(evaluate, *out, "--ask", question, "--json", *flags, cwd=runs[0], check=check)
        return p.stderr if check else [json.loads(x) for x in p.stdout.splitlines()]
    return ask


def test_the_distribution_is_read_from_the_model_and_compared_to_the_group(ask, runs, world):  # noqa: F811
    [found] = ask()
    f, folder = found["models"][runs[1][0]], runs[0] / runs[1][0] / "best"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    ids = tokenizer.encode(prompt_text({"prompt": QUESTION}, "<Q>{prompt}<A>"))
    with torch.no_grad():
        logits = model.head @ model(torch.tensor([ids]))[0, -1]
    p = logits.softmax(-1)[class_ids(tokenizer, f["classes"])]
    np.testing.assert_allclose(f["shares"], p / p.sum(), rtol=1e-4)
    assert f["class_mass"] == pytest.approx(p.sum().item(), rel=1e-4)
    if f["group_shares"]:
        assert f["jsd"] == pytest.approx(float(jsd(f["shares"], f["group_shares"])))
    assert len(f["answers"]) == 6 and f["answers"][4][0].startswith("4")


def test_a_belief_is_held_and_shares_are_drawn(ask, runs):  # noqa: F811
    answers = lambda found: found[0]["models"][runs[1][0]]["answers"]
    said = answers(ask("--belief", "4<Somewhat good>", "--samples", 3))
    assert [start for start, _ in said] == ["4<Somewhat good>"] * 3
    alone = answers(ask("--belief", 4))
    assert len(alone) == 1 and alone[0][0].startswith("4")
    drawn = answers(ask("--shares", "0,0,0,0,0.5,0.5", "--samples", 20))
    firsts = [start[0] for start, _ in drawn]
    assert len(firsts) == 120 and set(firsts) == {"4", "5"} and 40 < firsts.count("4") < 80
    assert answers(ask("--shares", "0,0,0,0,0.5,0.5", "--samples", 20)) == drawn
    assert answers(ask("--shares", "0,0,0,0,0.5,0.5", "--samples", 20, "--seed", 1)) != drawn


def test_the_dataset_knows_a_question_in_any_wording():
    row = lambda prompt, p, group="": {"prompt": prompt, "probabilities": p, "group": group}
    rows = [row("Tell me: How is tea?", [1, 0]), row("How is coffee?", [0, 1], "x"),
            row("How is coffee?", [0.5, 0.5], "y")]
    assert group_shares("how is TEA", rows, "") == [1, 0]
    assert group_shares("rum", rows, "") is None and group_shares("is", rows, "") is None
    assert group_shares("How is coffee?", rows, "") is None                # of two groups
    assert group_shares("How is coffee?", rows, "y") == [0.5, 0.5]


def test_it_is_shown_in_80_columns_of_plain_text(runs, call, world):  # noqa: F811
    cwd, outs = runs
    question = load_dataset(str(world), ("train",))[1]["train"][0]["prompt"]
    p = call(evaluate, *outs, "--ask", question, cwd=cwd)
    assert max(map(len, p.stdout.splitlines())) <= 80 and "\033" not in p.stdout
    assert "█" in p.stdout and p.stdout.count("JSD to the group") == 2
    assert p.stdout.count("the group  ") == 6 and p.stdout.count(outs[0][4:]) == 6 + 1
    p = cli("evaluate.py", outs[0], "--ask", question, cwd=cwd, PYTHONIOENCODING="ascii")
    assert p.stdout.isascii() and "#" in p.stdout


def test_questions_come_from_standard_input_and_checkpoints_need_no_data(runs, call, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "stdin", io.StringIO("How is tea?\nHow is rum?\n"))
    checkpoint = f"{runs[1][0]}/best"
    p = call(evaluate, checkpoint, "--json", "--ask", cwd=runs[0])
    found = [json.loads(x) for x in p.stdout.splitlines()]
    assert [x["question"] for x in found] == ["How is tea?", "How is rum?"]
    assert found[0]["models"][checkpoint]["classes"] == list("012345")
    assert found[0]["models"][checkpoint]["group_shares"] is None


@pytest.mark.parametrize("flags, message", [
    (["--shares", "1"], "--shares 1 must be 6 numbers that sum to 1"),
    (["--shares", "0,0,0,0,0.5,0.6"], "must be 6 numbers that sum to 1"),
    (["--shares", "nan,0,0,0,0.5,0.5"], "must be 6 numbers that sum to 1"),
    (["--shares=-1,1,0,0,0,1"], "must be 6 numbers that sum to 1"),
    (["--belief", "9<Great>"], "--belief '9<Great>' must be one of the classes 0, 1, 2, 3, 4, 5"),
    (["--belief", "4<Good>yes"], "must be one of the classes"),
    (["--belief", "4", "--shares", "1,0,0,0,0,0"], "give one"),
    (["--group", "Atlantis"], "--group must be one that"),
])
def test_what_does_not_fit_is_one_line(ask, flags, message):
    err = ask(*flags, check=2)
    assert message in err and len(err.strip().splitlines()) == 1


def test_an_empty_question_is_one_line(ask):
    assert "question is empty" in ask(question=" ", check=2)
