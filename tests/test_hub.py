"""python -m pytest tests/test_hub.py: checkpoints and files from a hub that misbehaves."""
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import data
from data import find_checkpoint, hub_file

WEIGHTS = "".join(chr(33 + i * i % 90) for i in range(200_000))
FILES = {"config.json": "{}", "vocab.json": "{}", "merges.txt": "#", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A server in the hub's form: the first answer names commit, size and sha256 and redirects to
    the storage. .faults: what the storage does wrong with the weights, in turn; .keys of the GETs
    there by file; .starts: where those of the weights began."""
    hub = SimpleNamespace(files=dict(FILES), faults=[], keys={}, starts=[], commit="c0ffee")

    def answer(r):
        file = Path(r.path).name
        text = hub.files.get(file)
        if text is None or not r.path.startswith(("/org/tiny/", "/datasets/org/set/", "/storage/")):
            return 404, ""
        if not r.path.startswith("/storage/"):
            revision = r.path.split("/resolve/")[1].split("/")[0]
            return (302, "", ("Location", f"/storage/{file}"), ("X-Linked-Size", len(text)),
                    ("X-Repo-Commit", hub.commit if revision == "main" else revision),
                    ("X-Linked-ETag", f'"{hashlib.sha256(text.encode()).hexdigest()}"'))
        hub.keys[file] = r.headers.get("Authorization")
        start, fault = int(r.headers.get("Range", "bytes=0-")[6:-1]), ""
        if file == "model.safetensors":
            hub.starts.append(start)
            fault = hub.faults.pop(0) if hub.faults else ""
        start = 0 if fault == "no ranges" else start
        whole = ("Content-Length", len(text) - start)
        text = "?" + text[1:] if fault == "lie" else text
        end = {"cut": (start + len(text)) // 2, "empty": start}.get(fault)
        return 500 if fault == "500" else 206 if start else 200, text[start:end], whole
    server.answer = answer
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))           # of other processes
    monkeypatch.setattr(data, "HF_HOME", tmp_path)
    return hub


def fetched():
    folder = find_checkpoint("org/tiny")
    assert {p.name: p.read_text() for p in folder.iterdir()} == FILES
    return folder


@pytest.mark.parametrize("file, variable", [("token", ""), ("no-token", " secret\n")])
def test_a_checkpoint_comes_with_the_token_once(hub, server, tmp_path, monkeypatch, file, variable):
    data.write(tmp_path / file, "secret\n")                # what `hf auth login` writes
    monkeypatch.setenv("HF_TOKEN", variable)               # with a line break, as mounted secrets
    folder = fetched()
    assert folder == tmp_path / "hub/models--org--tiny/snapshots/c0ffee"
    assert hub.keys == dict.fromkeys(FILES, "Bearer secret") and hub.starts == [0]
    sent = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetched() == folder and len(server.requests) == sent
    assert "secret" not in "".join(p.read_text() for p in folder.parent.parent.rglob("*.*"))


@pytest.mark.parametrize("faults, words, resumed", [
    (["cut"], "", True), (["500"], "", False), (["cut", "no ranges"], "", True),
    (["cut", "500", "cut"], "", True), (["lie"], "its sha256 differs from the hub's", False),
    (["cut", "empty"], "broke off: run the command again to resume it", True)])
def test_a_download_goes_on_where_it_broke_off_or_the_next_run_does(hub, faults, words, resumed):
    hub.faults = list(faults)
    if words:
        with pytest.raises((ValueError, OSError), match=words):
            fetched()
        hub.commit = "beef"                                # the hub has moved on in between
    assert fetched().name == "c0ffee"
    assert hub.starts[0] == 0 and (hub.starts[-1] > 0) == resumed


def test_processes_that_fetch_the_same_file_spoil_nothing(hub):
    code = "import data; data.find_checkpoint('org/tiny')"
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
               for _ in range(3)]
    assert 0 in [p.wait(timeout=60) for p in several] and fetched()


def test_shards_come_with_their_index_and_files_of_datasets_by_their_path(hub):
    names = ["model-1.safetensors", "model-2.safetensors"]
    hub.files = FILES | dict.fromkeys(names, WEIGHTS) | {
        "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", names))}),
        "table.csv": "a,b"}
    del hub.files["model.safetensors"]
    came = {p.name for p in find_checkpoint("org/tiny").iterdir()}
    assert came == {*hub.files} - {"table.csv"}
    assert hub_file("datasets/org/set", "data/table.csv").read_text() == "a,b"


@pytest.mark.parametrize("name, answer, env, words", [
    *[(x, None, {}, "no folder") for x in ("./x", "../x", "a/b/c", "a\\b", "run/x", "/x")],
    ("run", None, {}, "run is a run: give one of its checkpoints, such as run/best"),
    ("org/x", None, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ("org/x", (404, ""), {}, "org/x on the hub has no .*config.json"),
    ("org/x", (401, ""), {}, "401.*it needs an HF_TOKEN"),
    ("org/x", (200, "a page"), {}, "is HF_ENDPOINT right")], ids=str)
def test_what_cannot_be_had_is_one_line_and_what_looks_like_a_folder_is_not_asked_of_the_hub(
        hub, server, tmp_path, monkeypatch, name, answer, env, words):
    data.write(tmp_path / "run/metrics.jsonl", "")
    monkeypatch.chdir(tmp_path)
    server.answer = lambda r: answer
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises((ValueError, OSError), match=words):
        find_checkpoint(name)
    assert bool(server.requests) == bool(answer)
