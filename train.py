"""Pretrain a GPT, plainly (inner_steps=0) or by meta-learning: one loop for both, on any machine.

python train.py config/maml_demo.py                                 # whatever this machine has
python train.py config/maml_demo.py --seed=2 --out_dir=out/maml_s2  # every field is a flag
python train.py config/maml_demo.py --init_from=resume              # go on after a stop
torchrun --nproc_per_node=8 train.py config/maml_124m.py            # eight GPUs, the same steps
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
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from maml import MAML
from model import GPT, GPTConfig
from tasks import Dataset


@dataclasses.dataclass(frozen=True)
class Config:
    # the run
    out_dir: str = "out/run"  # where log.jsonl and ckpt.pt go
    init_from: str = "scratch"  # or a checkpoint's path, nanoGPT's too; draws begin anew
    resume: bool = False  # go on from out_dir/ckpt.pt, if any; --init_from=resume sets it
    dataset: str = "local"  # data_dir/dataset, as prepare_data.py wrote it
    data_dir: str = "data"
    seed: int = 1  # decides initialisation and every draw of training data, not the evaluation's
    device: str = "auto"  # 'auto' takes cuda, else mps, else cpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products; weights stay float32
    compile: bool = False  # torch.compile: minutes of waiting, then faster steps
    # the model; a checkpoint's shape rules
    block_size: int = 256  # tokens of a row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # the tasks: rows from anywhere, of one domain, or consecutive rows of one domain
    tasks: Literal["mixed", "domain", "passage"] = "mixed"
    batch_size: int = 16  # rows of a task, cut into inner_steps + 1 chunks
    tasks_per_step: int = 8  # the meta-batch; the processes share it out
    max_steps: int = 1000
    # the outer optimizer, AdamW
    learning_rate: float = 1e-3  # its peak; a cosine ends at a tenth. 0 leaves theta as it is
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta2: float = 0.95  # small batches ask for more: 0.99, 0.995
    grad_clip: float = 1.0  # of the norm of the outer gradient to theta; 0 for none
    nesterov: bool = False  # NAdam: a look-ahead that costs nothing, the control to beat
    # the inner loop; inner_steps=0 is plain training
    inner_steps: int = 0  # K
    inner_lr: float = 0.02  # around 0.02 for 'sgd', 1e-3 for 'adamw'
    inner_optimizer: str = "sgd"  # 'sgd' or 'adamw'
    inner_schedule: str = "constant"  # 'constant' or 'cosine'
    inner_warmup: int = 0  # inner steps of linear warm-up
    inner_repeats: int = 1  # inner steps on each chunk, in reading too
    inner_clip: float = 0.0  # of each inner gradient's norm, in reading too; 0 for none
    first_order: bool = False  # treat inner gradients as constants: the cost of plain training
    objective: str = "every"  # 'every' chunk's loss before it is learned, or the 'final' one's
    learn_inner_lr: str = "no"  # a learned rate for each 'tensor' or 'element', from inner_lr on
    inner_lr_lr: float = 0.01  # the outer learning rate of their logarithms, at its peak
    # watching
    eval_interval: int = 100  # steps between evaluations, each with a checkpoint
    eval_passages: int = 4  # passages of each domain's val split in an evaluation
    eval_rows: int = 32  # consecutive rows of such a passage

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 1 if name in POSITIVE else 0
            if type(value) in (int, float) and not least <= value < 1e30:
                raise ValueError(f"{name}={value} must be finite and at least {least}")
        if self.batch_size % (n := self.inner_steps + 1):
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of K + 1 = {n}")
        if self.learning_rate == 0 and (self.learn_inner_lr == "no" or self.inner_steps == 0):
            raise ValueError("learning_rate=0 leaves only rates to learn: set learn_inner_lr")


SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias")
COUNTS = ("batch_size", "tasks_per_step", "inner_repeats", "eval_interval", "eval_passages")
POSITIVE = (*SHAPE[:-1], *COUNTS, "eval_rows")
SIDE_BY_SIDE = 50_000_000  # parameters, in all passages that are read at once
KEPT = ("inner_steps", "inner_optimizer", "learn_inner_lr", "nesterov")  # when a run is resumed
NEW = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0}  # how far a run has come, and its cost

# --------------------------------------------------------------------------------------------------
# the run


def train(given: dict):
    """A run with the fields of Config that are `given`. ValueError and OSError say what to do."""
    cfg = Config(**given)
    out = Path(cfg.out_dir)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_shares(cfg, world_size)
    device = pick_device(cfg.device)
    if world_size > 1 and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=bound, timeout=datetime.timedelta(minutes=10))
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32

    # the model: out_dir's, another checkpoint's, or a new one
    ckpt, model = {}, None
    resumed = cfg.resume and (out / "ckpt.pt").exists()
    if resumed or cfg.init_from != "scratch":
        ckpt, model = load_checkpoint(out / "ckpt.pt" if resumed else Path(cfg.init_from))
        shape = {name: getattr(model.config, name) for name in SHAPE}
        if wrong := {k: v for k, v in shape.items() if given.get(k, v) != v}:
            raise ValueError(f"the checkpoint has the shape {wrong}: leave these fields out")
        cfg = dataclasses.replace(cfg, **shape)
    data = Dataset(
        Path(cfg.data_dir, cfg.dataset),
        block_size=cfg.block_size,
        batch_size=cfg.batch_size,
        tasks_per_step=cfg.tasks_per_step,
        tasks=cfg.tasks,
        seed=cfg.seed,
    )
    ids = data.meta["vocab_size"]
    if model is None:
        shape = {name: getattr(cfg, name) for name in SHAPE}
        model = GPT(GPTConfig(vocab_size=-(-ids // 64) * 64, **shape))  # as matrix units like it
    tokenizer = ckpt.get("dataset", data.meta)["tokenizer"]  # nanoGPT does not name its own
    if tokenizer != data.meta["tokenizer"] or model.config.vocab_size < ids:
        raise ValueError(f"{data.root} has other tokens than the checkpoint: prepare it alike")

    # learner and optimizer
    learner = make_learner(cfg, model).to(device)
    if ckpt.get("config", {}).get("inner_optimizer") == cfg.inner_optimizer:
        load_rates(learner, ckpt["learner"])  # another optimizer's rates mean something else
    optimizer = make_optimizer(cfg, learner)
    at = {key: ckpt.get(key, NEW[key]) for key in NEW}  # what a checkpoint cost, this run costs
    if resumed:
        check_same_run(ckpt, cfg, data)
        groups = optimizer.state_dict()["param_groups"]  # the rates that are asked for now
        optimizer.load_state_dict(ckpt["optimizer"] | {"param_groups": groups})
    else:
        at["step"] = 0
    if world_size > 1:  # file systems that lag may show the ranks different checkpoints
        seen = [None] * world_size
        dist.all_gather_object(seen, (at["step"], data.sha256))
        if len(set(seen)) > 1:
            raise ValueError(f"the processes begin at different steps or data: {seen}: start again")
    ddp = DDP(learner, gradient_as_bucket_view=True) if world_size > 1 else learner

    # the log, and what is evaluated
    header = make_header(cfg, data, model, device, world_size, ckpt)
    val = {d: data.passages(d, cfg.eval_passages, cfg.eval_rows) for d in data.roles}
    unseen = data.unseen(header["dataset"]["trained"]) if cfg.inner_steps else []
    chunk = cfg.batch_size // (cfg.inner_steps + 1)  # rows
    if rank == 0:
        open_log(out, header, at["step"], cfg.resume)
        print(f"{header['params']:,} parameters on {header['device']}", flush=True)
    stop_signals, stop = catch_signals(), False
    mine = range(rank, cfg.tasks_per_step, world_size)
    draws = ((step, task) for step in range(at["step"], cfg.max_steps) for task in mine)
    batches = (to_device(data.task(*draw), device) for draw in draws)
    xy = next(batches, None)
    silent = True if rank else None  # None: no bar where the output is no terminal
    bar = tqdm(total=cfg.max_steps, initial=at["step"], unit="step", disable=silent)

    for step in range(at["step"], cfg.max_steps + 1):
        at["step"], last = step, step == cfg.max_steps
        evaluated = (step % cfg.eval_interval == 0 or last) and not stop
        if evaluated:
            losses = evaluate(learner, val, unseen, chunk, rank, world_size)
            check_finite(step, sum(sum(table.values()) for table in losses.values()))
        if rank == 0 and (evaluated or stop):
            save(out, at, learner, optimizer, header)
        if rank == 0 and evaluated:
            append_row(out, {"kind": "val", **at, **losses})
            bar.write(one_line(step, losses, data.roles))
        if last or stop:
            break

        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(cfg, step)
        sums = torch.zeros(2, device=device)  # [loss, processes that were asked to stop]
        for task in mine:
            # DDP averages over the ranks, each of which has as many tasks: the mean over all tasks.
            # Only the last task's backward need talk to the other ranks.
            waits = world_size > 1 and task != mine[-1]
            with ddp.no_sync() if waits else nullcontext():
                loss = ddp(*xy) / len(mine)
                loss.backward()
            xy = next(batches, None)  # drawn while a GPU works
            sums[0] += loss.detach()
        sums[1] += bool(stop_signals)
        if world_size > 1:
            dist.all_reduce(sums)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        loss, stop, grad_norm = torch.stack([*sums, grad_norm]).tolist()  # the one wait for a GPU
        loss /= world_size
        check_finite(step, loss + grad_norm)
        optimizer.step()
        learner.bound_rates()
        learner.zero_grad()
        took = time.perf_counter() - began
        if rank == 0 and step % 10 == 0:
            append_row(out, {"kind": "train", **at, "loss": loss, "grad_norm": grad_norm})
        at["tokens"] += header["tokens_per_step"]
        at["flops"] += header["flops_per_step"]
        at["seconds"] = round(at["seconds"] + took, 4)
        flops = header["flops_per_step"] / took / world_size / 1e12
        speed = f"{header['tokens_per_step'] / took:,.0f} tokens/s, {flops:.3g} TFLOP/s"
        bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        bar.update()
    bar.close()
    if world_size > 1:
        del ddp  # one that outlives its process group may wait for ever when it is freed
        dist.destroy_process_group()
    if stop:  # an exit status that says so to make and to scripts
        raise SystemExit(f"stopped at step {step}: the same with --init_from=resume goes on")


def make_learner(cfg: Config, model: GPT) -> MAML:
    return MAML(
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
        inner_repeats=cfg.inner_repeats,
    )


def make_optimizer(cfg: Config, learner: MAML) -> torch.optim.Optimizer:
    """AdamW over theta, which learning_rate=0 leaves as it is, and over the learned rates."""
    groups = learner.model.parameter_groups(cfg.weight_decay)
    groups = [group | {"peak_lr": cfg.learning_rate} for group in groups]
    if (rates := learner.log_inner_lr) is not None:
        groups.append({"params": [rates], "weight_decay": 0.0, "peak_lr": cfg.inner_lr_lr})
    betas = (0.9, cfg.beta2)
    if cfg.nesterov:  # momentum_decay: beta1 from the first step on, as AdamW has it
        nadam = {"decoupled_weight_decay": True, "momentum_decay": 1e6}
        return torch.optim.NAdam(groups, betas=betas, **nadam)
    return torch.optim.AdamW(groups, betas=betas, fused=next(learner.parameters()).is_cuda)


def lr_factor(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.1 at max_steps."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    t = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, t)))


@torch.no_grad()
def evaluate(learner: MAML, val: dict, unseen, chunk: int, rank=0, world_size=1) -> dict:
    """Nats per token on passages of val, by domain; the ranks share the domains out.

    'loss' is theta's. 'online' is, on the same rows of `unseen` domains, the loss of a learner that
    learns each chunk of so many rows as soon as it is predicted. Nothing here is compiled, since
    domains may have val splits of many shapes.
    """
    device = next(learner.parameters()).device
    table = torch.zeros(len(val), 2, device=device)
    for i, domain in list(enumerate(val))[rank::world_size]:
        x, y = to_device(val[domain], device)  # (P, R, T)
        parts = zip(x.flatten(0, 1).split(chunk), y.flatten(0, 1).split(chunk), strict=True)
        losses = [len(a) * learner.model_loss({}, a, b) for a, b in parts]
        table[i, 0] = sum(losses) / (x.size(0) * x.size(1))
        if domain in unseen:
            table[i, 1] = read_passages(learner, x, y, chunk)[0].mean()
    if world_size > 1:
        dist.all_reduce(table)
    loss, online = (dict(zip(val, column, strict=True)) for column in table.T.tolist())
    return {"loss": loss, "online": {d: online[d] for d in unseen}}


def read_passages(learner: MAML, x, y, rows: int):
    """learner.read, as many passages side by side as copies of the parameters may be made.

    Losses (P, R), and the last passage's phi (N,).
    """
    n, losses = max(1, SIDE_BY_SIDE // sum(learner.sizes)), []
    for part in zip(x.split(n), y.split(n), strict=True):
        loss, phi = learner.read(*part, rows)
        losses.append(loss)
    return torch.cat(losses), phi[-1]


# --------------------------------------------------------------------------------------------------
# checkpoints and the log


def load_checkpoint(path: Path) -> tuple[dict, GPT]:
    """A checkpoint, ours or nanoGPT's, and its model. Only tensors and plain values are loaded."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, or give a ckpt.pt's path")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        args = {k: v for k, v in ckpt["model_args"].items() if k != "dropout"}  # nanoGPT's
        model = GPT(GPTConfig(**args))
        model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in ckpt["model"].items()})
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path} is cut short, or no checkpoint of a GPT ({why})") from error
    return ckpt, model


@torch.no_grad()
def load_rates(learner: MAML, saved: dict):
    """Rates that a checkpoint's learner has. That of a tensor fills its elements."""
    new, old = learner.log_inner_lr, saved.get("log_inner_lr")
    if new is None or old is None:
        return
    if len(old) > len(new):
        raise ValueError("the checkpoint has rates of elements: set learn_inner_lr=element")
    new.copy_(old if len(old) == len(new) else learner.by_element(old))


def check_same_run(ckpt: dict, cfg: Config, data: Dataset):
    """A run goes on with the data and the kind of optimizer that it had."""
    if not {"optimizer", "dataset"} <= ckpt.keys():  # nanoGPT's, or what adapt.py --save wrote
        raise ValueError(f"{cfg.out_dir} has no run of train.py: give its ckpt.pt as --init_from")
    if ckpt["step"] > cfg.max_steps:
        raise ValueError(f"{cfg.out_dir} is at step {ckpt['step']}: set max_steps to that, or more")
    old = {k: ckpt["config"][k] for k in KEPT} | {"data": ckpt["dataset"]["sha256"][:9]}
    new = {k: getattr(cfg, k) for k in KEPT} | {"data": data.sha256[:9]}
    if changed := ", ".join(f"{k}={old[k]} (now {new[k]})" for k in old if old[k] != new[k]):
        remedy = "resume alike, or give its ckpt.pt as --init_from and another out_dir"
        raise ValueError(f"{cfg.out_dir} was trained with {changed}: {remedy}")


def save(out: Path, at: dict, learner: MAML, optimizer, header: dict):
    """ckpt.pt, atomically: written beside it and renamed, so that there is always a whole one."""
    rates = {} if learner.log_inner_lr is None else {"log_inner_lr": learner.log_inner_lr.detach()}
    ckpt = {
        "model": learner.model.state_dict(),
        "model_args": dataclasses.asdict(learner.model.config),
        "learner": rates,
        "optimizer": optimizer.state_dict(),
        "config": header["config"],
        "dataset": header["dataset"],
        **at,
    }
    with open(out / "ckpt.pt.tmp", "wb") as file:
        torch.save(ckpt, file)
        os.fsync(file.fileno())  # or a power cut may keep the rename and lose the content
    os.replace(out / "ckpt.pt.tmp", out / "ckpt.pt")


def open_log(out: Path, header: dict, first_step: int, resume: bool):
    """Begins log.jsonl with the run's header; of an earlier one, rows before first_step stay."""
    path, rows = out / "log.jsonl", []
    if path.exists():
        if not resume:
            raise ValueError(f"{out} holds a run: --init_from=resume goes on; or another out_dir")
        rows = map(json.loads, path.read_text().split("\n")[:-1])  # a line cut short has no end
        rows = [r for r in rows if r.get("step", -1) < first_step or r["kind"] == "adapt"]
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "log.jsonl.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    os.replace(temporary, path)


def append_row(out: Path, row: dict):
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def make_header(cfg: Config, data: Dataset, model: GPT, device, world_size, ckpt: dict) -> dict:
    """The log's first row: what is needed to make the run again and to read its log."""
    git = "git describe --always --dirty --abbrev=40 --exclude='*'"  # by a shell: it may be absent
    how = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
    on_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} {device.type}"
    tokens = cfg.tasks_per_step * cfg.batch_size * cfg.block_size
    steps = cfg.inner_steps * cfg.inner_repeats
    forwards = ((3 if cfg.first_order else 12) * steps + 3) / (cfg.inner_steps + 1)  # as in maml.py
    # No text that the checkpoint was trained on may count as unseen.
    trained = {h for shards in data.trained.values() for h in shards.values()}
    trained |= {*ckpt.get("dataset", {}).get("trained", [])}
    return {
        "kind": "run",
        "command": " ".join(["python train.py", *sys.argv[1:]]),
        "config": dataclasses.asdict(cfg),
        "commit": subprocess.run(git, **how).stdout.strip() or "unknown",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{world_size} x {kind}",
        "params": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": tokens,
        "flops_per_step": forwards * tokens * model.flops_per_token(cfg.block_size),
        "dataset": {
            "name": cfg.dataset,
            "tokenizer": data.meta["tokenizer"],
            "roles": data.roles,
            "sha256": data.sha256,
            "trained": sorted(trained),
        },
    }


# --------------------------------------------------------------------------------------------------
# processes, devices, signals


def check_shares(cfg: Config, world_size: int):
    if cfg.tasks_per_step % world_size:
        rows, remedy = cfg.batch_size * cfg.tasks_per_step, "change either"
        if cfg.inner_steps == 0 and rows % world_size == 0:  # for plain training, rows are rows
            remedy = f"--tasks_per_step={world_size} --batch_size={rows // world_size} is as much"
        what = f"{world_size} processes cannot share tasks_per_step={cfg.tasks_per_step} out"
        raise ValueError(f"{what}: {remedy}")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here ({error}): try --device=auto") from None


def to_device(xy, device: torch.device):
    if device.type == "cuda":  # what is pinned is copied while the host goes on
        xy = [t.pin_memory() for t in xy]
    return [t.to(device, non_blocking=True) for t in xy]


def catch_signals() -> list:
    """A list that fills when the run is asked to stop. Asked again, it stops at once."""
    caught = []

    def handle(number, frame):
        if caught and time.monotonic() > caught[0] + 1:  # sooner it is torchrun's echo of Ctrl-C
            raise SystemExit("stopped at once: the last checkpoint is whole")
        caught.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT):  # what Slurm and a person send
        signal.signal(number, handle)
    return caught


def check_finite(step: int, value: float):
    if not math.isfinite(value):
        remedy = "lower learning_rate or inner_lr, or set inner_clip=1"
        what = f"step {step}: a loss or gradient is not finite: {remedy}"
        raise SystemExit(f"{what}; --init_from=resume goes on from the last checkpoint")


# --------------------------------------------------------------------------------------------------
# what is printed, and the command line


def one_line(step: int, losses: dict, roles: dict) -> str:
    """step 200 | train 2.310 | heldout 2.612 -> 2.404: means by role, 'loss' -> 'online'."""
    text = f"step {step}"
    for role in dict.fromkeys(roles.values()):
        tables = [[t[d] for d in t if roles[d] == role] for t in losses.values()]
        text += f" | {role} " + " -> ".join(f"{np.mean(table):.3f}" for table in tables if table)
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, like any other mistake
        raise ValueError(message)


def read_arguments(argv: list[str]) -> dict:
    """Fields of Config from ['config/x.py', '--key=value', ...], flags over files.

    ValueError names a wrong type, and the nearest name of a key that does not exist.
    """
    about = "What a flag means is said beside its default, in Config at the top of train.py."
    usage = "%(prog)s [config/x.py] [--key=value ...]"
    how = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = Parser(usage=usage, description=about, **how)
    for field in dataclasses.fields(Config):
        words = get_args(field.type) or None  # of a Literal
        kind = str if words else field.type
        if field.type is bool:
            kind, words = boolean, (True, False)
        parser.add_argument(f"--{field.name}", type=kind, choices=words, metavar=field.default)
    flags = []
    for path in [argument for argument in argv if not argument.startswith("-")]:
        if not Path(path).is_file():
            raise ValueError(f"no config file {path}; flags are written --key=value")
        for name, value in runpy.run_path(path).items():  # in a namespace of its own
            if name[0] != "_" and not isinstance(value, ModuleType):
                flags.append(f"--{name}={value}")
    flags += [argument for argument in argv if argument.startswith("-")]
    # to resume leaves what the run began from on record
    flags = ["--resume=true" if flag == "--init_from=resume" else flag for flag in flags]
    known, unknown = parser.parse_known_args(flags)
    for flag in unknown:
        name = flag.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(Config)], 1)
        hint = f"did you mean --{near[0]}?" if near else "python train.py --help lists them"
        raise ValueError(f"there is no {flag}: {hint}")
    return vars(known)


def boolean(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def main(argv: list[str] | None = None):
    try:
        train(read_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None


if __name__ == "__main__":
    main()
