"""Sources: every form gives the same rows, any cut into units gives the same rows, every fault names file and line."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Document, Segment, TokenDocument, encode
from ipt_jax.corpus.row_reader import Dropped, SourceSettings
from ipt_jax.corpus.sources import Corpus, read_unit

ROWS = [{"id": f"r{number}", "text": f"line {number} é\u2028x"} for number in range(7)]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_source(source: SourceSettings) -> Iterator[Document | Dropped]:
    for unit in Corpus(source).units():
        yield from read_unit(unit, source)


def write_all_forms(folder: Path) -> list[Path]:
    (folder / "a.jsonl").write_bytes(jsonl(ROWS))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    (folder / "c.jsonl.zst").write_bytes(zstd.compress(jsonl(ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet", row_group_size=3)
    with Output(folder / "e", stage="render", identity={}, shard_name="documents") as output:
        documents = [Document(row["id"], "s", "raw", [Segment(row["text"])]) for row in ROWS]
        output.seal(0, 2, map(encode, documents[:4]))
        output.seal(1, 2, map(encode, documents[4:]))
        output.finish()
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e")]


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    for path in write_all_forms(tmp_path):
        documents = list(read_source(SourceSettings(path=str(path), source="s")))
        assert documents == [Document(row["id"], "s", "raw", [Segment(row["text"])]) for row in ROWS], path


def test_directories_and_globs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(jsonl(ROWS[:2]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[2:3]))
    (tmp_path / "notes.md").write_text("not a source")
    ids = [one.id for one in read_source(SourceSettings(path=str(tmp_path))) if isinstance(one, Document)]
    assert ids == ["r2", "r0", "r1"]
    assert f"input {tmp_path}: files not read: 1 (notes.md); expected .jsonl" in capsys.readouterr().err
    ids = [one.id for one in read_source(SourceSettings(path=f"{tmp_path}/*.jsonl")) if isinstance(one, Document)]
    assert ids == ["r2"]


def test_a_kind_that_the_documents_contradict_is_refused(tmp_path: Path) -> None:
    path = str(write_all_forms(tmp_path)[-1])
    assert len(list(read_source(SourceSettings(path=path, kind="raw")))) == len(ROWS)
    with pytest.raises(UserError, match="record 1 has kind raw, the recipe sets kind task; remove kind"):
        list(read_source(SourceSettings(path=path, kind="task")))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(1, 80), st.booleans())
def test_any_cut_into_units_gives_every_row_once(tmp_path: Path, texts: list[str], unit_bytes: int, end: bool) -> None:
    data = jsonl([{"id": str(number), "text": f"t{text}"} for number, text in enumerate(texts)])
    (tmp_path / "x.jsonl").write_bytes(data if end else data[:-1])
    source = SourceSettings(path=str(tmp_path / "x.jsonl"))
    rows = [row for unit in Corpus(source).units(unit_bytes) for row in read_unit(unit, source)]
    assert [row.id for row in rows if isinstance(row, Document)] == [str(number) for number in range(len(texts))]


def test_templates_join_fields_and_keep_braces(tmp_path: Path) -> None:
    (tmp_path / "i.jsonl").write_bytes(jsonl([{"q": "What is {a}?", "a": "a {q}"}]))
    (document,) = read_source(SourceSettings(path=str(tmp_path / "i.jsonl"), template="{q} {a}", kind="instruction"))
    assert isinstance(document, Document) and (document.text, document.id) == ("What is {a}? a {q}", "i.jsonl:1")


def test_unusable_rows_are_dropped_with_a_reason(tmp_path: Path) -> None:
    lines = [
        '{"text": ""}',
        '{"text": " \\n"}',
        '{"text": null}',
        '{"text": "a\\ud800"}',
        "",
        '{"text": "b\\u0000<s>"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = list(read_source(SourceSettings(path=str(tmp_path / "x.jsonl"))))
    assert rows[:4] == [
        Dropped("empty_text"),
        Dropped("empty_text"),
        Dropped("null_text"),
        Dropped("lone_surrogate"),
    ]
    assert isinstance(rows[4], Document) and rows[4].text == "b\x00<s>"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"text": "a"}\n{bad\n', "line 2 is not valid JSON"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2: no field 'text', found body"),
        (b'{"text": [1]}\n', "line 1: field 'text' is a int, expected text"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
        (b'{"text": "a"}\n[1]\n', "line 2 is a list, expected an object"),
        (b"[1]\n", "holds one JSON array; write one object per line"),
        (b"", "the file is empty"),
        (b'[\n {"text": "a"}\n]\n', "holds one JSON array; write one object per line"),
        (b'{"text": ' + b"1" * 5000 + b"}\n", "line 1 is not valid JSON"),
    ],
)
def test_faults_name_file_and_line_wherever_the_units_fall(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(data)
    source = SourceSettings(path=str(tmp_path / "x.jsonl"))
    for unit_bytes in (1, 7, 1000):
        with pytest.raises(UserError) as caught:
            [row for unit in Corpus(source).units(unit_bytes) for row in read_unit(unit, source)]
        assert said in str(caught.value) and "x.jsonl" in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:1]))
    (document,) = read_source(SourceSettings(path=str(tmp_path / "x.jsonl")))
    assert isinstance(document, Document) and document.id == "r0"


def test_tokens_are_no_documents(tmp_path: Path) -> None:
    with Output(tmp_path / "o", stage="tokenize", identity={}, shard_name="tokens") as output:
        output.seal(0, 1, [encode(TokenDocument("a", "raw", "uint16", b"", []))])
        output.finish()
    with pytest.raises(
        UserError, match=r"tokens-00000-of-00001.*record 1 is not a document \(made by stage 'tokenize'"
    ):
        list(read_source(SourceSettings(path=str(tmp_path / "o"))))


def test_absent_and_cut_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Corpus(SourceSettings(path=str(tmp_path / "none.jsonl"))).units()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS * 50))[:60])
    with pytest.raises(UserError, match="cut short"):
        list(read_source(SourceSettings(path=str(tmp_path / "cut.jsonl.gz"))))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="x.parquet: its footer cannot be read"):
        list(read_source(SourceSettings(path=str(tmp_path / "x.parquet"))))


def test_identity_is_contents_not_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(jsonl(ROWS))
    one, two = (Corpus(SourceSettings(path=str(tmp_path / name / "x.jsonl"))).identity() for name in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "x.jsonl").write_bytes(jsonl(ROWS[:-1]))
    assert one != Corpus(SourceSettings(path=str(tmp_path / "two" / "x.jsonl"))).identity()
