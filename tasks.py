"""What is read: token shards by source domain, and the draws of tasks from them.

    data = Dataset("data/local", block_size=128, batch_size=16, tasks_per_step=4, tasks="passage")
    x, y = data.task(step=0, task=0)  # (B, T) ids, and the ids that follow them

Every draw is a pure function of (seed, step, task). So resuming needs no state but the step,
evaluating cannot move training, and the number of processes does not change the data.
"""

import hashlib
import json
import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
TASKS = ("mixed", "domain", "passage")
SPLITS = ("train", "val")
REMEDY = "prepare it again, with --overwrite"

# --------------------------------------------------------------------------------------------------
# the format, as prepare_data.py writes it


def open_shard(path) -> np.ndarray:
    """The ids of a shard, (tokens,) uint16, memory-mapped; ValueError if none or cut short."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: {REMEDY}")
    header = np.fromfile(path, np.int32, 3)
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is no token shard of version {VERSION}: {REMEDY}")
    tokens = int(header[2])
    if tokens < 1 or path.stat().st_size != 4 * HEADER_INTS + 2 * tokens:
        raise ValueError(f"{path} does not hold its {tokens} tokens: {REMEDY}")
    return np.memmap(path, np.uint16, "r", 4 * HEADER_INTS)


shard = lru_cache(128)(open_shard)  # each holds a file handle, and macOS gives a process 256


def read_meta(path: Path) -> dict:
    """What a meta.json says; ValueError if it is cut short or another program's."""
    try:
        meta = json.loads(path.read_bytes())
        return meta | {"domains": dict(meta["domains"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is broken, or of another program: {REMEDY}") from None


def lock(folder: Path):
    """An open file, to be kept: till it is closed, or the process ends, no other locks the folder.

    ValueError if another one has. What is left of the file is harmless.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder, ".lock"), "ab")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process writes to {folder}: wait until it ends") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    return file


# --------------------------------------------------------------------------------------------------
# tasks


class Dataset:
    """A prepared dataset. ValueError and FileNotFoundError say what is missing and what to do."""

    def __init__(
        self, root: Path, block_size: int, batch_size=1, tasks_per_step=1, tasks="mixed", seed=1
    ):
        if tasks not in TASKS:
            raise ValueError(f"tasks={tasks!r} is none of {', '.join(TASKS)}")
        self.root, self.T, self.batch_size = Path(root), block_size, batch_size
        self.tasks_per_step, self.tasks, self.seed = tasks_per_step, tasks, seed
        if not (self.root / "meta.json").is_file():
            remedy = f"run python prepare_data.py {self.root.name}, or PATH --name {self.root.name}"
            raise FileNotFoundError(f"no data at {self.root}: {remedy}")
        self.meta, self.roles = read_meta(self.root / "meta.json"), {}
        self.paths, self.bounds = {}, {}  # by (domain, split): the shards, and where each begins
        for d, entry in self.meta["domains"].items():
            for split in SPLITS:
                self.paths[d, split] = [self.root / path for path in entry["shards"][split]]
                lengths = [len(shard(path)) for path in self.paths[d, split]]
                self.bounds[d, split] = np.cumsum([0, *lengths])  # and where the last one ends
            if min(self.length(d, split) for split in SPLITS) > block_size:
                self.roles[d] = entry["role"]
            else:
                few = f"train or val has no row of {block_size} tokens"
                warnings.warn(f"domain {d!r} is left out: {few}", stacklevel=2)
        self.train_domains = sorted(d for d, role in self.roles.items() if role == "train")
        # What is trained on, by name and hash of content. The other roles are not part of it.
        self.trained = {d: self.meta["domains"][d]["shards"]["train"] for d in self.train_domains}
        self.sha256 = hashlib.sha256(json.dumps(self.trained, sort_keys=True).encode()).hexdigest()
        self.check()

    def check(self):
        """ValueError if any draw could ask a domain for more rows than it has."""
        if not self.train_domains:
            raise ValueError(f"{self.root} has no row to train on: lower block_size or add text")
        n = self.batch_size  # a mixed task may get all the rows that the step has for a domain
        if self.tasks == "mixed":
            n = min(n, -(-n * self.tasks_per_step // len(self.train_domains)))
        for d in self.train_domains:
            if self.length(d, "train") <= n * self.T:
                few = f"domain {d!r} has {self.length(d, 'train'):,} train tokens, too few"
                remedy = "lower block_size or batch_size, hold it out, or give it more text"
                raise ValueError(f"{few} for {n} rows of {self.T}: {remedy}")

    def task(self, step: int, task: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y (B, T) of one training task; which rows it has is decided by `tasks`:

        'mixed': from anywhere; 'domain': from random places of one domain; 'passage': consecutive
        windows of one domain, a text as it is read, which may run on into the next document. Steps
        draw domains as evenly as they can.
        """
        B, draw = self.batch_size, rng(self.seed, "train", step, task)
        if self.tasks == "mixed":
            domains = self.step_domains(step, self.tasks_per_step * B)[task * B : (task + 1) * B]
            counts = {d: domains.count(d) for d in sorted(set(domains))}
            rows = np.concatenate([self.train_rows(d, n, draw) for d, n in counts.items()])
            return batch(rows[draw.permutation(B)])
        domain = self.step_domains(step, self.tasks_per_step)[task]
        return batch(self.train_rows(domain, B, draw, consecutive=self.tasks == "passage"))

    def step_domains(self, step: int, n: int) -> list[str]:
        """The domains of a step's n draws, in random order: none twice before all came once."""
        draw = rng(self.seed, "domains", step)
        order = draw.permutation(self.train_domains).tolist()
        return [order[i % len(order)] for i in draw.permutation(n)]

    def train_rows(self, domain: str, n: int, draw, consecutive: bool = False) -> np.ndarray:
        """n rows (n, T + 1) of a train split, no token predicted in two of them."""
        inputs = self.length(domain, "train") - 1
        offset = draw.integers(min(self.T, inputs - n * self.T + 1))
        blocks = (inputs - offset) // self.T
        if consecutive:
            picks = draw.integers(blocks - n + 1) + np.arange(n)
        else:
            picks = draw.choice(blocks, n, replace=False)
        return np.stack([self.ids(domain, "train", offset + i * self.T) for i in picks])

    def passages(self, domain: str, n: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y (n, rows, T): n passages of consecutive rows, evenly spaced over the val split.

        The same at every call. A small split gives fewer passages, or one shorter passage.
        """
        blocks = (self.length(domain, "val") - 1) // self.T  # one at least, or it is left out
        rows = min(rows, blocks)
        n = min(n, blocks // rows)
        firsts = np.linspace(0, blocks - rows, n).astype(int)
        starts = (firsts[:, None] + np.arange(rows)) * self.T  # (n, rows)
        found = [[self.ids(domain, "val", start) for start in passage] for passage in starts]
        return batch(np.stack(found))

    def unseen(self, trained) -> list[str]:
        """The domains of which no train shard is among `trained`, hashes of shards.

        Text that was prepared otherwise is not recognised, though it may be the same.
        """
        shards = {d: self.meta["domains"][d]["shards"]["train"] for d in self.roles}
        return [d for d in shards if not set(trained) & set(shards[d].values())]

    def length(self, domain: str, split: str) -> int:
        return int(self.bounds[domain, split][-1])

    def ids(self, domain: str, split: str, start: int) -> np.ndarray:
        """T + 1 ids from `start` on, read across the borders of shards."""
        bounds, end = self.bounds[domain, split], start + self.T + 1
        first, last = np.searchsorted(bounds, (start, end - 1), side="right") - 1
        shards = zip(self.paths[domain, split][first : last + 1], bounds[first:], strict=False)
        return np.concatenate([shard(p)[max(0, start - at) : end - at] for p, at in shards])


def rng(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


def batch(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., T + 1) ids -> inputs and next-token targets (..., T)."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
