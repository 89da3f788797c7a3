"""python -m pytest tests/test_readme.py: what the README says runs."""
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the project with the README's new loss in losses.py, beside the others."""
    folder = tmp_path_factory.mktemp("fork")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "assets", folder / "assets")
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", README, re.S)
                 if "PREFS[" in code]
    source = (folder / "losses.py").read_text()
    mark = "# Every preference term is a method alone"
    assert source.count(mark) == 1 and len(snippet.splitlines()) <= 10
    (folder / "losses.py").write_text(source.replace(mark, snippet + "\n\n" + mark))
    return folder


@pytest.mark.parametrize("flags, out, branch", [
    (["--loss", "hinge"], "hinge", "own"), (["--loss", "gdpo-hinge"], "gdpo-hinge", "given")])
def test_the_new_loss_of_the_readme_trains_alone_and_inside_gdpo(fork, world, flags, out, branch):
    p = subprocess.run([sys.executable, "train.py", *flags, "--data", str(world), "--epochs", "1",
                        *map(str, SMALL)], cwd=fork, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    log = (fork / f"out/{world.name}-{out}-seed0/metrics.jsonl").read_text().splitlines()
    first = next(json.loads(x)["eval"] for x in log if "eval" in x)
    assert first["pref"] == pytest.approx(1)                # a margin of 0 at the reference
    assert ("kl" in first) == (branch == "given")


def test_every_flag_and_command_that_the_readme_names_is_there():
    """A --flag in a code block or in `code` belongs to one of the scripts, or to others."""
    known = set("--nproc_per_node --help --no-deps --shape --to --ask".split())
    for script in ("train.py", "evaluate.py", "synth.py"):
        known |= set(re.findall(r"^    (\w+): .*?  #", (ROOT / script).read_text(), re.M))
    named = set(re.findall(r"(--[a-z][a-z_-]*)", "".join(re.findall(r"```\n.*?```|`[^`]+`", README,
                                                             re.S))))
    assert {f for f in named if f[2:] not in known and f not in known} == set()


def core_and_all(name):
    """Lines of a file above its ruled line (===), and all."""
    lines = (ROOT / name).read_text().splitlines()
    rule = next((n for n, line in enumerate(lines) if line.startswith("# =====")), len(lines))
    return rule, len(lines)


def test_the_readme_counts_the_lines_of_core_and_files_truly():
    row = r"^\| \[(\w+\.py)\]\(\w+\.py\) \| *([\d,]* *\| *[\d,]+) \|"
    counted = dict(re.findall(row, README, re.M))
    assert set(counted) == {f"{x}.py" for x in "model data losses train evaluate synth".split()}
    core = 0
    for name, cell in counted.items():
        above, total = core_and_all(name)
        said_core, said_all = (int(x.strip().replace(",", "") or 0) for x in cell.split("|"))
        assert said_all == total and said_core in (0, above), name
        core += said_core
    assert f"{core:,} lines in this order" in README


OURS = {"model", "data", "losses", "train", "evaluate", "synth"}


@pytest.mark.parametrize("name, may", [
    ("model", set()), ("data", set()), ("losses", set()), ("synth", {"data"}),
    ("train", {"model", "data", "losses", "synth"}),
    ("evaluate", {"model", "data", "losses", "train", "synth"})])
def test_imports_run_one_way(name, may):
    source = (ROOT / f"{name}.py").read_text()
    found = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M)) & OURS
    assert found <= may
    if name == "train":                                # only to make the shipped world
        assert re.findall(r"^.*import synth$", source, re.M) == ["        import synth"]


def test_the_six_files_and_the_readme_stay_small():
    assert all(core_and_all(f"{name}.py")[1] <= 1190 for name in OURS)
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 16384
