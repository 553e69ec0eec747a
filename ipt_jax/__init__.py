"""Instruction pre-training in JAX. `ipt_jax.load(PATH)` gives a model that scores and generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipt_jax.inference.language_model import LanguageModel


def load(path: str, dtype: str = "float32", mesh: Any = None) -> LanguageModel:
    """The model in an HF directory, a run directory, one step's directory, or what `ipt import` wrote.

    `mesh`: of `ipt_jax.parallel.mesh.make_mesh`, on whose devices it is placed; None: one device.
    """
    from ipt_jax.inference.language_model import load as read

    return read(path, dtype=dtype, mesh=mesh)
