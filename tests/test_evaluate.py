"""python -m pytest tests/test_evaluate.py: metrics, intervals, tables, figures, judges, --ask."""
import io
import json
import random
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import test_client
import torch
from conftest import SMALL, cli, completion, golden
from test_client import question as prompt

import evaluate
import synth
from data import class_ids, load_dataset, prompt_text
from evaluate import (answer_metrics, answer_parser, belief_preference_consistency, check_judge,
                      encode, expressed_opinion, group_shares, interval, judge, mean_over_seeds,
                      ordinal_metrics, preference_metrics, print_report, reference_distributions,
                      response_similarity, summary, wordpiece)
from losses import RESPONSE, Scores
from model import Tokenizer, load_model, save_model
from train import jsd

BASELINES, SAMPLED = golden("11")
META = {"classes": [str(k) for k in range(6)], "off_scale": "0",
        "belief_to_class": {k: str(v) for k, v in SAMPLED["belief_map"].items()}}
client = test_client.client
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
    rng, p = np.random.default_rng(0), np.array([0.5, 0.3, 0.15, 0.05, 0, 0])
    answers = [[(str(c), None, "") for c in rng.choice(6, 8, p=p)] for _ in range(2000)]
    m = answer_metrics(answers, np.tile(p, (2000, 1)), {"classes": META["classes"]})
    assert m["sampled_jsd"].mean() == pytest.approx(m["sampling_floor"].mean(), rel=0.02)
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
    for text in "4<a>Yes.\n\nMore.", "\n\n 4<a>Yes. Question: What?", "4<a>Yes.\n \nx":
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
    assert "given maj ↑" in table and "\ngiven maj ↑: " in p.stdout       # and its explanation
    result = saved(cwd, gdpo)
    names = ("jsd", "cbc", "opinion", "flip", "vote", "given_majority", "minority")
    assert all(result["seen"][name] for name in names)
    assert "flip" in saved(cwd, sft)["seen"] and "given_majority" not in saved(cwd, sft)["seen"]
    assert result["reference_jsd"].keys() == reference_distributions(np.eye(6)).keys()
    texts = (cwd / gdpo / "samples.jsonl").read_text()
    assert [len(json.loads(x)["answers"]) for x in texts.splitlines()] == [2] * 20
    # two processes
    p = cli("evaluate.py", gdpo, *FAST, cwd=cwd, nproc=2)
    assert (cwd / gdpo / "samples.jsonl").read_text() == texts and p.stdout.count("±: half") == 1
    for k, v in saved(cwd, gdpo)["seen"].items():
        assert result["seen"][k] == (v if isinstance(v, int) else pytest.approx(v, abs=1e-5)), k


def test_what_cannot_be_measured_is_left_out_with_a_line(runs, tmp_path):
    """A failed start, a file and a diverged model beside a good run whose first checkpoint was
    trained again; in ASCII."""
    cwd, (diverged, gdpo) = tmp_path, runs[1]
    shutil.copytree(runs[0] / "out", cwd / "out")
    (cwd / "out/begun").mkdir()
    (cwd / "out/answers.jsonl").write_text("")
    model = load_model(cwd / diverged / "best")
    torch.nn.init.constant_(model.ln_f.bias, float("nan"))
    save_model(model, cwd / diverged / "best", 0)
    p = cli("evaluate.py", "out/begun", "out/answers.jsonl", gdpo, diverged, "--samples", 0,
            cwd=cwd, PYTHONIOENCODING="ascii")
    assert "left out: out/begun: it is no run" in p.stderr and gdpo in p.stdout
    assert "no reference, no margins" in p.stderr and "given maj" not in p.stdout
    assert f"left out: {diverged}: " in p.stderr and diverged not in p.stdout
    assert "JSD ?" in p.stdout and p.stdout.isascii() and "answers.jsonl" not in p.stderr


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "nothing could be measured"),
    (["x", "--judge", "j", "--samples", "0"], "--judge, --embeddings need --samples"),
    (["x", "--against", "y"], "--against y is not one of the runs"),
    (["x", "--judge_check", "5"], "--judge_check needs a --judge"),
    (["x", "--belief", "4"], "--belief, --shares, --group and --json need --ask"),
    (["x", "--ask", " "], "--ask: a question is empty"),
    (["x", "--ask", "Why?", "--belief", "4", "--shares", "1,0"], "--shares draws it: give one"),
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


# ---------------------------------------------------------------------------------------------
# Judges, encoders, chat models

ROWS = [{"prompt": "How is it?", "options": ["Good", "Bad"], "question_id": "q",
         "accept_choice": "Good", "accept_response": "It is fine.",
         "reject_choice": "Bad", "reject_response": "It is poor."}]


def test_bpc_asks_appendix_h_and_counts_failures_as_null(server, client):
    """A belief or a response that is missing is inconsistent, without asking."""
    replies = {"A": "Yes\nIt does.", "B": "No.\nIt does not.", "C": "Perhaps", "D": "**Yes**"}
    server.answer = lambda r: (200, completion(replies[re.search("Answer: (.)", prompt(r))[1]]))
    good = [("4", "Good", f"{x} {n}") for n in range(7) for x in "ABD"]
    answers = [good + [("4", "Good", "C"), ("4", None, "A"), ("4", "Good", " ")]]
    bpc, line = belief_preference_consistency(answers, ROWS, client(), "gpt-4o")
    np.testing.assert_array_equal(bpc, [[1, 0, 1] * 7 + [np.nan, 0, 0]])
    assert line == "gpt-4o: 1 of 22 judgements failed (one: 'Perhaps')"
    body = server.requests[0].body
    assert body["model"] == "gpt-4o" and body["temperature"] == 0 and body["max_tokens"] == 64
    form = body["response_format"]["json_schema"]["schema"]["properties"]["answer"]
    assert form["enum"] == ["Yes", "No"] and len(server.requests) == 22
    assert prompt(server.requests[0]).startswith(
        "For the following QA pair, does the answer express the opinion of the selection: Good\n\n"
        "Question: How is it?\n\nAnswer: ")
    # reviews, in three classes
    server.answer = lambda r: (200, completion(prompt(r).split("comment: ")[1]))
    answers = [[(label, None, said) for label, said in zip([*"12354", None], "112311")]]
    bpc, _ = belief_preference_consistency(answers, [{"prompt": "Film"}], client(), "j")
    np.testing.assert_array_equal(bpc, [[1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("labels, label, replies", [
    ("Yes No", "Yes", ["Yes", "**Yes**\nIt does.", '{ "answer" : "Yes" }']),
    ("Yes No", "No", ["no. It does not", "No, never", '{"answer": "No"}']),
    ("Yes No", None, ["Yes or No\nNo", "Yes/No", "Yes and no.", "Maybe yes", "Yesterday"]),
    ("1 2 3", "3", ["3/3", "Rating: 3"]), ("1 2 3", None, ["4", "1. The film is good", "Yes"])])
def test_a_judgement_is_never_guessed(server, client, labels, label, replies):
    for reply in replies:
        server.answer = lambda r: (200, completion(reply))
        found, line = judge(client(), "j", [reply], labels.split())
        assert found == [label] and ("no mean is given" in line) == (label is None), reply


def test_a_judge_that_cannot_be_read_is_not_asked_on_and_a_refusal_is_a_failure(server, client):
    server.answer = lambda r: (200, completion("Perhaps"))
    found, line = judge(client(), "j", [*map(str, range(50))], ["Yes", "No"])
    assert found == [None] * 50 and len(server.requests) == 20
    assert line.startswith("j: 20 of 20 judgements failed (one: 'Perhaps'), more than 5%")
    refusal = completion(None)
    refusal["choices"][0]["message"]["refusal"] = "Yes, but I can't."
    server.answer = lambda r: (200, refusal if prompt(r) == "b" else completion("Yes"))
    found, line = judge(client(), "j", ["a", "b"], ["Yes", "No"])
    assert found == [None, None] and "1 of 2 judgements failed" in line and "I can't" in line


def test_the_judge_itself_is_checked_on_labelled_reviews(server, client):
    said = {"0": "1", "1": "1", "2": "2", "3": "1", "4": "3"}
    rows = [{"accept_choice_id": t, "accept_response": f"text {n}"} for n, t in enumerate("12345")]
    server.answer = lambda r: (200, completion(said[prompt(r)[-1]]))
    line = check_judge(rows, client(), "j", 5)
    # class 1: 2 hits of 2 true, 3 told: 0.8; class 2: 1; class 3: 1 hit of 2 true, 1 told: 2/3
    assert f"accuracy 0.800, weighted F1 {0.4 * 0.8 + 0.2 * 1 + 0.4 * 2 / 3:.3f}" in line
    server.answer = lambda r: (200, completion("no idea" if prompt(r)[-1] == "0" else "1"))
    assert check_judge(rows, client(), "k", 5).endswith("more than 5%: no mean is given")


def test_a_judge_that_fails_is_found_at_once_or_costs_no_number(runs, call, server, monkeypatch):
    """A wrong key or rows without ratings before anything is measured; a server that is lost midway
    after all is kept."""
    cwd, (_, out) = runs
    monkeypatch.setattr(evaluate, "sample_rows", lambda model, items, *rest: [
        ["4<Approve>Mostly."] * 2 for _ in items])
    (cwd / out / "eval.json").unlink(missing_ok=True)
    flags = (out, *FAST, "--judge", "j", "--base_url", server.url)
    server.answer = lambda r: (200, completion("yes"))
    p = call(evaluate, *flags, "--judge_check", 5, cwd=cwd, check=2)
    assert "--judge_check is for reviews" in p.stderr and not (cwd / out / "eval.json").exists()
    server.requests.clear()
    (cwd / "out/answers.jsonl").unlink()
    words = {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}
    for good in (0, 2):
        server.answer = lambda r: (
            (200, completion("yes")) if 1 < len(server.requests) <= good else (401, words))
        p = call(evaluate, *flags, cwd=cwd, check=2)
        assert "Incorrect API key" in p.stderr and (good or len(server.requests) == 1)
        assert (cwd / out / "eval.json").exists() == ("JSD" in p.stdout) == bool(good)
    assert saved(cwd, out)["seen"]["opinion"] and "bpc" not in saved(cwd, out)["seen"]


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789",
         *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"), *"!,.?'中é", "the", "film",
         "##s", "good", "un", "##good"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random BERT and its tokenizer in Hugging Face's form."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(VOCAB)), encoding="utf-8")
    BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=120, hidden_size=32, num_hidden_layers=3,
                                 num_attention_heads=4, intermediate_size=64,
                                 max_position_embeddings=256)).eval()
    for p in model.parameters():                            # no trivial LayerNorm or bias
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder, model


def test_the_sentence_encoder_agrees_with_transformers(bert, tmp_path):
    from tokenizers import Tokenizer
    folder, theirs = bert
    rng, alphabet = random.Random(0), (
        "abz the films ungood 09 ,.!?'\"-_()#@$+<=>^`|~\t\n"
        "ÉéßİΣ中国カ한ﬁ½–…“”€\u200b\u00ad\x00\ufffd🙂")
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(3000)]
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [t for t in texts if wordpiece(t, vocab, 10 ** 6) != oracle.encode(t).ids] == []
    texts = [t for t in texts if t.strip()][:7] + ["the film", "a " * 200]
    for text, vector in zip(texts, encode(texts, str(folder))):
        with torch.no_grad():
            mean = theirs(torch.tensor([wordpiece(text, vocab)])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(vector), mean / mean.norm(), rtol=1e-4,
                                   atol=1e-5)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_act": "relu"}')
    with pytest.raises(ValueError, match="is not a BERT with exact GELUs"):
        encode(["x"], str(tmp_path))


def test_rs_compares_with_a_response_of_the_announced_belief():
    rows = ROWS + [ROWS[0] | {"prompt": "And how is it?", "accept_response": "Fine!"}]
    vectors = {"x": [1, 0], "It is fine.": [0.6, 0.8], "It is poor.": [0, 1], "Fine!": [1, 0]}
    encode = lambda texts: np.array([vectors[t] for t in texts], float)
    answers = [[("4", "Good", "x"), ("2", "Bad", "x"), ("4", "Other", "x"), ("4", "Good", "")],
               [("4", "Good", "x")] * 4]
    rs = response_similarity(answers, rows, encode)
    np.testing.assert_allclose(rs, [[0.6, 0, 0, 0], [1, 1, 1, 1]])
    missing = [ROWS[0] | {"options": ["Good", "Bad", "Rare"]}]
    assert np.isnan(response_similarity([[("5", "Rare", "x")]], missing, encode)).all()


def test_bpc_and_rs_stand_in_the_table_and_in_the_file(runs, call, bert, server):
    """RS by a local encoder and by an endpoint."""
    cwd, (_, out) = runs
    server.answer = lambda r: (200, completion("Yes\nIt does") if "messages" in r.body else {
        "data": [{"index": i, "embedding": [len(t), 4.0, 0]}
                 for i, t in enumerate(r.body["input"])]})
    for model in (bert[0], "api:text-embedding-3-small"):
        p = call(evaluate, out, *FAST, "--judge", "gpt-4o-mini", "--embeddings", model,
                 "--base_url", server.url, cwd=cwd)
        result = saved(cwd, out)
        assert result["judged"].startswith("gpt-4o-mini: 0 of ") and result["judged"] in p.stdout
        assert 0 <= result["seen"]["bpc"][0] <= 1 and -1 <= result["seen"]["rs"][0] <= 1
        assert " BPC" in p.stdout and " RS" in p.stdout
    assert {"text-embedding-3-small", "gpt-4o-mini"} == {r.body["model"] for r in server.requests}


def test_a_chat_model_is_prompted_with_shots_and_measured(runs, call, server, world, tmp_path):
    call(synth, "icf", "--data", world, "--shots", 2, "--out", tmp_path / "icf", cwd=tmp_path)

    def answer(r):
        assert prompt(r).startswith("You are a helpful assistant") and prompt(r).endswith("Answer:")
        assert prompt(r).count("Question: ") == 3 and r.body["max_tokens"] == 64
        return 200, completion(" 4<Approve>Mostly. Such is life.\n\nQuestion: And then?")
    server.answer = answer
    measure = lambda out, folder, *flags, check=0: call(
        evaluate, out, "--data", folder, *flags, cwd=tmp_path, check=check)
    p = measure("chat:gpt-4o", tmp_path / "icf", "--base_url", server.url)
    assert len(server.requests) == 20 and "sampled ↓" in p.stdout and "JSD ↓" not in p.stdout
    result = saved(tmp_path, "out/icf-chat-gpt-4o")
    assert result["seen"]["sampled_jsd"] and "jsd" not in result["seen"]
    p = measure(runs[0] / runs[1][0] / "best", tmp_path / "icf", *FAST)
    assert "mass ↑" in p.stdout
    p = measure("chat:gpt-4o", world, "--base_url", server.url, check=2)
    assert "have no few-shot context: make them with `synth.py icf`" in p.stderr


# ---------------------------------------------------------------------------------------------
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
