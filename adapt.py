"""How fast does a checkpoint learn a text that it has never seen?

    python adapt.py out/maml_demo                     # the unseen domains of the run's own dataset
    python adapt.py out/maml_demo --dataset other     # the domains of another one, prepared alike
    python adapt.py out/maml_demo --text notes.txt --prompt "Dear" --save learned.pt

Passages of consecutive rows are read: each row is predicted, then learned. The loss of every token
counts once, before it was learned. Three rules of learning, for every checkpoint alike:

    none    theta as it is
    adamw   AdamW, gradients clipped to a norm of 1. Its rate, steps on each row, beta2 and whether
            embeddings are frozen are those with the lowest such loss on the tune domains
    own     the inner loop that the checkpoint was trained with, at the rates that it has learned
"""

import argparse
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import train
from maml import MAML, adamw
from model import GPT
from plot import fewer_examples
from prepare_data import get_tokenizer
from tasks import Dataset, batch

RULES = ("none", "adamw", "own")
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")
START = {"lr": 1e-3, "steps": 1, "frozen": False, "beta2": 0.95}  # of the search for AdamW's best


def adapt(args):
    """Reads unseen domains, or a text, by each rule. ValueError says what is wrong with args."""
    path = Path(args.run)
    path = path if path.suffix == ".pt" else path / "ckpt.pt"
    if args.save and Path(args.save).resolve() == path.resolve():
        raise ValueError(f"--save would overwrite {path}: choose another path")
    ckpt, model = train.load_checkpoint(path)
    model.to(train.pick_device(args.device))
    has_own = ckpt.get("config", {}).get("inner_steps", 0) > 0
    rules = args.rules or (RULES if has_own else RULES[:2])
    if "own" in rules and not has_own:
        raise ValueError(f"{path} has no inner loop of its own: leave 'own' out")
    if args.text:
        tokenizer = get_tokenizer(ckpt.get("dataset", {}).get("tokenizer", "gpt2"))  # nanoGPT's
        passages, tune = {args.text: passage_of_text(args.text, tokenizer, model)}, []
    else:
        data, passages = unseen_passages(args, ckpt, rules)
        tune = [domain for domain in passages if data.roles[domain] == "tune"]
    heldout = [name for name in passages if name not in tune] or tune

    def on_tune(options) -> float:
        losses = [read(model, ckpt, "adamw", *passages[domain], **options)[0] for domain in tune]
        return np.nan_to_num(np.mean([loss.mean() for loss in losses]), nan=np.inf)

    options, tuned = {rule: {} for rule in rules}, None
    if "adamw" in rules:
        tuned = best_adamw(on_tune) if tune else chosen_adamw(path.parent / "log.jsonl")
        options["adamw"] = tuned or START
        if not tuned:
            print("adamw is not tuned: adapt this run to a dataset with tune domains first")
    curves = {name: {} for name in passages}  # {name: {rule: (R,)}}
    for name, (x, y) in passages.items():
        P, _, T = x.shape
        for rule in rules:
            losses, learned = read(model, ckpt, rule, x, y, **options[rule])  # (P, R)
            curves[name][rule] = losses.mean(0, dtype=float).round(4)
            # Another checkpoint is not the run's result, and plot.py calls every AdamW tuned.
            if path.name == "ckpt.pt" and not args.text and (tuned or rule != "adamw"):
                at = {unit: ckpt[unit] for unit in ("step", "tokens", "flops", "seconds")}
                row = {"kind": "adapt", "dataset": data.root.name, **at, "domain": name}
                row |= {"role": "tune" if name in tune else "heldout", "rule": rule}
                row |= {"options": options[rule], "row_tokens": T, "passages": P}
                row["loss"] = curves[name][rule].tolist()
                row["by_passage"] = losses.mean(1, dtype=float).round(4).tolist()
                train.append_row(path.parent, row)
        table(name, curves[name], T, P)
    mean = {rule: np.mean([curves[name][rule] for name in heldout], 0) for rule in rules}
    if len(heldout) > 1:
        P = sum(len(passages[name][0]) for name in heldout)
        table("mean of " + ", ".join(heldout), mean, T, P)
    if tuned and "own" in rules:
        print(fewer_examples("own", mean["own"], mean["adamw"], T))

    if args.text:
        print(f"\nbefore:\n{sample(args, model, tokenizer)}")
        model.load_state_dict(learned, strict=False)
        print(f"\nafter reading by {rules[-1]!r}:\n{sample(args, model, tokenizer)}")
    if args.save:
        kept = {key: value for key, value in ckpt.items() if key != "optimizer"}
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept | {"model": model.state_dict()}, args.save)
        print(f"\nsaved: python adapt.py {args.save} --text FILE goes on from here")


def unseen_passages(args, ckpt: dict, rules) -> tuple[Dataset, dict]:
    """A dataset, and passages (x, y) by domain, if the checkpoint was not trained on its text."""
    if "dataset" not in ckpt:
        raise ValueError(f"{args.run} does not say what it was trained on: give a --text to read")
    cfg, T = ckpt["config"], ckpt["config"]["block_size"]
    data = Dataset(Path(args.data_dir or cfg["data_dir"], args.dataset or cfg["dataset"]), T)
    if data.meta["tokenizer"] != ckpt["dataset"]["tokenizer"]:
        raise ValueError(f"{data.root} has other tokens: prepare it with the run's tokenizer")
    n = T * cfg["batch_size"] // (cfg["inner_steps"] + 1)
    if "own" in rules and args.tokens < 2 * n:
        raise ValueError(f"{args.run} learns {n:,} tokens at a time: read --tokens {4 * n}")
    R, passages = -(-args.tokens // T), {}
    for domain in data.unseen(ckpt["dataset"]["trained"]):
        x, y = data.passages(domain, args.passages, R)
        if x.size(1) < R:
            raise ValueError(f"{domain!r} is too short: add text, or use --tokens {x.numel()}")
        passages[domain] = (x, y)
    if not passages:
        raise ValueError(f"{data.root} has no unseen domain: prepare it with --heldout and --tune")
    return data, passages


def passage_of_text(text: str, tokenizer, model: GPT) -> tuple:
    """A file as one passage, x and y (1, R, T), less the tokens that fill no row at its end."""
    ids = np.array(tokenizer.encode_ordinary(Path(text).read_text(encoding="utf-8")))
    if ids.max(initial=0) >= model.config.vocab_size:
        few = f"the checkpoint knows {model.config.vocab_size} ids, too few for {tokenizer.name}"
        raise ValueError(f"{few}: use one that was trained on its tokens")
    T = min(model.config.block_size, len(ids) // 8)  # a short text is cut into short rows
    if T < 4:
        raise ValueError(f"{text} has only {len(ids)} tokens: give at least 32")
    rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]  # (R, T + 1)
    return batch(rows[None])


# --------------------------------------------------------------------------------------------------
# reading: the learner's own inner loop, passages side by side


@torch.no_grad()
def read(model: GPT, ckpt: dict, rule: str, x, y, **options):
    """Losses (P, R) of the rows of passages x, y (P, R, T), each before it was learned.

    And the parameters that have learned the last passage, by name.
    """
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    if rule == "none":
        rows = zip(x.flatten(0, 1)[:, None], y.flatten(0, 1)[:, None], strict=True)  # of (1, T)
        losses = torch.stack([model(*row)[1] for row in rows])
        return losses.view(x.shape[:2]).cpu().numpy(), {}
    if rule == "adamw":
        learner, chunk = adamw_learner(model, **options), 1
    else:
        cfg = train.Config(**ckpt["config"] | {"compile": False, "dtype": "float32"})
        learner = train.make_learner(cfg, model)
        train.load_rates(learner, ckpt["learner"])
        chunk = cfg.batch_size // (cfg.inner_steps + 1)  # rows
        chunk = min(chunk, x.size(1) // 2)  # a short text is learned in its middle at least
    losses, phi = train.read_passages(learner, x, y, chunk)
    return losses.cpu().numpy(), learner.by_name(phi)


def adamw_learner(model: GPT, lr: float, frozen: bool, beta2: float, steps: int = 1) -> MAML:
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name in EMBEDDINGS))  # what needs no gradient stays
    learner = MAML(model, 1, lr, "adamw", inner_clip=1.0, inner_repeats=steps)
    model.requires_grad_(True)
    learner.update = partial(adamw, beta2=beta2)
    return learner


def best_adamw(measure) -> dict:
    """Options of AdamW from which no change below lowers `measure`, a loss: hill climbing."""
    best, lowest, tried = START, measure(START), [START]
    while True:
        lr, steps = best["lr"], best["steps"]
        changes = [{"steps": 2 * steps, "lr": lr / 2}] if steps < 4 else []
        changes += [{"lr": lr / 2}, {"lr": 2 * lr}]
        changes += [{"frozen": not best["frozen"]}, {"beta2": 0.95}, {"beta2": 0.99}]
        untried = [best | change for change in changes if best | change not in tried]
        if not untried:
            print(f"adamw with {best} reads the tune domains best")
            return best
        tried.append(untried[0])
        loss = measure(untried[0])
        if loss < lowest:
            best, lowest = untried[0], loss


def chosen_adamw(log: Path) -> dict | None:
    """What adapting this run to its tune domains chose the last time; None if it never did."""
    lines = log.read_text().splitlines() if log.is_file() else []
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row.get("rule") == "adamw" and row["role"] == "tune"]
    return rows[-1]["options"] if rows else None


# --------------------------------------------------------------------------------------------------
# what is printed, and the command line


def table(title: str, curves: dict, T: int, passages: int):
    """The mean loss of each rule, and by tokens read: to an eighth, a fourth, a half, the end."""
    R = len(next(iter(curves.values())))
    edges = sorted({0, R // 8, R // 4, R // 2, R})
    heads = [f"{'0' if low == 0 else ''}-{high * T:,}" for low, high in pairwise(edges)]
    print(f"\n{title}: nats per token, {passages} passages")
    print(f"{'rule':8}{'mean':>9}" + "".join(f"{head:>10}" for head in heads))
    for rule, curve in curves.items():
        means = "".join(f"{curve[a:b].mean():10.3f}" for a, b in pairwise(edges))
        print(f"{rule:8}{curve.mean():9.3f}{means}")


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
    parser.add_argument("run", help="the folder of a run, or a checkpoint's path")
    parser.add_argument("--rules", nargs="+", choices=RULES, help="default: all")
    parser.add_argument("--dataset", help="whose domains are read; default: the run's own")
    parser.add_argument("--data_dir", help="where the dataset is, if it was moved")
    parser.add_argument("--passages", type=int, default=16, help="of each domain")
    parser.add_argument("--tokens", type=int, default=4096, help="of each passage")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text", help="a UTF-8 file to read instead")
    parser.add_argument("--save", help="where the parameters that have learned the text go")
    parser.add_argument("--prompt", default="\n", help="how the samples begin")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    args = parser.parse_args(argv)
    try:
        if args.tokens < 1 or args.passages < 1 or (args.save and not args.text):
            raise ValueError("--tokens and --passages must be positive, and --save needs --text")
        adapt(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"adapt.py: {error}") from None


if __name__ == "__main__":
    main()
