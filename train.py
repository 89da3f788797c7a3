"""Train with any loss in losses.py, on one CPU or many GPUs.

    python train.py --loss gdpo                         # the shipped world, minutes on a laptop
    torchrun --nproc_per_node=4 train.py --loss gdpo    # the same run on four processes

Fourth in reading order. Before the first step, a run scores its rows once with the initial policy,
so that one model serves as both policy and reference. A loss with a reference starts from an SFT
checkpoint, which is trained first if it is missing. OUT holds config.json (the flags),
metrics.jsonl (one object per logged step), best/ and last/ (checkpoints) and state.pt for --resume.

Left out on purpose: a second model in memory as the reference, dropout, float16.
"""
import hashlib
import json
import math
import os
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from data import (EVAL_BRANCHES, Parser, add_flags, class_ids, collate, cost, dataset_name,
                  encode_rows, epoch_batches, find_checkpoint, help_first, load_dataset, mismatch,
                  progress, prompt_text, read_json, run, write)


@dataclass
class Config:
    # the method
    loss: str = "gdpo"            # sft, dpo, kto, gdpo, gdpo-kto, ... (an unknown name lists all)
    beta: float = None            # strength of the reference, usually 0.01 (weak) to 1 (strong)
    alpha: float = 1.0            # H-DPO: strength of the policy's own log-probs
    label_smoothing: float = 0.0  # DPO: probability that a label is flipped
    gamma: float = 0.5            # SimPO: target margin
    prior: float = 0.5            # PIPA: prior share of right answers
    lambda_d: float = 1.0         # KTO: weight of desirable answers
    lambda_u: float = 1.0         # KTO: weight of undesirable answers
    w_kl: float = 1.0             # weight of the KL term, in every loss that has one
    w_belief: float = 1.0         # GDPO: weight of the belief's likelihood
    w_pref: float = 1.0           # weight of the preference term
    w_anchor: float = 0.0         # GDPO: weight of the accepted response's likelihood
    # data and model
    data: str = "data/toy"        # dataset folder, or several to mix, separated by commas
    form: str = ""                # prompt form, like "<G>{group}<Q>{prompt}<A>"; empty: the data's
    max_length: int = 0           # longest row in tokens; 0: the model's context
    overlong: Literal["error", "drop"] = "error"  # what happens to longer rows
    model: str = "scratch"        # where SFT starts: scratch (a small GPT-2), a folder, a hub name
    init: str = ""                # where other losses start; empty: the SFT run, made if missing
    n_layer: int = 2              # scratch: layers
    n_head: int = 4               # scratch: heads
    n_embd: int = 96              # scratch: channels
    vocab_size: int = 1024        # scratch: tokens, learned from the training rows
    # optimization; PRESETS replaces None
    epochs: float = None          # passes over the training rows
    batch_size: int = None        # rows per step, over all processes
    micro_batch: int = 0          # rows per forward pass on each process; 0: its whole share
    optimizer: Literal["rmsprop", "adamw"] = None  # update rule
    lr: float = None              # peak learning rate
    warmup: int = None            # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = None  # after warm-up; cosine falls to zero
    clip: float = 10.0            # gradients are clipped to this norm; 0: not at all
    # the run
    out: str = ""                 # run folder; empty: out/DATA-LOSS-seedN
    seed: int = 0                 # seeds initialisation and row order
    resume: bool = False          # continue the run in OUT
    overwrite: bool = False       # discard the run in OUT
    eval_every: int = None        # examples between evaluations; 0: only at the end
    log_every: int = 10           # steps between lines of metrics.jsonl
    select: Literal["jsd", "loss"] = "jsd"  # eval metric that picks OUT/best; lower is better
    # the machine
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; auto: bfloat16 on cuda
    compile: bool = False         # torch.compile the model
    checkpointing: bool = False   # keep one activation per layer, recompute the rest in backward
    shard_optimizer: bool = False  # each process keeps only its share of the optimizer's state


# Defaults in place of None. Those for checkpoints are the paper's (Appendix G; eval_every is from
# the authors' code); those for the small model were found by trial and error.
PRESETS = {              # scratch: SFT, others | checkpoint: SFT, others
    "epochs":            (10.0, 2.0, 40.0, 20.0),
    "batch_size":        (64, 32, 128, 32),
    "optimizer":         ("adamw", "rmsprop", "rmsprop", "rmsprop"),
    "lr":                (4e-3, 4e-4, 5e-7, 5e-7),
    "warmup":            (20, 10, 150, 150),
    "schedule":          ("cosine", "cosine", "constant", "constant"),
    "beta":              (0.1, 1.0, 0.1, 0.1),
    "eval_every":        (8000, 1600, 10000, 10000)}


def flags():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser, Config)
    return parser


help_first(__name__, flags)                            # before importing torch, which is slow

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from losses import ANSWER, LOSSES, RESPONSE, Scores, logratios, margin, score
from model import (GPT, GPTConfig, Tokenizer, fingerprint, load_model, replacing, save_model,
                   train_bpe)


# ---------------------------------------------------------------------------------------------
# Scoring rows without gradients: for the reference, evaluation, KTO's z0 (Eq. 10), evaluate.py

@torch.no_grad()
def score_rows(model, items, branches, classes, dtype="float32", desc="scoring", tokens=16384):
    """Score all items -> Scores on the CPU, in the items' order. Rows of similar length are batched
    together, up to about `tokens` tokens. The processes split the rows and gather the scores."""
    rank, size = rank_and_size()
    lengths, batches, parts = [cost(i, branches) for i in items], [], []
    for i in np.argsort(lengths, kind="stable")[rank::size].tolist():     # shortest first
        if not batches or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    for index in progress(batches, desc=desc, unit="batch", leave=False, disable=rank > 0, delay=1):
        batch = collate([items[i] for i in index], branches, classes)
        with autocast(model.head.device, dtype):
            s = score(model, model.head, to_tensors(batch, model.head.device))
        parts.append((index, {k: v.float().cpu() for k, v in vars(s).items() if v is not None}))
    parts = gather(parts)
    place = torch.tensor([i for index, _ in parts for i in index]).argsort()   # undoes the sort
    return Scores(**{k: torch.cat([p[k] for _, p in parts])[place] for k in parts[0][1]})


# ---------------------------------------------------------------------------------------------
# One step

def train_step(r, batch):
    """One forward, backward and update on `batch` (indices of training items). The loss is the mean
    over its rows, however they are split into micro-batches and processes. Returns the sums of the
    loss and its parts over these rows, and the gradient norm. r: a Run (see below)."""
    o, loss, items, ref = r.o, r.loss, r.items["train"], r.ref.get("train")
    rank, size = rank_and_size()
    device, mine = r.model.head.device, batch[rank::size]
    n = o.micro_batch or len(mine) or 1
    micros = [mine[i:i + n] for i in range(0, len(mine), n)] or [[]]      # n rows each, at most
    z0, logged = None, []
    if loss.mismatch:                  # KTO's baseline is the same for all micro-batches
        s = score_rows(r.model, [items[i] for i in batch], ("mismatch",), r.classes, o.dtype)
        z0 = (s.logps[:, 0] - ref[batch, -1]).mean(0).to(device)       # (3,), Eq. 10 by piece
    r.optimizer.zero_grad()
    for k, index in enumerate(micros):
        # processes exchange gradients once per step, after the last micro-batch
        with nullcontext() if k + 1 == len(micros) or size == 1 else r.policy.no_sync():
            rows = index or batch[:1]                  # no rows: run one, with weight 0, for DDP
            b = to_tensors(collate([items[i] for i in rows], loss.branches, r.classes), device)
            b |= {"ref": None if ref is None else ref[rows, :len(loss.branches)].to(device),
                  "mismatch": z0}
            with autocast(device, o.dtype):
                s = score(r.policy, r.model.head, b)
            values, parts = loss.objective(s, o)       # (B,), {name: (B,)}
            # DDP takes the mean over processes, this is to be the mean over rows
            (values[:len(index)].sum() * size / len(batch)).backward()
        parts = {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1)}
        logged.append({k: v.detach()[:len(index)] for k, v in parts.items()})
    norm = float(torch.nn.utils.clip_grad_norm_(r.model.parameters(), o.clip or math.inf))
    rows = {k: torch.cat([x[k] for x in logged]) for k in parts}          # on this process
    sums = sum_over_ranks(torch.stack([v.sum().double() for v in rows.values()]), device)
    sums = dict(zip(rows, sums.tolist()))
    if not math.isfinite(sums["loss"] + norm):
        bad = gather([items[i].row + 1 for i, v in zip(mine, rows["loss"]) if not v.isfinite()])
        raise FloatingPointError("the loss or its gradient is not finite: lower --lr"
                                 + f" (rows {sorted(bad)[:5]} of train.jsonl)" * bool(bad))
    r.optimizer.step()
    return sums, norm


def lr_at(o, step, total):
    """Learning rate at step 0 to total - 1: linear warm-up, then constant or cosine to zero."""
    lr = o.lr * min(1.0, (step + 1) / (o.warmup + 1))
    if o.schedule == "cosine":
        done = max(0, step - o.warmup) / max(1, total - o.warmup)
        lr *= 0.5 * (1 + math.cos(math.pi * done))
    return lr


# ---------------------------------------------------------------------------------------------
# The run

def train(o, wait=0):
    """Train from the first or the last saved step to the end, and return the Run. wait: how many
    seconds to wait if another process is using OUT."""
    can_resume(o)                      # if OUT is in use, say so before minutes of other work
    r = Run(o)
    with lock(r.out, wait):
        if on_first_rank(lambda: can_resume(o)):
            r.load_state()
        else:
            r.begin()
        if not r.lines:                # also if a run was killed before its first evaluation
            r.log(init=fingerprint(r.model), eval=evaluate(r))
        loop(r)
        r.save_weights("last")
    return r


def loop(r):
    o, items, batches, clock = r.o, r.items["train"], None, time.time()
    lengths = [cost(i, r.loss.branches) for i in items]
    per_epoch = math.ceil(len(items) / o.batch_size)
    total = max(1, round(o.epochs * per_epoch))
    every = max(1, o.eval_every // o.batch_size) if o.eval_every else total
    say(f"{o.out}: {o.loss}, {len(items)} rows, {total} steps of {o.batch_size}, "
        f"{sum(p.numel() for p in r.model.parameters()):,} parameters, {o.device}, {o.dtype}")
    with stop_signals() as stop, progress(total=total, initial=r.step, desc=o.loss, unit="step",
                                          disable=rank_and_size()[0] > 0) as bar:
        while r.step < total:
            # 1) rows and learning rate: pure functions of the step, so that --resume can continue
            epoch, i = divmod(r.step, per_epoch)
            if i == 0 or not batches:
                batches = epoch_batches(lengths, o.batch_size, o.seed, epoch)    # lists of rows
            lr = lr_at(o, r.step, total)
            r.optimizer.param_groups[0]["lr"] = lr

            # 2) forward, backward, update
            sums, norm = train_step(r, batches[i])
            r.step += 1
            r.rows += len(batches[i])
            r.sums = {k: r.sums.get(k, 0) + v for k, v in sums.items()}
            bar.update()

            # 3) log the mean over the rows since the last logged line
            if r.step % o.log_every == 0 or r.step == total:
                means = {k: v / r.rows for k, v in r.sums.items()}
                r.log(examples=r.step * o.batch_size, epoch=round(r.step / per_epoch, 4), lr=lr,
                      grad_norm=norm, seconds=round(time.time() - clock, 2), **means)
                bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
                r.sums, r.rows, clock = {}, 0, time.time()

            # 4) evaluate, keep the best weights, save the state
            if r.step % every == 0 or r.step == total:
                metrics = evaluate(r)
                r.log(eval=metrics)
                if r.best is None or metrics[o.select] < r.best:
                    r.best = metrics[o.select]
                    r.save_weights("best")
                r.save_state()

            # 5) stop if any process was asked to
            if sum_over_ranks(torch.tensor(len(stop)), r.model.head.device):
                r.save_state()
                say(f"stopped and saved at step {r.step}; to continue, add --resume to the command")
                sys.exit(130)


# =============================================================================================
# Plumbing: metrics of the eval split, processes, a run's folder, its report

def jsd(p, q):
    """Jensen-Shannon distance between distributions along the last axis: the square root of the
    divergence in nats, in float64, after normalising both. From 0 to sqrt(log 2) = 0.8326."""
    p, q = (torch.from_numpy(np.asarray(x, np.float64)) for x in (p, q))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    m = ((p + q) / 2).clamp(min=1e-300)                # for classes with no share in either
    divergence = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1) / 2
    return divergence.clamp(min=0).sqrt().numpy()      # rounding may take it below 0


def belief_metrics(s):
    """{name: (B,)}: JSD of the model's class shares to the group's, and its mass on the classes."""
    q = s.class_logps.double().exp().numpy()
    if not (np.isfinite(q).all() and q.sum(-1).all()):
        raise FloatingPointError("the model's class probabilities are 0 or NaN: its training "
                                 "diverged; train again with a lower --lr")
    return {"jsd": jsd(q, s.target.numpy()), "class_mass": q.sum(-1)}


def margins(s, items, beta):
    """Reward margins {name: (B,)} in nats, NaN on rows of another kind. "joint": each answer after
    its own belief, as in DPO. "given": both answers after the accepted belief, as in GDPO."""
    joint, given = logratios(s, ANSWER), logratios(s, [RESPONSE])
    both = {"joint": margin(joint[:, 0], joint[:, 1], beta),
            "given": margin(given[:, 0], given[:, 2], beta)}
    kinds = np.array([i.kind for i in items])
    return {f"{name}_{kind}": np.where(kinds == kind, values.double().numpy(), np.nan)
            for name, values in both.items() for kind in ("majority", "minority", "other")}


def evaluate(r):
    """Means over the eval split {name: value}: the loss and its parts, JSD, class mass, margins."""
    items, branches, loss = r.items["eval"], r.branches["eval"], r.loss
    s = score_rows(r.model, items, branches, r.classes, r.o.dtype, "evaluating")
    s.ref = r.ref.get("eval")
    if loss.mismatch:
        s.mismatch = (s.logps - s.ref)[:, -1].mean(0)  # (3,), as z0 in train_step
    at = [branches.index(b) for b in loss.branches]
    ref = None if s.ref is None else s.ref[:, at]
    trained = replace(s, logps=s.logps[:, at], counts=s.counts[:, at], ref=ref)
    values, parts = loss.objective(trained, r.o)
    rows = {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1), **belief_metrics(s)}
    if s.ref is not None:
        rows |= margins(s, items, r.o.beta)
    rows = {k: np.asarray(v, np.float64) for k, v in rows.items()}
    rows = {k: v[~np.isnan(v)] for k, v in rows.items()}
    return {k: float(v.mean()) if len(v) else None for k, v in rows.items()}


# ---------------------------------------------------------------------------------------------
# Under torchrun, every process runs this file and takes its share of each batch

def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def setup(device):
    """Join the process group under torchrun; returns this process's torch.device."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        # a long timeout, because the others wait while one process downloads a model
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=3))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
    return torch.device(device)


def leave():
    """Leave together and skip Python's teardown: torch's background threads sometimes abort it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def sum_over_ranks(values, device):
    """Sum a tensor over the processes, on all of them. A single process does not sync its GPU."""
    if dist.is_initialized():
        values = values.to(device)
        dist.all_reduce(values)
    return values


def gather(values):
    """Concatenate the lists of all processes, on every process."""
    everyone = [values] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, values)
    return sum(everyone, [])


def on_first_rank(action):
    """Run action() on rank 0 while the others wait; all get its result, or raise its error."""
    result = None
    if rank_and_size()[0] == 0:
        try:
            result = action()
        except (ValueError, OSError) as e:
            result = ValueError(str(e))
    result = gather([result])[0]
    if isinstance(result, ValueError):
        raise result
    return result


def say(*words):
    if rank_and_size()[0] == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stderr)


def device_of(name):
    """"auto", "cpu" or "cuda" -> "cpu" or "cuda". ValueError if torch cannot use the device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use; give --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def to_tensors(batch, device):
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()}


@contextmanager
def lock(folder, wait=0):
    """Make `folder` and lock it against other runs until the block ends or this process dies:
    sqlite's file lock does that on every platform. wait: seconds before giving up."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock" if rank_and_size()[0] == 0 else ":memory:"     # rank 0 holds it for all
    give_up = time.time() + wait
    while True:                        # sqlite's own waiting would ignore Ctrl-C
        try:
            connection = sqlite3.connect(file, timeout=0)
            connection.execute("BEGIN EXCLUSIVE")
            break
        except sqlite3.OperationalError as e:
            if time.time() >= give_up:
                raise ValueError(f"another process is using {folder}, or it is not writable ({e}): "
                                 "wait, or set another --out") from None
            time.sleep(1)
    with closing(connection):
        yield


@contextmanager
def stop_signals():
    """Yield a list that the first Ctrl-C or SIGTERM appends to. A second one exits at once."""
    asked = []
    ask = lambda *_: sys.exit(130) if asked else asked.append(1)
    old = {sig: signal.signal(sig, ask) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for sig, handler in old.items():
            signal.signal(sig, handler)


# ---------------------------------------------------------------------------------------------
# Where a run starts, its folder, its report

def resolve(o):
    """Replace None, "" and auto with real values. ValueError for an impossible value."""
    if o.loss not in LOSSES:
        raise ValueError(f"--loss {o.loss!r} is unknown: choose from {', '.join(LOSSES)}")
    if 0 in (o.batch_size, o.log_every):
        raise ValueError("--batch_size and --log_every must be more than 0")
    if not 0 < o.prior < 1:
        raise ValueError("--prior must be between 0 and 1")
    if o.init and o.model == "scratch":                # from a run, or from a plain checkpoint
        made = Path(o.init).parent / "config.json"
        o.model = read_json(made).get("model", o.init) if made.is_file() else o.init
    column = 2 * (o.model != "scratch") + LOSSES[o.loss].reference
    for name, values in PRESETS.items():
        if getattr(o, name) is None:
            setattr(o, name, values[column])
    o.device = device_of(o.device)
    o.dtype = {"auto": "bfloat16" if o.device == "cuda" else "float32"}.get(o.dtype, o.dtype)
    o.data, o.model = o.data.rstrip("/"), o.model.rstrip("/")
    o.out = o.out or run_folder(o, o.loss)
    return o


def run_folder(o, loss):
    parts = [dataset_name(o.data), "" if o.model == "scratch" else Path(o.model).name, loss]
    return f"out/{'-'.join(filter(None, parts))}-seed{o.seed}"


# May change on --resume
MACHINE = ("device", "micro_batch", "log_every", "compile", "checkpointing", "shard_optimizer")
# A run must share these with the SFT run that it starts from
SHARED = ("data", "form", "model", "seed", "max_length", "overlong", "n_layer", "n_head", "n_embd",
          "vocab_size")


class Run:
    """All that the loop works on. state.pt holds STATE, the model and the optimizer."""
    STATE = ("ref", "step", "best", "sums", "rows", "lines")

    def __init__(self, o):
        self.o, self.out, self.loss = o, Path(o.out), LOSSES[o.loss]
        device = setup(o.device)
        if "data/toy" in o.data.split(","):            # the shipped world, made if it is missing
            make_toy()
        meta, rows = load_dataset(o.data, ("train", "eval"), o.form)
        o.form = meta["form"]          # saved with the run, so that it no longer needs meta.json
        # for check_same: rows, or what their classes mean, must not change under a run
        o.hash_of_rows = hashlib.sha256(repr((meta["classes"], rows)).encode()).hexdigest()[:16]
        if self.loss.reference and not o.init:
            o.init = f"{sft_run(o)}/best"
        if o.init or o.model != "scratch":
            self.model, self.tokenizer = load_checkpoint(o.init or o.model, device)
        else:
            self.model, self.tokenizer = scratch(o, rows["train"], device)
        self.model.checkpointing = o.checkpointing
        limit = min(o.max_length or self.model.cfg.n_ctx, self.model.cfg.n_ctx)
        self.items = {split: encode_rows(rows[split], self.tokenizer, meta, limit, o.overlong,
                                         f"{o.data}/{split}.jsonl") for split in rows}
        self.branches = {"train": self.loss.branches,
                         "eval": tuple(dict.fromkeys(EVAL_BRANCHES + self.loss.branches))}
        if self.loss.mismatch:
            for split, items in self.items.items():
                self.branches[split] += ("mismatch",)
                mismatch(items, limit, o.seed)
        self.classes = class_ids(self.tokenizer, meta["classes"])
        self.optimizer = optimizer_of(o, self.model)
        self.policy = torch.compile(self.model, dynamic=True) if o.compile else self.model
        if dist.is_initialized():
            self.policy = DDP(self.policy, gradient_as_bucket_view=True)
        self.ref = {}                                  # {split: logps (B, S, 3) of the reference}
        self.step, self.best = 0, None                 # steps done; lowest --select metric
        self.sums, self.rows = {}, 0                   # since the last logged line
        self.lines = []                                # those of metrics.jsonl

    def begin(self):
        """Empty OUT, compute the reference's log-probs and save the first state."""
        if rank_and_size()[0] == 0:
            for name in ("state.pt", "metrics.jsonl", "best", "last", "eval.json", "samples.jsonl"):
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            write(self.out / "config.json", json.dumps(vars(self.o), indent=1) + "\n")
        if self.loss.reference:        # the policy is still the reference
            self.ref = {split: score_rows(self.model, items, self.branches[split], self.classes,
                                          self.o.dtype, f"reference, {split}").logps
                        for split, items in self.items.items()}
        self.save_state()

    def log(self, **values):
        self.lines.append({"step": self.step, **values})
        if rank_and_size()[0] == 0:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(self.lines[-1]) + "\n")

    def save_weights(self, name):
        if rank_and_size()[0] == 0:
            self.tokenizer.save(self.out / name)
            save_model(self.model, self.out / name, self.tokenizer.eos)

    def save_state(self):
        """Save all that --resume needs, replacing it in one rename."""
        if hasattr(self.optimizer, "consolidate_state_dict"):     # if sharded: collect on rank 0
            self.optimizer.consolidate_state_dict()
        if rank_and_size()[0] == 0:
            state = {k: getattr(self, k).state_dict() for k in ("model", "optimizer")}
            with replacing(self.out / "state.pt") as temporary:
                torch.save(state | {k: getattr(self, k) for k in self.STATE}, temporary)

    def load_state(self):
        """Restore state.pt, and metrics.jsonl as it was then."""
        own = {*MACHINE, "out", "resume", "overwrite"}
        check_same(self.out, self.o, vars(self.o).keys() - own)
        path = self.out / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=os.name != "nt")   # Windows cannot replace a mapped file
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            vars(self).update({k: state[k] for k in self.STATE})
        except Exception as e:                         # which one depends on the damage
            raise ValueError(f"{path} is damaged or of another version ({type(e).__name__}): "
                             "restore it, or start again with --overwrite") from None
        if rank_and_size()[0] == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write(self.out / "metrics.jsonl", text)
        say(f"{self.out}: resumed at step {self.step}")


def can_resume(o):
    """True if OUT holds a state to resume, False if it holds no run: one that ended before its
    first state leaves config.json at most. ValueError if a new run would destroy what it holds, or
    could not write there."""
    out = Path(o.out).absolute()
    folder = next(path for path in (out, *out.parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {o.out}: {folder} is not a folder that can be written to")
    held = {path.name for path in out.glob("[!.]*")
            if not path.name.startswith(("config.json", "state.pt.tmp"))}
    if o.resume and "state.pt" in held:
        return True
    if held and not o.overwrite:
        raise ValueError(f"{o.out} is in use ({', '.join(sorted(held)[:4])}): --resume continues "
                         "from its state.pt, --overwrite discards it, --out sets another folder")
    return False


def check_same(out, o, names):
    """Raise ValueError if the run in `out` has different flags or rows."""
    old, new = read_json(Path(out, "config.json")), vars(o)
    other = [f"{k} {old.get(k)} (here: {new[k]})" for k in names if old.get(k) != new[k]]
    if other:
        raise ValueError(f"the run in {out} differs from this one: {', '.join(sorted(other))}; "
                         "use the same flags and rows, or move that run away")


def make_toy():
    with lock(Path("data"), wait=600):
        import synth
        on_first_rank(lambda: Path("data/toy").exists() or synth.toy(synth.Toy(out="data/toy")))


def sft_run(o):
    """Return the folder of the SFT run that o starts from, which is trained if it is missing."""
    out = run_folder(o, "sft")
    if not on_first_rank(lambda: Path(out, "last").is_dir()):
        say(f"no finished SFT run in {out}: training SFT first, with SFT's own defaults (the "
            f"--epochs, --lr and so on given here are for {o.loss})")
        given = {k: getattr(o, k) for k in (*SHARED, *MACHINE, "dtype")}
        # if another process is training it right now, wait until it is done
        train(resolve(Config(loss="sft", resume=True, out=out, **given)), wait=7 * 86400)
    check_same(out, o, (*SHARED, "hash_of_rows"))
    return out


def scratch(o, rows, device):
    """Make a small GPT-2 with random weights and a BPE learned from rows: (model, tokenizer)."""
    texts = [t for r in rows for t in (prompt_text(r, o.form), r["accept_response"],
                                       r["reject_response"], *(f"<{c}>" for c in r["options"]))]
    tokenizer = train_bpe(texts, o.vocab_size)
    cfg = GPTConfig(tokenizer.n_tokens, o.max_length or 256, o.n_layer, o.n_head, o.n_embd,
                    4 * o.n_embd)
    return GPT(cfg).init_weights(o.seed).to(device), tokenizer


def load_checkpoint(name, device):
    """Load (model, tokenizer) from a checkpoint folder or hub name, which rank 0 fetches first."""
    folder = on_first_rank(lambda: str(find_checkpoint(str(name))))
    model, tokenizer = load_model(folder, device), Tokenizer.load(folder)
    if tokenizer.n_tokens > model.cfg.vocab_size:
        raise ValueError(f"{name}: the tokenizer has {tokenizer.n_tokens} tokens, but the "
                         f"model's embedding has {model.cfg.vocab_size} rows")
    return model, tokenizer


def optimizer_of(o, model):
    kind, options = torch.optim.RMSprop, {}
    if o.optimizer == "adamw":
        kind, options = torch.optim.AdamW, {"betas": (0.9, 0.99), "weight_decay": 0.01}
    if o.shard_optimizer and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer   # here: slow to import
        return ZeroRedundancyOptimizer(model.parameters(), kind, lr=o.lr, **options)
    return kind(model.parameters(), lr=o.lr, **options)


def report(r):
    """Print the metrics that the method trains, before and after, and one question's shares."""
    item, decode = r.items["eval"][0], r.tokenizer.decode
    s = score_rows(r.model, [item], ("chosen",), r.classes, r.o.dtype)    # on all processes
    if rank_and_size()[0] > 0:
        return
    evals = [line["eval"] for line in r.lines if "eval" in line]
    kind = "given" if "given" in r.loss.branches else "joint"
    of = {"given": "the answer given the belief", "joint": "belief and answer"}[kind]
    print(f"\n{r.o.loss} on {r.o.data}, eval split{'before':>44}{'after':>9}")
    for name, text in (("jsd", "JSD to the group's shares (0 to 0.833, lower is better)"),
                       (f"{kind}_majority", f"margin of {of}, majority"),
                       (f"{kind}_minority", f"margin of {of}, minority")):
        if evals[-1].get(name) is not None:
            print(f"  {text:58}{evals[0][name]:9.3f}{evals[-1][name]:9.3f}")
    print(f"\nFor example, the shares of the classes: {decode(item.prompt):.500}")
    print(" " * 10 + "".join(f"{decode([c]):>7}" for c in r.classes))
    for name, shares in (("group", s.target), ("model", s.class_logps.softmax(-1))):
        print(f"  {name:8}" + "".join(f"{p:7.2f}" for p in shares[0].tolist()))
    print(f"\nnext: python evaluate.py {r.o.out}, or ask it: --ask \"YOUR QUESTION\"")


def main():
    r = train(resolve(Config(**vars(flags().parse_args()))))
    report(r)
    leave()


if __name__ == "__main__":
    run(main)
