"""Pretrain a GPT, plainly (inner_steps=0) or by meta-learning: one loop for both, on one process or many.

    python train.py config/maml_demo.py                                    # this machine, whatever it has
    python train.py config/maml_demo.py --seed=2 --out_dir=out/maml_s2     # every field of Config is a flag
    python train.py config/maml_demo.py --init_from=resume                 # go on, bit for bit, after a stop
    torchrun --nproc_per_node=8 train.py config/maml_124m.py               # eight GPUs: the same tasks, the same steps

A step learns from tasks_per_step tasks, each batch_size rows of one domain: task by task the learner's outer loss is
differentiated and the gradients are averaged. Gradient accumulation over tasks is MAML's meta-batch, and DDP's ranks
share the tasks out. Every draw is a pure function of (seed, split, step, task), so that resuming needs no state but the
step, evaluating cannot move training, and the number of processes does not change the data.
"""

import ast
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from maml import MAML
from model import GPT, GPTConfig
from prepare_data import ROLES, open_shard, read_meta

PROGRESS = ("step", "seconds", "best")  # the fields of Run that a checkpoint carries
# the fields of Config that the log counts tokens and FLOPs by, or that shape the optimizer's state: a run keeps them
KEPT = ("batch_size", "tasks_per_step", "inner_steps", "first_order", "first_order_steps", "learn_inner_lr", "nesterov")

# ----------------------------------------------------------------------------------------------------------------------
# configuration: defaults here, a Python file of assignments over them, --key=value over both


@dataclasses.dataclass(frozen=True)
class Config:
    # the run
    out_dir: str = "out/run"  # where log.jsonl and the checkpoints go
    init_from: str = "scratch"  # 'scratch', 'resume' (from out_dir), or the path of a checkpoint, nanoGPT's too
    dataset: str = "local"  # data_dir/dataset, as prepare_data.py wrote it
    data_dir: str = "data"
    seed: int = 1  # decides initialisation and every draw of training data, not the evaluation's
    device: str = "auto"  # 'auto' takes cuda, else mps, else cpu
    dtype: str = "float32"  # of the matrix products: 'float32' or 'bfloat16' (autocast); weights stay float32
    compile: bool = False  # torch.compile: minutes of waiting, then faster steps; for GPUs and long runs
    # the model
    block_size: int = 256  # tokens of a row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0  # 0 for pretraining; second order needs 0
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # the tasks
    batch_size: int = 16  # rows of one task, split into inner_steps + 1 chunks; the micro-batch that memory bounds
    tasks_per_step: int = 8  # the meta-batch: at least the number of train domains where that is affordable
    max_steps: int = 1000
    domain_sampling: str = "uniform"  # 'uniform' over train domains or in proportion to their 'size'
    shuffle_domains: bool = False  # True: every task mixes all domains (the baseline as people do it; the control)
    # the outer optimizer, AdamW
    learning_rate: float = 1e-3
    min_lr: float = 1e-4  # where the cosine ends
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # of the meta-gradient's norm; 0 for none
    nesterov: bool = False  # AdamW with Nesterov's look-ahead (NAdam): a control for what inner steps gain
    lr_scale_from: str = ""  # a learner's checkpoint whose learned inner rates scale the outer ones: another control
    # the inner loop; inner_steps=0 is plain training
    inner_steps: int = 0  # K
    inner_lr: float = 0.02  # around 0.02 for 'sgd', 1e-3 for 'adamw'
    inner_optimizer: str = "sgd"  # 'sgd' or 'adamw'
    inner_schedule: str = "constant"  # 'constant' or 'cosine'
    inner_warmup: int = 0  # inner steps of linear warm-up
    inner_weight_decay: float = 0.0
    inner_clip: float = 0.0  # of each inner gradient's norm; 0 for none
    inner_warm_start: bool = False  # inner AdamW starts from the outer AdamW's second moment
    first_order: bool = False  # leave the Hessian out: the baseline's cost exactly
    first_order_steps: int = 0  # first order until this step, second order after
    objective: str = "every"  # 'every' chunk's loss before it is learned, or the 'final' chunk's only
    learn_inner_lr: bool = False  # a learned rate per parameter tensor and inner step, from inner_lr on
    inner_lr_lr: float = 0.01  # the outer learning rate of those (they are logarithms)
    # watching
    eval_interval: int = 100  # steps between evaluations, each with a checkpoint
    eval_steps: int = 4  # tasks per domain in an evaluation; runs compare if this times batch_size is the same
    log_interval: int = 10  # steps between training rows in the log
    keep_interval: int = 0  # evaluations at its multiples keep their checkpoint, step_*.pt, for adapt.py; 0 for none

    def __post_init__(self):
        for name, known in {"dtype": ("float32", "bfloat16"), "domain_sampling": ("uniform", "size")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(map(repr, known))}")
        positive = "block_size n_layer n_head n_embd batch_size tasks_per_step eval_interval eval_steps log_interval"
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), int(f.name in positive.split())
            if f.type in (int, float) and not least <= value < (2**63 if f.type is int else 3e38):
                raise ValueError(f"{f.name}={value} must be at least {least}, and finite in float32")
        if not self.learning_rate:
            raise ValueError("learning_rate=0.0 must be positive: to learn nothing, set max_steps=0")
        if self.inner_warm_start and self.inner_optimizer != "adamw":
            raise ValueError("inner_warm_start=True lends a second moment: set inner_optimizer='adamw' as well")
        if self.batch_size % (n := self.inner_steps + 1):
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of inner_steps + 1 = {n}: change either")


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def load_config(argv: list[str]) -> Config:
    """A Config from ['config/x.py', '--key=value', ...]; ValueError names a wrong key's nearest or a wrong type."""
    values = {}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if not equals:
                raise ValueError(f"{arg} has no value: write --{key}=VALUE")
            try:
                value = text if key in FIELDS and FIELDS[key].type is str else ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = {"true": True, "false": False}.get(text.lower(), text)
            values[key] = check_field(key, value, "the command line")
        elif not Path(arg).is_file():
            raise ValueError(f"no config file {arg}: give a path such as config/maml_demo.py")
        else:
            try:
                found = runpy.run_path(arg)  # in a namespace of its own; _names and imports are the file's business
            except Exception as error:
                raise ValueError(f"{arg} is not a config file that runs: {type(error).__name__}: {error}") from error
            found = {k: v for k, v in found.items() if k[0] != "_" and not isinstance(v, ModuleType)}
            values |= {key: check_field(key, value, arg) for key, value in found.items()}
    return Config(**values)


def check_field(key: str, value, where: str):
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, 1)
        raise ValueError(f"unknown key {key!r} in {where}" + (f": did you mean {near[0]!r}?" if near else ""))
    kind = FIELDS[key].type
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise ValueError(f"{key} in {where} must be {kind.__name__}, not {type(value).__name__} {value!r}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# the loop


@dataclasses.dataclass
class Run:
    """The parts of a run and how far it has come; start() makes one from a Config."""

    cfg: Config
    rank: int
    world_size: int
    device: torch.device
    data: "Dataset"
    learner: MAML
    optimizer: torch.optim.Optimizer
    step: int = 0  # outer updates made
    seconds: float = 0.0  # spent on them, evaluation apart
    best: float = math.inf  # the lowest mean loss on the tune domains


def train(run: Run):
    cfg, model, stop_signals, stopping = run.cfg, run.learner.model, [], False

    def on_signal(number, _):  # finish the step, save, go. One within a second is an echo, as torchrun's of Ctrl-C is
        if stop_signals and time.monotonic() > stop_signals[0] + 1:
            raise SystemExit("stopped at once: the last checkpoint is whole")
        stop_signals.append(time.monotonic())

    for sig in (signal.SIGTERM, signal.SIGINT):  # what Slurm and a person send
        signal.signal(sig, on_signal)
    ddp = DDP(run.learner, broadcast_buffers=False, gradient_as_bucket_view=True) if run.world_size > 1 else run.learner
    bar = tqdm(total=cfg.max_steps, initial=run.step, unit="step", disable=run.rank > 0, dynamic_ncols=True)
    while True:
        now = progress(cfg, model, run.step, run.seconds)
        due = run.step % cfg.eval_interval == 0 or run.step == cfg.max_steps
        if cfg.inner_warm_start and run.step:  # here, so that an evaluation after a resume lends the same
            moments = [run.optimizer.state[p]["exp_avg_sq"] for p in run.learner.theta().values()]
            run.learner.second_moment = [v / (1 - cfg.beta2**run.step) for v in moments]  # torch's v is not corrected
        if due and not stopping:
            losses = evaluate(run)
            if not math.isfinite(sum(losses["loss"].values())):  # or the good checkpoints would make way for this one
                raise SystemExit(not_finite(run, f"evaluation {losses['loss']}"))
            if run.rank == 0:
                append_row(cfg.out_dir, {"kind": "val", **now, **losses})
                save_checkpoint(run, losses)
                bar.write(one_line(run, losses))
        if run.step == cfg.max_steps or stopping:
            break
        began = time.perf_counter()
        row, stopping = outer_step(run, ddp, bool(stop_signals))
        run.seconds += (took := time.perf_counter() - began)
        run.step += 1
        flops = progress(cfg, model, run.step, 0)["flops"] - now["flops"]
        if run.rank == 0 and now["step"] % cfg.log_interval == 0:
            append_row(cfg.out_dir, {"kind": "train", **now, **row})
        speed = f"{tokens_per_step(cfg) / took:,.0f} tokens/s{mfu(run, flops / took)}"
        bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed}")
        bar.update()
    bar.close()
    if stopping and run.rank == 0:
        save_checkpoint(run)
        print(f"stopped after step {run.step}: the same command with --init_from=resume goes on")


def outer_step(run: Run, ddp, stop: bool) -> tuple[dict, bool]:
    """One outer update from tasks_per_step tasks: what the log says of it, and whether any rank was told to stop."""
    cfg, n, learner = run.cfg, run.cfg.tasks_per_step, run.learner
    learner.train()
    learner.first_order = cfg.first_order or run.step < cfg.first_order_steps
    learner.clipped = 0  # what an evaluation clipped is not the step's
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_factor(cfg, run.step)
    report = torch.zeros(n + 2, device=run.device)  # a loss per task, the wish to stop, clips: one message for all
    mine = range(run.rank, n, run.world_size)
    for task in mine:
        if cfg.dropout:
            torch.manual_seed(int(rng(cfg.seed, "dropout", run.step, task).integers(2**63)))
        x, y = run.data.task(run.step, task, run.device)
        # DDP averages over ranks; only the last task's backward need talk to the others
        with ddp.no_sync() if run.world_size > 1 and task != mine[-1] else nullcontext():
            loss = ddp(x, y)
            (loss * (run.world_size / n)).backward()
        report[task] = loss.detach()
    report[n], report[n + 1] = stop, learner.clipped
    if run.world_size > 1:
        dist.all_reduce(report)
    grad_norm = nn.utils.clip_grad_norm_(learner.model.parameters(), cfg.grad_clip or math.inf).item()
    loss = report[:n].mean().item()
    if not math.isfinite(loss + grad_norm):
        raise SystemExit(not_finite(run, f"loss {loss}, gradient norm {grad_norm}: stopped before the update"))
    run.optimizer.step()
    run.optimizer.zero_grad()
    row = {"loss": loss, "lr": run.optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}
    return row | {"clipped": int(report[n + 1])}, bool(report[n] > 0)


def not_finite(run: Run, what: str) -> str:
    rate = "inner_lr_lr" if run.cfg.learn_inner_lr else "inner_lr"
    remedy = f"--init_from=resume and a lower learning_rate or {rate}, or inner_clip=1.0"
    return f"step {run.step}: {what}. Go on from the last checkpoint in {run.cfg.out_dir}: {remedy}"


@torch.no_grad()
def evaluate(run: Run) -> dict:
    """Nats per token on val, by domain: theta's ('loss'), and after the learner's own inner steps ('adapted').

    The windows are the same at every step, and for all runs of one block_size and one eval_steps * batch_size. 'loss'
    takes all of them; 'adapted' learns from the first inner_steps chunks of each task and is measured on its last. The
    ranks share the tasks out.
    """
    learner, K = run.learner.eval(), run.cfg.inner_steps
    tasks = run.data.val
    table = torch.zeros(len(tasks), 2, device=run.device)
    for i in range(run.rank, len(tasks), run.world_size):
        x, y = (t.to(run.device) for t in tasks[i][1:])
        table[i, 0] = learner.loss(learner.theta(), x, y)
        if K:
            n = x.size(0) // (K + 1)
            table[i, 1] = learner.loss(learner.adapt(x[:-n], y[:-n]), x[-n:], y[-n:])
    if run.world_size > 1:
        dist.all_reduce(table)
    by_domain = {d: table[[i for i, t in enumerate(tasks) if t[0] == d]].mean(0).tolist() for d in run.data.domains}
    return {
        "loss": {d: before for d, (before, _) in by_domain.items()},
        "adapted": {d: after for d, (_, after) in by_domain.items()} if K else {},
    }


# ----------------------------------------------------------------------------------------------------------------------
# tasks: pure functions of (seed, split, step, task)


def rng(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


shard = lru_cache(512)(open_shard)  # a memory map holds a file handle: thousands of shards must not exhaust them


class Dataset:
    """The shards of data_dir/dataset. ValueError or FileNotFoundError say what is missing and how to make it."""

    def __init__(self, cfg: Config):
        self.root, self.T = Path(cfg.data_dir) / cfg.dataset, cfg.block_size
        if not (self.root / "meta.json").is_file():
            given = cfg.dataset if cfg.dataset in ROLES else f"PATH --name {cfg.dataset}"
            raise FileNotFoundError(f"no data at {self.root}: run python prepare_data.py {given}")
        self.meta = read_meta(self.root / "meta.json")
        self.sha256 = hashlib.sha256((self.root / "meta.json").read_bytes()).hexdigest()
        self.domains = {d: info["role"] for d, info in self.meta["domains"].items()}
        self.shards, self.lengths = {}, {}  # by (domain, split): paths, and their tokens
        for d, info in self.meta["domains"].items():
            for split in ("train", "val"):
                paths = [self.root / path for path in info["shards"][split]]
                for path in paths:
                    highest = shard(path)[:: max(1, len(shard(path)) // 1000)].max()  # a sample; --verify reads all
                    if highest >= self.meta["vocab_size"]:
                        raise ValueError(f"{path} holds id {highest}, beyond the vocabulary: prepare {self.root} again")
                self.shards[d, split] = paths
                self.lengths[d, split] = np.array([len(shard(path)) for path in paths], dtype=np.int64)
        self.train_domains = sorted(d for d, role in self.domains.items() if role == "train")
        if not self.train_domains:
            raise ValueError(f"{self.root} has no domain with the role 'train': prepare it with fewer --heldout")
        size = np.array([self.lengths[d, "train"].sum() for d in self.train_domains], dtype=float)
        self.share = size / size.sum() if cfg.domain_sampling == "size" else np.full(len(size), 1 / len(size))
        self.cfg = cfg
        for d, share in zip(self.train_domains, self.share, strict=True):  # every task must find its rows, none twice
            most = math.ceil(share * cfg.tasks_per_step * cfg.batch_size) + 1 if cfg.shuffle_domains else cfg.batch_size
            self.windows(d, "train", min(most, cfg.batch_size), rng(0))
        self.val = [(d, x, y) for d in self.domains for x, y in self.val_tasks(d)]

    def windows(self, domain: str, split: str, n: int, rng: np.random.Generator, at_most: bool = False) -> np.ndarray:
        """n rows of T + 1 ids from anywhere in a split, no position in two rows; with at_most fewer if it is small."""
        lengths = self.lengths[domain, split]
        offset = rng.integers(min(self.T, max(1, lengths.max(initial=0) - n * self.T)))
        blocks = np.maximum(lengths - 1 - offset, 0) // self.T  # rows that fit, by shard
        total = int(blocks.sum())
        n = min(n, total) if at_most else n
        if not 0 < n <= total:
            raise ValueError(
                f"domain {domain!r} has {lengths.sum():,} {split} tokens, too few for {max(n, 1)} rows of block_size="
                f"{self.T}: lower block_size or batch_size, or give it more text"
            )
        picks = rng.choice(total, n, replace=False)
        ends = blocks.cumsum()
        where = np.searchsorted(ends, picks, side="right")
        starts = offset + (picks - ends[where] + blocks[where]) * self.T
        paths = self.shards[domain, split]
        return np.stack([shard(paths[s])[a : a + self.T + 1] for s, a in zip(where, starts, strict=True)])  # (n, T + 1)

    def task(self, step: int, task: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """x, y (B, T) of one training task: rows of one domain, or with shuffle_domains of all of them."""
        B, shuffle = self.cfg.batch_size, self.cfg.shuffle_domains
        draws = B if shuffle else 1  # of domains: one for every row of a task, or for the task
        domains = self.step_domains(step, self.cfg.tasks_per_step * draws)[task * draws : (task + 1) * draws]
        draw = rng(self.cfg.seed, "train", step, task)
        rows = [self.windows(d, "train", B * domains.count(d) // draws, draw) for d in sorted(set(domains))]
        return batch(np.concatenate(rows)[draw.permutation(B)], device)

    def step_domains(self, step: int, n: int) -> list[str]:
        """The domains of a step's n draws, in proportion to their share, and as evenly as n allows: with equal shares
        none comes twice before all have come once (systematic sampling over the domains in random order)."""
        draw = rng(self.cfg.seed, "domains", step)
        order = draw.permutation(len(self.share))
        picks = np.searchsorted(self.share[order].cumsum(), (np.arange(n) + draw.random()) / n)
        return [self.train_domains[order[min(i, len(order) - 1)]] for i in draw.permutation(picks)]

    def val_tasks(self, domain: str):
        """The evaluation's tasks of a domain: x, y (B, T), the same windows at every step and for every seed."""
        B, chunks = self.cfg.batch_size, self.cfg.inner_steps + 1
        rows = self.windows(domain, "val", self.cfg.eval_steps * B, rng("val", domain), at_most=True)
        B = min(B, len(rows) // chunks * chunks)
        if not B:
            few = f"the val split of {domain!r} has only {len(rows)} rows of {self.T}"
            raise ValueError(f"{few}: lower block_size or inner_steps")
        return [batch(rows[i : i + B]) for i in range(0, len(rows) - B + 1, B)]


def batch(rows: np.ndarray, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T + 1) ids -> inputs and next-token targets (B, T)."""
    ids = torch.from_numpy(rows.astype(np.int64))
    if torch.device(device).type == "cuda":
        ids = ids.pin_memory().to(device, non_blocking=True)
    ids = ids.to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# start, checkpoints, log


def start(cfg: Config) -> Run:
    """Everything that train() needs, from scratch or from a checkpoint; raises ValueError or OSError with a remedy."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.tasks_per_step % world_size:
        raise ValueError(f"tasks_per_step={cfg.tasks_per_step} must be a multiple of the {world_size} processes")
    device = pick_device(cfg.device)
    data = Dataset(cfg)
    torch.manual_seed(cfg.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    path = Path(cfg.init_from)
    if resume := cfg.init_from == "resume":  # ckpt_prev.pt is alone where a kill fell between two renames
        path = next((p for n in ("ckpt.pt", "ckpt_prev.pt") if (p := Path(cfg.out_dir, n)).exists()), None)
    args = dict(vocab_size=-(-data.meta["vocab_size"] // 64) * 64)  # matrix units like multiples of 64
    args |= {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig) if f.name in FIELDS}
    if path and cfg.init_from != "scratch":
        ckpt, model = load_checkpoint(path, dropout=cfg.dropout)
        check_checkpoint(ckpt, args, data, cfg)
    else:
        ckpt, model = None, GPT(GPTConfig(**args))
    # Config's fields have the names of MAML's arguments
    options = {name: getattr(cfg, name) for name in inspect.signature(MAML).parameters if name in FIELDS}
    learner = MAML(model, autocast=torch.bfloat16 if cfg.dtype == "bfloat16" else None, **options).to(device)
    groups = [group | {"peak_lr": cfg.learning_rate} for group in model.parameter_groups(cfg.weight_decay)]
    if cfg.lr_scale_from:
        groups = scaled_groups(groups, load_checkpoint(Path(cfg.lr_scale_from))[0], model)
    if learner.log_inner_lr is not None:
        groups.append({"params": [learner.log_inner_lr], "weight_decay": 0.0, "peak_lr": cfg.inner_lr_lr})
    if cfg.nesterov:  # momentum_decay: beta1 from the first step on, as AdamW has it
        nadam = {"decoupled_weight_decay": True, "momentum_decay": 1e6}
        optimizer = torch.optim.NAdam(groups, betas=(cfg.beta1, cfg.beta2), **nadam)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=device.type == "cuda")
    run = Run(cfg, rank, world_size, device, data, learner, optimizer)
    if resume and ckpt:
        learner.load_state_dict(ckpt["learner"], strict=False)
        groups = optimizer.state_dict()["param_groups"]  # the rates that are asked for now, not the checkpoint's
        optimizer.load_state_dict(ckpt["optimizer"] | {"param_groups": groups})
        run.step, run.seconds, run.best = (ckpt[key] for key in PROGRESS)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        open_log(run, resumed=bool(resume and ckpt))
        print(summary(run), flush=True)
    return run


def scaled_groups(groups: list[dict], ckpt: dict, model: GPT) -> list[dict]:
    """A group per tensor, its rate times what a learner learned for it, over the geometric mean of all."""
    rates = ckpt.get("learner", {}).get("log_inner_lr")
    if rates is None or rates.size(1) != len([*model.parameters()]):
        raise ValueError("lr_scale_from needs the checkpoint of a learner of the same shape, with learn_inner_lr=True")
    scale = (rates.mean(0) - rates.mean()).exp().tolist()
    scale = dict(zip(map(id, model.parameters()), scale, strict=True))
    return [g | {"params": [p], "peak_lr": g["peak_lr"] * scale[id(p)]} for g in groups for p in g["params"]]


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} is not to be had here ({error}): leave it at 'auto'") from None


def load_checkpoint(path: Path, **changes) -> tuple[dict, GPT]:
    """A checkpoint of ours or of nanoGPT's, and its model: tensors and plain values only, so no code in it can run."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, or give the path of a ckpt.pt")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**ckpt["model_args"] | changes))
        model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in ckpt["model"].items()})
    except Exception as error:
        what = f"{path} is cut short, or no checkpoint of a GPT ({type(error).__name__}: {str(error)[:200]})"
        raise ValueError(f"{what}: use another one, such as ckpt_prev.pt beside it") from error
    return ckpt, model


def check_checkpoint(ckpt: dict, args: dict, data: Dataset, cfg: Config):
    """A run resumes as what it was; other weights need only have room for the data."""
    old = ckpt["model_args"]
    if cfg.init_from != "resume":
        if old["vocab_size"] < data.meta["vocab_size"] or old["block_size"] < cfg.block_size:
            size = f"{old['vocab_size']} ids and {old['block_size']} positions"
            raise ValueError(f"{cfg.init_from} has {size}: too few here")
        return
    if missing := {"config", "learner", "optimizer", "dataset", *PROGRESS} - ckpt.keys():
        what = f"the checkpoint in {cfg.out_dir} has weights but no {', '.join(sorted(missing))}"
        raise ValueError(f"{what}: give its path as --init_from and another out_dir")
    if ckpt["step"] > cfg.max_steps:
        raise ValueError(f"{cfg.out_dir} is at step {ckpt['step']} already: set max_steps to that, or to more")
    was, now = dataclasses.asdict(Config()) | ckpt["config"], dataclasses.asdict(cfg)
    old = old | {"dataset": ckpt["dataset"]["sha256"][:9]} | {key: was[key] for key in KEPT}
    new = args | {"dataset": data.sha256[:9]} | {key: now[key] for key in KEPT}
    if changed := ", ".join(f"{k}={old[k]} (now {new[k]})" for k in old if old[k] != new[k]):
        raise ValueError(f"{cfg.out_dir} was trained with {changed}: resume alike, or use another out_dir")


def save_checkpoint(run: Run, losses: dict | None = None):
    """ckpt.pt, atomically; the one before stays as ckpt_prev.pt, the best on the tune domains as best.pt."""
    cfg, out, model = run.cfg, Path(run.cfg.out_dir), run.learner.model
    tune = [losses["loss"][d] for d, role in run.data.domains.items() if losses and role == "tune"]
    mean = np.mean(tune).item() if tune else math.inf
    keep = cfg.keep_interval and losses and 0 < run.step < cfg.max_steps and run.step % cfg.keep_interval == 0
    names = ["best.pt"] * (mean < run.best) + [f"step_{run.step:06d}.pt"] * bool(keep) + ["ckpt.pt"]
    run.best = min(mean, run.best)
    learned = {k: v for k, v in run.learner.state_dict().items() if not k.startswith("model.")}
    ckpt = {"model": model.state_dict(), "learner": learned, "optimizer": run.optimizer.state_dict()}
    ckpt |= {"model_args": dataclasses.asdict(model.config), "config": dataclasses.asdict(cfg)}
    ckpt |= {"dataset": {"name": cfg.dataset, "sha256": run.data.sha256, "tokenizer": run.data.meta["tokenizer"]}}
    ckpt |= {key: getattr(run, key) for key in PROGRESS}
    temporary = out / "ckpt.pt.tmp"
    try:
        for name in names:
            torch.save(ckpt, temporary)
            with open(temporary) as file:  # a machine that loses power may keep a rename and lose what was renamed
                os.fsync(file.fileno())
            if name == "ckpt.pt" and (out / name).exists():
                os.replace(out / name, out / "ckpt_prev.pt")
            os.replace(temporary, out / name)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        what = f"step {run.step}: cannot write {out / 'ckpt.pt'} ({str(error)[:99]}). The one before is whole"
        raise SystemExit(f"{what}: make room, then --init_from=resume") from None


def open_log(run: Run, resumed: bool):
    """Begin log.jsonl with the run's header, or cut it back to the checkpoint that the run resumes from."""
    out, head, rows = Path(run.cfg.out_dir), header(run), []
    path, temporary = out / "log.jsonl", out / "log.jsonl.tmp"
    if path.exists() and resumed:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # a line cut short has no end
        rows = [r for r in rows if r.get("step", -1) < run.step or (r["kind"] == "adapt" and r["step"] == run.step)]
        if rows and head["config"] != rows[0]["config"] | {"init_from": "resume"}:  # it goes on with other settings
            rows[0] = head | {"before": rows[0]}
    elif path.exists():  # nothing is lost: an earlier run steps aside
        n = next(n for n in itertools.count(1) if not Path(f"{out}.{n}").exists())
        out.rename(f"{out}.{n}")
        print(f"the earlier run in {out} is now {out}.{n}")
    out.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows or [head]))
    os.replace(temporary, path)


def header(run: Run) -> dict:
    """The log's first row: what is needed to make the run again, and to read its log without the data."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = shutil.which("git") and subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    card = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{platform.machine()} {run.device.type}"
    meta, model = run.data.meta, run.learner.model
    sizes = {d: (sum(v.get("bytes", {}).values()), sum(v["tokens"].values())) for d, v in meta["domains"].items()}
    dataset = {"name": run.cfg.dataset, "sha256": run.data.sha256, "roles": run.data.domains}
    dataset |= {"tokenizer": meta["tokenizer"], "vocab_size": meta["vocab_size"]}
    dataset |= {"bytes_per_token": {d: size / tokens for d, (size, tokens) in sizes.items() if size}}
    row = {"kind": "run", "command": shlex.join(["python", "train.py", *sys.argv[1:]])}
    row |= {"config": dataclasses.asdict(run.cfg), "commit": (git and git.stdout.strip()) or "unknown"}
    row |= {"versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    row |= {"device": f"{run.world_size} x {card}", "params": sum(p.numel() for p in model.parameters())}
    return row | {"flops_per_token": model.flops_per_token(run.cfg.block_size), "dataset": dataset}


def append_row(out_dir: str, row: dict):
    with open(Path(out_dir) / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# counting and telling


def tokens_per_step(cfg: Config) -> int:
    return cfg.tasks_per_step * cfg.batch_size * cfg.block_size


def progress(cfg: Config, model: GPT, step: int, seconds: float) -> dict:
    """Where a row stands: support tokens count like all others, and FLOPs as maml.py's lesson counts them."""
    K, first = cfg.inner_steps, step if cfg.first_order else min(step, cfg.first_order_steps)
    forwards = 3 * first + (12 * K + 3) / (K + 1) * (step - first)  # of the tokens of one step
    flops = forwards * tokens_per_step(cfg) * model.flops_per_token(cfg.block_size)
    return {"step": step, "tokens": step * tokens_per_step(cfg), "flops": flops, "seconds": round(seconds, 3)}


def lr_factor(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to min_lr / learning_rate at max_steps."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    t = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    floor = cfg.min_lr / cfg.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def mfu(run: Run, flops_per_second: float) -> str:
    """Model FLOPs utilisation, on cards whose dense bfloat16 peak we know."""
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    peak = next((flops for card, flops in peaks.items() if card in name), None)
    return f", {flops_per_second / peak / run.world_size:.1%} MFU" if peak else ""


def one_line(run: Run, losses: dict) -> str:
    """step 200 | train 2.310 -> 2.290 | ...: the mean by role, before -> after the learner's own inner steps."""
    text, roles = f"step {run.step}", run.data.domains
    for role in (role for role in ("train", "tune", "heldout") if role in roles.values()):
        means = [np.mean([loss[d] for d in roles if roles[d] == role]) for loss in losses.values() if loss]
        text += f" | {role} {' -> '.join(f'{mean:.3f}' for mean in means)}"
    return text


def summary(run: Run) -> str:
    """What is about to happen, in five lines; the progress bar adds the time it will take."""
    cfg, model, roles = run.cfg, run.learner.model, [*run.data.domains.values()]
    domains = ", ".join(f"{roles.count(role)} {role}" for role in ("train", "tune", "heldout"))
    rates = ", learned rates from" if cfg.learn_inner_lr else " at"
    order = "first" if cfg.first_order else f"after {cfg.first_order_steps} steps second"
    inner = f"{cfg.inner_steps} x {cfg.inner_optimizer}{rates} {cfg.inner_lr:g}, {order} order, {cfg.objective!r}"
    total = progress(cfg, model, cfg.max_steps, 0)
    return f"""data     {run.data.root}: domains: {domains}; {run.data.meta["tokenizer"]} tokens
model    {sum(p.numel() for p in model.parameters()):,} parameters, {cfg.block_size} tokens of context
learner  {inner if cfg.inner_steps else "plain training (inner_steps=0)"}
step     {cfg.tasks_per_step} x {cfg.batch_size} rows, {tokens_per_step(cfg):,} tokens, on {run.world_size} {run.device}
total    {cfg.max_steps:,} steps, {total["tokens"]:,} tokens, {total["flops"]:.3g} FLOPs, into {cfg.out_dir}"""


def usage() -> str:
    """The opening docstring, and Config's fields with their defaults and comments as they stand above."""
    fields = [line.strip() for line in inspect.getsource(Config).split("def __post_init__")[0].splitlines()[2:]]
    return __doc__ + "\n" + "\n".join(f"  --{f}" if f[:1].isalpha() else f for f in fields)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        return print(usage())
    try:
        run = start(load_config(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None
    try:
        train(run)
    except OSError as error:  # the system's: a full disk, no permission
        raise SystemExit(f"train.py: {error}: mend that, then the same command with --init_from=resume") from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
