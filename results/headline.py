"""The headline once more, from the logs, by code that shares nothing with tables.py and plot.py.

    python results/headline.py results/corpus/*.jsonl --expect -0.063 0.006

Prints the mean difference on all domains but tune in nats per token (here a byte), half of its 95%
interval over seeds and over domains, and how many times fewer training tokens come to the
opponent's loss. A domain where one of both has no finite loss is left out, and named, and so is
one of --without. Fails if one of these figures is not as expected.
"""

import argparse
import json
import math
from statistics import fmean, stdev

TUNE = {"podcasts", "math_latex", "changelogs"}
TOLD = {"bible", "drama", "latin"}
TOLD |= {"french_novels", "german_law", "recipes_zh", "csv_tables", "chess_pgn"}
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # 1, 2, ... of freedom


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+")
    parser.add_argument("--expect", nargs="+", type=float, default=[])
    parser.add_argument("--without", nargs="+", default=[], help="domains")
    args = parser.parse_args(argv)
    logs = {}  # {(method, series, rule): {seed: {domain: (loss, training tokens)}}}
    for path in args.logs:
        with open(path) as file:
            header, *rows = map(json.loads, file)
        rows = [row for row in rows if row.get("dataset") in ("corpus", "fresh")]
        for row in [row for row in rows if row.get("model") == rows[-1].get("model")]:
            name = path.rpartition("/")[2].rpartition("_s")[0]
            series = name.rpartition("_")[0] if name.endswith("M") else name  # recipe_2.5M: recipe
            seeds = logs.setdefault((name, series, row["rule"]), {})
            read = seeds.setdefault(header["config"]["seed"], {})
            read[row["domain"]] = fmean(row["loss"]), row["tokens"]
    met = {domain for seeds in logs.values() for read in seeds.values() for domain in read}
    tune, told = sorted(TUNE & met), sorted(TOLD & met - {*args.without})

    def loss(read, domains):
        return fmean(read[domain][0] for domain in domains)

    for key, seeds in logs.items():
        logs[key] = {s: read for s, read in seeds.items() if {*tune, *told} <= read.keys()}
    most, chosen = max(map(len, logs.values())), []
    opponents = ("adamw", "dynamic", "adamw_once", "momentum", "adamw_falling", "dynamic_falling")
    for rules in (("own", "safe", "own_falling"), opponents):
        rows = [key for key in logs if key[2] in rules and len(logs[key]) == most]
        chosen.append(min(rows, key=lambda row: fmean(loss(r, tune) for r in logs[row].values())))
    ours, theirs = (logs[key] for key in chosen)
    seeds, times = sorted(ours.keys() & theirs.keys()), []
    failed = {d for d in told for s in seeds if not math.isfinite(ours[s][d][0] + theirs[s][d][0])}
    told = [domain for domain in told if domain not in failed]
    if failed:
        print("left out, as a loss is not finite:", *sorted(failed))
    print(f"{len(told)} domains:", *told)
    gaps = [[ours[s][d][0] - theirs[s][d][0] for d in told] for s in seeds]
    for s in seeds:
        runs = [logs[key][s] for key in logs if key[1:] == chosen[0][1:] and s in logs[key]]
        points = sorted((run[told[0]][1], loss(run, told)) for run in runs)
        times.append(theirs[s][told[0]][1] / needed(points, loss(theirs[s], told)))
    by_seed, by_domain = [*map(fmean, gaps)], [*map(fmean, zip(*gaps, strict=True))]
    figures = fmean(by_seed), half(by_seed), half(by_domain), fmean(times)
    print("{} by {} less {} by {}:".format(*chosen[0][::2], *chosen[1][::2]))
    print("{:+.3f} ± {:.3f} over seeds, ± {:.3f} over domains; {:.3f} times".format(*figures))
    if any(round(a, 3) != b for a, b in zip(figures, args.expect, strict=False)):
        raise SystemExit(f"expected {args.expect}")


def half(values: list[float]) -> float:
    return T95[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def needed(points: list[tuple[int, float]], level: float) -> float:
    """Straight over the logarithm of tokens between the budgets on both sides of the level."""
    above = [i for i, (_, loss) in enumerate(points) if loss > level]
    if not above or above[-1] == len(points) - 1:
        return math.nan if above else points[0][0]
    (n, high), (more, low) = points[above[-1] :][:2]
    return math.exp(math.log(n) + (high - level) / (high - low) * math.log(more / n))


if __name__ == "__main__":
    main()
