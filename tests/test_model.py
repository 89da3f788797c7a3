"""The model against transformers and against itself. python -m pytest tests/test_model.py"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden

from model import GPT, GPTConfig, load_model, pick

TINY = dict(vocab_size=61, n_ctx=48, n_layer=2, n_head=4, n_embd=32, n_inner=64)
NEOX = dict(**TINY, tanh_gelu=False, tied=False, by_head=True)
LLAMA = dict(**TINY, rotary=1.0, rms_norm=True, gated=True, bias=False, qkv_bias=False)
SHAPES = {
    "gpt2": GPTConfig(**TINY),
    "pythia": GPTConfig(**NEOX, rotary=0.25, parallel=True),
    "neox, sequential, full rotary": GPTConfig(**NEOX, rotary=1.0),
    "llama": GPTConfig(**LLAMA, tied=False, eps=1e-6),
    "llama, shared keys, tied": GPTConfig(**LLAMA, n_kv=2, rotary_base=100000.0),
    "llama 3": GPTConfig(**LLAMA, n_kv=1, tied=False, rope_scaling=(8.0, 1.0, 4.0, 16)),
    "qwen2": GPTConfig(**LLAMA | dict(qkv_bias=True), n_kv=2),
}
IDS = torch.randint(61, (3, 48), generator=torch.Generator().manual_seed(1))


def random_model(cfg, seed=0):
    model = GPT(cfg)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():                     # biases and norms too: nothing may hide
            p.copy_(0.3 * torch.randn(p.shape, generator=g) + (p.dim() == 1))
    return model


def logits(model, ids=IDS):
    return F.linear(model(ids), model.head)


@pytest.mark.parametrize("case", golden("models"), ids=lambda c: c["name"])
def test_logits_and_greedy_continuations_agree_with_golden_checkpoints(case):
    model = load_model(GOLDEN / case["name"])
    out = logits(model, torch.tensor(case["input_ids"]))[:, -1]
    torch.testing.assert_close(out.squeeze(), torch.tensor(case["logits_last"]).squeeze(),
                               rtol=1e-4, atol=1e-4)
    if case["greedy"]:                                   # ragged prompts in one batch
        prompts, other = [g["prompt_ids"] for g in case["greedy"]], case["other"]
        assert model.generate(prompts, 14, 0.0, 127) == [g["new_ids"] for g in case["greedy"]]
        new = model.generate([other["prompt_ids"]], 14, 0.0, other["stop_id"])
        assert new == [other["new_ids"]]


@pytest.mark.parametrize("name", SHAPES)
def test_packing_and_activation_checkpointing_change_no_gradient(name):
    """Two sequences that share 4 tokens, and one of 5, as 19 packed tokens."""
    paths = torch.tensor([[*range(10)], [*range(4), *range(10, 14), 0, 0],
                          [*range(14, 19), 0, 0, 0, 0, 0]])
    cells, ids = torch.tensor([*range(10), *range(14, 18), *range(20, 25)]), IDS[0, :19]
    results = []
    for packed, checkpointing in ((False, False), (True, False), (True, True)):
        model = random_model(SHAPES[name])
        model.checkpointing = checkpointing
        h = model(ids, paths, cells) if packed else model(ids[paths]).flatten(0, 1)[cells]
        F.linear(h, model.head).log_softmax(-1)[:, 0].sum().backward()
        results.append([h, *(p.grad for p in model.parameters())])
    for plain, *others in zip(*results):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_sampling_under_the_cache_is_sampling_without_it(name):
    """Ragged prompts in one batch, token by token, against whole forward passes row by row."""
    model = random_model(SHAPES[name])
    prompts = [IDS[0, :3].tolist(), IDS[1, :17].tolist(), IDS[2, :9].tolist()]
    new = model.generate(prompts, 12, 1.0, stop_id=None, seed=[(5, i) for i in range(3)])
    for i, (prompt, out) in enumerate(zip(prompts, new)):
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


def test_samples_follow_the_distribution():
    p = torch.tensor([[0.5, 0.0, 0.2, 0.3]])
    draws = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = pick(p.log().expand(20000, 4), 1.0, draws)
    shares = torch.bincount(ids, minlength=4) / 20000
    torch.testing.assert_close(shares[None], p, rtol=0, atol=0.015)
    assert shares[1] == 0


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_an_offset_of_all_logits_changes_no_sample_under_bfloat16(name):
    """One channel of the hidden states is held at 1: its column of the head is an offset."""
    model = random_model(GPTConfig(**vars(SHAPES[name]) | dict(tied=False)))
    model.requires_grad_(False)
    model.ln_f.weight[0], model.ln_f.bias[0] = 0, 1
    prompts = [row[:n].tolist() for row in IDS for n in (3, 8, 20)] * 9
    new = []
    for offset in (0, -100):
        model.lm_head.weight[:, 0] = offset
        with torch.autocast("cpu", torch.bfloat16):
            new.append(model.generate(prompts, 20, 3.0))
    assert new[0] == new[1] and len({tuple(ids) for ids in new[0]}) == len(prompts)


def test_generation_stops_at_the_stop_token_and_the_context_and_samples_no_padding():
    model = random_model(SHAPES["gpt2"])
    new = model.generate([[1, 2]] * 50, 20, 5.0, None, seed=1, n_tokens=7)
    assert {i for row in new for i in row} == set(range(7))
    [out] = model.generate([[1] * 40], 100, 1.0, stop_id=None)
    assert len(out) == 8                                 # 48 positions in all
    [out] = model.generate([[1, 2]], 40, 1.0, stop_id=9, seed=3)
    assert 9 not in out[:-1] and out != model.generate([[1, 2]], 40, 1.0, stop_id=9, seed=4)[0]
    for prompt in [1] * 48, []:
        with pytest.raises(ValueError, match="1 to 47 tokens .*: shorten the prompt"):
            model.generate([prompt], 1)
    with pytest.raises(ValueError, match="49 tokens do not fit the model's context of 48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    assert model.generate([], 1) == []
