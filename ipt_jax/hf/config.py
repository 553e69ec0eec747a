"""Converts model configurations: from a recipe's `model:` block, and to and from Hugging Face's config.json.

`config_from_hf` refuses what the decoder does not compute (biases, other activations, other RoPE scalings) instead of
ignoring it. Imports no JAX.
"""

from __future__ import annotations

import json
from typing import Any

from ipt_jax.core.checkpoint_path import ModelSource, resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.model.config import PRESETS, ModelConfig, ModelSettings


def resolve_model(
    settings: ModelSettings, vocab_size: int | None = None, bos_id: int | None = None, eos_id: int | None = None
) -> ModelConfig:
    """What a `model:` block means; `vocab_size` and the control ids are those of the sources' tokenizer."""
    stated = settings.model_dump(exclude_unset=True, exclude={"preset", "from_"})
    if settings.from_:
        fields = read_model_config(resolve_checkpoint(settings.from_)).model_dump() | stated
    else:
        tokenizer = {"vocab_size": vocab_size, "bos_id": bos_id, "eos_id": eos_id}
        known = {name: value for name, value in tokenizer.items() if value is not None}
        fields = known | PRESETS.get(settings.preset or "", {}) | stated
    if "hidden_size" in fields and "q_heads" in fields:
        fields.setdefault("head_dim", fields["hidden_size"] // fields["q_heads"])
    config = check_settings(ModelConfig, fields, "model")
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise UserError(
            f"model: vocab_size is {config.vocab_size}, but the sources' tokenizer has {vocab_size} ids; "
            f"set model.vocab_size to {vocab_size} or more"
        )
    return config


def read_model_config(source: ModelSource) -> ModelConfig:
    """The configuration of the model at `source`."""
    try:
        raw = json.loads(source.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source.config}: not valid JSON ({error})") from error
    if source.kind == "hf":
        raw = config_from_hf(raw, str(source.config))
    return check_settings(ModelConfig, raw, str(source.config))


FAMILIES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
# What a config.json means when it leaves a key out, where the two families differ.
HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
}


def config_from_hf(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a ModelConfig from a config.json of transformers 4 or 5."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type is {family!r}; expected one of {', '.join(FAMILIES)}")
    raw = HF_DEFAULTS[family] | raw
    _refuse_unsupported(raw, where)
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing; copy the model again")
    rope = raw.get("rope_parameters") or {}
    eos = raw.get("eos_token_id", 2)
    return {
        "family": family,
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "layers": raw["num_hidden_layers"],
        "q_heads": raw["num_attention_heads"],
        "kv_heads": raw["num_key_value_heads"] or raw["num_attention_heads"],
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        "intermediate_size": raw["intermediate_size"],
        "sliding_window": raw["sliding_window"] if family == "mistral" else None,
        "rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0,
        "rope_scaling": _scaling(raw.get("rope_scaling") or rope, where),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "max_positions": raw["max_position_embeddings"],
        "initializer_range": raw.get("initializer_range", 0.02),
        "bos_id": raw.get("bos_token_id", 1),
        "eos_id": eos[0] if isinstance(eos, list) else eos,
    }


REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only silu is computed here")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} is true; only projections without biases are computed here")


def _scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope_scaling is {kind!r}; expected llama3 or none")
    return {
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_positions": rope["original_max_position_embeddings"],
    }


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers 4.57 and 5, and vLLM, read; `dtype` is that of the tensors."""
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # with rope_scaling the spelling of 4, which 5 reads too
        "rope_scaling": _scaling_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "dtype": dtype,  # since transformers 4.56
        "torch_dtype": dtype,  # before it, and other readers
    }
    if config.family == "mistral":
        return raw | {"sliding_window": config.sliding_window}
    return raw | {"attention_bias": False, "mlp_bias": False}


def _scaling_to_hf(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
