"""Converts model configurations: from a recipe's `model:` block, and to and from Hugging Face's config.json.

`config_from_hf` refuses what the decoder does not compute (biases, other activations, other RoPE scalings) instead of
ignoring it. Imports no JAX.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ipt_jax.core.checkpoint_path import ModelSource, resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.core.settings import check_settings
from ipt_jax.hf.safetensors_io import stores_other_head
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
        rows = "; the added rows start as the mean of the stored ones" if settings.from_ else ""
        raise UserError(
            f"model: vocab_size is {config.vocab_size}, but the sources' tokenizer has {vocab_size} ids; "
            f"set model.vocab_size to {vocab_size} or more{rows}"
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
    config = check_settings(ModelConfig, raw, str(source.config))
    if source.kind == "hf" and config.tie_embeddings and stores_other_head(source.weights):
        print(
            f"warning: {source.config}: tie_word_embeddings is true, but a different lm_head.weight is stored; "
            "it is used, as transformers 5 does, and the model is untied",
            file=sys.stderr,
        )
        return config.model_copy(update={"tie_embeddings": False})
    return config


FAMILIES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
# Field of a ModelConfig, key of a config.json, and what the file means when it omits the key.
REQUIRED = object()
FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("family", "model_type", REQUIRED),
    ("vocab_size", "vocab_size", REQUIRED),
    ("hidden_size", "hidden_size", REQUIRED),
    ("intermediate_size", "intermediate_size", REQUIRED),
    ("layers", "num_hidden_layers", REQUIRED),
    ("q_heads", "num_attention_heads", REQUIRED),
    ("kv_heads", "num_key_value_heads", None),
    ("head_dim", "head_dim", None),
    ("max_positions", "max_position_embeddings", 2048),
    ("initializer_range", "initializer_range", 0.02),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("rope_theta", "rope_theta", 10_000.0),
    ("rope_scaling", "rope_scaling", None),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("bos_id", "bos_token_id", 1),
    ("eos_id", "eos_token_id", 2),
    ("sliding_window", "sliding_window", None),
)
MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
# Field of a RopeScaling and key of a config.json's rope_scaling.
ROPE_FIELDS = (
    ("factor", "factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("original_max_positions", "original_max_position_embeddings"),
)


def config_from_hf(raw: Any, where: str) -> dict[str, Any]:
    """The fields of a ModelConfig from a config.json of transformers 4 or 5."""
    _refuse_unsupported(raw, where)
    family = raw["model_type"]
    defaults = {key: default for _, key, default in FIELDS if default is not REQUIRED}
    raw = defaults | (MISTRAL_DEFAULTS if family == "mistral" else {}) | raw
    for field, key, default in FIELDS:
        if default is REQUIRED and field != "family" and not (isinstance(raw.get(key), int) and raw[key] > 0):
            raise UserError(f"{where}: {key} must be a positive integer, got {raw.get(key)!r}; copy the model again")
    fields = {field: raw[key] for field, key, _ in FIELDS}
    rope = _rope(raw, "rope_parameters", where)
    eos = raw["eos_token_id"]
    return fields | {
        "kv_heads": raw["num_key_value_heads"] or raw["num_attention_heads"],
        "head_dim": raw["head_dim"] or raw["hidden_size"] // raw["num_attention_heads"],
        "sliding_window": raw["sliding_window"] if family == "mistral" else None,
        "rope_theta": rope.get("rope_theta") or raw["rope_theta"],
        "rope_scaling": _scaling(_rope(raw, "rope_scaling", where) or rope, where),
        "eos_id": (eos[0] if len(eos) == 1 else tuple(eos) or None) if isinstance(eos, list) else eos,
    }


def _refuse_unsupported(raw: Any, where: str) -> None:
    """Raises UserError for a model that the decoder does not compute."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a JSON object, got a {type(raw).__name__}; copy the model again")
    family, quantized = raw.get("model_type"), raw.get("quantization_config")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: model_type is {family!r}; expected one of {', '.join(FAMILIES)}")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{where}: quantization_config is {method!r}; quantized weights are not read, use the unquantized model"
        )
    supported = (FAMILIES[family], FAMILIES[family].replace("ForCausalLM", "Model"))
    for name in raw.get("architectures") or []:
        if name not in supported:
            raise UserError(f"{where}: architectures is {name!r}; expected {' or '.join(supported)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only silu is computed here")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} is true; only projections without biases are computed here")


def _rope(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    if not isinstance(raw.get(key) or {}, dict):
        raise UserError(f"{where}: {key} must be a JSON object, got {raw[key]!r}; copy the model again")
    return raw.get(key) or {}


def _scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope_scaling is {kind!r}; expected llama3 or none")
    for _, key in ROPE_FIELDS:
        if key not in rope:
            raise UserError(f"{where}: rope_scaling.{key} is missing; copy the model's config.json again")
    return {field: rope[key] for field, key in ROPE_FIELDS}


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers 4.57 and 5, and vLLM, read; `dtype` is that of the tensors."""
    raw: dict[str, Any] = {"architectures": [FAMILIES[config.family]]}
    raw |= {key: getattr(config, field) for field, key, _ in FIELDS}
    raw["eos_token_id"] = list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id
    if config.rope_scaling is not None:  # the spelling of transformers 4, which 5 reads too
        scaling = {key: getattr(config.rope_scaling, field) for field, key in ROPE_FIELDS}
        raw["rope_scaling"] = {"rope_type": "llama3"} | scaling
    if config.family != "mistral":
        del raw["sliding_window"]
        raw |= {"attention_bias": False, "mlp_bias": False}
    # dtype since transformers 4.56, torch_dtype for earlier ones and other readers
    constants = {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
    return raw | constants | {"dtype": dtype, "torch_dtype": dtype}
