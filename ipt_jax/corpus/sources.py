"""Sources of text: JSON Lines (plain, gz, zst), Parquet, shards of Documents, directories and globs of these.

A source is cut into units (byte ranges of plain JSON Lines, row groups of Parquet, whole compressed files, whole
shards) so that processes can share the work; the units depend on the contents and `unit_bytes` alone. A row is named by
file and line in every error. What can be used is a Document; what cannot, for a reason that data may have (an empty
text), is `Dropped` with that reason; what points at a wrong config (a missing column) is a UserError.
"""

import glob
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard

from ipt_jax.corpus.records import Document, Kind, Segment, decode
from ipt_jax.corpus.settings import Settings, UserError, file_digest
from ipt_jax.corpus.shards import Shards, read_manifest

UNIT_BYTES = 64 << 20
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".ndjson")
_FIELD = re.compile(r"\{(\w+)\}")


class SourceSettings(Settings):
    """One input. `text` and `id` name the columns; `template` ("{question} {response}") joins several into one text."""

    path: str
    text: str = "text"
    id: str = "id"
    source: str | None = None
    kind: Kind = "raw"
    template: str | None = None


class Unit(NamedTuple):
    """Rows [start, stop) of `path`: bytes of plain JSON Lines, row groups of Parquet, shards of a directory."""

    path: str
    form: Literal["jsonl", "packed", "parquet", "shards"]
    start: int
    stop: int


class Dropped(NamedTuple):
    reason: str
    where: str


def find_files(path: str) -> list[Path]:
    """The input files behind a path, a directory or a glob, sorted; a directory of shards stands for itself."""
    found = Path(path)
    if found.is_file() or (found / "manifest.json").is_file():
        return [found]
    names = found.rglob("*") if found.is_dir() else map(Path, glob.glob(path, recursive=True))
    files = sorted(name for name in names if (name.is_file() and _form(name)) or (name / "manifest.json").is_file())
    if not files:
        what = "holds no .jsonl, .jsonl.gz, .jsonl.zst or .parquet file" if found.is_dir() else "no such file"
        raise UserError(f"input {path}: {what}; give a file, a directory, a glob, or a stage's output")
    return files


def _form(path: Path) -> str | None:
    name = path.name
    if name.endswith((".gz", ".zst")):
        return "packed" if name.endswith(JSONL) else None
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if name.endswith(JSONL) else None


def plan_units(settings: SourceSettings, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The source's units in reading order. Raises UserError for absent, empty and unknown files."""
    units: list[Unit] = []
    for path in find_files(settings.path):
        if path.is_dir():
            shards = read_manifest(path).shards
            units += [Unit(str(path), "shards", index, index + 1) for index in range(len(shards))]
            continue
        form = _form(path)
        if form is None:
            raise UserError(f"input {path}: unknown kind of file; expected one of {', '.join(JSONL)}, .parquet")
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"input {path}: the file is empty; give a file with one record a line")
        if form == "jsonl":
            units += [Unit(str(path), "jsonl", at, min(at + unit_bytes, size)) for at in range(0, size, unit_bytes)]
        elif form == "parquet":
            units += [Unit(str(path), "parquet", at, at + 1) for at in range(_open_parquet(path).num_row_groups)]
        else:
            units.append(Unit(str(path), "packed", 0, size))
    return units


def read_unit(unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """The rows of one unit, in order."""
    path = Path(unit.path)
    if unit.form == "shards":
        yield from _read_shard(path, unit.start)
        return
    for line, row in _rows(unit):
        yield _document(row, settings, where=f"{path.name}:{line}", named=f"input {path}: line {line}")


def _rows(unit: Unit) -> Iterator[tuple[int, dict[str, Any]]]:
    path = Path(unit.path)
    if unit.form == "parquet":
        yield from _read_parquet(path, unit.start)
    elif unit.form == "packed":
        yield from read_jsonl(path)
    else:
        yield from _read_range(path, unit.start, unit.stop)


def read_source(settings: SourceSettings) -> Iterator[Document | Dropped]:
    """All rows of a source in order, in constant memory."""
    for unit in plan_units(settings):
        yield from read_unit(unit, settings)


def source_identity(settings: SourceSettings) -> dict[str, Any]:
    """What the source means for a fingerprint: contents and columns, never where the files lie."""
    files = find_files(settings.path)
    contents = [read_manifest(path).fingerprint if path.is_dir() else file_digest(path) for path in files]
    return {**settings.model_dump(exclude={"path"}), "contents": contents}


def _document(row: dict[str, Any], settings: SourceSettings, *, where: str, named: str) -> Document | Dropped:
    names = _FIELD.findall(settings.template) if settings.template else [settings.text]
    for name in names:
        if name not in row:
            raise UserError(
                f"{named}: no field {name!r}, found {', '.join(sorted(row)) or 'none'}; name the text field"
            )
        if row[name] is None:
            return Dropped("null_text", where)
        if not isinstance(row[name], str):
            raise UserError(
                f"{named}: field {name!r} is a {type(row[name]).__name__}, expected text; name another field"
            )
    values = {name: row[name] for name in names}
    text = _FIELD.sub(lambda match: values[match[1]], settings.template) if settings.template else row[settings.text]
    if not text.strip():
        return Dropped("empty_text", where)
    if not _is_unicode(text):
        return Dropped("lone_surrogate", where)
    raw_id = row.get(settings.id)
    source = settings.source or str(row.get("source") or Path(settings.path).stem.split(".")[0])
    return Document(str(where if raw_id is None else raw_id), source, settings.kind, [Segment(text)])


def _is_unicode(text: str) -> bool:
    """JSON may spell lone surrogates, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_shard(path: Path, shard: int) -> Iterator[Document]:
    shards = Shards(path, verify=False)
    for record in shards.stream(shard):
        yield decode(record, Document)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSON Lines file, plain or packed. Raises UserError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"input {path}: no such file; give a JSON Lines file")
    if path.stat().st_size == 0:
        raise UserError(f"input {path}: the file is empty; give a file with one record a line")
    with _open_bytes(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_row(line, path, number)
        except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(f"input {path}: cut short or not compressed as its name says ({error})") from error


def _open_bytes(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))
    return path.open("rb")


def _read_range(path: Path, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows whose line begins within bytes [start, stop). Line numbers are counted from the start of the file."""
    with path.open("rb") as file:
        number = _lines_before(file, start)
        file.seek(max(start - 1, 0))
        if start > 0:
            file.readline()  # the end of a line that belongs to the unit before
        while file.tell() < stop and (line := file.readline()):
            number += 1
            if line.strip():
                yield number, parse_row(line, path, number)


def _lines_before(file: Any, start: int) -> int:
    """Lines that begin before byte `start`: those of the units before."""
    file.seek(0)
    count, left, last = 0, start, b"\n"
    while left > 0 and (block := file.read(min(left, 1 << 22))):
        count += block.count(b"\n")
        left, last = left - len(block), block[-1:]
    return count + (last != b"\n")


def parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: line {number} is not UTF-8 (byte {error.start}); convert the file") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"input {path}: line {number} is not valid JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(f"input {path}: line {number} is a {type(row).__name__}, expected an object with fields")
    return row


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"input {path}: not a whole Parquet file ({error})") from error


def _read_parquet(path: Path, group: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of one row group, numbered from 1 within the file."""
    file = _open_parquet(path)
    number = sum(file.metadata.row_group(index).num_rows for index in range(group))
    for batch in file.iter_batches(row_groups=[group]):
        for row in batch.to_pylist():
            number += 1
            yield number, row
