"""What both console scripts share: what ends with which exit code, and that it is told in one line."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import typer
from extras import ROOT

import ipt_jax.cli
import synth.cli
from ipt_jax.core.cli_support import run_app
from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.hashing import file_digest
from ipt_jax.core.stage import Output
from ipt_jax.corpus.datasets import parquet_parts
from ipt_jax.corpus.shards import Shards
from ipt_jax.corpus.tokenizer import load_tokenizer

PRINTS = r"""
import sys, typer
from rich.console import Console
from ipt_jax.core.cli_support import run_app, show
app = typer.Typer()
@app.command()
def main(how: str) -> None:
    for _ in range(20_000 if how != "few" else 1):
        if how == "rich":
            Console().print("a row of words, \xe9 \xb7 \xfc")
        else:
            show({"text": "a row of words, \xe9 \xb7 \xfc"}, as_json=how != "few")
run_app(app)
"""


def outcome(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of a console script whose one command calls `run`."""
    app = typer.Typer()
    app.command()(lambda: run() and None)
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    return ended.value.code


def fail(error: Exception, _: object = None) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (Fault("gone"), 1, "fault: gone"),
        (PermissionError(errno.EACCES, "Permission denied", "/in/x.jsonl"), 2, "error: /in/x.jsonl: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/in"), 2, "error: /in: Not a directory"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "fault: stdout or a file cannot be written (No space left",
        ),
    ],
)
def test_what_lies_outside_is_one_line(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = os.dup(1)
    try:
        assert outcome(partial(fail, error), monkeypatch) == code
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    told = capfd.readouterr().err
    assert told.startswith(said) and len(told.splitlines()) == 1


def test_an_error_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(partial(fail, OSError(errno.EBADF, "Bad file descriptor")), monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err


def test_paths_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    long = tmp_path / ("a" * 300)
    for path in (long, tmp_path, tmp_path / "file" / "below"):
        assert outcome(partial(file_digest, path), monkeypatch) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: ")
    assert outcome(lambda: list(run_units(file_digest, [long, long], workers=2)), monkeypatch) == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_closed_file_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Output(tmp_path / "o", stage="test", identity={}, shard_name="x") as output:
        output.seal(0, 1, [b"a"])
        output.finish()
    (tmp_path / "tokenizer.json").write_text("{}")
    open_ = Path.open

    def closed(path: Path, *rest: object, **named: object) -> object:
        if path.suffix == ".array_record" or path.name == "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_(path, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(PermissionError):
        Shards(tmp_path / "o", verify=False)
    with pytest.raises(PermissionError):
        load_tokenizer(tmp_path)


def test_a_closed_table_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", lambda *_: fail(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(PermissionError):
        parquet_parts(str(tmp_path / "x.parquet"))


def prints(how: str, stdout: int, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRINTS, how]
    return subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
    )


@pytest.mark.parametrize("how", ["rich", "json"])
def test_a_reader_that_leaves_is_no_fault(how: str) -> None:
    run = prints(how, subprocess.PIPE)
    assert run.stdout and run.stderr
    run.stdout.readline()
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == ("", 0)


def test_a_full_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        run = prints("few", full.fileno())
        told = run.communicate()[1]
    assert (run.returncode, len(told.splitlines())) == (1, 1) and "stdout or a file cannot be written" in told


def test_a_terminal_of_ascii_shows_what_it_can() -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = prints("few", subprocess.PIPE, **ascii_only)
    shown, told = run.communicate()
    assert (run.returncode, told) == (0, "") and "a row of words, ? ? ?" in shown
    run = prints("json", subprocess.PIPE, **ascii_only)
    assert json.loads(run.communicate()[0].splitlines()[0]) == {"text": "a row of words, é · ü"}


STAGES = r"""
import os, typer
from ipt_jax.core.cli_support import Shown, command, run_app
app = typer.Typer()
@command(app)
def quiet(tokens: int = 1):
    print("a library")
    os.system("echo a child")
    if tokens == 5:
        return Shown({"tokens": tokens}, view=lambda: print(f"view {tokens}"), exit_code=143)
    return {"tokens": tokens + 1}
@command(app, recipe="ipt_jax.config:MeshSettings")
def loud(settings, how: str = "plain"):
    print(how, settings.data, settings.fsdp)
    return Shown({"how": how}, view=lambda: print(how))
run_app(app)
"""


@pytest.mark.parametrize(
    ("arguments", "stdout", "stderr", "code"),
    [
        (["quiet"], "tokens  2\n", "a library\na child\n", 0),
        (["quiet", "--json"], '{"tokens": 2}\n', "a library\na child\n", 0),
        (["quiet", "--tokens", "5"], "view 5\n", "a library\na child\n", 143),
        (["quiet", "--tokens", "5", "--json"], '{"tokens": 5}\n', "a library\na child\n", 143),
        (["loud", "mesh.yaml", "fsdp=1", "--how", "a"], "a\n", "a 2 1\n", 0),
        (["loud", "mesh.yaml", "--json"], '{"how": "plain"}\n', "plain 2 -1\n", 0),
        (
            ["loud", "mesh.yaml", "fdsp=1"],
            "",
            "error: config mesh.yaml: unknown key 'fdsp'; did you mean 'fsdp'?\n",
            2,
        ),
    ],
)
def test_a_command_prints_its_result_alone(
    arguments: list[str], stdout: str, stderr: str, code: int, tmp_path: Path
) -> None:
    """Results go to stdout; what a stage or its children print goes to stderr."""
    (tmp_path / "mesh.yaml").write_text("data: 2\n")
    run = [sys.executable, "-c", STAGES, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.stdout.rstrip(" \n"), done.returncode) == (stdout.rstrip(), code)
    assert done.stderr == stderr


@pytest.mark.parametrize(
    ("command", "config", "meant"),
    [
        ("synth run", "quickstart/tokenize_raw.yaml", "ipt tokenize"),
        ("ipt tokenize", "quickstart/synth.yaml", "synth run"),
        ("synth render", "pretrain/500m_mix.yaml", "ipt train"),
        ("ipt plan", "synthesizer/collect.yaml", "synth collect"),
        ("synth collect", "synth/decontaminate.yaml", "synth decontaminate"),
        ("synth mine", "synth/verify.yaml", "synth verify"),
        ("synth verify", "synth/mine.yaml", "synth mine"),
    ],
)
def test_a_recipe_of_another_command_is_recognized(command: str, config: str, meant: str) -> None:
    package, name = command.split()
    app = {"ipt": ipt_jax.cli.app, "synth": synth.cli.app}[package]
    path = ROOT / "configs" / config
    with pytest.raises(UserError, match=f"{config}: a recipe of {meant}; run {meant} "):
        app([name, str(path)], standalone_mode=False)
