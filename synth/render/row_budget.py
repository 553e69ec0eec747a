"""Documents that fit a pre-training row: which texts of a group share one, and which pairs find no room.

Guaranteed: every text stays, in order; texts of one document are neighbours; a pair is shown whole or not at all, and
what is left out is counted. Tokens are counted as `ipt tokenize` will: the document's text at once, BOS and EOS added.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ipt_jax.corpus.records import Document
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.format.truncate import Span, split_text
from synth.render.layout import Shot

Fits = Callable[[int, Sequence[Shot]], bool]


def fit_rows(shots: Sequence[Shot], fits: Fits) -> list[list[Shot]]:
    """The group's texts as runs, as many texts in a run as fit together; `fits` tells of the n-th run whether it fits.

    A text that is too long alone loses its last pairs, all of them where there is no room for one. A run without pairs
    is no augmented document and is taken to fit.
    """
    rows: list[list[Shot]] = []
    rest = list(shots)
    while rest:
        number, count = len(rows), 1
        rest[0] = with_fewer_pairs(rest[0], number, fits)
        while count < len(rest) and fits(number, rest[: count + 1]):
            count += 1
        rows.append(rest[:count])
        rest = rest[count:]
    return rows


def with_fewer_pairs(shot: Shot, number: int, fits: Fits) -> Shot:
    """The text with as many of its pairs as fit, the first ones first."""
    for count in range(len(shot.pairs), 0, -1):
        fewer = replace(shot, pairs=shot.pairs[:count])
        if fits(number, [fewer]):
            return fewer
    return replace(shot, pairs=[])


def pairs_of(shots: Sequence[Shot]) -> int:
    return sum(len(shot.pairs) for shot in shots)


def raw_parts(text: str, tokenizer: Tokenizer | None, max_tokens: int | None) -> list[tuple[Span, str]]:
    """The spans of a text that make a raw document each, and their words; one, unless a row is too short for it."""
    if tokenizer is None or max_tokens is None or text_tokens(text, tokenizer) <= max_tokens:
        return [((0, len(text)), text)]
    spans = split_text(text, tokenizer, max_tokens, lambda part, _: text_tokens(part.strip(), tokenizer))
    return [(span, text[slice(*span)].strip()) for span in spans]


def count_tokens(document: Document, tokenizer: Tokenizer | None) -> int:
    """Tokens of the document with the BOS and EOS that `ipt tokenize` will put around it."""
    return 0 if tokenizer is None else text_tokens(document.text, tokenizer)


def text_tokens(text: str, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(text)) + (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None)
