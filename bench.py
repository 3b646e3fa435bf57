"""Speed and memory, as ratios measured in one run: A B C A B C ..., the median of the ratios to the plain step beside.

    python bench.py                   # the learner against plain training, eagerly
    python bench.py --compile         # the same, compiled as well (minutes of compilation)
    python bench.py --compile --dtype bfloat16 --n_layer 12 --n_head 12 --n_embd 768 --block_size 1024
    python bench.py data              # tokenisation against tiktoken alone, and what a draw of a task costs

F is a third of a plain eager step (forward and backward) on one chunk of --rows rows, with fused attention for what is
differentiated once and MATH attention for second order. `counted` is what maml.py's lesson says in F; `ratio` is
measured / counted. `memory` is the height of what torch allocates during a step, over that of the same plain step.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import prepare_data
from maml import MAML
from model import GPT, GPTConfig
from train import Config, Dataset, pick_device


# --- the learner ------------------------------------------------------------------------------------------------------
def bench_learner(args) -> list[dict]:
    device, autocast = pick_device(args.device), torch.bfloat16 if args.dtype == "bfloat16" else None
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    torch.manual_seed(0)
    model = GPT(GPTConfig(args.block_size, args.vocab_size, args.n_layer, args.n_head, args.n_embd)).to(device)
    cases = [("plain", 0, {}), ("plain, MATH attention", 0, {"math": True})]
    cases += [(f"first order, K={K}", K, {"first_order": True}) for K in (1, 3)]
    cases += [(f"second order, K={K}", K, {}) for K in (1, 3, 5, 10)]
    cases += [("second order, K=3, AdamW inside", 3, {"inner_optimizer": "adamw", "inner_lr": 1e-3})]
    # five inner steps are left out: torch compiles a function for eight learners at most
    compiled = [case for case in cases if args.compile and case[1] != 5 and "math" not in case[2]]
    cases += [(f"{name}, compiled", K, how | {"compile": True}) for name, K, how in compiled]
    steps, rows = [], []
    for name, K, how in cases:
        attention = partial(sdpa_kernel, SDPBackend.MATH) if how.pop("math", False) else nullcontext
        learner = MAML(model, K, **{"inner_lr": 0.01, "autocast": autocast} | how).to(device)
        ids = torch.randint(args.vocab_size, (args.rows * (K + 1), args.block_size + 1), device=device)
        steps.append(partial(timed_step, learner, ids, attention))
        rows.append({"case": name, "counted": 3 * (K + 1) if how.get("first_order") else 12 * K + 3})
    for step in tqdm(steps, "warming up"):
        step()
    seconds = np.array([[step() for step in steps] for _ in tqdm(range(args.repeat), "measuring")])
    peaks = [peak_memory(model, step, device) for step in steps]
    for i, (row, (name, K, _)) in enumerate(zip(rows, cases, strict=True)):
        plain, took = int("second" in name), np.median(seconds[:, i])  # which of the first two it is measured against
        F = np.median(3 * seconds[:, i] / seconds[:, plain])
        row |= {"F": F, "ratio": F / row["counted"], "of 9K+3": F / min(row["counted"], 9 * K + 3), "ms": 1e3 * took}
        row |= {"memory": peaks[i] / peaks[plain], "tokens/s": args.rows * (K + 1) * args.block_size / took}
    return rows


def timed_step(learner, ids, attention) -> float:
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    with attention():
        learner(ids[:, :-1], ids[:, 1:]).backward()
    wait()
    return time.perf_counter() - began


def peak_memory(model, step, device) -> int:
    """Bytes allocated at the height of a step, above what was there before it."""
    model.zero_grad()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


# --- the data ---------------------------------------------------------------------------------------------------------
def bench_data(args) -> list[dict]:
    """Preparing a text against tiktoken on the same text in memory, two processes each; and drawing tasks at scale."""
    name = prepare_data.get_tokenizer(args.tokenizer).name
    with tempfile.TemporaryDirectory() as folder:
        prepare_data.main(["local", "--name", "text", "--data_dir", folder, "--max_mb", "12"])
        shards = [prepare_data.open_shard(path) for path in sorted(Path(folder, "text").glob("*/train_*.bin"))]
        documents = [part[1:] for ids in shards for part in np.split(ids, np.flatnonzero(ids == 256))[1:]]
        texts = [ids.astype(np.uint8).tobytes().decode(errors="replace") for ids in documents]
        Path(folder, "in").mkdir()
        Path(folder, "in", "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        megabytes, seconds = sum(len(text.encode()) for text in texts) / 1e6, []
        for i in range(3):
            began = time.perf_counter()
            with multiprocessing.Pool(2) as pool:
                pool.map(encode, [(name, texts[0::2]), (name, texts[1::2])])
            alone, began = time.perf_counter() - began, time.perf_counter()
            options = ["--name", str(i), "--data_dir", folder, "--tokenizer", name, "--workers", "2"]
            subprocess.run([sys.executable, prepare_data.__file__, f"{folder}/in", *options], check=True)
            seconds.append((alone, time.perf_counter() - began))
        ratio, speed = np.median([(alone / took, megabytes / took) for alone, took in seconds], axis=0)
        rows = [{"case": f"{megabytes:.0f} MB to {name} tokens", "ratio": ratio, "MB/s": speed}]
        for size, domains, tokens in (("small", 10, 10**6), ("large", 40, 250 * 10**6)):
            case = f"draw a row of {domains * tokens:.0e} tokens, {domains} domains"
            rows.append({"case": case, "us": draw_time(Path(folder, size), domains, tokens)})
    return rows


def encode(task):
    name, texts = task
    return len(prepare_data.get_tokenizer(name).encode_ordinary_batch(texts, num_threads=1))


def draw_time(root: Path, domains: int, tokens: int) -> float:
    """Microseconds to draw a row of 1,024 tokens, from sparse files of that many tokens a domain in shards of 1e8."""
    none = {unit: {"train": 0, "val": 0} for unit in ("documents", "bytes", "tokens")}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "command": {}, "domains": {}}
    for d in map(str, range(domains)):
        shards = {f"{d}/train_{i:06}.bin": min(10**8, tokens - n) for i, n in enumerate(range(0, tokens, 10**8))}
        (root / d).mkdir(parents=True)
        for path, count in shards.items():
            np.array([prepare_data.MAGIC, prepare_data.VERSION, count], np.int32).tofile(root / path)
            os.truncate(root / path, 4 * prepare_data.HEADER_INTS + 2 * count)
        hashes = dict.fromkeys(shards, "")
        meta["domains"][d] = {"role": "train", "shards": {"train": hashes, "val": hashes}, "skipped": {}, **none}
    (root / "meta.json").write_text(json.dumps(meta))
    cfg = Config(data_dir=str(root.parent), dataset=root.name, block_size=1024, batch_size=16, tasks_per_step=8)
    data, began = Dataset(cfg), time.perf_counter()
    for step, task in itertools.product(range(50), range(8)):
        data.task(step, task)
    return 1e6 * (time.perf_counter() - began) / (50 * 8 * 16)


# --- the table --------------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="learner", choices=["learner", "data"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--repeat", type=int, default=7, help="rounds of measurement")
    shape = dict(rows=8, block_size=256, n_layer=4, n_head=4, n_embd=128, vocab_size=320)
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/bench.json"))
    args = parser.parse_args()
    rows = (bench_data if args.what == "data" else bench_learner)(args)
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    card = pick_device(args.device).type == "cuda"
    about = {"device": torch.cuda.get_device_name() if card else cpu, "torch": torch.__version__}
    about |= {name: getattr(args, name) for name in ("dtype", *shape)}
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    print(*(f"{key}={value}" for key, value in about.items()))
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        first, *cells = (f"{row[c]:.2f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns)
        print(first.ljust(46) + "".join(cell.rjust(12) for cell in cells))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
