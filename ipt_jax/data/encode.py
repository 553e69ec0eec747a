"""Documents as tokens: ids, the ranges of them that are targets, and how much of its text each token covers.

A document's segments are tokenized one by one: the first text of an example as a text's start, later ones as going on
from it, so that a prompt's tokens are a prefix of the training row's. Control tokens come from control segments; a
document without any gets BOS and EOS as its input says. Every text token, and the EOS, is a target where its segment
says so; BOS never is. Documents are taken in batches, because one call a document costs the tokenizer its speed.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ipt_jax.corpus.records import Document, Segment
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.tokenizer import Tokenizer

BOS, EOS = Segment(control="bos"), Segment(control="eos")
Dtype = Literal["uint16", "uint32"]
ARRAY_CODES: dict[Dtype, str] = {"uint16": "H", "uint32": "I"}  # array() reads a list of ids in half of numpy's time
TOKEN_TYPES: dict[Dtype, str] = {"uint16": "<u2", "uint32": "<u4"}  # as they stand in records


class TokenRow(NamedTuple):
    """Ids; ranges of them that are targets; the characters that each covers (of raw documents; control tokens none)."""

    tokens: np.ndarray
    loss_runs: list[tuple[int, int]]
    characters: np.ndarray | None


class Encoded(NamedTuple):
    """One piece of text: its ids as a list, as the tokenizer gives them, and as an array."""

    ids: list[int]
    tokens: np.ndarray


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, *, bos: bool = True, eos: bool = True
) -> Iterator[TokenRow]:
    """The tokens of each document. `bos` and `eos` act only where a document has no control segment."""
    segmented = [_with_controls(document.segments, bos, eos) for document in documents]
    first: list[str] = []
    later: list[str] = []
    for segments in segmented:
        for segment, continuing in _texts(segments):
            (later if continuing else first).append(segment.text)
    dtype = token_dtype(tokenizer)
    firsts, laters = _encode(first, tokenizer, dtype, False), _encode(later, tokenizer, dtype, True)
    for document, segments in zip(documents, segmented, strict=True):
        pieces = [next(laters if continuing else firsts) for _, continuing in _texts(segments)]
        yield _row(document, segments, pieces, tokenizer)


def token_dtype(tokenizer: Tokenizer) -> Dtype:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _with_controls(segments: list[Segment], bos: bool, eos: bool) -> list[Segment]:
    if any(segment.control for segment in segments):
        return segments
    return [BOS] * bos + segments + [EOS] * eos


def _texts(segments: list[Segment]) -> Iterator[tuple[Segment, bool]]:
    """The segments that hold text, and whether each goes on from a former one of its example."""
    continuing = False
    for segment in segments:
        if segment.control:
            continuing = segment.control == "eos"
        elif segment.text:
            yield segment, continuing
            continuing = True


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: Dtype, continuing: bool) -> Iterator[Encoded]:
    if not texts:
        return
    for ids in tokenizer.encode_batch(texts, continuing):
        yield Encoded(ids, np.frombuffer(array(ARRAY_CODES[dtype], ids), dtype))


def _row(document: Document, segments: list[Segment], pieces: list[Encoded], tokenizer: Tokenizer) -> TokenRow:
    """Lays out the segments' tokens in order."""
    parts: list[np.ndarray] = []
    covered: list[np.ndarray] = []
    runs: list[tuple[int, int]] = []
    texts = iter(zip(_texts(segments), pieces, strict=True))
    end = 0
    for segment in segments:
        if segment.control:
            parts.append(_control(segment.control, tokenizer, document))
            covered.append(np.zeros(1, np.uint32))
        elif segment.text:
            (_, continuing), piece = next(texts)
            parts.append(piece.tokens)
            if document.kind == "raw":
                covered.append(tokenizer.characters(segment.text, *piece, continuing=continuing))
        else:
            continue
        start, end = end, end + len(parts[-1])
        if segment.loss and segment.control != "bos":
            _add_run(runs, start, end)
    if not parts:
        return TokenRow(np.zeros(0, token_dtype(tokenizer)), runs, None)
    characters = np.concatenate(covered) if document.kind == "raw" else None
    return TokenRow(np.concatenate(parts, dtype=token_dtype(tokenizer)), runs, characters)


def _control(control: str, tokenizer: Tokenizer, document: Document) -> np.ndarray:
    found = tokenizer.bos_id if control == "bos" else tokenizer.eos_id
    if found is None:
        raise UserError(
            f"document {document.id!r} holds a {control} control, but the tokenizer has none; give one that has"
        )
    return np.array([found], token_dtype(tokenizer))


def _add_run(runs: list[tuple[int, int]], start: int, stop: int) -> None:
    if start == stop:
        return
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], stop)
    else:
        runs.append((start, stop))
