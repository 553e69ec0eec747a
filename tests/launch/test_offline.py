"""docs/howto/offline.md: the wheels that a machine without a network needs are those of launch/wheels.txt."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import yaml
from extras import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from trainkit import recipe_of, write_corpus

# What docs/howto/offline.md says that the machine has.
PRESENT = """
    jax flax optax orbax-checkpoint etils absl-py numpy pyyaml typer tokenizers sentencepiece safetensors pyarrow
""".split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = PROJECT["dependencies"]
WHEELS = {
    canonicalize_name(line)
    for line in (ROOT / "launch/wheels.txt").read_text(encoding="utf-8").split("\n")
    if line and not line.startswith("#")
}


def closure(*wanted: str) -> set[str]:
    """Names of `wanted`, with or without extras, and of all that they depend on here."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [one for one in map(Requirement, wanted) if one.marker is None or one.marker.evaluate()]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        found.add(name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            needs = map(Requirement, distribution(name).requires or [])
            todo += [one for one in needs if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


def test_the_wheels_are_those_that_the_machine_lacks() -> None:
    needed = closure(*DEPENDENCIES)
    missing = needed - closure(*PRESENT) - WHEELS
    assert not missing, f"launch/wheels.txt lacks {sorted(missing)}"
    assert not WHEELS - needed, f"launch/wheels.txt names {sorted(WHEELS - needed)}, which nothing needs"
    page = (ROOT / "docs/howto/offline.md").read_text(encoding="utf-8")
    assert not [name for name in [*PRESENT, *WHEELS] if f"`{name}`" not in page.lower().replace("_", "-")]
    assert f"You carry {len(WHEELS)} wheels" in " ".join(page.split())


def test_training_imports_nothing_else(tmp_path: Path) -> None:
    """`ipt train` where every other installed package is absent."""
    allowed = closure(*DEPENDENCIES) | {PROJECT["name"]}
    write_corpus(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_of(tmp_path).model_dump(mode="json", exclude_unset=True)), encoding="utf-8"
    )
    program = f"""
import importlib.metadata, re, sys
allowed = {allowed!r}
owners = importlib.metadata.packages_distributions()
hidden = {{module for module, names in owners.items()
          if not any(re.sub("[-_.]+", "-", name).lower() in allowed for name in names)}}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"hidden by tests/launch/test_offline.py: {{name}}", name=name)

sys.meta_path.insert(0, Hide())
import ipt_jax.inference.language_model, ipt_jax.hf.params, synth.cli
from ipt_jax.cli import main
sys.argv = ["ipt", "train", {str(tmp_path / "recipe.yaml")!r}, "--json"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["step"] > 0
