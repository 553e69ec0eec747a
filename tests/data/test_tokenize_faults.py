"""`ipt tokenize` under kills, full disks and damaged output: each fault named, the same bytes after the next run."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from token_shards import save_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import file_digest
from ipt_jax.corpus.shards import Shards
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize

SHARDS = 8


def checksums(output: Path) -> dict[str, str]:
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(output)): file_digest(path) for path in files}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's input of SHARDS units, and in `whole` what they come to."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tokenizer(folder / "tokenizer")
    draw = random.Random(0)
    words = ["a", "small", "world", "of", "words", "日本", "été"]
    rows = [{"id": str(i), "text": " ".join(draw.choices(words, k=draw.randint(1, 80)))} for i in range(400)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_tokenize(recipe(folder, folder / "whole"))
    assert len(Shards(folder / "whole").paths) == SHARDS
    return folder


def recipe(folder: Path, output: Path, workers: int = 1) -> TokenizeSettings:
    size = (folder / "in.jsonl").stat().st_size
    fields = {"inputs": [{"path": str(folder / "in.jsonl"), "source": "s"}], "tokenizer": str(folder / "tokenizer")}
    changes = {"output": str(output), "workers": workers, "unit_bytes": -(-size // SHARDS)}
    return TokenizeSettings.model_validate(fields | changes)


def test_killed_at_twenty_random_moments(inputs: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ipt_jax.data.tokenize"])
    draw, kills = random.Random(7), 0
    started = time.monotonic()
    whole = context.Process(target=run_tokenize, args=(recipe(inputs, tmp_path / "timed"),))
    whole.start()
    whole.join()
    seconds = time.monotonic() - started
    while kills < 20:
        process = context.Process(target=run_tokenize, args=(recipe(inputs, tmp_path / "killed"),))
        process.start()
        process.join(draw.uniform(0, seconds))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0 and checksums(tmp_path / "killed") == checksums(inputs / "whole")
            shutil.rmtree(tmp_path / "killed")
    run_tokenize(recipe(inputs, tmp_path / "killed"))
    assert checksums(tmp_path / "killed") == checksums(inputs / "whole")


def shard(output: Path, index: int) -> Path:
    return output / f"tokens-{index:05d}-of-{SHARDS:05d}.array_record"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def edit(output: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((output / "manifest.json").read_bytes())
    change(manifest)
    (output / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda out: os.truncate(shard(out, 2), 1000), "tokens-00002-of-00008.*1000 bytes, the manifest"),
    "a record flipped": (lambda out: flip(shard(out, 3), 300), r"tokens-00003-of-00008.*record \d+ of \d+ cannot be"),
    "the end flipped": (
        lambda out: flip(shard(out, 3), -1),
        "tokens-00003-of-00008.*differ from the manifest's checksum",
    ),
    "deleted": (lambda out: shard(out, 4).unlink(), "tokens-00004-of-00008.*missing"),
    "one for another": (lambda out: shutil.copy(shard(out, 0), shard(out, 5)), "tokens-00005-of-00008"),
    "doubled": (
        lambda out: shard(out, 6).write_bytes(shard(out, 6).read_bytes() * 2),
        "tokens-00006-of-00008.*bytes, the manifest",
    ),
    "an edited count": (lambda out: edit(out, lambda m: m["shards"][1].update(tokens=7)), "manifest.json: was edited"),
    "an edited checksum": (lambda out: edit(out, lambda m: m["shards"][1].update(sha256="0")), "manifest.json: was ed"),
    "a shard off the list": (lambda out: edit(out, lambda m: m["shards"].pop(1)), "manifest.json: was edited"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_mended(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, said = DAMAGES[name]
    output = shutil.copytree(inputs / "whole", tmp_path / "out")
    damage(output)
    with pytest.raises(UserError, match=said):
        Shards(output, "tokenize")
    run_tokenize(recipe(inputs, output))
    assert checksums(output) == checksums(inputs / "whole")
    told = capsys.readouterr().err
    assert "rebuilt" in told


@pytest.mark.parametrize("what", ["index", "parents", "chars"])
@pytest.mark.parametrize("damage", [lambda path: flip(path, -1), Path.unlink], ids=["flipped", "deleted"])
def test_damaged_side_files_are_made_again(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, damage: Callable[[Path], object]
) -> None:
    output = shutil.copytree(inputs / "whole", tmp_path / "out")
    file = output / f"tokens-00001-of-{SHARDS:05d}.{what}.npy"
    damage(file)
    run_tokenize(recipe(inputs, output))
    assert checksums(output) == checksums(inputs / "whole")
    assert file.name in capsys.readouterr().err


def test_a_copy_under_another_number_goes(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shutil.copytree(inputs / "whole", tmp_path / "out")
    shutil.copy(shard(output, 0), shard(output, SHARDS))
    run_tokenize(recipe(inputs, output))
    assert checksums(output) == checksums(inputs / "whole")
    assert "tokens-00008-of-00008.array_record: not listed in the manifest; it is removed" in capsys.readouterr().err


def _with_little_disk(settings: TokenizeSettings, limit: int) -> None:
    """No file may grow beyond `limit` bytes: writes then fail as they do on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run_tokenize(settings)
    except UserError as error:
        assert "cannot be written" in str(error), error
        os._exit(2)


@pytest.mark.parametrize("limit", [100, 1_000, 70_000])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(inputs: Path, tmp_path: Path, limit: int) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_with_little_disk, args=(recipe(inputs, tmp_path / "out"), limit))
    process.start()
    process.join()
    assert process.exitcode == 2
    left = list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else []
    assert not [path for path in left if path.suffix == ".array_record"]
    run_tokenize(recipe(inputs, tmp_path / "out"))
    assert checksums(tmp_path / "out") == checksums(inputs / "whole")
