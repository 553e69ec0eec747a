"""What goes wrong in a run: every loss is counted, failed groups can be asked again, nothing is silently short."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthkit import BOS, recipe, settings, shard_bytes, write_corpus, write_tokenizer
from test_synth_kill import COMMAND, Killed, kill_at

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus import read_documents
from ipt_jax.corpus.records import GroupText, SynthGroup, decode
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth import read_groups
from synth.config import FaultSettings, SynthesizerSettings
from synth.engine.base import Completion, GenerationRequest, RequestFailed
from synth.engine.scripted import ScriptedEngine
from synth.generate import run as run_module
from synth.generate.journal import Journal
from synth.generate.run import run_synth
from synth.render.documents import RenderSettings
from synth.render.run import run_render

FAULTS = {"error": 0.1, "timeout": 0.1}
LIMIT = 0.01


def faulty(folder: Path, **changes: Any) -> Any:
    """Settings of a run some of whose requests fail; the same output as without faults, by its identity."""
    return settings(folder, **{"synthesizer__faults": FAULTS, "synthesizer__request_timeout_seconds": LIMIT, **changes})


def test_a_request_that_hangs_is_given_up(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    synthesizer = SynthesizerSettings(
        model="m", engine="scripted", request_timeout_seconds=LIMIT, faults=FaultSettings(timeout=1.0)
    )
    asked = ScriptedEngine(synthesizer, tokenizer).generate(GenerationRequest("g/1/1", [BOS, 70], max_new_tokens=9))
    with pytest.raises(RequestFailed, match="no answer within 0.01 s") as failure:
        asyncio.run(asked)
    assert (failure.value.reason, failure.value.lasting) == ("timeout", False)


def test_requests_that_hang_need_a_limit() -> None:
    given = {"model": "m", "engine": "scripted", "faults": {"timeout": 0.1}}
    with pytest.raises(UserError, match="need request_timeout_seconds; set it"):
        check_settings(SynthesizerSettings, given, where="recipe")


def test_every_loss_is_counted_and_keeps_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = faulty(tmp_path, texts=60)
    result = run_synth(run)
    texts = [text for group in read_groups(run.output) for text in group.texts]
    failed = {reason: sum(text.finish_reason == reason for text in texts) for reason in ("error", "timeout")}
    assert result["failed"] == failed and min(failed.values()) > 0
    assert [text.raw_id for text in texts] == [f"t{number}" for number in range(60)]
    corpus = [json.loads(line)["text"] for line in Path(run.corpus[0].path).read_text().splitlines()]
    assert [text.text for text in texts] == corpus
    assert not [text for text in texts if text.finish_reason in failed and text.pairs]
    told = f"{sum(failed.values())} of 60 texts failed (error {failed['error']}, timeout {failed['timeout']})"
    assert told in capsys.readouterr().err
    rendered = check_settings(RenderSettings, {"groups": run.output, "output": str(tmp_path / "rendered")}, where="r")
    run_render(rendered)
    documents = "".join(document.text for document in read_documents(rendered.output))
    assert all(documents.count(text) == 1 for text in corpus)


@pytest.mark.parametrize("grouping", ["position", "source"])
def test_failed_groups_alone_are_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], grouping: str) -> None:
    undisturbed = settings(tmp_path, texts=60, grouping=grouping, output=str(tmp_path / "undisturbed"))
    expected = run_synth(undisturbed)
    failing = {
        group.id
        for group in (run_synth(faulty(tmp_path, grouping=grouping)), read_groups(tmp_path / "groups"))[1]
        if any(text.finish_reason in FAULTS for text in group.texts)
    }
    assert 0 < len(failing) < expected["groups"]
    asked = AskedGroups()
    with asked:
        result = run_synth(settings(tmp_path, grouping=grouping), retry_failed=True)
    assert asked.groups == failing
    assert f"{len(failing)} groups with failed texts are retried" in capsys.readouterr().err
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    assert shard_bytes(tmp_path / "groups") == shard_bytes(undisturbed.output)


class AskedGroups:
    """The ids of the groups whose requests reach the scripted engine inside the block."""

    def __enter__(self) -> None:
        self.groups: set[str] = set()
        self.patch = pytest.MonkeyPatch()
        generate = ScriptedEngine.generate

        async def watched(engine: ScriptedEngine, request: GenerationRequest) -> Completion:
            self.groups.add(request.id.split("/")[0])
            return await generate(engine, request)

        self.patch.setattr(ScriptedEngine, "generate", watched)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def test_without_failures_nothing_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(tmp_path)
    first, times = run_synth(run), [path.stat().st_mtime_ns for path in Path(run.output).glob("*.array_record")]
    assert {**run_synth(run, retry_failed=True), "seconds": 0} == {**first, "seconds": 0}
    assert [path.stat().st_mtime_ns for path in Path(run.output).glob("*.array_record")] == times
    assert "no text has failed; there is nothing to do" in capsys.readouterr().err


def test_what_fails_again_stays_counted(tmp_path: Path) -> None:
    first = run_synth(faulty(tmp_path, texts=60))
    again = run_synth(faulty(tmp_path), retry_failed=True)
    assert again["failed"] == first["failed"]


def test_unfinished_output_is_asked_again_and_finished(tmp_path: Path) -> None:
    """Sealed shards with failures, open ones with and without: one call makes it whole."""
    run_synth(undisturbed := settings(tmp_path, texts=60, output=str(tmp_path / "undisturbed")))
    with pytest.raises(Fault, match="died"):
        run_synth(faulty(tmp_path, synthesizer__faults={**FAULTS, "dies_at": 55}))
    run_synth(settings(tmp_path), retry_failed=True)
    assert shard_bytes(tmp_path / "groups") == shard_bytes(undisturbed.output)
    assert not (tmp_path / "groups" / "spool").exists()


@pytest.mark.parametrize("again", [True, False])
def test_retry_killed_at_every_write_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Sweeps the moment; then the same command, perhaps after a plain run, must give the undisturbed bytes."""
    changes: dict[str, Any] = {"texts": 12, "rounds": 2, "groups_per_shard": 3, "synthesizer__faults": {"error": 0.3}}
    run_synth(undisturbed := settings(tmp_path, texts=12, rounds=2, groups_per_shard=3, output=str(tmp_path / "u")))
    expected, moment, finished = shard_bytes(undisturbed.output), 0, False
    while not finished:
        failed = settings(tmp_path, **changes, output=str(tmp_path / f"killed{moment}"))
        well = settings(tmp_path, **{**changes, "synthesizer__faults": None}, output=failed.output)
        assert run_synth(failed)["failed"]
        with monkeypatch.context() as patch:
            left = kill_at(patch, moment)
            try:
                run_synth(well, retry_failed=True)
                finished = left[0] >= 0
            except Killed:
                pass
        if not again:
            run_synth(well)
        run_synth(well, retry_failed=True)
        assert shard_bytes(well.output) == expected, f"killed at moment {moment}"
        assert {path.name for path in Path(well.output).iterdir()} <= {*expected, "manifest.json", ".lock", "worklist"}
        moment += 7
    assert moment > 60


def command(folder: Path, *options: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(json.dumps(recipe(folder, **changes)))
    return subprocess.run([*COMMAND, str(folder / "run.yaml"), "--json", *options], capture_output=True, text=True)


def test_engine_that_dies_ends_the_run_in_one_line(tmp_path: Path) -> None:
    run_synth(undisturbed := settings(tmp_path, texts=60, output=str(tmp_path / "undisturbed")))
    died = command(tmp_path, synthesizer__faults={"dies_at": 40})
    assert died.returncode == 1
    (line,) = [line for line in died.stderr.splitlines() if line.startswith("fault: ")]
    stored = len(spooled_texts(tmp_path / "groups")) + 3 * 3 * len(shard_bytes(tmp_path / "groups"))
    assert f"; {stored} of 60 texts are stored in {tmp_path}/groups; rerun the same command to resume" in line
    assert "Traceback" not in died.stderr and 0 < stored < 60
    again = command(tmp_path)
    assert again.returncode == 0, again.stderr
    assert shard_bytes(tmp_path / "groups") == shard_bytes(undisturbed.output)


@pytest.mark.parametrize(
    ("texts", "told"),
    [(30, "all 30 texts failed (error 30)"), (400, "no request was answered and 50 texts have failed")],
)
def test_run_in_which_every_text_fails_ends_in_one_line(tmp_path: Path, texts: int, told: str) -> None:
    """Soon, with the last reason, and with few lines before; the command that it names repairs the output."""
    failing = command(tmp_path, texts=texts, synthesizer__faults={"error": 1.0})
    assert failing.returncode == 1
    (line,) = [line for line in failing.stderr.splitlines() if line.startswith("fault: ")]
    assert f"{told}, the last: scripted error; fix the cause and rerun with --retry-failed" in line
    assert "Traceback" not in failing.stderr and failing.stderr.count("stored without pairs") == 5
    assert "16 texts have failed (error 16), the last: scripted error" in failing.stderr
    assert command(tmp_path, synthesizer__faults={"error": 1.0}).returncode == 1
    again = command(tmp_path, "--retry-failed")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["texts"] == texts and not json.loads(again.stdout)["failed"]


def spooled_texts(output: Path) -> list[GroupText]:
    found: list[GroupText] = []
    for path in sorted((output / "spool").glob("*.spool")):
        journal = Journal(path)
        found += [text for place in journal for text in decode(journal.read(place), SynthGroup).texts]
        journal.close()
    return found


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from synth.cli import main
main()
"""


@pytest.mark.parametrize("room", [2_000, 6_000, 12_000, 20_000])
def test_full_disk_is_one_line_and_the_next_run_gives_the_same_bytes(tmp_path: Path, room: int) -> None:
    """A file may not grow beyond `room` bytes: the spool, the shard under ArrayRecord's hands, or the manifest."""
    changes: dict[str, Any] = {"texts": 40, "groups_per_shard": 7}
    run_synth(undisturbed := settings(tmp_path, **changes, output=str(tmp_path / "undisturbed")))
    (tmp_path / "run.yaml").write_text(json.dumps(recipe(tmp_path, **changes)))
    full = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(room), "run", str(tmp_path / "run.yaml")], capture_output=True, text=True
    )
    assert full.returncode == 2, full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in line and "free space" in line
    assert "Traceback" not in full.stderr
    again = command(tmp_path, **changes)
    assert again.returncode == 0, again.stderr
    assert shard_bytes(tmp_path / "groups") == shard_bytes(undisturbed.output)


@pytest.mark.parametrize("moment", ["before the first request", "at the twentieth request"])
def test_corpus_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        rows = write_corpus(tmp_path / "part.jsonl", 20, seed=number).read_text()
        (tmp_path / "corpus" / f"{number}.jsonl").write_text(rows.replace('"id": "t', f'"id": "{number}t'))
    run = settings(tmp_path, corpus={"path": str(tmp_path / "corpus")})
    gone = tmp_path / "corpus" / ("0.jsonl" if "first" in moment else "2.jsonl")
    asked, start, generate = [0], ScriptedEngine.__init__, ScriptedEngine.generate

    def starting(engine: ScriptedEngine, *arguments: Any) -> None:
        if "first" in moment:
            gone.rename(tmp_path / "kept")
        start(engine, *arguments)

    async def watched(engine: ScriptedEngine, request: GenerationRequest) -> Completion:
        asked[0] += 1
        if asked[0] == 20 and "first" not in moment:
            gone.rename(tmp_path / "kept")
        return await generate(engine, request)

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedEngine, "__init__", starting)
        patch.setattr(ScriptedEngine, "generate", watched)
        with pytest.raises(UserError, match=gone.name) as error:
            run_synth(run)
    assert "\n" not in str(error.value)
    os.rename(tmp_path / "kept", gone)
    assert run_synth(run)["texts"] == 60
    ids = [text.raw_id for group in read_groups(run.output) for text in group.texts]
    assert len(ids) == len(set(ids)) == 60


def rewritten(path: Path) -> None:
    path.write_text(path.read_text().replace("river", "RIVER"))


def exchanged(path: Path) -> None:
    path.with_name("other").write_text(path.read_text().replace("river", "RIVER"))
    os.replace(path.with_name("other"), path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_at_a_line(path: Path) -> None:
    os.truncate(path, len("".join(path.read_text().splitlines(keepends=True)[:30])))


@pytest.mark.parametrize("change", [rewritten, exchanged, truncated, cut_at_a_line])
@pytest.mark.parametrize("moment", ["while listed", 1, 20])
def test_corpus_file_that_changes_is_named_and_nothing_of_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int | str, change: Any
) -> None:
    """Where what comes later is read from the same file, or the next one's texts could take its place."""
    (tmp_path / "corpus").mkdir()
    for number in range(2):
        rows = write_corpus(tmp_path / "part.jsonl", 60, seed=number).read_text()
        (tmp_path / "corpus" / f"{number}.jsonl").write_text(rows.replace('"id": "t', f'"id": "{number}t'))
    changes = {"corpus": {"path": str(tmp_path / "corpus")}, "synthesizer__max_num_seqs": 2}
    run_synth(undisturbed := settings(tmp_path, **changes, output=str(tmp_path / "undisturbed")))
    run, file = settings(tmp_path, **changes), tmp_path / "corpus" / "0.jsonl"
    kept, asked = file.read_bytes(), [0]
    generate, listing = ScriptedEngine.generate, run_module.list_work

    async def watched(engine: ScriptedEngine, request: GenerationRequest) -> Completion:
        asked[0] += 1
        if asked[0] == moment:
            change(file)
        return await generate(engine, request)

    def watched_listing(*arguments: Any) -> Any:
        if moment == "while listed":
            change(file)
        return listing(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedEngine, "generate", watched)
        patch.setattr(run_module, "list_work", watched_listing)
        with pytest.raises(UserError, match=f"{file}") as error:
            run_synth(run)
    assert "\n" not in str(error.value)
    assert "RIVER" not in "".join(text.text for text in spooled_texts(tmp_path / "groups"))
    file.write_bytes(kept)
    assert run_synth(run)["texts"] == 120
    assert shard_bytes(run.output) == shard_bytes(undisturbed.output)
