"""Checkpoint folders, read and written. python -m pytest tests/test_checkpoints.py"""
import json
import os
from unittest.mock import Mock

import pytest
import torch
from test_model import IDS, SHAPES, logits, random_model

from model import fingerprint, load_model, save_model


@pytest.fixture
def folder(tmp_path):
    save_model(random_model(SHAPES["gpt2"]), tmp_path / "m", eos=60)
    return tmp_path / "m"


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_saved_here_or_again_by_transformers_loads_in_both(name, dtype, tmp_path):
    """In float32, whatever precision it has on disk (the hub's Pythia: float16)."""
    transformers = pytest.importorskip("transformers")
    model = random_model(SHAPES[name])
    model.to(dtype).float()                              # rounded, as it will be on disk
    save_model(model, tmp_path, eos=60)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == 60 and theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs.eval()(IDS).logits, rtol=0, atol=1e-4)
    theirs.to(dtype).save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        loaded = load_model(folder)
        assert same(loaded, model) and {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert vars(loaded.cfg) | {"n_kv": None} == vars(model.cfg) | {"n_kv": None}
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(random_model(model.cfg, 1))


def change(folder, name="model.safetensors", **tensors):
    """Store the weights again with some changed; None takes one out."""
    st = pytest.importorskip("safetensors.torch")
    state = st.load_file(folder / "model.safetensors") | tensors
    st.save_file({k: v for k, v in state.items() if v is not None}, folder / name)
    return state


def as_first_gpt2(folder):
    """Names without a prefix, and the causal mask beside them."""
    state = change(folder)
    names = {k.removeprefix("transformer."): v.clone() for k, v in state.items()}
    change(folder, **dict.fromkeys(state), **names, **{"h.0.attn.bias": torch.ones(1, 1, 48, 48)})


def as_shards(folder):
    state = change(folder)
    for n in range(3):
        left_out = dict.fromkeys(k for i, k in enumerate(sorted(state)) if i % 3 != n)
        change(folder, f"model-0000{n + 1}-of-00003.safetensors", **left_out)
    (folder / "model.safetensors").unlink()


def with_copied_head(folder):
    change(folder, **{"lm_head.weight": change(folder)["transformer.wte.weight"].clone()})


@pytest.mark.parametrize("form", [as_first_gpt2, as_shards, with_copied_head])
def test_every_form_of_weights_gives_the_same_model(folder, form):
    form(folder)
    assert same(load_model(folder), random_model(SHAPES["gpt2"]))


@pytest.mark.parametrize("name, weights, message", [
    ("h.0.attn.c_attn.weight", torch.ones(2, 3, 4), "(2, 3, 4), but config.json asks for (32, 96)"),
    ("h.0.attn.c_attn.weight", torch.ones(96, 32), "(96, 32), but config.json asks for (32, 96)"),
    ("ln_f.bias", None, "no tensor, but config.json asks for (32,)"),
    ("h.2.ln_1.weight", torch.ones(32), "(32,), but config.json asks for none"),
])
def test_each_tensor_is_used_once_and_a_wrong_one_is_named(folder, name, weights, message):
    change(folder, **{f"transformer.{name}": weights})
    with pytest.raises(ValueError) as e:
        load_model(folder)
    assert str(e.value) == f"{folder}: transformer.{name}: found {message}"


def test_a_missing_shard_or_file_is_named(folder):
    as_shards(folder)
    for pattern, message in (("*2-of-*", "found no tensor"),
                             ("*.safetensors", "no model.safetensors in .*: give a checkpoint"),
                             ("*.json", "config.json.* give the folder of a checkpoint")):
        for path in folder.glob(pattern):
            path.unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            load_model(folder)


def header(**changes):
    """A function: file -> the file with these changes in the header, at one of its tensors."""
    def damage(raw):
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header["transformer.ln_f.bias"] |= changes
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[end:]
    return damage


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: raw[:100], lambda raw: b"", lambda raw: b"\xff" * 20,
    header(shape=[33]), header(dtype="F8"), header(data_offsets=[10**9, 10**9 + 128]),
    header(data_offsets=[-10**9, 128 - 10**9])], ids=range(8))
def test_a_damaged_file_is_one_line_and_nothing_outside_it_is_read(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors: not safetensors, or truncated"):
        load_model(folder)


@pytest.mark.parametrize("name, change, message", [
    ("gpt2", {"model_type": "mistral"}, "model_type 'mistral' is not one of gpt2"),
    ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights': False} is not implemented"),
    ("gpt2", {"activation_function": "relu"}, "'relu'} is not implemented here"),
    ("pythia", {"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'} is not implemented"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'} is not implemented here"),
    ("llama", {"head_dim": 16}, "'head_dim': 16} is not implemented here"),
    ("llama", {"num_key_value_heads": 3}, "n_embd divisible by n_head"),
    ("qwen2", {"use_sliding_window": True}, "'use_sliding_window': True} is not implemented"),
    ("gpt2", {"n_head": 5}, "n_embd divisible by n_head"), ("gpt2", {"n_head": 0}, "config.json"),
])
def test_a_config_that_would_give_other_logits_is_refused(name, change, message, tmp_path):
    save_model(random_model(SHAPES[name]), tmp_path, eos=60)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    for text, words in (json.dumps(config), message), ("[]", "config.json"), ("", "config.json"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_weights_and_no_half_file(folder, error, monkeypatch):
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))
    with pytest.raises(type(error)) as e:
        save_model(random_model(SHAPES["gpt2"], seed=1), folder, eos=60)
    if isinstance(error, OSError):
        assert e.value.filename == str(folder / "config.json") and e.value.errno == 28
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same(load_model(folder), random_model(SHAPES["gpt2"]))
