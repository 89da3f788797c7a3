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
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", README, re.S)
                 if "PREFS[" in code]
    source = (folder / "losses.py").read_text()
    mark = "# " + "-" * 93 + "\n# Methods\n"
    assert source.count(mark) == 1 and len(snippet.splitlines()) <= 10
    (folder / "losses.py").write_text(source.replace(mark, snippet + "\n\n" + mark))
    return folder


@pytest.mark.parametrize("flags, out, branch", [
    (["--loss", "hinge"], "hinge", "own"), (["--pref", "hinge"], "gdpo-hinge", "given")])
def test_the_new_loss_of_the_readme_trains_alone_and_inside_gdpo(fork, world, flags, out, branch):
    p = subprocess.run([sys.executable, "train.py", *flags, "--data", str(world), "--epochs", "1",
                        *map(str, SMALL)], cwd=fork, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    log = (fork / f"out/{world.name}-{out}-seed0/metrics.jsonl").read_text().splitlines()
    first = next(json.loads(x)["eval"] for x in log if "eval" in x)
    assert first["pref"] == pytest.approx(1)                # a margin of 0 at the reference
    assert ("kl" in first) == (branch == "given")


def test_every_flag_and_command_that_the_readme_names_is_there():
    """A --flag in a code block or in `code` belongs to one of the three scripts, or to others."""
    known = set("--nproc_per_node --help --no-deps --nnodes --rdzv_backend --rdzv_endpoint".split())
    for script in ("train.py", "evaluate.py", "synth.py"):
        known |= set(re.findall(r"^    (\w+): .*?  #", (ROOT / script).read_text(), re.M))
    named = set(re.findall(r"(--[a-z][a-z_-]*)", "".join(re.findall(r"```\n.*?```|`[^`]+`", README,
                                                             re.S))))
    assert {f for f in named if f[2:] not in known and f not in known} == set()
