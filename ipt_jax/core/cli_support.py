"""Commands of both console scripts: the decorator `command`, exit codes, one-line errors and the printed result.

Exit codes: 0 success; 2 user error (one line on stderr, also for a path that cannot be opened); 1 fault (one line if
the cause is outside the program, otherwise a traceback); 130 Ctrl-C; 143 SIGTERM before the stage finished.
stdout holds the result only. Output of libraries and child processes during a stage goes to stderr.
"""

import contextlib
import errno
import importlib
import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand
from yaml import YAMLError

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.settings import Settings, list_fields, load_settings, parse_yaml

Config = Annotated[Path, typer.Argument(help="Recipe: a YAML file with the fields below.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.SUB=VALUE]...", help="Fields of the recipe to override. VALUE is YAML.", show_default=False
    ),
]
# Some versions of Typer contain a copy of click, others import it. Bases of its public errors are click's in both.
UsageError: Any
ClickError: Any
UsageError, ClickError = typer.BadParameter.__mro__[1:3]
# Errors of a path rather than of the program. Worker processes raise them unchanged.
OF_PATHS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS}
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object on stdout. Default: a table.")
]


class Shown(NamedTuple):
    """The result of a command with a view of its own, or with an exit code other than 0."""

    result: dict[str, Any]  # what --json prints
    view: Callable[[], None] | None = None  # prints to stdout in place of the table
    exit_code: int = 0


Result = dict[str, Any] | Shown
Body = Callable[..., Result]


def command(app: typer.Typer, name: str | None = None, *, recipe: str | None = None) -> Callable[[Body], Body]:
    """Registers a function as a command of `app`: load the recipe, run with stdout redirected, print the result.

    With `recipe` ("module:Class" of a settings class, imported when needed) the command takes CONFIG and overrides,
    passes the loaded settings as the first argument, and lists their fields in `--help`. Every command takes --json.
    """

    def register(body: Body) -> Body:
        own = list(inspect.signature(body).parameters.values())[1 if recipe else 0 :]
        taken = [_parameter("config", Config), _parameter("overrides", Overrides, None)] if recipe else []
        taken += [value.replace(kind=Parameter.KEYWORD_ONLY) for value in own]
        taken += [_parameter("as_json", AsJson, False)]

        def run(
            *, as_json: bool, config: Path | None = None, overrides: list[str] | None = None, **options: Any
        ) -> None:
            settings = [_load(recipe, config, overrides)] if recipe and config else []
            with quiet_stdout():
                result = body(*settings, **options)
            shown = Shown(result) if isinstance(result, dict) else result
            if shown.view is None or as_json:
                show(shown.result, as_json)
            else:
                shown.view()
            if shown.exit_code:
                raise typer.Exit(shown.exit_code)

        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
        run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        app.command(name, cls=_with_fields(recipe) if recipe else None)(run)
        return body

    return register


def _parameter(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _recipe_class(recipe: str) -> type[Settings]:
    module, _, name = recipe.partition(":")
    cls: type[Settings] = getattr(importlib.import_module(module), name)
    return cls


RECIPES = {  # by the command that reads them, to recognize a recipe of another command
    "ipt tokenize": "ipt_jax.data.tokenize:TokenizeSettings",
    "ipt train": "ipt_jax.config:Recipe",
    "ipt ablate": "ipt_jax.ablate.run:AblateSettings",
    "synth collect": "synth.collect.run:CollectSettings",
    "synth run": "synth.config:RunSettings",
    "synth mine": "synth.mine.run:MineSettings",
    "synth verify": "synth.verify.run:VerifySettings",
    "synth eval": "synth.evaluate.run:EvalSettings",
    "synth render": "synth.render.documents:RenderSettings",
    "synth decontaminate": "synth.decontaminate.run:DecontaminateSettings",
}


def _load(recipe: str, config: Path, overrides: list[str] | None) -> Settings:
    try:
        return load_settings(_recipe_class(recipe), config, overrides)
    except UserError as error:
        fitting = [name for name, one in RECIPES.items() if _fits(one, config)]
        if fitting and recipe not in map(RECIPES.get, fitting):
            raise UserError(f"config {config}: a recipe of {fitting[0]}; run {fitting[0]} {config}") from error
        raise


def _fits(recipe: str, config: Path) -> bool:
    """Whether a YAML file has all required keys of a recipe at its top, and no other keys than the recipe's."""
    try:
        keys = set(parse_yaml(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, YAMLError):
        return False
    fields = {field.alias or name: field for name, field in _recipe_class(recipe).model_fields.items()}
    return {name for name, field in fields.items() if field.is_required()} <= keys <= fields.keys()


def _with_fields(recipe: str) -> type[TyperCommand]:
    class WithFields(TyperCommand):
        """A command whose help ends with the fields of its recipe."""

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            rows = []
            for name, kind, default, description in list_fields(_recipe_class(recipe)):
                stated = default if default == "required" else f"default: {default}"
                rows.append((name, f"{description}  [{kind}; {stated}]"))
            with formatter.section("Recipe fields (N is the index of a list item, from 0)"):
                formatter.write_dl(rows)

    return WithFields


def run_app(app: typer.Typer) -> None:
    """Runs a console script and ends the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal lacks are printed as ?
    sys.exit(_exit_code(app))


def _exit_code(app: typer.Typer) -> int:
    try:
        result = app(standalone_mode=False)
        sys.stdout.flush()
        if result == 130:  # Typer returns it for Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _mistake(str(error))
    except Fault as error:
        print(f"fault: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except UsageError as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a command without arguments prints its help
            print(message, file=sys.stderr)
            return 2
        usage = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        return _mistake(message.rstrip(".") + usage)
    except ClickError as error:
        return _mistake(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        print("stopped; rerun the same command to resume", file=sys.stderr)
        return 130
    except (BrokenPipeError, SystemExit) as error:  # the reader of stdout is closed, as by `| head`
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _close_stdout()  # Typer and Rich report the pipe by SystemExit(1)
        return 0
    except OSError as error:
        return _failed(error)
    except Exception:
        traceback.print_exc()
        return 1


def _failed(error: OSError) -> int:
    if error.filename is not None and error.errno in OF_PATHS:
        return _mistake(f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and its permissions")
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _close_stdout()
        said = f"fault: stdout or a file cannot be written ({error.strerror}); free space or use another path"
        print(said, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _close_stdout() -> None:
    """Discards what is still in the buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _mistake(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirects stdout of this process and its children to stderr inside the block."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


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
