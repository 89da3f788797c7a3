"""python -m pytest tests/test_client.py: the chat client against a server that misbehaves."""
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate

import pytest
from conftest import ROOT, completion

import data
import synth


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """client(**flags): a Client of the local server, impatient."""
    monkeypatch.setattr(data, "PAUSE", 0.01)
    monkeypatch.setenv("API_KEY", "sk-very-secret")
    server.answer = lambda r: (200, completion("said " + r.body["messages"][0]["content"]))

    def make(**flags):
        flags = {"base_url": server.url + "/v1", "timeout": 0.5} | flags
        return synth.Client(synth.Chat(**flags), tmp_path / "c/answers.jsonl")
    return make


def ask(client, *prompts):
    return [text for text, _ in synth.chat(client, prompts, "asking")]


def test_answers_come_in_order_with_the_papers_settings_and_the_key_in_the_header(client, server):
    assert ask(client(), *"abcdefghij") == [f"said {x}" for x in "abcdefghij"]
    r = server.requests[0]
    assert r.path == "/v1/chat/completions"
    assert r.headers["Authorization"] == "Bearer sk-very-secret"
    assert {k: v for k, v in r.body.items() if k != "messages"} == {      # Appendix A
        "model": "gpt-3.5-turbo-1106", "temperature": 1.0, "top_p": 1.0, "frequency_penalty": 0.0}


def test_a_second_run_costs_nothing_and_a_new_question_one_request(client, server):
    ask(client(), "a", "b")
    assert ask(client(), "b", "a", "c") == ["said b", "said a", "said c"]
    assert len(server.requests) == 3
    ask(client(temperature=0.5), "a")                       # another request
    assert len(server.requests) == 4


def test_equal_questions_get_answers_of_their_own(client, server):
    server.answer = lambda r: (200, completion(str(len(server.requests))))
    first = ask(client(concurrency=1), "a", "a", "a")
    assert len(set(first)) == 3
    assert ask(client(), "a", "a", "a") == first


def test_the_key_is_kept_nowhere(client, server, tmp_path, capsys):
    ask(client(), "a")
    server.answer = lambda r: (401, {"error": {"message": "wrong key sk-very-secret"}})
    with pytest.raises(OSError, match=r"401 .*wrong key \*\*\*"):
        ask(client(), "b")
    server.answer = lambda r: (401, "x" * 450 + "sk-very-secret")        # where words are cut
    with pytest.raises(OSError) as e:
        ask(client(), "b")
    assert "sk-" not in str(e.value)
    assert "secret" not in (tmp_path / "c/answers.jsonl").read_text() + "".join(capsys.readouterr())


@pytest.mark.parametrize("bad", [
    (429, "slow down"), (500, "oops"), (503, {"error": "busy"}), (200, "{not json"),
    (200, '{"choices": [{"mess'), (200, {"error": "odd"}), (200, {"choices": []}),
])
def test_bad_moments_are_waited_out(client, server, bad):
    times = Counter()

    def answer(r):
        text = r.body["messages"][0]["content"]
        times[text] += 1
        return bad if times[text] < 3 else (200, completion(text))
    server.answer = answer
    assert ask(client(), *"abcd") == list("abcd")
    assert set(times.values()) == {3}


@pytest.mark.parametrize("form", ["number", "date"])
def test_retry_after_is_honoured(client, server, form):
    value = "0.6" if form == "number" else formatdate(time.time() + 2, usegmt=True)
    server.answer = lambda r: (429, "wait", ("Retry-After", value)) if len(server.requests) == 1 \
        else (200, completion("ok"))
    start = time.monotonic()
    assert ask(client(), "a") == ["ok"] and time.monotonic() - start >= 0.6


def test_a_hanging_server_is_asked_again(client, server):
    def answer(r):
        if len(server.requests) == 1:
            time.sleep(2)
        return 200, completion("ok")
    server.answer = answer
    assert ask(client(timeout=0.3), "a") == ["ok"] and len(server.requests) == 2


def test_a_cut_answer_is_asked_for_again(client, server):
    server.answer = lambda r: (200, completion("ok"), *[("Content-Length", "99999")]
                               * (len(server.requests) == 1))
    assert ask(client(), "a") == ["ok"] and len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_another_4xx_stops_at_once_with_the_servers_words(client, server, status):
    def answer(r):
        if r.body["messages"][0]["content"] == "bad":
            return status, {"error": {"message": "no such model"}}
        return 200, completion("fine")
    server.answer = answer
    with pytest.raises(OSError, match=f"{status}.*no such model.*3 answers are kept"):
        ask(client(concurrency=1), "a", "b", "c", "bad", "d", "e")
    assert len(server.requests) == 4                        # nothing was sent after it
    server.answer = lambda r: (200, completion("fine"))
    ask(client(), "a", "b", "c", "bad", "d", "e")
    assert len(server.requests) == 7


def test_a_server_that_stays_down_ends_the_run_after_a_bounded_number_of_tries(client, server):
    server.answer = lambda r: (500, "down")
    with pytest.raises(OSError, match="500.*down, 8 times"):        # with the server's words
        ask(client(), "a")
    assert len(server.requests) == synth.Client.TRIES


def test_a_server_out_of_reach_is_said_soon(client):
    with pytest.raises(OSError, match="is the address right, and the server up.*4 times"):
        ask(client(base_url="http://127.0.0.1:9"), "a")


def test_a_prompt_that_the_servers_filter_stops_is_a_refusal(client, server):
    """Azure answers 400 there; the others are asked, and nothing is asked twice."""
    no = {"error": {"code": "content_filter", "message": "the prompt was filtered"}}
    server.answer = lambda r: (
        (400, no) if r.body["messages"][0]["content"] == "bad" else (200, completion("fine")))
    for _ in range(2):
        answers = synth.chat(client(), ["a", "bad", "b"], "asking")
        assert [*map(tuple, answers)] == [("fine", "stop"), synth.REFUSED, ("fine", "stop")]
    assert len(server.requests) == 3


def test_an_empty_answer_is_asked_for_again_by_the_next_run(client, server):
    server.answer = lambda r: (200, completion(None))
    assert synth.chat(client(), ["a"], "asking") == [("", "stop")]
    server.answer = lambda r: (200, completion("ok"))
    assert synth.chat(client(), ["a"], "asking") == [("ok", "stop")]


def test_text_in_parts_and_odd_usage_are_read_and_refusals_kept(client, server):
    answers = {"parts": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
               "usage": "fine", "refusal": None, "surrogate": "\ud83d!"}

    def answer(r):
        what = r.body["messages"][0]["content"]
        reply = completion(answers[what])
        if what == "usage":
            reply["usage"] = {"prompt_tokens": "12", "completion_tokens": None}
        if what == "refusal":
            reply["choices"][0]["message"]["refusal"] = "I won't."
            reply["usage"] = ["x"]
        return 200, reply
    server.answer = answer
    assert ask(client(), *answers) == ["ab", "fine", "I won't.", "\ud83d!"]
    ended = [e for _, e in synth.chat(client(), list(answers), "asking")]
    assert ended == ["stop", "stop", "refusal", "stop"]
    assert ask(client(), *answers)[2] == "I won't." and len(server.requests) == 4


def test_no_more_than_concurrency_requests_are_under_way(client, server):
    now, most = [0], [0]

    def answer(r):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.03)
        now[0] -= 1
        return 200, completion("x")
    server.answer = answer
    ask(client(concurrency=3), *map(str, range(20)))
    assert most[0] == 3


def test_limit_and_max_usd_stop_before_more_is_spent(client, server):
    with pytest.raises(OSError, match="--limit 2 requests are sent; 2 answers are kept"):
        ask(client(concurrency=1, limit=2), *"abcde")
    assert len(server.requests) == 2
    price = {"usd_in": 1000.0, "usd_out": 10000.0}          # 100 and 10 tokens: 0.2 dollars each
    with pytest.raises(OSError, match=r"--max_usd 0.7 is reached .*\$0.6000"):
        ask(client(concurrency=1, max_usd=0.7, **price), *"abcde")
    assert len(server.requests) == 3                        # the two that are kept count as spent
    assert len(ask(client(max_usd=2.0, **price), *"abcde")) == 5


def test_max_usd_holds_whatever_the_concurrency_and_needs_usage(client, server, tmp_path):
    price = {"usd_in": 1000.0, "usd_out": 10000.0}
    with pytest.raises(OSError, match="--max_usd 0.5 is reached"):
        ask(client(max_usd=0.5, **price), *"abcdefghijkl")
    assert len(server.requests) == 2
    server.answer = lambda r: (200, completion("x") | {"usage": None})
    with pytest.raises(OSError, match="tells no usage"):
        ask(client(max_usd=0.5, cache=str(tmp_path / "other.jsonl"), **price), *"abcdefghijkl")
    assert len(server.requests) == 3


def test_tokens_and_cost_stand_beside_the_bar(client, capsys):
    ask(client(usd_in=0.5, usd_out=1.5), *"abcd")
    err = capsys.readouterr().err
    assert "400 tokens in, 40 out, $0.0003" in err


def test_a_half_last_line_of_the_cache_is_survived(client, server, tmp_path):
    ask(client(), "a", "b")
    path = tmp_path / "c/answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for broken in (lines[1][:40], "nonsense\n", "[1, 2]\n", '{"key": 1}\n', "\udcff\udcfe"):
        path.write_bytes((lines[0] + broken).encode(errors="surrogateescape"))
        sent = len(server.requests)
        assert ask(client(), "a", "b") == ["said a", "said b"]
        assert len(server.requests) == sent + 1
        assert ask(client(), "a", "b") and len(server.requests) == sent + 1   # and mended


def test_azure_has_its_own_url_and_header(client, server):
    url = f"{server.url}/openai/deployments/gpt-4o?api-version=2024-05-13"
    ask(client(base_url=url), "a")
    r = server.requests[0]
    assert r.path == "/openai/deployments/gpt-4o/chat/completions"
    assert r.query == {"api-version": "2024-05-13"}
    assert r.headers["api-key"] == "sk-very-secret" and not r.headers["Authorization"]


def test_a_redirect_gets_no_key(client, server):
    server.answer = lambda r: (307, "", ("Location", server.url + "/elsewhere"))
    with pytest.raises(OSError, match="307"):
        ask(client(base_url=f"{server.url}?api-version=1"), "a")
    assert [r.path for r in server.requests] == ["/chat/completions"]


def test_a_netrc_entry_does_not_replace_the_key(client, server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ask(client(), "a")
    assert server.requests[0].headers["Authorization"] == "Bearer sk-very-secret"


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
import synth, data
data.run(lambda: print(len(synth.chat(synth.Client(synth.Chat(base_url={url!r}, concurrency=2),
                                                   {cache!r}), list(map(str, range(30))), "x"))))
"""


@pytest.mark.parametrize("sig, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on_where_it_was(server, tmp_path, sig, code):
    def answer(r):
        time.sleep(0.05)
        return 200, completion("x")
    server.answer, cache = answer, tmp_path / "a.jsonl"
    script = SCRIPT.format(root=str(ROOT), url=server.url, cache=str(cache))
    command = [sys.executable, "-c", script]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(server.requests) < 8:
        time.sleep(0.01)
    os.kill(p.pid, sig)
    out, err = p.communicate(timeout=30)
    assert p.returncode == code and "Traceback" not in err, err
    kept = len([line for line in cache.read_text().splitlines() if json.loads(line)])
    sent = len(server.requests)
    assert sent - 2 <= kept <= sent < 30                    # lost: what was under way at a kill
    if sig == signal.SIGINT:
        assert kept == sent                                 # at Ctrl-C, not even that
    p = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert p.stdout == "30\n" and len(server.requests) == sent + 30 - kept
