"""`synth verify`: what each score says in plain cases, and a stage that resumes, refuses and deletes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from extras import shared
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthkit import damage_shard, recipe, settings, shard_bytes

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Pair, SynthGroup
from synth import read_groups
from synth.config import EngineScore, TextScore
from synth.format.wire import wire_pair
from synth.generate.run import run_synth
from synth.render.documents import RenderSettings
from synth.render.run import run_render
from synth.verify import run as verify_run
from synth.verify.run import VerifySettings, run_verify
from synth.verify.text_scores import TEXT_SCORES, PreparedText, Unscored
from synth.verify.verifier import ASKED_SCORES, read_pair, word_f1

TEXT = (
    "Anna lived in Velmoor for 12 years. She walked to the old mill every morning, and she never saw the king. "
    "Her brother Tom was happy."
)
COMMAND = [sys.executable, "-c", "from synth.cli import main; main()", "verify"]
ALL = list(get_args(TextScore))
ENGINE_ALL = [*ALL, *get_args(EngineScore)]


def score(name: str, question: str, answer: str, **parts: Any) -> float:
    return TEXT_SCORES[name](PreparedText(TEXT), wire_pair(question, answer, **parts))


@pytest.mark.parametrize(
    ("name", "question", "answer", "expected"),
    [
        ("grounded", "Where did she walk?", "to the old mill", 1.0),
        ("grounded", "Where did she walk?", "to the new mill", 0.5),
        ("grounded", "What did she do?", "She walks", 1.0),  # endings do not count
        ("grounded", "Did Anna live in Velmoor?", "Yes, she did.", 1.0),  # says what the question says
        ("grounded", "Did Anna live in Paris?", "Yes.", 2 / 3),
        ("quoted", "Where?", "the old mill", 1.0),
        ("quoted", "Where?", "the mill old", 0.0),
        ("quoted", "Who?", "Tom", 1.0),
        ("located", "Where did Anna live?", "in Velmoor", 1.0),
        ("located", "Where did Anna live?", "in Paris", 0.0),
        ("located", "Who was happy in Velmoor?", "Tom", 0.5),  # three sentences away
        ("question_grounded", "Where did Anna live?", "", 1.0),
        ("question_grounded", "Where did Peter live?", "", 0.5),
        ("entities", "Who lived there?", "Anna and Peter", 0.5),
        ("entities", "How long?", "12 years", 1.0),
        ("entities", "How long?", "13 years", 0.0),
        ("entities", "Who was Peter?", "Peter was a king.", 1.0),  # the question named him
        ("entities", "Where?", "The mill. Happy people went there.", 1.0),  # a capital that opens a sentence
        ("polarity", "Was Tom happy?", "Tom was happy", 1.0),
        ("polarity", "Was Tom happy?", "Tom was not happy", 0.5),  # of 'Tom' and 'happy', one is turned round
        ("polarity", "Whom did she see?", "never saw the king", 1.0),
        ("polarity", "Whom did she see?", "saw the king", 0.0),
        ("answer_type", "How many years?", "12", 1.0),
        ("answer_type", "How many years?", "the mill", 0.0),
        ("answer_type", "Who was it?", "his brother", 1.0),
        ("answer_type", "Who was it?", "because he was happy", 0.0),
        ("answer_type", "When?", "every morning", 1.0),
        ("answer_type", "Where?", "happy", 0.0),
        ("answer_type", "Why?", "a mill", 0.0),
        ("answer_type", "Wo wohnte Anna?", "in Velmoor", 1.0),  # no English question: nothing to hold against it
        ("unrepeated", "Who?", "the old mill", 1.0),
        ("unrepeated", "Who?", "the old mill the old mill", 3 / 4),
    ],
)
def test_scores_in_plain_cases(name: str, question: str, answer: str, expected: float) -> None:
    assert score(name, question, answer) == pytest.approx(expected)


def test_reasoning_counts_half_and_the_final_answer_half() -> None:
    assert score("grounded", "Who?", "Peter", rationale="Anna walked to the mill.") == 0.5
    assert score("grounded", "Who?", "Anna", rationale="Anna walked to the mill.") == 1.0


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["Anna", "Tom"], "Tom", 1.0),
        (["Anna", "Tom"], "Tom.", 1.0),
        (["Anna", "Tom"], "Peter", 0.0),
        (["Anna", "anna"], "anna", 0.0),
    ],
)
def test_form_of_options(options: list[str], answer: str, expected: float) -> None:
    assert score("options", "Who?", answer, options=options) == expected


def test_what_cannot_be_judged_says_why() -> None:
    for name, question, answer, reason in (
        ("options", "Who?", "Tom", "no_options"),
        ("grounded", "?", "!", "no_words"),
        ("language", "1?", "2", "no_letters"),
    ):
        with pytest.raises(Unscored, match=reason):
            score(name, question, answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Wer wohnt in dem alten Haus am Fluss?", "der König und seine drei Töchter"),
        ("Où allait la jeune fille ?", "Elle allait chercher de l'eau à la rivière."),
        ("谁住在那座山上？", "老国王和他的女儿"),
    ],
)
def test_language_is_that_of_the_text(question: str, answer: str) -> None:
    own = PreparedText(f"{question} {answer}. {answer}")
    foreign, same = score("language", question, answer), TEXT_SCORES["language"](own, Pair(question, answer))
    assert foreign < 0.1 and same > 0.8
    assert score("language", "Where did she walk every morning?", "to the old mill") > 0.9
    mixed = score("language", "Where did she walk every morning?", "去了老磨坊的附近散步了很久")
    assert mixed < 0.8  # the letters of another script


@given(st.text(max_size=200), st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60), st.booleans())
@hypothesis_settings(max_examples=150, deadline=None)
def test_every_score_is_between_0_and_1_whatever_stands_there(
    text: str, question: str, answer: str, choice: bool
) -> None:
    pair = wire_pair(question, answer, [answer, "other"] if choice else None)
    found = read_pair(PreparedText(text), pair, tuple(ALL))
    assert set(found) == set(ALL)
    for name, one in found.items():
        assert isinstance(one, str) or (isinstance(one, float) and 0 <= one <= 1), (name, one)


def test_names_in_recipes_are_the_scores_that_exist() -> None:
    assert set(TEXT_SCORES) | {"combined"} == set(get_args(TextScore))
    assert set(ASKED_SCORES) == set(get_args(EngineScore)) | {"options"}


def test_word_f1() -> None:
    assert word_f1("the old mill", "Old mills.") == 1.0
    assert word_f1("the old mill", "a new mill") == 0.5
    assert word_f1("", "") == word_f1("", "mill") == 0.0


# ---- with an engine


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty texts in ten groups and four shards, some pairs of them rejected."""
    folder = tmp_path_factory.mktemp("groups")
    run_synth(settings(folder, synthesizer__faults={"malformed": 0.3}))
    return folder


def verify_settings(folder: Path, output: Path, scores: list[str], **changes: Any) -> VerifySettings:
    """A recipe over the fixture's groups; `engine=…` fields go into the synthesizer block."""
    synthesizer = {**recipe(folder)["synthesizer"], **changes.pop("synthesizer", {})}
    plain = {"groups": str(folder / "groups"), "scores": scores, "output": str(output), "synthesizer": synthesizer}
    return check_settings(VerifySettings, {**plain, **changes}, where="recipe")


def test_only_scores_are_added(groups: Path, tmp_path: Path) -> None:
    result = run_verify(verify_settings(groups, tmp_path / "out", ENGINE_ALL))
    before, after = list(read_groups(groups / "groups")), list(read_groups(tmp_path / "out"))
    pairs = [pair for group in after for text in group.texts for pair in text.pairs]
    given = [pair for pair in pairs if pair.accepted]
    assert all(not pair.scores for pair in pairs if not pair.accepted)
    assert (result["pairs"], result["rejected"]) == (len(given), len(pairs) - len(given))
    assert result["rejected"] > 0
    assert [strip(group) for group in read_groups(tmp_path / "out")] == before
    assert sorted(shard_bytes(tmp_path / "out")) == sorted(shard_bytes(groups / "groups"))
    for name, mean in result["scores"].items():
        scores = [pair.scores[name] for pair in given if name in pair.scores]
        missing = sum(count for key, count in result["unscored"].items() if key.split(".")[0] == name)
        assert mean == pytest.approx(sum(scores) / len(scores), abs=1e-4)
        assert len(scores) + missing == len(given)
    assert result["unscored"]["options.no_options"] == sum(not pair.options for pair in given)
    assert result["engine"] == "scripted"


def strip(group: SynthGroup) -> SynthGroup:
    for text in group.texts:
        for pair in text.pairs:
            pair.scores = {}
    group.meta.pop("unscored", None)
    return group


def test_the_scripted_engine_knows_its_own_pairs(groups: Path, tmp_path: Path) -> None:
    """Quotes stand in the text: likelier with it than without, and answered the same way when asked again."""
    run_verify(verify_settings(groups, tmp_path / "out", ["open_closed", "agreement", "options"]))
    pairs = [pair for group in read_groups(tmp_path / "out") for text in group.texts for pair in text.pairs]
    quotes = [pair for pair in pairs if pair.accepted and pair.rationale is None]
    assert len(quotes) > 20
    # 0.1 nats a token with the text, 3.1 without: sigmoid(3)
    assert {pair.scores["open_closed"] for pair in quotes if not pair.options} == {0.9526}
    asked_again = [pair.scores["agreement"] for pair in quotes]
    assert sum(asked_again) / len(asked_again) > 0.6  # the first place of the quoted words may be another


def test_text_scores_alone_start_no_engine(groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_run, "open_engine", lambda *_: pytest.fail("an engine was started"))
    result = run_verify(verify_settings(groups, tmp_path / "a", ["grounded", "combined"]))
    assert result["engine"] is None
    plain = {"groups": str(groups / "groups"), "scores": ["combined", "grounded"], "output": str(tmp_path / "b")}
    run_verify(check_settings(VerifySettings, plain, where="recipe"))
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    with pytest.raises(UserError, match="agreement, open_closed need an engine"):
        check_settings(VerifySettings, {**plain, "scores": ["open_closed", "agreement"]}, where="recipe")


@pytest.mark.parametrize("reason", ["error", "timeout"])
def test_failing_requests_are_counted_and_leave_no_score(groups: Path, tmp_path: Path, reason: str) -> None:
    failing = {"faults": {reason: 1.0}, "request_timeout_seconds": 0.01}
    result = run_verify(verify_settings(groups, tmp_path / "out", ["open_closed"], synthesizer=failing))
    assert result["unscored"] == {f"open_closed.{reason}": result["pairs"]}
    assert result["scores"] == {}


def test_what_is_too_long_is_counted(groups: Path, tmp_path: Path) -> None:
    short = {"max_model_len": 200, "max_new_tokens": 20}
    result = run_verify(verify_settings(groups, tmp_path / "out", ["open_closed"], synthesizer=short))
    assert 0 < result["unscored"]["open_closed.too_long"] <= result["pairs"]


def test_an_engine_that_dies_costs_what_was_in_flight(groups: Path, tmp_path: Path) -> None:
    names = ["grounded", "open_closed", "options"]
    run_verify(verify_settings(groups, tmp_path / "whole", names))
    dying = {"max_num_seqs": 2, "faults": {"dies_at": 100}}
    with pytest.raises(Fault, match="rerun the same command"):
        run_verify(verify_settings(groups, tmp_path / "out", names, synthesizer=dying))
    assert stored(tmp_path / "out") > 0
    run_verify(verify_settings(groups, tmp_path / "out", names))
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert not (tmp_path / "out" / "spool").exists()


def test_killed_runs_lose_and_double_nothing(groups: Path, tmp_path: Path) -> None:
    names = ["combined", "open_closed", "agreement", "options"]
    run_verify(verify_settings(groups, tmp_path / "whole", names))
    slow = verify_settings(groups, tmp_path / "out", names, synthesizer={"faults": {"latency_seconds": 0.1}})
    (tmp_path / "recipe.yaml").write_text(slow.model_dump_json())
    for _ in range(3):
        before = stored(tmp_path / "out")
        process = subprocess.Popen([*COMMAND, str(tmp_path / "recipe.yaml")], stderr=subprocess.PIPE, text=True)
        while stored(tmp_path / "out") == before:
            if process.poll() is not None:
                assert process.returncode == 0 and process.stderr, process.stderr and process.stderr.read()
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
    run_verify(slow)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("sealed", [0, 1], ids=["the first shard", "all shards"])
def test_a_journal_left_by_a_kill_after_sealing_is_removed(
    groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: int
) -> None:
    names = ["combined", "options", "open_closed"]
    recipe = verify_settings(groups, tmp_path / "out", names)
    run_verify(verify_settings(groups, tmp_path / "whole", names))
    last = len(list((tmp_path / "whole").glob("*.array_record"))) - 1
    unlink = Path.unlink

    def die(path: Path, missing_ok: bool = False) -> None:
        if path.name == f"{sealed * last:05d}.spool":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die)
        run_verify(recipe)
    assert list((tmp_path / "out" / "spool").iterdir())
    run_verify(recipe)
    assert not (tmp_path / "out" / "spool").exists()
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def stored(output: Path) -> int:
    return sum(path.stat().st_size for path in [*output.glob("spool/*"), *output.glob("*.array_record")])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scores": ["grounded", "agreement"]}, "scores"),
        ({"seed": 1}, "seed"),
        ({"synthesizer": {"max_model_len": 1999}}, r"synthesizer\.max_model_len"),
    ],
)
def test_other_settings_are_refused_by_name(groups: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run_verify(verify_settings(groups, tmp_path / "out", ["grounded", "options"]))
    with pytest.raises(UserError, match=f"made with {named}"):
        run_verify(verify_settings(groups, tmp_path / "out", **{"scores": ["grounded", "options"], **change}))


def test_second_run_reads_the_figures(groups: Path, tmp_path: Path) -> None:
    recipe = verify_settings(groups, tmp_path / "out", ["grounded", "combined"])
    first = run_verify(recipe)
    assert {**run_verify(recipe), "seconds": 0} == {**first, "seconds": 0}
    shards = sorted((tmp_path / "out").glob("*.array_record"))
    whole = shard_bytes(tmp_path / "out")
    shards[1].unlink()
    damage_shard(tmp_path / "out", 0)
    run_verify(recipe)
    assert shard_bytes(tmp_path / "out") == whole


def test_scores_come_again_under_their_names_alone(groups: Path, tmp_path: Path) -> None:
    run_verify(verify_settings(groups, tmp_path / "one", ["grounded", "options"]))
    two = verify_settings(groups, tmp_path / "two", ["options", "language"], groups=str(tmp_path / "one"))
    result = run_verify(two)
    assert set(result["scores"]) == {"grounded", "options", "language"}
    assert (
        result["unscored"] == run_verify(verify_settings(groups, tmp_path / "one", ["grounded", "options"]))["unscored"]
    )


def test_a_run_may_verify_at_once(groups: Path, tmp_path: Path) -> None:
    """The scores are those of `synth verify` afterwards, and the run's own figures show them."""
    (tmp_path / "model").symlink_to(groups / "model")
    (tmp_path / "corpus.jsonl").symlink_to(groups / "corpus.jsonl")
    faults = {"malformed": 0.3}
    inline = settings(tmp_path, verify=ENGINE_ALL, synthesizer__faults=faults)
    ran = run_synth(inline)
    verified = run_verify(verify_settings(groups, tmp_path / "out", ENGINE_ALL, synthesizer={"faults": faults}))
    assert ran["scores"] == verified["scores"] and ran["unscored"] == verified["unscored"]
    pairs = [[text.pairs for text in group.texts] for group in read_groups(inline.output)]
    assert pairs == [[text.pairs for text in group.texts] for group in read_groups(tmp_path / "out")]
    with pytest.raises(UserError, match="made with verify"):
        run_synth(settings(tmp_path, synthesizer__faults=faults))


def test_a_run_scores_texts_alone_without_a_judge(groups: Path, tmp_path: Path) -> None:
    """What the documentation shows: `verify=[grounded,combined]`. The engine is asked for pairs and nothing else."""
    (tmp_path / "model").symlink_to(groups / "model")
    (tmp_path / "corpus.jsonl").symlink_to(groups / "corpus.jsonl")
    scores = ["grounded", "combined"]
    ran = run_synth(settings(tmp_path, verify=scores, synthesizer__faults={"malformed": 0.3}))
    verified = run_verify(verify_settings(groups, tmp_path / "out", scores))
    assert verified["engine"] is None
    assert ran["scores"].keys() == set(scores) and ran["scores"] == verified["scores"]
    pairs = [[text.pairs for text in group.texts] for group in read_groups(tmp_path / "groups")]
    assert pairs == [[text.pairs for text in group.texts] for group in read_groups(tmp_path / "out")]


def test_filtering_needs_no_engine(groups: Path, tmp_path: Path) -> None:
    """Every name can stand in `keep`; a pair that has no such score passes `not name < …` alone."""
    verified = run_verify(verify_settings(groups, tmp_path / "out", ENGINE_ALL))
    shutil.move(groups / "model", groups / "away")  # nothing of the synthesizer is looked at any more
    try:
        for number, (keep, kept) in enumerate(
            [
                (" and ".join(f"not {name} < 0" for name in ENGINE_ALL), verified["pairs"]),
                ("options >= 0", verified["pairs"] - verified["unscored"]["options.no_options"]),
                ("combined > 1", 0),
            ]
        ):
            plain = {"groups": str(tmp_path / "out"), "keep": keep, "output": str(tmp_path / f"rendered{number}")}
            assert run_render(check_settings(RenderSettings, plain, where="recipe"))["pairs"] == kept
    finally:
        shutil.move(groups / "away", groups / "model")


def test_swapped_answers_are_told_on_real_text() -> None:
    """At least 0.90, on a part of what `benchmarks/verify.py` reads."""
    rows = [json.loads(line) for line in shared("data/fairytaleqa/val.jsonl").read_text().splitlines()[:150]]
    cases = [(row["story"], row["context"], one["question"], one["answer"]) for row in rows for one in row["qa"]]
    others = cases[len(cases) // 2 :] + cases[: len(cases) // 2]
    right, wrong = [], []
    for (story, context, question, answer), (other, _, _, swapped) in zip(cases, others, strict=True):
        if story == other:
            continue
        for found, told in ((right, answer), (wrong, swapped)):
            score = read_pair(PreparedText(context), Pair(question, told), ("combined",))["combined"]
            assert isinstance(score, float)
            found.append(score)
    won = sum((one > other) + (one == other) / 2 for one in right for other in wrong) / (len(right) * len(wrong))
    assert len(right) > 250 and won >= 0.90
