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
import dataclasses
import json
from functools import cache, partial
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

EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")
START = {"lr": 1e-3, "steps": 1, "frozen": False, "beta2": 0.95}  # of the search for AdamW's best

# --------------------------------------------------------------------------------------------------
# reading: the learner's own inner loop, passages side by side


def own_learner(model: GPT, ckpt: dict) -> tuple[MAML, int]:
    """The inner loop that the checkpoint was trained with, its learned rates, its rows a chunk."""
    cfg = dataclasses.replace(train.Config(**ckpt["config"]), compile=False, dtype="float32")
    learner = train.make_learner(cfg, model)
    train.load_rates(learner, ckpt["learner"])
    return learner, cfg.batch_size // (cfg.inner_steps + 1)


def adamw_learner(model: GPT, lr: float, frozen: bool, beta2: float) -> MAML:
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and name in EMBEDDINGS))  # what needs no gradient stays
    learner = MAML(model, inner_lr=lr, inner_optimizer="adamw", inner_clip=1.0)
    model.requires_grad_(True)
    learner.update = partial(adamw, beta2=beta2)
    return learner


@torch.no_grad()
def read(model: GPT, ckpt: dict, rule: str, x, y, steps=None, **options):
    """Losses (P, R) of the rows of passages x, y (P, R, T), each before it was learned.

    And the parameters after the last passage, by name.
    """
    if rule == "none":
        rows = (t.flatten(0, 1).split(1) for t in (x, y))  # P * R times (1, T)
        losses = torch.stack([model(*row)[1] for row in zip(*rows, strict=True)])
        return losses.view(x.shape[:2]).cpu().numpy(), dict(model.named_parameters())
    if rule == "own":
        learner, chunk = own_learner(model, ckpt)
        chunk = min(chunk, x.size(1) // 2)  # a short text is learned in its middle at least
    else:
        learner, chunk = adamw_learner(model, **options), 1
    losses, phi = train.read_passages(learner.to(x.device), x, y, chunk, steps)
    return losses.cpu().numpy(), learner.by_name(phi)


def best_adamw(measure) -> dict:
    """Options of AdamW from which no single change lowers `measure`, a loss; hill climbing."""

    @cache
    def loss(**options):
        found = measure(options)
        return found if np.isfinite(found) else np.inf

    best, moved = START, True
    while moved:
        lr, steps = best["lr"], best["steps"]
        changes = [{"lr": lr / 2}, {"lr": 2 * lr}]
        if steps < 4:
            changes += [{"steps": 2 * steps, "lr": lr / 2}, {"steps": 2 * steps}]
        beta2 = 0.99 if best["beta2"] == 0.95 else 0.95
        changes += [{"frozen": not best["frozen"]}, {"beta2": beta2}]
        better = next((best | c for c in changes if loss(**best | c) < loss(**best)), None)
        best, moved = better or best, better is not None
    print(f"adamw with {best} reads the tune domains best")
    return best


# --------------------------------------------------------------------------------------------------
# the unseen domains of a dataset, or a text of one's own


def adapt_to_domains(args, path: Path, model: GPT, ckpt: dict, device):
    """Reads val passages of unseen domains by each rule; the log gets rows, the screen tables."""
    cfg, log = ckpt["config"], path.parent / "log.jsonl"
    T = cfg["block_size"]
    data = Dataset(Path(args.data_dir or cfg["data_dir"], args.dataset or cfg["dataset"]), T)
    if data.meta["tokenizer"] != ckpt["dataset"]["tokenizer"]:
        raise ValueError(f"{data.root} has other tokens: prepare it with the run's tokenizer")
    passages = unseen_passages(data, ckpt, args, device)
    tune = [d for d in passages if data.roles[d] == "tune"]
    heldout = [d for d in passages if d not in tune] or tune

    def on_tune(options):
        losses = [read(model, ckpt, "adamw", *passages[d], **options)[0] for d in tune]
        return np.mean([loss.mean() for loss in losses])

    options = {rule: {} for rule in args.rules or rules_of(ckpt)}
    learned = T * cfg["batch_size"] // (cfg["inner_steps"] + 1)  # tokens at a time
    if "own" in options and args.tokens < 2 * learned:
        raise ValueError(f"{path} learns {learned:,} tokens at a time: read --tokens {4 * learned}")
    if "adamw" in options:
        options["adamw"] = best_adamw(on_tune) if tune else chosen_adamw(log)
    at = {unit: ckpt[unit] for unit in ("step", "tokens", "flops", "seconds")}
    curves = {domain: {} for domain in passages}  # {domain: {rule: (R,)}}
    for rule, chosen in options.items():
        for domain, xy in passages.items():
            losses, _ = read(model, ckpt, rule, *xy, **chosen)  # (P, R)
            row = {
                "kind": "adapt",
                "dataset": data.root.name,
                **at,
                "domain": domain,
                "role": "tune" if domain in tune else "heldout",
                "rule": rule,
                "options": chosen,
                "row_tokens": T,
                "passages": len(losses),
                "loss": losses.mean(0, dtype=float).round(4).tolist(),
                "by_passage": losses.mean(1, dtype=float).round(4).tolist(),
            }
            if path.name == "ckpt.pt":  # another checkpoint is not the run's result
                train.append_row(path.parent, row)
            curves[domain][rule] = np.array(row["loss"])
    for domain, (x, _) in passages.items():
        table(domain, curves[domain], T, len(x))
    mean = {rule: np.mean([curves[d][rule] for d in heldout], 0) for rule in options}
    if len(heldout) > 1:
        P = sum(len(passages[d][0]) for d in heldout)
        table("mean of " + ", ".join(heldout), mean, T, P)
    if tune or options.get("adamw") is not START:
        print_fewer_examples(mean, T)


def unseen_passages(data: Dataset, ckpt: dict, args, device) -> dict:
    """{domain: (x, y) of (P, R, T)}, of domains whose text the checkpoint was never trained on."""
    passages, R = {}, -(-args.tokens // data.T)
    for domain in data.unseen(ckpt["dataset"]["trained"]):
        x, y = data.passages(domain, args.passages, R)
        if x.size(1) < R:
            few = f"the val split of {domain!r} has only {x.numel():,} tokens"
            raise ValueError(f"{few}: give it more text, or use --tokens {x.numel()}")
        passages[domain] = (x.to(device), y.to(device))
    if not passages:
        raise ValueError(f"{data.root} has no unseen domain: prepare it with --heldout and --tune")
    return passages


def adapt_to_text(args, path: Path, model: GPT, ckpt: dict, device):
    """Reads a text from its first row to its last, and shows a sample before and after."""
    tokenizer = get_tokenizer(ckpt.get("dataset", {}).get("tokenizer", "gpt2"))  # nanoGPT's
    ids = np.array(tokenizer.encode_ordinary(Path(args.text).read_text(encoding="utf-8")))
    if ids.max(initial=0) >= model.config.vocab_size:
        few = f"{path} knows {model.config.vocab_size} ids, fewer than {tokenizer.name} has"
        raise ValueError(f"{few}: use a checkpoint that was trained on its tokens")
    T = min(model.config.block_size, len(ids) // 8)  # a short text is cut into short rows
    if T < 4:
        raise ValueError(f"{args.text} has only {len(ids)} tokens: give at least 32")
    rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]  # (R, T + 1)
    x, y = (t.to(device) for t in batch(rows[None]))
    options = {rule: {} for rule in args.rules or rules_of(ckpt)}
    if "adamw" in options:
        options["adamw"] = chosen_adamw(path.parent / "log.jsonl")
    curves = {}
    for rule, chosen in options.items():
        losses, phi = read(model, ckpt, rule, x, y, **chosen)
        curves[rule] = losses[0]
    table(args.text, curves, T, 1)
    if options.get("adamw") is not START:  # less than an untuned AdamW needs is no praise
        print_fewer_examples(curves, T)
    print(f"\nbefore:\n{sample(model, tokenizer, args, device)}")
    model.load_state_dict(phi, strict=False)
    print(f"\nafter reading by {rule!r}:\n{sample(model, tokenizer, args, device)}")
    if args.save:
        kept = {key: value for key, value in ckpt.items() if key != "optimizer"}
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept | {"model": model.state_dict()}, args.save)
        print(f"\nsaved: python adapt.py {args.save} --text FILE goes on from here")


def rules_of(ckpt: dict) -> list[str]:
    """Those that a checkpoint can be read by; the last is the one that a text is learned by."""
    has_own = ckpt.get("config", {}).get("inner_steps")
    return ["none", "adamw", "own"] if has_own else ["none", "adamw"]


def chosen_adamw(log: Path) -> dict:
    """What adapting this run to its tune domains chose, or where that search begins."""
    lines = log.read_text().splitlines() if log.is_file() else []
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row.get("rule") == "adamw" and row["role"] == "tune"]
    chosen = [row["options"] for row in rows]
    if not chosen:
        print("adamw is not tuned: adapt this run to a dataset with tune domains first")
    return chosen[-1] if chosen else START


def sample(model: GPT, tokenizer, args, device) -> str:
    prompt = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
    x, dice = torch.tensor([prompt], device=device), torch.Generator(device).manual_seed(1)
    ids = model.generate(x, args.max_new_tokens, temperature=0.8, top_k=200, generator=dice)
    known = [i for i in ids[0].tolist() if i < tokenizer.n_vocab]  # the model's ids are padded
    return tokenizer.decode(known, errors="replace")


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
        means = [curve.mean(), *(curve[a:b].mean() for a, b in pairwise(edges))]
        print(f"{rule:8}{means[0]:9.3f}" + "".join(f"{mean:10.3f}" for mean in means[1:]))


def print_fewer_examples(curves: dict, T: int):
    if "own" in curves and "adamw" in curves:
        print(fewer_examples("own", curves["own"], curves["adamw"], T))


def main(argv: list[str] | None = None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("run", help="the folder of a run, or a checkpoint's path")
    parser.add_argument("--rules", nargs="+", choices=["none", "adamw", "own"], help="default: all")
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
        path = Path(args.run)
        path = path if path.suffix == ".pt" else path / "ckpt.pt"
        ckpt, model = train.load_checkpoint(path)
        device = train.pick_device(args.device)
        if unknown := set(args.rules or []) - set(rules_of(ckpt)):
            raise ValueError(f"{path} has no inner loop of its own: leave {min(unknown)!r} out")
        if args.tokens < 1 or args.passages < 1 or (args.save and not args.text):
            raise ValueError("--tokens and --passages must be positive, and --save needs --text")
        adapt = adapt_to_text if args.text else adapt_to_domains
        if not args.text and "tokens" not in ckpt:
            raise ValueError(f"{path} does not say what it was trained on: give a --text to read")
        adapt(args, path, model.to(device), ckpt, device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"adapt.py: {error}") from None


if __name__ == "__main__":
    main()
