"""What a run is on the command line and on disk: flags, checkpoints in and out, the log.

given = read_flags(Config, ["config/x.py", "--key=value"])   # checked against a dataclass
ckpt, model = load_checkpoint("out/run")       # ours, nanoGPT's, GPT-2 of transformers
write_whole(path, write)                       # whole, or the one before stays
"""

import dataclasses
import difflib
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

from model import GPT, GPTConfig

# --------------------------------------------------------------------------------------------------
# flags


def read_flags(config: type, argv: list[str], about: str = "") -> dict:
    """Fields of a dataclass from ['config/x.py', '--key=value', ...], flags over files.

    ValueError names a wrong type, and the nearest name of a key that does not exist.
    """
    fields, given = {f.name: f for f in dataclasses.fields(config)}, {}
    if {"-h", "--help"} & {*argv}:
        print(about, "Flags and their defaults, which Config explains:", sep="\n")
        print(*(f"  --{field.name}={field.default}" for field in fields.values()), sep="\n")
        raise SystemExit
    for path in [word for word in argv if not word.startswith("-")]:
        if not Path(path).is_file():
            raise ValueError(f"no config file {path}; flags are written --key=value")
        variables = runpy.run_path(path).items()  # in a namespace of its own
        given |= {k: v for k, v in variables if k[0] != "_" and not isinstance(v, ModuleType)}
    for word in [word for word in argv if word.startswith("-")]:
        name, equals, text = word.removeprefix("--").partition("=")
        if name in fields and not equals:
            raise ValueError(f"{word} has no value: write --{name}=VALUE")
        given[name] = text
    for name in given.keys() - fields.keys():
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists them"
        raise ValueError(f"there is no --{name}: {hint}")
    return {name: parse(name, fields[name].type, value) for name, value in given.items()}


def parse(name: str, kind, value):
    """A value of that kind, from a flag or a config file; ValueError says what it must be."""
    try:
        if kind is bool:
            return {"True": True, "False": False}[str(value).capitalize()]
        return kind(str(value))
    except (ValueError, KeyError):
        what = "True or False" if kind is bool else f"of type {kind.__name__}"
        raise ValueError(f"--{name}={value}: it must be {what}") from None


def pick_device(name: str) -> torch.device:
    """'auto' is cuda, else mps, else cpu. ValueError where this machine has no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.empty(0, device=name).device
    except Exception as error:  # of many kinds: each build of torch has its own
        why = str(error).split("\n")[0]
        raise ValueError(f"no device {name!r} here ({why}): try --device=auto") from None


# --------------------------------------------------------------------------------------------------
# whole files


def write_whole(path: Path, write):
    """write(file) beside its place, then renamed into it: a reader never sees half a file.

    OSError if it cannot be written. What was there before stays, and nothing is left beside it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the rename and lose the content
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save raises this where a disk is full
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# checkpoints

# what a configuration of transformers must have as GPT-2 has it
SAME = ("model_type", "activation_function", "n_inner", "layer_norm_epsilon", "scale_attn_weights")
SAME += ("scale_attn_by_inverse_layer_idx", "tie_word_embeddings")


def load_checkpoint(source: str | Path, block_size: int | None = None) -> tuple[dict, GPT]:
    """A checkpoint and its model: a run's folder or file, nanoGPT's, or a GPT-2 of transformers.

    block_size crops the positions. ValueError and OSError say what is wrong. Of a file only
    tensors and plain values are loaded.
    """
    path = Path(source)
    if (path / "config.json").is_file() or names_hub(str(source)):
        ckpt = from_transformers(str(source))
    else:
        path = path / "ckpt.pt" if path.is_dir() else path
        if not path.is_file():
            remedy = "train first, or give a ckpt.pt's path"
            raise FileNotFoundError(f"no checkpoint at {path}: {remedy}")
        try:
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
            ckpt["model"], ckpt["model_args"] = as_ours(ckpt["model"], ckpt["model_args"])
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(f"{path} is cut short, or no checkpoint of a GPT ({why})") from error
    args, weights = ckpt["model_args"], ckpt["model"]
    if block_size and block_size < args.get("block_size", 0):
        args = args | {"block_size": block_size}
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size].clone()
    model = GPT(GPTConfig(**args))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source} is no checkpoint of a GPT of its shape ({error})") from None
    return ckpt, model


def as_ours(weights: dict, args: dict) -> tuple[dict, dict]:
    """nanoGPT's weights and shape in our words: compiled or not, masks among them, older ones."""
    weights = {n.removeprefix("_orig_mod."): w for n, w in weights.items()}
    weights = {n: w for n, w in weights.items() if not n.endswith((".attn.bias", ".masked_bias"))}
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    bias = {"bias": "transformer.ln_f.bias" in weights}  # older ones do not say so
    return weights, bias | {k: v for k, v in args.items() if k in known}


def names_hub(source: str) -> bool:
    """'name' or 'owner/name' is on the hub, if neither it nor a folder 'owner' is here."""
    path = Path(source)
    here = path.exists() or ("/" in source and path.parent.is_dir()) or path.suffix == ".pt"
    return not here and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source))


def from_transformers(name: str) -> dict:
    """A GPT-2 of the hub, such as 'gpt2', or a folder that save_pretrained wrote."""
    try:
        from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel
    except ImportError:
        what = f"no checkpoint at {name} that is ours; for what transformers reads"
        raise ValueError(f"{what}: pip install transformers") from None
    try:
        c = AutoConfig.from_pretrained(name)
        odd = [f for f in SAME if getattr(c, f, None) != getattr(GPT2Config(), f)]
        if not odd:
            hf, found = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
            weights = hf.float().state_dict()
            odd = sorted(found["missing_keys"])  # these would be random
    except Exception as error:  # of many kinds
        why = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        what = f"no whole GPT-2 of transformers at {name}, here or on the hub, or offline"
        raise ValueError(f"{what}: train first, or give a path ({why})") from error
    if odd:
        what = f"its {odd[0]} is {getattr(c, odd[0], 'missing')}, not that of GPT-2"
        raise ValueError(f"{name}: {what}. Here is GPT-2 alone; the class MAML takes any module")
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # its Conv1D keeps (in, out)
    weights = {n: w.T.contiguous() if n.endswith(turned) else w for n, w in weights.items()}
    args = dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer)
    weights, args = as_ours(weights, args | dict(n_head=c.n_head, n_embd=c.n_embd))
    return {"model": weights, "model_args": args}


def tokenizer_of(ckpt: dict) -> str:
    """The tokenizer that a checkpoint was trained with; another's is told by its size."""
    if "dataset" in ckpt:
        return ckpt["dataset"]["tokenizer"]
    size = ckpt["model_args"]["vocab_size"]
    names = {"gpt2": (50257, 50304), "bytes": (257, 320)}  # as they are, and as they are padded
    found = [name for name, sizes in names.items() if size in sizes]
    if not found:
        raise ValueError(f"the checkpoint has {size} ids, which no tokenizer here has: {[*names]}")
    return found[0]


@torch.no_grad()
def load_rates(learner, saved: dict):
    """Rates that a checkpoint's learner has. That of a tensor fills its elements."""
    new, old = learner.log_inner_lr, saved.get("log_inner_lr")
    if new is None or old is None:
        return
    if len(old) > len(new):
        raise ValueError("the checkpoint has rates of elements: set learn_inner_lr=element")
    new.copy_(old if len(old) == len(new) else learner.by_element(old.to(new.device)))


# --------------------------------------------------------------------------------------------------
# the log


def open_log(out: Path, header: dict, first_step: int, resume: bool):
    """Begins log.jsonl with the run's header; of an earlier one, rows before first_step stay.

    What adapt.py read with the checkpoint that it goes on from stays too.
    """
    path, rows = out / "log.jsonl", []
    if not resume and (path.exists() or (out / "ckpt.pt").exists()):
        raise ValueError(f"{out} holds a run: --init_from=resume goes on; or another out_dir")
    if path.exists():
        rows = map(json.loads, path.read_text().split("\n")[:-1])  # a line cut short has no end
        # what was read at first_step was read by this model, if it has taken any step
        end = {"adapt": first_step + (first_step > 0)}
        rows = [r for r in rows if r.get("step", -1) < end.get(r["kind"], first_step)]
    text = "".join(json.dumps(row) + "\n" for row in [header, *rows])
    write_whole(path, lambda file: file.write(text.encode()))


def append_row(out: Path, row: dict):
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def where_and_how(device: torch.device, world_size: int) -> dict:
    """The part of a log's header that says what it was run with."""
    git = "git describe --always --dirty --abbrev=40 --exclude='*'"  # by a shell: it may be absent
    how = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
    on_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} {device.type}"
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(git, **how).stdout.strip() or "unknown",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{world_size} x {kind}",
    }
