"""Checkpoints to Hugging Face directories and back: every byte, every refusal, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from trainkit import run_python

import ipt_jax
from ipt_jax.core.checkpoint_path import resolve_checkpoint
from ipt_jax.core.errors import UserError
from ipt_jax.core.files import lock_directory
from ipt_jax.hf import convert, safetensors_io
from ipt_jax.hf.config import config_from_hf, config_to_hf, read_model_config, resolve_model
from ipt_jax.hf.convert import run_export, run_import
from ipt_jax.hf.params import leaves
from ipt_jax.model.config import ModelConfig, ModelSettings, RopeScaling
from ipt_jax.model.decoder import init_params

MISTRAL = ModelConfig(
    vocab_size=37, hidden_size=16, layers=2, q_heads=4, kv_heads=2, head_dim=6, intermediate_size=20,
    sliding_window=8, initializer_range=0.3,
)  # fmt: skip
LLAMA = MISTRAL.model_copy(
    update={
        "family": "llama", "sliding_window": None, "tie_embeddings": True, "rope_theta": 5e5,
        "rope_scaling": RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=32),
    }
)  # fmt: skip


def save_run(directory: Path, config: ModelConfig, steps: tuple[int, ...] = (5,), dtype: str = "float32") -> Path:
    """A run directory as training leaves it, with seeds for steps."""
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        for step in steps:
            params = jax.tree.map(lambda x: x.astype(dtype), init_params(config, jax.random.key(step)))
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    for step in steps:
        (directory / "checkpoints" / str(step) / "model.json").write_text(config.model_dump_json())
    return directory


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    run_export(save_run(tmp_path / "run", MISTRAL), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [MISTRAL, LLAMA], ids=["mistral", "llama"])
def test_both_ways_keep_every_byte(config: ModelConfig, dtype: str, tmp_path: Path) -> None:
    first = run_export(save_run(tmp_path / "run", config, dtype=dtype), tmp_path / "hf")
    imported = run_import(tmp_path / "hf", tmp_path / "imported")
    again = run_export(tmp_path / "imported", tmp_path / "again")
    file = tmp_path / "hf" / "model.safetensors"
    data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert first["bytes"] == imported["bytes"] == again["bytes"] == data
    assert first["tensors"] == imported["tensors"] == (20 if config.tie_embeddings else 21)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert load_file(file)["model.norm.weight"].dtype == jnp.dtype(dtype)


def test_every_kind_of_path_is_a_model(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", MISTRAL, steps=(2, 10))
    (run / "checkpoints" / "30.orbax-checkpoint-tmp-1").mkdir()  # a save that was killed
    run_export(run, tmp_path / "hf")
    run_import(tmp_path / "hf", tmp_path / "imported")
    row = np.arange(9)
    latest = ipt_jax.load(str(run)).logits(row)
    for path in (run / "checkpoints" / "10", tmp_path / "hf", tmp_path / "imported", tmp_path / "imported/checkpoint"):
        np.testing.assert_array_equal(ipt_jax.load(str(path)).logits(row), latest)
    assert (ipt_jax.load(str(run / "checkpoints" / "2")).logits(row) != latest).any()
    assert ipt_jax.load(str(run), dtype="bfloat16").params["norm"].dtype == jnp.bfloat16
    assert resolve_model(ModelSettings.model_validate({"from": str(tmp_path / "imported")})) == MISTRAL
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="model .*(neither|no such)"):
            ipt_jax.load(str(missing))


def test_a_model_in_several_files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 4000)
    run_import(exported, tmp_path / "imported")
    run_export(tmp_path / "imported", tmp_path / "parts")
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    whole: dict[str, Any] = {}
    for file in files:
        whole |= load_file(tmp_path / "parts" / file)
    original = load_file(exported / "model.safetensors")
    assert all(np.array_equal(whole[name], original[name]) for name in original) and whole.keys() == original.keys()
    row = np.arange(9)
    np.testing.assert_array_equal(
        ipt_jax.load(str(tmp_path / "parts")).logits(row), ipt_jax.load(str(exported)).logits(row)
    )
    (tmp_path / "parts" / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]}: no such file"):
        ipt_jax.load(str(tmp_path / "parts"))


def _missing(weights: dict[str, Any]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def _misshapen(weights: dict[str, Any]) -> None:
    weights["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 12), np.float32)


def _extra(weights: dict[str, Any]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)


def _quantized(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"] = np.zeros(16, np.int8)


DAMAGE = {
    _missing: r"tensor model.layers.1.mlp.up_proj.weight is missing",
    _misshapen: r"model.layers.0.self_attn.k_proj.weight has shape \[16, 12\], config.json asks for \[12, 16\]",
    _extra: r"model.layers.0.self_attn.q_proj.bias is not part of a mistral model",
    _quantized: r"tensor model.norm.weight is I8",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused_by_name(damage: Any, exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    damage(weights)
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(UserError, match=DAMAGE[damage]):
        run_import(exported, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_cut_file_is_refused(exported: Path, tmp_path: Path) -> None:
    whole = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="model.safetensors: not a complete safetensors file"):
        run_import(exported, tmp_path / "imported")


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", MISTRAL)

    def full_disk(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_write_json", full_disk)
        with pytest.raises(UserError, match="No space left"):
            run_export(run, tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
        with pytest.raises(UserError, match="needs 0.0 MB, the disk has 0.0 MB left"):
            run_export(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / ".hf.partial").mkdir()
    descriptor = lock_directory(tmp_path / ".hf.partial")
    with pytest.raises(UserError, match="another run is writing"):
        run_export(run, tmp_path / "hf")
    os.close(descriptor)
    run_export(run, tmp_path / "hf")
    run_export(run, tmp_path / "hf")  # an earlier export of the same model is replaced
    other = save_run(tmp_path / "other", LLAMA)
    with pytest.raises(UserError, match="is not an export of this model"):
        run_export(other, tmp_path / "hf")
    with pytest.raises(UserError, match="is not an export of this model"):
        run_export(run, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "other", "run"]


def test_tokenizer_files_travel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models

    run = save_run(tmp_path / "run", MISTRAL)
    run_export(run, tmp_path / "bare")
    assert "no tokenizer files" in capsys.readouterr().err
    (run / "tokenizer").mkdir()
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(run / "tokenizer" / "tokenizer.json"))
    run_export(run, tmp_path / "hf")
    run_import(tmp_path / "hf", tmp_path / "imported")
    run_export(tmp_path / "imported", tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (run / "tokenizer/tokenizer.json").read_bytes()
    assert ipt_jax.load(str(tmp_path / "imported")).tokenizer is not None
    assert "no tokenizer files" not in capsys.readouterr().err


@pytest.mark.parametrize("config", [MISTRAL, LLAMA], ids=["mistral", "llama"])
def test_config_translates_both_ways_and_dialects(config: ModelConfig) -> None:
    raw = config_to_hf(config, "bfloat16")
    assert ModelConfig(**config_from_hf(raw, "here")) == config
    five = {key: value for key, value in raw.items() if not key.startswith("rope_")}  # as transformers 5 spells it
    five["rope_parameters"] = {"rope_type": "default", **(raw["rope_scaling"] or {}), "rope_theta": raw["rope_theta"]}
    assert ModelConfig(**config_from_hf(five, "here")) == config


@pytest.mark.parametrize("config", [MISTRAL, LLAMA], ids=["mistral", "llama"])
def test_config_has_what_older_readers_ask_for(config: ModelConfig) -> None:
    """transformers 4.57 knows neither rope_parameters nor, before 4.56, dtype; all of this is read from the JSON."""
    raw = config_to_hf(config, "bfloat16")
    assert (raw["dtype"], raw["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert raw["rope_theta"] == config.rope_theta and "rope_parameters" not in raw
    assert raw["tie_word_embeddings"] is config.tie_embeddings and raw["head_dim"] == config.head_dim
    if config.rope_scaling is None:
        assert raw["rope_scaling"] is None and raw["sliding_window"] == 8
    else:
        assert raw["rope_scaling"] == {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }  # fmt: skip
        assert "sliding_window" not in raw


MEMORY = """
import resource, sys
from pathlib import Path
from ipt_jax.hf.convert import run_export
from ipt_jax.hf.convert import peak_rss_bytes, run_import
import jax, orbax.checkpoint, test_hf_roundtrip  # what is imported is not what is measured
folder = Path(sys.argv[1])
run_import(folder / "small", folder / "warm")
run_export(folder / "warm", folder / "warm_again")
before = peak_rss_bytes()
size = run_import(folder / "hf", folder / "imported")["bytes"]
middle = peak_rss_bytes()
run_export(folder / "imported", folder / "again")
print(size, middle - before, peak_rss_bytes() - before)
"""


def test_memory_is_that_of_some_tensors_not_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """216 MiB in twelve tensors of ours: both ways add less than half of them to a process (at 1.3B: benchmarks/)."""
    config = MISTRAL.model_copy(
        update={
            "hidden_size": 512, "q_heads": 8, "kv_heads": 8, "head_dim": 64, "intermediate_size": 512, "layers": 24,
            "vocab_size": 12_288,
        }
    )  # fmt: skip
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 40 * 2**20)
    for name, model in (("small", MISTRAL), ("hf", config)):
        draw = np.random.default_rng(0)
        planned = [
            safetensors_io.Planned(one, leaf.hf_shape, "float32") for leaf in leaves(model) for one in leaf.names
        ]
        (tmp_path / name).mkdir()
        safetensors_io.write_tensors(tmp_path / name, planned, (draw.random(one.shape, np.float32) for one in planned))
        (tmp_path / name / "config.json").write_text(json.dumps(config_to_hf(model, "float32")))
    # glibc keeps freed blocks of this size; those of a real model's size go back at once
    child = run_python(MEMORY, str(tmp_path), MALLOC_MMAP_THRESHOLD_=str(2**20))
    output, errors = child.communicate(timeout=280)
    assert child.returncode == 0, errors[-3000:]
    size, imported, exported = map(int, output.split())
    assert size > 200 * 2**20 and imported < size / 2 and exported < size / 2, output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is 'yarn'"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(LLAMA, "float32") | change))
    with pytest.raises(UserError, match=message):
        read_model_config(resolve_checkpoint(tmp_path))


def test_an_export_of_a_run_that_removes_its_checkpoint_takes_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", MISTRAL, steps=(2,))
    opened = convert.open_parameters

    def removed_meanwhile(source: Any, config: ModelConfig) -> Any:
        if source.weights.parent.name == "2":
            save_run(run, MISTRAL, steps=(4,))
            shutil.rmtree(source.weights.parent)
        return opened(source, config)

    monkeypatch.setattr(convert, "open_parameters", removed_meanwhile)
    run_export(run, tmp_path / "hf")
    assert "2 was removed by its run while it was read; retrying" in capsys.readouterr().err
    np.testing.assert_array_equal(ipt_jax.load(tmp_path / "hf").logits([1, 2]), ipt_jax.load(run).logits([1, 2]))


def test_an_export_converts_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", MISTRAL)
    assert 2 * run_export(run, tmp_path / "half", "bfloat16")["bytes"] == run_export(run, tmp_path / "hf")["bytes"]
    assert load_file(tmp_path / "half/model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert "ipt export: " in capsys.readouterr().err
    for dtype in ("float32", "bfloat16"):  # an export of the same model is replaced, whatever its dtype
        run_export(run, tmp_path / "half", dtype)
        assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == dtype
    with pytest.raises(UserError, match="dtype is 'int8'; expected float32 or bfloat16"):
        run_export(run, tmp_path / "hf", "int8")


def test_an_interrupted_import_leaves_nothing(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, save = [], convert._save

    def interrupted(*args: Any) -> None:
        saved.append(save(*args))
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_save", interrupted)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        run_import(exported, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    error = capsys.readouterr().err
    assert error.startswith("ipt import: ") and "stopped after" in error and "Traceback" not in error


def test_an_export_has_a_model_card(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", MISTRAL)
    (run / "run.json").write_text(json.dumps({"recipe": {"model": {"preset": "tiny", "from": None}}}))
    (run / "checkpoints/5/record").mkdir()
    (run / "checkpoints/5/record/record.json").write_text(json.dumps({"step": 5, "tokens": 12345}))
    run_export(run, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "- Base: new weights, tiny\n- Training: step 5, 12,345 tokens\n" in card
    assert 'tokenizer = AutoTokenizer.from_pretrained("hf")' in card and '"preset": "tiny"' in card
