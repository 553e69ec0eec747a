"""The table of parameter names here and in a Hugging Face state dict, used by import and export.

transformers stores a linear layer as [outputs, inputs] and one matrix per layer of the model; this project stores
[inputs..., outputs...] with heads as separate axes and all layers in one array. Mistral and Llama have the same names.
RoPE needs no permutation: both sides pair dimension i with i + H/2.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass

import numpy as np

from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import abstract_params


@dataclass(frozen=True)
class Row:
    """`name` has a place for the layer where ours are stacked. `inputs`: leading axes that a product sums over."""

    path: tuple[str, ...]
    name: str
    inputs: int = 0  # 0: no matrix of a linear layer, taken as it is


TABLE = (
    Row(("embedding",), "model.embed_tokens.weight"),
    Row(("layers", "attention_norm"), "model.layers.{}.input_layernorm.weight"),
    Row(("layers", "query"), "model.layers.{}.self_attn.q_proj.weight", inputs=1),
    Row(("layers", "key"), "model.layers.{}.self_attn.k_proj.weight", inputs=1),
    Row(("layers", "value"), "model.layers.{}.self_attn.v_proj.weight", inputs=1),
    Row(("layers", "output"), "model.layers.{}.self_attn.o_proj.weight", inputs=2),
    Row(("layers", "mlp_norm"), "model.layers.{}.post_attention_layernorm.weight"),
    Row(("layers", "gate"), "model.layers.{}.mlp.gate_proj.weight", inputs=1),
    Row(("layers", "up"), "model.layers.{}.mlp.up_proj.weight", inputs=1),
    Row(("layers", "down"), "model.layers.{}.mlp.down_proj.weight", inputs=1),
    Row(("norm",), "model.norm.weight"),
    Row(("head",), "lm_head.weight", inputs=1),
)


@dataclass(frozen=True)
class Leaf:
    """One parameter of a model: our path and shape, and the HF tensors it is made of, in order of layers."""

    row: Row
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return "{}" in self.row.name

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of one layer's part."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        shape, inputs = self.own_shape, self.row.inputs
        return shape if not inputs else (math.prod(shape[inputs:]), math.prod(shape[:inputs]))

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """One HF tensor as our (part of the) parameter."""
        return tensor if not self.row.inputs else tensor.T.reshape(self.own_shape)

    def to_hf(self, part: np.ndarray) -> np.ndarray:
        """The reverse of `from_hf`."""
        return part if not self.row.inputs else part.reshape(self.hf_shape[::-1]).T


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every parameter of a model of this configuration."""
    shapes = abstract_params(config)
    found = []
    for row in TABLE:
        if row.path == ("head",) and config.tie_embeddings:
            continue
        param = functools.reduce(operator.getitem, row.path, shapes)
        layers = range(config.layers) if "{}" in row.name else [0]
        found.append(Leaf(row, param.shape, tuple(row.name.format(layer) for layer in layers)))  # type: ignore[attr-defined]
    return found
