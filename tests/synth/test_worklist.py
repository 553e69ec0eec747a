"""The work list: any shard starts by itself with the same groups, in memory of one shard; a restart reads no corpus."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthkit import groups_of, settings, shard_bytes, write_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import FileHashCache, file_digest
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Document, Segment, encode
from ipt_jax.corpus.sources import Corpus
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth import read_groups
from synth.config import RunSettings
from synth.engine import weights_digest
from synth.generate import work_list
from synth.generate.run import run_synth
from synth.generate.work_list import form_groups, list_work, load_work, save_work
from synth.groups import Group

SHARED_FOLDER = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shards_apart(run: RunSettings) -> list[list[Group]]:
    """Each shard's groups, formed without the shards before it."""
    tokenizer = load_tokenizer(run.synthesizer.model)
    work = list_work(run, tokenizer, "run", Corpus(run.corpus))
    return [list(form_groups(run, tokenizer, work, [shard])) for shard in range(len(work.shards))]


ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["", "x", "y z. " * 60])), max_size=40)


@given(ROWS, st.integers(1, 3), st.integers(1, 4), st.sampled_from(["position", "source"]), st.booleans(), st.data())
@SHARED_FOLDER
def test_any_shard_starts_by_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[str, str]],
    rounds: int,
    size: int,
    grouping: str,
    split: bool,
    data: st.DataObject,
) -> None:
    texts = {f"t{number}": (source, text) for number, (source, text) in enumerate(rows) if text}
    if not texts:
        return
    write_rows(
        tmp_path / "corpus.jsonl",
        [{"id": f"t{number}", "source": source, "text": text} for number, (source, text) in enumerate(rows)],
    )
    monkeypatch.setattr(work_list, "UNIT_BYTES", data.draw(st.sampled_from([40, 500, 10_000])))
    run = settings(
        tmp_path,
        rounds=rounds,
        groups_per_shard=size,
        grouping=grouping,
        long_texts="split" if split else "cut",
        synthesizer__max_model_len=260,
        synthesizer__max_new_tokens=100,
    )
    shards = shards_apart(run)
    groups = [group for shard in shards for group in shard]
    assert groups == groups_of(run)
    assert [group.number for group in groups] == list(range(len(groups)))
    assert all(len(shard) == size for shard in shards[:-1]) and 1 <= len(shards[-1]) <= size
    assert len({group.id for group in groups}) == len(groups)
    assert all(len({text.source for text in group.texts}) == 1 for group in groups if grouping == "source")
    asked = sorted((text.id, *span) for group in groups for text, span in zip(group.texts, group.spans, strict=True))
    by_id: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in asked:
        by_id.setdefault(name, []).append((start, end))
    assert by_id.keys() == texts.keys()
    for name, spans in by_id.items():
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == len(texts[name][1])
        assert split or len(spans) == 1
    if grouping == "position":
        assert all(len(group.texts) == rounds for group in groups[:-1])


def test_short_groups_by_source_are_few(tmp_path: Path) -> None:
    """A shard ends where one more text would open a group too many; only there, and at the end, are groups short."""
    rows = [{"id": str(n), "text": "x", "source": "ab"[n % 2]} for n in range(12)]
    write_rows(tmp_path / "corpus.jsonl", rows)
    groups = groups_of(settings(tmp_path, rounds=2, groups_per_shard=3, grouping="source"))
    assert [[text.id for text in group.texts] for group in groups] == [
        ["0", "2"],
        ["1", "3"],
        ["4"],  # text 5 opens the next shard's first group
        ["5", "7"],
        ["6", "8"],
        ["9"],
        ["10"],
        ["11"],
    ]


def test_forms_of_files(tmp_path: Path) -> None:
    rows = [{"id": f"t{n}", "text": f"text {n}. " * (1 + n % 3), "source": "s"} for n in range(80)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_rows(folder / "a.jsonl", rows[:20])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[20:30]).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[30:50]), folder / "c.parquet", row_group_size=7)
    table = pyarrow.Table.from_pylist(rows[50:65])
    with pyarrow.ipc.new_stream(folder / "d.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    with Output(folder / "e", stage="render", identity={}, shard_name="documents") as output:
        documents = [Document(row["id"], "s", "raw", [Segment(row["text"])]) for row in rows[65:]]
        output.seal(0, 2, map(encode, documents[:5]))
        output.seal(1, 2, map(encode, documents[5:]))
        output.finish()
    run = settings(tmp_path, corpus__path=str(folder), rounds=2, groups_per_shard=4)
    shards = shards_apart(run)
    assert [text.id for shard in shards for group in shard for text in group.texts] == [f"t{n}" for n in range(80)]
    assert len(shards) == 10


@given(st.permutations(range(30)), st.sets(st.integers(0, 29), max_size=10))
@SHARED_FOLDER
def test_whether_a_text_is_converted_follows_from_seed_and_id(
    tmp_path: Path, order: list[int], absent: set[int]
) -> None:
    def converted(numbers: list[int]) -> set[str]:
        write_rows(tmp_path / "corpus.jsonl", [{"id": f"t{n}", "text": f"x {n}"} for n in [*numbers, 99]])
        run = settings(tmp_path, corpus__fraction=0.5, seed=3)
        return {text.id for group in groups_of(run) for text in group.texts} - {"t99"}

    every = converted(list(range(30)))
    assert 5 <= len(every) <= 25
    rest = [number for number in order if number not in absent]
    try:
        assert converted(rest) == every - {f"t{n}" for n in absent}
    except UserError as error:
        assert "no text to convert" in str(error) and every <= {f"t{n}" for n in absent}


def refuse_reading(*_: Any) -> Any:
    raise AssertionError("the corpus was read")


def test_restart_reads_neither_corpus_nor_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings(tmp_path, synthesizer__faults={"malformed": 0.3})
    expected, before = run_synth(run), shard_bytes(run.output)
    settle(tmp_path / "corpus.jsonl")
    interrupt(run, shard=2)
    run_synth(run)  # hashes the settled corpus, and keeps that
    interrupt(run, shard=2)
    read: list[str] = []
    real = work_list.read_texts

    def reading(*arguments: Any) -> Any:
        for text in real(*arguments):
            read.append(text.document.id)
            yield text

    monkeypatch.setattr(work_list, "list_work", refuse_reading)
    monkeypatch.setattr("synth.generate.run.list_work", refuse_reading)
    monkeypatch.setattr("ipt_jax.core.hashing.file_digest", refuse_reading)
    monkeypatch.setattr(work_list, "read_texts", reading)
    assert {**run_synth(run), "seconds": 0} == {**expected, "seconds": 0}
    assert shard_bytes(run.output) == before
    assert read == [f"t{number}" for number in range(18, 27)]


def settle(path: Path) -> None:
    """Sets the file's time back and waits until its inode's is old enough for the digest to be kept."""
    past = time.time() - 10
    os.utime(path, (past, past))
    time.sleep(max(0.0, path.stat().st_ctime + 2.1 - time.time()))


def interrupt(run: RunSettings, shard: int) -> None:
    """What a kill before the sealing of one shard leaves."""
    folder = Path(run.output)
    (found,) = folder.glob(f"groups-{shard:05d}-*")
    found.unlink()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"fingerprint": "x"}', None])
def test_a_damaged_or_foreign_list_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    run = settings(tmp_path)
    run_synth(run)
    path = Path(run.output) / "worklist" / "list.json"
    before = path.read_bytes()
    interrupt(run, shard=1)
    path.write_bytes(before.replace(b'"texts":30', b'"texts":31') if damage is None else damage)
    assert run_synth(run)["texts"] == 30
    assert path.read_bytes() == before


def test_a_list_holds_no_path_and_goes_with_its_run(tmp_path: Path) -> None:
    run = settings(tmp_path)
    work = list_work(run, load_tokenizer(write_tokenizer(tmp_path / "model")), "run", Corpus(run.corpus))
    save_work(tmp_path / "list.json", work)
    assert str(tmp_path) not in (tmp_path / "list.json").read_text()
    work.files, work.states = [], {}  # those of another call's files say nothing
    assert load_work(tmp_path / "list.json", "run") == work
    assert load_work(tmp_path / "list.json", "other") is None
    assert load_work(tmp_path / "absent.json", "run") is None


def test_corpus_may_move(tmp_path: Path) -> None:
    run = settings(tmp_path)
    expected = run_synth(run)
    interrupt(run, shard=0)
    (tmp_path / "corpus.jsonl").rename(tmp_path / "moved.jsonl")
    moved = settings(tmp_path, texts=0, corpus__path=str(tmp_path / "moved.jsonl"), corpus__source="corpus")
    with pytest.raises(UserError, match=r"corpus\.source"):
        run_synth(moved)
    again = run_synth(settings(tmp_path, texts=0, corpus__path=str(tmp_path / "moved.jsonl")))
    assert {**again, "seconds": 0} == {**expected, "seconds": 0}


def test_weights_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    settle(tmp_path / "model.safetensors")
    first = FileHashCache(tmp_path / "digests.json")
    expected = weights_digest(str(tmp_path), first)
    first.save()
    assert expected == weights_digest(str(tmp_path))
    monkeypatch.setattr("ipt_jax.core.hashing.file_digest", refuse_reading)
    assert weights_digest(str(tmp_path), FileHashCache(tmp_path / "digests.json")) == expected


def test_digests_are_kept_while_a_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def hashing(path: Path) -> str:
        hashed.append(Path(path).name)
        return file_digest(path)

    monkeypatch.setattr("ipt_jax.core.hashing.file_digest", hashing)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        settle(tmp_path / name)
    (tmp_path / "fresh").write_text("fresh")

    def ask() -> list[str]:
        hashed.clear()
        known = FileHashCache(tmp_path / "digests.json")
        found = [known(tmp_path / name) for name in ("a", "b", "fresh")]
        known.save()
        assert found == [file_digest(tmp_path / name) for name in ("a", "b", "fresh")]
        return list(hashed)

    assert ask() == ["a", "b", "fresh"]
    assert ask() == ["fresh"]
    state = (tmp_path / "b").stat()
    (tmp_path / "b").write_text("c")  # as long as before, and its time set back
    os.utime(tmp_path / "b", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert ask() == ["b", "fresh"]
    (tmp_path / "digests.json").write_text((tmp_path / "digests.json").read_text().replace("a ", "a  "))
    assert ask() == ["a", "b", "fresh"]


def test_split_texts_are_asked_about_whole(tmp_path: Path) -> None:
    """`cut` asks about the beginnings; `split` about all, each part a text of its own; the figures tell both."""
    rows = [{"id": f"t{n}", "text": "Anna walks by the old mill. " * (1 + 9 * (n % 3 == 0))} for n in range(12)]
    write_rows(tmp_path / "corpus.jsonl", rows)
    window = {"synthesizer__max_model_len": 400, "synthesizer__max_new_tokens": 250}
    cut = run_synth(settings(tmp_path, **window, output=str(tmp_path / "cut")))
    run = settings(tmp_path, **window, long_texts="split", groups_per_shard=2)
    split = run_synth(run)
    assert (cut["texts"], cut["texts_cut"], cut["texts_split"]) == (12, 4, 0)
    assert (split["texts"], split["texts_cut"], split["texts_split"]) == (20, 0, 12)
    spans: dict[str, list[tuple[int, int]]] = {}
    for group in read_groups(run.output):
        for text in group.texts:
            assert text.text == rows[int(text.raw_id[1:])]["text"][text.start : text.end]
            spans.setdefault(text.raw_id, []).append((text.start, text.end))
    assert {name: found[-1][1] for name, found in spans.items()} == {row["id"]: len(row["text"]) for row in rows}
    assert all(end == start for found in spans.values() for (_, end), (start, _) in zip(found, found[1:], strict=False))
    before = shard_bytes(run.output)
    interrupt(run, shard=1)
    assert {**run_synth(run), "seconds": 0} == {**split, "seconds": 0}
    assert shard_bytes(run.output) == before


def test_every_text_is_accounted_for(tmp_path: Path) -> None:
    """Each text stands in a record with how its answer ended, or is dropped for a reason; ends of chains count too."""
    rows: list[dict[str, Any]] = [{"id": f"t{n}", "text": "Anna sees the mill. " * (1 + n % 7)} for n in range(60)]
    rows += [{"id": "blank", "text": " "}, {"id": "null", "text": None}, {"id": "wide", "text": "\U0001f642" * 90}]
    write_rows(tmp_path / "corpus.jsonl", rows)
    faults = {"malformed": 0.4, "truncated": 0.3, "error": 0.2}
    run = settings(
        tmp_path, synthesizer__faults=faults, synthesizer__max_model_len=500, synthesizer__max_new_tokens=300
    )
    result = run_synth(run)
    texts = [text for group in read_groups(run.output) for text in group.texts]
    assert result["texts"] == len(texts) == sum(result["finished"].values()) == 61
    assert result["dropped"] == {"empty_text": 1, "null_text": 1}
    assert set(result["finished"]) == {"stop", "length", "error"}
    without = sum(all(not pair.accepted for pair in text.pairs) for text in texts)
    assert result["texts_without_pairs"] == without > result["finished"]["error"]
    assert result["examples_dropped"] > 0 and result["texts_cut"] == 1


def test_another_format_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_synth(settings(tmp_path))
    monkeypatch.setattr("synth.generate.run.FORMAT", 99)
    with pytest.raises(UserError, match="made with format="):
        run_synth(settings(tmp_path))
