"""One train step: what it optimizes, whatever the micro-batches; what the arithmetic refuses; what is chosen."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trainkit import host, model_of, place, program_of, random_batch, recipe_of, start, worst

from ipt_jax.config import Recipe, accumulation_steps, rows_per_step
from ipt_jax.core.errors import UserError
from ipt_jax.model.decoder import Mistral
from ipt_jax.train.bad_steps import LossWindow
from ipt_jax.train.metrics import loss_metrics
from ipt_jax.train.step import gradients

ROWS, LENGTH = 16, 32
SGD = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "clip_norm": None}


def take_steps(recipe: Recipe, steps: int = 3) -> tuple[list[dict[str, Any]], Any]:
    """Metrics of some steps on different batches, and the parameters after them."""
    program = program_of(recipe, model_of())
    state, metrics = start(program), []
    for seed in range(steps):
        state, measured = program.step(state, place(program, random_batch(ROWS, LENGTH, 104, seed)))
        metrics.append(jax.device_get(measured))
    assert int(state.step) == steps
    return metrics, host(state.params)


def test_loss_is_the_mean_over_all_targets() -> None:
    recipe, model, batch = recipe_of(), model_of(), random_batch(ROWS, LENGTH, 104)
    program = program_of(recipe, model)
    state = start(program)
    logits = Mistral.from_params(model, state.params)(jnp.asarray(batch["tokens"]))
    losses = np.asarray(-jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0])
    before = jax.tree.leaves((state.params, state.optimizer))
    _, metrics = program.step(state, place(program, batch))
    assert all(leaf.is_deleted() for leaf in before), "the state is donated"
    measured = loss_metrics(jax.device_get(metrics))
    np.testing.assert_allclose(measured["loss"], losses[batch["loss_mask"]].mean(), rtol=1e-5)
    for code, kind in enumerate(("raw", "augmented", "task", "instruction"), start=1):
        counted = losses[batch["loss_mask"] & (batch["kinds"] == code)]
        np.testing.assert_allclose(measured["loss_by_kind"][kind], counted.mean(), rtol=1e-5)
    assert metrics["tokens"] == (batch["segment_ids"] > 0).sum()
    assert metrics["pairs"] == ((batch["segment_ids"] > 0) * np.arange(1, LENGTH + 1)).sum()


def test_accumulation_changes_nothing() -> None:
    """Targets are spread unevenly over the micro-batches: a mean of means would differ."""
    runs = [take_steps(recipe_of(optimizer=SGD, train={"microbatch": rows})) for rows in (16, 8, 4)]
    for metrics, params in runs[1:]:
        assert worst(params, runs[0][1]) < 1e-5
        for one, other in zip(metrics, runs[0][0], strict=True):
            assert worst(one, other) < 1e-5


def test_chunks_and_remat_change_nothing() -> None:
    variants = [{"loss_chunk": 10**6}, {"loss_chunk": 16}, {"loss_chunk": 64, "remat": "full"}, {"remat": "dots"}]
    runs = [take_steps(recipe_of(optimizer=SGD, train=train)) for train in variants]
    for metrics, params in runs[1:]:
        assert worst(metrics, runs[0][0]) < 1e-5 and worst(params, runs[0][1]) < 1e-5


def test_bfloat16_compute_keeps_float32_parameters() -> None:
    program = program_of(recipe_of(train={"compute_dtype": "bfloat16"}), model_of())
    state, metrics = program.step(start(program), place(program, random_batch(ROWS, LENGTH, 104)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    exact = program_of(recipe_of(), model_of())
    _, wanted = exact.step(start(exact), place(exact, random_batch(ROWS, LENGTH, 104)))
    assert 0 < worst(metrics, wanted) < 0.05


def test_block_keeps_documents_apart() -> None:
    """Other tokens in a row's second document leave the first one's loss alone under block, not under allow."""
    batch = random_batch(ROWS, LENGTH, 104)
    batch["kinds"] = np.where(batch["segment_ids"] == 1, 1, 2).astype(np.int32)
    batch["segment_ids"] = np.where(np.arange(LENGTH) < 20, 2, 1).astype(np.int32) * np.ones((ROWS, 1), np.int32)
    batch["kinds"] = batch["segment_ids"]  # the later document is of kind 1
    changed = batch | {"tokens": np.where(batch["kinds"] == 2, 5, batch["tokens"])}
    for rule, same in (("block", True), ("allow", False)):
        program = program_of(recipe_of(data={"cross_document": rule}), model_of())
        losses = [program.step(start(program), place(program, b))[1]["loss_sums"][1] for b in (batch, changed)]
        assert (float(losses[0]) == float(losses[1])) == same


def test_tied_embeddings_learn() -> None:
    program = program_of(recipe_of(), model_of(tie_embeddings=True))
    state, batch = start(program), place(program, random_batch(ROWS, LENGTH, 104))
    losses = []
    for _ in range(30):
        state, metrics = program.step(state, batch)
        losses.append(loss_metrics(jax.device_get(metrics))["loss"])
    assert losses[-1] < 0.6 * losses[0]


# ---- arithmetic and choices


@pytest.mark.parametrize(
    ("train", "shards", "steps"),
    [({}, 1, 1), ({}, 8, 1), ({"microbatch": 4}, 1, 4), ({"microbatch": 2}, 4, 2), ({"microbatch": 16}, 1, 1)],
)
def test_accumulation_steps(train: dict[str, int], shards: int, steps: int) -> None:
    recipe = recipe_of(train=train)
    assert (rows_per_step(recipe), accumulation_steps(recipe, shards)) == (16, steps)


@pytest.mark.parametrize(
    ("train", "shards", "fits"),
    [
        ({"batch_tokens": 500}, 1, 512),
        ({"batch_tokens": 10}, 1, 32),
        ({"microbatch": 3}, 1, 480),
        ({"microbatch": 32}, 1, 1024),
        ({}, 5, 480),
        ({}, 32, 1024),
    ],
)
def test_a_batch_that_does_not_divide_names_one_that_does(train: dict[str, int], shards: int, fits: int) -> None:
    other = "(, or train.microbatch to a divisor of 16)?"
    with pytest.raises(UserError, match=f"set train.batch_tokens to {fits}{other}$"):
        accumulation_steps(recipe_of(train=train), shards)
    if "microbatch" in train:
        accumulation_steps(recipe_of(train=train | {"batch_tokens": fits}), shards)


def test_choices_are_told() -> None:
    choices = program_of(recipe_of(), model_of()).choices
    assert choices["attention"] == "xla" and "cpu" in choices["attention_reason"]
    assert (choices["compute_dtype"], choices["fallbacks"], choices["mesh"]["fsdp"]) == ("float32", [], 1)
    assert choices["state_bytes_per_device"] == 3 * 4 * choices["parameters"] + 2 * 4  # moments; two counters
    with pytest.raises(UserError, match="train.attention is cudnn, which cannot run here"):
        program_of(recipe_of(train={"attention": "cudnn"}), model_of())


def test_strict_refuses_what_could_not_be_split() -> None:
    mesh = {"fsdp": 2, "tensor": 4}
    fallbacks = program_of(recipe_of(mesh=mesh), model_of(), 8).choices["fallbacks"]
    assert "layers.key: kv_heads 2 does not divide over tensor, not split" in fallbacks
    with pytest.raises(UserError, match="train.strict: layers.key: kv_heads 2"):
        program_of(recipe_of(mesh=mesh, train={"strict": True}), model_of(), 8)


# ---- measures


def test_a_step_without_targets_or_with_nan_changes_the_count_alone() -> None:
    model = model_of()
    program = program_of(recipe_of(), model)
    batch = random_batch(16, 32, model.vocab_size)
    poisoned = dataclasses.replace(start(program), params=jax.tree.map(lambda w: w * jnp.nan, start(program).params))
    empty = batch | {"loss_mask": np.zeros_like(batch["loss_mask"])}
    for state, rows, loss in ((start(program), empty, None), (poisoned, batch, None)):
        before = jax.device_get((state.params, state.optimizer))
        after, metrics = program.step(state, place(program, rows))
        assert int(after.step) == 1 and not metrics["applied"]
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((after.params, after.optimizer)), before)
        assert loss_metrics(jax.device_get(metrics))["loss"] is loss
    assert program.step(start(program), place(program, batch))[1]["applied"]


def test_a_spike_is_reported_where_it_begins_and_ends() -> None:
    window = LossWindow()
    losses = [7.0 + 0.1 * (step % 5) for step in range(64)] + [247.0, 180.0] + [7.1] * 10
    said = {step: line for step, loss in enumerate(losses, 1) if (line := window.add(step, loss))}
    assert said == {
        65: "warning: step 65: loss 247.000, median of the last 64 steps 7.200",
        67: "step 67: loss 7.100 is back near the median after 2 steps of up to 247.000",
    }


def test_a_spike_in_the_first_steps_is_reported() -> None:
    window = LossWindow()
    assert [window.add(step, loss) for step, loss in enumerate([7.7, 7.9, 7.6, 7.8], 1)] == [None] * 4
    assert window.add(5, 247.0) == "warning: step 5: loss 247.000, median of the last 4 steps 7.750"


def test_a_slow_divergence_is_reported_once() -> None:
    window = LossWindow()
    losses = [5.0 - 0.01 * step for step in range(150)] + [3.5 + 0.02 * step for step in range(300)]
    said = [line for step, loss in enumerate(losses, 1) if (line := window.add(step, loss))]
    assert len(said) == 1
    assert re.fullmatch(
        r"warning: step \d+: the loss diverges: median of the last 128 steps 4\.\d+, the lowest was 3\.\d+", said[0]
    )


def test_a_step_above_the_limit_of_the_loss_changes_nothing() -> None:
    program = program_of(recipe_of(train={"batch_tokens": 16 * 32}), model_of())
    batch = place(program, random_batch(16, 32, 104))
    loss = loss_metrics(jax.device_get(program.step(start(program), batch)[1]))["loss"]
    assert program.step(start(program), batch, np.float32(loss * 1.01))[1]["applied"]
    after, metrics = program.step(start(program), batch, np.float32(loss * 0.99))
    assert not metrics["applied"] and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, start(program).params)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("remat", ["none", ("query", "gate")])
def test_layers_written_out_give_the_gradients_of_the_scan(remat: str | tuple[str, ...], devices: int) -> None:
    """Ten layers, which a CPU scans; on GPUs they are written out and their weights are cast once a step."""
    model = model_of(layers=10)
    program = program_of(recipe_of(train={"batch_tokens": 16 * 32, "remat": remat}), model, devices)
    assert not program.shape.unroll
    state, batch = start(program), place(program, random_batch(16, 32, model.vocab_size))
    both = [
        jax.jit(
            functools.partial(
                gradients, config=model, shape=dataclasses.replace(program.shape, unroll=unroll), mesh=program.mesh,
                shardings=program.shardings.params,
            )
        )(state.params, batch)
        for unroll in (False, True)
    ]  # fmt: skip
    (grads, sums), (written_out, written_sums) = both
    np.testing.assert_allclose(sums["loss"], written_sums["loss"], rtol=1e-6)
    assert worst(written_out, grads) < 1e-5
