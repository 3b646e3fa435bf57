"""Turns text into token shards, one folder per domain, for train.py to memory-map.

    python prepare_data.py                                    # real text found on this machine -> data/local
    python prepare_data.py PATH --name mine --heldout a,b     # your own: subfolders, *.txt, *.jsonl[.gz], *.parquet
    python prepare_data.py common_pile --max_tokens 1e9       # a corpus on the Hugging Face hub: see HUB
    python prepare_data.py --hf NAME --domain_field meta.set  # any other one
    python prepare_data.py --name mine --verify               # check every hash of data/mine

data/<name>/<domain>/{train,val}_000000.bin: 256 int32 (magic, version, token count, zeros), then uint16 ids, each
document preceded by the end-of-text id; llm.c and modded-nanogpt write the same, so a subfolder of their shards is
a domain as it is. data/<name>/meta.json describes them and is written last: where it is, the dataset is complete.
Killed at any moment, the same command goes on after the last full shards, to the same bytes: a shard depends on the
order of the documents alone. Until the dataset is complete, progress.json says which command it is for.
"""

import argparse
import ast
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sysconfig
import threading
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # 200 MB a file
MAX_DOCUMENT = 2**18  # characters; longer documents are cut at line ends, or memory would follow the longest of them
EOT = "<|endoftext|>"
SPLITS, UNITS = ("train", "val"), ("documents", "bytes", "tokens")

COMMON_PILE = """arxiv_abstracts arxiv_papers biodiversity_heritage_library caselaw_access_project cccc
data_provenance_initiative doab foodista github_archive library_of_congress libretexts news oercommons peS2o
pre_1929_books pressbooks project_gutenberg public_domain_review pubmed python_enhancement_proposals regulations
stackexchange stackv2_edu stackv2_html ubuntu_irc uk_hansard usgpo uspto wikimedia wikiteam youtube"""
LOCAL = {"torch": "torch torchgen functorch", "sympy": "sympy", "science": "numpy matplotlib networkx mpmath PIL"}
HUB = {  # datasets, separated by commas, and the field of a record that names its domain
    "common_pile": (",".join(f"common-pile/{source}_filtered" for source in COMMON_PILE.split()), None),
    "slimpajama": ("DKYoon/SlimPajama-6B", "meta.redpajama_set_name"),  # cerebras/SlimPajama-627B is the whole
    "pile_uncopyrighted": ("monology/pile-uncopyrighted", "meta.pile_set_name"),
}

# Held out is what no other domain resembles, so that adapting to it is learning and not remembering; 'tune', where
# learning rates are chosen, is the next farthest and not trained on either. Distances of local are measured, by what
# an order-4 byte model of the nearest other domain pays over the domain's own: cpp_headers 2.3 bits per byte,
# python_docs 1.3, type_stubs 1.1, the others mostly 0.4 to 0.9. Those of the hub are judged by kind.
ROLES = {
    "local": {"heldout": ["cpp_headers", "python_docs"], "tune": ["type_stubs"]},  # C++, and prose
    # chat, patents and recipes are alone of their kind; debates half so, youtube is speech too
    "common_pile": {"heldout": ["ubuntu_irc", "uspto", "foodista"], "tune": ["uk_hansard"]},
    # code and LaTeX against prose; Stack Exchange mixes them
    "slimpajama": {"heldout": ["RedPajamaGithub", "RedPajamaArXiv"], "tune": ["RedPajamaStackExchange"]},
    # made-up arithmetic, twenty other languages, law; chat is as far, and smaller
    "pile_uncopyrighted": {"heldout": ["DM Mathematics", "EuroParl", "FreeLaw"], "tune": ["Ubuntu IRC"]},
}


# ----------------------------------------------------------------------------------------------------------------------
# what the trainer reads


def open_shard(path) -> np.ndarray:
    """The ids of a shard, (tokens,) uint16, memory-mapped; ValueError if it is not one or was cut short."""
    header = np.fromfile(path, np.int32, 3) if os.path.exists(path) else ()
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is not a version {VERSION} token shard: make it again with prepare_data.py")
    if header[2] < 1 or os.path.getsize(path) != 4 * HEADER_INTS + 2 * int(header[2]):
        raise ValueError(f"{path} does not hold the {header[2]} tokens of its header: prepare it with --overwrite")
    return np.memmap(path, np.uint16, "r", 4 * HEADER_INTS)


def read_meta(path: Path) -> dict:
    """A dataset's meta.json; ValueError if it lacks something that is read from one."""
    try:
        meta = json.loads(path.read_bytes())
        right = [type(meta["tokenizer"]) is str, meta["vocab_size"] in range(1, 2**16 + 1), "command" in meta]
        for entry in meta["domains"].values():
            counts = [*entry["skipped"].values(), *(entry[unit][split] for unit in UNITS for split in SPLITS)]
            right += [entry["role"] in ("train", "tune", "heldout"), all(type(count) is int for count in counts)]
            right += [type(entry["shards"][split]) is dict for split in SPLITS]
        if not all(right):
            raise TypeError("a value of the wrong type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not as prepare_data.py wrote it ({why}): prepare it with --overwrite") from None
    return meta


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """'gpt2', 'bytes' (256 bytes and end of text; no download) or another of tiktoken's that fits in uint16."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(name, pat_str="(?s).{1,64}", mergeable_ranks=ranks, special_tokens={EOT: 256})
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network, or no such name
        raise SystemExit(f"cannot get the encoding {name!r}: use bytes, or gpt2 and connect once") from None
    if encoding.n_vocab > 2**16:
        raise SystemExit(f"{name} has {encoding.n_vocab} ids, more than the shards' uint16: use gpt2 or bytes")
    return encoding


# ----------------------------------------------------------------------------------------------------------------------
# sources: iterators of (domain, text), the same at every run; text is None for a malformed record


def read_local(max_mb: float):
    """Code of the installed packages, its docstrings apart, C++ headers, type stubs, tests.
    Files come in the order of their hash until a domain is full: a sample, and not the first of the alphabet."""
    roots = [("python", sysconfig.get_paths()["stdlib"])]
    for kind, packages in LOCAL.items():
        specs = filter(None, map(importlib.util.find_spec, packages.split()))
        roots += [(kind, place) for spec in specs for place in spec.submodule_search_locations]
    files = defaultdict(dict)  # domain -> hash -> text
    for kind, root in roots:
        for path in Path(root).rglob("*.*"):
            inside = set(path.relative_to(root).parts)
            if inside & {"site-packages", "dist-packages", "pydoc_data"} or (path.suffix == ".h" and "ops" in inside):
                continue  # others' code; seven thousand headers of ATen/ops from one template
            code = "tests" if inside & {"test", "tests"} else f"{kind}_code"
            if domain := {".py": code, ".pyi": "type_stubs", ".h": "cpp_headers"}.get(path.suffix):
                data = path.read_bytes()
                files[domain][hashlib.sha256(data).digest()] = data.decode("utf-8", "surrogateescape")
    topics = importlib.import_module("pydoc_data.topics").topics if importlib.util.find_spec("pydoc_data") else {}
    yield from (("python_docs", text) for _, text in sorted(topics.items()))
    taken = Counter(python_docs=sum(map(len, topics.values())))
    for domain, texts in sorted(files.items()):
        docs = domain.replace("_code", "_docs")
        for _, text in sorted(texts.items()):
            code, documentation = split_docstrings(text) if docs != domain else (text, "")
            for name, part in ((domain, code), (docs, documentation)):
                if taken[name] < max_mb * 1e6:
                    taken[name] += len(part or "")
                    yield name, part
            if min(taken[domain], taken[docs]) >= max_mb * 1e6:
                break


def split_docstrings(code: str):
    """Python source without its docstrings, and the docstrings under their names; (None, "") if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return None, ""
    lines, documentation = code.split("\n"), []
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (text := ast.get_docstring(node)):
            documentation.append(f"{getattr(node, 'name', '')}\n\n{text}\n".lstrip())
            string = node.body[0]
            if not lines[string.lineno - 1][: string.col_offset].strip():  # unless it shares a line with its `def`
                lines[string.lineno - 1 : string.end_lineno] = [None] * (string.end_lineno - string.lineno + 1)
    return "\n".join(line for line in lines if line is not None), "\n".join(documentation)


def find_files(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The text files of a folder by domain, and those of the domains that are subfolders of shards made by others."""
    if not folder.exists():
        raise SystemExit(f"no folder {folder}: give one, or one of {', '.join(ROLES)}")
    files, shards = defaultdict(list), defaultdict(list)
    for path in sorted([folder] if folder.is_file() else folder.rglob("*")):
        parts = path.relative_to(folder).parts or (path.name,)
        match = re.fullmatch(r"(.+)\.(txt|jsonl|jsonl\.gz|parquet)", path.name)
        domain = parts[0] if len(parts) > 1 else match and match[1]
        if domain and path.is_file() and not any(part.startswith(".") for part in parts):
            (shards if path.suffix == ".bin" else files)[domain].append(path)
    return {domain: files[domain] for domain in sorted(files) if domain not in shards}, shards


def read_files(files: dict[str, list[Path]], text_field: str):
    """Documents are lines of JSON, rows of parquet, or the text between <|endoftext|> lines."""
    for domain, path in ((domain, path) for domain, paths in files.items() for path in paths):
        if path.suffix == ".parquet":
            yield from ((domain, text) for _, text in read_hub("parquet", None, text_field, str(path)))
            continue
        try:  # surrogateescape: a byte that is not UTF-8 spoils its document, and not the rest of the file
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
                if ".jsonl" in path.suffixes:
                    yield from ((domain, string_at(text_field, line)) for line in file if line.strip())
                else:
                    yield from ((domain, text) for text in split_text(file, EOT))
        except (OSError, EOFError, zlib.error) as error:
            raise SystemExit(f"{path}: {error}: mend or remove the file and run again with --overwrite") from None


def read_hub(names: str, domain_field: str | None, text_field: str, data_files: str | None = None):
    """The records of datasets on the Hugging Face hub, streamed; each is a domain unless a field names the domain."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("this source needs the datasets package: pip install datasets") from None
    for name in names.split(","):
        own = name.split("/")[-1].removesuffix("_filtered")
        try:
            for record in load_dataset(name, data_files=data_files, split="train", streaming=True):
                domain = string_at(domain_field, record) if domain_field else own
                yield domain or "unknown", string_at(text_field, record) if domain else None
        except Exception as error:  # the hub, the network and the readers of datasets each raise their own
            raise SystemExit(f"{name}: {type(error).__name__}: {error}: the same command goes on from here") from None


def string_at(field: str, record: dict | str) -> str | None:
    """The string at 'a.b' of a record, or of a line of JSON; None if it has none."""
    try:
        record = json.loads(record) if isinstance(record, str) else record
        value = functools.reduce(lambda inner, key: inner[key], field.split("."), record)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def split_text(file, separator: str | None = None):
    """The text between lines that hold only the separator; one that exceeds MAX_DOCUMENT is cut at line ends."""
    piece = ""
    for line in iter(functools.partial(file.readline, MAX_DOCUMENT), ""):
        ends = line.strip() == separator
        if ends or len(piece) + len(line) > MAX_DOCUMENT:
            yield piece
            piece = ""
        piece += "" if ends else line
    yield piece


# ----------------------------------------------------------------------------------------------------------------------
# documents: hashed, chosen by their hash, and encoded


def unique_documents(stream, skipped: dict[str, Counter], keep: dict[str, int]):
    """(domain, text, 64-bit hash) of each document once over all domains, or a held-out one may have been trained on;
    `keep` is the hash from which on a domain's documents are left out."""
    seen = set()
    for domain, text in tqdm(stream, unit=" documents", disable=None):
        domain = re.sub(r"[/\\,]", "_", domain).strip(". ") or "unknown"
        if text is None:
            skipped[domain]["malformed"] += 1
            continue
        for piece in split_text(io.StringIO(text)) if len(text) > MAX_DOCUMENT else [text]:
            try:
                number = int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "little")
            except UnicodeEncodeError:  # what surrogateescape let through
                skipped[domain]["undecodable"] += 1
                continue
            if number in seen:
                skipped[domain]["duplicate"] += 1
            elif number < keep.get(domain, 2**64) and piece.strip():
                seen.add(number)
                yield domain, piece, number


def survey(stream, encoding: tiktoken.Encoding, max_tokens: float) -> dict[str, int]:
    """The hash below which each domain has about max_tokens tokens. It takes a pass of its own: nobody can draw an
    even sample from a stream without having seen its end."""
    sizes, samples = defaultdict(lambda: np.zeros(4096)), defaultdict(str)
    for domain, text, number in unique_documents(stream, defaultdict(Counter), {}):
        sizes[domain][number >> 52] += len(text.encode())
        samples[domain] += text[: max(0, 100_000 - len(samples[domain]))]
    keep = {}
    for domain, text in samples.items():
        tokens = np.cumsum(sizes[domain]) * len(encode_document(encoding, text)) / len(text.encode())
        keep[domain] = int(max((tokens <= max_tokens).sum(), (tokens == 0).sum() + 1)) << 52  # one document at least
    return keep


def encode_all(tokenizer: str, documents, workers: int):
    """Yields {key: documents' ids}, a batch at a time in the order of the (key, text). Processes encode a few batches
    ahead: Executor.map would read all the stream."""
    if workers < 2:
        yield from (encode_batch(tokenizer, batch) for batch in batches(documents))
        return
    pending = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        for batch in batches(documents):
            pending.append(pool.submit(encode_batch, tokenizer, batch))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def start_worker():
    """Leaves Ctrl-C to the parent, and ends with it even where it was killed outright."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()


def batches(documents, characters: int = 1_000_000):
    batch, size = [], 0
    for key, text in documents:
        batch.append((key, text))
        size += len(text)
        if size > characters:
            yield batch
            batch, size = [], 0
    yield batch


def encode_batch(tokenizer: str, batch: list[tuple]) -> dict[tuple, list[np.ndarray]]:
    encoded = defaultdict(list)
    for key, text in batch:
        encoded[key].append(encode_document(get_tokenizer(tokenizer), text))
    return encoded


def encode_document(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The end-of-text id and the ids of the text, (tokens,) uint16; '<|endoftext|>' inside it is ordinary text."""
    if encoding.name == "bytes":  # the same ids, a hundred times faster
        ids = np.frombuffer(text.encode(), np.uint8)
    else:  # encode_ordinary without its list of Python integers
        ids = encoding.encode_to_numpy(text, disallowed_special=())
    return np.concatenate(([encoding.eot_token], ids)).astype(np.uint16)


# ----------------------------------------------------------------------------------------------------------------------
# shards: filled beside their place and renamed into it


class Split:
    """The shards of one split of a domain: full ones, which a run that goes on keeps, and one that is being filled."""

    def __init__(self, root: Path, encoding: tiktoken.Encoding, domain: str, split: str):
        self.root, self.encoding, self.stem = root, encoding, f"{domain}/{split}"
        self.shards, self.counts = {}, Counter()  # SHA-256 by name; documents, bytes and tokens of them all
        self.filling, self.tokens = root / f"{self.stem}.tmp", 0
        while (root / self.next()).exists() and len(open_shard(root / self.next())) >= SHARD_TOKENS:
            self.record(self.next())
        self.to_skip = self.counts["documents"]  # so many at the beginning of the stream are in full shards

    def next(self) -> str:
        return f"{self.stem}_{len(self.shards):06d}.bin"

    def record(self, name: str):
        """Enters a shard; its counts are read back from the file, so it does not matter who wrote it."""
        self.shards[name], counts = read_shard(self.root / name, self.encoding)
        self.counts.update(counts)

    def add(self, documents: list[np.ndarray]):
        """A shard is full with the document that brings it to SHARD_TOKENS."""
        while documents:
            ends = self.tokens + np.cumsum([len(ids) for ids in documents])
            fit = documents[: np.searchsorted(ends, SHARD_TOKENS) + 1]
            append(self.filling, fit, "ab" if self.tokens else "wb")
            self.tokens, documents = int(ends[len(fit) - 1]), documents[len(fit) :]
            if self.tokens >= SHARD_TOKENS:
                self.close()

    def close(self):
        if self.tokens:
            with open(self.filling, "r+b") as file:
                file.write(np.array([MAGIC, VERSION, self.tokens], np.int32).tobytes())
            publish(self.filling, self.root / self.next())
            self.record(self.next())
            self.tokens = 0


def append(path: Path, documents: list[np.ndarray], mode: str):
    path.parent.mkdir(exist_ok=True)
    with open(path, mode) as file:
        if mode == "wb":
            file.write(bytes(4 * HEADER_INTS))  # the header comes last: zeros are no shard
        file.writelines(documents)


def write_json(path: Path, value: dict):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    publish(temporary, path)


def publish(temporary: Path, path: Path):
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_shard(path: Path, encoding: tiktoken.Encoding) -> tuple[str, dict[str, int]]:
    """A shard's SHA-256 and its counts, in blocks so that memory stays flat; ValueError if it has unknown ids."""
    counts, tokens = np.zeros(2**16, np.int64), len(open_shard(path))
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(4 * HEADER_INTS))
        while block := file.read(2**21):
            digest.update(block)
            counts += np.bincount(np.frombuffer(block, np.uint16), minlength=2**16)
    if counts[encoding.n_vocab :].any():
        raise ValueError(f"{path} has ids that {encoding.name} has not: name its tokenizer with --tokenizer")
    documents, counts[encoding.eot_token] = int(counts[encoding.eot_token]), 0
    size = sum(int(counts[i]) * len(encoding.decode_single_token_bytes(i)) for i in np.flatnonzero(counts))
    return digest.hexdigest(), {"tokens": tokens, "documents": documents, "bytes": size}


def balance(train: Split, val: Split, share: float):
    """Splits a small domain anew where its hashes left val far from its share: the last documents become val, or the
    last lines of the only one. Larger ones, with a full shard, have the right shares by their numbers."""
    if train.shards or val.shards or share / 4 < val.tokens / (train.tokens + val.tokens) < share * 4:
        return
    encoding, eot = train.encoding, np.uint16(train.encoding.eot_token)
    filled = [split.filling for split in (train, val) if split.tokens]
    ids = np.concatenate([np.fromfile(path, np.uint16, offset=4 * HEADER_INTS) for path in filled])
    end = int(len(ids) * (1 - share))
    for starts in (np.flatnonzero(ids == eot), np.flatnonzero(ids == encoding.encode_ordinary("\n")[0]) + 1):
        starts = starts[(starts > len(ids) // 2) & (starts < len(ids))]
        if len(starts):
            end = starts[np.abs(starts - end).argmin()]
            break
    while end > 1 and ids[end] != eot and encoding.decode_single_token_bytes(int(ids[end]))[0] >> 6 == 0b10:
        end -= 1  # not inside a character: such a byte continues one
    for split, part in ((train, ids[:end]), (val, ids[end:] if ids[end] == eot else np.append(eot, ids[end:]))):
        split.tokens = 0
        split.add([part])


# ----------------------------------------------------------------------------------------------------------------------
# the dataset


def prepare(root: Path, command: dict, stream, shards: dict[str, list[Path]], workers: int) -> dict:
    """Makes the dataset that `command` describes, or the rest of it where a run was stopped; returns its meta."""
    begun = next((path for path in (root / "meta.json", root / "progress.json") if path.exists()), None)
    if begun:
        meta = read_meta(begun)
        if meta["command"] != command:
            raise SystemExit(f"{root} was made otherwise or of other text: pass --overwrite or another --name")
        if begun.name == "meta.json":
            return meta
    elif any(path.suffix != ".tmp" for path in root.glob("*")):
        raise SystemExit(f"{root} holds something else: choose another --name")
    encoding = get_tokenizer(command["tokenizer"])
    if not begun:
        keep = survey(stream(), encoding, command["max_tokens"]) if command["max_tokens"] else {}
        meta = {"name": root.name, "tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "keep": keep}
        meta |= {"eot": encoding.eot_token, "command": command, "domains": {}}
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / "progress.json", meta)
    domains, skipped = {}, defaultdict(Counter)

    def splits(domain: str) -> list[Split]:
        if domain not in domains:
            domains[domain] = [Split(root, encoding, domain, name) for name in SPLITS]
        return domains[domain]

    def left_to_encode():
        for domain, text, number in unique_documents(stream(), skipped, meta["keep"]):
            is_val = number % 2**32 < command["val_share"] * 2**32
            splits(domain)[is_val].to_skip -= 1
            if splits(domain)[is_val].to_skip < 0:
                yield (domain, is_val), text

    for domain, paths in shards.items():
        val = [path for path in paths if "val" in path.name] or paths[-1:]
        for path in paths:
            splits(domain)[path in val].record(str(path.resolve()))
    for batch in encode_all(encoding.name, left_to_encode(), workers):
        for (domain, is_val), documents in batch.items():
            domains[domain][is_val].add(documents)
    for domain, (train, val) in domains.items():
        balance(train, val, command["val_share"])
        train.close()
        val.close()
        if not (train.shards and val.shards):
            raise SystemExit(f"{domain} has no text for both train and val: give it more, or a shard more")
        entry = {"source": command["source"], "skipped": skipped[domain]}
        entry |= {unit: {"train": train.counts[unit], "val": val.counts[unit]} for unit in UNITS}
        meta["domains"][domain] = entry | {"shards": {"train": train.shards, "val": val.shards}}
    if not domains:
        raise SystemExit(f"no text in {command['source']}: give a folder of text files, *.txt, *.jsonl or *.parquet")
    return meta


def verify(root: Path) -> dict:
    if not (root / "meta.json").exists():
        raise SystemExit(f"no complete dataset at {root}: run the same command without --verify first")
    meta = read_meta(root / "meta.json")
    for entry in meta["domains"].values():
        for path, digest in (entry["shards"]["train"] | entry["shards"]["val"]).items():
            if read_shard(root / path, get_tokenizer(meta["tokenizer"]))[0] != digest:
                raise SystemExit(f"{root / path} has changed since it was written: prepare it again with --overwrite")
    return meta


def check_roles(given: dict[str, list[str]], domains):
    for role, names in given.items():
        if unknown := set(names) - set(domains):
            raise SystemExit(f"--{role}: no domain {min(unknown)!r}: choose from {', '.join(sorted(domains))}")


def print_table(meta: dict):
    print(f"{'domain':30}{'role':>9}{'documents':>12}{'tokens':>16}{'bytes/token':>13}  skipped")
    for domain, entry in sorted(meta["domains"].items()):
        documents, tokens, size = (sum(entry[unit].values()) for unit in ("documents", "tokens", "bytes"))
        skipped = ", ".join(f"{count:,} {why}" for why, count in sorted(entry["skipped"].items()))
        print(f"{domain:30}{entry['role']:>9}{documents:12,}{tokens:16,}{size / tokens:13.2f}  {skipped}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="local", help=f"a folder or file of text, or {', '.join(ROLES)}")
    parser.add_argument("--name", help="of the dataset; default: of the source")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--tokenizer", help="gpt2 or bytes; default: gpt2 for the hub, else bytes")
    parser.add_argument("--heldout", help="domains, separated by commas, that are never trained on")
    parser.add_argument("--tune", help="domains on which learning rates are chosen")
    parser.add_argument("--max_mb", type=float, default=3, help="of text per domain of local")
    parser.add_argument("--max_tokens", type=float, default=0, help="about so many per domain, sampled by hash; 0: all")
    parser.add_argument("--workers", type=int, help="processes that tokenize; default: one a core")
    parser.add_argument("--hf", help="datasets on the Hugging Face hub, or a format that datasets reads")
    parser.add_argument("--data_files", help="with --hf: which files, as a glob")
    parser.add_argument("--domain_field", help="with --hf: the field of a record that names its domain, as a.b")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--overwrite", action="store_true", help="make the dataset anew")
    parser.add_argument("--verify", action="store_true", help="check every hash of a dataset, and write nothing")
    args = parser.parse_args(argv)
    hub = (args.hf, None) if args.hf else HUB.get(args.source)
    name = args.name or (re.sub(r"\W", "_", args.hf) if args.hf else Path(args.source).resolve().name.split(".")[0])
    if name != Path(name).name:
        raise SystemExit(f"--name {name!r}: give the name of a folder in --data_dir, not a path")
    root, shards = Path(args.data_dir) / name, {}
    given = {role: getattr(args, role) for role in ("heldout", "tune") if getattr(args, role) is not None}
    given = {role: [domain.strip() for domain in names.split(",") if domain.strip()] for role, names in given.items()}
    try:
        if args.verify:
            return print_table(verify(root))
        if hub:
            inputs = [hub[0], args.domain_field or hub[1], args.text_field, args.data_files]
            stream = functools.partial(read_hub, *inputs)
        elif args.source == "local":
            versions = map(importlib.metadata.version, ("torch", "numpy", "sympy", "matplotlib", "networkx"))
            inputs = [args.max_mb, sysconfig.get_config_var("py_version"), *versions]
            stream = functools.partial(read_local, args.max_mb)
        else:
            files, shards = find_files(Path(args.source))
            check_roles(given, files | shards)
            inputs = [[d, path.name, path.stat().st_size] for d, paths in (files | shards).items() for path in paths]
            stream = functools.partial(read_files, files, args.text_field)
        command = {"source": args.hf or args.source, "tokenizer": args.tokenizer or ("gpt2" if hub else "bytes")}
        command |= {"max_tokens": args.max_tokens, "val_share": 0.01 if hub else 0.1}
        command["inputs"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        if args.overwrite and ((root / "meta.json").exists() or (root / "progress.json").exists()):
            shutil.rmtree(root)
        # by default none for bytes: to send them to a process costs more than to copy them
        workers = args.workers or (1 if command["tokenizer"] == "bytes" else os.cpu_count())
        meta = prepare(root, command, stream, shards, workers)
        for domain, entry in meta["domains"].items():  # what was held out once stays so, until it is said otherwise
            before = ROLES.get(args.source, {}) if "role" not in entry else {entry["role"]: [domain]}
            roles = given | {role: names for role, names in before.items() if role not in given}
            entry["role"] = next((role for role, names in roles.items() if domain in names), "train")
        write_json(root / "meta.json", meta)
        (root / "progress.json").unlink(missing_ok=True)
        print_table(meta)
        check_roles(given, meta["domains"])  # only now does a stream's last domain show
    except BrokenExecutor:
        raise SystemExit("a worker died, of memory perhaps: the same command with fewer --workers goes on") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here") from None
    except OSError as error:
        raise SystemExit(f"{error}: once that is mended, the same command goes on from here") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
