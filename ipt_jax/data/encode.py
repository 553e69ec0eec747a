"""Documents as tokens: ids, the ranges of them that are targets, and how much of its text each token covers.

A document's segments are tokenized one by one: the first text of an example as a text's start, later ones as going on
from it, so that a prompt's tokens are a prefix of the training row's. Control tokens come from control segments; a
document without any gets BOS and EOS as its input says. Every text token, and the EOS, is a target where its segment
says so; BOS never is. Documents are taken in batches, because one call a document costs the tokenizer its speed.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise, repeat
from typing import NamedTuple

import numpy as np

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Document, Segment, TokenType
from ipt_jax.corpus.tokenizer import Tokenizer
from ipt_jax.data.exclude_converted import ranges

BOS, EOS = Segment(control="bos"), Segment(control="eos")


class TokenRow(NamedTuple):
    """Ids; ranges of them that are targets; the characters that each covers (of raw documents; control tokens none)."""

    tokens: np.ndarray
    loss_runs: list[tuple[int, int]]
    characters: np.ndarray | None


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, *, bos: bool = True, eos: bool = True
) -> Iterator[TokenRow]:
    """The tokens of each document. `bos` and `eos` act only where a document has no control segment."""
    segmented = [list(_pieces(document.segments, bos, eos)) for document in documents]
    texts: dict[str, list[str]] = {"first": [], "later": []}
    for pieces in segmented:
        for segment, what in pieces:
            if segment.text:
                texts[what].append(segment.text)
    raw = any(document.kind == "raw" for document in documents)
    pool = _Pool(texts["first"], texts["later"], tokenizer, raw)
    rows = [pool.lay(document, pieces) for document, pieces in zip(documents, segmented, strict=True)]
    tokens, characters = pool.laid()
    end = 0
    for document, (size, runs) in zip(documents, rows, strict=True):
        start, end = end, end + size
        yield TokenRow(tokens[start:end], runs, characters[start:end] if document.kind == "raw" and size else None)


def token_dtype(tokenizer: Tokenizer) -> TokenType:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _pieces(segments: list[Segment], bos: bool, eos: bool) -> Iterator[tuple[Segment, str]]:
    """The segments that make tokens, each with what it is: `bos`, `eos`, a `first` text of its example or a `later`."""
    if not any(segment.control for segment in segments):
        segments = [BOS] * bos + segments + [EOS] * eos
    continuing = False
    for segment in segments:
        if segment.control:
            continuing = segment.control == "eos"
            yield segment, segment.control
        elif segment.text:
            yield segment, "later" if continuing else "first"
            continuing = True


class _Pool:
    """The tokens of all texts of a batch, encoded in one call, and of the control tokens; laid out piece by piece."""

    def __init__(self, first: list[str], later: list[str], tokenizer: Tokenizer, raw: bool):
        """`raw`: whether characters are wanted."""
        dtype = token_dtype(tokenizer)
        controls = {
            name: one for name, one in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)) if one is not None
        }
        found = [np.array(list(controls.values()), dtype)]
        covered = [np.zeros(len(controls), np.uint32)]
        self._places: dict[str, Iterator[tuple[int, int]]] = {
            name: repeat((place, place + 1)) for place, name in enumerate(controls)
        }
        for name, texts in (("first", first), ("later", later)):
            batch = tokenizer.encode_batch(texts, name == "later") if texts else []
            sizes = [len(ids) for ids in batch]
            tokens = np.fromiter(chain.from_iterable(batch), dtype, count=sum(sizes))  # half of np.array's time
            if raw and texts:  # no other text needs characters
                covered.append(tokenizer.characters(texts, batch, tokens, name == "later"))
            self._places[name] = pairwise(accumulate(sizes, initial=sum(map(len, found))))
            found.append(tokens)
        self._tokens = np.concatenate(found)
        self._characters = np.concatenate(covered) if raw else None
        self._laid: list[tuple[int, int]] = []

    def lay(self, document: Document, pieces: list[tuple[Segment, str]]) -> tuple[int, list[tuple[int, int]]]:
        """Lays a document's tokens behind those of the one before: how many they are, and which are targets."""
        runs: list[tuple[int, int]] = []
        end = 0
        for segment, what in pieces:
            if what not in self._places:
                raise UserError(
                    f"document {document.id!r} holds a {what} control, but the tokenizer has none; give one that has"
                )
            place = next(self._places[what])
            self._laid.append(place)
            start, end = end, end + place[1] - place[0]
            if segment.loss and what != "bos":
                _add_run(runs, start, end)
        return end, runs

    def laid(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens laid out, and the characters that each covers."""
        places = ranges(*np.array(self._laid, np.int64).reshape(-1, 2).T)
        return self._tokens[places], np.zeros(0) if self._characters is None else self._characters[places]


def _add_run(runs: list[tuple[int, int]], start: int, stop: int) -> None:
    if start == stop:
        return
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], stop)
    else:
        runs.append((start, stop))
