"""Train with any loss of losses.py, from one CPU to many GPUs.

    python train.py --loss gdpo                         # the shipped world, minutes on a laptop
    torchrun --nproc_per_node=4 train.py --loss gdpo    # the same run, four processes

Fourth in reading order. A run: rows -> items; the reference's log-probs, once, from the policy as
it is before the first step (one model serves both); then steps of warm-up, accumulate, clip, step,
log, with evaluation and checkpoints between. Losses other than SFT start from an SFT checkpoint,
which is trained first if it is not there.

OUT holds config.json (the flags), metrics.jsonl (a JSON object per logged step), best/ and last/
(checkpoint folders), state.pt (all that --resume needs) and reference.pt.

Left out on purpose: a resident reference model, dropout, float16.
"""
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from data import (EVAL_BRANCHES, Parser, Tokenizer, add_flags, alone, check_ranges, class_ids,
                  collate, cost, dataset_name, encode_rows, epoch_batches, find_checkpoint,
                  find_dataset, help_first, load_dataset, mismatch, progress, prompt_text,
                  read_json, run, train_bpe, write)


@dataclass
class Config:
    loss: str = "gdpo"            # which method: see LOSSES in losses.py
    pref: str = "dpo"             # GDPO's preference term: see PREFS in losses.py
    data: str = "data/toy"        # dataset: folder or hub name; several, with commas, are mixed
    form: str = ""                # of the prompt, "<G>{group}<Q>{prompt}<A>" say; empty: the data's
    model: str = "scratch"        # what SFT starts from: scratch (a small GPT-2), folder, hub name
    init: str = ""                # what the others start from; empty: the SFT run, made if missing
    out: str = ""                 # run folder; empty: out/DATA-LOSS-seedN
    seed: int = 0                 # of initialisation and order
    epochs: float = -1.0          # passes over the training rows; -1, here and below: by PRESETS
    batch_size: int = -1          # rows a step, over all processes
    micro_batch: int = 0          # rows a forward pass of one process; 0: all of its share
    lr: float = -1.0              # peak learning rate
    warmup: int = -1              # steps of linear warm-up
    schedule: str = ""            # after warm-up: constant or cosine (to zero)
    optimizer: str = ""           # rmsprop or adamw
    clip: float = 10.0            # largest gradient norm
    beta: float = -1.0            # strength of the reference
    label_smoothing: float = 0.0  # DPO: how likely a label is the wrong way round
    gamma: float = 0.5            # SimPO: the margin it asks for
    lambda_d: float = 1.0         # KTO: weight of desirable answers
    lambda_u: float = 1.0         # KTO: weight of undesirable answers
    w_kl: float = 1.0             # weight of GDPO's KL term
    w_belief: float = 1.0         # weight of GDPO's belief likelihood
    w_pref: float = 1.0           # weight of GDPO's preference term
    w_anchor: float = 0.0         # weight of the accepted response's likelihood in GDPO
    eval_every: int = -1          # examples between evaluations
    select: str = "jsd"           # eval metric (lower is better) that picks OUT/best: jsd or loss
    max_length: int = 0           # longest row in tokens; 0: the model's context
    overlong: str = "error"       # longer rows: error, drop or trim
    n_layer: int = 2              # scratch: layers
    n_head: int = 4               # scratch: heads
    n_embd: int = 96              # scratch: channels
    vocab_size: int = 1024        # scratch: tokens learned from the training rows
    device: str = "auto"          # auto, cpu or cuda
    dtype: str = "auto"           # autocast: float32 or bfloat16; auto: bfloat16 on GPUs
    compile: bool = False         # torch.compile the model
    checkpointing: bool = False   # keep one activation a layer, run the layers again in backward
    shard_optimizer: bool = False  # each process keeps its share of the optimizer's state alone
    save_dtype: str = "float32"   # of the weights in OUT/best and OUT/last: float32 or bfloat16
    dry_run: bool = False         # print the memory that the run would take, and stop
    log_every: int = 10           # steps between lines of metrics.jsonl
    resume: bool = False          # go on with the run in OUT
    overwrite: bool = False       # throw away the run in OUT


def flags():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser, Config)
    return parser


help_first(__name__, flags)                            # before torch, which takes a second

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import synth
from evaluate import (VOLATILE, autocast, device_of, eval_metrics, gather, jsd, leave, load_torch,
                      on_first_rank, rank_and_size, reference_distributions, score_rows, setup,
                      to_tensors)
from losses import CHUNK, LOSSES, PREFS, score
from model import GPT, GPTConfig, fingerprint, load_model, read_config, save_model

# What -1 and "" stand for. The checkpoints' rows are the paper's Appendix G (eval and clip from the
# authors' code); the shipped world's were found by trying (README).
PRESETS = {
    ("scratch", "sft"): dict(epochs=10.0, batch_size=64, lr=4e-3, warmup=20, schedule="cosine",
                             optimizer="adamw", beta=0.1, eval_every=8000),
    ("scratch", "preference"): dict(epochs=2.0, batch_size=32, lr=4e-4, warmup=10,
                                    schedule="cosine", optimizer="rmsprop", beta=1.0,
                                    eval_every=1600),
    ("checkpoint", "sft"): dict(epochs=40.0, batch_size=128, lr=5e-7, warmup=150,
                                schedule="constant", optimizer="rmsprop", beta=0.1,
                                eval_every=10000),
    ("checkpoint", "preference"): dict(epochs=20.0, batch_size=32, lr=5e-7, warmup=150,
                                       schedule="constant", optimizer="rmsprop", beta=0.1,
                                       eval_every=10000),
}
CHOICES = {"schedule": ["constant", "cosine"], "optimizer": ["rmsprop", "adamw"],
           "select": ["jsd", "loss"], "overlong": ["error", "drop", "trim"],
           "dtype": ["float32", "bfloat16"],
           "save_dtype": ["float32", "bfloat16"]}

TINY, HUGE = 1e-12, 1 << 40
RANGES = {"seed": (0, HUGE), "epochs": (TINY, 1e6), "batch_size": (1, HUGE), "lr": (TINY, 1e3),
          "micro_batch": (0, HUGE), "warmup": (0, HUGE), "clip": (TINY, 1e12), "beta": (TINY, 1e6),
          "label_smoothing": (0, 0.5), "gamma": (0, 1e6), "lambda_d": (0, 1e6),
          "lambda_u": (0, 1e6), "w_kl": (0, 1e6), "w_belief": (0, 1e6), "w_pref": (0, 1e6),
          "w_anchor": (0, 1e6),
          "eval_every": (1, HUGE),
          "max_length": (0, 1 << 20), "n_layer": (1, 256), "n_head": (1, 256),
          "n_embd": (1, 1 << 15), "vocab_size": (258, 1 << 18), "log_every": (1, HUGE)}


def resolve(o):
    """Fill in what -1, "" and auto stand for; ValueError for a value that cannot be."""
    for name, value, known in (("loss", o.loss, LOSSES), ("pref", o.pref, PREFS)):
        if value not in known:
            raise ValueError(f"--{name} {value!r} is unknown; there is: {', '.join(known)}")
    inside = o.loss.removeprefix("gdpo-")
    if o.pref != "dpo" and o.loss != "gdpo" and inside != o.pref:
        raise ValueError(f"--pref {o.pref} is for --loss gdpo, not {o.loss}")
    if o.loss == "gdpo" and o.pref != "dpo":           # two ways to say the same
        o.loss = f"gdpo-{o.pref}"
    elif o.loss != inside in PREFS:
        o.pref = inside
    if o.init and not LOSSES[o.loss].reference:
        raise ValueError(f"--loss {o.loss} does not start from an SFT checkpoint: say --model "
                         f"{o.init}, not --init")
    if o.init and o.model == "scratch":                # a run's weights, or a checkpoint as it is
        made = Path(o.init).parent / "config.json"
        o.model = read_json(made).get("model", o.init) if made.is_file() else o.init
    kind = ("scratch" if o.model == "scratch" else "checkpoint",
            "preference" if LOSSES[o.loss].reference else "sft")
    for name, value in PRESETS[kind].items():
        if getattr(o, name) in (-1, ""):
            setattr(o, name, value)
    o.device, o.model = device_of(o.device), o.model.rstrip("/")
    o.data = ",".join(name and str(Path(name)) for name in o.data.split(","))
    if o.dtype == "auto":
        o.dtype = "bfloat16" if o.device == "cuda" else "float32"
    if o.dtype in ("float16", "fp16", "half"):
        raise ValueError("--dtype float16 overflows in the losses: use bfloat16 or float32")
    for name, allowed in CHOICES.items():
        if getattr(o, name) not in allowed:
            raise ValueError(f"--{name} {getattr(o, name)!r} is unknown; there is: "
                             f"{', '.join(allowed)}")
    check_ranges(o, **RANGES)
    if o.resume and o.overwrite:
        raise ValueError("--resume goes on with the run, --overwrite throws it away: say one")
    o.out = o.out or run_folder(o, o.loss)
    return o


def run_folder(o, loss):
    parts = [dataset_name(o.data), "" if o.model == "scratch" else Path(o.model).name, loss]
    return f"out/{'-'.join(filter(None, parts))}-seed{o.seed}"


# ---------------------------------------------------------------------------------------------
# Processes

def sum_over_ranks(values, device):
    """Sum of a list of numbers over the processes."""
    if not dist.is_initialized():
        return values                                  # a GPU need not be waited for
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def say(*words):
    if rank_and_size()[0] == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# What a run starts from

def prepare_data(o):
    """Make the shipped world, fetch a published set where it is missing; (meta, {split: rows})."""
    if "data/toy" in o.data.split(","):
        on_first_rank(make_toy)
    on_first_rank(lambda: [str(find_dataset(name)) for name in o.data.split(",")])
    meta, rows = load_dataset(o.data, ("train", "eval"), o.form)
    o.form = meta["form"]                              # the run's own, whatever becomes of the data
    return meta, rows


def make_toy():
    with alone(Path("data/.lock")):
        if not Path("data/toy").exists():
            synth.toy(synth.Toy(out="data/toy"))


SHARED = ("data", "form", "model", "seed", "max_length", "overlong", "n_layer", "n_head", "n_embd",
          "vocab_size")                                # flags that a run has in common with its SFT


def train_sft_first(o):
    """The SFT checkpoint that o starts from: the run beside it, trained or finished if need be."""
    folder = run_folder(o, "sft")
    with alone(Path(folder, ".first")) if rank_and_size()[0] == 0 else nullcontext():
        if not on_first_rank(lambda: Path(folder, "last").is_dir()):
            say(f"no SFT checkpoint in {folder}: training SFT first")
            keep = {k: getattr(o, k) for k in (*SHARED, "micro_batch", "device", "dtype", "compile",
                                               "checkpointing", "shard_optimizer", "save_dtype",
                                               "log_every")}
            train(resolve(Config(loss="sft", resume=True, out=folder, **keep)))
    sft = read_json(Path(folder) / "config.json")
    other = [f"--{k} {sft.get(k)} (here: {getattr(o, k)})" for k in SHARED
             if sft.get(k) != getattr(o, k)]
    if other:
        raise ValueError(f"the SFT run in {folder} is another one: {', '.join(other)}; say --init "
                         "with the checkpoint to start from, or move that run away")
    return f"{folder}/best"


def start_model(o, rows, form, device):
    """(model, tokenizer) that the run starts from: a checkpoint, or a fresh small one."""
    name = o.init if LOSSES[o.loss].reference else o.model
    if name != "scratch":
        folder = on_first_rank(lambda: str(find_checkpoint(name)))
        return load_model(folder, device), Tokenizer.load(folder)
    texts = [t for r in rows for t in (prompt_text(r, form), r["accept_response"],
                                       r["reject_response"], *(f"<{c}>" for c in r["options"]))]
    tokenizer = train_bpe(texts, o.vocab_size)
    return GPT(scratch_config(o, tokenizer.n_tokens)).init_weights(o.seed).to(device), tokenizer


def scratch_config(o, vocab_size):
    return GPTConfig(vocab_size, o.max_length or 256, o.n_layer, o.n_head, o.n_embd, 4 * o.n_embd)


def optimizer_of(o, model):
    kind, options = torch.optim.RMSprop, {"lr": o.lr}
    if o.optimizer == "adamw":
        kind, options = torch.optim.AdamW, options | {"betas": (0.9, 0.99), "weight_decay": 0.01}
    if not o.shard_optimizer or not dist.is_initialized():
        return kind(model.parameters(), **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer   # here: slow to import
    for p in model.parameters():                       # it sends them: no transposed views
        p.data = p.data.contiguous()
    return ZeroRedundancyOptimizer(model.parameters(), kind, **options)


def lr_at(o, step, total):
    """Learning rate of a step, 0 to total - 1: linear warm-up, then constant or cosine to zero."""
    warm = min(1.0, (step + 1) / (o.warmup + 1))
    if o.schedule == "constant":
        return o.lr * warm
    done = max(0, step - o.warmup) / max(1, total - o.warmup)
    return o.lr * warm * 0.5 * (1 + math.cos(math.pi * done))


class Schedule:
    """Which rows a step takes: a pure function of the seed, so that a resumed run goes on in the
    very order, on any number of processes."""
    def __init__(self, o, items, branches):
        self.o, self.lengths = o, [cost(i, branches) for i in items]
        self.per_epoch = math.ceil(len(items) / o.batch_size)
        self.total = max(1, round(o.epochs * self.per_epoch))
        self.epoch, self.batches = -1, []

    def batch(self, step):
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = epoch_batches(self.lengths, self.o.batch_size, self.o.seed, epoch)
        return self.batches[i]


# ---------------------------------------------------------------------------------------------
# One step

def train_step(model, raw, optimizer, loss, items, ref, batch, classes, o):
    """Forward, backward and update on the rows `batch` (indices into items); returns the sums of
    loss and parts over the rows of all processes, and the gradient's norm. The loss is the mean
    over all rows of the batch, in whatever micro-batches and processes they are.

    model: raw, or raw in DDP. A non-finite loss raises FloatingPointError before the update."""
    rank, size = rank_and_size()
    device, mine = raw.head.device, batch[rank::size]
    n = o.micro_batch or len(mine) or 1
    micros = [mine[i:i + n] for i in range(0, len(mine), n)] or [[]]
    sums, losses = {}, []
    between = None if not loss.mismatch else mismatched_logratio(
        raw, [items[i] for i in batch], ref[batch, -1], classes, o.dtype).to(device)
    optimizer.zero_grad(set_to_none=True)
    for k, index in enumerate(micros):
        last = k + 1 == len(micros)
        with nullcontext() if last or size == 1 else model.no_sync():
            rows = index or batch[:1]                  # a process without rows still has to join in
            b = to_tensors(collate([items[i] for i in rows], loss.branches, classes), device)
            with autocast(device, o.dtype):
                s = score(model, raw.head, b)
            s.ref = None if ref is None else ref[rows, :len(loss.branches)].to(device)
            s.mismatch = between
            values, parts = loss.objective(s, o)
            # DDP takes the mean over processes, this is to be the mean over rows
            (values[:len(index)].sum() * size / len(batch)).backward()
        losses.append(values.detach()[:len(index)])
        for name, v in {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1)}.items():
            sums[name] = sums.get(name, 0) + v.detach()[:len(index)].sum()
    norm = float(torch.nn.utils.clip_grad_norm_(raw.parameters(), o.clip))
    bad = [items[i].row + 1 for i, v in zip(mine, torch.cat(losses).tolist())
           if not math.isfinite(v)]
    *totals, n_bad = sum_over_ranks([*torch.stack([*sums.values()]).tolist(), len(bad)], device)
    if n_bad or not math.isfinite(norm):
        what, rows = ("loss", gather(bad)) if n_bad else (
            "gradient", [items[i].row + 1 for i in batch])
        raise FloatingPointError(
            f"the {what} is not finite on rows {sorted(rows)} of train.jsonl: look at them, or "
            "lower --lr; the weights are those before this step")
    optimizer.step()
    return dict(zip(sums, totals)), norm


def mismatched_logratio(model, items, ref, classes, dtype):
    """Mean log-ratio (3,), by piece, of each item's prompt with another row's answer: before it is
    clamped, KTO's z0 (Eq. 10). Over all items, whatever the ranks and micro-batches; no gradient.
    ref (B, 3): the same pairs' logps under the reference."""
    s = score_rows(model, items, ("mismatch",), classes, dtype)
    return (s.logps[:, 0] - ref).mean(0)


# ---------------------------------------------------------------------------------------------
# A run

class Run:
    """The state of a run and its files. All that --resume needs lies in OUT/state.pt, which is
    replaced in one rename; OUT/best and OUT/last are weights to use."""
    def __init__(self, o, model, tokenizer, optimizer):
        self.o, self.model, self.tokenizer, self.optimizer = o, model, tokenizer, optimizer
        self.out, self.step, self.best = Path(o.out), 0, None
        self.before, self.after = None, None           # eval metrics at step 0, and now
        self.sums, self.rows = {}, 0                   # of the steps since the last logged line
        self.items, self.lock = None, None             # hash of the rows as tokens; OUT/.lock
        self.writes = rank_and_size()[0] == 0

    STATE = ("step", "best", "before", "after", "sums", "rows", "items")

    def save_state(self):
        if hasattr(self.optimizer, "consolidate_state_dict"):     # its shares, on the first rank
            self.optimizer.consolidate_state_dict()
        if self.writes:
            save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                 | {k: getattr(self, k) for k in self.STATE}, self.out / "state.pt")

    def load_state(self):
        s = load_torch(self.out / "state.pt")
        if s["items"] != self.items:
            raise ValueError(f"the rows or the tokenizer are not those that {self.out} began with: "
                             "put them back, or begin again with --overwrite")
        self.model.load_state_dict(s["model"])
        self.optimizer.load_state_dict(s["optimizer"])
        for k in self.STATE:
            setattr(self, k, s[k])
        if self.writes:                                # forget what was logged after that
            lines = (self.out / "metrics.jsonl").read_text().split("\n")[:-1]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            write(self.out / "metrics.jsonl", "".join(line + "\n" for line in kept))
            for half in self.out.rglob("*.tmp"):       # what a kill left half-written
                half.unlink()

    def save_weights(self, name):
        if self.writes:
            self.tokenizer.save(self.out / name)
            save_model(self.model, self.out / name, self.tokenizer.eos,
                       getattr(torch, self.o.save_dtype))

    def log(self, **values):
        if self.writes:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"step": self.step, **values}) + "\n")

    def record(self, metrics):
        """An evaluation: log it, keep the weights if they are the best so far, save the state. The
        untrained start is no candidate for best."""
        self.log(eval=metrics)
        self.before = self.before or metrics
        self.after = metrics
        if self.step and (self.best is None or metrics[self.o.select] < self.best):
            self.best = metrics[self.o.select]
            self.save_weights("best")
        self.save_state()


def save(thing, path):
    temporary = f"{path}.tmp"
    torch.save(thing, temporary)
    os.replace(temporary, path)


def can_resume(o):
    """True if OUT holds a state to go on from. ValueError if it holds a run that this one would
    destroy, or one of other flags."""
    out, config = Path(o.out), dataclasses.asdict(o)
    if o.resume and not out.exists():
        say(f"nothing to go on with in {out}: beginning")
    if (out / "metrics.jsonl").exists() and not (o.overwrite or o.resume):
        raise ValueError(f"{out} holds a run already: --resume to go on with it, --overwrite to "
                         "throw it away, or another --out")
    if not o.resume or not (out / "state.pt").is_file():
        return False
    old = read_json(out / "config.json")
    changed = [f"--{k} {config[k]} (was {old.get(k)})" for k in config
               if k not in VOLATILE and old.get(k) != config[k]]
    if changed:
        raise ValueError("cannot resume with other flags than the run began with: "
                         + ", ".join(changed))
    return True


def claim_folder(r, resumed):
    """Make OUT and keep other processes out of it (the lock goes with this one, however it ends);
    unless the run goes on, clear what an earlier one left there."""
    r.out.mkdir(parents=True, exist_ok=True)
    r.lock = open(r.out / ".lock", "w")
    try:
        fcntl.flock(r.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {r.out}: wait, or say --out") from None
    if resumed:
        return
    for name in ("state.pt", "metrics.jsonl", "reference.pt", "eval.json", "samples.jsonl"):
        (r.out / name).unlink(missing_ok=True)
    for name in ("best", "last"):
        shutil.rmtree(r.out / name, ignore_errors=True)
    write(r.out / "config.json", json.dumps(dataclasses.asdict(r.o), indent=1) + "\n")


def hash_of(items):
    """The hash of all rows as tokens: tells whether a resumed run meets the same."""
    digest = hashlib.sha256()
    for split in items.values():
        for item in split:
            digest.update(repr(item).encode())
    return digest.hexdigest()


def reference_logps(r, items, branches, classes, resumed):
    """Log-probs of the items' branches under the policy before the first step: computed once, kept
    in OUT/reference.pt, for after a resume that policy is gone."""
    path = r.out / "reference.pt"
    if resumed:
        return load_torch(path)
    ref = {name: score_rows(r.model, items[name], branches[name], classes, r.o.dtype,
                            f"reference, {name}").logps for name in items}
    if r.writes:
        save(ref | {"init": fingerprint(r.model)}, path)
    return ref


class StopFlag:
    """Ctrl-C or SIGTERM asks the run to stop after its step; a second one stops it at once."""
    def __init__(self):
        self.asked = 0
        self.old = {sig: signal.signal(sig, self.ask) for sig in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, sig, frame):
        self.asked = 1
        self.release()

    def release(self):
        for sig, handler in self.old.items():
            signal.signal(sig, handler)


def train(o):
    """One run from its first step, or its last saved one, to its end. Returns the Run."""
    device = setup(o.device)
    loss = LOSSES[o.loss]
    meta, rows = prepare_data(o)
    own_sft = loss.reference and not o.init
    if own_sft:
        o.init = train_sft_first(o)
    resumed = on_first_rank(lambda: can_resume(o))
    model, tokenizer = start_model(o, rows["train"], meta["form"], device)
    model.checkpointing = o.checkpointing
    ids = class_ids(tokenizer, meta["classes"])
    limit = min(o.max_length or model.cfg.n_ctx, model.cfg.n_ctx)
    items = {s: encode_rows(rows[s], tokenizer, meta, limit, o.overlong, f"{o.data}/{s}.jsonl")
             for s in rows}
    r = Run(o, model, tokenizer, optimizer_of(o, model))
    r.items = hash_of(items)
    state = Path(o.init).parent / "state.pt"
    if own_sft and state.is_file() and load_torch(state)["items"] != r.items:
        raise ValueError(f"the SFT run in {state.parent} was trained on other rows than {o.data} "
                         "holds now: move it away, and it is trained again")
    branches = {"train": loss.branches, "eval": EVAL_BRANCHES}
    if loss.mismatch:
        for s in items:
            mismatch(items[s], limit, o.seed)
            branches[s] += ("mismatch",)
    on_first_rank(lambda: claim_folder(r, resumed))
    ref = reference_logps(r, items, branches, ids, resumed) if loss.reference else {}
    if resumed:
        r.load_state()
    policy = torch.compile(model, dynamic=True) if o.compile else model
    policy = DDP(policy, gradient_as_bucket_view=True) if dist.is_initialized() else policy
    loop(r, policy, loss, items, ref, ids)
    if r.lock:
        r.lock.close()
    return r


def loop(r, policy, loss, items, ref, classes):
    o, model = r.o, r.model
    schedule = Schedule(o, items["train"], loss.branches)
    every = max(1, o.eval_every // o.batch_size)

    def evaluate():
        s = score_rows(model, items["eval"], EVAL_BRANCHES, classes, o.dtype, "evaluating")
        if ref:
            s.ref = ref["eval"][:, :len(EVAL_BRANCHES)]
        if loss.mismatch:
            s.mismatch = mismatched_logratio(model, items["eval"], ref["eval"][:, -1], classes,
                                             o.dtype)
        r.record(eval_metrics(s, items["eval"], loss, o))

    say(f"{o.out}: {o.loss}, {len(items['train'])} rows, {schedule.total} steps of {o.batch_size}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {o.device}, {o.dtype}"
        + (f", resumed at step {r.step}" if r.step else ""))
    if r.step == 0:
        target = np.array([i.target for i in items["eval"]])
        r.log(reference_jsd={name: float(jsd(q, target).mean())
                             for name, q in reference_distributions(target).items()})
        evaluate()
    stop = StopFlag()
    bar = progress(total=schedule.total, initial=r.step, desc=o.loss, unit="step",
                   disable=not r.writes)
    clock = time.time()
    while r.step < schedule.total:
        batch, lr = schedule.batch(r.step), lr_at(o, r.step, schedule.total)
        for group in r.optimizer.param_groups:
            group["lr"] = lr
        sums, norm = train_step(policy, model, r.optimizer, loss, items["train"], ref.get("train"),
                                batch, classes, o)
        r.step += 1
        bar.update()
        r.sums = {k: r.sums.get(k, 0) + v for k, v in sums.items()}
        r.rows += len(batch)
        done = r.step == schedule.total
        if r.step % o.log_every == 0 or done:
            means = {k: v / r.rows for k, v in r.sums.items()}
            r.log(examples=r.step * o.batch_size, epoch=round(r.step / schedule.per_epoch, 4),
                  lr=lr, grad_norm=norm, seconds=round(time.time() - clock, 2), **means)
            bar.set_postfix(loss=f"{means['loss']:.3f}", jsd=f"{r.after['jsd']:.3f}", refresh=False)
            r.sums, r.rows, clock = {}, 0, time.time()
        if r.step % every == 0 or done:
            evaluate()
        if sum_over_ranks([stop.asked], model.head.device)[0]:
            r.save_state()
            bar.close()
            say(f"stopped and saved at step {r.step}; go on with the same command and --resume")
            sys.exit(130)
    bar.close()
    stop.release()
    r.save_weights("last")


def memory(cfg, o, tokens, processes=1):
    """Bytes that a step holds at its peak, by purpose, for micro-batches of `tokens` tokens, shared
    beginnings counted with each branch: an upper bound."""
    share = processes if o.shard_optimizer else 1
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(cfg).parameters())
    half = 2 if o.dtype == "bfloat16" else 4           # bytes of what autocast computes in
    # Kept for backward, per token of a layer: the float32 inputs of its LayerNorms (one where
    # attention and MLP read the same) and, in `half`, their outputs, q, k, v, the attention's
    # output by sequence and packed (rotary: q, k and that output once more), and the MLP's hidden
    # layer before and after its GELU.
    layer = (4 if cfg.parallel else 8) * cfg.n_embd + half * (
        (9 if cfg.rotary else 7) * cfg.n_embd + 2 * cfg.n_inner)
    last = 4 * cfg.n_embd
    kept = last + (layer + (cfg.n_layer - 1) * last if o.checkpointing else layer * cfg.n_layer)
    chunk = min(tokens, CHUNK) * cfg.vocab_size * (half + 3 * 4)
    return {"weights": 4 * n, "gradients": 4 * n,
            o.optimizer: 4 * n * (1 + (o.optimizer == "adamw")) / share,
            "bf16 copies": 2 * n * (half == 2), "activations": tokens * kept, "logits": chunk,
            "or update": 4 * n / share}                # the optimizer's temporaries, after backward


def dry_run(o):
    """The memory of a run as a table over micro-batches; needs config.json, no weights."""
    name = o.init or o.model
    cfg = scratch_config(o, o.vocab_size) if name == "scratch" else \
        read_config(find_checkpoint(name, weights=False))
    T = min(o.max_length or 512, cfg.n_ctx)
    branches, processes = len(LOSSES[o.loss].branches), int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"{name}, {o.loss}: GB per process at its peak, "
          f"rows of {branches} x {T} tokens (--max_length), "
          f"{o.dtype}, {'with' if o.checkpointing else 'without'} --checkpointing"
          + f", the optimizer shared by {processes} processes" * o.shard_optimizer + "\n")
    for n in (1, 2, 4, 8, 16, 32):
        need = memory(cfg, o, n * branches * T, processes)
        *held, copies, activations, logits, update = need.values()
        peak = sum(held) + max(copies + activations + logits, update)
        if n == 1:
            print("--micro_batch" + "".join(f"{k:>12}" for k in need) + f"{'peak':>8}  fits on")
        print(f"{n:13}" + "".join(f"{v / 1e9:12.2f}" for v in need.values())
              + f"{peak / 1e9:8.2f}  "
              + " ".join(str(card) for card in (24, 48, 80, 141) if peak < 0.94e9 * card))


def table(r):
    """What the run did, in words for its owner."""
    a, b, o = r.before, r.after, r.o
    lines = [f"\n{o.loss} on {o.data}, held-out paraphrases (eval split):",
             f"{'':46}{'before':>9}{'after':>9}"]
    names = {"jsd": "JSD to the group's beliefs (0 to 0.833)",
             "class_mass": "mass on the class tokens"}
    for kind, text in (("joint", "belief and answer"), ("given", "answer given the belief")):
        names |= {f"{kind}_{k}": f"margin of {text}, {k}" for k in ("majority", "minority")}
    for key, text in names.items():
        if a.get(key) is not None:
            lines.append(f"{text:46}{a[key]:9.3f}{b[key]:9.3f}")
    best = f"lowest {o.select} {r.best:.3f}"
    lines += [f"\ncheckpoints: {o.out}/best ({best}), {o.out}/last; log: {o.out}/metrics.jsonl",
              f"next: python evaluate.py {o.out}"]
    return "\n".join(lines)


def main():
    o = resolve(Config(**vars(flags().parse_args())))
    if o.dry_run:
        return dry_run(o)
    try:
        r = train(o)
    except RuntimeError as e:
        if not dist.is_initialized() or not re.search("gloo|nccl|connection", str(e), re.I):
            raise
        sys.exit(f"train.py: error: another process of the run is gone ({str(e).splitlines()[0]}):"
                 " look at its words; the same command with --resume goes on, on any number of "
                 "processes")
    if r.writes:
        print(table(r))
    leave()


if __name__ == "__main__":
    run(main)
