"""The picture and one short table, from logs alone.

    python plot.py out/baseline_demo out/rates_demo out/maml_demo -o out/curves.png

The first run is the baseline. Left: how unseen text is read, the baseline without learning and by
AdamW, the other runs by the rates they have learned (adapt.py writes these rows). Right: the loss
on held-out domains while training. Runs that differ in their seed alone are one method: a line is
their mean, a band their range.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

COLORS = ["#777777", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#882255", "#56b4e9"]
# what makes no other method: where a run is, what is watched, on which machine, how it was begun
APART = "seed|out_dir|data_dir|device|compile|resume|init_from|eval_.*"

# --------------------------------------------------------------------------------------------------
# logs


def read_log(path: Path) -> list[dict]:
    """The rows of a log, less a last line that a run in progress is still writing."""
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise SystemExit(f"no log at {log}: pass the out_dir of a run of train.py")
    try:
        rows = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
        kinds = [row["kind"] for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"{log} has a line that is no row ({error}): delete that line") from None
    if kinds[:1] != ["run"] or "val" not in kinds:
        raise SystemExit(f"{log} lacks its header or an evaluation: wait, or train again")
    return rows


def read_methods(paths: list[Path]) -> dict[str, list[list[dict]]]:
    """{label: the logs of its seeds}, in the order of the paths."""
    methods, labels = {}, {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        rows = read_log(path)
        name = path.parent.name if path.name == "log.jsonl" else path.stem
        config = {k: v for k, v in rows[0]["config"].items() if not re.fullmatch(APART, k)}
        config["tokens before"] = rows[0]["before"]["tokens"]  # a checkpoint's, that it began from
        key = json.dumps(config, sort_keys=True)
        short = re.sub(r"[_-]s(eed)?[_-]?\d+$", "", name)
        label = labels.setdefault(key, name if short in labels.values() else short)
        methods.setdefault(label, []).append(rows)
    units = {rows[0]["dataset"]["tokenizer"] for runs in methods.values() for rows in runs}
    if len(units) > 1:
        raise SystemExit(f"losses of {' and '.join(units)} tokens do not compare: plot apart")
    return methods


def training_curve(rows: list[dict], table: str) -> np.ndarray:
    """(evaluations, 2): training tokens, and the mean loss on the held-out domains."""
    roles = rows[0]["dataset"]["roles"]
    points = {}  # by step: a run that was resumed says some steps twice
    for row in rows:
        losses = row.get(table) if row["kind"] == "val" else None
        if losses:
            heldout = [loss for d, loss in losses.items() if roles[d] == "heldout"]
            if heldout:
                points[row["step"]] = (row["tokens"], np.mean(heldout))
    return np.array([points[step] for step in sorted(points)]).reshape(-1, 2)


def reading_curve(rows: list[dict], rule: str, dataset: str | None = None):
    """(tokens of a row, mean loss of each row (R,)) over the held-out domains; None if not read."""
    dataset, found = dataset or rows[0]["dataset"]["name"], {}
    for row in rows:  # newer rows replace older ones
        if (row["kind"], row.get("role")) != ("adapt", "heldout"):
            continue
        if (row["rule"], row["dataset"]) == (rule, dataset):
            found[row["domain"]] = row
    if not found:
        return None
    T = next(iter(found.values()))["row_tokens"]
    return T, np.mean([row["loss"] for row in found.values()], axis=0)


# --------------------------------------------------------------------------------------------------
# measures


def running(curve: np.ndarray) -> np.ndarray:
    """The loss over the later half of what was read, after each row of `curve`, (R,)."""
    return np.array([np.mean(curve[n // 2 : n]) for n in range(1, len(curve) + 1)])


def tokens_needed(curve: np.ndarray, level: float, T: int) -> int | None:
    """Tokens read when `running` has come down to a level for good; None if it never does."""
    above = np.flatnonzero(running(curve) > level)
    n = above[-1] + 2 if len(above) else 1
    return n * T if n <= len(curve) else None


def fewer_examples(name: str, curve: np.ndarray, adamw: np.ndarray, T: int) -> str:
    end = T * len(adamw)
    n = tokens_needed(curve, running(adamw)[-1], T)
    if n is None:
        return f"fewer examples: {name} does not come to where AdamW is after {end:,} tokens"
    many = f"{end / n:.1f} times fewer"
    return f"fewer examples: {name} is after {n:,} tokens where AdamW is after {end:,}: {many}"


# --------------------------------------------------------------------------------------------------
# the table and the picture


def reading_lines(methods: dict, dataset=None) -> list[tuple[str, int, np.ndarray]]:
    """(label, T, curves (seeds, R)): the baseline by 'none' and 'adamw', all others by 'own'."""
    lines = []
    for i, (label, runs) in enumerate(methods.items()):
        baseline = {"none": "no learning", "adamw": "tuned AdamW"}
        for rule, words in (baseline if i == 0 else {"own": "its own rates"}).items():
            curves = [c for c in (reading_curve(rows, rule, dataset) for rows in runs) if c]
            if curves:
                lines.append((f"{label}, {words}", curves[0][0], np.stack([c for _, c in curves])))
    return lines


def print_table(lines: list, methods: dict):
    R, T = lines[0][2].shape[1], lines[0][1]
    print(f"unseen text, nats per token over the first {R * T:,}, each predicted, then learned:")
    for label, _, curves in lines:
        means, log = curves.mean(1), methods[label.split(",")[0]][0]
        spread = f" ± {means.std(ddof=1):.3f} over {len(means)} seeds" if len(means) > 1 else ""
        tokens = max(row["tokens"] for row in log if row["kind"] == "val") / 1e6
        print(f"  {label:36}{means.mean():.3f}{spread}  after {tokens:.1f}M training tokens")
    adamw = next((curves for label, _, curves in lines if label.endswith("AdamW")), None)
    if adamw is not None and len(lines) > 2:
        label, _, curves = lines[-1]
        print(fewer_examples(label.split(",")[0], curves.mean(0), adamw.mean(0), T))


def draw(methods: dict, lines: list, output: Path):
    figure = Figure(figsize=(13, 5), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    colors = dict(zip([label for label, *_ in lines], COLORS, strict=False))
    for label, T, curves in lines:
        x = T * np.arange(1, curves.shape[1] + 1)
        y = np.array([running(curve) for curve in curves])
        draw_line(left, x, y, label, colors[label])
    left.set(title="Reading text that was never seen", xlabel="tokens of it read so far")
    left.set(ylabel="nats per token, over the later half of them")
    for i, (label, runs) in enumerate(methods.items()):
        for table, style in (("loss", "-"), ("online", "--")):
            curves = [c for c in (training_curve(rows, table) for rows in runs) if len(c) > 1]
            if curves and np.ptp(curves[0][:, 1]):  # theta that stays as it is has no curve
                n = min(map(len, curves))  # a seed may not have come as far
                y = np.array([curve[:n, 1] for curve in curves])
                words = "no learning" if table == "loss" else "learning as it reads"
                draw_line(right, curves[0][:n, 0], y, f"{label}, {words}", COLORS[i + 1], style)
    if ends := [line.get_ydata()[-1] for line in right.lines]:
        right.set_ylim(min(ends) - 0.05, max(ends) + 0.6)  # the first steps would press it flat
    right.set(title="Pretraining: loss on domains held out", xlabel="training tokens")
    right.set(ylabel="nats per token")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.45 * max((line.get_xdata()[-1] for line in axes.lines), default=1))
        space_labels(axes)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def draw_line(axes, x, y, label: str, color: str, style="-"):
    """The mean of y (seeds, points) with the range of the seeds, and its name at its end."""
    mean = y.mean(0)
    axes.plot(x, mean, color=color, ls=style)
    axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.2, lw=0)
    axes.annotate(f"{label} {mean[-1]:.2f}", (x[-1], mean[-1]), color=color, va="center", size=8.5)


def space_labels(axes):
    """Puts the labels right of all lines, those that would overlap apart, from the lowest up."""
    low, high = axes.get_ylim()
    gap, below = 0.045 * (high - low), -np.inf
    end = max((text.xy[0] for text in axes.texts), default=0)
    for text in sorted(axes.texts, key=lambda text: text.xy[1]):
        below = max(text.xy[1], below + gap)
        text.set_position((1.01 * end, below))


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", type=Path, help="folders or logs, baseline first")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/curves.png"))
    parser.add_argument("--dataset", help="whose domains were read; default: the runs' own")
    args = parser.parse_args(argv)
    methods = read_methods(args.runs)
    lines = reading_lines(methods, args.dataset)
    if not lines:
        raise SystemExit("no run was read yet: python adapt.py RUN writes what the picture shows")
    print_table(lines, methods)
    draw(methods, lines, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
