"""python -m pytest tests/test_evaluate.py: metrics, intervals, tables, figures, --ask."""
import io
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, cli, golden

import evaluate
from data import class_ids, load_dataset, prompt_text
from evaluate import (answer_metrics, answer_parser, expressed_opinion, group_shares, interval,
                      mean_over_seeds, ordinal_metrics, preference_metrics, print_report,
                      reference_distributions, summary)
from losses import RESPONSE, Scores
from model import Tokenizer, load_model, save_model
from train import jsd

BASELINES, SAMPLED = golden("11")
META = {"classes": [str(k) for k in range(6)], "off_scale": "0",
        "belief_to_class": {k: str(v) for k, v in SAMPLED["belief_map"].items()}}
FAST = ("--samples", 2, "--max_new_tokens", 12, "--device", "cpu")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """(folder, [SFT run, GDPO run]), both tiny."""
    cwd = tmp_path_factory.mktemp("runs")
    cli("train.py", "--data", world, "--loss", "gdpo", "--epochs", 1, *SMALL, cwd=cwd)
    return cwd, [f"out/{world.name}-{loss}-seed0" for loss in ("sft", "gdpo")]


def saved(cwd, out):
    return json.loads((cwd / out / "eval.json").read_text())


def measured(values, seen=False, groups=None):
    """What evaluate.measure returns, of a row per question and its JSD."""
    rows = [{"prompt": str(n), "question_id": str(n), "group": g}
            for n, g in enumerate(groups or [""] * len(values))]
    return SimpleNamespace(rows=rows, seen=np.broadcast_to(seen, len(rows)),
                           metrics={"jsd": np.array(values, float)})


def test_reference_distributions_agree_with_golden_11():
    target = np.array(BASELINES["probabilities"])
    names = {"uniform": "uniform", "majority": "majority", "reverse": "reverse_as_in_paper_text",
             "noise(0.05)": "noise_0_05", "noise(0.1)": "noise_0_1"}
    for name, q in reference_distributions(target).items():
        # row 3 of noise(0.1): the authors' number is of the sorted vectors, where the noise makes
        # 0.2 0.2 0.2 0.2 0.1 0.1 of itself; in place it does not
        same = [n for n in range(len(target)) if (name, n) != ("noise(0.1)", 3)]
        expected = np.array(BASELINES[names.pop(name)])
        np.testing.assert_allclose(jsd(q, target)[same], expected[same], atol=1e-9)
    assert not names


def test_w1_knows_the_order_of_the_classes_and_minority_mass_is_a_ratio_of_sums():
    p, q = np.eye(6)[[1, 1, 1]], np.eye(6)[[1, 2, 5]]
    assert ordinal_metrics(q, p, META)["w1"].tolist() == [0, 0.25, 1]
    half = [[0.5, 0.5, 0, 0, 0, 0]]                      # class 0 is off the scale
    assert ordinal_metrics(half, [[0.2, 0.8, 0, 0, 0, 0]], META)["w1"] == pytest.approx([0])
    assert np.isnan(ordinal_metrics(half, np.eye(6)[:1], META)["w1"])
    five = {"classes": list("12345"), "off_scale": None}
    assert ordinal_metrics(np.eye(5)[:1], np.eye(5)[4:], five)["w1"] == [1]
    pairs = ordinal_metrics([[0.05, 0, 0.35, 0, 0.6, 0], [0.9, 0, 0, 0, 0.1, 0]],
                            [[0.1, 0, 0.3, 0, 0.6, 0], [0.99, 0, 0, 0, 0.01, 0]], META)["minority"]
    np.testing.assert_allclose(pairs, [[0.05, 0.1], [0.1, 0.01]])
    assert interval(pairs, ["a", "b"])[0] == pytest.approx(0.15 / 0.11)


def test_vote_and_flip_are_read_from_four_branches():
    """Response log-probs of chosen, own, given, flip: h is 2 after the accepted belief and -1 after
    the rejected one in row 0; in row 1 the answer does not follow; row 2 has one class twice."""
    logps, ref = torch.zeros(2, 3, 4, 3)
    logps[..., RESPONSE] = torch.tensor([[-1., -2, -3, -3], [-1, -3, -3, -2], [-1, -2, -3, -3]])
    shares, pair = torch.tensor([[0.6, 0.4]] * 3), torch.tensor([[0.75, 0.25]] * 3)
    items = [SimpleNamespace(accept=a, reject=b) for a, b in ((0, 1), (0, 1), (1, 1))]
    vote = lambda h, other: pytest.approx(
        (0.6 / (1 + np.exp(-h)) + 0.4 / (1 + np.exp(-other)) - 0.75) ** 2)
    s = Scores(logps, None, shares.log(), None, pair, None)
    m = preference_metrics(s, items, 1.0)
    assert set(m) == {"flip", "vote"} and m["vote"][0] == vote(2, -1)
    assert m["flip"][:2].tolist() == [1, 0] and np.isnan([m["flip"][2], m["vote"][2]]).all()
    s.ref = ref                                          # rewards
    assert preference_metrics(s, items, 0.5)["vote_r"][0] == vote(1, -0.5)
    ref[..., RESPONSE] = logps[1, :, RESPONSE]
    assert preference_metrics(s, items, 0.5)["flip_r"][0] == 0


def test_sampled_beliefs_and_cbc_agree_with_golden_11_and_opinion_takes_the_first_stance():
    parse = answer_parser(META)
    answers = [[*map(parse, row)] for row in zip(*SAMPLED["samples"])]
    m = answer_metrics(answers, np.array(SAMPLED["probabilities"]), META)
    np.testing.assert_allclose(m["sampled_jsd"], SAMPLED["sampled_jsd"], atol=1e-9)
    assert m["cbc"].mean() == pytest.approx(SAMPLED["cbc"])
    meta = META | {"stances": {"not at all": "1", "mostly": "4"}}
    texts = ("4<Yes>Mostly. Not at all a burden.", "4<Yes>Well, not at all.", "4<Yes>Hm.", "Mostly")
    assert expressed_opinion([[*map(parse, texts)]], meta).tolist() == [[1, 0, 0, 0]]


def test_a_perfect_sampler_has_the_floors_jsd_and_junk_the_largest():
    rng, p, floors = np.random.default_rng(0), np.array([0.5, 0.3, 0.15, 0.05, 0, 0]), {}
    for k in (8, 32):
        answers = [[(str(c), None, "") for c in rng.choice(6, k, p=p)] for _ in range(2000)]
        m = answer_metrics(answers, np.tile(p, (2000, 1)), {"classes": META["classes"]})
        floors[k] = m["sampling_floor"].mean()
        assert m["sampled_jsd"].mean() == pytest.approx(floors[k], rel=0.02)
    assert floors[8] > floors[32] > 0
    answers = [[(None, None, "junk")] * 8]               # where no class is off the scale
    m = answer_metrics(answers, np.full((1, 5), 0.2), {"classes": list("12345")})
    assert m["sampled_jsd"] == pytest.approx(np.sqrt(np.log(2)))


@pytest.mark.parametrize("text, parsed", [
    ("Well<a>b", ("Well", "a", "b")), ("4<a > b>so <i>", ("4", "a > b", "so <i>")),
    ("4<who knows>x", ("4", "who knows", "x")), ("4 stars", ("4", None, " stars")),
    ("<a>", (None, "a", "")), ("45 minutes in I left", (None, None, "45 minutes in I left")),
    ("4.5 stars", (None, None, "4.5 stars")), ("4. Good", ("4", None, ". Good"))])
def test_an_answer_is_cut_where_label_and_belief_end(text, parsed):
    meta = {"classes": ["Well", "We", "4"], "belief_to_class": {"a > b": "4", "a": "We"}}
    assert answer_parser(meta)(text) == parsed
    for rest in (".\n\nMore.", ". Question: What?", ".\n \nx"):
        text = f"\n\n 4<a>Yes{rest}"
        assert answer_parser(meta)(text, few_shot=True) == ("4", "a", "Yes.")


def test_the_bootstrap_resamples_questions_not_rows():
    """Ten rows of one question tell no more than one row of it; 19 questions are too few."""
    values, questions = np.random.default_rng(0).normal(size=50), np.arange(50)
    _, low, high = interval(values, questions)
    mean10, low10, high10 = interval(np.repeat(values, 10), np.repeat(questions, 10))
    assert mean10 == pytest.approx(values.mean())
    assert high10 - low10 == pytest.approx(high - low, rel=0.05)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(50), rel=0.15)
    assert interval(np.array([np.nan, np.nan]), np.array([1, 2])) is None
    assert interval(np.ones(19), np.arange(19)) == [1, None, None]


def test_seen_and_unseen_questions_groups_and_the_worst_of_them_are_kept_apart():
    r = measured([1, 1, 1, 5], seen=[True, True, True, False], groups="xxyy")
    r.rows[1]["question_id"] = "0"
    r.metrics |= {"cbc": np.array([1.0, 1, 0, 0]), "rs": np.full(4, np.nan)}
    out = summary(r)
    assert [*out] == ["unseen", "seen", "group x", "group y", "worst group"]
    assert out["seen"]["rows"] == 3 and out["seen"]["questions"] == 2 and out["seen"]["jsd"][0] == 1
    assert out["unseen"]["jsd"][0] == 5 and out["worst group"]["jsd"][0] == 3
    assert out["worst group"]["cbc"][0] == 0 and out["worst group"]["rs"] is None


def test_seeds_are_averaged_and_the_larger_interval_stands(capsys):
    sd = np.sqrt(2)
    assert mean_over_seeds([[1, 0.9, 1.1], [3, 2.9, 3.1]]) == pytest.approx([2, 2 - sd, 2 + sd])
    assert mean_over_seeds([[1, -3, 5], [3, None, None]]) == pytest.approx([2, -2, 6])
    assert mean_over_seeds([[1, None, None]]) == [1, 1, 1]
    assert mean_over_seeds([[1, 0, 2], None]) is None
    result = lambda *jsd: {"seen": {"rows": 1, "questions": 1, "jsd": jsd, "cbc": None}}
    print_report({"a-seed0": result(1., 0.9, 1.1), "b": result(5., None, None),
                  "a-seed1": result(3., 2.9, 3.1)})
    lines = [x.split() for x in capsys.readouterr().out.splitlines()]
    assert ["a", "(2", "seeds)", "2.000", "±1.414"] in lines and ["b", "5.000", "*"] in lines


def test_paired_differences_are_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    a, b = hard + 0.1 * rng.normal(size=200), hard - 0.2 + 0.1 * rng.normal(size=200)
    value, low, high = summary(measured(b), measured(a), "a")["unseen, difference to a"]["jsd"]
    assert value == pytest.approx(-0.2, abs=0.05)
    whole = interval(a, np.arange(200))
    assert high - low < 0.2 * (whole[2] - whole[1])
    assert [*summary(measured(b[:100]), measured(a), "a")] == ["unseen"]


def test_the_command_prints_tables_and_writes_the_same_numbers(runs, call):
    cwd, (sft, gdpo) = runs
    p = call(evaluate, gdpo, sft, *FAST, "--against", sft, cwd=cwd)
    table, differences = p.stdout.split(f"difference to {sft}")[:2]
    for out in (sft, gdpo):
        line = next(x for x in table.splitlines() if x.startswith(out))
        assert f"{saved(cwd, out)['unseen']['jsd'][0]:.3f}" == line.split()[1]
    assert table.index(gdpo) < table.index(sft) and gdpo in differences and sft not in differences
    assert max(map(len, p.stdout.splitlines())) <= 100
    legend = p.stdout.split("unseen: questions")[1]
    for header in ("JSD ↓", "given maj ↑", "minority →1"):
        assert header in table and f"\n{header}: " in legend
    result = saved(cwd, gdpo)
    names = ("jsd", "cbc", "opinion", "flip", "vote", "given_majority", "minority")
    assert all(result["seen"][name] for name in names)
    assert "flip" in saved(cwd, sft)["seen"] and "given_majority" not in saved(cwd, sft)["seen"]
    assert result["reference_jsd"].keys() == reference_distributions(np.eye(6)).keys()
    answers = [json.loads(x) for x in (cwd / gdpo / "samples.jsonl").read_text().splitlines()]
    assert len(answers) == 20 and len(answers[0]["answers"]) == 2
    call(evaluate, gdpo, *FAST, cwd=cwd)
    assert saved(cwd, gdpo) == result
    # two processes
    texts = (cwd / gdpo / "samples.jsonl").read_text()
    p = cli("evaluate.py", gdpo, *FAST, cwd=cwd, nproc=2)
    assert (cwd / gdpo / "samples.jsonl").read_text() == texts and p.stdout.count("±: half") == 1
    for k, v in saved(cwd, gdpo)["seen"].items():
        assert result["seen"][k] == (pytest.approx(v, abs=1e-5) if isinstance(v, int) else
                                     v and [x and pytest.approx(x, abs=1e-5) for x in v]), k


def test_what_cannot_be_measured_is_left_out_with_a_line(runs, tmp_path):
    """A failed start, a file and a diverged model beside a good run whose first checkpoint was
    trained again; in ASCII."""
    cwd, (diverged, gdpo) = tmp_path, runs[1]
    shutil.copytree(runs[0] / "out", cwd / "out")
    (cwd / "out/begun").mkdir()
    (cwd / "out/begun/config.json").write_text("{")
    (cwd / "out/answers.jsonl").write_text("")
    model = load_model(cwd / diverged / "best")
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    save_model(model, cwd / diverged / "best", 0)
    p = cli("evaluate.py", "out/begun", "out/answers.jsonl", gdpo, diverged, "--samples", 0,
            cwd=cwd, PYTHONIOENCODING="ascii")
    assert "left out: out/begun: out/begun is no run" in p.stderr and gdpo in p.stdout
    assert "no reference, no margins" in p.stderr and "given maj" not in p.stdout
    assert f"left out: {diverged}: " in p.stderr and diverged not in p.stdout
    assert "JSD ?" in p.stdout and p.stdout.isascii() and "answers.jsonl" not in p.stderr


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "nothing could be measured"),
    (["x", "--judge", "j", "--samples", "0"], "--judge, --embeddings need --samples"),
    (["x", "--against", "y"], "--against y is not one of the runs"),
    (["x", "--judge_check", "5"], "--judge_check needs a --judge"),
    (["x", "--belief", "4"], "--belief, --shares, --group and --json need --ask"),
    (["chat:gpt-4o", "--ask", "Why?"], "no folder chat:gpt-4o")])
def test_bad_input_is_one_line_and_exit_2(args, message, call, tmp_path):
    err = call(evaluate, *args, cwd=tmp_path, check=2).stderr
    assert message in err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_figures_and_tables_are_drawn_from_the_files_alone(runs, call, tmp_path):
    pytest.importorskip("matplotlib")
    cwd, outs = runs
    call(evaluate, *outs, *FAST, cwd=cwd)
    (tmp_path / "begun").mkdir()
    p = cli("assets/figures.py", *outs, tmp_path / "begun", "--to", tmp_path / "f", cwd=cwd)
    assert "left out, not a finished run" in p.stderr and "begun" in p.stderr
    assert p.stdout.strip().endswith("bars.png, jsd.png, margins.png, tables.md")
    text = (tmp_path / "f/tables.md").read_text(encoding="utf-8")
    for out in outs:
        assert f"| {out[4:-6]} | {saved(cwd, out)['unseen']['jsd'][0]:.3f} ±" in text
    assert text.count("Table 3") == 3 and (tmp_path / "f/jsd.png").stat().st_size > 10_000
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    p = cli("assets/figures.py", "x", cwd=tmp_path, check=1, PYTHONPATH=str(tmp_path))
    assert p.stderr == "figures.py: error: the figures need matplotlib: pip install matplotlib\n"


# --ask

QUESTION = "How do you rate night buses?"


@pytest.fixture
def ask(runs, call):
    """What `evaluate.py OUT --ask QUESTION --json` finds for the SFT run, or its error."""
    def ask(*flags, check=0):
        cwd, (sft, _) = runs
        p = call(evaluate, sft, "--ask", QUESTION, "--json", *flags, cwd=cwd, check=check)
        return p.stderr if check else json.loads(p.stdout)["models"][sft]
    return ask


def test_the_distribution_is_read_from_the_model_and_compared_to_the_group(ask, runs):
    found, folder = ask(), runs[0] / runs[1][0] / "best"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    ids = tokenizer.encode(prompt_text({"prompt": QUESTION}, "<Q>{prompt}<A>"))
    with torch.no_grad():
        logits = model.head @ model(torch.tensor([ids]))[0, -1]
    p = logits.softmax(-1)[class_ids(tokenizer, found["classes"])]
    np.testing.assert_allclose(found["shares"], p / p.sum(), rtol=1e-4)
    assert found["class_mass"] == pytest.approx(p.sum().item(), rel=1e-4)
    assert found["jsd"] == pytest.approx(float(jsd(found["shares"], found["group_shares"])))
    assert len(found["answers"]) == 6 and found["answers"][4][0].startswith("4")


def test_a_belief_is_held_and_shares_are_drawn(ask):
    said = ask("--belief", "4<Somewhat good>", "--samples", 3)["answers"]
    assert [start for start, _ in said] == ["4<Somewhat good>"] * 3
    [[alone, _]] = ask("--belief", 4)["answers"]
    assert alone.startswith("4")
    flags = ("--shares", "0,0,0,0,0.5,0.5", "--samples", 20)
    drawn = ask(*flags)["answers"]
    firsts = lambda said: [start[0] for start, _ in said]
    assert len(drawn) == 120 and set(firsts(drawn)) == {"4", "5"}
    assert 40 < firsts(drawn).count("4") < 80 and ask(*flags)["answers"] == drawn
    assert firsts(ask(*flags, "--seed", 1)["answers"]) != firsts(drawn)


@pytest.mark.parametrize("flags", [
    *([f"--shares={x}"] for x in ("1", "0,0,0,0,0,x", "0,0,0,0,0.5,0.6", "nan,0,0,0,0.5,0.5",
                                  "-1,1,0,0,0,1")),
    ["--belief", "9<Great>"], ["--group", "Atlantis"]])
def test_what_does_not_fit_is_one_line(ask, flags):
    assert len(ask(*flags, check=2).strip().splitlines()) == 1


def test_the_dataset_knows_a_question_in_any_wording():
    rows = [{"prompt": prompt, "probabilities": p, "group": group} for prompt, p, group in (
        ("Tell me: How is tea?", [1, 0], ""), ("How is coffee?", [0, 1], "x"),
        ("How is coffee?", [0.5, 0.5], "y"))]
    assert group_shares("how is TEA", rows, "") == [1, 0]
    assert group_shares("rum", rows, "") is None and group_shares("is", rows, "") is None
    assert group_shares("How is coffee?", rows, "") is None                # of two groups
    assert group_shares("How is coffee?", rows, "y") == [0.5, 0.5]


def test_it_is_shown_in_80_columns_of_plain_text(runs, call, world):
    cwd, outs = runs
    question = load_dataset(str(world), ("train",))[1]["train"][0]["prompt"]
    p = call(evaluate, *outs, "--ask", question, cwd=cwd)
    assert max(map(len, p.stdout.splitlines())) <= 80 and "\033" not in p.stdout
    assert "█" in p.stdout and p.stdout.count("JSD to the group") == 2
    assert p.stdout.count("the group  ") == 6 and p.stdout.count(outs[0][4:]) == 6 + 1


def test_questions_come_from_standard_input_and_checkpoints_need_no_data(runs, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("How is tea?\n\nHow is rum?\n"))
    checkpoint = f"{runs[1][0]}/best"
    shutil.copytree(runs[0] / checkpoint, runs[0] / "bare", dirs_exist_ok=True)
    p = call(evaluate, checkpoint, "bare", "--json", "--ask", cwd=runs[0])
    found = [json.loads(x) for x in p.stdout.splitlines()]
    assert [x["question"] for x in found] == ["How is tea?", "How is rum?"]
    one, other = found[0]["models"].values()
    assert one == other and one["classes"] == list("012345") and one["group_shares"] is None
