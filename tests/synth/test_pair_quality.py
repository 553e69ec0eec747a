"""What `synth eval` measures, in figures that were computed by hand, and its intervals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from extras import need

from ipt_jax.corpus.records import GroupText, Pair
from synth.evaluate.quality import (
    AnswerLoss,
    EvalTask,
    ScoredText,
    answer_sums,
    diversity,
    estimate,
    loss_sums,
    match_pairs,
    mean_estimate,
    pair_sums,
    rouge_l,
    score_sets,
)
from synth.format.parser import rejected
from synth.format.wire import wire_pair

TEXT = "Anna walks to the old mill. Ben bakes white bread."


def scored(pairs: list[Pair], text: str = TEXT, name: str = "t", source: str = "set") -> GroupText:
    return GroupText(name, 0, len(text), text, source, pairs, 1, 0, 0, 0, "stop")


def test_answers_are_compared_as_squad_does() -> None:
    gold = [wire_pair("Where?", "The old mill."), wire_pair("Who?", "Ben"), wire_pair("What?", "white bread")]
    sums = answer_sums(["to an old mill", "ben", "yes"], gold)
    # {to, old, mill} against {old, mill}: 2 · 2 / 5; case, articles and punctuation do not count
    assert sums == {"f1": (pytest.approx(0.8 + 1 + 0), 3), "exact_match": (1, 3)}


def test_answers_keep_option_and_drop_reasoning() -> None:
    gold = [wire_pair("Who?", "Ben", ["Anna", "Ben"], "He bakes.")]
    assert answer_sums(["Ben"], gold) == {"f1": (1.0, 1), "exact_match": (1, 1)}
    assert answer_sums(["!"], [wire_pair("Which?", "?")]) == {"f1": (0.0, 1), "exact_match": (0, 1)}
    assert answer_sums(["红色"], [wire_pair("?", "红")]) == {"f1": (pytest.approx(2 / 3), 1), "exact_match": (0, 1)}


def test_pairs_are_matched_by_an_assignment_and_not_greedily() -> None:
    """Taken greedily, the first pair would get gold 0 (F1 1.0) and leave the second pair with nothing in common."""
    pairs = [wire_pair("a b c d", "x"), wire_pair("a b", "y")]
    gold = [wire_pair("a b c d", "x"), wire_pair("c d e f", "y")]
    # questions: F1 [[1, 1/2], [2/3, 0]]; 1 + 0 < 1/2 + 2/3
    assert match_pairs(pairs, gold) == [(0, 1), (1, 0)]
    assert match_pairs([], gold) == []


def test_equal_questions_are_matched_by_their_answers() -> None:
    pairs = [wire_pair("who bakes", "Anna"), wire_pair("who bakes", "Ben")]
    assert match_pairs(pairs, [pairs[1], pairs[0]]) == [(0, 1), (1, 0)]


def test_pair_quality_of_one_text() -> None:
    pairs = [
        wire_pair("Who walks?", "Anna"),
        wire_pair("Who bakes bread?", "Carl"),
        wire_pair("Is it?", "red"),
        rejected("unclosed", "Who"),
    ]
    gold = [wire_pair("Who walks?", "Anna"), wire_pair("Who bakes?", "Ben")]
    sums = pair_sums(scored(pairs), gold)
    # matched: "who walks anna" in full; "who bakes bread carl" and "who bakes ben" share 2 words: 2 · 2 / 7
    likeness = 1 + 4 / 7
    assert sums == {
        "well_formed": (3, 4),
        "pairs_per_text": (3, 1),
        "grounded": (1.0, 3),  # only "Anna" is in the text
        "pair_f1": (pytest.approx(2 * likeness), 5),
        "pair_precision": (pytest.approx(likeness), 3),
        "pair_recall": (pytest.approx(likeness), 2),
        "rouge_l": (pytest.approx(2 * likeness), 5),
    }


def test_perfect_and_missing_pairs() -> None:
    gold = [wire_pair("Who walks?", "Anna"), wire_pair("Who bakes?", "Ben")]
    assert pair_sums(scored(gold), gold)["pair_f1"] == (4.0, 4)
    assert pair_sums(scored(gold[::-1]), gold)["rouge_l"] == (4.0, 4)
    empty = pair_sums(scored([]), gold)
    assert (empty["pair_f1"], empty["well_formed"], empty["pairs_per_text"]) == ((0, 2), (0, 0), (0, 1))


def test_rouge_l_of_known_words() -> None:
    assert rouge_l("the cat sat down".split(), "the dog sat".split()) == pytest.approx(4 / 7)  # LCS "the sat"
    assert rouge_l("a b c".split(), "c b a".split()) == pytest.approx(1 / 3)
    assert rouge_l([], ["a"]) == rouge_l(["a"], []) == rouge_l(["a"], ["b"]) == 0


@pytest.mark.extra
def test_rouge_l_is_that_of_rouge_score() -> None:
    scorer = need("rouge_score.rouge_scorer", extra="evals").RougeScorer(["rougeL"])
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = ([f"w{word}" for word in rng.integers(0, 6, rng.integers(1, 12))] for _ in range(2))
        expected = scorer.score(" ".join(other), " ".join(one))["rougeL"].fmeasure
        assert rouge_l(one, other) == pytest.approx(expected)


def test_losses_are_nats_per_token_and_gains_are_differences() -> None:
    sums = loss_sums([AnswerLoss(none=6.0, other=5.0, own=2.0, tokens=2), AnswerLoss(3.0, 3.5, 3.0, 1)])
    assert sums == {
        "loss_none": (9.0, 3),
        "loss_other": (8.5, 3),
        "loss_own": (5.0, 3),
        "gain_over_none": (4.0, 3),
        "gain_over_other": (3.5, 3),
    }


def test_diversity_counts_questions() -> None:
    pairs = [
        wire_pair("Who sees Anna?", "a"),
        wire_pair("who sees  Anna?", "b"),
        wire_pair("Who sees Ben?", "c", ["c", "d"]),
        wire_pair("Why?", "e", rationale="f"),
    ]
    assert diversity(pairs) == {
        "distinct_1": 0.5,  # who, sees, anna, ben, why of 10 words
        "distinct_2": 0.5,  # who sees, sees anna, sees ben of 6
        "distinct_3": pytest.approx(2 / 3, abs=1e-4),
        "repeated_questions": 0.25,
        "formats": {"free": 2, "choice": 1, "free_cot": 1},
        "first_words": {"who": 3, "why": 1},
    }
    nothing = diversity([])
    assert (nothing["distinct_1"], nothing["repeated_questions"], nothing["formats"]) == (None, None, {})


# ---- intervals


def test_intervals_cover_the_true_value_as_often_as_they_say() -> None:
    """200 data sets of 60 texts with a known ratio: about 95% of the intervals hold it."""
    rng = np.random.default_rng(5)
    covered = 0
    for number in range(200):
        sizes = rng.integers(1, 6, 60)
        texts = [{"f1": (float(rng.binomial(size, 0.3)), float(size))} for size in sizes]
        low, high = estimate(texts, 0, str(number)).rounded()["intervals"]["f1"]
        covered += low <= 0.3 <= high
    assert 176 <= covered <= 199  # 190 expected, standard deviation 3; percentile intervals are a little narrow


def test_a_ratio_weighs_texts_by_their_questions() -> None:
    found = estimate([{"f1": (1.0, 1.0)}, {"f1": (0.0, 3.0)}], 0, "set").rounded()
    assert found["f1"] == 0.25
    assert found["intervals"]["f1"] == [0.0, 1.0]


def test_equal_texts_have_no_width_and_one_text_has_no_interval() -> None:
    assert estimate([{"f1": (1.0, 2.0)}] * 9, 0, "set").rounded()["intervals"]["f1"] == [0.5, 0.5]
    alone = estimate([{"f1": (1.0, 2.0), "rouge_l": (0.0, 0.0)}], 0, "set").rounded()
    assert alone == {"f1": 0.5, "rouge_l": None, "intervals": {"f1": None, "rouge_l": None}}


def test_intervals_follow_the_seed_and_the_name() -> None:
    texts = [{"f1": (float(number % 3), 2.0)} for number in range(20)]
    drawn = {key: tuple(estimate(texts, *key).replicates["f1"]) for key in [(0, "a"), (1, "a"), (0, "b")]}
    assert drawn[0, "a"] == tuple(estimate(texts, 0, "a").replicates["f1"])
    assert len(set(drawn.values())) == 3


def test_means_over_sets_weigh_sets_equally() -> None:
    many = estimate([{"f1": (1.0, 1.0), "grounded": (1.0, 1.0)}] * 100, 0, "many")
    few = estimate([{"f1": (0.0, 1.0)}] * 2, 0, "few")
    assert mean_estimate([many, few]).rounded() == {"f1": 0.5, "intervals": {"f1": [0.5, 0.5]}}


def test_seen_and_unseen_sets_have_means_of_their_own() -> None:
    gold = [wire_pair("Who walks?", "Anna")]
    texts = [
        ScoredText(scored(gold, name=name, source=source), gold, answers, None)
        for name, source, answers in [("1", "a", ["Anna"]), ("2", "a", ["Anna"]), ("1", "b", ["Ben"]), ("1", "c", None)]
    ]
    tasks = [EvalTask(name, seen, [], Counter()) for name, seen in [("a", True), ("b", False), ("c", False)]]
    found = score_sets(tasks, texts, seed=0)
    assert {name: one["f1"] for name, one in found["sets"].items()} == {"a": 1.0, "b": 0.0, "c": None}
    assert (found["seen"]["f1"], found["unseen"]["f1"], found["unseen"]["well_formed"]) == (1.0, None, 1.0)
    assert found["sets"]["a"]["intervals"]["f1"] == [1.0, 1.0]
