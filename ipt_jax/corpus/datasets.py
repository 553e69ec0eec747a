"""Data sets of other libraries: Hugging Face (a `save_to_disk` directory, or `hf:NAME` of the hub) and TFDS.

Hugging Face data sets are Arrow files in the end: a saved directory is read without the library, and a name of the hub
needs it (extra `hf`) only to be fetched. TFDS directories must have been prepared as ArrayRecord; they are read through
tensorflow-datasets (extra `tfds`) without TensorFlow. A data set with several splits asks for one of them.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError

HUB = "hf:"
READ_RECORDS = 256


def is_hf(path: Path) -> bool:
    """Whether `path` is what `save_to_disk` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def is_tfds(path: Path) -> bool:
    return (path / "features.json").is_file() and (path / "dataset_info.json").is_file()


def hf_files(path: Path, split: str | None) -> list[Path]:
    """The Arrow files of a saved data set, or of one split of a saved dictionary of them."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return hf_files(path / choose_split(str(path), splits, split), None)
        if split is not None:
            raise UserError(f"input {path}: a data set without splits, given split: {split}; take split out")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / file["filename"] for file in state["_data_files"]]
    except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"input {path}: not a whole Hugging Face data set ({error}); save it again") from error


@lru_cache(maxsize=8)
def hub_files(name: str, subset: str | None, split: str | None) -> list[Path]:
    """The Arrow files of a data set of the hub, fetched into the library's cache on first use."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"input {HUB}{name}: needs the package datasets; run launch/setup.sh hf") from error
    try:
        found: Any = datasets.load_dataset(name, subset)
    except Exception as error:  # the library raises whatever its many parts raise: no network, no such name, no access
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"input {HUB}{name}: cannot be fetched ({type(error).__name__}: {reason}); "
            "check the name, subset and network, or give a local path"
        ) from error
    one = found[choose_split(HUB + name, sorted(found), split)]
    return [Path(file["filename"]) for file in one.cache_files]


def choose_split(where: str, splits: list[str], split: str | None) -> str:
    """The split that is asked for, or the only one."""
    if split in splits:
        return str(split)
    if split is None and len(splits) == 1:
        return splits[0]
    given = "several splits" if split is None else f"no split {split!r}"
    raise UserError(f"input {where}: {given}; set split to one of {', '.join(splits)}")


def tfds_split(path: Path, split: str | None) -> str:
    return choose_split(str(path), [str(name) for name in _tfds_builder(path).info.splits], split)


def tfds_files(path: Path, split: str) -> list[tuple[Path, int]]:
    """The files of a split and their numbers of records."""
    info = _tfds_builder(path).info.splits[split]
    return [(Path(file), count) for file, count in zip(info.filepaths, info.shard_lengths, strict=True)]


def read_tfds(path: Path, split: str, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Records [start, stop) of a split. Bytes become text where they are UTF-8."""
    source = _tfds_source(path, split)
    for first in range(start, stop, READ_RECORDS):
        indices = list(range(first, min(first + READ_RECORDS, stop)))
        try:
            rows = source.__getitems__(indices)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"input {path}: records {first} to {indices[-1]} of {split} cannot be read ({reason}); prepare it again"
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
    except Exception as error:  # as many kinds as TFDS has parts
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"input {path}: not a whole TFDS directory ({reason}); prepare it again") from error
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
