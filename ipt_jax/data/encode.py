"""Documents as tokens: ids, the ranges of them that are targets, and how much of its text each token covers.

A document's segments are tokenized one by one: the first text of an example as a text's start, later ones as going on
from it, so that a prompt's tokens are a prefix of the training row's. Control tokens come from control segments; a
document without any gets BOS and EOS as its input says. Every text token, and the EOS, is a target where its segment
says so; BOS never is. Documents are taken in batches, because one call a document costs the tokenizer its speed.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ipt_jax.corpus.records import Document, Segment, TokenType
from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.tokenizer import Tokenizer

BOS, EOS = Segment(control="bos"), Segment(control="eos")
NO_CHARACTERS = np.zeros(1, np.uint32)


class TokenRow(NamedTuple):
    """Ids; ranges of them that are targets; the characters that each covers (of raw documents; control tokens none)."""

    tokens: np.ndarray
    loss_runs: list[tuple[int, int]]
    characters: np.ndarray | None


class Encoded(NamedTuple):
    """One piece of text."""

    tokens: np.ndarray
    characters: np.ndarray


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
    raw = any(document.kind == "raw" for document in documents)
    firsts, laters = _encode(first, tokenizer, raw, False), _encode(later, tokenizer, raw, True)
    controls = _controls(tokenizer)
    for document, segments in zip(documents, segmented, strict=True):
        pieces = [next(laters if continuing else firsts) for _, continuing in _texts(segments)]
        yield _row(document, segments, pieces, controls)


def token_dtype(tokenizer: Tokenizer) -> TokenType:
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


def _encode(texts: list[str], tokenizer: Tokenizer, raw: bool, continuing: bool) -> Iterator[Encoded]:
    """All pieces in one call of the tokenizer. Only raw text needs characters."""
    if not texts:
        return
    batch = tokenizer.encode_batch(texts, continuing)
    dtype = token_dtype(tokenizer)
    tokens = np.fromiter(chain.from_iterable(batch), dtype, count=sum(map(len, batch)))  # half of np.array's time
    characters = tokenizer.characters(texts, batch, tokens, continuing) if raw else tokens[:0]
    start = 0
    for ids in batch:
        here = slice(start, start + len(ids))
        yield Encoded(tokens[here], characters[here])
        start = here.stop


def _controls(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The control tokens that the tokenizer has, as arrays of one."""
    found = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    return {name: np.array([one], token_dtype(tokenizer)) for name, one in found.items() if one is not None}


def _row(
    document: Document, segments: list[Segment], pieces: list[Encoded], controls: dict[str, np.ndarray]
) -> TokenRow:
    """Lays out the segments' tokens in order."""
    parts: list[np.ndarray] = []
    covered: list[np.ndarray] = []
    runs: list[tuple[int, int]] = []
    texts = iter(pieces)
    end = 0
    for segment in segments:
        if segment.control:
            if segment.control not in controls:
                raise UserError(
                    f"document {document.id!r} holds a {segment.control} control, but the tokenizer has none; "
                    "give one that has"
                )
            piece = Encoded(controls[segment.control], NO_CHARACTERS)
        elif segment.text:
            piece = next(texts)
        else:
            continue
        parts.append(piece.tokens)
        covered.append(piece.characters)
        start, end = end, end + len(piece.tokens)
        if segment.loss and segment.control != "bos":
            _add_run(runs, start, end)
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    return TokenRow(tokens, runs, np.concatenate(covered) if parts and document.kind == "raw" else None)


def _add_run(runs: list[tuple[int, int]], start: int, stop: int) -> None:
    if start == stop:
        return
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], stop)
    else:
        runs.append((start, stop))
