"""Token shards: documents written page by page with their side files, and read back one by one.

A page is one ArrayRecord record of about 8,192 tokens of consecutive documents, or of one that is longer; the index
beside the shard says which page holds a document. Pages are not compressed: ids compress by a quarter, and unpacking
them is two thirds of what reading a page costs.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ipt_jax.corpus.records import KIND_CODES, KINDS, TokenDocument, TokenPage, decode, encode
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.shards import UNPACKED, Shards, write_shard
from ipt_jax.data.lengths import id_key
from ipt_jax.data.sides import SideWriter

PAGE_TOKENS = 1 << 13
RECORDS = "pages 1"  # what the records of a token directory are, in its identity: raised when they change


class Written(NamedTuple):
    """A document, and how many characters of its text each token covers, for a raw one."""

    document: TokenDocument
    characters: np.ndarray | None = None


def write_token_shard(temporary: Path, documents: Iterable[Written]) -> tuple[int, dict[str, str]]:
    """Writes a shard and its side files under temporary names; returns its records and the SHA-256 of each side file."""
    side = SideWriter(temporary)
    records = write_shard(temporary, _pages(documents, side), UNPACKED)
    return records, side.close()


def _pages(documents: Iterable[Written], side: SideWriter) -> Iterator[bytes]:
    page, first, tokens = 0, 0, 0
    held: list[TokenDocument] = []
    keys: list[int] = []
    for document, characters in documents:
        size, key = len(document.tokens) // np.dtype(document.dtype).itemsize, id_key(document.id)
        if held and tokens + size > PAGE_TOKENS:
            yield _page(first, held, keys)
            page, first, tokens = page + 1, first + len(held), 0
            held, keys = [], []
        side.add(key, page, size, characters, document.parents)
        held.append(document)
        keys.append(key)
        tokens += size
    if held:
        yield _page(first, held, keys)


def _page(first: int, documents: list[TokenDocument], keys: list[int]) -> bytes:
    width = np.dtype(documents[0].dtype).itemsize
    page = TokenPage(
        first=first,
        dtype=documents[0].dtype,
        tokens=b"".join([one.tokens for one in documents]),
        lengths=np.array([len(one.tokens) // width for one in documents], "<u4").tobytes(),
        keys=np.array(keys, "<u8").tobytes(),
        kinds=bytes([KIND_CODES[one.kind] for one in documents]),
        run_counts=np.array([len(one.loss_runs) for one in documents], "<u4").tobytes(),
        runs=np.array([run for one in documents for run in one.loss_runs], "<u4").tobytes(),
        ids=[one.id for one in documents],
        sources=[one.source for one in documents],
        parents={place: one.parents for place, one in enumerate(documents) if one.parents},
    )
    return encode(page)


def open_token_shards(path: str | Path, *, verify: bool = True) -> Shards:
    """The shards of a directory that `ipt tokenize` wrote. Raises UserError when another version did."""
    shards = Shards(path, "tokenize", verify=verify)
    if (found := shards.manifest.identity.get("records")) != RECORDS:
        raise UserError(
            f"{path}: its records are {found or 'single documents'!r}, this version reads {RECORDS!r}; "
            "delete it and run ipt tokenize again"
        )
    return shards


def read_token_documents(path: str | Path) -> Iterator[TokenDocument]:
    """The documents of a token directory, in order. Raises UserError for what is damaged."""
    for record in open_token_shards(path):
        yield from documents_of(decode(record, TokenPage))


def documents_of(page: TokenPage) -> Iterator[TokenDocument]:
    lengths, counts = np.frombuffer(page.lengths, "<u4"), np.frombuffer(page.run_counts, "<u4")
    ends, run_ends = np.cumsum(lengths).tolist(), np.cumsum(counts).tolist()
    runs = np.frombuffer(page.runs, "<u4").reshape(-1, 2).tolist()
    width, start, first_run = np.dtype(page.dtype).itemsize, 0, 0
    for place, (stop, last_run) in enumerate(zip(ends, run_ends, strict=True)):
        yield TokenDocument(
            page.ids[place],
            KINDS[page.kinds[place] - 1],
            page.dtype,
            page.tokens[start * width : stop * width],
            [(low, high) for low, high in runs[first_run:last_run]],
            page.parents.get(place, []),
            page.sources[place],
        )
        start, first_run = stop, last_run
