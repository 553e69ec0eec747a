"""Directories as people have them: other heads, quantized, bare, classifiers, several EOS, a larger tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_hf_roundtrip import LLAMA, MISTRAL, save_run
from trainkit import model_of, program_of, recipe_of

import ipt_jax
from ipt_jax.core.checkpoint_path import resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.hf.config import read_model_config, resolve_model
from ipt_jax.hf.convert import run_export, run_import
from ipt_jax.hf.params import load_params
from ipt_jax.model.config import ModelConfig, ModelSettings


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    run_export(save_run(tmp_path / "run", LLAMA), tmp_path / "hf")
    return tmp_path / "hf"


def edit(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_stored_head_that_differs_is_used(tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, weights = np.arange(9), load_file(tied / "model.safetensors")
    before = ipt_jax.load(tied).logits(row)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, tied / "model.safetensors")
    np.testing.assert_array_equal(ipt_jax.load(tied).logits(row), before)
    assert "lm_head" not in capsys.readouterr().err
    save_file(weights | {"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}, tied / "model.safetensors")
    run_import(tied, tmp_path / "imported")
    assert "a different lm_head.weight is stored; it is used" in capsys.readouterr().err
    np.testing.assert_allclose(ipt_jax.load(tmp_path / "imported").logits(row), 2 * before, atol=1e-5)
    assert not ipt_jax.load(tmp_path / "imported").config.tie_embeddings


@pytest.mark.parametrize(("eos", "read", "written"), [([2, 5, 7], (2, 5, 7), [2, 5, 7]), ([5], 5, 5), ([], None, None)])
def test_every_eos_is_kept(eos: list[int], read: Any, written: Any, tied: Path, tmp_path: Path) -> None:
    edit(tied, eos_token_id=eos)
    run_import(tied, tmp_path / "imported")
    assert resolve_model(ModelSettings.model_validate({"from": str(tmp_path / "imported")})).eos_id == read
    run_export(tmp_path / "imported", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == written
    assert json.loads((tmp_path / "again/generation_config.json").read_text()).get("eos_token_id") == written


def test_each_eos_ends_a_row(tied: Path) -> None:
    free = ipt_jax.load(tied).generate([[3, 4]], 12, eos=False)[0]
    edit(tied, eos_token_id=[free[4], free[2]])
    assert ipt_jax.load(tied).generate([[3, 4]], 12) == [free[: min(free.index(free[2]), free.index(free[4]))]]


def test_other_weights_beside_the_model_are_not_read(tied: Path) -> None:
    before = ipt_jax.load(tied).logits([1, 2])
    save_file({"tok_embeddings.weight": np.zeros((2, 2), np.float32)}, tied / "consolidated.safetensors")
    np.testing.assert_array_equal(ipt_jax.load(tied).logits([1, 2]), before)


def test_a_bare_model_is_read(tied: Path, tmp_path: Path) -> None:
    before, weights = ipt_jax.load(tied).logits([1, 2]), load_file(tied / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, tied / "model.safetensors")
    edit(tied, architectures=["LlamaModel"])
    np.testing.assert_array_equal(ipt_jax.load(tied).logits([1, 2]), before)
    edit(tied, tie_word_embeddings=False)
    with pytest.raises(UserError, match="tensor lm_head.weight is missing: the model was saved without its output"):
        ipt_jax.load(tied)


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": ROPE}, "rope_scaling.high_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be a JSON object, got 'llama3'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is 'awq'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is 'LlamaForSequenceClassification'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
    ],
)
def test_an_unreadable_config_is_refused_by_field(fields: dict[str, Any], message: str, tied: Path) -> None:
    edit(tied, **fields)
    with pytest.raises(UserError, match=message):
        ipt_jax.load(tied)


def test_a_config_that_is_a_list_is_refused(tied: Path) -> None:
    (tied / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="config.json: expected a JSON object, got a list"):
        read_model_config(resolve_checkpoint(tied))


@pytest.mark.parametrize("config", [MISTRAL, LLAMA], ids=["own head", "tied"])
def test_added_tokens_start_as_the_mean(config: ModelConfig, tmp_path: Path) -> None:
    source = resolve_checkpoint(save_run(tmp_path / "run", config))
    settings = {"from": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"tokenizer has 39 ids; set model.vocab_size to 39 or more; the added rows"):
        resolve_model(ModelSettings.model_validate(settings), 39)
    wanted = resolve_model(ModelSettings.model_validate(settings | {"vocab_size": 39}), 39)
    _, old = load_params(source)
    grown, new = load_params(source, vocab_size=39)
    assert grown == wanted and new["embedding"].shape == (39, 16)
    np.testing.assert_array_equal(new["embedding"][:37], old["embedding"])
    np.testing.assert_allclose(new["embedding"][38], np.asarray(old["embedding"]).mean(0), rtol=1e-5)
    if not config.tie_embeddings:
        assert new["head"].shape == (16, 39)
        np.testing.assert_allclose(new["head"][:, 37], np.asarray(old["head"]).mean(1), rtol=1e-5)


def test_rows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(
        UserError, match="data.seq_len is 32, but model.max_positions is 16; lower data.seq_len, or set"
    ):
        program_of(recipe_of(), model_of(max_positions=16))
