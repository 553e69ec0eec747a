"""Perplexity and bits per byte of plain text.

A text is scored in windows of the model's context, and every token once. BOS, or EOS if the tokenizer has no BOS,
precedes the first token and is not scored itself. Each later window begins with the token before its first one; the
last window is filled with earlier tokens. This is the rolling log-likelihood of lm-evaluation-harness 0.4.13 (backend
hf, add_bos_token=False); the names of the metrics are those of the harness, which divides by words (runs of characters
that are not white space, plus one for white space at an end) and by UTF-8 bytes of all texts together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError

Ids = list[int]


def read_text(path: Path) -> str:
    """A .txt file, which is one text."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"task {path}: no such file; set a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task {path}: cannot be read as UTF-8 text ({error}); correct the file") from error
    if not text.strip():
        raise UserError(f"task {path}: has no text; set a file with text")
    return text


def first_id(tokenizer: Any) -> int:
    """The id that precedes a text."""
    found: int | None = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if found is None:
        raise UserError("perplexity: the tokenizer has neither BOS nor EOS to precede a text; set another tokenizer")
    return found


def windows(ids: Ids, first: int, context: int) -> Iterator[tuple[Ids, Ids]]:
    """(prompt, continuation) pairs whose continuations join to `ids`; each pair has at most `context` + 1 tokens.

    The model reads all of a pair but its last token. Ids 5 6 7 8 9, first 1, context 3: (1, 5 6 7), (6 7, 8 9).
    """
    joined = [first, *ids]
    for start in range(0, len(ids), context):
        stop = min(start + context, len(ids))
        begin = start if start == 0 else stop - context
        yield joined[begin : start + 1], joined[start + 1 : stop + 1]


def text_row(text: str, logprobs: Sequence[float], tokens: int) -> dict[str, Any]:
    """What is known of one text. `logprobs`: of its windows."""
    loglikelihood, size, words = math.fsum(logprobs), len(text.encode()), len(re.split(r"\s+", text))
    return {
        "loglikelihood": loglikelihood,
        "tokens": tokens,
        "bytes": size,
        "words": words,
        "bits_per_byte": -loglikelihood / size / math.log(2),
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics over all texts: of the sums, not the mean of the texts' own."""
    loglikelihood = math.fsum(row["loglikelihood"] for row in rows)
    tokens, size, words = (sum(row[name] for row in rows) for name in ("tokens", "bytes", "words"))
    values = {
        "bits_per_byte": -loglikelihood / size / math.log(2),
        "byte_perplexity": _perplexity(loglikelihood, size),
        "word_perplexity": _perplexity(loglikelihood, words),
        "token_perplexity": _perplexity(loglikelihood, tokens),
    }
    return {
        "metric": "bits_per_byte",
        "value": values["bits_per_byte"],
        "stderr": None,
        "n": len(rows),
        "chance": None,
        "truncated": 0,
        "metrics": {name: {"value": value, "stderr": None} for name, value in values.items()},
        "loglikelihood": loglikelihood,
        "tokens": tokens,
        "bytes": size,
        "words": words,
    }


def _perplexity(loglikelihood: float, count: int) -> float:
    exponent = -loglikelihood / count
    return math.exp(exponent) if exponent < 700 else math.inf
