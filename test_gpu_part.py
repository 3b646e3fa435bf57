"""What a GPU needs, to be merged into test_maml.py. `pytest -x -m gpu` is for `make gpu-check`.

DRY_RUN=1 runs the gpu tests with a tiny model on the CPU, so that their own mistakes are found.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import train
from maml import MAML, meta_grad
from model import GPT, GPTConfig
from tasks import HEADER_INTS, MAGIC, VERSION

HERE, CPU = Path(__file__).parent, torch.device("cpu")
DRY = bool(os.environ.get("DRY_RUN"))
DEVICE = "cpu" if DRY else "cuda"
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a GPU"),
]
FIRST = dict(inner_steps=3, first_order=True, learn_inner_lr="element", inner_clip=1.0)
SECOND = dict(inner_steps=3, learn_inner_lr="tensor")
CONFIGS = ("baseline_124m", "maml_124m")
TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=16)


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**TINY | dict(vocab_size=64) | changes))


def ids(*shape, vocab=64, seed=0):
    rows = torch.randint(vocab, (*shape[:-1], shape[-1] + 1), generator=seeded(seed))
    return rows[..., :-1].contiguous(), rows[..., 1:].contiguous()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gradients(learner, x, y, wrapped=None) -> dict:
    learner.zero_grad()
    (wrapped or learner)(x, y).backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters()}


# --------------------------------------------------------------------------------------------------
# what is compiled


@pytest.fixture
def compiled(monkeypatch):
    """Counts (function, static) of what torch.compile is given: traced, without a compiler."""
    torch._dynamo.reset()
    graphs, compile = Counter(), torch.compile

    def traced(function, **how):
        def backend(graph, inputs):
            static = not any(isinstance(t, torch.SymInt) for t in inputs)
            graphs[function.__name__, static] += 1
            return aot_eager(graph, inputs)

        return compile(function, backend=backend, **how)

    monkeypatch.setattr(torch, "compile", traced)
    return graphs


@pytest.mark.parametrize(
    "method, expected",
    [
        ({"inner_steps": 0}, {"loss": 2}),  # with and without a gradient
        (FIRST, {"summed_step": 1, "loss": 1, "read_step": 1}),
        (FIRST | {"inner_optimizer": "adamw"}, {"summed_step": 1, "loss": 1, "read_step": 1}),
        (SECOND, {"gradient": 1, "hessian_product": 1, "loss": 2, "read_step": 1}),
    ],
    ids=["baseline", "first", "adamw", "second"],
)
def test_each_function_is_compiled_once_and_never_again(compiled, method, expected):
    learner = MAML(small(), compile=True, **method)
    optimizer = train.make_optimizer(train.Config(), learner)
    # the second domain's val split is too small for four rows
    val = {"a": ids(2, 4, 16), "b": ids(2, 3, 16)}
    for step in range(4):
        if step % 2:
            train.evaluate(learner, val, {"a": "heldout", "b": "heldout"}, device=CPU)
        learner(*ids(8, 16, seed=step)).backward()
        optimizer.step()
        learner.zero_grad()
    assert compiled == {(name, True): count for name, count in expected.items()}


@pytest.mark.parametrize("method", [{"inner_steps": 0}, FIRST, SECOND], ids=str)
def test_ddp_changes_nothing_of_what_is_compiled_in_bfloat16(compiled, tmp_path, method):
    learner, task = MAML(small(), compile=True, autocast=torch.bfloat16, **method), ids(8, 16)
    alone = gradients(learner, *task)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    try:
        ddp = DDP(learner, broadcast_buffers=False, gradient_as_bucket_view=True)
        for _ in range(2):  # DDP may lay its buckets out anew after the first
            beside = gradients(learner, *task, wrapped=ddp)
            assert all(torch.equal(alone[n], beside[n]) for n in alone)
    finally:
        dist.destroy_process_group()


class Height(TorchDispatchMode):
    """The bytes of all tensors made under it that live at once, at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size):
        self.now -= size


def height(name: str, **changes) -> int:
    """Bytes of an outer step of a 124M config, counted on tensors without content."""
    cfg = train.Config(**train.read_arguments([f"{HERE}/config/{name}.py"]) | changes)
    rows = cfg.batch_size // (cfg.inner_steps + 1)
    K = min(cfg.inner_steps, 2)  # the third chunk is like those that follow
    with FakeTensorMode(), Height() as height:
        shape = {field: getattr(cfg, field) for field in train.SHAPE}
        learner = MAML(
            GPT(GPTConfig(**shape)),
            inner_steps=K,
            first_order=cfg.first_order,
            learn_inner_lr=cfg.learn_inner_lr,
            inner_clip=cfg.inner_clip,
            autocast=torch.bfloat16,
        )
        optimizer = train.make_optimizer(cfg, learner)
        for _ in range(2):  # the second finds the optimizer's moments
            x = torch.zeros(rows * (K + 1), cfg.block_size, dtype=torch.long)
            learner(x, x).backward()
            optimizer.step()
        return height.peak


def test_both_124m_configs_fit_a_card_of_80_gb():
    baseline, learner = (height(name) for name in CONFIGS)
    print(baseline, learner)
