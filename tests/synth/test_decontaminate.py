"""`synth decontaminate`: exactly what shares words with a benchmark is found, marked or left out, and listed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extras import need, shared
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthkit import settings as run_settings
from synthkit import shard_bytes

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Document, GroupText, Pair, Segment, SynthGroup, encode
from ipt_jax.corpus.shards import Shards, read_documents
from synth import read_groups
from synth.decontaminate import ngram_index
from synth.decontaminate.ngram_index import (
    FIELD_WORDS,
    LAST_LETTER,
    BenchmarkItem,
    Finder,
    NgramIndex,
    read_words,
)
from synth.decontaminate.run import DecontaminateSettings, run_decontaminate
from synth.format.wire import example_segments, wire_pair
from synth.generate.run import run_synth
from synth.text.words import UNSPACED, sentence_spans, sentences
from synth.text.words import words as scored_words

# ---- words


def plain_words(text: str) -> list[str]:
    """The rule of the module's docstring, letter by letter."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words, open_word = [], False
    for letter in folded:
        inside = unicodedata.category(letter)[0] in "LMN" and ord(letter) < LAST_LETTER
        alone = inside and any(first <= ord(letter) <= last for first, last in UNSPACED)
        if inside and open_word and not alone:
            words[-1] += letter
        elif inside:
            words.append(letter)
        open_word = inside and not alone
    return words


def found_words(text: str) -> list[str]:
    words = read_words([text])
    return list(words.run(0, len(words)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Anna's mill—it WALKS, twice!", ["anna", "s", "mill", "it", "walks", "twice"]),
        ("Straße ＡＢＣ１２ e\u0301té", ["strasse", "abc12", "été"]),
        ("3.14 and 1,000", ["3", "14", "and", "1", "000"]),
        ("水は東京 is water", ["水", "は", "東", "京", "is", "water"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("བོད་ཡིག།", ["བ", "ོ", "ད", "ཡ", "ི", "ག"]),
        ("人々〇 ㇰ豈\U000e0100", ["人", "々", "〇", "ㇰ", "豈"]),
        ("🙂 — \n", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert found_words(text) == words == plain_words(text)


@given(st.text(max_size=60))
@hypothesis_settings(max_examples=300, deadline=None)
def test_words_of_any_text(text: str) -> None:
    assert found_words(text) == plain_words(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Anna's 1,000 boats, twice!", ["Anna's", "1,000", "boats", "twice"]),
        ("水は東京 is water", ["水", "は", "東", "京", "is", "water"]),
        ("བོད་ཡིག།", ["བ", "ོ", "ད", "ཡ", "ི", "ག"]),
        ("人々〇 ㇰ𠀋", ["人", "々", "〇", "ㇰ", "𠀋"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_scores_and_overlap_split_the_same_scripts(text: str, words: list[str]) -> None:
    assert scored_words(text) == words


def test_sentences() -> None:
    text = ' One. "Two!" she said… 3.5 km?\n\nTitle\n水。「東京。」終わり '
    found = ["One.", '"Two!"', "she said… 3.5 km?", "Title", "水。", "「東京。」", "終わり"]
    assert sentences(text) == found
    assert [text[start:end] for start, end in sentence_spans(text)] == found
    assert sentence_spans(" \n ") == []


# ---- matches

LETTERS = st.text("abAB. '水é", max_size=24)
ITEMS = st.lists(st.lists(LETTERS, min_size=1, max_size=3), min_size=1, max_size=5)


def plain_runs(fields: list[str], ngram: int, shortest: int) -> set[tuple[str, ...]]:
    joined = plain_words("\n".join(fields))
    runs = {tuple(joined[i : i + ngram]) for i in range(len(joined) - ngram + 1)}
    if shortest <= len(joined) < ngram:
        runs.add(tuple(joined))
    parts = [plain_words(field) for field in fields]
    return runs | {tuple(part) for part in parts if max(shortest, FIELD_WORDS) <= len(part) < ngram}


def holds(words: list[str], run: tuple[str, ...]) -> bool:
    return any(tuple(words[i : i + len(run)]) == run for i in range(len(words) - len(run) + 1))


def check_finder(items: list[list[str]], texts: list[str], ngram: int, shortest: int) -> None:
    needles = NgramIndex.build(
        [BenchmarkItem(0, str(number), tuple(fields)) for number, fields in enumerate(items)],
        ["b"],
        ngram,
        shortest,
    )
    runs = [plain_runs(fields, ngram, shortest) for fields in items]
    assert needles.too_short == [number for number, one in enumerate(runs) if not one]
    for text, found in zip(texts, Finder(needles).find(texts), strict=True):
        words = plain_words(text)
        assert set(found) == {number for number, one in enumerate(runs) if any(holds(words, run) for run in one)}
        for number, run in found.items():
            assert tuple(run.split(" ")) in runs[number] and holds(words, tuple(run.split(" ")))


@given(ITEMS, st.lists(LETTERS, max_size=4), st.integers(2, 11), st.integers(1, 3))
@hypothesis_settings(max_examples=300, deadline=None)
def test_a_text_matches_exactly_the_items_whose_runs_it_holds(
    items: list[list[str]], texts: list[str], ngram: int, shortest: int
) -> None:
    check_finder(items, texts, ngram, min(shortest, ngram))


@given(ITEMS, st.lists(LETTERS, max_size=4), st.integers(2, 11), st.integers(1, 3))
@hypothesis_settings(max_examples=300, deadline=None)
def test_colliding_hashes_find_nothing_else(
    items: list[list[str]], texts: list[str], ngram: int, shortest: int
) -> None:
    """With two bits of hash a word nearly everything is a candidate, and only words decide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram_index, "mixed", lambda hashes: hashes & np.uint64(3))
        check_finder(items, texts, ngram, min(shortest, ngram))


def test_a_run_does_not_reach_from_one_text_into_the_next() -> None:
    finder = Finder(NgramIndex.build([BenchmarkItem(0, "i", ("one two three four",))], ["b"], 4, 4))
    assert finder.find(["one two", "three four"]) == [{}, {}]
    assert finder.find(["ONE two,", "one: two - three; four"]) == [{}, {0: "one two three four"}]


# ---- a run


def pair(question: str, answer: str, **parts: Any) -> Pair:
    return wire_pair(question, answer, **parts)


def group(name: str, *texts: tuple[str, list[Pair]]) -> SynthGroup:
    made = [
        GroupText(f"{name}.t{place}", 0, len(text), text, "s", pairs, place + 1, 0, 0, 0, "stop")
        for place, (text, pairs) in enumerate(texts)
    ]
    return SynthGroup(name, made, "m", "w", {}, "f")


def write_records(path: Path, stage: str, shards: list[list[SynthGroup]] | list[list[Document]]) -> str:
    with Output(path, stage=stage, identity={"made": "by a test"}, shard_name="records") as output:
        for index, records in enumerate(shards):
            output.seal(index, len(shards), map(encode, records))
        output.finish()
    return str(path)


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def decontaminate(folder: Path, inputs: list[dict[str, Any]], rows: list[dict[str, Any]], **fields: Any) -> Any:
    benchmark = {"path": write_rows(folder / "bench.jsonl", *rows), "fields": ["question", "answer"]}
    recipe = {"inputs": inputs, "benchmarks": [benchmark], "workers": 1, "output": str(folder / "clean"), **fields}
    return run_decontaminate(check_settings(DecontaminateSettings, recipe, where="recipe"))


def matches(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "clean" / "removed.jsonl").read_text().splitlines()]


ROWS = [
    {"id": "q1", "question": "Which river runs past the old green mill of Anna?", "answer": "The Teal"},
    {"id": "q2", "question": "Who bakes bread?", "answer": "Boris does"},
]


def test_pairs_are_marked_and_the_rest_of_the_group_stays(tmp_path: Path) -> None:
    planted = pair("Which river runs past the old green mill of Anna?", "the Teal!")
    choice = pair("Who bakes bread?", "Boris does", options=["Anna does", "Boris does"])
    reasoned = pair("Who bakes bread?", "Boris does", rationale="The text says so.")
    kept = [pair("Who bakes cake?", "Boris does"), pair("Who?", "Boris")]
    before = group("g", ("A text.", [kept[0], planted, choice]), ("Another text.", [kept[1], reasoned]))
    source = write_records(tmp_path / "groups", "synth", [[before], [group("h", ("Plain.", kept))]])
    result = decontaminate(tmp_path, [{"path": source}], ROWS)
    after, other = read_groups(tmp_path / "clean" / "groups")
    verdicts = [[(one.verdict, one.reason) for one in text.pairs] for text in after.texts]
    assert verdicts == [
        [("accepted", None), ("rejected", "contaminated"), ("rejected", "contaminated")],
        [("accepted", None), ("rejected", "contaminated")],
    ]
    assert after.texts[0].pairs[1].question == planted.question and after.texts[0].text == "A text."
    assert other == group("h", ("Plain.", kept)) and after.meta == {}
    assert (result["pairs"], result["texts"], result["documents"]) == (7, 3, 0)
    assert result["removed"] == {"bench": 3} and result["pairs_removed"] == 3
    assert result["benchmarks"]["bench"]["items_hit"] == 2
    assert [(line["record"], line["text"], line["pair"], line["item"]) for line in matches(tmp_path)] == [
        ("g", "g.t0", 1, "q1"),
        ("g", "g.t0", 2, "q2"),
        ("g", "g.t1", 1, "q2"),
    ]
    assert matches(tmp_path)[2]["words"] == "who bakes bread boris does"


def test_a_question_is_found_with_its_options(tmp_path: Path) -> None:
    row = {
        "question": "Who bakes?",
        "answer": ["Anna with the long hair", "Boris from the mill", "No one in the village"],
    }
    told = pair("Who bakes?", "No one in the village", options=row["answer"], rationale="Nobody is seen.")
    source = write_records(tmp_path / "groups", "synth", [[group("g", ("A text.", [told]))]])
    assert decontaminate(tmp_path, [{"path": source}], [row])["pairs_removed"] == 1


def test_a_text_that_matches_takes_its_pairs_along(tmp_path: Path) -> None:
    telling = "Once more: which river runs past the old green mill of Anna? Nobody knows."
    fine = [pair("Who walks?", "Anna")]
    source = write_records(tmp_path / "groups", "synth", [[group("g", (telling, fine), ("Fine.", fine))]])
    result = decontaminate(tmp_path, [{"path": source}], ROWS)
    (after,) = read_groups(tmp_path / "clean" / "groups")
    assert after.meta == {"contaminated_texts": [0]} and after.texts[0].text == telling
    assert [text.pairs[0].verdict for text in after.texts] == ["rejected", "accepted"]
    assert (result["pairs_removed"], result["texts_removed"], result["documents_removed"]) == (1, 1, 0)
    assert result["removed"] == {"bench": 2} and len(matches(tmp_path)) == 1


def test_documents_and_raw_texts_are_left_out(tmp_path: Path) -> None:
    tuning = [
        Document(name, "s", "task", example_segments("A text.", [pair(question, answer)]))
        for name, question, answer in (("a", "Who bakes bread?", "Boris does"), ("b", "Who bakes cake?", "Boris does"))
    ]
    raw = [{"id": "r1", "body": "Who bakes bread? Boris does."}, {"id": "r2", "body": "Who bakes?"}, {"body": ""}]
    inputs = [
        {"path": write_records(tmp_path / "tuning", "collect", [tuning])},
        {"path": write_rows(tmp_path / "raw.jsonl", *raw), "text": "body", "source": "web"},
    ]
    result = decontaminate(tmp_path, inputs, ROWS)
    assert list(read_documents(tmp_path / "clean" / "tuning")) == [tuning[1]]
    assert list(read_documents(tmp_path / "clean" / "raw")) == [Document("r2", "web", "raw", [Segment("Who bakes?")])]
    assert result["documents_removed"] == 2 and result["dropped"] == {"contaminated": 2, "empty_text": 1}
    assert [(line["input"], line["record"], line["kind"]) for line in matches(tmp_path)] == [
        ("tuning", "a", "document"),
        ("raw", "r1", "document"),
    ]


def test_short_items_are_counted_and_not_looked_for(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "raw.jsonl", {"id": "r", "text": "Yes, no, Boris."})
    result = decontaminate(tmp_path, [{"path": source}], [{"question": "Yes", "answer": "no"}, *ROWS])
    assert result["documents_removed"] == 0 and result["benchmarks"]["bench"]["too_short"] == 1


def test_every_field_block_and_list_is_looked_for(tmp_path: Path) -> None:
    rows = [
        {
            "qa": [{"q": "Who sees the old boat?", "a": "Anna"}, {"q": "Who sees the new boat?", "a": None}],
            "id": "\ud800",
        },
        {"qa": [{"q": "Where do the nine geese of the miller sleep at night?", "a": ["in the barn", "nowhere"]}]},
    ]
    texts = ["Who sees the new boat?", "Where do the nine geese of the miller sleep at night", "Who sees the old boat?"]
    raw = write_rows(tmp_path / "raw.jsonl", *({"id": text, "text": text} for text in texts))
    benchmark = {"path": write_rows(tmp_path / "deep.jsonl", *rows), "fields": ["qa.q", "qa.a"]}
    result = decontaminate(tmp_path, [{"path": raw}], ROWS, benchmarks=[benchmark])
    assert [line["item"] for line in matches(tmp_path)] == ["?/1", "deep.jsonl:2/0"]
    assert result["benchmarks"]["deep"]["items"] == 3


def test_a_second_run_goes_on_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    run_synth(run_settings(tmp_path))
    groups = read_groups(tmp_path / "groups")
    told = next(one for made in groups for text in made.texts for one in text.pairs if one.format == "free")
    rows = [{"question": told.question, "answer": told.answer}, *ROWS]
    inputs = [{"path": str(tmp_path / "groups")}]
    whole = decontaminate(tmp_path, inputs, rows)
    assert whole["pairs_removed"] >= 1
    output, listing = tmp_path / "clean" / "groups", (tmp_path / "clean" / "removed.jsonl").read_bytes()
    shards = shard_bytes(output)
    assert len(shards) == len(Shards(tmp_path / "groups").paths) > 2
    sorted(output.glob("*.array_record"))[1].unlink()
    damaged = sorted(output.glob("*.array_record"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"!" + damaged.read_bytes()[-8:])
    (output / "groups-00001.99.tmp").write_bytes(b"half")
    sorted(output.glob("*.removed.jsonl"))[0].write_text("edited")
    assert decontaminate(tmp_path, inputs, rows, workers=2) == whole
    assert shard_bytes(output) == shards and (tmp_path / "clean" / "removed.jsonl").read_bytes() == listing
    assert not list((tmp_path / "clean").rglob("*.tmp"))
    with pytest.raises(UserError, match="ngram"):
        decontaminate(tmp_path, inputs, rows, ngram=8)
    with pytest.raises(UserError, match="benchmarks.bench"):
        decontaminate(tmp_path, inputs, ROWS)


def test_the_output_lies_apart_and_holds_nothing_else(tmp_path: Path) -> None:
    groups = write_records(tmp_path / "groups", "synth", [[group("g", ("A text.", [pair("Who?", "Anna")]))]])
    (tmp_path / "clean").mkdir()
    inside = write_rows(tmp_path / "clean" / "raw.jsonl", {"id": "r", "text": "abc"})
    for source, output, told in (
        (groups, groups, "overlaps with input"),
        (groups, f"{groups}/clean", "overlaps with input"),
        (inside, str(tmp_path / "clean"), "overlaps with input"),
        (inside, groups, "holds 'manifest.json', not of this stage"),
    ):
        write_rows(tmp_path / "bench.jsonl")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=told):
            decontaminate(tmp_path, [{"path": source}], ROWS, output=output)
        assert sorted(tmp_path.rglob("*")) == before
    apart = write_rows(tmp_path / "apart.jsonl", {"id": "r", "text": "abc"})
    Path(inside).unlink()
    decontaminate(tmp_path, [{"path": groups}], ROWS)
    decontaminate(tmp_path, [{"path": apart}], ROWS)
    assert sorted(path.name for path in (tmp_path / "clean").iterdir()) == ["apart", "groups", "removed.jsonl"]


def test_render_leaves_out_what_was_found(tmp_path: Path) -> None:
    from synth.render.documents import RenderSettings
    from synth.render.run import run_render

    telling = "Once more: which river runs past the old green mill of Anna? Nobody knows."
    clean = [pair("Who walks here?", "Anna")]
    groups = [
        group("g", (telling, clean), ("A fine text.", clean)),
        group("h", (telling, clean)),
    ]
    decontaminate(tmp_path, [{"path": write_records(tmp_path / "groups", "synth", [groups])}], ROWS)
    run_render(RenderSettings(groups=str(tmp_path / "clean" / "groups"), output=str(tmp_path / "augmented")))
    (document,) = read_documents(tmp_path / "augmented")
    assert "A fine text." in document.text and "Once more" not in document.text
    assert [parent.id for parent in document.parents] == ["g.t1"]


def test_planted_questions_are_found_and_no_others(tmp_path: Path) -> None:
    """Every tenth question of FairytaleQA's validation set, planted into its training texts."""
    rows = [json.loads(line) for line in shared("data/fairytaleqa/val.jsonl").read_text().splitlines()]
    questions = [entry["question"] for row in rows for entry in row["qa"]]
    items = [{"id": str(number), "question": question} for number, question in enumerate(questions)]
    texts = [json.loads(line)["context"] for line in shared("data/fairytaleqa/train.jsonl").read_text().splitlines()]
    for number in range(0, len(questions), 10):
        words = texts[number].split(" ")
        texts[number] = " ".join([*words[:40], questions[number].upper(), *words[40:]])
    benchmark = [{"path": write_rows(tmp_path / "val.jsonl", *items), "fields": ["question"]}]
    source = write_rows(tmp_path / "raw.jsonl", *({"id": str(n), "text": text} for n, text in enumerate(texts)))
    result = decontaminate(tmp_path, [{"path": source}], ROWS, benchmarks=benchmark)
    runs = [f" {' '.join(found_words(question))} " for question in questions]
    padded = {str(number): f" {' '.join(found_words(text))} " for number, text in enumerate(texts)}
    expected = {number for number, text in padded.items() if any(run in text for run in runs)}
    planted = {str(number) for number in range(0, len(questions), 10)}
    assert (
        planted < expected and len(expected) == len(planted) + 3
    )  # three tales hold "who had three daughters", "who owned the forest"
    assert {line["record"] for line in matches(tmp_path)} == expected and result["documents_removed"] == len(expected)


@pytest.mark.extra
def test_lm_eval_tasks(tmp_path: Path) -> None:
    need("lm_eval", extra="evals")
    data = write_rows(tmp_path / "docs.jsonl", *ROWS)
    (tmp_path / "mill.yaml").write_text(
        f"task: mill\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    )
    source = write_rows(tmp_path / "raw.jsonl", {"id": "r", "text": "Who bakes bread? Boris does."})
    benchmark = {"task": str(tmp_path / "mill.yaml"), "fields": ["question", "answer"], "name": "mill"}
    result = decontaminate(tmp_path, [{"path": source}], ROWS, benchmarks=[benchmark])
    assert result["removed"] == {"mill": 1} and matches(tmp_path)[0]["item"] == "mill/test/1"
    Path(data).unlink()
    with pytest.raises(UserError, match="mill.yaml: cannot be loaded"):
        decontaminate(tmp_path, [{"path": source}], ROWS, benchmarks=[benchmark])


def mistakes() -> Iterator[tuple[Callable[[Path], Any], str]]:
    def run(**fields: Any) -> Callable[[Path], Any]:
        def call(folder: Path) -> Any:
            source = write_rows(folder / "raw.jsonl", {"id": "r", "text": "abc"})
            inputs = fields.pop("inputs", [{"path": source}] * fields.pop("times", 1))
            return decontaminate(folder, inputs, ROWS, **fields)

        return call

    yield run(times=2), "inputs: duplicate name 'raw'"
    yield run(benchmarks=[{"fields": ["q"]}]), "a path or a task"
    yield run(inputs=[{"path": "raw/*.jsonl"}]), r"inputs: '\*' has other characters"
    yield run(inputs=[{"path": "raw.jsonl", "name": "removed.jsonl"}]), "'removed.jsonl' is a file of the output"
    yield run(benchmarks=[{"path": "nowhere.jsonl", "fields": ["q"]}]), "no such file"


@pytest.mark.parametrize(("call", "told"), mistakes(), ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_told(tmp_path: Path, call: Callable[[Path], Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        call(tmp_path)
    assert not (tmp_path / "clean").exists()


def test_a_benchmark_without_rows_is_told(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").write_bytes(b"PAR1\xff")
    groups = write_records(tmp_path / "groups", "synth", [[]])
    for path, said in ((tmp_path / "b.parquet", "its footer cannot be read"), (groups, "has no rows of questions")):
        with pytest.raises(UserError, match=said):
            source = write_rows(tmp_path / "raw.jsonl", {"id": "r", "text": "abc"})
            decontaminate(tmp_path, [{"path": source}], ROWS, benchmarks=[{"path": str(path), "fields": ["q"]}])


def test_an_absent_field_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "raw.jsonl", {"id": "r", "text": "abc"})
    with pytest.raises(UserError, match="line 1: no field 'query', found answer, id, question"):
        benchmark = {"path": write_rows(tmp_path / "b.jsonl", *ROWS), "fields": ["query"]}
        decontaminate(tmp_path, [{"path": source}], ROWS, benchmarks=[benchmark])
