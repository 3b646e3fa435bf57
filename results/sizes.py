"""What learning at test time is worth at several sizes of the model, a picture from logs.

    python results/sizes.py results/sizes/*.jsonl

A log is named after its method, its size and its seed: baseline_0.2M_s1.jsonl.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import STYLES, WORDS, read_by, read_methods


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/sizes.png"))
    args = parser.parse_args(argv)
    methods = read_methods(args.logs)
    runs = [rows for seeds in methods.values() for rows in seeds]
    datasets = {row["dataset"]: 0 for rows in runs for row in rows if row["kind"] == "adapt"}
    figure = Figure(figsize=(6 * len(datasets), 4.5), layout="constrained", dpi=80)
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, dataset in zip(panels, datasets, strict=True):
        lines = {}  # {(method, rule): [(parameters, loss)]}
        for (name, rule), (_, y, _) in read_by(methods, dataset).items():
            params = methods[name][0][0]["params"]
            lines.setdefault((name.split("_")[0], rule), []).append((params, y.mean()))
        learners = {method for method, rule in lines if rule == "own"}
        lines = {key: v for key, v in lines.items() if key[1] == "own" or key[0] not in learners}
        kinds = list(dict.fromkeys(method for method, _ in lines))
        for (method, rule), points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            told = (f"{n:,}: {v:.3f}" for n, v in zip(x, y, strict=True))
            print(f"{dataset}, {method}, {WORDS[rule]}:", *told)
            how = dict(color=f"C{kinds.index(method)}", label=f"{method}, {WORDS[rule]}")
            axes.plot(x, y, STYLES[rule], **how)
        axes.set(title=f"{dataset}: held-out domains", xscale="log", xlabel="parameters")
        axes.set(ylabel="nats per token, learned as it is read")
        sizes = sorted({n for points in lines.values() for n, _ in points})
        axes.set_xticks(sizes, [f"{n / 1e6:.2g}M" for n in sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
