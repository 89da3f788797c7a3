"""Checkpoints in, from folders and from the hub, and out.
python -m pytest tests/test_checkpoints.py"""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, cli, real_data

import data
import evaluate
import train
from data import Tokenizer, find_checkpoint, train_bpe
from model import GPT, GPTConfig, load_model, save_model
from train import memory
from test_model import SHAPES, random_model

IDS = torch.arange(40)[None] % 61


def logits(model, ids=IDS):
    with torch.no_grad():
        return F.linear(model(ids), model.head)


def state_of(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------
# Forms of weights

def as_bin(folder, zipped=True, buffers=True):
    state = {k.removeprefix("transformer."): v for k, v in state_of(folder).items()}
    if buffers:                                          # what old checkpoints carry
        state["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
        state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()


def as_shards(folder):
    from safetensors.torch import save_file
    state, where = state_of(folder), {}
    for n, name in enumerate(sorted(state)):
        where[name] = f"model-{n % 3}.safetensors"
    for shard in set(where.values()):
        save_file({k: state[k] for k in where if where[k] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("form", [as_bin, lambda f: as_bin(f, zipped=False), as_shards],
                         ids=["zipped bin", "legacy bin", "shards"])
def test_every_form_of_weights_gives_the_same_model(tmp_path, form):
    pytest.importorskip("safetensors")
    model = random_model(SHAPES["gpt2"])
    save_model(model, tmp_path, eos=60)
    form(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_half_precision_weights_are_read_as_float32_and_written_on_request(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = random_model(SHAPES[name])
    save_model(model, tmp_path, eos=60, dtype=torch.bfloat16)
    again = load_model(tmp_path)
    for p, q in zip(model.parameters(), again.parameters()):
        assert q.dtype == torch.float32 and torch.equal(p.to(torch.bfloat16).float(), q)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    theirs.half().save_pretrained(tmp_path / "half")     # as the hub's Pythia
    assert all(torch.equal(p.half().float(), q) for p, q in zip(
        again.parameters(), load_model(tmp_path / "half").parameters()))


def test_old_and_new_keys_of_pythias_config_mean_the_same(tmp_path):
    model = random_model(SHAPES["pythia"])
    save_model(model, tmp_path, eos=60)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"partial_rotary_factor": config.pop("rotary_pct"),
                                 "rope_theta": config.pop("rotary_emb_base"),
                                 "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).cfg == model.cfg


@pytest.mark.parametrize("shard", ["../model-0.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, shard):
    pytest.importorskip("safetensors")
    folder = tmp_path / "m"
    save_model(random_model(SHAPES["gpt2"]), folder, eos=60)
    as_shards(folder)
    shutil.copy(folder / "model-0.safetensors", tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0.safetensors", shard))
    with pytest.raises(ValueError, match="is not a file of this folder"):
        load_model(folder)


def test_an_index_that_names_tensors_no_shard_holds_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    save_model(random_model(SHAPES["gpt2"]), tmp_path, eos=60)
    as_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("{", '{"x": 0, ', 1).replace(
        '"transformer.wte.weight"', '"transformer.other.weight"'))
    with pytest.raises(ValueError, match="no shard holds"):
        load_model(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/gdpo-test-was-here",)


def test_a_bin_file_that_wants_to_run_code_is_refused(tmp_path):
    save_model(random_model(SHAPES["gpt2"]), tmp_path, eos=60)
    (tmp_path / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save({"wte.weight": Evil()}, tmp_path / "pytorch_model.bin",
                   _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="not a file of weights alone"):
            load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a file of weights alone"):
        load_model(tmp_path)
    assert not Path("/tmp/gdpo-test-was-here").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_loading_holds_the_weights_once(tmp_path):
    """Peak memory above the start: the weights and little more than the largest tensor."""
    cfg = GPTConfig(vocab_size=20000, n_ctx=64, n_layer=8, n_head=4, n_embd=512, n_inner=2048)
    model = GPT(cfg).init_weights(0)
    size = sum(4 * p.numel() for p in model.parameters())            # 142 MB
    save_model(model, tmp_path, eos=0)
    save_model(random_model(SHAPES["gpt2"]), tmp_path / "small", eos=0)
    code = """if True:
        import re, sys, model
        model.load_model(sys.argv[1] + "/small")         # torch imports half of itself at first use
        open("/proc/self/clear_refs", "w").write("5")    # forget the peak of the imports
        kB = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        before = kB("VmRSS")
        m = model.load_model(sys.argv[1])
        print((kB("VmHWM") - before) * 1024)"""
    out = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True,
                         capture_output=True)
    assert 0.9 * size < int(out.stdout) < size + 4 * 20000 * 512 + 30e6, out.stdout + out.stderr


@pytest.mark.skipif(not (SHARED.parent / "golden/models").is_dir(),
                    reason="no golden checkpoints beside")
def test_all_golden_checkpoints_load_and_agree():
    expected = json.loads((SHARED.parent / "golden/models/expected.json").read_text())
    cases = {c["name"]: c for c in expected["cases"]}
    for folder in sorted((SHARED.parent / "golden/models").iterdir()):
        if folder.is_dir():
            case = cases[expected["same_weights"].get(folder.name, folder.name)]
            out = logits(load_model(folder), torch.tensor(case["inputs"]["input_ids"]))
            want = torch.tensor(case["expected"]["logits_f32"]).view(
                out.shape[0], -1, out.shape[-1])
            torch.testing.assert_close(out[:, -want.shape[1]:], want, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Tokenizers, and the folder that others load

WORDS = ["the", "Hello", "  ", " ", "\t", "\n", "   ", " " * 30, "é", "e\u0301", "日本", "🙂",
         "def f(x):", "return", "12345", "3.14", "can't", "'s", "\u00a0", "ﬁ", "<|x|>", ".", "...",
         "!?", "(a > b)>"]


def strings(n):
    rng = random.Random(0)
    for _ in range(n):
        yield "".join(
            rng.choice(WORDS) + rng.choice(["", " "]) if rng.random() < 0.9
            else chr(rng.choice([rng.randint(32, 0x2ff), rng.randint(0x300, 0xd7ff),
                                 rng.randint(0x1f300, 0x1f6ff)]))
            for _ in range(rng.randint(0, 14)))


@real_data
def test_20000_strings_have_the_ids_of_hugging_faces_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copy(SHARED / "gpt_neox/20B_tokenizer.json", tmp_path / "tokenizer.json")
    pythia, theirs = (Tokenizer.load(tmp_path),
                      tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    gpt2 = Tokenizer.load(SHARED / "gpt2")
    gpt2s = tokenizers.ByteLevelBPETokenizer(str(SHARED / "gpt2/encoder.json"),
                                             str(SHARED / "gpt2/vocab.bpe"))
    assert (pythia.n_tokens, pythia.eos, gpt2.n_tokens) == (50277, 0, 50257)
    for text in strings(20000):
        assert pythia.encode(text) == theirs.encode(text).ids, repr(text)
        assert gpt2.encode(text) == gpt2s.encode(text).ids, repr(text)
    import unicodedata
    text = "a   b  é\n" + " " * 40 + "日本🙂"
    assert pythia.decode(pythia.encode(text)) == unicodedata.normalize("NFC", text)


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram"}, "added_tokens": []}))
    with pytest.raises(ValueError, match="tokenizer.json: not a byte-level BPE that is read here: "
                                         "model Unigram"):
        Tokenizer.load(tmp_path)


def mini_tokenizer(family, folder):
    """A small tokenizer in the files of a family."""
    small = train_bpe(["the cat sat on the mat"] * 9 + list(strings(300)), 500)
    small.save(folder)
    if family == "pythia":
        vocab = json.loads((folder / "vocab.json").read_text())
        merges = (folder / "merges.txt").read_text().splitlines()[1:]
        runs = {" " * n: len(vocab) + 6 - n for n in range(2, 7)}
        added = {"<|endoftext|>": vocab.pop("<|endoftext|>")} | runs
        (folder / "tokenizer.json").write_text(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": t.isspace(),
                              "special": not t.isspace()}
                             for i, t in sorted((i, t) for t, i in added.items())],
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "vocab": vocab, "merges": merges}}))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_transformers_loads_what_a_run_writes(family, tmp_path, world, call):
    """A run from a checkpoint of each family: OUT/best gives the same logits and ids there."""
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    tokenizer = mini_tokenizer(family, base)
    cfg = GPTConfig(**vars(SHAPES[family]) | {"vocab_size": 512, "n_ctx": 192})
    save_model(GPT(cfg).init_weights(0), base, tokenizer.eos)
    call(train, "--loss", "sft", "--model", base, "--data", world, "--epochs", 1,
        "--batch_size", 8, "--lr", 1e-3, "--device", "cpu", "--checkpointing", "--out", "out",
        cwd=tmp_path)
    best = tmp_path / "out/best"
    ours, theirs = load_model(best), transformers.AutoModelForCausalLM.from_pretrained(best)
    ids = torch.randint(500, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, ids), theirs(ids).logits, rtol=0, atol=1e-4)
    assert not torch.equal(ours.wte.weight, load_model(base).wte.weight)
    auto, again = transformers.AutoTokenizer.from_pretrained(best), Tokenizer.load(best)
    for text in strings(500):
        assert auto(text)["input_ids"] == again.encode(text) == tokenizer.encode(text), repr(text)
    assert auto.eos_token_id == tokenizer.eos == theirs.config.eos_token_id
    assert {p.name for p in best.iterdir()} <= {
        "config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt",
        "tokenizer_config.json"}
    p = call(evaluate, base, best, "--data", world, "--samples", 1, "--max_new_tokens", 4,
            cwd=tmp_path)
    assert f"{base} " in p.stdout and not (base / "eval.json").exists()


def test_padded_ids_are_never_sampled():
    model = random_model(SHAPES["pythia"])
    new = model.generate([[1, 2]] * 50, 20, 5.0, None, seed=1, n_tokens=7)
    assert {i for row in new for i in row} == set(range(7))


@pytest.mark.parametrize("name", SHAPES)
def test_activation_checkpointing_changes_no_gradient(name):
    grads = []
    for on in (False, True):
        model = random_model(SHAPES[name])
        model.checkpointing = on
        F.linear(model(IDS), model.head).log_softmax(-1)[..., 0].mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
@pytest.mark.parametrize("on", [False, True])
def test_the_dry_run_counts_what_autograd_keeps(name, on):
    """Bytes that the forward pass saves for backward under bf16, weights and their copies apart."""
    cfg = GPTConfig(**vars(SHAPES[name]) | dict(n_embd=128, n_inner=512, n_layer=4, n_ctx=128))
    model, kept = GPT(cfg).init_weights(0), {}
    model.checkpointing = on
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t         # held, so that no address comes twice
        return t

    totals = []
    for N in (2, 6):                                     # the difference: what grows with tokens
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(
                "cpu", torch.bfloat16):
            places = torch.arange(N * 128)               # packed, as in training
            model(torch.zeros_like(places), places.view(N, 128), places)
        totals.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    o = SimpleNamespace(dtype="bfloat16", checkpointing=on, optimizer="rmsprop",
                        shard_optimizer=False)
    per_token = (totals[1] - totals[0]) / (4 * 128)
    claimed = (memory(cfg, o, 1024)["activations"] - memory(cfg, o, 512)["activations"]) / 512
    if on:                                               # backward will hold a whole block as well
        o.checkpointing = False
        claimed -= (memory(cfg, o, 1000)["activations"] / 1000 - 4 * 128) / cfg.n_layer - 4 * 128
    assert per_token == pytest.approx(claimed, rel=0.05)


# ---------------------------------------------------------------------------------------------
# The hub

class Hub:
    """A local server in the hub's form: metadata on the first answer, a redirect to the storage.
    `faults` {file: list of what to do wrong, once each}; `log` the GETs that reached the
    storage."""

    def __init__(self, folder):
        self.files = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.faults, self.log, self.commit, hub = {}, [], "c0ffee", self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                file = self.path.rsplit("/", 1)[1]
                raw = hub.files.get(file)
                if (not self.path.startswith(("/org/tiny/resolve/", "/storage/"))
                        or raw is None):
                    return self.reply(404)
                if not self.path.startswith("/storage/"):
                    revision = self.path.split("/")[4]
                    return self.reply(302, {"Location": f"/storage/{file}", "X-Repo-Commit":
                                            hub.commit if revision == "main" else revision,
                                            "X-Linked-ETag": f'"{hashlib.sha256(raw).hexdigest()}"',
                                            "X-Linked-Size": str(len(raw))})
                fault = hub.faults.get(file) and body and hub.faults[file].pop(0)
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                if body:
                    hub.log.append((file, start, self.headers.get("Authorization")))
                if fault in ("404", "500"):
                    return self.reply(int(fault))
                if fault == "no ranges":
                    start = 0
                if fault == "lie":
                    raw = raw[:-1] + bytes([raw[-1] ^ 1])
                self.reply(206 if start else 200, {"Content-Length": str(len(raw) - start)})
                if body:
                    half = start + (len(raw) - start) // 2
                    self.wfile.write(raw[start:half if fault in ("cut", "stall") else None])
                    self.wfile.flush()
                    if fault == "stall":
                        time.sleep(1.5)

            def reply(self, code, headers=None):
                self.send_response(code)
                for k, v in (headers or {"Content-Length": "0"}).items():
                    self.send_header(k, v)
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "upstream"
    mini_tokenizer("gpt2", folder)
    cfg = GPTConfig(**vars(SHAPES["gpt2"]) | {"vocab_size": 512, "n_ctx": 192})
    save_model(random_model(cfg), folder, eos=499)
    server = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    monkeypatch.setattr(data, "PAUSE", 0.01)
    yield server
    server.server.shutdown()


def same(folder, tmp_path):
    return torch.equal(logits(load_model(folder)), logits(load_model(tmp_path / "upstream")))


def test_a_checkpoint_comes_from_the_hub_once_and_then_from_the_cache(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    folder = find_checkpoint("org/tiny")
    assert (folder == tmp_path / "cache/hub/models--org--tiny/snapshots/c0ffee"
            and same(folder, tmp_path))
    assert sorted(file for file, _, _ in hub.log) == [
        "config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert Tokenizer.load(folder).encode("the cat")
    hub.server.shutdown()                                # offline, with a filled cache
    hub.server.server_close()
    assert find_checkpoint("org/tiny") == folder
    assert "secret" not in "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*")
                                   if p.is_file())


@pytest.mark.parametrize("faults", [["cut"], ["stall"], ["500"], ["cut", "no ranges"],
                                    ["cut", "500", "stall"]])
def test_a_cut_a_stall_or_an_error_is_gone_on_from(hub, tmp_path, faults):
    hub.faults = {"model.safetensors": list(faults)}
    assert same(find_checkpoint("org/tiny"), tmp_path)
    starts = [start for file, start, _ in hub.log if file == "model.safetensors"]
    assert len(starts) == len([f for f in faults if f != "no ranges"]) + 1
    if faults[0] in ("cut", "stall"):
        assert starts[1] > 0                             # by range, not from the beginning
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_file_that_goes_between_two_requests_is_no_file(hub, tmp_path):
    hub.faults = {"config.json": ["404"]}
    with pytest.raises(ValueError, match="gone between two requests"):
        find_checkpoint("org/tiny")
    assert same(find_checkpoint("org/tiny"), tmp_path)


def test_all_files_are_of_one_commit(hub, tmp_path):
    """The hub moves on between two tries: what is missing is fetched from the first commit."""
    hub.faults = {"model.safetensors": ["cut"] * 5}
    with pytest.raises(ConnectionError):
        find_checkpoint("org/tiny")
    hub.commit = "beef"
    folder = find_checkpoint("org/tiny")
    assert folder.name == "c0ffee" and same(folder, tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": {"a": 5}}'])
def test_a_broken_index_from_the_hub_is_one_line(hub, index):
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = index.encode()
    with pytest.raises(ValueError, match="index.json"):
        find_checkpoint("org/tiny")


def test_offline_means_offline(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        find_checkpoint("org/tiny")
    assert hub.log == []


def test_a_file_that_is_not_what_was_announced_is_thrown_away(hub, tmp_path):
    hub.faults = {"model.safetensors": ["lie"]}
    with pytest.raises(ValueError, match="not the file that the hub announced"):
        find_checkpoint("org/tiny")
    assert not list(tmp_path.rglob("*.incomplete"))
    assert same(find_checkpoint("org/tiny"), tmp_path)   # and the next try is clean


def test_a_server_that_always_cuts_ends_in_one_line_and_keeps_what_came(hub, tmp_path):
    hub.faults = {"model.safetensors": ["cut"] * 5}
    with pytest.raises(ConnectionError, match="run the command again"):
        find_checkpoint("org/tiny")
    [part] = tmp_path.rglob("*.incomplete")
    assert 0 < part.stat().st_size < len(hub.files["model.safetensors"])
    assert same(find_checkpoint("org/tiny"), tmp_path)


def test_two_processes_fetch_a_file_once(hub, tmp_path):
    code = "import data; data.find_checkpoint('org/tiny')"
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [p.wait(60) for p in several] == [0, 0, 0]
    assert [file for file, _, _ in hub.log].count("model.safetensors") == 1
    assert same(find_checkpoint("org/tiny"), tmp_path)


def test_sharded_checkpoints_come_with_all_their_shards(hub, tmp_path):
    pytest.importorskip("safetensors")
    as_shards(tmp_path / "upstream")
    hub.files = {p.name: p.read_bytes() for p in (tmp_path / "upstream").iterdir()}
    assert same(find_checkpoint("org/tiny"), tmp_path)
    assert sum(file.startswith("model-") for file, _, _ in hub.log) == 3


def test_in_a_torchrun_job_one_process_fetches_and_the_run_trains(hub, tmp_path, world):
    cli("train.py", "--loss", "sft", "--model", "org/tiny", "--data", world, "--epochs", 1,
        "--out", "out", "--device", "cpu", "--batch_size", 16, cwd=tmp_path, nproc=2,
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "cache"))
    assert [file for file, _, _ in hub.log].count("model.safetensors") == 1
    assert (tmp_path / "out/last/model.safetensors").is_file()


@pytest.mark.parametrize("name, message", [
    ("org/none", "org/none on the hub has no config.json"),
    ("a/b/c", "no folder a/b/c, and that is no name on the hub"),
    ("../x", "no folder ../x, and that is no name on the hub"), ("", "no folder , and that is no"),
])
def test_a_name_that_is_nowhere_is_one_line(hub, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_checkpoint(name)


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(OSError, match="give a local folder, or check the network"):
        find_checkpoint("gpt2")
