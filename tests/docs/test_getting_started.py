"""Commands of the tutorial and of the how-to pages run as a reader would type them.

A block is left out where a comment right before it says why: `<!-- not run: … -->`, `<!-- needs a GPU -->` or
`<!-- needs several hosts -->`. The how-to pages run in the folder that the tutorial made.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from extras import ROOT

PAGE = ROOT / "docs" / "getting_started.md"
HOWTO = [path for path in sorted((ROOT / "docs" / "howto").glob("*.md")) if path.stem != "offline"]  # own test
# Console scripts of this checkout, whatever is installed.
PREAMBLE = """set -eu
ipt() { python -m ipt_jax.cli "$@"; }
synth() { python -m synth.cli "$@"; }
"""


def script_of(page: str) -> str:
    """All commands of a page, without the marked blocks."""
    marks = r"^(<!-- (?:not run: .*|needs a GPU|needs several hosts) -->\n)?"
    blocks = re.findall(marks + r"```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return PREAMBLE + "".join(block for mark, block in blocks if not mark)


def run_page(page: Path, folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    code = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PATH": path, "PYTHONPATH": code, "JAX_PLATFORMS": "cpu"}
    script = script_of(page.read_text(encoding="utf-8"))
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("docs", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder, run_page(PAGE, folder)


def test_the_tutorial_makes_a_model(tutorial: tuple[Path, str]) -> None:
    folder, printed = tutorial
    assert "30 my/texts.jsonl" in printed and "accepted" in printed
    assert (folder / "my/model/model.safetensors").exists()
    assert re.search(r"^.{60} \| \S*.+$", printed, re.MULTILINE), printed[-1000:]


@pytest.mark.parametrize("page", HOWTO, ids=lambda page: page.stem)
def test_the_how_to_runs(page: Path, tutorial: tuple[Path, str]) -> None:
    run_page(page, tutorial[0])
