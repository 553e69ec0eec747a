"""launch/tune_synthesizer.sh: its steps in order, where it resumes, what it refuses, and the plan of its recipes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from extras import ROOT

from ipt_jax.config import Recipe, check_schedule, rows_per_step
from ipt_jax.core.settings import load_settings
from ipt_jax.data.plan import build_plan
from ipt_jax.data.tokenize import TokenizeSettings, run_tokenize
from synth.collect.run import CollectSettings, run_collect
from synth.miniworld.write import run_miniworld

RECIPES = ROOT / "configs/synthesizer"
TUNING = ["smollm2", "miniworld", "collect", "tokenize", "import", "plan", "train", "export"]
STUB = """#!/usr/bin/env bash
case $1 in *.py) name=$(basename "$1" .py) ;; *) name=$1 ;; esac
if [ "${FAILS:-}" = "$name" ]; then exit 1; fi
echo "$name $*" >> calls
echo '{}'
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of the launch scripts and recipes with programs that write down how they were called."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copytree(RECIPES, root / "configs/synthesizer")
    (root / "launch/setup.sh").write_text("#!/bin/sh\n")
    for name in ("synth", "ipt", "python"):
        program = root / ".venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(STUB)
        program.chmod(0o755)
    for name in ("mine", "held"):
        (tmp_path / f"{name}.jsonl").write_text('{"context": "c", "qa": []}\n')
    return root


def launch(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "IPT_VENV"}
    return subprocess.run(
        [checkout / "launch/tune_synthesizer.sh", *arguments],
        cwd=checkout.parent,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


def calls(checkout: Path) -> list[str]:
    """The commands that ran, each with its arguments, since the last look."""
    written = checkout / "calls"
    found = written.read_text().splitlines() if written.exists() else []
    written.unlink(missing_ok=True)
    return found


def names(checkout: Path) -> list[str]:
    return [call.split()[0] for call in calls(checkout)]


def test_it_tunes_and_scores_on_the_users_rows(checkout: Path) -> None:
    assert launch(checkout, "mine.jsonl", "held.jsonl").returncode == 0
    ran = calls(checkout)
    assert [call.split()[0] for call in ran] == [*TUNING, *["eval"] * 4, "tune_summary"]
    assert f"inputs.0.path={checkout.parent / 'mine.jsonl'} inputs.0.name=mine" in ran[2]
    zero, few, untuned, rules = ran[8:12]
    assert all(f'tasks=[{{path: "{checkout.parent / "held.jsonl"}", name: heldout}}]' in one for one in ran[8:12])
    assert "few_shot" not in zero and "few_shot=3" in few
    assert "synthesizer.model=out/tune_synthesizer/smollm2 seed_examples.path=" in untuned
    assert "synthesizer=null helper=null" in rules


def test_it_resumes_at_the_step_that_failed(checkout: Path) -> None:
    failed = launch(checkout, "mine.jsonl", FAILS="train")
    assert failed.returncode == 1 and "train failed" in failed.stderr
    assert names(checkout) == TUNING[:6]
    assert launch(checkout, "mine.jsonl").returncode == 0
    assert names(checkout) == TUNING[6:], "without held-out rows nothing is scored"
    assert launch(checkout, "mine.jsonl").returncode == 0
    assert names(checkout) == []


def test_a_changed_recipe_repeats_its_step_and_later_ones(checkout: Path) -> None:
    launch(checkout, "mine.jsonl")
    calls(checkout)
    with (checkout / "configs/synthesizer/smollm2.yaml").open("a") as file:
        file.write("# changed\n")
    launch(checkout, "mine.jsonl")
    assert names(checkout) == TUNING[5:]


def test_mistakes_exit_with_2_and_one_line(checkout: Path) -> None:
    for arguments, words in [
        (["absent.jsonl"], "absent.jsonl: no such file"),
        ([], "pass your own rows"),
        (["a"] * 3, "too many"),
    ]:
        done = launch(checkout, *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert calls(checkout) == []


def test_help_is_the_head_of_the_script(checkout: Path) -> None:
    done = launch(checkout, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Tune SmolLM2-135M") and "TRAIN" in done.stdout


def test_the_recipes_plan_a_run(tmp_path: Path) -> None:
    """On the rows of a world, with its tokenizer: one epoch of all documents, none of them cut."""
    world, documents, tokens = (tmp_path / name for name in ("world", "documents", "tokens"))
    run_miniworld(world, articles=20, tuning_articles=400, seed=0)
    tokenizer = world / "tokenizer"
    changes = [f"inputs=[{{path: {world / 'tuning'}}}]", f"few_shot.tokenizer={tokenizer}", f"output={documents}"]
    collected = run_collect(load_settings(CollectSettings, RECIPES / "smollm2_collect.yaml", changes))
    assert collected["datasets"] == 3, "free-form pairs come from the user's rows"
    changes = [f"inputs=[{{path: {documents}}}]", f"tokenizer={tokenizer}", f"output={tokens}"]
    run_tokenize(load_settings(TokenizeSettings, RECIPES / "smollm2_tokenize.yaml", changes))
    recipe = load_settings(Recipe, RECIPES / "smollm2.yaml", [f"data.sources.0.path={tokens}"])
    plan = build_plan(recipe.data, rows_per_step=rows_per_step(recipe)).summary()
    check_schedule(recipe, plan["steps"])
    assert plan["tokens"] == collected["tokens"] and plan["truncated_tokens"] == 0
