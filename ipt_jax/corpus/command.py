"""What both console scripts share: exit codes, one-line errors, and a stdout that holds the result alone.

Exit 0 on success, 2 on a user's mistake (one line on stderr; a path that cannot be opened is one), 1 on a fault (one
line where its cause lies outside, else its traceback), 130 on Ctrl-C, 143 where SIGTERM stopped an unfinished stage.
Whatever libraries and their child processes print while a stage runs goes to stderr.
"""

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ipt_jax.corpus.settings import Fault, UserError

Config = Annotated[Path, typer.Argument(help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Fields to override.", show_default=False)
]
# Typer brings its own copy of click or uses the one installed, by version; its public errors lead to the bases in both.
UsageError: Any
ClickError: Any
UsageError, ClickError = typer.BadParameter.__mro__[1:3]
# What a path is at fault for, wherever it is used; a worker process hands such an error on whole.
OF_PATHS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS}
AsJson = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on stdout.")]


def run_app(app: typer.Typer) -> None:
    """Runs a console script and ends the process with the exit code that the contract gives."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a ? for it
    sys.exit(_exit_code(app))


def _exit_code(app: typer.Typer) -> int:
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _mistake(str(error))
    except Fault as error:
        print(f"fault: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except UsageError as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a bare command asks for its help
            print(message, file=sys.stderr)
            return 2
        usage = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        return _mistake(message.rstrip(".") + usage)
    except ClickError as error:
        return _mistake(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as error:  # the reader of stdout has gone, as `| head` does
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _close_stdout()  # Typer and Rich tell of the pipe by SystemExit(1)
        return 0
    except OSError as error:
        return _failed(error)
    except Exception:
        traceback.print_exc()
        return 1


def _failed(error: OSError) -> int:
    if error.filename is not None and error.errno in OF_PATHS:
        return _mistake(f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and its rights")
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _close_stdout()
        print(
            f"fault: stdout or a file cannot be written ({error.strerror}); free space or write elsewhere",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    return 1


def _close_stdout() -> None:
    """What is still in its buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _mistake(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Sends all that is written to stdout, by this process or its children, to stderr meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def show(result: dict[str, Any], as_json: bool, *, hide: tuple[str, ...] = ()) -> None:
    """Prints a stage's result: one JSON object, or a table of its figures without the keys in `hide`."""
    if as_json:
        print(json.dumps(result, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf")))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if key not in hide:
            table.add_row(key.replace("_", " "), _plain(value))
    Console(highlight=False).print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
