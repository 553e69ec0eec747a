"""Where texts and pairs stand in a rendered document: spans cut out the strings, for all layouts and all inputs."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from renderkit import EVEN, PAIRS, group, odd_group, recipe, render
from scipy.stats import chisquare

from ipt_jax.corpus.records import Document, SynthGroup, decode, encode
from synth.format.parser import gold_option, read_format
from synth.format.wire import final_answer, question_stem, wire_pair
from synth.render.documents import Renderer
from synth.render.layout import Fragment, SpanLabel, finish, join


def test_finish_literal() -> None:
    pieces = [
        Fragment("Q: "),
        Fragment("Why?", SpanLabel("question", 0, 2)),
        Fragment(" A: "),
        Fragment("Rain", SpanLabel("answer", 0, 2)),
    ]
    text = [Fragment("It rains.", SpanLabel("text", 0))]
    words, spans = finish(join("\n", [text, [], pieces]))
    assert words == "It rains.\nQ: Why? A: Rain"
    assert spans == {"text": [[0, 0, 9]], "question": [[0, 2, 13, 17]], "answer": [[0, 2, 21, 25]]}


@pytest.mark.parametrize("layout", list(EVEN))
def test_spans_literal(layout: str) -> None:
    one = group("g", [[PAIRS[0], PAIRS[1]], [PAIRS[2]]])
    [document] = render(one, layouts={layout: 1})
    cut = {
        part: {tuple(owner): document.text[start:end] for *owner, start, end in found}
        for part, found in document.meta["spans"].items()
    }
    assert cut["text"] == {(0,): "Text 0 of g.", (1,): "Text 1 of g."}
    assert cut["question"] == {(0, 0): "Who built the hall?", (0, 1): "Where is it?", (1, 0): "How many rooms?"}
    assert cut["rationale"] == {(1, 0): "Two and two."}
    assert (cut["answer"][0, 0], cut["answer"][1, 0]) == ("Ann", "4")
    assert all(option in cut["options"][0, 1] for option in ("Oslo", "Rome", "Bern"))


def check_document(document: Document, one: SynthGroup) -> int:
    """Every span gives back its string; returns the number of pairs shown."""
    assert document.text.strip()
    if document.kind == "raw":
        return 0
    spans, places = document.meta["spans"], [text.raw_id for text in one.texts]
    texts = [one.texts[places.index(parent.id)] for parent in document.parents]
    for text, start, end in spans.get("text", []):
        assert document.text[start:end] == texts[text].text.strip()
    shown = [(text, pair) for text, pair, *_ in spans["question"]]
    assert len(set(shown)) == len(shown)
    assert shown == sorted(shown) == sorted((text, pair) for text, pair, *_ in spans["answer"])
    for part, found in spans.items():
        for *owner, start, end in found if part != "text" else []:
            stored = texts[owner[0]].pairs[owner[1]]
            pair, cut = read_format(stored.question, stored.answer), document.text[start:end]
            assert cut
            match part:
                case "question":
                    assert cut == question_stem(pair).strip()
                case "rationale":
                    assert cut == pair.rationale.strip()
                case "answer" if not pair.options:
                    assert cut == final_answer(pair)
                case "options":
                    assert all(option in cut for option in pair.options)
    edges = sorted(span[-2:] for found in spans.values() for span in found)
    assert all(before[1] <= after[0] for before, after in zip(edges, edges[1:], strict=False)), "spans do not overlap"
    return len(shown)


@pytest.mark.parametrize("layout", list(EVEN))
def test_odd_pairs_never_raise_and_spans_give_them_back(layout: str) -> None:
    """Renders what no parser would have accepted, too: each pair is shown where its spans say, or counted."""
    stream = random.Random(f"odd {layout}")
    shown = lost = given_pairs = 0
    for number in range(1500):
        one = odd_group(stream, f"g{number}")
        counts, dropped = Counter(), Counter()
        chosen = recipe(layouts={layout: 1}, one_shot=0.3)
        for document in Renderer(chosen, counts, dropped).documents(one):
            assert decode(encode(document), Document) == document
            shown += check_document(document, one)
        lost += dropped.total() - dropped["blank_text"]
        given_pairs += sum(len(text.pairs) for text in one.texts)
    assert shown + lost == given_pairs
    assert shown > 1500
    assert lost > 1500


WORDS = st.text(st.characters(codec="utf-8"), max_size=30)
NAMES = WORDS.filter(str.strip)


@given(st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=4), WORDS, st.integers(0, 99), st.sampled_from([*EVEN]))
@settings(max_examples=200)
def test_any_words_are_found_at_their_spans(pairs: list[tuple[str, str]], text: str, seed: int, layout: str) -> None:
    one = group("g", [[wire_pair(question, answer) for question, answer in pairs]], [text])
    for document in render(one, seed=seed, layouts={layout: 1}):
        check_document(document, one)


def test_answer_is_the_label_or_text_of_the_gold_line() -> None:
    """In whatever style and order: the line that holds the answer holds the right option, and no other line does."""
    pair = wire_pair("Where is it?", "555", ["444", "555", "666", "777"])
    assert gold_option(pair) == 1
    for number in range(300):
        [document] = render(group(f"g{number}", [[pair]]))
        spans = document.meta["spans"]
        [[_, _, start, end]], [[_, _, first, last]] = spans["options"], spans["answer"]
        answer = document.text[first:last]
        listed = document.text[start:end].replace(" / ", "\n").replace(" (", "\n(").splitlines()
        assert [answer in line for line in listed].count(True) == 1
        assert "555" in next(line for line in listed if answer in line)


@pytest.mark.parametrize("stored", [0, 3])
def test_the_right_option_stands_anywhere(stored: int) -> None:
    """Wherever it stood in the record, in a text's first pair as in its second, it is shown at each place alike."""
    options = ["111", "222", "333", "444"]
    pairs = [wire_pair(f"Which is it, {place}?", options[stored], options) for place in range(2)]
    where = [Counter[int](), Counter[int]()]
    for number in range(1500):
        [document] = render(group(f"g{number}", [pairs]), layouts=EVEN)
        for _, pair, start, end in document.meta["spans"]["options"]:
            listed = document.text[start:end]
            where[pair][sorted(options, key=listed.index).index(options[stored])] += 1
    for found in where:
        assert sorted(found) == [0, 1, 2, 3]
        assert chisquare([*found.values()]).pvalue > 1e-4
    assert chisquare([where[0][place] + where[1][place] for place in range(4)]).pvalue > 1e-4
