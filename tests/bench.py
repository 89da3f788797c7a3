"""What a training step costs, against the floor and against a plain step. By hand, not a test:

    python tests/bench.py                        # GPT-2's shape, both tasks, every loss: operations
    python tests/bench.py --time                 # also processor time and memory, in alternation

Operations are counted by torch's FlopCounterMode. The floor is what the method needs at least:
forward and backward over the tokens that differ, the prompt and belief of a pair once, no padding,
logits only where a loss reads them, the reference's log-probs known:
    sum over tokens of 3 x (2 x weights of the layers + 4 x C x layers x tokens it attends to)
    + 3 x 2 x C x V x positions that are scored   (KTO: and a third of it, forward alone, for z0).
"theirs" is the authors' step written with transformers: three policy forwards (the accepted answer
twice), a resident reference, everything padded to the longest, logits of all positions in float32.
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import Item, collate, cost, epoch_batches, lay_out, mismatch, sequence  # noqa: E402
from losses import LOSSES, score  # noqa: E402
from model import GPT, GPTConfig, config_to_hf  # noqa: E402

SHAPES = {
    "gpt2": GPTConfig(),
    "pythia-160m": GPTConfig(vocab_size=50304, n_ctx=2048, rotary=0.25, parallel=True,
                             tanh_gelu=False, tied=False),
    "small": GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_embd=256, n_inner=1024)}
TASKS = {"opinions": (26, 7, 56), "reviews": (90, 1, 170)}   # mean tokens: prompt, belief, response
METHODS = ("sft", "dpo", "gdpo", "kto", "gdpo-kto")
CLASSES = list(range(15, 21))


def some_items(task, n, vocab, seed=0):
    """Rows of random tokens whose pieces vary by half around the task's means."""
    rng = np.random.default_rng(seed)
    draw = lambda mean: rng.integers(vocab // 2, vocab, max(1, int(mean * rng.uniform(0.5, 1.5))))
    prompt, belief, response = TASKS[task]
    items = []
    for row in range(n):
        beliefs, responses = (tuple(draw(m).tolist() for _ in range(2)) for m in (belief, response))
        items.append(Item(row, draw(prompt).tolist(), beliefs, responses, belief > 1, [1 / 6] * 6,
                          0, 2, "other", "", ""))
    mismatch(items, 1024, 0)
    return items


def floor(items, loss, cfg):
    """Operations that one step needs at least, by the formula above."""
    weights = cfg.n_layer * (4 * cfg.n_embd ** 2 + 2 * cfg.n_embd * cfg.n_inner)

    def forward(branches, scored):
        tokens = attended = 0
        for item in items:
            _, depth, *_ = lay_out([sequence(item, b) for b in branches])
            tokens += len(depth)
            attended += sum(depth) + len(depth)
        return (2 * weights * tokens + 4 * cfg.n_embd * cfg.n_layer * attended
                + 2 * cfg.n_embd * cfg.vocab_size * scored)
    batch = collate(items, loss.branches, CLASSES)
    total = 3 * forward(loss.branches, len(batch["at"]))
    if loss.mismatch:
        total += forward(("mismatch",), len(collate(items, ("mismatch",), CLASSES)["at"]))
    return total


def our_step(model, items, name):
    """Forward and backward as train.train_step takes them."""
    loss, device = LOSSES[name], model.head.device
    o = train.resolve(train.Config(loss=name, device="cpu"))

    def scores(branches):
        b = train.to_tensors(collate(items, branches, CLASSES), device)
        return score(model(b["ids"], b.get("pos"), b.get("end")), model.head, b)

    def step():
        model.zero_grad(set_to_none=True)
        between = None
        if loss.mismatch:
            with torch.no_grad():
                between = scores(("mismatch",)).logps[:, 0].mean(0)
        s = scores(loss.branches)
        s.ref, s.mismatch = torch.zeros_like(s.logps), between
        loss.objective(s, o)[0].mean().backward()
    return step


def their_step(cfg, items, name, device="cpu"):
    """A step as the authors' code takes it, with transformers' model of the same shape."""
    from transformers import AutoConfig, AutoModelForCausalLM
    hf = AutoConfig.for_model(**config_to_hf(cfg, 0, torch.float32))
    with torch.device(device):
        policy, reference = (AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa")
                             for _ in range(2))
    sides = {"chosen": (0, 0), "own": (1, 1), "given": (0, 1), "mismatch": (2, 2)}

    def batch(branches):
        rows = [(i.prompt, i.beliefs[sides[b][0]], i.responses[sides[b][1]]) for b in branches
                for i in items]
        T = max(sum(map(len, row)) for row in rows)
        ids, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T)
        for n, (prompt, belief, response) in enumerate(rows):
            row = prompt + belief + response
            ids[n, :len(row)] = torch.tensor(row)
            mask[n, len(prompt):len(row)] = 1
        return ids.to(device), mask.to(device)

    def logps(model, b):
        ids, mask = b
        logits = model(input_ids=ids).logits.float()[:, :-1]   # causal: the right pads are unseen
        picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (picked * mask[:, 1:]).sum(-1)

    def step():
        policy.zero_grad(set_to_none=True)
        gdpo = name.startswith("gdpo")
        if name == "sft":
            loss = -logps(policy, batch(["chosen"])).mean()
        else:
            both = batch(["chosen", "given" if gdpo else "own"])
            extra = batch(["mismatch"]) if "kto" in name else None
            with torch.no_grad():
                ref = logps(reference, both)
                z = 0 if extra is None else (logps(policy, extra) - logps(reference, extra)).mean()
            r = (logps(policy, both) - ref).view(2, -1)
            loss = -torch.nn.functional.logsigmoid(0.1 * (r[0] - r[1] - z)).mean()
            if gdpo:                                   # calibration: the accepted answer once more
                loss = loss - logps(policy, batch(["chosen"])).mean()
        loss.backward()
    return step


def count(steps):
    """Operations of some steps (on the meta device); attention in its mathematical form, which the
    counter knows whole."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in steps:
            step()
    return counter.get_total_flops()


def alternate(steps, repeats):
    """Processor seconds of each step, best of `repeats`, taken in turns."""
    best = [float("inf")] * len(steps)
    for _ in range(repeats):
        for n, step in enumerate(steps):
            start = time.process_time()
            step()
            best[n] = min(best[n], time.process_time() - start)
    return best


def peak(args, who):
    """Most MB that a process held which takes one step (and has loaded torch and the model)."""
    command = [sys.executable, __file__, *args, "--memory", who]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="gpt2", choices=SHAPES)
    parser.add_argument("--task", default="", choices=["", *TASKS])
    parser.add_argument("--loss", default="", choices=["", *METHODS])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--time", action="store_true", help="also processor time and memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", default="", choices=["", "ours", "theirs"])
    o = parser.parse_args()
    cfg = SHAPES[o.shape]
    if o.memory:
        items = some_items(o.task, o.rows, cfg.vocab_size)
        step = our_step(GPT(cfg).init_weights(0), items, o.loss) if o.memory == "ours" else \
            their_step(cfg, items, o.loss)
        step()
        status = Path("/proc/self/status").read_text()
        return print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3)
    print(f"{o.shape}, {o.rows} pairs a step; operations as a ratio to the floor"
          + ("; processor time and peak memory of the process: ours / theirs" if o.time else ""))
    for task in [o.task] if o.task else TASKS:
        for name in [o.loss] if o.loss else METHODS:
            print(line(o, cfg, task, name), flush=True)


def line(o, cfg, task, name):
    """Batches of 16 x rows items: ours as train.Schedule makes them, theirs in random order."""
    loss = LOSSES[name]
    items = some_items(task, 16 * o.rows, cfg.vocab_size)
    costs = [cost(i, loss.branches) for i in items]
    sorted_batches = [[items[i] for i in index] for index in epoch_batches(costs, o.rows, 0, 0)]
    batches = [items[i:i + o.rows] for i in range(0, len(items), o.rows)]
    least = floor(items, loss, cfg)
    with torch.device("meta"):
        model = GPT(cfg)
    ours = count(our_step(model, b, name) for b in sorted_batches)
    theirs = count(their_step(cfg, b, name, "meta") for b in batches)
    text = (f"{task:9} {name:9} floor {least / 16e12:6.3f} TFLOP   ours {ours / least:5.2f}   "
            f"theirs {theirs / least:5.2f}")
    if o.time:                                         # one batch of middling length each
        mine, other = (sorted(several, key=lambda b: floor(b, loss, cfg))[8]
                       for several in (sorted_batches, batches))
        fair = floor(other, loss, cfg) / floor(mine, loss, cfg)
        a, b = alternate([our_step(GPT(cfg).init_weights(0), mine, name),
                          their_step(cfg, other, name)], o.repeats)
        flags = ["--shape", o.shape, "--task", task, "--loss", name, "--rows", str(o.rows)]
        m = [peak(flags, who) for who in ("ours", "theirs")]
        text += (f"   time {a:5.1f} s / {b:5.1f} s, for the same work {fair * a / b:.2f}   memory "
                 f"{m[0]:,.0f} / {m[1]:,.0f} MB = {m[0] / m[1]:.2f}")
    return text


if __name__ == "__main__":
    main()
