"""What the work costs, against a floor and against others. By hand, not a test:

    python tests/bench.py                # operations of a step, GPT-2's shape, all tasks and losses
    python tests/bench.py time           # processor time and peak memory of a step, in alternation
    python tests/bench.py speed          # whole steps: tokens/s and utilisation; on a GPU too
    python tests/bench.py all            # these three for all tasks and losses: an hour on a CPU
    python tests/bench.py memory         # what a run needs, computed, at each --micro_batch
    python tests/bench.py sampling       # answers/s of model.generate and of transformers' generate
    python tests/bench.py rows           # reading 177,000 rows; --help
    python tests/bench.py loading        # a checkpoint, beside safetensors + torch
    python tests/bench.py processes      # --shard_optimizer: what each of two processes holds

Operations are counted by torch's FlopCounterMode. The floor is what the method needs at least:
forward and backward over the tokens that differ, the prompt and belief of a pair once, no padding,
logits only where a loss reads them, the reference's log-probs known:
    sum over tokens of 3 x (2 x weights of the layers + 4 x C x layers x tokens it attends to)
    + 3 x 2 x C x V x positions that are scored   (KTO: and a third of it, forward alone, for z0).
"theirs" is the authors' step written with transformers: three policy forwards (the accepted answer
twice), a resident reference, everything padded to the longest, logits of all positions in float32.
"trl" is TRL's DPOTrainer (pip install trl): its collator and its compute_loss on rows sorted as
ours are, the reference's log-probs precomputed, no gradient checkpointing.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from data import (BRANCHES, Item, Tokenizer, collate, cost, encode_rows,  # noqa: E402
                  epoch_batches, load_dataset, mismatch, run, train_bpe)
from losses import CHUNK, LOSSES, score  # noqa: E402
from model import GPT, GPTConfig, config_to_hf, load_model, on_disk, save_model  # noqa: E402
from train import autocast, to_tensors  # noqa: E402

neox = dict(vocab_size=50304, n_ctx=2048, rotary=0.25, parallel=True, tanh_gelu=False, tied=False)
SHAPES = {
    "gpt2": GPTConfig(),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280, n_inner=5120),
    "pythia-160m": GPTConfig(**neox),
    "pythia-2.8b": GPTConfig(n_layer=32, n_head=32, n_embd=2560, n_inner=10240, **neox),
    "small": GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_embd=256, n_inner=1024)}
TASKS = {"opinions": (26, 7, 56), "reviews": (90, 1, 170)}   # mean tokens: prompt, belief, response
METHODS = ("sft", "dpo", "gdpo", "kto", "gdpo-kto")
CLASSES = list(range(15, 21))
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bfloat16") if CUDA else ("cpu", "float32")


def some_items(task, n, vocab, seed=0):
    """Rows of random tokens whose pieces vary by half around the task's means."""
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


def sequence(item, branch):
    belief, response = BRANCHES[branch]
    return item.prompt + item.beliefs[belief] + item.responses[response]


def floor(items, loss, cfg):
    """Operations that one step needs at least, by the formula above."""
    weights = cfg.n_layer * (4 * cfg.n_embd ** 2 + 2 * cfg.n_embd * cfg.n_inner)

    def forward(branches, scored):
        tokens = attended = 0
        for item in items:                             # a token is needed once for each past it has
            whole = [tuple(sequence(item, b)) for b in branches]
            pasts = {s[:t + 1] for s in whole for t in range(len(s))}
            tokens += len(pasts)
            attended += sum(map(len, pasts))
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
        return score(model, model.head, to_tensors(collate(items, branches, CLASSES), device))

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
    with torch.device(device):                         # eval: dropout is off, as in their code
        policy, reference = (AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa").eval()
                             for _ in range(2))
    def batch(branches):
        rows = [(i.prompt, i.beliefs[BRANCHES[b][0]], i.responses[BRANCHES[b][1]])
                for b in branches for i in items]
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


def trl_step(cfg, items):
    """DPO as TRL's trainer takes it, at its best settings, on these very rows."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    one_word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x")),
                                       eos_token="x", pad_token="x")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config_to_hf(cfg, 0, torch.float32)), attn_implementation="sdpa")
    options = DPOConfig(tempfile.mkdtemp(), use_cpu=not CUDA, bf16=CUDA, max_length=None, beta=0.1,
                        precompute_ref_log_probs=True, gradient_checkpointing=False,
                        report_to="none")
    trainer = DPOTrainer(model, args=options, processing_class=one_word, train_dataset=(
        Dataset.from_dict({"prompt": ["x"], "chosen": ["x"], "rejected": ["x"]})))
    examples = [{"prompt_ids": i.prompt, "chosen_ids": i.beliefs[0] + i.responses[0],
                 "rejected_ids": i.beliefs[1] + i.responses[1],
                 "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0} for i in items]

    def step():
        trainer.model.zero_grad(set_to_none=True)
        batch = {k: v.to(DEVICE) for k, v in trainer.data_collator(examples).items()}
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return step


def count(steps):
    """Operations of some steps on the meta device, which knows no autocast; attention in its
    mathematical form, which the counter knows whole."""
    no_autocast = mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with no_autocast, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in steps:
            step()
    return counter.get_total_flops()


def seconds(step):
    """Of the processor on a CPU, by the clock on a GPU, in the precision that a run has there."""
    clock = time.perf_counter if CUDA else time.process_time
    if CUDA:
        torch.cuda.synchronize()
    start = clock()
    with autocast(DEVICE, DTYPE):
        step()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def alternate(steps, repeats):
    """Seconds of each step of a dict, best of `repeats`, taken in turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            best[name] = min(best[name], seconds(step))
    return best


def memory_peak():
    """Most bytes that this process held: on the GPU, else of main memory."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def child(what, o, *flags, launch=(sys.executable,)):
    """Run this script once more, with the same options; what it printed, as JSON lines."""
    same = [f"--{k}={v}" for k, v in vars(o).items() if k != "what" and not isinstance(v, bool)]
    out = subprocess.run([*launch, __file__, what, *same, *flags], capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    return [json.loads(line) for line in out.stdout.splitlines()]


# ---------------------------------------------------------------------------------------------
# What is measured

def memory(cfg, tokens, half=2, adam=False, checkpointing=False, processes=1):
    """Bytes that a step holds at its peak, by purpose, for micro-batches of `tokens` tokens, shared
    beginnings counted with each branch: an upper bound. half: bytes of what autocast computes in.
    Of GPT-2 and Pythia; a gated MLP or shared heads are not counted."""
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(cfg).parameters())
    # Kept for backward, per token of a layer: the float32 inputs of its LayerNorms (one where
    # attention and MLP read the same) and, in `half`, their outputs, q, k, v, the attention's
    # output by sequence and packed (rotary: q, k and that output once more), and the MLP's hidden
    # layer before and after its GELU.
    layer = (4 if cfg.parallel else 8) * cfg.n_embd + half * (
        (9 if cfg.rotary else 7) * cfg.n_embd + 2 * cfg.n_inner)
    last = 4 * cfg.n_embd
    kept = last + (layer + (cfg.n_layer - 1) * last if checkpointing else layer * cfg.n_layer)
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": 4 * n * (1 + adam) / processes,
            "bf16 copies": 2 * n * (half == 2), "activations": tokens * kept,
            "logits": min(tokens, CHUNK) * cfg.vocab_size * 16, "or update": 4 * n / processes}


def memory_table(o, cfg):
    """GB of one process, RMSprop and bfloat16 autocast, rows of two branches of 512 tokens."""
    print(f"{o.shape}: GB per process at its peak, rows of 2 x 512 tokens, bfloat16 autocast, "
          f"RMSprop, {'with' if o.checkpointing else 'without'} --checkpointing\n")
    for n in (1, 2, 4, 8, 16, 32):
        need = memory(cfg, n * 1024, checkpointing=o.checkpointing)
        *fixed, copies, activations, logits, update = need.values()
        peak = sum(fixed) + max(copies + activations + logits, update)
        if n == 1:
            print("--micro_batch" + "".join(f"{k:>12}" for k in need) + f"{'peak':>8}  fits on")
        print(f"{n:13}" + "".join(f"{v / 1e9:12.2f}" for v in need.values())
              + f"{peak / 1e9:8.2f}  "
              + " ".join(str(card) for card in (24, 48, 80, 141) if peak < 0.94e9 * card))


def batches_of(o, cfg, task, name):
    """16 x rows items in batches: as train.loop makes them, and in random order."""
    items = some_items(task, 16 * o.rows, cfg.vocab_size)
    costs = [cost(i, LOSSES[name].branches) for i in items]
    return ([[items[i] for i in index] for index in epoch_batches(costs, o.rows, 0, 0)],
            [items[i:i + o.rows] for i in range(0, len(items), o.rows)])


def operations(o, cfg, task, name):
    ours, theirs = batches_of(o, cfg, task, name)
    least = sum(floor(b, LOSSES[name], cfg) for b in ours)
    with torch.device("meta"):
        model = GPT(cfg)
    a = count(our_step(model, b, name) for b in ours)
    b = count(their_step(cfg, b, name, "meta") for b in theirs)
    return (f"operations   floor {least / 16e12:6.3f} TFLOP   ours {a / least:5.2f}   "
            f"theirs {b / least:5.2f}")


def in_turns(o, cfg, task, name):
    """One batch of middling length each; theirs is scaled to the same work by the floor."""
    loss = LOSSES[name]
    ours, theirs = (sorted(several, key=lambda b: floor(b, loss, cfg))[8]
                    for several in batches_of(o, cfg, task, name))
    model = GPT(cfg).init_weights(0).to(DEVICE)
    steps = {"ours": our_step(model, ours, name), "theirs": their_step(cfg, theirs, name, DEVICE)}
    if name.startswith("gdpo"):
        steps["our dpo"] = our_step(model, ours, "dpo")
    try:
        steps["trl's dpo"] = trl_step(cfg, ours)
    except ImportError:
        pass
    t = alternate(steps, o.repeats)
    t["theirs"] *= floor(ours, loss, cfg) / floor(theirs, loss, cfg)
    peaks = {who: child("held", o, f"--task={task}", f"--loss={name}", f"--who={who}")[0]
            for who in ("ours", "theirs")}
    return (f"{t['ours']:6.2f} s; ours / " + "   ".join(
        f"{k} {t['ours'] / v:.2f}" for k, v in t.items() if k != "ours")
        + f"   peak memory {peaks['ours'] / 1e9:.2f} GB / theirs "
          f"{peaks['ours'] / peaks['theirs']:.2f}")


def held(o, cfg, task, name):
    """A process that takes one step, and has loaded torch and the model."""
    items = batches_of(o, cfg, task, name)[0 if o.who == "ours" else 1]
    items = sorted(items, key=lambda b: floor(b, LOSSES[name], cfg))[8]
    seconds(our_step(GPT(cfg).init_weights(0).to(DEVICE), items, name) if o.who == "ours" else
            their_step(cfg, items, name, DEVICE))
    return memory_peak()


def matmul_peak():
    """Operations a second of a large matrix product in the precision of a run."""
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device=DEVICE) for _ in range(2))
    a, b = (x.to(getattr(torch, DTYPE)) for x in (a, b))
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(20))


def speed(o, cfg, task, name):
    """Whole training steps (train.train_step), from rows to updated weights."""
    batches, _ = batches_of(o, cfg, task, name)
    items = [i for b in batches for i in b]
    loss, raw = LOSSES[name], GPT(cfg).init_weights(0).to(DEVICE)
    raw.checkpointing = o.checkpointing
    t = train.resolve(train.Config(loss=name, device=DEVICE, micro_batch=o.micro_batch, lr=1e-6,
                                   optimizer="rmsprop"))
    optimizer, ref = train.optimizer_of(t, raw), torch.zeros(len(items), len(loss.branches) + 1, 3)
    model = torch.compile(raw, dynamic=True) if o.compile else raw

    def step(n):
        train.train_step(model, raw, optimizer, loss, items, ref,
                         range(n * o.rows, (n + 1) * o.rows), CLASSES, t)
    for n in range(6):
        seconds(lambda: step(n))
    peak = matmul_peak()
    spent = sum(seconds(lambda: step(n)) for n in range(6, 16))
    work = sum(floor(b, loss, cfg) for b in batches[6:])
    tokens = sum(cost(i, loss.branches) for b in batches[6:] for i in b)
    return (f"{tokens / spent:,.0f} tokens/s (a shared prompt once), {10 * o.rows / spent:.1f} "
            f"pairs/s   {work / spent / peak:.0%} of the {peak / 1e12:,.3g} TFLOP/s of a large "
            f"{DTYPE} product   peak memory {memory_peak() / 1e9:.2f} GB")


def sampling(o, cfg):
    """Answers of 64 tokens to prompts of the opinion task: all rows at once, eight answers each,
    against transformers' generate on four sequences at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM
    prompts = [i.prompt for i in some_items("opinions", o.prompts, cfg.vocab_size)]
    prompts, n = sorted(prompts, key=len), 64
    model = GPT(cfg).init_weights(0).to(DEVICE)
    hf = AutoConfig.for_model(**config_to_hf(cfg, 0, torch.float32))
    with torch.device(DEVICE):
        other = AutoModelForCausalLM.from_config(hf, attn_implementation="sdpa").eval()
    four, T = prompts[::max(1, len(prompts) // 4)][:4], max(map(len, prompts))
    ids, mask = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T, dtype=torch.long)
    for row, prompt in enumerate(four):
        ids[row, T - len(prompt):], mask[row, T - len(prompt):] = torch.tensor(prompt), 1
    room = torch.cuda.mem_get_info()[0] / 2 if CUDA else 4e9       # as evaluate.sample_rows
    size = max(1, min(512, int(room / (8 * cfg.n_layer * cfg.n_embd * (T + n)))))
    jobs = [p for p in prompts for _ in range(8)]
    t = alternate({
        "ours": lambda: [model.generate(jobs[i:i + size], n) for i in range(0, len(jobs), size)],
        "theirs": lambda: other.generate(
            ids.to(DEVICE), attention_mask=mask.to(DEVICE), do_sample=True, top_k=0,
            max_new_tokens=n, min_new_tokens=n, pad_token_id=0)}, o.repeats)
    ours, theirs = len(jobs) / t["ours"], 4 / t["theirs"]
    print(f"{o.shape}: {len(prompts)} prompts x 8 answers of {n} tokens, {size} at once: "
          f"{ours:.2f} answers/s; transformers' generate, four at once: {theirs:.2f}; "
          f"ratio {ours / theirs:.1f}")


def rows(o, cfg):
    """Reading: as many rows as the large United States set has, with answers of about 56 tokens."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioubdklmnrst"), rng.integers(2, 9))) for _ in range(20000)]
    text = lambda n: " ".join(words[i] for i in rng.zipf(1.3, n).clip(max=len(words)) - 1)
    options = ["Very good", "Somewhat good", "Somewhat bad", "Very bad"]
    prompts = [f"What do you think of {text(12)}?" for _ in range(1500)]
    with tempfile.TemporaryDirectory() as folder:
        folder, texts = Path(folder), []
        (folder / "meta.json").write_text(json.dumps({"classes": list("012345")}))
        with open(folder / "train.jsonl", "w") as f:
            for _ in range(o.read):
                a, b = rng.choice(4, 2, replace=False)
                row = {"prompt": prompts[rng.integers(len(prompts))], "options": options,
                       "probabilities": [0, 0.1, 0.2, 0.3, 0.4, 0],
                       "accept_choice_id": str(4 - a), "accept_choice": options[a],
                       "reject_choice_id": str(4 - b), "reject_choice": options[b],
                       "accept_response": text(40), "reject_response": text(40)}
                texts.append(row["accept_response"]) if len(texts) < 2000 else None
                f.write(json.dumps(row) + "\n")
        train_bpe(texts + prompts, 8192).save(folder)
        spent, tokens, held = child("read", o, f"--folder={folder}")[0]
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, check=True)
    print(f"{o.read:,} rows of {tokens / o.read:.0f} tokens read, checked and tokenized: "
          f"{spent:.1f} s, {held / 1e9:.2f} GB; train.py --help: "
          f"{time.perf_counter() - start:.2f} s")


def loading(o, cfg):
    """Random weights in Hugging Face's form, from a warm page cache, into float32 tensors that own
    their memory: load_model in alternation with safetensors + torch. --shape gpt2-large takes
    3.1 GB of disk and twice that of memory."""
    from safetensors.torch import load_file

    def theirs():
        with torch.device("meta"):
            model = GPT(cfg)
        stored = load_file(Path(folder) / "model.safetensors")
        state = {n: torch.empty(p.shape) for n, p in model.named_parameters()}
        for n, w in state.items():
            for name, (_, view) in on_disk(n, w, cfg).items():
                view.copy_(stored[name].view(view.shape))
        model.load_state_dict(state, assign=True)

    def clock(load):
        start = time.perf_counter()
        load()
        return time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        save_model(GPT(cfg), folder, eos=0)
        pairs = [(clock(lambda: load_model(folder)), clock(theirs)) for _ in range(9)]
    ours, other = (sorted(x)[4] for x in zip(*pairs))
    print(f"{o.shape}, median of 9: ours {ours:.2f} s, safetensors + torch {other:.2f} s, "
          f"ratio {ours / other:.2f}")


def read(o, cfg):
    start = time.perf_counter()
    meta, found = load_dataset(o.folder, ("train",))
    items = encode_rows(found["train"], Tokenizer.load(o.folder), meta, 1024)
    tokens = sum(cost(i, ("chosen",)) for i in items)
    print(json.dumps([time.perf_counter() - start, tokens, memory_peak()]))


def processes(o, cfg):
    """Two processes take a step each way."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    print(f"{o.shape}, RMSprop: a process's optimizer state, and all that it holds at its peak")
    for sharded in (0, 1):
        held = child("process", o, f"--sharded={sharded}", launch=launch)
        print(f"{'with' if sharded else 'without'} --shard_optimizer: " + ", ".join(
            f"{state / 1e9:.3f} of {peak / 1e9:.2f} GB" for state, peak in held))


def process(o, cfg):
    train.setup(DEVICE)
    items = some_items("opinions", 4, cfg.vocab_size)
    raw = GPT(cfg).init_weights(0).to(DEVICE)
    t = train.resolve(train.Config(loss="gdpo", device=DEVICE, optimizer="rmsprop", lr=1e-6,
                                   shard_optimizer=bool(o.sharded)))
    optimizer = train.optimizer_of(t, raw)
    model = train.DDP(raw, gradient_as_bucket_view=True)
    for _ in range(2):
        train.train_step(model, raw, optimizer, LOSSES["gdpo"], items, torch.zeros(4, 2, 3),
                         range(4), CLASSES, t)
    state = getattr(optimizer, "optim", optimizer).state.values()
    state = sum(v.nbytes for s in state for v in s.values() if torch.is_tensor(v))
    sys.stdout.write(json.dumps([state, memory_peak()]) + "\n")       # at once: there are two
    train.dist.destroy_process_group()


def everything(o, cfg, task, name):
    return "\n  ".join(("", *(f(o, cfg, task, name) for f in (operations, in_turns, speed))))


STEPS = {"operations": operations, "time": in_turns, "speed": speed, "all": everything,
         "held": held}
INSIDE = ("held", "read", "process")                   # what child() runs
OTHERS = {"memory": memory_table, "sampling": sampling, "rows": rows, "loading": loading,
          "processes": processes, "read": read, "process": process}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="operations", choices=[*STEPS, *OTHERS],
                        metavar="|".join(k for k in (*STEPS, *OTHERS) if k not in INSIDE))
    parser.add_argument("--shape", default="gpt2", choices=SHAPES)
    parser.add_argument("--task", default="", choices=["", *TASKS])
    parser.add_argument("--loss", default="", choices=["", *METHODS])
    parser.add_argument("--rows", type=int, default=8, help="pairs a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro_batch", type=int, default=0, help="speed: pairs a forward pass")
    parser.add_argument("--compile", action="store_true", help="speed: torch.compile the model")
    parser.add_argument("--checkpointing", action="store_true", help="speed: as train.py's")
    parser.add_argument("--prompts", type=int, default=1843 if CUDA else 16, help="sampling")
    parser.add_argument("--read", type=int, default=177000, help="rows: how many")
    for hidden in ("who", "folder", "sharded"):        # what child() says
        parser.add_argument(f"--{hidden}", default="0", help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.sharded, cfg = int(o.sharded), SHAPES[o.shape]
    if o.what in OTHERS:
        return OTHERS[o.what](o, cfg)
    if o.what == "held":
        return print(held(o, cfg, o.task, o.loss))
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{o.shape}, {o.rows} pairs a step, {device}, torch {torch.__version__}")
    for task in [o.task] if o.task else TASKS:
        for name in [o.loss] if o.loss else METHODS:
            print(f"{task:9} {name:9}{STEPS[o.what](o, cfg, task, name)}", flush=True)


if __name__ == "__main__":
    run(main)
