"""Every claim of the repository as a test named like a sentence: make test, or python -m pytest.

The expensive one is behind a marker: python -m pytest -m slow.
"""

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adapt
import plot
import prepare_data
import train
from maml import MAML, meta_grad
from model import GPT, GPTConfig

HERE = Path(__file__).parent
torch.set_num_threads(2)
os.environ.pop("COLUMNS", None)


# ----------------------------------------------------------------------------------------------------------------------
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


def task(rows=12, seed=1, vocab=32, T=8):
    ids = torch.randint(vocab, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def meta_gradient(learner, x, y):
    learner.zero_grad()
    loss = learner(x, y)
    loss.backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters()}, loss.item()


def distance(a: dict, b: dict) -> float:
    """Relative distance of two gradients."""
    return math.sqrt(sum((a[n] - b[n]).square().sum() for n in b) / sum(b[n].square().sum() for n in b))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Three train domains, one to tune on and one held out: random walks over different alphabets."""
    root = tmp_path_factory.mktemp("text")
    for i, domain in enumerate(["alpha", "beta", "gamma", "tune", "far"]):
        dice = np.random.default_rng(i)
        letters = [chr(48 + 9 * i + k) for k in range(9)]
        for doc in range(40):
            walk = np.cumsum(dice.integers(-1, 3, 400)) % 9
            path = root / domain / f"{doc}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(" ".join(letters[j] for j in walk))
    data = tmp_path_factory.mktemp("data")
    prepare_data.main([str(root), "--name", "tiny", "--heldout", "far", "--tune", "tune", "--data_dir", str(data)])
    return data


@pytest.fixture
def flags(data_dir, tmp_path):
    """The command line of a run that takes a second."""

    def command(**changes):
        fields = dict(
            out_dir=tmp_path / "run", data_dir=data_dir, dataset="tiny", device="cpu", block_size=16, n_layer=1,
            n_head=2, n_embd=16, batch_size=4,
            tasks_per_step=4, max_steps=6, eval_interval=3, eval_steps=2, log_interval=1,
            warmup_steps=2, inner_steps=1, learn_inner_lr=True,
        )  # fmt: skip
        return [f"--{key}={value}" for key, value in (fields | changes).items()]

    return command


def rows_of(out_dir, without=("seconds",)) -> list[dict]:
    rows = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in without} for row in rows if row["kind"] != "run"]


def weights_of(out_dir) -> dict:
    ckpt = torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)
    moments = {(i, k): v for i, s in ckpt["optimizer"]["state"].items() for k, v in s.items()}
    return ckpt["model"] | ckpt["learner"] | moments


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------------------
# the mathematics


def test_one_step_on_a_quadratic_has_the_closed_form():
    """L_k = |phi - c_k|^2 / 2: the gradient is (1 - lr) (phi_1 - c_1), and its mean with (theta - c_0) for 'every'."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

        def forward(self, x, y):
            return None, 0.5 * (self.w - y[0]).square().sum()

    c = torch.tensor([[3.0, 1.0], [0.5, 4.0]], dtype=torch.float64)
    for objective, expected in (
        ("final", lambda w: 0.9 * (w - 0.1 * (w - c[0]) - c[1])),
        ("every", lambda w: 0.5 * (0.9 * (w - 0.1 * (w - c[0]) - c[1]) + (w - c[0]))),
    ):
        model = Quadratic()
        MAML(model, 1, 0.1, objective=objective)(c, c).backward()
        torch.testing.assert_close(model.w.grad, expected(model.w.detach()), rtol=1e-14, atol=0)


OPTIONS = [
    dict(inner_steps=K, inner_optimizer=optimizer, objective=objective, first_order=first, **more)
    for K, optimizer, objective, first in itertools.product((1, 3), ("sgd", "adamw"), ("final", "every"), (False, True))
    for more in ({}, {"learn_inner_lr": True, "inner_clip": 0.5, "inner_schedule": "cosine", "inner_warmup": 1})
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_meta_gradient_is_that_of_the_unrolled_episode(options):
    learner = MAML(tiny_gpt(), inner_lr=0.05, inner_weight_decay=0.1, **options).double()
    x, y = task()
    grads, loss = meta_gradient(learner, x, y)
    naive, naive_loss = meta_grad(learner, x, y)
    assert abs(loss - naive_loss) < 1e-13 and grads.keys() == naive.keys()
    # the derivative of a fresh AdamW's step divides by |g|, and rounding with it
    assert distance(grads, naive) < (1e-9 if "adamw" in options.values() else 1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("objective", ["final", "every"])
def test_the_meta_gradient_is_what_finite_differences_say(optimizer, objective):
    """Central differences in float64 along a random direction in theta and the learned rates together."""
    learner = MAML(tiny_gpt(), 2, 0.05, optimizer, objective=objective, learn_inner_lr=True).double()
    if optimizer == "adamw":  # fresh, its first step is sign(g), on which differences see nothing but jumps
        learner.second_moment = [torch.full_like(p, 1e-2) for p in learner.theta().values()]
    x, y = task()
    grads, _ = meta_gradient(learner, x, y)
    torch.manual_seed(2)
    direction = {n: torch.randn_like(p) for n, p in learner.named_parameters()}
    slope = sum((grads[n] * direction[n]).sum() for n in grads).item()
    sides = []
    with torch.no_grad():
        for h in (1e-5, -1e-5):
            moved = {n: p + h * direction[n] for n, p in learner.named_parameters()}
            sides.append(functional_call(learner, moved, (x, y)).item())
    assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_parameters_without_curvature_or_without_use_are_no_trouble():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.cubed, self.linear, self.unused = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))

        def forward(self, x, y):
            return None, (self.cubed**3 * x).sum() + (self.linear * y).sum()

    learner, x = MAML(Flat(), 2, 0.1), torch.randn(3, 3, dtype=torch.float64)
    grads, _ = meta_gradient(learner, x, x)
    assert distance(grads, meta_grad(learner, x, x)[0]) < 1e-14 and not grads["model.unused"].any()


def test_a_dropped_hessian_cannot_hide():
    learner = MAML(tiny_gpt(), 1, 0.5, objective="final")
    second, _ = meta_gradient(learner, *task())
    learner.first_order = True
    first, _ = meta_gradient(learner, *task())
    assert distance(first, second) > 0.1


def test_first_order_is_the_gradient_at_phi():
    learner = MAML(tiny_gpt(), 2, 0.1, objective="final", first_order=True)
    x, y = task()
    grads, _ = meta_gradient(learner, x, y)
    phi = {n: t.detach() for n, t in learner.adapt(x[:8], y[:8]).items()}
    at_phi = grad(learner.loss)(phi, x[8:], y[8:])
    assert distance({n.removeprefix("model."): g for n, g in grads.items()}, at_phi) < 1e-14


def test_adapt_takes_the_steps_that_torch_optim_takes():
    x, y = task()
    for name, make in (
        ("sgd", lambda params: torch.optim.SGD(params, 0.1, weight_decay=0.0)),
        ("adamw", lambda params: torch.optim.AdamW(params, 0.01, betas=(0.9, 0.95), weight_decay=0.2)),
    ):
        model = tiny_gpt()
        learner = MAML(model, 3, 0.1 if name == "sgd" else 0.01, name, inner_weight_decay=0.2 * (name == "adamw"))
        with torch.no_grad():
            phi = learner.adapt(x, y)
        optimizer = make(model.parameters())
        for xs, ys in zip(x.chunk(3), y.chunk(3), strict=True):
            optimizer.zero_grad()
            model(xs, ys)[1].backward()
            optimizer.step()
        for n, p in model.named_parameters():
            torch.testing.assert_close(phi[n], p.detach(), rtol=1e-6, atol=1e-7)


def test_with_one_step_of_a_fresh_adamw_second_order_is_first_order():
    """Its step is sign(g), whose derivative is zero; a second moment lent by the outer AdamW gives it one."""
    learner = MAML(tiny_gpt(), 1, 0.01, "adamw", objective="final")
    gradients = {}
    for lent in (None, [torch.full_like(p, 1e-2) for p in learner.theta().values()]):
        for first_order in (True, False):
            learner.second_moment, learner.first_order = lent, first_order
            gradients[lent is not None, first_order], _ = meta_gradient(learner, *task())
    assert distance(gradients[False, True], gradients[False, False]) < 0.01
    assert distance(gradients[True, True], gradients[True, False]) > 0.1


def test_tied_embeddings_stay_tied_in_the_inner_loop():
    model, (x, y) = tiny_gpt(), task()
    phi = MAML(model, 3, 0.1).adapt(x, y)
    assert "lm_head.weight" not in phi
    untied = tiny_gpt()
    untied.load_state_dict(phi, strict=False)
    torch.testing.assert_close(functional_call(model, phi, (x, y))[1], untied(x, y)[1], rtol=1e-12, atol=0)


def test_rates_follow_the_schedule_and_clipping_bounds_the_gradient():
    learner = MAML(tiny_gpt(), 4, 1.0, inner_schedule="cosine", inner_warmup=1)
    assert [learner.rates(k)[0] for k in range(4)] == pytest.approx([0.5, 1.0, 0.75, 0.25])
    x, y = task()
    clipped = MAML(tiny_gpt(), 1, 1.0, inner_clip=1e-3)
    phi, theta = clipped.adapt(x, y), clipped.theta()
    assert math.sqrt(sum((phi[n] - theta[n]).detach().square().sum() for n in phi)) == pytest.approx(1e-3)
    assert int(clipped.clipped) == 1


def test_memory_does_not_grow_with_inner_steps_beyond_copies_of_the_parameters():
    """Counts the bytes that autograd keeps between forward and backward: phi_k and g_k, and no activations."""

    def kept(K):
        seen, nodes, storages = set(), [MAML(tiny_gpt(), K, 0.1)(*task(rows=4 * (K + 1))).grad_fn], {}
        while nodes:
            node = nodes.pop()
            names = [name for name in dir(node) if name.startswith("_saved_")]
            for t in (*getattr(node, "saved_tensors", ()), *(getattr(node, name) for name in names)):
                if isinstance(t, torch.Tensor):
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            before = {n for n, _ in node.next_functions if n is not None and n not in seen}
            seen |= before
            nodes += before
        return sum(storages.values())

    parameters = sum(p.numel() * p.element_size() for p in tiny_gpt().parameters())
    assert kept(1) > 3 * parameters and (kept(10) - kept(1)) / 9 < 2.1 * parameters


class Sinusoids(nn.Module):
    """Finn et al. 2017, section 5.1: regress y = a sin(x + b) from ten points with two hidden layers of 40."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x, y):
        prediction = self.net(x)
        return prediction, F.mse_loss(prediction, y)

    @staticmethod
    def draw(n, generator):
        a, b = 0.1 + 4.9 * torch.rand(1, generator=generator), math.pi * torch.rand(1, generator=generator)
        x = 10 * torch.rand(n, 1, generator=generator) - 5
        return x, a * torch.sin(x + b)


def sinusoid_errors(steps: int, tasks: int) -> dict[str, float]:
    """The error after one gradient step on ten points of a new sinusoid, meta-trained and jointly pretrained."""
    errors = {}
    for name, K in (("maml", 1), ("joint", 0)):
        torch.manual_seed(0)
        model, dice = Sinusoids(), torch.Generator().manual_seed(0)
        learner = MAML(model, K, 0.01, objective="final")
        optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(tasks):
                (learner(*Sinusoids.draw(20, dice)) / tasks).backward()
            optimizer.step()
        test, losses = torch.Generator().manual_seed(1), []
        for _ in range(200):
            x, y = Sinusoids.draw(110, test)
            with torch.no_grad():
                phi = MAML(model, 1, 0.01).adapt(x[:10], y[:10])
                losses.append(functional_call(model, phi, (x[10:], y[10:]))[1].item())
        errors[name] = float(np.mean(losses))
    return errors


@pytest.mark.slow
def test_one_step_learns_a_sinusoid_after_meta_training_and_not_after_joint_training():
    errors = sinusoid_errors(steps=15_000, tasks=25)
    assert errors["maml"] < 0.5 and errors["joint"] > 2


def test_a_shortened_meta_training_on_sinusoids_already_beats_joint_training_by_far():
    errors = sinusoid_errors(steps=1_500, tasks=4)
    assert errors["maml"] < 0.75 * errors["joint"] and errors["joint"] > 2


# ----------------------------------------------------------------------------------------------------------------------
# the identities


def test_zero_inner_steps_is_plain_training_bit_for_bit():
    for compute in (None, torch.bfloat16):
        model, (x, y) = tiny_gpt().float(), task()
        with torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
            plain = model(x, y)[1]
        plain.backward()
        expected = {f"model.{n}": p.grad.clone() for n, p in model.named_parameters()}
        for objective in ("final", "every"):
            grads, loss = meta_gradient(MAML(model, 0, objective=objective, autocast=compute), x, y)
            assert loss == plain.item() and all(torch.equal(grads[n], expected[n]) for n in expected)


def test_evaluation_and_training_take_the_same_inner_steps():
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.1, objective="final"), task()
    with torch.no_grad():
        after = learner.loss(learner.adapt(x[:8], y[:8]), x[8:], y[8:])
    assert learner(x, y).item() == after.item()


@pytest.mark.parametrize("first_order", [True, False])
def test_what_is_compiled_is_compiled_whole_and_once(monkeypatch, first_order):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # as traced, without a compiler
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    model = tiny_gpt(n_layer=1)
    compiled = MAML(model, 2, 0.1, first_order=first_order, compile=True)
    for seed in range(2):
        x, y = task(seed=seed)
        expected, _ = meta_gradient(MAML(model, 2, 0.1, first_order=first_order), x, y)
        assert distance(meta_gradient(compiled, x, y)[0], expected) < 1e-12
        assert graphs["unique_graphs"] == (2 if first_order else 3)  # loss, gradient and the Hessian's product


def test_attention_is_fused_except_where_it_is_differentiated_twice():
    learner = MAML(tiny_gpt().float(), 1, 0.1)
    with torch.profiler.profile() as forward:
        loss = learner(*task())
    with torch.profiler.profile() as backward:
        loss.backward()
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    fused = [sum(event.name == kernel for event in p.events()) for p in (forward, backward)]
    assert fused == [2 * 2, 0]  # two layers, two chunks; in the backward none is computed again by a fused kernel


def test_bfloat16_agrees_with_float32_and_leaves_parameters_and_updates_in_float32():
    model, (x, y) = tiny_gpt().float(), task()
    learners = [MAML(model, 1, 0.1, autocast=dtype) for dtype in (None, torch.bfloat16)]
    (exact, loss), (rounded, rounded_loss) = (meta_gradient(learner, x, y) for learner in learners)
    assert 0 < abs(loss - rounded_loss) < 0.02 * loss and 0 < distance(rounded, exact) < 0.05
    assert all(t.dtype == torch.float32 for t in (*rounded.values(), *learners[1].adapt(x, y).values()))


def test_flops_are_what_the_flop_counter_counts():
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    x, y = task(rows=3, T=32)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # of the fused ones it counts no FLOPs
        model(x, y)
    assert counter.get_total_flops() == model.flops_per_token() * x.numel()
    learner = MAML(model, 3, 0.1)
    x, y = task(rows=4, T=32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        learner(x, y).backward()
    cfg = train.Config(block_size=32, batch_size=4, tasks_per_step=1, inner_steps=3)
    counted = train.progress(cfg, model, 1, 0)["flops"]
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.06)  # fused backwards repeat a product


def test_the_logits_are_those_of_gpt2_in_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=96)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=16, **shape)).eval()
    with torch.no_grad():  # away from zero, where one GELU is like another
        for p in theirs.parameters():
            p.mul_(4)
    ours = GPT(GPTConfig(block_size=16, bias=True, **shape)).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # its Conv1D keeps (in, out)
    ours.load_state_dict({k: v.t() if k.endswith(turned) else v for k, v in weights.items()}, strict=True)
    x, _ = task(rows=2, T=16, vocab=96)
    torch.testing.assert_close(ours(x)[0], theirs(x).logits, rtol=0, atol=1e-4)


def test_the_ten_lines_of_the_readme_run_as_they_stand():
    lines = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)
    names = {}
    exec(lines, names)
    by_backward = {n: p.grad for n, p in names["learner"].named_parameters()}
    assert distance(by_backward, names["grads"]) < 1e-4


def test_generation_is_decided_by_the_callers_generator():
    model, start = tiny_gpt(), torch.zeros(1, 1, dtype=torch.long)
    draws = [model.generate(start, 20, top_k=10, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and draws[0].shape == (1, 21)
    modes = [model.generate(start, 20, temperature=0) for _ in range(2)]
    assert torch.equal(*modes)


# ----------------------------------------------------------------------------------------------------------------------
# the systems


@pytest.mark.parametrize("method", [{"inner_steps": 0}, {"first_order": True}, {"first_order_steps": 3}], ids=str)
def test_a_run_cut_and_resumed_is_bitwise_the_uninterrupted_one(flags, tmp_path, monkeypatch, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main(flags(out_dir=whole, **method))
    outer_step = train.outer_step
    for last in (0, 1, 4):  # as if the signal had come during this step, between and at evaluations
        monkeypatch.setattr(
            train, "outer_step", lambda run, ddp, stop, last=last: outer_step(run, ddp, run.step == last)
        )
        train.main(flags(out_dir=cut, init_from="resume", **method))
        assert torch.load(cut / "ckpt.pt", weights_only=True)["step"] == last + 1
    monkeypatch.setattr(train, "outer_step", outer_step)
    train.main(flags(out_dir=cut, init_from="resume", **method))
    assert same(weights_of(whole), weights_of(cut))
    assert rows_of(whole) == rows_of(cut)
    assert not list(cut.glob("*.tmp"))


def torchrun(arguments, n=2, **kwargs):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n}",
        "--master_port=0",
        "--standalone",
    ]
    return subprocess.run([*command, str(HERE / "train.py"), *arguments], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_two_processes_do_what_one_does(flags, tmp_path, inner_steps):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    train.main(flags(out_dir=alone, inner_steps=inner_steps))
    done = torchrun(flags(out_dir=pair, inner_steps=inner_steps))
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows_of(alone), rows_of(pair), strict=True):
        assert one["step"] == two["step"]
        torch.testing.assert_close(torch.tensor(flat(one)), torch.tensor(flat(two)), rtol=1e-4, atol=1e-4)
    ours, theirs = weights_of(alone), weights_of(pair)
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-3, atol=1e-5) for n in ours)


def flat(row) -> list[float]:
    return [
        v
        for value in row.values()
        for v in (value.values() if isinstance(value, dict) else [value])
        if v != row["kind"]
    ]


def test_the_same_command_gives_the_same_log_and_evaluating_more_often_changes_nothing(flags, tmp_path):
    for name, interval in (("a", 3), ("b", 3), ("c", 1)):
        train.main(flags(out_dir=tmp_path / name, eval_interval=interval))
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    trained = [[row for row in rows_of(tmp_path / name) if row["kind"] == "train"] for name in "ac"]
    assert trained[0] == trained[1] and same(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


def test_the_draws_are_pure_and_a_step_covers_the_domains_evenly(flags):
    cfg = train.load_config(flags(tasks_per_step=3))
    data = train.Dataset(cfg)
    assert torch.equal(data.task(5, 1)[0], data.task(5, 1)[0]) and not torch.equal(
        data.task(5, 1)[0], data.task(6, 1)[0]
    )
    for step in range(20):
        assert sorted(data.step_domains(step, 3)) == ["alpha", "beta", "gamma"]
        assert max(data.step_domains(step, 7).count(d) for d in data.train_domains) == 3
    mixed = train.Dataset(train.load_config(flags(shuffle_domains=True, tasks_per_step=3, batch_size=6)))
    rows = [row for task in range(3) for row in mixed.task(0, task)[0].tolist()]
    owners = [(max(i for i in row if i < 256) - 48) // 9 for row in rows]  # each domain has an alphabet of its own
    assert sorted(owners) == [0] * 6 + [1] * 6 + [2] * 6 and owners[:6] != sorted(owners[:6])


def test_rows_of_a_task_never_overlap(flags):
    data = train.Dataset(train.load_config(flags()))
    ids = np.arange(1000, dtype=np.uint16)
    data.shards["alpha", "train"], data.lengths["alpha", "train"] = ["ids"], np.array([1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "shard", lambda path: ids)
        for seed in range(50):
            rows = data.windows("alpha", "train", 50, train.rng(seed))
            assert len(np.unique(rows[:, :-1])) == 50 * 16


def test_a_nanogpt_checkpoint_is_taken_over(flags, tmp_path):
    args = dict(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16, bias=True, dropout=0.0)
    model = GPT(GPTConfig(**args))
    weights = {f"_orig_mod.{n}": p for n, p in model.state_dict().items()}
    torch.save({"model": weights, "model_args": args, "iter_num": 7}, tmp_path / "nano.pt")
    run = train.start(train.load_config(flags(init_from=tmp_path / "nano.pt")))
    assert same(run.learner.model.state_dict(), model.state_dict())


def test_the_pipeline_runs_through_and_adapting_lowers_the_held_out_loss(flags, tmp_path, capsys):
    for name, inner_steps in (("plain", 0), ("maml", 1)):
        train.main(
            flags(out_dir=tmp_path / name, inner_steps=inner_steps, max_steps=60, eval_interval=30, learning_rate=1e-2)
        )
        adapt.main([str(tmp_path / name), "--draws", "1", "--lr", "1e-4", "1e-2", "--rows", "2", "--query_rows", "4"])
    rows = [row for row in rows_of(tmp_path / "maml") if row["kind"] == "adapt"]
    assert {row["domain"]: row["role"] for row in rows} == {"far": "heldout", "tune": "tune"} and len(rows) == 4
    curve = next(row["loss"] for row in rows if row["role"] == "heldout" and row["chosen"])
    assert len(curve) == 6 and curve[-1] < curve[0]
    plot.main([str(tmp_path / "plain"), str(tmp_path / "maml"), "-o", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "maml" in capsys.readouterr().out


def test_adapting_to_ones_own_text_is_saved_and_can_be_gone_on_from(flags, tmp_path, capsys):
    train.main(flags())
    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    notes = ["--text", str(tmp_path / "notes.txt"), "--max_new_tokens", "20", "--lr", "1e-2"]
    adapt.main([str(tmp_path / "run"), *notes, "--save", str(tmp_path / "adapted.pt")])
    before, after = [
        float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if "nats per token" in line
    ]
    assert after < before
    adapt.main([str(tmp_path / "adapted.pt"), *notes])
    assert f"before: {after:.3f}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# the edges: what is wrong, and what to do, in one line


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"inner_stepz": 1}, "did you mean 'inner_steps'"),
        ({"max_steps": "many"}, "max_steps in the command line must be int"),
        ({"bias": 1}, "must be bool"),
        ({"objective": "evry"}, "choose 'final' or 'every'"),
        ({"dtype": "float16"}, "choose 'float32' or 'bfloat16'"),
        ({"batch_size": 5}, "batch_size=5 must be a multiple of inner_steps + 1 = 2"),
        ({"dataset": "nowhere"}, "run python prepare_data.py nowhere"),
        ({"block_size": 100_000}, "lower block_size"),
        ({"n_head": 3}, "must be a multiple of n_head"),
        ({"init_from": "elsewhere.pt"}, "no checkpoint at elsewhere.pt"),
        ({"dropout": 0.1}, "set dropout=0.0, or first_order=True"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_a_mistake_is_answered_with_its_remedy(flags, changes, remedy):
    with pytest.raises(SystemExit, match=re.escape(remedy)):
        train.main(flags(**changes))


def test_config_files_are_checked_like_the_command_line(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("import math\n_half = 0.5\nlearning_rate = 1\ninner_lr = _half * math.pi\n")
    cfg = train.load_config([str(config), "--out_dir=3", "--bias=true"])
    assert (cfg.learning_rate, cfg.out_dir, cfg.bias) == (1.0, "3", True) and cfg.inner_lr == math.pi / 2
    for text, remedy in (
        ("leraning_rate = 1", "did you mean 'learning_rate'"),
        ("n_layer = 2.5", "n_layer"),
        ("x =", "runs"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=remedy):
            train.load_config([str(config)])


def test_resuming_as_something_else_is_refused(flags, data_dir):
    train.main(flags(max_steps=1))
    for changes, remedy in (({"n_embd": 32}, "n_embd=16"), ({"learn_inner_lr": False}, "inner rates=1")):
        with pytest.raises(SystemExit, match=remedy):
            train.main(flags(init_from="resume", **changes))
    meta = data_dir / "tiny" / "meta.json"
    text = meta.read_text()
    try:
        meta.write_text(text + " ")
        with pytest.raises(SystemExit, match="dataset="):
            train.main(flags(init_from="resume"))
    finally:
        meta.write_text(text)


def test_a_checkpoint_cut_short_is_named_and_no_code_in_it_runs(flags, tmp_path):
    train.main(flags(max_steps=1))
    path = tmp_path / "run" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match=r"ckpt\.pt is cut short"):
        train.main(flags(init_from="resume"))
    torch.save({"model": {}, "model_args": Path("x")}, path)  # any object that is not plain data
    with pytest.raises(SystemExit, match="no checkpoint of a GPT"):
        train.main(flags(init_from="resume"))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint_whole(flags, tmp_path):
    with pytest.raises(SystemExit, match="stopped before the update"):
        train.main(flags(inner_lr=1e30, learn_inner_lr=False, inner_steps=3))
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 0 and all(torch.isfinite(w).all() for w in ckpt["model"].values())


@pytest.mark.parametrize("end", ['{"kind": "val", "loss": {"a": 1.0}', '{"kind": "tr', '{"kind": "train"}'])
def test_a_log_cut_in_the_middle_of_a_row_does_not_stop_a_resume(flags, tmp_path, end):
    train.main(flags(max_steps=2))
    rows = rows_of(tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write(end)
    train.main(flags(max_steps=2, init_from="resume"))
    assert rows_of(tmp_path / "run") == rows


def test_what_an_evaluation_lends_and_what_a_row_counts_survive_a_resume(flags, tmp_path, monkeypatch):
    watched = dict(inner_optimizer="adamw", inner_lr=1e-3, inner_warm_start=True, inner_clip=0.05, log_interval=5)
    train.main(flags(out_dir=tmp_path / "whole", **watched))
    outer_step = train.outer_step
    monkeypatch.setattr(train, "outer_step", lambda run, ddp, stop: outer_step(run, ddp, run.step == 2))
    train.main(flags(out_dir=tmp_path / "cut", **watched))
    train.main(flags(out_dir=tmp_path / "cut", init_from="resume", **watched))
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
    assert sum(row.get("clipped", 0) for row in rows_of(tmp_path / "cut")) == 4 * 6  # one inner step of each task


def test_a_full_disk_under_the_log_is_named(flags, monkeypatch):
    def full(out_dir, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "append_row", full)
    with pytest.raises(SystemExit, match=r"No space left .*--init_from=resume"):
        train.main(flags())


def test_weights_that_are_not_finite_never_become_a_checkpoint(flags, tmp_path):
    with pytest.raises(SystemExit, match="step 1: evaluation"):
        train.main(flags(learning_rate=1e30, warmup_steps=0, eval_interval=1, inner_steps=0, learn_inner_lr=False))
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"inner_steps": -1},
        {"max_steps": -1},
        {"seed": -1},
        {"grad_clip": -1},
        {"learning_rate": 0},
        {"min_lr": "1e999"},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(flags, changes):
    with pytest.raises(SystemExit, match=f"{next(iter(changes))}=.* must be"):
        train.main(flags(**changes))


@pytest.mark.parametrize("text", ["{", "[]", '{"domains": {"a": {}}}'])
def test_a_meta_json_that_is_none_is_named(flags, tmp_path, text):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "meta.json").write_text(text)
    with pytest.raises(SystemExit, match=r"tiny/meta\.json is not .*--overwrite"):
        train.main(flags(data_dir=tmp_path))


def test_an_earlier_run_steps_aside(flags, tmp_path):
    train.main(flags(max_steps=1))
    train.main(flags(max_steps=2))
    assert rows_of(f"{tmp_path / 'run'}.1")[-1]["step"] == 1 and rows_of(tmp_path / "run")[-1]["step"] == 2


def test_help_names_every_field(capsys):
    train.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}: " in text for name in train.FIELDS)


# ----------------------------------------------------------------------------------------------------------------------
# the data: text to shards


def prepared(tmp_path, source, *options, name="set"):
    prepare_data.main([str(source), "--name", name, "--data_dir", str(tmp_path / "data"), *options])
    return json.loads((tmp_path / "data" / name / "meta.json").read_text())


def documents_of(root, meta, domain, split):
    encoding = prepare_data.get_tokenizer(meta["tokenizer"])
    ids = np.concatenate([prepare_data.open_shard(root / path) for path in meta["domains"][domain]["shards"][split]])
    return [encoding.decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == meta["eot"]))[1:]]


def write_folder(folder, per_domain=40):
    for domain in ("père noël", "數學"):
        (folder / domain).mkdir(parents=True)
        for i in range(per_domain):
            (folder / domain / f"{i}.md").write_text(
                f"{domain} {i}: <|endoftext|> is text here. " + "é数 \n" * (i * 7), "utf-8"
            )
    return folder


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_any_text_comes_back_from_its_tokens(name):
    try:
        encoding = prepare_data.get_tokenizer(name)
    except SystemExit:
        pytest.skip("the gpt2 encoding is neither cached nor reachable")
    for text in ("", "plain", " \n\t\r\x00", "日本語 🙂 ∂x", "<|endoftext|>", "a" * 5000):
        ids = prepare_data.encode_document(encoding, text)
        assert ids.dtype == np.uint16 and ids[0] == encoding.eot_token and encoding.decode(ids[1:].tolist()) == text
        assert ids[1:].tolist() == encoding.encode_ordinary(text)


def test_every_document_is_in_one_split_whole(tmp_path):
    meta = prepared(tmp_path, write_folder(tmp_path / "text"), "--heldout", "數學")
    for domain, entry in meta["domains"].items():
        train, val = (documents_of(tmp_path / "data/set", meta, domain, split) for split in ("train", "val"))
        files = {path.read_text("utf-8") for path in (tmp_path / "text" / domain).iterdir()}
        assert set(train) | set(val) == files and not set(train) & set(val) and len(train + val) == 40
        assert 0 < len(val) < len(train) and entry["role"] == ("heldout" if domain == "數學" else "train")
        assert entry["bytes"]["train"] + entry["bytes"]["val"] == sum(len(text.encode()) for text in files)


def test_a_shard_cut_short_is_refused(tmp_path):
    prepared(tmp_path, write_folder(tmp_path / "text"))
    path = tmp_path / "data/set/數學/train_000000.bin"
    header, ids = np.fromfile(path, np.int32, 256), np.fromfile(path, np.uint16)[512:]
    assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    path.write_bytes(path.read_bytes()[:-2])
    for read in (prepare_data.open_shard, lambda path: prepared(tmp_path, tmp_path / "text", "--verify")):
        with pytest.raises((ValueError, SystemExit), match=r"train_000000.*--overwrite"):
            read(path)


def test_a_text_of_one_line_is_not_cut_inside_a_character(tmp_path):
    (tmp_path / "line.txt").write_text("數學" * 50, "utf-8")
    meta = prepared(tmp_path, tmp_path / "line.txt")
    parts = [documents_of(tmp_path / "data/set", meta, "line", split)[0] for split in ("train", "val")]
    assert "".join(parts) == "數學" * 50 and all(parts)


def test_one_document_still_gives_both_splits(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"línea {i}\n" for i in range(100)), "utf-8")
    meta = prepared(tmp_path, tmp_path / "book.txt")
    train, val = (documents_of(tmp_path / "data/set", meta, "book", split) for split in ("train", "val"))
    assert (
        "".join(train + val) == (tmp_path / "book.txt").read_text("utf-8") and 0.05 < len(val[0]) / len(train[0]) < 0.2
    )


def test_bad_records_are_counted_and_duplicates_dropped(tmp_path):
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": f"document {i % 30}"}) for i in range(40)]
    (tmp_path / "text/a.jsonl").write_text("\n".join([*lines, "{broken", '{"no": "text"}', '{"text": "\\ud800"}']))
    (tmp_path / "text/b.txt").write_bytes(b"\xff\xfe bad\n<|endoftext|>\ndocument 1<|endoftext|>\n<|endoftext|>\nown\n")
    domains = prepared(tmp_path, tmp_path / "text")["domains"]
    assert domains["a"]["skipped"] == {"duplicate": 10, "malformed": 2, "undecodable": 1}
    assert domains["b"]["skipped"] == {"undecodable": 1} and sum(domains["a"]["documents"].values()) == 30


def test_a_user_s_mistake_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", lambda name: SimpleNamespace(n_vocab=100277))
    (tmp_path / "empty").mkdir()
    prepared(tmp_path, write_folder(tmp_path / "text"), name="made")
    for folder, options, name, remedy in (
        ("text", ["--heldout", "數字"], "set", "數學"),
        ("text", ["--tokenizer", "cl100k_base"], "set", "uint16: use gpt2 or bytes"),
        ("text", ["--max_tokens", "500"], "made", "--overwrite"),
        ("text", ["--verify"], "none", "without --verify"),
        ("empty", [], "set", "give a folder of text"),
        ("nothing", [], "set", "common_pile"),
    ):
        with pytest.raises(SystemExit, match=remedy):
            prepared(tmp_path, tmp_path / folder, *options, name=name)


def test_a_sample_is_as_large_as_asked(tmp_path):
    domains = prepared(tmp_path, write_folder(tmp_path / "text", 99), "--max_tokens", "30000")["domains"]
    assert all(25_000 < sum(entry["tokens"].values()) <= 31_000 for entry in domains.values())


def test_shards_of_llm_c_are_a_domain_as_they_are(tmp_path):
    (tmp_path / "text/fineweb").mkdir(parents=True)
    for name, count in (("fineweb_train_000001.bin", 300), ("fineweb_val_000000.bin", 50)):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, count
        (tmp_path / "text/fineweb" / name).write_bytes(
            header.tobytes() + (np.arange(count, dtype=np.uint16) % 257).tobytes()
        )
    entry = prepared(tmp_path, tmp_path / "text")["domains"]["fineweb"]
    assert entry["tokens"] == {"train": 300, "val": 50} and "val_000000" in str(entry["shards"]["val"])


def test_killed_again_and_again_it_ends_with_the_same_bytes_for_any_number_of_workers(tmp_path):
    source = write_folder(tmp_path / "text", per_domain=150)
    code = "import sys, time, prepare_data as P; P.SHARD_TOKENS, cut, append = 50_000, P.batches, P.append\n"
    code += (
        "P.batches = lambda documents: cut(documents, 5_000)\n"  # many small steps, each slow enough to be killed in
    )
    code += "P.append = lambda *shard: time.sleep(0.005) or append(*shard); P.main(sys.argv[1:])"
    run = [sys.executable, "-c", code, str(source), "--name", "set", "--data_dir"]
    subprocess.run([*run, tmp_path / "whole"], check=True, capture_output=True, cwd=HERE)
    kills = 0
    while not (tmp_path / "parts/set/meta.json").exists():
        full = len(list(tmp_path.glob("parts/set/*/*.bin")))
        process = subprocess.Popen([*run, tmp_path / "parts", "--workers", "2"], cwd=HERE, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("parts/set/*/*.bin"))) < full + 3:
            time.sleep(0.002)
        kills += process.poll() is None
        assert kills < 12, "it does not go on but starts anew"
        process.kill()
        process.wait()
        assert all(len(prepare_data.open_shard(path)) for path in tmp_path.glob("parts/set/*/*.bin"))
    parts, whole = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
        for root in (tmp_path / "parts", tmp_path / "whole")
    )
    assert parts == whole and len(whole) > 9 and kills > 1


def test_one_dataset_of_many_domains_streams_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"row {i} " * 9, "meta": {"set": "Pile-CC" if i % 3 else "DM Mathematics"}} for i in range(300)]
    (tmp_path / "in").mkdir()
    for part in range(2):
        pandas.DataFrame(rows[part * 150 : part * 150 + 150]).to_parquet(tmp_path / f"in/{part}.parquet")
        with gzip.open(tmp_path / f"in/{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[part * 150 : part * 150 + 150])
    options = ("--tokenizer", "bytes", "--domain_field", "meta.set", "--heldout", "DM Mathematics", "--data_files")
    parquet, lines = (
        prepared(tmp_path, "local", "--hf", kind, *options, str(tmp_path / "in" / glob), name=kind)["domains"]
        for kind, glob in (("parquet", "*.parquet"), ("json", "*.jsonl.gz"))
    )
    assert (
        sum(parquet["DM Mathematics"]["documents"].values()) == 100 and parquet["DM Mathematics"]["role"] == "heldout"
    )
    for domain in parquet:
        assert list(parquet[domain]["shards"]["train"].values()) == list(lines[domain]["shards"]["train"].values())


# ----------------------------------------------------------------------------------------------------------------------
# plot.py: the scoreboard says what the logs say


def write_log(path, points, adapt=(), seed=1, **config):
    """A log with evaluations [(tokens, loss)] and adapt rows [(losses, lr, chosen)] of the last of them."""
    data = {
        "name": "toy",
        "tokenizer": "bytes",
        "roles": {"a": "train", "z": "heldout"},
        "bytes_per_token": {"a": 1, "z": 1},
    }
    rows = [{"kind": "run", "config": {"seed": seed, **config}, "commit": "c0ffee", "params": 10, "dataset": data}]
    at = [{"step": t, "tokens": t, "flops": 2 * t, "seconds": 3 * t} for t, _ in points]
    rows += [{"kind": "val", **a, "loss": {"a": loss, "z": loss}} for a, (_, loss) in zip(at, points, strict=True)]
    same = {"kind": "adapt", **at[-1], "domain": "z", "role": "heldout", "draw": 0, "support_tokens": [0, 8]}
    rows += [{**same, "loss": loss, "lr": lr, "chosen": chosen} for loss, lr, chosen in adapt]
    path.mkdir()
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_speed_up_of_a_curve_that_falls_twice_as_fast_is_two_and_of_one_that_stays_above_is_missing(tmp_path):
    base = write_log(tmp_path / "base", [(0, 5.0), (50, 4.0), (100, 3.0)])
    fast = write_log(tmp_path / "fast", [(0, 5.0), (100, 1.0)], inner_steps=1)  # at 3.0 between evaluations, at 50
    slow = write_log(tmp_path / "slow", [(0, 5.0), (100, 3.1)], inner_steps=2)
    methods, _ = plot.read_methods([base, fast, slow])
    (base,), (fast,), (slow,) = (list(seeds.values()) for seeds in methods.values())
    np.testing.assert_allclose(plot.speed_up([fast], [base]), [2, 2, 2])
    assert np.isnan(plot.speed_up([slow], [base])).all()


def test_runs_that_differ_only_in_seed_fold_into_one_method_and_differences_are_paired_by_seed(tmp_path):
    losses = {"base_s1": 3.0, "base_s2": 4.0, "maml_s1": 2.0, "maml_s2": 3.5}
    for name, loss in losses.items():
        write_log(
            tmp_path / name, [(0, 9.0), (9, loss)], seed=int(name[-1]), inner_steps=int("maml" in name), out_dir=name
        )
    methods, unit = plot.read_methods(tmp_path / name for name in losses)
    assert {label: sorted(seeds) for label, seeds in methods.items()} == {"base": [1, 2], "maml": [1, 2]}
    # differences -1 and -0.5: mean -0.75, deviation 0.5 / sqrt(2), so half the interval is 12.706 * 0.25
    row = next(row for row in plot.scoreboard(methods, unit) if row[1] == "held-out domains")
    assert row[-1] == "2.750 (-0.75 ± 3.2)"


def test_the_speed_up_after_adaptation_is_read_from_the_checkpoints_that_were_adapted(tmp_path):
    runs = []
    for name, ends in {"base": [5.0, 4.0, 3.0], "fast": [4.0, 3.0, 2.0], "last": [None, None, 2.0]}.items():
        log = write_log(tmp_path / name, [(0, 9.0), (50, 9.0), (100, 9.0), (150, 9.0)], out_dir="", K=len(runs))
        at = [{"step": t, "tokens": t, "flops": 2 * t, "seconds": 3 * t} for t in (50, 100, 150)]
        row = {"kind": "adapt", "domain": "z", "role": "heldout", "draw": 0, "lr": 1, "chosen": True}
        rows = [
            {**row, **a, "support_tokens": [0, 8], "loss": [9.0, end]} for a, end in zip(at, ends, strict=True) if end
        ]
        with open(log / "log.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        runs.append(log)
    base, fast, last = ([*seeds.values()] for seeds in plot.read_methods(runs)[0].values())
    np.testing.assert_allclose(plot.speed_up(fast, base, "adapted"), [1.5, 1.5, 1.5])  # at 3.0 after 100, not 150
    assert np.isnan(plot.speed_up(last, base, "adapted")).all()  # one checkpoint is no curve


def test_the_table_of_a_sweep_is_sorted_by_train_and_tune_loss_and_says_what_was_changed(tmp_path, capsys):
    for name, lr, seen, tune, far in (
        ("base", 1, 3.0, 2.0, 1.0),
        ("best", 2, 2.9, 1.9, 9.0),
        ("raw", 3, 1.0, None, 1.0),
    ):
        log = write_log(tmp_path / name, [(0, 9.0), (10 * lr, seen)], lr=lr, eval_steps=lr, seed=lr, out_dir=name)
        rows = [json.loads(line) for line in (log / "log.jsonl").read_text().splitlines()]
        rows[0]["dataset"]["roles"] |= {"t": "tune"}
        for row in rows[1:]:
            row["loss"]["t"] = 0.0
        same = {**rows[-1], "kind": "adapt", "draw": 0, "lr": 1, "chosen": True, "support_tokens": [0, 8]}
        unseen = {"t": ("tune", tune), "z": ("heldout", far)} if tune else {}
        rows += [{**same, "domain": d, "role": role, "loss": [5.0, end]} for d, (role, end) in unseen.items()]
        (log / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.main([*(str(tmp_path / name) for name in ("base", "best", "raw")), "--table", "--markdown"])
    table = [[text.strip() for text in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert table[2] == ["best", "lr=2", "2", "20", "2.900", "1.900", "5.000", "9.000"]
    assert table[3] == ["base", "-", "1", "10", "3.000", "2.000", "5.000", "1.000"]
    assert table[4] == ["raw", "lr=3", "3", "30", "1.000", "-", "-", "-"]
    assert not (tmp_path / "curves.png").exists()


def test_newer_adapt_rows_take_the_place_of_older_ones(tmp_path):
    old, new = [([3.0, 2.5], 0.1, True), ([3.0, 2.9], 0.2, False)], [([3.0, 2.0], 0.1, False), ([3.0, 1.0], 0.2, True)]
    run = plot.read_methods([write_log(tmp_path / "run", [(9, 3.0)], old + new)])[0]["run"][1]
    np.testing.assert_array_equal(run["ladder"][:, 0, 0], [[3.0, 1.0], [3.0, 2.0]])  # the rate chosen last comes first


def test_a_cut_last_line_is_left_out_and_logs_beyond_repair_are_refused_with_a_remedy(tmp_path):
    log = write_log(tmp_path / "run", [(0, 5.0), (9, 3.0)]) / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"kind": "val", "st')
    assert [row["kind"] for row in plot.read_log(log)] == ["run", "val", "val"]
    _, first, *_ = whole.splitlines()
    for text, remedy in {
        "": "train it again",
        first + "\n": "train it again",
        "no json\n" + whole: "line 1.*delete",
    }.items():
        log.write_text(text)
        with pytest.raises(SystemExit, match=remedy):
            plot.read_log(log)
    with pytest.raises(SystemExit, match=r"no log at .*train\.py"):
        plot.read_log(tmp_path / "nowhere")


def test_the_picture_and_the_scoreboard_need_no_torch(tmp_path):
    run = write_log(tmp_path / "run", [(0, 5.0), (9, 3.0)])
    code = "import sys, plot; sys.argv[1:] = [sys.argv[1]]; plot.main(); assert 'torch' not in sys.modules"
    out = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, cwd=Path(plot.__file__).parent
    )
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.splitlines()[-1]).stat().st_size > 10_000
