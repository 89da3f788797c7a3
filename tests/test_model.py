"""python -m pytest tests/test_model.py"""
import json
import struct

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden

from model import GPT, GPTConfig, load_model, pick, read_safetensors, save_model

CLOSE = dict(rtol=0, atol=1e-4)
TINY = dict(vocab_size=61, n_ctx=48, n_layer=2, n_head=4, n_embd=32, n_inner=64)
SHAPES = {
    "gpt2": GPTConfig(**TINY),
    "pythia": GPTConfig(**TINY, rotary=0.25, parallel=True, tanh_gelu=False, tied=False),
    "neox, sequential, full rotary": GPTConfig(**TINY, rotary=1.0, tanh_gelu=False, tied=False),
}


def random_model(cfg, seed=0):
    model = GPT(cfg)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():                     # biases and norms too: nothing may hide
            p.copy_(0.3 * torch.randn(p.shape, generator=g) + (p.dim() == 1))
    return model


def logits(model, ids):
    return F.linear(model(ids), model.head)


@pytest.mark.parametrize("case", golden("models"), ids=lambda c: c["name"])
def test_logits_and_greedy_continuations_agree_with_golden_checkpoints(case):
    model = load_model(GOLDEN / case["name"])
    out = logits(model, torch.tensor(case["input_ids"]))[:, -1]
    torch.testing.assert_close(out.squeeze(), torch.tensor(case["logits_last"]).squeeze(),
                               rtol=1e-4, atol=1e-4)
    if case["greedy"]:                                   # ragged prompts in one batch
        prompts = [g["prompt_ids"] for g in case["greedy"]]
        assert model.generate(prompts, 14, 0.0, 127) == [g["new_ids"] for g in case["greedy"]]
        other = case["other"]
        assert model.generate([other["prompt_ids"]], 14, 0.0, other["stop_id"]) == [
            other["new_ids"]]


@pytest.mark.parametrize("name", SHAPES)
def test_a_saved_model_gives_the_same_logits_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(SHAPES[name])
    save_model(model, tmp_path, eos=60)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(61, (3, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), theirs(ids).logits, **CLOSE)


def test_the_exact_gelu_on_gpt2_weights_fails_parity():
    """The check above would catch the best known slip: nanoGPT's exact GELU in GPT-2."""
    model = random_model(SHAPES["gpt2"])
    ids = torch.arange(40)[None]
    right = logits(model, ids)
    for block in model.h:
        block.mlp.approximate = "none"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits(model, ids), right, **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
def test_save_and_load_give_back_every_weight(name, tmp_path):
    model = random_model(SHAPES[name])
    save_model(model, tmp_path, eos=60)
    again = load_model(tmp_path)
    assert again.cfg == model.cfg
    for (n, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), n
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_does_not_depend_on_what_it_is_padded_or_batched_with(name):
    model = random_model(SHAPES[name])
    row = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(2))
    batch = torch.randint(61, (4, 35), generator=torch.Generator().manual_seed(3))
    batch[2, :20] = row
    torch.testing.assert_close(model(batch)[2, :20], model(row)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_sampling_under_the_cache_is_sampling_without_it(name):
    """Ragged prompts in one batch, token by token, against whole forward passes row by row."""
    model, g = random_model(SHAPES[name]), torch.Generator().manual_seed(4)
    prompts = [torch.randint(61, (n,), generator=g).tolist() for n in (3, 17, 9)]
    new = model.generate(prompts, 12, 1.0, stop_id=None, seed=[(5, i) for i in range(3)])
    for i, (prompt, out) in enumerate(zip(prompts, new)):
        import numpy as np
        draws = torch.from_numpy(np.random.default_rng((5, i)).random(12))
        ids = list(prompt)
        for t in range(12):
            ids.append(pick(logits(model, torch.tensor([ids]))[:, -1], 1.0, draws[t:t + 1]).item())
        assert out == ids[len(prompt):]


def test_equal_prompts_are_computed_once_and_finished_rows_leave_the_batch(monkeypatch):
    model, sizes, forward = random_model(SHAPES["gpt2"]), [], GPT.forward

    def count(self, ids, *args, **kwargs):
        sizes.append(len(ids))
        return forward(self, ids, *args, **kwargs)
    monkeypatch.setattr(GPT, "forward", count)
    prompts = [[1, 2, 3]] * 6 + [[4, 5]] * 2
    alone = [model.generate([p], 44, 3.0, 12, [(0, n)])[0] for n, p in enumerate(prompts)]
    sizes.clear()
    together = model.generate(prompts, 44, 3.0, 12, [(0, n) for n in range(8)])
    assert together == alone and sizes[0] == 2 and sizes[1] == 8 and sizes[-1] <= 4
    alive = [sum(len(row) > t for row in together) for t in range(1, len(sizes))]
    assert all(a <= size <= max(2 * a, 1) for a, size in zip(alive, sizes[1:]))


def test_a_row_samples_the_same_alone_and_in_any_batch():
    model = random_model(SHAPES["gpt2"])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = model.generate(prompts, 10, 1.0, 60, seed=7)
    assert [model.generate([p], 10, 1.0, 60, seed=[(7, i)])[0]
            for i, p in enumerate(prompts)] == together
    assert model.generate(prompts, 10, 1.0, 60, seed=8) != together


def test_samples_follow_the_distribution():
    p = torch.tensor([[0.5, 0.0, 0.2, 0.3]])
    draws = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = pick(p.log().expand(20000, 4), 1.0, draws)
    shares = torch.bincount(ids, minlength=4) / 20000
    torch.testing.assert_close(shares[None], p, rtol=0, atol=0.015)
    assert shares[1] == 0


def test_generation_stops_at_the_stop_token_and_at_the_context():
    model = random_model(SHAPES["gpt2"])
    [out] = model.generate([[1] * 40], 100, 1.0, stop_id=None)
    assert len(out) == 8                                 # 48 positions in all
    [out] = model.generate([[1, 2]], 40, 1.0, stop_id=9, seed=3)
    assert 9 not in out[:-1]
    with pytest.raises(ValueError, match="shorten the prompt"):
        model.generate([[1] * 48], 1)
    with pytest.raises(ValueError, match="1 to 47 tokens"):
        model.generate([[]], 1)
    assert model.generate([], 1) == []


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="49 tokens do not fit the model's context of 48"):
        random_model(SHAPES["gpt2"])(torch.zeros(1, 49, dtype=torch.long))


@pytest.mark.parametrize("damage, message", [
    (lambda h: h["transformer.ln_f.bias"].update(shape=[31]), "bad dtype, shape or offset"),
    (lambda h: h["transformer.ln_f.bias"].update(shape=[-32, -1]), "bad dtype, shape or offset"),
    (lambda h: h["transformer.ln_f.bias"].update(dtype="F8"), "dtype that is unknown here"),
    (lambda h: h["transformer.ln_f.bias"].update(data_offsets=[10**9, 10**9 + 128]),
     "bad dtype, shape"),
    (lambda h: h["transformer.ln_f.bias"].update(data_offsets=[0, 128]),     # overlap
     "bad dtype, shape"),
    (lambda h: h["transformer.ln_f.bias"].update(data_offsets=[0.5]), "header is broken"),
    (lambda h: h["transformer.ln_f.bias"].pop("shape"), "header is broken"),
    (lambda h: h.popitem(), "its header speaks of"),
    (lambda h: h.update(x=3), "header is broken"),
    (lambda h: h.update({"transformer.h.7.foo": h.pop("transformer.ln_f.bias")}),
     "has no tensor ln_f.bias"),
])
def test_a_header_that_lies_is_refused(tmp_path, damage, message):
    save_model(random_model(SHAPES["gpt2"]), tmp_path, eos=60)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + n])
    damage(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n:])
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"{}")
    with pytest.raises(ValueError, match="cut short"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    ({"scale_attn_weights": False}, "'scale_attn_weights': False} is not implemented"),
    ({"scale_attn_by_inverse_layer_idx": True}, "is not implemented here"),
    ({"activation_function": "relu"}, "'relu'} is not implemented here"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "is not implemented here"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "is not implemented here"),
    ({"n_head": 0}, "n_head cannot be 0"), ({"n_head": "4"}, "n_head cannot be '4'"),
    ({"n_head": 5}, "does not divide into 5 heads"), ({"vocab_size": None}, "vocab_size cannot be"),
    ({"n_embd": None}, "n_embd cannot be None"), ({"layer_norm_epsilon": "1e-5"}, "eps '1e-5'"),
])
def test_a_config_that_would_give_other_logits_is_refused(tmp_path, change, message):
    save_model(random_model(SHAPES["gpt2"]), tmp_path, eos=60)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON dict"):
        load_model(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update({"lm_head.weight": torch.ones(61, 32)}), "differs from them"),
    (lambda s: s.update({"wte.weight": s["transformer.wte.weight"].clone()}), "stand twice"),
    (lambda s: s.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int64)}),
     "ln_f.bias is torch.int64"),
    (lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 3, 4)}),
     "of shape \\(2, 3, 4\\), not numbers"),
])
def test_tensors_that_are_not_the_models_are_refused(tmp_path, change, message):
    torch_files = pytest.importorskip("safetensors.torch")
    save_model(random_model(SHAPES["gpt2"]), tmp_path, eos=60)
    state = torch_files.load_file(tmp_path / "model.safetensors")
    change(state)
    torch_files.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
