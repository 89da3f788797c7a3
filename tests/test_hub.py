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
    the storage. .faults {file: what to do wrong, once each}; .log the GETs at the storage, .starts
    where those of the weights began."""
    hub = SimpleNamespace(files=dict(FILES), faults={}, log=[], starts=[], commit="c0ffee")

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
        start = int(r.headers.get("Range", "bytes=0-")[6:-1])
        hub.log.append((file, r.headers.get("Authorization")))
        hub.starts += [start] * (file == "model.safetensors")
        fault = hub.faults.get(file) and hub.faults[file].pop(0)
        start = 0 if fault == "no ranges" else start
        whole = ("Content-Length", len(text) - start)
        if fault == "cut":
            return 206 if start else 200, text[start:start + (len(text) - start) // 2], whole
        text = "?" + text[1:] if fault == "lie" else text
        return (500, "oops") if fault == "500" else (206 if start else 200, text[start:], whole)
    server.answer = answer
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "PAUSE", 0.001)
    return hub


def fetched():
    folder = find_checkpoint("org/tiny")
    assert {p.name: p.read_text() for p in folder.iterdir()} == FILES
    return folder


@pytest.mark.parametrize("where", ["HF_TOKEN", "file"])
def test_a_checkpoint_comes_once_with_the_token_and_then_from_the_cache(hub, server, tmp_path,
                                                                        monkeypatch, where):
    if where == "file":                                    # what `hf auth login` writes
        data.write(tmp_path / "cache/token", "secret\n")
    else:
        monkeypatch.setenv("HF_TOKEN", " secret\n")        # as mounted secrets are
    folder = fetched()
    assert folder == tmp_path / "cache/hub/models--org--tiny/snapshots/c0ffee"
    assert sorted(f for f, _ in hub.log) == sorted(FILES)
    assert {key for _, key in hub.log} == {"Bearer secret"}
    sent = len(server.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint("org/tiny") == folder and len(server.requests) == sent
    assert not any("secret" in p.read_text() for p in (tmp_path / "cache/hub").rglob("*")
                   if p.is_file())


@pytest.mark.parametrize("faults", [["cut"], ["500"], ["cut", "no ranges"], ["cut", "500", "cut"]])
def test_a_download_goes_on_where_it_broke_off(hub, faults):
    hub.faults = {"model.safetensors": list(faults)}
    fetched()
    assert hub.starts[0] == 0 and (hub.starts[-1] > 0) == ("cut" in faults)


def test_a_server_that_always_cuts_ends_in_one_line_and_keeps_what_came(hub):
    hub.faults = {"model.safetensors": ["cut"] * data.TRIES}
    with pytest.raises(ConnectionError, match="what came is kept, run the command again"):
        fetched()
    hub.commit = "beef"                                    # the hub has moved on in between
    assert fetched().name == "c0ffee" and hub.starts[-1] > 0


def test_a_file_that_is_not_what_was_announced_is_thrown_away(hub, tmp_path):
    hub.faults = {"model.safetensors": ["lie"]}
    with pytest.raises(ValueError, match="not the file that the hub announced"):
        fetched()
    assert not list(tmp_path.rglob("*.incomplete")) and fetched()


def test_processes_that_fetch_the_same_file_do_not_disturb_each_other(hub):
    code = "import data; print(data.find_checkpoint('org/tiny'))"
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE) for _ in range(3)]
    folders = {p.communicate(timeout=60)[0].strip() for p in several}
    assert [p.returncode for p in several] == [0, 0, 0] and folders == {str(fetched())}


def test_shards_come_with_their_index(hub):
    del hub.files["model.safetensors"]
    names = ["model-1.safetensors", "model-2.safetensors"]
    index = json.dumps({"weight_map": dict(zip("ab", names))})
    hub.files |= {"model.safetensors.index.json": index} | dict.fromkeys(names, WEIGHTS)
    assert {p.name for p in find_checkpoint("org/tiny").iterdir()} == set(hub.files)


def test_a_file_of_a_dataset_is_fetched_by_its_path(hub):
    hub.files["table.csv"] = "a,b"
    assert hub_file("datasets/org/set", "data/table.csv").read_text() == "a,b"
    with pytest.raises(FileNotFoundError, match="on the hub has no none.csv"):
        hub_file("datasets/org/set", "none.csv")


@pytest.mark.parametrize("name", ["./x", "../x", "a/b/c", "a\\b", "", "here/x", "/x"])
def test_what_looks_like_a_folder_is_not_asked_of_the_hub(hub, server, tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_checkpoint(name)
    assert not server.requests


@pytest.mark.parametrize("answer, env, error, words", [
    ((404, ""), {}, FileNotFoundError, "org/x on the hub has no .*config.json"),
    ((401, ""), {}, ValueError, "401.*it wants an HF_TOKEN"),
    ((200, "a page"), {}, ValueError, "is HF_ENDPOINT right"),
    (None, {"HF_ENDPOINT": "http://127.0.0.1:9"}, ConnectionError, "is the address right.*4 times"),
    (None, {"HF_HUB_OFFLINE": "1"}, FileNotFoundError, "HF_HUB_OFFLINE is set")], ids=str)
def test_what_cannot_be_had_is_one_line(hub, server, monkeypatch, answer, env, error, words):
    server.answer = lambda r: answer
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words):
        find_checkpoint("org/x")
