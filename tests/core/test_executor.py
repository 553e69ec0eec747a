"""Processes and Ray run the same function: the same bytes of token shards, and a mistake in a worker is one line."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extras import ROOT, need
from token_shards import save_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import run_units
from ipt_jax.core.hashing import file_digest


def end_this_worker(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(UserError, match="was killed.*fewer workers"):
        list(run_units(end_this_worker, [1, 2], workers=2))


def wait_or_fail(seconds: float) -> float:
    if not seconds:
        raise UserError("no")
    time.sleep(seconds)
    return seconds


def test_nobody_waits_for_work_that_is_thrown_away() -> None:
    with pytest.raises(UserError, match="no"):
        list(run_units(wait_or_fail, [10_000.0, 0.0], workers=2))
    assert not [one for one in multiprocessing.active_children() if "ForkServer" in type(one).__name__]


def checksums(output: Path) -> dict[str, str]:
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(output)): file_digest(path) for path in files}


@pytest.mark.extra
def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    """As a user runs it: relative paths, a mistake in the last line, the fixed file, against two local processes."""
    need("ray", extra="ray")
    save_tokenizer(tmp_path / "tokenizer")
    lines = [json.dumps({"id": str(i), "text": f"a small world of words {i}"}) for i in range(200)]
    recipe = {"inputs": [{"path": "in.jsonl"}], "tokenizer": "tokenizer", "output": "ray", "unit_bytes": 3000}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", "from ipt_jax.cli import main; main()", "tokenize", "recipe.yaml", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *changes], capture_output=True, text=True, cwd=tmp_path, env=environment)

    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:-1], '{"id": 200, "text": {"no": "text"}}']))
    refused = run("executor=ray")
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: input ")
    assert "in.jsonl: line 200: field 'text' is a dict, expected text" in refused.stderr.splitlines()[-1]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    ray = run("executor=ray", "output=again")
    assert ray.returncode == 0 and json.loads(ray.stdout)["documents"] == 200, ray.stderr
    assert run("executor=local", "workers=2", "output=local").returncode == 0
    assert checksums(tmp_path / "again") == checksums(tmp_path / "local")
