"""How fast does a checkpoint learn a text that it has never seen?

    python adapt.py out/maml_demo                     # the unseen domains of the run's own dataset
    python adapt.py out/maml_demo --dataset other     # the domains of another one, prepared alike
    python adapt.py out/maml_demo --text notes.txt --prompt "Dear" --save learned.pt

Passages of consecutive rows are read: each row is predicted, then learned. The loss of every token
counts once, before it was learned. Three rules of learning, for every checkpoint alike:

    none    theta as it is
    adamw   AdamW, with the rate, steps per row, frozen embeddings and beta2 that are best on the
            tune domains by this same measure
    own     the rates that the checkpoint has learned
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from maml import MAML, adamw
from model import GPT
from prepare_data import get_tokenizer
from tasks import Dataset, batch
from train import append_row, load_checkpoint, load_rates, pick_device, to_device

ADAMW = {"lr": 1e-3, "steps": 1, "frozen": False, "beta2": 0.95}  # where the search begins
SEARCH = [("lr", (5e-4, 2e-3, 2.5e-4)), ("steps", (2, 4)), ("lr", (5e-4, 2.5e-4, 1e-3, 2e-3))]
SEARCH += [("frozen", (True,)), ("lr", (5e-4, 1e-3, 2e-3, 4e-3)), ("beta2", (0.99,))]
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")
SIDE_BY_SIDE = 100e6  # parameters of all passages that are learned at once, to bound memory

# --------------------------------------------------------------------------------------------------
# reading


def rule_none(model: GPT, ckpt: dict):
    return MAML(model, inner_steps=0), 0


def rule_adamw(model: GPT, ckpt: dict, lr: float, steps: int, frozen: bool, beta2: float):
    for name in EMBEDDINGS:
        model.get_parameter(name).requires_grad_(not frozen)
    learner = MAML(model, 1, lr, "adamw", inner_clip=1.0)
    learner.update = partial(adamw, beta2=beta2)
    return learner, steps


def rule_own(model: GPT, ckpt: dict):
    cfg = ckpt["config"]
    learner = MAML(
        model,
        inner_steps=1,
        inner_lr=cfg["inner_lr"],
        inner_optimizer=cfg["inner_optimizer"],
        learn_inner_lr=cfg["learn_inner_lr"],
        inner_clip=cfg["inner_clip"],
        inner_schedule=cfg["inner_schedule"],
        inner_warmup=cfg["inner_warmup"],
    )
    load_rates(learner, ckpt["learner"])
    return learner, 1


RULES = {"none": rule_none, "adamw": rule_adamw, "own": rule_own}


@torch.no_grad()
def read(rule: str, model: GPT, ckpt: dict, x, y, **options) -> tuple[np.ndarray, dict]:
    """The loss of each row of passages x, y (P, R, T) before it was learned, (P, R), and phi."""
    for p in model.parameters():
        p.requires_grad_(True)
    learner, steps = RULES[rule](model, ckpt, **options)
    learner, device = learner.to(x.device), x.device
    if steps == 0:
        theta = learner.theta()
        rows = [[learner.loss(theta, a[None], b[None]) for a, b in zip(*xy)] for xy in zip(x, y)]
        return np.array([[loss.item() for loss in passage] for passage in rows]), theta
    n = max(1, int(SIDE_BY_SIDE // sum(p.numel() for p in model.parameters())))
    parts = [learner.read(*part, steps) for part in zip(x.split(n), y.split(n))]
    return torch.cat([losses for losses, _ in parts]).cpu().numpy(), parts[-1][1]
