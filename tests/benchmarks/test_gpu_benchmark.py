"""benchmarks/gpu.py: every part runs at toy size, and what is missing, dropped or broken is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from extras import ROOT, need

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_parts  # noqa: E402

CEILINGS = {"part": "ceilings", "case": "NVIDIA H100 80GB HBM3", "flops": 7e14, "bandwidth": 3e12}


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.extra
@pytest.mark.timeout(300)
def test_tiny_runs_every_part(tmp_path: Path) -> None:
    need("torch", extra="test")
    done = run("--tiny", "--minutes", "4", "-o", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        rows.setdefault(row["part"], []).append(row)
        assert not row.get("note", "").startswith(("failed", "dropped", "skipped", "refused")), row
    assert list(rows) == ["ceilings", "numbers", "speed", "roofline", "synthesis", "rivals"]
    assert [row["good"] for row in rows["numbers"]] == [True] * 3
    assert [row["case"] for row in rows["speed"]] == ["tiny, 4 rows, remat none", "tiny, 8 rows, remat full"]
    assert [row["case"].split(",")[0] for row in rows["rivals"]] == ["torch-compile", "torch-eager", "naive"]
    for row in rows["speed"] + rows["rivals"]:
        assert row["tokens_per_second"] > 0 and row["losses"][-1] < row["losses"][0] < 7  # ln 512 is 6.2
    parts = {row["case"].split(": ")[1] for row in rows["roofline"]}
    assert {"attention", "feed_forward", "loss", "optimizer", "whole step"} <= parts
    assert all(row["share_of_bandwidth_limit"] > 0 for row in rows["synthesis"])
    for row in report["rows"]:
        assert row["case"] in done.stdout  # the table has them all


def test_what_does_not_fit_the_time_is_dropped(tmp_path: Path) -> None:
    done = run("--tiny", "--parts", "speed", "--minutes", "0", "-o", str(tmp_path / "gpu.json"))
    assert done.returncode == 1
    assert "nothing was measured" in done.stderr
    assert "dropped: " in done.stdout


def test_wrong_arguments(tmp_path: Path) -> None:
    for arguments, message in (
        (["--parts", "fast"], "unknown part 'fast'; choose from numbers, speed, rivals, synthesis, roofline"),
        (["-o", "absent/gpu.json"], "--output: the folder absent does not exist"),
    ):
        done = run("--tiny", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels.txt").write_text("# packages\nyaml\nno-such-wheel\nnumpy\n")
    monkeypatch.setattr(gpu, "WHEELS", tmp_path / "wheels.txt")
    assert gpu.missing_wheels() == ["no-such-wheel"]


def test_a_child_that_fails_costs_one_row(tmp_path: Path) -> None:
    unit = gpu.Unit("speed", "no-such-size", 1)
    rows = list(gpu.child_rows(unit, 60, tmp_path, True, {"memory_bytes": 2**34, **CEILINGS}))
    assert len(rows) == 1
    assert rows[0]["note"].startswith("failed, exit 1: ")


def test_a_child_that_outlasts_the_time_is_stopped(tmp_path: Path) -> None:
    rows = list(gpu.child_rows(gpu.Unit("speed", "tiny", 1), 0.2, tmp_path, True, {"memory_bytes": 2**34, **CEILINGS}))
    assert rows == [{"part": "speed", "case": "tiny", "note": "failed, out of time"}]


def test_small_memory_takes_fewer_rows() -> None:
    rows = {}
    for gib in (78, 40, 24):
        context = gpu_parts.Context("1.3b", Path(), False, CEILINGS | {"memory_bytes": gib * 2**30})
        rows[gib] = gpu_parts.rows_that_fit(context, gpu_parts.Case("1.3b", 16, "none"))
    assert rows == {78: 16, 40: 8, 24: 4}
