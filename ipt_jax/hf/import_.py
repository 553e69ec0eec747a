"""`ipt import`: a Hugging Face directory becomes a checkpoint that training continues from.

Guarantees: the parameters keep their dtype (float32 or bfloat16; float16 widens to float32), each stands where the
table of `ipt_jax.hf.mapping` puts it, and the output is whole or absent. One parameter, all its layers, is in memory
at a time. Tokenizer files travel along; without them the import succeeds with a warning.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as orbax

from ipt_jax.corpus.settings import UserError
from ipt_jax.corpus.tokenizer import load_tokenizer
from ipt_jax.hf.load import open_parameters
from ipt_jax.hf.mapping import leaves
from ipt_jax.hf.target import refuse_foreign, whole_directory
from ipt_jax.model.config import param_count
from ipt_jax.model.integrity import write_digests
from ipt_jax.model.paths import LiteralPath
from ipt_jax.model.source import ModelSource, read_model_config, resolve_checkpoint


def run_import(hf_dir: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes OUTPUT/checkpoint, OUTPUT/model.json and OUTPUT/tokenizer."""
    source, output = resolve_checkpoint(hf_dir), Path(output).absolute()
    if source.kind != "hf":
        raise UserError(f"{hf_dir}: is a checkpoint already; import takes a Hugging Face directory with config.json")
    config = read_model_config(source)
    dtype, parameters = open_parameters(source, config)
    text = config.model_dump_json(indent=1)
    earlier = output / "model.json"
    refuse_foreign(output, earlier.is_file() and earlier.read_text(encoding="utf-8") == text, "import")
    size = param_count(config) * (2 if dtype == "bfloat16" else 4)
    with whole_directory(output, size) as directory:
        for leaf, value in parameters:
            _save(LiteralPath(directory / "written"), leaf.row.path, value)
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


def copy_tokenizer(source: ModelSource, target: Path) -> None:
    """The tokenizer files beside a model, byte for byte, or a warning."""
    if source.tokenizer is None:
        print("warning: the model has no tokenizer files; whoever tokenizes for it has to name them", file=sys.stderr)
        return
    target.mkdir(exist_ok=True)
    for file in load_tokenizer(source.tokenizer).files():
        (target / file.name).write_bytes(file.read_bytes())


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
