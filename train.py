"""Train with any loss of losses.py, on one CPU or many GPUs.

    python train.py --loss gdpo                         # the shipped world, minutes on a laptop
    torchrun --nproc_per_node=4 train.py --loss gdpo    # the same run on four processes

Fourth in reading order. A run: rows -> items; the reference's log-probs, computed once with the
policy as it is before the first step (so one model serves as both); then the loop. Every loss but
SFT starts from an SFT checkpoint, which is trained first if it is missing.

OUT holds config.json (the flags), metrics.jsonl (one JSON object per logged step), best/ and last/
(checkpoint folders) and state.pt (all that --resume needs).

Left out on purpose: a second model in memory as the reference, dropout, float16.
"""
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from data import (EVAL_BRANCHES, Parser, Tokenizer, add_flags, class_ids, collate, cost,
                  dataset_name, encode_rows, epoch_batches, find_checkpoint, help_first,
                  load_dataset, mismatch, progress, prompt_text, read_json, run, train_bpe,
                  write)


@dataclass
class Config:
    # the method
    loss: str = "gdpo"            # the method; {LOSSES}
    beta: float = None            # strength of the reference; 0.01 (weak) to 1 (strong) is sane
    alpha: float = 1.0            # H-DPO: strength of the policy's own log-probs
    label_smoothing: float = 0.0  # DPO: chance that a label is the wrong way round
    gamma: float = 0.5            # SimPO: the margin it asks for
    prior: float = 0.5            # PIPA: share of right answers
    lambda_d: float = 1.0         # KTO: weight of desirable answers
    lambda_u: float = 1.0         # KTO: weight of undesirable answers
    w_kl: float = 1.0             # weight of the KL term, in every loss that has it
    w_belief: float = 1.0         # GDPO: weight of the belief's likelihood
    w_pref: float = 1.0           # GDPO: weight of the preference term
    w_anchor: float = 0.0         # GDPO: weight of the accepted response's likelihood
    # data and model
    data: str = "data/toy"        # dataset folder; give more than one, with commas, to mix them
    form: str = ""                # of the prompt, as "<G>{group}<Q>{prompt}<A>"; empty: the data's
    max_length: int = 0           # longest row in tokens; 0: the model's context
    overlong: Literal["error", "drop", "trim"] = "error"  # what happens to longer rows
    model: str = "scratch"        # where SFT starts: scratch (a small GPT-2), a folder, a hub name
    init: str = ""                # where the others start; empty: the SFT run, made if missing
    n_layer: int = 2              # scratch: layers
    n_head: int = 4               # scratch: heads
    n_embd: int = 96              # scratch: channels
    vocab_size: int = 1024        # scratch: tokens, learned from the training rows
    # optimization; None is filled in from PRESETS
    epochs: float = None          # passes over the training rows
    batch_size: int = None        # rows per step, over all processes
    micro_batch: int = 0          # rows per forward pass of one process; 0: all of its share
    optimizer: Literal["rmsprop", "adamw"] = None  # which
    lr: float = None              # peak learning rate
    warmup: int = None            # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = None  # after warm-up; cosine falls to zero
    clip: float = 10.0            # largest gradient norm
    # the run
    out: str = ""                 # run folder; empty: out/DATA-LOSS-seedN
    seed: int = 0                 # of initialisation and order
    resume: bool = False          # go on with the run in OUT
    overwrite: bool = False       # throw away the run in OUT
    eval_every: int = None        # examples between evaluations
    log_every: int = 10           # steps between lines of metrics.jsonl
    select: Literal["jsd", "loss"] = "jsd"  # eval metric that picks OUT/best; lower is better
    # the machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on cuda
    compile: bool = False         # torch.compile the model
    checkpointing: bool = False   # keep one activation per layer, recompute the rest in backward
    shard_optimizer: bool = False  # each process keeps only its share of the optimizer's state
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in best/ and last/


# May change on --resume, and between runs that count as the same method
VOLATILE = ("out", "resume", "overwrite", "device", "micro_batch", "log_every", "compile",
            "checkpointing", "shard_optimizer")
# A run shares these with the SFT run that it starts from
SHARED = ("data", "form", "model", "seed", "max_length", "overlong", "n_layer", "n_head", "n_embd",
          "vocab_size")
POSITIVE = ("epochs", "batch_size", "lr", "clip", "eval_every", "log_every", "n_layer", "n_head",
            "n_embd")
# What None stands for. A checkpoint's values are the paper's (Appendix G; eval_every from the
# authors' code); those of the shipped world were found by trying.
PRESETS = {  # (from scratch?, starts from an SFT checkpoint?)
    (True, False): dict(epochs=10.0, batch_size=64, lr=4e-3, warmup=20, schedule="cosine",
                        optimizer="adamw", beta=0.1, eval_every=8000),
    (True, True): dict(epochs=2.0, batch_size=32, lr=4e-4, warmup=10, schedule="cosine",
                       optimizer="rmsprop", beta=1.0, eval_every=1600),
    (False, False): dict(epochs=40.0, batch_size=128, lr=5e-7, warmup=150, schedule="constant",
                         optimizer="rmsprop", beta=0.1, eval_every=10000),
    (False, True): dict(epochs=20.0, batch_size=32, lr=5e-7, warmup=150, schedule="constant",
                        optimizer="rmsprop", beta=0.1, eval_every=10000),
}


def flags():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser, Config)
    return parser


help_first(__name__, flags)                            # before torch, which takes a second

import numpy as np
import scipy.special
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from losses import ANSWER, LOSSES, RESPONSE, Scores, logratios, margin, score
from model import GPT, GPTConfig, fingerprint, load_model, save_model


def resolve(o):
    """Fill in what None, "" and auto stand for. ValueError for a value that cannot be."""
    if o.loss not in LOSSES:
        raise ValueError(f"--loss {o.loss!r} is unknown; there is: {', '.join(LOSSES)}")
    loss = LOSSES[o.loss]
    if o.init and not loss.reference:
        raise ValueError(f"--loss {o.loss} does not start from an SFT checkpoint: give --model "
                         f"{o.init} instead of --init")
    if o.resume and o.overwrite:
        raise ValueError("--resume goes on with the run, --overwrite throws it away: give one")
    if o.init and o.model == "scratch":                # a run's weights, or a checkpoint as it is
        made = Path(o.init).parent / "config.json"
        o.model = read_json(made).get("model", o.init) if made.is_file() else o.init
    for name, value in PRESETS[o.model == "scratch", loss.reference].items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    for name in POSITIVE:                              # the parser refuses less than 0
        if not getattr(o, name) > 0:
            raise ValueError(f"--{name} must be more than 0")
    o.device = device_of(o.device)
    o.dtype = {"auto": "bfloat16" if o.device == "cuda" else "float32"}.get(o.dtype, o.dtype)
    o.model = o.model.rstrip("/")
    o.data = ",".join(str(Path(name)) if name else "" for name in o.data.split(","))
    o.out = o.out or run_folder(o, o.loss)
    return o


def run_folder(o, loss):
    parts = [dataset_name(o.data), "" if o.model == "scratch" else Path(o.model).name, loss]
    return f"out/{'-'.join(filter(None, parts))}-seed{o.seed}"


# ---------------------------------------------------------------------------------------------
# Scoring rows without a gradient: the reference, evaluation, KTO's z0 (and evaluate.py)

def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def to_tensors(batch, device):
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()}


@torch.no_grad()
def score_rows(model, items, branches, classes, dtype="float32", desc="scoring", tokens=16384):
    """Scores of all items, in their order, on the CPU. Batches of like length, of about `tokens`
    tokens, are dealt out over the processes and gathered: every row once."""
    rank, size = rank_and_size()
    lengths = [cost(i, branches) for i in items]
    mine, parts = sorted(range(len(items)), key=lambda i: (lengths[i], i))[rank::size], []
    with progress(total=len(mine), desc=desc, unit="row", leave=False, disable=rank > 0,
                  delay=1) as bar:
        while mine:
            full = (k for k, i in enumerate(mine) if (k + 1) * lengths[i] > tokens)
            n = next(full, len(mine)) or 1             # rows come shortest first
            index, mine = mine[:n], mine[n:]
            batch = collate([items[i] for i in index], branches, classes)
            with autocast(model.head.device, dtype):
                s = score(model, model.head, to_tensors(batch, model.head.device))
            parts.append((index, {k: v.float().cpu() for k, v in vars(s).items()
                                  if v is not None}))
            bar.update(n)
    parts = gather(parts)
    place = torch.tensor([i for index, _ in parts for i in index]).argsort()
    return Scores(**{k: torch.cat([p[k] for _, p in parts])[place] for k in parts[0][1]})


def mismatched_logratio(model, items, ref, classes, dtype):
    """Mean log-ratio (3,), by piece, of each item's prompt with another row's answer: KTO's z0
    (Eq. 10) before it is clamped. ref (B, 3): the same pairs' logps under the reference."""
    s = score_rows(model, items, ("mismatch",), classes, dtype)
    return (s.logps[:, 0] - ref).mean(0)


def jsd(p, q):
    """Jensen-Shannon distance of distributions along the last axis: the square root of the
    divergence in nats, in float64, both normalised to 1. Between 0 and sqrt(log 2) = 0.8326."""
    p, q = (np.asarray(x, np.float64) for x in (p, q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    m = (p + q) / 2
    divergence = (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m)).sum(-1) / 2
    return np.sqrt(np.maximum(divergence, 0))          # scipy's own gives NaN where p is nearly q


def belief_metrics(s):
    """JSD of the model's class distribution to the group's, and its class mass: {name: (B,)}."""
    q = s.class_logps.double().exp().numpy()
    if not (np.isfinite(q).all() and q.sum(-1).all()):
        raise FloatingPointError("the model gives no class any probability, or NaN: its training "
                                 "diverged; train again with a lower --lr")
    return {"jsd": jsd(q, s.target.numpy()), "class_mass": q.sum(-1)}


KINDS = ("majority", "minority", "other")


def margins(s, items, beta):
    """Reward margins {name: (B,)} in nats, NaN on rows of another kind. "joint": belief and answer,
    each answer with its own belief, as DPO trains them. "given": the answer after the accepted
    belief, as GDPO trains it. s has EVAL_BRANCHES first, and a reference."""
    joint, given = logratios(s, ANSWER), logratios(s, [RESPONSE])
    both = {"joint": margin(joint[:, 0], joint[:, 1], beta),
            "given": margin(given[:, 0], given[:, 2], beta)}
    kinds = np.array([i.kind for i in items])
    return {f"{name}_{kind}": np.where(kinds == kind, values.double().numpy(), np.nan)
            for name, values in both.items() for kind in KINDS}


def eval_metrics(s, items, loss, o):
    """Means over the eval split: the loss and its parts, JSD, class mass, margins."""
    at = [EVAL_BRANCHES.index(b) for b in loss.branches]
    ref = None if s.ref is None else s.ref[:, at]
    values, parts = loss.objective(
        replace(s, logps=s.logps[:, at], counts=s.counts[:, at], ref=ref), o)
    rows = {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1)}
    rows = {k: v.double().numpy() for k, v in rows.items()} | belief_metrics(s)
    if s.ref is not None:
        rows |= margins(s, items, o.beta)
    rows = {k: v[~np.isnan(v)] for k, v in rows.items()}
    return {k: float(v.mean()) if len(v) else None for k, v in rows.items()}


# ---------------------------------------------------------------------------------------------
# One step

def train_step(model, raw, optimizer, loss, items, ref, batch, classes, o):
    """Forward, backward and update on the rows `batch` (indices into items). Returns the sums of
    the loss and its parts over the rows of all processes, and the gradient's norm. The loss is the
    mean over all rows of the batch, in whatever micro-batches and processes they are.
    model: raw, or raw in DDP. A loss that is not finite raises FloatingPointError, no update."""
    rank, size = rank_and_size()
    device, mine = raw.head.device, batch[rank::size]
    n = o.micro_batch or len(mine) or 1
    micros = [mine[i:i + n] for i in range(0, len(mine), n)] or [[]]
    z0 = None                          # KTO's baseline, the same for all micro-batches
    if loss.mismatch:
        z0 = mismatched_logratio(raw, [items[i] for i in batch], ref[batch, -1], classes,
                                 o.dtype).to(device)
    sums, losses = {}, []
    optimizer.zero_grad(set_to_none=True)
    for k, index in enumerate(micros):
        # gradients travel between processes once a step, after the last micro-batch
        with nullcontext() if k + 1 == len(micros) or size == 1 else model.no_sync():
            rows = index or batch[:1]                  # a process without rows still has to join in
            b = to_tensors(collate([items[i] for i in rows], loss.branches, classes), device)
            with autocast(device, o.dtype):
                s = score(model, raw.head, b)
            s.ref = None if ref is None else ref[rows, :len(loss.branches)].to(device)
            s.mismatch = z0
            values, parts = loss.objective(s, o)       # (B,)
            # DDP takes the mean over processes, this is to be the mean over rows
            (values[:len(index)].sum() * size / len(batch)).backward()
        losses.append(values.detach()[:len(index)])
        for name, v in {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1)}.items():
            sums[name] = sums.get(name, 0) + v.detach()[:len(index)].sum().double()
    norm = float(torch.nn.utils.clip_grad_norm_(raw.parameters(), o.clip))
    totals = dict(zip(sums, sum_over_ranks(torch.stack([*sums.values()])).tolist()))
    if not math.isfinite(totals["loss"] + norm):
        bad = gather([items[i].row + 1 for i, v in zip(mine, torch.cat(losses).tolist())
                      if not math.isfinite(v)])
        at = f"rows {sorted(bad)[:5]}" if bad else f"a step of {len(batch)} rows"
        raise FloatingPointError(f"the {'loss' if bad else 'gradient'} is not finite on {at} of "
                                 "train.jsonl: lower --lr, or look at the rows")
    optimizer.step()
    return totals, norm


def lr_at(o, step, total):
    """Learning rate of a step, 0 to total - 1: linear warm-up, then constant or cosine to zero."""
    warm = min(1.0, (step + 1) / (o.warmup + 1))
    if o.schedule == "constant":
        return o.lr * warm
    done = max(0, step - o.warmup) / max(1, total - o.warmup)
    return o.lr * warm * 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------
# The loop

def train(o):
    """One run, from its first step or its last saved one to its end. Returns the Run."""
    device, loss = setup(o.device), LOSSES[o.loss]
    meta, rows = prepare_data(o)
    own_sft = loss.reference and not o.init
    if own_sft:
        o.init = f"{run_folder(o, 'sft')}/best"
    on_first_rank(lambda: can_resume(o))               # before hours of SFT
    if own_sft:
        train_sft_first(o)
    model, tokenizer = start_model(o, rows["train"], device)
    model.checkpointing = o.checkpointing
    classes = class_ids(tokenizer, meta["classes"])
    limit = min(o.max_length or model.cfg.n_ctx, model.cfg.n_ctx)
    items = {s: encode_rows(rows[s], tokenizer, meta, limit, o.overlong, f"{o.data}/{s}.jsonl")
             for s in rows}
    same = {"rows": hash_of(items), "init": fingerprint(model)}
    if loss.mismatch:
        for s in items:
            mismatch(items[s], limit, o.seed)
    with lock(Path(o.out) / ".lock"):
        resumed = on_first_rank(lambda: begin(o))
        for folder in [Path(o.init).parent] * own_sft + [o.out] * resumed:
            if first_line(folder).get("rows") != same["rows"]:
                raise ValueError(f"the run in {folder} was trained on other rows than {o.data} "
                                 "holds now: put them back, or move that run away")
        r = Run(o, model, tokenizer, optimizer_of(o, model), items, classes)
        if resumed:
            r.load_state()
        loop(r, loss, same)
    return r


def evaluate(r, loss, **values):
    """Measure the policy on the eval split and log it."""
    items, o = r.items["eval"], r.o
    s = score_rows(r.model, items, EVAL_BRANCHES, r.classes, o.dtype, "evaluating")
    if r.ref:
        s.ref = r.ref["eval"][:, :len(EVAL_BRANCHES)]
    if loss.mismatch:
        s.mismatch = mismatched_logratio(r.model, items, r.ref["eval"][:, -1], r.classes, o.dtype)
    r.after = eval_metrics(s, items, loss, o)
    r.before = r.before or r.after
    if not math.isfinite(r.after[o.select]):
        raise FloatingPointError(f"the eval {o.select} is not finite at step {r.step}: lower --lr")
    r.log(**values, eval=r.after)


def loop(r, loss, same):
    """same: {"rows", "init"}, what the log's first line says of the run."""
    o, model, items = r.o, r.model, r.items
    per_epoch = math.ceil(len(items["train"]) / o.batch_size)
    total, every = max(1, round(o.epochs * per_epoch)), max(1, o.eval_every // o.batch_size)
    lengths = [cost(i, loss.branches) for i in items["train"]]
    policy = torch.compile(model, dynamic=True) if o.compile else model
    policy = DDP(policy, gradient_as_bucket_view=True) if dist.is_initialized() else policy
    say(f"{o.out}: {o.loss}, {len(items['train'])} rows, {total} steps of {o.batch_size}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {o.device}, {o.dtype}"
        + (f", resumed at step {r.step}" if r.step else ""))

    # 0) the reference is the policy before its first step: one forward pass over all rows, kept
    if r.before is None:
        branches = {"train": loss.branches, "eval": EVAL_BRANCHES}
        if loss.reference:
            r.ref = {s: score_rows(model, items[s], branches[s] + ("mismatch",) * loss.mismatch,
                                   r.classes, o.dtype, f"reference, {s}").logps for s in items}
        evaluate(r, loss, **same)
        r.save_state()
    clock, epoch = time.time(), None
    stop_device = model.head.device if dist.is_initialized() else "cpu"   # no GPU to wait for
    with stop_signals() as stop, progress(total=total, initial=r.step, desc=o.loss, unit="step",
                                          disable=rank_and_size()[0] > 0) as bar:
        while r.step < total:
            # 1) which rows, at which rate: pure functions of the step, so that --resume goes on
            if epoch != r.step // per_epoch:
                epoch = r.step // per_epoch
                batches = epoch_batches(lengths, o.batch_size, o.seed, epoch)
            batch, lr = batches[r.step % per_epoch], lr_at(o, r.step, total)
            for group in r.optimizer.param_groups:
                group["lr"] = lr

            # 2) forward, backward, update
            sums, norm = train_step(policy, model, r.optimizer, loss, items["train"],
                                    r.ref.get("train"), batch, r.classes, o)
            r.step += 1
            r.rows += len(batch)
            r.sums = {k: r.sums.get(k, 0) + v for k, v in sums.items()}
            bar.update()

            # 3) log the mean over the rows since the last line
            if r.step % o.log_every == 0 or r.step == total:
                means = {k: v / r.rows for k, v in r.sums.items()}
                r.log(examples=r.step * o.batch_size, epoch=round(r.step / per_epoch, 4), lr=lr,
                      grad_norm=norm, seconds=round(time.time() - clock, 2), **means)
                bar.set_postfix(loss=f"{means['loss']:.3f}", jsd=f"{r.after['jsd']:.3f}",
                                refresh=False)
                r.sums, r.rows, clock = {}, 0, time.time()

            # 4) evaluate, keep the best weights, save the state
            if r.step % every == 0 or r.step == total:
                evaluate(r, loss)
                if r.best is None or r.after[o.select] < r.best:
                    r.best = r.after[o.select]
                    r.save_weights("best")
                r.save_state()

            # 5) stop if asked to
            if sum_over_ranks(torch.tensor(len(stop), device=stop_device)):
                r.save_state()
                bar.close()
                say(f"stopped and saved at step {r.step}; the same command with --resume goes on")
                sys.exit(130)
    r.save_weights("last")


# =============================================================================================
# Plumbing: processes, where a run starts, its folder, its report

# Under torchrun, every process runs this file and takes its share of each batch

def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device_of(name):
    """"auto", "cpu" or "cuda" -> the device that is there. ValueError if it is not."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use; give --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def setup(device):
    """Join the process group under torchrun; returns this process's torch.device."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=timedelta(hours=3))   # ranks wait while one downloads
    if device != "cuda":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cuda.matmul.allow_tf32 = True
    return torch.device("cuda", torch.cuda.current_device())


def leave():
    """Leave together and skip Python's teardown: torch's background threads sometimes abort it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def on_first_rank(action):
    """Run action() on rank 0 while the others wait; all get its result, or raise its error."""
    outcome = [None, None]
    if rank_and_size()[0] == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as e:
            outcome[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise ValueError(outcome[1])
    return outcome[0]


def sum_over_ranks(values):
    """A tensor's sum over the processes, on all of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(values):
    """The lists of all processes as one list, on every process."""
    everyone = [values] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, values)
    return sum(everyone, [])


def say(*words):
    if rank_and_size()[0] == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stderr)


@contextmanager
def lock(path, wait=0):
    """Keep other runs away from `path` until the block, or this process, ends, however it ends:
    sqlite's file lock does that on every platform. wait: seconds before giving up."""
    held = []

    def take():
        path.parent.mkdir(parents=True, exist_ok=True)
        held.append(sqlite3.connect(path, timeout=wait))
        try:
            held[0].execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            raise ValueError(f"another process is at work in {path.parent}: wait for it, or give "
                             "another --out") from None
    try:
        on_first_rank(take)
        yield
    finally:
        for connection in held:
            connection.close()


# ---------------------------------------------------------------------------------------------
# What a run starts from

def prepare_data(o):
    """(meta, {split: rows}); the shipped world is made where it is missing."""
    def make_toy():
        import synth
        if not Path("data/toy").exists():
            synth.toy(synth.Toy(out="data/toy"))
    if "data/toy" in o.data.split(","):
        with lock(Path("data/.lock"), wait=600):
            on_first_rank(make_toy)
    meta, rows = load_dataset(o.data, ("train", "eval"), o.form)
    o.form = meta["form"]              # saved with the run, which then needs no meta.json for it
    return meta, rows


def train_sft_first(o):
    """Train the SFT run whose best/ is o.init, or finish its training, if need be."""
    folder = Path(o.init).parent
    with lock(folder / ".first", wait=7 * 86400):
        if not on_first_rank(lambda: (folder / "last").is_dir()):
            say(f"no finished SFT run in {folder}: training SFT first, with SFT's own defaults "
                f"(the --epochs, --lr and so on given here are for {o.loss})")
            keep = (*SHARED, "micro_batch", "device", "dtype", "compile", "checkpointing",
                    "shard_optimizer", "save_dtype", "log_every")
            train(resolve(Config(loss="sft", resume=True, out=str(folder),
                                 **{k: getattr(o, k) for k in keep})))
    sft = read_json(folder / "config.json")
    other = [f"--{k} {sft.get(k)} (here: {getattr(o, k)})" for k in SHARED
             if sft.get(k) != getattr(o, k)]
    if other:
        raise ValueError(f"the SFT run in {folder} has other flags: {', '.join(other)}; give the "
                         "checkpoint to start from with --init, or move that run away")


def load_checkpoint(name, device):
    """(model, tokenizer) of a checkpoint folder or hub name, which rank 0 fetches first."""
    folder = on_first_rank(lambda: str(find_checkpoint(str(name))))
    model, tokenizer = load_model(folder, device), Tokenizer.load(folder)
    if tokenizer.n_tokens > model.cfg.vocab_size:
        raise ValueError(f"{name}: the tokenizer has {tokenizer.n_tokens} tokens, but the "
                         f"model's embedding has {model.cfg.vocab_size} rows")
    return model, tokenizer


def start_model(o, rows, device):
    """(model, tokenizer): a checkpoint, or a fresh small model."""
    name = o.init if LOSSES[o.loss].reference else o.model
    if name != "scratch":
        return load_checkpoint(name, device)
    texts = [t for r in rows for t in (prompt_text(r, o.form), r["accept_response"],
                                       r["reject_response"], *(f"<{c}>" for c in r["options"]))]
    tokenizer = train_bpe(texts, o.vocab_size)
    cfg = GPTConfig(tokenizer.n_tokens, o.max_length or 256, o.n_layer, o.n_head, o.n_embd,
                    4 * o.n_embd)
    return GPT(cfg).init_weights(o.seed).to(device), tokenizer


def optimizer_of(o, model):
    kind, options = {"rmsprop": (torch.optim.RMSprop, {}), "adamw": (
        torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.01})}[o.optimizer]
    if not o.shard_optimizer or not dist.is_initialized():
        return kind(model.parameters(), lr=o.lr, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer   # here: slow to import
    for p in model.parameters():                       # it sends them, so no transposed views
        p.data = p.data.contiguous()
    return ZeroRedundancyOptimizer(model.parameters(), kind, lr=o.lr, **options)


# ---------------------------------------------------------------------------------------------
# A run and its folder

@dataclass
class Run:
    """What the loop works on. The last fields, with model, optimizer and ref, make state.pt."""
    o: Config
    model: GPT
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    items: dict                        # {"train": [...], "eval": [...]}
    classes: list                      # token ids of the class labels
    ref: dict = field(default_factory=dict)   # {split: logps (B, S, 3)} of the reference
    step: int = 0                      # steps done
    best: float = None                 # lowest eval metric so far, of --select
    before: dict = None                # eval metrics at step 0 ...
    after: dict = None                 # ... and now
    sums: dict = field(default_factory=dict)  # of the steps since the last logged line ...
    rows: int = 0                      # ... over so many rows
    STATE = ("ref", "step", "best", "before", "after", "sums", "rows")

    @property
    def out(self):
        return Path(self.o.out)

    def log(self, **values):
        if rank_and_size()[0] == 0:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"step": self.step, **values}) + "\n")

    def save_weights(self, name):
        if rank_and_size()[0] == 0:
            self.tokenizer.save(self.out / name)
            save_model(self.model, self.out / name, self.tokenizer.eos,
                       getattr(torch, self.o.save_dtype))

    def save_state(self):
        """All that --resume needs, replaced in one rename."""
        if hasattr(self.optimizer, "consolidate_state_dict"):     # its shares, on the first rank
            self.optimizer.consolidate_state_dict()
        if rank_and_size()[0] > 0:
            return
        path, temporary = self.out / "state.pt", self.out / "state.pt.tmp"
        try:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                       | {k: getattr(self, k) for k in self.STATE}, temporary)
            os.replace(temporary, path)
        except (RuntimeError, OSError) as e:           # RuntimeError: torch's word for a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot write {path} ({str(e).splitlines()[0]:.80}): is the disk full? "
                          "--resume goes on from the last saved state") from e

    def load_state(self):
        path, log = self.out / "state.pt", self.out / "metrics.jsonl"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=os.name != "nt")   # Windows cannot replace a mapped file
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for k in self.STATE:
                setattr(self, k, saved[k])
        except Exception as e:                         # of many kinds, depending on the damage
            raise ValueError(f"{path} is damaged or of another version ({type(e).__name__}): begin "
                             "the run again with --overwrite") from None
        if rank_and_size()[0] == 0:                    # forget what was logged after that state
            lines = log.read_text().split("\n")[:-1]
            write(log, "".join(x + "\n" for x in lines if json.loads(x)["step"] <= self.step))


def can_resume(o):
    """True if OUT holds a state to go on from. ValueError where this run would destroy another one,
    or go on with one of other flags."""
    out, config = Path(o.out), asdict(o)
    made = [name for name in MADE if (out / name).exists()]
    if o.resume and "state.pt" in made:
        old = read_json(out / "config.json")
        changed = [f"--{k} {v} (was {old.get(k)})" for k, v in config.items()
                   if k not in VOLATILE and old.get(k) != v]
        if changed:
            raise ValueError(f"cannot resume with other flags than the run in {out} began with: "
                             + ", ".join(changed))
        return True
    if made and not o.overwrite and not (o.resume and made == ["metrics.jsonl"]):
        raise ValueError(f"{out} holds a run already ({', '.join(made)}), " + (
            "but no state.pt to go on from" if o.resume else "--resume goes on with it")
            + "; --overwrite throws it away, --out gives another folder")
    return False


MADE = ("metrics.jsonl", "best", "last", "state.pt")   # what is never lost without --overwrite


def begin(o):
    """Make OUT ready for this run; returns whether it goes on from a saved state."""
    out = Path(o.out)
    for half in out.rglob("*.tmp"):                    # what a kill left half-written
        half.unlink()
    if can_resume(o):
        return True
    for path in [out / name for name in (*MADE, "eval.json", "samples.jsonl")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write(out / "config.json", json.dumps(asdict(o), indent=1) + "\n")
    return False


def hash_of(items):
    """Tells whether two runs see the same rows, as tokens."""
    digest = hashlib.sha256()
    for item in items["train"] + items["eval"]:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


def first_line(out):
    """The log's first line, which holds the hash of the rows and the fingerprint of the start."""
    path = Path(out) / "metrics.jsonl"
    return json.loads(path.read_text().split("\n")[0] or "{}") if path.is_file() else {}


@contextmanager
def stop_signals():
    """A list that Ctrl-C or SIGTERM adds to, for the loop to read. A second one stops at once."""
    asked = []

    def restore(*_):
        asked.append(1)
        for sig, handler in old.items():
            signal.signal(sig, handler)
    old = {sig: signal.signal(sig, restore) for sig in (signal.SIGINT, signal.SIGTERM)}
    yield asked
    restore()


# ---------------------------------------------------------------------------------------------
# The report, the command line

def report(r):
    """What the run did: first what the method trains, then one row as an example."""
    o, loss = r.o, LOSSES[r.o.loss]
    kinds = {"joint": "margin of belief and answer", "given": "margin of answer given the belief"}
    if "given" in loss.branches:
        kinds = dict(reversed(kinds.items()))
    names = {"jsd": "JSD to the group's shares (0 to 0.833, lower is better)",
             "class_mass": "probability of all classes together"}
    names |= {f"{k}_{kind}": f"{text}, {kind}" for k, text in kinds.items() for kind in KINDS[:2]}
    lines = [f"\n{o.loss} on {o.data}, eval split{'before':>44}{'after':>9}"]
    lines += [f"  {text:58}{r.before[k]:9.3f}{r.after[k]:9.3f}" for k, text in names.items()
              if r.after.get(k) is not None]
    if loss.reference:
        lines.append(f"  ({o.loss} does not train the {[*kinds.values()][1]}, which may fall)")
    item, decode = r.items["eval"][0], r.tokenizer.decode
    s = score_rows(r.model, [item], ("chosen",), r.classes, o.dtype)
    lines += ["", f"For example, the shares of the classes: {decode(item.prompt):.500}",
              "  " + " " * 8 + "".join(f"{decode([c]):>7}" for c in r.classes)]
    for name, shares in (("group", s.target[0]), ("model", s.class_logps[0].exp())):
        lines.append(f"  {name:8}" + "".join(f"{p:7.2f}" for p in shares.tolist()))
    return "\n".join([*lines, "", f"weights: {o.out}/best (lowest {o.select}, {r.best:.3f}), "
                      f"{o.out}/last; log: {o.out}/metrics.jsonl",
                      f"next: python evaluate.py {o.out}, or ask it: --ask \"YOUR QUESTION\""])


def main():
    o = resolve(Config(**vars(flags().parse_args())))
    try:
        r = train(o)
    except (RuntimeError, MemoryError) as e:
        words = str(e).splitlines()[0] if str(e) else ""
        if isinstance(e, MemoryError) or re.search("out of memory|can't allocate", str(e), re.I):
            raise OSError("out of memory: lower --micro_batch, or add --checkpointing; --resume "
                          "goes on from the last saved state") from None
        if dist.is_initialized() and re.search("gloo|nccl|connection", words, re.I):
            raise OSError(f"another process of the run is gone ({words:.100}): see its message. "
                          "The same command with --resume goes on, on any number of processes"
                          ) from None
        raise
    text = report(r)                                   # every process scores its share of it
    if rank_and_size()[0] == 0:
        print(text)
    leave()


if __name__ == "__main__":
    run(main)
