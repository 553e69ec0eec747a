"""Which documents of the sources of a mix are held out of training, by id.

A document is held out if the key of its id is among the lowest `share` of all keys, so runs with any seed hold the same
documents out, and a larger share contains a smaller one. Copies of a text follow it: a text that augmented documents
were made from is held out if one of them is, and not by its own id. A document made of held-out texts that is not held
out itself is neither trained on nor validated on.

Guarantees: no document of training has the id of a held-out document, or a parent with the id of a held-out document.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest
from ipt_jax.core.manifest import Manifest
from ipt_jax.corpus.records import Parent
from ipt_jax.data.token_index import document_count, id_key, read_index, read_parents
from ipt_jax.data.token_shards import open_token_shards

Directory = tuple[Path, Manifest]


class Role(IntEnum):
    """What a document is for."""

    TRAINING = 0
    HELD_OUT = 1
    NEITHER = 2


class _PageParents(msgspec.Struct):
    """The fields of a TokenPage that say what its documents were made from."""

    first: int
    parents: dict[int, list[Parent]]


_DECODER = msgspec.msgpack.Decoder(_PageParents)


class HeldOut:
    """The documents that `share` holds out of all `sources` together."""

    def __init__(self, share: float, sources: Sequence[Directory]):
        self._share, self._sources = share, sources
        shards = [[[entry.sha256 for entry in manifest.shards] for _, manifest in sources]]
        self.identity = digest([share, shards])

    def roles(self, directory: Path, manifest: Manifest, shard: int, index: np.ndarray) -> np.ndarray:
        """The Role of each document of a shard, [documents] of uint8. `index`: the rows of the shard."""
        copied, texts = self._texts
        keys, documents = self._made_from[directory][shard]
        made = np.zeros(len(index), bool)
        made[documents] = True
        drawn = self._drawn(index["id"]) & (made | ~among(index["id"], copied))
        of_held_out = among(index["id"], texts)  # as a text, or as a document made of one
        of_held_out[documents[among(keys, texts)]] = True
        roles = np.where(of_held_out, Role.NEITHER, Role.TRAINING).astype(np.uint8)
        roles[drawn | (of_held_out & ~made)] = Role.HELD_OUT
        return roles

    def _drawn(self, keys: np.ndarray) -> np.ndarray:
        return keys < np.uint64(int(self._share * 2**64))

    @cached_property
    def _made_from(self) -> dict[Path, list[tuple[np.ndarray, np.ndarray]]]:
        """For each shard of each source: the keys of all parents, and the number of the document of each."""
        return {directory: _parents_by_document(directory, manifest) for directory, manifest in self._sources}

    @cached_property
    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted keys: of all texts that documents were made from; of held-out documents with parents, and of these."""
        every, held = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for directory, manifest in self._sources:
            shards = self._made_from[directory]
            if not any(len(keys) for keys, _ in shards):
                continue
            for index, (keys, documents) in zip(read_index(directory, manifest), shards, strict=True):
                every.append(keys)
                drawn = self._drawn(index["id"])[documents]
                held += [keys[drawn], index["id"][documents[drawn]]]
        return np.unique(np.concatenate(every)), np.unique(np.concatenate(held))


def _parents_by_document(directory: Path, manifest: Manifest) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per shard. Reads the pages of a source whose documents have parents: side files do not say whose they are."""
    nothing = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    if not len(read_parents(directory, manifest)):
        return [nothing] * len(manifest.shards)
    found: list[list[tuple[int, int]]] = [[] for _ in manifest.shards]
    ends = np.cumsum([entry.records for entry in manifest.shards])
    for number, record in enumerate(open_token_shards(directory, verify=False)):
        page = _DECODER.decode(record)
        found[int(np.searchsorted(ends, number, side="right"))] += [
            (id_key(parent.id), page.first + place) for place, parents in page.parents.items() for parent in parents
        ]
    return [
        (np.array([key for key, _ in pairs], np.uint64), np.array([place for _, place in pairs], np.int64))
        for pairs in found
    ]


def refuse_shared(validation: dict[str, Directory], training: dict[str, Directory]) -> None:
    """Raises UserError where a document of `validation`, or a text that it was made from, is also in `training`."""
    for name, directory in validation.items():
        keys = np.unique(np.concatenate([index["id"] for index in read_index(*directory)] + [_parent_keys(directory)]))
        for other, trained in training.items():
            shared = sum(int(among(index["id"], keys).sum()) for index in read_index(*trained))
            shared += int(among(_parent_keys(trained), keys).sum())
            if shared:
                raise UserError(
                    f"validation source {name!r}: {shared:,} ids of training source {other!r} "
                    f"({document_count(trained[1]):,} documents) are also in it, as documents or as the texts that "
                    "documents were made from; tokenize texts that training has not, or set data.held_out_share instead"
                )


def _parent_keys(directory: Directory) -> np.ndarray:
    keys: np.ndarray = read_parents(*directory)["id"]
    return keys


def among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each key is in a sorted array."""
    if not len(ordered):
        return np.zeros(len(keys), bool)
    place = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    found: np.ndarray = ordered[place] == keys
    return found
