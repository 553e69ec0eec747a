"""Columnar files and data sets of other libraries: Parquet, Arrow, Hugging Face (saved or cloned), TFDS.

Only the requested columns are read, a few hundred rows at a time: Parquet by row groups, Arrow by record batches of a
memory-mapped file. A Hugging Face data set (a `save_to_disk` directory, or `hf:NAME` of the hub) is Arrow files; the
library (extra `hf`) is needed only to download one. A TFDS directory must be prepared as ArrayRecord; it is read
through tensorflow-datasets (extra `tfds`) without TensorFlow. A damaged file is a UserError that names it.
"""

import fnmatch
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import parse_yaml
from ipt_jax.corpus.paths import DAMAGED, compression, file_size, is_remote, open_file, read_plain

HUB = "hf:"
READ_ROWS = 256  # as Python objects at a time
INFO_FILES = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}  # never rows
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
SPLIT = re.compile(r"(?:.*[._/-])?(train|validation|valid|val|dev|test)(?:[._/-].*)?", re.IGNORECASE)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- Parquet and Arrow


class RowRange(NamedTuple):
    """Row groups or record batches [start, stop) of a file, the rows before them, and their bytes."""

    start: int
    stop: int
    rows_before: int
    size: int


def parquet_parts(path: str) -> list[RowRange]:
    """One range per row group; one for all of a compressed file, which has to be decompressed from its beginning."""
    with _open_parquet(path) as file:
        metadata = file.metadata
        if compression(path):
            return [RowRange(0, metadata.num_row_groups, 0, file_size(path))]
        parts, before = [], 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            parts.append(RowRange(index, index + 1, before, group.total_byte_size))
            before += group.num_rows
        return parts


def row_groups(path: str) -> int:
    with _open_parquet(path) as file:
        return int(file.metadata.num_row_groups)


Columns = list[str] | None  # fields, nested ones with dots; None: all


def read_parquet(path: str, start: int, stop: int, needed: Columns, optional: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of row groups [start, stop): the fields `needed`, and those of `optional` that the file has."""
    with _open_parquet(path) as file:
        columns = _columns(path, file.schema_arrow, needed, optional)
        with _damaged(path, f"row group {start}"):
            for batch in file.iter_batches(batch_size=READ_ROWS, row_groups=list(range(start, stop)), columns=columns):
                yield from _rows(batch, path)


def arrow_parts(path: str, part_bytes: int) -> list[RowRange]:
    """Ranges of record batches of about `part_bytes`; one for all of a compressed file."""
    parts, start, before, rows, size = [], 0, 0, 0, 0
    index = -1
    limit = sys.maxsize if compression(path) else part_bytes
    with _damaged(path, "its record batches"):
        for index, batch in enumerate(_arrow_batches(path)):
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if size >= limit:
                parts.append(RowRange(start, index + 1, before, size))
                start, before, rows, size = index + 1, before + rows, 0, 0
    if rows:
        parts.append(RowRange(start, index + 1, before, size))
    return parts


def read_arrow(path: str, start: int, stop: int, needed: Columns, optional: list[str]) -> Iterator[dict[str, Any]]:
    """As `read_parquet`, the rows of record batches [start, stop)."""
    with _damaged(path, f"record batches {start} to {stop}"):
        for index, batch in enumerate(_arrow_batches(path)):
            if index >= stop:
                return
            if index >= start:
                fields = _columns(path, batch.schema, needed, optional)
                heads = [one if one in batch.schema.names else one.partition(".")[0] for one in fields]
                selected = batch.select(list(dict.fromkeys(heads)))
                for row in range(0, batch.num_rows, READ_ROWS):
                    yield from _rows(selected.slice(row, READ_ROWS), path)


def _columns(path: str, schema: Any, needed: Columns, optional: list[str]) -> list[str]:
    """What to read of a file: a column, a field of structs by its path, or the column that holds a list on the way."""
    if needed is None:
        return list(schema.names)
    found: dict[str, None] = {}
    for name in [*needed, *optional]:
        column = _column(schema, name)
        if column is None and name in needed:
            known = ", ".join(_field_names(schema))
            raise UserError(f"input {path}: no column {name!r}, found {known}; name another column")
        found |= {column: None} if column else {}
    return [one for one in found if one.partition(".")[0] == one or one.partition(".")[0] not in found]


def _column(schema: Any, name: str) -> str | None:
    import pyarrow

    if name in schema.names:
        return name
    head, *rest = name.split(".")
    if head not in schema.names or not rest:
        return None
    kind = schema.field(head).type
    for part in rest:
        while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            name, kind = head, kind.value_type  # the path of a list's items depends on the writer
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return name


def _field_names(schema: Any) -> list[str]:
    """Columns, structs as the names of their fields."""
    import pyarrow

    names: list[str] = []
    for field in schema:
        inner = field.type if pyarrow.types.is_struct(field.type) else ()
        names += [f"{field.name}.{one.name}" for one in inner] or [field.name]
    return names


def _rows(batch: Any, path: str) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"input {path}: a text is not UTF-8 ({error}); write the file as UTF-8") from error


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    local = not is_remote(path) and not compression(path)
    with _damaged(path, "its footer"):
        file = pyarrow.parquet.ParquetFile(
            path if local else read_plain(path) if compression(path) else open_file(path)
        )
    with file:
        yield file


def _arrow_batches(path: str) -> Iterator[Any]:
    """Of Arrow's stream format, which Hugging Face writes, or its file format."""
    import pyarrow

    with _open_arrow(path) as opened:
        if opened.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(opened)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            opened.seek(0)
            yield from pyarrow.ipc.open_stream(opened)


def _open_arrow(path: str) -> Any:
    import pyarrow

    if compression(path):
        return pyarrow.BufferReader(read_plain(path).getbuffer())
    return pyarrow.PythonFile(open_file(path), "r") if is_remote(path) else pyarrow.memory_map(path)


@contextmanager
def _damaged(path: str, part: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, *DAMAGED) as error:
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


# ---- clones of the hub


def card_files(where: str, card: str, names: list[str], split: str | None, subset: str | None) -> list[str] | None:
    """Of the files `names` of a folder, those that its `card` (README.md) declares for a split. None: it declares none.

    As the hub reads cards: `configs` with `data_files`, a text, a list, or a list of {split, path}.
    """
    matter = FRONT_MATTER.match(card)
    try:
        declared: Any = parse_yaml(matter[1]) if matter else {}
        configs = {
            str(one.get("config_name", "default")): one
            for one in declared["configs"]
            if {"data_files", "data_dir"} & {*one}
        }
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return None
    if not configs:
        return None
    usual = [name for name, one in configs.items() if one.get("default")]
    name = subset or (usual or [one for one in configs if one == "default" or len(configs) == 1] or [""])[0]
    if name not in configs:
        raise UserError(f"input {where}: its card has several subsets; set subset to one of {', '.join(configs)}")
    patterns = _patterns(configs[name])
    chosen = _choose_split(where, list(patterns), split)
    found = [
        one for one in names if any(fnmatch.fnmatchcase(one, each.removeprefix("./")) for each in patterns[chosen])
    ]
    if not found:
        raise UserError(
            f"input {where}: no file {', '.join(patterns[chosen])}, which README.md declares; download it again"
        )
    return found


def _patterns(config: dict[str, Any]) -> dict[str, list[str]]:
    """Patterns of files by split."""
    given = config.get("data_files", f"{str(config.get('data_dir', '')).strip('/')}/*")
    if isinstance(given, str) or (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        given = {"train": given}
    if isinstance(given, list):
        given = {str(one["split"]): one["path"] for one in given}
    folder = f"{config['data_dir'].strip('/')}/" if "data_dir" in config and "data_files" in config else ""
    return {
        split: [folder + str(one) for one in (paths if isinstance(paths, list) else [paths])]
        for split, paths in given.items()
    }


def clone_files(names: list[str]) -> list[str]:
    """The data files of a clone whose card declares none: the Parquet files in `data`, else all files of rows."""
    return [one for one in names if one.startswith("data/") and one.endswith(".parquet")] or names


def files_of_split(where: str, names: list[str], split: str | None, one_set: bool) -> list[str]:
    """The files whose name, or a folder of it, is that of the split. `one_set`: several splits must not be joined."""
    splits = {name: match[1].lower() for name in names if (match := SPLIT.fullmatch(name))}
    found = sorted(set(splits.values()))
    if split is not None:
        if chosen := [name for name in names if splits.get(name) == split.lower()]:
            return chosen
        if not found:
            raise UserError(f"input {where}: has no splits, but split is {split}; remove split")
        raise UserError(f"input {where}: no file of split {split!r} (they name {', '.join(found)}); set another split")
    if one_set and len(found) > 1:
        raise UserError(f"input {where}: has files of several splits; set split to one of {', '.join(found)}")
    return names


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
