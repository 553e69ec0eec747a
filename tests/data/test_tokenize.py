"""`ipt tokenize`: ids, targets and counts to the token; the same bytes for any workers and after any kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from extras import ROOT
from hypothesis import given
from hypothesis import strategies as st
from token_shards import save_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import file_digest
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import Document, Parent, Segment, TokenDocument, encode
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from ipt_jax.data.encode import TokenRow, tokenize_documents
from ipt_jax.data.token_index import index_path, read_index, read_parents
from ipt_jax.data.token_shards import read_token_documents
from ipt_jax.data.tokenize import TokenizeInput, TokenizeSettings, run_tokenize


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(path: Path, tokenizer: Tokenizer, output: Path, **changes: object) -> TokenizeSettings:
    source = TokenizeInput(path=str(path), source="s")
    fields = {"inputs": [source], "tokenizer": str(tokenizer.directory), "output": str(output), "workers": 1} | changes
    return TokenizeSettings.model_validate(fields)


def read(output: Path) -> list[TokenDocument]:
    return list(read_token_documents(output))


def ids(document: TokenDocument) -> list[int]:
    return np.frombuffer(document.tokens, "<u2").tolist()


def checksums(output: Path) -> dict[str, str]:
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(output)): file_digest(path) for path in files}


def test_raw_documents_and_what_is_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "a world"}, {"id": "b", "text": " \n"}, {"id": "c", "text": None}, {"text": "words"}]
    result = run_tokenize(settings(write_jsonl(tmp_path / "in.jsonl", rows), tokenizer, tmp_path / "out"))
    first, last = read(tmp_path / "out")
    assert ids(first) == [1, *tokenizer.encode("a world"), 2]
    assert first.loss_runs == [(1, len(ids(first)))]  # BOS is no target, EOS is
    assert (first.id, first.kind, first.source, last.id) == ("a", "raw", "s", "in.jsonl:4")
    assert result["documents"] == 2 and result["tokens"] == len(ids(first)) + len(ids(last))
    assert result["dropped"] == {"empty_text": 1, "null_text": 1}
    assert result["tokens_per_second"] > 0 and result["kinds"] == {"raw": 2} and result["duplicate_ids"] == 0
    manifest = Shards(tmp_path / "out").manifest
    assert manifest.tokens == result["tokens"]
    assert (manifest.identity["tokenizer"], manifest.identity["vocab_size"]) == (tokenizer.digest, tokenizer.vocab_size)
    assert load_tokenizer(tmp_path / "out" / "tokenizer").digest == tokenizer.digest


def test_side_files_tell_lengths_and_characters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "small words " * (i + 1)} for i in range(5)]
    run_tokenize(settings(write_jsonl(tmp_path / "in.jsonl", rows), tokenizer, tmp_path / "out", unit_bytes=90))
    shards = Shards(tmp_path / "out")
    indexes = list(read_index(shards.path, shards.manifest))
    assert len(indexes) == len(shards.manifest.shards) > 1
    index = np.concatenate(indexes)
    assert index["tokens"].tolist() == [len(ids(document)) for document in read(tmp_path / "out")]
    assert index["characters"].tolist() == [len(row["text"]) for row in rows]


def tokenize_document(document: Document, tokenizer: Tokenizer, **policy: bool) -> TokenRow:
    (row,) = tokenize_documents([document], tokenizer, **policy)
    return row


def test_control_segments_and_loss_runs(tokenizer: Tokenizer) -> None:
    segments = [
        Segment(control="bos", loss=False),
        Segment("a world", loss=False),
        Segment(" of", loss=True),
        Segment(" words", loss=True),
        Segment(control="eos", loss=True),
        Segment(control="bos"),
        Segment("a", loss=False),
        Segment(control="eos", loss=False),
    ]
    row = tokenize_document(Document("x", "s", "task", segments), tokenizer)
    prompt, answer = tokenizer.encode("a world"), tokenizer.encode(" of", True) + tokenizer.encode(" words", True)
    assert row.tokens.tolist() == [1, *prompt, *answer, 2, 1, *tokenizer.encode("a"), 2]
    assert row.loss_runs == [(1 + len(prompt), 2 + len(prompt) + len(answer))]


def test_policy_acts_only_without_controls(tokenizer: Tokenizer) -> None:
    plain = Document("x", "s", "augmented", [Segment("a"), Segment(" b", loss=False)])
    assert tokenize_document(plain, tokenizer).tokens.tolist() == [
        1,
        *tokenizer.encode("a"),
        *tokenizer.encode(" b", True),
        2,
    ]
    assert tokenize_document(plain, tokenizer, bos=False, eos=False).tokens.tolist() == tokenizer.encode("a b")
    ended = Document("x", "s", "task", [Segment("a"), Segment(control="eos")])
    assert tokenize_document(ended, tokenizer).tokens.tolist() == [*tokenizer.encode("a"), 2]


@given(
    st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "<s", ">", "a", " ", "é", "\n", "日"]), min_size=1, max_size=12)
)
def test_text_that_spells_a_control_token_never_becomes_one(tokenizer: Tokenizer, parts: list[str]) -> None:
    row = tokenize_document(Document("x", "s", "raw", [Segment("".join(parts))]), tokenizer)
    ids, covered = row.tokens.tolist(), row.characters.tolist()
    assert ids[0] == 1 and ids[-1] == 2
    assert not {0, 1, 2} & set(ids[1:-1])
    assert covered[0] == covered[-1] == 0 and sum(covered) == len("".join(parts)) and len(covered) == len(ids)
    assert row.loss_runs == [(1, len(ids))]


def test_documents_of_a_stage_and_their_parents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parents = [Parent("raw-1", 0, 5), Parent("raw-2", 2, 9)]
    documents = [
        Document("g", "s", "augmented", [Segment("a world")], parents, {"layout": "plain"}),
        Document("e", "s", "augmented", [Segment("")]),
    ]
    with Output(tmp_path / "in", stage="render", identity={}, shard_name="documents") as output:
        output.seal(0, 1, map(encode, documents))
        output.finish()
    result = run_tokenize(settings(tmp_path / "in", tokenizer, tmp_path / "out"))
    (document,) = read(tmp_path / "out")
    assert document.parents == parents and result["dropped"] == {"empty_text": 1}
    shards = Shards(tmp_path / "out")
    assert read_parents(shards.path, shards.manifest)[["start", "end"]].tolist() == [(0, 5), (2, 9)]


def test_mistakes_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "text": "a"}, {"id": "b", "text": "b"}])
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"id": "a", "text": "a"}, {"id": "a", "text": "b"}])
    bare = load_tokenizer(save_tokenizer(tmp_path / "bare", controls=False))
    with pytest.raises(UserError, match="has no BOS.*set bos: false"):
        run_tokenize(settings(rows, bare, tmp_path / "bare-out"))
    with pytest.raises(UserError, match=r"duplicate id 'a', row 1 of twice.jsonl and row 2 of twice.jsonl"):
        run_tokenize(settings(twice, tokenizer, tmp_path / "twice"))
    assert run_tokenize(settings(rows, tokenizer, tmp_path / "out"))["duplicate_ids"] == 0
    other = TokenizeInput(path=str(rows), source="s", eos=False)
    with pytest.raises(UserError, match=r"inputs\.0\.eos=True, now False"):
        run_tokenize(settings(rows, tokenizer, tmp_path / "out", inputs=[other]))
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="every document was dropped.*empty_text"):
        run_tokenize(settings(empty, tokenizer, tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_duplicate_ids_are_counted_in_any_number_of_passes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "in"
    documents = [Document(f"{i % 7}", "s", "raw", [Segment(f"words {i}")]) for i in range(20)]
    with Output(rows, stage="render", identity={}, shard_name="documents") as output:
        output.seal(0, 2, map(encode, documents[:9]))
        output.seal(1, 2, map(encode, documents[9:]))
        output.finish()
    for passes in (1, 3, 20):
        monkeypatch.setattr("ipt_jax.data.tokenize.IDS_PER_PASS", -(-20 // passes))
        result = run_tokenize(settings(rows, tokenizer, tmp_path / str(passes), unit_bytes=100))
        assert result["duplicate_ids"] == 13


def many_rows(path: Path, count: int) -> Path:
    draw = random.Random(0)
    words = ["a", "small", "world", "of", "words", "other", "things", "日本", "été"]
    rows = [{"id": str(i), "text": " ".join(draw.choices(words, k=draw.randint(1, 400)))} for i in range(count)]
    return write_jsonl(path, rows)


def test_workers_change_no_byte_and_a_lost_file_is_made_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = many_rows(tmp_path / "in.jsonl", 300)
    for workers in (1, 2):
        run_tokenize(settings(rows, tokenizer, tmp_path / str(workers), unit_bytes=50_000, workers=workers))
    wanted = checksums(tmp_path / "1")
    assert checksums(tmp_path / "2") == wanted
    shard = Shards(tmp_path / "2").manifest.shards[1].name
    index_path(tmp_path / "2", shard, "index").unlink()
    (tmp_path / "2" / Shards(tmp_path / "1").manifest.shards[2].name).unlink()
    run_tokenize(settings(rows, tokenizer, tmp_path / "2", unit_bytes=50_000))
    assert checksums(tmp_path / "2") == wanted


def test_killed_then_finished_gives_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = many_rows(tmp_path / "in.jsonl", 1200)
    killed = settings(rows, tokenizer, tmp_path / "killed", unit_bytes=40_000, workers=2)
    code = "import sys; from ipt_jax.data.tokenize import *; "
    code += "run_tokenize(TokenizeSettings.model_validate_json(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, killed.model_dump_json()], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list((tmp_path / "killed").glob("*.array_record"))) < 3:
        time.sleep(0.005)
    assert process.poll() is None, "it finished before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.5)  # its workers follow
    with pytest.raises(UserError, match="has not finished"):
        Shards(tmp_path / "killed", "tokenize")
    result = run_tokenize(killed)
    assert result["documents"] == 1200
    run_tokenize(settings(rows, tokenizer, tmp_path / "whole", unit_bytes=40_000))
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
