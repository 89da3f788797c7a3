"""Shared by the tests: paths, golden numbers, a one-character tokenizer, the real command line.

    python -m pytest                 # all, about a minute and a half on two cores
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import run  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"       # from runs of the authors' code and of transformers
SHARED = ROOT.parent / "shared" / "data"  # real files that users do not have; tests skip without
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
    """Run the real command; returns the finished process, its exit code checked."""
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
    """The same as cli, in this process: no start of Python and torch to wait for."""
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
    synth.toy(synth.Toy(out=str(folder), train=4, eval=2, test=2))
    for split, n in (("train", 40), ("eval", 20), ("test", 20)):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:n]))
    return folder


SMALL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--vocab_size", 400, "--batch_size", 8,
         "--eval_every", 16, "--log_every", 1, "--device", "cpu")
