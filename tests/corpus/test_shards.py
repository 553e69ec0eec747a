"""Shards: whole or absent, resumable, refused when other settings made them, damage named by file."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import write_whole
from ipt_jax.core.manifest import difference
from ipt_jax.core.stage import Output
from ipt_jax.corpus import read_documents
from ipt_jax.corpus.records import Document, Parent, Segment, decode, encode
from ipt_jax.corpus.shards import Shards, read_manifest

IDENTITY = {"seed": 0, "text": {"field": "text"}}


def document(number: int) -> Document:
    return Document(f"d{number}", "test", "raw", [Segment(f"text {number}")], [Parent("p", 0, number)])


def fill(path: Path, shards: int = 2, each: int = 3, identity: dict = IDENTITY) -> None:
    with Output(path, stage="test", identity=identity, shard_name="documents") as output:
        for shard in range(shards):
            records = [encode(document(shard * each + at)) for at in range(each)]
            output.seal(shard, shards, records, tokens=10, counts={"pairs": 2}, dropped={"empty_text": 1})
        output.finish({"note": 1})


def test_round_trip(tmp_path: Path) -> None:
    fill(tmp_path / "o")
    assert [one.id for one in read_documents(tmp_path / "o")] == ["d0", "d1", "d2", "d3", "d4", "d5"]
    manifest = read_manifest(tmp_path / "o", "test")
    assert (manifest.records, manifest.tokens, manifest.counts, manifest.dropped) == (
        6,
        20,
        {"pairs": 4},
        {"empty_text": 2},
    )
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == [
        ".lock",
        "documents-00000-of-00002.array_record",
        "documents-00001-of-00002.array_record",
        "manifest.json",
    ]
    shards = Shards(tmp_path / "o")
    assert [decode(record, Document).id for record in shards.__getitems__([5, 0, 3, 0])] == ["d5", "d0", "d3", "d0"]
    assert decode(shards[4], Document) == document(4)


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    for name in ("documents-00000-of-00002.array_record", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_whole_is_kept_and_leftovers_go(tmp_path: Path) -> None:
    with Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents") as output:
        output.seal(1, 2, [b"one"])
    (tmp_path / "o" / "documents-00000.7.tmp").write_bytes(b"half")
    with Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents") as output:
        assert list(output.entries) == [1] and not output.manifest.complete
        assert not list((tmp_path / "o").glob("*.tmp"))
    with pytest.raises(UserError, match="has not finished; rerun it"):
        Shards(tmp_path / "o")


def test_a_deleted_shard_is_made_again(tmp_path: Path) -> None:
    fill(tmp_path / "o")
    (tmp_path / "o" / "documents-00001-of-00002.array_record").unlink()
    with Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents") as output:
        assert list(output.entries) == [0] and not output.manifest.complete


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path / "o")
    with pytest.raises(UserError, match=r"made with text.field='text', now 'body'; set another output"):
        fill(tmp_path / "o", identity={"seed": 0, "text": {"field": "body"}})
    assert difference("1e24" * 16, "805a" * 16) == (
        "1e241e241e24…, now 805a805a805a…: the contents of this input have changed since"
    )
    with pytest.raises(UserError, match="made by stage 'test', not 'render'"):
        Output(tmp_path / "o", stage="render", identity=IDENTITY, shard_name="documents").__enter__()


def test_a_foreign_directory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds 'thesis.txt' but no manifest"):
        fill(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "thesis.txt"]


def test_an_unwritable_output_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot be written"):
        fill(Path("/proc/nowhere"))


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def endless() -> Iterator[bytes]:
        yield b"one"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"),
        Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents") as output,
    ):
        output.seal(0, 1, endless())
    assert not (tmp_path / "o").exists()


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "page.html", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "page.html", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("page.html", b"old")]


def test_a_mistake_after_the_first_shard_keeps_it(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError),
        Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents") as output,
    ):
        output.seal(0, 2, [b"one"])
        raise UserError("line 7 is not valid JSON")
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == [
        ".lock",
        "documents-00000-of-00002.array_record",
        "manifest.json",
    ]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "131071 bytes, the manifest says 131072"),
        (lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "differ from the manifest's checksum"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path: Path, damage, said: str) -> None:
    fill(tmp_path / "o")
    file = tmp_path / "o" / "documents-00001-of-00002.array_record"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        Shards(tmp_path / "o")
    assert "documents-00001-of-00002.array_record" in str(caught.value)


def test_only_stages_that_ask_no_model_mend_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fill(tmp_path / "o")
    file = tmp_path / "o" / "documents-00001-of-00002.array_record"
    whole, listed = file.read_bytes(), (tmp_path / "o" / "manifest.json").read_text()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match="documents-00001.*; delete this file, then rerun its stage"):
        Shards(tmp_path / "o")
    with Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents") as output:
        assert list(output.entries) == [0, 1] and output.manifest.complete
    with Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents", remake=True) as output:
        assert list(output.entries) == [0] and not output.manifest.complete
    assert "differ from the manifest's checksum" in capsys.readouterr().err
    (tmp_path / "o" / "manifest.json").write_text(listed.replace('"tokens": 20', '"tokens": 30'))
    with pytest.raises(UserError, match="restore it from a backup, or rerun stage 'test'"):
        Shards(tmp_path / "o")
    with pytest.raises(UserError, match="restore it from a backup, or write to another output"):
        fill(tmp_path / "o")
    with Output(tmp_path / "o", stage="test", identity=IDENTITY, shard_name="documents", remake=True) as output:
        assert output.entries == {}


def test_an_output_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    with pytest.raises(UserError, match=r"/o: cannot be written \(File exists\); this is a file; set a directory"):
        fill(tmp_path / "o")
    assert (tmp_path / "o").read_text() == "mine"


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "o")
    (tmp_path / "o" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        Shards(tmp_path / "o")


HOLDER = """
import sys, time
from ipt_jax.core.stage import Output
with Output(sys.argv[1], stage="test", identity={}, shard_name="documents"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_writers_and_a_killed_one(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "o")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing here"):
        Output(tmp_path / "o", stage="test", identity={}, shard_name="documents").__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    time.sleep(0.1)
    with Output(tmp_path / "o", stage="test", identity={}, shard_name="documents") as output:
        assert not output.manifest.complete


def test_another_record_is_named() -> None:
    with pytest.raises(UserError, match="record is not a Document"):
        decode(b"\x93\x01\x02\x03", Document)
