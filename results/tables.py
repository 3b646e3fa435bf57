"""The long tables of results/README.md, from the logs beside this file.

    python results/tables.py results/demo/*.jsonl   # the baseline's logs first; markdown to stdout

A log is named method_s<seed>.jsonl. Differences are to the baseline read by tuned AdamW, paired by
seed, with 95% intervals of Student's t where there are two seeds or more.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from plot import read_log, running, tokens_needed

T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365]  # for 1, 2, ... degrees of freedom
RULES = ("none", "adamw", "own")


def main(paths: list[str]):
    logs = defaultdict(dict)  # by method, by seed
    for path in map(Path, paths):
        method, _, seed = path.stem.rpartition("_s")
        logs[method][int(seed)] = read_log(path)
    baseline, *_ = logs
    readings = {
        (method, seed): read_rows(rows) for method in logs for seed, rows in logs[method].items()
    }
    print_runs(logs)
    datasets = sorted({key[0] for found in readings.values() for key in found})
    for dataset in datasets:
        domains = sorted(
            {key[1:3] for found in readings.values() for key in found if key[0] == dataset}
        )
        groups = {f"{d} ({role})": [d] for role, d in domains}
        heldout = [d for role, d in domains if role == "heldout"]
        if len(heldout) > 1:
            groups = {f"mean of {', '.join(heldout)}": heldout} | groups
        for title, group in groups.items():
            print_readings(f"{dataset}: {title}", dataset, group, logs, baseline, readings)


def read_rows(rows: list[dict]) -> dict:
    """{(dataset, role, domain, rule): row} of a log; newer rows replace older ones."""
    adapt = [row for row in rows if row["kind"] == "adapt"]
    return {(r["dataset"], r["role"], r["domain"], r["rule"]): r for r in adapt}


def print_runs(logs):
    print("| method | seeds | tokens | FLOPs | seconds | held-out, theta | AdamW (first seed) |")
    print("|---|---|---|---|---|---|---|")
    for method, seeds in logs.items():
        rows = next(iter(seeds.values()))
        roles = rows[0]["dataset"]["roles"]
        last = [row for row in rows if row["kind"] == "val"][-1]
        ends = []
        for run in seeds.values():
            end = [row for row in run if row["kind"] == "val"][-1]["loss"]
            ends.append(np.mean([loss for d, loss in end.items() if roles[d] == "heldout"]))
        chosen = [row["options"] for row in rows if row.get("rule") == "adamw"]
        options = ", ".join(f"{k} {v:g}" for k, v in chosen[0].items()) if chosen else ""
        cells = [method, ", ".join(map(str, sorted(seeds))), f"{last['tokens']:,}"]
        cells += [f"{last['flops']:.2e}", f"{last['seconds']:,.0f}", interval(ends), options]
        print(f"| {' | '.join(cells)} |")


def print_readings(title, dataset, group, logs, baseline, readings):
    def curve(method, seed, rule):
        found = readings[method, seed]
        rows = [row for key, row in found.items() if key[0] == dataset and key[2] in group]
        losses = [row["loss"] for row in rows if row["rule"] == rule]
        return np.mean(losses, axis=0) if len(losses) == len(group) else None

    def read_by(method, rule):
        curves = {seed: curve(method, seed, rule) for seed in logs[method]}
        return {seed: c for seed, c in curves.items() if c is not None}

    lines, reference = [], read_by(baseline, "adamw")
    for method in logs:
        for rule in RULES:
            curves = read_by(method, rule)
            if not curves:
                continue
            R = len(next(iter(curves.values())))
            T = next(r["row_tokens"] for r in readings[method, min(curves)].values())
            parts = [(0, R), (0, R // 8), (R // 8, R // 4), (R // 4, R // 2), (R // 2, R)]
            means = [np.mean([c[a:b].mean() for c in curves.values()]) for a, b in parts]
            paired = [s for s in curves if s in reference]
            differences = [curves[s].mean() - reference[s].mean() for s in paired]
            needed = [tokens_needed(curves[s], running(reference[s])[-1], T) for s in paired]
            times = [R * T / n for n in needed if n]
            fewer = interval(times, "x") if len(times) == len(paired) > 0 else "not reached"
            cells = [method, rule, *(f"{mean:.3f}" for mean in means)]
            lines.append([*cells, interval(differences, sign="+"), fewer if rule == "own" else ""])
    if lines:
        edges = [R // 8 * T, R // 4 * T, R // 2 * T, R * T]
        heads = ["method", "rule", "mean", *(f"-{edge:,}" for edge in edges)]
        heads += ["mean less the baseline's by AdamW", "fewer examples"]
        print(f"\n{title}, nats per token\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for cells in lines:
            print(f"| {' | '.join(cells)} |")


def interval(values, unit="", sign="") -> str:
    """The mean, and half of its 95% interval where there is one."""
    if not len(values):
        return ""
    text = f"{np.mean(values):{sign}.3f}{unit}"
    if len(values) > 1:
        half = T95[len(values) - 2] * np.std(values, ddof=1) / np.sqrt(len(values))
        text += f" ± {half:.3f}"
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
