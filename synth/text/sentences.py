"""Where sentences end, and texts as sentences."""

from __future__ import annotations

import re

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|\n")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Sentences without the blanks around them."""
    edges = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    spans = []
    for start, end in zip(edges, edges[1:], strict=False):
        words = text[start:end]
        if words.strip():
            spans.append((start + len(words) - len(words.lstrip()), end - len(words) + len(words.rstrip())))
    return spans


def sentences(text: str) -> list[str]:
    parts, start = [], 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        if text[start:end].strip():
            parts.append(text[start:end])
        start = end
    return parts
