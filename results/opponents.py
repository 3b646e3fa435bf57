"""More opponents, for adapt.py's table and logs: what others learn with at test time.

    python results/opponents.py out/baseline --rules adamw_once momentum     # and adapt.py's flags

    adamw_once  AdamW with one step on each row, which costs what a row of the recipe costs
    momentum    SGD with momentum of 0.9, each row in one or in three epochs, the first blocks
                frozen or not: what entries of Parameter Golf use
    adamw_falling, dynamic_falling, own_falling
                AdamW, dynamic evaluation and the checkpoint's own inner loop (at `lr` times its
                rates), where row j of a passage is learned at 1 / sqrt(1 + j / span) of the
                rate. Dynamic evaluation is clipped, too: no gradient is longer than `clip` times
                their root mean square length on train domains

The tune domains choose the options, as they do for the rules of adapt.py.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adapt
from maml import MAML


def momentum(g, m, layout):
    m = 0.9 * m + g
    return m, m


class Reader(adapt.Reader):
    def adamw_once(self, **options) -> MAML:
        return self.adamw(**options)

    def momentum(self, lr: float, frozen_blocks: int, **_) -> MAML:
        self.model.transformer.h[:frozen_blocks].requires_grad_(False)
        learner = MAML(self.model, 1, lr)  # which leaves out what is frozen now
        self.model.requires_grad_(True)
        learner.direction, learner.start = momentum, torch.zeros_like
        return learner

    def adamw_falling(self, span: int, steps: int, **options) -> MAML:
        return falling(self.adamw(**options), span, steps)

    def dynamic_falling(self, clip: float, span: int, **options) -> MAML:
        learner = self.dynamic(**options)
        most = clip * self.mean_square.sum().sqrt()
        learner.direction = partial(clipped, learner.direction, most)
        return falling(learner, span)

    def own_falling(self, lr: float, span: int) -> MAML:
        learner = self.own()
        learner.log_inner_lr.data += math.log(lr)
        return falling(learner, span)


def clipped(direction, most, g, state, layout):
    return direction(g * (most / (g.norm() + 1e-12)).clamp(max=1.0), state, layout)


def falling(learner: MAML, span: int, steps: int = 1) -> MAML:
    def factors(n):
        return learner.constant([(1 + j // steps / span) ** -0.5 for j in range(n)])

    learner.factors = factors
    return learner


START = {
    "adamw_once": {"lr": 1e-3, "frozen": False, "beta2": 0.95},
    "momentum": {"lr": 0.01, "steps": 1, "frozen_blocks": 0},
    "adamw_falling": {"lr": 3.5e-4, "frozen": False, "beta2": 0.99, "steps": 4, "span": 8},
    "dynamic_falling": {"lr": 1.1e-3, "eps": 0.3, "decay": 0.0, "clip": 1.0, "span": 8},
    "own_falling": {"lr": 1.4, "span": 8},
}
CHOICES = {
    "adamw_once": {"frozen": (False, True), "beta2": (0.95, 0.99)},
    "momentum": {"steps": (1, 3), "frozen_blocks": (0, 2)},
    "adamw_falling": {"span": (4, 8, 16)},
    "dynamic_falling": {"clip": (0.5, 0.7, 1.0), "span": (4, 8, 16)},
    "own_falling": {"span": (4, 8, 16)},
}

if __name__ == "__main__":
    adapt.Reader, adapt.RULES = Reader, (*adapt.RULES, *START)
    adapt.START.update(START)
    adapt.CHOICES.update(CHOICES)
    adapt.main()
