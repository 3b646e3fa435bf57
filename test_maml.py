"""Every claim of the repository as a test named like a sentence: make test, or python -m pytest.

What takes minutes is behind a marker: python -m pytest -m slow. What needs a GPU: -m gpu.
"""

import gzip
import hashlib
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


def tiny_gpt(**changes) -> GPT:
    """A GPT in float64 with weights large enough that its Hessian matters."""
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**shape | changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def task(*shape, vocab=32, seed=1):
    """x, y of a shape, (12, 8) unless given: random ids, and the ids that follow them."""
    *rows, T = shape or (12, 8)
    ids = torch.randint(vocab, (*rows, T + 1), generator=seeded(seed))
    return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()


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


def prepare_in(folder, source, *options, name="set") -> Path:
    """The dataset folder/name of a folder, a file or {path: content}."""
    source = write(folder / "text", source) if isinstance(source, dict) else source
    prepare_data.main([str(source), "--name", name, "--data_dir", str(folder), *options])
    return folder / name


@pytest.fixture
def prepare(tmp_path):
    return partial(prepare_in, tmp_path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Three train domains, one to tune on, one held out: random walks, each in its own alphabet."""
    files = {}
    for i, domain in enumerate(["alpha", "beta", "gamma", "tune", "far"]):
        dice = np.random.default_rng(i)
        walks = [48 + 9 * i + np.cumsum(dice.integers(-1, 3, 400)) % 9 for _ in range(40)]
        files[f"{domain}.jsonl"] = records(" ".join(map(chr, walk)) for walk in walks)
    folder = tmp_path_factory.mktemp("data")
    return prepare_in(folder, files, "--heldout", "far", "--tune", "tune", name="tiny").parent


def flags(**fields) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items() if value is not None]


TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=16)
QUICK = dict(dataset="tiny", device="cpu", batch_size=4, tasks_per_step=4, tasks="passage", **TINY)
QUICK |= dict(inner_steps=1, learn_inner_lr="element", first_order=True, max_steps=6)
QUICK |= dict(warmup_steps=2, eval_interval=3, eval_passages=2, eval_rows=8)
PLAIN = dict(inner_steps=0, learn_inner_lr="no", tasks="mixed")


@pytest.fixture
def pretrain(data_dir, tmp_path):
    """A run that takes a second, and where it is."""

    def pretrain(name="run", **changes) -> Path:
        places = dict(data_dir=data_dir, out_dir=tmp_path / name)
        train.main(flags(**QUICK | places | changes))
        return tmp_path / name

    return pretrain


@pytest.fixture
def printed(capsys):
    """What a program prints."""

    def printed(main, *arguments) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return printed


def run(*command, **how) -> subprocess.CompletedProcess:
    """A program in a process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, **how)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): something happens when a later run begins the step n."""

    def at_step(n, action, lr_factor=train.lr_factor):
        def acting(cfg, step):
            if step == n:
                action()
            return lr_factor(cfg, step)

        monkeypatch.setattr(train, "lr_factor", acting)

    return at_step


def rows_of(out_dir) -> list[dict]:
    return [json.loads(row) for row in (out_dir / "log.jsonl").read_text().splitlines()]


def log_of(out_dir) -> dict[str, list[dict]]:
    """The rows of a log by kind, without what no two runs share: headers and seconds."""
    log = defaultdict(list)
    for row in rows_of(out_dir):
        log[row.pop("kind")].append({k: v for k, v in row.items() if k != "seconds"})
    assert log.pop("run")
    return log


def checkpoint_of(out_dir) -> dict:
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def weights_of(out_dir) -> tuple:
    ckpt = checkpoint_of(out_dir)
    return ckpt["model"], ckpt["learner"], ckpt["optimizer"]["state"]


identical = partial(torch.testing.assert_close, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# the mathematics


class Toy(nn.Module):
    """Parameters in float64, and any loss(x, y, *parameters)."""

    def __init__(self, loss, *parameters):
        super().__init__()
        self.loss, self.list = loss, nn.ParameterList(p.double() for p in parameters)

    def forward(self, x, y):
        return None, self.loss(x, y, *self.list)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("objective", ["final", "every"])
def test_one_step_on_a_quadratic_has_the_closed_form(first_order, objective):
    """L_k = |phi - c_k|^2 / 2. Rates grow where gradients agree, and shrink where they do not."""
    theta, *c = torch.tensor([[1.0, -2.0], [3.0, 1.0], [0.5, 4.0]], dtype=torch.float64)
    model = Toy(lambda x, y, w: 0.5 * (w - y[0]).square().sum(), theta)
    learner = MAML(model, 1, 0.1, "sgd", first_order, objective, "element").double()
    grads, _ = backward(learner, torch.stack(c), torch.stack(c))
    alpha = learner.log_inner_lr.detach().exp()
    moved = -alpha * (theta - c[0])
    after = theta + moved - c[1]
    d_theta = after if first_order else (1 - alpha) * after
    expected = torch.stack([d_theta, after * moved])
    if objective == "every":
        expected = (expected + torch.stack([theta - c[0], 0 * theta])) / 2
    found = torch.stack([grads["model.list.0"], grads["log_inner_lr"]])
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("objective", ["final", "every"])
@pytest.mark.parametrize("learned", ["no", "tensor", "element"])
def test_the_meta_gradient_is_that_of_the_definition(K, optimizer, first_order, objective, learned):
    x, y = task()
    for more in ({}, dict(inner_clip=0.5, inner_schedule="cosine", inner_warmup=1, inner_repeats=2)):
        learner = MAML(tiny_gpt(), K, 0.05, optimizer, first_order, objective, learned, **more)
        grads, loss = backward(learner.double(), x, y)
        defined, defined_loss = meta_grad(learner, x, y)
        assert abs(loss - defined_loss) < 1e-13 and grads.keys() == defined.keys()
        # the derivative of a fresh AdamW's step divides by |g|, and rounding with it
        assert distance(grads, defined) < (1e-9 if optimizer == "adamw" else 1e-12)


@pytest.mark.parametrize("objective", ["final", "every"])
@pytest.mark.parametrize("learned", ["tensor", "element"])
def test_the_meta_gradient_is_what_finite_differences_say(objective, learned):
    """In float64, for each tensor of theta and of the rates along a random direction."""
    options = dict(objective=objective, learn_inner_lr=learned, inner_clip=1.0)
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.05, **options).double(), task()
    names, parameters = zip(*learner.named_parameters(), strict=True)

    def outer_loss(*parameters):
        return functional_call(learner, dict(zip(names, parameters, strict=True)), (x, y))

    how = dict(eps=1e-5, rtol=1e-5, atol=1e-9, fast_mode=True)
    assert torch.autograd.gradcheck(outer_loss, parameters, **how)


def test_first_order_is_the_gradient_after_learning_and_a_dropped_hessian_cannot_hide():
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.5, objective="final"), task()
    second, second_loss = backward(learner, x, y)
    learner.first_order = True
    first, first_loss = backward(learner, x, y)
    phi = learner.vectors()[0].detach()
    for xj, yj in zip(x.chunk(3)[:2], y.chunk(3)[:2], strict=True):
        phi = phi - 0.5 * grad(learner.loss)(phi, xj, yj)
    assert first_loss == pytest.approx(second_loss, rel=1e-14)
    at_phi = learner.by_name(grad(learner.loss)(phi, x[8:], y[8:]))
    assert distance(first, {f"model.{n}": g for n, g in at_phi.items()}) < 1e-13
    assert distance(first, second) > 0.1


def test_parameters_without_curvature_or_without_use_are_no_trouble():
    def loss(x, y, cubed, flat, unused):
        return (cubed**3 * x + flat * y).sum()

    learner, x = MAML(Toy(loss, *torch.ones(3, 3)), 2, 0.1), torch.randn(3, 3, dtype=torch.float64)
    grads, _ = backward(learner, x, x)
    assert distance(grads, meta_grad(learner, x, x)[0]) < 1e-14
    assert not grads["model.list.2"].any()


def test_what_is_frozen_may_have_another_dtype_but_what_learns_has_one():
    model = Toy(lambda x, y, a, b, c: (a * b**3 * x + c**2 * y).sum(), *torch.ones(3, 3))
    model.list[0] = nn.Parameter(torch.full((3,), 2, dtype=torch.int8), requires_grad=False)
    learner, x = MAML(model, 2, 0.1), torch.randn(3, 3, dtype=torch.float64)
    assert learner.rates(None) == 0.1
    for late in (1, 2):  # the second time round, a parameter was frozen after MAML was made
        learner.zero_grad()
        learner(x, x).backward()
        grads, _ = meta_grad(learner, x, x)
        assert len(grads) == 3 - late
        for name, g in grads.items():
            torch.testing.assert_close(learner.get_parameter(name).grad, g, rtol=1e-14, atol=1e-14)
        model.list[1].requires_grad_(False)
    model.list[1] = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="one dtype"):
        MAML(model, 2, 0.1)


ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0)
OPTIMIZERS = [("sgd", 0.1, torch.optim.SGD, 1e-12), ("adamw", 0.01, ADAMW, 1e-6)]


@pytest.mark.parametrize("learned", ["no", "tensor", "element"])
@pytest.mark.parametrize("name, lr, torchs, rtol", OPTIMIZERS, ids=["sgd", "adamw"])
def test_reading_takes_the_steps_that_torch_optim_takes(learned, name, lr, torchs, rtol):
    model, (x, y) = tiny_gpt(), task(3, 8)
    given = lr if learned == "no" else 0.5  # where rates are learned, nothing but they count
    learner = MAML(model, 1, given, name, learn_inner_lr=learned).double()
    if learned != "no":
        learner.log_inner_lr.data.fill_(math.log(lr))
    losses, phi = learner.read(x[None], y[None])
    phi, losses_of_torch = learner.by_name(phi[0]), []
    loss = functional_call(model, phi, (x, y))[1].detach()
    optimizer = torchs(model.parameters(), lr)
    for xj, yj in zip(x.split(1), y.split(1), strict=True):
        optimizer.zero_grad()
        losses_of_torch.append(model(xj, yj)[1])
        losses_of_torch[-1].backward()
        optimizer.step()
    expected = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(phi, expected, rtol=rtol, atol=rtol / 10)
    torch.testing.assert_close(losses[0], torch.stack(losses_of_torch).detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(loss, model(x, y)[1].detach(), rtol=rtol, atol=0)


def test_rates_follow_the_schedule_and_clipping_bounds_the_gradient():
    learner = MAML(tiny_gpt(), 4, 1.0, inner_schedule="cosine", inner_warmup=1)
    assert learner.factors(5).tolist() == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447], 1e-5)
    theta, xy = learner.vectors()[0], task(1, 1, 8)
    clips = (1e-3, 1e3, 0)
    clipped, short, free = (MAML(tiny_gpt(), 1, 1.0, inner_clip=c).read(*xy)[1] for c in clips)
    # a gradient that is short enough stays as it is
    torch.testing.assert_close(short, free, rtol=1e-14, atol=1e-14)
    assert (clipped[0] - theta).norm().item() == pytest.approx(1e-3)
    _, warmed = MAML(tiny_gpt(), 1, 1.0, inner_warmup=1).read(*xy)  # half of the rate
    torch.testing.assert_close(2 * (warmed - theta), free - theta)


HEIGHTS = [(True, "tensor", 0.01), (True, "element", 0.01), (False, "no", 1.1)]


@pytest.mark.parametrize("first_order, learned, most", HEIGHTS)
def test_an_inner_step_keeps_no_graph_and_only_in_second_order_phi(first_order, learned, most):
    """By how many copies of the parameters an inner step raises the height of an outer loss."""

    def copies(K):
        model, xy = tiny_gpt(), task(4 * (K + 1), 8)
        learner = MAML(model, K, 0.1, first_order=first_order, learn_inner_lr=learned)
        height = bench.peak_memory(lambda tasks: [learner(*task) for task in tasks], [xy])
        return height / sum(p.numel() * p.element_size() for p in model.parameters())

    assert (copies(12) - copies(2)) / 10 < most


class Regression(nn.Sequential):
    def forward(self, x, y):
        prediction = super().forward(x)
        return prediction, F.mse_loss(prediction, y)


LONG = pytest.param(15_000, 25, 0.5, marks=pytest.mark.slow)


@pytest.mark.parametrize("steps, tasks, limit", [(2_500, 1, math.inf), LONG])
def test_one_step_learns_a_sinusoid_only_after_meta_training(steps, tasks, limit):
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
        one_step = MAML(model, 1, 0.01, objective="final")
        with torch.no_grad():
            errors[K] = np.mean([one_step(*draw(20, test)).item() for _ in range(200)])
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
    assert loss == plain.item()
    identical(grads, expected)


@pytest.mark.parametrize("first_order", [False, True])
def test_attention_is_fused_except_where_it_is_differentiated_twice(first_order):
    learner = MAML(tiny_gpt().float(), 1, 0.1, first_order=first_order)
    with torch.profiler.profile() as forward:
        loss = learner(*task())
    with torch.profiler.profile() as back:
        loss.backward()
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    fused = [sum(event.name == kernel for event in p.events()) for p in (forward, back)]
    assert fused == [2 * 2, 0]  # 2 layers, 2 chunks


def test_bfloat16_agrees_with_float32_and_leaves_parameters_and_updates_in_float32():
    model, (x, y) = tiny_gpt().float(), task()
    learners = [MAML(model, 1, 0.1, autocast=dtype) for dtype in (None, torch.bfloat16)]
    (exact, loss), (rounded, rounded_loss) = (backward(learner, x, y) for learner in learners)
    assert 0 < abs(loss - rounded_loss) < 0.02 * loss and 0 < distance(rounded, exact) < 0.05
    _, phi = learners[1].read(x[None], y[None])
    assert all(t.dtype == torch.float32 for t in (*rounded.values(), phi))


@pytest.mark.parametrize("K, first_order", [(0, False), (3, True), (3, False)])
def test_the_flops_of_the_log_are_what_the_flop_counter_counts(pretrain, K, first_order):
    def counted(compute):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            compute()
        return counter.get_total_flops()

    options = dict(inner_steps=K, first_order=first_order, learn_inner_lr="no")
    out = pretrain(n_embd=64, n_layer=2, max_steps=1, **options)
    _, model = train.load_checkpoint(out / "ckpt.pt")
    x, y = task(4, 16, vocab=257)
    assert counted(lambda: model(x, y)) == model.flops_per_token(16) * x.numel()
    learner = MAML(model, K, first_order=first_order)
    flops = 4 * counted(lambda: learner(x, y).backward())  # four tasks
    # where it is differentiated twice, attention in blocks leaves some of the masked half out
    assert flops == pytest.approx(log_of(out)["val"][-1]["flops"], rel=0.02)


def test_the_logits_are_those_of_gpt2_in_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=96)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=16, **shape)).eval()
    with torch.no_grad():  # away from zero, where one GELU is like another
        for p in theirs.parameters():
            p.mul_(4)
    ours = GPT(GPTConfig(block_size=16, bias=True, **shape))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # its Conv1D keeps (in, out)
    weights = {n: p.T if n.endswith(turned) else p for n, p in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    x, _ = task(2, 16, vocab=96)
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, rtol=0, atol=1e-4)


README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippets_of_the_readme_run_as_they_stand():
    names, (method, another_model, _) = {}, SNIPPETS
    exec(method, names)
    grads = {n: p.grad for n, p in names["learner"].model.named_parameters()}
    assert distance(grads, names["meta_gradient"]) < 1e-4
    exec(another_model, names)  # a model that is no GPT
    assert all(p.grad.any() for p in names["learner"].parameters())


def test_the_trained_model_is_one_of_transformers(trained, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    shutil.copytree(trained / "maml", tmp_path / "out/maml_demo")
    monkeypatch.chdir(tmp_path)
    names, (x, _) = {}, task(2, 16, vocab=257)
    exec(SNIPPETS[2], names)
    ours = names["model"](x)[0]
    torch.testing.assert_close(ours, names["hf"](x).logits, rtol=0, atol=1e-4)
    assert ours.std() > 0.5


@pytest.mark.parametrize("first_order", [False, True])
def test_the_inner_optimizer_of_the_readme_is_exact(first_order, monkeypatch):
    added = re.findall(r"^\+(.*)", README, re.MULTILINE)
    monkeypatch.setattr(maml, "UPDATES", dict(maml.UPDATES))
    exec("\n".join(added), {"torch": torch, "UPDATES": maml.UPDATES})
    options = dict(first_order=first_order, learn_inner_lr="element")
    learner, (x, y) = MAML(tiny_gpt(), 3, 0.05, "momentum", **options).double(), task()
    assert distance(backward(learner, x, y)[0], meta_grad(learner, x, y)[0]) < 1e-12
    losses, _ = learner.read(*task(3, 5, 8))
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


def test_the_draws_are_pure_and_a_step_covers_the_domains_evenly(data_dir):
    def draws(tasks_per_step=3, batch_size=4, **options):
        """The inputs of twenty steps."""
        data = tasks.Dataset(data_dir / "tiny", 16, batch_size, tasks_per_step, **options)
        return [[data.task(step, i)[0] for i in range(tasks_per_step)] for step in range(20)]

    def domains_of_rows(*batches):
        """The domain of each row, told by its alphabet."""
        return [(row[row < 256].max().item() - 48) // 9 for x in batches for row in x]

    three = draws(tasks="domain")
    assert all(map(torch.equal, three[5], draws(tasks="domain")[5]))
    assert not torch.equal(three[5][0], three[6][0])
    assert not torch.equal(three[5][0], draws(tasks="domain", seed=2)[5][0])
    for kind in ("domain", "passage"):
        steps = draws(tasks=kind, tasks_per_step=7)
        assert all(len(set(domains_of_rows(x))) == 1 for step in steps for x in step)
        counts = [sorted(Counter(domains_of_rows(*step)).values()) for step in steps]
        assert all(count == [8, 8, 12] for count in counts)
    mixed = draws(batch_size=6)
    assert all(Counter(domains_of_rows(*step)) == {0: 6, 1: 6, 2: 6} for step in mixed)
    assert domains_of_rows(mixed[0][0]) != sorted(domains_of_rows(mixed[0][0]))


def shard_of(ids) -> bytes:
    header = np.array([20240520, 1, len(ids)] + [0] * 253, np.int32)
    return header.tobytes() + np.array(ids, np.uint16).tobytes()


def counting(folder, val=257) -> Path:
    """A dataset of one domain whose ids count upwards, through two train shards and through val."""
    shards = {"train_0": range(128), "train_1": range(128, 257), "val": range(val)}
    entry = {
        "role": "train",
        "shards": {"train": {"train_0": "", "train_1": ""}, "val": {"val": ""}},
    }
    files = {name: shard_of(ids) for name, ids in shards.items()}
    return write(folder, files | {"meta.json": json.dumps({"domains": {"counting": entry}})})


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
    data.paths["counting", "train"] = None  # nothing of it is needed
    x, y = data.passages("counting", 3, 4)
    assert x.shape == (3, 4, 16) and torch.equal(y, x + 1)
    assert x[:, 0, 0].tolist() == [0, 4 * 16, 8 * 16]
    assert torch.equal(x.flatten(1), x[:, 0, :1] + torch.arange(64))
    x, _ = data.passages("counting", 3, 1000)  # too short for that: one passage, of all there is
    assert x.shape == (1, 12, 16)


# --------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_reading_is_causal_and_side_by_side_as_one_at_a_time(optimizer, monkeypatch):
    options = dict(learn_inner_lr="element", inner_clip=1.0)
    learner, (x, y) = MAML(tiny_gpt(), 1, 0.05, optimizer, **options).double(), task(3, 5, 8)
    together, phi = learner.read(x, y, repeat=2)
    once, _ = learner.read(x, y)  # a row's loss is that before any step on it
    assert together.shape == once.shape and torch.equal(together[:, 0], once[:, 0])
    assert (together[:, 1:] != once[:, 1:]).all()
    for i in range(3):
        alone, own = learner.read(x[i : i + 1], y[i : i + 1], repeat=2)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(phi[i], own[0], rtol=1e-12, atol=1e-12)
    for most in (2, 3):  # two passages, then the third; all three
        monkeypatch.setattr(train, "SIDE_BY_SIDE", most * len(phi[0]))
        parts = train.read_passages(learner, x, y, 1, 2)
        torch.testing.assert_close(parts, (together, phi[2]), rtol=1e-12, atol=1e-12)
    x[:, 3], y[:, 3] = 7, 9
    after, _ = learner.read(x, y)
    assert torch.equal(once[:, :3], after[:, :3])
    assert not torch.isclose(once[:, 3:], after[:, 3:]).any()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_online_loss_of_a_task_is_what_training_lowers(rows):
    """learner(x, y) for 'every' is the mean of the losses of reading x, y in the same chunks."""
    options = dict(inner_clip=1.0, first_order=True, inner_schedule="cosine")
    learner, (x, y) = MAML(tiny_gpt(), 12 // rows - 1, 0.05, **options), task()
    losses, _ = learner.read(x[None], y[None], rows)
    assert learner(x, y).item() == pytest.approx(losses.mean().item(), rel=1e-12)
    first = learner.model_loss({}, x[:rows], y[:rows])
    assert losses[0, 0].item() == pytest.approx(first.item())


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A baseline and a learner that begins from it, both trained for a few seconds."""
    out = tmp_path_factory.mktemp("trained")
    common = dict(data_dir=data_dir, dataset="tiny", device="cpu", eval_interval=60, warmup_steps=5)
    plain = dict(max_steps=120, learning_rate=1e-2, batch_size=16, tasks_per_step=1)
    own = dict(max_steps=60, learning_rate=3e-3, batch_size=8, tasks_per_step=2, inner_steps=7)
    own |= dict(first_order=True, learn_inner_lr="element", tasks="passage", inner_lr_lr=0.1)
    own |= dict(inner_clip=4, inner_lr=0.05, init_from=out / "plain/ckpt.pt")
    for name, method in {"plain": plain, "maml": own}.items():
        train.main(flags(out_dir=out / name, **TINY | common | method))
        adapt.main([str(out / name), *READ_256])
    return out


RULES = ("none", "own")
READ_256 = flags(passages=4, tokens=256)
READ_64 = flags(passages=2, tokens=64, rules="none")


def test_learned_rates_read_unseen_text_better_and_the_table_is_that_of_the_log(trained, printed):
    text = printed(adapt.main, trained / "maml", *READ_256)
    rows = {(row["domain"], row["rule"]): row for row in log_of(trained / "maml")["adapt"]}
    assert rows.keys() == set(itertools.product(["tune", "far"], ["none", "adamw", "own"]))
    mean = {key: np.mean(row["loss"]) for key, row in rows.items()}
    assert all(mean[domain, "own"] < mean[domain, "none"] - 0.05 for domain in ("tune", "far"))
    table = text.split("far: ")[1].splitlines()[2:5]
    for rule, line in zip(["none", "adamw", "own"], table, strict=True):
        loss = np.array(rows["far", rule]["loss"])
        halves = [loss, loss[:2], loss[2:4], loss[4:8], loss[8:]]
        assert line.split() == [rule, *(f"{part.mean():.3f}" for part in halves)]
        assert np.mean(rows["far", rule]["by_passage"]) == pytest.approx(loss.mean(), abs=1e-3)


def test_adamws_options_are_chosen_on_tune_domains_alone(trained, data_dir, monkeypatch):
    tune, _ = tasks.Dataset(data_dir / "tiny", 16).passages("tune", 2, 4)
    seen, read = [], adapt.read

    def reading(model, ckpt, rule, x, y, **options):
        seen.append(x)
        return read(model, ckpt, rule, x, y, **options)

    monkeypatch.setattr(adapt, "read", reading)
    adapt.main([str(trained / "plain"), *flags(passages=2, tokens=64, rules="adamw")])
    *searched, _, _ = seen  # the last two are tune and far, by what was chosen
    assert len(searched) > 2 and all(torch.equal(x, tune) for x in searched)


def test_no_domain_that_was_trained_on_is_read(trained, data_dir, tmp_path, printed):
    """Whatever its role is now."""
    copy = shutil.copytree(trained / "plain", tmp_path / "copy")
    give_roles = partial(prepare_in, tmp_path, data_dir / "text", name="other")
    other = flags(data_dir=tmp_path, dataset="other", device="cpu")
    go_on = [*other, f"--init_from={copy}/ckpt.pt", "--max_steps=1"]
    give_roles("--heldout", "alpha,far", "--tune", "tune")
    train.main([*go_on, f"--out_dir={tmp_path}/more"])
    for out in (copy, tmp_path / "more"):  # what goes on without alpha has seen it all the same
        text = printed(adapt.main, out, *other, *READ_64)
        assert "far: " in text and "alpha" not in text
    give_roles("--heldout", "", "--tune", "")
    train.main([*go_on, f"--out_dir={tmp_path}/all"])
    with refused(match="no unseen domain"):
        adapt.main([f"{tmp_path}/all", *other])


ODD = {
    "one character": "a" * 3000,
    "random bytes": "".join(map(chr, np.random.default_rng(0).integers(0, 128, 3000))),
    "another alphabet": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. " * 60,
    "long": "It was the same text again, and again. " * 600,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_reading_never_blows_up(trained, tmp_path, printed, text):
    """On a text unlike any it stays finite, and no worse than 0.1 above no learning at all."""
    options = flags(text=write(tmp_path, {"odd.txt": text}) / "odd.txt", max_new_tokens=5)
    table = printed(adapt.main, trained / "maml", *options, "--rules", "none", "own")
    means = dict(re.findall(r"^(none|own) +(\S+)", table, re.M))
    assert float(means["own"]) < float(means["none"]) + 0.1


def test_a_text_of_ones_own_is_learned_and_what_was_learned_can_be_kept(trained, tmp_path, printed):
    write(tmp_path, {"notes.txt": "the quick brown fox jumps over the lazy dog. " * 60})
    notes, saved = flags(text=tmp_path / "notes.txt", max_new_tokens=20), tmp_path / "learned.pt"
    first = printed(adapt.main, trained / "maml", *notes, f"--save={saved}")
    assert first.count("own") >= 2 and "before:" in first and "after" in first
    second = printed(adapt.main, saved, *notes)  # it knows the text now
    before, after = (float(re.search(r"^none +(\S+)", t, re.M)[1]) for t in (first, second))
    assert after < before - 0.5
    assert "adamw is not tuned" in second and "fewer examples" not in second  # no log beside it
    rows = len(rows_of(trained / "maml"))
    shutil.copy(saved, trained / "maml/learned.pt")
    adapt.main([str(trained / "maml/learned.pt"), *READ_64])  # it is not the run's result
    assert len(rows_of(trained / "maml")) == rows


def test_a_text_of_fewer_rows_than_two_chunks_is_learned_all_the_same(trained):
    ckpt, model = train.load_checkpoint(trained / "maml/ckpt.pt")
    ckpt["config"]["batch_size"] = 64  # chunks of 8 rows
    unlearned, learned = (adapt.read(model, ckpt, rule, *task(1, 8, 16))[0] for rule in RULES)
    assert np.allclose(unlearned[:, :4].mean(), learned[:, :4].mean())
    assert not np.isclose(unlearned[:, 4:].mean(), learned[:, 4:].mean())


def test_what_adapt_cannot_do_is_answered_with_its_remedy(trained, tmp_path):
    small = checkpoint_of(trained / "plain")
    small["model_args"]["vocab_size"] = 64
    small["model"]["transformer.wte.weight"] = torch.zeros(64, 16)
    small["model"]["lm_head.weight"] = small["model"]["transformer.wte.weight"]
    torch.save(small, tmp_path / "small.pt")
    for checkpoint, option, remedy in (
        (trained / "plain", "--rules=own", "no inner loop of its own"),
        (trained / "plain", "--save=x", "--text"),
        (trained / "plain", "--tokens=1000000", "use --tokens"),
        (trained / "maml", "--tokens=16", "learns 16 tokens at a time: read --tokens 64"),
        (tmp_path / "small.pt", f"--text={HERE / 'README.md'}", "knows 64 ids"),
    ):
        with refused(match=remedy):
            adapt.main([str(checkpoint), option])


def test_adamws_options_are_found_by_hill_climbing_on_the_measure_it_is_given():
    def valley(options):
        far = abs(math.log2(options["lr"] / 5e-4)) + abs(options["steps"] - 2)
        return far + (not options["frozen"]) + (options["beta2"] > 0.96)

    assert adapt.best_adamw(valley) == {"lr": 5e-4, "steps": 2, "frozen": True, "beta2": 0.95}
    assert adapt.best_adamw(lambda options: math.nan) == adapt.START


def test_only_what_a_tune_domain_chose_is_called_tuned(tmp_path):
    for role, chosen in {"heldout": adapt.START, "tune": {"lr": 0.5}}.items():
        row = {"kind": "adapt", "rule": "adamw", "role": role, "options": {"lr": 0.5}}
        log = write(tmp_path, {"log.jsonl": json.dumps(row) + "\n"}) / "log.jsonl"
        assert adapt.chosen_adamw(log) == chosen


def test_frozen_embeddings_stay_and_the_rest_learns():
    model = GPT(GPTConfig(8, 32, 1, 2, 8))
    learner = adapt.adamw_learner(model, lr=1e-3, frozen=True, beta2=0.99)
    named = dict(model.named_parameters())
    assert named.keys() - learner.shapes.keys() == set(adapt.EMBEDDINGS)
    _, phi = learner.read(*task(3, 5, 8))
    assert all(not torch.equal(p, named[n]) for n, p in learner.by_name(phi[0]).items())
    assert all(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# the systems

RUNS = [PLAIN, dict(), dict(first_order=False, learn_inner_lr="tensor"), dict(learning_rate=0)]


@pytest.mark.parametrize("method", RUNS, ids=["plain", "first", "second", "rates"])
def test_a_run_stopped_and_resumed_is_bitwise_the_uninterrupted(pretrain, at_step, method):
    whole = pretrain("whole", **method)
    cut = whole.parent / "cut"
    for step in (1, 3):  # it ends at step 2, where no evaluation is due, and at 4
        at_step(step, partial(signal.raise_signal, signal.SIGTERM))
        with refused(match="stopped at step .*--init_from=resume goes on"):
            pretrain("cut", init_from="resume", **method)
        assert checkpoint_of(cut)["step"] == step + 1
    for _ in range(2):  # the second time it is done already
        pretrain("cut", init_from="resume", **method)
        identical(weights_of(cut), weights_of(whole))
        assert log_of(cut) == log_of(whole) and not list(cut.glob("*.tmp"))


@pytest.mark.parametrize("method", [PLAIN, dict()], ids=["plain", "first"])
def test_two_processes_do_what_one_does(pretrain, data_dir, tmp_path, method):
    alone, pair = pretrain("alone", **method), tmp_path / "pair"
    options = flags(data_dir=data_dir, out_dir=pair, **QUICK | method)
    done = run(*TORCHRUN, "--nproc_per_node=2", HERE / "train.py", *options)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(log_of(pair), log_of(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights_of(pair), weights_of(alone), rtol=1e-3, atol=1e-5)


def test_ranks_that_begin_at_different_steps_refuse_to_start(pretrain, data_dir, tmp_path):
    """As file systems that lag may have it: each rank sees an out_dir of its own."""
    pretrain("1", max_steps=3)
    options = " ".join(flags(data_dir=data_dir, init_from="resume", **QUICK))
    command = f"{sys.executable} {HERE}/train.py {options} --out_dir=$RANK"
    shell = ["--nproc_per_node=2", "--no-python", "sh", "-c", command]
    done = run(*TORCHRUN, *shell, cwd=tmp_path)
    assert done.returncode and "begin at different steps" in done.stderr
    assert not (tmp_path / "0").exists()  # and nothing was touched


def test_evaluating_more_often_changes_nothing_but_the_checkpoints(pretrain, monkeypatch):
    written, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda ckpt, to: (written.append(to.name), save(ckpt, to)))
    rarely, often = pretrain("rarely"), pretrain("often", eval_interval=1)
    assert Counter(Path(name).parent for name in written) == {rarely: 3, often: 7}
    assert log_of(rarely)["train"] == log_of(often)["train"]
    identical(weights_of(rarely), weights_of(often))


def test_what_is_printed_before_and_after_learning_is_of_the_same_rows(pretrain, data_dir):
    """'loss' and 'online' of a learner whose rates are next to nothing are the same number."""
    out = pretrain(max_steps=0, inner_lr=1e-12, learn_inner_lr="no")
    [row] = log_of(out)["val"]
    assert row["loss"].keys() == {"alpha", "beta", "gamma", "tune", "far"}
    assert row["online"] == pytest.approx({d: row["loss"][d] for d in ("tune", "far")}, abs=1e-5)
    _, model = train.load_checkpoint(out / "ckpt.pt")
    x, y = tasks.Dataset(data_dir / "tiny", 16).passages("far", 2, 8)
    loss = model(x.flatten(0, 1), y.flatten(0, 1))[1].item()
    assert row["loss"]["far"] == pytest.approx(loss, abs=1e-5)


def test_learning_the_rates_alone_leaves_theta_bitwise_as_it_was(pretrain):
    base = pretrain("base", **PLAIN)
    for name, options in {"decay": {}, "nesterov": dict(weight_decay=0, nesterov=True)}.items():
        out = pretrain(name, init_from=base / "ckpt.pt", learning_rate=0, **options)
        identical(checkpoint_of(out)["model"], checkpoint_of(base)["model"])
        rates = checkpoint_of(out)["learner"]["log_inner_lr"]
        assert not torch.isclose(rates, torch.tensor(math.log(0.02))).all()
    with refused(match="leaves only rates to learn"):
        pretrain("nothing", learning_rate=0, **PLAIN)


def test_learned_rates_stay_within_a_factor_of_inner_lr(pretrain):
    out = pretrain(inner_lr_lr=100.0)
    rates = checkpoint_of(out)["learner"]["log_inner_lr"].exp()
    assert rates.max().item() == pytest.approx(0.02 * 150, 1e-4)
    assert rates.min().item() == pytest.approx(0.02 / 150, 1e-4)


def test_rates_of_elements_begin_with_those_of_their_tensors(pretrain):
    tensor = pretrain("tensor", learn_inner_lr="tensor", inner_lr_lr=0.1)
    element = pretrain("element", init_from=tensor / "ckpt.pt", max_steps=0)
    sizes = [p.numel() for p in train.load_checkpoint(tensor / "ckpt.pt")[1].parameters()]
    rates, filled = (checkpoint_of(run)["learner"]["log_inner_lr"] for run in (tensor, element))
    for rate, part in zip(rates, filled.split(sizes), strict=True):
        assert (part == rate).all()
    with refused(match="set learn_inner_lr=element"):
        pretrain("back", init_from=element / "ckpt.pt", learn_inner_lr="tensor")


def test_a_run_that_begins_from_a_checkpoint_counts_what_that_cost(pretrain):
    base = pretrain("base", **PLAIN)
    at = log_of(base)["val"][-1]
    out = pretrain("more", init_from=base / "ckpt.pt")
    first, *_, last = log_of(out)["val"]
    assert (first["step"], first["tokens"], first["flops"]) == (0, at["tokens"], at["flops"])
    assert last["tokens"] == 2 * at["tokens"] == 2 * 6 * 4 * 4 * 16
    assert rows_of(out)[1]["seconds"] == checkpoint_of(base)["seconds"] > 0
    pretrain("more", init_from="resume", max_steps=9)
    assert log_of(out)["val"][-1]["tokens"] == (6 + 9) * 4 * 4 * 16


def test_a_checkpoints_shape_rules_is_logged_and_cannot_be_contradicted(pretrain, tmp_path):
    base = pretrain("base", n_layer=2, n_embd=32, **PLAIN) / "ckpt.pt"
    shape = dict.fromkeys(TINY)  # not given
    out = pretrain("more", init_from=base, **shape)
    config = rows_of(out)[0]["config"]
    assert (config["n_layer"], config["n_embd"], config["block_size"]) == (2, 32, 16)
    with refused(match="the checkpoint has the shape .'n_layer': 2.: leave"):
        pretrain("other", init_from=base, **shape | {"n_layer": 1})
    assert not (tmp_path / "other").exists()
    # the same command goes on after a stop, and its header still says what it began from
    options = train.read_arguments([f"--init_from={base}", "--init_from=resume", "--max_steps=8"])
    assert options == {"init_from": str(base), "resume": True, "max_steps": 8}
    pretrain("more", init_from="resume", max_steps=8, **shape)
    assert checkpoint_of(out)["step"] == 8


def test_a_nanogpt_checkpoint_is_taken_over(pretrain, tmp_path):
    args = dict(vocab_size=320, bias=True, **TINY)
    model = GPT(GPTConfig(**args)).state_dict()
    ckpt = {"model": {f"_orig_mod.{n}": p for n, p in model.items()}, "iter_num": 7}
    torch.save(ckpt | {"model_args": args | {"dropout": 0.0}}, tmp_path / "nano.pt")
    out = pretrain(init_from=tmp_path / "nano.pt", max_steps=0)
    identical(checkpoint_of(out)["model"], model)


def test_nesterov_is_adamw_that_looks_ahead():
    moved = []
    for nesterov in (False, True):
        learner = MAML(tiny_gpt(), 0)
        start = {n: p.detach().clone() for n, p in learner.named_parameters()}
        cfg = train.Config(nesterov=nesterov, weight_decay=0.0)
        optimizer = train.make_optimizer(cfg, learner)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
        backward(learner, *task())
        optimizer.step()
        moved.append({n: p.detach() - start[n] for n, p in learner.named_parameters()})
    plain, ahead = moved
    expected = {n: d * (1 + 0.9 / 1.9) for n, d in plain.items()}  # g + m, both of one gradient
    torch.testing.assert_close(ahead, expected, rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# the edges: what is wrong, and what to do, in one line


MISTAKES = [
    ("inner_stepz", 1, "did you mean --inner_steps?"),
    ("max_steps", "many", "--max_steps: invalid int value: 'many'"),
    ("bias", 1, "--bias: invalid boolean value: '1'"),
    ("objective", "evry", "choose 'every' or 'final'"),
    ("learn_inner_lr", "all", "choose 'no' or 'tensor' or 'element'"),
    ("dtype", "float16", "--dtype: invalid choice: 'float16' (choose from"),
    ("tasks", "books", "--tasks: invalid choice: 'books' (choose from"),
    ("batch_size", 5, "batch_size=5 must be a multiple of K + 1 = 2"),
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


def test_config_files_are_checked_like_flags_and_help_names_every_field(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("import math\n_half = 0.5\nlearning_rate = 1\ninner_lr = _half * math.pi\n")
    cfg = train.Config(**train.read_arguments([str(config), "--out_dir=3", "--bias=True"]))
    assert (cfg.learning_rate, cfg.inner_lr) == (1.0, math.pi / 2)
    assert (cfg.out_dir, cfg.bias) == ("3", True)
    mistakes = {"leraning_rate = 1": "did you mean --learning_rate", "n_layer = 2.5": "n_layer"}
    for text, remedy in mistakes.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=remedy):
            train.read_arguments([str(config)])
    with refused(match=r"no config file 2; flags are written --key=value"):
        train.main(["--seed", "2"])
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in vars(cfg))


@pytest.mark.parametrize("path", sorted((HERE / "config").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_one_that_the_readme_can_name(path):
    cfg = train.Config(**train.read_arguments([str(path)]))
    lines = path.read_text().splitlines()
    assert len(lines) <= 25 and f"train.py config/{path.name}" in lines[0]
    assert cfg.out_dir == f"out/{path.stem}"


def test_resuming_as_something_else_is_refused_and_no_code_in_a_checkpoint_runs(pretrain):
    path = pretrain(max_steps=1) / "ckpt.pt"
    for remedy, changed in {
        "'n_embd': 16": {"n_embd": 32},
        "set max_steps to that": {"max_steps": 0},
        "learn_inner_lr=element": {"learn_inner_lr": "no"},
        "inner_steps=1": {"inner_steps": 3},
        "inner_optimizer=sgd": {"inner_optimizer": "adamw"},
        "nesterov=False": {"nesterov": True},
    }.items():
        with refused(match=remedy):
            pretrain(init_from="resume", **changed)
    ckpt = checkpoint_of(path.parent)
    torch.save({"model": ckpt["model"], "model_args": ckpt["model_args"], "config": {}}, path)
    with refused(match="no run of train.py: give its ckpt.pt as --init_from"):
        pretrain(init_from="resume")
    torch.save(ckpt | {"dataset": ckpt["dataset"] | {"tokenizer": "gpt2"}}, path)
    with refused(match="has other tokens than the checkpoint"):
        pretrain("other", init_from=path)
    path.write_bytes(path.read_bytes()[:-1000])
    with refused(match=r"ckpt\.pt is cut short"):
        pretrain(init_from="resume")
    torch.save({"model": {}, "model_args": Path("x")}, path)  # any object that is not plain data
    with refused(match="no checkpoint of a GPT"):
        pretrain(init_from="resume")


def test_a_run_goes_on_only_with_what_it_was_trained_on(pretrain, data_dir, tmp_path):
    """Roles that are given later stop it where they change that, and nowhere else."""
    moved = shutil.copytree(data_dir, tmp_path / "data")
    give_roles = partial(prepare_in, moved, moved / "text", name="tiny")
    out = pretrain(data_dir=moved, max_steps=3)
    give_roles("--heldout", "tune", "--tune", "far")
    pretrain(data_dir=moved, init_from="resume")
    assert checkpoint_of(out)["step"] == 6
    give_roles("--heldout", "tune,alpha")
    with refused(match="was trained with data="):
        pretrain(data_dir=moved, init_from="resume", max_steps=9)


def test_an_earlier_run_is_not_overwritten_and_one_without_a_checkpoint_begins_again(pretrain):
    out = pretrain(max_steps=1)
    log = log_of(out)
    with refused(match="holds a run: --init_from=resume goes on"):
        pretrain(max_steps=2)
    assert log_of(out) == log
    (out / "ckpt.pt").unlink()  # killed before its first one
    assert log_of(pretrain(max_steps=1, init_from="resume")) == log


def test_a_run_goes_on_as_it_is_asked_for_and_its_log_says_so(pretrain):
    pretrain(max_steps=3)
    out = pretrain(init_from="resume", learning_rate=0.5, warmup_steps=0, batch_size=8)
    assert checkpoint_of(out)["optimizer"]["param_groups"][0]["peak_lr"] == 0.5
    assert checkpoint_of(out)["tokens"] == 3 * 4 * 4 * 16 + 3 * 4 * 8 * 16
    headers = [row["config"]["learning_rate"] for row in rows_of(out) if row["kind"] == "run"]
    assert headers == [0.5, 1e-3] and rows_of(out)[0]["kind"] == "run"


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
    assert [row["kind"] for row in rows_of(out)] == ["run", "val"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_under_the_log_is_named(pretrain, at_step, tmp_path):
    log = tmp_path / "run/log.jsonl"
    at_step(0, lambda: (log.unlink(), log.symlink_to("/dev/full")))
    with refused(match="No space left"):
        pretrain()
    assert checkpoint_of(tmp_path / "run")["step"] == 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    pretrain, at_step, monkeypatch, tmp_path
):
    def full(ckpt, file):
        file.write(b"half of it")
        raise OSError("the disk is full")

    at_step(1, lambda: monkeypatch.setattr(torch, "save", full))
    with refused(match="the disk is full"):
        pretrain()
    assert checkpoint_of(tmp_path / "run")["step"] == 0


# --------------------------------------------------------------------------------------------------
# the data: text to shards


def domains_of(dataset) -> dict:
    return json.loads((dataset / "meta.json").read_bytes())["domains"]


def documents_of(dataset, domain) -> list[list[str]]:
    """The texts of train and of val, whose ids are tiktoken's, an end-of-text id before each."""
    meta, found = json.loads((dataset / "meta.json").read_bytes()), []
    encoding = prepare_data.get_tokenizer(meta["tokenizer"])
    for shards in meta["domains"][domain]["shards"].values():
        ids = np.concatenate([tasks.open_shard(dataset / path) for path in shards])
        parts = np.split(ids, np.flatnonzero(ids == meta["eot"]))[1:]
        found.append([encoding.decode(part[1:].tolist()) for part in parts])
        expected = ([meta["eot"], *encoding.encode_ordinary(text)] for text in found[-1])
        assert ids.tolist() == [*itertools.chain.from_iterable(expected)]
    return found


@pytest.mark.parametrize("name, most, most_val", [("bytes", 0, 10**7), ("pairs", 20_000, 1000)])
def test_documents_stay_whole_and_val_is_the_last_share(prepare, monkeypatch, name, most, most_val):
    """Odd texts, longer and longer, none of 2,000 tokens; --max_tokens cuts none of them either."""
    ranks = {bytes([i]): i for i in range(256)} | {b"aa": 256, "数".encode()[:2]: 257}
    options = dict(mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    pairs = prepare_data.tiktoken.Encoding("pairs", pat_str=r"\s+|\S+", **options)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", {"pairs": pairs}.get)
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 5000)
    monkeypatch.setattr(prepare_data, "VAL_TOKENS", most_val)
    odd = "{}: <|endoftext|>\r\x00 日本語 🙂 " + "a" * 99
    texts = {d: [odd.format(d) + "é数 \n" * n for n in range(0, 280, 7)] for d in ("père", "數學")}
    options = [f"--tokenizer={name}", f"--max_tokens={most}"]
    made = prepare({f"{d}.jsonl": records(texts[d]) for d in texts}, *options)
    for domain, entry in domains_of(made).items():
        train, val = documents_of(made, domain)
        found, tokens = train + val, sum(entry["tokens"].values())
        assert found == texts[domain][: len(found)] and len(entry["shards"]["train"]) > 2
        assert most <= tokens < most + 2000 if most else found == texts[domain]
        assert entry["bytes"] == sum(len(text.encode()) for text in found)
        assert entry["documents"] == {"train": len(train), "val": len(val)}
        assert abs(entry["tokens"]["val"] - min(tokens / 10, most_val)) < 1000


def test_a_long_text_is_cut_at_line_ends_and_never_within_a_character(prepare, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_PIECE", 100)
    lines, signs = "".join(f"line {i}\n" for i in range(200)), "數學" * 50
    made = prepare({"lines.txt": lines, "signs.txt": signs})
    train, val = documents_of(made, "lines")
    assert "".join(train + val) == lines and len(train + val) > 9
    assert all(len(part) <= 100 and part.endswith("\n") for part in train + val)
    [train], [val] = documents_of(made, "signs")  # one document still gives both splits
    assert train + val == signs and 0.05 < len(val) / len(train) < 0.2
    assert domains_of(made)["signs"]["documents"] == {"train": 1, "val": 1}


def test_roles_stay_until_it_is_said_otherwise_and_change_no_shard(prepare):
    files = {f"{d}.txt": f"{d} " * 99 for d in "abc"}
    made = prepare(files, "--heldout=a", "--tune=b")
    shards = {path: path.stat().st_mtime_ns for path in made.rglob("*.bin")}
    for options, expected in (
        ([], ["heldout", "tune", "train"]),
        (["--heldout=b"], ["train", "heldout", "train"]),
        (["--heldout=", "--tune=c"], ["train", "train", "tune"]),
    ):
        prepare(files, *options)
        assert [domains_of(made)[d]["role"] for d in "abc"] == expected
    assert shards == {path: path.stat().st_mtime_ns for path in made.rglob("*.bin")}


def test_a_shard_cut_short_is_refused(prepare):
    made = prepare({"a.txt": "some text"})
    path = made / "a/train_000000.bin"
    whole = path.read_bytes()
    assert whole == shard_of(tasks.open_shard(path))
    digests = {"a/train_000000.bin": hashlib.sha256(whole).hexdigest()}
    assert digests == domains_of(made)["a"]["shards"]["train"]
    for content in (whole[:-2], b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_000000.*prepare it"):
            tasks.open_shard(path)


def test_bad_records_are_counted_and_duplicates_dropped_over_all_domains(prepare):
    a = records(f"document {i % 30}" for i in range(40))
    a += '{broken\n{"no": "text"}\n{"text": "\\ud800"}\n{"text": " "}\n'
    b = b"\xff\xfe bad\n<|endoftext|>\ndocument 1<|endoftext|>\n<|endoftext|>\nown\n"
    b += b"<|endoftext|>\nother\n<|endoftext|>\nown\n"
    c = gzip.compress(records(["own\n", "newer", "new"]).encode())
    made = prepare({"a.jsonl": a, "b.txt": b, "c.jsonl.gz": c, "d.jsonl": '"no text"\n'})
    found = {d: (e["skipped"], sum(e["documents"].values())) for d, e in domains_of(made).items()}
    assert found.pop("a") == ({"duplicate": 10, "malformed": 3}, 30)
    assert found.pop("b") == ({"duplicate": 1, "malformed": 1}, 3)
    assert found == {"c": ({"duplicate": 1}, 2)}  # d has no text


def test_a_user_s_mistake_names_the_remedy(prepare, tmp_path, monkeypatch):
    made = prepare({f"{d}.txt": f"{d} " * 99 for d in "abc"}, name="made")
    wide = SimpleNamespace(n_vocab=100277)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", lambda name: wide)
    write(tmp_path, {"cut.jsonl.gz": gzip.compress(records(["text"]).encode())[:-9]})
    write(tmp_path, {"local/uspto.txt": "other", "empty/.git/a.txt": "any", "empty/a.png": "any"})
    for source, option, name, remedy in (
        ("text", "--heldout=d", "made", "no domain 'd': choose from a, b, c"),
        ("text", "--heldout=a,b,c", "made", "name fewer"),
        ("text", "--tokenizer=cl100k_base", "wide", "uint16: use gpt2 or bytes"),
        ("text", "--max_tokens=500", "made", "--overwrite, or another --name"),
        ("local", "--tune=", "made", "--overwrite, or another --name"),
        ("text", "--tune=", "text", "something else: choose another --name"),
        ("empty", "--tune=", "new", "give local, common_pile, a folder of text"),
        ("cut.jsonl.gz", "--tune=", "cut", r"cut\.jsonl\.gz: EOFError.*: mend that"),
    ):
        with refused(match=remedy):
            prepare(tmp_path / source, option, name=name)
    assert {entry["role"] for entry in domains_of(made).values()} == {"train"}
    prepare(tmp_path / "local", name="x")  # whose domain is not held out by its name


def killed(n, *command) -> bool:
    """Whether it is killed, in a process of its own, when it uses a file for the n-th time."""
    uses = itertools.count(1)

    def kill(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and next(uses) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "open" and arguments[1] == "w":
            assert str(arguments[0]).endswith(".tmp")  # nothing is half written where it is read

    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    sys.addaudithook(kill)
    try:
        prepare_data.main([*map(str, command)])
    finally:
        os._exit(0)


def test_killed_again_and_again_it_ends_with_the_same_bytes(prepare, tmp_path, monkeypatch):
    """A domain takes 203 uses of files, the last 20 for its shards: where each run is killed."""
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 5000)
    files = {f"{d}/{i}.md": f"{d} {i} " + "é数 \n" * i for d in "abcdefgh" for i in range(90)}
    whole = prepare(files | {f"{d}/copy.md": "in three domains" for d in "ace"}, name="whole")
    parts = prepare(write(tmp_path, {"z.txt": "to overwrite"}) / "z.txt", name="parts")
    command, kills = [tmp_path / "text", "--name=parts", f"--data_dir={tmp_path}"], 0
    assert killed(300, *command, "--overwrite")
    while killed(390 + 3 * kills, *command):
        kills += 1
        assert kills < 9, "it does not go on but starts anew"
        assert all(len(tasks.open_shard(path)) for path in parts.rglob("*.bin"))
    read = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in (parts, whole)]
    assert read[0] == read[1] and len(read[0]) > 20 and kills > 4
    assert domains_of(whole)["c"]["skipped"] == {"duplicate": 1}


def test_one_dataset_of_many_domains_streams_through_datasets(prepare, tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"row {i} " * 9, "in": {"set": "b" if i % 3 else "a/x"}} for i in range(300)]
    write(tmp_path, {"rows/0.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    hub = ["local", "--hf", f"{tmp_path}/rows/", "--tokenizer=bytes"]
    made = prepare(*hub, "--domain_field=in.set", "--heldout=a_x", "--max_tokens=8000")
    train, val = documents_of(made, "a_x")
    assert train + val == [row["text"] for row in rows[::3]]
    train, val = documents_of(made, "b")
    assert train + val == [row["text"] for i, row in enumerate(rows) if i % 3][: len(train + val)]
    assert 8000 <= sum(domains_of(made)["b"]["tokens"].values()) < 8100
    assert domains_of(made)["a_x"]["role"] == "heldout"
    assert sum(domains_of(prepare(*hub, name="whole"))["rows"]["documents"].values()) == 300


def test_local_needs_no_package_beyond_the_requirements(prepare, monkeypatch):
    absent, find = ("sympy", "networkx", "mpmath", "PIL"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else find(n))
    domains = domains_of(prepare("local", "--max_mb=0.1"))
    assert max(entry["bytes"] for entry in domains.values()) < 2e6
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


GRAPHS = {
    "baseline": ({"inner_steps": 0}, {"model_loss": 1}),
    "element": (FIRST, {"summed_step": 1}),
    "tensor": (FIRST | {"learn_inner_lr": "tensor"}, {"summed_step": 1}),
    "second": (SECOND, {"gradient": 1, "hessian_product": 1, "loss": 1}),
}


@pytest.mark.parametrize("method, expected", GRAPHS.values(), ids=GRAPHS)
def test_what_is_compiled_agrees_and_is_compiled_once(compiled, method, expected):
    model = tiny_gpt(**TINY).float()
    learner, eager = MAML(model, compile=True, **method), MAML(model, **method)
    optimizer = train.make_optimizer(train.Config(), learner)
    torch.testing.assert_close(backward(learner, *task(8, 16))[0], backward(eager, *task(8, 16))[0])
    # the second domain's val split is too small for four rows
    val = {"a": task(2, 4, 16), "b": task(1, 3, 16)}
    for step in range(4):
        if step % 2:
            train.evaluate(learner, val, ["a", "b"], 2)
        backward(learner, *task(8, 16, seed=step))
        optimizer.step()
    assert compiled == {(name, True): count for name, count in expected.items()}


@pytest.mark.parametrize("method", [{"inner_steps": 0}, FIRST, SECOND], ids=str)
def test_ddp_changes_nothing_of_what_is_compiled_in_bfloat16(compiled, tmp_path, method):
    model, (x, y) = tiny_gpt(**TINY).float(), task(8, 16)
    learner = MAML(model, compile=True, autocast=torch.bfloat16, **method)
    alone = backward(learner, x, y)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    ddp = DDP(learner, gradient_as_bucket_view=True)
    found = [backward(learner, x, y, wrapped=ddp) for _ in range(2)]
    del ddp  # if it outlives its process group, its end may wait for ever (torch 2.13)
    dist.destroy_process_group()
    for beside in found:  # twice, as DDP may lay its buckets out anew after the first
        identical(beside, alone)


class Height(TorchDispatchMode):
    """The bytes of the tensors made under it that live at once, at most."""

    now, peak, seen = 0, 0, weakref.WeakSet()

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
    given = train.read_arguments([f"{HERE}/config/{config}.py"])
    cfg = train.Config(**given | changes | {"compile": False})
    rows = cfg.batch_size // (cfg.inner_steps + 1)
    K = min(cfg.inner_steps, 2)  # the third chunk is like those that follow
    with FakeTensorMode(), Height() as counted:
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
    # At the height of a step it holds theta, phi, their rates, two sums, and g twice: g's pieces
    # live until they are one vector.
    copies = (learner - height("baseline_124m", batch_size=8)) / 124e6 / 4
    assert copies < 12


# A driver that says there is one card of sm_90: enough to trace and to lower, and for no more.
CARD = """
#include <string.h>
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaSetDevice(int d) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *a, int *b) { *a = *b = 0; return 0; }
int cudaGetDeviceProperties(int *p, int d) {
    memset(p, 0, 900); p[77] = 32; p[90] = 9; p[96] = p[97] = 132; return 0;  // warp, major, SMs
}
int cuDevicePrimaryCtxGetState(int d, int *flags, int *active) { *flags = *active = 0; return 0; }
"""
LOWER = """
import json, re, sys, torch, triton, maml, model, train
from types import SimpleNamespace
from torch._inductor import config, graph
from torch._inductor.fx_passes import fuse_attention
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget

card = dict(type="cuda", index=0, name="", major=9, minor=0, multi_processor_count=132)
card |= dict(warp_size=32, total_memory=2**36, max_threads_per_multi_processor=2048)
card |= dict(max_threads_per_block=1024, regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20)
card |= dict(shared_memory_per_block=49152, shared_memory_per_block_optin=232448)
torch.cuda.get_device_properties = lambda *device: SimpleNamespace(**card)
torch.cuda.get_device_capability = lambda *device: (9, 0)
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
torch.cuda._lazy_init = fake_tensor.init_gpu_context = lambda *device: None
driver = dict(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
triton.runtime.driver.set_active(SimpleNamespace(**driver))
fuse_attention._get_sfdp_patterns = lambda *device: []  # this and the two below would use the card
config.shape_padding = config.joint_graph_constant_folding = False
config.force_disable_caches = True
seen = {}

def read_graph(graph):
    seen["products"] = [str(n.meta["val"].dtype) for n in graph.nodes if "mm" in str(n.target)]
    seen["attention"] = [str(n.target) for n in graph.nodes if "attention" in str(n.target)]

def read_code(code):
    launch = r"^ +(?:\\w+ = )?(triton_\\w+\\.run|extern_kernels\\.\\w+|torch\\.ops\\.[\\w.]+)\\("
    print(json.dumps(seen | {"launches": len(re.findall(launch, code, re.M))}))
    raise SystemExit  # what follows would run the code

config.post_grad_custom_post_pass = read_graph
graph.GraphLowering.save_output_code = staticmethod(read_code)
cfg = train.Config(**train.read_arguments(sys.argv[1:]))
shape = {name: getattr(cfg, name) for name in train.SHAPE}
with fake_tensor.FakeTensorMode(), torch.device("cuda"):
    maml.MAML.constant = lambda self, value: torch.ones(len(value) if type(value) is list else ())
    x = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
    train.make_learner(cfg, model.GPT(model.GPTConfig(**shape)))(x, x)
"""


LOWERS = torch.version.cuda and sys.platform == "linux" and not torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.skipif(not LOWERS, reason="needs torch built for CUDA, and no GPU")
def test_the_inner_step_of_124m_lowers_to_few_launches_for_sm_90(tmp_path):
    write(tmp_path, {"card.c": CARD, "lower.py": LOWER})
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "card.c"], check=True)
    paths = dict(LD_PRELOAD=library, LD_LIBRARY_PATH=tmp_path, PYTHONPATH=HERE)
    done = run(tmp_path / "lower.py", HERE / "config/maml_124m.py", env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["launches"] <= 444  # 381; one more kernel for every weight would be 49 more
    assert set(seen["products"]) == {"torch.bfloat16"} and len(seen["products"]) == 3 * 49
    fused = r"aten._scaled_dot_product_(flash|efficient|cudnn)_attention(_backward)?.default"
    assert len(seen["attention"]) == 24 and all(re.match(fused, name) for name in seen["attention"])


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
        fields = dict(data_dir=shards, dataset="random", device=DEVICE, out_dir=tmp_path / "run")
        fields |= TINY | dict(eval_rows=4, compile=False) if DRY else {}
        return [f"{HERE}/config/{config}.py", *flags(**fields | changes)]

    return run_flags


@mark
@pytest.mark.parametrize("method", [FIRST, SECOND], ids=["first", "second"])
def test_a_gradient_on_the_gpu_is_that_of_float64_on_the_cpu(method):
    torch.set_float32_matmul_precision("highest")
    model, (x, y) = tiny_gpt(**TINY), task(8, 16)
    exact, _ = meta_grad(MAML(model, **method), x, y)
    learner = MAML(model.float(), compile=not DRY, **method).to(DEVICE)
    found, _ = backward(learner, x.to(DEVICE), y.to(DEVICE))
    assert distance({n: g.cpu() for n, g in found.items()}, exact) < 1e-4


@mark
@pytest.mark.parametrize("config", CONFIGS)
def test_twenty_steps_of_a_124m_config_compile_nothing_after_the_second(
    run_flags, config, monkeypatch, tmp_path
):
    # a rank's share of an eighth, so that one card takes its steps as one of eight would
    share = {"baseline_124m": 4, "maml_124m": 1}[config]
    graphs, counts = torch._dynamo.utils.counters["stats"], []
    check = train.check_finite

    def counting(*loss):
        counts.append(graphs["unique_graphs"])
        check(*loss)

    torch._dynamo.reset()
    monkeypatch.setattr(train, "check_finite", counting)
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    train.main(run_flags(config, tasks_per_step=share, max_steps=20, eval_interval=10))
    assert len(counts) == 3 + 20 and counts[2] == counts[-1]  # evaluated, step 0, step 1; the rest
    at = [row for row in rows_of(tmp_path / "run") if row["kind"] == "val"]
    flops, tokens, seconds = (at[2][k] - at[1][k] for k in ("flops", "tokens", "seconds"))
    print(f"\n{config}: {tokens / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s")


@mark
@pytest.mark.parametrize("config", CONFIGS)
def test_attention_is_fused_and_no_matrix_product_is_in_float32(run_flags, config):
    cfg = train.Config(**train.read_arguments(run_flags(config)))
    shape = {field: getattr(cfg, field) for field in train.SHAPE}
    model, K = GPT(GPTConfig(vocab_size=512, **shape)).to(DEVICE), min(cfg.inner_steps, 1)
    step = bench.make_step(cfg, model, K, cfg.first_order, cfg.learn_inner_lr)
    xy = [t.to(DEVICE) for t in task(8, cfg.block_size, vocab=512)]
    step([xy])  # compiles
    with torch.profiler.profile(record_shapes=True) as profile:
        step([xy])
    events = profile.profiler.kineto_results.events()
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    assert {e.dtypes()[0] for e in events if e.name() in products} == {"c10::BFloat16"}
    fused = r"aten::_scaled_dot_product_(flash|efficient|cudnn)_attention"
    assert any(re.match(fused, e.name()) for e in events)


@mark
@pytest.mark.skipif(not DRY and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_do_what_one_does(run_flags, tmp_path):
    losses = []
    for n in (1, 2):
        changes = dict(tasks_per_step=2, max_steps=3, eval_interval=3, n_layer=2, compile=False)
        options = run_flags("maml_124m", out_dir=tmp_path / str(n), **changes)
        done = run(*TORCHRUN, f"--nproc_per_node={n}", HERE / "train.py", *options)
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in rows_of(tmp_path / str(n))[1:]])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


@mark
def test_asked_to_stop_a_run_saves_and_goes_on_from_there(run_flags, tmp_path):
    out, changes = tmp_path / "run", dict(tasks_per_step=1, n_layer=2, compile=False)
    command = [HERE / "train.py", *run_flags("maml_124m", max_steps=100_000, **changes)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    for _ in range(600):
        time.sleep(0.2)
        begun = (out / "log.jsonl").exists() and log_of(out)["train"]
        if begun or process.poll() is not None:
            break
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    at = checkpoint_of(out)["step"]
    assert at > 0
    run(*command, "--init_from=resume", f"--max_steps={at + 5}", check=True)
    assert rows_of(out)[-1]["step"] == at + 5


# --------------------------------------------------------------------------------------------------
# plot.py: what is told is what the logs say

VAL = [(0, 5.0), (9, 3.0)]


def write_log(path, val=VAL, adapt=(), seed=1):
    """A log with evaluations [(tokens, loss)] and adapt rows {rule: losses of 16-token rows}."""
    roles = {"a": "train", "t": "tune", "z": "heldout"}
    data = dict(name="toy", tokenizer="bytes", roles=roles)
    rows = [{"kind": "run", "config": {"seed": seed}, "dataset": data}]
    for tokens, loss in val:
        losses = {"a": 0.0, "t": 0.0, "z": loss}
        at = {"step": tokens, "tokens": tokens, "flops": 0.0}
        rows.append({"kind": "val", **at, "loss": losses, "online": {}})
    for (rule, losses), domain in itertools.product(dict(adapt).items(), "tz"):
        row = {"kind": "adapt", "dataset": "toy", "domain": domain, "role": roles[domain]}
        row["tokens"] = 2_000_000
        loss = [loss + 5 * (domain == "t") for loss in losses]
        row |= {"options": {}, "by_passage": [min(losses), max(losses)]}
        rows.append({**row, "rule": rule, "row_tokens": 16, "loss": loss})
    write(path, {"log.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return path


@pytest.fixture
def told(tmp_path, printed):
    return partial(printed, plot.main, f"--output={tmp_path}/curves.png")


def test_the_table_says_what_heldout_rows_say_and_how_many_fewer_are_needed(told, tmp_path):
    adamw = [3.0] * 4 + [2.0] * 4  # over its later half 2.0
    base = write_log(tmp_path / "base", adapt={"none": [4.0] * 8, "adamw": adamw})
    own = [3.0, 2.0, 1.0] + [1.0] * 5  # its later half is at 2.0 after two rows
    text = told(base, write_log(tmp_path / "maml", adapt={"own": own}))
    cells = dict(re.findall(r"^  (.*\S) +(\d\.\d+)  after 2.0M training tokens$", text, re.M))
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
        logs[name] = write_log(tmp_path / name, adapt={"none": [1.0 + seed]}, seed=seed)
    text = told(*logs.values())
    assert "  base, no learning                   2.500 ± 0.707 over 2 seeds" in text
    assert "  maml, no learning" in text and "  base_small, no learning" in text
    with refused(match="'base_s3' have one seed: rename"):
        told(logs["base_s1"], write_log(tmp_path / "base_s3"))


def test_the_long_tables_pair_by_seed_and_give_intervals(tmp_path):
    logs = []
    for seed in (1, 2, 3):
        for name, tokens, read in (
            ("base", 8, {"adamw": [2.0] * 8}),
            ("half_maml", 2, {"own": [3.1 - seed / 10] * 8}),
            ("maml", 8, {"own": [0.9 + seed / 10] * 8}),
        ):
            val = [(0, 5.0), (tokens, 3.0)]
            folder = write_log(tmp_path / f"{name}{seed}", val, read, seed)
            logs.append((folder / "log.jsonl").rename(tmp_path / f"{name}_s{seed}.jsonl"))
    text = run(HERE / "results/tables.py", *sorted(logs)).stdout
    half = 4.303 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    assert re.search(rf"^\| maml \| own \| 1.100 .* -0.900 ± {half:.3f} ", text, re.M)
    # half of the way in loss from 2 tokens to 8, so at 4: the base needs twice as many
    assert "faster: maml needs 2.000x ± 0.000 fewer training tokens" in text


def test_learned_rates_are_drawn_from_a_checkpoint(trained, tmp_path):
    done = run(HERE / "results/rates.py", trained / "maml", "-o", tmp_path / "rates.png")
    assert done.returncode == 0 and (tmp_path / "rates.png").stat().st_size > 10_000


def test_newer_rows_replace_older_ones_and_a_level_that_is_never_reached_is_none(tmp_path):
    log = write_log(tmp_path / "run", adapt={"own": [9.0, 9.0]}) / "log.jsonl"
    newer = write_log(tmp_path / "new", adapt={"own": [2.0, 1.0]})
    with open(log, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(newer)[1:])
    T, curve = plot.reading_curve(plot.read_log(log), "own")
    assert T == 16 and curve.tolist() == [2.0, 1.0]
    assert plot.tokens_needed(curve, 1.5, 16) == 32 and plot.tokens_needed(curve, 0.5, 16) is None
    assert plot.tokens_needed(curve, 2.5, 16) == 16
    bounced = np.array([3.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0])  # at 1.0 early, and not for good
    assert plot.tokens_needed(bounced, 1.5, 16) == 8 * 16
    assert plot.reading_curve(plot.read_log(log), "adamw") is None


def test_logs_beyond_repair_are_refused_and_a_cut_last_line_is_left_out(told, tmp_path):
    log = write_log(tmp_path / "run", adapt={"none": [3.0]}) / "log.jsonl"
    header, first, *rest = log.read_text().splitlines(keepends=True)
    log.write_text("".join([header, first, *rest, '{"kind": "val", "st']))
    assert "3.000" in told(log)
    for lines, remedy in (
        ([], "train again"),
        ([first], "train again"),
        ([header], "train again"),
        ([header, "no json\n", first], "delete that line"),
        ([header, first], r"adapt\.py"),
    ):
        log.write_text("".join(lines))
        with refused(match=remedy):
            told(log)
    with refused(match=r"no log at .*train\.py"):
        told(tmp_path / "nowhere")


def test_the_picture_needs_no_torch(trained, tmp_path):
    code = "import sys, plot; plot.main(); assert 'torch' not in sys.modules"
    done = run("-c", code, trained / "plain", trained / "maml", "-o", tmp_path / "c.png", cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert "tuned AdamW" in done.stdout and (tmp_path / "c.png").stat().st_size > 10_000
