"""One corpus in any format and layout: the same documents, the same ids; formats and paths as people have them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from extras import need

from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings, expand_path
from ipt_jax.corpus.duplicates import find_duplicates
from ipt_jax.corpus.records import Document, Segment
from ipt_jax.corpus.row_reader import Dropped, SourceSettings
from ipt_jax.corpus.sources import Corpus, find_files, read_rows, read_unit
from synth.config import RunSettings
from synth.render.documents import HubSettings

ROWS = [{"id": f"r{number}", "text": f'line {number}, "é"\nand\u2028more'} for number in range(7)]
DOCUMENTS = [Document(row["id"], "s", "raw", [Segment(row["text"])]) for row in ROWS]


def read(*sources: object, unit_bytes: int = 1 << 20) -> list[Document | Dropped]:
    given = [one if isinstance(one, dict) else {"path": str(one)} for one in sources]
    corpus = Corpus([SourceSettings.model_validate({"source": "s"} | one) for one in given])
    return [row for unit in corpus.units(unit_bytes) for row in read_unit(unit, corpus.source_of(unit))]


def ids(*sources: object) -> list[str]:
    return [one.id for one in read(*sources) if isinstance(one, Document)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


def arrow(rows: list[dict]) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


FORMS: dict[str, Callable[[list[dict]], bytes]] = {
    "lines.jsonl": lines,
    "lines.json": lines,
    "array.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "wrapped.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "table.csv": table,
    "table.tsv": lambda rows: table(rows, "\t"),
    "columns.parquet": parquet,
    "batches.arrow": arrow,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", PACKERS)
def test_every_format_plain_and_compressed_gives_the_same_documents(tmp_path: Path, form: str, ending: str) -> None:
    path = tmp_path / (form + ending)
    path.write_bytes(PACKERS[ending](FORMS[form](ROWS)))
    assert read(path) == read(path, unit_bytes=1) == DOCUMENTS
    (file,) = find_files(SourceSettings(path=str(path)))
    assert [row for _, row in read_rows(file)] == ROWS
    if ending:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match=f"{form}"):
            read(path)


def test_text_files_are_a_text_each(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, text in {"a/1.txt": "one", "a/2.txt": "  ", "b.txt": "two\n\nlines", "c.txt": ""}.items():
        (tmp_path / name).write_text(text)
    found = read(tmp_path)
    assert found == [
        Document("b.txt:1", "s", "raw", [Segment("two\n\nlines")]),
        Dropped("empty_text"),
        Document("a/1.txt:1", "s", "raw", [Segment("one")]),
        Dropped("empty_text"),
    ]
    assert read({"path": str(tmp_path), "text": "data.text", "id": "key"}) == found
    units = Corpus(SourceSettings(path=str(tmp_path))).units()
    assert [len(unit.files) for unit in units] == [4]
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="b.txt: not UTF-8 at byte 3"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.json", b'[{"text": "a"}, {"text": ]', "x.json: row 2 is not valid JSON"),
        ("x.json", b'[{"text": "a"},', "x.json: its array ends after row 1"),
        ("x.json", b'[{"text": "a"}, 3]', "x.json: row 2 is a int, expected an object"),
        ("x.csv", b"id,text\n1,a,b\n", r"x.csv: row 1 \(line 2\) has 3 cells, its first line names 2"),
        ("x.csv", b'id,text\n1,"a\n', r"x.csv: row 1 .* is not valid CSV"),
        ("x.csv", b"id,id\n1,2\n", "its first line names 'id' twice"),
        ("x.csv", b"id,body\n1,a\n", "x.csv: row 1: no field 'text', found body, id"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("x.docx", b"a", "unknown kind of file; expected .jsonl"),
    ],
)
def test_faults_of_files_name_the_place(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)


NESTED = [
    {"doc": {"text": "a", "title": "A", "parts": [{"text": "x"}, {"text": None}, {"text": "y"}]}, "meta": {"id": 7}},
    {"doc": {"text": None, "title": "B", "parts": []}, "meta": {"id": 8}},
]


@pytest.mark.parametrize("form", ["lines.jsonl", "columns.parquet", "batches.arrow"])
def test_nested_fields_and_lists_of_parts(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    path.write_bytes(FORMS[form](NESTED))
    (first, second) = read({"path": str(path), "text": "doc.text", "id": "meta.id"})
    assert isinstance(first, Document) and (first.id, first.text) == ("7", "a") and second == Dropped("null_text")
    (first, second) = read({"path": str(path), "text": "doc.parts.text"})
    assert isinstance(first, Document) and first.text == "x\ny" and second == Dropped("null_text")
    (first, second) = read({"path": str(path), "text": ["doc.title", "doc.text"]})
    assert [one.text for one in (first, second) if isinstance(one, Document)] == ["A\na", "B"]
    with pytest.raises(UserError, match=r"'doc.body', found doc.parts, doc.text, doc.title|found doc.text, doc.title"):
        read({"path": str(path), "text": "doc.body"})


def test_a_null_field_of_a_template_is_left_out(tmp_path: Path) -> None:
    rows = [{"title": None, "text": "b"}, {"title": "T", "text": "b"}, {"title": "T", "text": None}]
    (tmp_path / "x.jsonl").write_bytes(lines([*rows, {"title": None, "text": None}]))
    found = read({"path": str(tmp_path / "x.jsonl"), "template": "{title}\n{text}"})
    assert [one.text if isinstance(one, Document) else one.reason for one in found] == ["b", "T\nb", "T", "null_text"]


def test_ids_are_names_relative_to_the_input(tmp_path: Path) -> None:
    """The same names in two folders, anywhere; several inputs; ids that restart in each file; ids of contents."""
    for root in ("here", "elsewhere/deep"):
        for part in ("en", "de"):
            (tmp_path / root / part).mkdir(parents=True)
            (tmp_path / root / part / "part-0.jsonl").write_bytes(lines([{"text": part}, {"text": part + "2"}]))
    expected = ["de/part-0.jsonl:1", "de/part-0.jsonl:2", "en/part-0.jsonl:1", "en/part-0.jsonl:2"]
    assert ids(tmp_path / "here") == ids(tmp_path / "elsewhere/deep") == ids(tmp_path / "here/*/*.jsonl") == expected
    one, two = ids(tmp_path / "here/en"), ids(tmp_path / "here/en", tmp_path / "here/de")
    assert two == [*one, "de/part-0.jsonl:1", "de/part-0.jsonl:2"] and one == ["part-0.jsonl:1", "part-0.jsonl:2"]
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": 0, "text": "x"}, {"id": 1, "text": "y"}]))
    (tmp_path / "b.jsonl").write_bytes(lines([{"id": 0, "text": "x"}, {"id": None, "text": "z"}]))
    assert ids(tmp_path / "*.jsonl") == ["0", "1", "0", "b.jsonl:2"]
    corpus = Corpus(SourceSettings(path=str(tmp_path / "*.jsonl")))
    with pytest.raises(UserError, match=r"duplicate id '0', row 1 of a.jsonl and row 1 of b.jsonl; make .* id: null"):
        find_duplicates(corpus, corpus.units(), drop=False, label="test")
    files = {"path": str(tmp_path / "*.jsonl"), "id": None}
    assert ids(files) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    content = Corpus(SourceSettings(path=str(tmp_path / "*.jsonl"), id="content"))
    assert find_duplicates(content, content.units(), drop=False, label="test").texts == {1: [0]}
    assert len(set(ids({"path": str(tmp_path / "*.jsonl"), "id": "content"}))) == 3


def test_clones_of_hub_data_sets_are_read_by_their_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / "dataset_infos.json").write_text('{"default": {"text": "no row"}}')
    (clone / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    (clone / "data" / "train-00000-of-00001.parquet").write_bytes(parquet(ROWS))
    (clone / "extra.jsonl").write_bytes(lines([{"id": "no", "text": "row of the clone"}]))
    assert read(clone) == DOCUMENTS
    assert "files not read: 3 (README.md, …)" in capsys.readouterr().err
    (clone / "data" / "test-00000-of-00001.parquet").write_bytes(parquet(ROWS[:2]))
    with pytest.raises(UserError, match="has files of several splits; set split to one of test, train"):
        read(clone)
    assert read({"path": str(clone), "split": "test"}) == DOCUMENTS[:2]
    configs = (
        "---\nconfigs:\n- config_name: big\n  default: true\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "- config_name: small\n  data_files: extra.jsonl\n---\n"
    )
    (clone / "README.md").write_text(configs)
    assert read(clone) == DOCUMENTS and ids({"path": str(clone), "subset": "small"}) == ["no"]
    with pytest.raises(UserError, match="several subsets; set subset to one of big, small"):
        read({"path": str(clone), "subset": "medium"})


def test_empty_files_beside_others_and_info_files_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part-0.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "part-1.jsonl").write_bytes(b"")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    assert read(tmp_path) == read(tmp_path / "*") == DOCUMENTS
    assert capsys.readouterr().err.count("files not read: 2 (_SUCCESS, …)") == 2


def test_paths_with_home_variables_and_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", str(tmp_path))
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
    for path in ("~/x.jsonl", "$CORPUS/x.jsonl", "${CORPUS}/x.jsonl", f"file://{tmp_path}/x.jsonl"):
        assert read(path) == DOCUMENTS
        assert expand_path(path) == f"{tmp_path}/x.jsonl"
    recipe = {"synthesizer": {"model": "~/m", "engine": "scripted"}, "corpus": "~/x.jsonl", "output": "~/out"}
    made = check_settings(RunSettings, recipe, "recipe")
    assert (made.output, made.synthesizer.model) == (f"{tmp_path}/out", f"{tmp_path}/m")
    with pytest.raises(UserError, match=r"recipe: output: the variable \$NOWHERE is not set"):
        check_settings(RunSettings, {**recipe, "output": "$NOWHERE/out"}, "recipe")


def test_a_corpus_is_a_block_a_path_or_a_list_of_both() -> None:
    recipe = {"synthesizer": {"model": "m", "engine": "scripted"}, "output": "out"}

    def corpus(value: object) -> list[tuple[str, object]]:
        found = check_settings(RunSettings, {**recipe, "corpus": value}, "recipe").corpus
        return [(one.path, one.text) for one in found]

    assert corpus("a") == corpus({"path": "a"}) == corpus(["a"]) == [("a", "text")]
    assert corpus(["a", {"path": "b", "text": "data.text"}]) == [("a", "text"), ("b", "data.text")]
    with pytest.raises(UserError, match=r"recipe: corpus\.fraction: .*less than or equal to 1"):
        corpus({"path": "a", "fraction": 2})
    with pytest.raises(UserError, match=r"recipe: unknown key 'corpus\.1\.texts'; did you mean 'corpus"):
        corpus(["a", {"path": "b", "texts": "c"}])


@pytest.mark.extra
def test_remote_files_are_listed_and_read_in_ranges() -> None:
    fsspec = need("fsspec", extra="cloud")
    store = fsspec.filesystem("memory")
    files = {"a.jsonl": lines(ROWS[:3]), "b/c.parquet": parquet(ROWS[3:5])}
    files["b/d.json.gz"] = gzip.compress(lines(ROWS[5:]))
    for name, data in files.items():
        store.pipe(f"/bucket/corpus/{name}", data)
    assert read("memory://bucket/corpus") == read("memory://bucket/corpus", unit_bytes=7) == DOCUMENTS
    assert read("memory://bucket/corpus/*.jsonl", "memory://bucket/corpus/b/*") == DOCUMENTS
    assert read({"path": "memory://bucket/corpus/a.jsonl", "id": None})[0].id == "a.jsonl:1"  # type: ignore[union-attr]
    identity = Corpus(SourceSettings(path="memory://bucket/corpus")).identity()
    store.pipe("/bucket/corpus/a.jsonl", lines(ROWS[:2]))
    assert identity != Corpus(SourceSettings(path="memory://bucket/corpus")).identity()
    with pytest.raises(UserError, match="input memory://bucket/none: no such file"):
        read("memory://bucket/none")
    with pytest.raises(UserError, match="input nowhere://x: .*use a local path, s3://, gs://, hf:// or https://"):
        read("nowhere://x")


def test_names_of_languages_are_refused_with_their_code() -> None:
    with pytest.raises(ValueError, match="'English' is not a language code .*; write en for English"):
        HubSettings(output="o", name="n", license="mit", language=["English"])
    for code in ("en", "zh-Hant", "yue", "multilingual"):
        HubSettings(output="o", name="n", license="mit", language=[code])


def test_what_a_file_may_not_be_read_says(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(table(ROWS))
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads all
        with pytest.raises(UserError, match=r"x.csv: cannot be read \(Permission denied\)"):
            read(path)
