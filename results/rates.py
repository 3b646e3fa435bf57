"""The learned rates of checkpoints, a picture: which tensors learn fast.

    python results/rates.py out/maml_demo out/maml_adamw_demo -o results/rates.png

A line spans nine tenths of a tensor's elements, a dot is their median. The rates begin at inner_lr.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that learned rates")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/rates.png"))
    args = parser.parse_args(argv)
    figure = Figure(figsize=(5 * len(args.runs) + 2, 7), layout="constrained", dpi=80)
    panels = figure.subplots(1, len(args.runs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, args.runs, strict=True):
        path = run / "ckpt.pt"
        if not path.is_file():
            raise SystemExit(f"no checkpoint at {path}: pass the folder of a run")
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if "log_inner_lr" not in (ckpt.get("learner") or {}):
            raise SystemExit(f"{run} has learned no rates: pass runs with learn_inner_lr")
        parameters = GPT(GPTConfig(**ckpt["model_args"])).named_parameters()  # in theta's order
        sizes = {name.removeprefix("transformer."): p.numel() for name, p in parameters}
        rates = ckpt["learner"]["log_inner_lr"].flatten().exp()
        # rates of tensors are one each
        cuts = list(sizes.values()) if len(rates) == sum(sizes.values()) else 1
        spans = [np.quantile(part, [0.05, 0.5, 0.95]) for part in rates.split(cuts)]
        low, median, high = zip(*spans, strict=True)  # of each tensor, the model's first on top
        axes.hlines(range(len(sizes)), low, high, color="C0", lw=3, alpha=0.4)
        axes.plot(median, range(len(sizes)), "o", color="C0", ms=4)
        axes.axvline(ckpt["config"]["inner_lr"], color="0.5", ls=":", lw=1)
        axes.set(title=run.name, xlabel="learned rate of an element", xscale="log")
        axes.set_yticks(range(len(sizes)), sizes, size=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
