"""Measure what a run costs; each command takes --shape, the first two also --task and --loss:

    python tests/bench.py                # operations of a step over the floor, GPT-2's shape
    python tests/bench.py speed          # whole steps: seconds, tokens/s, utilisation, peak memory
    python tests/bench.py memory         # what a run needs, computed, at each --micro_batch
    python tests/bench.py sampling       # answers/s of model.generate

torch's FlopCounterMode counts operations. The floor is the least that the method needs: forward and
backward over distinct tokens (a pair shares its prompt and belief), no padding, logits only where
a loss reads them, and the reference's log-probs already known:
    sum over tokens of 3 x (2 x weights of the layers + 4 x C x layers x tokens it attends to)
    + 3 x 2 x C x V x positions that are scored   (KTO: plus its mismatched pairs, forward only).
"""
import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from data import BRANCHES, Item, collate, cost, epoch_batches, mismatch, run  # noqa: E402
from losses import CHUNK, LOSSES, score  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

neox = dict(vocab_size=50304, n_ctx=2048, rotary=0.25, parallel=True, tanh_gelu=False, tied=False,
            by_head=True)
SHAPES = {
    "gpt2": GPTConfig(),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280, n_inner=5120),
    "pythia-2.8b": GPTConfig(n_layer=32, n_head=32, n_embd=2560, n_inner=10240, **neox),
    "small": GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_embd=256, n_inner=1024)}
TASKS = {"opinions": (26, 7, 56), "reviews": (90, 1, 170)}   # mean tokens: prompt, belief, response
METHODS = ("sft", "dpo", "gdpo", "kto", "gdpo-kto")
CLASSES = list(range(15, 21))
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bfloat16") if CUDA else ("cpu", "float32")


def some_items(task, n, vocab, seed=0):
    """Rows of random tokens; a piece has 0.5 to 1.5 times the task's mean length."""
    rng = np.random.default_rng(seed)
    draw = lambda mean: rng.integers(vocab // 2, vocab, max(1, int(mean * rng.uniform(0.5, 1.5))))
    prompt, belief, response = TASKS[task]
    items = []
    for row in range(n):
        beliefs, responses = (tuple(draw(m).tolist() for _ in range(2)) for m in (belief, response))
        items.append(Item(row, draw(prompt).tolist(), beliefs, responses, belief > 1, [1 / 6] * 6,
                          0, 1, 2, "other", "", ""))
    mismatch(items, 1024, 0)
    return items


def batches_of(o, cfg, task, name):
    """16 batches of o.rows items, as train.loop makes them."""
    items = some_items(task, 16 * o.rows, cfg.vocab_size)
    costs = [cost(i, LOSSES[name].branches) for i in items]
    return [[items[i] for i in index] for index in epoch_batches(costs, o.rows, 0, 0)]


def forward_floor(items, branches, cfg):
    """Operations of a forward pass that computes each token once per distinct prefix."""
    weights = cfg.n_layer * (4 * cfg.n_embd ** 2 + 2 * cfg.n_embd * cfg.n_inner)
    tokens = attended = 0
    for i in items:
        pairs = [BRANCHES[b] for b in branches]
        whole = [tuple(i.prompt + i.beliefs[b] + i.responses[r]) for b, r in pairs]
        pasts = {ids[:t + 1] for ids in whole for t in range(len(ids))}
        tokens += len(pasts)
        attended += sum(map(len, pasts))
    scored = len(collate(items, branches, CLASSES)["at"])
    return 2 * (weights * tokens + cfg.n_embd * (2 * cfg.n_layer * attended
                                                 + cfg.vocab_size * scored))


def floor(items, loss, cfg):
    """The fewest operations that a step can take, by the formula above."""
    between = forward_floor(items, ("mismatch",), cfg) if loss.mismatch else 0
    return 3 * forward_floor(items, loss.branches, cfg) + between


def our_step(model, items, name):
    """Forward and backward as train.train_step runs them."""
    loss, o = LOSSES[name], train.resolve(train.Config(loss=name, device="cpu"))

    def scores(branches):
        batch = train.to_tensors(collate(items, branches, CLASSES), model.head.device)
        return score(model, model.head, batch)

    def step():
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            z0 = scores(("mismatch",)).logps[:, 0].mean(0) if loss.mismatch else None
        s = scores(loss.branches)
        s.ref, s.mismatch = torch.zeros_like(s.logps), z0
        loss.objective(s, o)[0].mean().backward()
    return step


def count(steps):
    """Operations of some steps on the meta device, which has no autocast. Attention runs in its
    mathematical form, because the counter counts all of it."""
    no_autocast = mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with no_autocast, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in steps:
            step()
    return counter.get_total_flops()


def seconds(step):
    """Processor time on a CPU, wall time on a GPU, in the precision that a run uses there."""
    clock = time.perf_counter if CUDA else time.process_time
    start = clock()
    with train.autocast(DEVICE, DTYPE):
        step()
    if CUDA:                                           # kernels run asynchronously
        torch.cuda.synchronize()
    return clock() - start


def matmul_peak():
    """Operations per second of a large matrix product, in the precision of a run."""
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=getattr(torch, DTYPE)) for _ in range(2))
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(20))


def operations(o, cfg, task, name):
    """Operations of our steps, and their ratio to the floor."""
    batches = batches_of(o, cfg, task, name)
    with torch.device("meta"):
        model = GPT(cfg)
    least = sum(floor(b, LOSSES[name], cfg) for b in batches)
    spent = count(our_step(model, b, name) for b in batches)
    return f"{spent / 16e12:6.3f} TFLOP per step, {spent / least:5.2f} of the floor"


def speed(o, cfg, task, name):
    """Ten whole training steps (train.train_step), rows to updated weights, after six warm-ups."""
    import resource                                    # not at the top: Windows lacks it
    batches, loss, model = batches_of(o, cfg, task, name), LOSSES[name], GPT(cfg).init_weights(0)
    items = [i for b in batches for i in b]
    t = train.resolve(train.Config(loss=name, device=DEVICE, micro_batch=o.micro_batch, lr=1e-6,
                                   optimizer="rmsprop"))
    model.to(DEVICE).checkpointing = o.checkpointing
    r = SimpleNamespace(
        o=t, loss=loss, model=model, optimizer=train.optimizer_of(t, model), classes=CLASSES,
        policy=torch.compile(model, dynamic=True) if o.compile else model, items={"train": items},
        ref={"train": torch.zeros(len(items), len(loss.branches) + 1, 3)})
    steps = [lambda n=n: train.train_step(r, range(n, n + o.rows))
             for n in range(0, len(items), o.rows)]
    for step in steps[:6]:
        step()
    peak, spent = matmul_peak(), sum(map(seconds, steps[6:]))
    work = sum(floor(b, loss, cfg) for b in batches[6:])
    tokens = sum(cost(i, loss.branches) for b in batches[6:] for i in b)
    held = (torch.cuda.max_memory_allocated() if CUDA else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (f"{spent / 10:.3f} s per step, {tokens / spent:,.0f} tokens/s (shared prompts once), "
            f"{work / spent / peak:.0%} of the {peak / 1e12:,.3g} TFLOP/s of a large {DTYPE} "
            f"product, peak memory {held / 1e9:.2f} GB")


def memory(cfg, tokens, checkpointing):
    """Bytes that a step holds at its peak, by purpose, for micro-batches of `tokens` tokens, with
    RMSprop and bfloat16 autocast. An upper bound: shared prefixes count twice. GPT-2 and Pythia."""
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(cfg).parameters())
    # Kept for backward, per token of a layer: the float32 inputs of its LayerNorms (one where
    # attention and MLP share it) and, in bfloat16, their outputs, q, k, v, the attention's
    # output by sequence and packed (rotary: q, k and that output twice), and the MLP's hidden
    # layer before and after its GELU.
    layer = (4 if cfg.parallel else 8) * cfg.n_embd + 2 * (
        (9 if cfg.rotary else 7) * cfg.n_embd + 2 * cfg.n_inner)
    last = 4 * cfg.n_embd
    kept = last + (layer + (cfg.n_layer - 1) * last if checkpointing else layer * cfg.n_layer)
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * n, "bf16 copies": 2 * n,
            "activations": tokens * kept, "logits": min(tokens, CHUNK) * cfg.vocab_size * 16,
            "or update": 4 * n}


def memory_table(o, cfg):
    print(f"{o.shape}: GB per process at its peak, rows of 2 x 512 tokens, bfloat16 autocast, "
          f"RMSprop, {'with' if o.checkpointing else 'without'} --checkpointing\n\n--micro_batch"
          + "".join(f"{k:>12}" for k in memory(cfg, 0, False)) + f"{'peak':>8}  fits on")
    for n in (1, 2, 4, 8, 16, 32):
        need = [x / 1e9 for x in memory(cfg, n * 1024, o.checkpointing).values()]
        *fixed, copies, activations, logits, update = need
        peak = sum(fixed) + max(copies + activations + logits, update)
        print(f"{n:13}" + "".join(f"{x:12.2f}" for x in need) + f"{peak:8.2f}  "
              + " ".join(str(card) for card in (24, 48, 80, 141) if peak < 0.94 * card))


def sampling(o, cfg):
    """Sample eight answers of 64 tokens to each prompt of the opinion task."""
    prompts = [i.prompt for i in some_items("opinions", 1843 if CUDA else 16, cfg.vocab_size)]
    jobs, n = [p for p in sorted(prompts, key=len) for _ in range(8)], 64
    model = GPT(cfg).init_weights(0).to(DEVICE)
    room = torch.cuda.mem_get_info()[0] / 2 if CUDA else 4e9       # as evaluate.sample_rows
    size = max(1, min(512, int(room / (8 * cfg.n_layer * cfg.n_embd * (len(jobs[-1]) + n)))))
    spent = min(seconds(lambda: [model.generate(jobs[i:i + size], n)
                                 for i in range(0, len(jobs), size)]) for _ in range(3))
    print(f"{o.shape}: {len(prompts)} prompts x 8 answers of {n} tokens, {size} at once: "
          f"{len(jobs) / spent:.2f} answers/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="operations",
                        choices=["operations", "speed", "memory", "sampling"])
    parser.add_argument("--shape", default="gpt2", choices=SHAPES)
    parser.add_argument("--task", choices=TASKS, help="default: all")
    parser.add_argument("--loss", choices=METHODS, help="default: all")
    parser.add_argument("--rows", type=int, default=8, help="pairs per step")
    parser.add_argument("--micro_batch", type=int, default=0, help="speed: pairs per forward pass")
    parser.add_argument("--checkpointing", action="store_true", help="as in train.py")
    parser.add_argument("--compile", action="store_true", help="as in train.py")
    o = parser.parse_args()
    cfg = SHAPES[o.shape]
    if o.what in ("memory", "sampling"):
        return {"memory": memory_table, "sampling": sampling}[o.what](o, cfg)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{o.shape}, {o.rows} pairs per step, {device}, torch {torch.__version__}")
    measure = operations if o.what == "operations" else speed
    for task in [o.task] if o.task else TASKS:
        for name in [o.loss] if o.loss else METHODS:
            print(f"{task:9} {name:9}{measure(o, cfg, task, name)}", flush=True)


if __name__ == "__main__":
    run(main)
