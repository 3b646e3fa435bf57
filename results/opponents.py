"""One more opponent: what entries of Parameter Golf learn with at test time.

    python results/opponents.py out/baseline --rules momentum     # and adapt.py's other arguments

SGD with momentum of 0.9, each row learned once or in three epochs, the first blocks frozen or not.
The tune domains choose among these and the rate, as they do for the rules of adapt.py.
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
    def momentum(self, lr: float, frozen_blocks: int, **_) -> MAML:
        self.model.transformer.h[:frozen_blocks].requires_grad_(False)
        learner = MAML(self.model, 1, lr)  # which leaves out what is frozen now
        self.model.requires_grad_(True)
        learner.direction, learner.start = momentum, torch.zeros_like
        return learner


if __name__ == "__main__":
    adapt.Reader, adapt.RULES = Reader, (*adapt.RULES, "momentum")
    adapt.START["momentum"] = {"lr": 0.01, "steps": 1, "frozen_blocks": 0}
    adapt.CHOICES["momentum"] = {"steps": (1, 3), "frozen_blocks": (0, 2)}
    adapt.main()
