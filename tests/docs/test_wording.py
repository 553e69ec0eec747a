"""Help texts, recipe headers, launch scripts, pages and source text: plain words, and in a fixed form.

Help begins with a verb, every option states its default, every recipe opens with command, hardware, expectation and
the part of the paper that it reproduces. `BANNED` lists phrases that a reader of the field would have to decode.
`docs/log.md` keeps its dated text. `python tests/docs/test_wording.py [PATH…]` prints the findings in source text.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from extras import ROOT
from typer.testing import CliRunner

import ipt_jax.cli
import synth.cli

APPS = {"ipt": ipt_jax.cli.app, "synth": synth.cli.app}
COMMANDS = {
    f"{name} {command}": (app, parameters)
    for name, app in APPS.items()
    for command, parameters in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "templates")
LAUNCH = sorted(path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch", ".yaml", ".py"))
VERBS = "Compare Compile Compute Convert Evaluate Generate Remove Render Score Show Tokenize Train Write".split()
# Each with what to write instead.
BANNED = {
    r"go(es)? on|going on|went on": "resume, continue",
    r"anew|(run|runs|started?|made|asks?) again": "rerun, retry, rebuild",
    r"tells?|told": "report, print",
    r"stands?|stood": "is, is listed",
    r"lies?|lay": "is, is stored",
    r"mends?": "fix, repair",
    r"(leaves?|left) (\w+ ){0,3}alone": "keep, skip",
    r"(?<!there )(is|are) no(?! longer)": "is not a",
    r"whole": "complete, full",
    r"behind": "after",
    r"luck": "random seed",
    r"as long as": "if",
    r"not at all|all or nothing": "atomic",
    r"(?-i:grains?)": "unit",
    r"knocks?": "retries",
    r"another (seed|world)": "different seeds",
    r"kept out|keeps? \w+ out": "exclude",
    r"looked for|at hand|give or take|likeliest|sort of": "the usual word",
    r"(become|becomes)": "convert to",
    r"suffices?|for ever": "is enough; indefinitely",
    r"yours": "set by you",
    r"the real (vllm|thing|model)": "drop real",
    r"what (is|was) left|what (is|was) there|what they are for": "the remaining",
    r"to the (byte|bit)": "identical, exact",
    r"nothing swallowed": "no silent data loss",
    r"(keeps?|kept) apart": "separate",
    r"laid out|lays? (\w+ ){0,4}out": "formatted, arranged",
    r"want of": "lack of",
    r"turns? round": "invert",
    r"(?-i:wants?)": "requires, expects",
    r"hands? on": "pass",
    r"all of it, in parts": "split",
    r"(engine|task|process|place|once|one|tokens|pairs|texts|questions?|seconds?|steps?|copies) (?-i:an?) "
    r"(gpu|host|core|group|text|step|second|day|shard|row|run|prompt|document|data set)": "per",
}


def found_in(text: str) -> list[str]:
    """Banned phrases in a text, each with its context. Code between backticks is exempt."""
    text = re.sub(r"\s*\n[\s#>]*", " ", re.sub(r"`[^`\n]+`", "`…`", text))
    matches = (re.finditer(rf".{{0,30}}\b(?:{phrase})\b.{{0,20}}", text, re.IGNORECASE) for phrase in BANNED)
    return [match.group() for found in matches for match in found]


def help_of(name: str) -> str:
    app, command = name.split(maxsplit=1) if " " in name else (name, "")
    done = CliRunner().invoke(APPS[app], [*command.split(), "--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


def test_the_list_finds_what_it_bans() -> None:
    before = "Raw text and a synthesizer make groups of texts with pairs; run again, it goes on.\nOne engine a\n# GPU."
    assert len(found_in(before)) == 3
    assert not found_in("A checkpoint per GPU is no longer written. Rerun to resume.")


@pytest.mark.parametrize("name", [*APPS, *COMMANDS])
def test_help_has_no_private_phrase(name: str) -> None:
    assert found_in(help_of(name)) == []


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md")


@pytest.mark.parametrize("path", [*RECIPES, *LAUNCH], ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_and_scripts_have_no_private_phrase(path: Path) -> None:
    assert found_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_have_no_private_phrase(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert found_in(re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)) == []


def source_text(code: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring, block of comments, and string in an exception that the code raises or makes."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value  # docstrings, of fields too
        call = node.exc if isinstance(node, ast.Raise) else node
        named = isinstance(call, ast.Call) and ast.unparse(call.func).endswith(("Error", "Fault", "Failed", "Died"))
        if isinstance(call, ast.Call) and (named or isinstance(node, ast.Raise)):
            parts = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
            yield call.lineno, " ".join(part for part in parts if isinstance(part, str))
    last, comment = -1, ""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and comment:
                yield last, comment
                comment = ""
            last, comment = token.start[0], f"{comment} {token.string.lstrip('# ')}"
    if comment:
        yield last, comment


def findings(paths: Iterable[Path]) -> list[str]:
    """file:line and phrase of every banned phrase in the source text of the files."""
    found = []
    for path in paths:
        for line, text in sorted(set(source_text(path.read_text(encoding="utf-8")))):
            found += [f"{path.relative_to(ROOT)}:{line}: {phrase}" for phrase in found_in(text)]
    return found


SOURCES = [path for package in ("ipt_jax", "synth") for path in sorted((ROOT / package).rglob("*.py"))]


def test_source_text_is_found() -> None:
    code = '''"""It stands."""\nx = 1  # told\ndef f(n):\n    raise ValueError(f"{n} is no number")\n'''
    assert [(line, len(found_in(text))) for line, text in source_text(code)] == [(1, 1), (4, 1), (4, 1), (2, 1)]


def test_sources_have_no_private_phrase() -> None:
    found = findings(SOURCES)
    assert not found, f"{len(found)} phrases:\n" + "\n".join(found)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_a_verb_and_says_what_is_written(name: str) -> None:
    text: Any = COMMANDS[name][1].help
    assert text.split()[0] in VERBS
    assert len(text.splitlines()[0]) <= 45, "longer subjects are cut in the list of commands"
    assert re.search(r"\b(writes?|prints)\b", text, re.IGNORECASE), "what is written"
    assert re.search(r"\b(re-?run|writes no output)\b", text, re.IGNORECASE), "what a rerun does"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_states_its_default(name: str) -> None:
    for parameter in COMMANDS[name][1].params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{name}: {parameter.name} has no help"
        if parameter.param_type_name == "option" and not parameter.required:
            stated = "Default: " in parameter.help or (parameter.default is not None and parameter.show_default)
            assert stated, f"{name}: {parameter.name} states no default"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_recipe_lists_its_fields(name: str) -> None:
    takes_recipe = any(parameter.name == "config" for parameter in COMMANDS[name][1].params)
    assert ("Recipe fields" in help_of(name)) == takes_recipe
    if name == "ipt train":
        text = " ".join(help_of(name).split())
        assert "data.seq_len Tokens per row. [int; required]" in text
        assert "data.sources.N.epochs Amount in epochs. [float | null; default: null]" in text
        assert "[cosine | linear | constant | wsd; default: cosine]" in text


def test_help_imports_no_jax() -> None:
    probe = (
        "import sys\nfrom typer.testing import CliRunner\nimport ipt_jax.cli, synth.cli\n"
        f"for name in {list(COMMANDS)!r}:\n"
        "    app, command = name.split()\n"
        "    done = CliRunner().invoke({'ipt': ipt_jax.cli, 'synth': synth.cli}[app].app, [command, '--help'])\n"
        "    assert done.exit_code == 0, done.output\n"
        "print(*sorted({'jax', 'jaxlib', 'flax', 'optax', 'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_opens_with_command_hardware_expectation_and_paper(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    keys = [match.group(1) for line in header if (match := re.match(r"# (\w+): +\S", line))]
    assert keys[:4] == ["Command", "Hardware", "Expect", "Paper"] and keys[4:] in ([], ["Note"])
    assert all(len(line) <= 100 for line in header)
    program, *rest = header[0].removeprefix("# Command:").split()
    assert rest[-1] == (path.stem if path.parent.name == "evals" else str(path.relative_to(ROOT)))
    assert f"{program} {rest[0]}" in COMMANDS if len(rest) > 1 else (ROOT / program).exists()


if __name__ == "__main__":
    print(*findings([Path(name).resolve() for name in sys.argv[1:]] or SOURCES), sep="\n")
