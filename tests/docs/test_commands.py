"""Commands of the README and of all pages exist as they are written: scripts, subcommands, options and recipes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from extras import ROOT

import ipt_jax.cli
import synth.cli

COMMANDS: dict[str, Any] = {
    "ipt": typer.main.get_command(ipt_jax.cli.app),
    "synth": typer.main.get_command(synth.cli.app),
}
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "earlier.md")]


def fragments(text: str) -> Iterator[str]:
    """Lines of fenced blocks, continued lines joined, and code between backticks."""
    text = text.replace("\\\n", " ")
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """What a reader may type: fragments that begin with a console script or a file under launch/."""
    found = []
    for fragment in fragments(text):
        line = fragment.strip().removeprefix("$ ").partition(" #")[0]
        line = re.sub(r"^([A-Z_]+=\S+ +)+", "", line)  # variables set for one command
        for part in re.split(r"&&|;|\|", line):
            if not re.match(r"\s*(ipt|synth|(\./)?launch/\S+)(\s|$)", part):
                continue
            words = shlex.split(part.replace("'", ""))
            found.append(words)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_the_page_exist(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        check(words)


def check(words: list[str]) -> None:
    name, *rest = words
    shown = " ".join(words)
    if name not in COMMANDS:
        script = ROOT / name.removeprefix("./")
        assert script.exists(), f"{shown}: no such script"
    elif rest and rest[0] != "--help":
        command = COMMANDS[name].commands.get(rest[0])
        assert command is not None, f"{shown}: {name} has no command {rest[0]}"
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        asked = {word.partition("=")[0] for word in rest[1:] if re.match(r"--?[a-z]", word)}
        assert asked <= known, f"{shown}: {name} {rest[0]} has no {sorted(asked - known)}"
    for word in rest:
        if re.fullmatch(r"configs/[\w./-]+\.(yaml|jsonl)", word):
            assert (ROOT / word).exists(), f"{shown}: no {word}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_in_the_readme(name: str) -> None:
    shown = {words[1] for words in commands(README.read_text(encoding="utf-8")) if words[0] == name and words[1:]}
    assert set(COMMANDS[name].commands) <= shown


def test_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert len(text.split()) <= 1300
    assert [line for line in text.splitlines() if len(line) > 100] == []
