"""Measure runs: how close the model's beliefs are to the group's, and what its answers express.

    python evaluate.py out/toy-gdpo-seed0 [OUT ...]

Fifth in reading order. Prints one table over runs and writes the same numbers, with intervals, to
OUT/eval.json. Metrics as in section 5.1.1 of the paper; all intervals are 95% bootstrap intervals
over survey questions. train.py uses the first half of this file while it trains.

Left out here: BPC by an LLM judge, RS, figures.
"""
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import scipy.special
import scipy.stats
import torch
import torch.distributed as dist

from data import (EVAL_BRANCHES, Parser, SPLITS, Tokenizer, add_flags, check_ranges, class_ids, collate,
                  encode_rows, find_checkpoint, load_dataset, progress, read_json, run, write)
from losses import ANSWER, RESPONSE, Scores, logratios, margin, score
from model import fingerprint, load_model

VOLATILE = ("out", "resume", "overwrite", "device", "micro_batch", "log_every", "compile",
            "checkpointing", "dry_run")                # flags that leave a run what it is
KINDS = ("majority", "minority", "other")


# ---------------------------------------------------------------------------------------------
# Scoring rows with a model (used by train.py too)

def rank_and_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device_of(name):
    """"auto", "cpu" or "cuda" -> the device that is there; ValueError if it is not."""
    if name not in ("auto", "cpu", "cuda") or name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} is not here: say --device cpu, or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def load_torch(path):
    """A file of torch.save, weights alone, on the CPU; ValueError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as e:                             # of many kinds, by how the file is broken
        raise ValueError(f"{path} is damaged ({type(e).__name__}): begin the run again with "
                         "--overwrite") from None


def autocast(device, dtype):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def to_tensors(batch, device):
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()}


@torch.no_grad()
def score_rows(model, items, branches, classes, dtype="float32", desc="scoring", tokens=16384):
    """Scores of all items, in their order, on the CPU: batches of like length, of about `tokens`
    tokens, dealt out over the ranks and gathered; every row once, however uneven the shares."""
    rank, size = rank_and_size()
    device = model.head.device
    lengths = [i.length(branches) for i in items]
    mine = sorted(range(len(items)), key=lambda i: (lengths[i], i))[rank::size]
    parts, start = [], 0
    bar = progress(total=len(mine), desc=desc, unit="row", leave=False, disable=rank > 0, delay=1)
    while start < len(mine):
        stop = start + 1
        while (stop < len(mine)
               and (stop + 1 - start) * len(branches) * lengths[mine[stop]] <= tokens):
            stop += 1
        index = mine[start:stop]
        batch = to_tensors(collate([items[i] for i in index], branches, classes), device)
        with autocast(device, dtype):
            s = score(model(batch["ids"]), model.head, batch)
        parts.append((index, {f.name: getattr(s, f.name).float().cpu() for f in fields(s)
                              if getattr(s, f.name) is not None}))
        bar.update(stop - start)
        start = stop
    bar.close()
    if size > 1:
        everyone = [None] * size
        dist.all_gather_object(everyone, parts)
        parts = sum(everyone, [])
    place = torch.tensor([i for index, _ in parts for i in index]).argsort()
    return Scores(**{k: torch.cat([p[k] for _, p in parts])[place] for k in parts[0][1]})


def jsd(p, q):
    """Jensen-Shannon distance of distributions along the last axis: square root, natural log,
    float64, both normalised to 1; between 0 and sqrt(log 2) = 0.8326."""
    p, q = (np.asarray(x, np.float64) for x in (p, q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    m = (p + q) / 2
    divergence = (scipy.special.rel_entr(p, m) + scipy.special.rel_entr(q, m)).sum(-1) / 2
    return np.sqrt(np.maximum(divergence, 0))          # scipy's own gives NaN where p is nearly q


def belief_metrics(s):
    """JSD of the model's class distribution to the target, and its class mass: {name: (B,)}."""
    q = s.class_logps.double().exp().numpy()
    if not np.isfinite(q).all():
        raise FloatingPointError("the model's log-probs are not finite: its training diverged")
    return {"jsd": jsd(q, s.target.numpy()), "class_mass": q.sum(-1)}


def margin_metrics(s, beta):
    """Reward margins (B,) in nats of the two kinds: "joint", belief and answer together, each with
    its own belief, as DPO trains them; "given", the answer alone after the accepted belief, as GDPO
    does. s has the branches of EVAL_BRANCHES and a reference."""
    joint, given = logratios(s, ANSWER), logratios(s, [RESPONSE])
    return {"joint": margin(joint[:, 0], joint[:, 1], beta).double().numpy(),
            "given": margin(given[:, 0], given[:, 2], beta).double().numpy()}


def by_kind(metrics, items):
    """{name: (B,)} -> {name_majority, name_minority, name_other: (B,)}, NaN where not that kind."""
    kinds = np.array([i.kind for i in items])
    return {f"{name}_{kind}": np.where(kinds == kind, values, np.nan)
            for name, values in metrics.items() for kind in KINDS}


def pick_branches(s, branches):
    """The Scores that a loss with these branches sees, out of Scores over EVAL_BRANCHES."""
    at = [EVAL_BRANCHES.index(b) for b in branches]
    return Scores(s.logps[:, at], s.counts[:, at], s.class_logps, s.target, s.n_options,
                  None if s.ref is None else s.ref[:, at], s.mismatch)


def eval_metrics(s, items, loss, o):
    """Means over the eval split for the log: the loss and its parts, JSD, class mass, margins."""
    values, parts = loss.objective(pick_branches(s, loss.branches), o)
    rows = {"loss": values, **parts, "chosen_logps": s.logps[:, 0].sum(-1)}
    rows = {k: v.double().numpy() for k, v in rows.items()} | belief_metrics(s)
    if s.ref is not None:
        rows |= by_kind(margin_metrics(s, o.beta), items)
    return {k: mean(v) for k, v in rows.items()}


def mean(values):
    """Mean of the entries that are numbers, or None where there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


# ---------------------------------------------------------------------------------------------
# The reference distributions of Figure 4

def reference_distributions(target):
    """name -> (B, K): what a model without training would say. target (B, K) float64."""
    target = np.asarray(target, np.float64)
    B, K = target.shape
    rows, top, bottom = np.arange(B), target.argmax(-1), target.argmin(-1)
    majority = np.zeros_like(target)
    majority[rows, top] = 1
    order, reverse = np.argsort(target, -1, kind="stable"), np.empty_like(target)
    # differs: the authors' code sorts the shares; as in the text, the largest is swapped with the
    # smallest, the second largest with the second smallest, and so on.
    for i in range(K):
        reverse[rows, order[:, i]] = target[rows, order[:, K - 1 - i]]
    out = {"majority": majority, "reverse": reverse, "uniform": np.full_like(target, 1 / K)}
    for level in (0.05, 0.1):
        noisy = target.copy()
        noisy[rows, top] -= level
        noisy[rows, bottom] += level
        out[f"noise({level})"] = noisy
    return out


# ---------------------------------------------------------------------------------------------
# Sampled answers: JSD of samples, CBC, expressed opinion

@torch.no_grad()
def sample_rows(model, items, tokenizer, n_samples, max_new_tokens, seed, dtype, batch=512):
    """n_samples answers to every item's prompt at temperature 1: a list of lists of texts. An
    answer's randomness depends on the seed, its row and its number alone."""
    jobs = [(i, k) for i in range(len(items)) for k in range(n_samples)]
    jobs.sort(key=lambda job: (len(items[job[0]].prompt), job))
    texts = [[None] * n_samples for _ in items]
    bar = progress(total=len(jobs), desc="sampling", unit="answer", leave=False, delay=1)
    for start in range(0, len(jobs), batch):
        part = jobs[start:start + batch]
        with autocast(model.head.device, dtype):
            new = model.generate([items[i].prompt for i, _ in part], max_new_tokens, 1.0,
                                 tokenizer.eos, [(seed, items[i].row, k) for i, k in part],
                                 tokenizer.n_tokens)
        for (i, k), ids in zip(part, new):
            texts[i][k] = tokenizer.decode(ids)
        bar.update(len(part))
    bar.close()
    return texts


def parse_answer(text, meta):
    """(class label, belief text, response) of a sampled answer; None for a part that is not there.
    The belief is one that the dataset knows, or whatever stands before the first `>`."""
    labels = sorted(meta["classes"], key=len, reverse=True)
    label = next((c for c in labels if text.startswith(c)), None)
    rest = text[len(label or ""):]
    known = [t for t in meta.get("belief_to_class") or () if rest.startswith(f"<{t}>")]
    belief = max(known, key=len) if known else (re.match("<(.*?)>", rest, re.S) or [None, None])[1]
    return label, belief, rest if belief is None else rest[len(belief) + 2:]


def sampled_counts(answers, meta):
    """How often each class begins the answers: (B, K). An answer that begins with no class label
    counts for the class off the scale, or for none where there is no such class."""
    classes = meta["classes"]
    counts = np.zeros((len(answers), len(classes)))
    for row, several in enumerate(answers):
        for label, _, _ in several:
            label = label or meta.get("off_scale")
            if label is not None:
                counts[row, classes.index(label)] += 1
    return counts


def class_belief_consistency(answers, meta):
    """CBC of section 5.1.1 (B,): how often the belief's text maps back to the class before it."""
    to_class = meta["belief_to_class"]
    return np.array([np.mean([label is not None and str(to_class.get(belief)) == label
                              for label, belief, _ in several]) for several in answers])


def expressed_opinion(answers, meta):
    """How often the response expresses the class that the model announced (B,), by the rule of the
    templates: the first stance phrase in it is one of that class's. No phrase: not expressed."""
    stances = {phrase.lower(): label for phrase, label in meta["stances"].items()}
    longest = sorted(stances, key=len, reverse=True)
    find = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in longest))

    def expresses(label, response):
        phrase = find.search(response.lower())
        return phrase is not None and stances[phrase[0]] == label
    return np.array([np.mean([expresses(label, response) for label, _, response in several])
                     for several in answers])


def sampling_floor(target, n_samples, draws=64):
    """JSD (B,) that n_samples answers of a perfect model would score: the mean over `draws`
    multinomial draws from the target itself."""
    rng = np.random.default_rng(0)
    p = target / target.sum(-1, keepdims=True)
    return np.mean([jsd(rng.multinomial(n_samples, p), p) for _ in range(draws)], axis=0)


# ---------------------------------------------------------------------------------------------
# A table over runs

@dataclass
class Config:
    split: str = "test"          # which rows: train, eval or test
    checkpoint: str = "best"     # which weights of a run: best or last
    data: str = ""               # dataset, or several; empty: the one the run was trained on
    form: str = ""               # of the prompt; empty: the run's own, or the data's
    samples: int = 8             # answers sampled for each row (the authors' number); 0: none
    max_new_tokens: int = 64     # longest sampled answer
    seed: int = 0                # of the samples
    device: str = "auto"         # auto, cpu or cuda


class Evaluation:
    """What runs on one dataset share: its rows, and the reference's log-probs by checkpoint."""
    def __init__(self, data, form, split):
        self.meta, rows = load_dataset(data, dict.fromkeys(("train", split)), form)
        self.name, self.rows = f"{data}/{split}.jsonl", rows[split]
        self.trained = {str(r.get("question_id") or r["prompt"]) for r in rows["train"]}
        self.references = {}

    def score(self, folder, device, run_config):
        """(items, model, tokenizer, Scores over EVAL_BRANCHES) of a checkpoint."""
        folder = find_checkpoint(str(folder))
        model, tokenizer = load_model(folder, device), Tokenizer.load(folder)
        ids = class_ids(tokenizer, self.meta["classes"])
        limit = min(run_config["max_length"] or model.cfg.n_ctx, model.cfg.n_ctx)
        items = encode_rows(self.rows, tokenizer, self.meta, limit,
                            run_config["overlong"], self.name)
        s = score_rows(model, items, EVAL_BRANCHES, ids, run_config["dtype"])
        return items, model, tokenizer, s

    def measure(self, out, o, run_config, device):
        """{metric: (B,)} of one run, and its items."""
        folder = Path(out) / o.checkpoint if run_config["loss"] else out
        if run_config["loss"] and not folder.is_dir():
            raise FileNotFoundError(f"{out} has no {o.checkpoint}/ yet: finish the run with "
                                    "--resume")
        items, model, tokenizer, s = self.score(folder, device, run_config)
        metrics = belief_metrics(s)
        if run_config["init"]:
            s.ref = self.reference(out, device, run_config)
            metrics |= by_kind(margin_metrics(s, run_config["beta"]), items)
        if o.samples:
            texts = sample_rows(model, items, tokenizer, o.samples, o.max_new_tokens, o.seed,
                                run_config["dtype"])
            answers = [[parse_answer(t, self.meta) for t in several] for several in texts]
            target, counts = s.target.double().numpy(), sampled_counts(answers, self.meta)
            metrics["sampled_jsd"] = jsd(counts + 1e-12, target)
            metrics["sampling_floor"] = sampling_floor(target, o.samples)
            if self.meta.get("belief_to_class"):
                metrics["cbc"] = class_belief_consistency(answers, self.meta)
            if self.meta.get("stances"):
                metrics["opinion"] = expressed_opinion(answers, self.meta)
        return metrics, items

    def reference(self, out, device, run_config):
        """Log-probs under the checkpoint that the run in OUT began with, which must still be it."""
        init = run_config["init"]
        key = (init, run_config["dtype"], run_config["max_length"], run_config["overlong"])
        if key not in self.references:
            _, model, _, s = self.score(init, device, run_config)
            self.references[key] = s.logps, fingerprint(model)
        logps, now = self.references[key]
        if load_torch(Path(out) / "reference.pt")["init"] != now:
            raise ValueError(f"{init} is not any more the checkpoint that {out} began with: train "
                             "the run again, or put that checkpoint back")
        return logps


def interval(values, questions):
    """(mean, low, high): 95% bootstrap interval over questions, each with all its rows."""
    good = ~np.isnan(values)
    if not good.any():
        return None
    _, index = np.unique(np.asarray(questions)[good], return_inverse=True)
    sums, counts = np.bincount(index, values[good]), np.bincount(index)
    ratio = lambda s, c, axis=-1: s.sum(axis) / c.sum(axis)
    if len(sums) < 2:
        return [float(ratio(sums, counts))] * 3
    b = scipy.stats.bootstrap((sums, counts), ratio, paired=True, vectorized=True, n_resamples=2000,
                              method="percentile", random_state=0).confidence_interval
    return [float(ratio(sums, counts)), float(b.low), float(b.high)]


def summary(metrics, items, trained):
    """{part: {metric: [mean, low, high]}}: "seen", questions with a paraphrase in training, and
    "unseen", never trained on; of several groups also each, and for each metric the worst."""
    questions, groups = (np.array([getattr(i, k) for i in items]) for k in ("question", "group"))
    seen = np.array([q in trained for q in questions])
    parts = {"seen": seen, "unseen": ~seen}
    if len(set(groups)) > 1:
        parts |= {f"group {g}": groups == g for g in sorted(set(groups))}
    out = {name: {"rows": int(mask.sum()), "questions": len(set(questions[mask])),
                  **{k: interval(v[mask], questions[mask]) for k, v in metrics.items()}}
           for name, mask in parts.items() if mask.any()}
    several = [v for name, v in out.items() if name.startswith("group ")]
    if several:
        out["worst group"] = {k: worst(k, [v[k] for v in several if v[k]]) for k in metrics}
    return out


def worst(metric, values):
    """Of [[mean, low, high], ...] the worst: the largest distance, or the smallest of a metric
    where more is better."""
    pick = max if metric in LESS_IS_BETTER else min
    return pick(values, key=lambda v: v[0], default=None)


LESS_IS_BETTER = ("jsd", "sampled_jsd", "sampling_floor")
BELIEFS = {"jsd": "JSD", "class_mass": "mass", "sampled_jsd": "sampled JSD", "cbc": "CBC",
           "opinion": "opinion"}
MARGINS = {f"{kind}_{k}": f"{kind} {k}" for kind in ("joint", "given") for k in KINDS}


def table(results, part, columns):
    """One line per run of mean and half-width of its interval, or per loss where seeds repeat."""
    width = max(map(len, results))
    lines = [f"{'':{width}}" + "".join(f"{text:>15}" for text in columns.values())]
    for name, result in results.items():
        cells = [result.get(part, {}).get(k) for k in columns]
        lines.append(f"{name:{width}}" + "".join(
            f"{'-' if c is None else f'{c[0]:.3f} ±{(c[2] - c[1]) / 2:.3f}':>15}" for c in cells))
    return "\n".join(lines)


def over_seeds(results, configs):
    """Results of runs that differ in their seed alone -> {name (n seeds): mean and spread}, the
    spread one standard deviation over seeds, shown in the place of the interval."""
    groups = {}
    for out, result in results.items():
        same = {k: v for k, v in configs[out].items() if k not in (*VOLATILE, "seed", "init")}
        group = groups.setdefault(json.dumps(same, sort_keys=True), {})
        group.setdefault(configs[out].get("seed"), (out, result))
    merged = {}
    for key, by_seed in groups.items():
        several = [result for _, result in by_seed.values()]
        if len(several) > 1:
            first = next(iter(by_seed.values()))[0]
            merged[f"{re.sub('-?seed[0-9]+$', '', first)} ({len(several)} seeds)"] = {part: {
                k: spread([r[part][k][0] for r in several if r.get(part, {}).get(k)])
                for k in several[0][part] if k not in ("rows", "questions")} for part in several[0]}
    return merged


def spread(values):
    m, sd = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    return [m, m - sd, m + sd] if len(values) else None


def reference_lines(e):
    """JSD of Figure 4's reference distributions on the rows, in one line."""
    target = np.array([r["probabilities"] for r in e.rows])
    return "JSD without training: " + ", ".join(
        f"{name} {jsd(q, target).mean():.3f}"
        for name, q in reference_distributions(target).items())


def read_run(out, o):
    """The flags of the run in OUT; of a checkpoint that is no run (a folder, a name on the hub),
    the few that stand for them."""
    if (Path(out) / "metrics.jsonl").is_file():
        config = read_json(Path(out) / "config.json")
        missing = {"loss", "data", "init", "beta", "dtype", "max_length", "overlong"} - set(config)
        if missing:
            raise ValueError(f"{out}/config.json lacks {sorted(missing)}: it is no run's")
        return config
    if not o.data:
        raise ValueError(f"{out} is not the folder of a run (no metrics.jsonl): give the OUT of "
                         "train.py, or, for a checkpoint, --data DIR as well")
    return {"loss": "", "model": out, "init": "", "data": o.data, "max_length": 0,
            "overlong": "error", "dtype": "bfloat16" if o.device == "cuda" else "float32"}


def main():
    parser = Parser(description="Measure runs: one table over all of them.")
    parser.add_argument("OUT", nargs="+",
                        help="run folders of train.py, or, with --data, checkpoints")
    add_flags(parser, Config)
    flags = vars(parser.parse_args())
    outs, o = flags.pop("OUT"), Config(**flags)
    check_ranges(o, samples=(0, 10000), max_new_tokens=(1, 100000), seed=(0, 2 ** 63))
    for name, allowed in (("split", SPLITS), ("checkpoint", ("best", "last"))):
        if getattr(o, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}")
    o.device = device_of(o.device)
    configs = {out: read_run(out, o) for out in dict.fromkeys(x.rstrip("/") or x for x in outs)}
    evaluations, results = {}, {}
    for out in progress(configs, desc="runs", unit="run", disable=len(configs) == 1):
        data = o.data or configs[out]["data"], o.form or configs[out].get("form", "")
        if data not in evaluations:
            evaluations[data] = Evaluation(*data, o.split)
        e = evaluations[data]
        metrics, items = e.measure(out, o, configs[out], o.device)
        results[out] = summary(metrics, items, e.trained)
        if configs[out]["loss"]:
            write(Path(out) / "eval.json", json.dumps({"split": o.split, "checkpoint": o.checkpoint,
                  "data": data[0], "samples": o.samples, **results[out]}, indent=1) + "\n")
    report(results, configs, evaluations, o)


def report(results, configs, evaluations, o):
    merged = over_seeds(results, configs)
    for part in dict.fromkeys(part for r in results.values() for part in r):
        some = next(r[part] for r in results.values() if part in r)
        counts = (f": {some['rows']} {o.split} rows, {some['questions']} questions"
                  if "rows" in some else ", metric by metric")
        print(f"\n{part}{' questions' * part.endswith('seen')}{counts}; the runs' {o.checkpoint} weights" + (
            f"; {o.samples} samples a row (a perfect model's sampled JSD: "
            f"{some['sampling_floor'][0]:.3f})" if o.samples else ""))
        for columns in (BELIEFS, MARGINS):
            columns = {k: v for k, v in columns.items()
                       if any(k in r.get(part, {}) for r in results.values())}
            if not columns:
                continue
            print(table(results, part, columns))
            if merged:
                print("mean ± standard deviation over seeds\n" + table(merged, part, columns))
    for (data, _), e in evaluations.items():
        print(f"\n{data}: {reference_lines(e)}")
    print("± half of the 95% bootstrap interval over questions. joint: belief and answer, each "
          "with its own belief; given: the answer after the accepted belief.")


if __name__ == "__main__":
    run(main)
