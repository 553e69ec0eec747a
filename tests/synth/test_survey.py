"""What a page counts and marks: distributions in literal numbers, even samples, where answers stand."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inspect import make_group, write

from ipt_jax.core.svg import Column, bar_chart, column_chart
from ipt_jax.corpus.records import Pair, encode
from ipt_jax.corpus.shards import Shards
from synth.format.parser import reject
from synth.format.wire import wire_pair
from synth.inspect.html_page import (
    HighlightedSpan,
    distribution_cards,
    evidence,
    highlighted_spans,
    length_chart,
    pairs_chart,
    score_chart,
)
from synth.inspect.statistics import GroupStatistics, category, count_groups, first_word, spread

# ---- grounds


def found(text: str, answer: str, question: str = "What?") -> tuple[str, bool] | None:
    place = evidence(text, wire_pair(question, answer))
    return place and (text[place.start : place.end], place.exact)


def test_answers_are_found_where_they_stand() -> None:
    text = "Ann and Hal went to Rome. They saw\nthe  old hall; halls of stone."
    assert found(text, "ann") == ("Ann", True)
    assert found(text, "Rome.") == ("Rome", True)
    assert found(text, "the old hall") == ("the  old hall", True)
    assert found(text, "hal") == ("Hal", True), "not inside halls"
    assert found(text, "it") is None
    assert found(text, "a boat") is None
    assert evidence("Rome Romeo", reject(wire_pair("Where?", "Rome"), "no_answer")) is None


def test_of_several_places_the_one_that_the_question_speaks_of() -> None:
    text = "Ann was born in Oslo. Later she lived in Rome. Her brother stayed in Oslo until the war."
    place = evidence(text, wire_pair("Where did her brother stay until the war?", "Oslo"))
    assert place is not None and text[: place.start].endswith("stayed in ")
    assert found(text, "The brother did not leave Oslo before the war") == (
        "Her brother stayed in Oslo until the war.",
        False,
    )


def test_grounds_that_overlap_are_cut() -> None:
    text = "the old hall in Rome"
    pairs = [
        wire_pair("What?", "the old hall"),
        wire_pair("Where is what?", "old hall in Rome"),
        wire_pair("?", "none"),
    ]
    assert highlighted_spans(text, pairs) == [
        HighlightedSpan(0, 4, [1], [], True),
        HighlightedSpan(4, 12, [1, 2], [1], True),
        HighlightedSpan(12, 20, [2], [2], True),
    ]


@given(st.text("aAnİ. \n", max_size=40), st.lists(st.text("anİß. ", min_size=1, max_size=6), max_size=3))
@settings(max_examples=100)
def test_stretches_are_in_order_and_inside(text: str, answers: list[str]) -> None:
    parts = highlighted_spans(text, [Pair("Q?", answer) for answer in answers])
    edges = [edge for part in parts for edge in (part.start, part.end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    assert all(part.start < part.end and part.numbers for part in parts)


# ---- counts


def test_survey_counts() -> None:
    pairs = [
        wire_pair("Who built it?", "Ann"),
        wire_pair("how many rooms?", "two rooms", ["two rooms", "three rooms"]),
        wire_pair("The hall stands in ____.", "Rome", rationale="It says so."),
        reject(Pair("Why?", ""), "no_answer"),
        Pair("x", "", verdict="rejected"),
    ]
    pairs[0].scores = {"grounded": 0.5, "odd": float("nan")}
    stats = GroupStatistics(total=7)
    stats.add(make_group("g", pairs))
    stats.add(make_group("h", []))
    assert (stats.groups, stats.texts, stats.accepted) == (2, 2, 3)
    assert stats.pairs_a_text == {3: 1, 0: 1}
    assert stats.answer_words == {1: 2, 2: 1}
    assert stats.first_words == {"who": 1, "how": 1, "the": 1}
    assert stats.categories == {"person": 1, "quantity": 1, "gap to fill": 1}
    assert stats.formats == {"free": 1, "choice": 1, "free_cot": 1}
    assert stats.reasons == {"no_answer": 1, "rejected": 1}
    assert stats.scores == {"grounded": [0.5]}


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How old is she?", "quantity"),
        ("How did she get there?", "manner"),
        ("“Whose hall is it?”", "person"),
        ("WHY?", "reason"),
        ("Isn't it old?", "yes or no"),
        ("Summarize the text.", "instruction"),
        ("Howard built what?", "other"),
        ("Ποιος;", "other"),
        ("In what year was it built?", "time"),
        ("In what did she believe?", "thing or fact"),
        ("", "other"),
    ],
)
def test_categories(question: str, kind: str) -> None:
    assert category(question) == kind


def test_first_words() -> None:
    assert [first_word(words) for words in ("What’s it?", "  “Who”", "?!", "1st?", "Ποιος;")] == [
        "what’s",
        "who",
        "(no word)",
        "1st",
        "ποιος",
    ]


def test_a_sample_is_spread_evenly(tmp_path: Path) -> None:
    shards = Shards(write(tmp_path / "groups", [encode(make_group(str(i), [])) for i in range(10)]))
    assert [group.id for group in spread(shards, 4)] == ["0", "2", "5", "7"]
    assert len(list(spread(shards, 99))) == 10
    stats = count_groups(shards, 4)
    assert (stats.groups, stats.total) == (4, 10)


# ---- charts


def numbers(svg: str) -> dict[str, str]:
    """What a chart says of each bar under the pointer."""
    ElementTree.fromstring(svg)
    return dict(words.split(": ", 1) for words in re.findall(r"<title>(.*?)</title>", svg))


def test_charts_say_their_numbers() -> None:
    assert numbers(bar_chart("t", [("a & b", 3), ("c", 1)], colour="c0", total=8)) == {
        "a &amp; b": "3 (37.5%)",
        "c": "1 (12.5%)",
    }
    drawn = column_chart("t", [Column("1", "one", 3), Column("2", "two", 0)], colour="c0")
    assert numbers(drawn) == {"one": "3 (100.0%)", "two": "0 (0.0%)"}
    assert 'aria-label="t: one 3; two 0"' in drawn


def test_columns_cover_every_number() -> None:
    stats = GroupStatistics(total=1)
    stats.pairs_a_text.update({0: 1, 1: 2, 90: 3})
    assert list(numbers(pairs_chart(stats.pairs_a_text)).items())[::12] == [
        ("0 pairs", "1 (16.7%)"),
        ("12 pairs", "0 (0.0%)"),
        ("24+ pairs", "3 (50.0%)"),
    ]
    stats.answer_words.update({1: 1, 7: 2, 300: 1})
    assert {name: said for name, said in numbers(length_chart(stats.answer_words)).items() if said[0] != "0"} == {
        "1 word": "1 (25.0%)",
        "6–7 words": "2 (50.0%)",
        "101–300 words": "1 (25.0%)",
    }
    scores = numbers(score_chart("s", [0.0, 0.049, 0.05, 1.0]))
    assert (len(scores), scores["0 to 0.05"], scores["0.95 to 1"]) == (20, "2 (50.0%)", "1 (25.0%)")
    assert list(numbers(score_chart("s", [-2.0, 3.0])))[0] == "-2 to -1.8"


@pytest.mark.parametrize("pairs", [[], [Pair("", "")], [Pair("?", "!", verdict="rejected")]])
def test_cards_of_little(pairs: list[Pair]) -> None:
    stats = GroupStatistics(total=1)
    stats.add(make_group("g", pairs))
    assert 1 <= len(distribution_cards(stats)) <= 5
