"""Documents as tokens: ids, the ranges of ids that are targets, and the characters that each token covers.

The segments of a document are tokenized one by one: the first text of an example as the start of a text, later ones as
its continuation, so that the tokens of a prompt are a prefix of the training row. Control tokens come from control
segments; a document without any gets BOS and EOS as its input says. Tokens of text and EOS are targets if their segment
says so; BOS never is. Documents are encoded in batches, because one call per document makes the tokenizer slow.
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
    """Ids, target ranges, and the characters that each id of a raw document covers (control tokens none)."""

    tokens: np.ndarray
    loss_runs: list[tuple[int, int]]
    characters: np.ndarray | None


class _Encoded(NamedTuple):
    """Control tokens and the tokens of all texts of a batch. `places`: for each role the ranges of its segments."""

    tokens: np.ndarray
    characters: np.ndarray | None
    places: dict[str, Iterator[tuple[int, int]]]


def tokenize_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, *, bos: bool = True, eos: bool = True
) -> Iterator[TokenRow]:
    """The tokens of each document. `bos` and `eos` act on documents without control segments."""
    segmented = [list(_segments(document.segments, bos, eos)) for document in documents]
    raw = any(document.kind == "raw" for document in documents)
    encoded = _encode(list(chain.from_iterable(segmented)), tokenizer, raw)
    places: list[tuple[int, int]] = []
    targets: list[tuple[int, list[tuple[int, int]]]] = []
    for document, segments in zip(documents, segmented, strict=True):
        runs: list[tuple[int, int]] = []
        end = 0
        for segment, role in segments:
            if role not in encoded.places:
                raise UserError(
                    f"document {document.id!r} has a {role} control, but the tokenizer has no {role}; "
                    "set a tokenizer with one"
                )
            places.append(next(encoded.places[role]))
            start, end = end, end + places[-1][1] - places[-1][0]
            if segment.loss and role != "bos" and start < end:
                joined = runs.pop()[0] if runs and runs[-1][1] == start else start
                runs.append((joined, end))
        targets.append((end, runs))
    order = ranges(*np.array(places, np.int64).reshape(-1, 2).T)
    tokens = encoded.tokens[order]
    characters = None if encoded.characters is None else encoded.characters[order]
    end = 0
    for document, (size, runs) in zip(documents, targets, strict=True):
        start, end = end, end + size
        covered = characters[start:end] if characters is not None and document.kind == "raw" and size else None
        yield TokenRow(tokens[start:end], runs, covered)


def token_dtype(vocab_size: int) -> TokenType:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _segments(segments: list[Segment], bos: bool, eos: bool) -> Iterator[tuple[Segment, str]]:
    """The segments that make tokens, each with its role: bos, eos, `first` text of its example or a `later` one."""
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


def _encode(segments: list[tuple[Segment, str]], tokenizer: Tokenizer, raw: bool) -> _Encoded:
    """Encodes the texts of each role in one call. `raw`: whether characters are needed."""
    dtype = token_dtype(tokenizer.vocab_size)
    controls = {name: one for name, one in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)) if one is not None}
    found, covered = [np.array(list(controls.values()), dtype)], [np.zeros(len(controls), np.uint32)]
    places: dict[str, Iterator[tuple[int, int]]] = {name: repeat((i, i + 1)) for i, name in enumerate(controls)}
    for name in ("first", "later"):
        texts = [segment.text for segment, role in segments if role == name]
        batch = tokenizer.encode_batch(texts, name == "later") if texts else []
        sizes = [len(ids) for ids in batch]
        tokens = np.fromiter(chain.from_iterable(batch), dtype, count=sum(sizes))  # twice as fast as np.array
        if raw and texts:
            covered.append(tokenizer.characters(texts, batch, tokens, name == "later"))
        places[name] = pairwise(accumulate(sizes, initial=sum(map(len, found))))
        found.append(tokens)
    return _Encoded(np.concatenate(found), np.concatenate(covered) if raw else None, places)
