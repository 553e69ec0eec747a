"""Sources of text: JSON Lines (plain, gz, zst), Parquet, Arrow, shards of Documents, Hugging Face and TFDS data sets.

A path names a file, a directory, a glob or `hf:NAME`. A source is cut into units: byte ranges of plain JSON Lines, row
groups of Parquet, record batches of Arrow, complete compressed files, complete shards, records of TFDS files. Processes
share the units, which depend on the contents and `unit_bytes` alone. Errors name a row by file and line.
"""

import glob
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from backports import zstd

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import DigestOf, file_digest
from ipt_jax.corpus import datasets
from ipt_jax.corpus.records import Document, decode
from ipt_jax.corpus.row_reader import Dropped, RowReader, SourceSettings
from ipt_jax.corpus.shards import Shards, read_manifest

UNIT_BYTES = 64 << 20
READ_BYTES = 4 << 20
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".ndjson")
WRAPPERS = ("data", "rows", "examples")  # fields that hold the rows of a JSON file
EXPECTED = f"{', '.join(JSONL)}, .parquet or .arrow"
DIGEST_THREADS = 8
OPEN: dict[str, Any] = {".gz": gzip.open, ".zst": zstd.open}
Form = Literal["jsonl", "packed", "parquet", "arrow", "shards", "tfds"]


class Unit(NamedTuple):
    """Rows of `path`: bytes [start, stop) of plain JSON Lines, or row groups, record batches, shards or records.

    Row numbers begin after `rows_before` rows of the file (lines for JSON Lines). `size` in bytes is for progress.
    """

    path: str
    form: Form
    start: int
    stop: int
    rows_before: int
    size: int


# ---- files of a source


def find_files(path: str) -> list[Path]:
    """The files and data sets of a path, a directory or a glob, sorted, each once even if several links lead to it.

    A directory of shards, a saved Hugging Face data set and a TFDS directory count as one file.
    """
    found = Path(path)
    if found.is_file() or (found.is_dir() and _directory_form(found)):
        return [found]
    candidates = _walk(found) if found.is_dir() else sorted(map(Path, glob.glob(path, recursive=True)))
    files = [one for one in candidates if (_directory_form(one) if one.is_dir() else _form(one))]
    if not files:
        fault = f"has no {', '.join(JSONL)}, .parquet or .arrow file" if found.is_dir() else "no such file"
        raise UserError(f"input {path}: {fault}; set a file, a directory, a glob, or the output of a stage")
    once: dict[Path, Path] = {}
    for file in files:
        once.setdefault(file.resolve(), file)
    files = list(once.values())
    prepared = [str(one) for one in files if one.is_dir() and datasets.is_tfds(one)]
    if len(prepared) > 1:
        raise UserError(f"input {path}: has {len(prepared)} TFDS data sets; set one of them, such as {prepared[0]}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Files of any kind and data sets, files before those of subdirectories. Skips hidden entries, the contents of data
    sets and links to a parent directory."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    yield from (entry for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir() and _directory_form(entry):
            yield entry
        elif entry.is_dir() and entry.resolve() not in (above.resolve() for above in entry.parents):
            yield from _walk(entry)


def _directory_form(path: Path) -> str | None:
    if (path / "manifest.json").is_file():
        return "shards"
    return "hf" if datasets.is_hf(path) else "tfds" if datasets.is_tfds(path) else None


def _form(path: Path) -> Form | None:
    if path.name.endswith(JSONL):
        return "packed" if path.name.endswith((".gz", ".zst")) else "jsonl"
    return "parquet" if path.suffix == ".parquet" else "arrow" if path.suffix == ".arrow" else None


class _Input(NamedTuple):
    """A file, a directory of shards, or one split of a TFDS directory."""

    path: Path
    form: Form
    split: str = ""


def _inputs(settings: SourceSettings) -> list[_Input]:
    """The inputs of `path`, `split` and `subset`. Raises UserError if one is missing or of unknown kind."""
    if settings.path.startswith(datasets.HUB):
        files = datasets.hub_files(settings.path.removeprefix(datasets.HUB), settings.subset, settings.split)
        return [_Input(file, "arrow") for file in files]
    inputs: list[_Input] = []
    for path in find_files(settings.path):
        form = _directory_form(path) if path.is_dir() else _form(path)
        if form == "hf":
            inputs += [_Input(file, "arrow") for file in datasets.hf_files(path, settings.split)]
        elif form == "tfds":
            inputs.append(_Input(path, "tfds", datasets.tfds_split(path, settings.split)))
        elif form is None:
            raise UserError(f"input {path}: unknown kind of file; expected {EXPECTED}")
        elif settings.split is not None:
            raise UserError(f"input {path}: has no splits, but split is {settings.split}; remove split")
        else:
            inputs.append(_Input(path, form))  # type: ignore[arg-type]
    if settings.subset is not None:
        raise UserError(f"input {settings.path}: subset {settings.subset} is only for {datasets.HUB}NAME; remove it")
    return inputs


def input_paths(settings: SourceSettings) -> list[str]:
    """The paths of the units of a source, in reading order, without opening the files."""
    return [str(one.path) for one in _inputs(settings)]


def source_identity(settings: SourceSettings, digest_of: DigestOf = file_digest) -> dict[str, Any]:
    """The source as part of a fingerprint: contents and settings, but not paths."""
    inputs = _inputs(settings)
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        contents = list(pool.map(lambda one: _contents(one, digest_of), inputs))
    return {**settings.model_dump(exclude={"path"}), "contents": contents}


def _contents(one: _Input, digest_of: DigestOf) -> str | list[str]:
    if one.form == "shards":
        return read_manifest(one.path).fingerprint
    if one.form == "tfds":
        return [digest_of(file) for file, _ in datasets.tfds_files(one.path, one.split)]
    return digest_of(one.path)


# ---- units


def plan_units(settings: SourceSettings, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The units of a source in reading order. Raises UserError for missing, empty and unknown files. Other files of a
    directory are reported on stderr."""
    folder = Path(settings.path)
    if not settings.path.startswith(datasets.HUB) and folder.is_dir() and not _directory_form(folder):
        others = [file for file in _walk(folder) if file.is_file() and not _form(file)]
        if others:
            names = f"{others[0].relative_to(folder)}{', …' if len(others) > 1 else ''}"
            print(f"input {folder}: files not read: {len(others)} ({names}); expected {EXPECTED}", file=sys.stderr)
    return [unit for one in _inputs(settings) for unit in _units(one, unit_bytes)]


def _units(one: _Input, unit_bytes: int) -> Iterator[Unit]:
    with _reading(one.path):
        if one.form == "shards":
            before = 0
            for index, shard in enumerate(read_manifest(one.path).shards):
                yield Unit(str(one.path), "shards", index, index + 1, before, shard.bytes)
                before += shard.records
        elif one.form == "tfds":
            yield from _tfds_units(one, unit_bytes)
        else:
            yield from _file_units(one, unit_bytes)


def _file_units(one: _Input, unit_bytes: int) -> Iterator[Unit]:
    path = one.path
    if not path.is_file():
        raise UserError(f"input {path}: no such file, but its data set lists it; download or save the data set again")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"input {path}: the file is empty; set a file with one record per line")
    if one.form == "jsonl":
        yield from _jsonl_units(path, size, unit_bytes)
    elif one.form == "packed":
        yield Unit(str(path), "packed", 0, size, 0, size)
    else:
        parts = datasets.parquet_parts(path) if one.form == "parquet" else datasets.arrow_parts(path, unit_bytes)
        yield from (Unit(str(path), one.form, *part) for part in parts)


def _jsonl_units(path: Path, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Ranges of `unit_bytes`, with the number of lines that begin before each. Reads the file once."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Unit(str(path), "jsonl", start, stop, lines + (last != b"\n"), stop - start)
            left = stop - start
            while left > 0 and (block := file.read(min(left, READ_BYTES))):
                lines, last, left = lines + block.count(b"\n"), block[-1:], left - len(block)


def _tfds_units(one: _Input, unit_bytes: int) -> Iterator[Unit]:
    """Ranges of records of about `unit_bytes` of their file, with rows counted over the split."""
    before = 0
    for file, records in datasets.tfds_files(one.path, one.split):
        size = file.stat().st_size if file.is_file() else 0
        step = max(1, -(-records * unit_bytes // max(size, unit_bytes)))
        for start in range(0, records, step):
            rows = min(step, records - start)
            place = before + start
            yield Unit(str(one.path), "tfds", place, place + rows, place, size * rows // records)
        before += records


# ---- rows


def read_unit(unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """The rows of one unit, in order."""
    path = Path(unit.path)
    with _reading(path):
        if unit.form == "shards":
            yield from _read_shard(path, unit, settings)
            return
        reader = RowReader(settings, path.name, unit.path)
        for number, row in _rows(path, unit, settings):
            yield reader.document(row, number)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Converts an OSError to a UserError that names the input."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"input {path}: cannot be read ({error.strerror or error}); check its permissions and the disk"
        ) from error


def _rows(path: Path, unit: Unit, settings: SourceSettings) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in its file, row)."""
    if unit.form == "packed":
        return read_jsonl(path)
    if unit.form == "jsonl":
        return _read_range(path, unit.start, unit.stop, unit.rows_before)
    if unit.form == "tfds":
        rows = datasets.read_tfds(path, datasets.tfds_split(path, settings.split), unit.start, unit.stop)
    elif unit.form == "parquet":
        rows = datasets.read_parquet(path, unit.start, settings.columns, [settings.id, "source"])
    else:
        rows = datasets.read_arrow(path, unit.start, unit.stop, settings.columns, [settings.id, "source"])
    return enumerate(rows, start=unit.rows_before + 1)


def _read_shard(path: Path, unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """Documents of a shard. They have text, id and kind; of the settings, only the bounds of length apply."""
    shards = Shards(path, verify=False)
    longest = settings.max_characters
    for number, record in enumerate(shards.stream(unit.start), start=unit.rows_before + 1):
        where = f"input {shards.paths[unit.start]}: record {number}"
        try:
            document = decode(record, Document)
        except UserError as error:
            raise UserError(
                f"{where} is not a document (made by stage {shards.manifest.stage!r}); set raw text, or the output of "
                "synth collect or synth render"
            ) from error
        if "kind" in settings.model_fields_set and document.kind != settings.kind:
            raise UserError(f"{where} has kind {document.kind}, the recipe sets kind {settings.kind}; remove kind")
        characters = sum(len(segment.text) for segment in document.segments)
        if characters < settings.min_characters:
            yield Dropped("too_short")
        elif longest is not None and characters > longest:
            yield Dropped("too_long")
        else:
            yield document


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSON Lines file, plain or compressed. Raises UserError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"input {path}: no such file; set a JSON Lines file")
    if path.stat().st_size == 0:
        raise UserError(f"input {path}: the file is empty; set a file with one record per line")
    number = 0
    try:
        with OPEN.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_row(line, path, number)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise UserError(
            f"input {path}: cut short or not compressed as its name says, after line {number} ({error}); "
            "restore the file or download it again"
        ) from error


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a JSON Lines, JSON, Parquet or Arrow file, with all columns.

    A JSON file may also hold one array of rows, or one object with such an array in one of `WRAPPERS`.
    """
    form = _form(path)
    with _reading(path):
        if form == "parquet":
            groups = (datasets.read_parquet(path, part.start, None, []) for part in datasets.parquet_parts(path))
            yield from enumerate((row for rows in groups for row in rows), start=1)
        elif form == "arrow":
            yield from enumerate(datasets.read_arrow(path, 0, sys.maxsize, None, []), start=1)
        elif form is None:
            raise UserError(f"input {path}: unknown kind of file; expected {EXPECTED}")
        elif ".json" in path.suffixes[-2:] and (document := _json_document(path)) is not None:
            for number, row in enumerate(document, start=1):
                if not isinstance(row, dict):
                    raise UserError(
                        f"input {path}: item {number} is a {type(row).__name__}, expected an object with fields"
                    )
                yield number, row
        else:
            yield from read_jsonl(path)


def _json_document(path: Path) -> list[Any] | None:
    """The rows of a file that is one JSON value. None for JSON Lines and for what is not JSON."""
    try:
        with OPEN.get(path.suffix, open)(path, "rb") as file:
            lines = (line for line in file if line.strip())
            first, second = next(lines, b""), next(lines, None)
            if second is not None and first.lstrip()[:1] == b"{" and first.rstrip()[-1:] == b"}":
                return None
            file.seek(0)
            value = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError, zlib.error, zstd.ZstdError, gzip.BadGzipFile):
        return None  # reading by lines names the place
    if isinstance(value, dict):
        rows = next((value[name] for name in WRAPPERS if isinstance(value.get(name), list)), None)
        return [value] if rows is None else rows
    return value if isinstance(value, list) else None


def _read_range(path: Path, start: int, stop: int, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows whose line begins within bytes [start, stop). `number` lines begin before."""
    with path.open("rb") as file:
        file.seek(max(start - 1, 0))
        if start > 0:
            file.readline()  # the end of a line of the previous unit
        while file.tell() < stop and (line := file.readline()):
            number += 1
            if line.strip():
                yield number, _parse_row(line, path, number)


def _parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    if number == 1 and line.lstrip().startswith(b"["):
        raise UserError(f"input {path}: holds one JSON array; write one object per line")
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: line {number} is not UTF-8 (byte {error.start}); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"input {path}: line {number} is not valid JSON ({error}); correct or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"input {path}: line {number} is a {type(row).__name__}, expected an object with fields")
    return row
