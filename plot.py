"""The picture and one short table, from logs alone.

    python plot.py out/baseline_demo out/rates_demo out/maml_demo -o out/curves.png

Left: how unseen text is read, by the rates that a run has learned, or without learning and by AdamW
(adapt.py writes these rows). Right: the loss on held-out domains while training. Runs named x_s1,
x_s2, ... are the seeds of one method: a line is their mean, a band their range.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

WORDS = {"none": "no learning", "adamw": "tuned AdamW", "own": "its own rates"}
STYLES = {"none": ":", "adamw": "--", "own": "-"}

# --------------------------------------------------------------------------------------------------
# logs, curves, measures


def read_methods(paths: list[Path]) -> dict[str, list[list[dict]]]:
    """{name: the logs of its seeds}, in the order of the paths."""
    methods, units = {}, set()
    for path in dict.fromkeys(path.resolve() for path in paths):
        rows = read_log(path)
        named = path.parent if path.name == "log.jsonl" else path
        name = named.name.removesuffix(".jsonl")
        runs = methods.setdefault(re.sub(r"_s\d+$", "", name), [])
        if any(run[0]["config"]["seed"] == rows[0]["config"]["seed"] for run in runs):
            raise SystemExit(f"two runs named {name!r} have one seed: rename a folder or a log")
        runs.append(rows)
        units.add(rows[0]["dataset"]["tokenizer"])
    if len(units) > 1:
        raise SystemExit(f"losses of {' and '.join(units)} tokens do not compare: plot apart")
    return methods


def read_log(path: Path) -> list[dict]:
    """The rows of a log, less a last line that a run in progress is still writing."""
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise SystemExit(f"no log at {log}: pass the out_dir of a run of train.py")
    try:
        rows = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    except ValueError as error:
        raise SystemExit(f"{log} has a line that is no row ({error}): delete that line") from None
    kinds = [row.get("kind") for row in rows]
    if kinds[:1] != ["run"] or "val" not in kinds:
        raise SystemExit(f"{log} lacks its header or an evaluation: wait, or train again")
    return rows


def reading_curve(rows: list[dict], rule: str, dataset: str | None = None):
    """(tokens read after each row, its loss over the held-out domains), (R,); None if not read."""
    wanted = {"kind": "adapt", "role": "heldout", "rule": rule}
    wanted["dataset"] = dataset or rows[0]["dataset"]["name"]
    found = {row["domain"]: row for row in rows if wanted.items() <= row.items()}  # the newest
    if not found:
        return None
    loss = np.mean([row["loss"] for row in found.values()], axis=0)
    T = next(iter(found.values()))["row_tokens"]
    return T * np.arange(1, len(loss) + 1), loss


def training_curve(rows: list[dict], rule: str):
    """(training tokens, loss over the held-out domains) of evaluations; None if it is constant."""
    table = {"none": "loss", "own": "online"}.get(rule)
    roles, points = rows[0]["dataset"]["roles"], {}
    for row in rows:
        losses = row.get(table, {}) if row["kind"] == "val" else {}
        heldout = [loss for domain, loss in losses.items() if roles[domain] == "heldout"]
        if heldout:
            points[row["tokens"]] = np.mean(heldout)
    if len(set(points.values())) < 2:
        return None
    return list(points), list(points.values())


def lines_of(methods: dict, curve_of) -> dict[tuple[str, str], tuple]:
    """{(name, rule): (x (n,), y (seeds, n))}, of the seeds that have a curve."""
    lines = {}
    for name, runs in methods.items():
        for rule in STYLES:
            curves = [curve_of(rows, rule) for rows in runs]
            curves = [curve for curve in curves if curve]
            if curves:
                x = min((x for x, _ in curves), key=len)  # a seed may not have come as far
                lines[name, rule] = x, np.array([y[: len(x)] for _, y in curves])
    return lines


def running(curve: np.ndarray) -> np.ndarray:
    """The loss over the later half of what was read, after each row of `curve`, (..., R)."""
    ends = range(1, curve.shape[-1] + 1)
    return np.stack([curve[..., n // 2 : n].mean(-1) for n in ends], -1)


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
    where = f"{name} is after {n:,} tokens where AdamW is after {end:,}"
    return f"fewer examples: {where}: {end / n:.1f} times fewer"


# --------------------------------------------------------------------------------------------------
# the table and the picture


def print_table(reading: dict, methods: dict):
    x = next(iter(reading.values()))[0]
    print(f"unseen text, nats per token over the first {x[-1]:,}, each predicted, then learned:")
    for (name, rule), (_, y) in reading.items():
        means = y.mean(1)
        spread = f" ± {means.std(ddof=1):.3f} over {len(means)} seeds" if len(means) > 1 else ""
        tokens = max(row["tokens"] for row in methods[name][0] if row.get("rule") == rule) / 1e6
        label = f"{name}, {WORDS[rule]}"
        print(f"  {label:36}{means.mean():.3f}{spread}  after {tokens:.1f}M training tokens")
    adamw = [y.mean(0) for (_, rule), (_, y) in reading.items() if rule == "adamw"]
    (name, rule), (x, y) = list(reading.items())[-1]
    if rule == "own" and adamw:
        strongest = min(adamw, key=lambda curve: running(curve)[-1])
        print(fewer_examples(name, y.mean(0), strongest, x[0]))


def draw(reading: dict, training: dict, output: Path):
    figure = Figure(figsize=(15, 4.5), layout="constrained", dpi=90)
    left, right = figure.subplots(1, 2)
    reading = {key: (x, running(y)) for key, (x, y) in reading.items()}
    names = list(dict.fromkeys(name for name, _ in [*reading, *training]))
    for axes, lines in ((left, reading), (right, training)):
        for (name, rule), (x, y) in lines.items():
            mean, color = y.mean(0), f"C{names.index(name)}"
            label = f"{name}, {WORDS[rule]}: {mean[-1]:.2f}"
            axes.plot(x, mean, STYLES[rule], color=color, label=label)
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.2, lw=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="loss at the end")
    if training:
        ends = [y[:, -1].mean() for _, y in training.values()]
        right.set_ylim(min(ends) - 0.05, max(ends) + 0.6)  # the first steps would press it flat
    left.set(title="Reading text that was never seen", xlabel="tokens of it read so far")
    left.set(ylabel="nats per token, over the later half of them")
    right.set(title="Pretraining: loss on domains held out", xlabel="training tokens")
    right.set(ylabel="nats per token")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", type=Path, help="folders or logs, baseline first")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/curves.png"))
    parser.add_argument("--dataset", help="whose domains were read; default: the runs' own")
    args = parser.parse_args(argv)
    methods = read_methods(args.runs)
    reading = lines_of(methods, lambda rows, rule: reading_curve(rows, rule, args.dataset))
    if not reading:
        raise SystemExit("no run was read yet: python adapt.py RUN writes what the picture shows")
    learners = [name for name, rule in reading if rule == "own"]  # shown by that rule alone
    for name in learners:
        reading.pop((name, "none"), None)
        reading.pop((name, "adamw"), None)
    print_table(reading, methods)
    draw(reading, lines_of(methods, training_curve), args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
