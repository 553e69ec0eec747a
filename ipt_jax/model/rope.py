"""Rotary position embedding in Hugging Face's half-split layout, with Llama-3.1's frequency scaling.

Angles are float32 whatever the compute dtype: at position 4,096 a bfloat16 angle is wrong by several radians.
The layout pairs dimension i with i + H/2 (not 2i with 2i + 1); both directions of `ipt_jax.hf` rely on it.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from ipt_jax.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """[H/2] float32 radians per position, highest frequency first."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    return frequencies if config.rope_scaling is None else _llama3(frequencies, config.rope_scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly in turns."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions: Array | np.ndarray) -> tuple[Array, Array]:
    """What `rotate` multiplies with at `positions` [B, T]: [c, c] and [-s, s] of the angles, float32 [B, T, H].

    Tables of NumPy positions are constants of the program: XLA else works the angles out again in every rotation.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    angles = positions[..., None].astype(np.float32) * inverse_frequencies(config)  # [B, T, H/2]
    cos, sin = xp.cos(angles), xp.sin(angles)
    return jnp.asarray(xp.concatenate([cos, cos], -1)), jnp.asarray(xp.concatenate([-sin, sin], -1))


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates x [B, T, N, H] by its positions; the products are float32, the result has x's dtype.

    Both halves at once, x turned by half of H beside x: a TPU pads the last dim of each array to 128 lanes, so halves
    would take as much room as the whole.
    """
    cos, sin = (table[:, :, None, :] for table in tables)  # [B, T, 1, H]
    wide = x.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)
