"""`max_document_tokens`: no rendered document exceeds the row, every text stays, what is left out is counted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from renderkit import EVEN, PAIRS, group, odd_group, recipe
from synthkit import write_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Document, SynthGroup
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.encode import tokenize_documents
from synth.format.wire import wire_pair
from synth.render.documents import Renderer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token a byte."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def render(
    one: SynthGroup, tokenizer: Tokenizer, limit: int | None, **fields: object
) -> tuple[list[Document], Counter[str], Counter[str]]:
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    settings = recipe(tokenizer="tokenizer", max_document_tokens=limit, **fields)
    return Renderer(settings, counts, dropped, tokenizer).documents(one), counts, dropped


def sizes(documents: list[Document], tokenizer: Tokenizer) -> list[int]:
    return [len(row.tokens) for row in tokenize_documents(documents, tokenizer)]


def test_texts_that_do_not_fit_together_become_documents(tokenizer: Tokenizer) -> None:
    one = group("g", [PAIRS[:1], PAIRS[1:2], PAIRS[2:3]], ["A text. " * 20] * 3)
    layout = {"layouts": {"text_first": 1.0}}
    (whole,), _, _ = render(one, tokenizer, None, **layout)
    [size] = sizes([whole], tokenizer)
    assert render(one, tokenizer, size, **layout)[0] == [whole]
    documents, counts, dropped = render(one, tokenizer, size - 1, **layout)
    assert [document.id for document in documents] == ["g", "g.part1"]
    assert [len(document.parents) for document in documents] == [2, 1]
    assert (counts["split_for_row"], counts["pairs"], dropped) == (1, 3, Counter())
    assert max(sizes(documents, tokenizer)) < size


def test_a_text_too_long_alone_loses_its_last_pairs(tokenizer: Tokenizer) -> None:
    one = group("g", [PAIRS], ["A text. " * 20])
    layout = {"layouts": {"text_first": 1.0}}
    (whole,), _, _ = render(one, tokenizer, None, **layout)
    [size] = sizes([whole], tokenizer)
    (document,), counts, dropped = render(one, tokenizer, size - 1, **layout)
    assert (counts["pairs"], dropped) == (3, Counter(row_full=1))
    assert "Who built the hall?" in document.text and "Which is old?" not in document.text


def test_a_text_without_room_for_a_pair_stays_raw_in_parts(tokenizer: Tokenizer) -> None:
    text = "One sentence here. Another one there! " * 5
    documents, counts, dropped = render(group("g", [PAIRS], [text]), tokenizer, 60)
    assert {document.kind for document in documents} == {"raw"}
    assert " ".join(document.text for document in documents) == text.strip()
    assert [document.id for document in documents[:2]] == ["g.raw0", "g.raw0.part1"]
    starts = [parent.start for document in documents for parent in document.parents]
    ends = [parent.end for document in documents for parent in document.parents]
    assert starts == [3, *ends[:-1]] and ends[-1] == 3 + len(text)
    assert (counts["pairs"], dropped) == (0, Counter(row_full=4))
    assert max(sizes(documents, tokenizer)) <= 60


@given(st.integers(0, 10**6), st.integers(40, 700), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=300, deadline=None)
def test_no_document_exceeds_the_row(tokenizer: Tokenizer, number: int, limit: int, one_shot: float) -> None:
    one = odd_group(random.Random(number), f"g{number}")
    fields = {"layouts": EVEN, "one_shot": one_shot}
    documents, counts, dropped = render(one, tokenizer, limit, **fields)
    unlimited, free, _ = render(one, tokenizer, None, **fields)
    assert all(size <= limit for size in sizes(documents, tokenizer))
    assert len({document.id for document in documents}) == len(documents)
    assert counts["pairs"] + dropped["row_full"] == free["pairs"]
    covered = sorted((parent.id, parent.start, parent.end) for one in documents for parent in one.parents)
    asked = sorted((parent.id, parent.start, parent.end) for one in unlimited for parent in one.parents)
    assert {name for name, *_ in asked} <= {name for name, *_ in covered} | blank(one)
    for name in {name for name, *_ in covered}:
        spans = [(start, end) for other, start, end in covered if other == name]
        assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    if all(size <= limit for size in sizes(unlimited, tokenizer)):
        assert documents == unlimited


def blank(one: SynthGroup) -> set[str]:
    return {text.raw_id for text in one.texts if not text.text.strip()}


def test_a_limit_needs_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_document_tokens: requires a tokenizer"):
        recipe(max_document_tokens=2048)


def test_a_detached_pair_that_exceeds_the_row_is_counted(tokenizer: Tokenizer) -> None:
    counts, dropped = Counter(), Counter()
    long = wire_pair("Why?", "rain " * 200)
    fields = recipe(detached=1, tokenizer="unused", max_document_tokens=32)
    documents = Renderer(fields, counts, dropped, tokenizer).documents(group("g", [[long]]))
    assert [doc.kind for doc in documents] == ["raw"] and (counts["pairs"], dropped["row_full"]) == (0, 1)
