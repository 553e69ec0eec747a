"""Data sets for the hub: rows that say what the documents are, files whole or absent, a card that the hub can read."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from extras import ROOT, need
from renderkit import EVEN, PAIRS, group, odd_group, recipe
from synthkit import write_tokenizer
from test_render import write_groups

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import SynthGroup
from ipt_jax.corpus.shards import read_documents
from synth.format.parser import reject
from synth.format.wire import wire_pair
from synth.render.dataset_card import SCHEMA, cell, features, fenced, size_category
from synth.render.documents import RenderSettings
from synth.render.run import run_render


def shards_of_groups() -> list[list[SynthGroup]]:
    scored = wire_pair("Who?", "Ann | Bo")
    scored.scores = {"grounded": 0.5, "language": 1.0}
    plain = [group(f"plain{i}", [[wire_pair("Why?", "Rain")]]) for i in range(3)]
    return [
        [*plain, group("a", [PAIRS, []]), group("b", [[reject(PAIRS[0], "no_answer"), scored]], ["Ann.\n```\ncode"])],
        [],
        [group("none", [[]], ["<script>alone</script> \u202e \0"]), group("c", [PAIRS, PAIRS[:2]])],
    ]


def hub_recipe(folder: Path, **hub: object) -> RenderSettings:
    given = {"output": str(folder / "hub"), "name": "Tales", "license": "cc-by-4.0", "language": ["en"], **hub}
    where = {"groups": str(folder / "groups"), "output": str(folder / "documents")}
    return recipe(**where, layouts=EVEN, one_shot=0.5, hub=given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_groups(tmp_path / "groups", shards_of_groups())
    return tmp_path


def read_rows(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "hub" / "data").iterdir())
    if files[0].suffix == ".parquet":
        return [row for file in files for row in pq.read_table(file).to_pylist()]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]


def cut(row: dict[str, Any], part: str) -> list[str]:
    return [row["text"][span["start"] : span["end"]] for span in row["spans"] if span["part"] == part]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_are_the_documents_with_their_pairs_beside_them(folder: Path, kind: str) -> None:
    run_render(hub_recipe(folder, format=kind))
    assert sorted(path.name for path in (folder / "hub").iterdir()) == ["README.md", "data", "export.json"]
    names = [f"train-0000{i}-of-00003.{kind}" for i in range(3)]
    assert sorted(path.name for path in (folder / "hub" / "data").iterdir()) == names
    rows, documents = read_rows(folder), list(read_documents(folder / "documents"))
    assert [(row["id"], row["text"], row["kind"]) for row in rows] == [(d.id, d.text, d.kind) for d in documents]
    by_id = {row["id"].split(".")[0]: row for row in rows if row["kind"] == "augmented"}
    assert by_id["b"]["pairs"] == [
        {
            "text": 0,
            "question": "Who?",
            "options": [],
            "rationale": None,
            "answer": "Ann | Bo",
            "format": "free",
            "scores": [{"name": "grounded", "value": 0.5}, {"name": "language", "value": 1.0}],
        }
    ]
    assert by_id["b"]["parents"] == [{"id": "b-0", "start": 3, "end": 3 + len("Ann.\n```\ncode")}]
    first = by_id["a"]
    assert [pair["options"] for pair in first["pairs"]][1] == ["Oslo", "Rome", "Bern"]
    assert [pair["rationale"] for pair in first["pairs"]] == [None, None, "Two and two.", "The barn is new."]
    assert cut(first, "question") == [pair["question"] for pair in first["pairs"]]
    assert [span["pair"] for span in first["spans"] if span["part"] == "answer"] == [0, 1, 2, 3]
    assert {span["pair"] for row in rows for span in row["spans"] if span["part"] == "text"} == {None}
    [raw] = [row for row in rows if row["id"] == "none.raw0"]
    assert (raw["layout"], raw["pairs"], raw["spans"]) == (None, [], [])


@pytest.mark.parametrize("limit", [None, 150])
def test_spans_of_odd_rows_name_their_pairs(tmp_path: Path, limit: int | None) -> None:
    stream = random.Random(5)
    write_groups(tmp_path / "groups", [[odd_group(stream, f"g{i}") for i in range(300)]])
    fields = {"tokenizer": str(write_tokenizer(tmp_path / "tokenizer")), "max_document_tokens": limit}
    result = run_render(hub_recipe(tmp_path).model_copy(update=fields))
    assert bool(result["split_for_row"]) == bool(limit)
    checked = 0
    rows = read_rows(tmp_path)
    assert [row["text"] for row in rows] == [document.text for document in read_documents(tmp_path / "documents")]
    for row in rows:
        for span in row["spans"]:
            if span["part"] in ("question", "rationale"):
                assert row["text"][span["start"] : span["end"]] == row["pairs"][span["pair"]][span["part"]]
                checked += 1
    assert checked > 200


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_datasets_loads_the_directory(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = need("datasets", extra="hf")
    run_render(hub_recipe(folder, format=kind))
    loaded = datasets.load_dataset(str(folder / "hub"), split="train", cache_dir=str(folder / "cache"))
    assert loaded.to_list() == read_rows(folder)
    assert loaded.features == datasets.Features.from_arrow_schema(SCHEMA)
    assert features(SCHEMA) == datasets.Features.from_arrow_schema(SCHEMA)._to_yaml_list()


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "hub" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_says_what_is_in_it(folder: Path) -> None:
    result = run_render(hub_recipe(folder, name="Tales | and\n# more", license="odc-by"))
    front, body = card(folder)
    assert {key: front[key] for key in ("license", "language", "size_categories", "pretty_name")} == {
        "license": "odc-by",
        "language": ["en"],
        "size_categories": ["n<1K"],
        "pretty_name": "Tales | and\n# more",
    }
    assert front["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert "multiple-choice" in front["task_categories"]
    assert body.splitlines()[1] == r"# Tales \| and # more"
    for line in (
        f"| documents | {result['documents']} |",
        f"| pairs | {result['pairs']} |",
        r"| free\_cot | 2 | 14.3% |",
        "| synthesizer | tiny, weights " + "w" * 64 + " |",
        "| filter of pairs | none: every pair that the parser accepted |",
    ):
        assert line in body.splitlines()
    for name, number in result["layouts"].items():
        assert f"| {cell(name)} | {number} | {number / sum(result['layouts'].values()):.1%} |" in body
    assert body.count("```text") == 2


def test_another_licence_has_a_name_and_a_place(folder: Path) -> None:
    with pytest.raises(UserError, match="requires license_name and license_link"):
        hub_recipe(folder, license="other", license_name="mine")
    with pytest.raises(UserError, match=r"hub\.license"):
        hub_recipe(folder, license="CC BY 4.0")
    with pytest.raises(UserError, match="hub.license is missing"):
        recipe(hub={"output": "x", "name": "x", "language": ["en"]})
    run_render(hub_recipe(folder, license="other", license_name="mine", license_link="LICENSE"))
    front, body = card(folder)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "mine", "LICENSE")
    assert "mine (LICENSE), as stated" in body


def test_a_second_run_makes_what_is_missing_and_the_same_bytes(folder: Path) -> None:
    run_render(hub_recipe(folder))
    hub = folder / "hub"
    whole = {path.name: path.read_bytes() for path in hub.rglob("*") if path.is_file()}
    kept = (hub / "data" / "train-00000-of-00003.parquet").stat().st_mtime_ns
    (hub / "data" / "train-00001-of-00003.parquet").unlink()
    (hub / "data" / "train-00002-of-00003.parquet").write_bytes(b"PAR1")
    (hub / "data" / "train-00000-of-00003.parquet.tmp").write_bytes(b"half")
    (hub / "README.md").unlink()
    run_render(hub_recipe(folder))
    assert {path.name: path.read_bytes() for path in hub.rglob("*") if path.is_file()} == whole
    assert (hub / "data" / "train-00000-of-00003.parquet").stat().st_mtime_ns == kept
    run_render(hub_recipe(folder, license="mit"))
    assert card(folder)[0]["license"] == "mit", "another licence needs no other rows"


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    stream = random.Random(2)
    write_groups(tmp_path / "groups", [[odd_group(stream, f"{s}-{i}") for i in range(400)] for s in range(4)])
    settings = tmp_path / "recipe.yaml"
    fields = {"groups": str(tmp_path / "groups"), "output": str(tmp_path / "documents"), "tokenizer": None}
    hub = {"output": str(tmp_path / "hub"), "name": "x", "license": "mit", "language": ["en"]}
    settings.write_text(json.dumps({**fields, "hub": hub}))
    command = [sys.executable, "-c", "from synth.cli import app; app()", "render", str(settings)]
    killed = 0
    for sight in ("documents/*.tmp", "documents/*-00002-of-*", "hub/data/*.tmp", "hub/data/*-00001-of-*.parquet"):
        running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while running.poll() is None and not any(tmp_path.glob(sight)):
            time.sleep(0.001)
        running.kill()
        killed += running.wait() != 0
    assert killed >= 3
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    found = files_of(tmp_path / "hub"), files_of(tmp_path / "documents")
    given = {"groups": str(tmp_path / "groups"), "output": str(tmp_path / "whole")}
    run_render(recipe(**given, hub={**hub, "output": str(tmp_path / "hub2")}))
    assert found == (files_of(tmp_path / "hub2"), files_of(tmp_path / "whole"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def test_other_directories_are_left_alone(folder: Path) -> None:
    (folder / "hub" / "data").mkdir(parents=True)
    (folder / "hub" / "data" / "train-mine.parquet").write_text("mine")
    with pytest.raises(UserError, match="contains 'data' but no export.json"):
        run_render(hub_recipe(folder))
    assert (folder / "hub" / "data" / "train-mine.parquet").read_text() == "mine"
    assert not (folder / "documents").exists(), "said before the work begins"
    (folder / "hub" / "data" / "train-mine.parquet").unlink()
    (folder / "hub" / "data").rmdir()
    run_render(hub_recipe(folder))
    with pytest.raises(UserError, match="contains other documents"):
        run_render(hub_recipe(folder, format="jsonl"))


def test_size_categories() -> None:
    assert [size_category(n) for n in (0, 999, 1000, 40_000_000)] == ["n<1K", "n<1K", "1K<n<10K", "10M<n<100M"]


def test_an_example_cannot_end_its_block() -> None:
    assert fenced("a\n```\nb") == "````text\na\n```\nb\n````"
    assert cell("a|b\n<c>") == r"a\|b \<c\>"
