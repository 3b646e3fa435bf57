"""Pretrain a GPT, plainly (inner_steps=0) or by meta-learning: one loop for both, on any machine.

    python train.py config/maml_demo.py                                 # whatever this machine has
    python train.py config/maml_demo.py --seed=2 --out_dir=out/maml_s2  # every field is a flag
    python train.py config/maml_demo.py --init_from=resume              # go on after a stop
    torchrun --nproc_per_node=8 train.py config/maml_124m.py            # eight GPUs, the same steps

A step learns from tasks_per_step tasks. Task by task the learner's outer loss is differentiated, and
the gradients are averaged; DDP's ranks share the tasks out.
"""

import argparse
import dataclasses
import datetime
import difflib
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
from contextlib import nullcontext
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
from tasks import TASKS, Dataset, ahead

SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias")  # of the model; a checkpoint's rules
# what the log counts tokens and FLOPs by, or what shapes the optimizer's state: a run keeps it
KEPT = ("batch_size", "tasks_per_step", "inner_steps", "first_order", "learn_inner_lr", "nesterov")


@dataclasses.dataclass(frozen=True)
class Config:
    # the run
    out_dir: str = "out/run"  # where log.jsonl and the checkpoints go
    init_from: str = "scratch"  # or a checkpoint's path, nanoGPT's too; 'resume' sets resume=True
    resume: bool = False  # go on from the checkpoint in out_dir, where there is one
    dataset: str = "local"  # data_dir/dataset, as prepare_data.py wrote it
    data_dir: str = "data"
    seed: int = 1  # decides initialisation and every draw of training data, not the evaluation's
    device: str = "auto"  # 'auto' takes cuda, else mps, else cpu
    dtype: str = "float32"  # of the products: 'float32' or 'bfloat16'; weights stay float32
    compile: bool = False  # torch.compile: minutes of waiting, then faster steps
    # the model
    block_size: int = 256  # tokens of a row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # the tasks
    tasks: str = "mixed"  # rows from anywhere; of one 'domain'; consecutive ones: a 'passage'
    batch_size: int = 16  # rows of a task, cut into inner_steps + 1 chunks
    tasks_per_step: int = 8  # the meta-batch; the processes share it out
    permute_share: float = 0.0  # of tasks whose alphabet is permuted, so that only learning helps
    max_steps: int = 1000
    # the outer optimizer, AdamW
    learning_rate: float = (
        1e-3  # at its peak; a cosine takes it to a tenth. 0 leaves theta as it is
    )
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta2: float = 0.95
    grad_clip: float = 1.0  # of the outer gradient's norm; 0 for none
    nesterov: bool = False  # NAdam: a look-ahead that costs nothing, the control to beat
    # the inner loop; inner_steps=0 is plain training
    inner_steps: int = 0  # K
    inner_lr: float = 0.02  # around 0.02 for 'sgd', 1e-3 for 'adamw'
    inner_optimizer: str = "sgd"  # 'sgd' or 'adamw'
    inner_schedule: str = "constant"  # 'constant' or 'cosine'
    inner_warmup: int = 0  # inner steps of linear warm-up
    inner_clip: float = 0.0  # of each inner gradient's norm, in reading too; 0 for none
    first_order: bool = False  # take inner gradients for constants: the cost of plain training
    objective: str = "every"  # 'every' chunk's loss before it is learned, or the 'final' one's
    learn_inner_lr: str = "no"  # a learned rate for each 'tensor' or 'element', from inner_lr on
    inner_lr_lr: float = 0.01  # the outer learning rate of their logarithms, at its peak
    # watching
    eval_interval: int = 100  # steps between evaluations, each with a checkpoint
    eval_passages: int = 4  # passages of each domain's val split in an evaluation
    eval_rows: int = 32  # consecutive rows of such a passage

    def __post_init__(self):
        words = {"dtype": ("float32", "bfloat16"), "tasks": TASKS}
        for name, known in words.items():
            if (value := getattr(self, name)) not in known:
                choices = " or ".join(map(repr, known))
                raise ValueError(f"{name}={value!r} is unknown: choose {choices}")
        zero_is_wrong = {*SHAPE[:-1], "batch_size", "tasks_per_step", "inner_lr"}
        zero_is_wrong |= {"eval_interval", "eval_passages", "eval_rows"}
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name in zero_is_wrong)
            if field.type is int and not least <= value < 2**63:
                raise ValueError(f"{field.name}={value} must be at least {least}")
            if field.type is float and not 0 <= value < 1e38:
                raise ValueError(f"{field.name}={value} must not be negative, and finite")
        if self.batch_size % (n := self.inner_steps + 1):
            what = f"batch_size={self.batch_size} must be a multiple of inner_steps + 1 = {n}"
            raise ValueError(f"{what}: change either")
        if self.learning_rate == 0 and (self.learn_inner_lr == "no" or self.inner_steps == 0):
            raise ValueError(
                "learning_rate=0 leaves nothing to learn: set learn_inner_lr='element'"
            )


# --------------------------------------------------------------------------------------------------
# the run


def train(given: dict):
    """Pretrains as `given`, fields of Config by name, say. ValueError and OSError name a remedy."""
    cfg = Config(**given)

    # processes
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_divisible(cfg, world_size)
    device = pick_device(cfg.device)
    if world_size > 1 and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        timeout = datetime.timedelta(minutes=10)
        dist.init_process_group(backend, device_id=bound, timeout=timeout)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32

    # weights: from out_dir, another checkpoint or scratch
    out, ckpt = Path(cfg.out_dir), None
    resumed = cfg.resume and (out / "ckpt.pt").exists()
    if resumed or cfg.init_from != "scratch":
        ckpt, model = load_checkpoint(out / "ckpt.pt" if resumed else Path(cfg.init_from))
        shape = {name: getattr(model.config, name) for name in SHAPE}
        if wrong := [name for name in SHAPE if given.get(name, shape[name]) != shape[name]]:
            has = ", ".join(f"{name}={shape[name]}" for name in wrong)
            raise ValueError(f"the checkpoint has {has}: leave {', '.join(wrong)} out")
        cfg = dataclasses.replace(cfg, **shape)

    # data
    data = Dataset(
        Path(cfg.data_dir, cfg.dataset),
        block_size=cfg.block_size,
        batch_size=cfg.batch_size,
        tasks_per_step=cfg.tasks_per_step,
        tasks=cfg.tasks,
        seed=cfg.seed,
        permute_share=cfg.permute_share,
    )
    val = {d: data.passages(d, cfg.eval_passages, cfg.eval_rows) for d in data.roles}
    vocab_size = data.meta["vocab_size"]
    if ckpt is None:
        padded = -(-vocab_size // 64) * 64  # matrix units like multiples of 64
        shape = {name: getattr(cfg, name) for name in SHAPE}
        model = GPT(GPTConfig(vocab_size=padded, **shape))
    elif model.config.vocab_size < vocab_size:
        few = f"the checkpoint knows {model.config.vocab_size} ids, {data.root} has {vocab_size}"
        raise ValueError(f"{few}: use a checkpoint or a dataset with the other's tokenizer")

    # learner
    learner = MAML(
        model,
        inner_steps=cfg.inner_steps,
        inner_lr=cfg.inner_lr,
        inner_optimizer=cfg.inner_optimizer,
        first_order=cfg.first_order,
        objective=cfg.objective,
        learn_inner_lr=cfg.learn_inner_lr,
        inner_clip=cfg.inner_clip,
        compile=cfg.compile,
        autocast=torch.bfloat16 if cfg.dtype == "bfloat16" else None,
        inner_schedule=cfg.inner_schedule,
        inner_warmup=cfg.inner_warmup,
    ).to(device)
    ddp = learner
    if world_size > 1:
        ddp = DDP(learner, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = make_optimizer(cfg, learner)

    # where it stands
    step, seconds, best, spent = 0, 0.0, math.inf, {"tokens": 0, "flops": 0.0, "seconds": 0.0}
    if resumed:
        check_same_run(ckpt, cfg, data)
        groups = optimizer.state_dict()["param_groups"]  # the rates asked for now
        optimizer.load_state_dict(ckpt["optimizer"] | {"param_groups": groups})
        step, best, seconds = ckpt["step"], ckpt["best"], ckpt["seconds"]
        spent = ckpt["spent_before"]
    elif ckpt:
        spent = ckpt.get(
            "spent", spent
        )  # what the checkpoint cost counts, or nothing would compare
    if ckpt:
        load_rates(learner, ckpt.get("learner", {}))
    if world_size > 1:  # a file system that lags may show the ranks different checkpoints
        seen = [None] * world_size
        dist.all_gather_object(seen, (step, data.sha256))
        if len(set(seen)) > 1:
            raise ValueError(f"the processes start from different steps or data: {seen}; try again")
    header = describe(cfg, data, model, spent, f"{world_size} x {device_name(device)}")
    if rank == 0:
        open_log(out, header, step, resumed)
        print(summary(cfg, header), flush=True)

    # the loop
    stop_signals = catch_signals()
    mine = range(rank, cfg.tasks_per_step, world_size)
    draws = [(s, task) for s in range(step, cfg.max_steps) for task in mine]
    tasks = ahead(lambda s, task: to_device(data.task(s, task), device), draws)
    bar = tqdm(total=cfg.max_steps, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    stop = False
    for step in range(step, cfg.max_steps + 1):
        at = {"step": step, **count(cfg, header, spent, step, seconds)}
        last = step == cfg.max_steps
        if (step % cfg.eval_interval == 0 or last) and not stop:
            losses = evaluate(learner, val, data.roles, cfg, rank, world_size, device)
            check_finite(cfg, step, sum(losses["loss"].values()), "the evaluation")
            best, is_best = judge(losses, data.roles, best)
            if rank == 0:
                save(
                    out,
                    ["best.pt"] * is_best,
                    learner,
                    optimizer,
                    cfg,
                    data,
                    spent,
                    at,
                    best,
                    seconds,
                )
                append_row(out, {"kind": "val", **at, **losses})
                bar.write(one_line(step, losses, data.roles))
        elif stop and rank == 0:
            save(out, [], learner, optimizer, cfg, data, spent, at, best, seconds)
            bar.write(f"stopped at step {step}: the same command with --init_from=resume goes on")
        if last or stop:
            break

        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(cfg, step)
        total = torch.zeros(2, device=device)
        for task in mine:
            # DDP averages over the ranks; only the last task's backward need talk to them
            silent = world_size > 1 and task != mine[-1]
            with ddp.no_sync() if silent else nullcontext():
                loss = ddp(*next(tasks)) / len(mine)
                loss.backward()
            total[0] += loss.detach()
        total[1] += bool(stop_signals)
        if world_size > 1:
            dist.all_reduce(total)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        loss, stop, grad_norm = torch.stack([*total / world_size, grad_norm]).tolist()
        check_finite(cfg, step, loss + grad_norm, "the outer loss or its gradient")
        optimizer.step()
        learner.zero_grad()
        took = time.perf_counter() - began
        seconds += took
        if rank == 0 and step % 10 == 0:
            lr = cfg.learning_rate * lr_factor(cfg, step)
            append_row(out, {"kind": "train", **at, "loss": loss, "lr": lr, "grad_norm": grad_norm})
        speed = header["tokens_per_step"] / took
        flops = header["flops_per_step"] / took / world_size / 1e12
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, {flops:.3g} TFLOP/s")
        bar.update()
    bar.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def make_optimizer(cfg: Config, learner: MAML) -> torch.optim.Optimizer:
    """AdamW over theta, unless learning_rate=0 leaves it as it is, and over the learned rates."""
    groups = []
    if cfg.learning_rate:
        groups = learner.model.parameter_groups(cfg.weight_decay)
        groups = [group | {"peak_lr": cfg.learning_rate} for group in groups]
    if rates := [*learner.log_inner_lr]:
        groups.append({"params": rates, "weight_decay": 0.0, "peak_lr": cfg.inner_lr_lr})
    chosen = sum(len(group["params"]) for group in groups)
    assert chosen == len([*learner.parameters()]) or not cfg.learning_rate
    betas = (0.9, cfg.beta2)
    if cfg.nesterov:  # momentum_decay this large: beta1 from the first step on, as AdamW has it
        return torch.optim.NAdam(
            groups, betas=betas, decoupled_weight_decay=True, momentum_decay=1e6
        )
    fused = next(learner.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, betas=betas, fused=fused)


def lr_factor(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.1 at max_steps."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    t = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


@torch.no_grad()
def evaluate(learner: MAML, val, roles, cfg: Config, rank=0, world_size=1, device="cpu") -> dict:
    """Nats per token on passages of val, by domain; the ranks share the domains out.

    'loss' is theta's. 'online' is the learner's own on the same rows, of the domains that are not
    trained on: the mean loss of rows that are learned as soon as they are predicted.
    """
    chunk = cfg.batch_size // (cfg.inner_steps + 1)
    table = torch.zeros(len(val), 2, device=device)
    for i, (domain, xy) in enumerate(val.items()):
        if i % world_size != rank:
            continue
        x, y = to_device(xy, device)  # (P, R, T)
        rows = x.flatten(0, 1), y.flatten(0, 1)
        losses = [learner.loss(learner.theta(), *part) for part in padded(*rows, chunk)]
        counts = [(part[1][:, 0] >= 0).sum() for part in padded(*rows, chunk)]
        table[i, 0] = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / len(rows[0])
        if cfg.inner_steps and roles[domain] != "train":
            table[i, 1] = learner.read(x, y, chunk)[0].mean()
    if world_size > 1:
        dist.all_reduce(table)
    table = dict(zip(val, table.tolist(), strict=True))
    unseen = [d for d in val if cfg.inner_steps and roles[d] != "train"]
    return {"loss": {d: table[d][0] for d in val}, "online": {d: table[d][1] for d in unseen}}


def padded(x, y, n):
    """x, y (rows, T) in parts of n rows each, so that they make one graph; -1 fills the last y."""
    missing = -len(x) % n
    x = torch.cat([x, x[:1].expand(missing, -1)])
    y = torch.cat([y, torch.full_like(y[:1], -1).expand(missing, -1)])
    return list(zip(x.split(n), y.split(n), strict=True))


def judge(losses: dict, roles: dict, best: float) -> tuple[float, bool]:
    """The lowest mean loss on the tune domains so far, and whether this is it."""
    judged = losses["online"] or losses["loss"]
    tune = [judged[d] for d, role in roles.items() if role == "tune"]
    mean = float(np.mean(tune)) if tune else math.inf
    return min(mean, best), mean < best


# --------------------------------------------------------------------------------------------------
# checkpoints and the log


def load_checkpoint(path: Path) -> tuple[dict, GPT]:
    """A checkpoint, ours or nanoGPT's, and its model. Only tensors and plain values are loaded."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, or give a ckpt.pt's path")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        known = {field.name for field in dataclasses.fields(GPTConfig)}
        args = {name: value for name, value in ckpt["model_args"].items() if name in known}
        model = GPT(GPTConfig(**args))
        weights = {n.removeprefix("_orig_mod."): w for n, w in ckpt["model"].items()}
        model.load_state_dict(weights)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path} is cut short, or no checkpoint of a GPT ({why})") from error
    return ckpt, model


@torch.no_grad()
def load_rates(learner: MAML, saved: dict):
    """Learned rates from a checkpoint; a tensor's begins those of its elements, and their mean its."""
    for i, rate in enumerate(learner.log_inner_lr):
        if (old := saved.get(f"log_inner_lr.{i}")) is not None:
            rate.copy_(old if rate.dim() else old.mean())


def check_same_run(ckpt: dict, cfg: Config, data: Dataset):
    """A run resumes as what it was, or its log would not add up."""
    needed = {"config", "dataset", "optimizer", "learner", "step", "seconds", "spent_before"}
    if missing := needed - ckpt.keys():
        what = f"the checkpoint in {cfg.out_dir} has no {', '.join(sorted(missing))}"
        raise ValueError(f"{what}: give its path as --init_from and another out_dir")
    if ckpt["step"] > cfg.max_steps:
        raise ValueError(f"{cfg.out_dir} is at step {ckpt['step']}: set max_steps to that, or more")
    old = {name: ckpt["config"].get(name) for name in KEPT}
    old |= {"trained on": ckpt["dataset"]["sha256"][:9]}
    new = {name: getattr(cfg, name) for name in KEPT} | {"trained on": data.sha256[:9]}
    if changed := ", ".join(f"{k}={old[k]} (now {new[k]})" for k in old if old[k] != new[k]):
        raise ValueError(f"{cfg.out_dir} was trained with {changed}: resume alike")


def save(out: Path, names, learner, optimizer, cfg, data, spent_before, at, best, seconds):
    """ckpt.pt, atomically: written beside it, then renamed. `names` are further links to it."""
    learned = {k: v for k, v in learner.state_dict().items() if not k.startswith("model.")}
    trained_on = {"name": cfg.dataset, "sha256": data.sha256, "shards": data.trained}
    ckpt = {
        "model": learner.model.state_dict(),
        "learner": learned,
        "optimizer": optimizer.state_dict(),
        "model_args": dataclasses.asdict(learner.model.config),
        "config": dataclasses.asdict(cfg),
        "dataset": trained_on | {"tokenizer": data.meta["tokenizer"]},
        "step": at["step"],
        "seconds": seconds,
        "best": best,
        "spent_before": spent_before,
        "spent": {name: at[name] for name in ("tokens", "flops", "seconds")},
    }
    temporary, link = out / "ckpt.pt.tmp", out / "link.tmp"
    try:
        torch.save(ckpt, temporary)
        with open(temporary) as file:  # or a power cut may keep the rename and lose the content
            os.fsync(file.fileno())
        for name in names:
            link.unlink(missing_ok=True)
            try:
                os.link(temporary, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(temporary, link)
            os.replace(link, out / name)
        os.replace(temporary, out / "ckpt.pt")
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        what = f"step {at['step']}: cannot write {out / 'ckpt.pt'} ({str(error)[:99]})"
        raise SystemExit(f"{what}. The one before is whole: make room, resume") from None


def open_log(out: Path, header: dict, step: int, resumed: bool):
    """Begins log.jsonl with the run's header, or cuts it back to the checkpoint's step."""
    path, temporary = out / "log.jsonl", out / "log.jsonl.tmp"
    rows = [header]
    if path.exists() and resumed:
        lines = path.read_text().split("\n")[:-1]  # a line cut short has no end
        old = [json.loads(line) for line in lines]
        rows = [
            header | {"before": old[0]} if old and old[0]["config"] != header["config"] else header
        ]
        rows += [r for r in old[1:] if r.get("step", -1) < step or r["kind"] == "adapt"]
    elif path.exists():
        raise ValueError(
            f"{out} holds a run: --init_from=resume goes on, or choose another out_dir"
        )
    out.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


def append_row(out: Path, row: dict):
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def describe(cfg: Config, data: Dataset, model: GPT, spent: dict, device: str) -> dict:
    """The log's first row: what is needed to make the run again and to read its log."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    commit = shutil.which("git") and subprocess.run(git, cwd=here, capture_output=True, text=True)
    K, tokens = cfg.inner_steps, cfg.tasks_per_step * cfg.batch_size * cfg.block_size
    forwards = 3 if cfg.first_order or K == 0 else (12 * K + 3) / (K + 1)  # of each token: maml.py
    return {
        "kind": "run",
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
        "config": dataclasses.asdict(cfg),
        "commit": (commit and commit.stdout.strip()) or "unknown",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": device,
        "params": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": tokens,
        "flops_per_step": forwards * tokens * model.flops_per_token(cfg.block_size),
        "spent_before": spent,
        "dataset": {"name": cfg.dataset, "sha256": data.sha256, "roles": data.roles}
        | {"tokenizer": data.meta["tokenizer"]},
    }


def count(cfg: Config, header: dict, spent: dict, step: int, seconds: float) -> dict:
    """What a run has cost by a step, with what the checkpoint that it began from had."""
    return {
        "tokens": spent["tokens"] + step * header["tokens_per_step"],
        "flops": spent["flops"] + step * header["flops_per_step"],
        "seconds": round(spent["seconds"] + seconds, 3),
    }


# --------------------------------------------------------------------------------------------------
# processes, devices, signals


def check_divisible(cfg: Config, world_size: int):
    if cfg.tasks_per_step % world_size == 0:
        return
    what = f"tasks_per_step={cfg.tasks_per_step} is no multiple of the {world_size} processes"
    rows = cfg.batch_size * cfg.tasks_per_step
    remedy = "change either"
    if cfg.inner_steps == 0 and rows % world_size == 0:
        same = f"--tasks_per_step={world_size} --batch_size={rows // world_size}"
        remedy = f"{same} has as many rows in a step"
    raise ValueError(f"{what}: {remedy}")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({error}): try --device=auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {device.type}"


def to_device(xy, device: torch.device):
    if device.type == "cuda":  # pinned memory is copied while the host goes on
        return [t.pin_memory().to(device, non_blocking=True) for t in xy]
    return [t.to(device) for t in xy]


def catch_signals() -> list:
    """A list that fills when the run is asked to stop. A second signal stops it at once."""
    caught = []

    def handle(number, frame):
        if caught and time.monotonic() > caught[0] + 1:  # sooner it is an echo, as torchrun's is
            raise SystemExit("stopped at once: the last checkpoint is whole")
        caught.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT):  # what Slurm and a person send
        signal.signal(number, handle)
    return caught


def check_finite(cfg: Config, step: int, value: float, what: str):
    if not math.isfinite(value):
        remedy = "--init_from=resume with a lower learning_rate or inner_lr, or inner_clip=1"
        raise SystemExit(
            f"step {step}: {what} is not finite. The last checkpoint is whole: {remedy}"
        )


# --------------------------------------------------------------------------------------------------
# what is printed, and the command line


def one_line(step: int, losses: dict, roles: dict) -> str:
    """step 200 | train 2.310 | heldout 2.612 -> 2.404: means by role, theta's -> online."""
    text = f"step {step}"
    for role in ("train", "tune", "heldout"):
        domains = [d for d in roles if roles[d] == role]
        tables = [losses["loss"], losses["online"]] if role != "train" else [losses["loss"]]
        means = [np.mean([table[d] for d in domains]) for table in tables if table and domains]
        if means:
            text += f" | {role} " + " -> ".join(f"{mean:.3f}" for mean in means)
    return text


def summary(cfg: Config, header: dict) -> str:
    """What is about to happen, in five lines; the progress bar adds the time it will take."""
    roles = [*header["dataset"]["roles"].values()]
    domains = ", ".join(f"{roles.count(role)} {role}" for role in ("train", "tune", "heldout"))
    learned = f", learned by {cfg.learn_inner_lr}" if cfg.learn_inner_lr != "no" else ""
    order = "first" if cfg.first_order else "second"
    inner = f"{cfg.inner_steps} x {cfg.inner_optimizer} at {cfg.inner_lr:g}{learned}, {order} order"
    total = count(cfg, header, header["spent_before"], cfg.max_steps, 0)
    return f"""data     {cfg.dataset}: {domains} domains; {header["dataset"]["tokenizer"]} tokens
model    {header["params"]:,} parameters, {cfg.block_size} tokens of context
learner  {inner if cfg.inner_steps else "plain training (inner_steps=0)"}
step     {cfg.tasks_per_step} {cfg.tasks} x {cfg.batch_size} rows, on {header["device"]}
total    {cfg.max_steps:,} steps, {total["tokens"]:,} tokens, {total["flops"]:.3g} FLOPs"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def read_arguments(argv: list[str]) -> dict:
    """Fields of Config from ['config/x.py', '--key=value', ...], later ones over earlier ones.

    ValueError names a wrong value's type, and the nearest name of a key that does not exist.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    about = "What each flag means is said beside its default, in Config, at the top of train.py."
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("train.py", None, __doc__, about, formatter_class=form, allow_abbrev=False)
    parser.add_argument("config", nargs="*", help="Python files of assignments, config/*.py")
    for name, field in fields.items():
        kind = boolean if field.type is bool else field.type
        kwargs = {"metavar": field.type.__name__, "default": argparse.SUPPRESS}
        parser.add_argument(f"--{name}", type=kind, help=f"default {field.default!r}", **kwargs)
    flags, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        check_known(argument.lstrip("-").partition("=")[0], fields, "the command line")
    flags, given = vars(flags), {}
    for path in flags.pop("config"):
        if not Path(path).is_file():
            raise ValueError(f"no config file {path}: give a path such as config/maml_demo.py")
        try:
            values = runpy.run_path(path)  # in a namespace of its own
        except Exception as error:
            raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
        for name, value in values.items():
            if name[0] == "_" or isinstance(value, ModuleType):
                continue
            check_known(name, fields, path)
            kind = fields[name].type
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                raise ValueError(f"{name} in {path} must be {kind.__name__}, not {value!r}")
            given[name] = value
    if flags.get("init_from") == "resume":  # what it began from stays on record
        del flags["init_from"]
        flags["resume"] = True
    return given | flags


def check_known(name: str, fields, where: str):
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown key {name!r} in {where}{hint}")


def boolean(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def main(argv: list[str] | None = None):
    try:
        train(read_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None


if __name__ == "__main__":
    main()
