"""What the tests share: paths, golden numbers, a character tokenizer, the real command line.

    python -m pytest                 # everything: about two minutes on two cores
"""
import csv
import json
import os
import subprocess
import sys
import threading
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

real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data files in {SHARED}")


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


class CharTokenizer:
    """The golden files' tokenizer: `!`..`~` -> ord - 33, space 94, end 127."""
    eos = 127

    def encode(self, text):
        return [94 if c == " " else ord(c) - 33 for c in text]


def cli(script, *args, cwd, check=0, nproc=0, **env):
    """Run the real command and check its exit code; returns the finished process."""
    launch = [sys.executable, str(ROOT / script)]
    if nproc:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                  f"--nproc_per_node={nproc}", str(ROOT / script)]
    p = subprocess.run([*launch, *map(str, args)], cwd=cwd, text=True, capture_output=True,
                       timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert check is None or p.returncode == check, p.stdout + p.stderr
    return p


@pytest.fixture
def call(monkeypatch, capsys):
    """Like cli, but in this process, which saves starting Python and importing torch."""
    def call(module, *args, cwd, check=0):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        code = 0
        capsys.readouterr()
        try:
            run(module.main)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert code == check, out + err
        return SimpleNamespace(stdout=out, stderr=err, returncode=code)
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
def server():
    """A local HTTP server at .url (http://...). Tests set .answer(request) -> (status, JSON or
    text, headers...); a request has path, query, body, headers. .requests lists them all."""
    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            url, size = urlparse(self.path), int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            query = {k: v[0] for k, v in parse_qs(url.query).items()}
            r = SimpleNamespace(method=self.command, path=url.path, query=query, body=body,
                                headers=self.headers)
            fake.requests.append(r)
            status, answer, *headers = fake.answer(r)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass                                   # the client left, or got more than it wanted

        do_GET = do_POST = do_HEAD = reply
        log_message = lambda *args: None

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", requests=[], answer=None)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield fake
    http.shutdown()
    http.server_close()


def completion(text, finish="stop"):
    """A chat completion as OpenAI's API returns it."""
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                         "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}}


SURVEY = [
    ["Is it so?", "defaultdict(<class 'list'>, {'Chile (rural)': [0.6, 0.3, 0.1], "
                  "\"Côte d'Ivoire\": [1, 0, 0]})",
     "['Yes', \"Don't know\", 'No']", "GAS"],
    ["How bad?", "defaultdict(<class 'list'>, {'Chile (rural)': [0.2, 0.3, 0.5]})",
     "['A bit', 'Not too much', 'A lot']", "GAS"],
    ["All zero", "defaultdict(<class 'list'>, {'Chile (rural)': [0.0, 0.0]})",
     "['Yes', 'No']", "WVS"],
    ["Unmapped", "defaultdict(<class 'list'>, {'Chile (rural)': [0.5, 0.5]})",
     "['Yes', 'Maybe']", "WVS"],
    ["", "defaultdict(<class 'list'>, {'Chile (rural)': [0.5, 0.5]})", "['Yes', 'No']", "WVS"],
    ["Third", "defaultdict(<class 'list'>, {'Chile (rural)': [0.9, 0.1]})", "['Yes', 'No']", "WVS"],
]
SURVEY_MAP = {"Yes": 4, "No": 2, "Don't know": 0, "A bit": 2, "Not too much": 2, "A lot": 5}


@pytest.fixture
def table(tmp_path):
    """Flags of `synth.py opinions` for a small survey table."""
    with open(tmp_path / "t.csv", "w", newline="") as f:
        csv.writer(f).writerows([["question", "selections", "options", "source"], *SURVEY])
    (tmp_path / "map.json").write_text(json.dumps(SURVEY_MAP))
    return ["--csv", tmp_path / "t.csv", "--map", tmp_path / "map.json",
            "--country", "Chile (rural)", "--holdout_questions", 1, "--paraphrases", 40,
            "--noise", 0.15]
