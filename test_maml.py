"""Every claim of the repository as a test named like a sentence: make test, or python -m pytest.

The expensive one is behind a marker: python -m pytest -m slow.
"""

import dataclasses
import gzip
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
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
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import adapt
import plot
import prepare_data
import train
from maml import MAML, meta_grad
from model import GPT, GPTConfig

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tensors this small only wait for a second thread
refused = partial(pytest.raises, SystemExit)  # a user's mistake ends the program with one line

# ----------------------------------------------------------------------------------------------------------------------
# what the tests share: models and gradients, data and runs


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


def meta_gradient(learner, x, y):
    learner.zero_grad()
    loss = learner(x, y)
    loss.backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters()}, loss.item()


def distance(a: dict, b: dict) -> float:
    """Relative distance of two gradients."""
    return math.sqrt(sum((a[n] - b[n]).square().sum() for n in b) / sum(b[n].square().sum() for n in b))


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
    """Three train domains, one to tune on and one held out: random walks, each over an alphabet of its own."""
    text, data = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data")
    for i, domain in enumerate(["alpha", "beta", "gamma", "tune", "far"]):
        dice = np.random.default_rng(i)
        walks = [48 + 9 * i + np.cumsum(dice.integers(-1, 3, 400)) % 9 for _ in range(40)]
        write(text, {f"{domain}.jsonl": records(" ".join(map(chr, walk)) for walk in walks)})
    prepare_data.main([str(text), "--name", "tiny", "--heldout", "far", "--tune", "tune", "--data_dir", str(data)])
    return data


@pytest.fixture
def flags(data_dir, tmp_path):
    """The command line of a run that takes a second."""
    fields = dict(out_dir=tmp_path / "run", data_dir=data_dir, dataset="tiny", device="cpu")
    fields |= dict(block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=4, tasks_per_step=4, inner_steps=1)
    fields |= dict(max_steps=6, warmup_steps=2, learn_inner_lr=True, eval_interval=3, eval_steps=2, log_interval=1)
    return lambda **changes: [f"--{key}={value}" for key, value in (fields | changes).items()]


@pytest.fixture
def pretrain(flags, tmp_path):
    def pretrain(name="run", **changes) -> Path:
        train.main(flags(out_dir=tmp_path / name, **changes))
        return tmp_path / name

    return pretrain


def during_step(n, action, monkeypatch, outer_step=train.outer_step):
    """Something happens while a later run makes its step n."""

    def acting(run, *rest):
        if run.step == n:
            action()
        return outer_step(run, *rest)

    monkeypatch.setattr(train, "outer_step", acting)


def log_of(out_dir) -> dict[str, list[dict]]:
    """The rows of a log by kind, without what no two runs share: the header and the seconds."""
    log = defaultdict(list)
    for row in map(json.loads, (Path(out_dir) / "log.jsonl").read_text().splitlines()[1:]):
        log[row.pop("kind")].append({key: value for key, value in row.items() if key != "seconds"})
    return log


def checkpoint_of(out_dir) -> dict:
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)


def weights_of(out_dir) -> dict:
    ckpt = checkpoint_of(out_dir)
    moments = {(i, name): value for i, state in ckpt["optimizer"]["state"].items() for name, value in state.items()}
    return ckpt["model"] | ckpt["learner"] | moments


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------------------
# the mathematics


class Toy(nn.Module):
    """Parameters in float64, and any loss(x, y, *parameters)."""

    def __init__(self, loss, *parameters):
        super().__init__()
        self.loss, self.list = loss, nn.ParameterList(p.double() for p in parameters)

    def forward(self, x, y):
        return None, self.loss(x, y, *self.list)


def test_one_step_on_a_quadratic_has_the_closed_form():
    """L_k = |phi - c_k|^2 / 2: the gradient is (1 - lr) (phi_1 - c_1), and its mean with theta - c_0 for 'every'."""
    theta, c = torch.tensor([1.0, -2.0]), torch.tensor([[3.0, 1.0], [0.5, 4.0]], dtype=torch.float64)
    final = 0.9 * (theta - 0.1 * (theta - c[0]) - c[1])
    for objective, expected in (("final", final), ("every", (final + theta - c[0]) / 2)):
        model = Toy(lambda x, y, w: 0.5 * (w - y[0]).square().sum(), theta)
        MAML(model, 1, 0.1, objective=objective)(c, c).backward()
        torch.testing.assert_close(model.list[0].grad, expected, rtol=1e-14, atol=0)


OPTIONS = [
    dict(inner_steps=K, inner_optimizer=optimizer, objective=objective, first_order=first, **more)
    for K, optimizer, objective, first in itertools.product((1, 3), ("sgd", "adamw"), ("final", "every"), (False, True))
    for more in ({}, {"learn_inner_lr": True, "inner_clip": 0.5, "inner_schedule": "cosine", "inner_warmup": 1})
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_meta_gradient_is_that_of_the_unrolled_episode(options):
    learner, (x, y) = MAML(tiny_gpt(), inner_lr=0.05, inner_weight_decay=0.1, **options).double(), task()
    grads, loss = meta_gradient(learner, x, y)
    naive, naive_loss = meta_grad(learner, x, y)
    assert abs(loss - naive_loss) < 1e-13 and grads.keys() == naive.keys()
    # the derivative of a fresh AdamW's step divides by |g|, and rounding with it
    assert distance(grads, naive) < (1e-9 if "adamw" in options.values() else 1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("objective", ["final", "every"])
def test_the_meta_gradient_is_what_finite_differences_say(optimizer, objective):
    """Central differences in float64 along a random direction in theta and the learned rates together."""
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.05, optimizer, objective=objective, learn_inner_lr=True).double(), task()
    if optimizer == "adamw":  # fresh, its first step is sign(g), on which differences see nothing but jumps
        learner.second_moment = [torch.full_like(p, 1e-2) for p in learner.theta().values()]
    grads, _ = meta_gradient(learner, x, y)
    torch.manual_seed(2)
    direction = {n: torch.randn_like(p) for n, p in learner.named_parameters()}
    slope = sum((grads[n] * direction[n]).sum() for n in grads).item()
    with torch.no_grad():
        moved = [{n: p + h * direction[n] for n, p in learner.named_parameters()} for h in (1e-5, -1e-5)]
        above, below = (functional_call(learner, parameters, (x, y)).item() for parameters in moved)
    assert (above - below) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_parameters_without_curvature_or_without_use_are_no_trouble():
    model = Toy(lambda x, y, cubed, linear, unused: (cubed**3 * x + linear * y).sum(), *torch.ones(3, 3))
    learner, x = MAML(model, 2, 0.1), torch.randn(3, 3, dtype=torch.float64)
    grads, _ = meta_gradient(learner, x, x)
    assert distance(grads, meta_grad(learner, x, x)[0]) < 1e-14 and not grads["model.list.2"].any()


def test_first_order_is_the_gradient_after_adapting_and_a_dropped_hessian_cannot_hide():
    learner, (x, y) = MAML(tiny_gpt(), 2, 0.5, objective="final"), task()
    second, second_loss = meta_gradient(learner, x, y)
    learner.first_order = True
    first, first_loss = meta_gradient(learner, x, y)
    phi = {n: t.detach() for n, t in learner.adapt(x[:8], y[:8]).items()}
    assert first_loss == second_loss == learner.loss(phi, x[8:], y[8:]).item()
    at_phi = grad(learner.loss)(phi, x[8:], y[8:])
    assert distance(first, {f"model.{n}": g for n, g in at_phi.items()}) < 1e-14 and distance(first, second) > 0.1


@pytest.mark.parametrize("name, lr, decay", [("sgd", 0.1, 0.0), ("adamw", 0.01, 0.2)])
def test_adapt_takes_the_steps_that_torch_optim_takes_and_tied_embeddings_stay_tied(name, lr, decay):
    model, (x, y) = tiny_gpt(), task()
    with torch.no_grad():
        phi = MAML(model, 3, lr, name, inner_weight_decay=decay).adapt(x, y)
        loss = functional_call(model, phi, (x, y))[1]
    make = {"sgd": torch.optim.SGD, "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95))}[name]
    optimizer = make(model.parameters(), lr, weight_decay=decay)
    for xs, ys in zip(x.chunk(3), y.chunk(3), strict=True):
        optimizer.zero_grad()
        model(xs, ys)[1].backward()
        optimizer.step()
    torch.testing.assert_close(phi, {n: p.detach() for n, p in model.named_parameters()}, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, model(x, y)[1].detach(), rtol=1e-6, atol=0)


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


def test_rates_follow_the_schedule_and_clipping_bounds_the_gradient():
    learner = MAML(tiny_gpt(), 4, 1.0, inner_schedule="cosine", inner_warmup=1)
    assert [learner.rates(k)[0] for k in range(4)] == pytest.approx([0.5, 1.0, 0.75, 0.25])
    clipped = MAML(tiny_gpt(), 1, 1.0, inner_clip=1e-3)
    phi, theta = clipped.adapt(*task()), clipped.theta()
    assert math.sqrt(sum((phi[n] - theta[n]).detach().square().sum() for n in phi)) == pytest.approx(1e-3)
    assert int(clipped.clipped) == 1


def test_memory_does_not_grow_with_inner_steps_beyond_copies_of_the_parameters():
    def kept(K, **how):
        """Bytes that a forward leaves allocated for its backward, in copies of the parameters."""
        learner, (x, y) = MAML(tiny_gpt(), K, 0.1), task(rows=4 * (K + 1))
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = learner(x, y, **how)  # noqa: F841
        left = sum(event.self_cpu_memory_usage for event in profile.events())
        return left / sum(p.numel() * p.element_size() for p in learner.parameters())

    assert (kept(4) - kept(1)) / 3 < 2.1 < (kept(4, unrolled=True) - kept(1, unrolled=True)) / 3


class Regression(nn.Sequential):
    def forward(self, x, y):
        prediction = super().forward(x)
        return prediction, F.mse_loss(prediction, y)


@pytest.mark.parametrize(
    "steps, tasks, limit", [(2_500, 1, math.inf), pytest.param(15_000, 25, 0.5, marks=pytest.mark.slow)]
)
def test_one_step_learns_a_sinusoid_after_meta_training_and_not_after_joint_training(steps, tasks, limit):
    """Finn et al. 2017, section 5.1: regress y = a sin(x + b) from ten points with two hidden layers of 40."""

    def draw(n, dice):
        a, b = 0.1 + 4.9 * torch.rand(1, generator=dice), math.pi * torch.rand(1, generator=dice)
        x = 10 * torch.rand(n, 1, generator=dice) - 5
        return x, a * torch.sin(x + b)

    errors = {}
    for K in (0, 1):
        torch.manual_seed(0)
        model = Regression(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        learner, one_step = MAML(model, K, 0.01, objective="final"), MAML(model, 1, 0.01)
        optimizer, (dice, test) = torch.optim.Adam(learner.parameters(), 1e-3), map(seeded, (0, 1))
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(tasks):
                (learner(*draw(20, dice)) / tasks).backward()
            optimizer.step()
        with torch.no_grad():
            new = [draw(110, test) for _ in range(200)]
            errors[K] = np.mean([one_step.loss(one_step.adapt(x[:10], y[:10]), x[10:], y[10:]).item() for x, y in new])
    assert errors[0] > 2 and errors[1] < min(limit, 0.75 * errors[0])


# ----------------------------------------------------------------------------------------------------------------------
# the identities


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("objective", ["final", "every"])
def test_zero_inner_steps_is_plain_training_bit_for_bit(compute, objective):
    model, (x, y) = tiny_gpt().float(), task()
    with torch.autocast("cpu", torch.bfloat16, enabled=compute is not None):
        plain = model(x, y)[1]
    plain.backward()
    expected = {f"model.{n}": p.grad.clone() for n, p in model.named_parameters()}
    grads, loss = meta_gradient(MAML(model, 0, objective=objective, autocast=compute), x, y)
    assert loss == plain.item() and same(grads, expected)


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
    learner, kernel = MAML(tiny_gpt().float(), 1, 0.1), "aten::_scaled_dot_product_flash_attention_for_cpu"
    with torch.profiler.profile() as forward:
        loss = learner(*task())
    with torch.profiler.profile() as backward:
        loss.backward()
    fused = [sum(event.name == kernel for event in p.events()) for p in (forward, backward)]
    assert fused == [2 * 2, 0]  # two layers, two chunks; in the backward none is computed again by a fused kernel


def test_attention_on_a_cpu_computes_in_float32_where_the_rest_computes_in_bfloat16():
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    for model, compute in ((tiny_gpt().float(), torch.bfloat16), (tiny_gpt().bfloat16(), None)):
        with Watch():
            MAML(model, 1, autocast=compute)(*task())
    assert seen == [torch.float32] * 8  # two models, two chunks, two layers


def test_bfloat16_agrees_with_float32_and_leaves_parameters_and_updates_in_float32():
    model, (x, y) = tiny_gpt().float(), task()
    learners = [MAML(model, 1, 0.1, autocast=dtype) for dtype in (None, torch.bfloat16)]
    (exact, loss), (rounded, rounded_loss) = (meta_gradient(learner, x, y) for learner in learners)
    assert 0 < abs(loss - rounded_loss) < 0.02 * loss and 0 < distance(rounded, exact) < 0.05
    assert all(t.dtype == torch.float32 for t in (*rounded.values(), *learners[1].adapt(x, y).values()))


@pytest.mark.parametrize("method", [{"inner_steps": 0}, {"first_order": True}, {"first_order": False}], ids=str)
def test_the_flops_of_the_log_are_what_the_flop_counter_counts(flags, method):
    def counted(compute):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of the fused it counts none
            compute()
        return counter.get_total_flops()

    shape = dict(n_embd=64, n_layer=2, inner_steps=3, max_steps=1)
    run = train.start(train.load_config(flags(**shape | method)))
    x, y = run.data.task(0, 0)
    assert counted(lambda: run.learner.model(x, y)) == run.learner.model.flops_per_token() * x.numel()
    flops = 4 * counted(lambda: run.learner(x, y).backward())  # four tasks
    train.train(run)
    # where it is differentiated twice, attention in blocks leaves some of the masked half out
    assert flops == pytest.approx(log_of(run.cfg.out_dir)["val"][-1]["flops"], rel=0.02)


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
    names = {}
    ten_lines, recipe = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(ten_lines, names)
    assert distance({n: p.grad for n, p in names["model"].named_parameters()}, names["meta_gradient"]) < 1e-4
    exec(recipe, names)  # a model that is no GPT
    assert all(p.grad.any() for p in names["learner"].parameters())


def test_generation_is_decided_by_the_callers_generator():
    model, start = tiny_gpt(), torch.zeros(1, 1, dtype=torch.long)
    one, two, other = (model.generate(start, 20, top_k=10, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (1, 21)
    assert torch.equal(*(model.generate(start, 20, temperature=0) for _ in range(2)))


# ----------------------------------------------------------------------------------------------------------------------
# the systems

LENT = dict(inner_optimizer="adamw", inner_lr=1e-3, inner_warm_start=True, inner_clip=0.05)


@pytest.mark.parametrize("method", [{"inner_steps": 0}, {"first_order": True}, {"first_order_steps": 3}, LENT], ids=str)
def test_a_run_stopped_and_resumed_is_bitwise_the_uninterrupted_one(pretrain, monkeypatch, method):
    whole = pretrain("whole", **method)
    for step in (1, 3):  # it ends at step 3, where an evaluation is due, and at 5, where none is
        during_step(step, partial(signal.raise_signal, signal.SIGTERM), monkeypatch)
        cut = pretrain("cut", init_from="resume", **method)
        assert step < checkpoint_of(cut)["step"] < 6
    pretrain("cut", init_from="resume", **method)
    assert same(weights_of(whole), weights_of(cut)) and not list(cut.glob("*.tmp"))
    assert log_of(whole) == log_of(cut)
    clipped = 4 if "inner_clip" in method else 0  # the one inner step of each of four tasks
    assert [row["clipped"] for row in log_of(cut)["train"]] == [clipped] * 6


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_two_processes_do_what_one_does(flags, pretrain, tmp_path, inner_steps):
    alone, pair = pretrain("alone", inner_steps=inner_steps), tmp_path / "pair"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, HERE / "train.py", *flags(out_dir=pair, inner_steps=inner_steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(log_of(pair), log_of(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights_of(pair), weights_of(alone), rtol=1e-3, atol=1e-5)


def test_evaluating_more_often_changes_nothing(pretrain):
    rarely, often = pretrain("rarely"), pretrain("often", eval_interval=1)
    assert log_of(rarely)["train"] == log_of(often)["train"] and same(weights_of(rarely), weights_of(often))


def test_the_draws_are_pure_and_a_step_covers_the_domains_evenly(flags):
    def draw(**changes):
        """The inputs of twenty steps."""
        cfg = train.load_config(flags(**changes))
        data = train.Dataset(cfg)
        return [[data.task(step, i)[0] for i in range(cfg.tasks_per_step)] for step in range(20)]

    def domains(*tasks):
        """The domain of each row, told by its alphabet."""
        return [(row[row < 256].max().item() - 48) // 9 for x in tasks for row in x]

    three, seven = draw(tasks_per_step=3), draw(tasks_per_step=7)
    again = train.Dataset(train.load_config(flags(tasks_per_step=3))).task(5, 1)[0]
    assert torch.equal(again, three[5][1]) and not torch.equal(again, three[6][1])
    assert all(len(set(domains(x))) == 1 for step in three + seven for x in step)
    assert all(Counter(domains(*step)) == {0: 4, 1: 4, 2: 4} for step in three)
    assert all(sorted(Counter(domains(*step)).values()) == [8, 8, 12] for step in seven)
    mixed = draw(shuffle_domains=True, tasks_per_step=3, batch_size=6)
    assert all(Counter(domains(*step)) == {0: 6, 1: 6, 2: 6} for step in mixed)
    assert domains(mixed[0][0]) != sorted(domains(mixed[0][0]))


def test_rows_of_a_task_are_whole_and_never_overlap(flags, prepare):
    shards = {"train_0": np.arange(128), "train_1": np.arange(128, 257), "val_0": np.arange(257)}
    made = prepare({f"counting/{name}.bin": shard_of(ids) for name, ids in shards.items()})
    data = train.Dataset(train.load_config(flags(data_dir=made.parent, dataset=made.name, batch_size=6)))
    for step in range(50):
        x, y = data.task(step, 0)
        assert len(x.unique()) == x.numel() and torch.equal(y, x + 1) and torch.equal(x[:, 1:], y[:, :-1])


def test_a_nanogpt_checkpoint_is_taken_over(flags, tmp_path):
    args = dict(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16, bias=True, dropout=0.0)
    model = GPT(GPTConfig(**args))
    weights = {f"_orig_mod.{n}": p for n, p in model.state_dict().items()}
    torch.save({"model": weights, "model_args": args, "iter_num": 7}, tmp_path / "nano.pt")
    run = train.start(train.load_config(flags(init_from=tmp_path / "nano.pt")))
    assert same(run.learner.model.state_dict(), model.state_dict())


def test_the_pipeline_runs_through_and_adapting_lowers_the_loss_on_what_was_held_out(pretrain, tmp_path, capsys):
    for name, inner_steps in (("plain", 0), ("maml", 1)):
        out = pretrain(name, inner_steps=inner_steps, max_steps=60, eval_interval=30, learning_rate=1e-2)
        adapt.main([str(out), "--draws", "1", "--lr", "1e-4", "1e-2", "--rows", "2", "--query_rows", "4"])
    rows = log_of(out)["adapt"]
    assert {row["domain"]: row["role"] for row in rows} == {"far": "heldout", "tune": "tune"} and len(rows) == 4
    curve = next(row["loss"] for row in rows if row["role"] == "heldout" and row["chosen"])
    assert len(curve) == 6 and curve[-1] < curve[0]

    code = "import sys, plot; plot.main(); assert 'torch' not in sys.modules"  # the picture needs no torch
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "plain", out], capture_output=True, cwd=HERE)
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and b"maml" in done.stdout and not done.returncode

    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    notes = ["--text", str(tmp_path / "notes.txt"), "--max_new_tokens", "20", "--lr", "1e-2"]
    capsys.readouterr()
    adapt.main([str(out), *notes, "--save", str(tmp_path / "adapted.pt")])
    before, after = re.findall(r"(\S+) nats per token", capsys.readouterr().out)
    assert float(after) < float(before)
    adapt.main([str(tmp_path / "adapted.pt"), *notes])  # one's own text is gone on from
    assert f"before: {after}" in capsys.readouterr().out
    small = checkpoint_of(out)
    small["model_args"]["vocab_size"], small["model"]["transformer.wte.weight"] = 64, torch.zeros(64, 16)
    small["model"]["lm_head.weight"] = small["model"]["transformer.wte.weight"]
    torch.save(small, tmp_path / "small.pt")
    with refused(match="knows 64 ids"):
        adapt.main([str(tmp_path / "small.pt"), *notes])


# ----------------------------------------------------------------------------------------------------------------------
# the edges: what is wrong, and what to do, in one line


MISTAKES = [
    ("inner_stepz", 1, "did you mean 'inner_steps'"),
    ("max_steps", "many", "max_steps in the command line must be int"),
    ("bias", 1, "must be bool"),
    ("objective", "evry", "choose 'final' or 'every'"),
    ("dtype", "float16", "choose 'float32' or 'bfloat16'"),
    ("batch_size", 5, "batch_size=5 must be a multiple of inner_steps + 1 = 2"),
    ("dataset", "nowhere", "run python prepare_data.py PATH --name nowhere"),
    ("block_size", 100_000, "lower block_size"),
    ("n_head", 3, "must be a multiple of n_head"),
    ("init_from", "elsewhere.pt", "no checkpoint at elsewhere.pt"),
    ("dropout", 0.1, "set dropout=0.0, or first_order=True"),
    *((key, -1, f"{key}=-1") for key in ("inner_steps", "max_steps", "seed", "grad_clip")),
    ("learning_rate", 0, "learning_rate=0.0 must be positive"),
    ("min_lr", "1e999", "min_lr=inf must be"),
]


@pytest.mark.parametrize("key, value, remedy", MISTAKES, ids=lambda text: str(text)[:20])
def test_a_mistake_is_answered_with_its_remedy(pretrain, key, value, remedy):
    with refused(match=re.escape(remedy)):
        pretrain(**{key: value})


def test_config_files_are_checked_like_the_command_line_and_help_names_every_field(tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text("import math\n_half = 0.5\nlearning_rate = 1\ninner_lr = _half * math.pi\n")
    cfg = train.load_config([str(config), "--out_dir=3", "--bias=true"])
    assert (cfg.learning_rate, cfg.inner_lr, cfg.out_dir, cfg.bias) == (1.0, math.pi / 2, "3", True)
    mistakes = {"leraning_rate = 1": "did you mean 'learning_rate'", "n_layer = 2.5": "n_layer", "x =": "runs"}
    for text, remedy in mistakes.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=remedy):
            train.load_config([str(config)])
    train.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}: " in text for field in dataclasses.fields(train.Config))


def test_resuming_as_something_else_is_refused_and_no_code_in_a_checkpoint_runs(pretrain, data_dir, tmp_path):
    path, other = pretrain(max_steps=1) / "ckpt.pt", shutil.copytree(data_dir, tmp_path / "data")
    (other / "tiny/meta.json").write_text((other / "tiny/meta.json").read_text() + " ")
    changes = {"n_embd=16": {"n_embd": 32}, "dataset=": {"data_dir": other}, "set max_steps to that": {"max_steps": 0}}
    changes |= {"learn_inner_lr=True": {"learn_inner_lr": False}, "nesterov=False": {"nesterov": True}}
    changes |= {"batch_size=4": {"batch_size": 8}}  # the log counts the tokens of all steps by it
    for remedy, changed in changes.items():
        with refused(match=remedy):
            pretrain(init_from="resume", **changed)
    path.write_bytes(path.read_bytes()[:-1000])
    with refused(match=r"ckpt\.pt is cut short"):
        pretrain(init_from="resume")
    torch.save({"model": {}, "model_args": Path("x")}, path)  # any object that is not plain data
    with refused(match="no checkpoint of a GPT"):
        pretrain(init_from="resume")


def test_a_run_goes_on_at_the_rates_that_are_asked_for_and_its_log_says_so(pretrain):
    pretrain(max_steps=3)
    out = pretrain(init_from="resume", learning_rate=1e-5, min_lr=1e-5, warmup_steps=0)
    assert [row["lr"] for row in log_of(out)["train"][3:]] == [1e-5] * 3
    header = json.loads((out / "log.jsonl").read_text().split("\n")[0])
    assert header["config"]["learning_rate"] == 1e-5 and header["before"]["config"]["learning_rate"] == 1e-3


def test_what_is_not_finite_stops_the_run_and_leaves_the_checkpoint_whole(pretrain, tmp_path):
    for message, changes in {
        "stopped before the update": dict(inner_lr=1e30, learn_inner_lr=False, inner_steps=3),
        "step 1: evaluation": dict(learning_rate=1e30, warmup_steps=0, eval_interval=1, inner_steps=0),
    }.items():
        with refused(match=message):
            pretrain(**changes)
        ckpt = checkpoint_of(tmp_path / "run")
        assert ckpt["step"] == 0 and all(torch.isfinite(w).all() for w in ckpt["model"].values())


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
    during_step(1, lambda: (log.unlink(), log.symlink_to("/dev/full")), monkeypatch)
    with refused(match=r"No space left .*--init_from=resume"):
        pretrain()


def test_the_controls_are_the_baseline_with_one_thing_of_the_learner(pretrain):
    rates = checkpoint_of(learner := pretrain("learner", inner_lr_lr=0.5))["learner"]["log_inner_lr"][0]
    controls = {"plain": {}, "ahead": {"nesterov": True}, "scaled": {"lr_scale_from": learner / "ckpt.pt"}}
    model = {}
    for name, control in {"start": {"max_steps": 0}, **controls}.items():
        out = pretrain(name, **{"inner_steps": 0, "weight_decay": 0.0, "max_steps": 1, **control})
        model[name] = checkpoint_of(out)["model"]
    names = [name for name in model["start"] if name != "lm_head.weight"]  # it is wte's
    scale = (rates - rates.mean()).exp()
    assert scale.std() > 0.05
    for name, rate in zip(names, scale.tolist(), strict=True):
        plain, ahead, scaled = (model[n][name] - model["start"][name] for n in controls)
        torch.testing.assert_close(ahead, plain * (1 + 0.9 / 1.9), rtol=1e-2, atol=1e-6)  # g + m, both of one gradient
        torch.testing.assert_close(scaled, plain * rate, rtol=1e-2, atol=1e-6)


def test_checkpoints_kept_on_the_way_are_adapted_too(pretrain):
    out = pretrain(keep_interval=3, max_steps=9)
    assert sorted(path.name for path in out.glob("step_*")) == ["step_000003.pt", "step_000006.pt"]
    adapt.main([str(out), "--draws", "1", "--lr", "1e-3", "--rows", "2", "--query_rows", "4"])
    losses = {row["step"]: row["loss"][0] for row in log_of(out)["adapt"] if row["domain"] == "far"}
    assert sorted(losses) == [3, 6, 9] and len(set(losses.values())) == 3


def test_an_earlier_run_steps_aside(pretrain, tmp_path):
    for max_steps in (1, 2):
        pretrain(max_steps=max_steps)
    assert [log_of(tmp_path / name)["val"][-1]["step"] for name in ("run.1", "run")] == [1, 2]


def test_a_meta_json_that_is_none_is_named(pretrain, tmp_path):
    for text in ("{", "[]", '{"domains": {"a": {}}}'):
        with refused(match=r"tiny/meta\.json is not .*--overwrite"):
            pretrain(data_dir=write(tmp_path, {"tiny/meta.json": text}))


# ----------------------------------------------------------------------------------------------------------------------
# the data: text to shards


@pytest.fixture
def prepare(tmp_path):
    """prepare(source, *options) makes a dataset of a folder, a file or {path: text} and returns where it is."""

    def prepare(source, *options, name="set") -> Path:
        source = write(tmp_path / "text", source) if isinstance(source, dict) else source
        prepare_data.main([str(source), "--name", name, "--data_dir", str(tmp_path / "data"), *options])
        return tmp_path / "data" / name

    return prepare


def domains_of(dataset) -> dict:
    return prepare_data.read_meta(dataset / "meta.json")["domains"]


def documents_of(dataset, domain) -> list[list[str]]:
    """The texts of train and of val, whose ids are tiktoken's, an end-of-text id before each."""
    meta, found = prepare_data.read_meta(dataset / "meta.json"), []
    encoding = prepare_data.get_tokenizer(meta["tokenizer"])
    for paths in (meta["domains"][domain]["shards"][split] for split in ("train", "val")):
        ids = np.concatenate([prepare_data.open_shard(dataset / path) for path in paths])
        documents = [part[1:].tolist() for part in np.split(ids, np.flatnonzero(ids == meta["eot"]))[1:]]
        found.append([encoding.decode(document) for document in documents])
        assert ids[0] == meta["eot"] and documents == [encoding.encode_ordinary(text) for text in found[-1]]
    return found


def shard_of(ids) -> bytes:
    return np.array([20240520, 1, len(ids)] + [0] * 253, np.int32).tobytes() + ids.astype(np.uint16).tobytes()


def two_domains(n=40) -> dict:
    """{path: text} of n files each, of growing length."""
    files = itertools.product(("père noël", "數學"), range(n))
    return {f"{d}/{i}.md": f"{d} {i}: <|endoftext|> is text here. " + "é数 \n" * (i * 7) for d, i in files}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_any_text_comes_back_from_its_tokens(prepare, name):
    try:
        prepare_data.get_tokenizer(name)
    except SystemExit:
        pytest.skip("the gpt2 encoding is neither cached nor reachable")
    odd = ["plain", " \n\t\r\x00", "日本語 🙂 ∂x", "<|endoftext|>", "a" * 500]
    texts = [f"{text}{i}" for text in odd for i in range(30)]
    train, val = documents_of(prepare({"odd.jsonl": records(texts)}, "--tokenizer", name), "odd")
    assert sorted(train + val) == sorted(texts)


def test_every_document_is_in_one_split_whole(prepare):
    made = prepare(two_domains(), "--heldout", "數學")
    for domain, entry in domains_of(made).items():
        train, val = documents_of(made, domain)
        texts = [text for path, text in two_domains().items() if path.startswith(domain)]
        assert sorted(train + val) == sorted(texts) and 0 < len(val) < len(train)
        assert entry["role"] == ("heldout" if domain == "數學" else "train")
        assert sum(entry["bytes"].values()) == sum(len(text.encode()) for text in texts)


def test_what_was_held_out_stays_so_until_it_is_said_otherwise(prepare):
    made, roles = prepare({f"{d}.txt": f"{d} " * 99 for d in "abc"}, "--heldout", "a", "--tune", "b"), []
    for options in ([], ["--heldout", "b"], ["--heldout", "", "--tune", "c"]):
        prepare(made.parents[1] / "text", *options)
        roles.append([domains_of(made)[d]["role"] for d in "abc"])
    assert roles == [["heldout", "tune", "train"], ["train", "heldout", "train"], ["train", "train", "tune"]]


@pytest.mark.parametrize("text", ["數學" * 50, "".join(f"línea {i}\n" for i in range(100))], ids=["line", "lines"])
def test_one_document_still_gives_both_splits_and_no_character_is_cut(prepare, tmp_path, text):
    [train], [val] = documents_of(prepare(write(tmp_path, {"book.txt": text}) / "book.txt"), "book")
    assert train + val == text and 0.05 < len(val) / len(train) < 0.2


def test_a_shard_cut_short_is_refused(prepare, tmp_path):
    path = prepare(two_domains()) / "數學/train_000000.bin"
    header, ids = np.fromfile(path, np.int32, 256), np.fromfile(path, np.uint16)[512:]
    assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    path.write_bytes(path.read_bytes()[:-2])
    for read in (partial(prepare_data.open_shard, path), partial(prepare, tmp_path / "text", "--verify")):
        with pytest.raises((ValueError, SystemExit), match=r"train_000000.*--overwrite"):
            read()


def test_bad_records_are_counted_and_duplicates_dropped(prepare):
    a = records(f"document {i % 30}" for i in range(40)) + '{broken\n{"no": "text"}\n{"text": "\\ud800"}'
    b = b"\xff\xfe bad\n<|endoftext|>\ndocument 1<|endoftext|>\n<|endoftext|>\nown\n"
    domains = domains_of(prepare({"a.jsonl": a, "b.txt": b}))
    assert domains["a"]["skipped"] == {"duplicate": 10, "malformed": 2, "undecodable": 1}
    assert domains["b"]["skipped"] == {"undecodable": 1} and sum(domains["a"]["documents"].values()) == 30


def test_a_user_s_mistake_names_the_remedy(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", lambda name: SimpleNamespace(n_vocab=100277))
    (tmp_path / "empty").mkdir()
    prepare(two_domains(), name="made")
    for folder, options, name, remedy in (
        ("text", ["--heldout", "數字"], "set", "數學"),
        ("text", ["--tokenizer", "cl100k_base"], "set", "uint16: use gpt2 or bytes"),
        ("text", ["--max_tokens", "500"], "made", "--overwrite"),
        ("text", ["--verify"], "none", "without --verify"),
        ("empty", [], "set", "give a folder of text"),
        ("nothing", [], "set", "common_pile"),
    ):
        with refused(match=remedy):
            prepare(tmp_path / folder, *options, name=name)


def test_a_sample_is_as_large_as_asked(prepare):
    domains = domains_of(prepare(two_domains(99), "--max_tokens", "30000"))
    assert all(25_000 < sum(entry["tokens"].values()) <= 31_000 for entry in domains.values())


def test_shards_of_llm_c_are_a_domain_as_they_are(prepare):
    train, val = shard_of(np.arange(300) % 257), shard_of(np.arange(50))
    made = prepare({"fineweb/fineweb_train_000001.bin": train, "fineweb/fineweb_val_000000.bin": val})
    entry = domains_of(made)["fineweb"]
    assert entry["tokens"] == {"train": 300, "val": 50} and "val_000000" in str(entry["shards"]["val"])


def test_killed_again_and_again_it_ends_with_the_same_bytes_for_any_number_of_workers(tmp_path):
    source, parts, whole = write(tmp_path / "text", two_domains(150)), tmp_path / "parts", tmp_path / "whole"
    code = "import os, sys, time, prepare_data as P; P.SHARD_TOKENS, sync = 50_000, os.fsync\n"
    code += "os.fsync = lambda file: time.sleep(0.01) or sync(file)\n"  # slow enough to be killed in
    code += "P.main(sys.argv[1:])"
    run = [sys.executable, "-c", code, source, "--name", "set", "--data_dir"]
    subprocess.run([*run, whole], check=True, capture_output=True, cwd=HERE)
    kills = 0
    while not (parts / "set/meta.json").exists():
        full = len(list(parts.rglob("*.bin")))
        process = subprocess.Popen([*run, parts, "--workers", "2"], cwd=HERE, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(parts.rglob("*.bin"))) < full + 3:
            time.sleep(0.002)
        kills += process.poll() is None
        assert kills < 12, "it does not go on but starts anew"
        process.kill()
        process.wait()
        assert all(len(prepare_data.open_shard(path)) for path in parts.rglob("*.bin"))
    left, expected = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in (parts, whole))
    assert left == expected and len(expected) > 9 and kills > 1


def test_one_dataset_of_many_domains_streams_through_datasets(prepare, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"row {i} " * 9, "meta": {"set": "b" if i % 3 else "a"}} for i in range(300)]
    for part, half in enumerate((rows[:150], rows[150:])):
        pandas.DataFrame(half).to_parquet(tmp_path / f"{part}.parquet")
        with gzip.open(tmp_path / f"{part}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in half)
    options, made = ("--tokenizer", "bytes", "--domain_field", "meta.set", "--heldout", "a", "--data_files"), []
    for kind, glob in (("parquet", "*.parquet"), ("json", "*.json.gz")):
        made.append(prepare("local", "--hf", kind, *options, str(tmp_path / glob), name=kind))
    assert [documents_of(made[0], domain) for domain in "ab"] == [documents_of(made[1], domain) for domain in "ab"]
    rare = domains_of(made[0])["a"]
    assert sum(rare["documents"].values()) == 100 and rare["role"] == "heldout"


# ----------------------------------------------------------------------------------------------------------------------
# plot.py: the scoreboard says what the logs say


def write_log(path, points, adapt=(), seed=1, **config):
    """A log with evaluations [(tokens, loss)] and adapt rows [(losses, lr, chosen)] of the last of them."""
    data = dict(name="toy", tokenizer="bytes", roles={"a": "train", "z": "heldout"}, bytes_per_token={"a": 1, "z": 1})
    rows = [{"kind": "run", "config": {"seed": seed, **config}, "commit": "c0ffee", "params": 10, "dataset": data}]
    at = [{"step": t, "tokens": t, "flops": 2 * t, "seconds": 3 * t} for t, _ in points]
    rows += [{"kind": "val", **a, "loss": {"a": loss, "z": loss}} for a, (_, loss) in zip(at, points, strict=True)]
    last = {"kind": "adapt", **at[-1], "domain": "z", "role": "heldout", "draw": 0, "support_tokens": [0, 8]}
    rows += [{**last, "loss": loss, "lr": lr, "chosen": chosen} for loss, lr, chosen in adapt]
    path.mkdir()
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scoreboard(tmp_path, capsys):
    """{what is measured: [a cell for each method]}, as plot.py prints it."""

    def scoreboard(*runs):
        plot.main([*map(str, runs), "--markdown", "-o", str(tmp_path / "curves.png")])
        lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return {name.strip(): [cell.strip() for cell in cells] for _, name, *cells in lines}

    return scoreboard


def test_the_speed_up_of_a_curve_that_falls_twice_as_fast_is_two(scoreboard, tmp_path):
    base = write_log(tmp_path / "base", [(0, 5.0), (50, 4.0), (100, 3.0)])
    fast = write_log(tmp_path / "fast", [(0, 5.0), (100, 1.0)], inner_steps=1)  # at 3.0 between evaluations, at 50
    slow = write_log(tmp_path / "slow", [(0, 5.0), (100, 3.1)], inner_steps=2)  # never there
    board = scoreboard(base, fast, slow)
    for unit, when in itertools.product(("tokens", "flops", "seconds"), ("train domains", "before")):
        assert board[f"speed-up in {unit}, {when}"] == ["1.000", "2.000 (+1)", "-"]


def test_runs_that_differ_only_in_seed_fold_into_one_method_and_differences_are_paired_by_seed(scoreboard, tmp_path):
    runs = []
    for name, loss in {"base_s1": 3.0, "base_s2": 4.0, "maml_s1": 2.0, "maml_s2": 3.5}.items():
        config = dict(seed=int(name[-1]), inner_steps=int("maml" in name), out_dir=name)
        runs.append(write_log(tmp_path / name, [(0, 9.0), (9, loss)], **config))
    board = scoreboard(*runs)
    assert board["held-out loss, nats per token"] == ["base", "maml"]
    # differences -1 and -0.5: mean -0.75, deviation 0.5 / sqrt(2), so half the interval is 12.706 * 0.25
    assert board["held-out domains"] == ["3.500", "2.750 (-0.75 ± 3.2)"]
    board = scoreboard(*runs[:3])  # what has one seed is faster or slower than the baseline's run of that seed
    assert board["speed-up in tokens, before"] == ["1.000", "1.167 (+0.17)"]  # (9 - 2) / (9 - 3)


def test_the_speed_up_after_adaptation_is_read_from_the_checkpoints_that_were_adapted(tmp_path):
    runs = []
    for name, ends in {"base": [5.0, 4.0, 3.0], "fast": [4.0, 3.0, 2.0], "last": [None, None, 2.0]}.items():
        log = write_log(tmp_path / name, [(0, 9.0), (50, 9.0), (100, 9.0), (150, 9.0)], inner_steps=len(runs))
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


def test_newer_adapt_rows_take_the_place_of_older_ones(scoreboard, tmp_path):
    old, new = [([3.0, 2.5], 0.1, True), ([3.0, 2.9], 0.2, False)], [([3.0, 2.0], 0.1, False), ([3.0, 1.0], 0.2, True)]
    board = scoreboard(write_log(tmp_path / "run", [(9, 3.0)], old + new))
    assert board["after 8 tokens"] == ["1.000"]  # at the rate chosen last
    assert board["worst less best rate, after"] == ["1.000"]
    assert (board["after, at a rate of 0.1"], board["after, at a rate of 0.2"]) == (["2.000"], ["1.000"])
    assert board["after - before, at a rate of 0.1"] == ["-1.000"]  # 2.0 - 3.0


def test_a_cut_last_line_is_left_out_and_logs_beyond_repair_are_refused_with_a_remedy(scoreboard, tmp_path):
    log = write_log(tmp_path / "run", [(0, 5.0), (9, 3.0)]) / "log.jsonl"
    header, first, last = log.read_text().splitlines()
    log.write_text(f"{header}\n{first}\n{last}\n" + '{"kind": "val", "st')
    assert scoreboard(log)["held-out domains"] == ["3.000"]
    for lines in ([], [first], [header], [header, "no json", first]):
        log.write_text("".join(line + "\n" for line in lines))
        with refused(match="line 2.*delete" if "no json" in lines else "train it again"):
            scoreboard(log)
    with refused(match=r"no log at .*train\.py"):
        scoreboard(tmp_path / "nowhere")
