"""Draw the paper's Figures 2 to 5 and Tables 2 and 3 from finished runs; needs matplotlib.

    python assets/figures.py out/toy-*-seed? --to figures

Runs whose folders differ only in -seedN are one method, shown by their mean and spread.
"""
import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("figures.py: error: the figures need matplotlib: pip install matplotlib")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Parser, run
from evaluate import METRICS, SEED, mean_over_seeds

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
COLUMNS = ("jsd", "opinion", "cbc", "bpc", "rs", "flip", "w1", "sampled_jsd")      # of Table 2
BARS = ("jsd", "bpc", "opinion", "cbc")                # of Figure 5


def read_run(out):
    """What the figures need of a run: evals are {examples: metrics}, answers {prompt: text}, and
    measured is eval.json's part for unseen questions, if there are any."""
    text = {x.name: x.read_text(encoding="utf-8") for x in out.glob("*.json*")}
    config, result = json.loads(text["config.json"]), json.loads(text.get("eval.json", "{}"))
    log, rows = ([json.loads(x) for x in text.get(name, "").splitlines()]
                 for name in ("metrics.jsonl", "samples.jsonl"))
    evals = {x["step"] * config["batch_size"]: x["eval"] for x in log if "eval" in x}
    if len(evals) < 2:
        raise ValueError("fewer than two evaluations")
    return SimpleNamespace(
        loss=config["loss"], tuned="joint_majority" in log[0]["eval"],
        reference=result.get("reference_jsd"), evals=evals,
        measured=result.get("unseen") or result.get("seen"),
        answers={x["prompt"]: x["answers"][0] for x in rows[::max(1, len(rows) // 3)][:3]})


def plot_curve(ax, runs, metric, **style):
    """An eval metric over training: the mean over seeds, and a band from lowest to highest."""
    steps = sorted(set.intersection(*(set(r.evals) for r in runs)))
    y = np.array([[r.evals[x].get(metric) for x in steps] for r in runs], float)
    ax.plot(steps, y.mean(0), **style)
    ax.fill_between(steps, y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)
    ax.set_xlabel("training examples")


def draw_margins(ax, method, runs):
    """Figures 2 and 3: the margin that the method trains, for majority and minority."""
    kind, what = "joint", "belief and answer"
    if "gdpo" in runs[0].loss:
        kind, what = "given", "answer given the belief"
    for side, colour, dash in zip(("majority", "minority"), COLOURS, "-:"):
        plot_curve(ax, runs, f"{kind}_{side}", color=colour, linestyle=dash, label=side)
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set(title=f"{method}: {what}", ylabel="reward margin (nats)")
    ax.legend()


def draw_jsd(ax, title, methods):
    """Figure 4: JSD over training; dashed: baselines that need no training, if they fit."""
    for n, (method, runs) in enumerate(methods.items()):
        plot_curve(ax, runs, "jsd", color=COLOURS[n % 8], marker="osD^v<>*"[n % 8],
                   linestyle=["-", "--", "-."][n // 8 % 3], markersize=4, label=method)
    top = 1.05 * ax.get_ylim()[1]
    found = [r.reference for runs in methods.values() for r in runs if r.reference]
    for name, value in found[0].items() if found else ():
        if value < top:
            ax.axhline(value, color="0.5", linestyle="--", linewidth=0.8)
            ax.text(1.01, value / top, name, transform=ax.transAxes, fontsize=8, va="center")
    ax.set(ylim=(0, top), ylabel="mean Jensen-Shannon distance (eval split)", title=title)
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def draw_bars(ax, metric, values):
    """Figure 5: JSD, and how often the answer expresses its belief."""
    mean, low, high = np.transpose([*values.values()])
    ax.bar([*values], mean, yerr=(high - low) / 2, color=COLOURS[0], width=0.7, capsize=3)
    ax.tick_params(axis="x", labelrotation=60, labelsize=8)
    ax.set_title(METRICS[metric][0])


def tables(methods, values):
    """Markdown: Table 2, a row per method and a column per metric, and Table 3, answers."""
    rows = [["Table 2", *(METRICS[k][0] for k in values)], ["---"] * (len(values) + 1)]
    cell = lambda v: f"{v[0]:.3f} ± {(v[2] - v[1]) / 2:.3f}" if v else ""
    rows += [[m, *(cell(v.get(m)) for v in values.values())] for m in methods]
    for prompt in dict.fromkeys(prompt for runs in methods.values() for prompt in runs[0].answers):
        rows += [[], ["Table 3", prompt], ["---", "---"]]
        rows += [[method, runs[0].answers.get(prompt, "")] for method, runs in methods.items()]
    clean = lambda text: " ".join(text.split()).replace("|", "\\|")
    return "".join(f"| {' | '.join(map(clean, row))} |\n" if row else "\n" for row in rows)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("OUT", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--to", default="figures", type=Path, help="folder to write")
    o, methods = parser.parse_args(), {}
    for out in filter(Path.is_dir, o.OUT):
        try:
            found = read_run(out)
            methods.setdefault(SEED.sub("", out.name), []).append(found)
        except (OSError, ValueError, LookupError) as e:
            print(f"left out, not a finished run: {out} ({type(e).__name__}: {e})", file=sys.stderr)
    if not methods:
        raise ValueError("none of these folders holds a finished run")
    tuned = {m: runs for m, runs in methods.items() if runs[0].tuned}
    curves = {"from the SFT checkpoint": tuned,
              "SFT": {m: runs for m, runs in methods.items() if m not in tuned}}
    values = {}                        # {metric: {method: [mean, low, high]}}
    for k, (method, runs) in product(COLUMNS, methods.items()):
        if v := mean_over_seeds([r.measured.get(k) for r in runs if r.measured]):
            values.setdefault(k, {})[method] = v
    o.to.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update({"axes.titlesize": 9, "legend.fontsize": 8})
    for name, draw, panels, width, height in (
            ("margins", draw_margins, tuned, 3.6, 2.8),
            ("bars", draw_bars, {k: values[k] for k in BARS if k in values}, 3.4, 3.2),
            ("jsd", draw_jsd, {k: v for k, v in curves.items() if v}, 5.5, 4.5)):
        if not panels:
            continue
        columns, rows = min(3, len(panels)), -(-len(panels) // 3)
        figure = pyplot.figure(figsize=(width * columns, height * rows), layout="constrained")
        for n, panel in enumerate(panels.items(), 1):
            shared = figure.axes[0] if name == "margins" and figure.axes else None
            draw(figure.add_subplot(rows, columns, n, sharey=shared), *panel)
        figure.savefig(o.to / f"{name}.png", dpi=150, bbox_inches="tight")
    (o.to / "tables.md").write_text(tables(methods, values), encoding="utf-8")
    print(f"{o.to}: " + ", ".join(sorted(x.name for x in o.to.iterdir())))


if __name__ == "__main__":
    run(main)
