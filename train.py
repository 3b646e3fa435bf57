"""Pretrain a GPT, plainly (inner_steps=0) or by meta-learning: one loop for both, on any machine.

python train.py config/maml_demo.py                                 # whatever this machine has
python train.py config/maml_demo.py --seed=2 --out_dir=out/maml_s2  # every field is a flag
python train.py config/maml_demo.py --init_from=resume              # go on after a stop
python train.py config/rates_gpt2.py --init_from=gpt2               # from weights that exist
torchrun --nproc_per_node=8 train.py config/maml_124m.py            # eight GPUs, the same steps
"""

import datetime
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import run
from maml import MAML, choose
from model import GPT, GPTConfig
from tasks import Dataset, lock

SHAPE = ("block_size", "n_layer", "n_head", "n_embd", "bias")
INNER = ("inner_steps", "inner_lr", "inner_optimizer", "inner_schedule", "inner_warmup")
INNER += ("first_order", "objective", "learn_inner_lr")  # MAML's arguments, which ckpt.pt keeps
MAY_BE_0 = ("seed", "max_steps", "plain_steps", "warmup_steps", "inner_steps", "inner_warmup")
KEPT = ("inner_steps", "inner_optimizer", "learn_inner_lr", "nesterov", "plain_steps")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # of matrix products
# how far a run has come, and what it cost; the first steps of a process compile
NEW = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "compile_seconds": 0.0}


@dataclass(frozen=True)
class Config:
    # the run
    out_dir: str = "out/run"  # where log.jsonl and ckpt.pt go
    init_from: str = "scratch"  # or a checkpoint's path, nanoGPT's too, or gpt2: draws begin anew
    resume: bool = False  # go on from out_dir/ckpt.pt, if any; --init_from=resume sets it
    dataset: str = "local"  # data_dir/dataset, as prepare_data.py wrote it
    data_dir: str = "data"
    seed: int = 1  # decides initialisation and every draw of training data, not the evaluation's
    device: str = "auto"  # 'auto' takes cuda, else mps, else cpu
    dtype: str = "float32"  # or 'bfloat16': of the products; weights stay float32
    compile: bool = False  # torch.compile: minutes of waiting, then faster steps
    # the model; a checkpoint's shape rules
    block_size: int = 256  # tokens of a row
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # 'mixed', rows from anywhere; of one 'domain'; or a 'passage', consecutive rows of one domain
    tasks: str = "mixed"
    batch_size: int = 16  # rows of a task, cut into inner_steps + 1 chunks
    tasks_per_step: int = 8  # the meta-batch; the processes share it out
    max_steps: int = 1000  # plain_steps included
    # plain training first, on rows from anywhere: how many steps, and their batches
    plain_steps: int = 0
    plain_batch_size: int = 16
    plain_tasks_per_step: int = 8
    # the outer optimizer, AdamW
    learning_rate: float = 1e-3  # its peak; a cosine ends at a tenth. 0 leaves theta as it is
    warmup_steps: int = 50  # of plain steps, and of the others; at most an eighth of them
    weight_decay: float = 0.1
    beta2: float = 0.95  # small batches ask for more: 0.99, 0.995
    grad_clip: float = 1.0  # of the norm of the outer gradient to theta; 0 for none
    nesterov: bool = False  # NAdam: a look-ahead that costs nothing, the control to beat
    # the inner loop; inner_steps=0 is plain training
    inner_steps: int = 0  # K
    inner_lr: float = 0.02  # around 0.02 for 'sgd', 1e-3 for 'adamw' and 'normed'
    inner_optimizer: str = "sgd"  # 'sgd', 'adamw' or 'normed'
    inner_schedule: str = "constant"  # 'constant' or 'cosine', over the inner_steps of a task
    inner_warmup: int = 0  # inner steps of linear warm-up
    first_order: bool = False  # treat inner gradients as constants: the cost of plain training
    objective: str = "every"  # 'every' chunk's loss before it is learned, or the 'final' one's
    learn_inner_lr: str = "no"  # a learned rate for each 'tensor' or 'element', from inner_lr on
    inner_lr_lr: float = 0.01  # the outer learning rate of their logarithms, at its peak
    # watching
    eval_interval: int = 100  # steps between evaluations, each with a checkpoint
    eval_passages: int = 4  # passages of each domain's val split in an evaluation
    eval_rows: int = 32  # consecutive rows of such a passage

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), int(f.type is int and f.name not in MAY_BE_0)
            if f.type in (int, float) and not least <= value < 1e30:
                raise ValueError(f"{f.name}={value} must be finite and at least {least}")
        if self.batch_size % (n := self.inner_steps + 1):
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of K + 1 = {n}")
        no_rates = self.learn_inner_lr == "no" or self.inner_steps == 0
        if self.learning_rate == 0 and (no_rates or self.plain_steps):
            remedy = "set learn_inner_lr, and no plain_steps"
            raise ValueError(f"learning_rate=0 leaves only rates to learn: {remedy}")
        rows = self.batch_size // (self.inner_steps + 1)
        if self.inner_steps and self.eval_rows <= rows:
            raise ValueError(f"eval_rows={self.eval_rows} must exceed the {rows} rows of a chunk")
        if self.plain_steps > self.max_steps:
            raise ValueError(f"max_steps={self.max_steps} must include plain_steps")


# --------------------------------------------------------------------------------------------------
# the run


def train(given: dict):
    """A run with the fields of Config that are `given`. ValueError and OSError say what to do."""
    cfg = Config(**given)
    out = Path(cfg.out_dir)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shared = [cfg.tasks_per_step] + [cfg.plain_tasks_per_step] * (cfg.plain_steps > 0)
    if any(n % world_size for n in shared):
        raise ValueError(f"{world_size} processes cannot share {shared} tasks a step out evenly")
    device = run.pick_device(cfg.device)
    if world_size > 1 and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=bound, timeout=datetime.timedelta(minutes=10))
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32

    # the model: out_dir's, another checkpoint's, or a new one
    ckpt, model, rates = {}, None, {}
    resumed = cfg.resume and (out / "ckpt.pt").exists()
    if resumed or cfg.init_from != "scratch":
        source = out / "ckpt.pt" if resumed else cfg.init_from
        ckpt, model = run.load_checkpoint(source, None if resumed else given.get("block_size"))
        decided = {name: getattr(model.config, name) for name in SHAPE}
        learns = cfg.inner_steps and cfg.learn_inner_lr != "no"
        same = cfg.inner_optimizer == ckpt.get("inner", {}).get("inner_optimizer")
        if rates := ckpt["learner"] if learns and same else {}:  # of its own inner optimizer alone
            decided["inner_lr"] = ckpt["inner"]["inner_lr"]  # the centre of their bound
        if wrong := {k: v for k, v in decided.items() if given.get(k, v) != v}:
            raise ValueError(f"the checkpoint has {wrong}: leave these fields out")
        cfg = replace(cfg, **decided)
    plain_cfg = plainly(cfg)
    data = make_dataset(cfg)
    plain_data = make_dataset(plain_cfg) if cfg.plain_steps else data
    if model is None:
        vocab_size = -(-data.meta["vocab_size"] // 64) * 64  # as matrix units like it
        shape = {name: getattr(cfg, name) for name in SHAPE}
        model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    elif run.tokenizer_of(ckpt) != data.meta["tokenizer"]:
        raise ValueError(f"{data.root} has other tokens than the checkpoint: prepare it alike")

    # learner and optimizer
    inner = {name: getattr(cfg, name) for name in INNER}
    compute = dict(compile=cfg.compile, autocast=choose(DTYPES, cfg.dtype))
    learner = MAML(model, **inner, **compute).to(device)
    plain_learner = MAML(model, inner_steps=0, **compute)
    optimizer = make_optimizer(cfg, learner)
    at = {key: ckpt.get(key, NEW[key]) for key in NEW}  # costs add up over init_from
    run.load_rates(learner, rates)
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

    # the log, and what is evaluated
    header = make_header(cfg, data, model, device, world_size, ckpt)
    val = {d: data.passages(d, cfg.eval_passages, cfg.eval_rows) for d in data.roles}
    unseen = data.unseen(header["dataset"]["trained"]) if cfg.inner_steps else []
    rows = cfg.batch_size // (cfg.inner_steps + 1)  # of a chunk
    if rank == 0:
        held = lock(out)  # no second process may write there
        run.open_log(out, header, at["step"], cfg.resume)
        print(f"{header['params']:,} parameters on {header['device']}", flush=True)
    stop_signals, stop, ddp = [], False, None
    for number in (signal.SIGTERM, signal.SIGINT):  # from Slurm, torchrun or a person
        signal.signal(number, lambda number, _: stop_signals.append(number))
    batches = draw(cfg, data, plain_data, at["step"], rank, world_size, device)
    xy = next(batches, None)
    silent = True if rank else None  # None: no bar where the output is no terminal
    bar = tqdm(total=cfg.max_steps, initial=at["step"], unit="step", disable=silent)

    for step in range(at["step"], cfg.max_steps + 1):
        at["step"], last, plain = step, step == cfg.max_steps, step < cfg.plain_steps
        evaluated = (step % cfg.eval_interval == 0 or last) and not stop
        if evaluated:
            watched = [] if plain else unseen  # no rate has learned anything yet
            losses = evaluate(learner, val, watched, rows, rank, world_size)
            check_finite(step, sum(losses["loss"].values()))  # 'online' is only watched
        if rank == 0 and (evaluated or stop):
            learned = learner.log_inner_lr
            ckpt = {"model": model.state_dict(), "model_args": asdict(model.config)}
            ckpt |= {"learner": {} if learned is None else {"log_inner_lr": learned.detach()}}
            ckpt |= {"inner": inner | {"rows": rows}}  # what reads a text
            ckpt |= {"optimizer": optimizer.state_dict(), **at}
            ckpt |= {key: header[key] for key in ("config", "dataset")}
            run.write_whole(out / "ckpt.pt", partial(torch.save, ckpt))
        if rank == 0 and evaluated:
            run.append_row(out, {"kind": "val", **at, **losses, **rates_moved(learner)})
            bar.write(one_line(step, losses, data.roles))
        if last or stop:
            break

        began, first = time.perf_counter(), ddp is None or step == cfg.plain_steps
        now = plain_cfg if plain else cfg
        if first:  # of the plain steps, or of the others; one DDP at a time hooks the gradients
            ddp = plain_learner if plain else learner
            if world_size > 1:
                ddp = DDP(ddp, gradient_as_bucket_view=True)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(cfg, step)
        mine, loss = now.tasks_per_step // world_size, torch.zeros((), device=device)
        for i in range(mine):
            # DDP averages over the ranks, each of which has as many tasks: the mean over all tasks.
            # Ranks exchange gradients once a step, in the backward of their last task.
            waits = world_size > 1 and i < mine - 1
            with ddp.no_sync() if waits else nullcontext():
                task_loss = ddp(*xy) / mine
                task_loss.backward()
            xy = next(batches, None)  # drawn while a GPU works
            loss += task_loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        rates_grad = None if learner.log_inner_lr is None else learner.log_inner_lr.grad
        size = loss.new_zeros(()) if rates_grad is None else rates_grad.abs().mean()
        # all ranks learn the mean loss, and whether one of them was asked to stop
        asked = loss.new_tensor(float(bool(stop_signals)))
        numbers = torch.stack([loss, grad_norm, size, asked]) / world_size
        if world_size > 1:
            dist.all_reduce(numbers)
        loss, grad_norm, size, stop = numbers.tolist()  # the one wait for a GPU
        check_finite(step, loss + grad_norm + size)
        if rates_grad is not None:
            set_eps(optimizer.param_groups[-1], size)
        optimizer.step()
        learner.bound_rates()
        learner.zero_grad()
        took = time.perf_counter() - began
        if rank == 0 and step % 10 == 0:
            run.append_row(out, {"kind": "train", **at, "loss": loss, "grad_norm": grad_norm})
        tokens, flops = cost_of_step(now, model)
        at["tokens"] += tokens
        at["flops"] += flops
        clock = "compile_seconds" if first and cfg.compile else "seconds"
        at[clock] = round(at[clock] + took, 4)
        speed = f"{tokens / took:,.0f} tokens/s, {flops / took / world_size / 1e12:.3g} TFLOP/s"
        bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        bar.update()
    bar.close()
    if rank == 0:
        held.close()
    if world_size > 1:
        del ddp  # one that outlives its process group may wait for ever when it is freed
        dist.destroy_process_group()
    if stop:  # an exit status that says so to make and to scripts
        raise SystemExit(f"stopped at step {step}: the same with --init_from=resume goes on")


# --------------------------------------------------------------------------------------------------
# its parts


def plainly(cfg: Config) -> Config:
    """How the plain steps are taken."""
    rows = dict(batch_size=cfg.plain_batch_size, tasks_per_step=cfg.plain_tasks_per_step)
    return replace(cfg, tasks="mixed", inner_steps=0, **rows) if cfg.plain_steps else cfg


def make_dataset(cfg: Config) -> Dataset:
    root, sizes = Path(cfg.data_dir, cfg.dataset), (cfg.batch_size, cfg.tasks_per_step)
    return Dataset(root, cfg.block_size, *sizes, cfg.tasks, cfg.seed)


def draw(cfg: Config, data: Dataset, plain_data: Dataset, first: int, rank, world_size, device):
    """The tasks of one process, one after the other."""
    for step in range(first, cfg.max_steps):
        source = plain_data if step < cfg.plain_steps else data
        for task in range(rank, source.tasks_per_step, world_size):
            yield to_device(source.task(step, task), device)


def make_optimizer(cfg: Config, learner: MAML) -> torch.optim.Optimizer:
    """AdamW over theta, which learning_rate=0 leaves as it is, and over the learned rates."""
    groups = learner.model.parameter_groups(cfg.weight_decay)
    groups = [group | {"peak_lr": cfg.learning_rate} for group in groups if cfg.learning_rate]
    if (rates := learner.log_inner_lr) is not None:
        group = {"betas": (0.9, 0.95), "weight_decay": 0.0}  # its eps: set_eps
        groups.append({"params": [rates], "peak_lr": cfg.inner_lr_lr, **group})
    betas = (0.9, cfg.beta2)
    if cfg.nesterov:  # momentum_decay: beta1 from the first step on, as AdamW has it
        nadam = {"decoupled_weight_decay": True, "momentum_decay": 1e6}
        return torch.optim.NAdam(groups, betas=betas, **nadam)
    return torch.optim.AdamW(groups, betas=betas, fused=next(learner.parameters()).is_cuda)


def set_eps(group: dict, size: float):
    """AdamW's eps of the learned rates: a tenth of the mean size of their gradients.

    These may be below 1e-8, and the usual eps would hold all rates still. With next to none, rates
    of little evidence would step as far as any other, along noise: those of tokens that training
    never saw grew until a text of such tokens blew up.
    """
    group["eps"] = max(0.1 * size, 1e-30)


def lr_factor(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.1: once over the plain steps, and once after."""
    n, steps = cfg.plain_steps, cfg.max_steps
    step, steps = (step, n) if step < n else (step - n, steps - n)
    warmup = min(cfg.warmup_steps, steps // 8)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    t = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, t)))


@torch.no_grad()
def evaluate(learner: MAML, val: dict, unseen, rows: int, rank=0, world_size=1) -> dict:
    """Nats per token on passages of val, by domain; the ranks share the domains out.

    'loss' is theta's. 'online' is, on the same rows of `unseen` domains, the loss of test-time
    training: each chunk of so many rows is predicted, then learned. Nothing here is compiled, since
    domains may have val splits of many shapes.
    """
    device = next(learner.parameters()).device
    table = torch.zeros(len(val), 2, device=device)
    for i, domain in list(enumerate(val))[rank::world_size]:
        x, y = to_device(val[domain], device)  # (P, R, T)
        parts = zip(x.flatten(0, 1).split(rows), y.flatten(0, 1).split(rows), strict=True)
        losses = [len(a) * learner.model_loss({}, a, b) for a, b in parts]
        table[i, 0] = sum(losses) / (x.size(0) * x.size(1))
        if domain in unseen:
            table[i, 1] = learner.read(x, y, rows)[0].mean()
    if world_size > 1:
        dist.all_reduce(table)
    loss, online = (dict(zip(val, column, strict=True)) for column in table.T.tolist())
    return {"loss": loss, "online": {d: online[d] for d in unseen}}


def rates_moved(learner: MAML) -> dict:
    """The share of learned rates that have moved from inner_lr, by a hundredth at least."""
    if learner.log_inner_lr is None:
        return {}
    moved = (learner.log_inner_lr - math.log(learner.inner_lr)).abs() > 0.01
    return {"rates_moved": round(moved.float().mean().item(), 4)}


def cost_of_step(cfg: Config, model: GPT) -> tuple[int, float]:
    """(tokens, FLOPs) of an outer step: forwards as in maml.py, and the inner loop's vectors.

    These are a few FLOPs for each element and inner step: the optimizer's, and five for both sums.
    """
    tokens, K = cfg.tasks_per_step * cfg.batch_size * cfg.block_size, cfg.inner_steps
    forwards = ((3 if cfg.first_order else 12) * K + 3) / (K + 1)
    each = {"sgd": 2, "adamw": 15, "normed": 12}.get(cfg.inner_optimizer, 9) + 5
    elements = each * K * cfg.tasks_per_step * sum(p.numel() for p in model.parameters())
    return tokens, forwards * tokens * model.flops_per_token(cfg.block_size) + elements


# --------------------------------------------------------------------------------------------------
# what is kept and printed


def check_same_run(ckpt: dict, cfg: Config, data: Dataset):
    """A run goes on with the data and the kind of optimizer that it had."""
    if not {"optimizer", "dataset"} <= ckpt.keys():  # nanoGPT's, or what adapt.py --save wrote
        raise ValueError(f"{cfg.out_dir} has no run of train.py: give its ckpt.pt as --init_from")
    if ckpt["step"] > cfg.max_steps:
        raise ValueError(f"{cfg.out_dir} is at step {ckpt['step']}: set max_steps to that, or more")

    def kept(config: dict, sha256: str) -> dict:
        of = {"data": sha256[:9], "theta learns": config["learning_rate"] > 0}
        return of | {key: config.get(key, 0) for key in KEPT}

    old, new = kept(ckpt["config"], ckpt["dataset"]["sha256"]), kept(asdict(cfg), data.sha256)
    if changed := ", ".join(f"{k}={old[k]} (now {new[k]})" for k in old if old[k] != new[k]):
        remedy = "resume alike, or give its ckpt.pt as --init_from and another out_dir"
        raise ValueError(f"{cfg.out_dir} was trained with {changed}: {remedy}")


def make_header(cfg: Config, data: Dataset, model: GPT, device, world_size, ckpt: dict) -> dict:
    """The log's first row: what is needed to make the run again and to read its log."""
    # No text that the checkpoint was trained on may count as unseen.
    trained = {h for shards in data.trained.values() for h in shards.values()}
    trained |= {*ckpt.get("dataset", {}).get("trained", [])}
    return {
        "kind": "run",
        **run.where_and_how(device, world_size),
        "config": asdict(cfg),
        "params": sum(p.numel() for p in model.parameters()),
        "dataset": dict(name=cfg.dataset, tokenizer=data.meta["tokenizer"], roles=data.roles)
        | dict(sha256=data.sha256, trained=sorted(trained)),
    }


def one_line(step: int, losses: dict, roles: dict) -> str:
    """step 200 | train 2.310 | heldout 2.612 -> 2.404: means by role, 'loss' -> 'online'."""
    text = f"step {step}"
    for role in dict.fromkeys(roles.values()):
        tables = [[t[d] for d in t if roles[d] == role] for t in losses.values()]
        text += f" | {role} " + " -> ".join(f"{np.mean(table):.3f}" for table in tables if table)
    return text


# --------------------------------------------------------------------------------------------------
# processes, devices, signals


def to_device(xy, device: torch.device):
    if device.type == "cuda":  # what is pinned is copied while the host goes on
        xy = [t.pin_memory() for t in xy]
    return [t.to(device, non_blocking=True) for t in xy]


def check_finite(step: int, value: float):
    if not math.isfinite(value):
        what = f"step {step}: a loss or gradient is not finite: lower learning_rate or inner_lr"
        raise SystemExit(f"{what}; --init_from=resume goes on from the last checkpoint")


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    # to resume leaves what the run began from on record
    argv = ["--resume=true" if flag == "--init_from=resume" else flag for flag in argv]
    try:
        train(run.read_flags(Config, argv, __doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None


if __name__ == "__main__":
    main()
