"""Turns text into token shards, one folder per domain, which tasks.py maps into memory.

    python prepare_data.py                                 # text of this machine -> data/local
    python prepare_data.py PATH --name mine --heldout a,b  # your own folder or file
    python prepare_data.py common_pile --max_tokens 1e9    # a corpus on the Hugging Face hub
    python prepare_data.py --hf NAME --domain_field a.b    # any other one

In a folder, each subfolder of text files is a domain, and so is each *.txt, *.jsonl, *.jsonl.gz and
*.parquet beside them. data/<name>/<domain>/{train,val}_000000.bin: 256 int32 (magic, version,
count), then uint16 ids, the end-of-text id before each document. data/<name>/meta.json describes
them and is written last. A run that was killed goes on when the same command is given again.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from tasks import HEADER_INTS, MAGIC, VERSION

SHARD_TOKENS = 100_000_000  # 200 MB a file
VAL_TOKENS = 10_000_000  # val is the last tenth of a domain, and about so much at most
MAX_PIECE = 2**18  # characters; text that is longer is cut at line ends, to keep memory flat
EOT = "<|endoftext|>"
COMMON_PILE = """arxiv_abstracts arxiv_papers biodiversity_heritage_library caselaw_access_project
cccc data_provenance_initiative doab foodista github_archive library_of_congress libretexts news
oercommons peS2o pre_1929_books pressbooks project_gutenberg public_domain_review pubmed
python_enhancement_proposals regulations stackexchange stackv2_edu stackv2_html ubuntu_irc
uk_hansard usgpo uspto wikimedia wikiteam youtube"""
# The domain of a package's code. The standard library is the folder that holds argparse.
LOCAL = {"argparse": "python_code", "torch": "torch_code", "sympy": "sympy_code"}
LOCAL |= dict.fromkeys(("numpy", "matplotlib", "networkx", "mpmath", "PIL"), "science_code")
# Held out is what no other domain resembles: adapting to it is learning and not remembering.
# 'tune', where the rates of adapting are chosen, is the next farthest, and not trained on either.
ROLES = dict.fromkeys(("cpp_headers", "python_docs", "ubuntu_irc", "uspto", "foodista"), "heldout")
ROLES |= dict.fromkeys(("type_stubs", "uk_hansard"), "tune")

# --------------------------------------------------------------------------------------------------
# the command


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("source", nargs="?", default="local", help="local, common_pile, a folder or a file")
    add("--name", help="of the dataset; default: of the source")
    add("--data_dir", default="data")
    add("--tokenizer", help="gpt2 or bytes; default: gpt2 for the hub, else bytes")
    add("--heldout", help="domains, separated by commas, that are never trained on")
    add("--tune", help="domains on which the rates of adapting are chosen")
    add("--max_mb", type=float, default=3, help="of text per domain of local")
    add("--max_tokens", type=float, default=0, help="of each domain; 0: all")
    add("--hf", help="a dataset on the Hugging Face hub, or a folder of one")
    add("--domain_field", help="with --hf: the field of a record that names its domain, as a.b")
    add("--text_field", default="text")
    add("--overwrite", action="store_true", help="make the dataset anew")
    try:
        prepare(parser.parse_args(argv))
    except (OSError, KeyboardInterrupt) as error:
        raise SystemExit(f"stopped by {error!r}: the same command goes on from here") from None


def prepare(args):
    source = args.hf or args.source
    hub = args.hf or source == "common_pile"
    path = Path(source).resolve()
    root = Path(args.data_dir, args.name or re.sub(r"\W", "_", path.name.split(".")[0]))
    if args.hf:  # a stream of many domains has no name
        streams = {"" if args.domain_field else clean(path.name): [args.hf]}
    elif hub:
        streams = {d: [f"common-pile/{d}_filtered"] for d in COMMON_PILE.split()}
    elif source == "local":
        streams = find_local(args.max_mb * 1e6)
    else:
        streams = find_files(path)
        source = {d: sum(file.stat().st_size for file in files) for d, files in streams.items()}
    command = {"source": source, "tokenizer": args.tokenizer or ("gpt2" if hub else "bytes")}
    command |= {"text_field": args.text_field, "domain_field": args.domain_field}
    command |= {"max_tokens": args.max_tokens, "max_mb": args.max_mb}
    meta = begin(root, command, args.overwrite)
    if "finished" in meta:
        make_domains(root, meta, streams, args)
        del meta["finished"], meta["seen"]
    give_roles(meta["domains"], args)
    write(root / "meta.json", json.dumps(meta, indent=1).encode())
    (root / "progress.json").unlink(missing_ok=True)
    for domain, entry in meta["domains"].items():
        tokens = f"{sum(entry['tokens'].values()):,} tokens"
        print(f"{domain:30}{entry['role']:8}{tokens:>24}, skipped: {dict(entry['skipped'])}")
    print(f"{root} is ready: python train.py config/baseline_demo.py --dataset={root.name}")


def give_roles(domains: dict[str, dict], args):
    """Gives the roles that --tune and --heldout name. What had such a role before is to train."""
    for role, names in (("tune", args.tune), ("heldout", args.heldout)):
        if names is None:
            continue
        for entry in domains.values():
            if entry["role"] == role:
                entry["role"] = "train"
        for name in filter(None, map(str.strip, names.split(","))):
            if name not in domains:
                raise SystemExit(f"no domain {name!r}: choose from {', '.join(sorted(domains))}")
            domains[name]["role"] = role
    if all(entry["role"] != "train" for entry in domains.values()):
        raise SystemExit("no domain is left to train on: name fewer with --heldout or --tune")


# --------------------------------------------------------------------------------------------------
# text: {stream: the files, hub datasets or lists of texts that it is read from}


def find_local(most: float) -> dict[str, list]:
    """Code of the installed packages, their headers, stubs and tests, and the manual of Python."""
    found = defaultdict(list)
    for package, code in LOCAL.items():
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent if spec else None
        for path in root.rglob("*.*") if root else ():
            inside = set(path.relative_to(root).parts)
            domain = {".py": code, ".pyi": "type_stubs", ".h": "cpp_headers"}.get(path.suffix)
            if domain == code and inside & {"test", "tests"}:
                domain = "tests"
            if domain == "cpp_headers" and "ops" in inside:
                continue  # thousands of headers from one template
            if domain and not inside & {"site-packages", "dist-packages", "pydoc_data"}:
                found[domain].append(path)
    for files in found.values():  # in the order of their hash: not the first of the alphabet
        files.sort(key=lambda path: hashlib.sha256(path.read_bytes()).digest())
        ends = np.cumsum([path.stat().st_size for path in files])
        del files[np.searchsorted(ends, most) + 1 :]
    from pydoc_data.topics import topics

    return dict(sorted(found.items())) | {"python_docs": [[topics[t] for t in sorted(topics)]]}


def find_files(folder: Path) -> dict[str, list[Path]]:
    found = defaultdict(list)
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts or (path.name,)
        match = re.fullmatch(r"(.+)\.(txt|jsonl|jsonl\.gz|parquet)", path.name)
        domain = parts[0] if len(parts) > 1 else match and match[1]
        if domain and path.is_file() and not any(part.startswith(".") for part in parts):
            found[clean(domain)].append(path)
    return found


def read_documents(stream: str, places: list, args):
    """(domain, text) of each document; text is None if its record has none."""
    for place in places:
        for record in read_records(place):
            domain = stream or clean(string_at(args.domain_field, record) or "")
            text = record if isinstance(record, str) else string_at(args.text_field, record)
            if text is None or text.strip():
                yield domain, text


def read_records(place: Path | str | list[str]):
    """Texts as strings, lines of JSON as bytes, records of a dataset as dicts."""
    try:
        if isinstance(place, list):
            yield from place
        elif isinstance(place, str) or place.suffix == ".parquet":
            from datasets import load_dataset

            name, files = (place, None) if isinstance(place, str) else ("parquet", str(place))
            yield from load_dataset(name, data_files=files, split="train", streaming=True)
        elif ".jsonl" in place.suffixes:
            with (gzip.open if place.suffix == ".gz" else open)(place, "rb") as file:
                yield from filter(bytes.strip, file)
        else:  # surrogateescape: a byte that is not UTF-8 spoils its document, not the whole file
            with open(place, encoding="utf-8", errors="surrogateescape") as file:
                yield from pieces(file)
    except ImportError:
        raise SystemExit("this source needs the datasets package: pip install datasets") from None
    except Exception as error:  # files, the hub, the network, or another package
        raise SystemExit(f"cannot read {place}: {error!r}: mend that and run this again") from None


def string_at(field: str, record: bytes | dict) -> str | None:
    """The string at 'a.b' of a record, or of a line of JSON; None if it has none."""
    try:
        value = json.loads(record) if isinstance(record, bytes) else record
        for key in field.split("."):
            value = value[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def pieces(file):
    """The documents of a text file, cut where they are longer than a piece."""
    piece = ""
    while line := file.readline(MAX_PIECE):
        ends = line.strip() == EOT
        if ends or len(piece) + len(line) > MAX_PIECE:
            yield piece
            piece = ""
        piece += "" if ends else line
    yield piece


def clean(domain: str) -> str:
    """The name as one of a folder, and of a list separated by commas."""
    return re.sub(r"[/\\,]", "_", domain).strip(". ") or "unknown"


# --------------------------------------------------------------------------------------------------
# shards


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


def begin(root: Path, command: dict, overwrite: bool) -> dict:
    """What is in meta.json, as far as this command has come; refuses what another one made."""
    encoding = get_tokenizer(command["tokenizer"])
    made = [path for path in (root / "meta.json", root / "progress.json") if path.exists()]
    if made and not overwrite:
        meta = json.loads(made[0].read_bytes())
        if meta.get("command") != command:
            raise SystemExit(f"{root} is of other text or options: --overwrite, or another --name")
        return meta
    if not made and any(path.suffix != ".tmp" for path in root.glob("*")):
        raise SystemExit(f"{root} holds something else: choose another --name")
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token}
    meta |= {"command": command, "domains": {}, "finished": [], "seen": []}
    root.mkdir(parents=True, exist_ok=True)
    write(root / "progress.json", json.dumps(meta).encode())
    (root / "meta.json").unlink(missing_ok=True)
    return meta


def make_domains(root: Path, meta: dict, streams: dict[str, list], args):
    """Adds the domains that `meta` lacks, and saves it after each stream."""
    for path in [*root.glob("*/*.bin"), *root.glob("*/*.tmp")]:
        if path.parent.name not in meta["domains"]:
            path.unlink()  # of a run that was stopped, or of what is overwritten
    encoding, seen = get_tokenizer(meta["tokenizer"]), set(meta["seen"])
    roles = ROLES if meta["command"]["source"] in ("local", "common_pile") else {}
    for name in [name for name in streams if name not in meta["finished"]]:
        documents = tqdm(read_documents(name, streams[name], args), name, disable=None)
        entries = write_ids(root, name, iter(documents), seen, encoding, args.max_tokens)
        for domain, entry in entries.items():
            if not entry["tokens"]:
                print(f"{domain} is left out, it has no text: {dict(entry['skipped'])}")
                continue
            entry |= write_shards(root, domain, encoding)
            meta["domains"][domain] = entry | {"role": roles.get(domain, "train")}
        meta["finished"].append(name)
        meta["seen"] = list(seen)
        write(root / "progress.json", json.dumps(meta).encode())
    if not meta["domains"]:
        (root / "progress.json").unlink()
        folder = "a folder of text (subfolders, *.txt, *.jsonl, *.jsonl.gz, *.parquet)"
        remedy = f"give local, common_pile, {folder}, or the right --text_field"
        raise SystemExit(f"no text in {args.hf or args.source}: {remedy}")


def write_ids(root: Path, name: str, documents, seen: set[str], encoding, most: float) -> dict:
    """Writes what is new in a stream into a file per domain; returns counts for each of them."""
    entries = defaultdict(lambda: {"tokens": 0, "bytes": 0, "skipped": Counter()})
    while batch := list(islice(documents, 64)):  # tiktoken shares it out among threads
        encoded = encoding.encode_ordinary_batch([text or "" for _, text in batch])
        for (domain, text), ids in zip(batch, encoded, strict=True):
            entry = entries[domain]
            if most and entry["tokens"] >= most:
                if name:
                    return entries
                continue  # other domains may follow
            try:
                data = text.encode()
            except (AttributeError, UnicodeEncodeError):  # None, or a half of a character
                entry["skipped"]["malformed"] += 1
                continue
            digest = hashlib.blake2b(data, digest_size=8).hexdigest()
            if digest in seen:  # in any domain, or a held-out text may be trained on
                entry["skipped"]["duplicate"] += 1
                continue
            seen.add(digest)
            (root / domain).mkdir(exist_ok=True)
            with open(root / domain / "ids.tmp", "ab") as file:
                file.write(np.array([encoding.eot_token, *ids], np.uint16))
            entry["tokens"] += len(ids) + 1
            entry["bytes"] += len(data)
    return entries


def write_shards(root: Path, domain: str, encoding: tiktoken.Encoding) -> dict:
    """Shares a domain's ids out to train and val, and returns what meta.json says of both.

    Val begins at the start of a document, the nearest in the last half. If there is none, the last
    document is cut.
    """
    ids, eot = np.memmap(root / domain / "ids.tmp", np.uint16, "r"), encoding.eot_token
    end = max(int(0.9 * len(ids)), len(ids) - VAL_TOKENS)
    first = max(end - VAL_TOKENS, len(ids) // 2 + 1)
    starts = first + np.flatnonzero(ids[first:] == eot)
    if len(starts):
        end = starts[np.abs(starts - end).argmin()]
    while encoding.decode_single_token_bytes(int(ids[end]))[0] >> 6 == 0b10:
        end -= 1  # such a byte continues a character
    val = ids[end:] if len(starts) else np.append(ids[:1], ids[end:])
    entry = {"documents": Counter(), "tokens": Counter(), "shards": defaultdict(dict)}
    for split, part in (("train", ids[:end]), ("val", val)):
        for start in range(0, len(part), SHARD_TOKENS):
            shard = part[start : start + SHARD_TOKENS]
            header = np.zeros(HEADER_INTS, np.int32)
            header[:3] = MAGIC, VERSION, len(shard)
            content = b"".join([header, shard])
            path = f"{domain}/{split}_{start // SHARD_TOKENS:06d}.bin"
            write(root / path, content)
            entry["documents"][split] += int((shard == eot).sum())
            entry["tokens"][split] += len(shard)
            entry["shards"][split][path] = hashlib.sha256(content).hexdigest()
    (root / domain / "ids.tmp").unlink()
    return entry


def write(path: Path, content: bytes):
    """Beside its place, then renamed into it: a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
