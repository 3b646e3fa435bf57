"""Turns text into token shards, one folder per domain, which tasks.py maps into memory.

    python prepare_data.py                                 # text of this machine -> data/local
    python prepare_data.py PATH --name mine --heldout a,b  # your own folder or file
    python prepare_data.py common_pile --max_tokens 1e9    # a corpus on the Hugging Face hub
    python prepare_data.py --hf NAME --domain_field a.b    # any other one

In a folder, each subfolder of text files is a domain, and so is each *.txt, *.jsonl, *.jsonl.gz and
*.parquet beside them. Text is UTF-8, or what its byte order mark says; a line ends in a line feed.
data/<name>/<domain>/{train,val}_000000.bin: 256 int32 (magic, version, count), then uint16 ids, the
end-of-text id before each document. data/<name>/meta.json describes them and is written last. A run
that was killed goes on when the same command is given again.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from run import write_whole
from tasks import HEADER_INTS, MAGIC, VERSION, lock, open_shard, read_meta
from text import (
    EOT,
    MAX_PIECE,
    REMEDY,
    clean,
    find_files,
    fingerprint,
    is_text,
    read_documents,
    walk,
)

SHARD_TOKENS = 100_000_000  # 200 MB a file
VAL_TOKENS = 10_000_000  # val is the last tenth of a domain, and about so much at most
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
    except ValueError as error:
        raise SystemExit(f"prepare_data.py: {error}") from None
    except (OSError, KeyboardInterrupt) as error:
        why = str(error) or "Ctrl-C"
        raise SystemExit(f"stopped by {why}: the same command goes on from here") from None


def prepare(args):
    if not (args.max_tokens >= 0 and args.max_mb >= 0):
        raise ValueError("--max_tokens and --max_mb must be 0 or more")
    if (args.hf and args.source != "local") or (args.domain_field and not args.hf):
        raise ValueError("--hf takes the place of a source, and --domain_field needs --hf")
    source = args.hf or args.source
    hub = args.hf or source == "common_pile"
    path = Path(source).resolve()
    name = args.name or clean(re.sub(r"\W", "_", path.name.strip(".").split(".")[0]))
    if name != clean(name):
        raise ValueError(f"--name {name!r} cannot be a folder's: use {clean(name)!r}")
    if args.hf:  # a stream of many domains has no name
        streams = {"" if args.domain_field else clean(path.name): [args.hf]}
    elif hub:
        streams = {d: [f"common-pile/{d}_filtered"] for d in COMMON_PILE.split()}
    elif source == "local":
        streams = find_local(args.max_mb * 1e6)
    else:
        streams, source = find_files(path), None
    folder = args.hf and path.is_dir()
    files = streams if source is None else {s: walk(path, [], set()) for s in streams if folder}
    texts = dict.fromkeys(streams)  # {stream: what changes with its text, if that is known}
    texts |= {s: fingerprint(files[s]) for s in tqdm(files, "changes", disable=None)}
    if "" not in streams:  # a typo is found before the work is done
        give_roles({d: {"role": "train"} for d in streams}, args)
    command = {"source": source, "tokenizer": args.tokenizer or ("gpt2" if hub else "bytes")}
    command |= {"text_field": args.text_field, "domain_field": args.domain_field}
    command |= {"max_tokens": args.max_tokens, "max_mb": args.max_mb}
    encoding, root = get_tokenizer(command["tokenizer"]), Path(args.data_dir, name)
    held = {path.name for path in root.glob("*") if path.suffix != ".tmp"} - {".lock"}
    if held and not held & {"meta.json", "progress.json"}:
        raise ValueError(f"{root} holds something else: choose another --name")
    with lock(root):
        meta = begin(root, command, texts, encoding, args.overwrite)
        try:
            if "seen" in meta:
                make_domains(root, meta, streams, texts, encoding, args)
                del meta["seen"]
            give_roles(meta["domains"], args)
            write(root / "meta.json", json.dumps(meta, indent=1).encode())
            (root / "progress.json").unlink(missing_ok=True)
        finally:  # when the disk is full, too
            remove_unfinished(root, meta)
    for domain, entry in meta["domains"].items():
        for shard in chain(*entry["shards"].values()):
            open_shard(root / shard)  # one may be lost
        tokens = f"{sum(entry['tokens'].values()):,} tokens"
        print(f"{domain:30}{entry['role']:8}{tokens:>24}, skipped: {dict(entry['skipped'])}")
    where = f"--dataset={name}" + f" --data_dir={args.data_dir}" * (args.data_dir != "data")
    print(f"{root} is ready: python train.py config/baseline_demo.py {where}")


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
                raise ValueError(f"no domain {name!r}: choose from {', '.join(sorted(domains))}")
            domains[name]["role"] = role
    if all(entry["role"] != "train" for entry in domains.values()):
        raise ValueError("no domain is left to train on: name fewer with --heldout or --tune")


# --------------------------------------------------------------------------------------------------
# where text is: {stream: the files, hub datasets or lists of texts that it is read from}


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
        files[:] = filter(is_text, files)  # some packages test their readers with odd bytes
    from pydoc_data.topics import topics

    return dict(sorted(found.items())) | {"python_docs": [[topics[t] for t in sorted(topics)]]}


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


def encode(texts: list[str], encoding: tiktoken.Encoding) -> list[list[int]]:
    """The ids of each text, in parts that threads share: at a million blanks, tiktoken breaks."""
    parts = [[t[i : i + MAX_PIECE] for i in range(0, len(t), MAX_PIECE)] for t in texts]
    ids = iter(encoding.encode_ordinary_batch([*chain(*parts)]))
    return [[*chain(*islice(ids, len(of_text)))] for of_text in parts]


def begin(root: Path, command: dict, texts: dict, encoding, overwrite: bool) -> dict:
    """What is in meta.json, as far as this command has come; refuses what another one made."""
    made = [path for path in (root / "meta.json", root / "progress.json") if path.exists()]
    if made and not overwrite:
        meta, remedy = read_meta(made[0]), "--overwrite, or another --name"
        if meta.get("command") != command:
            raise ValueError(f"{root} is of other text or options: {remedy}")
        done = meta.setdefault("texts", {})
        asked = done if "seen" in meta else done | texts  # what is not yet done may be mended
        changed = [stream for stream in asked if done.get(stream) != texts.get(stream)]
        if changed:
            raise ValueError(f"the text of {changed[0]!r} has changed since: {remedy}")
        return meta
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token}
    meta |= {"command": command, "domains": {}, "texts": {}, "seen": []}
    write(root / "progress.json", json.dumps(meta).encode())
    (root / "meta.json").unlink(missing_ok=True)
    return meta


def remove_unfinished(root: Path, meta: dict):
    """What a run leaves that was stopped, and what is overwritten."""
    for path in [*root.glob("*.tmp"), *root.glob("*/*.bin"), *root.glob("*/*.tmp")]:
        if path.suffix == ".tmp" or path.parent.name not in meta["domains"]:
            path.unlink()


def make_domains(root: Path, meta: dict, streams: dict, texts: dict, encoding, args):
    """Adds the domains that `meta` lacks, and saves it after each stream."""
    remove_unfinished(root, meta)
    seen = set(meta["seen"])
    roles = ROLES if meta["command"]["source"] in ("local", "common_pile") else {}
    for name in [name for name in streams if name not in meta["texts"]]:
        documents = tqdm(read_documents(name, streams[name], args), name, disable=None)
        entries = write_ids(root, name, iter(documents), seen, encoding, args.max_tokens)
        for domain, entry in entries.items():
            shards = write_shards(root, domain, encoding) if entry["tokens"] else None
            if not shards:
                few = f"{entry['tokens']} tokens are too few for train and val"
                print(f"{domain} is left out, its {few}, skipped: {dict(entry['skipped'])}")
                continue
            meta["domains"][domain] = entry | shards | {"role": roles.get(domain, "train")}
        if not entries:
            print(f"{name} is left out: it is empty")
        meta["texts"][name] = texts[name]
        meta["seen"] = list(seen)
        write(root / "progress.json", json.dumps(meta).encode())
    if not meta["domains"]:
        (root / "progress.json").unlink()
        raise ValueError(f"no text in {args.hf or args.source}: {REMEDY}")


def write_ids(root: Path, name: str, documents, seen: set[str], encoding, most: float) -> dict:
    """Writes what is new in a stream into a file per domain; returns counts for each of them."""
    entries = defaultdict(lambda: {"tokens": 0, "bytes": 0, "skipped": Counter()})
    while batch := list(islice(documents, 64)):
        encoded = encode([text or "" for _, text in batch], encoding)
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


def write_shards(root: Path, domain: str, encoding: tiktoken.Encoding) -> dict | None:
    """Shares a domain's ids out to train and val; what meta.json says of both, None if too few.

    Val begins at the start of a document, the nearest in the last half. If there is none, the last
    document is cut.
    """
    ids, eot = np.memmap(root / domain / "ids.tmp", np.uint16, "r"), encoding.eot_token
    if len(ids) < 3:
        return None
    end = max(int(0.9 * len(ids)), len(ids) - VAL_TOKENS)
    first = max(end - VAL_TOKENS, len(ids) // 2 + 1)
    starts = first + np.flatnonzero(ids[first:] == eot)
    if len(starts):
        end = starts[np.abs(starts - end).argmin()]
    while encoding.decode_single_token_bytes(int(ids[end]))[0] >> 6 == 0b10:
        end -= 1  # such a byte continues a character
    val = ids[end:] if len(starts) else np.append(ids[:1], ids[end:])
    if min(end, len(val)) < 2:  # not even one token, and what follows it
        return None
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
    write_whole(path, lambda file: file.write(content))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal knows every name
    main()
