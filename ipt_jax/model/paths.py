"""Paths for Orbax, whose own characters are never read as a pattern.

Orbax finds the parts of a checkpoint by `epath.Path.glob`, which takes the directory as a part of the pattern. Under a
directory named `lr[1e-4]` it finds nothing, and the checkpoint it writes cannot be read. Orbax keeps the class of an
epath, so `LiteralPath` reaches every such call.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

_Local: Any = type(epath.Path("/"))


class LiteralPath(_Local):
    """A path on a local or mounted disk. `glob` matches names below it."""

    def glob(self, pattern: str) -> Iterator[LiteralPath]:
        """Yields the paths below this one that match `pattern`."""
        for name in glob.glob(pattern, root_dir=os.fspath(self)):
            yield self / name
