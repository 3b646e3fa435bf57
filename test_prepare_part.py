"""The data: text to shards. To be merged into test_maml.py."""

import gzip
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prepare_data
import tasks

HERE = Path(__file__).parent
refused = partial(pytest.raises, SystemExit)  # a user's mistake ends the program with one line


def write(folder, files: dict) -> Path:
    """The folder, with {path: text or bytes} in it."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def records(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# --------------------------------------------------------------------------------------------------
# the data: text to shards


@pytest.fixture
def prepare(tmp_path):
    """prepare(source, *options): a dataset of a folder, a file or {path: text}; where it is."""

    def prepare(source, *options, name="set") -> Path:
        source = write(tmp_path / "text", source) if isinstance(source, dict) else source
        place = ["--name", name, "--data_dir", str(tmp_path / "data")]
        prepare_data.main([str(source), *place, *options])
        return tmp_path / "data" / name

    return prepare


def domains_of(dataset) -> dict:
    return tasks.read_meta(dataset / "meta.json")["domains"]


def documents_of(dataset, domain) -> list[list[str]]:
    """The texts of train and of val, whose ids are tiktoken's, an end-of-text id before each."""
    meta, found = tasks.read_meta(dataset / "meta.json"), []
    encoding = prepare_data.get_tokenizer(meta["tokenizer"])
    for split in ("train", "val"):
        paths = sorted(meta["domains"][domain]["shards"][split])
        ids = np.concatenate([tasks.open_shard(dataset / path) for path in paths])
        parts = np.split(ids, np.flatnonzero(ids == meta["eot"]))[1:]
        documents = [part[1:].tolist() for part in parts]
        found.append([encoding.decode(document) for document in documents])
        assert ids[0] == meta["eot"]
        assert documents == [encoding.encode_ordinary(text) for text in found[-1]]
    return found


def shard_of(ids) -> bytes:
    header = np.array([20240520, 1, len(ids)] + [0] * 253, np.int32)
    return header.tobytes() + ids.astype(np.uint16).tobytes()


def two_domains(n=40) -> dict:
    """{path: text} of n files each, of growing length."""
    files = itertools.product(("père noël", "數學"), range(n))
    text = "{} {}: <|endoftext|> is text here. "
    return {f"{d}/{i:03}.md": text.format(d, i) + "é数 \n" * (i * 7) for d, i in files}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_any_text_comes_back_from_its_tokens(prepare, name):
    try:
        prepare_data.get_tokenizer(name)
    except SystemExit:
        pytest.skip("the gpt2 encoding is neither cached nor reachable")
    odd = ["plain", " \n\t\r\x00", "日本語 🙂 ∂x", "<|endoftext|>", "a" * 500]
    texts = [f"{text}{i}" for text in odd for i in range(80)]
    train, val = documents_of(prepare({"odd.jsonl": records(texts)}, "--tokenizer", name), "odd")
    assert train + val == texts


def test_every_document_is_in_one_split_whole_and_val_is_the_last_share(prepare, monkeypatch):
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 5000)
    made = prepare(two_domains(), "--heldout", "數學")
    for domain, entry in domains_of(made).items():
        train, val = documents_of(made, domain)
        texts = [text for path, text in two_domains().items() if path.startswith(domain)]
        assert train + val == texts and len(entry["shards"]["train"]) > 2
        assert entry["role"] == ("heldout" if domain == "數學" else "train")
        assert sum(entry["bytes"].values()) == sum(len(text.encode()) for text in texts)
        assert entry["documents"] == {"train": len(train), "val": len(val)}
        assert 0.05 < entry["tokens"]["val"] / sum(entry["tokens"].values()) < 0.15


def test_roles_stay_until_it_is_said_otherwise_and_change_no_shard(prepare):
    made = prepare({f"{d}.txt": f"{d} " * 99 for d in "abc"}, "--heldout", "a", "--tune", "b")
    roles, shards = [], {path: path.stat().st_mtime_ns for path in made.rglob("*.bin")}
    for options in ([], ["--heldout", "b"], ["--heldout", "", "--tune", "c"]):
        prepare(made.parents[1] / "text", *options)
        roles.append([domains_of(made)[d]["role"] for d in "abc"])
    expected = [["heldout", "tune", "train"], ["train", "heldout", "train"]]
    assert roles == [*expected, ["train", "train", "tune"]] and len(shards) == 6
    assert all(path.stat().st_mtime_ns == written for path, written in shards.items())


@pytest.mark.parametrize("text", ["數學" * 50, "".join(f"línea {i}\n" for i in range(100))])
def test_one_document_still_gives_both_splits_and_no_character_is_cut(prepare, tmp_path, text):
    [train], [val] = documents_of(prepare(write(tmp_path, {"book.txt": text}) / "book.txt"), "book")
    assert train + val == text and 0.05 < len(val) / len(train) < 0.2
    assert "\n" not in text or val.startswith("línea")


def test_a_long_document_is_cut_at_line_ends(prepare, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_DOCUMENT", 100)
    lines = [f"line {i}\n" for i in range(200)]
    for name, text in (("plain.txt", "".join(lines)), ("json.jsonl", records(["".join(lines)]))):
        made = prepare({name: text}, name=name.split(".")[0])
        train, val = documents_of(made, name.split(".")[0])
        documents = train + val
        assert "".join(documents) == "".join(lines) and len(documents) > 9
        assert all(len(text) <= 100 and text.endswith("\n") for text in documents)
        (made.parents[1] / "text" / name).unlink()


def test_a_shard_cut_short_or_changed_is_refused(prepare, tmp_path):
    path = prepare(two_domains()) / "數學/train_000000.bin"
    header, ids = np.fromfile(path, np.int32, 256), np.fromfile(path, np.uint16)[512:]
    assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
    whole, verify = path.read_bytes(), partial(prepare, tmp_path / "text", "--verify")
    verify()
    path.write_bytes(whole[:-2] + b"\x01\x00")
    with refused(match=r"train_000000.*--overwrite"):
        verify()
    path.write_bytes(whole[:-2])
    for read in (partial(tasks.open_shard, path), verify):
        with pytest.raises((ValueError, SystemExit), match=r"train_000000.*--overwrite"):
            read()


def test_bad_records_are_counted_and_duplicates_dropped_over_all_domains(prepare):
    a = records(f"document {i % 30}" for i in range(40))
    a += '{broken\n{"no": "text"}\n{"text": "\\ud800"}\n{"text": " "}\n'
    b = b"\xff\xfe bad\n<|endoftext|>\ndocument 1<|endoftext|>\n<|endoftext|>\nown\n"
    b += b"<|endoftext|>\nother\n<|endoftext|>\nown\n"
    domains = domains_of(prepare({"a.jsonl": a, "b.txt": b, "c.jsonl": records(["own\n", "new"])}))
    assert domains["a"]["skipped"] == {"duplicate": 10, "malformed": 3}
    assert domains["b"]["skipped"] == {"duplicate": 1, "malformed": 1}
    assert domains["c"]["skipped"] == {"duplicate": 1}
    assert [sum(domains[d]["documents"].values()) for d in "ab"] == [30, 3]


def test_a_user_s_mistake_names_the_remedy(prepare, tmp_path, monkeypatch):
    prepare(two_domains(), name="made")
    wide = SimpleNamespace(n_vocab=100277)
    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", lambda name: wide)
    (tmp_path / "empty").mkdir()
    for folder, options, name, remedy in (
        ("text", ["--heldout", "數字"], "set", "數學"),
        ("text", ["--heldout", "數學", "--tune", "père noël"], "made", "name fewer"),
        ("text", ["--tokenizer", "cl100k_base"], "wide", "uint16: use gpt2 or bytes"),
        ("text", ["--max_tokens", "500"], "made", "--overwrite"),
        ("text", ["--verify"], "none", "without --verify"),
        ("empty", [], "empty", "give a folder of text"),
        ("nothing", [], "nothing", "common_pile"),
    ):
        with refused(match=remedy):
            prepare(tmp_path / folder, *options, name=name)
    assert {entry["role"] for entry in domains_of(tmp_path / "data/made").values()} == {"train"}


def test_max_tokens_ends_a_domain_with_a_whole_document(prepare):
    made = prepare(two_domains(99), "--max_tokens", "30000")
    for domain, entry in domains_of(made).items():
        texts = [text for path, text in two_domains(99).items() if path.startswith(domain)]
        train, val = documents_of(made, domain)
        found = train + val
        assert found == texts[: len(found)] and 30_000 <= sum(entry["tokens"].values()) < 36_000


def test_shards_of_llm_c_are_a_domain_as_they_are(prepare, tmp_path):
    train, val = shard_of(np.arange(300) % 257), shard_of(np.arange(50))
    files = {"fineweb/fineweb_train_000001.bin": train, "fineweb/fineweb_val_000000.bin": val}
    made = prepare(files | {"own.txt": "some text of one's own"})
    entry = domains_of(made)["fineweb"]
    assert entry["tokens"] == {"train": 300, "val": 50}
    [path] = entry["shards"]["val"]
    assert "val_000000" in path and tasks.open_shard(made / path)[49] == 49
    with refused(match="--tokenizer"):
        prepare({"fineweb/fineweb_train_000001.bin": shard_of(np.arange(300))}, "--overwrite")
    with refused(match="give it one more"):
        prepare(write(tmp_path / "one", {"a/train.bin": train}), name="one")


def test_killed_again_and_again_it_ends_with_the_same_bytes_for_any_number_of_workers(tmp_path):
    files = {f"{d}/{i}.md": f"{d} {i} " + "é数 \n" * i for d in "abcdef" for i in range(90)}
    files |= {f"{d}/copy.md": "in three domains" for d in "ace"}
    source, parts, whole = write(tmp_path / "text", files), tmp_path / "parts", tmp_path / "whole"
    code = "import os, sys, time, prepare_data as P; P.SHARD_TOKENS, sync = 5_000, os.fsync\n"
    code += "os.fsync = lambda file: time.sleep(0.02) or sync(file)\n"  # slow enough to be killed
    code += "P.main(sys.argv[1:])"
    run = [sys.executable, "-c", code, source, "--name", "set", "--data_dir"]
    subprocess.run([*run, whole, "--workers", "1"], check=True, capture_output=True, cwd=HERE)
    progress, kills, seen = parts / "set/progress.json", 0, []
    while not (parts / "set/meta.json").exists():
        command = [*run, parts, "--workers", "3"]
        process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (parts / "set/meta.json").exists():
            finished = json.loads(progress.read_bytes())["finished"] if progress.exists() else []
            if len(finished) > len(seen):
                time.sleep(0.02 * kills)  # within the next domain, each time elsewhere
                break
            time.sleep(0.001)
        kills += process.poll() is None
        process.kill()
        process.wait()
        seen = json.loads(progress.read_bytes())["finished"] if progress.exists() else seen
        assert kills < 9, "it does not go on but starts anew"
        assert all(len(tasks.open_shard(path)) for path in parts.rglob("*.bin"))
    read = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in (parts, whole)]
    assert read[0] == read[1] and len(read[0]) > 20 and kills > 2
    assert domains_of(whole / "set")["c"]["skipped"] == {"duplicate": 1}


def test_one_dataset_of_many_domains_streams_through_datasets(prepare, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"row {i} " * 9, "meta": {"set": "b" if i % 3 else "a/x"}} for i in range(300)]
    for part, half in enumerate((rows[:150], rows[150:])):
        with gzip.open(tmp_path / f"{part}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in half)
    options = ["--tokenizer", "bytes", "--domain_field", "meta.set", "--heldout", "a_x"]
    made = prepare("local", "--hf", "json", *options, "--data_files", str(tmp_path / "*.json.gz"))
    rare = domains_of(made)["a_x"]
    assert sum(rare["documents"].values()) == 100 and rare["role"] == "heldout"
    train, val = documents_of(made, "b")
    assert train + val == [row["text"] for i, row in enumerate(rows) if i % 3]


def test_local_needs_no_package_beyond_the_requirements(prepare, monkeypatch):
    absent, find = ("sympy", "networkx", "mpmath", "PIL"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    domains = domains_of(prepare("local", "--max_mb", "0.1"))
    roles = {domain: entry["role"] for domain, entry in domains.items()}
    assert roles["cpp_headers"] == roles["python_docs"] == "heldout" != roles["type_stubs"]
    assert {"python_code", "torch_code", "science_code", "tests"} <= roles.keys()
    assert "sympy_code" not in roles
