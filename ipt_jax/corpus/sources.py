"""Sources of text: JSON Lines (plain, gz, zst), Parquet, Arrow, shards of Documents, Hugging Face and TFDS data sets.

A path names a file, a directory, a glob or `hf:NAME`. A source is cut into units (byte ranges of plain JSON Lines, row
groups of Parquet, record batches of Arrow, whole compressed files, whole shards, records of TFDS files) so that
processes can share the work; the units depend on the contents and `unit_bytes` alone. A row is named by file and line
in every error.
"""

import glob
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import DigestOf, file_digest
from ipt_jax.corpus.columnar import arrow_parts, parquet_parts, read_arrow, read_parquet
from ipt_jax.corpus.datasets import HUB, hf_files, hub_files, is_hf, is_tfds, read_tfds, tfds_files, tfds_split
from ipt_jax.corpus.records import Document, decode
from ipt_jax.corpus.row_reader import Dropped, RowReader, SourceSettings
from ipt_jax.corpus.shards import Shards, read_manifest

UNIT_BYTES = 64 << 20
READ_BYTES = 4 << 20
ZSTD_BYTES = 128 << 10  # compressed bytes at a time; text grows some fivefold
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".ndjson")
DIGEST_THREADS = 8
Form = Literal["jsonl", "packed", "parquet", "arrow", "shards", "tfds"]


class Unit(NamedTuple):
    """Rows of `path`: bytes [start, stop) of plain JSON Lines, or row groups, record batches, shards, records.

    `rows_before` of the file (lines for JSON Lines) number its rows; `size` in bytes weighs it for the progress line.
    """

    path: str
    form: Form
    start: int
    stop: int
    rows_before: int
    size: int


def find_files(path: str) -> list[Path]:
    """The files and data sets behind a path, a directory or a glob, sorted; one that several links lead to counts once.

    A directory of shards, a saved Hugging Face data set and a TFDS directory stand for themselves.
    """
    found = Path(path)
    if found.is_file() or (found.is_dir() and _directory_form(found)):
        return [found]
    if found.is_dir():
        files = [file for file in _walk(found) if file.is_dir() or _form(file)]
    else:
        hits = sorted(map(Path, glob.glob(path, recursive=True)))
        files = [hit for hit in hits if (_directory_form(hit) if hit.is_dir() else _form(hit))]
    if not files:
        what = f"holds no {', '.join(JSONL)}, .parquet or .arrow file" if found.is_dir() else "no such file"
        raise UserError(f"input {path}: {what}; give a file, a directory, a glob, or a stage's output")
    once: dict[Path, Path] = {}
    for file in files:
        once.setdefault(file.resolve(), file)
    files = list(once.values())
    prepared = [str(one) for one in files if one.is_dir() and is_tfds(one)]
    if len(prepared) > 1:
        raise UserError(f"input {path}: holds {len(prepared)} TFDS data sets; give one of them, such as {prepared[0]}")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Files of any kind and data sets, files before those of the folders below; hidden ones are left out, data sets are
    not looked into, and a link to a folder above is not followed."""
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
    return "hf" if is_hf(path) else "tfds" if is_tfds(path) else None


def _form(path: Path) -> Form | None:
    name = path.name
    if name.endswith((".gz", ".zst")):
        return "packed" if name.endswith(JSONL) else None
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".arrow"):
        return "arrow"
    return "jsonl" if name.endswith(JSONL) else None


class _Input(NamedTuple):
    """A file, a directory of shards, or one split of a TFDS directory."""

    path: Path
    form: Form
    split: str = ""


def _inputs(settings: SourceSettings) -> list[_Input]:
    """What the settings' path, split and subset come to. Raises UserError for what is absent or of no known kind."""
    if settings.path.startswith(HUB):
        files = hub_files(settings.path.removeprefix(HUB), settings.subset, settings.split)
        return [_Input(file, "arrow") for file in files]
    inputs: list[_Input] = []
    for path in find_files(settings.path):
        form = _directory_form(path) if path.is_dir() else _form(path)
        if form == "hf":
            inputs += [_Input(file, "arrow") for file in hf_files(path, settings.split)]
        elif form == "tfds":
            inputs.append(_Input(path, "tfds", tfds_split(path, settings.split)))
        elif form is None:
            raise UserError(f"input {path}: unknown kind of file; expected {', '.join(JSONL)}, .parquet or .arrow")
        elif settings.split is not None:
            raise UserError(f"input {path}: given split: {settings.split}, but has no splits; take split out")
        else:
            inputs.append(_Input(path, form))  # type: ignore[arg-type]
    if settings.subset is not None:
        raise UserError(f"input {settings.path}: subset {settings.subset} is for {HUB}NAME alone; take it out")
    return inputs


def input_paths(settings: SourceSettings) -> list[str]:
    """The paths of a source's units, in reading order, without a look into the files."""
    return [str(one.path) for one in _inputs(settings)]


def plan_units(settings: SourceSettings, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The source's units in reading order. Raises UserError for absent, empty and unknown files; what a directory holds
    of other kinds is told on stderr."""
    if not settings.path.startswith(HUB):
        _tell_others(Path(settings.path))
    return [unit for one in _inputs(settings) for unit in _units(one, unit_bytes)]


def _tell_others(folder: Path) -> None:
    if not folder.is_dir() or _directory_form(folder):
        return
    others = [file for file in _walk(folder) if file.is_file() and not _form(file)]
    if others:
        names = f"{others[0].relative_to(folder)}{', …' if len(others) > 1 else ''}"
        expected = f"{', '.join(JSONL)}, .parquet or .arrow"
        print(f"input {folder}: files not read: {len(others)} ({names}); expected {expected}", file=sys.stderr)


def _units(one: _Input, unit_bytes: int) -> Iterator[Unit]:
    with _reading(one.path):
        yield from _cut(one, unit_bytes)


def _cut(one: _Input, unit_bytes: int) -> Iterator[Unit]:
    path, name = one.path, str(one.path)
    if one.form == "shards":
        before = 0
        for index, shard in enumerate(read_manifest(path).shards):
            yield Unit(name, "shards", index, index + 1, before, shard.bytes)
            before += shard.records
        return
    if one.form == "tfds":
        yield from _tfds_units(one, unit_bytes)
        return
    if not path.is_file():
        raise UserError(f"input {path}: no such file, though its data set lists it; fetch or save the data set again")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"input {path}: the file is empty; give a file with one record a line")
    if one.form == "jsonl":
        yield from _jsonl_units(path, size, unit_bytes)
    elif one.form == "packed":
        yield Unit(name, "packed", 0, size, 0, size)
    else:
        parts = parquet_parts(path) if one.form == "parquet" else arrow_parts(path, unit_bytes)
        yield from (Unit(name, one.form, *part) for part in parts)


def _tfds_units(one: _Input, unit_bytes: int) -> Iterator[Unit]:
    """Runs of records of about `unit_bytes` of their file, the rows counted over the whole split."""
    before = 0
    for file, records in tfds_files(one.path, one.split):
        size = file.stat().st_size if file.is_file() else 0
        step = max(1, -(-records * unit_bytes // max(size, unit_bytes)))
        for start in range(0, records, step):
            rows = min(step, records - start)
            place = before + start
            yield Unit(str(one.path), "tfds", place, place + rows, place, size * rows // records)
        before += records


def read_unit(unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """The rows of one unit, in order."""
    path = Path(unit.path)
    with _reading(path):
        if unit.form == "shards":
            yield from _read_shard(path, unit, settings)
            return
        reader = RowReader(settings, path.name, unit.path)
        for number, row in _rows(unit, settings):
            yield reader.document(row, number)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns a missing permission or a failing disk into a UserError that names the input, not the output."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"input {path}: cannot be read ({error.strerror or error}); check its rights and disk"
        ) from error


def _rows(unit: Unit, settings: SourceSettings) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in its file, row)."""
    path = Path(unit.path)
    if unit.form == "packed":
        return read_jsonl(path)
    if unit.form == "jsonl":
        return _read_range(path, unit.start, unit.stop, unit.rows_before)
    if unit.form == "tfds":
        rows = read_tfds(path, tfds_split(path, settings.split), unit.start, unit.stop)
    elif unit.form == "parquet":
        rows = read_parquet(path, unit.start, settings.columns, [settings.id, "source"])
    else:
        rows = read_arrow(path, unit.start, unit.stop, settings.columns, [settings.id, "source"])
    return enumerate(rows, start=unit.rows_before + 1)


def read_source(settings: SourceSettings) -> Iterator[Document | Dropped]:
    """All rows of a source in order, in constant memory."""
    for unit in plan_units(settings):
        yield from read_unit(unit, settings)


def source_identity(settings: SourceSettings, digest_of: DigestOf = file_digest) -> dict[str, Any]:
    """What the source means for a fingerprint: contents and columns, never where the files lie."""
    inputs = _inputs(settings)
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        contents = list(pool.map(lambda one: _contents(one, digest_of), inputs))
    return {**settings.model_dump(exclude={"path"}), "contents": contents}


def _contents(one: _Input, digest_of: DigestOf) -> str | list[str]:
    if one.form == "shards":
        return read_manifest(one.path).fingerprint
    if one.form == "tfds":
        return [digest_of(file) for file, _ in tfds_files(one.path, one.split)]
    return digest_of(one.path)


def _read_shard(path: Path, unit: Unit, settings: SourceSettings) -> Iterator[Document | Dropped]:
    """Documents of a stage's shard. They have text, ids and kinds of their own; only the bounds of length act."""
    shards = Shards(path, verify=False)
    longest = settings.max_characters
    for number, record in enumerate(shards.stream(unit.start), start=unit.rows_before + 1):
        try:
            document = decode(record, Document)
        except UserError as error:
            raise UserError(
                f"input {shards.paths[unit.start]}: record {number} is no document (stage {shards.manifest.stage!r} "
                "made it); give raw text, or the output of synth collect or synth render"
            ) from error
        if "kind" in settings.model_fields_set and document.kind != settings.kind:
            raise UserError(
                f"input {shards.paths[unit.start]}: given kind: {settings.kind}, but record {number} is of kind "
                f"{document.kind}; a stage's documents bring their own, take kind out"
            )
        characters = sum(len(segment.text) for segment in document.segments)
        if characters < settings.min_characters:
            yield Dropped("too_short", f"{path.name}:{number}")
        elif longest is not None and characters > longest:
            yield Dropped("too_long", f"{path.name}:{number}")
        else:
            yield document


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSON Lines file, plain or packed. Raises UserError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"input {path}: no such file; give a JSON Lines file")
    if path.stat().st_size == 0:
        raise UserError(f"input {path}: the file is empty; give a file with one record a line")
    number = 0
    with _open_bytes(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_row(line, path, number)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"input {path}: cut short or not compressed as its name says, after line {number} ({error}); "
                "fetch or write the file again"
            ) from error


def _open_bytes(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdFile(path), READ_BYTES) if path.name.endswith(".zst") else path.open("rb")


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file. The library's own reader ends at the first frame, and takes a cut one for whole."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._inside = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._file.read(ZSTD_BYTES)
            if not data:
                if self._inside:
                    raise EOFError("the last frame has no end")
                return 0
            self._inside = True
            self._ready = self._frame.decompress(data)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_range(path: Path, start: int, stop: int, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows whose line begins within bytes [start, stop); `number` lines begin before."""
    with path.open("rb") as file:
        file.seek(max(start - 1, 0))
        if start > 0:
            file.readline()  # the end of a line that belongs to the unit before
        while file.tell() < stop and (line := file.readline()):
            number += 1
            if line.strip():
                yield number, parse_row(line, path, number)


def _jsonl_units(path: Path, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Ranges of `unit_bytes`, and the lines that begin before each: one reading of the file, as the checksum's is."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Unit(str(path), "jsonl", start, stop, lines + (last != b"\n"), stop - start)
            left = stop - start
            while left > 0 and (block := file.read(min(left, READ_BYTES))):
                lines, last, left = lines + block.count(b"\n"), block[-1:], left - len(block)


def parse_row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    if number == 1 and line.lstrip().startswith(b"["):
        raise UserError(f"input {path}: holds one JSON array; write its objects one a line")
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: line {number} is not UTF-8 (byte {error.start}); convert the file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"input {path}: line {number} is not valid JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(f"input {path}: line {number} is a {type(row).__name__}, expected an object with fields")
    return row
