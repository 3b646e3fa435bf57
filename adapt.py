"""Test-time training: how fast does a checkpoint learn a text that it has never seen?

    python adapt.py out/maml_demo                     # the unseen domains of the run's own dataset
    python adapt.py out/maml_demo --dataset other     # the domains of another one, prepared alike
    python adapt.py out/maml_demo --text notes.txt --prompt "Dear" --save learned.pt
    python adapt.py gpt2 --text notes.txt --rules none adamw dynamic   # needs transformers

Passages of consecutive rows are read: each row is predicted, then learned. The loss of every token
counts once, before it was learned. Rules, for every checkpoint alike:

    none     theta as it is
    adamw    AdamW: the best of its rate, steps on each row, beta2, and embeddings frozen or not
    dynamic  dynamic evaluation (Krause et al. 2018, 2019): SGD with a rate for each element, by the
             mean squared gradient on train domains, and decay to theta
    own      the inner loop that the checkpoint was trained with, at the rates that it has learned
    safe     own and none mixed: never worse than the better of both, but for ln 2 nats a passage

The options of adamw and dynamic are those with the lowest loss on the tune domains.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import run
from maml import MAML, adamw
from model import GPT
from prepare_data import encode, get_tokenizer
from tasks import Dataset, batch
from text import read_text

RULES = ("none", "adamw", "dynamic", "own", "safe")
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")
# Where the search for the best options begins, and what it tries for each rate.
START = {
    "adamw": {"lr": 5e-4, "steps": 1, "frozen": False, "beta2": 0.95},
    "dynamic": {"lr": 8e-4, "eps": 0.3, "decay": 0.0},
}
CHOICES = {
    "adamw": {"frozen": (False, True), "beta2": (0.95, 0.99), "steps": (1, 2, 4)},
    "dynamic": {"eps": (0.1, 0.3, 1.0), "decay": (0.0, 0.001, 0.01)},
}
STATISTICS = 256  # rows whose squared gradients 'dynamic' divides by


class Reader:
    """Reads passages by each rule: one model, its own inner loop, and its squared gradients."""

    def __init__(self, ckpt: dict, model: GPT, statistics):
        self.ckpt, self.model, self.statistics = ckpt, model, statistics
        self.own_rows = ckpt["inner"]["rows"] if ckpt.get("inner", {}).get("inner_steps") else None
        self.mean_square = None

    def read(self, rule: str, x, y, found=None, **options):
        """Losses (P, R) of the rows of passages x, y (P, R, T), each before it was learned.

        And the parameters that have learned the last passage, by name. found: what other rules
        have found for these passages, {rule: both}, which 'safe' need not read again.
        """
        device, rows = next(self.model.parameters()).device, 1
        x, y = x.to(device), y.to(device)
        if rule == "none":
            with torch.no_grad():
                each = zip(x.flatten(0, 1)[:, None], y.flatten(0, 1)[:, None], strict=True)
                losses = torch.stack([self.model(*row)[1] for row in each])
            return losses.view(x.shape[:2]).cpu().numpy(), {}
        if rule == "safe":
            found = found or {}
            (own, phi), (none, _) = (found.get(r) or self.read(r, x, y) for r in ("own", "none"))
            finite = all(p.isfinite().all() for p in phi.values())  # if not, theta is left
            return mixture(np.stack([own, none]), x.size(-1)), phi if finite else {}
        learner = getattr(self, rule)(**options)
        if rule == "own":  # of a short text some is learned
            rows = min(self.own_rows, max(1, x.size(1) // 2))
        n = options.get("steps", 1)  # rows that come n times are learned n times
        losses, phi = learner.read(*(t.repeat_interleave(n, 1) for t in (x, y)), rows)
        return losses[:, ::n].cpu().numpy(), learner.by_name(phi[-1])

    def own(self) -> MAML:
        inner = {k: v for k, v in self.ckpt["inner"].items() if k != "rows"}
        learner = MAML(self.model, **inner)
        run.load_rates(learner, self.ckpt["learner"])
        return learner

    def adamw(self, lr: float, frozen: bool, beta2: float, **_) -> MAML:
        for name, p in self.model.named_parameters():
            p.requires_grad_(not (frozen and name in EMBEDDINGS))  # MAML freezes these
        learner = MAML(self.model, 1, lr, "adamw")
        self.model.requires_grad_(True)
        learner.direction = partial(adamw, beta2=beta2)
        return learner

    def dynamic(self, lr: float, eps: float, decay: float) -> MAML:
        learner = MAML(self.model, 1, lr, learn_inner_lr="element")
        learner.direction, learner.start = partial(pulled, decay=decay), torch.zeros_like
        if self.mean_square is None:
            self.mean_square = mean_square(learner, self.statistics())
        rms = self.mean_square.sqrt()
        with torch.no_grad():
            learner.log_inner_lr.copy_((lr / (rms + eps * rms.mean())).log())
        return learner


def pulled(g, away, layout, decay: float):
    """SGD's direction, and a share of the way back to theta: `away` is (theta - phi) / alpha."""
    return g - decay * away, (1 - decay) * away + g


@torch.no_grad()
def mean_square(learner: MAML, rows: list) -> torch.Tensor:
    """The mean squared gradient (N,) of theta over rows [(x, y), ...], each (1, T)."""
    theta, total = learner.vectors()[0], 0.0
    for row in tqdm(rows, "squared gradients", disable=None):
        total = total + learner.gradient(theta, *row)[0].square_()
    return total / len(rows)


def mixture(losses: np.ndarray, T: int) -> np.ndarray:
    """The losses (P, R) of a Bayesian mixture of experts, whose losses are (experts, P, R).

    Each row of T tokens is predicted by all of them, weighed by the likelihood that they gave to
    the rows so far. So the passage's likelihood is the mean of theirs: over n tokens the loss is
    at most the best expert's plus ln(experts) / n nats a token, whatever the text. An expert
    whose loss is not finite has a likelihood of zero from there on; one of them must have none.
    """
    losses = np.nan_to_num(losses.astype(float), nan=np.inf, posinf=np.inf)
    logs = -T * losses.cumsum(-1)  # of the rows so far
    together = np.logaddexp.reduce(logs, 0) - np.log(len(losses))  # (P, R)
    return -np.diff(together, axis=-1, prepend=0) / T


# --------------------------------------------------------------------------------------------------
# the program


def adapt(args):
    """Reads unseen domains, or a text, by each rule. ValueError says what is wrong with args."""
    ckpt, model = run.load_checkpoint(args.run)
    path = Path(args.run)
    path = path / "ckpt.pt" if path.is_dir() else path
    target = Path(args.save or "none")
    if target.name == "ckpt.pt" or target.resolve() == path.resolve():
        raise ValueError(f"--save would overwrite {args.save}, a run's: choose another path")
    if args.options_from and not Path(args.options_from, "log.jsonl").is_file():
        raise ValueError(f"no log in {args.options_from}: give the folder of a run")
    model.to(run.pick_device(args.device))
    reader = Reader(ckpt, model, partial(statistics, args, ckpt, model))
    usual = ("none", "own", "safe") if args.text else RULES
    rules = args.rules or (usual if reader.own_rows else RULES[:3])
    if {"own", "safe"} & {*rules} and not reader.own_rows:
        raise ValueError(f"{path} has no inner loop of its own: leave 'own' and 'safe' out")
    if args.text:
        tokenizer = get_tokenizer(run.tokenizer_of(ckpt))
        passages, tune = {args.text: passage_of_text(args.text, tokenizer, model)}, []
        if hash_of([Path(args.text).read_bytes()]) in ckpt.get("read", []):
            print(f"{args.text} was learned before: its loss is not that of unseen text")
    else:
        data, passages = unseen_passages(args, ckpt, reader.own_rows)
        tune = [domain for domain in passages if data.roles[domain] == "tune"]
    heldout = [name for name in passages if name not in tune] or tune

    log = Path(args.options_from or path.parent, "log.jsonl")
    options, guessed = {rule: {} for rule in rules}, []
    for rule in [rule for rule in rules if rule in START]:
        if tune and not args.options_from:
            options[rule] = best_options(rule, partial(mean_loss, reader, rule, passages, tune))
        elif logged := logged_options(log, rule):
            options[rule] = logged
        else:
            options[rule] = untuned(rule, model)
            guessed.append(rule)
            print(f"{rule} is not tuned: adapt a run to tune domains first (--options_from RUN)")
    curves, found = {name: {} for name in passages}, {}  # {name: {rule: (R,)}}
    weights = hash_of(p.cpu().numpy().tobytes() for p in model.state_dict().values())
    steps = {rule: options[rule].get("steps", 1) for rule in rules}
    # of reading a token: a forward, and two more for each gradient
    costs = {rule: {"none": 1, "safe": 4}.get(rule, 3 * steps[rule]) for rule in rules}
    for name, rule in tqdm([*itertools.product(passages, rules)], "reading", disable=None):
        x, y = passages[name]
        found = found if curves[name] else {}  # of this domain
        found[rule] = reader.read(rule, x, y, found, **options[rule])
        losses, learned = found[rule]  # (P, R)
        curves[name][rule] = losses.mean(0, dtype=float).round(4)
        # Only a run's own checkpoint is logged, and no rule that was not tuned.
        if path.name == "ckpt.pt" and not args.text and rule not in guessed:
            shards = json.dumps(data.meta["domains"][name]["shards"]["val"])
            row = {"kind": "adapt", "dataset": data.root.name, "sha256": hash_of([shards.encode()])}
            row |= {"model": weights, "forwards": costs[rule]}
            row |= {unit: ckpt[unit] for unit in ("step", "tokens", "flops", "seconds")}
            row |= {"domain": name, "role": "tune" if name in tune else "heldout", "rule": rule}
            row |= {"options": options[rule], "row_tokens": x.size(-1), "passages": len(x)}
            row |= {"loss": curves[name][rule].tolist()}
            row |= {"by_passage": losses.mean(1, dtype=float).round(4).tolist()}
            run.append_row(path.parent, row)
    for name in passages:
        table(name, curves[name], costs, *passages[name][0].shape[::2])
    if len(heldout) > 1:
        mean = {rule: np.mean([curves[name][rule] for name in heldout], 0) for rule in rules}
        P = sum(len(passages[name][0]) for name in heldout)
        table("mean of " + ", ".join(heldout), mean, costs, P, x.size(-1))
    if args.text:
        show_text(args, ckpt, model, tokenizer, learned, rules[-1])


def untuned(rule: str, model: GPT) -> dict:
    """START is for a million parameters. AdamW's best rate was 1.6e-4 at 135 million.

    Of dynamic evaluation steps as long are assumed: one on n parameters is sqrt(n) its rate.
    """
    n = max(1.0, sum(p.numel() for p in model.parameters()) / 1e6)
    return START[rule] | {"lr": START[rule]["lr"] / n ** (0.25 if rule == "adamw" else 0.5)}


def show_text(args, ckpt: dict, model: GPT, tokenizer, learned: dict, rule: str):
    """Keeps what was learned, and prints what the model writes before and after."""
    if not all(p.isfinite().all() for p in learned.values()):
        raise ValueError(f"reading by {rule!r} left parameters that are not finite: leave it out")
    before = sample(args, model, tokenizer)
    model.load_state_dict(learned, strict=False)
    if args.save:
        kept = {key: value for key, value in ckpt.items() if key != "optimizer"}
        kept["model"], kept["read"] = model.state_dict(), ckpt.get("read", [])
        kept["read"] = [*kept["read"], hash_of([Path(args.text).read_bytes()])]
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        run.write_whole(Path(args.save), partial(torch.save, kept))
        print(f"\nsaved: python adapt.py {args.save} --text FILE goes on from here")
    print(f"\nbefore:\n{before}")
    print(f"\nafter reading by {rule!r}:\n{sample(args, model, tokenizer)}")


def unseen_passages(args, ckpt: dict, own_rows: int | None) -> tuple[Dataset, dict]:
    """A dataset, and passages (x, y) by domain, if the checkpoint was not trained on its text."""
    if "dataset" not in ckpt:
        raise ValueError(f"{args.run} does not say what it was trained on: give a --text to read")
    cfg, T = ckpt["config"], ckpt["model_args"]["block_size"]
    root = Path(args.data_dir or cfg["data_dir"], args.dataset or cfg["dataset"])
    data = open_dataset(root, ckpt, T)
    tokens = args.tokens or max(4096, 8 * T * (own_rows or 1))
    R, passages = -(-tokens // T), {}
    for domain in data.unseen(ckpt["dataset"]["trained"]):
        x, y = data.passages(domain, args.passages, R)
        if x.size(1) < R:
            raise ValueError(f"{domain!r} is too short: add text, or use --tokens {x.numel()}")
        passages[domain] = (x, y)
    if not passages:
        raise ValueError(f"{data.root} has no unseen domain: prepare it with --heldout and --tune")
    if ckpt.get("read"):
        print("this checkpoint has read texts of yours: a domain that holds them is not unseen")
    return data, passages


def open_dataset(root: Path, ckpt: dict, T: int, **options) -> Dataset:
    data = Dataset(root, T, **options)
    if data.meta["tokenizer"] != run.tokenizer_of(ckpt):
        raise ValueError(f"{root} has other tokens: prepare it with the run's tokenizer")
    return data


def passage_of_text(text: str, tokenizer, model: GPT) -> tuple:
    """A file as one passage, x and y (1, R, T), less the tokens that fill no row at its end."""
    ids = np.array(encode([read_text(text)], tokenizer)[0])
    if ids.max(initial=0) >= model.config.vocab_size:
        few = f"the checkpoint knows {model.config.vocab_size} ids, too few for {tokenizer.name}"
        raise ValueError(f"{few}: use one that was trained on its tokens")
    T = min(model.config.block_size, len(ids) // 8)  # a short text is cut into short rows
    if T < 4:
        raise ValueError(f"{text} has only {len(ids)} tokens: give at least 32")
    rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]  # (R, T + 1)
    return batch(rows[None])


def statistics(args, ckpt: dict, model: GPT):
    """Rows ((1, T), (1, T)) on which squared gradients are measured: of the train domains.

    Where these are not at hand, of the manual that comes with Python.
    """
    T, device = model.config.block_size, next(model.parameters()).device
    cfg = ckpt.get("config", {})
    for data_dir in (args.data_dir, cfg.get("data_dir")) if cfg else ():
        if data_dir and Path(data_dir, cfg["dataset"], "meta.json").is_file():
            data = open_dataset(Path(data_dir, cfg["dataset"]), ckpt, T, tasks_per_step=STATISTICS)
            return [[t.to(device) for t in data.task(0, i)] for i in range(STATISTICS)]
    from pydoc_data.topics import topics

    T, manual = min(T, 256), "\n".join(topics.values())
    ids = np.array(encode([manual], get_tokenizer(run.tokenizer_of(ckpt)))[0])
    rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]
    x, y = batch(rows[:: -(-len(rows) // (STATISTICS // 8))])
    return list(zip(x.to(device).split(1), y.to(device).split(1), strict=True))


# --------------------------------------------------------------------------------------------------
# options: those with the lowest loss on tune domains


def mean_loss(reader: Reader, rule: str, passages: dict, tune: list, options: dict, most: int):
    """Over the tune domains, on so many passages of each at most; inf if it is not finite."""
    found = [[xy[:most] for xy in passages[domain]] for domain in tune]
    losses = [reader.read(rule, x, y, **options)[0].mean() for x, y in found]
    return float(np.mean(losses)) if np.isfinite(losses).all() else math.inf


def best_options(rule: str, measure) -> dict:
    """The grid of CHOICES, at each point the best rate, found by halving and doubling.

    The grid is searched on one passage a domain; its best three, and rates around them, on four.
    """
    few, more, best = {}, {}, START[rule]
    bar = tqdm(desc=f"the best {rule}", disable=None)

    def score(table: dict, options: dict, most: int) -> float:
        key = tuple(options.items())
        if key not in table:
            table[key] = measure(options, most)
            bar.update()
        return table[key]

    def climb(table: dict, options: dict, most: int) -> dict:
        while math.isinf(score(table, options, most)) and options["lr"] > 1e-9:
            options = options | {"lr": options["lr"] / 4}
        for factor in (2.0, 0.5):
            other = options | {"lr": options["lr"] * factor}
            while score(table, other, most) < score(table, options, most):
                options, other = other, other | {"lr": other["lr"] * factor}
        return options

    for values in itertools.product(*CHOICES[rule].values()):
        point = dict(zip(CHOICES[rule], values, strict=True))
        found = climb(few, best | point, 1)
        if score(few, found, 1) <= score(few, best, 1):
            best = found
    for key in sorted(few, key=few.get)[:3]:
        score(more, dict(key), 4)
    best = climb(more, dict(min(more, key=more.get)), 4)
    bar.close()
    print(f"{rule} with {best} reads the tune domains best")
    return best


def logged_options(log: Path, rule: str) -> dict | None:
    """What adapting this run to its tune domains chose the last time; None if it never did."""
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []  # a line cut short has no end
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row.get("rule") == rule and row["role"] == "tune"]
    return rows[-1]["options"] if rows else None


def hash_of(parts: Iterable[bytes]) -> str:
    """12 digits for a text, or all tensors of a model, given as bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# what is printed, and the command line


def table(title: str, curves: dict, costs: dict, passages: int, T: int):
    """The mean loss of each rule, and by tokens read: to an eighth, a fourth, a half, the end."""
    R = len(next(iter(curves.values())))
    edges = sorted({0, R // 8, R // 4, R // 2, R})
    heads = [f"{'0' if low == 0 else ''}-{high * T:,}" for low, high in pairwise(edges)]
    print(f"\n{title}: nats per token, {passages} passages; cost in forwards a token")
    print(f"{'rule':8}{'cost':>6}{'mean':>9}" + "".join(f"{head:>10}" for head in heads))
    for rule, curve in curves.items():
        means = "".join(f"{curve[a:b].mean():10.3f}" for a, b in pairwise(edges))
        print(f"{rule:8}{costs[rule]:6}{curve.mean():9.3f}{means}")


def sample(args, model: GPT, tokenizer) -> str:
    prompt = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
    device = next(model.parameters()).device
    x, dice = torch.tensor([prompt], device=device), torch.Generator(device).manual_seed(1)
    ids = model.generate(x, args.max_new_tokens, temperature=0.8, top_k=200, generator=dice)
    known = [i for i in ids[0].tolist() if i < tokenizer.n_vocab]  # the model's ids are padded
    return tokenizer.decode(known, errors="replace")


def main(argv: list[str] | None = None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("run", help="a run's folder, a checkpoint's path, or gpt2, ...")
    parser.add_argument("--rules", nargs="+", choices=RULES, help="default: all")
    parser.add_argument("--dataset", help="whose domains are read; default: the run's own")
    parser.add_argument("--data_dir", help="where the dataset is, if it was moved")
    parser.add_argument("--passages", type=int, default=16, help="of each domain")
    parser.add_argument("--tokens", type=int, help="of each passage; default: 4096 or more")
    parser.add_argument("--options_from", help="a run whose tune domains chose adamw's, dynamic's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text", help="a UTF-8 file to read instead")
    parser.add_argument("--save", help="where the parameters that have learned the text go")
    parser.add_argument("--prompt", default="\n", help="how the samples begin")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a sample may hold what the terminal does not know
        sys.stdout.reconfigure(errors="replace")
    try:
        if min(args.tokens or 1, args.passages) < 1 or (args.save and not args.text):
            raise ValueError("--tokens and --passages must be positive, and --save needs --text")
        adapt(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"adapt.py: {error}") from None


if __name__ == "__main__":
    main()
