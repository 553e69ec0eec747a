"""Memory of `ipt import` and `ipt export` for a random model in several safetensors files.

    python benchmarks/hf_memory.py [--preset mistral-1.3b] [--dtype bfloat16] [--folder DIR] [--json]

Each command is a process of its own, with two figures: the peak resident set that the kernel recorded, which includes
pages of mapped files (the kernel reclaims them under pressure), and the peak anonymous memory in samples 20 ms apart.
Bars: import at most 2 GiB above the model's bytes, export at most 1 GiB above the largest file that it writes. Needs
four times the model's bytes on the disk of DIR (default: a temporary folder), which is cleared at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ipt_jax.hf import safetensors_io
from ipt_jax.hf.config import config_to_hf, resolve_model
from ipt_jax.hf.params import leaves
from ipt_jax.model.config import PRESETS, ModelConfig, ModelSettings

GIB = 2**30
IPT = [sys.executable, "-c", "from ipt_jax.cli import main; main()"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[name for name in PRESETS if name != "tiny"], default="mistral-1.3b")
    parser.add_argument("--dtype", choices=safetensors_io.CODES, default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", action="store_true", help="print one object on stdout, the table on stderr")
    options = parser.parse_args()
    config = resolve_model(ModelSettings(preset=options.preset))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write_model(folder / "hf", config, options.dtype)
        imported = measure("import", str(folder / "hf"), "-o", str(folder / "imported"))
        exported = measure("export", str(folder / "imported"), "-o", str(folder / "again"))
        file = max(path.stat().st_size for path in (folder / "again").glob("*.safetensors"))
    rows = [{"command": "import", "own": size, "bar": 2.0} | imported, {"command": "export", "own": file} | exported]
    rows[1]["bar"] = 1.0
    print(f"{options.preset}, {options.dtype}: {size / GIB:.2f} GiB of tensors; GiB", file=sys.stderr)
    print("command   peak RSS  above own shards (bar)   anonymous   above    seconds", file=sys.stderr)
    for row in rows:
        above, anonymous = ((row[key] - row["own"]) / GIB for key in ("peak_rss_bytes", "anonymous_bytes"))
        print(
            f"{row['command']:8} {row['peak_rss_bytes'] / GIB:9.2f} {above:12.2f} ({row['bar']:.0f})"
            f" {row['anonymous_bytes'] / GIB:17.2f} {anonymous:9.2f} {row['seconds']:8.0f}",
            file=sys.stderr,
        )
        row["met"] = above <= row["bar"]
    if options.json:
        print(json.dumps(rows))
    return 0 if all(row["met"] for row in rows) else 1


def write_model(directory: Path, config: ModelConfig, dtype: str) -> int:
    """A random model in files of up to 1 GB; its bytes."""
    directory.mkdir()
    planned = [safetensors_io.Planned(name, leaf.hf_shape, dtype) for leaf in leaves(config) for name in leaf.names]
    draw = np.random.default_rng(0)

    def arrays() -> Iterator[np.ndarray]:
        for tensor in planned:
            yield (0.02 * draw.random(tensor.shape, np.float32)).astype(jnp.dtype(dtype))

    safetensors_io.SHARD_BYTES = 10**9
    safetensors_io.write_tensors(directory, planned, arrays())
    (directory / "config.json").write_text(json.dumps(config_to_hf(config, dtype)))
    return sum(tensor.bytes for tensor in planned)


def measure(*arguments: str) -> dict[str, float]:
    """Runs `ipt ARGUMENTS` and samples its anonymous memory."""
    begun = time.monotonic()
    child = subprocess.Popen([*IPT, *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    anonymous = 0
    while child.poll() is None:
        anonymous = max(anonymous, anonymous_bytes(child.pid))
        time.sleep(0.02)
    if child.returncode:
        sys.exit(f"ipt {' '.join(arguments)} failed with {child.returncode}")
    assert child.stdout is not None
    found = json.loads(child.stdout.read())
    return {
        "peak_rss_bytes": found["peak_rss_bytes"],
        "anonymous_bytes": anonymous,
        "seconds": time.monotonic() - begun,
    }


def anonymous_bytes(process: int) -> int:
    """Anonymous memory of the process. 0 if it has just ended, or on other systems than Linux."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    sys.exit(main())
