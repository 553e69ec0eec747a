"""Columnar files: Parquet by row groups and Arrow (what Hugging Face data sets lie in) by record batches.

Only the columns that are asked for are read, a few hundred rows at a time. Arrow files are mapped, so that skipping
record batches reads nothing. A file that is damaged is a UserError naming it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ipt_jax.core.errors import UserError

BATCH_ROWS = 256  # rows as Python objects at a time


class RowRange(NamedTuple):
    """Row groups or record batches [start, stop) of a file: the rows before them, and their bytes."""

    start: int
    stop: int
    rows_before: int
    size: int


def parquet_parts(path: Path) -> list[RowRange]:
    """One a row group."""
    metadata = _open_parquet(path).metadata
    parts, before = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        parts.append(RowRange(index, index + 1, before, group.total_byte_size))
        before += group.num_rows
    return parts


def read_parquet(path: Path, group: int, needed: list[str], wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one row group: the columns `needed`, and those of `wanted` that the file has."""
    file = _open_parquet(path)
    columns = _columns(path, file.schema_arrow.names, needed, wanted)
    with _damaged(path, f"row group {group}"):
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns):
            yield from _rows(batch, path)


def arrow_parts(path: Path, part_bytes: int) -> list[RowRange]:
    """Runs of record batches of about `part_bytes`."""
    parts, start, before, rows, size = [], 0, 0, 0, 0
    index = -1
    with _damaged(path, "its record batches"):
        for index, batch in enumerate(_arrow_batches(path)):
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if size >= part_bytes:
                parts.append(RowRange(start, index + 1, before, size))
                start, before, rows, size = index + 1, before + rows, 0, 0
    if rows:
        parts.append(RowRange(start, index + 1, before, size))
    return parts


def read_arrow(path: Path, start: int, stop: int, needed: list[str], wanted: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of record batches [start, stop): the columns `needed`, and those of `wanted` that the file has."""
    with _damaged(path, f"record batches {start} to {stop}"):
        for index, batch in enumerate(_arrow_batches(path)):
            if index >= stop:
                return
            if index >= start:
                here = batch.select(_columns(path, batch.schema.names, needed, wanted))
                for row in range(0, batch.num_rows, BATCH_ROWS):
                    yield from _rows(here.slice(row, BATCH_ROWS), path)


def _columns(path: Path, found: list[str], needed: list[str], wanted: list[str]) -> list[str]:
    for name in needed:
        if name not in found:
            raise UserError(f"input {path}: no column {name!r}, found {', '.join(found)}; name another column")
    return [name for name in dict.fromkeys([*needed, *wanted]) if name in found]


def _rows(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: a text is not UTF-8 ({error}); write the file again as UTF-8") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    with _damaged(path, "its footer"):
        return pyarrow.parquet.ParquetFile(path)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Hugging Face writes Arrow's stream format; other tools write its file format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(mapped)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)


@contextmanager
def _damaged(path: Path, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"input {path}: {what} cannot be read ({reason}); fetch or write the file again") from error
