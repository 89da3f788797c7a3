"""python -m pytest tests/test_client.py: the chat client against a server that misbehaves."""
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, completion

import data
import synth

FINE = (200, completion("fine"))
question = lambda r: r.body["messages"][0]["content"]
ask = lambda client, *prompts: [text for text, _ in synth.chat(client, prompts, "asking")]


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """client(**flags): a Client of the local server, impatient, and one request at a time."""
    monkeypatch.setenv("API_KEY", "sk-very-secret")
    server.answer = lambda r: (200, completion("said " + question(r)))
    usual = {"base_url": server.url + "/v1", "timeout": 0.5, "concurrency": 1}
    return lambda **flags: synth.Client(synth.Chat(**usual | flags), tmp_path / "c/answers.jsonl")


def fails(client, words, *prompts):
    """The run ends, with these words; returns all it said."""
    with pytest.raises((OSError, ValueError), match=words) as e:
        ask(client, *prompts)
    return str(e.value)


def test_answers_come_in_order_from_no_more_than_concurrency_requests_at_once(client, server):
    done, at_once = [], []

    def answer(r):
        at_once.append(len(server.requests) - len(done))
        time.sleep(0.02)
        done.append(r)
        return 200, completion("said " + question(r))
    server.answer = answer
    assert ask(client(concurrency=3), *"abcdefghi") == [f"said {x}" for x in "abcdefghi"]
    assert max(at_once) == 3


def test_nothing_but_what_was_given_is_sent(client, server):
    ask(client(), "a")
    c = client(temperature=0.5, max_tokens=9, extra='{"seed": 1, "model": null}')
    synth.chat(c, ["a"], "asking", {"type": "object"}, temperature=0.0, llm="m", max_tokens=5)
    r, messages = server.requests[0], [{"role": "user", "content": "a"}]
    schema = {"name": "answer", "strict": True, "schema": {"type": "object"}}
    assert (r.path, r.headers["Authorization"]) == ("/v1/chat/completions", "Bearer sk-very-secret")
    assert [r.body for r in server.requests] == [
        {"model": "gpt-3.5-turbo-1106", "messages": messages},
        {"temperature": 0.0, "max_tokens": 9, "seed": 1, "messages": messages,
         "response_format": {"type": "json_schema", "json_schema": schema}}]


@pytest.mark.parametrize("flags, words", [
    ({"extra": "[1]"}, "--extra must be a JSON object"), ({"max_usd": 1.0}, "needs prices"),
    ({"base_url": "localhost"}, "is not an http"),
    ({"base_url": "http://me:very-secret@127.0.0.1/v1"}, "user:password@((?!secret).)*$")])
def test_a_flag_that_cannot_be_meant_is_one_line(client, flags, words):
    with pytest.raises(ValueError, match=words):
        client(**flags)


def test_only_what_was_never_answered_is_asked_and_equal_questions_get_their_own(client, server):
    server.answer = lambda r: (200, completion(str(len(server.requests))))
    assert ask(client(), "a", "b", "a") == ["1", "2", "3"]
    assert ask(client(), "b", "a", "c", "a") == ["2", "1", "4", "3"]
    assert ask(client(temperature=0.5), "a") == ["5"]       # another request


@pytest.mark.parametrize("broken", ['{"key": "a', "[1, 2]\n", '{"key": 1}\n', "\udcff\udcfe"])
def test_a_broken_line_of_the_cache_is_survived_and_ended(client, server, broken):
    ask(client(), "a")
    with open(client().cache, "a", errors="surrogateescape") as f:
        f.write(broken)
    for _ in range(2):
        assert ask(client(), "a", "b") == ["said a", "said b"]
    assert len(server.requests) == 2


def test_max_usd_stops_before_more_is_spent(client, server, capsys):
    price = {"usd_in": 1000.0, "usd_out": 10000.0}          # 100 and 10 tokens: 0.2 dollars each
    fails(client(max_usd=0.6, **price), r"--max_usd 0.6 is reached .*\$0.6", *"abcde")
    assert len(server.requests) == 3                        # the two that are kept count as spent
    assert len(ask(client(max_usd=2.0, **price), *"abcde")) == 5
    assert "500 tokens in, 50 out, $1.0000" in capsys.readouterr().err
    server.answer = lambda r: (200, completion("x") | {"usage": None})
    fails(client(max_usd=5.0, **price), "reports no usage", *"fghijkl")


SCRIPT = """
import data, signal, sys, synth
signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job ignores it
client = synth.Client(synth.Chat(base_url=sys.argv[1], concurrency=2), sys.argv[2])
data.run(lambda: print(len(synth.chat(client, list(map(str, range(30))), "x"))))
"""


@pytest.mark.parametrize("sig, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on_where_it_was(server, tmp_path, sig, code):
    server.answer, cache = lambda r: time.sleep(0.05) or FINE, tmp_path / "a.jsonl"
    start = lambda: subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, cache], cwd=ROOT,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = start()
    while len(server.requests) < 8:
        time.sleep(0.01)
    p.send_signal(sig)
    _, err = p.communicate(timeout=30)
    assert p.returncode == code and "Traceback" not in err, err
    kept, sent = len([*map(json.loads, open(cache))]), len(server.requests)
    assert sent - 2 <= kept <= sent < 30                    # lost: what was under way at a kill
    assert kept == sent or sig == signal.SIGKILL            # at Ctrl-C, not even that
    assert start().communicate(timeout=60)[0] == "30\n" and len(server.requests) == sent + 30 - kept


def test_keys_are_kept_and_shown_nowhere(client, server, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("API_KEY", "sk-very-secret\n")       # as mounted secrets are
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))    # does not replace the key
    ask(client(), "a")
    assert server.requests[0].headers["Authorization"] == "Bearer sk-very-secret"
    said = client().cache.read_text()
    for words in ("wrong key sk-very-secret", "x" * 490 + "sk-very-secret"):   # where words are cut
        server.answer = lambda r: (401, {"error": words})
        said += fails(client(), "the server answered 401", "b")
    server.answer = lambda r: (404, {"error": "no POST /v1/chat/completions?key=AIza-secret"})
    said += fails(client(base_url=f"{server.url}/v1?key=AIza-secret"), "404", "b")
    monkeypatch.setenv("API_KEY", "sk-very\nsecret")
    said += fails(client(), "^API_KEY holds a line break", "c")
    assert "secret" not in said + "".join(capsys.readouterr())


def test_azure_has_its_own_url_and_header_and_a_redirect_gets_no_key(client, server):
    ask(client(base_url=f"{server.url}/openai/deployments/gpt-4o?api-version=2024-05-13"), "a")
    r = server.requests.pop()
    assert r.path == "/openai/deployments/gpt-4o/chat/completions"
    assert r.query == {"api-version": "2024-05-13"}
    assert r.headers["api-key"] == "sk-very-secret" and not r.headers["Authorization"]
    server.answer = lambda r: (307, "", ("Location", server.url + "/elsewhere"))
    fails(client(), "307", "b")
    assert [r.path for r in server.requests] == ["/v1/chat/completions"]


PASSING = [(429, "slow down"), (503, {"error": "busy"}), (200, "<html>Wait"),
           (200, {"error": {"code": 502}}), (200, "cut", ("Content-Length", "99")),
           *[(200, completion("a te", end)) for end in ("error", "tool_calls", "abort")]]
TWICE = [(200, {"error": "no such path"}), (200, 'data: {"choices": []}'), (200, {"choices": "x"})]
FINAL = [(401, "wrong key"), (404, "no page"), (501, "no"), (429, {"code": "insufficient_quota"})]


@pytest.mark.parametrize("bad, times", [(x, n) for n, answers in (
    (8, PASSING), (2, TWICE), (1, FINAL)) for x in answers], ids=lambda x: str(x)[:50])
def test_what_may_pass_is_asked_again_and_the_rest_ends_the_run(client, server, bad, times):
    asked = lambda: Counter(map(question, server.requests))
    broken = {"bad": 99, "twice": times // 3}
    server.answer = lambda r: bad if asked()[question(r)] <= broken.get(question(r), 0) else FINE
    fails(client(), "the answers so far are kept", "a", "twice", "bad", "d")
    assert asked() == {"a": 1, "twice": times // 3 + 1, "bad": times}     # and nothing after it
    assert len(client().answers) == 2


def test_a_busy_server_names_a_wait_and_a_slow_or_absent_one_is_tried_less_often(
        client, server, monkeypatch):
    for headers, seconds in (({"Retry-After": "7"}, 7), ({"Retry-After": "99999"}, 600),
                             ({"ratelimit": '"api";r=0;t=40'}, 40), ({}, 0)):
        assert data.wait_of(SimpleNamespace(headers=headers)) == seconds
    server.answer, away = lambda r: time.sleep(0.3) or FINE, client(base_url="http://127.0.0.1:9")
    fails(client(timeout=0.1), "--timeout.*--concurrency, --styles.*--max_tokens.*3 times", "a")
    fails(away, "is the address right.*4 times", "a")
    monkeypatch.setattr(data, "ANSWERED", {"127.0.0.1:9"})  # not so if it had answered
    fails(away, "8 times", "a")


@pytest.mark.parametrize("answer, text, ended", [
    *[(completion(said), "answer", "stop") for said in (
        "<think>\nQ: a draft\n</think>\n\nanswer", "o </think> answer",
        "<think>a</think> no <think>b</think> answer", "[THINK]a[/THINK]answer",
        "<seed:think >a</seed:think >answer", "```json\nanswer\n```",
        "analysis a assistantfinalanswer",
        "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>answer",
        [{"text": "an"}, {"type": "thinking", "thinking": "h"}, {"type": "text", "text": "swer"}])],
    *[(completion("a", x), "a", "stop") for x in ("eos", "STOP", "", None, "x")],
    *[(completion("a", x), "a", "length") for x in ("length", "MAX_TOKENS", "context_exceeded")]],
    ids=str)
def test_an_answer_is_read_without_thinking_and_with_its_end(client, server, answer, text, ended):
    server.answer = lambda r: (200, answer)
    assert synth.chat(client(), ["a"], "asking") == [(text, ended)]


@pytest.mark.parametrize("status, answer, words", [
    (400, {"error": {"message": "Content Exists Risk", "param": None}}, "400: .*Exists Risk"),
    (403, "your input was flagged; this model requires moderation", "403: .*flagged"),
    (413, "Request too large for model `m`, please reduce your message", "413: "),
    (200, {"error": {"code": 403, "message": "flagged"}}, "flagged"),
    (200, {"choices": [{"error": {"code": 403}, "message": {"content": "a te"}}]}, "403"),
    (200, {"choices": None, "promptFeedback": {"blockReason": "SAFETY"}}, "SAFETY"),
    (200, {"choices": [{"message": {"content": None, "refusal": "I won't."}}]}, "I won't."),
    *[(200, {"choices": x}, "finish_reason stop") for x in ([], [None], [{"message": None}])],
    *[(200, completion("a", x), "finish_reason " + x.lower()) for x in (
        "content_filter", "SAFETY", "refusal", "RECITATION")],
    (200, completion("<think>hm", "length"), "finish_reason length .raise --max_tokens")], ids=str)
def test_a_refused_prompt_is_named_and_asked_again(client, server, capsys, status, answer, words):
    server.answer = lambda r: (status, answer) if question(r) == "bad" else FINE
    for _ in range(2):
        a, bad, b = synth.chat(client(), ["a", "bad", "b"], "asking")
        assert a == b == ("fine", "stop")
        assert bad.ended == "refused" and re.search(words, bad.text)
        assert "1 of 3 prompts were refused, the first: " in capsys.readouterr().err
    assert len(server.requests) == 3 + 1


@pytest.mark.parametrize("bad", [(400, "no such model"), (403, "suspended"), (200, completion(""))])
def test_five_refusals_in_a_row_end_a_run_if_a_harmless_prompt_is_refused_too(client, server, bad):
    server.answer = lambda r: bad if question(r) in "1234567" else FINE
    for sent in (7 + 1 + 3, 7 + 1):                         # then the others are in the cache
        assert ask(client(), *"1234567xyz")[7:] == ["fine"] * 3
        assert len(server.requests) == sent
        server.requests.clear()
    assert ask(client(), *"1a2b3c4d5e")[1::2] == ["fine"] * 5 and len(server.requests) == 10
    server.requests.clear()
    server.answer = lambda r: bad
    fails(client(), "even a harmless prompt is refused: .*the answers so far are kept", *"1234567")
    assert [question(r) for r in server.requests] == [*"12345", "Reply with yes."]


def test_parameters_that_a_model_refuses_are_left_out_once(client, server, capsys, monkeypatch):
    monkeypatch.setenv("API_KEY", "x")                      # a dummy, which garbles no message
    refused = {"top_p": "`temperature` and `top_p` cannot both be specified",
               "max_tokens": "Use 'max_completion_tokens' instead of 'max_tokens'",
               "response_format": "failed to parse grammar"}
    server.answer = lambda r: next(
        ((500 if name == "response_format" else 400, {"error": {"message": words, "param": name}})
         for name, words in refused.items() if name in r.body), FINE)
    c = client(extra='{"top_p": 0.5}', temperature=0.7, max_tokens=9)
    synth.chat(c, ["a", "b"], "asking", schema={"type": "object"})
    assert server.requests[-1].body == {"model": c.o.llm, "max_completion_tokens": 9,
        "temperature": 0.7, "messages": [{"role": "user", "content": "b"}]}
    assert len(server.requests) == 3 + 2 and capsys.readouterr().err.count("left out") == 3
    synth.chat(client(extra='{"max_completion_tokens": 7}', max_tokens=9), ["c"], "asking")
    assert server.requests[-1].body.items() >= {"max_completion_tokens": 7}.items()
    assert "max_tokens" not in server.requests[-1].body
    server.answer = lambda r: (400, "max_tokens is too large for the context length")
    assert ask(c, "d")[0].startswith("400") and "max_completion_tokens" in server.requests[-1].body


def embeddings(r, vector, index=range):
    found = [{"embedding": vector(x)} | ({} if k is None else {"index": k})
             for k, x in zip(index(len(r.body["input"])), r.body["input"])]
    return 200, {"data": found[::-1] if index is range else found, "usage": {"prompt_tokens": 1.0}}


@pytest.mark.parametrize("index", [range, lambda n: [None, *range(1, n)], lambda n: [None] * n])
def test_embeddings_come_in_order_however_many_inputs_a_server_takes(client, server, index):
    vector = lambda x: [3.0 * int(x), 4.0 * int(x)] if int(x) % 2 else [int(x), 0.0]
    server.answer = lambda r: (400, "batch size of input is invalid") if (
        len(r.body["input"]) > 10) else embeddings(r, vector, index)
    vectors = synth.embed(client(), [str(i) for i in range(1, 71)], "e")
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [1, 0]] * 35)


@pytest.mark.parametrize("vector", [[None, None], [0, 0], [[1, 2]], ["a", "b"], "text", []])
def test_broken_embeddings_are_an_error_and_not_kept(client, server, vector):
    server.answer = lambda r: embeddings(r, lambda text: vector)
    with pytest.raises(OSError, match="unreadable answer.*2 times; the answers so far"):
        synth.embed(client(), ["a", "b"], "e")
    assert not client().answers
