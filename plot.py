"""The picture and one short table, from logs alone.

    python plot.py out/baseline_demo out/maml_demo -o out/curves.png

Left: the loss while unseen text is read, by each rule of learning (adapt.py writes these rows).
Right: the loss on held-out domains while training; a mark apart is what adapt.py read at the end.
Runs named x_s1, x_s2, ... are seeds of one method: a line is their mean, a band their range.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

WORDS = {"none": "no learning", "adamw": "tuned AdamW", "dynamic": "dynamic evaluation"}
WORDS |= {"own": "its own inner loop", "safe": "safe mixture"}
WORDS |= {"adamw_once": "AdamW, one step a row", "momentum": "SGD with momentum"}
WORDS |= {"adamw_falling": "AdamW, falling rates", "own_falling": "its own, falling rates"}
WORDS |= {"dynamic_falling": "dynamic, falling rates, clipped"}
STYLES = {"none": "o:", "adamw": "s--", "dynamic": "D-.", "own": "*-", "safe": "^-"}
STYLES |= {"adamw_once": "d--", "momentum": "v--", "adamw_falling": "x--"}
STYLES |= {"dynamic_falling": "P-.", "own_falling": "X-"}
# rules that learn and that no outer loop has made; those of results/opponents.py among them
OPPONENTS = ("adamw", "dynamic", "adamw_once", "momentum", "adamw_falling", "dynamic_falling")

# --------------------------------------------------------------------------------------------------
# logs


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


def newest_readings(rows: list[dict], dataset: str | None = None, role="heldout") -> dict:
    """{rule: {domain: its newest row}} of the newest model; {} if it was trained on since."""
    wanted, found = (dataset or rows[0]["dataset"]["name"], role), {}
    step = model = None
    for row in rows:
        newest = row.get("step", step), row.get("model", model)  # training names no model
        if newest != (step, model):
            (step, model), found = newest, {}
        if row["kind"] == "adapt" and wanted == (row["dataset"], row["role"]):
            found.setdefault(row["rule"], {})[row["domain"]] = row
    return found


def read_by(methods: dict, dataset: str | None = None, role="heldout") -> dict:
    """{(name, rule): (tokens read (R,), loss (seeds, R), mean over domains, a row of the log)}."""
    curves, ways = {}, {}
    for name, runs in methods.items():
        readings = [newest_readings(rows, dataset, role) for rows in runs]
        for rule in WORDS:
            seeds = [reading[rule] for reading in readings if rule in reading]
            ways |= {how_read(rows): f"{name} by {rule!r}" for rows in seeds}
            if len(ways) > 1:
                (a, by), (b, other), *_ = ways.items()
                unlike = [" and ".join(sorted(way)) or "no more" for way in (a - b, b - a)]
                which = f"{by} read {unlike[0]}, {other} {unlike[1]}"
                how = "python adapt.py RUN with one --dataset, --tokens and --passages"
                raise SystemExit(f"{which}: read both again ({how}) or plot them apart")
            if seeds:
                row, *_ = seeds[0].values()
                y = np.array([np.mean([r["loss"] for r in rows.values()], 0) for rows in seeds])
                curves[name, rule] = row["row_tokens"] * np.arange(1, y.shape[1] + 1), y, row
                if any(r["tokens"] != row["tokens"] for rows in seeds for r in rows.values()):
                    raise SystemExit(f"seeds of {name} differ in training tokens: plot them apart")
    return curves


def how_read(rows: dict[str, dict]) -> frozenset[str]:
    """What must be equal of readings whose losses are compared."""
    sizes = {f"{len(row['loss'])} rows of {row['row_tokens']} tokens" for row in rows.values()}
    if len(sizes) > 1:
        raise SystemExit(f"a run read {' and '.join(sorted(sizes))}: read it again by adapt.py")
    return frozenset(sizes).union(
        f"{row.get('passages')} passages of {row['dataset']}/{domain} (sha256 {row.get('sha256')})"
        for domain, row in rows.items()
    )


# --------------------------------------------------------------------------------------------------
# curves and measures


def training_curves(methods: dict, keys) -> dict[tuple[str, str], tuple]:
    """{(name, rule): (training tokens (n,), loss (seeds, n), mean over held-out domains)}.

    Of the runs whose evaluations read what the first one's read: losses of other text do not join.
    """
    curves, first = {}, None
    for name, rule in keys:
        table, seeds = "online" if rule == "own" else "loss", []
        for header, *rows in methods[name]:
            cfg, data = header["config"], header["dataset"]
            size = [cfg.get(size) for size in ("block_size", "eval_rows", "eval_passages")]
            first = first or (size, data["roles"], data.get("sha256"))
            if first != (size, data["roles"], data.get("sha256")):
                print(f"right panel: {name}, {WORDS[rule]} lacks seed {cfg['seed']} (other text)")
                continue
            val = [row for row in rows if row["kind"] == "val" and row.get(table)]
            heldout = [d for d, role in data["roles"].items() if role == "heldout"]
            if val and heldout:
                seeds += [{r["tokens"]: np.mean([r[table][d] for d in heldout]) for r in val}]
        x = sorted(set.intersection(*map(set, seeds))) if seeds else []
        if seeds and not x:
            raise SystemExit(f"seeds of {name} have no evaluation at equal tokens: plot them apart")
        if x:
            curves[name, rule] = np.array(x), np.array([[seed[n] for n in x] for seed in seeds])
    return curves


def running(curve: np.ndarray) -> np.ndarray:
    """The loss over the later half of what was read, after each row of `curve`, (..., R)."""
    ends = range(1, curve.shape[-1] + 1)
    return np.stack([curve[..., n // 2 : n].mean(-1) for n in ends], -1)


def tokens_needed(curve: np.ndarray, level: float, T: int) -> int | None:
    """Tokens read when `running` has come down to a level for good; None if it never does."""
    above = np.flatnonzero(~(running(curve) <= level))  # NaN is above
    n = above[-1] + 2 if len(above) else 1
    return int(n * T) if n <= len(curve) else None


def strongest(reading: dict, tune: dict) -> tuple[str, str] | None:
    """The opponent: of AdamW and dynamic evaluation on any run, the best on the tune domains."""
    rivals = [key for key in reading if key[1] in OPPONENTS]
    judged = [(tune, key) for key in rivals if key in tune] or [(reading, key) for key in rivals]
    losses = {key: np.nan_to_num(of[key][1].mean(), nan=np.inf) for of, key in judged}
    return min(losses, key=losses.get, default=None)


def fewer_examples(name: str, curve, opponent, T: int, by="tuned AdamW") -> str:
    """How many times fewer tokens a curve (R,) needs to where another ends than that one needs."""
    level = running(opponent)[-1]
    need, n = tokens_needed(opponent, level, T), tokens_needed(curve, level, T)
    if n is None or need is None:
        return f"fewer examples: {name} does not come to the {level:.3f} of {by}"
    where = f"{by} comes to {level:.3f} (mean of the later half of what it read) after {need:,}"
    times = f"{need / n:.1f} times fewer" if n <= need else f"{n / need:.1f} times more"
    return f"fewer examples: {where} tokens, {name} after {n:,}: {times}"


# --------------------------------------------------------------------------------------------------
# the table and the picture


def print_table(reading: dict, opponent: tuple[str, str] | None):
    x = next(iter(reading.values()))[0]
    few = min(len(x), -(-512 // x[0]))  # rows
    seeds = ", ± deviation of seeds" * any(len(y) > 1 for _, y, _ in reading.values())
    print(f"unseen text, nats per token, each scored, then learned{seeds}:")
    heads = f"{f'all {x[-1]:,}':>16}{f'first {x[few - 1]:,}':>13}{'forwards':>10}{'trained on':>12}"
    print(f"{'':42}{heads}")
    for (name, rule), (_, y, row) in reading.items():
        spread = f" ± {y.mean(1).std(ddof=1):.3f}" if len(y) > 1 else ""  # over seeds
        cells = f"{y[:, :few].mean():13.3f}{row.get('forwards') or '-':>10}"
        cells = f"{f'{y.mean():.3f}{spread}':>16}{cells}{row['tokens'] / 1e6:11.1f}M"
        print(f"  {f'{name}, {WORDS[rule]}':40}{cells}")
    for name, rule in reading if opponent else ():
        if rule == "own":
            ours, theirs = (reading[key][1].mean(0) for key in ((name, rule), opponent))
            by = f"{WORDS[opponent[1]]} on {opponent[0]}"
            print(fewer_examples(name, ours, theirs, x[0], by))


def draw(reading: dict, training: dict, marks: dict, output: Path):
    """`marks` are {(name, rule): (training tokens, loss)}."""
    figure = Figure(figsize=(12, 5.5), layout="constrained", dpi=90)
    panels = figure.subplots(1, 2 if training else 1, squeeze=False)[0]
    so_far = {key: (x, y.cumsum(1) * x[0] / x) for key, (x, y, _) in reading.items()}
    names, shown = list(dict.fromkeys(name for name, _ in reading)), {}
    for axes, lines in zip(panels, (so_far, training), strict=False):
        for (name, rule), (x, y) in lines.items():
            how = dict(color=f"C{names.index(name)}", markevery=[-1] if lines is so_far else 1)
            line = axes.plot(x, y.mean(0), STYLES[rule], **how)[0]
            axes.fill_between(x, y.min(0), y.max(0), color=how["color"], alpha=0.2, lw=0)
            shown.setdefault(f"{name}, {WORDS[rule]}", line)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(title="Reading unseen text", xlabel="tokens of it read")
    panels[0].set(ylabel="nats per token, mean of those read so far")
    if training:
        for (name, rule), (x, y) in marks.items():
            how = dict(color=f"C{names.index(name)}", alpha=0.8)
            panels[1].plot(x, y, STYLES[rule][0], ms=9, mec="k", **how)
            if rule in OPPONENTS:
                panels[1].axhline(y, ls=STYLES[rule][1:], lw=1, **how)
        ends = [*(y[:, -1].mean() for _, y in training.values()), *(y for _, y in marks.values())]
        panels[1].set_ylim(min(ends) - 0.05, max(ends) + 0.6)  # the first steps would press it flat
        framed = "; framed: the left panel's ends" if marks else ""
        panels[1].set(title="Held-out text while training", xlabel=f"training tokens{framed}")
        panels[1].set(ylabel="nats per token, mean of all")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
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
    reading = read_by(methods, args.dataset)
    tune = read_by(methods, args.dataset, "tune") or read_by(methods, role="tune")
    for name in methods:
        if name not in {name for name, _ in reading}:
            print(f"{name} was not read, or was trained since: read it by adapt.py")
    if not reading:
        raise SystemExit("no run was read yet: python adapt.py RUN writes what the picture shows")
    print_table(reading, strongest(reading, tune))
    learners = {name for name, rule in reading if rule == "own"}
    if any(name not in learners for name, _ in reading):  # a learner is shown by its own rule
        reading = {k: v for k, v in reading.items() if k[0] not in learners or k[1] == "own"}
    training = training_curves(methods, [key for key in reading if key[1] in ("none", "own")])
    header, marks = methods[next(iter(reading))[0]][0][0], {}
    for key, (x, y, row) in reading.items():  # over as many tokens as the curves
        n = header["config"].get("eval_rows", len(x))
        if n <= len(x) and row["dataset"] == header["dataset"]["name"]:
            marks[key] = row["tokens"], y[:, :n].mean()
    draw(reading, training, marks, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
