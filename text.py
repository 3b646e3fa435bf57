"""What text is: which files of a folder are read, by which domain, and what is in them.

    domains = find_files(Path("books"))  # {domain: its files}; what is ignored is printed
    text = read_text("notes.txt")  # decoded, or a ValueError that says what to do

What a file is, its content says, and for all of it: an encoding is never that of a line alone.
"""

import codecs
import gzip
import hashlib
import io
import json
import re
import unicodedata
import zlib
from collections import defaultdict
from itertools import chain, count, islice
from pathlib import Path

MAX_PIECE = 2**18  # characters; text that is longer is cut at line ends, to keep memory flat
EOT = "<|endoftext|>"
REMEDY = "give local, common_pile, or text: *.txt, *.parquet, *.jsonl with a record a line, folders"
SUFFIX = re.compile(r"\.(txt|jsonl|jsonl\.gz|ndjson|parquet)$", re.IGNORECASE)
RESERVED = r"(?i)(meta|progress)\.(json|tmp)|con|prn|aux|nul|com\d|lpt\d"  # by us, and by Windows
MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32")  # before UTF-16's,
MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16")  # which begins it
MARKS |= {codecs.BOM_UTF8: "utf-8-sig"}

# --------------------------------------------------------------------------------------------------
# files, and the names of domains


def find_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each domain. In a subfolder any text will do, but JSON's syntax is none."""
    if not folder.exists():
        raise ValueError(f"there is no {folder}: {REMEDY}")
    found, ignored, taken = defaultdict(list), [], {}
    for path in [folder] if folder.is_file() else walk(folder, ignored, {folder.resolve()}):
        parts, known = path.relative_to(folder).parts, SUFFIX.search(path.name)
        if (known or len(parts) != 1) and (known or is_text(path, 99)):
            domain = parts[0] if len(parts) > 1 else SUFFIX.sub("", path.name)
            found[folder_name(domain, taken)].append(path)
        else:
            ignored.append(path)
    if ignored:
        print(f"ignored {len(ignored)}, as hidden, no text, or seen before:", *ignored[:9])
    if not found:
        raise ValueError(f"no text in {folder}: {REMEDY}")
    return found


def walk(folder: Path, ignored: list[Path], seen: set[Path]):
    """The files below a folder. Links are followed, to no folder twice: some lead in a circle."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name[0] != "." and path.resolve() not in seen:
            seen.add(path.resolve())
            yield from walk(path, ignored, seen)
        elif path.is_file() and path.name[0] != ".":
            yield path
        else:
            ignored.append(path)


def fingerprint(files) -> str:
    """A hash of contents: an edit may keep a file's size, and a copy changes its time."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name!r} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def folder_name(domain: str, taken: dict[str, str]) -> str:
    """A domain's own folder, even where upper and lower case are one; adds it to those taken."""
    name = plain = clean(domain)
    for n in count(2):
        if taken.setdefault(name.casefold(), domain) == domain:
            return name
        name = f"{plain}_{n}"


def clean(name: str) -> str:
    """A name that every system takes for a folder's, and that fits a list separated by commas."""
    name = unicodedata.normalize("NFC", name.encode(errors="replace").decode())
    name = re.sub(r'[\x00-\x1f\x7f/\\,:*?"<>|]', "_", name).encode()[:100].decode(errors="ignore")
    name = name.strip(". ") or "unknown"
    return f"{name}_" if re.fullmatch(RESERVED, name) else name


# --------------------------------------------------------------------------------------------------
# what is read there: (domain, text) of each document


def read_text(path: str | Path) -> str:
    """A whole text file. ValueError names the file, what is wrong with it and what to do."""
    return "".join(lines(path))


def lines(path: str | Path, most: int = -1):
    """The lines of a text file, gzipped or not, cut where they are longer than `most` characters.

    Raises as `read_text`: what a file is, is known from its content, and the same for all of it.
    """
    try:
        with open(path, "rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            start = file.peek(4)
            encoding = next((MARKS[mark] for mark in MARKS if start.startswith(mark)), "utf-8")
            text = io.TextIOWrapper(file, encoding)
            while line := text.readline(most):
                if "\0" in line:
                    raise ValueError("it has NULs, so it is no UTF-8: convert or remove it")
                yield line
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if isinstance(error, UnicodeError):
            error = f"not {encoding}, {error.reason}: convert it, as by iconv -f latin1 -t utf-8"
        raise ValueError(f"cannot read {path}: {error}") from None


def is_text(path: Path, most: int | None = None) -> bool:
    """Whether `lines` can read the file, or `most` lines of it."""
    try:
        return path.suffix.lower() != ".json" and all(islice(lines(path, 2**13), most))
    except ValueError:
        return False


def read_documents(stream: str, places: list, args):
    """(domain, text) of each document; text is None if its record has none."""
    taken, fields = {}, [args.text_field] + ([] if stream else [args.domain_field])
    for place in places:
        records, first = read_records(place, args.text_field), []
        for record in islice(records, 1000):
            first.append(record)
            if None not in [string_at(field, record) for field in fields]:
                break
        else:
            if first:
                few = f"none of {len(first)} records has {' and '.join(fields)}"
                remedy = "name other fields, or put one record on a line"
                raise ValueError(f"{place}: {few}, as {first[0]!r:.99}: {remedy}")
        for record in chain(first, records):
            domain = stream or folder_name(string_at(args.domain_field, record) or "", taken)
            text = string_at(args.text_field, record)
            if text is None or text.strip():
                yield domain, text and re.sub("\r\n?", "\n", text.removeprefix("\ufeff"))


def read_records(place: Path | str | list[str], text_field: str):
    """Records as dicts, or as lines of JSON."""
    known = isinstance(place, Path) and SUFFIX.search(place.name)
    kind = known[1].lower() if known else "hub" if isinstance(place, str) else "txt"
    if kind == "txt":
        texts = place if isinstance(place, list) else pieces(place)
        yield from ({text_field: text} for text in texts)
    elif kind not in ("hub", "parquet"):
        yield from filter(str.strip, lines(place))
    try:
        if kind == "hub":
            from datasets import load_dataset

            yield from load_dataset(place, split="train", streaming=True)
        elif kind == "parquet":
            from pyarrow.parquet import ParquetFile  # to datasets, [1] in a name is a pattern

            with open(place, "rb") as file:
                for batch in ParquetFile(file).iter_batches(1000):
                    yield from batch.to_pylist()
    except ImportError as error:
        raise ValueError(f"this source needs {error.name}: pip install {error.name}") from None
    except Exception as error:  # the hub, the network, or another package
        raise ValueError(f"cannot read {place}: {error!r}: mend that, run this again") from None


def string_at(field: str, record: str | dict) -> str | None:
    """The string or number in a field of this name, or at 'a.b'; None if there is none."""
    try:
        value = json.loads(record.strip("\ufeff")) if isinstance(record, str) else record
        for key in [field] if field in value else field.split("."):
            value = value[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(value) if isinstance(value, str | int | float) else None


def pieces(path: Path):
    """The documents of a text file, cut at line ends where they are longer than a piece."""
    piece = ""
    for line in lines(path, MAX_PIECE):
        ends = line.strip() == EOT
        if ends or len(piece) + len(line) > MAX_PIECE:
            yield piece
            piece = ""
        piece += "" if ends else line
    yield piece
