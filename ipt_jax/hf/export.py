"""`ipt export`: a checkpoint becomes a directory that transformers (4.57 and 5), vLLM and lm-eval load.

Guarantees: safetensors in the checkpoint's own dtype, in files of up to 5 GB, with config.json, generation_config.json
and the tokenizer files; the directory is whole or absent, and only an earlier export of the same model is replaced.
One parameter, all its layers, is in memory at a time. Without tokenizer files it succeeds with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ipt_jax.hf.import_ import copy_tokenizer, peak_rss_bytes
from ipt_jax.hf.load import Parameters, open_parameters
from ipt_jax.hf.mapping import leaves
from ipt_jax.hf.target import refuse_foreign, whole_directory
from ipt_jax.hf.tensors import Planned, write_tensors, written_here
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.source import config_to_hf, read_model_config, resolve_checkpoint


def run_export(checkpoint: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes the model behind `checkpoint` (a run, a step, an import or an HF directory) to `output`."""
    source, output = resolve_checkpoint(checkpoint), Path(output).absolute()
    config = read_model_config(source)
    dtype, parameters = open_parameters(source, config)
    raw = config_to_hf(config, dtype)
    refuse_foreign(output, _is_export(output, raw), "export")
    planned = [Planned(name, leaf.hf_shape, dtype) for leaf in leaves(config) for name in leaf.names]
    size = sum(tensor.bytes for tensor in planned)
    with whole_directory(output, size) as directory:
        write_tensors(directory, planned, _hf_tensors(parameters, dtype))
        _write_json(directory / "config.json", raw)
        _write_json(directory / "generation_config.json", _generation(config))
        copy_tokenizer(source, directory)
    return {"tensors": len(planned), "bytes": size, "peak_rss_bytes": peak_rss_bytes()}


def _hf_tensors(parameters: Parameters, dtype: str) -> Iterator[np.ndarray]:
    for leaf, value in parameters:
        for part in value if leaf.stacked else value[None]:
            yield leaf.to_hf(part).astype(np.dtype(dtype), copy=False)


def _is_export(path: Path, raw: dict[str, Any]) -> bool:
    config = path / "config.json"
    return config.is_file() and written_here(path) and json.loads(config.read_text(encoding="utf-8")) == raw


def _generation(config: ModelConfig) -> dict[str, Any]:
    tokens = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}
    return {key: value for key, value in tokens.items() if value is not None}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
