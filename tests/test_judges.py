"""python -m pytest tests/test_judges.py: BPC by an LLM, RS by an encoder, chat models."""
import json
import random
import re

import numpy as np
import pytest
import test_client
import test_evaluate
import torch
from conftest import completion
from test_client import question as prompt
from test_evaluate import FAST, saved

import evaluate
import synth
from evaluate import (belief_preference_consistency, check_judge, encode, judge,
                      response_similarity, wordpiece)

client, runs = test_client.client, test_evaluate.runs
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
    (["Yes", "No"], "Yes", ["Yes", "**Yes**\nIt does.", '{ "answer" : "Yes" }']),
    (["Yes", "No"], "No", ["no. It does not", "No, never", '{"answer": "No"}']),
    (["Yes", "No"], None, ["Yes or No\nNo", "Yes/No", "Yes and no.", "Maybe yes", "Yesterday"]),
    ([*"123"], "3", ["3", "The rating is 3.", "3/3", "3.0"]),
    ([*"123"], "2", [" 2. ", "Rating: 2", '{"answer": "2"}']),
    ([*"123"], None, ["-1", "4", "1 or 2", "3 stars", "1. The film is good", "Yes"])])
def test_a_judgement_is_never_guessed(server, client, labels, label, replies):
    for reply in replies:
        server.answer = lambda r: (200, completion(reply))
        found, line = judge(client(), "j", [reply], labels)
        assert found == [label], reply
        assert ("no mean is given" in line) == (label is None)


def test_a_judge_that_cannot_be_read_is_not_asked_on_and_a_refusal_is_a_failure(server, client):
    server.answer = lambda r: (200, completion("Perhaps"))
    found, line = judge(client(), "j", [*map(str, range(50))], ["Yes", "No"])
    assert found == [None] * 50 and len(server.requests) == 20
    assert line.startswith("j: 20 of 20 judgements failed (one: 'Perhaps'), more than 5%")
    answer = completion(None)
    answer["choices"][0]["message"]["refusal"] = "Yes, but I can't."
    server.answer = lambda r: (200, answer if prompt(r) == "b" else completion("Yes"))
    found, line = judge(client(), "j", ["a", "b"], ["Yes", "No"])
    assert found == [None, None] and "1 of 2 judgements failed" in line and "I can't" in line


def test_the_judge_itself_is_checked_on_labelled_reviews(server, client):
    said = {"0": "1", "1": "1", "2": "2", "3": "1", "4": "3"}
    rows = [{"accept_choice_id": t, "accept_response": f"text {n}"} for n, t in enumerate("12345")]
    server.answer = lambda r: (200, completion(said[prompt(r)[-1]]))
    line = check_judge(rows, client(), "j", 5)
    # class 1: 2 hits of 2 true, 3 told: 0.8; class 2: 1; class 3: 1 hit of 2 true, 1 told: 2/3
    assert f"accuracy 0.800, weighted F1 {0.4 * 0.8 + 0.2 * 1 + 0.4 * 2 / 3:.3f}" in line
    assert "0 of 5 judgements failed" in line
    server.answer = lambda r: (200, completion("no idea" if prompt(r)[-1] == "0" else "1"))
    line = check_judge(rows, client(), "k", 5)
    assert line == ("k: 1 of 5 judgements failed (one: 'no idea'), more than 5%: no mean is given")


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
