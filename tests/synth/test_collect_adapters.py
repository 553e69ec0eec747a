"""The adapters of `synth collect`: rows in the documented schemas, traps included, with literal outcomes.

A line of tests/synth/fixtures/adapters/NAME.jsonl has a `row` in the columns of its data set, the `examples` that it
adds, [context, [[question, answer], …]], and what is `dropped`. `note` names the trap.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from synth.collect.data_sets import (
    ADAPTERS,
    CollectInput,
    DataSet,
    RowTally,
    input_files,
    merge_examples,
    read_examples,
)

FIXTURES = Path(__file__).parent / "fixtures" / "adapters"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.jsonl"))
PAPER = """squad topiocqa hotpotqa wikitablequestions quac qed fairytaleqa mctest narrativeqa race race_c reclor logiqa
    aqua_rat dream triviaqa nlquad newsqa tweetqa cosmosqa doqa ecqa qasc quartz ropes spartqa babi coqa covid_qa
    convfinqa pubmedqa multirc quail""".split()
A_QUESTION_PER_ROW = sorted(
    set(PAPER) - {"nlquad", "babi", "coqa", "quac", "convfinqa", "multirc", "squad", "topiocqa"}
)
Pairs = dict[str, list[list[str]]]


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(adapter: str, path: Path) -> tuple[Pairs, Counter[str], int]:
    """Pairs by context (those without one together), dropped by reason, and rows."""
    tally = RowTally()
    found: Pairs = {}
    for example in merge_examples(
        read_examples(DataSet("set", adapter, input_files(CollectInput(path=str(path)))), tally)
    ):
        assert all(pair.accepted for pair in example.pairs)
        found.setdefault(example.context, []).extend([pair.question, pair.answer] for pair in example.pairs)
    return found, tally.dropped, tally.rows


def test_the_data_sets_of_the_paper_have_adapters_and_five_rows() -> None:
    assert len(PAPER) == 33 and set(PAPER) <= ADAPTERS.keys() and set(PAPER) <= set(NAMES)
    assert {name: len(lines(name)) for name in PAPER if len(lines(name)) < 5} == {}


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_the_documented_schema(name: str, tmp_path: Path) -> None:
    expected: Pairs = {}
    dropped: Counter[str] = Counter()
    for line in lines(name):
        dropped.update(line["dropped"])
        for context, pairs in line["examples"]:
            expected.setdefault(context, []).extend(pairs)
    found = read(name, write_jsonl(tmp_path / "rows.jsonl", [line["row"] for line in lines(name)]))
    assert found == (expected, dropped, len(lines(name)))


@pytest.mark.parametrize("name", NAMES)
def test_formats_of_files_give_the_same_pairs(name: str, tmp_path: Path) -> None:
    rows = [line["row"] for line in lines(name)]
    schema = pyarrow.Table.from_pylist(rows[:1]).schema
    alike = [row for row in rows if row.keys() == rows[0].keys() and typed(row) == schema]
    table = pyarrow.Table.from_pylist(alike)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "array.json").write_text(json.dumps(alike, indent=1))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": "1", "data": alike}))
    with gzip.open(tmp_path / "array.json.gz", "wt") as file:
        json.dump(alike, file)
    expected = read(name, write_jsonl(tmp_path / "rows.jsonl", alike))
    assert expected[0] and expected[2] == len(alike)
    for other in ("rows.parquet", "rows.arrow", "array.json", "wrapped.json", "array.json.gz"):
        assert read(name, tmp_path / other) == expected, other


def typed(row: dict[str, Any]) -> pyarrow.Schema | None:
    try:
        return pyarrow.Table.from_pylist([row]).schema
    except pyarrow.ArrowException:
        return None


# ---- any row


ODD: list[Any] = [None, "", " ", "\ud800", "x" * 30, "<ANS> b </END>", 0, -1, 7, 2.5, float("nan"), True]
ODD += [[], [None], [[]], ["a", 1], {}, {"a": []}, {"text": None}, {"text": ["a"], "label": [1]}, [{"text": 1}]]


def mutate(value: Any, draw: random.Random) -> Any:
    """A copy in which one value at some depth is another one, missing, or repeated."""
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    value = copy.deepcopy(value)
    walk(value)
    if not places:
        return value
    holder, key = draw.choice(places)
    change = draw.random()
    if change < 0.2:
        del holder[key]
    elif change < 0.3 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = copy.deepcopy(draw.choice(ODD))
    return value


@pytest.mark.parametrize("name", [*NAMES, "generic", "ft_collection"])
def test_a_mutated_row_gives_pairs_or_a_reason(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    own = [line["row"] for line in lines(name)] if name in NAMES else OTHERS[name]
    for number in range(80):
        row = draw.choice(own)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            row = mutate(row, draw)
        found, dropped, rows = read(name, write_jsonl(tmp_path / f"{number}.jsonl", [row]))
        assert rows == 1 and (found or dropped), row
        (tmp_path / f"{number}.jsonl").unlink()


@pytest.mark.parametrize("name", A_QUESTION_PER_ROW)
def test_rows_in_are_pairs_and_dropped(name: str, tmp_path: Path) -> None:
    draw = random.Random(f"{name} rows")
    own = [line["row"] for line in lines(name)]
    rows = [mutate(draw.choice(own), draw) if draw.random() < 0.6 else draw.choice(own) for _ in range(60)]
    found, dropped, count = read(name, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert count == 60 == sum(map(len, found.values())) + dropped.total()


COT = {"Q": "Who?\nOptions:\n- Ann\n- Bo\nLet's think step by step.", "A": "See.\nTherefore, the answer is Ann"}
OTHERS: dict[str, list[dict[str, Any]]] = {
    "generic": [
        {"id": "1", "context": "Ann ran.", "qa": [{"question": "Who?", "answer": "Ann", "options": ["Ann", "Bo"]}]},
        {"context": "Ann ran.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}},
        {"passage": "Ann.", "question": "Who?", "choices": {"text": ["Bo", "Ann"], "label": ["A", "B"]}, "answer": 1},
    ],
    "ft_collection": [
        {"context": "Ann ran.", "QA_list": [{"Q": "Who?", "A": "Ann"}, COT], "QA_type": "free", "rc_name": "set"}
    ],
}
