"""launch/reproduce.sh: its steps in order, where it resumes, what each arm reads, and the parts written in Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from extras import ROOT
from renderkit import PAIRS, group, render

from ipt_jax.ablate.run import AblateSettings, arm_recipe
from ipt_jax.core.settings import load_settings
from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import encode
from synth.miniworld.questions import TASKS

STUB = """#!/usr/bin/env bash
if [ "${FAILS:-}" = "$1" ]; then exit 1; fi
echo "$PWD $(basename "$0") $*" >> "$CALLS"
echo '{}'
"""
ABLATIONS = [load_settings(AblateSettings, ROOT / f"configs/reproduce/{name}.yaml") for name in ("main", "layouts")]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of scripts and recipes with programs that write down how they were called."""
    for name in ("launch", "configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "launch/setup.sh").write_text("#!/bin/sh\n")
    for name in ("synth", "ipt", "python"):
        program = tmp_path / ".venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(STUB)
        program.chmod(0o755)
    monkeypatch.delenv("IPT_VENV", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


def launch(checkout: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The finished process, and the commands that it ran."""
    written = checkout / "calls"
    written.unlink(missing_ok=True)
    command = [str(checkout / "launch/reproduce.sh"), *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    return done, written.read_text().splitlines() if written.exists() else []


def test_each_arm_reads_what_a_step_writes(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, calls = launch(checkout)
    assert done.returncode == 0, done.stderr
    written = {match for call in calls for match in re.findall(r" output=(out/reproduce/tokens/\w+)", call)}
    monkeypatch.chdir(ROOT)
    arms = [arm_recipe(one, arm, 0) for one in ABLATIONS for arm in one.arms]
    read = {source.path for arm in arms for source in arm.data.sources}
    assert read <= written
    assert written - read == {"out/reproduce/tokens/tuning"}  # the synthesizer's
    assert [call.split()[2] for call in calls][-4:] == ["tokenize", "ablate", "ablate", "examples/reproduction.py"]


def test_arms_differ_in_their_sources_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for one in ABLATIONS:
        arms = [arm_recipe(one, arm, 0).model_dump(exclude={"run_dir": True, "data": {"sources"}}) for arm in one.arms]
        assert all(arm == arms[0] for arm in arms)
        for arm in one.arms:
            shares = [source.share for source in arm_recipe(one, arm, 0).data.sources]
            assert sum(share or 0.0 for share in shares) == pytest.approx(1.0)
    assert ABLATIONS[0].baselines == ["vanilla", "mix"]


def test_tasks_are_those_of_the_world() -> None:
    known = {*TASKS, "recall_answers", "reading_answers"}
    for one in ABLATIONS:
        for task in one.tasks:
            name, _, path = task.partition("=")
            assert name in known and path == f"out/reproduce/world/heldout/{name}.jsonl"


def test_it_resumes_at_the_step_that_failed(checkout: Path) -> None:
    done, calls = launch(checkout, FAILS="ablate")
    assert done.returncode == 1 and "main failed" in done.stderr
    done, later = launch(checkout)
    assert done.returncode == 0 and [call.split()[2] for call in later[:2]] == ["ablate", "ablate"]
    assert len(calls) > 25 and len(later) == 3
    assert len(launch(checkout)[1]) == 1  # the tables alone


def test_another_seed_has_a_directory_of_its_own(checkout: Path) -> None:
    done, calls = launch(checkout, "10")
    assert done.returncode == 0, done.stderr
    assert {call.split()[0] for call in calls} == {str(checkout / "out/seed-10")}
    assert any("--seed 10" in call for call in calls) and any("seeds=[10, 11, 12]" in call for call in calls)
    assert (checkout / "out/seed-10/configs/reproduce/main.yaml").is_file()
    done, calls = launch(checkout, "x")
    assert (done.returncode, calls) == (2, []) and "SEED is x; pass a number" in done.stderr


def test_pairs_without_texts(tmp_path: Path) -> None:
    """Of a group rendered with detached pairs, the questions and answers remain, and no text."""
    documents = render(group("g", [PAIRS[:2], PAIRS[:1]]), detached=1.0)
    with Output(tmp_path / "documents", stage="synth render", identity={}, shard_name="documents") as output:
        output.seal(0, 1, map(encode, documents))
        output.finish()
    script = [sys.executable, str(ROOT / "examples/reproduction.py"), "pairs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*script, str(tmp_path / "documents"), str(tmp_path / "pairs.jsonl")], check=True, env=environment)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 3 < len(documents)
    assert all("Text" not in row["text"] for row in rows) and sum("Ann" in row["text"] for row in rows) == 2
