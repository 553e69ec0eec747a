"""Inputs of other tools and hostile rows: Hugging Face and TFDS data sets, templates, filters, what is refused."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from extras import need
from token_shards import save_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Document, Segment, encode
from ipt_jax.corpus.row_reader import Dropped, SourceSettings
from ipt_jax.corpus.sources import Corpus, read_unit
from ipt_jax.data.token_shards import read_token_documents
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize

ROWS = [{"id": f"r{number}", "text": f"line {number} é"} for number in range(7)]
DOCUMENTS = [Document(row["id"], "s", "raw", [Segment(row["text"])]) for row in ROWS]


def documents(path: Path | str, unit_bytes: int = 1 << 20, **fields: object) -> list[Document | Dropped]:
    source = SourceSettings.model_validate({"path": str(path), "source": "s"} | fields)
    return [row for unit in Corpus(source).units(unit_bytes) for row in read_unit(unit, source)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- data sets of other libraries


def arrow(path: Path, rows: list[dict], batch: int = 3, file_format: bool = False) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    new = pyarrow.ipc.new_file if file_format else pyarrow.ipc.new_stream
    with path.open("wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


@pytest.mark.parametrize("file_format", [False, True])
def test_arrow_files_in_any_cut(tmp_path: Path, file_format: bool) -> None:
    path = arrow(tmp_path / "x.arrow", ROWS, file_format=file_format)
    assert len(Corpus(SourceSettings(path=str(path))).units(1)) == 3
    assert documents(path, 1) == documents(path) == DOCUMENTS


@pytest.mark.extra
def test_saved_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = need("datasets", extra="hf")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "two")
    assert documents(tmp_path / "one") == documents(tmp_path / "two", split="train") == DOCUMENTS
    assert documents(tmp_path / "two", split="test") == DOCUMENTS[:1]
    with pytest.raises(UserError, match=r"two: several splits; set split to one of train, test"):
        documents(tmp_path / "two")
    with pytest.raises(UserError, match=r"two: no split 'dev'; set split to one of train, test"):
        documents(tmp_path / "two", split="dev")
    with pytest.raises(UserError, match=r"one: has no splits, but split is train; remove split"):
        documents(tmp_path / "one", split="train")
    train, test = (SourceSettings(path=str(tmp_path / "two"), split=split) for split in ("train", "test"))
    assert Corpus(train).identity()["contents"] != Corpus(test).identity()["contents"]
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="no such file, but its data set lists it"):
        documents(tmp_path / "one")


@pytest.mark.extra
def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder takes the library's whole way but for the network."""
    need("datasets", extra="hf")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    assert documents(f"hf:{tmp_path / 'set'}") == DOCUMENTS
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        documents("hf:nobody/nothing")
    assert str(caught.value).startswith("input hf:nobody/nothing: cannot be downloaded (")
    assert str(caught.value).endswith("check the name, subset and network, or set a local path")
    assert "\n" not in str(caught.value)


def tfds_directory(path: Path, splits: dict[str, list[int]], form: str = "array_record") -> Path:
    """What TFDS leaves after preparing ROWS as ArrayRecord, `splits` naming the rows of each file of a split."""
    tfds = need("tensorflow_datasets", extra="tfds")
    writer_module = need("array_record.python.array_record_module", extra="test")
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
    features.save_config(path)
    listed = []
    for split, sizes in splits.items():
        first = 0
        for number, size in enumerate(sizes):
            name = path / f"tiny-{split}.array_record-{number:05d}-of-{len(sizes):05d}"
            writer = writer_module.ArrayRecordWriter(str(name), "group_size:1")
            for row in ROWS[first : first + size]:
                writer.write(features.serialize_example(row))
            writer.close()
            first += size
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(size) for size in sizes]
        listed.append({"name": split, "shardLengths": lengths, "numBytes": "1", "filepathTemplate": template})
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": form, "moduleName": "tiny", "splits": listed}
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


@pytest.mark.extra
def test_tfds_directories(tmp_path: Path) -> None:
    path = tfds_directory(tmp_path / "tiny" / "1.0.0", {"train": [4, 3], "test": [2]})
    assert documents(path, split="train") == documents(path, 1, split="train") == DOCUMENTS
    assert documents(tmp_path / "tiny", split="test") == DOCUMENTS[:2]
    with pytest.raises(UserError, match=r"several splits; set split to one of train, test"):
        documents(path)
    source = SourceSettings(path=str(path), split="train", source="s")
    assert len(Corpus(source).identity()["contents"]) == 1
    tfds_directory(tmp_path / "tiny" / "2.0.0", {"train": [7]})
    with pytest.raises(UserError, match="has 2 TFDS data sets; set one of them"):
        documents(tmp_path / "tiny")
    other = tfds_directory(tmp_path / "old", {"train": [7]}, form="tfrecord")
    with pytest.raises(UserError, match="prepared as tfrecord, which only TensorFlow reads"):
        documents(other)


def test_a_stage_beside_other_files_is_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    jsonl(tmp_path / "in" / "x.jsonl", ROWS[:3])
    jsonl(tmp_path / "in" / ".cache" / "x.jsonl", ROWS)
    with Output(tmp_path / "in" / "y", stage="render", identity={}, shard_name="documents") as output:
        output.seal(0, 1, map(encode, DOCUMENTS[3:]))
        output.finish()
    assert documents(tmp_path / "in") == DOCUMENTS


def test_what_several_links_lead_to_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    jsonl(tmp_path / "in" / "x.jsonl", ROWS)
    (tmp_path / "in" / "a.jsonl").symlink_to("x.jsonl")
    (tmp_path / "in" / "sub" / "loop").symlink_to("..")
    (tmp_path / "elsewhere").symlink_to("in")
    read = [documents(tmp_path / "in"), documents(tmp_path), documents(tmp_path / "**" / "*.jsonl")]
    assert read == [DOCUMENTS] * 3


def test_splits_and_subsets_where_there_are_none(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(UserError, match="has no splits, but split is train; remove split"):
        documents(path, split="train")
    with pytest.raises(UserError, match="subset en is only for hf:NAME; remove it"):
        documents(path, subset="en")


# ---- templates and filters


@pytest.mark.parametrize(
    ("template", "loss", "segments"),
    [
        ("{q} {a}", None, [Segment("What? It.")]),
        ("{q} {a}", ["a"], [Segment("What?", False), Segment(" It.")]),
        ("Q: {q}\nA: {a}\n", ["a"], [Segment("Q: What?\nA:", False), Segment(" It."), Segment("\n", False)]),
        ("{q}{a}", ["q", "a"], [Segment("What?It.")]),
        ("{a}{q}\n\n{a}", ["q"], [Segment("It.", False), Segment("What?"), Segment("\n\nIt.", False)]),
    ],
)
def test_templates(tmp_path: Path, template: str, loss: list[str] | None, segments: list[Segment]) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"q": "What?", "a": "It.", "id": 5}])
    (document,) = documents(path, template=template, loss=loss, kind="instruction")
    assert document == Document("5", "s", "instruction", segments)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "none"}, "names no field"),
        ({"template": "{q}", "loss": ["a"]}, "loss names 'a', not a field of the template; set q"),
        ({"loss": ["a"]}, "loss names 'a', not a field of the template"),
        ({"min_characters": 9, "max_characters": 8}, "max_characters 8 is below min_characters 9"),
    ],
)
def test_templates_that_cannot_be(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SourceSettings.model_validate({"path": "x"} | fields)


def test_targets_that_are_empty_and_lengths_out_of_bounds_are_counted(tmp_path: Path) -> None:
    rows = [{"q": "Who?", "a": answer} for answer in ("", " ", "yes", "yes indeed", None)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    bounds = {"min_characters": 9, "max_characters": 10}
    found = documents(path, template="{q} {a}", loss=["a"], **bounds)
    reasons = [one.reason if isinstance(one, Dropped) else one.text for one in found]
    assert reasons == ["empty_target", "empty_target", "too_short", "too_long", "null_text"]
    assert [one.reason for one in documents(path, text="q", **bounds) if isinstance(one, Dropped)] == ["too_short"] * 5


def test_duplicates_over_all_inputs_keep_the_first(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    texts = ["a world", "words", "a world", "  ", "a world ", "words"]
    one = jsonl(tmp_path / "one.jsonl", [{"id": f"a{i}", "text": text} for i, text in enumerate(texts)])
    two = jsonl(tmp_path / "two.jsonl", [{"id": f"b{i}", "text": text} for i, text in enumerate(["words", "other"])])
    for unit_bytes in (30, 1 << 20):
        output = tmp_path / str(unit_bytes)
        fields = {"tokenizer": str(tokenizer), "output": str(output), "workers": 1, "unit_bytes": unit_bytes}
        inputs = [{"path": str(one)}, {"path": str(two)}]
        recipe = TokenizeSettings.model_validate({"inputs": inputs, "drop_duplicates": True} | fields)
        assert run_tokenize(recipe)["dropped"] == {"duplicate": 3, "empty_text": 1}
        assert [document.id for document in read_token_documents(output)] == ["a0", "a1", "a4", "b1"]


# ---- hostile files


def test_all_frames_of_a_zstd_file_are_read_and_a_cut_one_is_told(tmp_path: Path) -> None:
    data = [json.dumps(row).encode() + b"\n" for row in ROWS]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"".join(zstd.compress(b"".join(part)) for part in (data[:3], data[3:4], [], data[4:])))
    assert documents(path) == DOCUMENTS
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"x.jsonl.zst: cut short .* after line 4"):
        documents(path)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(data[:4])) + gzip.compress(b"".join(data[4:])))
    assert documents(path) == DOCUMENTS
    broken = bytearray(path.read_bytes())
    broken[10] |= 0x06  # a kind of block that does not exist
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"x.jsonl.gz: cut short or not compressed as its name says, after line 0"):
        documents(path)


def parquet(path: Path, **columns: pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_columns_that_are_absent_nested_or_no_utf8(tmp_path: Path) -> None:
    nested = parquet(tmp_path / "n.parquet", text=pyarrow.array([{"body": "a"}]), id=pyarrow.array(["x"]))
    with pytest.raises(UserError, match=r"n.parquet: row 1: field 'text' is a dict, expected text"):
        documents(nested)
    with pytest.raises(UserError, match=r"n.parquet: no column 'body', found text.body, id; name another column"):
        documents(nested, text="body")
    binary = pyarrow.array([b"caf\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    with pytest.raises(UserError, match=r"u.parquet: a text is not UTF-8"):
        documents(parquet(tmp_path / "u.parquet", text=binary))
    nulls = parquet(tmp_path / "0.parquet", text=pyarrow.array([None, "a"], pyarrow.string()))
    assert documents(nulls) == [
        Dropped("null_text"),
        Document("0.parquet:2", "s", "raw", [Segment("a")]),
    ]
    whole = parquet(tmp_path / "cut.parquet", text=pyarrow.array(["a" * 9] * 1000))
    data = bytearray(whole.read_bytes())
    data[8:60] = bytes(52)
    whole.write_bytes(data)
    with pytest.raises(UserError, match=r"cut.parquet: row group 0 cannot be read"):
        documents(whole)


def test_ids(tmp_path: Path) -> None:
    rows = [{"key": 7, "text": "a"}, {"key": None, "text": "b"}, {"key": "\ud800", "text": "c"}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    named = documents(path, id="key")
    assert [getattr(one, "id", None) or one.reason for one in named] == ["7", "x.jsonl:2", "lone_surrogate"]
    with pytest.raises(UserError, match=r"x.jsonl: line 1: no field 'uid', found key, text; set the id field"):
        documents(path, id="uid")
    with pytest.raises(UserError, match=r"line 1: field 'key' is a list, expected an id"):
        documents(jsonl(tmp_path / "y.jsonl", [{"key": ["a"], "text": "a"}]), id="key")


def test_a_file_that_may_not_be_read_is_named_as_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "x.jsonl", ROWS)

    def refuse(self: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"input .*x.jsonl: cannot be read \(Permission denied\)"):
        documents(path)


def test_documents_of_all_units(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", ROWS)
    assert documents(path) == DOCUMENTS
