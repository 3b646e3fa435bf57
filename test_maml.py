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

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
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
DRY = bool(os.environ.get("DRY_RUN"))  # what make gpu-check does, tiny and on a CPU
DEVICE = "cpu" if DRY else "cuda"
refused = partial(pytest.raises, SystemExit)  # a user's mistake ends the program with one line

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


def run(*command, **how) -> subprocess.CompletedProcess:
    """A program in a process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, **how)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


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
        log[row.pop("kind")].append({k: v for k, v in row.items() if k != "seconds"})
    assert log.pop("run")
    return log


def checkpoint_of(out_dir) -> dict:
    return torch.load(out_dir / "ckpt.pt", map_location="cpu", weights_only=True)


def weights_of(out_dir) -> tuple:
    ckpt = checkpoint_of(out_dir)
    return ckpt["model"], ckpt["learner"], ckpt["optimizer"]["state"]


identical = partial(torch.testing.assert_close, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------
# the mathematics


README = (HERE / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ADDED = re.findall(r"^\+(.*)", README, re.MULTILINE)  # another inner optimizer, "momentum"
exec("\n".join(ADDED), {"torch": torch, "UPDATES": maml.UPDATES})


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
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "momentum"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("objective", ["final", "every"])
@pytest.mark.parametrize("learned", ["no", "tensor", "element"])
def test_the_meta_gradient_is_that_of_the_definition(K, optimizer, first_order, objective, learned):
    x, y = task()
    clipped = dict(inner_clip=0.5, inner_schedule="cosine", inner_warmup=1, inner_repeats=2)
    for more in ({}, clipped):
        learner = MAML(tiny_gpt(), K, 0.05, optimizer, first_order, objective, learned, **more)
        grads, loss = backward(learner.double(), x, y)
        defined, defined_loss = meta_grad(learner, x, y)
        # the derivative of a fresh AdamW's step divides by |g|, and rounding with it
        assert distance(grads, defined) < (1e-9 if optimizer == "adamw" else 1e-12)
        assert abs(loss - defined_loss) < 1e-13


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


def test_what_is_frozen_flat_or_unused_is_no_trouble_and_what_learns_has_one_dtype():
    def loss(x, y, frozen, late, flat, unused):
        return (frozen * late**3 * x + flat * y).sum()

    model, x = Toy(loss, *torch.ones(4, 3)), torch.randn(3, 3, dtype=torch.float64)
    model.list[0] = nn.Parameter(torch.full((3,), 2, dtype=torch.int8), requires_grad=False)
    learner = MAML(model, 2, 0.1)
    assert learner.rates(None) == 0.1  # not of the first parameter's dtype
    for learning in (3, 2):
        grads, _ = backward(learner, x, x)
        assert len(grads) == learning and not grads["model.list.3"].any()
        assert distance(grads, meta_grad(learner, x, x)[0]) < 1e-14
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
    learner = MAML(model, 2, lr, name, learn_inner_lr=learned, inner_repeats=2).double()
    rates = [lr if learned == "no" else lr / (1 + i) for i in range(len(learner.sizes))]
    train.load_rates(learner, {"log_inner_lr": torch.tensor(rates, dtype=torch.float64).log()})
    losses, phi = learner.read(x[None], y[None])
    assert learner(x, y).item() == pytest.approx(losses.mean().item(), rel=1e-12)
    parameters = zip(model.parameters(), rates, strict=True)
    optimizer = optimizer([dict(params=[p], lr=rate) for p, rate in parameters])
    for xj, yj, loss in zip(x.split(1), y.split(1), losses[0], strict=True):
        torch.testing.assert_close(loss, model(xj, yj)[1].detach(), rtol=rtol, atol=0)
        for _ in range(2):
            optimizer.zero_grad()
            model(xj, yj)[1].backward()
            optimizer.step()
    stepped = {n: p.detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(learner.by_name(phi[0]), stepped, rtol=rtol, atol=rtol / 10)


def test_rates_follow_the_schedule_and_clipping_bounds_the_gradient():
    learner = MAML(tiny_gpt(), 4, 1.0, inner_schedule="cosine", inner_warmup=1)
    assert learner.factors(5).tolist() == pytest.approx([0.5, 1, 0.853553, 0.5, 0.146447], 1e-5)

    def moved(**more):
        return MAML(tiny_gpt(), 1, 1.0, **more).read(*task(1, 1, 8))[1] - learner.vectors()[0]

    assert moved(inner_clip=1e-3).norm().item() == pytest.approx(1e-3)
    torch.testing.assert_close(moved(inner_clip=1e3), moved())  # a gradient that is short enough
    torch.testing.assert_close(2 * moved(inner_warmup=1), moved())


@pytest.mark.parametrize("first_order, most", [(True, 0.01), (False, 1.1)])
def test_an_inner_step_keeps_no_graph_and_only_in_second_order_phi(first_order, most):
    """By how many copies of the parameters an inner step raises the height of an outer loss."""
    how = dict(first_order=first_order, learn_inner_lr="element" if first_order else "no")

    def copies(K):
        model, xy = tiny_gpt(), task(4 * (K + 1), 8)
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
    how = dict(inner_steps=K, first_order=first_order, inner_repeats=2, learn_inner_lr="no")
    out = pretrain(n_embd=64, n_layer=2, max_steps=1, **how)
    _, model = train.load_checkpoint(out / "ckpt.pt")
    learner, (x, y) = MAML(model, **how), task(4, 16, vocab=257)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        learner(x, y).backward()
    # where it is differentiated twice, attention in blocks leaves some of the masked half out
    rel = 1e-9 if first_order or K == 0 else 0.02
    logged = log_of(out)["val"][-1]["flops"]  # of four tasks
    assert 4 * counter.get_total_flops() == pytest.approx(logged, rel)


def test_the_snippets_of_the_readme_run_as_they_stand():
    names, (method, another_model, _) = {}, SNIPPETS
    exec(method, names)
    grads = {n: p.grad for n, p in names["learner"].model.named_parameters()}
    assert distance(grads, names["meta_gradient"]) < 1e-4
    exec(another_model, names)  # a model that is no GPT
    assert all(p.grad.any() for p in names["learner"].parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_are_those_of_gpt2_in_transformers(bias, tmp_path, monkeypatch):
    """By the README's words; with large weights, as near zero one GELU is like another."""
    pytest.importorskip("transformers")
    model, names, (x, _) = tiny_gpt(bias=bias).float(), {}, task(2, 8)
    (tmp_path / "out/maml_demo").mkdir(parents=True)
    ckpt = {"model": model.state_dict(), "model_args": vars(model.config)}
    torch.save(ckpt, tmp_path / "out/maml_demo/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    exec(SNIPPETS[2], names)
    torch.testing.assert_close(names["hf"](x).logits, model(x)[0], rtol=0, atol=1e-4)


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
    with pytest.raises(ValueError, match="'passages' is none of mixed, domain, passage"):
        tasks.Dataset(root, 16, tasks="passages")


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
    root = counting(tmp_path)
    (root / "b/train_0.bin").write_bytes(shard_of([1] * 8))
    (root / "b/train_1.bin").write_bytes(shard_of([1] * 8))
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
    options = dict(learn_inner_lr="element", inner_clip=1.0, inner_repeats=2)
    learner, (x, y) = MAML(tiny_gpt(), 1, 0.05, optimizer, **options).double(), task(3, 5, 8)
    together, phi = learner.read(x, y)
    alone = [learner.read(*xy) for xy in zip(x.split(1), y.split(1), strict=True)]
    torch.testing.assert_close((together, phi), tuple(map(torch.cat, zip(*alone, strict=True))))
    for most in (2, 3):  # two passages, then the third; all three
        monkeypatch.setattr(train, "SIDE_BY_SIDE", most * len(phi[0]))
        torch.testing.assert_close(train.read_passages(learner, x, y, 1), (together, phi[2]))
    learner.inner_repeats = 1
    once, _ = learner.read(x, y)  # a row's loss is that before any step on it
    assert torch.equal(together[:, 0], once[:, 0]) and (together[:, 1:] != once[:, 1:]).all()
    x[:, 3], y[:, 3] = 7, 9
    after, _ = learner.read(x, y)
    assert torch.equal(once[:, :3], after[:, :3])
    assert not torch.isclose(once[:, 3:], after[:, 3:]).any()


READ_256 = flags(passages=4, tokens=256)
READ_64 = flags(passages=2, tokens=64, rules="none")


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A baseline and a learner that begins from it, both trained for a few seconds, and read."""
    out = tmp_path_factory.mktemp("trained")
    common = dict(data_dir=data_dir, dataset="tiny", device="cpu", eval_rows=16, warmup_steps=5)
    plain = dict(max_steps=120, learning_rate=1e-2, batch_size=16, tasks_per_step=1)
    own = dict(max_steps=60, learning_rate=3e-3, batch_size=8, tasks_per_step=2, inner_steps=7)
    own |= dict(first_order=True, learn_inner_lr="element", tasks="passage", inner_lr_lr=0.1)
    own |= dict(inner_clip=4, inner_lr=0.05, init_from=out / "plain/ckpt.pt")
    for name, method in {"plain": plain, "maml": own}.items():
        train.main(flags(out_dir=out / name, **TINY | common | method))
        adapt.main([str(out / name), *READ_256])
    return out


def test_learned_rates_read_unseen_text_better_and_the_table_is_that_of_the_log(trained):
    text = printed(adapt.main, trained / "maml", *READ_256)
    rows = {(row["domain"], row["rule"]): row for row in log_of(trained / "maml")["adapt"]}
    assert rows.keys() == set(itertools.product(["tune", "far"], ["none", "adamw", "own"]))
    evaluated = log_of(trained / "maml")["val"][-1]  # on the same passages
    assert evaluated["loss"].keys() - evaluated["online"].keys() == {"alpha", "beta", "gamma"}
    for domain, online in evaluated["online"].items():
        own, none = (np.mean(rows[domain, rule]["loss"]) for rule in ("own", "none"))
        assert own == pytest.approx(online, abs=1e-4) and own < none - 0.05
    lines = text.split("far: ")[1].splitlines()[2:5]
    for rule, line in zip(["none", "adamw", "own"], lines, strict=True):
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


def test_adamws_options_are_found_by_hill_climbing_and_only_on_tune_domains_called_so(tmp_path):
    def valley(options):
        far = abs(math.log2(options["lr"] / 5e-4)) + abs(options["steps"] - 2)
        return far + (not options["frozen"]) + (options["beta2"] > 0.96)

    assert adapt.best_adamw(valley) == {"lr": 5e-4, "steps": 2, "frozen": True, "beta2": 0.95}
    assert adapt.best_adamw(lambda options: math.nan) == adapt.START
    for role, chosen in {"heldout": None, "tune": {"lr": 0.5}}.items():
        row = {"kind": "adapt", "rule": "adamw", "role": role, "options": {"lr": 0.5}}
        log = write(tmp_path, {"log.jsonl": json.dumps(row) + "\n"}) / "log.jsonl"
        assert adapt.chosen_adamw(log) == chosen


def test_an_adamw_that_no_tune_domain_chose_is_not_logged(trained, data_dir, tmp_path):
    prepare_in(tmp_path, data_dir / "text", "--heldout", "far,tune")
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "plain/ckpt.pt", tmp_path / "run")
    adapt.main([f"{tmp_path}/run", *flags(data_dir=tmp_path, dataset="set", passages=2, tokens=64)])
    rows = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert {row["rule"] for row in rows} == {"none"}


def test_frozen_embeddings_stay_and_the_rest_learns_in_as_many_steps_as_are_asked_for():
    model, options = tiny_gpt(), dict(lr=1e-3, frozen=True, beta2=0.99)
    once, phi = adapt.read(model, {}, "adamw", *task(3, 5, 8), **options)
    twice, _ = adapt.read(model, {}, "adamw", *task(3, 5, 8), **options, steps=2)
    assert np.array_equal(once[:, 0], twice[:, 0]) and (once[:, 1:] != twice[:, 1:]).all()
    theta = dict(model.named_parameters())
    assert theta.keys() - phi.keys() == set(adapt.EMBEDDINGS)
    assert not any(torch.equal(phi[name], theta[name]) for name in phi)
    assert all(p.requires_grad for p in model.parameters())


ODD = {
    "one character": "a" * 3000,
    "random bytes": "".join(map(chr, np.random.default_rng(0).integers(0, 128, 3000))),
    "another alphabet": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία. " * 60,
    "long": "It was the same text again, and again. " * 600,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_reading_never_blows_up(trained, tmp_path, text):
    """On a text unlike any it stays finite, and no worse than 0.1 above no learning at all."""
    options = flags(text=write(tmp_path, {"odd.txt": text}) / "odd.txt", max_new_tokens=5)
    table = printed(adapt.main, trained / "maml", *options, "--rules", "none", "own")
    means = dict(re.findall(r"^(none|own) +(\S+)", table, re.M))
    assert float(means["own"]) < float(means["none"]) + 0.1


def test_a_text_of_ones_own_is_learned_and_what_was_learned_can_be_kept(trained, tmp_path):
    write(tmp_path, {"notes.txt": "the quick brown fox jumps over the lazy dog. " * 60})
    notes, saved = flags(text=tmp_path / "notes.txt", max_new_tokens=20), tmp_path / "learned.pt"
    first = printed(adapt.main, trained / "maml", *notes, f"--save={saved}")
    assert first.count("own") >= 2 and "before:" in first and "after" in first
    second = printed(adapt.main, saved, *notes)  # it knows the text now
    before, after = (float(re.search(r"^none +(\S+)", t, re.M)[1]) for t in (first, second))
    assert after < before - 0.5
    assert "adamw is not tuned" in second and "fewer examples" not in second  # no log beside it
    with refused(match="would overwrite .*: choose another path"):
        adapt.main([str(saved), *notes, f"--save={saved}"])
    rows = plot.read_log(trained / "maml")
    shutil.copy(saved, trained / "maml/learned.pt")
    adapt.main([str(trained / "maml/learned.pt"), *READ_64])  # it is not the run's result
    assert plot.read_log(trained / "maml") == rows


def test_a_text_of_fewer_rows_than_two_chunks_is_learned_all_the_same(trained):
    ckpt, model = train.load_checkpoint(trained / "maml/ckpt.pt")
    ckpt["config"]["batch_size"] = 64  # chunks of 8 rows
    none, own = (adapt.read(model, ckpt, rule, *task(1, 8, 16))[0] for rule in ("none", "own"))
    assert np.allclose(none[:, :4].mean(), own[:, :4].mean())
    assert not np.isclose(none[:, 4:].mean(), own[:, 4:].mean())


def test_what_adapt_cannot_do_is_answered_with_its_remedy(trained, tmp_path):
    foreign = {"model": tiny_gpt().state_dict(), "model_args": vars(tiny_gpt().config)}
    torch.save(foreign, tmp_path / "foreign.pt")
    torch.save(foreign | {"dataset": {"tokenizer": "bytes"}}, tmp_path / "small.pt")
    for checkpoint, option, remedy in (
        (trained / "plain", "--rules=own", "no inner loop of its own"),
        (trained / "plain", "--save=x", "--text"),
        (trained / "plain", "--tokens=1000000", "use --tokens"),
        (trained / "maml", "--tokens=16", "learns 16 tokens at a time: read --tokens 64"),
        (tmp_path / "small.pt", f"--text={HERE / 'README.md'}", "knows 32 ids"),
        (tmp_path / "foreign.pt", "--tokens=64", "give a --text to read"),
    ):
        with refused(match=remedy):
            adapt.main([str(checkpoint), option])


# --------------------------------------------------------------------------------------------------
# the systems

RUNS = [PLAIN, dict(), dict(first_order=False, learn_inner_lr="tensor"), dict(learning_rate=0)]


@pytest.mark.parametrize("method", RUNS, ids=["plain", "first", "second", "rates"])
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


@pytest.mark.parametrize("method", [PLAIN, dict(), ON_GPUS], ids=["plain", "first", "gpus"])
def test_two_processes_do_what_one_does(pretrain, data_dir, tmp_path, method):
    alone, pair = pretrain("alone", **method), tmp_path / "pair"
    options = flags(**QUICK | dict(data_dir=data_dir, out_dir=pair) | method)
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


def test_what_is_printed_before_and_after_learning_is_of_the_same_rows():
    """'loss' and 'online' of a learner whose rates are next to nothing are the same number."""
    learner, val = MAML(tiny_gpt(), 1, 1e-12), {"a": task(2, 4, 8), "b": task(1, 3, 8)}
    found = train.evaluate(learner, val, ["a", "b"], chunk=2)
    for domain, (x, y) in val.items():
        loss = learner.model(x.flatten(0, 1), y.flatten(0, 1))[1].item()
        assert found["loss"][domain] == pytest.approx(loss)
        assert found["online"][domain] == pytest.approx(loss)


def test_rates_learned_alone_leave_theta_bitwise_stay_bounded_and_fill_elements(pretrain):
    base = pretrain("base", **PLAIN)
    alone = dict(init_from=base / "ckpt.pt", learning_rate=0, inner_lr_lr=100)
    for nesterov in (True, False):
        tensor = pretrain(f"{nesterov}", nesterov=nesterov, learn_inner_lr="tensor", **alone)
        identical(checkpoint_of(tensor)["model"], checkpoint_of(base)["model"])
        rates = checkpoint_of(tensor)["learner"]["log_inner_lr"]
        torch.testing.assert_close(rates.exp().unique(), torch.tensor([0.02 / 150, 0.02 * 150]))
    element = pretrain("element", init_from=tensor / "ckpt.pt", max_steps=0)
    sizes = [p.numel() for p in train.load_checkpoint(element / "ckpt.pt")[1].parameters()]
    filled = rates.repeat_interleave(torch.tensor(sizes))
    identical(checkpoint_of(element)["learner"]["log_inner_lr"], filled)
    with refused(match="set learn_inner_lr=element"):
        pretrain("back", init_from=element / "ckpt.pt", learn_inner_lr="tensor")


def test_what_begins_from_a_checkpoint_has_its_shape_and_counts_what_it_cost(pretrain):
    base = pretrain("base", n_layer=2, n_embd=32, **PLAIN)
    given = dict.fromkeys(TINY) | dict(init_from=base / "ckpt.pt")  # no shape
    with refused(match="the checkpoint has the shape .'n_layer': 2.: leave"):
        pretrain("more", **given | dict(n_layer=1))
    out = pretrain("more", **given)
    header, first, *_ = plot.read_log(out)
    shape, cost = [header["config"][name] for name in TINY], checkpoint_of(base)
    assert shape == [16, 2, 2, 32]
    assert all(first[unit] == cost[unit] > 0 for unit in ("tokens", "flops", "seconds"))
    # the same command goes on after a stop, and its header still says what it began from
    options = train.read_arguments([*flags(**given), "--init_from=resume"])
    assert options == {"init_from": str(base / "ckpt.pt"), "resume": True}
    pretrain("more", **given | dict(init_from="resume", max_steps=8))
    assert checkpoint_of(out)["step"] == 8 and checkpoint_of(out)["tokens"] == (6 + 8) * 4 * 4 * 16


def test_a_nanogpt_checkpoint_is_taken_over(pretrain, tmp_path):
    args = dict(vocab_size=320, bias=True, **TINY)
    model = GPT(GPTConfig(**args)).state_dict()
    ckpt = {"model": {f"_orig_mod.{n}": p for n, p in model.items()}, "iter_num": 7}
    torch.save(ckpt | {"model_args": args | {"dropout": 0.0}}, tmp_path / "nano.pt")
    out = pretrain(init_from=tmp_path / "nano.pt", max_steps=0)
    identical(checkpoint_of(out)["model"], model)


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


MISTAKES = [
    (dict(inner_stepz=1), "did you mean --inner_steps?"),
    (dict(max_steps="many"), "--max_steps: invalid int value: 'many'"),
    (dict(bias=1), "--bias: invalid choice: '1' (choose from True, False"),
    (dict(objective="evry"), "choose 'every' or 'final'"),
    (dict(learn_inner_lr="all"), "choose 'no' or 'tensor' or 'element'"),
    (dict(dtype="float16"), "--dtype: invalid choice: 'float16' (choose from"),
    (dict(tasks="books"), "--tasks: invalid choice: 'books' (choose from"),
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
]


@pytest.mark.parametrize("wrong, remedy", MISTAKES, ids=lambda given: str(given)[:40])
def test_a_mistake_is_answered_with_its_remedy_and_harms_no_run(pretrain, wrong, remedy):
    out = pretrain(max_steps=1)
    before = log_of(out), weights_of(out)
    with refused(match=re.escape(remedy)):
        pretrain(**wrong)
    identical((log_of(out), weights_of(out)), before)


def test_processes_that_do_not_divide_the_tasks_are_told_the_flags_that_do(pretrain, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(match="--tasks_per_step=2 --batch_size=2 is as much"):
        pretrain(**PLAIN, tasks_per_step=1)
    with refused(match="2 processes cannot share tasks_per_step=1 out: change either"):
        pretrain(tasks_per_step=1)


def test_config_files_are_checked_like_flags_and_help_names_every_field(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("import math\n_half = 0.5\nlearning_rate = 1\ninner_lr = _half * math.pi\n")
    options = train.read_arguments([str(config), "--out_dir=3", "--bias=True"])
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
    assert train.read_arguments([str(path)])["out_dir"] == f"out/{path.stem}"


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
    give_roles("--heldout", "tune,alpha")
    with refused(match="was trained with data="):
        pretrain(data_dir=data, init_from="resume", max_steps=9)
    more = pretrain("more", data_dir=data, init_from=out / "ckpt.pt")  # goes on without alpha
    for seen_alpha in (out, more):
        text = printed(adapt.main, seen_alpha, *READ_64)
        assert "tune: " in text and "alpha" not in text
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
    assert [row["kind"] for row in plot.read_log(out)] == ["run", "val"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("name", ["log.jsonl", "ckpt.pt.tmp"])
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(pretrain, at_step, tmp_path, name):
    path = tmp_path / "run" / name
    at_step(0, lambda: (path.unlink(missing_ok=True), path.symlink_to("/dev/full")))
    with refused(match="No space left"):
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
    encode_batch, given = encoding.encode_ordinary_batch, []
    monkeypatch.setattr(
        encoding, "encode_ordinary_batch", lambda t: given.extend(t) or encode_batch(t)
    )
    assert [encoding.decode(ids) for ids in prepare_data.encode(texts, encoding)] == texts
    assert max(map(len, given)) == 100  # tiktoken overflows at a million blanks


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
    write(tmp_path, {"latin.txt": "é".encode("latin-1"), "nul.txt": "a" * 9**6 + "\0"})
    write(
        tmp_path, {"fields.jsonl": '{"body": "a"}\n' * 2, "array.jsonl": array, "array.json": array}
    )
    write(tmp_path, {"cut.jsonl.gz": gzip.compress(records(["text"]).encode())[:-9]})
    write(tmp_path, {"local/uspto.txt": "other", "empty/.git/a.txt": "any", "empty/a.png": "any"})
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


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
LINES = "".join(f"строка {i} 数 🙂\n" for i in range(400))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_any_unicode_with_any_line_ends_is_the_same_text(prepare, monkeypatch, encoding):
    monkeypatch.setattr("text.MAX_PIECE", 500)
    for ends in ("\n", "\r\n", "\r"):
        text = LINES.replace("\n", ends)
        rows = "".join(json.dumps({"text": t}, ensure_ascii=False) + ends for t in (text, text[9:]))
        files = {"text.txt": text, "a.JSONL": rows, "b/rows.Jsonl.gz": rows.replace("стр", "о")}
        files = {path: content.encode(encoding) for path, content in files.items()}
        files["b/rows.Jsonl.gz"] = gzip.compress(files["b/rows.Jsonl.gz"])
        made = prepare(files, "--overwrite")
        assert "".join(texts_of(made, "text")) == LINES
        assert texts_of(made, "a") == [LINES, LINES[9:]]
        assert len(texts_of(made, "b")) == 2
        assert prepare_data.read_text(made.parent / "text/text.txt") == LINES


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


def test_two_processes_never_write_to_one_dataset(prepare, tmp_path):
    made = prepare({"a.txt": "some text"})
    code = (
        f"import tasks, time; f = tasks.lock({str(made)!r}); print(1, flush=True); time.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE)
    assert other.stdout.readline()
    with refused(match="another process writes to .*set: wait"):
        prepare(made.parent / "text", "--overwrite")
    assert tasks.open_shard(made / "a/train_000000.bin").size
    other.kill()
    other.wait()
    prepare(made.parent / "text", "--overwrite")  # what a killed one leaves holds nobody


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
    source = write(
        tmp_path / "s", {"a.txt": "a" * 99, "b.txt": "b" * 99_999, "c.txt": b"\xe9 latin"}
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with refused(match="stopped by .*: the same command goes on"):
            prepare(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    made, found = tmp_path / "set", sorted((tmp_path / "set").rglob("*.*"))
    assert [path.name for path in found][-3:] == [
        "train_000000.bin",
        "val_000000.bin",
        "progress.json",
    ]
    time = (made / "a/train_000000.bin").stat().st_mtime_ns
    with refused(match="not utf-8"):
        prepare(source)
    write(source, {"c.txt": "mended"})
    assert domains_of(prepare(source)).keys() == {"a", "b", "c"}
    assert (made / "a/train_000000.bin").stat().st_mtime_ns == time


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
    with refused(match=r"none of 300 records has text and in\.sett, as .*'set'"):
        prepare(*hub, "--domain_field=in.sett", name="typo")
    rows = [{"text": f"text {i}", "a.b": [3, True, None, "c"][i % 4]} for i in range(400)]
    write(tmp_path, {"rows/0.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    with refused(match="has changed since"):
        prepare(*hub, name="whole")
    wide = write(tmp_path / "wide", {"0.jsonl": "".join(json.dumps(r) + "\n" for r in rows[::4])})
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

FIRST = dict(inner_steps=3, first_order=True, learn_inner_lr="element", inner_clip=1.0)
SECOND = dict(inner_steps=1, learn_inner_lr="tensor")
METHODS = {"plain": dict(inner_steps=0), "first": FIRST, "second": SECOND}
GRAPHS = {"plain": 1, "first": 1, "second": 3}  # of second order: loss, gradient, Hessian product


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
    given = train.read_arguments([f"{HERE}/config/{config}.py"]) | dict(compile=False)
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
def test_twenty_steps_compile_nothing_late_and_multiply_in_bfloat16(
    tmp_path, at_step, config, share
):
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


def write_log(path, adapt=(), seed=1, tokens=9) -> Path:
    """A log with two evaluations, and with adapt rows [(rule, losses of 16-token rows)]."""
    roles = {"a": "train", "t": "tune", "z": "heldout"}
    data = dict(name="toy", tokenizer="bytes", roles=roles)
    rows = [dict(kind="run", config=dict(seed=seed), dataset=data)]
    for at, loss in ((0, 5.0), (tokens, 3.0)):
        losses = {"a": 0.0, "t": 0.0, "z": loss}
        rows.append(dict(kind="val", tokens=at, flops=0.0, loss=losses, online={}))
    for (rule, losses), domain in itertools.product(adapt, "tz"):
        row = dict(kind="adapt", dataset="toy", domain=domain, role=roles[domain], rule=rule)
        row |= dict(tokens=2_000_000, row_tokens=16, by_passage=[min(losses), max(losses)])
        rows.append(row | dict(options={}, loss=[loss + 5 * (domain == "t") for loss in losses]))
    return write(path, {"log.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})


@pytest.fixture
def told(tmp_path):
    return partial(printed, plot.main, f"--output={tmp_path}/curves.png")


def test_the_table_says_what_heldout_rows_say_and_how_many_fewer_are_needed(told, tmp_path):
    own = [9.0, 2.0] + [1.0] * 6  # its later half is at 2.0 after two rows
    adamw = [3.0] * 4 + [2.0] * 4  # over its later half 2.0
    base = write_log(tmp_path / "base", [("none", [4.0] * 8), ("adamw", adamw)])
    newer = [("own", [9.0] * 8), ("own", own)]  # rows that replace older ones
    text = told(base, write_log(tmp_path / "maml_0.1", newer))  # the folder's whole name
    cells = dict(re.findall(r"^  (.*\S) +(\d\.\d+)  after 2.0M training tokens$", text, re.M))
    assert cells == {
        "base, no learning": "4.000",
        "base, tuned AdamW": "2.500",
        "maml_0.1, its own rates": f"{np.mean(own):.3f}",
    }
    assert "maml_0.1 is after 32 tokens where AdamW is after 128: 4.0 times fewer" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and len(text.splitlines()) <= 6


def test_a_level_is_reached_when_the_loss_stays_there():
    fallen, bounced = [2.0, 1.0], [3.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    rows_needed = ((fallen, 2.5, 1), (fallen, 1.5, 2), (fallen, 0.5, None), (bounced, 1.5, 8))
    for curve, level, rows in rows_needed:
        assert plot.tokens_needed(np.array(curve), level, 1) == rows


def test_seeds_of_one_method_are_averaged_and_paired_in_the_long_tables(told, tmp_path):
    logs = []
    for seed in (1, 2, 3):
        for name, tokens, read in (
            ("base_small", 8, [("adamw", [2.0] * 8)]),
            ("half_maml", 2, [("own", [3.1 - seed / 10] * 8)]),
            ("maml", 8, [("own", [0.9 + seed / 10] * 8)]),
        ):
            folder = write_log(tmp_path / f"{name}{seed}", read, seed, tokens)
            logs.append((folder / "log.jsonl").rename(tmp_path / f"{name}_s{seed}.jsonl"))
    text = told(*logs)
    assert re.search("^  base_small, tuned AdamW +2.000 ± 0.000 over 3 seeds", text, re.M)
    assert re.search("^  maml, its own rates +1.100 ± 0.100 over 3 seeds", text, re.M)
    text = run(HERE / "results/tables.py", *logs).stdout
    half = 4.303 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    assert re.search(rf"^\| maml \| own \| 1.100 .* -0.900 ± {half:.3f} ", text, re.M)
    # half of the way in loss from 2 tokens to 8, so at 4: the base needs twice as many
    assert "faster: maml needs 2.000x ± 0.000 fewer training tokens" in text
    with refused(match="'maml_s4' have one seed: rename"):
        told(*logs, write_log(tmp_path / "maml_s4"))


def test_logs_beyond_repair_are_refused_and_a_cut_last_line_is_left_out(told, tmp_path):
    log = write_log(tmp_path / "run", [("none", [3.0])]) / "log.jsonl"
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


def test_the_pictures_are_drawn_from_runs_and_that_of_logs_without_torch(trained, tmp_path):
    code = "import sys, plot; plot.main(); assert 'torch' not in sys.modules"
    for i, program in enumerate((["-c", code, trained / "plain"], [HERE / "results/rates.py"])):
        done = run(*program, trained / "maml", "-o", tmp_path / f"{i}.png", cwd=HERE)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000
