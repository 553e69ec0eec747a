"""Columnar files and data sets of other libraries: Parquet, Arrow, Hugging Face, TFDS.

Only the requested columns are read, a few hundred rows at a time: Parquet by row groups, Arrow by record batches of a
memory-mapped file. A Hugging Face data set (a `save_to_disk` directory, or `hf:NAME` of the hub) is Arrow files; the
library (extra `hf`) is needed only to download one. A TFDS directory must be prepared as ArrayRecord; it is read
through tensorflow-datasets (extra `tfds`) without TensorFlow. A damaged file is a UserError that names it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ipt_jax.core.errors import UserError

HUB = "hf:"
READ_ROWS = 256  # as Python objects at a time


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- Parquet and Arrow


class RowRange(NamedTuple):
    """Row groups or record batches [start, stop) of a file, the rows before them, and their bytes."""

    start: int
    stop: int
    rows_before: int
    size: int


def parquet_parts(path: Path) -> list[RowRange]:
    """One range per row group."""
    metadata = _open_parquet(path).metadata
    parts, before = [], 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        parts.append(RowRange(index, index + 1, before, group.total_byte_size))
        before += group.num_rows
    return parts


Columns = list[str] | None  # None: all


def read_parquet(path: Path, group: int, needed: Columns, optional: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of one row group: the columns `needed`, and those of `optional` that the file has."""
    file = _open_parquet(path)
    columns = _columns(path, file.schema_arrow.names, needed, optional)
    with _damaged(path, f"row group {group}"):
        for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=[group], columns=columns):
            yield from _rows(batch, path)


def arrow_parts(path: Path, part_bytes: int) -> list[RowRange]:
    """Ranges of record batches of about `part_bytes`."""
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


def read_arrow(path: Path, start: int, stop: int, needed: Columns, optional: list[str]) -> Iterator[dict[str, Any]]:
    """As `read_parquet`, the rows of record batches [start, stop)."""
    with _damaged(path, f"record batches {start} to {stop}"):
        for index, batch in enumerate(_arrow_batches(path)):
            if index >= stop:
                return
            if index >= start:
                selected = batch.select(_columns(path, batch.schema.names, needed, optional))
                for row in range(0, batch.num_rows, READ_ROWS):
                    yield from _rows(selected.slice(row, READ_ROWS), path)


def _columns(path: Path, found: list[str], needed: Columns, optional: list[str]) -> list[str]:
    if needed is None:
        return found
    for name in needed:
        if name not in found:
            raise UserError(f"input {path}: no column {name!r}, found {', '.join(found)}; name another column")
    return [name for name in dict.fromkeys([*needed, *optional]) if name in found]


def _rows(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: a text is not UTF-8 ({error}); write the file as UTF-8") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    with _damaged(path, "its footer"):
        return pyarrow.parquet.ParquetFile(path)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Of Arrow's stream format, which Hugging Face writes, or its file format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(mapped)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)


@contextmanager
def _damaged(path: Path, part: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"input {path}: {part} cannot be read ({_reason(error)}); restore the file or download it again"
        ) from error


# ---- Hugging Face


def is_hf(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def hf_files(path: Path, split: str | None) -> list[Path]:
    """The Arrow files of a saved data set, or of one split of a saved dictionary."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return hf_files(path / _choose_split(str(path), splits, split), None)
        if split is not None:
            raise UserError(f"input {path}: has no splits, but split is {split}; remove split")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / file["filename"] for file in state["_data_files"]]
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"input {path}: not a complete Hugging Face data set ({error}); save it again") from error


@lru_cache(maxsize=8)
def hub_files(name: str, subset: str | None, split: str | None) -> list[Path]:
    """The Arrow files of a data set of the hub. The first call downloads it into the cache of the library."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"input {HUB}{name}: needs the package datasets; run launch/setup.sh hf") from error
    try:
        found: Any = datasets.load_dataset(name, subset)
    except Exception as error:  # any type: no network, no such name, no access
        raise UserError(
            f"input {HUB}{name}: cannot be downloaded ({type(error).__name__}: {_reason(error)}); "
            "check the name, subset and network, or set a local path"
        ) from error
    return [Path(file["filename"]) for file in found[_choose_split(HUB + name, sorted(found), split)].cache_files]


def _choose_split(where: str, splits: list[str], split: str | None) -> str:
    """The split that is set, or the only one."""
    if split in splits:
        return str(split)
    if split is None and len(splits) == 1:
        return splits[0]
    found = "several splits" if split is None else f"no split {split!r}"
    raise UserError(f"input {where}: {found}; set split to one of {', '.join(splits)}")


# ---- TFDS


def is_tfds(path: Path) -> bool:
    return (path / "features.json").is_file() and (path / "dataset_info.json").is_file()


def tfds_split(path: Path, split: str | None) -> str:
    return _choose_split(str(path), [str(name) for name in _tfds_builder(path).info.splits], split)


def tfds_files(path: Path, split: str) -> list[tuple[Path, int]]:
    """The files of a split and their numbers of records."""
    info = _tfds_builder(path).info.splits[split]
    return [(Path(file), count) for file, count in zip(info.filepaths, info.shard_lengths, strict=True)]


def read_tfds(path: Path, split: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Records [start, stop) of a split. Bytes are decoded as UTF-8."""
    source = _tfds_source(path, split)
    for first in range(start, stop, READ_ROWS):
        indices = list(range(first, min(first + READ_ROWS, stop)))
        try:
            rows = source.__getitems__(indices)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(
                f"input {path}: records {first} to {indices[-1]} of {split} cannot be read ({_reason(error)}); "
                "prepare it again"
            ) from error
        for index, row in zip(indices, rows, strict=True):
            yield {name: _plain(value, path, split, index) for name, value in row.items()}


def _plain(value: Any, path: Path, split: str, index: int) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"input {path}: record {index} of {split} is not UTF-8 (byte {error.start}); prepare it again"
            ) from error
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


@lru_cache(maxsize=8)
def _tfds_builder(path: Path) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"input {path}: a TFDS data set, which needs tensorflow-datasets; run launch/setup.sh tfds"
        ) from error
    try:
        builder = tensorflow_datasets.builder_from_directory(str(path))
    except Exception as error:  # TFDS raises many types
        raise UserError(f"input {path}: not a complete TFDS directory ({_reason(error)}); prepare it again") from error
    form = builder.info.file_format
    if form is None or form.value != "array_record":
        raise UserError(
            f"input {path}: prepared as {form.value if form else 'unknown'}, which only TensorFlow reads; "
            "prepare it with file_format='array_record'"
        )
    return builder


@lru_cache(maxsize=8)
def _tfds_source(path: Path, split: str) -> Any:
    return _tfds_builder(path).as_data_source(split=split)
