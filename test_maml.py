"""Every claim of the repository as a test named like a sentence: make test, or python -m pytest.

What takes minutes is behind a marker: python -m pytest -m slow. What needs a GPU: -m gpu.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
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
import run
import tasks
import train
from maml import MAML, meta_grad
from model import GPT, GPTConfig
from text import read_text

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tensors this small only wait for a second thread
DRY = bool(os.environ.get("DRY_RUN"))  # what make gpu-check does, tiny and on a CPU
DEVICE = "cpu" if DRY else "cuda"
refused = partial(pytest.raises, SystemExit)  # a user's mistake ends the program with one line
read_flags = partial(run.read_flags, train.Config)

# --------------------------------------------------------------------------------------------------
# what the tests share


def tiny_gpt(**changes) -> GPT:
    """A GPT in float64 with weights large enough that its Hessian matters."""
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**shape | changes)).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def task(*shape, vocab=32, seed=1):
    """x, y of a shape, (12, 8) unless given: random ids, and the ids that follow them."""
    *rows, T = shape or (12, 8)
    return tasks.batch(np.random.default_rng(seed).integers(vocab, size=(*rows, T + 1)))


def backward(learner, x, y, wrapped=None):
    """(gradients by name, loss), as training computes them."""
    learner.zero_grad()
    loss = (wrapped or learner)(x, y)
    loss.backward()
    named = learner.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}, loss.item()


def distance(a: dict, b: dict) -> float:
    """Relative distance of two gradients."""
    assert a.keys() == b.keys()
    square = sum((a[n] - b[n]).square().sum() for n in b) / sum(b[n].square().sum() for n in b)
    return square.sqrt().item()


def write(folder, files: dict) -> Path:
    """The folder, with {path: text or bytes} in it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def records(texts) -> str:
    return jsonl({"text": text} for text in texts)


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


def shard_of(ids) -> bytes:
    header = np.array([20240520, 1, len(ids)] + [0] * 253, np.int32)
    return header.tobytes() + np.array(ids, np.uint16).tobytes()


def counting(folder, tokens=257, vocab=5000) -> Path:
    """The folder, with a dataset of domains whose ids count up from 0, 1000, ..., in two shards."""
    files, domains = {}, {}
    for i, (domain, role) in enumerate(zip("abcde", ["train"] * 3 + ["heldout"] * 2, strict=True)):
        ids = (1000 * i + np.arange(tokens)) % vocab
        first, second, val = (f"{domain}/{part}.bin" for part in ("train_0", "train_1", "val"))
        files |= {first: shard_of(ids[:128]), second: shard_of(ids[128:])}
        files[val] = shard_of(ids[: tokens // 8] if domain == "e" else ids)  # "e" has little text
        train_shards = {path: f"hash of {path}" for path in (first, second)}
        domains[domain] = {"role": role, "shards": {"train": train_shards, "val": {val: ""}}}
    meta = {"tokenizer": "gpt2", "vocab_size": vocab, "domains": domains}
    return write(folder, files | {"meta.json": json.dumps(meta)})


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
        out = tmp_path / name
        train.main(flags(**QUICK | dict(data_dir=data_dir, out_dir=out) | changes))
        return out

    return pretrain


def printed(main, *arguments) -> str:
    """What a program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(argument) for argument in arguments])
    return out.getvalue()


def execute(*command, fails=False, **how) -> subprocess.CompletedProcess:
    """A program in a process of its own, which fails or does not, as it should."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert bool(done.returncode) == fails, done.stderr
    return done


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): something happens when a later run begins the step n."""
    actions, lr_factor = {}, train.lr_factor

    def acting(cfg, step):
        if step in actions:
            actions.pop(step)()
        return lr_factor(cfg, step)

    monkeypatch.setattr(train, "lr_factor", acting)
    return actions.__setitem__


def log_of(out_dir) -> dict[str, list[dict]]:
    """The rows of a log by kind, without what no two runs share: headers and seconds."""
    log = defaultdict(list)
    for row in plot.read_log(out_dir):
        log[row.pop("kind")].append({k: v for k, v in row.items() if "seconds" not in k})
    assert log.pop("run")
    return log


def checkpoint_of(out_dir) -> dict:
    return torch.load(out_dir / "ckpt.pt", map_location="cpu", weights_only=True)


def weights_of(out_dir) -> tuple:
    ckpt = checkpoint_of(out_dir)
    return ckpt["model"], ckpt["learner"], ckpt["optimizer"]["state"]


def read_apart(learner, x, y) -> tuple:
    """What read() returns of passages that are read one at a time."""
    losses, phi = zip(*map(learner.read, x.split(1), y.split(1)), strict=True)
    return torch.cat(losses), torch.cat(phi)


identical = partial(torch.testing.assert_close, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# the mathematics


README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ADDED = re.findall(r"^\+(.*)", README, re.MULTILINE)  # another inner optimizer, "momentum"
exec("\n".join(ADDED), {"torch": torch, "DIRECTIONS": maml.DIRECTIONS})


class Toy(nn.Module):
    """Parameters in float64, and any loss(x, y, *parameters)."""

    def __init__(self, loss, *parameters):
        super().__init__()
        self.loss, self.list = loss, nn.ParameterList(p.double() for p in parameters)

    def forward(self, x, y):
        return None, self.loss(x, y, *self.list)


def assert_defined(learner, x, y, most=1e-12, seed=1) -> tuple:
    """That what training computes is what meta_grad defines, whatever is drawn; and what it is."""
    torch.manual_seed(seed)
    grads, loss = backward(learner, x, y)
    torch.manual_seed(seed)
    defined, defined_loss = meta_grad(learner, x, y)
    assert distance(grads, defined) < most and abs(loss - defined_loss) < 1e-13
    return grads, loss


@pytest.mark.parametrize("first_order", [False, True])
def test_a_model_with_dropout_has_the_gradient_of_the_masks_that_it_drew(first_order):
    def loss(x, y, w):
        return F.cross_entropy(F.dropout(w[x]).flatten(0, 1), y.flatten())

    learner = MAML(Toy(loss, torch.randn(32, 32)), 2, 0.5, first_order=first_order)
    losses = [assert_defined(learner, *task(), seed=seed)[1] for seed in (1, 2)]
    assert losses[0] != losses[1]


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
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "normed", "momentum"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("objective", ["final", "every"])
@pytest.mark.parametrize("learned", ["no", "tensor", "element"])
def test_the_meta_gradient_is_that_of_the_definition(K, optimizer, first_order, objective, learned):
    for more in ({}, dict(inner_schedule="cosine", inner_warmup=1)):
        learner = MAML(tiny_gpt(), K, 0.05, optimizer, first_order, objective, learned, **more)
        # the derivative of a fresh AdamW's step divides by |g|, and rounding with it
        assert_defined(learner, *task(), most=1e-9 if optimizer == "adamw" else 1e-12)


@pytest.mark.parametrize("objective", ["final", "every"])
@pytest.mark.parametrize("learned", ["tensor", "element"])
def test_the_meta_gradient_is_what_finite_differences_say(objective, learned):
    """In float64, for each tensor of theta and of the rates along a random direction."""
    options = dict(objective=objective, learn_inner_lr=learned)
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.05, **options).double(), task()
    grads, _ = backward(learner, x, y)
    for name, p in learner.named_parameters():
        along, theta, losses = torch.randn_like(p), p.detach().clone(), []
        for eps in (1e-5, -1e-5):
            p.data = theta + eps * along
            losses.append(learner(x, y).item())
        p.data = theta
        slope = (losses[0] - losses[1]) / 2e-5
        assert (grads[name] * along).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_what_is_frozen_flat_or_unused_is_no_trouble_and_what_learns_has_one_dtype():
    def loss(x, y, frozen, late, flat, unused):
        return (frozen * late**3 * x + flat * y).sum()

    model, x = Toy(loss, *torch.ones(4, 3)), torch.randn(3, 3, dtype=torch.float64)
    model.list[0] = nn.Parameter(torch.full((3,), 2, dtype=torch.int8), requires_grad=False)
    learner = MAML(model, 2, 0.1)
    assert learner.constant(0.1) == 0.1  # not of the first parameter's dtype
    for learning in (3, 2):
        grads, _ = assert_defined(learner, x, x, most=1e-14)
        assert len(grads) == learning and not grads["model.list.3"].any()
        model.list[1].requires_grad_(False)  # after MAML was made
    model.list[1] = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="one dtype and device"):
        MAML(model, 2, 0.1)


OPTIMIZERS = {
    "sgd": (0.1, torch.optim.SGD, 1e-12),
    "momentum": (0.1, partial(torch.optim.SGD, momentum=0.9), 1e-12),
    "adamw": (0.01, partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0), 1e-6),
}


@pytest.mark.parametrize("learned", ["no", "tensor", "element"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reading_is_torch_optim_and_its_mean_loss_is_what_training_lowers(name, learned):
    """Where rates are learned, each tensor has one of its own."""
    model, (x, y), (lr, optimizer, rtol) = tiny_gpt(), task(3, 8), OPTIMIZERS[name]
    learner = MAML(model, 2, lr, name, learn_inner_lr=learned).double()
    rates = [lr if learned == "no" else lr / (1 + i) for i in range(len(learner.sizes))]
    run.load_rates(learner, {"log_inner_lr": torch.tensor(rates, dtype=torch.float64).log()})
    losses, phi = learner.read(x[None], y[None])
    assert learner(x, y).item() == pytest.approx(losses.mean().item(), rel=1e-12)
    parameters = zip(model.parameters(), rates, strict=True)
    optimizer = optimizer([dict(params=[p], lr=rate) for p, rate in parameters])
    for xj, yj, loss in zip(x.split(1), y.split(1), losses[0], strict=True):
        torch.testing.assert_close(loss, model(xj, yj)[1].detach(), rtol=rtol, atol=0)
        optimizer.zero_grad()
        model(xj, yj)[1].backward()
        optimizer.step()
    stepped = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(learner.by_name(phi[0]), stepped, rtol=rtol, atol=rtol / 10)


def test_a_schedule_spans_the_steps_of_a_task_and_begins_again_in_a_longer_text():
    learner = MAML(tiny_gpt(), 4, 1.0, inner_schedule="cosine", inner_warmup=1)
    span = [0.5, 1, 0.75, 0.25]  # a warm-up of one step, then a cosine of three
    assert learner.factors(9).tolist() == pytest.approx([*span, *span, 0.5])

    def moved(**more):
        return MAML(tiny_gpt(), 1, 1.0, **more).read(*task(1, 1, 8))[1] - learner.vectors()[0]

    torch.testing.assert_close(2 * moved(inner_warmup=1), moved())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_normed_step_is_as_long_as_its_rates_say_whatever_the_gradient(scale):
    learner = MAML(tiny_gpt(), 1, 0.1, "normed")
    g, _ = learner.gradient(learner.vectors()[0], *task())
    d, _ = learner.direction(scale * g, (), learner.layout)
    for name, part in learner.by_name(d).items():
        rms = part.square().mean().sqrt()
        if part.dim() == 1 or name in adapt.EMBEDDINGS:  # one tensor, one root mean square
            torch.testing.assert_close(rms, torch.ones_like(rms))
            continue
        G = learner.by_name(g)[name]  # the formula, in numbers of its own
        rows = (G**2).mean(1)
        G = G / (rows + 0.1 * rows.mean()).sqrt()[:, None]
        columns = (G**2).mean(0)
        G = G / (columns + 0.1 * columns.mean()).sqrt()
        torch.testing.assert_close(part, G, rtol=1e-6, atol=0)
        assert 0.8 < rms < 1
    assert not learner.direction(0 * g, (), learner.layout)[0].any()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_size_of_the_loss_changes_no_rate_s_path(scale):
    """Gradients of log rates are tiny: an outer optimizer with an eps like theirs would stand."""

    frozen = train.Config(learning_rate=0, inner_steps=1, learn_inner_lr="element")

    def path(scale):
        learner = MAML(tiny_gpt(), 2, 1e-3, first_order=True, learn_inner_lr="element")
        optimizer = train.make_optimizer(frozen, learner)
        [group] = optimizer.param_groups
        group["lr"] = 0.1
        for step in range(4):
            optimizer.zero_grad()
            (scale * learner(*task(seed=step))).backward()
            train.set_eps(group, learner.log_inner_lr.grad.abs().mean().item())
            optimizer.step()
        return learner.log_inner_lr.detach() - math.log(1e-3)

    assert path(1.0).abs().median() > 0.1
    torch.testing.assert_close(path(scale), path(1.0), rtol=1e-3, atol=1e-4)


def test_rates_of_tokens_that_training_never_saw_stay_near_where_they_began(pretrain):
    """Else noise moves them as far as evidence moves others, and a text of such tokens blows up."""
    given = dict(inner_optimizer="normed", inner_lr=1e-3, inner_lr_lr=0.1, max_steps=40)
    checkpoint = checkpoint_of(pretrain(**given))
    V, C = checkpoint["model"]["transformer.wte.weight"].shape  # its rates come first
    moved = checkpoint["learner"]["log_inner_lr"][: V * C].view(V, C) - math.log(1e-3)
    seen, unseen = moved[48:75].abs().mean(), moved[128:256].abs().mean()  # three alphabets
    assert unseen < 0.3 * seen


def test_second_order_has_a_backward_and_no_autograd_grad():
    learner, (x, y) = MAML(tiny_gpt(), 1, 0.1), task()
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        torch.autograd.grad(learner(x, y), list(learner.parameters()))
    assert all(g.any() for g in backward(learner, x, y)[0].values())


@pytest.mark.parametrize("first_order, most", [(True, 0.01), (False, 1.1)])
def test_an_inner_step_keeps_no_graph_and_only_in_second_order_phi(first_order, most):
    """By how many copies of the parameters an inner step raises the height of an outer loss."""
    how = dict(first_order=first_order, learn_inner_lr="element" if first_order else "no")

    def copies(K):
        model, xy = tiny_gpt(n_embd=32), task(4 * (K + 1), 8)
        learner = MAML(model, K, 0.1, **how)
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

    def draw():
        a, b, x = 0.1 + 4.9 * torch.rand(1), math.pi * torch.rand(1), 10 * torch.rand(20, 1) - 5
        return x, a * torch.sin(x + b)

    errors = {}
    for K in (0, 1):
        torch.manual_seed(0)
        layers = nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
        model = Regression(*layers)
        learner, one_step = (MAML(model, k, 0.01, objective="final") for k in (K, 1))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(tasks):
                (learner(*draw()) / tasks).backward()
            optimizer.step()
        errors[K] = np.mean([one_step(*draw()).item() for _ in range(200)])
    assert errors[0] > 2 and errors[1] < min(limit, 0.75 * errors[0])


# --------------------------------------------------------------------------------------------------
# the identities


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_zero_inner_steps_is_plain_training_bit_for_bit(compute):
    model, (x, y) = tiny_gpt().float(), task()
    with torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
        plain = model(x, y)[1]
    plain.backward()
    expected = {f"model.{n}": p.grad.clone() for n, p in model.named_parameters()}
    identical(backward(MAML(model, 0, autocast=compute), x, y), (expected, plain.item()))


@pytest.mark.parametrize("first_order", [False, True])
def test_attention_is_fused_except_where_it_is_differentiated_twice(first_order):
    learner = MAML(tiny_gpt().float(), 1, 0.1, first_order=first_order)
    with torch.profiler.profile() as forward:
        loss = learner(*task())
    with torch.profiler.profile() as back:
        loss.backward()
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    fused = [sum(event.name == kernel for event in p.events()) for p in (forward, back)]
    assert fused == [4 if first_order else 2, 0]  # 2 layers, 2 chunks: the last is only predicted


def test_bfloat16_agrees_with_float32_and_leaves_parameters_and_updates_in_float32():
    model, (x, y) = tiny_gpt().float(), task()
    learners = [MAML(model, 1, 0.1, autocast=dtype) for dtype in (None, torch.bfloat16)]
    (exact, loss), (rounded, rounded_loss) = (backward(learner, x, y) for learner in learners)
    assert 0 < abs(loss - rounded_loss) < 0.02 * loss and 0 < distance(rounded, exact) < 0.05
    _, phi = learners[1].read(x[None], y[None])
    assert all(t.dtype == torch.float32 for t in (*rounded.values(), phi))


@pytest.mark.parametrize("K, first_order", [(0, False), (3, True), (3, False)])
def test_the_flops_of_the_log_are_what_the_flop_counter_counts(pretrain, K, first_order):
    how = dict(inner_steps=K, first_order=first_order, learn_inner_lr="no")
    out = pretrain(n_embd=64, n_layer=2, max_steps=1, **how)
    _, model = run.load_checkpoint(out / "ckpt.pt")
    learner, (x, y) = MAML(model, **how), task(4, 16, vocab=257)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        learner(x, y).backward()
    logged = log_of(out)["val"][-1]["flops"]  # of four tasks, and of their vectors
    vectors = 7 * K * 4 * sum(p.numel() for p in model.parameters())
    assert 4 * counter.get_total_flops() + vectors == pytest.approx(logged)


def test_the_snippets_of_the_readme_run_as_they_stand():
    names, (method, another_model) = {}, SNIPPETS
    exec(method, names)
    grads = {n: p.grad for n, p in names["learner"].model.named_parameters()}
    assert distance(grads, names["meta_gradient"]) < 1e-4
    exec(another_model, names)  # a model that is no GPT
    assert all(p.grad.any() for p in names["learner"].parameters())


class Wrapped(nn.Sequential):
    """All that a causal model of transformers needs."""

    def forward(self, x, y):
        logits = self[0](input_ids=x, use_cache=False).logits
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())


def of_transformers(kind: str, **changes) -> nn.Module:
    """Tiny and random, with large weights, biases too."""
    hf = pytest.importorskip("transformers")
    shape = dict(n_positions=16, n_embd=16, n_layer=2, n_head=2)
    if kind == "llama":
        shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        shape |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    ids = dict(vocab_size=320, bos_token_id=None, eos_token_id=None)
    config = hf.AutoConfig.for_model(kind, **shape | ids | changes)
    model = hf.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "10KB"}])
def test_a_gpt2_that_transformers_saved_has_its_logits_here_cropped_or_not(tmp_path, how):
    hf, (x, _) = of_transformers("gpt2"), task(2, 16, vocab=320)
    hf.save_pretrained(tmp_path, **how)
    ckpt, model = run.load_checkpoint(tmp_path)
    assert model.config.bias and run.tokenizer_of(ckpt) == "bytes"
    torch.testing.assert_close(model(x)[0], hf(x).logits, rtol=0, atol=1e-4)
    _, cropped = run.load_checkpoint(tmp_path, block_size=8)
    assert cropped.config.block_size == 8
    torch.testing.assert_close(cropped(x[:, :8])[0], hf(x[:, :8]).logits, rtol=0, atol=1e-4)


def test_a_folder_of_transformers_that_is_no_whole_gpt2_is_refused(tmp_path):
    of_transformers("llama").save_pretrained(tmp_path / "llama")
    of_transformers("gpt2", activation_function="relu").save_pretrained(tmp_path / "relu")
    for name in ("bare", "cut"):
        of_transformers("gpt2").save_pretrained(tmp_path / name)
    (tmp_path / "bare/model.safetensors").unlink()
    os.truncate(tmp_path / "cut/model.safetensors", 2000)
    for name, remedy in (
        ("llama", "its model_type is llama, not that of GPT-2.*MAML takes any module"),
        ("relu", "its activation_function is relu, not that of GPT-2"),
        ("bare", "no whole GPT-2 of transformers at [^ ]*bare, .*OSError"),
        ("cut", "no whole GPT-2 of transformers at [^ ]*cut, .*Safetensor"),
    ):
        with pytest.raises(ValueError, match=f"^[^\n]*{remedy}[^\n]*$"):
            run.load_checkpoint(tmp_path / name)


def test_what_is_not_here_is_a_name_on_the_hub_unless_it_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"out/run/log.jsonl": ""}))
    hub = ["gpt2", "gpt2-medium", "openai-community/gpt2", "some.one/gpt-2.5_b"]
    paths = ["out/rum", "out", "gone.pt", "a/gone.pt", "/gone", "./gone", "../gone", "a/b/c", "~/a"]
    assert [name for name in hub + paths if run.names_hub(name)] == hub
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    for name in hub:
        with pytest.raises(ValueError, match=f"no checkpoint at {name} .*: pip install transf"):
            run.load_checkpoint(name)
    for name in paths:
        with pytest.raises(FileNotFoundError, match="train first, or give a ckpt"):
            run.load_checkpoint(name)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_causal_models_of_transformers_are_learners_and_readers_as_they_are(kind):
    model, (x, y) = Wrapped(of_transformers(kind)), task(2, 3, 8, vocab=320)
    for first_order in (True, False):
        learner = MAML(model, 2, 0.01, first_order=first_order, learn_inner_lr="tensor").double()
        _, loss = assert_defined(learner, x[0], y[0], most=1e-6)
    losses, phi = learner.read(x, y)
    torch.testing.assert_close((losses, phi), read_apart(learner, x, y))
    assert losses.mean(1)[0].item() == pytest.approx(loss)
    rounded, _ = MAML(model.float(), 2, 0.01, autocast=torch.bfloat16).read(x, y)
    torch.testing.assert_close(rounded, losses.float(), rtol=0.05, atol=0)


def test_generation_is_decided_by_the_callers_generator():
    generate = partial(tiny_gpt().generate, torch.zeros(1, 1, dtype=torch.long), 20)
    dice = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    one, two, other = (generate(top_k=10, generator=generator) for generator in dice)
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (1, 21)
    assert torch.equal(generate(temperature=0), generate(temperature=0))


# --------------------------------------------------------------------------------------------------
# tasks


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_rows_are_whole_and_never_overlap_and_a_step_covers_the_domains_evenly(tmp_path, kind):
    data = tasks.Dataset(counting(tmp_path), 16, batch_size=6, tasks_per_step=4, tasks=kind)
    starts, in_order = set(), []
    for step in range(100):
        counts = Counter()
        for x, y in (data.task(step, i) for i in range(4)):
            assert torch.equal(y, x + 1) and torch.equal(x[:, 1:], y[:, :-1])
            assert len(x.unique()) == x.numel()
            consecutive = torch.equal(x.flatten(), x[0, 0] + torch.arange(x.numel()))
            assert consecutive == (kind == "passage")  # across shards, too
            domains = (x[:, 0] // 1000).tolist()
            assert (len(set(domains)) > 1) == (kind == "mixed")
            in_order.append(domains == sorted(domains))
            starts.add(x[0, 0].item())
            counts.update(domains)
        assert sorted(counts.values()) == ([8, 8, 8] if kind == "mixed" else [6, 6, 12])
    assert len(starts) > 150 and all(in_order) == (kind != "mixed")


def test_draws_are_pure_functions_of_seed_step_and_task(tmp_path):
    root = counting(tmp_path)

    def draw(seed, step, task):
        data = tasks.Dataset(root, 16, 4, tasks_per_step=8, tasks="domain", seed=seed)
        return tuple(data.task(step, task)[0].flatten().tolist())

    keys = list(itertools.product(range(2), range(3), range(8)))
    drawn = [draw(*key) for key in keys]
    assert drawn == [draw(*key) for key in keys] and len(set(drawn)) == len(keys)


@pytest.mark.parametrize("kind, most", [("mixed", 4), ("domain", 6), ("passage", 6)])
def test_the_most_that_a_draw_can_ask_of_a_domain_is_known_before_the_first(tmp_path, kind, most):
    """Two draws of 6 rows from three domains: at most 4 rows of one, if rows are mixed."""
    sizes = {"batch_size": 6, "tasks_per_step": 2, "tasks": kind}
    data = tasks.Dataset(counting(tmp_path / "enough", 64 * most + 1), 2, **sizes)
    drawn = [data.task(step, i)[0][:, 0] // 1000 for step in range(50) for i in range(2)]
    assert most == max(Counter(rows.tolist()).most_common(1)[0][1] for rows in drawn)
    assert tasks.Dataset(tmp_path / "enough", 64, **sizes).task(0, 0)[0].shape == (6, 64)
    with pytest.raises(ValueError, match=f"'a' has {64 * most} train .* {most} rows of 64: lower"):
        tasks.Dataset(counting(tmp_path / "few", 64 * most), 64, **sizes)


def test_a_domain_without_a_row_is_left_out_with_a_warning(tmp_path):
    few = dict.fromkeys(("b/train_0.bin", "b/train_1.bin"), shard_of([1] * 8))
    root = write(counting(tmp_path), few)
    with pytest.warns(UserWarning, match="'b' is left out: train or val has no row of 16 tokens"):
        data = tasks.Dataset(root, 16, batch_size=6, tasks_per_step=4)
    assert data.train_domains == ["a", "c"] and "b" not in {*data.trained, *data.roles}
    assert "b" not in data.unseen([]) and data.task(0, 0)[0].shape == (6, 16)


def test_passages_of_val_come_in_order_evenly_spaced_and_never_from_the_train_split(tmp_path):
    data = tasks.Dataset(counting(tmp_path), 16)
    data.paths["a", "train"] = None  # nothing of it is needed
    x, y = data.passages("a", 3, 4)
    expected = torch.tensor([[0], [6 * 16], [12 * 16]]) + torch.arange(4 * 16)
    assert torch.equal(x, expected.view(3, 4, 16)) and torch.equal(y, x + 1)
    x, _ = data.passages("a", 3, 1000)  # too short for that: one passage, of all there is
    assert x.shape == (1, 16, 16)


# --------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_reading_is_causal_and_side_by_side_as_one_at_a_time(optimizer, monkeypatch):
    options = dict(learn_inner_lr="element", inner_schedule="cosine")
    learner, (x, y) = MAML(tiny_gpt(), 1, 0.05, optimizer, **options).double(), task(3, 5, 8)
    together, phi = learner.read(x, y)
    torch.testing.assert_close((together, phi), read_apart(learner, x, y))
    for most in (2, 3):  # two passages, then the third; all three
        monkeypatch.setattr(maml, "SIDE_BY_SIDE", most * len(phi[0]))
        found = learner.read(x, y)
        torch.testing.assert_close(found, (together, phi[2:] if most == 2 else phi))
    x[:, 3], y[:, 3] = 7, 9
    after, _ = learner.read(x, y)
    assert torch.equal(together[:, :3], after[:, :3])
    assert not torch.isclose(together[:, 3:], after[:, 3:]).any()


@pytest.fixture(scope="session", autouse=True)
def small_grids():
    """Searches for the best options take as long as those of a model of any size: fewer here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "CHOICES", {"adamw": {"steps": (1, 2)}, "dynamic": {"eps": (0.3,)}})
        yield


READ_256 = flags(passages=4, tokens=256)
CHOICES = adapt.CHOICES
READ_64 = flags(passages=2, tokens=64, rules="none")


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A baseline and a learner that begins from it, both trained for a few seconds, and read."""
    out = tmp_path_factory.mktemp("trained")
    common = dict(data_dir=data_dir, dataset="tiny", device="cpu", eval_rows=16, warmup_steps=5)
    plain = dict(max_steps=120, learning_rate=1e-2, batch_size=16, tasks_per_step=1)
    own = dict(max_steps=60, learning_rate=3e-3, batch_size=8, tasks_per_step=2, inner_steps=7)
    own |= dict(first_order=True, learn_inner_lr="element", tasks="passage", inner_lr_lr=0.1)
    own |= dict(inner_optimizer="normed", inner_lr=1e-3, init_from=out / "plain/ckpt.pt")
    for name, method in {"plain": plain, "maml": own}.items():
        train.main(flags(out_dir=out / name, **TINY | common | method))
        adapt.main([str(out / name), *READ_256])
    return out


def test_learned_rates_read_unseen_text_better_and_the_table_is_that_of_the_log(trained):
    text = printed(adapt.main, trained / "maml", *READ_256)
    rows = {(row["domain"], row["rule"]): row for row in log_of(trained / "maml")["adapt"]}
    assert rows.keys() == set(itertools.product(["tune", "far"], adapt.RULES))
    evaluated = log_of(trained / "maml")["val"][-1]  # on the same passages
    assert evaluated["loss"].keys() - evaluated["online"].keys() == {"alpha", "beta", "gamma"}
    for domain, online in evaluated["online"].items():
        own, none = (np.mean(rows[domain, rule]["loss"]) for rule in ("own", "none"))
        assert own == pytest.approx(online, abs=1e-4) and own < none - 0.05
    lines = text.split("far: ")[1].splitlines()[2:7]
    for rule, line in zip(adapt.RULES, lines, strict=True):
        row, loss = rows["far", rule], np.array(rows["far", rule]["loss"])
        halves = [loss, loss[:2], loss[2:4], loss[4:8], loss[8:]]
        assert line.split() == [rule, str(row["forwards"]), *(f"{h.mean():.3f}" for h in halves)]
        assert np.mean(rows["far", rule]["by_passage"]) == pytest.approx(loss.mean(), abs=1e-3)


@pytest.mark.parametrize("rule", adapt.START)
def test_opponents_are_tuned_on_tune_domains_alone(trained, data_dir, tmp_path, monkeypatch, rule):
    tune, _ = tasks.Dataset(data_dir / "tiny", 16).passages("tune", 2, 4)
    spy = create_autospec(adapt.Reader.read, side_effect=adapt.Reader.read)
    monkeypatch.setattr(adapt.Reader, "read", spy)
    shutil.copy(trained / "plain/ckpt.pt", tmp_path)
    adapt.main([str(tmp_path), *flags(passages=2, tokens=64, rules=rule)])
    seen = [call.args[2] for call in spy.call_args_list]
    *searched, _, _ = seen  # the last two are tune and far, by what was chosen
    assert len(searched) > 4 and all(torch.equal(x, tune[: len(x)]) for x in searched)


def test_adamws_options_are_those_of_a_grid_at_rates_of_their_own(tmp_path, monkeypatch):
    def valleys(options, most):  # frozen embeddings are best at a far higher rate than others
        best = 8e-3 if options["frozen"] else 5e-4
        far = abs(math.log2(options["lr"] / best)) + abs(options["steps"] - 2)
        return far - options["frozen"] + (options["beta2"] > 0.96)

    monkeypatch.setattr(adapt, "CHOICES", CHOICES)
    best = {"lr": 8e-3, "steps": 2, "frozen": True, "beta2": 0.95}
    assert adapt.best_options("adamw", valleys) == best
    assert adapt.best_options("adamw", lambda *_: math.inf).keys() == best.keys()
    steep = adapt.best_options("adamw", lambda o, _: math.inf if o["lr"] > 2e-5 else -o["lr"])
    assert steep["lr"] > 5e-6  # found although the first steps blow up
    for role, chosen in {"heldout": None, "tune": {"lr": 0.5}}.items():
        row = {"kind": "adapt", "rule": "adamw", "role": role, "options": {"lr": 0.5}}
        log = write(tmp_path, {"log.jsonl": json.dumps(row) + "\n"}) / "log.jsonl"
        assert adapt.logged_options(log, "adamw") == chosen


def test_dynamic_evaluation_is_sgd_at_rates_by_squared_gradients_of_train_domains(trained):
    ckpt, model = run.load_checkpoint(trained / "plain")
    args = SimpleNamespace(data_dir=None)
    rows = adapt.statistics(args, ckpt, model)
    data = tasks.Dataset(Path(ckpt["config"]["data_dir"], "tiny"), 16, 1, adapt.STATISTICS)
    assert all(torch.equal(row[0], data.task(0, i)[0]) for i, row in enumerate(rows))
    reader, (x, y) = adapt.Reader(ckpt, model, lambda: rows[:4]), task(1, 3, 16, vocab=200)
    losses, phi = reader.read("dynamic", x, y, lr=0.01, eps=0.5, decay=0.1)
    vector = nn.utils.parameters_to_vector
    theta = vector(model.parameters()).detach()

    def gradient(x, y):
        return vector(torch.autograd.grad(model(x, y)[1], model.parameters()))

    rms = torch.stack([gradient(*row) ** 2 for row in rows[:4]]).mean(0).sqrt()
    for i, row in enumerate(zip(x[0].split(1), y[0].split(1), strict=True)):
        assert model(*row)[1].item() == pytest.approx(losses[0, i], rel=1e-5)
        old = vector(model.parameters()).detach()
        new = old - 0.01 / (rms + 0.5 * rms.mean()) * gradient(*row) + 0.1 * (theta - old)
        nn.utils.vector_to_parameters(new, model.parameters())
    found = vector(phi[name] for name, _ in model.named_parameters())
    torch.testing.assert_close(found, new, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hostile", [0.0, 3.0, 1e4, math.nan, math.inf])
def test_a_safe_reading_is_at_most_ln_2_nats_worse_than_the_better_of_both(hostile):
    """Whatever the text: the losses of both are drawn, one of them may fail in the middle."""
    T = 16
    for seed in range(50):
        losses = np.random.default_rng(seed).exponential(2, (2, 3, 20))
        losses[seed % 2, :, seed % 20 :] += hostile
        found = adapt.mixture(losses, T).sum(-1)
        best = np.nan_to_num(losses, nan=np.inf, posinf=np.inf).sum(-1).min(0)
        assert (found <= best + math.log(2) / T + 1e-9).all() and np.isfinite(found).all()
        likelihoods = np.exp(-T * np.nan_to_num(losses[:, 0, :2], nan=99, posinf=99).sum(-1))
        found = T * adapt.mixture(losses[:, :1, :2], T).sum()
        assert found == pytest.approx(-np.log(likelihoods.mean()), rel=1e-5)


def test_frozen_embeddings_stay_and_the_rest_learns_in_as_many_steps_as_are_asked_for():
    model, options = tiny_gpt(), dict(lr=1e-3, frozen=True, beta2=0.99)
    reader = adapt.Reader({}, model, None)
    once, phi = reader.read("adamw", *task(3, 5, 8), **options, steps=1)
    twice, _ = reader.read("adamw", *task(3, 5, 8), **options, steps=2)
    assert np.array_equal(once[:, 0], twice[:, 0]) and (once[:, 1:] != twice[:, 1:]).all()
    assert twice.shape == (3, 5)
    theta = dict(model.named_parameters())
    assert theta.keys() - phi.keys() == set(adapt.EMBEDDINGS)
    assert not any(torch.equal(phi[name], theta[name]) for name in phi)
    assert all(p.requires_grad for p in model.parameters())


ODD = {
    "one character": "a" * 3000,
    "random bytes": "".join(map(chr, np.random.default_rng(0).integers(1, 128, 3000))),
    "another alphabet": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. " * 60,
    "long": "It was the same text again, and again. " * 600,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_reading_never_blows_up(trained, tmp_path, text):
    """On a text unlike any it is no worse than no learning at all, but for ln 2 nats in all."""
    options = flags(text=write(tmp_path, {"odd.txt": text}) / "odd.txt", max_new_tokens=5)
    table = printed(adapt.main, trained / "maml", *options, "--rules", "none", "safe")
    means = dict(re.findall(r"^(none|safe) +\d (?: +)(\S+)", table, re.M))
    assert float(means["safe"]) < float(means["none"]) + math.log(2) / 2900 + 1e-3


def test_a_text_of_ones_own_is_learned_and_what_was_learned_can_be_kept(trained, tmp_path):
    """Where the terminal cannot show it, too."""
    write(tmp_path, {"数學 🙂.txt": "the quick brown fox jumps over the lazy dog. " * 60})
    notes = flags(text=tmp_path / "数學 🙂.txt", prompt="é", max_new_tokens=20)
    saved, ascii_only = tmp_path / "learned.pt", os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [HERE / "adapt.py", trained / "maml", *notes, f"--save={saved}"]
    first = execute(*command, env=ascii_only).stdout
    assert first.count("own") >= 2 and "before:" in first and "after reading by 'safe'" in first
    assert checkpoint_of(trained / "maml").keys() - torch.load(saved).keys() == {"optimizer"}
    rules = ["--rules", "none", "adamw", "safe"]
    second = printed(adapt.main, saved, *notes, *rules)  # it knows the text now
    before, after = (float(re.search(r"^none +1 +(\S+)", t, re.M)[1]) for t in (first, second))
    assert after < before - 0.5
    assert "adamw is not tuned: adapt a run to tune domains first" in second  # no log beside it
    assert "was learned before" in second and "was learned before" not in first
    with refused(match=r"would overwrite .*: choose another path"):
        adapt.main([str(saved), *notes, f"--save={saved}"])
    rows = plot.read_log(trained / "maml")
    shutil.copy(saved, trained / "maml/learned.pt")
    adapt.main([str(trained / "maml/learned.pt"), *READ_64])  # it is not the run's result
    assert plot.read_log(trained / "maml") == rows


def test_a_text_of_fewer_rows_than_two_chunks_is_learned_all_the_same(trained):
    ckpt, model = run.load_checkpoint(trained / "maml/ckpt.pt")
    ckpt["inner"]["rows"] = 8
    reader = adapt.Reader(ckpt, model, None)
    none, own = (reader.read(rule, *task(1, 8, 16))[0] for rule in ("none", "own"))
    assert np.allclose(none[:, :4].mean(), own[:, :4].mean())
    assert not np.isclose(none[:, 4:].mean(), own[:, 4:].mean())


def test_a_gpt2_learns_a_text_as_it_is_and_then_at_rates_that_it_has_learned(pretrain, tmp_path):
    of_transformers("gpt2").save_pretrained(tmp_path / "gpt2")
    notes = write(tmp_path, {"notes.txt": "to be, or not to be: " * 40}) / "notes.txt"
    how = [*flags(text=notes, max_new_tokens=9), "--rules", "none", "adamw", "dynamic"]
    text = printed(adapt.main, tmp_path / "gpt2", *how)
    means = dict(re.findall(r"^(none|adamw|dynamic) +\d +(\S+)", text, re.M))
    assert float(means["adamw"]) < float(means["none"]) and len(means) == 3
    assert "before:" in text and "after reading by 'dynamic'" in text
    frozen = dict(learning_rate=0, learn_inner_lr="tensor", n_layer=2)
    out = pretrain(init_from=tmp_path / "gpt2", **frozen)
    identical(weights_of(out)[0], run.load_checkpoint(tmp_path / "gpt2")[1].state_dict())
    assert re.search(r"^own +3 ", printed(adapt.main, out, *how, "own"), re.M)


def test_what_is_not_tuned_takes_smaller_steps_in_a_larger_model():
    small, large = (tiny_gpt(n_embd=8 * n, vocab_size=32_000) for n in (1, 16))
    assert adapt.untuned("adamw", small) == adapt.START["adamw"]
    n = sum(p.numel() for p in large.parameters())
    assert adapt.untuned("dynamic", large)["lr"] * n**0.5 == pytest.approx(0.8)
    assert adapt.untuned("adamw", large)["lr"] * n**0.25 == pytest.approx(5e-4 * 1e6**0.25)
    with pytest.raises(ValueError, match="by 'adamw' left parameters that are not finite"):
        learned = {"lm_head.weight": torch.full((2, 2), math.nan)}
        adapt.show_text(None, {}, small, None, learned, "adamw")


def test_what_adapt_cannot_do_is_answered_with_its_remedy(trained, tmp_path):
    foreign = {"model": tiny_gpt().state_dict(), "model_args": vars(tiny_gpt().config)}
    torch.save(foreign, tmp_path / "foreign.pt")
    torch.save(foreign | {"dataset": {"tokenizer": "bytes"}}, tmp_path / "small.pt")
    counting(tmp_path / "tiny")  # in GPT-2's tokens, for the squared gradients of 'dynamic'
    text, plain = dict(text=HERE / "README.md"), trained / "plain"
    for checkpoint, options, remedy in (
        (plain, dict(rules="own"), "no inner loop of its own"),
        (plain, dict(save="x"), "--text"),
        (plain, dict(tokens=1_000_000), "use --tokens"),
        (tmp_path / "small.pt", text, "knows 32 ids"),
        (tmp_path / "foreign.pt", dict(tokens=64), "give a --text to read"),
        (plain, text | dict(rules="dynamic", data_dir=tmp_path), "with the run's tokenizer"),
    ):
        with refused(match=remedy):
            adapt.main([str(checkpoint), *flags(**options)])


# --------------------------------------------------------------------------------------------------
# the systems

RECIPE = dict(plain_steps=2, plain_batch_size=3, plain_tasks_per_step=2, inner_optimizer="normed")
RUNS = [PLAIN, dict(), dict(first_order=False, learn_inner_lr="tensor"), dict(learning_rate=0)]
RUNS += [RECIPE]


@pytest.mark.parametrize("method", RUNS, ids=["plain", "first", "second", "rates", "recipe"])
def test_a_run_stopped_and_resumed_is_bitwise_one_that_was_not(pretrain, at_step, method):
    """And one that was evaluated more often."""
    often = pretrain("often", eval_interval=1, **method)
    cut, expected = often.parent / "cut", log_of(often)
    expected["val"] = [row for row in expected["val"] if row["step"] % 3 == 0]
    for step in (1, 3):  # it ends at step 2, where no evaluation is due, and at 4
        at_step(step, partial(signal.raise_signal, signal.SIGTERM))
        with refused(match="stopped at step .*--init_from=resume goes on"):
            pretrain("cut", init_from="resume", **method)
        assert checkpoint_of(cut)["step"] == step + 1
    for _ in range(2):  # the second time it is done already
        pretrain("cut", init_from="resume", **method)
        identical(weights_of(cut), weights_of(often))
        assert log_of(cut) == expected and not list(cut.glob("*.tmp"))


TWO_GPUS = pytest.mark.skipif(not DRY and torch.cuda.device_count() < 2, reason="needs two GPUs")
ON_GPUS = pytest.param(dict(device=DEVICE), marks=[pytest.mark.gpu, TWO_GPUS])


@pytest.mark.parametrize("method", [PLAIN, RECIPE, ON_GPUS], ids=["plain", "recipe", "gpus"])
def test_two_processes_do_what_one_does(pretrain, data_dir, tmp_path, method):
    alone, pair = pretrain("alone", **method), tmp_path / "pair"
    options = flags(**QUICK | dict(data_dir=data_dir, out_dir=pair) | method)
    execute(*TORCHRUN, HERE / "train.py", *options)
    torch.testing.assert_close(log_of(pair), log_of(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights_of(pair), weights_of(alone), rtol=1e-3, atol=1e-5)


def test_plain_steps_first_are_those_of_the_baseline_bit_for_bit(pretrain):
    """What follows goes on from there, with rates that have not moved before."""
    plain = PLAIN | dict(batch_size=3, tasks_per_step=2, seed=3)
    base = pretrain("base", **plain, max_steps=4)
    both = pretrain("both", **RECIPE | dict(plain_steps=4, max_steps=4, seed=3))
    identical(checkpoint_of(both)["model"], checkpoint_of(base)["model"])
    recipe = pretrain("recipe", **RECIPE | dict(plain_steps=4, max_steps=8, seed=3))
    assert log_of(recipe)["train"][0]["loss"] == log_of(base)["train"][0]["loss"]
    val = {row["step"]: row for row in log_of(recipe)["val"]}
    assert {step for step in val if val[step]["online"]} == {6, 8} == val.keys() - {0, 3}
    assert val[3]["rates_moved"] == 0 < 0.1 < val[8]["rates_moved"]
    assert checkpoint_of(recipe)["tokens"] == 4 * 2 * 3 * 16 + 4 * 4 * 4 * 16


def test_ranks_that_begin_at_different_steps_refuse_to_start(pretrain, data_dir, tmp_path):
    """As file systems that lag may have it: each rank sees an out_dir of its own."""
    pretrain("1", max_steps=3)
    options = " ".join(flags(data_dir=data_dir, init_from="resume", **QUICK))
    command = f"{sys.executable} {HERE}/train.py {options} --out_dir=$RANK"
    done = execute(*TORCHRUN, "--no-python", "sh", "-c", command, cwd=tmp_path, fails=True)
    assert "begin at different steps" in done.stderr
    assert not (tmp_path / "0").exists()  # and nothing was touched


def test_what_is_printed_before_and_after_learning_is_of_the_same_rows():
    """'loss' and 'online' of a learner whose rates are next to nothing are the same number."""
    learner, val = MAML(tiny_gpt(), 1, 1e-12), {"a": task(2, 4, 8), "b": task(1, 3, 8)}
    found = train.evaluate(learner, val, ["a", "b"], rows=2)
    rows = {domain: (x.flatten(0, 1), y.flatten(0, 1)) for domain, (x, y) in val.items()}
    losses = {domain: learner.model(*xy)[1].item() for domain, xy in rows.items()}
    assert found["loss"] == pytest.approx(losses) == found["online"]


def test_rates_learned_alone_leave_theta_bitwise_stay_bounded_and_fill_elements(pretrain):
    base = pretrain("base", **PLAIN)
    alone = dict(init_from=base / "ckpt.pt", learning_rate=0, inner_lr_lr=1e6)
    for nesterov in (True, False):
        tensor = pretrain(f"{nesterov}", nesterov=nesterov, learn_inner_lr="tensor", **alone)
        identical(checkpoint_of(tensor)["model"], checkpoint_of(base)["model"])
        rates = checkpoint_of(tensor)["learner"]["log_inner_lr"]
        torch.testing.assert_close(rates.exp().unique(), torch.tensor([0.02 / 150, 0.02 * 150]))
    element = pretrain("element", init_from=tensor / "ckpt.pt", max_steps=0)
    sizes = [p.numel() for p in run.load_checkpoint(element / "ckpt.pt")[1].parameters()]
    filled = rates.repeat_interleave(torch.tensor(sizes))
    identical(checkpoint_of(element)["learner"]["log_inner_lr"], filled)
    with refused(match="set learn_inner_lr=element"):
        pretrain("back", init_from=element / "ckpt.pt", learn_inner_lr="tensor")


def test_what_begins_from_a_checkpoint_has_its_shape_and_counts_what_it_cost(pretrain):
    base = pretrain("base", n_layer=2, n_embd=32, **PLAIN)
    given = dict.fromkeys(TINY) | dict(init_from=base / "ckpt.pt")  # no shape
    with refused(match="the checkpoint has .'n_layer': 2.: leave"):
        pretrain("more", **given | dict(n_layer=1))
    out = pretrain("more", **given)
    header, first, *_ = plot.read_log(out)
    shape, cost = [header["config"][name] for name in TINY], checkpoint_of(base)
    assert shape == [16, 2, 2, 32]
    assert all(first[unit] == cost[unit] > 0 for unit in ("tokens", "flops", "seconds"))
    # the same command goes on after a stop; before its first checkpoint it begins as it did
    config = write(out.parent, {"c.py": f"init_from = {str(base / 'ckpt.pt')!r}"}) / "c.py"
    how = flags(**QUICK | given | dict(init_from=None, data_dir=header["config"]["data_dir"]))
    train.main([str(config), *how, f"--out_dir={out.parent}/again", "--init_from=resume"])
    identical(weights_of(out.parent / "again"), weights_of(out))
    pretrain("more", **given | dict(init_from="resume", max_steps=8))
    assert checkpoint_of(out)["step"] == 8 and checkpoint_of(out)["tokens"] == (6 + 8) * 4 * 4 * 16


def test_a_nanogpt_checkpoint_is_taken_over_if_its_vocabulary_is_the_dataset_s(pretrain, tmp_path):
    """Compiled, with masks as older ones have them, and without a word on biases."""
    args = dict(vocab_size=320, bias=True, **TINY)
    model = GPT(GPTConfig(**args)).state_dict()
    weights = {f"_orig_mod.{n}": p for n, p in model.items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    said = {k: v for k, v in args.items() if k != "bias"} | {"dropout": 0.0}
    torch.save({"model": weights, "iter_num": 7, "model_args": said}, tmp_path / "nano.pt")
    out = pretrain(init_from=tmp_path / "nano.pt", max_steps=0)
    identical(checkpoint_of(out)["model"], model)
    cropped = pretrain("cropped", init_from=tmp_path / "nano.pt", max_steps=0, block_size=8)
    positions = checkpoint_of(cropped)["model"]["transformer.wpe.weight"]
    identical(positions, model["transformer.wpe.weight"][:8])
    for vocab_size, remedy in ((50304, "has other tokens"), (65, "has 65 ids, which no tokenizer")):
        args |= dict(vocab_size=vocab_size)
        foreign = {"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args}
        torch.save(foreign, tmp_path / "foreign.pt")
        with refused(match=remedy):
            pretrain("foreign", init_from=tmp_path / "foreign.pt")


def test_nesterov_is_adamw_that_looks_ahead():
    learner, moved = MAML(tiny_gpt(), 0), []
    backward(learner, *task())
    for nesterov in (False, True):  # two steps down one gradient
        cfg, theta = train.Config(nesterov=nesterov, weight_decay=0.0), learner.vectors()[0]
        optimizer = train.make_optimizer(cfg, learner)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        moved.append(learner.vectors()[0] - theta)
    torch.testing.assert_close(moved[1], moved[0] * (1 + 0.9 / 1.9), rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------------------------------
# the edges: what is wrong, and what to do, in one line


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
MISTAKES = [
    (dict(inner_stepz=1), "did you mean --inner_steps?"),
    (dict(max_steps="many"), "--max_steps=many: it must be of type int"),
    (dict(bias=1), "--bias=1: it must be True or False"),
    (dict(objective="evry"), "choose 'every' or 'final'"),
    (dict(learn_inner_lr="all"), "choose 'no' or 'tensor' or 'element'"),
    (dict(dtype="float16"), "no 'float16': choose 'float32' or 'bfloat16'"),
    (dict(tasks="books"), "tasks='books' is none of mixed, domain, passage"),
    (dict(batch_size=5), "batch_size=5 must be a multiple of K + 1 = 2"),
    (dict(dataset="nowhere"), "run python prepare_data.py nowhere, or PATH --name nowhere"),
    (dict(block_size=100_000), "lower block_size"),
    (dict(n_head=3), "must be a multiple of n_head"),
    (dict(init_from="elsewhere.pt"), "no checkpoint at elsewhere.pt"),
    *(({key: -1}, f"{key}=-1") for key in ("inner_steps", "max_steps", "seed", "grad_clip")),
    (dict(eval_rows=0), "eval_rows=0 must be finite and at least 1"),
    (dict(learning_rate="inf"), "learning_rate=inf must be"),
    (dict(learning_rate=0, learn_inner_lr="no"), "leaves only rates to learn"),
    (dict(learning_rate=0, inner_steps=0), "leaves only rates to learn"),
    (dict(max_steps=2), "holds a run: --init_from=resume goes on"),
    (dict(resume=True, max_steps=0), "set max_steps to that"),
    (dict(resume=True, n_embd=32), "'n_embd': 16"),
    (dict(resume=True, learn_inner_lr="no"), "learn_inner_lr=element"),
    (dict(resume=True, inner_steps=3), "inner_steps=1"),
    (dict(resume=True, inner_optimizer="adamw"), "inner_optimizer=sgd"),
    (dict(resume=True, nesterov=True), "nesterov=False"),
    (dict(resume=True, plain_steps=1), "plain_steps=0 (now 1)"),
    (dict(resume=True, inner_lr=0.5), "has {'inner_lr': 0.02}: leave these fields out"),
    (dict(resume=True, learning_rate=0), "theta learns=True (now False)"),
    (dict(learning_rate=0, plain_steps=2), "and no plain_steps"),
    (dict(eval_rows=2), "eval_rows=2 must exceed the 2 rows of a chunk"),
    (dict(plain_steps=9), "max_steps=6 must include plain_steps"),
    (dict(device="cuda:77"), "no device 'cuda:77' here"),
    pytest.param(dict(device="cuda"), "): try --device=auto", marks=NO_GPU),
]


@pytest.mark.parametrize("wrong, remedy", MISTAKES, ids=lambda given: str(given)[:40])
def test_a_mistake_is_answered_with_its_remedy_and_harms_no_run(pretrain, wrong, remedy):
    out = pretrain(max_steps=1)
    before = log_of(out), weights_of(out)
    with refused(match=re.escape(remedy)):
        pretrain(**wrong)
    identical((log_of(out), weights_of(out)), before)


@pytest.mark.parametrize("gone", ["log.jsonl", "ckpt.pt"])
def test_what_is_left_of_a_run_or_written_by_another_process_is_not_replaced(pretrain, gone):
    out = pretrain(max_steps=1)
    adapt.main([str(out), *READ_64])
    (out / gone).rename(out.parent / gone)
    kept = {path: path.read_bytes() for path in out.iterdir()}
    with refused(match="holds a run"):
        pretrain(max_steps=1)
    with tasks.lock(out), refused(match="another process writes to"):
        pretrain(max_steps=1, init_from="resume")
    assert kept == {path: path.read_bytes() for path in out.iterdir() if path.suffix != ".lock"}
    pretrain(max_steps=1, init_from="resume")  # without ckpt.pt it begins again
    assert len(log_of(out)["adapt"]) == 0  # and what another model read is not its own


@pytest.mark.parametrize("method", [dict(tasks_per_step=3), RECIPE | dict(plain_tasks_per_step=1)])
def test_processes_that_do_not_divide_the_tasks_refuse_to_start(pretrain, monkeypatch, method):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(match=r"2 processes cannot share \[.*\] tasks a step out"):
        pretrain(**method)


def test_config_files_are_checked_like_flags_and_help_names_every_field(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("import math\n_half = 0.5\nlearning_rate = 1\ninner_lr = _half * math.pi\n")
    options = read_flags([str(config), "--out_dir=3", "--bias=True"])
    assert options == dict(learning_rate=1.0, inner_lr=math.pi / 2, out_dir="3", bias=True)
    config.write_text("leraning_rate = 1")
    with refused(match="did you mean --learning_rate"):
        train.main([str(config)])
    with refused(match="no config file 2; flags are written --key=value"):
        train.main(["--seed", "2"])
    with refused():
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in vars(train.Config()))


@pytest.mark.parametrize("path", sorted((HERE / "config").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_one_that_the_readme_can_name(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 25 and f"train.py config/{path.name}" in lines[0]
    assert read_flags([str(path)])["out_dir"] == f"out/{path.stem}"


def test_a_checkpoint_that_is_foreign_or_cut_short_is_refused_and_no_code_in_one_runs(pretrain):
    path = pretrain(max_steps=1) / "ckpt.pt"
    ckpt = checkpoint_of(path.parent)
    foreign = {"model": ckpt["model"], "model_args": ckpt["model_args"], "config": {}}
    for content, remedy in (
        (foreign, "no run of train.py: give its ckpt.pt as --init_from"),
        ({k: v for k, v in ckpt.items() if k != "optimizer"}, "no run of train.py"),
        (ckpt | {"dataset": {"tokenizer": "gpt2"}}, "has other tokens than the checkpoint"),
        (ckpt | {"model": Path()}, "no checkpoint of a GPT .UnpicklingError"),  # no plain data
    ):
        torch.save(content, path)
        with refused(match=remedy):
            pretrain(init_from="resume")
    path.write_bytes(path.read_bytes()[:-1000])
    with refused(match=r"ckpt\.pt is cut short"):
        pretrain(init_from="resume")


def test_new_roles_stop_only_a_run_they_concern_and_unsee_nothing(pretrain, data_dir, tmp_path):
    data = shutil.copytree(data_dir, tmp_path / "data")
    give_roles = partial(prepare_in, data, data / "text", name="tiny")
    out = pretrain(data_dir=data, max_steps=3)
    give_roles("--heldout", "tune", "--tune", "far")
    pretrain(data_dir=data, init_from="resume")
    assert checkpoint_of(out)["step"] == 6
    give_roles("--heldout", "tune,far,alpha", "--tune", "")
    with refused(match="was trained with data="):
        pretrain(data_dir=data, init_from="resume", max_steps=9)
    more = pretrain("more", data_dir=data, init_from=out / "ckpt.pt")  # goes on without alpha
    for seen_alpha in (out, more):
        text = printed(adapt.main, seen_alpha, *READ_64, "--rules", "none", "adamw", "dynamic")
        assert "tune: " in text and "alpha" not in text
        # what no tune domain chose is not logged
        assert {row["rule"] for row in log_of(seen_alpha)["adapt"]} == {"none"}
    give_roles("--heldout", "", "--tune", "")
    with refused(match="no unseen domain"):
        adapt.main([str(pretrain("all", data_dir=data))])


def test_a_run_goes_on_as_it_is_asked_for_and_one_without_a_checkpoint_begins_again(pretrain):
    out = pretrain(max_steps=3)
    log = log_of(out)
    pretrain(init_from="resume", learning_rate=0.5, warmup_steps=0, batch_size=8)
    assert checkpoint_of(out)["optimizer"]["param_groups"][0]["peak_lr"] == 0.5
    assert checkpoint_of(out)["tokens"] == 3 * 4 * 4 * 16 + 3 * 4 * 8 * 16
    headers = [row["config"] for row in plot.read_log(out) if row["kind"] == "run"]
    assert [config["learning_rate"] for config in headers] == [0.5, 1e-3]
    (out / "ckpt.pt").unlink()  # as if it was killed before its first one
    assert log_of(pretrain(max_steps=3, init_from="resume")) == log


def test_the_seconds_of_a_log_leave_compilation_out(pretrain, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    last = plot.read_log(pretrain(compile=True, max_steps=1))[-1]
    assert last["compile_seconds"] > 0 == last["seconds"]


def test_what_is_not_finite_stops_the_run_and_leaves_the_checkpoint_whole(pretrain, tmp_path):
    wild = dict(learning_rate=1e25, warmup_steps=0, **PLAIN)
    for interval, at in ((6, "in training"), (1, "in an evaluation")):
        with refused(match="step 1: a loss or gradient is not finite"):
            pretrain(at, eval_interval=interval, **wild)
        ckpt = checkpoint_of(tmp_path / at)
        assert ckpt["step"] == 0 and all(torch.isfinite(w).all() for w in ckpt["model"].values())
    with refused(match="step 0: .* is not finite"):  # the outer loss, before any step
        pretrain("own", inner_lr=1e25, learn_inner_lr="no")
    watched = pretrain("watched", inner_lr=1e25, learn_inner_lr="no", max_steps=0)
    assert math.isnan(log_of(watched)["val"][0]["online"]["far"])  # which stops no run


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
    assert [row["kind"] for row in plot.read_log(out)] == ["run", "val"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("name", ["log.jsonl", "ckpt.pt"])
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(pretrain, at_step, tmp_path, name):
    out = tmp_path / "run"
    path = out / (name if name == "log.jsonl" else f"{name}.{os.getpid()}.tmp")
    at_step(0, lambda: (path.unlink(missing_ok=True), path.symlink_to("/dev/full")))
    with refused(match="No space left"):
        pretrain()
    assert checkpoint_of(out)["step"] == 0 and not list(out.glob("*.tmp"))


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


def texts_of(dataset, domain) -> list[str]:
    return [*itertools.chain(*documents_of(dataset, domain))]


@pytest.mark.parametrize("name, most, most_val", [("bytes", 0, 10**7), ("pairs", 20_000, 1000)])
def test_documents_stay_whole_and_val_is_the_last_share(prepare, monkeypatch, name, most, most_val):
    """Odd texts, longer and longer, none of 2,000 tokens; --max_tokens cuts none of them either."""
    ranks = {bytes([i]): i for i in range(256)} | {b"aa": 256, "数".encode()[:2]: 257}
    options = dict(mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    pairs = prepare_data.tiktoken.Encoding("pairs", pat_str=r"\s+|\S+", **options)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", {"pairs": pairs}.get)
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 5000)
    monkeypatch.setattr(prepare_data, "VAL_TOKENS", most_val)
    odd = "{}: <|endoftext|>\x00 日本語 🙂 " + "a" * 99
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
    monkeypatch.setattr("text.MAX_PIECE", 100)
    lines, signs = "".join(f"line {i}\n" for i in range(200)), "數學" * 50
    made = prepare({"lines.txt": lines, "signs.txt": signs})
    train, val = documents_of(made, "lines")
    assert "".join(train + val) == lines and len(train + val) > 9
    assert all(len(part) <= 100 and part.endswith("\n") for part in train + val)
    [train], [val] = documents_of(made, "signs")  # one document still gives both splits
    assert train + val == signs and 0.05 < len(val) / len(train) < 0.2
    assert domains_of(made)["signs"]["documents"] == {"train": 1, "val": 1}
    texts, encoding = ["", signs + lines, "short"], prepare_data.get_tokenizer("bytes")
    spy = Mock(wraps=encoding.encode_ordinary_batch)
    monkeypatch.setattr(encoding, "encode_ordinary_batch", spy)
    assert [encoding.decode(ids) for ids in prepare_data.encode(texts, encoding)] == texts
    assert max(map(len, spy.call_args[0][0])) == 100  # tiktoken overflows at a million blanks


def test_roles_stay_until_it_is_said_otherwise_and_change_no_shard(prepare):
    files = {f"{d}.txt": f"{d} " * 99 for d in "abc"}  # written anew each time, with the same text
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
    b = "<|endoftext|>\ndocument 1<|endoftext|>\n<|endoftext|>\nown\n"
    b += "<|endoftext|>\nother\n<|endoftext|>\nown\n"
    c = gzip.compress(records(["own\n", "newer", "new"]).encode())
    made = prepare({"a.jsonl": a, "b.txt": b, "c.jsonl.gz": c, "d.jsonl": ""})
    found = {d: (e["skipped"], sum(e["documents"].values())) for d, e in domains_of(made).items()}
    assert found.pop("a") == ({"duplicate": 10, "malformed": 3}, 30)
    assert found.pop("b") == ({"duplicate": 1}, 3)
    assert found == {"c": ({"duplicate": 1}, 2)}  # d is empty


def test_a_user_s_mistake_names_the_remedy(prepare, tmp_path, monkeypatch):
    made = prepare({f"{d}.txt": f"{d} " * 99 for d in "abc"}, name="made")
    wide = SimpleNamespace(n_vocab=100277)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", lambda name: wide)
    array = json.dumps([{"text": "a"}], indent=1)
    odd = {"latin.txt": "é".encode("latin-1"), "nul.txt": "a" * 9**6 + "\0"}
    odd |= {"array.jsonl": array, "array.json": array, "fields.jsonl": '{"body": "a"}\n' * 2}
    odd |= {"cut.jsonl.gz": gzip.compress(records(["text"]).encode())[:-9]}
    odd |= {"local/uspto.txt": "other", "empty/.git/a.txt": "any", "empty/a.png": "any"}
    write(tmp_path, odd)
    for source, option, name, remedy in (
        ("text", "--heldout=d", "made", "no domain 'd': choose from a, b, c"),
        ("text", "--heldout=a,b,c", "made", "name fewer"),
        ("text", "--max_mb=nan", "new", "must be 0 or more"),
        ("text", "--max_tokens=-1", "new", "must be 0 or more"),
        ("text", "--domain_field=set", "new", "--domain_field needs --hf"),
        ("text", "--heldout=d", "new", "no domain 'd'"),  # before any work
        ("text", "--tune=", "../out", r"'../out' cannot be a folder's: use '_out'"),
        ("absent", "--tune=", "new", r"there is no .*absent: give local"),
        ("text", "--tokenizer=cl100k_base", "wide", "uint16: use gpt2 or bytes"),
        ("text", "--max_tokens=500", "made", "--overwrite, or another --name"),
        ("local", "--tune=", "made", "--overwrite, or another --name"),
        ("text", "--tune=", "text", "something else: choose another --name"),
        ("empty", "--tune=", "new", "no text in .*empty: give local, common_pile, or text"),
        ("cut.jsonl.gz", "--tune=", "cut", r"cannot read .*cut\.jsonl\.gz: .* ended before"),
        ("fields.jsonl", "--tune=", "cut", r"fields.jsonl: none of 2 records has text, .*body"),
        ("array.jsonl", "--tune=", "cut", r"array.jsonl: none of 5 records has text, .*'\["),
        ("latin.txt", "--tune=", "cut", r"latin.txt: not utf-8, .*: convert it.*iconv"),
        ("nul.txt", "--tune=", "cut", r"nul.txt: it has NULs"),
        ("array.json", "--tune=", "cut", r"no text in .*array.json: .* with a record a line"),
    ):
        with refused(match=remedy):
            prepare(tmp_path / source, option, name=name)
    assert {entry["role"] for entry in domains_of(made).values()} == {"train"}
    assert not (tmp_path / "new").exists() and not (tmp_path / "text/.lock").exists()
    prepare(tmp_path / "local", name="x")  # whose domain is not held out by its name


def killed(n, *command) -> bool:
    """Whether it is killed, in a process of its own, as it uses files of the dataset 'parts'."""
    uses = itertools.count(1)

    def kill(event, arguments):
        uses_file = event in ("open", "os.rename", "os.remove", "os.mkdir")
        if uses_file and "/parts" in str(arguments[0]) and next(uses) == n:
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
    """A domain takes 113 uses of files, the last 20 for its shards: where each run is killed."""
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 5000)
    files = {f"{d}/{i}.md": f"{d} {i} " + "é数 \n" * i for d in "abcdefgh" for i in range(90)}
    whole = prepare(files | {f"{d}/copy.md": "in three domains" for d in "ace"}, name="whole")
    parts = prepare(write(tmp_path, {"z.txt": "to overwrite"}) / "z.txt", name="parts")
    command, kills = [tmp_path / "text", "--name=parts", f"--data_dir={tmp_path}"], 0
    assert killed(180, *command, "--overwrite")
    while killed(220 + 3 * kills, *command):
        kills += 1
        assert kills < 9, "it does not go on but starts anew"
        assert all(len(tasks.open_shard(path)) for path in parts.rglob("*.bin"))
    read = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in (parts, whole)]
    assert read[0] == read[1] and len(read[0]) > 20 and kills > 4
    assert domains_of(whole)["c"]["skipped"] == {"duplicate": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_any_unicode_with_any_line_ends_is_the_same_text(prepare, monkeypatch, encoding):
    monkeypatch.setattr("text.MAX_PIECE", 500)
    lines = "".join(f"строка {i} 数 🙂\n" for i in range(400))
    for ends in ("\n", "\r\n", "\r"):
        text = lines.replace("\n", ends)
        rows = "".join(json.dumps({"text": t}, ensure_ascii=False) + ends for t in (text, text[9:]))
        files = {"text.txt": text, "a.JSONL": rows, "b/rows.Jsonl.gz": rows.replace("стр", "о")}
        files = {path: content.encode(encoding) for path, content in files.items()}
        files["b/rows.Jsonl.gz"] = gzip.compress(files["b/rows.Jsonl.gz"])
        made = prepare(files, "--overwrite")
        assert "".join(texts_of(made, "text")) == read_text(made.parent / "text/text.txt") == lines
        assert texts_of(made, "a") == [lines, lines[9:]] and len(texts_of(made, "b")) == 2


def test_names_never_merge_domains_nor_leave_the_folder_of_the_dataset(prepare, tmp_path):
    names = ["News", "news", "a,b", "a_b", "a\nb", "con", "meta.json"]
    names += ["🙂", "é", "e\u0301", "é" * 99]
    made = prepare({f"{name}/text": f"text of {name}" for name in names} | {"x/y.txt": "text"})
    domains = domains_of(made)
    assert len(domains) == len(names) + 1 == len({d.casefold() for d in domains})
    assert {"News", "news_2", "con_", "meta.json_", "🙂", "é"} < domains.keys()
    assert all("," not in d and len(d.encode()) < 120 for d in domains)
    prepare_data.main([str(tmp_path / "text/x/../x"), "--data_dir", str(tmp_path / "data")])
    write(tmp_path, {".corpus/a.txt": "text", "b[1]/a.txt": "more"})
    for source, name in ((".corpus", "corpus"), ("b[1]", "b_1_")):
        prepare_data.main([str(tmp_path / source), "--data_dir", str(tmp_path / "data")])
        assert domains_of(tmp_path / "data" / name).keys() == {"a"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"x", "corpus", "b_1_"}


def test_what_is_not_read_is_named(prepare, tmp_path, capsys):
    texts = {"a/a.txt": "text", "a/.hidden": "x", "a/a.json": "[]", "c.csv": "x", "e/f.md": ""}
    data = {"a/b.PNG": b"\x89PNG\0", "a/d.TXT.gz": gzip.compress(b"zipped")}
    source = write(tmp_path / "source", texts | data)
    write(tmp_path / "elsewhere", {"deep/1.md": "of elsewhere"})
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "linked/deep/loop").symlink_to(source)
    (source / "a/broken").symlink_to("nowhere")
    made = prepare(source)
    texts = {d: "".join(texts_of(made, d)) for d in domains_of(made)}
    assert texts == {"a": "textzipped", "linked": "of elsewhere"}
    printed = capsys.readouterr().out
    assert "ignored 6" in printed and "e is left out" in printed
    for name in (".hidden", "a.json", "b.PNG", "c.csv", "loop", "broken"):
        assert name in printed


def test_a_folder_or_file_that_cannot_be_read_stops_it(prepare, tmp_path, monkeypatch):
    source, listed = write(tmp_path / "s", {"a/a.txt": "text", "b/b.txt": "text"}), Path.iterdir

    def iterdir(folder):
        if folder.name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with refused(match="Permission denied: .*/b'"):
        prepare(source)


def test_two_processes_never_write_to_one_dataset(prepare):
    made = prepare({"a.txt": "some text"})
    with tasks.lock(made), refused(match="another process writes to .*set: wait"):
        prepare(made.parent / "text", "--overwrite")
    assert tasks.open_shard(made / "a/train_000000.bin").size


def test_text_that_has_changed_is_not_called_ready(prepare, tmp_path):
    source = write(tmp_path / "s", {"a.txt": "some text", "b.txt": "b" * 99})
    prepare(source)
    times = (source / "a.txt").stat()
    write(source, {"a.txt": "same size"})
    os.utime(source / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    with refused(match="the text of 'a' has changed since: --overwrite"):
        prepare(source)
    made = prepare(source, "--overwrite")
    assert "".join(texts_of(made, "a")) == "same size"
    write(source, {"c.txt": "new"})
    with refused(match="the text of 'c' has changed since"):
        prepare(source)
    for lost, remedy in (("b/val_000000.bin", "missing"), ("meta.json", "broken")):
        write(made, {"meta.json": "{"}) if lost == "meta.json" else (made / lost).unlink()
        (source / "c.txt").unlink(missing_ok=True)
        with refused(match=f"{lost} is {remedy}.*--overwrite"):
            prepare(source)


def test_a_full_disk_stops_it_in_one_line_and_keeps_what_is_done(prepare, tmp_path):
    texts = {"a.txt": "a" * 99, "b.txt": "b" * 99_999, "c.txt": b"\xe9 latin"}
    source = write(tmp_path / "s", texts)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with refused(match="stopped by .*: the same command goes on"):
            prepare(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    made = tmp_path / "set"
    found = [str(path.relative_to(made)) for path in sorted(made.rglob("[!.]*.*"))]
    assert found == ["a/train_000000.bin", "a/val_000000.bin", "progress.json"]
    time = (made / "a/train_000000.bin").stat().st_mtime_ns
    with refused(match="not utf-8"):
        prepare(source)
    write(source, {"c.txt": "mended"})
    assert domains_of(prepare(source)).keys() == {"a", "b", "c"}
    assert (made / "a/train_000000.bin").stat().st_mtime_ns == time


def test_one_dataset_of_many_domains_streams_through_datasets(prepare, tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"row {i} " * 9, "in": {"set": "b" if i % 3 else "a/x"}} for i in range(300)]
    write(tmp_path, {"rows/0.jsonl": jsonl(rows)})
    hub = ["local", "--hf", f"{tmp_path}/rows/", "--tokenizer=bytes"]
    made = prepare(*hub, "--domain_field=in.set", "--heldout=a_x", "--max_tokens=8000")
    train, val = documents_of(made, "a_x")
    assert train + val == [row["text"] for row in rows[::3]]
    train, val = documents_of(made, "b")
    assert train + val == [row["text"] for i, row in enumerate(rows) if i % 3][: len(train + val)]
    assert 8000 <= sum(domains_of(made)["b"]["tokens"].values()) < 8100
    assert domains_of(made)["a_x"]["role"] == "heldout"
    assert sum(domains_of(prepare(*hub, name="whole"))["rows"]["documents"].values()) == 300
    with refused(match=r"none of 300 records has text and in\.sett, as .*'set'"):
        prepare(*hub, "--domain_field=in.sett", name="typo")
    rows = [{"text": f"text {i}", "a.b": [3, True, None, "c"][i % 4]} for i in range(400)]
    write(tmp_path, {"rows/0.jsonl": jsonl(rows)})
    with refused(match="has changed since"):
        prepare(*hub, name="whole")
    wide = write(tmp_path / "wide", {"0.jsonl": jsonl(rows[::4])})
    domains = domains_of(prepare(*hub[:2], str(wide), hub[3], "--domain_field=a.b", name="ints"))
    assert domains.keys() == {"3"}


def test_a_parquet_file_is_read_by_its_name_alone(prepare, tmp_path):
    pyarrow, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
    (tmp_path / "text").mkdir()
    for name in ("train1", "train[1]"):
        table = {"text": [f"text of {name}", None], "more": [{"text": ["nested"]}] * 2}
        parquet.write_table(pyarrow.table(table), tmp_path / f"text/{name}.parquet")
    made = prepare(tmp_path / "text")
    for name in ("train1", "train[1]"):
        assert "".join(texts_of(made, name)) == f"text of {name}"
        assert domains_of(made)[name]["skipped"] == {"malformed": 1}


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
# GPUs: what can be known without one

FIRST = dict(inner_steps=3, first_order=True, learn_inner_lr="element", inner_optimizer="normed")
SECOND = dict(inner_steps=1, learn_inner_lr="tensor")
METHODS = {"plain": dict(inner_steps=0), "first": FIRST, "second": SECOND}
GRAPHS = {"plain": 1, "first": 1, "second": 3}  # of second order: gradient, its graph, last loss


@pytest.fixture
def compiled(monkeypatch):
    """What torch.compile is given is traced and counted, and needs no compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("method", METHODS)
def test_what_is_compiled_agrees_and_is_compiled_once(compiled, method):
    model = tiny_gpt(**TINY).float()
    learner, eager = (MAML(model, compile=c, **METHODS[method]) for c in (True, False))
    optimizer = train.make_optimizer(train.Config(), learner)
    torch.testing.assert_close(backward(learner, *task(8, 16)), backward(eager, *task(8, 16)))
    # the second domain's val split is too small for four rows
    val = {"a": task(2, 4, 16), "b": task(1, 3, 16)}
    for step in range(4):
        train.evaluate(learner, val, ["a", "b"], 2)
        backward(learner, *task(8, 16, seed=step))
        optimizer.step()
    assert compiled.frame_count == GRAPHS[method]


@pytest.mark.parametrize("method", METHODS)
def test_ddp_changes_nothing_of_what_is_compiled_in_bfloat16(compiled, tmp_path, method):
    model, (x, y) = tiny_gpt(**TINY).float(), task(8, 16)
    learner = MAML(model, compile=True, autocast=torch.bfloat16, **METHODS[method])
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

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive |= {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return out


def height(config: str, **changes) -> int:
    """Bytes of an outer step of a config, counted on tensors without content."""
    given = read_flags([f"{HERE}/config/{config}.py"]) | dict(compile=False)
    cfg = train.Config(**given | changes)
    K, rows = min(cfg.inner_steps, 2), cfg.batch_size // (cfg.inner_steps + 1)
    with FakeTensorMode(), Height() as counted:  # K = 2: a third chunk is like those that follow
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


# --------------------------------------------------------------------------------------------------
# make gpu-check, which stops at the first that fails; DRY_RUN=1 runs it tiny, on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["first", "second"])
def test_a_gradient_on_the_gpu_is_that_of_float64_on_the_cpu(method):
    torch.set_float32_matmul_precision("highest")
    model, (x, y) = tiny_gpt(**TINY), task(8, 16)
    exact, _ = meta_grad(MAML(model, **METHODS[method]), x, y)
    learner = MAML(model.float(), compile=not DRY, **METHODS[method]).to(DEVICE)
    found, _ = backward(learner, x.to(DEVICE), y.to(DEVICE))
    assert distance({n: g.cpu() for n, g in found.items()}, exact) < 1e-4


@pytest.mark.gpu
def test_asked_to_stop_a_run_saves_and_goes_on_from_there(pretrain, at_step):
    at_step(2, partial(signal.raise_signal, signal.SIGTERM))
    with refused(match="stopped at step 3"):
        pretrain(device=DEVICE)
    assert checkpoint_of(pretrain(device=DEVICE, init_from="resume"))["step"] == 6


@pytest.mark.gpu
@pytest.mark.parametrize("config, share", [("baseline_124m", 4), ("maml_124m", 1)])
def test_20_steps_compile_nothing_late_and_multiply_in_bfloat16(tmp_path, at_step, config, share):
    """Of a 124M config, with as many tasks a step as one card of eight has."""
    T, vocab = (16, 300) if DRY else (1024, 50257)
    counting(tmp_path / "ids", 160 * T + 1, vocab)
    graphs, early = torch._dynamo.utils.counters["stats"], []
    profile = torch.profiler.profile(record_shapes=True)
    torch._dynamo.reset()
    at_step(2, lambda: (early.append(graphs["unique_graphs"]), profile.start()))
    at_step(3, profile.stop)
    given = dict(data_dir=tmp_path, dataset="ids", out_dir=tmp_path / "run", device=DEVICE)
    given |= dict(tasks_per_step=share, max_steps=20, eval_interval=10)
    tiny = TINY | dict(eval_rows=4, compile=False) if DRY else {}
    train.main([f"{HERE}/config/{config}.py", *flags(**given | tiny)])
    assert early == [graphs["unique_graphs"]]
    events = profile.profiler.kineto_results.events()
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    assert {e.dtypes()[0] for e in events if e.name() in products} == {"c10::BFloat16"}
    fused = r"aten::_scaled_dot_product_(flash|efficient|cudnn)_attention"
    assert any(re.match(fused, e.name()) for e in events)
    at = [row for row in plot.read_log(tmp_path / "run") if row["kind"] == "val"]
    flops, tokens, seconds = (at[2][k] - at[1][k] for k in ("flops", "tokens", "seconds"))
    print(f"\n{config}: {tokens / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s")


# --------------------------------------------------------------------------------------------------
# plot.py: what is told is what the logs say


TUNE = ("t", "podcasts", "math_latex", "changelogs")


def log(adapt=(), seed=1, tokens=9, at=(0, 9), domains="tz", **changes) -> list[dict]:
    """Rows of two evaluations, and what adapt.py read, [(rule, losses of 16-token rows)]."""
    roles = {"a": "train"} | {d: "tune" if d in TUNE else "heldout" for d in domains}
    data = dict(name="toy", tokenizer=changes.pop("tokenizer", "bytes"), roles=roles)
    rows = [dict(kind="run", config=dict(seed=seed), dataset=data)]
    for step, loss in zip(at, (5.0, *[3.0] * len(at)), strict=False):
        losses = {"a": 0.0, **dict.fromkeys(domains, loss)}
        rows.append(dict(kind="val", step=step, tokens=step, flops=0.0, loss=losses, online={}))
    for (rule, losses), domain in itertools.product(adapt, domains):
        row = dict(kind="adapt", dataset="toy", domain=domain, role=roles[domain], rule=rule)
        row |= dict(step=at[-1], tokens=tokens, row_tokens=16, flops=tokens * 6e6, options={})
        row |= dict(by_passage=[min(losses), max(losses)], passages=2, sha256="0a", model="1b")
        row |= dict(forwards={"none": 1, "own": 3}.get(rule, 12))
        rows.append(row | dict(loss=[loss + 5 * (domain in TUNE) for loss in losses]) | changes)
    return rows


@pytest.fixture
def told(tmp_path):
    """told(name=rows, ...): what plot.py prints of runs with such logs."""

    def told(**logs) -> str:
        write(tmp_path, {f"{name}/log.jsonl": jsonl(rows) for name, rows in logs.items()})
        folders = [tmp_path / name for name in logs]
        return printed(plot.main, f"--output={tmp_path}/curves.png", *folders)

    return told


def test_the_table_says_what_heldout_rows_say_and_how_many_fewer_are_needed(told, tmp_path):
    own = [9.0, 2.0] + [1.0] * 6  # its later half is at 2.0 after two rows
    adamw = [3.0] * 4 + [2.0] * 4  # over its later half 2.0
    base = log([("none", [4.0] * 8), ("adamw", adamw)], tokens=2_000_000)
    newer = [("own", [9.0] * 8), ("own", own)]  # rows that replace older ones
    maml = {"maml_0.1": log(newer, tokens=2_000_000)}  # the folder's whole name
    text = told(base=base, **maml)
    cells = re.findall(r"^  (\S+, [\w ]*\w) +(\d\.\d+) +(\d\.\d+) +(\d+) +2.0M$", text, re.M)
    mean = f"{np.mean(own):.3f}"  # of 128 tokens, so the first 512 are all
    assert cells == [
        ("base, no learning", "4.000", "4.000", "1"),
        ("base, tuned AdamW", "2.500", "2.500", "12"),
        ("maml_0.1, its own inner loop", mean, mean, "3"),
    ]
    assert "tuned AdamW on base comes to 2.000" in text and "mean of the later half" in text
    assert "after 128 tokens, maml_0.1 after 32: 4.0 times fewer" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and len(text.splitlines()) <= 7
    text = told(long=log([("none", [3.0] * 32 + [1.0] * 32)]))
    assert re.search(r"all 1,024 +first 512 ", text)
    assert re.search(r"^  long, no learning +2.000 +3.000 +1 ", text, re.M)


def test_a_level_is_reached_when_the_loss_stays_there_and_a_curve_needs_as_much_as_itself():
    fallen, bounced = [2.0, 1.0], [3.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    rows_needed = ((fallen, 2.5, 1), (fallen, 1.5, 2), (fallen, 0.5, None), (bounced, 1.5, 8))
    for curve, level, rows in (*rows_needed, ([1.0, math.nan], 2.0, None)):
        assert plot.tokens_needed(np.array(curve), level, 1) == rows
    for seed in range(20):
        falling = np.linspace(3, 1 + seed % 2, 32) + np.random.default_rng(seed).normal(size=32)
        assert plot.fewer_examples("own", falling, falling, 16).endswith(": 1.0 times fewer")
    early = np.array([3.0] + [1.0] * 7)  # needs 2 rows of its 8
    late = np.array([3.0] * 5 + [0.0] * 3)  # 0.75 over its later half; 1 after the last row alone
    assert plot.fewer_examples("own", late, early, 1).endswith("own after 8: 4.0 times more")
    assert "own does not come to" in plot.fewer_examples("own", early + 1, early, 1)


def test_the_opponent_is_the_one_that_the_tune_domains_choose(told):
    base, maml = log([("adamw", [2.0] * 8), ("dynamic", [1.9] * 8)]), log([("own", [1.0] * 8)])
    text = told(base=base, maml=maml)
    assert "fewer examples: dynamic evaluation on base comes to 1.900" in text
    for row in base:  # on text held out dynamic evaluation stays better, on tune domains it is not
        if row.get("rule") == "dynamic" and row["role"] == "tune":
            row["loss"] = [9.0] * 8
    text = told(base=base, maml=maml)
    assert "fewer examples: tuned AdamW on base comes to 2.000" in text


UNLIKE = [
    (dict(adapt=[("own", [3.0] * 4)]), "8 rows of 16 tokens.* 4 rows of 16 tokens"),
    (dict(row_tokens=32), "rows of 16 tokens.* rows of 32 tokens"),
    (dict(sha256="0b"), r"\(sha256 0a\).*\(sha256 0b\)"),
    (dict(sha256=None), r"\(sha256 0a\).*\(sha256 None\)"),  # what is unknown is not equal
    (dict(passages=1), "2 passages.* 1 passages"),
    (dict(domains="yz"), "no more.* passages of toy/y"),
    (dict(tokenizer="gpt2"), "do not compare: plot apart"),
]


@pytest.mark.parametrize("changes, what", UNLIKE)
def test_what_was_not_read_alike_is_not_compared(told, changes, what):
    base = log([("adamw", [3.0] * 8)])
    with refused(match=what):
        told(base=base, maml=log(**dict(adapt=[("own", [3.0] * 8)]) | changes))


def test_what_another_model_has_read_is_not_plotted(told):
    old = log([("none", [4.0] * 8), ("adamw", [2.0] * 8)])
    _, step_0, step_9, *readings = log([("none", [3.0] * 8)], model="2c")
    text = told(run=old + readings)
    assert "no learning  " in text and " 3.000 " in text and "AdamW" not in text
    assert "AdamW" not in told(run=old + readings[-1:])  # the heldout domain alone
    assert "AdamW" in told(run=[*old, step_9])  # an evaluation of the same step: the same model
    with refused(match=r"no run was read yet: python adapt\.py RUN"):
        told(run=[*old, step_0, step_9])  # begun again since
    assert "apart was not read" in told(run=old, apart=log([("own", [3.0] * 8)], dataset="toys"))


def test_a_run_whose_reading_was_cut_short_is_refused(told):
    whole, half = (log([("none", [4.0] * n)], domains="yz") for n in (8, 4))
    with refused(match="4 rows of 16 tokens and 8 rows of 16 tokens: read it again"):
        told(run=whole[:-1] + half[-1:])


def test_seeds_join_at_equal_training_tokens_or_not_at_all(told, tmp_path):
    seeded = partial(log, [("none", [3.0] * 8)])
    seeds = dict(a_s1=seeded(1, at=(0, 3, 9)), a_s2=seeded(2))
    told(**seeds)
    methods = plot.read_methods([tmp_path / name for name in seeds])
    x, y = plot.training_curves(methods, [("a", "none")])["a", "none"]
    assert x.tolist() == [0, 9] and y.tolist() == [[5, 3], [5, 3]]
    with refused(match="seeds of a have no evaluation at equal tokens"):
        told(**seeds, a_s3=seeded(3, at=(1, 8)))
    with refused(match="seeds of a differ in training tokens"):
        told(**seeds, a_s4=seeded(4, tokens=8))
    other = seeded(5)
    other[0]["config"]["eval_passages"] = 2
    assert "a, no learning lacks seed 5 (other text)" in told(**seeds, a_s5=other)


def published(folder: Path, loss_of) -> list[Path]:
    """Logs of two budgets of a recipe and of a baseline, three seeds, loss_of(name, rule, d, s)."""
    corpus = [*TUNE[1:], "bible", "drama", "latin"]
    fresh = ["french_novels", "german_law", "recipes_zh", "csv_tables", "chess_pgn"]
    methods = [("base", ("none", "adamw", "dynamic"), 50), ("r", ["own"], 50)]
    methods += [("r_2.0M", ["own"], 20)]
    for seed, (name, rules, tokens) in itertools.product((1, 2, 3), methods):
        read = [(rule, [0.0]) for rule in rules]
        header, *rows = log(read, seed, tokens, domains=corpus, dataset="corpus")
        header["dataset"]["name"] = "corpus"
        rows += log(read, seed, tokens, domains=fresh, dataset="fresh")[3:]
        for row in rows[2:]:
            row["loss"] = [loss_of(name, row["rule"], row["domain"], seed)] * 8
        write(folder, {f"{name}_s{seed}.jsonl": jsonl([header, *rows])})
    return sorted(folder.iterdir())


def test_the_headline_of_the_long_tables_is_that_of_a_second_program(tmp_path):
    gaps = defaultdict(lambda: -0.1 + 0.05 * next(dice))
    dice = iter(np.random.default_rng(1).normal(size=99))

    def loss_of(name, rule, domain, seed):
        if rule == "none":
            return 3.0
        if rule == "adamw":  # stronger wherever the tune domains do not see it
            return 2.5 if domain in TUNE else 1.8
        gap = gaps[domain, seed] if rule == "own" else 0  # half of the budget loses what it gains
        return 2.0 + (gap if name == "r" else -gap)

    logs = published(tmp_path, loss_of)
    told = [d for d in dict.fromkeys(d for d, _ in gaps) if d not in TUNE]
    table = np.array([[gaps[d, s] for d in told] for s in (1, 2, 3)])  # (seeds, domains)
    over_seeds = 4.303 * table.mean(1).std(ddof=1) / 3**0.5  # Student's t, 2 degrees of freedom
    over_domains = 2.365 * table.mean(0).std(ddof=1) / 8**0.5
    figures = [f"{table.mean():+.3f}", *(f"{half:.3f}" for half in (over_seeds, over_domains))]
    figures.append(f"{2.5**0.5:.3f}")  # straight over the logarithm of 20 and 50 tokens
    text = execute(HERE / "results/tables.py", *logs).stdout
    gap = "{} ± {} ± {} (over seeds, over 8 dom".format(*figures)
    assert f"headline: r, its own inner loop, less base, dynamic evaluation:\n{gap}" in text
    assert f"faster: {figures[3]} ± 0.000 times fewer training tokens" in text
    assert re.search(r"^\| base \| dynamic evaluation .* \| 1.000 ± 0.000 \|$", text, re.M)
    second = [HERE / "results/headline.py", *logs, "--expect"]
    assert "r by own less base by dynamic" in execute(*second, *figures).stdout
    for i, figure in enumerate(figures):
        execute(*second, *figures[:i], f"{float(figure) + 0.001:.3f}", fails=True)


def test_training_tokens_to_a_level_lie_between_budgets_and_never_beyond(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "results")
    from headline import needed
    from tables import training_tokens_needed

    points = {1: 4.0, 4: 3.0, 16: 2.0}
    for level, tokens in ((3.5, 2), (3.0, 4), (2.25, 4 * 4**0.75), (2.0, 16), (4.0, 1), (9.0, 1)):
        assert math.isclose(training_tokens_needed(points, level), tokens)
        assert math.isclose(needed(sorted(points.items()), level), tokens)
    for found in (training_tokens_needed(points, 1.9), needed(sorted(points.items()), 1.9)):
        assert found is None or math.isnan(found)


def test_logs_of_earlier_editions_are_plotted_and_tabled(tmp_path):
    """Their rows do not say which model read, at what cost, nor the hash of what was read."""
    for name in ("baseline", "recipe"):
        rows = map(json.loads, (HERE / f"results/corpus/{name}_s1.jsonl").read_text().splitlines())
        old = [{k: row[k] for k in row if k not in ("model", "forwards", "sha256")} for row in rows]
        write(tmp_path, {f"{name}_s1.jsonl": jsonl(old)})
    logs = sorted(tmp_path.glob("*.jsonl"))
    text = printed(plot.main, *logs, f"--output={tmp_path}/curves.png")
    assert "baseline, tuned AdamW" in text and "recipe, its own inner loop" in text
    text = execute(HERE / "results/tables.py", *logs).stdout
    assert "headline: recipe, its own, falling rates, less baseline, dynamic" in text


def test_logs_beyond_repair_are_refused_and_a_cut_last_line_is_left_out(tmp_path):
    told = partial(printed, plot.main, tmp_path, f"--output={tmp_path}/curves.png")
    with refused(match=r"no log at .*train\.py"):
        told()
    header, first, *rest = jsonl(log([("none", [3.0])])).splitlines(keepends=True)
    write(tmp_path, {"log.jsonl": "".join([header, first, *rest, '{"kind": "val", "st'])})
    assert "3.000" in told()
    for lines, remedy in (
        ([], "train again"),
        ([first], "train again"),
        ([header], "train again"),
        ([header, "no json\n", first], "delete that line"),
        ([header, first], r"adapt\.py"),
    ):
        write(tmp_path, {"log.jsonl": "".join(lines)})
        with refused(match=remedy):
            told()


def test_the_pictures_are_drawn_from_runs_and_that_of_logs_without_torch(trained, tmp_path):
    code = "import sys, plot; plot.main(); assert 'torch' not in sys.modules"
    for i, program in enumerate((["-c", code, trained / "plain"], [HERE / "results/rates.py"])):
        execute(*program, trained / "maml", "-o", tmp_path / f"{i}.png", cwd=HERE)
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000
