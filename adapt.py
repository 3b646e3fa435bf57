"""How fast does a checkpoint learn what it has never seen? AdamW on a few tokens of a held-out domain, or of your text.

    python adapt.py out/maml_demo  # learns tune and held-out domains, from every kept checkpoint; rows into its log
    python adapt.py out/maml_demo --text notes.txt --prompt "Dear" --save adapted.pt

All checkpoints are adapted alike, whatever trained them: a fresh AdamW at a constant rate, no weight decay, gradients
clipped to a norm of 1, new rows at every step. The rate with the lowest losses on the tune domains is marked as chosen,
and the held-out domains are then read at it. Support comes from a domain's train split, the loss from its val split.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from maml import MAML, chunks
from model import GPT
from prepare_data import get_tokenizer
from train import Config, Dataset, append_row, batch, check_field, load_checkpoint, pick_device, progress, rng

MEASURED = (0, 1, 2, 4, 8, 16)  # the loss is measured after so many steps
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

# ----------------------------------------------------------------------------------------------------------------------
# learning, and what it gains


@torch.no_grad()
def learning_curve(model: GPT, support, query, lr: float, measured=MEASURED) -> tuple[list[float], dict]:
    """The query's loss (nats per token) after each of the measured numbers of steps, and the parameters at the end.

    support and query are pairs x, y of (rows, T); the support's rows are a multiple of the last number of steps.
    """
    learner = MAML(model, measured[-1], lr, "adamw", inner_clip=1.0, first_order=True)  # nothing is differentiated
    losses, phi = [learner.loss(learner.theta(), *query).item()], learner.theta()
    for k, (_, phi) in enumerate(learner.trajectory(*(chunks(t, measured[-1]) for t in support)), start=1):
        if k in measured:
            losses.append(learner.loss(phi, *query).item())
    return losses, phi


def adapt_to_domains(args, model: GPT, ckpt: dict, device):
    """Learn each domain of the grid (rate, domain, draw of the support), choose the rate, and append the rows."""
    if not Path(args.run).is_dir() or "dataset" not in ckpt:
        raise ValueError(f"{args.run} is not the folder of a run: give one, or a --text to learn")
    args.lr = args.lr or LEARNING_RATES
    fields = {key: check_field(key, value, args.run) for key, value in ckpt["config"].items()}
    cfg = Config(**fields | {"data_dir": args.data_dir or ckpt["config"]["data_dir"]})
    data = Dataset(cfg)
    if data.sha256 != ckpt["dataset"]["sha256"]:
        raise ValueError(f"{data.root} is not the data that {args.run} was trained on: prepare it as it was")
    domains = sorted(d for d, role in data.domains.items() if role != "train")
    if not domains:
        raise ValueError(f"{data.root} holds no domain out: prepare it with --heldout and --tune, or adapt to a --text")
    rows, n = [], MEASURED[-1] * args.rows
    total, what = len(domains) * args.draws * len(args.lr), f"{args.run}, step {ckpt['step']}"
    with tqdm(total=total, unit="curve", desc=what) as bar:
        for domain in domains:
            query = batch(data.windows(domain, "val", args.query_rows, rng("query", domain), at_most=True), device)
            for draw in range(args.draws):
                support = batch(data.windows(domain, "train", n, rng("support", domain, draw)), device)
                for lr in args.lr:
                    losses, _ = learning_curve(model, support, query, lr)
                    rows.append(
                        {"domain": domain, "role": data.domains[domain], "draw": draw, "lr": lr, "loss": losses}
                    )
                    bar.update()
    judges = [r for r in rows if r["role"] == "tune"] or rows  # without a tune domain the held-out ones must judge
    chosen = min(args.lr, key=lambda lr: np.mean([r["loss"][1:] for r in judges if r["lr"] == lr]))
    support_tokens = [k * args.rows * cfg.block_size for k in MEASURED]
    for row in rows:
        row |= {"chosen": row["lr"] == chosen, "steps": MEASURED, "support_tokens": support_tokens}
        append_row(args.run, {"kind": "adapt", **progress(cfg, model, ckpt["step"], ckpt["seconds"]), **row})
    tokens = "".join(f"{k:>8,}" for k in support_tokens)
    print(f"learning rate {chosen:g}, chosen on {', '.join(sorted({r['domain'] for r in judges}))}")
    print(f"{'nats per token after tokens':30}{tokens}")
    for domain in domains:
        curve = np.mean([r["loss"] for r in rows if r["domain"] == domain and r["lr"] == chosen], axis=0)
        print(f"{domain + ' (' + data.domains[domain] + ')':30}" + "".join(f"{loss:8.3f}" for loss in curve))


def adapt_to_text(args, model: GPT, ckpt: dict, device):
    """Learn the first nine tenths of a text, row by row; show the loss on the rest and a sample, before and after."""
    tokenizer = get_tokenizer(ckpt.get("dataset", {}).get("tokenizer", "gpt2"))  # nanoGPT's checkpoints do not say
    ids = np.array(tokenizer.encode_ordinary(Path(args.text).read_text(encoding="utf-8")))
    if ids.max(initial=0) >= model.config.vocab_size:
        size = f"{args.run} knows {model.config.vocab_size} ids"
        raise ValueError(f"{size}, fewer than {tokenizer.name} has: adapt a checkpoint that was trained on its tokens")
    T = min(model.config.block_size, len(ids) // 20)  # a short text is cut into short rows
    if T < 4:
        raise ValueError(f"{args.text} has only {len(ids)} tokens: give at least 80")
    rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]  # (rows, T + 1)
    n_query = max(1, len(rows) // 10)
    per_step = min(args.rows, len(rows) - n_query)
    steps = (len(rows) - n_query) // per_step
    support, query = batch(rows[: steps * per_step], device), batch(rows[-n_query:], device)
    lr = args.lr[0] if args.lr else chosen_lr(Path(args.run))
    (before, after), phi = learning_curve(model, support, query, lr, (0, steps))
    sizes = f"on {support[0].numel():,} tokens, measured on {query[0].numel():,}"
    print(f"{args.text}: {steps} AdamW steps at {lr:g} {sizes}")
    print(f"\nbefore: {before:.3f} nats per token\n{sample(model, tokenizer, args, device)}")
    model.load_state_dict(phi, strict=False)  # lm_head.weight is wte's
    print(f"\nafter: {after:.3f} nats per token\n{sample(model, tokenizer, args, device)}")
    if args.save:
        keep = {key: ckpt[key] for key in ("model_args", "config", "dataset", "step", "seconds") if key in ckpt}
        Path(args.save).parent.mkdir(parents=True, exist_ok=True)
        torch.save(keep | {"model": model.state_dict()}, args.save)
        print(f"\nsaved: python adapt.py {args.save} --text ..., or train.py --init_from={args.save}")


def chosen_lr(run: Path) -> float:
    """The rate that adapting this run to its tune domains chose; 1e-3 where that was never done."""
    log = (run if run.is_dir() else run.parent) / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.is_file() else []
    return next((row["lr"] for row in reversed(rows) if row.get("chosen")), 1e-3)


def sample(model: GPT, tokenizer, args, device) -> str:
    prompt = torch.tensor([tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]], device=device)
    dice = torch.Generator(device).manual_seed(args.seed)
    ids = model.generate(prompt, args.max_new_tokens, args.temperature, top_k=200, generator=dice)[0].tolist()
    return tokenizer.decode([i for i in ids if i < tokenizer.n_vocab], errors="replace")  # the model's ids are padded


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, or a checkpoint's path (nanoGPT's too, with --text)")
    parser.add_argument("--lr", type=float, nargs="+", help="the grid, or the one rate for --text")
    parser.add_argument("--rows", type=int, default=4, help="rows learned in one step")
    parser.add_argument("--draws", type=int, default=3, help="draws of the support set from each domain")
    parser.add_argument("--query_rows", type=int, default=32, help="rows of the val split that measure the loss")
    parser.add_argument("--data_dir", help="where the dataset is, if it was moved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text", help="a UTF-8 file to learn instead of the domains")
    parser.add_argument("--save", help="where the parameters that learned the text go")
    parser.add_argument("--prompt", default="\n", help="how the samples begin")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1, help="of the samples")
    args = parser.parse_args(argv)
    try:
        device, path = pick_device(args.device), Path(args.run)
        last = path / "ckpt.pt" if path.is_dir() or not path.suffix else path
        for checkpoint in [last] if args.text else [*sorted(path.glob("step_*.pt")), last]:
            ckpt, model = load_checkpoint(checkpoint)
            (adapt_to_text if args.text else adapt_to_domains)(args, model.to(device).eval(), ckpt, device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"adapt.py: {error}") from None


if __name__ == "__main__":
    main()
