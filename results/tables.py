"""Every figure of results/README.md, from the logs: markdown to stdout.

    python results/tables.py results/corpus/*.jsonl
    python results/tables.py results/demo/*.jsonl \\
        --groups tune=local:type_stubs test=local:cpp_headers,python_docs

A log is named method_s<seed>.jsonl; a method that ends in its budget, recipe_2.5M, is a point on
the way to the method without it. Losses are nats per token, which is a byte in most of our logs.

The tune domains choose, whatever the others say: of AdamW and dynamic evaluation on any method the
opponent, of all inner loops (and their safe mixtures) the headline's row; both among the methods of
the most seeds. It is told on all other groups together. Differences are paired by seed, with two
95% intervals of Student's t: over seeds, and over domains, each of these the mean over seeds.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import OPPONENTS, WORDS, newest_readings, read_by, read_methods, running, tokens_needed

GROUPS = [  # name=dataset:domains
    "tune=corpus:podcasts,math_latex,changelogs",
    "test=corpus:bible,drama,latin",
    "fresh=fresh:french_novels,german_law,recipes_zh,csv_tables,chess_pgn",
]
# Student's t for 1, 2, ... degrees of freedom
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179]


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--groups", nargs="+", default=GROUPS, help="name=dataset:domain,domain")
    parser.add_argument("--opponent", nargs=2, metavar=("METHOD", "RULE"), help="else: by tune")
    args = parser.parse_args(argv)
    methods = read_methods(args.logs)
    readings, groups = read_groups(methods, args.groups)
    told = [domain for name in groups if name != "tune" for domain in groups[name]]
    tune = groups.get("tune", told)
    whole = {key: curves(seeds, [*tune, *told]) for key, seeds in readings.items()}
    most = max(len(found) for found in whole.values())
    judged = {  # {(method, rule): loss over the tune domains}
        key: np.nan_to_num(np.mean([*curves(readings[key], tune).values()]), nan=np.inf)
        for key, found in whole.items()
        if len(found) == most > 0
    }
    rivals = [key for key in judged if key[1] in OPPONENTS]
    opponent = tuple(args.opponent or min(rivals, key=judged.get, default=("a run", "adamw")))
    if opponent not in readings:
        raise SystemExit(f"no reading of {opponent[0]} by {opponent[1]!r}: name an --opponent")
    print_runs(methods)
    columns, domains = groups | {"all but tune": told}, {d: [d] for d in [*tune, *told]}
    print_losses("Unseen text, ± over seeds", readings, columns, told)
    print_losses("By domain, ± over seeds", readings, domains)
    title = f"Less {label(opponent)}: ± over seeds, ± over domains"
    print_differences(title, readings, columns, told, opponent)
    print_differences("The same by domain", readings, domains, told, opponent)
    if ours := [key for key in judged if key[1] not in ("none", *OPPONENTS)]:
        print_headline(methods, readings, told, min(ours, key=judged.get), opponent)
    if few := ", ".join(label(key) for key in readings if key not in judged and key[1] != "none"):
        print(f"\nread fewer than {most} seeds or not all domains, so not to be chosen: {few}")


def read_groups(methods: dict, texts: list[str]) -> tuple[dict, dict]:
    """{(method, rule): {seed: {domain: row}}}, and {group: its domains that were read}."""
    readings, groups = {}, {}
    for text in texts:
        group, dataset, domains = re.split("[=:]", text)
        role, names = "tune" if group == "tune" else "heldout", domains.split(",")
        if twice := {*names} & {d for read in groups.values() for d in read}:
            raise SystemExit(f"{', '.join(twice)} in two groups: name each domain once")
        read_by(methods, dataset, role)  # which refuses what was not read alike
        for method, run in [(name, run) for name, runs in methods.items() for run in runs]:
            for rule, found in newest_readings(run, dataset, role).items():
                found = {domain: row for domain, row in found.items() if domain in names}
                seeds = readings.setdefault((method, rule), {})
                seeds.setdefault(run[0]["config"]["seed"], {}).update(found)
        read = {d for seeds in readings.values() for rows in seeds.values() for d in rows}
        groups |= {group: [d for d in names if d in read]} if read & {*names} else {}
        if missing := ", ".join(d for d in names if d not in read):
            print(f"not read, so in no mean: {missing} ({group})\n")
    if not groups.keys() - {"tune"}:
        raise SystemExit("no domain of a group was read: name them, --groups test=DATASET:DOMAIN")
    order = [(method, rule) for method in methods for rule in WORDS]
    return {key: readings[key] for key in order if key in readings}, groups


def curves(seeds: dict, domains: list[str]) -> dict[int, np.ndarray]:
    """{seed: (R,), mean over domains} of the seeds that have read them all."""
    whole = {seed: rows for seed, rows in seeds.items() if {*domains} <= rows.keys()}
    return {s: np.mean([rows[d]["loss"] for d in domains], 0) for s, rows in whole.items()}


# --------------------------------------------------------------------------------------------------
# tables


def table(title: str, heads: list[str], lines: list[list[str]]):
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def print_runs(methods: dict):
    lines = []
    for method, runs in methods.items():
        last = [row for row in runs[0] if row["kind"] == "val"][-1]
        chosen = {row["rule"]: row["options"] for row in runs[0] if row.get("rule") in OPPONENTS}
        chosen = [f"{rule} {json.dumps(options)}" for rule, options in chosen.items() if options]
        cells = [method, f"{runs[0][0].get('params')}", str(len(runs)), f"{last['tokens']:,}"]
        lines.append([*cells, f"{last['flops']:.2e}", " ".join(chosen)])
    heads = ["method", "parameters", "seeds", "training tokens", "training FLOPs"]
    table("Runs", [*heads, "options that the tune domains chose (first seed)"], lines)


def print_losses(title: str, readings: dict, columns: dict, first: list[str] | None = None):
    """`columns` are {head: domains}; of the domains `first` the first 512 tokens are one more."""
    lines = []
    for (method, rule), seeds in readings.items():
        row = next(row for rows in seeds.values() for row in rows.values())
        cells = [method, WORDS[rule], f"{row.get('forwards') or '-'}", str(len(seeds))]
        for domains in columns.values():
            cells.append(interval([curve.mean() for curve in curves(seeds, domains).values()]))
        if first:
            few = -(-512 // row["row_tokens"])
            cells.append(interval([curve[:few].mean() for curve in curves(seeds, first).values()]))
        lines.append(cells)
    heads = ["method", "rule", "forwards a token", "seeds", *columns]
    table(title, [*heads, "their first 512 tokens"] if first else heads, lines)


def print_differences(title: str, readings: dict, columns: dict, told: list[str], opponent):
    lines, theirs = [], readings[opponent]
    for (method, rule), seeds in readings.items():
        gaps = [difference(seeds, theirs, domains) for domains in columns.values()]
        lines.append([method, WORDS[rule], *gaps, fewer_tokens_read(seeds, theirs, told)])
    table(title, ["method", "rule", *columns, "fewer examples, times"], lines)


def label(key: tuple[str, str]) -> str:
    return f"{key[0]}, {WORDS[key[1]]}"


def difference(seeds: dict, theirs: dict, domains: list[str]) -> str:
    """The mean, half of its interval over seeds, and half of that over domains."""
    paired = sorted(curves(seeds, domains).keys() & curves(theirs, domains).keys())
    a, b = (
        np.array([[np.mean(of[s][d]["loss"]) for d in domains] for s in paired])
        for of in (seeds, theirs)
    )  # (seeds, domains)
    if not paired:
        return "-"
    over_domains = f" ± {half((a - b).mean(0)):.3f}" if len(domains) > 1 else ""
    return interval((a - b).mean(1), "+") + over_domains


def fewer_tokens_read(seeds: dict, theirs: dict, domains: list[str]) -> str:
    a, b = curves(seeds, domains), curves(theirs, domains)
    levels = {seed: running(b[seed])[-1] for seed in sorted(a.keys() & b.keys())}
    needs = [(tokens_needed(a[s], n, 1), tokens_needed(b[s], n, 1)) for s, n in levels.items()]
    if not needs or None in [need for pair in needs for need in pair]:
        return "not reached" if needs else "-"
    return interval([theirs / ours for ours, theirs in needs])


def print_headline(methods: dict, readings: dict, told: list[str], best, opponent):
    gap = difference(readings[best], readings[opponent], told)
    print(f"\nheadline: {label(best)}, less {label(opponent)}:")
    print(f"{gap} (over seeds, over {len(told)} domains)")
    levels = {seed: curve.mean() for seed, curve in curves(readings[opponent], told).items()}
    points = {seed: {} for seed in curves(readings[best], told) if seed in levels}
    for (method, rule), seeds in readings.items():  # {seed: {training tokens: loss}}
        same = [re.sub(r"_[\d.]+M$", "", name) for name in (method, best[0])]
        params = [methods[name][0][0].get("params") for name in (method, best[0])]
        if rule == best[1] and len({*same}) == len({*params}) == 1:
            for seed, curve in curves(seeds, told).items():
                points.get(seed, {})[seeds[seed][told[0]]["tokens"]] = curve.mean()
    needed = {seed: training_tokens_needed(found, levels[seed]) for seed, found in points.items()}
    if None in needed.values():
        print(f"faster: not all seeds come to the loss of {label(opponent)}")
        return
    budgets = [readings[opponent][seed][told[0]]["tokens"] for seed in needed]
    least = "at least " if any(n == min(points[seed]) for seed, n in needed.items()) else ""
    times = interval(np.divide(budgets, [*needed.values()]))
    print(f"faster: {least}{times} times fewer training tokens")


def training_tokens_needed(points: dict[int, float], level: float) -> float | None:
    """Tokens to a level, straight over their logarithm between the two budgets around it.

    The smallest budget, where that is there already: then fewer tokens would do. None: not reached.
    """
    tokens = sorted(points)
    above = [i for i, n in enumerate(tokens) if not points[n] <= level]
    if not tokens or above[-1:] == [len(tokens) - 1]:
        return None
    if not above:
        return tokens[0]
    n, more = tokens[above[-1]], tokens[above[-1] + 1]
    return n * (more / n) ** ((points[n] - level) / (points[n] - points[more]))


def half(values) -> float:
    return T95[min(len(values) - 1, len(T95)) - 1] * np.std(values, ddof=1) / len(values) ** 0.5


def interval(values, sign="") -> str:
    """The mean, and half of its 95% interval; of one or two values these alone."""
    if len(values) < 3:
        return ", ".join(f"{value:{sign}.3f}" for value in values) or "-"
    return f"{np.mean(values):{sign}.3f} ± {half(values):.3f}"


if __name__ == "__main__":
    main()
