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
    """{name: the logs of its seeds}, in the order of the paths."""
    methods = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        name = path.parent.name if path.name == "log.jsonl" else path.stem
        runs = methods.setdefault(re.sub(r"_s\d+$", "", name), [])
        runs.append(read_log(path))
        if len({rows[0]["config"]["seed"] for rows in runs}) < len(runs):
            raise SystemExit(f"two runs named {name!r} have one seed: rename a folder or a log")
    units = {rows[0]["dataset"]["tokenizer"] for runs in methods.values() for rows in runs}
    if len(units) > 1:
        raise SystemExit(f"losses of {' and '.join(units)} tokens do not compare: plot apart")
    return methods


def training_curve(rows: list[dict], table: str) -> np.ndarray:
    """(evaluations, 2): training tokens, and the mean loss on the held-out domains."""
    roles, points = rows[0]["dataset"]["roles"], []
    for row in rows:
        losses = row[table] if row["kind"] == "val" else {}
        if heldout := [loss for d, loss in losses.items() if roles[d] == "heldout"]:
            points.append((row["tokens"], np.mean(heldout)))
    return np.array(points).reshape(-1, 2)


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


def reading_lines(methods: dict, dataset=None) -> list[tuple[str, str, int, np.ndarray]]:
    """(name, rule, T, curves (seeds, R)): by 'own' where it was read so, or 'none' and 'adamw'."""
    lines = []
    for name, runs in methods.items():
        learns = any(row.get("rule") == "own" for row in runs[0])
        for rule in ("own",) if learns else ("none", "adamw"):
            curves = [c for c in (reading_curve(rows, rule, dataset) for rows in runs) if c]
            if curves:
                lines.append((name, rule, curves[0][0], np.stack([c for _, c in curves])))
    return lines


def print_table(lines: list, methods: dict):
    _, _, T, curves = lines[0]
    total = T * curves.shape[1]
    print(f"unseen text, nats per token over the first {total:,}, each predicted, then learned:")
    for name, rule, _, curves in lines:
        means = curves.mean(1)
        spread = f" ± {means.std(ddof=1):.3f} over {len(means)} seeds" if len(means) > 1 else ""
        read = [row["tokens"] for row in methods[name][0] if row.get("rule") == rule]
        tokens = max(read) / 1e6
        label = f"{name}, {WORDS[rule]}"
        print(f"  {label:36}{means.mean():.3f}{spread}  after {tokens:.1f}M training tokens")
    name, rule, _, curves = lines[-1]
    adamw = [curves.mean(0) for _, rule, _, curves in lines if rule == "adamw"]
    if adamw and rule == "own":
        strongest = min(adamw, key=lambda curve: running(curve)[-1])
        print(fewer_examples(name, curves.mean(0), strongest, T))


def draw(methods: dict, lines: list, output: Path):
    figure = Figure(figsize=(15, 4.5), layout="constrained", dpi=90)
    left, right = figure.subplots(1, 2)
    for name, rule, T, curves in lines:
        x = T * np.arange(1, curves.shape[1] + 1)
        y = np.array([running(curve) for curve in curves])
        draw_line(left, x, y, name, rule, list(methods).index(name))
    left.set(title="Reading text that was never seen", xlabel="tokens of it read so far")
    left.set(ylabel="nats per token, over the later half of them")
    for i, (name, runs) in enumerate(methods.items()):
        for table, rule in (("loss", "none"), ("online", "own")):
            curves = [c for c in (training_curve(rows, table) for rows in runs) if len(c) > 1]
            if curves and np.ptp(curves[0][:, 1]):  # theta that stays as it is has no curve
                n = min(map(len, curves))  # a seed may not have come as far
                y = np.array([curve[:n, 1] for curve in curves])
                draw_line(right, curves[0][:n, 0], y, name, rule, i)
    if ends := [line.get_ydata()[-1] for line in right.lines]:
        right.set_ylim(min(ends) - 0.05, max(ends) + 0.6)  # the first steps would press it flat
    right.set(title="Pretraining: loss on domains held out", xlabel="training tokens")
    right.set(ylabel="nats per token")
    for axes in (left, right):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="loss at the end")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def draw_line(axes, x, y, name: str, rule: str, i: int):
    """The mean of y (seeds, points) of the i-th method, with the range of the seeds."""
    mean = y.mean(0)
    label = f"{name}, {WORDS[rule]}: {mean[-1]:.2f}"
    axes.plot(x, mean, STYLES[rule], color=f"C{i}", label=label)
    axes.fill_between(x, y.min(0), y.max(0), color=f"C{i}", alpha=0.2, lw=0)


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
