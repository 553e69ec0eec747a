"""`synth collect`: the wire format of tuning documents, the cap, few-shot sequences, and what bad data sets get."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from extras import shared
from synthkit import damage_shard

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import load_settings
from ipt_jax.corpus.records import Document, Segment
from ipt_jax.corpus.shards import read_documents, read_manifest
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.collect.run import CollectSettings, run_collect
from synth.format.parser import parse_completion
from synth.groups import read_groups
from synth.miniworld.write import write_tokenizer
from synth.render.documents import RenderSettings
from synth.render.run import run_render

BOS, EOS = Segment(loss=False, control="bos"), Segment(loss=True, control="eos")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes alone: an example's tokens are its characters, BOS and EOS."""
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer([], 259, directory)
    return directory


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(name: str, pairs: int = 1, context: str = "Some text.") -> dict[str, Any]:
    qa = [{"question": f"Question {index}?", "answer": f"answer {index}"} for index in range(pairs)]
    return {"id": name, "context": context, "qa": qa}


def collect(tmp_path: Path, *paths: Path, **settings: Any) -> tuple[dict[str, Any], list[Document]]:
    output = tmp_path / "tuning"
    inputs = [{"path": str(path)} for path in paths]
    figures = run_collect(CollectSettings.model_validate({"inputs": inputs, "output": str(output), **settings}))
    return figures, list(read_documents(output))


def test_segments_of_a_context_with_two_pairs(tmp_path: Path) -> None:
    qa = [
        {"question": "Who came?", "answer": "Ann", "kind": "ignored"},
        {"question": "When?", "answer": "in May", "options": ["in May", "in June"], "rationale": "It says so."},
    ]
    path = write(tmp_path / "story.jsonl", [{"id": "s/1", "context": "Ann came in May.\n", "qa": qa}])
    figures, documents = collect(tmp_path, path)
    pairs = (
        "<QUE> Who came? <ANS> Ann </END>\n\n<QUE> When?\nOptions:\n- in May\n- in June\nLet's think step by step. "
        "<ANS> It says so.\nTherefore, the answer is in May </END>"
    )
    segments = [BOS, Segment(" <CON> Ann came in May. </CON>\n\n", loss=False), Segment(pairs, loss=True), EOS]
    meta = {"dataset": "story", "contexts": ["s/1"]}
    assert documents == [Document("story/s/1", "story", "task", segments, meta=meta)]
    dropped = {"ignored_field_kind": 1}
    expected = {"documents": 1, "contexts": 1, "pairs": 2, "tokens": None, "dropped": dropped, "datasets": 1}
    assert figures == expected


def test_groups_hold_one_context_each_and_render_like_synthesized_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "story.jsonl", [row("s/1", pairs=2), row("s/2", context="Other text.")])
    recipe = {"inputs": [{"path": str(path)}], "write": "groups", "output": str(tmp_path / "groups")}
    figures = run_collect(CollectSettings.model_validate(recipe))
    assert (figures["groups"], figures["contexts"], figures["pairs"]) == (2, 2, 3)
    groups = {group.id: group.texts for group in read_groups(tmp_path / "groups")}
    assert set(groups) == {"story/s/1", "story/s/2"}
    [text] = groups["story/s/1"]
    assert (text.raw_id, text.text, text.source) == ("s/1", "Some text.", "story")
    assert [(pair.question, pair.answer) for pair in text.accepted_pairs] == [
        ("Question 0?", "answer 0"),
        ("Question 1?", "answer 1"),
    ]
    run_render(RenderSettings(groups=str(tmp_path / "groups"), output=str(tmp_path / "documents")))
    rendered = {document.id: document for document in read_documents(tmp_path / "documents")}
    assert rendered["story/s/1"].kind == "augmented" and "answer 1" in rendered["story/s/1"].text
    assert "Other text." in rendered["story/s/2"].text and "<QUE>" not in rendered["story/s/2"].text
    with pytest.raises(ValueError, match="groups hold one context each; remove few_shot"):
        CollectSettings.model_validate({**recipe, "few_shot": {"tokenizer": "t"}})


def test_most_pairs_first_then_an_order_drawn_from_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [row(f"{pairs}-{index}", pairs) for index in range(5) for pairs in (1, 2, 3)])
    figures, documents = collect(tmp_path / "a", path, max_contexts=7)
    names = [document.meta["contexts"][0] for document in documents]
    assert sorted(name[0] for name in names) == ["2", "2", "3", "3", "3", "3", "3"]
    assert figures["dropped"] == {"beyond_max_contexts": 8} and figures["pairs"] == 19
    assert names != sorted(names)
    other = [one.meta["contexts"][0] for one in collect(tmp_path / "b", path, max_contexts=7, seed=1)[1]]
    assert other != names and [name for name in other if name[0] == "3"] != [name for name in names if name[0] == "3"]


def test_few_shot_sequences_hold_one_data_set_and_as_many_examples_as_fit(tmp_path: Path, tokenizer: Path) -> None:
    sets = [write(tmp_path / f"{name}.jsonl", [row(f"{name}{index}") for index in range(9)]) for name in "xyz"]
    one = len(" <CON> Some text. </CON>\n\n" + "<QUE> Question 0? <ANS> answer 0 </END>") + 2
    few_shot = {"tokenizer": str(tokenizer), "max_tokens": 4 * one + 3}
    figures, documents = collect(tmp_path, *sets, few_shot=few_shot)
    assert [len(document.meta["contexts"]) for document in documents] == [4, 4, 1] * 3
    assert all(name[0] == document.source for document in documents for name in document.meta["contexts"])
    assert figures["tokens"] == 27 * one and figures["documents"] == 9 and figures["datasets"] == 3
    controls = [segment.control for segment in documents[0].segments if segment.control]
    assert controls == ["bos", "eos"] * 4
    assert [count_tokens(document, load_tokenizer(tokenizer)) for document in documents] == [4 * one, 4 * one, one] * 3


def count_tokens(document: Document, tokenizer: Tokenizer) -> int:
    """Segment by segment, the pieces of an example after its first as going on."""
    total, continuing = 0, False
    for segment in document.segments:
        total += 1 if segment.control else len(tokenizer.encode(segment.text, continuing=continuing))
        continuing = not segment.control
    return total


def test_an_example_that_fits_exactly_stays_and_a_longer_one_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path / "set.jsonl", [row("fits"), row("long", context="Some text..")])
    one = len(" <CON> Some text. </CON>\n\n" + "<QUE> Question 0? <ANS> answer 0 </END>") + 2
    few_shot = {"tokenizer": str(tokenizer), "max_tokens": one}
    figures, documents = collect(tmp_path, path, few_shot=few_shot)
    assert figures["dropped"] == {"too_long": 1} and documents[0].meta["contexts"] == ["fits"]
    with pytest.raises(UserError, match="no example fits few_shot.max_tokens = 60; increase it"):
        collect(tmp_path / "short", path, few_shot={**few_shot, "max_tokens": 60})


def test_every_row_and_pair_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    bad = [
        {"question": "Choose.", "answer": "c", "options": ["a", "b"]},
        {"question": "A tag </END> inside?", "answer": "yes"},
        {"question": "", "answer": "yes"},
        {"question": "Empty?", "answer": " ", "explanation": "None."},
        {"question": "Question 0?", "answer": "again"},
    ]
    rows = [
        {"id": "a", "context": "Text.", "qa": [*row("a")["qa"], *bad]},
        {"id": "a", "context": "Another with the same id.", "qa": row("a")["qa"]},
        {"id": "b", "context": "  ", "qa": row("b")["qa"]},
        {"id": "c", "context": "No pairs.", "qa": []},
        {"id": "d", "context": "Half a letter \ud800.", "qa": row("d")["qa"]},
        {"context": "No id.", "qa": row("e")["qa"]},
    ]
    figures, documents = collect(tmp_path, write(tmp_path / "set.jsonl", rows))
    assert figures["dropped"] == {
        "duplicate_id": 1,
        "empty_context": 1,
        "no_pairs": 1,
        "lone_surrogate": 1,
        "pair_answer_not_in_options": 1,
        "pair_nested_tag": 1,
        "pair_empty_question": 1,
        "pair_empty_answer": 1,
        "pair_duplicate_question": 1,
        "ignored_field_explanation": 1,
    }
    assert sorted(document.id for document in documents) == ["set/a", "set/set.jsonl:6"]


def test_excluded_data_sets_stay_out_and_names_are_checked(tmp_path: Path) -> None:
    for name in ("seen", "unseen"):
        write(tmp_path / f"{name}.jsonl", [row(name)])
    folder = tmp_path / "out"
    figures, documents = collect(folder, tmp_path, exclude=["unseen"])
    assert figures["datasets"] == 1 and [document.source for document in documents] == ["seen"]
    with pytest.raises(UserError, match="no data set 'unsen' among the inputs; they are seen, unseen"):
        collect(tmp_path / "x", tmp_path / "*.jsonl", exclude=["unsen"])
    with pytest.raises(UserError, match="no data set is left"):
        collect(tmp_path / "x", tmp_path / "*.jsonl", exclude=["seen", "unseen"])
    with pytest.raises(UserError, match="duplicate data set .seen."):
        collect(tmp_path / "x", tmp_path / "*.jsonl", tmp_path / "seen.jsonl")
    joined = {"inputs": [{"path": str(tmp_path / "*.jsonl"), "name": "both"}]}
    assert collect(tmp_path / "y", **joined)[0]["datasets"] == 1


def test_a_broken_line_is_named_before_anything_is_written(tmp_path: Path) -> None:
    good, path = write(tmp_path / "a.jsonl", [row("a")]), tmp_path / "b.jsonl"
    for line, message in [
        ('{"context": "x", "qa": [}', "line 2 is not valid JSON"),
        ('["context", "x"]', "line 2 is a list, expected an object"),
    ]:
        path.write_text(json.dumps(row("a")) + "\n" + line + "\n")
        with pytest.raises(UserError, match=re.escape(message)):
            collect(tmp_path, good, path)
        assert not (tmp_path / "tuning").exists()


@pytest.mark.parametrize(
    ("line", "reason", "expected"),
    [
        ('{"context": "x"}', "missing_question", "qa, qas, qa_pairs, pairs (a list of pairs), or question, query"),
        ('{"tex": "x", "qa": []}', "missing_context", "context, passage, article, story, document, paragraph, text"),
        ('{"context": "x", "qa": [{"question": "x"}]}', "pair_missing_answer", "answer, answers, label, answerKey"),
        ('{"context": "x", "question": "x"}', "pair_missing_answer", "answer, answers, label, answerKey, answer_key"),
        ('{"context": "x", "qa": ["x"]}', "pair_unreadable_pair", "a pair is an object {question, answer}"),
        ('{"context": "x", "qa": "x"}', "unreadable_pairs", "a list of pairs"),
        ('{"context": {"x": 1}, "qa": []}', "unreadable_context", "context, passage"),
        (
            '{"context": "x", "qa": [{"question": "x", "answer": "y", "options": "y"}]}',
            "pair_unreadable_options",
            "options",
        ),
        (
            '{"context": "x", "qa": [{"question": "x", "answer": "y", "rationale": {}}]}',
            "pair_unreadable_rationale",
            "rationale",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_counted_and_the_accepted_fields_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str, expected: str
) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="no context has pairs") as caught:
        collect(tmp_path, path)
    assert reason in str(caught.value) and "b.jsonl: line 1: " in str(caught.value) and expected in str(caught.value)
    path.write_text(json.dumps(row("a")) + "\n" + line + "\n")
    assert collect(tmp_path, path)[0]["dropped"][reason] == 1
    assert "b.jsonl: line 2: " in (said := capsys.readouterr().err) and expected in said


def test_absent_empty_and_foreign_inputs(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.parquet").write_text("x")
    (tmp_path / "rows.docx").write_text("x")
    write(tmp_path / "bare.jsonl", [row("a", pairs=0)])
    for name, message in [
        ("absent.jsonl", "no such file"),
        ("empty.jsonl", "the file is empty"),
        ("rows.parquet", "cannot be read"),
        ("rows.docx", "unknown kind of file; expected .jsonl"),
        ("bare.jsonl", r"'bare': no context has pairs \(dropped: no_pairs 1\)"),
    ]:
        with pytest.raises(UserError, match=message):
            collect(tmp_path / "out", tmp_path / name)


def test_a_second_run_changes_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [row(str(index)) for index in range(20)])
    figures, _ = collect(tmp_path, path)
    shard = next((tmp_path / "tuning").glob("*.array_record"))
    written = shard.stat().st_mtime_ns
    assert collect(tmp_path, path)[0] == figures and shard.stat().st_mtime_ns == written
    whole = shard.read_bytes()
    damage_shard(tmp_path / "tuning", 0)
    assert collect(tmp_path, path)[0] == figures and shard.read_bytes() == whole
    with pytest.raises(UserError, match=r"made with max_contexts=10000, now 5"):
        collect(tmp_path, path, max_contexts=5)
    moved = path.rename(tmp_path / "sub.jsonl")
    assert collect(tmp_path, inputs=[{"path": str(moved), "name": "set"}])[0] == figures


def test_a_recipe_as_the_readme_writes_it(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path / "qa.jsonl", [row("a")])
    recipe = tmp_path / "collect.yaml"
    recipe.write_text(
        f"inputs: [{{path: {tmp_path}/qa.jsonl, adapter: generic, name: fairytaleqa}}]\nmax_contexts: 10000\n"
        f"exclude: []\nfew_shot: {{tokenizer: {tokenizer}, max_tokens: 4096}}\noutput: {tmp_path}/tuning\n"
    )
    run_collect(load_settings(CollectSettings, recipe))
    assert read_manifest(tmp_path / "tuning", stage="collect").counts == {"contexts": 1, "pairs": 1}
    with pytest.raises(UserError, match="did you mean 'max_contexts'"):
        load_settings(CollectSettings, recipe, ["max_context=1"])


def test_fairytaleqa(tmp_path: Path, tokenizer: Path) -> None:
    few_shot = {"tokenizer": str(tokenizer), "max_tokens": 20_000}
    figures, documents = collect(tmp_path, shared("data/fairytaleqa/val.jsonl"), few_shot=few_shot)
    assert figures["contexts"] + figures["dropped"]["no_pairs"] == 380 and 900 <= figures["pairs"] <= 930
    reader = load_tokenizer(tokenizer)
    assert figures["tokens"] == sum(count_tokens(document, reader) for document in documents)
    for document in documents:
        for segment in document.segments:
            if segment.loss and not segment.control:
                pairs = parse_completion(segment.text, finished=True)
                assert pairs and all(pair.accepted for pair in pairs)
