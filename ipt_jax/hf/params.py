"""Reads models: parameters leaf by leaf from a checkpoint or an HF directory, and the `LanguageModel` around them.

Guarantees that every parameter is there, has the shape that the configuration asks for, and that nothing is left over
(a stored copy of a tied head apart); a UserError names the tensor that is not so. At no time is more than one
parameter, all its layers, held besides the result.

The table of names serves import and export. transformers stores a linear layer as [outputs, inputs] and one matrix per
layer of the model; this project stores [inputs..., outputs...] with heads as separate axes and all layers in one array.
Mistral and Llama have the same names. RoPE needs no permutation: both sides pair dimension i with i + H/2.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ipt_jax.core.checkpoint_path import LiteralPath, ModelSource
from ipt_jax.core.errors import UserError
from ipt_jax.hf.config import read_model_config
from ipt_jax.hf.safetensors_io import HEAD, Stored, list_tensors, read_tensor
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


Parameters = Iterator[tuple[Leaf, np.ndarray]]
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}  # float16 widens: bfloat16 would drop its digits


def load_params(
    source: ModelSource,
    dtype: str = "float32",
    place: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, value: jnp.asarray(value),
    vocab_size: int | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and parameters of `source`; `place` puts each parameter where it should live.

    `vocab_size` adds ids: their rows of the embedding and columns of the head are the mean of the stored ones.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; expected float32 or bfloat16")
    config = read_model_config(source)
    added = max(0, (vocab_size or 0) - config.vocab_size)
    params: dict[str, Any] = {}
    _, parameters = open_parameters(source, config)
    for leaf, value in parameters:
        block = params
        for key in leaf.row.path[:-1]:
            block = block.setdefault(key, {})
        if added and leaf.row.path[0] in ("embedding", "head"):
            axis = int(leaf.row.path[0] == "head")
            mean = value.astype(np.float32).mean(axis, keepdims=True).astype(value.dtype)
            value = np.concatenate([value, np.repeat(mean, added, axis)], axis)
        block[leaf.row.path[-1]] = place(leaf.row.path, value.astype(jnp.dtype(dtype), copy=False))
    return config.model_copy(update={"vocab_size": config.vocab_size + added}), params


def open_parameters(source: ModelSource, config: ModelConfig) -> tuple[str, Parameters]:
    """The dtype that the parameters are stored in, and the parameters one by one, checked before the first is read."""
    if source.kind == "hf":
        stored = list_tensors(source.weights)
        dtype = _check_hf(source, config, stored)
        return dtype, _from_hf(config, stored, dtype)
    return _check_checkpoint(source, config), _from_checkpoint(source, config)


def _check_hf(source: ModelSource, config: ModelConfig, stored: dict[str, Stored]) -> str:
    wanted = {name: leaf.hf_shape for leaf in leaves(config) for name in leaf.names}
    for name, shape in wanted.items():
        if name == HEAD not in stored and len(stored) >= len(wanted) - 1:
            raise UserError(
                f"{source.weights}: tensor {name} is missing: the model was saved without its output projection; "
                "save it with AutoModelForCausalLM, or set tie_word_embeddings to true in config.json"
            )
        if name not in stored:
            raise UserError(
                f"{source.weights}: tensor {name} is missing; config.json asks for it, copy the model again"
            )
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, "
                f"config.json asks for {list(shape)}"
            )
        if stored[name].dtype not in DTYPES:
            raise UserError(
                f"{stored[name].file}: tensor {name} is {stored[name].dtype}; give float32, bfloat16 or float16 weights"
            )
    for name in stored.keys() - wanted.keys():
        if name != HEAD and not name.endswith("rotary_emb.inv_freq"):  # a table that old writers stored
            raise UserError(f"{stored[name].file}: tensor {name} is not part of a {config.family} model")
    dtypes = {DTYPES[stored[name].dtype] for name in wanted}
    return "bfloat16" if dtypes == {"bfloat16"} else "float32"


def _from_hf(config: ModelConfig, stored: dict[str, Stored], dtype: str) -> Parameters:
    for leaf in leaves(config):
        value = np.empty(leaf.shape, jnp.dtype(dtype))
        parts = value if leaf.stacked else value[None]
        for part, name in zip(parts, leaf.names, strict=True):
            part[...] = leaf.from_hf(read_tensor(stored[name]))
        yield leaf, value


def _check_checkpoint(source: ModelSource, config: ModelConfig) -> str:
    stored = ocp.PyTreeCheckpointHandler().metadata(LiteralPath(source.weights)).tree
    dtypes = set()
    for leaf in leaves(config):
        found = stored
        for key in leaf.row.path:
            found = found.get(key, {})
        name = ".".join(leaf.row.path)
        if not hasattr(found, "shape"):
            raise UserError(f"{source.weights}: parameter {name} is missing; {source.config} asks for it")
        if tuple(found.shape) != leaf.shape:
            raise UserError(
                f"{source.weights}: parameter {name} has shape {list(found.shape)}, "
                f"{source.config.name} asks for {list(leaf.shape)}"
            )
        dtypes.add(jnp.dtype(found.dtype).name)
    return "bfloat16" if dtypes == {"bfloat16"} else "float32"


def _from_checkpoint(source: ModelSource, config: ModelConfig) -> Parameters:
    with ocp.PyTreeCheckpointer() as reader:
        for leaf in leaves(config):
            yield leaf, _read_one(reader, source.weights, leaf.row.path)


def _read_one(reader: ocp.PyTreeCheckpointer, directory: Path, path: tuple[str, ...]) -> np.ndarray:
    """One parameter, the others left on disk."""
    item: Any = 0
    how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(path):
        item, how = {key: item}, {key: how}
    found = reader.restore(
        LiteralPath(directory), args=ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    )
    for key in path:
        found = found[key]
    return found
