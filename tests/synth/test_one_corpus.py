"""One corpus in many formats and layouts, through all stages; and runs whose corpus is renamed and grows."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from synthkit import recipe, settings, write_tokenizer

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.shards import read_documents, read_manifest
from ipt_jax.data.token_shards import read_token_documents
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize
from synth import read_groups
from synth.config import RunSettings
from synth.decontaminate.run import DecontaminateSettings, run_decontaminate
from synth.generate.run import run_synth
from synth.mine.run import MineSettings, run_mine

ROWS = [
    {"id": f"t{n}", "text": f"Anna Smith is a baker. The mill {n} stands by the river.", "source": "s"}
    for n in range(24)
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def layouts(folder: Path) -> dict[str, Any]:
    """The corpus of each layout, as a recipe states it."""
    write(folder / "one.jsonl", lines(ROWS))
    write(folder / "parts/a/0.json.gz", gzip.compress(json.dumps(ROWS[:9], indent=1).encode()))
    write(folder / "parts/b/0.jsonl.xz", lzma.compress(lines(ROWS[9:])))
    table = pyarrow.Table.from_pylist(ROWS)
    write(folder / "clone/README.md", b"---\nlicense: mit\n---\n")
    write(folder / "clone/dataset_infos.json", b'{"text": "none"}')
    (folder / "clone/data").mkdir()
    pyarrow.parquet.write_table(table, folder / "clone/data/train-0.parquet", row_group_size=5)
    with (folder / "one.arrow").open("wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)
    write_table(folder / "one.csv", ROWS, ",")
    write_table(folder / "one.tsv", ROWS, "\t")
    nested = [{"meta": {"id": row["id"]}, "data": {"text": row["text"]}, "source": "s"} for row in ROWS]
    write(folder / "nested.jsonl", lines(nested))
    fields = {"text": "data.text", "id": "meta.id"}
    write(folder / "first.jsonl", lines(ROWS[:5]))
    write(folder / "second.jsonl", lines(nested[5:]))
    return {
        "lines": f"{folder}/one.jsonl",
        "folder of compressed files": f"{folder}/parts",
        "glob": f"{folder}/parts/*/0.*",
        "clone of the hub": f"{folder}/clone",
        "arrow": f"{folder}/one.arrow",
        "csv": f"{folder}/one.csv",
        "tsv": {"path": f"{folder}/one.tsv"},
        "nested": {"path": f"{folder}/nested.jsonl", **fields},
        "list": [f"{folder}/first.jsonl", {"path": f"{folder}/second.jsonl", **fields}],
    }


def stages(folder: Path, corpus: Any, model: Path) -> dict[str, Any]:
    """What the stages make of a corpus."""
    inputs = corpus if isinstance(corpus, list) else [corpus]
    half = [{"fraction": 0.5, **({"path": one} if isinstance(one, str) else one)} for one in inputs]
    plain = {**recipe(folder, texts=1), "corpus": half, "rounds": 2, "output": str(folder / "groups")}
    run_synth(check_settings(RunSettings, plain, "recipe"))
    mine = {"corpus": half, "workers": 1, "output": str(folder / "mined")}
    run_mine(check_settings(MineSettings, mine, "recipe"))
    tokenize = {"inputs": corpus, "tokenizer": str(model), "workers": 1, "output": str(folder / "tokens")}
    run_tokenize(check_settings(TokenizeSettings, tokenize, "recipe"))
    named = [{"name": f"n{n}", **({"path": one} if isinstance(one, str) else one)} for n, one in enumerate(inputs)]
    benchmark = write(folder / "questions.csv", b"question\nwhat is never in any of these texts at all\n")
    questions = {"path": str(benchmark), "fields": ["question"]}
    clean = {"inputs": named, "benchmarks": questions, "workers": 1, "output": str(folder / "clean")}
    run_decontaminate(check_settings(DecontaminateSettings, clean, "recipe"))
    return {
        "groups": [[(text.raw_id, text.text) for text in group.texts] for group in read_groups(folder / "groups")],
        "mined": [text.raw_id for group in read_groups(folder / "mined") for text in group.texts],
        "tokens": [(one.id, one.tokens) for one in read_token_documents(folder / "tokens")],
        "clean": [(one.id, one.text) for n in range(len(inputs)) for one in read_documents(folder / f"clean/n{n}")],
    }


def test_nine_layouts_through_all_stages(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for number, (name, corpus) in enumerate(layouts(tmp_path / "corpus").items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        found[name] = stages(folder, corpus, write_tokenizer(tmp_path / "model"))
    assert len(found) == 9
    expected = found["lines"]
    assert [name for name, _ in expected["tokens"]] == [row["id"] for row in ROWS]
    assert expected["clean"] == [(row["id"], row["text"]) for row in ROWS]
    converted = [name for group in expected["groups"] for name, _ in group]
    assert 4 < len(converted) < 20 and expected["mined"] == converted
    for name, one in found.items():
        assert one == expected, name


def test_one_rule_for_duplicates_in_all_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Duplicate ids are refused; equal texts are counted, dropped on request, and one document with id: content."""
    model = write_tokenizer(tmp_path / "model")
    write(tmp_path / "x/a.jsonl", lines([{"id": 1, "text": "a b c"}, {"id": 2, "text": "d e"}]))
    write(tmp_path / "x/b.jsonl", lines([{"id": 3, "text": "a b c"}, {"id": 2, "text": "f"}]))
    twice = r"duplicate id '2', row 2 of a.jsonl and row 2 of b.jsonl; make the ids unique"
    path = {"path": str(tmp_path / "x")}
    run = {**recipe(tmp_path, texts=1), "rounds": 2}

    def tokenize(name: str, **fields: Any) -> dict[str, Any]:
        plain = {"inputs": {**path, **fields}, "tokenizer": str(model), "output": str(tmp_path / name), "workers": 1}
        return run_tokenize(check_settings(TokenizeSettings, plain, "recipe"))

    def synth(name: str, drop: bool = False, **fields: Any) -> dict[str, Any]:
        plain = {**run, "corpus": {**path, **fields}, "drop_duplicates": drop, "output": str(tmp_path / name)}
        return run_synth(check_settings(RunSettings, plain, "recipe"))

    def mine(name: str, drop: bool = False, **fields: Any) -> dict[str, Any]:
        plain = {"corpus": {**path, **fields}, "drop_duplicates": drop, "output": str(tmp_path / name), "workers": 1}
        return run_mine(check_settings(MineSettings, plain, "recipe"))

    for stage in (tokenize, synth, mine):
        name = stage.__name__
        with pytest.raises(UserError, match=twice):
            stage(f"{name}-refused")
        assert not (tmp_path / f"{name}-refused").exists()
    assert synth("all", id=None)["texts"] == mine("mined", id=None)["texts"] == tokenize("t", id=None)["documents"] == 4
    assert capsys.readouterr().err.count("1 texts are equal to an earlier one; set drop_duplicates: true") == 2
    for result in (synth("s2", id="content"), mine("m2", id="content"), tokenize("t2", id="content")):
        assert result["dropped"] == {"duplicate": 1} and 3 in (result.get("texts"), result.get("documents"))
    for result in (synth("s3", True, id=None), mine("m3", True, id=None)):
        assert result["dropped"] == {"duplicate": 1} and result["texts"] == 3
    assert read_manifest(tmp_path / "t").inputs.ids == ["file and row"]  # type: ignore[union-attr]
    files = read_manifest(tmp_path / "s2").inputs.files  # type: ignore[union-attr]
    assert [one.name for one in files] == ["a.jsonl", "b.jsonl"]


# ---- kills, renames and growth


def corpus_rows(folder: Path) -> Counter[str]:
    return Counter(json.loads(line)["text"] for file in folder.glob("*") for line in file.read_text().splitlines())


def until_done(rng: Random, folder: Path, between: Any, **flags: Any) -> dict[str, Any]:
    """Runs with kills, and what people do between them, to the end."""
    for _ in range(20):
        dies_at = rng.choice([None, 1, 3, 6])
        faults = {"dies_at": dies_at} if dies_at else None
        run = settings(folder, corpus__path=str(folder / "corpus"), rounds=2, synthesizer__faults=faults)
        try:
            return run_synth(run, **flags)
        except Fault:
            between()
    return run_synth(settings(folder, corpus__path=str(folder / "corpus"), rounds=2), **flags)


@pytest.mark.parametrize("seed", range(20))
def test_kills_renames_and_growth(tmp_path: Path, seed: int) -> None:
    """Each text is converted once, with the id of its start, whatever happens to the names of the files."""
    rng = Random(seed)
    texts = (f"Text {number} of the old mill by the river." for number in range(10**6))
    corpus = tmp_path / "corpus"
    with_ids = rng.random() < 0.4

    def rows(count: int) -> bytes:
        made = [next(texts) for _ in range(count)]
        return lines([{"id": text.split()[1], "text": text} if with_ids else {"text": text} for text in made])

    def rename() -> None:
        files = sorted(corpus.iterdir())
        if rng.random() < 0.7:
            chosen = rng.choice(files)
            chosen.rename(corpus / f"{rng.randrange(10**6)}-{len(files)}.jsonl")

    for number in range(rng.randint(1, 3)):
        write(corpus / f"part-{number}.jsonl", rows(rng.randint(2, 9)))
    if rng.random() < 0.7:
        until_done(rng, tmp_path, rename)
    else:  # a run that never ends before the corpus grows
        with pytest.raises(Fault):
            run = settings(tmp_path, corpus__path=str(corpus), rounds=2, synthesizer__faults={"dies_at": 2})
            run_synth(run)
    for _ in range(rng.randint(1, 2)):
        new = corpus / f"new-{rng.randrange(10**6)}.jsonl"
        grown = rng.choice(sorted(corpus.iterdir())) if rng.random() < 0.5 else new
        with grown.open("ab") as file:
            file.write(rows(rng.randint(1, 7)))
        if not (tmp_path / "groups").exists():  # killed before its first group
            until_done(rng, tmp_path, rename)
            continue
        with pytest.raises(UserError, match=r"made of other files: .*\.jsonl .*--extend"):
            run_synth(settings(tmp_path, corpus__path=str(corpus), rounds=2))
        held = (tmp_path / "groups" / "manifest.json").read_bytes()
        try:
            until_done(rng, tmp_path, rename, extend=True)
        except UserError as error:  # a file was renamed and has grown: it cannot be recognized, and nothing has changed
            assert not with_ids and "are not in the corpus any more" in str(error)
            assert (tmp_path / "groups" / "manifest.json").read_bytes() == held
            return
    stored = [text for group in read_groups(tmp_path / "groups") for text in group.texts]
    assert Counter(text.text for text in stored) == corpus_rows(corpus)
    assert len({text.raw_id for text in stored}) == len(stored)
    manifest = read_manifest(tmp_path / "groups")
    assert manifest.count("texts") == len(stored)
    names = {one.name for one in manifest.inputs.files}  # type: ignore[union-attr]
    assert with_ids or {text.raw_id.rpartition(":")[0] for text in stored} <= names


def test_an_extension_keeps_finished_groups_and_is_resumed_after_losses(tmp_path: Path) -> None:
    run = settings(tmp_path, texts=10)
    first = run_synth(run)
    before = {path.name: path.read_bytes() for path in (tmp_path / "groups").glob("*.array_record")}
    with (tmp_path / "corpus.jsonl").open("ab") as file:
        file.write(lines([{"id": f"n{n}", "text": f"New text {n}."} for n in range(5)] + [{"id": "e", "text": ""}]))
    more = run_synth(run, extend=True)
    assert (first["texts"], more["texts"], more["dropped"]) == (10, 15, {"empty_text": 1})
    after = {path.name: path.read_bytes() for path in (tmp_path / "groups").glob("*.array_record")}
    assert before.items() <= after.items() and len(after) > len(before)
    assert {**run_synth(run), "seconds": 0} == {**run_synth(run, extend=True), "seconds": 0} == {**more, "seconds": 0}
    (tmp_path / "groups" / sorted(before)[0]).unlink()
    assert run_synth(run)["texts"] == 15
    stored = Counter(text.raw_id for group in read_groups(tmp_path / "groups") for text in group.texts)
    assert stored == Counter([*(f"t{n}" for n in range(10)), *(f"n{n}" for n in range(5))])
    changed = (tmp_path / "corpus.jsonl").read_text().replace("New text 3", "Other text 3")
    (tmp_path / "corpus.jsonl").write_text(changed)
    with pytest.raises(UserError, match="text 'n3' has changed since it was converted, and --extend only adds"):
        run_synth(run, extend=True)


def test_failed_texts_of_an_extended_output_are_retried(tmp_path: Path) -> None:
    run = settings(tmp_path, texts=12, synthesizer__faults={"error": 0.3})
    failed = run_synth(run)["failed"]
    assert sum(failed.values()) > 0
    with (tmp_path / "corpus.jsonl").open("ab") as file:
        file.write(lines([{"id": f"n{n}", "text": f"New text {n}."} for n in range(5)]))
    run_synth(run, extend=True)
    result = run_synth(settings(tmp_path), retry_failed=True)
    assert result["failed"] == {} and result["texts"] == 17
    assert len({text.raw_id for group in read_groups(tmp_path / "groups") for text in group.texts}) == 17
