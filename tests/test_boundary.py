"""python -m pytest tests/test_boundary.py: text files, flags, one-line errors."""
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

from data import Parser, add_flags, progress, read_json, run, write
from losses import LOSSES


@pytest.mark.parametrize("content, problem", [
    *[('{"a": "é"}'.encode(x), "") for x in ("utf-8", "utf-8-sig")],
    *[('{"a": "é"}'.encode(x), "a.json is not UTF-8") for x in ("cp1252", "utf-16", "utf-16-le")],
    *[(x, "a.json is not a JSON object") for x in (b"{", b"[1]", b"5")]])
def test_json_is_utf8_with_or_without_a_mark_and_anything_else_is_one_line(
        tmp_path, content, problem):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=problem) if problem else nullcontext():
        assert read_json(tmp_path / "a.json") == {"a": "é"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new/a.json"
    write(path, '{"é": 1}\n')
    assert read_json(path) == {"é": 1} and [*path.parent.iterdir()] == [path]
    monkeypatch.setattr(Path, "write_bytes", lambda path, text: path.touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, "longer")
    assert read_json(path) == {"é": 1}


@dataclass
class Flags:
    rows: int = 8                # how many; 100% of them
    lr: float | None = None      # peak
    order: Literal["up", "down"] = None  # which way
    name: str = ""               # any
    quick: bool = False          # or slow


def test_flags_are_the_fields_of_a_dataclass():
    parser = Parser()
    add_flags(parser, Flags)
    for args, flags in ([], Flags()), ("--rows 3 --lr 1e-3 --order up --quick".split(),
                                       Flags(3, 1e-3, "up", quick=True)):
        assert Flags(**vars(parser.parse_args(args))) == flags
    for args, words in ["--row 3", "unrecognized"], ["--lr nan", "--lr: nan is not a finite"]:
        with pytest.raises(ValueError, match=f"{words}.*see --help"):
            parser.parse_args(args.split())                # --row: no abbreviations
    told = " ".join(parser.format_help().split())
    assert "how many; 100% of them [8]" in told and "or slow [False]" in told


def test_the_losses_that_the_help_of_train_names_are_there():
    [names] = re.findall("loss: str .*# (.*), [.]{3}", (ROOT / "train.py").read_text())
    assert set(names.split(", ")) <= set(LOSSES)


@pytest.mark.parametrize("error, line", [
    (ValueError("no\nsuch  thing"), "no such thing"), (FloatingPointError("nan"), "nan"),
    (OSError(28, "No space left on device", "log"), "log: No space left on device: "
     "free some space and run again (train.py: with --resume)"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "out of memory: lower --micro_batch, add "
     "--checkpointing, or lower --samples; --resume continues from the last saved state")])
def test_an_error_is_one_line_below_the_bar(monkeypatch, capsys, error, line):
    def main():
        for _ in progress(range(9), desc="bar"):
            raise error
    monkeypatch.setattr(sys, "argv", ["x/train.py"])
    monkeypatch.setenv("RANK", "1")                         # left over from something else
    with pytest.raises(SystemExit) as e:
        run(main)
    assert e.value.code == 2 and capsys.readouterr().err.endswith(f"\ntrain.py: error: {line}\n")


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_under_torchrun_the_first_process_speaks(rank, lines):
    code = "import data\n@data.run\ndef main():\n    raise ValueError('±')"
    p = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": rank, "PYTHONIOENCODING": "ascii"})
    assert p.returncode == 2 and p.stderr.splitlines() == ["-c: error: ?"] * lines


def test_ctrl_c_during_imports_is_no_traceback():
    code = ("import data, time; data.help_first('__main__', None); print(1, flush=True)\n"
            "time.sleep(9)")
    p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    assert p.communicate(timeout=9)[1] == "" and p.returncode == -signal.SIGINT
