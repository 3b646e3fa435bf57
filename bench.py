"""Speed and memory of the learner, as ratios to plain training measured in one run.

    python bench.py --compile=True        # a small model, compiled: minutes
    python bench.py config/maml_124m.py   # a config's fields; any --key=value

A step learns K + 1 chunks, then calls optimizer.step(). Each case is timed beside plain training on
the same chunks: A B A B. The first row, plain training beside itself, shows the noise. 'per token'
is time over plain training's, 'forwards' are counted as in maml.py, 'of count' is measured over
counted, 'memory' is the peak over plain training's. Medians are printed.
"""

import sys
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from maml import MAML, choose
from model import GPT, GPTConfig
from run import pick_device, read_flags
from tasks import batch
from train import DTYPES, SHAPE, Config, make_optimizer, to_device

ROUNDS, COLUMNS = 5, ("ms", "tokens/s", "per token", "forwards", "of count", "memory", "TFLOP/s")
graphs = torch._dynamo.utils.counters["stats"]  # what torch.compile has compiled so far


def bench(cfg: Config, vocab_size: int):
    device, K, T = pick_device(cfg.device), cfg.inner_steps, cfg.block_size
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    torch._dynamo.config.recompile_limit = 64  # every learner compiles functions of its own
    torch.manual_seed(cfg.seed)
    shape = {name: getattr(cfg, name) for name in SHAPE}
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).to(device)
    rows = cfg.batch_size // (K + 1)  # of a chunk
    ids = np.random.default_rng(cfg.seed).integers(vocab_size, size=(max(K + 1, 4) * rows, T + 1))
    x, y = to_device(batch(ids), device)
    plain = make_step(cfg, model, inner_steps=0)
    cases, pairs = [("plain training", K + 1, 3 * (K + 1), plain)], []  # chunks, forwards, step
    for k, rates in [(k, rates) for rates in ("tensor", "element") for k in sorted({1, K} - {0})]:
        step = make_step(cfg, model, k, first_order=True, learn_inner_lr=rates)
        cases.append((f"first order, K={k}, {rates}", k + 1, 3 * (k + 1), step))
    cases += [(f"second order, K={k}", k + 1, 12 * k + 3, make_step(cfg, model, k)) for k in (1, 3)]
    for _, n, _, step in cases:
        task = x[: n * rows], y[: n * rows]
        chunks = list(zip(*(t.chunk(n) for t in task), strict=True))
        pairs.append([(plain, chunks), (step, chunks if step is plain else [task])])

    memory = [[peak_memory(*run) for run in pair] for pair in tqdm(pairs, "warming up")]
    compiled = graphs["unique_graphs"]
    seconds = [[[timed(*run) for run in p] for p in pairs] for _ in tqdm(range(ROUNDS), "timing")]
    print(" " * 26 + "".join(name.rjust(10) for name in COLUMNS))
    for i, (name, n, forwards, _) in enumerate(cases):
        times = [(case, case / beside) for beside, case in (s[i] for s in seconds)]
        took, ratio = np.median(times, axis=0)
        flops = forwards * rows * T * model.flops_per_token(T) / took / 1e12
        cells = [f"{1e3 * took:.1f}", f"{n * rows * T / took:,.0f}", f"{ratio:.3f}", f"{forwards}"]
        cells += [f"{ratio * 3 * n / forwards:.3f}", f"{memory[i][1] / memory[i][0]:.2f}"]
        print(name.ljust(26) + "".join(cell.rjust(10) for cell in [*cells, f"{flops:.3g}"]))
    print(f"{compiled} graphs compiled before timing, {graphs['unique_graphs'] - compiled} in it")


def make_step(cfg: Config, model: GPT, inner_steps: int, first_order=False, learn_inner_lr="no"):
    """A function of tasks that takes an outer step, and returns the tensors that are kept."""
    same = ("inner_lr", "inner_optimizer", "inner_schedule", "inner_warmup", "objective", "compile")
    how = {name: getattr(cfg, name) for name in same} | {"autocast": choose(DTYPES, cfg.dtype)}
    how |= {"first_order": first_order, "learn_inner_lr": learn_inner_lr}
    learner = MAML(model, inner_steps, **how)
    optimizer = make_optimizer(cfg, learner)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the learners share the model, so nobody may change it

    def step(tasks) -> list[torch.Tensor]:
        for x, y in tasks:
            (learner(x, y) / len(tasks)).backward()
        optimizer.step()
        learner.zero_grad()
        return [*learner.parameters(), *(t for s in optimizer.state.values() for t in s.values())]

    return step


def timed(step, tasks) -> float:
    began = time.perf_counter()
    step(tasks)[0].sum().item()  # .item() waits for a GPU
    return time.perf_counter() - began


def peak_memory(step, tasks) -> int:
    """Bytes that are kept from step to step, and the height of a step above them."""
    kept = sum(t.numel() * t.element_size() for t in step(tasks))
    if tasks[0][0].is_cuda:
        others = torch.cuda.memory_allocated() - kept
        torch.cuda.reset_peak_memory_stats()
        step(tasks)
        return torch.cuda.max_memory_allocated() - others
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step(tasks)
    events = sorted(run.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return kept + int(np.cumsum([e.nbytes() for e in events if e.name() == "[memory]"]).max())


if __name__ == "__main__":
    try:
        given = {"inner_steps": 15, "batch_size": 128} | read_flags(Config, sys.argv[1:], __doc__)
        bench(Config(**given), 50_304 if given.get("dataset") == "common_pile" else 320)
    except (ValueError, OSError) as error:
        raise SystemExit(f"bench.py: {error}") from None
