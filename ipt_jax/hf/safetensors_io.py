"""Safetensors files: reading one tensor at a time, and writing a model whose tensors come one by one.

Reading goes through the safetensors library, which checks that a file is complete. Writing is done here, since
the library needs all tensors of a file in memory: the format is eight bytes of header length, a JSON header and the
tensors' bytes, and all shapes are known before the first tensor is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ipt_jax.core.errors import UserError

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARD_BYTES = 5 * 10**9
CODES = {"float32": "F32", "bfloat16": "BF16"}
MARK = {"format": "pt", "writer": "ipt_jax"}  # transformers requires a format; the writer identifies our exports


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, F16
    name: str  # in the file


def list_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor in a directory's safetensors files, by name. Raises UserError for absent or broken files."""
    index = directory / INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [directory / name for name in sorted(set(named.values()))]
    else:
        files, named = sorted(directory.glob("model*.safetensors")), {}  # not Mistral's consolidated.safetensors
    if not files:
        raise UserError(f"{directory}: no model*.safetensors; save the model with safetensors (.bin is never read)")
    found: dict[str, Stored] = {}
    for file in files:
        found |= _list_file(file)
    for name, file_name in named.items():
        if name not in found:
            raise UserError(
                f"{directory / file_name}: tensor {name} is missing, though {INDEX} names it; copy it again"
            )
    if "embed_tokens.weight" in found:  # a bare LlamaModel
        found = {name if name == HEAD else f"model.{name}": stored for name, stored in found.items()}
    return found


def stores_other_head(directory: Path) -> bool:
    """Whether an output projection is stored that differs from the embedding."""
    stored = list_tensors(directory)
    if HEAD not in stored or EMBEDDING not in stored:
        return False
    return not np.array_equal(read_tensor(stored[HEAD]), read_tensor(stored[EMBEDDING]))


def _list_file(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise UserError(f"{file}: no such file, though {INDEX} names it; copy it again")
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {name: Stored(file, tuple(one.get_shape()), one.get_dtype(), name) for name, one in slices.items()}
    except SafetensorError as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); copy it again") from error


def read_tensor(stored: Stored) -> np.ndarray:
    """One tensor, copied out of its file."""
    with safe_open(stored.file, framework="np") as opened:
        return opened.get_tensor(stored.name)


def written_here(directory: Path) -> bool:
    """Whether the directory's first safetensors file was written by this project."""
    for file in sorted(directory.glob("model*.safetensors"))[:1]:
        try:
            with safe_open(file, framework="np") as opened:
                return (opened.metadata() or {}).get("writer") == MARK["writer"]
        except SafetensorError:
            return False
    return False


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # float32 or bfloat16

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * (2 if self.dtype == "bfloat16" else 4)


def write_tensors(directory: Path, planned: list[Planned], tensors: Iterable[np.ndarray]) -> None:
    """Writes `tensors`, in the order of `planned`, to files of up to SHARD_BYTES; several get an index."""
    shards = _shards(planned)
    arrays = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        only = len(shards) == 1
        name = "model.safetensors" if only else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(directory / name, shard, arrays)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = {"total_size": sum(tensor.bytes for tensor in planned)}
        (directory / INDEX).write_text(json.dumps({"metadata": total, "weight_map": weight_map}, indent=2))


def _shards(planned: list[Planned]) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_file(path: Path, shard: list[Planned], arrays: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": MARK}
    end = 0
    for tensor in shard:
        offsets = [end, end + tensor.bytes]
        header[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map tensors at multiples of eight
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in shard:
            array = next(arrays)
            assert array.shape == tensor.shape and array.dtype.name == tensor.dtype, (tensor, array.shape, array.dtype)
            file.write(np.ascontiguousarray(array).tobytes())
