"""Held-out documents: which they are, that training never sees them, and that measuring them changes nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from token_shards import random_documents, write_tokens
from trainkit import build, model_of, recipe_of, start, train_processes

from ipt_jax.config import Recipe, ValidationSettings
from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Parent
from ipt_jax.data.block_table import SourceDocuments
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan, plan_summary_table
from ipt_jax.data.token_index import id_key, read_index
from ipt_jax.model.decoder import Mistral
from ipt_jax.train.metrics import best_of, held_out_words, measures, read_lines
from ipt_jax.train.trainer import run_train
from ipt_jax.train.validation import Validation, build_validation_plan

CHILD = "from ipt_jax.cli import main; main()"


def write_mix(folder: Path) -> None:
    """240 raw documents; 40 augmented ones made of three of the first 120 each; 30 tasks whose second half is loss."""
    raw = random_documents([15 + i % 30 for i in range(240)])
    write_tokens(folder / "raw", raw, shards=3)
    parents = [[Parent(f"raw-{3 * i + j}", 0, 9999) for j in range(3)] for i in range(40)]
    write_tokens(folder / "augmented", random_documents([60] * 40, 1), kind="augmented", parents=parents, shards=2)
    write_tokens(folder / "task", random_documents([30] * 30, 2), kind="task", loss_runs=[[(15, 30)]] * 30)


def mixed(folder: Path, **blocks: Any) -> Recipe:
    """A recipe over `write_mix`, a fifth of whose documents are held out."""
    sources = [{"name": name, "path": str(folder / name), "epochs": 1} for name in ("raw", "augmented", "task")]
    data = {"sources": sources, "held_out_share": 0.2} | blocks.pop("data", {})
    return recipe_of(folder, data=data, **blocks).model_copy(update={"validation": ValidationSettings(every_steps=4)})


def keys_of(documents: SourceDocuments) -> set[int]:
    return set(documents.of_blocks(np.arange(len(documents.table.tokens)))["id"].tolist())


def test_no_document_is_in_both_nor_any_copy_of_one(tmp_path: Path) -> None:
    write_mix(tmp_path)
    plan = build_plan(mixed(tmp_path).data, rows_per_step=4)
    trained = [keys_of(source.documents) for source in plan.sources]
    held_out = [keys_of(source.held_out) for source in plan.sources if source.held_out]
    raw, augmented = ({id_key(f"{kind}-{i}"): i for i in range(240)} for kind in ("raw", "augmented"))
    assert not set.union(*trained) & set.union(*held_out)
    assert len(trained[0]) + len(held_out[0]) == 240
    texts = {3 * augmented[key] + j for key in held_out[1] for j in range(3)}
    assert {raw[key] for key in held_out[0] if raw[key] < 120} == texts, "the texts of held-out copies, no others"
    for key in trained[1]:
        assert not {3 * augmented[key] + j for j in range(3)} & {raw[one] for one in held_out[0]}
    for held, all_of_them in zip(held_out, (240, 40, 30), strict=True):
        assert 0.1 * all_of_them < len(held) < 0.3 * all_of_them


def test_a_copy_of_a_held_out_text_is_not_used(tmp_path: Path) -> None:
    """The text 0 is in every augmented document: none but held-out ones may be used."""
    write_tokens(tmp_path / "raw", random_documents([20] * 60))
    parents = [[Parent("raw-0", 0, 5), Parent(f"raw-{i}", 0, 5)] for i in range(1, 41)]
    write_tokens(tmp_path / "augmented", random_documents([30] * 40, 1), kind="augmented", parents=parents)
    with pytest.raises(UserError, match="source 'augmented': no token is left"):
        build_plan(
            DataSettings.model_validate({"seq_len": 32, "held_out_share": 0.2, "sources": [
                {"name": name, "path": str(tmp_path / name), "epochs": 1} for name in ("raw", "augmented")
            ]}), rows_per_step=4,
        )  # fmt: skip


def test_converted_spans_and_held_out_documents_leave_together(tmp_path: Path) -> None:
    write_mix(tmp_path)
    raw = {"name": "raw", "path": str(tmp_path / "raw"), "epochs": 1, "exclude_converted": "augmented"}
    augmented = {"name": "augmented", "path": str(tmp_path / "augmented"), "epochs": 1}
    plan = build_plan(mixed(tmp_path, data={"sources": [raw, augmented]}).data, rows_per_step=4)
    of_raw = plan.summary()["sources"][0]
    assert (of_raw["converted_documents"], of_raw["copies_of_held_out"]) == (120, 0)
    assert of_raw["available_documents"] + of_raw["held_out_documents"] == 120, "the other half was converted"


def test_the_plan_says_what_is_held_out(tmp_path: Path) -> None:
    write_mix(tmp_path)
    plan = build_plan(mixed(tmp_path).data, rows_per_step=4)
    summary = plan.summary()
    task = summary["sources"][2]
    assert task["held_out_documents"] + task["documents"] == 30
    assert task["held_out_tokens"] == 30 * task["held_out_documents"]
    assert f"task: {task['held_out_documents']} documents with" in str(plan_summary_table(summary).caption)
    other = build_plan(mixed(tmp_path, data={"held_out_share": 0.3}).data, rows_per_step=4)
    assert other.fingerprint != plan.fingerprint
    assert keys_of(other.sources[2].held_out) > keys_of(plan.sources[2].held_out)  # type: ignore[arg-type]


def test_validation_refuses_ids_of_training(tmp_path: Path) -> None:
    write_mix(tmp_path)
    write_tokens(tmp_path / "clean", random_documents([20] * 5, 7), ids=[f"new-{i}" for i in range(5)])
    write_tokens(tmp_path / "same", random_documents([20] * 5, 8), ids=[f"new-{i}" for i in range(4)] + ["raw-7"])
    copied = [[Parent("raw-3", 0, 5)]]
    write_tokens(tmp_path / "copy", random_documents([20], 9), kind="augmented", ids=["x"], parents=copied)

    def plan_of(name: str) -> Plan | None:
        validation = {"sources": [{"name": name, "path": str(tmp_path / name)}]}
        recipe = recipe_of(tmp_path).model_dump(by_alias=True) | {"validation": validation}
        return build_validation_plan(recipe := Recipe.model_validate(recipe), training(recipe), 4)

    def training(recipe: Recipe) -> Plan:
        return build_plan(recipe.data, rows_per_step=4)

    found = plan_of("clean")
    assert found is not None and found.tokens == 100
    with pytest.raises(UserError, match="validation source 'same': 1 ids of training source 'raw'"):
        plan_of("same")
    with pytest.raises(UserError, match="validation source 'copy': 1 ids of training source 'raw'"):
        plan_of("copy")
    with pytest.raises(UserError, match="'raw' is also the name of another source"):
        plan_of("raw")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"held_out_share": None}, "set data.held_out_share"), ({"held_out_share": 1e-9}, "holds no document out")],
)
def test_validation_needs_documents(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_mix(tmp_path)
    recipe = mixed(tmp_path, data=fields)
    with pytest.raises(UserError, match=message):
        build_validation_plan(recipe, build_plan(recipe.data, rows_per_step=16), 16)


def by_hand(recipe: Recipe, plan: Plan, params: Any) -> dict[str, float]:
    """Losses from complete logits, document by document of the index, on one device."""
    sums: dict[str, list[float]] = {}
    batch = plan.batch(range(plan.rows))
    model = Mistral.from_params(model_of(tie_embeddings=True), params)
    logits = np.asarray(model(batch["tokens"]), np.float64)
    log_normal = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    loss = log_normal - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    for name, code in (("raw", 1), ("augmented", 2), ("task", 7)):
        sums[name] = loss[batch["loss_mask"] & (batch["kinds"] == code)].tolist()
    return {name: float(np.mean(values)) for name, values in sums.items()} | {
        "loss": float(np.mean(sum(sums.values(), [])))
    }


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1}])
def test_any_mesh_measures_the_loss_of_every_held_out_token(tmp_path: Path, mesh: dict[str, int]) -> None:
    write_mix(tmp_path)
    recipe = mixed(tmp_path, mesh=mesh)
    devices = int(np.prod(list(mesh.values())))
    program = build(recipe, model_of(tie_embeddings=True), devices)
    training = build_plan(recipe.data, rows_per_step=16)
    plan = build_validation_plan(recipe, training, 16)
    assert plan is not None and recipe.validation is not None
    state = start(program)
    found = Validation(recipe.validation, plan, program).measure(state.params)
    held = {source.settings.name: source.held_out for source in training.sources}
    raw, augmented, task = (held[name] for name in ("raw", "augmented", "task"))
    assert raw and augmented and task
    assert found["targets_by_kind"] == {
        "raw": raw.tokens - raw.documents, "augmented": augmented.tokens - augmented.documents,
        "task": 15 * task.documents,
    }  # fmt: skip
    assert found["answer_targets"] == 15 * task.documents, "tokens 15 to 29 of each task"
    assert found["targets"] == sum(found["targets_by_kind"].values())
    expected = by_hand(recipe, plan, jax.device_get(state.params))
    assert found["loss"] == pytest.approx(expected.pop("loss"), rel=2e-6)
    assert found["answer_loss"] == found["loss_by_kind"]["task"]
    assert found["loss_by_kind"] == pytest.approx(expected, rel=2e-6)


def test_training_is_the_same_bits_with_and_without_validation(tmp_path: Path) -> None:
    """Also where the validated run stops and resumes; its last step and each fourth one are validated."""
    write_mix(tmp_path)
    recipe = mixed(tmp_path, mesh={"fsdp": 8}, train={"checkpoint_every": 5})
    plain = recipe.model_copy(update={"validation": None, "run_dir": str(tmp_path / "plain")})
    steps = run_train(plain)["step"]
    half = recipe.model_copy(update={"train": recipe.train.model_copy(update={"stop_at_step": 7})})
    assert run_train(half)["step"] == 7
    assert run_train(recipe)["step"] == steps
    lines, others = (read_lines(Path(one.run_dir) / "metrics.jsonl")[0] for one in (recipe, plain))
    validated = [line["step"] for line in lines if "validation" in line]
    assert validated == sorted({4, 7, *range(8, steps, 4), steps})
    trained = {line["step"]: (line["loss"], line["grad_norm"], line["tokens"]) for line in lines}
    assert len(others) > 5
    for line in others:
        assert trained[line["step"]] == (line["loss"], line["grad_norm"], line["tokens"])
    record = json.loads((tmp_path / "run" / "checkpoints" / str(steps) / "record" / "record.json").read_bytes())
    last = lines[-1]["validation"]
    assert record["measures"] == {"loss": last["loss"], "answers": last["answer_loss"], **last["loss_by_kind"]}
    started = json.loads((tmp_path / "run" / "run.json").read_bytes())["started_unix_seconds"]
    for before, line in pairwise(lines):
        assert before["train_seconds"] <= line["train_seconds"]
        assert line["goodput"] == pytest.approx(line["train_seconds"] / (line["unix_seconds"] - started))
        assert 0 < line["goodput"] < 1, "compilation is in the time since the start"
        assert line["peak_memory_bytes"] is None, "CPUs do not say"
    best = min(found for line in lines if (found := best_of(line)))
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["best"] == {
        "step": best[1], "held_out_loss": best[0],
    }  # fmt: skip


def test_several_hosts_measure_the_same(tmp_path: Path) -> None:
    write_mix(tmp_path)
    found = []
    for devices in ([4], [2, 2]):
        recipe = mixed(tmp_path, train={"stop_at_step": 2, "checkpoint_every": None, "checkpoint_minutes": 60.0})
        named = recipe.model_dump(by_alias=True, exclude_unset=True) | {"run_dir": str(tmp_path / f"run{len(devices)}")}
        path = tmp_path / f"{len(devices)}.yaml"
        path.write_text(json.dumps(named))
        errors = train_processes(CHILD, ("train", str(path)), devices)
        assert "step 2: held-out loss" in errors[0]
        found.append(read_lines(Path(named["run_dir"]) / "metrics.jsonl")[0][-1]["validation"])
    one, two = found
    assert one["targets_by_kind"] == two["targets_by_kind"]
    assert measures(one) == pytest.approx(measures(two), rel=1e-6)


def test_the_best_checkpoint_is_kept_by_a_validated_measure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each checkpoint is validated, though no step is a multiple of `every_steps`."""
    write_mix(tmp_path)
    recipe = mixed(tmp_path, mesh={"fsdp": 8}, train={"checkpoint_every": 3, "keep_checkpoints": 1, "keep_best": "raw"})
    assert recipe.validation is not None
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"every_steps": 1000})})
    steps = run_train(recipe)["step"]
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl")[0] if "validation" in line]
    assert [line["step"] for line in lines] == [*range(3, steps, 3), steps]
    assert "has no measure" not in capfd.readouterr().err
    best = min(lines, key=lambda line: line["validation"]["loss_by_kind"]["raw"])["step"]
    assert {int(one.name) for one in (tmp_path / "run" / "checkpoints").iterdir()} == {best, steps}


def test_a_loss_that_is_not_finite_is_said() -> None:
    measured = {"loss": None, "answer_loss": None, "loss_by_kind": {"raw": None}, "seconds": 0.25}
    assert held_out_words(measured) == "loss is not finite () in 0.2 s"
    assert measures(measured) == {}


def test_index_and_plan_agree_on_the_ids(tmp_path: Path) -> None:
    """Every document is trained on, held out, or counted as a copy."""
    write_mix(tmp_path)
    plan = build_plan(mixed(tmp_path).data, rows_per_step=4)
    for source in plan.sources:
        total = sum(len(index) for index in read_index(source.path, source.manifest))
        assert source.held_out is not None
        neither = source.documents.table.remains.counts[3]
        assert source.documents.documents + source.held_out.documents + neither == total
