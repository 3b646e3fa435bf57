"""What a GPU needs, to be merged into test_maml.py: `pytest -x -m gpu` is `make gpu-check`.

DRY_RUN=1 runs the gpu tests with a tiny model on the CPU, so that their own mistakes are found.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
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
        (FIRST, {"summed_step": 1, "loss": 1}),
        (FIRST | {"learn_inner_lr": "tensor"}, {"summed_step": 1, "loss": 1}),
        (SECOND, {"gradient": 1, "hessian_product": 1, "loss": 2}),
    ],
    ids=["baseline", "element", "tensor", "second"],
)
def test_what_is_compiled_agrees_and_is_compiled_once(compiled, method, expected):
    model = small()
    learner, eager = MAML(model, compile=True, **method), MAML(model, **method)
    optimizer = train.make_optimizer(train.Config(), learner)
    task = ids(8, 16)
    torch.testing.assert_close(gradients(learner, *task), gradients(eager, *task))
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
    assert copies < 9


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
            header = np.zeros(HEADER_INTS, np.int32)
            header[:3] = MAGIC, VERSION, n
            (root / "random" / domain).mkdir(parents=True, exist_ok=True)
            content = header.tobytes() + draw.integers(vocab, size=n).astype(np.uint16).tobytes()
            (root / "random" / path).write_bytes(content)
            entry["tokens"][split], entry["shards"][split] = n, {path: ""}
        domains[domain] = entry | {"role": role}
    meta = {"tokenizer": "gpt2", "vocab_size": vocab, "domains": domains}
    (root / "random" / "meta.json").write_text(json.dumps(meta))
    return root


@pytest.fixture
def run_flags(shards, tmp_path):
    def run_flags(config, **changes) -> list[str]:
        flags = dict(data_dir=shards, dataset="random", device=DEVICE, out_dir=tmp_path / "run")
        flags |= (TINY | dict(eval_rows=4, compile=False) if DRY else {}) | changes
        return [f"{HERE}/config/{config}.py", *(f"--{k}={v}" for k, v in flags.items())]

    return run_flags


def log_of(flags) -> list[dict]:
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
    found = gradients(learner, *(t.to(DEVICE) for t in task))
    off = sum((found[n].cpu() - exact[n]).square().sum() for n in exact)
    assert off < 1e-8 * sum(t.square().sum() for t in exact.values())


@mark
@pytest.mark.parametrize("config", CONFIGS)
def test_twenty_steps_of_a_124m_config_compile_nothing_after_the_second(
    run_flags, config, monkeypatch
):
    # a rank's share of an eighth, so that one card takes its steps as one of eight would
    tasks = {"baseline_124m": 4, "maml_124m": 1}[config]
    flags = run_flags(config, tasks_per_step=tasks, max_steps=20, eval_interval=10)
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
    at = [row for row in log_of(flags) if row["kind"] == "val"]
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
        logs.append([row["loss"] for row in log_of(flags) if row["kind"] != "run"])
    torch.testing.assert_close(*logs, rtol=1e-3, atol=1e-3)


@mark
def test_asked_to_stop_a_run_saves_and_goes_on_from_there(run_flags):
    flags = run_flags("maml_124m", tasks_per_step=1, max_steps=100_000, n_layer=2, compile=False)
    command = [sys.executable, HERE / "train.py", *flags]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(600):
        time.sleep(0.2)
        if run.poll() is not None or any(row["kind"] == "train" for row in log_of(flags)):
            break
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0
    at = torch.load(Path(log_of(flags)[0]["config"]["out_dir"], "ckpt.pt"))["step"]
    assert at > 0
    subprocess.run([*command, "--init_from=resume", f"--max_steps={at + 5}"], check=True)
    assert log_of(flags)[-1]["step"] == at + 5
