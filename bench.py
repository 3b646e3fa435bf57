"""Speed and memory of the learner, as ratios to plain training measured in one run.

    python bench.py                       # a small model, on whatever this machine has
    python bench.py --compile=True        # the same compiled: minutes of waiting
    python bench.py config/maml_124m.py   # a config's model, chunk, dtype, device; any --key=value

A step learns K + 1 chunks, then calls optimizer.step(). Each learner is timed beside plain training
on the same chunks, in turns: A B A B. What is printed are medians. The first row is plain training
beside itself: it shows the noise.

    per token   time, over that of plain training on the same tokens
    forwards    of one chunk, counted as in maml.py; plain training takes 3 (K + 1)
    of count    forwards as measured, over forwards as counted
    memory      weights, optimizer and the height of a step, over those of plain training
"""

import argparse
import dataclasses
import sys
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from maml import MAML
from model import GPT, GPTConfig
from tasks import batch
from train import SHAPE, Config, make_optimizer, pick_device, read_arguments, to_device

COLUMNS = ("ms", "tokens/s", "per token", "forwards", "of count", "memory", "TFLOP/s")


def bench(cfg: Config, vocab_size: int, rounds: int):
    device, K = pick_device(cfg.device), cfg.inner_steps
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    torch._dynamo.config.recompile_limit = 64  # every learner compiles functions of its own
    torch.manual_seed(cfg.seed)
    shape = {name: getattr(cfg, name) for name in SHAPE}
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).to(device)
    rows, T = cfg.batch_size // (K + 1), cfg.block_size  # of a chunk
    ids = np.random.default_rng(cfg.seed).integers(vocab_size, size=(max(K + 1, 4) * rows, T + 1))
    x, y = to_device(batch(ids), device)

    cases = [("plain training", K, 3 * (K + 1), {"inner_steps": 0})]
    for rates in ("tensor", "element"):
        how = {"first_order": True, "learn_inner_lr": rates}
        cases += [(f"first order, K={k}, {rates}", k, 3 * (k + 1), how) for k in sorted({1, K})]
    how = {"first_order": False, "learn_inner_lr": "no"}
    cases += [(f"second order, K={k}", k, 12 * k + 3, how) for k in (1, 3)]

    plain, pairs = make_step(cfg, model, inner_steps=0), []
    for _, k, _, how in cases:
        step, task = make_step(cfg, model, **{"inner_steps": k} | how), slice((k + 1) * rows)
        chunks = list(zip(x[task].split(rows), y[task].split(rows), strict=True))
        tasks = chunks if how.get("inner_steps") == 0 else [(x[task], y[task])]
        pairs.append(((plain, chunks), (step, tasks)))
    memory = [[peak_memory(*run, device) for run in pair] for pair in tqdm(pairs, "warming up")]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = [[[timed(*run) for run in p] for p in pairs] for _ in tqdm(range(rounds), "timing")]

    print(" " * 28 + "".join(name.rjust(11) for name in COLUMNS))
    for i, (name, k, forwards, _) in enumerate(cases):
        took, ratio = np.median([(s[i][1], s[i][1] / s[i][0]) for s in seconds], axis=0)
        of_count = ratio * 3 * (k + 1) / forwards
        flops = forwards * rows * T * model.flops_per_token(T) / took / 1e12
        cells = [f"{1e3 * took:.1f}", f"{(k + 1) * rows * T / took:,.0f}", f"{ratio:.3f}"]
        cells += [f"{forwards}", f"{of_count:.3f}", f"{memory[i][1] / memory[i][0]:.2f}"]
        print(name.ljust(28) + "".join(cell.rjust(11) for cell in [*cells, f"{flops:.3g}"]))
    if cfg.compile:
        now = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(f"{graphs} graphs compiled before the first timing, {now} after the last")


def make_step(cfg: Config, model: GPT, **how):
    """A function of tasks that takes one outer step, and what it keeps from step to step."""
    fields = {name: getattr(cfg, name) for name in ("inner_lr", "inner_optimizer", "inner_clip")}
    autocast = torch.bfloat16 if cfg.dtype == "bfloat16" else None
    learner = MAML(model, compile=cfg.compile, autocast=autocast, **fields | how)
    learner.to(next(model.parameters()).device)
    optimizer = make_optimizer(cfg, learner)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the learners share the model, so nobody may change it

    def step(tasks) -> list[torch.Tensor]:
        for x, y in tasks:
            (learner(x, y) / len(tasks)).backward()
        optimizer.step()
        learner.zero_grad()
        states = [t for state in optimizer.state.values() for t in state.values()]
        return [*learner.parameters(), *states]

    return step


def timed(step, tasks) -> float:
    wait = torch.cuda.synchronize if tasks[0][0].is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    step(tasks)
    wait()
    return time.perf_counter() - began


def peak_memory(step, tasks, device) -> int:
    """Bytes: what a step keeps, and what it allocates beyond that at its height."""
    kept = sum(t.numel() * t.element_size() for t in step(tasks))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(tasks)
        return kept + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step(tasks)
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    heights = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return kept + int(heights.max())


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, help="50,304 with a config file, else 320")
    own, rest = parser.parse_known_args()
    vocab_size = own.vocab_size or (50_304 if any(a[0] != "-" for a in rest) else 320)
    try:
        cfg = Config(**{"inner_steps": 15, "batch_size": 128} | read_arguments(rest))
        if cfg.inner_steps == 0:
            raise ValueError("inner_steps=0 has no learner to measure: give config/maml_124m.py")
        bench(cfg, vocab_size, own.rounds)
    except (ValueError, OSError) as error:
        raise SystemExit(f"bench.py: {error}") from None


if __name__ == "__main__":
    main()
