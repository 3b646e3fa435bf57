"""What learned rates and MAML are worth at several sizes of the model, a picture from logs.

    python results/sizes.py results/sizes/*.jsonl results/corpus/{baseline,rates,maml}_s1.jsonl

A log is named after its method: baseline_..., rates_... or maml_....
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import STYLES, WORDS, read_log, reading_curve

LINES = [("baseline", "none"), ("baseline", "adamw"), ("rates", "own"), ("maml", "own")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/sizes.png"))
    args = parser.parse_args(argv)
    logs = [(path.stem.split("_")[0], read_log(path)) for path in args.logs]
    datasets = {row["dataset"]: 0 for _, rows in logs for row in rows if row["kind"] == "adapt"}
    figure = Figure(figsize=(6 * len(datasets), 4.5), layout="constrained", dpi=80)
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, dataset in zip(panels, datasets, strict=True):
        for i, (method, rule) in enumerate(LINES):
            runs = [rows for name, rows in logs if name == method]
            found = [(rows[0]["params"], reading_curve(rows, rule, dataset)) for rows in runs]
            points = sorted((params, np.mean(curve[1])) for params, curve in found if curve)
            x, y = zip(*points, strict=True)
            print(f"{dataset}, {method}, {WORDS[rule]}:", *(f"{n:,}: {v:.3f}" for n, v in points))
            label = f"{method}, {WORDS[rule]}"
            axes.plot(x, y, "o" + STYLES[rule], color=f"C{max(0, i - 1)}", label=label)
        axes.set(title=f"{dataset}: held-out domains", xscale="log", xlabel="parameters")
        axes.set(ylabel="nats per token, learned as it is read")
        axes.set_xticks(x, [f"{n / 1e6:.2g}M" for n in x])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
