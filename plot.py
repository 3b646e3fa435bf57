"""The picture and the scoreboard: what was gained over the baseline, told from the logs alone.

    python plot.py out/baseline_demo out/maml_demo  # writes out/curves.png, prints the scoreboard
    python plot.py results/baseline_s* results/* --markdown -o curves.png  # the first run named is the baseline

Runs whose configs differ only in seed are one method: a line is the mean over its seeds, a band their range.
"""

import argparse
import json
import math
import re
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time (seconds)"}
COLORS = ["#000000", "#d55e00", "#56b4e9", "#882255", "#e69f00", "#0072b2"]  # dark and light: distinct in greyscale too
LINES, MARKERS = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))], "os^Dv*P"  # 6, 5 and 7: no two methods look alike
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]  # Student's t for 1, 2, ... degrees


# --- logs -------------------------------------------------------------------------------------------------------------
def read_methods(paths):
    """{label: {seed: run}}, the baseline first, and the unit of all losses."""
    paths = dict.fromkeys(path.resolve() for path in paths if path.suffix == ".jsonl" or not path.is_file())
    if not paths:  # what is left of results/*, which names other files too, and the baseline twice
        raise SystemExit("no logs among these files: pass the out_dir of runs of train.py")
    logs = {path: read_log(path) for path in paths}
    bits = len({rows[0]["dataset"]["tokenizer"] for rows in logs.values()}) > 1  # nats per token would not compare
    methods, labels, protocol = {}, {}, {}
    for path, rows in logs.items():
        try:
            config, run = rows[0]["config"], to_run(rows, bits)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SystemExit(f"{path} is not as train.py wrote it ({error!r}): mend or leave it out") from None
        same = json.dumps({key: config[key] for key in sorted(config) if key not in ("seed", "out_dir")})
        name = re.sub(r"[_-]s(eed)?[_-]?\d+$", "", path.parent.name if path.name == "log.jsonl" else path.stem)
        label = labels.setdefault(same, str(path) if name in methods else name)
        if methods.setdefault(label, {}).setdefault(config["seed"], run) is not run:
            raise SystemExit(f"{path} has the config and seed of another run: leave one of them out")
        if any(protocol.setdefault(key, run[key]) != run[key] for key in ("domains", "support") if run[key]):
            raise SystemExit(f"{path} has other held-out domains or support sizes than the rest: adapt all runs alike")
    return methods, "bits per byte" if bits else "nats per token"


def read_log(path):
    """The rows of a log, less a last line that a run in progress is still writing."""
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise SystemExit(f"no log at {log}: pass the out_dir of a run of train.py")
    rows, lines = [], log.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:  # a loss that is NaN is read as infinite: it is bad, not missing
            rows.append({"kind": "", **json.loads(line, parse_constant=lambda _: math.inf)})
        except (ValueError, TypeError):
            if number < len(lines):
                raise SystemExit(f"{log}, line {number}, is no row of a log: delete that line") from None
    kinds = [row["kind"] for row in rows]
    if kinds[:1] != ["run"] or "val" not in kinds:
        raise SystemExit(f"{log} lacks its header or a first evaluation: wait for that run, or train it again")
    return rows


def to_run(rows, bits):
    """A run's mean losses before ('train', 'heldout') and after adaptation ('adapted'): {step: [tokens, flops, seconds,
    loss]}; and its last 'ladder'. Newer rows replace older ones: a run is resumed, or adapted again."""
    roles, size = rows[0]["dataset"]["roles"], rows[0]["dataset"]["bytes_per_token"]
    unit = {d: 1 / math.log(2) / size.get(d, math.nan) if bits else 1.0 for d in sorted(roles)}
    domains = {role: [d for d in unit if roles[d] == role] for role in ("train", "heldout")}
    if not domains["heldout"]:
        raise SystemExit("a run holds no domain out, so there is nothing to compare: prepare its data with --heldout")
    run = {"head": rows[0], "domains": domains["heldout"], "support": [], "ladder": np.full((1, 1, 1, 1), math.nan)}
    run |= {"train": {}, "heldout": {}, "adapted": {}}
    for row in [row for row in rows if row["kind"] == "val"]:
        for role, names in domains.items():
            loss = np.mean([unit[d] * row["loss"].get(d, math.nan) for d in names])
            run[role][int(row["step"])] = [*(float(row[axis]) for axis in AXES), loss]
    adapt = [row for row in rows if row["kind"] == "adapt" and row["role"] == "heldout"]
    for step in sorted({row["step"] for row in adapt if row["chosen"]}):
        last = [row for row in adapt if row["step"] == step]
        run["support"], run["ladder"] = last[-1]["support_tokens"], ladder(last, domains["heldout"], unit)
        run["adapted"][step] = [*(float(last[-1][axis]) for axis in AXES), run["ladder"][0, ..., -1].mean()]
    return run


def ladder(rows, domains, unit):
    """A checkpoint's losses as it adapts: (rates, draws, domains, support sizes), chosen rate first, nan if missing."""
    losses = {(row["lr"], row["draw"], row["domain"]): unit[row["domain"]] * np.array(row["loss"]) for row in rows}
    chosen, missing = [row["lr"] for row in rows if row["chosen"]][-1], np.full(len(rows[-1]["loss"]), math.nan)
    rates, draws = sorted({key[0] for key in losses}, key=lambda rate: rate != chosen), {key[1] for key in losses}
    return np.array([[[losses.get((rate, draw, d), missing) for d in domains] for draw in draws] for rate in rates])


# --- measures ---------------------------------------------------------------------------------------------------------
def curve(runs, name):
    """(seeds, steps, 4): tokens, FLOPs, seconds and loss, at the steps that all seeds have."""
    steps = sorted(set.intersection(*(set(run[name]) for run in runs)))
    return np.array([[run[name][step] for step in steps] for run in runs]).reshape(len(runs), -1, 4)


def first_reach(mean, target):
    """Tokens, FLOPs and seconds where a mean curve (steps, 4) first comes down to target; nan if it never does."""
    below = np.flatnonzero(mean[:, 3] <= target)
    if not len(below):
        return np.full(3, math.nan)
    pair = mean[[below[0], max(below[0] - 1, 0)]]
    return np.array([np.interp(target, pair[:, 3], pair[:, k]) for k in range(3)])


def speed_up(runs, baseline, name="heldout"):
    """In tokens, FLOPs and seconds: the baseline's way to its final loss over the runs' way to that same loss."""
    mean, base = curve(runs, name).mean(0), curve(baseline, name).mean(0)
    target = base[-1, 3] if min(len(mean), len(base)) > 1 else -math.inf  # one checkpoint is no curve
    return first_reach(base, target) / first_reach(mean, target)


def deviation(values):
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else math.nan


def measures(runs, baseline):
    """{(the hypothesis's word, what is measured): value} of a method, over all its seeds or one of them."""
    support, path = runs[0]["support"] or [0], np.mean([run["ladder"][0].mean((0, 1)) for run in runs], axis=0)
    ends = [run["ladder"][0, ..., -1] for run in runs]  # (draws, domains) each
    rates = [run["ladder"].mean((1, 2))[:, -1] for run in runs]  # (rates,) each
    train, heldout = (curve(runs, role)[:, -1, 3] for role in ("train", "heldout"))  # (seeds,)
    fast = {"before": speed_up(runs, baseline), "after": speed_up(runs, baseline, "adapted")}
    return {
        ("trained", "train domains"): train.mean(),
        ("trained", "held-out domains"): heldout.mean(),
        **{("faster", f"speed-up in {axis}, {when}"): fast[when][k] for when in fast for k, axis in enumerate(AXES)},
        **{("fewer examples", f"after {n:,} tokens"): path[k] for k, n in enumerate(support)},
        ("fewer examples", "mean on the way (area under the curve)"): np.trapezoid(path, support) / max(support[-1], 1),
        ("more robustly", "worst held-out domain, after"): np.mean([end.mean(0).max() for end in ends]),
        ("more robustly", "worst less best rate, after"): np.mean([np.ptp(rate) for rate in rates]),
        ("more reliably", "deviation over seeds, before"): deviation(heldout),
        ("more reliably", "deviation over seeds, after"): deviation([end.mean() for end in ends]),
        ("more reliably", "deviation over draws, after"): np.mean([np.mean(deviation(end)) for end in ends]),
        ("two by two", "before"): path[0],
        ("two by two", "after"): path[-1],
        ("two by two", "after - before (difference: interaction)"): path[-1] - path[0],
    }


# --- table and picture ------------------------------------------------------------------------------------------------
@np.errstate(divide="ignore", invalid="ignore")  # a loss may be infinite, a curve empty
def scoreboard(methods, unit, markdown=False):
    """The measures as a table. A cell: the value (its difference to the baseline, paired by seed, ± 95% t interval)."""
    first, columns = next(iter(methods.values())), []
    for seeds in methods.values():
        values, pairs = measures([*seeds.values()], [*first.values()]), []
        for seed in [seed for seed in seeds if seed in first and seeds is not first]:
            base = [first[seed]]
            pairs.append((measures([seeds[seed]], base), measures(base, base)))
        columns.append({m: cell(values[m], [own[m] - base.get(m, math.nan) for own, base in pairs]) for m in values})
    names = max(columns, key=len)
    rows = [("", f"held-out loss, {unit}", *methods), *((*m, *(c.get(m, "-") for c in columns)) for m in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines)


def cell(value, differences):
    n, mean = len(differences), np.mean(differences or [math.nan])
    half = T95[min(n, 11) - 2] * deviation(differences) / math.sqrt(n) if n > 1 else math.nan  # past 11, a bit too wide
    paired = "" if math.isnan(mean) else f" ({mean:+.2g})" if math.isnan(half) else f" ({mean:+.2g} ± {half:.2g})"
    return ("-" if math.isnan(value) else f"{value:#.4g}") + paired


@np.errstate(divide="ignore", invalid="ignore")  # a loss may be infinite, a curve empty
def picture(methods, unit):
    """Learning curves, with arrows from the baseline's end to where others reach its loss; below, the last ladders."""
    fig = Figure(figsize=(11, 9.5 + 0.3 * len(methods)), layout="constrained", dpi=150)
    axes = fig.subplot_mosaic([[role + axis for axis in AXES] for role in ("heldout", "train")] + [["support"] * 3])
    first, sizes, facts, short = [*next(iter(methods.values())).values()], [0], {}, EngFormatter(places=1, sep="")
    base = curve(first, "heldout").mean(0)
    end = base[-1, 3]
    for i, (label, seeds) in enumerate(methods.items()):
        runs, look = [*seeds.values()], {"color": COLORS[i % 6], "ls": LINES[i % 5], "marker": MARKERS[i % 7], "ms": 4}
        panels = {"support": (runs[0]["support"] or [0], np.array([run["ladder"][0].mean((0, 1)) for run in runs]))}
        for role in ("heldout", "train"):
            late = curve(runs, role)
            late = late[:, late.shape[1] // 6 :]  # the first sixth would press the rest flat
            panels |= {role + axis: (late[..., k].mean(0), late[..., 3]) for k, axis in enumerate(AXES)}
        mean, ratio, sizes = curve(runs, "heldout").mean(0), speed_up(runs, first), runs[0]["support"] or sizes
        says = "speed-up {:.2f}x in tokens, {:.2f}x in FLOPs, {:.2f}x in time".format(*ratio)
        says = (says if ratio[0] > 0 else "does not reach that loss") if i else f"the baseline, ends at {end:.3f}"
        says = fill(f"{label} (seed {', '.join(map(str, sorted(seeds)))}): {says}", 64)
        for panel, (x, y) in panels.items():
            axes[panel].plot(x, y.mean(0), markevery=max(1, len(x) // 8), label=says, **look)
            axes[panel].fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.2, lw=0)
        for axis, here, start in zip(AXES, first_reach(mean, end), first_reach(base, end), strict=True):
            arrow = {"arrowstyle": "-|>", "color": look["color"], "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
            if i and here >= 0:
                axes["heldout" + axis].annotate("", (here, end), (start, end), arrowprops=arrow, zorder=5)
        for head in (run["head"] for run in runs):
            data, commit = (
                head["dataset"],
                str(head["commit"])[:7] + str(head["commit"])[40:],
            )  # 40 digits, perhaps '-dirty'
            size = f"{short(mean[-1, 0])} tokens, {short(head['params'])} parameters"
            facts[f"{data['name']} ({data['tokenizer']} tokens), {size}, commit {commit}"] = None
    for axis in AXES:
        for role, name in (("heldout", "held-out"), ("train", "train-domain")):
            axes[role + axis].set(xlabel=AXES[axis], ylabel=f"{name} loss ({unit})", xlim=(0, None))
            axes[role + axis].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes["support"].set_xscale("symlog", base=2, linthresh=[*sizes, 1][1])
    axes["support"].set_xticks(sizes, [f"{size:,}" for size in sizes])
    note = "support tokens learned by AdamW at the rate chosen on the tune domains (no line: run adapt.py first)"
    axes["support"].set(xlabel=note, ylabel=f"held-out loss ({unit})")
    note = "Speed-up (arrows): the baseline's way to its final held-out loss, before adaptation, over the method's"
    handles = axes["support"].get_legend_handles_labels()
    fig.legend(*handles, title=note, loc="outside lower center", ncols=min(2, len(methods)), fontsize=9, frameon=False)
    names = " against ".join(filter(None, [", ".join([*methods][1:]), next(iter(methods))]))
    fig.suptitle("\n".join([fill(names, 100), *facts]))
    return fig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or log files, the baseline first")
    parser.add_argument("-o", "--output", type=Path, help="the picture (default: curves.png beside the last run)")
    parser.add_argument("--markdown", action="store_true", help="print the scoreboard as a markdown table")
    args = parser.parse_args(argv)
    path = args.output or args.runs[-1].parent / "curves.png"
    methods, unit = read_methods(args.runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(methods, unit).savefig(path)
    print(scoreboard(methods, unit, args.markdown), path, sep="\n")


if __name__ == "__main__":
    main()
