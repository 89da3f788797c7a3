"""Figures 2 to 5 and Tables 2 and 3 of the paper, from the files of runs; pip install matplotlib.

    python assets/figures.py out/toy-*-seed? --to figures

Runs whose folders differ only in -seedN are one method: the mean over seeds, and their spread.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
METRICS = {"jsd": "JSD ↓", "opinion": "opinion ↑", "cbc": "CBC ↑", "bpc": "BPC ↑", "rs": "RS ↑",
           "flip": "flip ↑", "w1": "W1 ↓", "sampled_jsd": "sampled ↓", "coverage": "coverage →1"}


def read_run(out):
    """(loss, {examples: eval metrics}, eval.json or {}, {prompt: a sampled answer}) of a run."""
    text = {x.name: x.read_text(encoding="utf-8") for x in out.glob("*.json*")}
    config, lines = json.loads(text["config.json"]), text["metrics.jsonl"].split("\n")[:-1]
    evals = {x["step"] * config["batch_size"]: x["eval"] for x in map(json.loads, lines)
             if "eval" in x}
    if len(evals) < 2:
        raise ValueError("its training has not come far")
    rows = [json.loads(x) for x in text.get("samples.jsonl", "").splitlines()]
    answers = {row["prompt"]: row["answers"][0] for row in rows[::max(1, len(rows) // 3)][:3]}
    return config["loss"], evals, json.loads(text.get("eval.json", "{}")), answers


def plot_curve(ax, runs, metric, **style):
    """An eval metric over training: the mean over seeds, and a band from lowest to highest."""
    steps = sorted(set.intersection(*(set(evals) for _, evals, *_ in runs)))
    y = np.array([[evals[x].get(metric) for x in steps] for _, evals, *_ in runs], float)
    ax.plot(steps, y.mean(0), **style)
    ax.fill_between(steps, y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)
    ax.set_xlabel("training examples")


def draw_margins(pyplot, methods):
    """Figures 2 and 3: a panel per method, majority against minority, of the margin it trains."""
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    figure, axes = pyplot.subplots(rows, columns, sharey=True, squeeze=False, layout="constrained",
                                   figsize=(3.6 * columns, 2.8 * rows))
    for ax in axes.flat[len(methods):]:
        ax.remove()
    for ax, (method, runs) in zip(axes.flat, methods.items()):
        kind = "given" if "gdpo" in runs[0][0] else "joint"
        for side, colour, dash in zip(("majority", "minority"), COLOURS, "-:"):
            plot_curve(ax, runs, f"{kind}_{side}", color=colour, linestyle=dash, label=side)
        ax.axhline(0, color="0.6", linewidth=0.8)
        text = {"given": "answer given the belief", "joint": "belief and answer"}[kind]
        ax.set_title(f"{method}: {text}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.supylabel("reward margin (nats)", fontsize=10)
    return figure


def draw_jsd(pyplot, methods):
    """Figure 4: JSD over training; dashed: what a model without training would have, if it fits."""
    figure, ax = pyplot.subplots(figsize=(5.5, 4.5), layout="constrained")
    for n, (method, runs) in enumerate(methods.items()):
        plot_curve(ax, runs, "jsd", color=COLOURS[n % 8], marker="osD^v<>*"[n % 8], markersize=4,
                   linestyle=["-", "--", "-.", ":"][n // 8 % 4], label=method)
    top = ax.get_ylim()[1]
    results = [r for runs in methods.values() for *_, r, _ in runs if r]
    for name, value in results[0]["reference_jsd"].items() if results else ():
        if value < top:
            ax.axhline(value, color="0.5", linestyle="--", linewidth=0.8)
            ax.text(1.01, value / top, name, transform=ax.transAxes, fontsize=8, va="center")
    ax.set(ylim=(0, top), ylabel="mean Jensen-Shannon distance (eval split)")
    ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return figure


def measured(runs, metric):
    """(mean, half of its interval) on unseen questions if there are any; of seeds, their standard
    deviation if that is larger. None where it is missing."""
    found = [(r.get("unseen") or r["seen"]).get(metric) for *_, r, _ in runs if r]
    if not found or not all(found):
        return None
    means, halves = [v[0] for v in found], [(v[2] - v[1]) / 2 for v in found if v[1] is not None]
    return np.mean(means), max(np.mean(halves or [0]), np.std(means, ddof=int(len(means) > 1)))


def draw_bars(pyplot, methods):
    """Figure 5: JSD, and how often the answer expresses its belief."""
    shown = [k for k in ("jsd", "bpc", "opinion", "cbc")
             if any(measured(runs, k) for runs in methods.values())]
    figure, axes = pyplot.subplots(1, max(1, len(shown)), squeeze=False, figsize=(9, 3.2))
    for ax, k in zip(axes.flat, shown):
        values = {m: v for m, runs in methods.items() if (v := measured(runs, k))}
        ax.bar([*values], [v for v, _ in values.values()], color=COLOURS[0], width=0.7, capsize=3,
               yerr=[half for _, half in values.values()])
        ax.tick_params(axis="x", labelrotation=60, labelsize=8)
        ax.set_title(METRICS[k], fontsize=9)
    return figure


def tables(methods):
    """Table 2, a row per method and a column per metric, and Table 3, answers; Markdown."""
    shown = [k for k in METRICS if any(measured(runs, k) for runs in methods.values())]
    rows = [["Table 2", *(METRICS[k] for k in shown)], ["---"] * (len(shown) + 1)]
    for method, runs in methods.items():
        values = [measured(runs, k) for k in shown]
        rows.append([method, *(f"{v[0]:.3f} ± {v[1]:.3f}" if v else "" for v in values)])
    for prompt in dict.fromkeys(prompt for runs in methods.values() for prompt in runs[0][3]):
        rows += [[], ["Table 3", prompt], ["---", "---"]]
        rows += [[method, runs[0][3].get(prompt, "")] for method, runs in methods.items()]
    clean = lambda text: " ".join(text.split()).replace("|", "\\|")
    return "".join(f"| {' | '.join(map(clean, row))} |\n" if row else "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("OUT", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--to", default="figures", type=Path, help="folder to write")
    o, methods = parser.parse_args(), {}
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures.py: error: the figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    for out in filter(Path.is_dir, o.OUT):
        try:
            run = read_run(out)
            methods.setdefault(re.sub(r"-seed\d+$", "", out.name), []).append(run)
        except (OSError, ValueError, KeyError) as e:
            print(f"left out, no finished run: {out}: {e!r}", file=sys.stderr)
    if not methods:
        sys.exit("figures.py: error: none of these folders holds a finished run")
    tuned = {m: runs for m, runs in methods.items()
             if "joint_majority" in next(iter(runs[0][1].values()))}
    o.to.mkdir(parents=True, exist_ok=True)
    for name, draw, shown in (("margins", draw_margins, tuned), ("jsd", draw_jsd, methods),
                              ("bars", draw_bars, methods)):
        if shown:
            draw(pyplot, shown).savefig(o.to / f"{name}.png", dpi=150, bbox_inches="tight")
    (o.to / "tables.md").write_text(tables(methods), encoding="utf-8")
    print(f"{o.to}: " + ", ".join(sorted(x.name for x in o.to.iterdir())))


if __name__ == "__main__":
    main()
