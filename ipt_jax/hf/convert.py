"""`ipt import` converts a Hugging Face directory to a checkpoint, and `ipt export` the reverse.

Guarantees: output is atomic, and only an earlier output for the same model is replaced. One parameter, with all its
layers, is in memory at a time. Tokenizer files are copied; without them both succeed with a warning. An import keeps
float32 and bfloat16 (float16 widens to float32). An export has safetensors in the checkpoint's dtype, in files of up to
5 GB, with config.json and generation_config.json, for transformers 4.57 and 5, vLLM and lm-eval.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import orbax.checkpoint.experimental.v1 as orbax

from ipt_jax.core.checkpoint_digests import write_digests
from ipt_jax.core.checkpoint_path import LiteralPath, ModelSource, resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.core.files import refuse_unrelated, whole_directory
from ipt_jax.core.progress import Progress
from ipt_jax.hf.config import config_to_hf, read_model_config
from ipt_jax.hf.export_tokenizer import copy_tokenizer, export_tokenizer
from ipt_jax.hf.params import Parameters, leaves, open_parameters
from ipt_jax.hf.safetensors_io import CODES, Planned, write_tensors, written_here
from ipt_jax.model.config import ModelConfig, param_count

TRIES = 5  # checkpoints that a run may remove during an export


def run_import(hf_dir: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes OUTPUT/checkpoint, OUTPUT/model.json and OUTPUT/tokenizer."""
    source, output = resolve_checkpoint(hf_dir), Path(output).absolute()
    if source.kind != "hf":
        raise UserError(f"{hf_dir}: is already a checkpoint; import reads a Hugging Face directory with config.json")
    config = read_model_config(source)
    dtype, parameters = open_parameters(source, config)
    text = config.model_dump_json(indent=1)
    earlier = output / "model.json"
    refuse_unrelated(output, earlier.is_file() and earlier.read_text(encoding="utf-8") == text, "import")
    size = param_count(config) * (2 if dtype == "bfloat16" else 4)
    _silence_orbax()
    with whole_directory(output, size) as directory:
        with Progress(size / 1e6, "MB", "ipt import") as progress:
            for leaf, value in parameters:
                _save(LiteralPath(directory / "written"), leaf.row.path, value)
                progress.advance(value.nbytes / 1e6)
        orbax.partial.finalize(LiteralPath(directory / "written"))
        checkpoint = directory / "checkpoint"
        checkpoint.mkdir()
        os.replace(directory / "written" / "state", checkpoint / "params")
        for file in (directory / "written").iterdir():  # Orbax's notes on the item, under the name it now has
            file.unlink()
        (directory / "written").rmdir()
        (checkpoint / "model.json").write_text(text, encoding="utf-8")
        write_digests(checkpoint)
        (directory / "model.json").write_text(text, encoding="utf-8")
        copy_tokenizer(source, directory / "tokenizer")
    tensors = sum(len(leaf.names) for leaf in leaves(config))
    return {"tensors": tensors, "bytes": size, "peak_rss_bytes": peak_rss_bytes()}


def _save(directory: LiteralPath, path: tuple[str, ...], value: np.ndarray) -> None:
    """Adds one parameter to the checkpoint under way."""
    block: Any = value
    for key in reversed(path):
        block = {key: block}
    try:
        orbax.partial.save(directory, block)
    except ValueError as error:  # TensorStore's word for a failed write
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _silence_orbax() -> None:
    """An interrupted save logs a traceback for each array; the exception is raised as well."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def run_export(checkpoint: str | Path, output: str | Path, dtype: str | None = None) -> dict[str, Any]:
    """Writes the model of `checkpoint` (a run, a step, an import or an HF directory) to `output`.

    `dtype` is float32, bfloat16 or None for that of the checkpoint. A run that removes the checkpoint meanwhile has
    written a newer one, which is exported.
    """
    if dtype not in (None, *CODES):
        raise UserError(f"dtype is {dtype!r}; expected {' or '.join(CODES)}")
    for _ in range(TRIES):
        source = resolve_checkpoint(checkpoint)
        try:
            return _export(source, Path(output).absolute(), dtype)
        except Exception:
            if source.weights.exists():
                raise
            print(f"{source.weights.parent} was removed by its run while it was read; retrying", file=sys.stderr)
    raise UserError(
        f"{checkpoint}: the run removes its checkpoints while they are read; set train.keep_checkpoints higher"
    )


def _export(source: ModelSource, output: Path, dtype: str | None) -> dict[str, Any]:
    config = read_model_config(source)
    stored, parameters = open_parameters(source, config)
    dtype = dtype or stored
    refuse_unrelated(output, _is_export(output, config), "export")
    planned = [Planned(name, leaf.hf_shape, dtype) for leaf in leaves(config) for name in leaf.names]
    size = sum(tensor.bytes for tensor in planned)
    with whole_directory(output, size) as directory:
        with Progress(size / 1e6, "MB", "ipt export") as progress:
            write_tensors(directory, planned, _hf_tensors(parameters, dtype, progress))
        _write_json(directory / "config.json", config_to_hf(config, dtype))
        _write_json(directory / "generation_config.json", _generation(config))
        export_tokenizer(source, directory)
        (directory / "README.md").write_text(_card(source, config, dtype, output), encoding="utf-8")
    return {"tensors": len(planned), "bytes": size, "peak_rss_bytes": peak_rss_bytes()}


def _hf_tensors(parameters: Parameters, dtype: str, progress: Progress) -> Iterator[np.ndarray]:
    for leaf, value in parameters:
        for part in value if leaf.stacked else value[None]:
            tensor = leaf.to_hf(part).astype(np.dtype(dtype), copy=False)
            progress.advance(tensor.nbytes / 1e6)
            yield tensor


def _is_export(path: Path, config: ModelConfig) -> bool:
    """Whether `path` is an earlier export of this model, of whatever dtype."""
    written = _read_json(path / "config.json")
    return written_here(path) and written in [config_to_hf(config, dtype) for dtype in CODES]


def _generation(config: ModelConfig) -> dict[str, Any]:
    tokens = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id}
    return {key: value for key, value in tokens.items() if value is not None}


def _card(source: ModelSource, config: ModelConfig, dtype: str, output: Path) -> str:
    """The model card: what the model was trained from and on, and how to load it."""
    step = source.weights.parent
    record, run = (_read_json(file) for file in (step / "record/record.json", step.parent.parent / "run.json"))
    recipe = run.get("recipe", {})
    lines = ["---", "library_name: transformers", "---", "", f"# {output.name}", ""]
    lines.append(f"A {config.family} model of {param_count(config):,} parameters in {dtype}, written by `ipt export`.")
    if recipe:
        model = recipe["model"]
        lines += ["", f"- Base: {model.get('from') or 'new weights, ' + str(model.get('preset') or 'no preset')}"]
    if record:
        lines.append(f"- Training: step {record['step']:,}, {record['tokens']:,} tokens")
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'{name} = {cls}.from_pretrained("{output.name}")' for name, cls in LOADERS]
    lines += ["```", "", f"vLLM: `vllm serve {output.name}`"]
    if recipe:
        lines += ["", "## Recipe", "", "```json", json.dumps(recipe, indent=1), "```"]
    return "\n".join(lines) + "\n"


LOADERS = (("model", "AutoModelForCausalLM"), ("tokenizer", "AutoTokenizer"))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
