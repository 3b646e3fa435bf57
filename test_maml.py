"""Every claim of the repository as a test named like a sentence: make test, or python -m pytest.

What takes minutes is behind a marker: python -m pytest -m slow. What needs a GPU: -m gpu.
"""

import dataclasses
import gzip
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import adapt
import bench
import maml
import plot
import prepare_data
import tasks
import train
from maml import MAML, meta_grad
from model import GPT, GPTConfig

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tensors this small only wait for a second thread
refused = partial(pytest.raises, SystemExit)  # a user's mistake ends the program with one line

# --------------------------------------------------------------------------------------------------
# what the tests share


def tiny_gpt(seed=0, **changes) -> GPT:
    """A GPT in float64 with weights large enough that its Hessian matters."""
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**shape | changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def task(rows=12, seed=1, vocab=32, T=8):
    ids = torch.randint(vocab, (rows, T + 1), generator=seeded(seed))
    return ids[:, :-1], ids[:, 1:]


def backward(learner, x, y, wrapped=None):
    """(gradients by name, loss), as training computes them."""
    learner.zero_grad()
    loss = (wrapped or learner)(x, y)
    loss.backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters()}, loss.item()


def distance(a: dict, b: dict) -> float:
    """Relative distance of two gradients."""
    square = sum((a[n] - b[n]).square().sum() for n in b) / sum(b[n].square().sum() for n in b)
    return square.sqrt().item()


def write(folder, files: dict) -> Path:
    """The folder, with {path: text or bytes} in it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def records(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Three train domains, one to tune on, one held out: random walks, each in its own alphabet."""
    text, data = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data")
    for i, domain in enumerate(["alpha", "beta", "gamma", "tune", "far"]):
        dice = np.random.default_rng(i)
        walks = [48 + 9 * i + np.cumsum(dice.integers(-1, 3, 400)) % 9 for _ in range(40)]
        write(text, {f"{domain}.jsonl": records(" ".join(map(chr, walk)) for walk in walks)})
    roles = ["--heldout", "far", "--tune", "tune"]
    prepare_data.main([str(text), "--name", "tiny", *roles, "--data_dir", str(data)])
    return data


@pytest.fixture
def flags(data_dir, tmp_path):
    """The command line of a run that takes a second."""
    fields = dict(out_dir=tmp_path / "run", data_dir=data_dir, dataset="tiny", device="cpu")
    fields |= dict(block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=4, tasks_per_step=4)
    fields |= dict(inner_steps=1, learn_inner_lr="element", tasks="passage", first_order=True)
    fields |= dict(max_steps=6, warmup_steps=2, eval_interval=3, eval_passages=2, eval_rows=8)
    return lambda **changes: [f"--{k}={v}" for k, v in (fields | changes).items() if v is not None]


@pytest.fixture
def pretrain(flags, tmp_path):
    def pretrain(name="run", **changes) -> Path:
        train.main(flags(out_dir=tmp_path / name, **changes))
        return tmp_path / name

    return pretrain


PLAIN = dict(inner_steps=0, learn_inner_lr="no", tasks="mixed")


def at_step(n, action, monkeypatch, draw=tasks.Dataset.task):
    """Something happens when a later run begins the step n."""
    done = []

    def acting(data, step, task):
        if step == n and not done:
            done.append(action())
        return draw(data, step, task)

    monkeypatch.setattr(tasks.Dataset, "task", acting)


def log_of(out_dir) -> dict[str, list[dict]]:
    """The rows of a log by kind, without what no two runs share: the header and the seconds."""
    log = defaultdict(list)
    for row in map(json.loads, (Path(out_dir) / "log.jsonl").read_text().splitlines()[1:]):
        log[row.pop("kind")].append({k: v for k, v in row.items() if k != "seconds"})
    return log


def header_of(out_dir) -> dict:
    return json.loads((Path(out_dir) / "log.jsonl").read_text().split("\n")[0])


def checkpoint_of(out_dir) -> dict:
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)


def weights_of(out_dir) -> dict:
    ckpt = checkpoint_of(out_dir)
    states = ckpt["optimizer"]["state"].items()
    moments = {(i, name): value for i, state in states for name, value in state.items()}
    return ckpt["model"] | ckpt["learner"] | moments


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------------
# the mathematics


class Toy(nn.Module):
    """Parameters in float64, and any loss(x, y, *parameters)."""

    def __init__(self, loss, *parameters):
        super().__init__()
        self.loss, self.list = loss, nn.ParameterList(p.double() for p in parameters)

    def forward(self, x, y):
        return None, self.loss(x, y, *self.list)


def quadratic(theta):
    return Toy(lambda x, y, w: 0.5 * (w - y[0]).square().sum(), theta)


def test_one_step_on_a_quadratic_has_the_closed_form():
    """L_k = |phi - c_k|^2 / 2: the gradient is (1 - lr) (phi_1 - c_1), and with 'every' a mean."""
    theta = torch.tensor([1.0, -2.0])
    c = torch.tensor([[3.0, 1.0], [0.5, 4.0]], dtype=torch.float64)
    final = 0.9 * (theta - 0.1 * (theta - c[0]) - c[1])
    for objective, expected in (("final", final), ("every", (final + theta - c[0]) / 2)):
        model = quadratic(theta)
        MAML(model, 1, 0.1, objective=objective)(c, c).backward()
        torch.testing.assert_close(model.list[0].grad, expected, rtol=1e-14, atol=0)


def test_a_rate_grows_where_gradients_agree_and_shrinks_where_they_contradict_each_other():
    """L_k = |phi - c_k|^2 / 2; one dimension has c_1 = c_0 and the other c_1 = -c_0."""
    c = torch.tensor([[3.0, 3.0], [3.0, -3.0]], dtype=torch.float64)
    learner = MAML(quadratic(torch.zeros(2)), 1, 0.1, first_order=True, learn_inner_lr="element")
    grads, _ = backward(learner, c, c)
    # phi_1 = 0.1 c_0; d outer / d log alpha = (phi_1 - c_1) * (phi_1 - theta) / 2
    expected = torch.tensor([-2.7 * 0.3 / 2, 3.3 * 0.3 / 2])
    torch.testing.assert_close(grads["log_inner_lr.0"].float(), expected)


CHOICES = {
    "inner_steps": (1, 3),
    "inner_optimizer": ("sgd", "adamw"),
    "objective": ("final", "every"),
    "first_order": (False, True),
    "learn_inner_lr": ("no", "tensor", "element"),
}
OPTIONS = [
    dict(zip(CHOICES, choice, strict=True)) for choice in itertools.product(*CHOICES.values())
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_meta_gradient_is_that_of_the_definition(options):
    for more in ({}, {"inner_clip": 0.5, "inner_schedule": "cosine", "inner_warmup": 1}):
        learner, (x, y) = MAML(tiny_gpt(), inner_lr=0.05, **options, **more).double(), task()
        grads, loss = backward(learner, x, y)
        defined, defined_loss = meta_grad(learner, x, y)
        assert abs(loss - defined_loss) < 1e-13 and grads.keys() == defined.keys()
        # the derivative of a fresh AdamW's step divides by |g|, and rounding with it
        assert distance(grads, defined) < (1e-9 if "adamw" in options.values() else 1e-12)


@pytest.mark.parametrize("objective", ["final", "every"])
@pytest.mark.parametrize("learned", ["tensor", "element"])
def test_the_meta_gradient_is_what_finite_differences_say(objective, learned):
    """Central differences in float64 along a random direction in theta and the rates together."""
    options = dict(objective=objective, learn_inner_lr=learned, inner_clip=1.0)
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.05, **options).double(), task()
    grads, _ = backward(learner, x, y)
    torch.manual_seed(2)
    direction = {n: torch.randn_like(p) for n, p in learner.named_parameters()}
    slope = sum((grads[n] * direction[n]).sum() for n in grads).item()
    with torch.no_grad():
        at = [
            {n: p + h * direction[n] for n, p in learner.named_parameters()} for h in (1e-5, -1e-5)
        ]
        above, below = (functional_call(learner, parameters, (x, y)).item() for parameters in at)
    assert (above - below) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_first_order_is_the_gradient_after_learning_and_a_dropped_hessian_cannot_hide():
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.5, objective="final"), task()
    second, second_loss = backward(learner, x, y)
    learner.first_order = True
    first, first_loss = backward(learner, x, y)
    phi = {n: p.detach() for n, p in learner.theta().items()}
    for xj, yj in zip(x.chunk(3)[:2], y.chunk(3)[:2], strict=True):
        phi = {n: p - 0.5 * grad(learner.loss)(phi, xj, yj)[n] for n, p in phi.items()}
    assert first_loss == pytest.approx(second_loss, rel=1e-14)
    at_phi = grad(learner.loss)(phi, x[8:], y[8:])
    assert distance(first, {f"model.{n}": g for n, g in at_phi.items()}) < 1e-13
    assert distance(first, second) > 0.1


def test_parameters_without_curvature_or_without_use_are_no_trouble():
    model = Toy(
        lambda x, y, cubed, flat, unused: (cubed**3 * x + flat * y).sum(), *torch.ones(3, 3)
    )
    learner, x = MAML(model, 2, 0.1), torch.randn(3, 3, dtype=torch.float64)
    grads, _ = backward(learner, x, x)
    assert distance(grads, meta_grad(learner, x, x)[0]) < 1e-14
    assert not grads["model.list.2"].any()


@pytest.mark.parametrize("name, lr", [("sgd", 0.1), ("adamw", 0.01)])
def test_reading_takes_the_steps_that_torch_optim_takes_and_tied_embeddings_stay_tied(name, lr):
    model, (x, y) = tiny_gpt(), task(rows=3)
    _, phi = MAML(model, 1, lr, name).read(x[None], y[None])
    phi = {n: p[0] for n, p in phi.items()}
    loss = functional_call(model, phi, (x, y))[1].detach()
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0)
    for row in zip(x, y, strict=True):
        optimizer.zero_grad()
        model(*(t[None] for t in row))[1].backward()
        optimizer.step()
    expected = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(phi, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, model(x, y)[1].detach(), rtol=1e-6, atol=0)


def test_rates_follow_the_schedule_and_clipping_bounds_the_gradient():
    learner = MAML(tiny_gpt(), 4, 1.0, inner_schedule="cosine", inner_warmup=1)
    assert learner.factors(5).tolist() == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447], 1e-5)
    clipped, (x, y) = MAML(tiny_gpt(), 1, 1.0, inner_clip=1e-3), task(rows=1)
    _, phi = clipped.read(x[None], y[None])
    short, free = (MAML(tiny_gpt(), 1, 1.0, inner_clip=c).read(x[None], y[None]) for c in (1e3, 0))
    assert distance(short[1], free[1]) < 1e-14  # a gradient that is short enough stays as it is
    moved = sum((phi[n][0] - p).square().sum() for n, p in clipped.theta().items())
    assert moved.sqrt().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("learned", ["tensor", "element"])
def test_first_order_keeps_no_graph_and_no_copy_for_each_inner_step(learned):
    """Bytes at the height of a step, in copies of the parameters: as many for 12 steps as for 2."""

    def height(K):
        model = tiny_gpt(n_embd=64)
        learner = MAML(model, K, 0.1, first_order=True, learn_inner_lr=learned)
        x, y = task(rows=K + 1)
        learner(x, y)  # what is allocated once and kept does not count
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = learner(x, y)  # noqa: F841
        events = profile.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        most = np.cumsum([nbytes for _, nbytes in memory]).max()
        return most / sum(p.numel() * p.element_size() for p in model.parameters())

    assert height(12) < 1.05 * height(2)


def test_second_order_keeps_phi_and_no_graph_of_an_inner_step():
    def kept(K):
        """Bytes that a forward leaves allocated for its backward, in copies of the parameters."""
        learner, (x, y) = MAML(tiny_gpt(), K, 0.1), task(rows=4 * (K + 1))
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = learner(x, y)  # noqa: F841
        left = sum(event.self_cpu_memory_usage for event in profile.events())
        return left / sum(p.numel() * p.element_size() for p in learner.parameters())

    assert (kept(4) - kept(1)) / 3 < 2.1


class Regression(nn.Sequential):
    def forward(self, x, y):
        prediction = super().forward(x)
        return prediction, F.mse_loss(prediction, y)


LONG = pytest.param(15_000, 25, 0.5, marks=pytest.mark.slow)


@pytest.mark.parametrize("steps, tasks, limit", [(2_500, 1, math.inf), LONG])
def test_one_step_learns_a_sinusoid_after_meta_training_and_not_after_joint_training(
    steps, tasks, limit
):
    """Finn et al. 2017, section 5.1: regress y = a sin(x + b) from ten points, two layers of 40."""

    def draw(n, dice):
        a, b = 0.1 + 4.9 * torch.rand(1, generator=dice), math.pi * torch.rand(1, generator=dice)
        x = 10 * torch.rand(n, 1, generator=dice) - 5
        return x, a * torch.sin(x + b)

    errors = {}
    for K in (0, 1):
        torch.manual_seed(0)
        layers = nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
        model = Regression(*layers)
        learner = MAML(model, K, 0.01, objective="final")
        optimizer, (dice, test) = torch.optim.Adam(learner.parameters(), 1e-3), map(seeded, (0, 1))
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(tasks):
                (learner(*draw(20, dice)) / tasks).backward()
            optimizer.step()
        one_step, losses = MAML(model, 1, 0.01, objective="final"), []
        with torch.no_grad():
            losses = [one_step(*draw(20, test)).item() for _ in range(200)]
        errors[K] = np.mean(losses)
    assert errors[0] > 2 and errors[1] < min(limit, 0.75 * errors[0])


# --------------------------------------------------------------------------------------------------
# the identities


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("objective", ["final", "every"])
def test_zero_inner_steps_is_plain_training_bit_for_bit(compute, objective):
    model, (x, y) = tiny_gpt().float(), task()
    with torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
        plain = model(x, y)[1]
    plain.backward()
    expected = {f"model.{n}": p.grad.clone() for n, p in model.named_parameters()}
    grads, loss = backward(MAML(model, 0, objective=objective, autocast=compute), x, y)
    assert loss == plain.item() and same(grads, expected)


def test_attention_is_fused_except_where_it_is_differentiated_twice():
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for first_order, expected in ((False, [2 * 2, 0]), (True, [2 * 2, 0])):  # 2 layers, 2 chunks
        learner = MAML(tiny_gpt().float(), 1, 0.1, first_order=first_order)
        with torch.profiler.profile() as forward:
            loss = learner(*task())
        with torch.profiler.profile() as back:
            loss.backward()
        fused = [sum(event.name == kernel for event in p.events()) for p in (forward, back)]
        assert fused == expected


def test_bfloat16_agrees_with_float32_and_leaves_parameters_and_updates_in_float32():
    model, (x, y) = tiny_gpt().float(), task()
    learners = [MAML(model, 1, 0.1, autocast=dtype) for dtype in (None, torch.bfloat16)]
    (exact, loss), (rounded, rounded_loss) = (backward(learner, x, y) for learner in learners)
    assert 0 < abs(loss - rounded_loss) < 0.02 * loss and 0 < distance(rounded, exact) < 0.05
    _, phi = learners[1].read(x[None], y[None])
    assert all(t.dtype == torch.float32 for t in (*rounded.values(), *phi.values()))


METHODS = [PLAIN, dict(first_order=True), dict(first_order=False)]


@pytest.mark.parametrize("method", METHODS, ids=["plain", "first", "second"])
def test_the_flops_of_the_log_are_what_the_flop_counter_counts(pretrain, method):
    def counted(compute):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            compute()
        return counter.get_total_flops()

    options = {"inner_steps": 3, "learn_inner_lr": "no"} | method
    log = log_of(pretrain(n_embd=64, n_layer=2, max_steps=1, **options))
    model = GPT(GPTConfig(16, 320, 2, 2, 64))
    x, y = task(4, vocab=257, T=16)
    assert counted(lambda: model(x, y)) == model.flops_per_token(16) * x.numel()
    learner = MAML(model, options["inner_steps"], first_order=options.get("first_order", False))
    flops = 4 * counted(lambda: learner(x, y).backward())  # four tasks
    # where it is differentiated twice, attention in blocks leaves some of the masked half out
    assert flops == pytest.approx(log["val"][-1]["flops"], rel=0.02)


def test_the_logits_are_those_of_gpt2_in_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=96)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=16, **shape)).eval()
    with torch.no_grad():  # away from zero, where one GELU is like another
        for p in theirs.parameters():
            p.mul_(4)
    ours = GPT(GPTConfig(block_size=16, bias=True, **shape))
    unused = (".attn.bias", ".attn.masked_bias")
    weights = {k: v for k, v in theirs.state_dict().items() if not k.endswith(unused)}
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # its Conv1D keeps (in, out)
    weights = {k: v.t() if k.endswith(turned) else v for k, v in weights.items()}
    ours.load_state_dict(weights, strict=True)
    x, _ = task(rows=2, T=16, vocab=96)
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, rtol=0, atol=1e-4)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_the_snippets_of_the_readme_run_as_they_stand():
    names, (method, another_model, _) = {}, snippets()
    exec(method, names)
    grads = {n: p.grad for n, p in names["learner"].model.named_parameters()}
    assert distance(grads, names["meta_gradient"]) < 1e-4
    exec(another_model, names)  # a model that is no GPT
    assert all(p.grad.any() for p in names["learner"].parameters())


def test_the_trained_model_is_one_of_transformers(trained, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    shutil.copytree(trained / "maml", tmp_path / "out/maml_demo")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippets()[2], names)
    x, _ = task(rows=2, T=16, vocab=257)
    theirs, ours = names["hf"](x).logits, names["model"](x)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 0.5


def test_the_inner_optimizer_of_the_readme_is_exact(monkeypatch):
    recipe = (HERE / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    added = [line[1:] for line in recipe.splitlines() if line.startswith("+")]
    monkeypatch.setattr(maml, "UPDATES", dict(maml.UPDATES))
    exec("\n".join(added), {"zeros_like": maml.zeros_like, "UPDATES": maml.UPDATES})
    learner, (x, y) = (
        MAML(tiny_gpt(), 3, 0.05, "momentum", learn_inner_lr="element").double(),
        task(),
    )
    for first_order in (False, True):
        learner.first_order = first_order
        assert distance(backward(learner, x, y)[0], meta_grad(learner, x, y)[0]) < 1e-12
    losses, _ = learner.read(*passages())
    assert losses.isfinite().all()


def test_generation_is_decided_by_the_callers_generator():
    model, start = tiny_gpt(), torch.zeros(1, 1, dtype=torch.long)
    one, two, other = (
        model.generate(start, 20, top_k=10, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (1, 21)
    assert torch.equal(*(model.generate(start, 20, temperature=0) for _ in range(2)))


# --------------------------------------------------------------------------------------------------
# tasks


def draws(data_dir, **changes):
    """The inputs of twenty steps."""
    options = dict(block_size=16, batch_size=4, tasks_per_step=3) | changes
    data = tasks.Dataset(data_dir / "tiny", **options)
    return [[data.task(step, i)[0] for i in range(data.tasks_per_step)] for step in range(20)]


def domains_of_rows(*batches):
    """The domain of each row, told by its alphabet."""
    return [(row[row < 256].max().item() - 48) // 9 for x in batches for row in x]


def test_the_draws_are_pure_and_a_step_covers_the_domains_evenly(data_dir):
    three = draws(data_dir, tasks="domain")
    assert all(map(torch.equal, three[5], draws(data_dir, tasks="domain")[5]))
    assert not torch.equal(three[5][0], three[6][0])
    assert not torch.equal(three[5][0], draws(data_dir, tasks="domain", seed=2)[5][0])
    for kind in ("domain", "passage"):
        steps = draws(data_dir, tasks=kind, tasks_per_step=7)
        assert all(len(set(domains_of_rows(x))) == 1 for step in steps for x in step)
        counts = [sorted(Counter(domains_of_rows(*step)).values()) for step in steps]
        assert all(count == [8, 8, 12] for count in counts)
    mixed = draws(data_dir, batch_size=6)
    assert all(Counter(domains_of_rows(*step)) == {0: 6, 1: 6, 2: 6} for step in mixed)
    assert domains_of_rows(mixed[0][0]) != sorted(domains_of_rows(mixed[0][0]))


def counting(folder, train=(128, 129), val=257):
    """A dataset of one domain whose train ids count upwards through its shards; val's as well."""
    starts = np.cumsum([0, *train])
    parts = {f"train_{i}": np.arange(a, b) for i, (a, b) in enumerate(itertools.pairwise(starts))}
    shards = {f"counting/{name}.bin": shard_of(ids) for name, ids in parts.items()}
    write(folder / "text", shards | {"counting/val_0.bin": shard_of(np.arange(val))})
    prepare_data.main([str(folder / "text"), "--name", "set", "--data_dir", str(folder / "data")])
    return folder / "data" / "set"


def shard_of(ids) -> bytes:
    header = np.array([20240520, 1, len(ids)] + [0] * 253, np.int32)
    return header.tobytes() + ids.astype(np.uint16).tobytes()


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_rows_are_whole_never_overlap_and_a_passage_is_consecutive_across_shards(tmp_path, kind):
    data = tasks.Dataset(counting(tmp_path), 16, batch_size=6, tasks=kind, tasks_per_step=2)
    firsts = set()
    assert not all(torch.equal(data.task(i, 0)[0], data.task(i, 1)[0]) for i in range(9))
    for step in range(200):
        x, y = data.task(step, 0)
        assert len(x.unique()) == x.numel() and torch.equal(y, x + 1)
        assert torch.equal(x[:, 1:], y[:, :-1])
        consecutive = torch.equal(x.flatten(), x[0, 0] + torch.arange(x.numel()))
        assert consecutive == (kind == "passage")
        firsts.add(x[0, 0].item())
    assert len(firsts) > 50


def test_passages_of_val_come_in_order_evenly_spaced_and_never_from_the_train_split(tmp_path):
    data = tasks.Dataset(counting(tmp_path, val=200), 16)
    x, y = data.passages("counting", 3, 4)
    assert x.shape == (3, 4, 16) and torch.equal(y, x + 1)
    assert x[:, 0, 0].tolist() == [0, 4 * 16, 8 * 16]
    assert torch.equal(x.flatten(1), x[:, 0, :1] + torch.arange(64))
    x, _ = data.passages("counting", 3, 1000)  # too short for that: one passage, of all there is
    assert x.shape == (1, 12, 16)
    data.paths["counting", "train"] = None  # nothing of it is needed
    data.passages("counting", 2, 4)


def test_drawing_ahead_changes_nothing_and_passes_errors_on():
    keys = [(i, j) for i in range(3) for j in range(2)]
    assert list(tasks.ahead(lambda i, j: 10 * i + j, keys)) == [0, 1, 10, 11, 20, 21]
    assert list(tasks.ahead(lambda: 0, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(tasks.ahead(lambda i: 1 // i, [(1,), (0,)]))


# --------------------------------------------------------------------------------------------------
# reading


def passages(P=3, R=5, seed=1):
    x, y = task(rows=P * R, seed=seed)
    return x.view(P, R, -1), y.view(P, R, -1)


def test_reading_is_causal():
    for learner in (MAML(tiny_gpt(), 1, 0.1), MAML(tiny_gpt(), 1, 0.01, "adamw")):
        x, y = passages()
        before, _ = learner.read(x, y)
        x, y = x.clone(), y.clone()
        x[:, 3], y[:, 3] = 7, 9
        after, _ = learner.read(x, y)
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.isclose(before[:, 3:], after[:, 3:]).any()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_passages_side_by_side_are_read_as_one_at_a_time(optimizer):
    learner = MAML(
        tiny_gpt(), 1, 0.05, optimizer, learn_inner_lr="element", inner_clip=1.0
    ).double()
    x, y = passages()
    together, phi = learner.read(x, y, repeat=2)
    once, _ = learner.read(x, y)  # a row's loss is that before any step on it
    assert together.shape == once.shape and torch.equal(together[:, 0], once[:, 0])
    assert (together[:, 1:] != once[:, 1:]).all()
    for i in range(3):
        alone, own = learner.read(x[i : i + 1], y[i : i + 1], repeat=2)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-12, atol=0)
        assert (
            distance({n: p[i] for n, p in phi.items()}, {n: p[0] for n, p in own.items()}) < 1e-12
        )


@pytest.mark.parametrize("learned", ["tensor", "element"])
def test_own_rates_fixed_to_one_number_are_sgd(learned):
    x, y = passages()
    own = MAML(tiny_gpt(), 1, 0.5, learn_inner_lr=learned).double()
    for rate in own.log_inner_lr:
        rate.data.fill_(math.log(0.03))
    expected, _ = MAML(tiny_gpt(), 1, 0.03).read(x, y)
    torch.testing.assert_close(own.read(x, y)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_online_loss_of_a_task_is_what_training_lowers(rows):
    """learner(x, y) for 'every' is the mean of the losses of reading x, y in the same chunks."""
    options = dict(inner_clip=1.0, first_order=True, inner_schedule="cosine")
    learner, (x, y) = MAML(tiny_gpt(), 12 // rows - 1, 0.05, **options), task()
    losses, _ = learner.read(x[None], y[None], rows)
    assert learner(x, y).item() == pytest.approx(losses.mean().item(), rel=1e-12)
    x, y = x[:rows], y[:rows]
    assert losses[0, 0].item() == pytest.approx(learner.loss(learner.theta(), x, y).item())


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A baseline and a learner that begins from it, both trained for a few seconds."""
    out = tmp_path_factory.mktemp("trained")
    shape = ["--block_size=16", "--n_layer=1", "--n_head=2", "--n_embd=16", "--dataset=tiny"]
    common = [f"--data_dir={data_dir}", "--device=cpu", "--eval_interval=60", "--warmup_steps=5"]
    plain = ["--max_steps=120", "--learning_rate=1e-2", "--batch_size=16", "--tasks_per_step=1"]
    train.main([*shape, *common, *plain, f"--out_dir={out}/plain"])
    own = ["--max_steps=60", "--learning_rate=3e-3", "--batch_size=8", "--tasks_per_step=2"]
    own += ["--inner_steps=7", "--first_order=true", "--learn_inner_lr=element", "--tasks=passage"]
    own += ["--inner_lr_lr=0.1", "--inner_clip=4", "--inner_lr=0.05"]
    train.main([*shape, *common, *own, f"--init_from={out}/plain/ckpt.pt", f"--out_dir={out}/maml"])
    for run in ("plain", "maml"):
        adapt.main([str(out / run), "--passages", "4", "--tokens", "256"])
    return out


def test_learned_rates_read_unseen_text_better_than_no_learning(trained):
    rows = {(r["rule"], r["domain"]): np.mean(r["loss"]) for r in log_of(trained / "maml")["adapt"]}
    assert {rule for rule, _ in rows} == {"none", "adamw", "own"}
    assert {domain for _, domain in rows} == {"tune", "far"}
    assert all(rows["own", d] < rows["none", d] - 0.05 for d in ("tune", "far"))


def test_the_table_that_is_printed_is_that_of_the_log(trained, capsys):
    adapt.main([str(trained / "maml"), "--passages", "4", "--tokens", "256"])
    printed = capsys.readouterr().out
    rows = [r for r in log_of(trained / "maml")["adapt"] if r["domain"] == "far"][-3:]
    table = printed.split("far: ")[1].split("\n\n")[0].splitlines()[2:5]
    for row, line in zip(rows, table, strict=True):
        loss = np.array(row["loss"])
        halves = [loss, loss[:2], loss[2:4], loss[4:8], loss[8:]]
        assert line.split() == [row["rule"], *(f"{part.mean():.3f}" for part in halves)]
        assert np.mean(row["by_passage"]) == pytest.approx(loss.mean(), abs=1e-3)


def test_adamws_options_are_chosen_on_tune_domains_alone(trained, data_dir, monkeypatch):
    seen, read, expected = (
        [],
        adapt.read,
        tasks.Dataset(data_dir / "tiny", 16).passages("tune", 2, 4),
    )

    def reading(model, ckpt, rule, x, y, **options):
        seen.append(x)
        return read(model, ckpt, rule, x, y, **options)

    def search(measure):
        measure(adapt.START)
        assert len(seen) == 1 and torch.equal(seen[0], expected[0])
        return adapt.START

    monkeypatch.setattr(adapt, "read", reading)
    monkeypatch.setattr(adapt, "best_adamw", search)
    adapt.main([str(trained / "plain"), "--passages", "2", "--tokens", "64", "--rules", "adamw"])
    assert len(seen) == 3


def test_no_domain_that_was_trained_on_is_read_whatever_its_role_is_now(trained, data_dir, capsys):
    text = data_dir.parent
    meta = json.loads((data_dir / "tiny/meta.json").read_text())
    meta["domains"]["alpha"]["role"] = "heldout"
    write(data_dir, {"other/meta.json": json.dumps(meta)})
    for domain in meta["domains"]:
        shutil.copytree(data_dir / "tiny" / domain, data_dir / "other" / domain)
    run = shutil.copytree(trained / "plain", text / "copy")
    moved = [f"--data_dir={data_dir}", "--dataset=other", "--device=cpu"]
    read = ["--dataset", "other", "--passages", "2", "--tokens", "64", "--rules", "none"]
    adapt.main([str(run), *read])
    printed = capsys.readouterr().out
    assert "far: " in printed and "alpha" not in printed
    train.main([f"--init_from={run}/ckpt.pt", f"--out_dir={text}/more", "--max_steps=1", *moved])
    adapt.main(
        [str(text / "more"), *read]
    )  # it goes on without alpha, which it has seen all the same
    printed = capsys.readouterr().out
    assert "far: " in printed and "alpha" not in printed
    for domain in ("tune", "far"):
        meta["domains"].pop(domain)
    write(data_dir, {"other/meta.json": json.dumps(meta)})
    with refused(match="no unseen domain"):
        adapt.main([str(run), "--dataset", "other"])


ODD = {
    "one character": "a" * 3000,
    "random bytes": "".join(map(chr, np.random.default_rng(0).integers(0, 128, 3000))),
    "another alphabet": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. " * 60,
    "long": "It was the same text again, and again. " * 600,
}


@pytest.mark.parametrize("name", ODD)
def test_reading_never_blows_up(trained, tmp_path, capsys, name):
    """On a text unlike any it stays finite, and no worse than 0.1 above no learning at all."""
    write(tmp_path, {"odd.txt": ODD[name]})
    options = ["--text", str(tmp_path / "odd.txt"), "--max_new_tokens", "5"]
    adapt.main([str(trained / "maml"), *options, "--rules", "none", "own"])
    means = dict(re.findall(r"^(none|own) +(\S+)", capsys.readouterr().out, re.M))
    assert float(means["own"]) < float(means["none"]) + 0.1


def test_a_text_of_ones_own_is_learned_and_what_was_learned_can_be_kept(trained, tmp_path, capsys):
    write(tmp_path, {"notes.txt": "the quick brown fox jumps over the lazy dog. " * 60})
    notes = ["--text", str(tmp_path / "notes.txt"), "--max_new_tokens", "20"]
    saved = tmp_path / "learned.pt"
    adapt.main([str(trained / "maml"), *notes, "--save", str(saved)])
    first = capsys.readouterr().out
    assert first.count("own") >= 2 and "before:" in first and "after" in first
    adapt.main([str(saved), *notes, "--rules", "none", "adamw"])  # it knows the text now
    none, second = re.compile(r"^none +(\S+)", re.M), capsys.readouterr().out
    assert float(none.search(second)[1]) < float(none.search(first)[1]) - 0.5
    assert "adamw is not tuned" in second  # no log beside it tells what was chosen
    rows = len((trained / "maml/log.jsonl").read_text().splitlines())
    shutil.copy(saved, trained / "maml/learned.pt")
    read = ["--passages", "2", "--tokens", "64", "--rules", "none"]
    adapt.main([str(trained / "maml/learned.pt"), *read])  # it is not the run's result
    assert len((trained / "maml/log.jsonl").read_text().splitlines()) == rows
    for options, remedy in (
        (["--rules", "own"], "no inner loop of its own"),
        (["--save", "x"], "--text"),
    ):
        with refused(match=remedy):
            adapt.main([str(trained / "plain"), *options])
    with refused(match="use --tokens"):
        adapt.main([str(trained / "plain"), "--tokens", "1000000"])
    small = checkpoint_of(trained / "plain")
    small["model_args"]["vocab_size"] = 64
    small["model"]["transformer.wte.weight"] = torch.zeros(64, 16)
    small["model"]["lm_head.weight"] = small["model"]["transformer.wte.weight"]
    torch.save(small, tmp_path / "small.pt")
    with refused(match="knows 64 ids"):
        adapt.main([str(tmp_path / "small.pt"), *notes])


def test_adamws_options_are_found_by_hill_climbing_on_the_measure_it_is_given():
    def valley(options):
        far = abs(math.log2(options["lr"] / 5e-4)) + abs(options["steps"] - 2)
        return far + (not options["frozen"]) + (options["beta2"] > 0.96)

    assert adapt.best_adamw(valley) == {"lr": 5e-4, "steps": 2, "frozen": True, "beta2": 0.95}
    assert adapt.best_adamw(lambda options: math.nan) == adapt.START


def test_frozen_embeddings_stay_and_the_rest_learns():
    model = GPT(GPTConfig(8, 32, 1, 2, 8))
    learner = adapt.adamw_learner(model, lr=1e-3, frozen=True, beta2=0.99)
    assert set(dict(model.named_parameters())) - set(learner.names) == set(adapt.EMBEDDINGS)
    _, phi = learner.read(*passages())
    assert all(not torch.equal(phi[n][0], p) for n, p in learner.theta().items())
    assert all(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# the systems

RUNS = [PLAIN, dict(), dict(first_order=False, learn_inner_lr="tensor"), dict(learning_rate=0)]


@pytest.mark.parametrize("method", RUNS, ids=["plain", "first", "second", "rates"])
def test_a_run_stopped_and_resumed_is_bitwise_the_uninterrupted_one(
    pretrain, tmp_path, monkeypatch, method
):
    whole, cut = pretrain("whole", **method), tmp_path / "cut"
    for step in (1, 3):  # it ends at step 2, where no evaluation is due, and at 4
        at_step(step, partial(signal.raise_signal, signal.SIGTERM), monkeypatch)
        with refused(match="stopped at step .*--init_from=resume goes on"):
            pretrain("cut", init_from="resume", **method)
        assert 0 < checkpoint_of(cut)["step"] < 6
    pretrain("cut", init_from="resume", **method)
    assert same(weights_of(whole), weights_of(cut)) and not list(cut.glob("*.tmp"))
    assert log_of(whole) == log_of(cut)


@pytest.mark.parametrize("method", [PLAIN, dict()], ids=["plain", "first"])
def test_two_processes_do_what_one_does(flags, pretrain, tmp_path, method):
    alone, pair = pretrain("alone", **method), tmp_path / "pair"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, HERE / "train.py", *flags(out_dir=pair, **method)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(log_of(pair), log_of(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights_of(pair), weights_of(alone), rtol=1e-3, atol=1e-5)


def test_ranks_that_begin_at_different_steps_refuse_to_start(flags, pretrain, tmp_path):
    """As file systems that lag may have it: each rank sees an out_dir of its own."""
    pretrain("1", max_steps=3)
    code = f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import train\n"
    code += "train.main(sys.argv[1:] + ['--out_dir=' + os.environ['RANK']])"
    write(tmp_path, {"start.py": code})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "start.py", *flags(out_dir=None, init_from="resume")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "begin at different steps" in done.stderr
    assert not (tmp_path / "0").exists()  # and nothing was touched


def test_evaluating_more_often_changes_nothing(pretrain):
    rarely, often = pretrain("rarely"), pretrain("often", eval_interval=1)
    assert log_of(rarely)["train"] == log_of(often)["train"]
    assert same(weights_of(rarely), weights_of(often))


def test_what_is_printed_before_and_after_learning_is_of_the_same_rows(pretrain, data_dir):
    """'loss' and 'online' of a learner whose rates are next to nothing are the same number."""
    out = pretrain(max_steps=0, inner_lr=1e-12, learn_inner_lr="no")
    [row] = log_of(out)["val"]
    assert set(row["online"]) == {"tune", "far"} and set(row["loss"]) == {
        "alpha",
        "beta",
        "gamma",
        "tune",
        "far",
    }
    assert all(row["online"][d] == pytest.approx(row["loss"][d], abs=1e-5) for d in row["online"])
    model = GPT(GPTConfig(**checkpoint_of(out)["model_args"]))
    model.load_state_dict(checkpoint_of(out)["model"])
    x, y = tasks.Dataset(data_dir / "tiny", 16).passages("far", 2, 8)
    loss = model(x.flatten(0, 1), y.flatten(0, 1))[1].item()
    assert row["loss"]["far"] == pytest.approx(loss, abs=1e-5)


def test_a_checkpoint_is_written_once_at_an_evaluation(pretrain, monkeypatch):
    written, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda ckpt, path: (written.append(path), save(ckpt, path)))
    pretrain(max_steps=6, eval_interval=3)
    assert len(written) == 3  # at steps 0, 3 and 6


def test_learning_the_rates_alone_leaves_theta_bitwise_as_it_was(pretrain, tmp_path):
    base = pretrain("base", **PLAIN)
    for weight_decay, nesterov in ((0.1, False), (0.0, True)):
        name = f"rates{nesterov}"
        options = dict(learning_rate=0, weight_decay=weight_decay, nesterov=nesterov)
        out = pretrain(name, init_from=base / "ckpt.pt", **options)
        assert same(checkpoint_of(out)["model"], checkpoint_of(base)["model"])
        rates = checkpoint_of(out)["learner"].values()
        assert all(not torch.isclose(rate, torch.tensor(math.log(0.02))).all() for rate in rates)
    with refused(match="leaves only rates to learn"):
        pretrain("nothing", learning_rate=0, **PLAIN)


def test_rates_of_elements_begin_with_those_of_their_tensors(pretrain):
    tensor = pretrain("tensor", learn_inner_lr="tensor", inner_lr_lr=0.1)
    element = pretrain("element", init_from=tensor / "ckpt.pt", max_steps=0)
    for name, rate in checkpoint_of(element)["learner"].items():
        assert rate.dim() and (rate == checkpoint_of(tensor)["learner"][name]).all()


def test_a_run_that_begins_from_a_checkpoint_counts_what_that_cost(pretrain):
    base = pretrain("base", **PLAIN)
    at = log_of(base)["val"][-1]
    out = pretrain("more", init_from=base / "ckpt.pt")
    first, *_, last = log_of(out)["val"]
    assert (first["step"], first["tokens"], first["flops"]) == (0, at["tokens"], at["flops"])
    assert last["tokens"] == 2 * at["tokens"] == 2 * 6 * 4 * 4 * 16
    seconds = [json.loads(r)["seconds"] for r in (out / "log.jsonl").read_text().split("\n")[1:-1]]
    assert seconds[0] == checkpoint_of(base)["spent"]["seconds"] > 0
    pretrain("more", init_from="resume", max_steps=9)
    assert log_of(out)["val"][-1]["tokens"] == (6 + 9) * 4 * 4 * 16


def test_a_checkpoints_shape_rules_is_logged_and_contradicting_flags_are_refused(
    pretrain, tmp_path
):
    base = pretrain("base", n_layer=2, n_embd=32, **PLAIN) / "ckpt.pt"
    shape = dict(n_layer=None, n_embd=None, n_head=None, block_size=None)  # not given
    out = pretrain("more", init_from=base, **shape)
    config = header_of(out)["config"]
    assert (config["n_layer"], config["n_embd"], config["block_size"]) == (2, 32, 16)
    with refused(match="the checkpoint has n_layer=2: leave n_layer out"):
        pretrain("other", init_from=base, **shape | {"n_layer": 1})
    assert not (tmp_path / "other").exists()
    # the same command goes on after a stop, and its header still says what it began from
    given = [f"--init_from={base}", "--init_from=resume"]
    options = train.read_arguments([*given, "--max_steps=8"])
    assert options == {"init_from": str(base), "resume": True, "max_steps": 8}
    pretrain("more", init_from="resume", max_steps=8, **shape)
    assert checkpoint_of(out)["step"] == 8


def test_a_nanogpt_checkpoint_is_taken_over(pretrain, tmp_path):
    shape = dict(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16, bias=True)
    model = GPT(GPTConfig(**shape))
    weights = {f"_orig_mod.{n}": p for n, p in model.state_dict().items()}
    args = shape | {"dropout": 0.0}
    torch.save({"model": weights, "model_args": args, "iter_num": 7}, tmp_path / "nano.pt")
    out = pretrain(init_from=tmp_path / "nano.pt", max_steps=0)
    assert same(checkpoint_of(out)["model"], model.state_dict())


def test_nesterov_is_adamw_that_looks_ahead(pretrain):
    model = {}
    for name, options in (
        ("start", {"max_steps": 0}),
        ("plain", {}),
        ("ahead", {"nesterov": True}),
    ):
        out = pretrain(name, **PLAIN | {"weight_decay": 0.0, "max_steps": 1} | options)
        model[name] = checkpoint_of(out)["model"]
    for name, start in model["start"].items():
        plain, ahead = (model[run][name] - start for run in ("plain", "ahead"))
        # g + m, both of one gradient
        torch.testing.assert_close(ahead, plain * (1 + 0.9 / 1.9), rtol=1e-2, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# the edges: what is wrong, and what to do, in one line


MISTAKES = [
    ("inner_stepz", 1, "did you mean --inner_steps?"),
    ("max_steps", "many", "--max_steps: invalid int value: 'many'"),
    ("bias", 1, "--bias: invalid boolean value: '1'"),
    ("objective", "evry", "choose 'every' or 'final'"),
    ("learn_inner_lr", "all", "choose 'no' or 'tensor' or 'element'"),
    ("dtype", "float16", "choose 'float32' or 'bfloat16'"),
    ("tasks", "books", "choose 'mixed' or 'domain' or 'passage'"),
    ("batch_size", 5, "batch_size=5 must be a multiple of inner_steps + 1 = 2"),
    ("dataset", "nowhere", "run python prepare_data.py nowhere, or PATH --name nowhere"),
    ("block_size", 100_000, "lower block_size"),
    ("n_head", 3, "must be a multiple of n_head"),
    ("init_from", "elsewhere.pt", "no checkpoint at elsewhere.pt"),
    *((key, -1, f"{key}=-1") for key in ("inner_steps", "max_steps", "seed", "grad_clip")),
    ("eval_rows", 0, "eval_rows=0 must be finite and at least 1"),
    ("learning_rate", "inf", "learning_rate=inf must be"),
]


@pytest.mark.parametrize("key, value, remedy", MISTAKES, ids=lambda text: str(text)[:20])
def test_a_mistake_is_answered_with_its_remedy(pretrain, key, value, remedy):
    with refused(match=re.escape(remedy)):
        pretrain(**{key: value})


def test_processes_that_do_not_divide_the_tasks_are_told_the_flags_that_do(pretrain, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = dict(tasks_per_step=1, batch_size=8)
    with refused(match="--tasks_per_step=2 --batch_size=4 is as much"):
        pretrain(**PLAIN | options)
    with refused(match="2 processes cannot share tasks_per_step=1 out: change either"):
        pretrain(**options)


def test_config_files_are_checked_like_the_command_line_and_help_names_every_field(
    tmp_path, capsys
):
    config = tmp_path / "c.py"
    config.write_text("import math\n_half = 0.5\nlearning_rate = 1\ninner_lr = _half * math.pi\n")
    cfg = train.Config(**train.read_arguments([str(config), "--out_dir=3", "--bias=True"]))
    assert (cfg.learning_rate, cfg.inner_lr) == (1.0, math.pi / 2)
    assert (cfg.out_dir, cfg.bias) == ("3", True)
    mistakes = {"leraning_rate = 1": "did you mean --learning_rate", "n_layer = 2.5": "n_layer"}
    for text, remedy in (mistakes | {"x =": "does not run"}).items():
        config.write_text(text)
        with pytest.raises(ValueError, match=remedy):
            train.read_arguments([str(config)])
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in vars(cfg))


@pytest.mark.parametrize("path", sorted((HERE / "config").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_one_that_the_readme_can_name(path):
    cfg = train.Config(**train.read_arguments([str(path)]))
    lines = path.read_text().splitlines()
    assert len(lines) <= 25 and f"train.py config/{path.name}" in lines[0]
    assert cfg.out_dir == f"out/{path.stem}"


def test_resuming_as_something_else_is_refused_and_no_code_in_a_checkpoint_runs(pretrain, tmp_path):
    path = pretrain(max_steps=1) / "ckpt.pt"
    changes = {"n_embd=16": {"n_embd": 32}, "set max_steps to that": {"max_steps": 0}}
    changes |= {"learn_inner_lr=element": {"learn_inner_lr": "no"}}
    changes |= {"batch_size=4": {"batch_size": 8}, "nesterov=False": {"nesterov": True}}
    for remedy, changed in changes.items():  # the log counts the tokens of all steps by these
        with refused(match=remedy):
            pretrain(init_from="resume", **changed)
    path.write_bytes(path.read_bytes()[:-1000])
    with refused(match=r"ckpt\.pt is cut short"):
        pretrain(init_from="resume")
    torch.save({"model": {}, "model_args": Path("x")}, path)  # any object that is not plain data
    with refused(match="no checkpoint of a GPT"):
        pretrain(init_from="resume")


def test_roles_given_later_stop_a_run_only_where_they_change_what_it_was_trained_on(
    pretrain, data_dir, tmp_path
):
    moved = shutil.copytree(data_dir, tmp_path / "data")
    out = pretrain(data_dir=moved, max_steps=3)

    def give(**roles):
        meta = json.loads((moved / "tiny/meta.json").read_text())
        for domain, role in roles.items():
            meta["domains"][domain]["role"] = role
        write(moved, {"tiny/meta.json": json.dumps(meta)})

    give(tune="heldout", far="tune")
    pretrain(data_dir=moved, init_from="resume")
    assert checkpoint_of(out)["step"] == 6
    give(alpha="heldout")
    with refused(match="was trained with data="):
        pretrain(data_dir=moved, init_from="resume", max_steps=9)


def test_an_earlier_run_is_not_overwritten(pretrain):
    pretrain(max_steps=1)
    with refused(match="holds a run: --init_from=resume goes on"):
        pretrain(max_steps=2)


def test_a_run_killed_before_its_first_checkpoint_begins_again_when_resumed(pretrain):
    out = pretrain(max_steps=1)
    log = log_of(out)
    (out / "ckpt.pt").unlink()
    assert log_of(pretrain(max_steps=1, init_from="resume")) == log


def test_theta_cannot_be_thawed_or_frozen_in_a_run_that_has_begun(pretrain):
    pretrain("rates", learning_rate=0)
    with refused(match=r"learning_rate=0=True \(now False\): .* give its ckpt.pt as --init_from"):
        pretrain("rates", init_from="resume")


def test_a_finished_run_that_is_resumed_is_done(pretrain):
    out = pretrain()
    before, log = weights_of(out), log_of(out)
    pretrain(init_from="resume")
    assert same(before, weights_of(out)) and log_of(out) == log


def test_a_run_goes_on_at_the_rates_that_are_asked_for_and_its_log_says_so(pretrain):
    pretrain(max_steps=3)
    rates = dict(learning_rate=0.5, warmup_steps=0)
    out = pretrain(init_from="resume", **rates)
    assert checkpoint_of(out)["optimizer"]["param_groups"][0]["peak_lr"] == 0.5
    header = header_of(out)
    assert header["config"]["learning_rate"] == 0.5
    assert header["earlier"]["config"]["learning_rate"] == 1e-3


def test_what_is_not_finite_stops_the_run_and_leaves_the_checkpoint_whole(pretrain, tmp_path):
    wild = dict(learning_rate=1e25, warmup_steps=0, **PLAIN)
    for interval, at in ((6, "in training"), (1, "in an evaluation")):
        with refused(match="step 1: a loss or gradient is not finite"):
            pretrain(at, eval_interval=interval, **wild)
        ckpt = checkpoint_of(tmp_path / at)
        assert ckpt["step"] == 0 and all(torch.isfinite(w).all() for w in ckpt["model"].values())
    with refused(match="step 0: .* is not finite"):  # the learner's own loss, before any step
        pretrain("own", inner_lr=1e25, learn_inner_lr="no")
    assert not (tmp_path / "own/ckpt.pt").exists()


def test_a_log_cut_in_the_middle_of_a_row_does_not_stop_a_resume(pretrain):
    out = pretrain(max_steps=2)
    log = log_of(out)
    for end in ('{"kind": "val", "loss": {"a": 1.0}', '{"kind": "tr', '{"kind": "train"}'):
        with open(out / "log.jsonl", "a") as file:
            file.write(end)
        pretrain(max_steps=2, init_from="resume")
        assert log_of(out) == log
    (out / "log.jsonl").write_text("")  # as a power cut may leave it
    pretrain(max_steps=2, init_from="resume")
    rows = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["kind"] for row in rows] == ["run", "val"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_under_the_log_is_named(pretrain, monkeypatch, tmp_path):
    log = tmp_path / "run/log.jsonl"
    at_step(0, lambda: (log.unlink(), log.symlink_to("/dev/full")), monkeypatch)
    with refused(match="No space left"):
        pretrain()
    assert checkpoint_of(tmp_path / "run")["step"] == 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(pretrain, monkeypatch, tmp_path):
    def full(ckpt, path):
        path.write_bytes(b"half of it")
        raise RuntimeError("the disk is full")

    at_step(1, lambda: monkeypatch.setattr(torch, "save", full), monkeypatch)
    with refused(match="The one before is whole"):
        pretrain()
    assert checkpoint_of(tmp_path / "run")["step"] == 0 and not list(tmp_path.glob("run/*.tmp"))


def test_a_meta_json_that_is_none_is_named(pretrain, tmp_path):
    for text in ("{", "[]", '{"domains": {"a": {}}}'):
        with refused(match=r"tiny/meta\.json is not .*--overwrite"):
            pretrain(data_dir=write(tmp_path, {"tiny/meta.json": text}))


# --------------------------------------------------------------------------------------------------
# the data: text to shards


@pytest.fixture
def prepare(tmp_path):
    """prepare(source, *options): a dataset of a folder, a file or {path: text}; where it is."""

    def prepare(source, *options, name="set") -> Path:
        source = write(tmp_path / "text", source) if isinstance(source, dict) else source
        place = ["--name", name, "--data_dir", str(tmp_path / "data")]
        prepare_data.main([str(source), *place, *options])
        return tmp_path / "data" / name

    return prepare


def domains_of(dataset) -> dict:
    return tasks.read_meta(dataset / "meta.json")["domains"]


def documents_of(dataset, domain) -> list[list[str]]:
    """The texts of train and of val, whose ids are tiktoken's, an end-of-text id before each."""
    meta, found = tasks.read_meta(dataset / "meta.json"), []
    encoding = prepare_data.get_tokenizer(meta["tokenizer"])
    for split in ("train", "val"):
        paths = sorted(meta["domains"][domain]["shards"][split])
        ids = np.concatenate([tasks.open_shard(dataset / path) for path in paths])
        parts = np.split(ids, np.flatnonzero(ids == meta["eot"]))[1:]
        documents = [part[1:].tolist() for part in parts]
        found.append([encoding.decode(document) for document in documents])
        assert ids[0] == meta["eot"]
        assert documents == [encoding.encode_ordinary(text) for text in found[-1]]
    return found


def two_domains(n=40) -> dict:
    """{path: text} of n files each, of growing length."""
    files = itertools.product(("père noël", "數學"), range(n))
    text = "{} {}: <|endoftext|> is text here. "
    return {f"{d}/{i:03}.md": text.format(d, i) + "é数 \n" * (i * 7) for d, i in files}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_any_text_comes_back_from_its_tokens(prepare, name):
    try:
        prepare_data.get_tokenizer(name)
    except SystemExit:
        pytest.skip("the gpt2 encoding is neither cached nor reachable")
    odd = ["plain", " \n\t\r\x00", "日本語 🙂 ∂x", "<|endoftext|>", "a" * 500]
    texts = [f"{text}{i}" for text in odd for i in range(80)]
    train, val = documents_of(prepare({"odd.jsonl": records(texts)}, "--tokenizer", name), "odd")
    assert train + val == texts


def test_every_document_is_in_one_split_whole_and_val_is_the_last_share(prepare, monkeypatch):
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 5000)
    made = prepare(two_domains(), "--heldout", "數學")
    for domain, entry in domains_of(made).items():
        train, val = documents_of(made, domain)
        texts = [text for path, text in two_domains().items() if path.startswith(domain)]
        assert train + val == texts and len(entry["shards"]["train"]) > 2
        assert entry["role"] == ("heldout" if domain == "數學" else "train")
        assert sum(entry["bytes"].values()) == sum(len(text.encode()) for text in texts)
        assert entry["documents"] == {"train": len(train), "val": len(val)}
        assert 0.05 < entry["tokens"]["val"] / sum(entry["tokens"].values()) < 0.15


def test_roles_stay_until_it_is_said_otherwise_and_change_no_shard(prepare):
    made = prepare({f"{d}.txt": f"{d} " * 99 for d in "abc"}, "--heldout", "a", "--tune", "b")
    roles, shards = [], {path: path.stat().st_mtime_ns for path in made.rglob("*.bin")}
    for options in ([], ["--heldout", "b"], ["--heldout", "", "--tune", "c"]):
        prepare(made.parents[1] / "text", *options)
        roles.append([domains_of(made)[d]["role"] for d in "abc"])
    expected = [["heldout", "tune", "train"], ["train", "heldout", "train"]]
    assert roles == [*expected, ["train", "train", "tune"]] and len(shards) == 6
    assert all(path.stat().st_mtime_ns == written for path, written in shards.items())


@pytest.mark.parametrize("text", ["數學" * 50, "".join(f"línea {i}\n" for i in range(100))])
def test_one_document_still_gives_both_splits_and_no_character_is_cut(prepare, tmp_path, text):
    [train], [val] = documents_of(prepare(write(tmp_path, {"book.txt": text}) / "book.txt"), "book")
    assert train + val == text and 0.05 < len(val) / len(train) < 0.2
    assert "\n" not in text or val.startswith("línea")


def test_a_long_document_is_cut_at_line_ends(prepare, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_DOCUMENT", 100)
    lines = [f"line {i}\n" for i in range(200)]
    for name, text in (("plain.txt", "".join(lines)), ("json.jsonl", records(["".join(lines)]))):
        made = prepare({name: text}, name=name.split(".")[0])
        train, val = documents_of(made, name.split(".")[0])
        documents = train + val
        assert "".join(documents) == "".join(lines) and len(documents) > 9
        assert all(len(text) <= 100 and text.endswith("\n") for text in documents)
        (made.parents[1] / "text" / name).unlink()


def test_a_shard_cut_short_or_changed_is_refused(prepare, tmp_path):
    path = prepare(two_domains()) / "數學/train_000000.bin"
    header, ids = np.fromfile(path, np.int32, 256), np.fromfile(path, np.uint16)[512:]
    assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    whole, verify = path.read_bytes(), partial(prepare, tmp_path / "text", "--verify")
    verify()
    path.write_bytes(whole[:-2] + b"\x01\x00")
    with refused(match=r"train_000000.*--overwrite"):
        verify()
    path.write_bytes(whole[:-2])
    for read in (partial(tasks.open_shard, path), verify):
        with pytest.raises((ValueError, SystemExit), match=r"train_000000.*--overwrite"):
            read()


def test_bad_records_are_counted_and_duplicates_dropped_over_all_domains(prepare):
    a = records(f"document {i % 30}" for i in range(40))
    a += '{broken\n{"no": "text"}\n{"text": "\\ud800"}\n{"text": " "}\n'
    b = b"\xff\xfe bad\n<|endoftext|>\ndocument 1<|endoftext|>\n<|endoftext|>\nown\n"
    b += b"<|endoftext|>\nother\n<|endoftext|>\nown\n"
    domains = domains_of(prepare({"a.jsonl": a, "b.txt": b, "c.jsonl": records(["own\n", "new"])}))
    assert domains["a"]["skipped"] == {"duplicate": 10, "malformed": 3}
    assert domains["b"]["skipped"] == {"duplicate": 1, "malformed": 1}
    assert domains["c"]["skipped"] == {"duplicate": 1}
    assert [sum(domains[d]["documents"].values()) for d in "ab"] == [30, 3]


def test_a_user_s_mistake_names_the_remedy(prepare, tmp_path, monkeypatch):
    prepare(two_domains(), name="made")
    wide = SimpleNamespace(n_vocab=100277)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", lambda name: wide)
    (tmp_path / "empty").mkdir()
    mixed = {"both/a/b.bin": shard_of(np.arange(9)), "both/a/c.txt": "text"}
    write(tmp_path, mixed | {"x/local/a.txt": "text"})
    for folder, options, name, remedy in (
        ("text", ["--heldout", "數字"], "set", "數學"),
        ("text", ["--heldout", "數學", "--tune", "père noël"], "made", "name fewer"),
        ("text", ["--tokenizer", "cl100k_base"], "wide", "uint16: use gpt2 or bytes"),
        ("text", ["--max_tokens", "500"], "made", "--overwrite"),
        ("text", ["--verify"], "none", "without --verify"),
        ("empty", [], "empty", "give a folder of text"),
        ("nothing", [], "nothing", "common_pile"),
        ("x/local", [], "x", "rename it"),  # or it would be taken for the source of that name
        ("both", [], "both", "move either away"),
    ):
        with refused(match=remedy):
            prepare(tmp_path / folder, *options, name=name)
    assert {entry["role"] for entry in domains_of(tmp_path / "data/made").values()} == {"train"}


def test_max_tokens_ends_a_domain_with_a_whole_document(prepare):
    made = prepare(two_domains(99), "--max_tokens", "30000")
    for domain, entry in domains_of(made).items():
        texts = [text for path, text in two_domains(99).items() if path.startswith(domain)]
        train, val = documents_of(made, domain)
        found = train + val
        assert found == texts[: len(found)] and 30_000 <= sum(entry["tokens"].values()) < 36_000


def test_shards_of_llm_c_are_a_domain_as_they_are(prepare, tmp_path):
    train, val = shard_of(np.arange(300) % 257), shard_of(np.arange(50))
    files = {"fineweb/fineweb_train_000001.bin": train, "fineweb/fineweb_val_000000.bin": val}
    made = prepare(files | {"own.txt": "some text of one's own"})
    entry = domains_of(made)["fineweb"]
    assert entry["tokens"] == {"train": 300, "val": 50}
    [path] = entry["shards"]["val"]
    assert "val_000000" in path and tasks.open_shard(made / path)[49] == 49
    with refused(match="--tokenizer"):
        prepare({"fineweb/fineweb_train_000001.bin": shard_of(np.arange(300))}, "--overwrite")
    with refused(match="give it one more"):
        prepare(write(tmp_path / "one", {"a/train.bin": train}), name="one")


def test_killed_again_and_again_it_ends_with_the_same_bytes_for_any_number_of_workers(tmp_path):
    files = {f"{d}/{i}.md": f"{d} {i} " + "é数 \n" * i for d in "abcdef" for i in range(90)}
    files |= {f"{d}/copy.md": "in three domains" for d in "ace"}
    source, parts, whole = write(tmp_path / "text", files), tmp_path / "parts", tmp_path / "whole"
    code = "import os, sys, time, prepare_data as P; P.SHARD_TOKENS, sync = 5_000, os.fsync\n"
    code += "os.fsync = lambda file: time.sleep(0.02) or sync(file)\n"  # slow enough to be killed
    code += "P.main(sys.argv[1:])"
    run = [sys.executable, "-c", code, source, "--name", "set", "--data_dir"]
    subprocess.run([*run, whole, "--workers", "1"], check=True, capture_output=True, cwd=HERE)
    progress, kills, seen = parts / "set/progress.json", 0, []
    while not (parts / "set/meta.json").exists():
        command = [*run, parts, "--workers", "3"]
        process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (parts / "set/meta.json").exists():
            finished = json.loads(progress.read_bytes())["finished"] if progress.exists() else []
            if len(finished) > len(seen):
                time.sleep(0.02 * kills)  # within the next domain, each time elsewhere
                break
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        process.wait()
        seen = json.loads(progress.read_bytes())["finished"] if progress.exists() else seen
        assert kills < 9, "it does not go on but starts anew"
        assert all(len(tasks.open_shard(path)) for path in parts.rglob("*.bin"))
    read = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in (parts, whole)]
    assert read[0] == read[1] and len(read[0]) > 20 and kills > 2
    assert domains_of(whole / "set")["c"]["skipped"] == {"duplicate": 1}


def test_one_dataset_of_many_domains_streams_through_datasets(prepare, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"row {i} " * 9, "meta": {"set": "b" if i % 3 else "a/x"}} for i in range(300)]
    for part, half in enumerate((rows[:150], rows[150:])):
        with gzip.open(tmp_path / f"{part}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in half)
    options = ["--tokenizer", "bytes", "--domain_field", "meta.set", "--heldout", "a_x"]
    made = prepare("local", "--hf", "json", *options, "--data_files", str(tmp_path / "*.json.gz"))
    rare = domains_of(made)["a_x"]
    assert sum(rare["documents"].values()) == 100 and rare["role"] == "heldout"
    train, val = documents_of(made, "b")
    assert train + val == [row["text"] for i, row in enumerate(rows) if i % 3]


def test_local_needs_no_package_beyond_the_requirements(prepare, monkeypatch):
    absent, find = ("sympy", "networkx", "mpmath", "PIL"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    domains = domains_of(prepare("local", "--max_mb", "0.1"))
    roles = {domain: entry["role"] for domain, entry in domains.items()}
    assert roles["cpp_headers"] == roles["python_docs"] == "heldout" != roles["type_stubs"]
    assert {"python_code", "torch_code", "science_code", "tests"} <= roles.keys()
    assert "sympy_code" not in roles


# --------------------------------------------------------------------------------------------------
# GPUs: what can be known without one, and make gpu-check. DRY_RUN=1 runs that tiny, on a CPU.

DRY = bool(os.environ.get("DRY_RUN"))
DEVICE = "cpu" if DRY else "cuda"


def mark(test):
    absent = not DRY and not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason="needs a GPU")(test))


FIRST = dict(inner_steps=3, first_order=True, learn_inner_lr="element", inner_clip=1.0)
SECOND = dict(inner_steps=1, learn_inner_lr="tensor")
CONFIGS = ("baseline_124m", "maml_124m")
TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=16)


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**TINY | dict(vocab_size=64) | changes))


def ids(*shape, vocab=64, seed=0):
    rows = torch.randint(vocab, (*shape[:-1], shape[-1] + 1), generator=seeded(seed))
    return rows[..., :-1].contiguous(), rows[..., 1:].contiguous()


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
        ({"inner_steps": 0}, {"loss": 1}),
        (FIRST, {"summed_step": 1}),
        (FIRST | {"learn_inner_lr": "tensor"}, {"summed_step": 1}),
        (SECOND, {"gradient": 1, "hessian_product": 1, "loss": 1}),
    ],
    ids=["baseline", "element", "tensor", "second"],
)
def test_what_is_compiled_agrees_and_is_compiled_once(compiled, method, expected):
    model = small()
    learner, eager = MAML(model, compile=True, **method), MAML(model, **method)
    optimizer = train.make_optimizer(train.Config(), learner)
    task = ids(8, 16)
    torch.testing.assert_close(backward(learner, *task)[0], backward(eager, *task)[0])
    # the second domain's val split is too small for four rows
    val = {"a": ids(2, 4, 16), "b": ids(1, 3, 16)}
    for step in range(4):
        if step % 2:
            train.evaluate(learner, val, ["a", "b"], 2)
        learner(*ids(8, 16, seed=step)).backward()
        optimizer.step()
        learner.zero_grad()
    assert compiled == {(name, True): count for name, count in expected.items()}


@pytest.mark.parametrize("method", [{"inner_steps": 0}, FIRST, SECOND], ids=str)
def test_ddp_changes_nothing_of_what_is_compiled_in_bfloat16(compiled, tmp_path, method):
    learner, task = MAML(small(), compile=True, autocast=torch.bfloat16, **method), ids(8, 16)
    alone = backward(learner, *task)[0]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    ddp = DDP(learner, gradient_as_bucket_view=True)
    found = [backward(learner, *task, wrapped=ddp)[0] for _ in range(2)]
    del ddp  # if it outlives its process group, its end may wait for ever (torch 2.13)
    dist.destroy_process_group()
    for beside in found:  # twice, as DDP may lay its buckets out anew after the first
        assert all(torch.equal(alone[n], beside[n]) for n in alone)


class Height(TorchDispatchMode):
    """The bytes of the tensors made under it that live at once, at most."""

    now, peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def height(config: str, **changes) -> int:
    """Bytes of an outer step of a config, counted on tensors without content."""
    cfg = train.Config(**train.read_arguments([f"{HERE}/config/{config}.py"]) | changes)
    cfg = dataclasses.replace(cfg, compile=False)
    rows = cfg.batch_size // (cfg.inner_steps + 1)
    K = min(cfg.inner_steps, 2)  # the third chunk is like those that follow
    with FakeTensorMode(), Height() as counted:
        counted.seen = weakref.WeakSet()
        model = GPT(GPTConfig(**{field: getattr(cfg, field) for field in train.SHAPE}))
        step = bench.make_step(cfg, model, K, cfg.first_order, cfg.learn_inner_lr)
        for _ in range(2):  # the second finds the optimizer's moments
            x = torch.zeros(rows * (K + 1), cfg.block_size, dtype=torch.long)
            step([(x, x)])
        return counted.peak


def test_both_124m_configs_fit_a_card_and_the_learner_costs_few_copies_of_the_parameters():
    baseline, learner = height("baseline_124m"), height("maml_124m")
    assert max(baseline, learner) < 40e9  # half a card of 80 GB
    # More than plain training on such chunks, it keeps the rates with a gradient and two moments.
    # At the height of a step it holds two sums, phi, and of g what plain training has too.
    copies = (learner - height("baseline_124m", batch_size=8)) / 124e6 / 4
    assert copies < 10


# --------------------------------------------------------------------------------------------------
# make gpu-check: a test a line of its list, in this order, stopping at the first that fails


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A dataset of random ids: three domains to train on, two held out, one of these short."""
    root, draw = tmp_path_factory.mktemp("gpu"), np.random.default_rng(0)
    T, vocab = (16, 300) if DRY else (1024, 50257)
    domains = {}
    for domain, rows in {"a": 40, "b": 40, "c": 40, "far": 140, "short": 20}.items():
        role, entry = "heldout" if rows != 40 else "train", {"tokens": {}, "shards": {}}
        for split, n in {"train": 140 * T, "val": rows * T + 1}.items():
            path = f"{domain}/{split}_000000.bin"
            write(root / "random", {path: shard_of(draw.integers(vocab, size=n))})
            entry["tokens"][split], entry["shards"][split] = n, {path: ""}
        domains[domain] = entry | {"role": role}
    meta = {"tokenizer": "gpt2", "vocab_size": vocab, "domains": domains}
    write(root / "random", {"meta.json": json.dumps(meta)})
    return root


@pytest.fixture
def run_flags(shards, tmp_path):
    def run_flags(config, **changes) -> list[str]:
        flags = dict(data_dir=shards, dataset="random", device=DEVICE, out_dir=tmp_path / "run")
        flags |= (TINY | dict(eval_rows=4, compile=False) if DRY else {}) | changes
        return [f"{HERE}/config/{config}.py", *(f"--{k}={v}" for k, v in flags.items())]

    return run_flags


def rows_of(flags) -> list[dict]:
    out = next(flag for flag in flags if flag.startswith("--out_dir=")).partition("=")[2]
    path = Path(out, "log.jsonl")
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


@mark
@pytest.mark.parametrize("method", [FIRST, SECOND], ids=["first", "second"])
def test_a_gradient_on_the_gpu_is_that_of_float64_on_the_cpu(method):
    torch.set_float32_matmul_precision("highest")
    learner, task = MAML(small().double(), **method), ids(8, 16)
    exact, _ = meta_grad(learner, *task)
    learner = MAML(small(), compile=not DRY, **method).to(DEVICE)
    found = backward(learner, *(t.to(DEVICE) for t in task))[0]
    off = sum((found[n].cpu() - exact[n]).square().sum() for n in exact)
    assert off < 1e-8 * sum(t.square().sum() for t in exact.values())


@mark
@pytest.mark.parametrize("config", CONFIGS)
def test_twenty_steps_of_a_124m_config_compile_nothing_after_the_second(
    run_flags, config, monkeypatch
):
    # a rank's share of an eighth, so that one card takes its steps as one of eight would
    share = {"baseline_124m": 4, "maml_124m": 1}[config]
    flags = run_flags(config, tasks_per_step=share, max_steps=20, eval_interval=10)
    graphs, counts = torch._dynamo.utils.counters["stats"], []
    check = train.check_finite

    def counting(*loss):
        counts.append(graphs["unique_graphs"])
        check(*loss)

    torch._dynamo.reset()
    monkeypatch.setattr(train, "check_finite", counting)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    train.main(flags)
    assert len(counts) == 3 + 20 and counts[2] == counts[-1]  # evaluated, step 0, step 1; the rest
    at = [row for row in rows_of(flags) if row["kind"] == "val"]
    flops, tokens, seconds = (at[2][k] - at[1][k] for k in ("flops", "tokens", "seconds"))
    SPEED[config] = tokens / seconds
    print(f"\n{config}: {SPEED[config]:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s")
    if len(SPEED) == 2:
        print(f"learner / baseline: {SPEED['maml_124m'] / SPEED['baseline_124m']:.2f}")


SPEED = {}


@mark
@pytest.mark.parametrize("config", CONFIGS)
def test_attention_is_fused_and_no_matrix_product_is_in_float32(run_flags, config):
    cfg = train.Config(**train.read_arguments(run_flags(config)))
    shape = {field: getattr(cfg, field) for field in train.SHAPE}
    model, K = GPT(GPTConfig(vocab_size=512, **shape)).to(DEVICE), min(cfg.inner_steps, 1)
    step = bench.make_step(cfg, model, K, cfg.first_order, cfg.learn_inner_lr)
    task = [t.to(DEVICE) for t in ids(8, cfg.block_size, vocab=512)]
    step([task])  # compiles
    with torch.profiler.profile(record_shapes=True) as profile:
        step([task])
    events = profile.profiler.kineto_results.events()
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    assert {e.dtypes()[0] for e in events if e.name() in products} == {"c10::BFloat16"}
    fused = r"aten::_scaled_dot_product_(flash|efficient|cudnn)_attention"
    assert any(re.match(fused, e.name()) for e in events)


@mark
@pytest.mark.skipif(not DRY and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_does(run_flags, tmp_path):
    logs = []
    for n in (1, 2):
        changes = dict(tasks_per_step=2, max_steps=3, eval_interval=3, n_layer=2, compile=False)
        flags = run_flags("maml_124m", out_dir=tmp_path / str(n), **changes)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={n}", HERE / "train.py", *flags]
        subprocess.run(command, check=True)
        logs.append([row["loss"] for row in rows_of(flags) if row["kind"] != "run"])
    torch.testing.assert_close(*logs, rtol=1e-3, atol=1e-3)


@mark
def test_asked_to_stop_a_run_saves_and_goes_on_from_there(run_flags):
    flags = run_flags("maml_124m", tasks_per_step=1, max_steps=100_000, n_layer=2, compile=False)
    command = [sys.executable, HERE / "train.py", *flags]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(600):
        time.sleep(0.2)
        if run.poll() is not None or any(row["kind"] == "train" for row in rows_of(flags)):
            break
    run.send_signal(signal.SIGTERM)
    run.wait(60)
    at = torch.load(Path(rows_of(flags)[0]["config"]["out_dir"], "ckpt.pt"))["step"]
    assert at > 0
    subprocess.run([*command, "--init_from=resume", f"--max_steps={at + 5}"], check=True)
    assert rows_of(flags)[-1]["step"] == at + 5


# --------------------------------------------------------------------------------------------------
# plot.py: what is told is what the logs say


def write_log(path, val, adapt=(), seed=1):
    """A log with evaluations [(tokens, loss)] and adapt rows {rule: losses of 16-token rows}."""
    roles = {"a": "train", "t": "tune", "z": "heldout"}
    data = dict(name="toy", tokenizer="bytes", roles=roles)
    rows = [{"kind": "run", "config": {"seed": seed}, "dataset": data}]
    for tokens, loss in val:
        losses = {"a": 0.0, "t": 0.0, "z": loss}
        rows.append({"kind": "val", "step": tokens, "tokens": tokens, "loss": losses, "online": {}})
    for rule, losses in dict(adapt).items():
        for domain, shift in (("t", 5.0), ("z", 0.0)):
            row = {"kind": "adapt", "dataset": "toy", "domain": domain, "role": roles[domain]}
            loss = [loss + shift for loss in losses]
            rows.append({**row, "rule": rule, "row_tokens": 16, "loss": loss})
    write(path, {"log.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return path


@pytest.fixture
def told(tmp_path, capsys):
    def told(*runs) -> str:
        plot.main([*map(str, runs), "-o", str(tmp_path / "curves.png")])
        return capsys.readouterr().out

    return told


def test_the_table_says_what_the_heldout_rows_say_and_how_many_fewer_examples_are_needed(
    told, tmp_path
):
    val = [(0, 5.0), (64, 3.0)]
    adamw = [3.0] * 4 + [2.0] * 4  # over its later half 2.0
    base = write_log(tmp_path / "base", val, {"none": [4.0] * 8, "adamw": adamw})
    own = [3.0, 2.0, 1.0] + [1.0] * 5  # its later half is at 2.0 after two rows
    text = told(base, write_log(tmp_path / "maml", val, {"own": own}))
    cells = dict(re.findall(r"^  (.*\S) +(\d\.\d+)  after 0.0M training tokens$", text, re.M))
    assert cells == {
        "base, no learning": "4.000",
        "base, tuned AdamW": "2.500",
        "maml, its own rates": f"{np.mean(own):.3f}",
    }
    assert "maml is after 32 tokens where AdamW is after 128: 4.0 times fewer" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and len(text.splitlines()) <= 6


def test_runs_named_alike_but_for_their_seed_are_one_method(told, tmp_path):
    logs = {}
    for name, seed in {"base_s1": 1, "base_s2": 2, "maml_s1": 1, "base_small": 1}.items():
        read = {"none": [1.0 + seed]}
        logs[name] = write_log(tmp_path / name, [(0, 5.0), (9, 3.0)], read, seed=seed)
    text = told(*logs.values())
    assert "  base, no learning                   2.500 ± 0.707 over 2 seeds" in text
    assert "  maml, no learning" in text and "  base_small, no learning" in text
    with refused(match="'base_s3' have one seed: rename"):
        told(logs["base_s1"], write_log(tmp_path / "base_s3", [(9, 3.0)], seed=1))


def test_newer_rows_replace_older_ones_and_a_level_that_is_never_reached_is_none(tmp_path):
    log = write_log(tmp_path / "run", [(9, 3.0)], {"own": [9.0, 9.0]})
    rows = (log / "log.jsonl").read_text()
    newer = write_log(tmp_path / "new", [(9, 3.0)], {"own": [2.0, 1.0]}) / "log.jsonl"
    (log / "log.jsonl").write_text(rows + "".join(newer.read_text().splitlines(True)[2:]))
    T, curve = plot.reading_curve(plot.read_log(log), "own")
    assert T == 16 and curve.tolist() == [2.0, 1.0]
    assert plot.tokens_needed(curve, 1.5, 16) == 32 and plot.tokens_needed(curve, 0.5, 16) is None
    assert plot.tokens_needed(curve, 2.5, 16) == 16
    bounced = np.array([3.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0])  # at 1.0 early, and not for good
    assert plot.tokens_needed(bounced, 1.5, 16) == 8 * 16
    assert plot.reading_curve(plot.read_log(log), "adamw") is None


def test_logs_beyond_repair_are_refused_with_a_remedy_and_a_cut_last_line_is_left_out(
    told, tmp_path
):
    log = write_log(tmp_path / "run", [(0, 5.0), (9, 3.0)], {"none": [3.0]}) / "log.jsonl"
    header, first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([header, first, *rest]) + "\n" + '{"kind": "val", "st')
    assert "3.000" in told(log)
    for lines in ([], [first], [header], [header, "no json", first]):
        log.write_text("".join(line + "\n" for line in lines))
        with refused(match="delete that line" if "no json" in lines else "train again"):
            told(log)
    with refused(match=r"no log at .*train\.py"):
        told(tmp_path / "nowhere")
    log.write_text(f"{header}\n{first}\n")
    with refused(match=r"adapt\.py"):
        told(log)


def test_the_picture_needs_no_torch(trained, tmp_path):
    code = "import sys, plot; plot.main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, trained / "plain", trained / "maml", "-o", "curves.png"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tuned AdamW" in done.stdout and (tmp_path / "curves.png").stat().st_size > 10_000
