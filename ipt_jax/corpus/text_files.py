"""Rows of text files: JSON Lines, JSON, CSV, TSV and plain text, each also compressed.

A file is read as a stream. A JSON file holds one object per line, one array of objects, objects that follow each other
in any layout, or one object with the array in one of `WRAPPERS`. The first line of a CSV file names the columns. A text
file is one row {"text": ...}. Rows are numbered from 1: by line in JSON Lines, else by row. Errors name file and row.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.paths import DAMAGED, compression, file_name, file_size, open_file, open_plain, reading

Kind = Literal["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
EXPECTED = ".jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow (plain, .gz, .zst, .xz or .bz2)"
WRAPPERS = ("data", "rows", "examples")  # fields that hold the rows of a JSON file
READ_CHARACTERS = 1 << 20
BETWEEN = re.compile(r"[\s,]*")
Row = dict[str, Any]
csv.field_size_limit(sys.maxsize)


def kind_of(path: str) -> Kind | None:
    """By the end of its name; None for a file that is not read."""
    name = file_name(path).lower().removesuffix(compression(path))
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


def read_text_file(path: str, kind: Kind) -> Iterator[tuple[int, Row]]:
    """(number, row) of a file that is read from its beginning."""
    number = 0
    try:
        with open_plain(path) as file:
            for number, row in _rows(path, kind, file):
                yield number, row
    except DAMAGED as error:
        what = "line" if kind == "jsonl" else "row"
        raise UserError(
            f"input {path}: cut short or not compressed as its name says, after {what} {number} ({error}); "
            "restore the file or download it again"
        ) from error


def _rows(path: str, kind: Kind, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    if kind in ("csv", "tsv"):
        yield from _read_table(path, file, "," if kind == "csv" else "\t")
    elif kind == "txt":
        yield 1, {"text": _decoded(path, file.read())}
    elif kind == "jsonl" or one_per_line(file):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_row(line, path, number)
    else:
        yield from _read_json(path, file)


def _decoded(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: not UTF-8 at byte {error.start}; convert the file") from error


# ---- JSON Lines


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Row]]:
    """(line number, row) of a JSON Lines file, plain or compressed. Raises UserError naming file and line."""
    path = str(path)
    if not Path(path).is_file():
        raise UserError(f"input {path}: no such file; set a JSON Lines file")
    if file_size(path) == 0:
        raise UserError(f"input {path}: the file is empty; set a file with one record per line")
    return read_text_file(path, "jsonl")


def read_range(path: str, start: int, stop: int, number: int) -> Iterator[tuple[int, Row]]:
    """Rows of JSON Lines whose line begins within bytes [start, stop). `number` lines begin before."""
    with open_file(path) as file:
        file.seek(max(start - 1, 0))
        if start > 0:
            file.readline()  # the end of a line of the previous unit
        at = file.tell()
        while at < stop and (line := file.readline()):
            at += len(line)
            number += 1
            if line.strip():
                yield number, _parse_row(line, path, number)


def _parse_row(line: bytes, path: str, number: int) -> Row:
    if number == 1 and line.lstrip().startswith(b"["):
        raise UserError(
            f"input {path}: holds one JSON array; write one object per line, or let the name of the file end in .json"
        )
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


# ---- JSON


def holds_lines(path: str) -> bool:
    """Whether a .json file that is not compressed holds one object per line."""
    with reading(path), open_file(path) as file:
        return one_per_line(file)


def one_per_line(file: IO[bytes]) -> bool:
    """Whether the first two lines are an object each. The file is then at its beginning again."""
    start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    if not start.startswith(b"{"):
        return False
    lines = (line for line in file if line.strip())
    first, second = next(lines, b""), next(lines, b"")
    file.seek(0)
    return first.rstrip().endswith(b"}") and second.lstrip().startswith(b"{") and _is_object(first)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _read_json(path: str, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    try:
        for number, value in enumerate(_json_values(path, io.TextIOWrapper(file, "utf-8-sig")), start=1):
            if not isinstance(value, dict):
                raise UserError(
                    f"input {path}: row {number} is a {type(value).__name__}, expected an object with fields"
                )
            yield number, value
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: not UTF-8 ({error.reason}); convert the file") from error


def _json_values(path: str, text: io.TextIOWrapper) -> Iterator[Any]:
    """The items of one array, the values that follow each other, or the rows of one object that wraps them."""
    decoder = json.JSONDecoder()
    buffer, at, count, listed = "", 0, 0, False
    while True:
        at = BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        if at == len(buffer):
            buffer, at = text.read(READ_CHARACTERS), 0
            if not buffer:
                break
        elif not count and not listed and buffer[at] == "[":
            listed, at = True, at + 1
        elif listed and buffer[at] == "]":
            return
        else:
            try:
                value, at = decoder.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                more = text.read(max(READ_CHARACTERS, len(buffer) - at))
                if not more:
                    raise UserError(
                        f"input {path}: row {count + 1} is not valid JSON ({error}); correct it or download the file "
                        "again"
                    ) from error
                buffer, at = buffer[at:] + more, 0
                continue
            count += 1
            wrapped = (
                next((value[name] for name in WRAPPERS if isinstance(value.get(name), list)), None)
                if (count == 1 and not listed and isinstance(value, dict))
                else None
            )
            yield from [value] if wrapped is None else wrapped
    if listed:
        raise UserError(f"input {path}: its array ends after row {count}, without ]; download the file again")


# ---- CSV and TSV


def _read_table(path: str, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Row]]:
    lines = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        names = next(lines, [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"input {path}: its first line names {twice[0]!r} twice; give each column a name of its own"
            )
        for number, cells in enumerate((cells for cells in lines if cells), start=1):
            if len(cells) > len(names):
                raise UserError(
                    f"input {path}: row {number} (line {lines.line_num}) has {len(cells)} cells, its first line names "
                    f"{len(names)}; quote cells that hold {delimiter!r}"
                )
            yield number, dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))
    except csv.Error as error:
        raise UserError(
            f"input {path}: row {number + 1} (line {lines.line_num}) is not valid CSV ({error}); correct its quotes"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: not UTF-8 after line {lines.line_num}; convert the file") from error
