"""Finds a model on disk.

`resolve_checkpoint` takes every path that the project calls a model: a Hugging Face directory, a run directory (its
latest checkpoint), one step's directory, or what `ipt import` wrote. `LiteralPath` is for Orbax, which finds the parts
of a checkpoint by `epath.Path.glob` and takes the directory as a part of the pattern: under a directory named
`lr[1e-4]` it finds nothing, and the checkpoint it writes cannot be read. Orbax keeps the class of an epath, so
`LiteralPath` reaches every such call. Imports no JAX.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from ipt_jax.core.checkpoint_digests import DIGESTS, LOADED, damage, newest_verified, refuse_all, unverified
from ipt_jax.core.errors import UserError

_Local: Any = type(epath.Path("/"))


class LiteralPath(_Local):
    """A path on a local or mounted disk. `glob` matches names below it."""

    def glob(self, pattern: str) -> Iterator[LiteralPath]:
        """Yields the paths below this one that match `pattern`."""
        for name in glob.glob(pattern, root_dir=os.fspath(self)):
            yield self / name


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelSource:
    """`kind` hf: `weights` is a directory with safetensors; params: it is Orbax's, with the parameters alone."""

    kind: str
    weights: Path
    config: Path
    tokenizer: Path | None


def resolve_checkpoint(path: str | Path) -> ModelSource:
    """What `path` holds. Raises UserError where it is not a model."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise UserError(f"model {path}: no such directory; set it to an HF directory, a run, a step or an import")
    if (path / "config.json").is_file():
        return ModelSource("hf", path, path / "config.json", _tokenizer(path))
    step = _checkpoint(path)
    if step is None:
        raise UserError(
            f"model {path}: neither config.json (an HF directory) nor a checkpoint; a run has one after its first save"
        )
    if unverified(step):
        print(f"warning: {step} has no digests.json (an earlier version wrote it): not verified", file=sys.stderr)
    places = (step.parent / "tokenizer", step.parent.parent / "tokenizer")
    tokenizer = next((found for place in places if (found := _tokenizer(place))), None)
    return ModelSource("params", step / "params", step / "model.json", tokenizer)


def _checkpoint(path: Path) -> Path | None:
    """The directory with the parameters: `path`, an import's, or the newest step of a run that verifies."""
    for directory in (path, path / "checkpoint"):
        if (directory / "params").is_dir() or (directory / DIGESTS).is_file():
            if found := damage(directory, LOADED):
                raise UserError(f"model {directory}: {found}; use another checkpoint or copy it again")
            return directory
    if path.parent.name == "checkpoints" and path.name.isdigit():
        raise UserError(f"model {path}: {damage(path, LOADED)}; use another checkpoint or copy it again")
    newest, skipped = newest_verified(path / "checkpoints", LOADED)
    if newest is None and skipped and not any(step.exists() for step, _ in skipped):
        return _checkpoint(path)  # the run has removed them and written newer ones
    if newest is None and skipped:
        raise refuse_all(skipped)
    for step, found in skipped:
        print(f"warning: checkpoint {step} is skipped: {found}", file=sys.stderr)
    if newest is not None and skipped:
        print(f"warning: step {newest.name} is used, whose digests match", file=sys.stderr)
    return newest


def _tokenizer(directory: Path) -> Path | None:
    return directory if any((directory / name).is_file() for name in TOKENIZER_FILES) else None
