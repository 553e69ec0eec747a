"""Token shards: documents written in pages with their side files, and read back.

A page is one ArrayRecord record of about 8,192 tokens of consecutive documents, or of one longer document. The index
beside the shard says which page holds a document. Pages are not compressed: it would save a quarter of the bytes and
make a read three times as slow.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import NewShard
from ipt_jax.corpus.records import KIND_CODES, KINDS, TokenDocument, TokenPage, decode, encode
from ipt_jax.corpus.shards import Shards
from ipt_jax.data.token_index import TokenIndexWriter, id_key

PAGE_TOKENS = 1 << 13
# A document of a page: code of its kind (KIND_CODES), number of loss runs and tokens, key of its id (data.token_index).
ROW = np.dtype([("kind", "<u4"), ("runs", "<u4"), ("tokens", "<u4"), ("id", "<u8")])
RECORDS = "pages 1"  # format of the records, part of the identity of a directory: incremented when it changes


class Written(NamedTuple):
    """A document, and the characters that each token covers if it is raw."""

    document: TokenDocument
    characters: np.ndarray | None = None


def token_pages(documents: Iterable[Written], shard: NewShard) -> Iterator[bytes]:
    """Yields the records of a shard and writes its side files."""
    side = TokenIndexWriter(shard)
    page, first, tokens = 0, 0, 0
    held: list[TokenDocument] = []
    for document, characters in documents:
        size = len(document.tokens) // np.dtype(document.dtype).itemsize
        if held and tokens + size > PAGE_TOKENS:
            yield encode_page(first, held)
            page, first, tokens, held = page + 1, first + len(held), 0, []
        side.add(document.id, page, size, characters, document.parents)
        held.append(document)
        tokens += size
    if held:
        yield encode_page(first, held)
    shard.side_files = side.close()


def encode_page(first: int, documents: list[TokenDocument]) -> bytes:
    """The record of a page whose first document has number `first` in its shard."""
    width = np.dtype(documents[0].dtype).itemsize
    rows = [(KIND_CODES[one.kind], len(one.loss_runs), len(one.tokens) // width, id_key(one.id)) for one in documents]
    page = TokenPage(
        first=first,
        dtype=documents[0].dtype,
        tokens=b"".join([one.tokens for one in documents]),
        rows=np.array(rows, ROW).tobytes(),
        runs=np.array([run for one in documents for run in one.loss_runs], "<u4").tobytes(),
        ids=[one.id for one in documents],
        sources=[one.source for one in documents],
        parents={place: one.parents for place, one in enumerate(documents) if one.parents},
    )
    return encode(page)


def open_token_shards(path: str | Path, *, verify: bool = True) -> Shards:
    """The shards of an output directory of `ipt tokenize`. Raises UserError if another version wrote it."""
    shards = Shards(path, "tokenize", verify=verify)
    if (found := shards.manifest.identity.get("records")) != RECORDS:
        raise UserError(
            f"{path}: its records are {found or 'single documents'!r}, this version reads {RECORDS!r}; "
            "delete it and rerun ipt tokenize"
        )
    return shards


def read_token_documents(path: str | Path) -> Iterator[TokenDocument]:
    """The documents of a token directory, in order. Raises UserError for damage."""
    for record in open_token_shards(path):
        yield from documents_of(decode(record, TokenPage))


def documents_of(page: TokenPage) -> Iterator[TokenDocument]:
    rows, runs = np.frombuffer(page.rows, ROW), np.frombuffer(page.runs, "<u4").reshape(-1, 2).tolist()
    width, start, run = np.dtype(page.dtype).itemsize, 0, 0
    for place, (kind, run_count, tokens, _) in enumerate(rows.tolist()):
        yield TokenDocument(
            page.ids[place],
            KINDS[kind - 1],
            page.dtype,
            page.tokens[start : start + tokens * width],
            [(low, high) for low, high in runs[run : run + run_count]],
            page.parents.get(place, []),
            page.sources[place],
        )
        start, run = start + tokens * width, run + run_count
