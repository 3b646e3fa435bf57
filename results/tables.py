"""The long tables of results/README.md, from the logs beside this file.

    python results/tables.py results/demo/*.jsonl   # markdown to stdout

A log is named method_s<seed>.jsonl. The first method, read by tuned AdamW (by its own rates if it
was not read so), is what the others are compared with, paired by seed. ± is half of a 95% interval
of Student's t over seeds; of two seeds both values are given. 'documents' is such a half over
passages, of the differences' means over seeds, the domains taken as given. Where a method x has a
half_x of fewer training tokens, a line between the two, straight over the logarithm of the tokens,
says how many times fewer tokens x needs than the first method.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import read_methods, running, tokens_needed

# Student's t for 1, 2, ... degrees of freedom
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
RULES = ("none", "adamw", "own")


def main(paths: list[str]):
    methods = read_methods([Path(path) for path in paths])
    logs = {m: {rows[0]["config"]["seed"]: rows for rows in runs} for m, runs in methods.items()}
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
            how = dict(faster=group == heldout)
            print_readings(f"{dataset}: {title}", dataset, group, logs, baseline, readings, **how)


def read_rows(rows: list[dict]) -> dict:
    """{(dataset, role, domain, rule): row} of a log; newer rows replace older ones."""
    adapt = [row for row in rows if row["kind"] == "adapt"]
    return {(r["dataset"], r["role"], r["domain"], r["rule"]): r for r in adapt}


def print_runs(logs):
    print("| method | seeds | tokens | FLOPs | held-out, theta | AdamW (first seed) |")
    print("|---|---|---|---|---|---|")
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
        cells += [f"{last['flops']:.2e}", interval(ends), options]
        print(f"| {' | '.join(cells)} |")


def print_readings(title, dataset, group, logs, baseline, readings, faster):
    def found(method, seed, rule):
        """The rows of the group's domains, or [] if one is missing."""
        rows = readings[method, seed].items()
        rows = [row for key, row in rows if key[0] == dataset and key[2] in group]
        rows = [row for row in rows if row["rule"] == rule]
        return rows if len(rows) == len(group) else []

    def read_by(method, rule):
        rows = {seed: found(method, seed, rule) for seed in logs[method]}
        return {seed: np.mean([r["loss"] for r in rs], 0) for seed, rs in rows.items() if rs}

    rule = "adamw" if read_by(baseline, "adamw") else "own"
    reference, lines = read_by(baseline, rule), []
    for method, by in [(method, by) for method in logs for by in RULES]:
        curves = read_by(method, by)
        if not curves:
            continue
        first = found(method, min(curves), by)[0]
        T, R = first["row_tokens"], len(first["loss"])
        edges = [0, R // 8, R // 4, R // 2, R]
        parts = [(0, R), *pairwise(edges)]
        means = [np.mean([c[a:b].mean() for c in curves.values()]) for a, b in parts]
        paired = [s for s in curves if s in reference]
        differences = [curves[s].mean() - reference[s].mean() for s in paired]
        needed = [tokens_needed(curves[s], running(reference[s])[-1], T) for s in paired]
        times = [R * T / n for n in needed if n]
        fewer = interval(times, "x") if len(times) == len(paired) > 0 else "not reached"
        cells = [method, by, *(f"{mean:.3f}" for mean in means), interval(differences, sign="+")]
        pairs = [(found(method, s, by), found(baseline, s, rule)) for s in paired]
        lines.append([*cells, over_documents(pairs), fewer if by == "own" else ""])
    if lines:
        heads = ["method", "rule", "mean", *(f"{a * T:,} to {b * T:,}" for a, b in pairwise(edges))]
        heads += [f"mean less {baseline}'s by {rule}", "documents", "fewer examples"]
        print(f"\n{title}, nats per token\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for cells in lines:
            print(f"| {' | '.join(cells)} |")
    for method in logs if faster else ():
        half = f"half_{method}"
        if half not in logs or not (read_by(method, "own") and read_by(half, "own")):
            continue
        ends = {m: {s: c.mean() for s, c in read_by(m, "own").items()} for m in (half, method)}
        ratios = []
        for seed in sorted(ends[half].keys() & ends[method].keys() & reference.keys()):
            high, low = ends[half][seed], ends[method][seed]
            n, full, of_baseline = (tokens_of(logs[m][seed]) for m in (half, method, baseline))
            share = (high - reference[seed].mean()) / (high - low)  # of the way from half
            ratios.append(of_baseline / (n * (full / n) ** share))
        print(f"\nfaster: {method} needs {interval(ratios, 'x')} fewer training tokens")


def tokens_of(rows: list[dict]) -> int:
    return max(row["tokens"] for row in rows if row["kind"] == "val")


def over_documents(pairs) -> str:
    """Half of a 95% interval over passages, of [(rows by domain, rows by domain)] of each seed."""
    gaps = []  # by domain: (P,)
    for rows in zip(*(zip(a, b, strict=True) for a, b in pairs), strict=True):
        gaps.append(np.mean([np.subtract(a["by_passage"], b["by_passage"]) for a, b in rows], 0))
    variance = sum(gap.var(ddof=1) / len(gap) for gap in gaps) / max(1, len(gaps)) ** 2
    return f"± {1.96 * variance**0.5:.3f}" if gaps else ""


def interval(values, unit="", sign="") -> str:
    """The mean, and half of its 95% interval; of one or two values these alone."""
    if len(values) < 3:
        return ", ".join(f"{value:{sign}.3f}{unit}" for value in values)
    half = T95[len(values) - 2] * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):{sign}.3f}{unit} ± {half:.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
