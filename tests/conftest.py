"""What the tests share: paths, golden numbers, a character tokenizer, the real command line.

    python -m pytest                 # everything: about two minutes on two cores
"""
import csv
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlparse

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import run  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"       # from runs of the authors' code and of transformers
SHARED = ROOT.parent / "shared" / "data"  # real data that users lack; its tests are then skipped
torch.set_num_threads(2)

golden = lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data files in {SHARED}")


class CharTokenizer:
    """The golden files' tokenizer: `!`..`~` -> ord - 33, space 94, end 127."""
    eos = 127

    def encode(self, text):
        return [94 if c == " " else ord(c) - 33 for c in text]


def cli(script, *args, cwd, check=0, nproc=0, **env):
    """Run the real command and check its exit code; returns the finished process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    launch = [sys.executable, *(torchrun if nproc else []), ROOT / script, *args]
    p = subprocess.run([*map(str, launch)], cwd=cwd, text=True, capture_output=True,
                       timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert check is None or p.returncode == check, p.stdout + p.stderr
    return p


@pytest.fixture
def call(monkeypatch, capsys):
    """Like cli, but in this process, which saves starting Python and importing torch."""
    def call(module, *args, cwd, check=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit, match=f"^{check}$") if check else nullcontext():
            run(module.main)
        out, err = capsys.readouterr()
        return SimpleNamespace(stdout=out, stderr=err)
    return call


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small made-up dataset: 40 rows to train on, 20 each for eval and test."""
    folder = tmp_path_factory.mktemp("world") / "tiny"
    import synth
    synth.toy(synth.Toy(out=str(folder), paraphrases=10))
    for split, n in (("train", 40), ("eval", 20), ("test", 20)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))
    return folder


SMALL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--vocab_size", 400, "--batch_size", 8,
         "--eval_every", 16, "--log_every", 1, "--device", "cpu")


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server at .url (http://...). Tests set .answer(request) -> (status, JSON or
    text, headers...); a request has path, query, body, headers. .requests lists them all."""
    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            url, size = urlparse(self.path), int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            query = {k: v[0] for k, v in parse_qs(url.query).items()}
            r = SimpleNamespace(path=url.path, query=query, body=body, headers=self.headers)
            fake.requests.append(r)
            status, answer, *headers = fake.answer(r)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            with suppress(OSError):                    # the client left, or got more than it wanted
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = reply
        log_message = lambda *args: None

    monkeypatch.setattr("data.PAUSE", 0.001)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", requests=[], answer=None)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield fake
    http.shutdown()
    http.server_close()


def completion(text, finish="stop"):
    """A chat completion as OpenAI's API returns it."""
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}}


SURVEY = [                               # question, shares, options
    ("Is it so?", "[0.6, 0.3, 0.1], \"Côte d'Ivoire\": [1, 0, 0]", "['Yes', \"Don't know\", 'No']"),
    ("How bad?", "[0.2, 0.3, 0.5]", "['A bit', 'Not too much', 'A lot']"),
    ("All zero", "[0.0, 0.0]", "['Yes', 'No']"), ("Unmapped", "[0.5, 0.5]", "['Yes', 'Maybe']"),
    ("", "[0.5, 0.5]", "['Yes', 'No']"), ("Third", "[0.9, 0.1]", "['Yes', 'No']")]
SURVEY_MAP = {"Yes": 4, "No": 2, "Don't know": 0, "A bit": 2, "Not too much": 2, "A lot": 5}


@pytest.fixture
def table(tmp_path):
    """Flags of `synth.py opinions` for a small survey table."""
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows([("question", "selections", "options", "source"), *(
            (asked, f"defaultdict(<class 'list'>, {{'Chile (rural)': {shares}}})", options, "GAS")
            for asked, shares, options in SURVEY)])
    (tmp_path / "map.json").write_text(json.dumps(SURVEY_MAP))
    return ["--csv", tmp_path / "t.csv", "--map", tmp_path / "map.json", "--noise", 0.15,
            "--country", "Chile (rural)", "--holdout_questions", 1, "--paraphrases", 40]
