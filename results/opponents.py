"""More opponents, for adapt.py's table and logs: what others learn with at test time.

    python results/opponents.py out/baseline --rules adamw_once momentum     # and adapt.py's flags

    adamw_once  AdamW with one step on each row, which costs what a row of the recipe costs
    momentum    SGD with momentum of 0.9, each row in one or in three epochs, the first blocks
                frozen or not: what entries of Parameter Golf use

The tune domains choose the options, as they do for the rules of adapt.py.
"""

import sys
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


if __name__ == "__main__":
    adapt.Reader, adapt.RULES = Reader, (*adapt.RULES, "adamw_once", "momentum")
    adapt.START["adamw_once"] = {"lr": 1e-3, "frozen": False, "beta2": 0.95}
    adapt.START["momentum"] = {"lr": 0.01, "steps": 1, "frozen_blocks": 0}
    adapt.CHOICES["adamw_once"] = {"frozen": (False, True), "beta2": (0.95, 0.99)}
    adapt.CHOICES["momentum"] = {"steps": (1, 3), "frozen_blocks": (0, 2)}
    adapt.main()
