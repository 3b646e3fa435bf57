"""Turns text into token shards, one folder per domain, which tasks.py maps into memory.

    python prepare_data.py                                 # text of this machine -> data/local
    python prepare_data.py PATH --name mine --heldout a,b  # your own folder or file
    python prepare_data.py common_pile --max_tokens 1e9    # a corpus on the Hugging Face hub
    python prepare_data.py --hf NAME --domain_field a.b    # any other one

In a folder, each subfolder of text files is a domain, and so is each *.txt, *.jsonl, *.jsonl.gz and
*.parquet beside them.

data/<name>/<domain>/{train,val}_000000.bin: 256 int32 (magic, version, count), then uint16 ids, the
end-of-text id before each document. data/<name>/meta.json describes them and is written last. A run
that was killed goes on when the same command is given again, with the folder, file or dataset that
was not finished.
"""

import argparse
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sysconfig
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from tasks import HEADER_INTS, MAGIC, VERSION

SHARD_TOKENS = 100_000_000  # 200 MB a file
MAX_DOCUMENT = 2**18  # characters; longer ones are cut at line ends, to keep memory flat
EOT = "<|endoftext|>"
dumps = functools.partial(json.dumps, indent=1, sort_keys=True)
COMMON_PILE = """arxiv_abstracts arxiv_papers biodiversity_heritage_library caselaw_access_project
cccc data_provenance_initiative doab foodista github_archive library_of_congress libretexts news
oercommons peS2o pre_1929_books pressbooks project_gutenberg public_domain_review pubmed
python_enhancement_proposals regulations stackexchange stackv2_edu stackv2_html ubuntu_irc
uk_hansard usgpo uspto wikimedia wikiteam youtube"""
LOCAL = {"torch": "torch_code", "sympy": "sympy_code"}  # the domain of an installed package's code
LOCAL |= dict.fromkeys(("numpy", "matplotlib", "networkx", "mpmath", "PIL"), "science_code")
# Held out is what no other domain resembles: adapting to it is learning and not remembering.
# 'tune', where the rates of adapting are chosen, is the next farthest, and not trained on either.
ROLES = {
    "local": {"heldout": "cpp_headers,python_docs", "tune": "type_stubs"},
    "common_pile": {"heldout": "ubuntu_irc,uspto,foodista", "tune": "uk_hansard"},
}

# --------------------------------------------------------------------------------------------------
# the command


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("source", nargs="?", default="local", help=f"a folder, a file, or {', '.join(ROLES)}")
    add("--name", help="of the dataset; default: of the source")
    add("--data_dir", default="data")
    add("--tokenizer", help="gpt2 or bytes; default: gpt2 for the hub, else bytes")
    add("--heldout", help="domains, separated by commas, that are never trained on")
    add("--tune", help="domains on which the rates of adapting are chosen")
    add("--max_mb", type=float, default=3, help="of text per domain of local")
    add("--max_tokens", type=float, default=0, help="a domain ends after so many; 0: all")
    add("--workers", type=int, default=os.cpu_count(), help="threads that tokenize")
    add("--hf", help="a dataset on the Hugging Face hub, or a folder of one")
    add("--domain_field", help="with --hf: the field of a record that names its domain, as a.b")
    add("--text_field", default="text")
    add("--overwrite", action="store_true", help="make the dataset anew")
    try:
        run(parser.parse_args(argv))
    except (OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"stopped by {error!r}: the same command goes on from here") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


def run(args):
    path = Path(args.source).resolve()
    source = args.hf or path.name
    if source in ROLES and source != args.source:
        raise SystemExit(f"{path} is named like a source that is built in: rename it")
    name = args.name or re.sub(r"\W", "_", Path(source).name.split(".")[0])
    root, hub, inputs = Path(args.data_dir, name), {}, [args.max_mb, args.text_field]
    if args.hf:
        hub = {"" if args.domain_field else clean(Path(args.hf).name): args.hf}
    elif source == "common_pile":
        hub = {d: f"common-pile/{d}_filtered" for d in COMMON_PILE.split()}
    if hub:
        inputs += [hub, args.domain_field]
        options = args.domain_field, args.text_field
        streams = {d: read_hub(d, dataset, *options) for d, dataset in hub.items()}
    elif source == "local":
        streams = read_local(args.max_mb * 1e6)
    else:
        files = find_files(path)
        inputs += [[d, p.name, p.stat().st_size] for d, paths in files.items() for p in paths]
        streams = {d: read_files(d, paths, args.text_field) for d, paths in files.items()}
    command = {"source": source, "tokenizer": args.tokenizer or ("gpt2" if hub else "bytes")}
    command |= {"max_tokens": args.max_tokens, "val_share": 0.01 if hub else 0.1}
    command["inputs"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    if args.overwrite and ((root / "meta.json").exists() or (root / "progress.json").exists()):
        if root.resolve() in (path, *path.parents):
            raise SystemExit(f"{root} holds the text itself: choose another --name")
        shutil.rmtree(root)
    meta = prepare(root, command, streams, args.workers)
    before = {d: entry["role"] for d, entry in meta["domains"].items()}
    for d, role in choose_roles(before, args).items():
        meta["domains"][d]["role"] = role
    write(root / "meta.json", dumps(meta) + "\n")
    for name in ("progress.json", "seen.tmp"):
        (root / name).unlink(missing_ok=True)
    print_table(meta)


def choose_roles(before: dict[str, str], args) -> dict[str, str]:
    """The role of each domain after --tune and --heldout; one that is not given anew stays."""
    roles = dict(before)
    for role, names in (("tune", args.tune), ("heldout", args.heldout)):
        if names is not None:
            roles = {d: "train" if r == role else r for d, r in roles.items()}
            roles |= {d.strip(): role for d in names.split(",") if d.strip()}
    if unknown := roles.keys() - before.keys():
        raise SystemExit(f"no domain {min(unknown)!r}: choose from {', '.join(sorted(before))}")
    if "train" not in roles.values():
        raise SystemExit("no domain is left to train on: name fewer with --heldout or --tune")
    return roles


def print_table(meta: dict):
    print(f"{'domain':30}{'role':>9}{'documents':>12}{'tokens':>16}{'bytes/token':>13}  skipped")
    for d, entry in sorted(meta["domains"].items()):
        documents, tokens = (sum(entry[unit].values()) for unit in ("documents", "tokens"))
        skipped = ", ".join(f"{n:,} {why}" for why, n in sorted(entry["skipped"].items()))
        row = f"{d:30}{entry['role']:>9}{documents:12,}{tokens:16,}{entry['bytes'] / tokens:13.2f}"
        print(f"{row}  {skipped}")


# --------------------------------------------------------------------------------------------------
# documents: {domain: its (domain, text) pairs}, the same at every run; text is None if malformed


def read_local(most: float) -> dict:
    """Code of the installed packages, their headers, stubs and tests, and the manual of Python."""
    roots = {sysconfig.get_paths()["stdlib"]: "python_code"}
    for package, domain in LOCAL.items():
        if spec := importlib.util.find_spec(package):
            roots[spec.submodule_search_locations[0]] = domain
    files = defaultdict(list)
    for root, code in roots.items():
        for path in Path(root).rglob("*.*"):
            inside = set(path.relative_to(root).parts)
            if inside & {"site-packages", "dist-packages", "pydoc_data"}:
                continue
            if path.suffix == ".h" and "ops" in inside:
                continue  # thousands of headers from one template
            domains = {".py": code, ".pyi": "type_stubs", ".h": "cpp_headers"}
            if inside & {"test", "tests"}:
                domains[".py"] = "tests"
            if domain := domains.get(path.suffix):
                files[domain].append(path)
    for paths in files.values():  # in the order of their hash: not the first of the alphabet
        paths.sort(key=lambda path: hashlib.sha256(path.read_bytes()).digest())
        ends = np.cumsum([path.stat().st_size for path in paths])
        del paths[np.searchsorted(ends, most) + 1 :]
    streams = {d: read_files(d, files[d], "") for d in sorted(files)}
    if importlib.util.find_spec("pydoc_data"):
        from pydoc_data.topics import topics

        streams["python_docs"] = (("python_docs", text) for _, text in sorted(topics.items()))
    return streams


def find_files(folder: Path) -> dict[str, list[Path]]:
    if not folder.exists():
        raise SystemExit(f"no folder {folder}: give one, or one of {', '.join(ROLES)}")
    files = defaultdict(list)
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts or (path.name,)
        match = re.fullmatch(r"(.+)\.(txt|jsonl|jsonl\.gz|parquet)", path.name)
        domain = parts[0] if len(parts) > 1 else match and match[1]
        if domain and path.is_file() and not any(part.startswith(".") for part in parts):
            files[clean(domain)].append(path)
    return files


def read_files(domain: str, paths: list[Path], text_field: str):
    """Documents are lines of JSON, rows of parquet, or the text between <|endoftext|> lines."""
    for path in paths:
        if path.suffix == ".parquet":
            yield from read_hub(domain, "parquet", None, text_field, data_files=str(path))
            continue
        opened = gzip.open if path.suffix == ".gz" else open
        try:  # surrogateescape: a byte that is not UTF-8 spoils its document, not the whole file
            with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
                if ".jsonl" in path.suffixes:
                    texts = (string_at(text_field, line) for line in file if line.strip())
                else:
                    texts = pieces(file, EOT)
                yield from ((domain, text) for text in texts)
        except (OSError, EOFError, zlib.error) as error:
            raise SystemExit(f"{path}: {error}: mend it, and use --overwrite") from None


def read_hub(domain: str, name: str, field: str | None, text_field: str, **files):
    """The records of a dataset on the Hugging Face hub, streamed."""
    try:
        from datasets import load_dataset

        for record in load_dataset(name, split="train", streaming=True, **files):
            found = clean(string_at(field, record) or "") if field else domain
            yield found, string_at(text_field, record)
    except ImportError:
        raise SystemExit("this source needs the datasets package: pip install datasets") from None
    except Exception as error:  # the hub, the network and the readers each raise their own
        raise SystemExit(f"{name}: {error!r}: the same command goes on from here") from None


def string_at(field: str, record: dict | str) -> str | None:
    """The string at 'a.b' of a record, or of a line of JSON; None if it has none."""
    try:
        value = json.loads(record) if isinstance(record, str) else record
        for key in field.split("."):
            value = value[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def pieces(file, separator: str | None = None):
    """The text between lines that hold only the separator; a longer one is cut at line ends."""
    piece = ""
    for line in iter(functools.partial(file.readline, MAX_DOCUMENT), ""):
        ends = line.strip() == separator
        if ends or len(piece) + len(line) > MAX_DOCUMENT:
            yield piece
            piece = ""
        piece += "" if ends else line
    yield piece


def clean(domain: str) -> str:
    """The name as one of a folder, and of a list separated by commas."""
    return re.sub(r"[/\\,]", "_", domain).strip(". ") or "unknown"


# --------------------------------------------------------------------------------------------------
# tokens


@functools.cache
def get_tokenizer(name: str) -> tiktoken.Encoding:
    """'gpt2', 'bytes' (256 bytes and end of text), or another of tiktoken's that fits uint16."""
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {EOT: 256}
        options = dict(pat_str="(?s).{1,64}", mergeable_ranks=ranks, special_tokens=special)
        return tiktoken.Encoding(name, **options)
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network, or no such name
        raise SystemExit(f"no encoding {name!r}: use bytes, or gpt2 and connect once") from None
    if encoding.n_vocab > 2**16:
        raise SystemExit(f"{name} has too many ids for the shards' uint16: use gpt2 or bytes")
    return encoding


def encode_all(documents, encoding: tiktoken.Encoding, pool: ThreadPoolExecutor):
    """What encode returns, in the order of the documents; threads go ahead: tiktoken is Rust."""
    pending = deque()
    for domain, text in documents:
        long = text is not None and len(text) > MAX_DOCUMENT
        for piece in pieces(io.StringIO(text)) if long else [text]:
            if piece is None or piece.strip():
                pending.append(pool.submit(encode, domain, piece, encoding))
        while len(pending) > 256:
            yield pending.popleft().result()
    yield from (future.result() for future in pending)


def encode(domain: str, text: str | None, encoding: tiktoken.Encoding) -> tuple:
    """The domain, a hash of the text (None if malformed), its bytes, its ids after end-of-text."""
    try:
        data = text.encode()
    except (AttributeError, UnicodeEncodeError):  # None, or what surrogateescape let through
        return domain, None, 0, ()
    if encoding.name == "bytes":  # the same ids, a hundred times faster
        ids = np.frombuffer(data, np.uint8)
    else:  # '<|endoftext|>' inside a text is ordinary text
        ids = encoding.encode_to_numpy(text, disallowed_special=())
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return domain, number, len(data), np.append(encoding.eot_token, ids).astype(np.uint16)


# --------------------------------------------------------------------------------------------------
# shards


def prepare(root: Path, command: dict, streams: dict, workers: int) -> dict:
    """Makes the dataset that `command` describes, or the rest of it; returns its meta."""
    encoding = get_tokenizer(command["tokenizer"])
    found = [path for path in (root / "meta.json", root / "progress.json") if path.exists()]
    if found:
        meta = json.loads(found[0].read_bytes())
    elif any(path.suffix != ".tmp" for path in root.glob("*")):
        raise SystemExit(f"{root} holds something else: choose another --name")
    else:
        meta = {"name": root.name, "tokenizer": encoding.name, "vocab_size": encoding.n_vocab}
        meta |= {"eot": encoding.eot_token, "command": command, "domains": {}}
        meta |= {"finished": [], "seen": 0}  # streams, and how many hashes are in seen.tmp
        root.mkdir(parents=True, exist_ok=True)
        write(root / "progress.json", dumps(meta))
    if meta.get("command") != command:
        mistake = f"{root} was made otherwise or of other text"
        raise SystemExit(f"{mistake}: pass --overwrite or another --name")
    if "finished" not in meta:
        return meta
    for folder in root.iterdir():
        if folder.is_dir() and folder.name not in meta["domains"]:
            shutil.rmtree(folder)  # it was being written when the run was stopped
    hashes = root / "seen.tmp"
    hashes.touch()
    os.truncate(hashes, 8 * meta["seen"])
    seen = dict.fromkeys(np.fromfile(hashes, np.uint64).tolist())  # a set that keeps its order
    with ThreadPoolExecutor(workers) as pool:
        for name in [name for name in streams if name not in meta["finished"]]:
            entries = read_stream(root, name, streams[name], seen, encoding, command, pool)
            for domain, entry in entries.items():
                roles = ROLES.get(command["source"], {}).items()
                named = [role for role, domains in roles if domain in domains.split(",")]
                meta["domains"][domain] = entry | {"role": [*named, "train"][0]}
            with open(hashes, "ab") as file:
                np.array(list(seen)[meta["seen"] :], np.uint64).tofile(file)
                os.fsync(file.fileno())
            meta["seen"] = len(seen)
            meta["finished"].append(name)
            write(root / "progress.json", dumps(meta))
    if not meta["domains"]:
        shutil.rmtree(root)
        remedy = "give a folder of text, *.txt, *.jsonl or *.parquet, or the right --text_field"
        raise SystemExit(f"no text in {command['source']}: {remedy}")
    return {key: value for key, value in meta.items() if key not in ("finished", "seen")}


def read_stream(root: Path, name: str, stream, seen: dict, encoding, command, pool) -> dict:
    """Makes the shards of a stream's domains and returns their entries in meta.json.

    What is dropped is decided in the order of the stream: threads may run ahead as they like.
    """
    starts, tokens, skipped, full = defaultdict(list), Counter(), defaultdict(Counter), set()
    sizes = Counter()  # bytes
    left = (document for document in tqdm(stream, name, disable=None) if document[0] not in full)
    for domain, number, size, ids in encode_all(left, encoding, pool):
        if domain in full:
            continue
        if number is None or number in seen:
            skipped[domain]["malformed" if number is None else "duplicate"] += 1
            continue
        seen[number] = None  # once over all domains, or a held-out text may be trained on
        (root / domain).mkdir(exist_ok=True)
        with open(root / domain / "ids.tmp", "ab") as file:
            file.write(ids)
        starts[domain].append(tokens[domain])
        tokens[domain] += len(ids)
        sizes[domain] += size
        if tokens[domain] >= (command["max_tokens"] or math.inf):
            full.add(domain)
            if domain == name:
                break  # others may follow only in a stream of many domains
    for domain in skipped.keys() - starts.keys():
        print(f"{domain} is left out, it has no text: {dict(skipped[domain])}")
    entries = {}
    for domain in starts:
        ids = np.memmap(root / domain / "ids.tmp", np.uint16, "r")
        begins = np.array(starts[domain])
        end = first_of_val(ids, begins, encoding, command["val_share"])
        before, whole = int((begins < end).sum()), ids[end] == encoding.eot_token
        val = ids[end:] if whole else np.append(ids[:1], ids[end:])  # the rest of a document
        parts = {"train": ids[:end], "val": val}
        entries[domain] = {
            "documents": {"train": before, "val": len(begins) - before + (not whole)},
            "tokens": {split: len(part) for split, part in parts.items()},
            "shards": {split: write_shards(root, domain, split, parts[split]) for split in parts},
            "bytes": sizes[domain],
            "skipped": skipped[domain],
        }
        os.remove(root / domain / "ids.tmp")
    return entries


def first_of_val(ids, starts, encoding: tiktoken.Encoding, share: float) -> int:
    """The start of a document, or else of a line, in the last half, where val has its share."""
    end, half = int(len(ids) * (1 - share)), len(ids) // 2
    if not (starts > half).any():  # the last document is most of the domain
        starts = np.flatnonzero(ids[:-1] == encoding.encode_ordinary("\n")[0]) + 1
    starts = starts[starts > half]
    if len(starts):
        return int(starts[np.abs(starts - end).argmin()])
    while end > 1 and encoding.decode_single_token_bytes(int(ids[end]))[0] >> 6 == 0b10:
        end -= 1  # such a byte continues a character
    return end


def write_shards(root: Path, domain: str, split: str, ids: np.ndarray) -> dict[str, str]:
    """{path of a shard: its SHA-256}"""
    hashes = {}
    for start in range(0, len(ids), SHARD_TOKENS):
        part = ids[start : start + SHARD_TOKENS]
        header = np.zeros(HEADER_INTS, np.int32)
        header[:3] = MAGIC, VERSION, len(part)
        path = f"{domain}/{split}_{len(hashes):06d}.bin"
        write(root / path, header, part)
        hashes[path] = hashlib.sha256(np.memmap(root / path, mode="r")).hexdigest()
    return hashes


def write(path: Path, *parts):
    """Beside its place, then renamed into it: a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        for part in parts:
            file.write(part.encode() if isinstance(part, str) else part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
