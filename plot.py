"""The picture and the scoreboard: what was gained over the baseline, told from the logs alone.

    python plot.py out/baseline_demo out/maml_demo  # writes out/curves.png, prints the scoreboard
    python plot.py results/tail/plain.jsonl results/tail/* --markdown -o curves.png  # the baseline is named first
    python plot.py results/sweep/*.jsonl --table  # no picture; a row for each method, the best choice first

Runs whose configs differ only in seed, in what is watched and in whose learned rates they borrow are one method: a
line is the mean over its seeds, a band their range.
"""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (seconds)"}
TITLES = {"heldout": "held-out, before adaptation", "adapted": "held-out, after adaptation", "train": "train domains"}
PANELS = [["heldout tokens", "heldout flops", "heldout seconds"], ["adapted tokens", "adapted flops", "train tokens"]]
COLORS = ["#000000", "#d55e00", "#56b4e9", "#882255", "#e69f00", "#0072b2"]  # dark and light: distinct in greyscale too
LINES, MARKERS = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))], "os^Dv*P"  # 6, 5 and 7: no two methods look alike
WATCHED = "seed|out_dir|(log|keep)_interval|eval_.*"  # the fields that make no other method
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]  # Student's t for 1, 2, ... degrees


# --- logs -------------------------------------------------------------------------------------------------------------
def read_methods(paths):
    """{label: {seed: run}}, the baseline first, and the unit of all losses."""
    logs = {path: read_log(path) for path in dict.fromkeys(path.resolve() for path in paths)}  # one may be named twice
    bits = len({rows[0]["dataset"]["tokenizer"] for rows in logs.values()}) > 1  # nats per token would not compare
    methods, labels, alike = {}, {}, {}
    for path, rows in logs.items():
        try:
            config, run = rows[0]["config"], to_run(rows, bits)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SystemExit(f"{path} is not as train.py wrote it ({error!r}): mend or leave it out") from None
        name = re.sub(r"[_-]s(eed)?[_-]?\d+$", "", path.parent.name if path.name == "log.jsonl" else path.stem)
        same = {key: value for key, value in config.items() if not re.fullmatch(WATCHED, key)}
        same = json.dumps(same | {"lr_scale_from": bool(config.get("lr_scale_from"))}, sort_keys=True)
        label = labels.setdefault(same, str(path) if name in methods else name)
        if methods.setdefault(label, {}).setdefault(config["seed"], run) is not run:
            raise SystemExit(f"{path} has the config and seed of another run: leave one of them out")
        if any(alike.setdefault(key, run[key]) != run[key] for key in ("domains", "support") if key in run):
            raise SystemExit(f"{path} has other unseen domains or support sizes than the rest: adapt all runs alike")
    for run in (run for seeds in methods.values() for run in seeds.values()):  # missing, where it was not adapted
        run["support"] = alike.get("support", [0])
        ladder = run.setdefault("ladder", np.full((1, 1, 1, len(run["support"])), math.nan))
        run["learning"] = {n: [n, n, n, loss] for n, loss in zip(run["support"], ladder[0].mean((0, 1)), strict=True)}
    return methods, "bits per byte" if bits else "nats per token"


def read_log(path):
    """The rows of a log, less a last line that a run in progress is still writing."""
    rows, log = [], path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise SystemExit(f"no log at {log}: pass the out_dir of a run of train.py")
    for number, line in enumerate(log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:  # a loss that is NaN is read as infinite: it is bad, not missing
            rows.append({"kind": "", **json.loads(line, parse_constant=lambda _: math.inf)})
        except (ValueError, TypeError):
            raise SystemExit(f"{log}, line {number}, is no row of a log: delete that line") from None
    kinds = [row["kind"] for row in rows]
    if kinds[:1] != ["run"] or "val" not in kinds:
        raise SystemExit(f"{log} lacks its header or a first evaluation: wait for that run, or train it again")
    return rows


def to_run(rows, bits):
    """Mean losses before ('train', 'heldout') and after adaptation ('adapted'), {step: [tokens, flops, seconds, loss]};
    if the last checkpoint was adapted, its 'tune' loss after that, and its 'ladder': (rates, draws, held-out domains,
    support sizes) of 'rates', the chosen first. Newer rows replace older ones: a run is resumed, or adapted again."""
    roles, size = rows[0]["dataset"]["roles"], rows[0]["dataset"]["bytes_per_token"]
    unit = {d: 1 / math.log(2) / size.get(d, math.nan) if bits else 1.0 for d in sorted(roles)}
    train, tune, heldout = ([d for d in unit if roles[d] == role] for role in ("train", "tune", "heldout"))
    if not heldout:
        raise SystemExit("a run holds no domain out, so there is nothing to compare: prepare its data with --heldout")
    run = {"head": rows[0], "domains": [tune, heldout], "train": {}, "heldout": {}, "adapted": {}, "tune": math.nan}
    for row in [row for row in rows if row["kind"] == "val"]:
        for name, domains in (("train", train), ("heldout", heldout)):
            loss = np.mean([unit[d] * row["loss"].get(d, math.nan) for d in domains])
            run[name][int(row["step"])] = [*(float(row[axis]) for axis in AXES), loss]
    adapt = [row for row in rows if row["kind"] == "adapt"]
    adapt = [row for row in adapt if row["support_tokens"] == adapt[-1]["support_tokens"]]
    for step, chosen in {row["step"]: row["lr"] for row in adapt if row["chosen"]}.items():
        now = [row for row in adapt if row["step"] == step]
        loss = {(row["lr"], row["draw"], row["domain"]): unit[row["domain"]] * np.array(row["loss"]) for row in now}
        rates, draws = sorted({key[0] for key in loss}, key=lambda lr: lr != chosen), {key[1] for key in loss}
        gap = np.full(len(now[-1]["loss"]), math.nan)  # one rate may have been tried on more draws than another
        ladder = np.array([[[loss.get((lr, k, d), gap) for d in heldout] for k in draws] for lr in rates])
        run["support"] = now[-1]["support_tokens"]
        run["adapted"][step] = [*(float(now[-1][axis]) for axis in AXES), ladder[0, ..., -1].mean()]
        if step >= max(run["heldout"]):
            tuned = [path[-1] for (lr, _, d), path in loss.items() if lr == chosen and d in tune]
            run |= {"ladder": ladder, "rates": rates, "tune": np.mean(tuned or math.nan)}
    return run


# --- measures ---------------------------------------------------------------------------------------------------------
def curve(runs, name):
    """(seeds, steps, 4): tokens, FLOPs, seconds and loss, at the steps that all seeds have."""
    steps = sorted(set.intersection(*(set(run[name]) for run in runs)))
    return np.array([[run[name][step] for step in steps] for run in runs]).reshape(len(runs), -1, 4)


def speed_up(runs, baseline, name):
    """In tokens, FLOPs and seconds: the baseline's way to its final loss over the runs' way to that same loss. Runs
    that are below it at their first point, of which there are few after adaptation, are at least so much faster."""
    ways, curves = [], [curve(baseline, name).mean(0), curve(runs, name).mean(0)]
    if min(map(len, curves)) < 2:  # one checkpoint is no curve
        return np.full(3, math.nan)
    for points in curves:
        lowest = np.minimum.accumulate(points[:, 3])  # so that the first time a loss is reached counts
        ways.append([np.interp(curves[0][-1, 3], lowest[::-1], x[::-1], left=math.nan) for x in points.T[:3]])
    return np.divide(*ways)


def beside(seeds, baseline):
    """The baseline's runs of the same seeds, against which a method is fast or slow."""
    return [baseline[seed] for seed in seeds if seed in baseline] or [*baseline.values()]


def deviation(values):
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else math.nan


def measures(runs, baseline):
    """{(the hypothesis's word, what is measured): value} of a method, over all its seeds or one of them."""
    train, heldout, after = (curve(runs, name)[:, -1, 3] for name in ("train", "heldout", "learning"))  # (seeds,)
    ends = [run["ladder"][..., -1] for run in runs]  # (rates, draws, domains) each, the chosen rate first
    support, *_, path = curve(runs, "learning").mean(0).T  # (support sizes,)
    curves = {"train domains": "train", "before": "heldout", "after": "adapted"}
    fast = {when: speed_up(runs, baseline, name) for when, name in curves.items()}
    tried = sorted(set.intersection(*(set(run.get("rates", ())) for run in baseline)))
    pairs = [(run.get("rates", []), end) for run, end in zip(runs, ends, strict=True)]
    at = {lr: [end[rates.index(lr)].mean() for rates, end in pairs if lr in rates] for lr in tried}
    at = {f"at a rate of {lr:g}": np.mean(losses or math.nan) for lr, losses in at.items()}
    return {
        ("trained", "train domains"): train.mean(),
        ("trained", "tune domains, after"): np.mean([run["tune"] for run in runs]),
        ("trained", "held-out domains"): heldout.mean(),
        **{("faster", f"speed-up in {axis}, {when}"): fast[when][k] for when in fast for k, axis in enumerate(AXES)},
        **{("fewer examples", f"after {n:,.0f} tokens"): loss for n, loss in zip(support, path, strict=True)},
        ("fewer examples", "mean on the way (area under the curve)"): np.trapezoid(path, support) / max(support[-1], 1),
        ("more robustly", "worst held-out domain, after"): np.mean([end[0].mean(0).max() for end in ends]),
        **{("more robustly", f"after, {rate}"): loss for rate, loss in at.items()},
        ("more robustly", "worst less best rate, after"): np.mean([np.ptp(end.mean((1, 2))) for end in ends]),
        ("more reliably", "deviation over seeds, before"): deviation(heldout),
        ("more reliably", "deviation over seeds, after"): deviation(after),
        ("more reliably", "deviation over draws, after"): np.mean([np.mean(deviation(end[0])) for end in ends]),
        ("two by two", "held-out, before"): path[0],
        ("two by two", "held-out, after"): path[-1],
        ("two by two", "after - before (difference: interaction)"): path[-1] - path[0],
        **{("two by two", f"after - before, {rate}"): loss - path[0] for rate, loss in at.items()},
    }


# --- tables -----------------------------------------------------------------------------------------------------------
def scoreboard(methods, unit):
    """A method a column. A cell: the value (its difference to the baseline, paired by seed, ± 95% t interval)."""
    first, columns = next(iter(methods.values())), []
    for seeds in methods.values():
        values, pairs = measures([*seeds.values()], beside(seeds, first)), []
        for seed in [seed for seed in seeds if seed in first and seeds is not first]:
            own, base = (measures([run], [first[seed]]) for run in (seeds[seed], first[seed]))
            pairs.append({m: own[m] - base[m] for m in own})
        columns.append([cell(values[m], [pair[m] for pair in pairs]) for m in values])
    rows = [(*m, *cells) for m, *cells in zip(values, *columns, strict=True)]
    return [("", f"held-out loss, {unit}", *methods), *rows]


def sweep(methods, unit):
    """A method a row, with what its config changes in the baseline's. The best comes first by what may be looked at to
    choose, the mean of train loss and tune loss after adaptation; what was not adapted comes last."""
    rows, base = [], next(iter(next(iter(methods.values())).values()))["head"]["config"]
    shown = [("trained", "train domains"), ("trained", "tune domains, after")]
    shown += [("two by two", "held-out, before"), ("two by two", "held-out, after")]
    for label, seeds in methods.items():
        runs, config = [*seeds.values()], next(iter(seeds.values()))["head"]["config"]
        changed = [key for key in base if config.get(key, base[key]) != base[key]]  # older logs have fewer fields
        changed = [key for key in changed if not re.fullmatch(WATCHED, key)]
        changes = " ".join(f"{key}={config[key]}" for key in changed) or "-"
        tokens, losses = f"{curve(runs, 'train')[0, -1, 0]:,.0f}", [measures(runs, runs)[m] for m in shown]
        row = label, changes, ", ".join(map(str, sorted(seeds))), tokens, *map(cell, losses)
        rows.append((math.isnan(losses[1]), np.nansum(losses[:2]), row))
    rows = [row for *_, row in sorted(rows, key=lambda row: row[:2])]
    return [(f"losses in {unit}", "changed", "seeds", "tokens", *(what for _, what in shown)), *rows]


def cell(value, differences=()):
    n, mean = len(differences), np.mean(differences or math.nan)
    half = T95[min(n, 11) - 2] * deviation(differences) / math.sqrt(n) if n > 1 else math.nan  # past 11, a bit too wide
    paired = "" if math.isnan(mean) else f" ({mean:+.2g})" if math.isnan(half) else f" ({mean:+.2g} ± {half:.2g})"
    return "-" if math.isnan(value) else f"{value:#.4g}{paired}"


# --- picture ----------------------------------------------------------------------------------------------------------
def picture(methods, unit):
    """Losses before and after adaptation against what training cost, with speed-ups; below, how the last ones adapt."""
    fig, first = Figure(figsize=(11, 11), layout="constrained", dpi=150), next(iter(methods.values()))
    for panel, ax in fig.subplot_mosaic([*PANELS, ["learning tokens"] * 3]).items():
        name, axis = panel.split()
        k, base = [*AXES].index(axis), curve(first.values(), name)
        for i, seeds in enumerate(methods.values()):
            runs, look = [*seeds.values()], {"color": COLORS[i % 6], "ls": LINES[i % 5], "marker": MARKERS[i % 7]}
            points, ratio = curve(runs, name), speed_up(runs, beside(seeds, first), name)[k]
            late = points[:, points.shape[1] // 4 if name in TITLES else 0 :]  # the first quarter presses the rest flat
            x, y = late[..., k].mean(0), late[..., 3]
            ax.plot(x, y.mean(0), markevery=max(1, len(x) // 8), label=f"{ratio:.2f}x" if ratio > 0 else "-", **look)
            ax.fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.2)
        if name in TITLES:
            ax.set(title=TITLES[name], xlabel=AXES[axis], xlim=(0, 1.02 * ax.get_xlim()[1]))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if base.shape[1] > 1:
                ax.axhline(base[:, -1, 3].mean(), color="gray", lw=0.8)  # what the speed-ups are to
                ax.legend(title="speed-up", loc="best", frameon=False)
        else:
            ax.set_xscale("symlog", base=2, linthresh=[*x, 1][1])
            ax.set_xticks(x, [f"{n:,.0f}" for n in x])
            ax.set(title="held-out, as the last checkpoint adapts", xlabel="tokens learned at the chosen rate")
            names = [f"{label} (seed {', '.join(map(str, sorted(seeds)))})" for label, seeds in methods.items()]
            fig.legend(ax.lines, names, loc="outside lower center", ncols=3, frameon=False)
    heads = [run["head"] for seeds in methods.values() for run in seeds.values()]
    facts = [f"{head['dataset']['name']}, {head['params']:,} parameters" for head in heads]
    commits = [str(head["commit"])[:7] + str(head["commit"])[40:] for head in heads]  # 40 digits, perhaps '-dirty'
    fig.suptitle(f"{', '.join(dict.fromkeys(facts))}; commit {', '.join(dict.fromkeys(commits))}")
    fig.supylabel(f"loss in {unit}")
    return fig


@np.errstate(divide="ignore", invalid="ignore")  # a loss may be infinite
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or log files, the baseline first")
    parser.add_argument("-o", "--output", type=Path, help="the picture (default: curves.png beside the last run)")
    parser.add_argument("--table", action="store_true", help="no picture; a row for each method, the best choice first")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    args = parser.parse_args(argv)
    methods, unit = read_methods(args.runs)
    rows = (sweep if args.table else scoreboard)(methods, unit)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        line = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(line)} |" if args.markdown else "  ".join(line).rstrip())
    if not args.table:
        path = args.output or args.runs[-1].parent / "curves.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(methods, unit).savefig(path)
        print(path)


if __name__ == "__main__":
    main()
