"""Validation: the loss on documents that training leaves out, by kind, from a plan of its own.

The batches are micro-batches of the train step, on its mesh, with its parameters: there is no second copy. A document
has `answers` where its kind is not raw and not all of its tokens are targets, as `loss` of `ipt tokenize` sets: the
tokens that remain are the answers of pairs. `answer_loss` is the mean over them.

Guarantees: every planned token is counted once, and the counts are exact; any mesh and any number of hosts measures the
same loss up to rounding; training is the same bits with and without it; the measured documents depend on neither
`data.seed` nor the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ipt_jax.config import Recipe, ValidationSettings
from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import KINDS
from ipt_jax.data.block_table import SourceDocuments, open_documents
from ipt_jax.data.exclude_converted import ranges
from ipt_jax.data.held_out import refuse_shared
from ipt_jax.data.loader import batches
from ipt_jax.data.mixture import SourceMix
from ipt_jax.data.plan import Mix, Plan, Source
from ipt_jax.data.token_reader import FoundDocuments
from ipt_jax.data.token_shards import open_token_shards
from ipt_jax.model.decoder import Params, logical_axes
from ipt_jax.parallel.fsdp import OnDevice
from ipt_jax.parallel.mesh import batch_sharding, host_slot, place_batch
from ipt_jax.train.loss import Sums
from ipt_jax.train.run_info import report
from ipt_jax.train.step import Batch, Program, StepShape, abstract_batch, cast_matrices, loss_of

GROUPS = 1 + 2 * len(KINDS)  # no document; each kind; each kind, of documents with answers
IN_FLIGHT = 2  # batches that are started before the sums of an earlier one are fetched


class ValidationPlan(Plan):
    """One pass over held-out documents. `kinds` of documents with answers are higher by the number of kinds."""

    def _read(self, pieces: np.ndarray, by_block: bool) -> FoundDocuments:
        found = super()._read(pieces, by_block)
        with_answers = has_answers(found, pieces["document"]["tokens"].astype(np.int64))
        found.places["kind"] += np.where(with_answers, len(KINDS), 0).astype(np.uint32)
        return found


def has_answers(found: FoundDocuments, tokens: np.ndarray) -> np.ndarray:
    """Whether some, but not all of the `tokens` of each document after its first one are targets. Not raw ones."""
    places = found.places
    runs = found.runs[ranges(places["run"], places["run"] + places["runs"])].astype(np.int64)
    document = np.repeat(np.arange(len(places)), places["runs"])
    covered = np.bincount(document, runs[:, 1] - np.maximum(runs[:, 0], 1), minlength=len(places))
    some: np.ndarray = (places["kind"] > 1) & (covered > 0) & (covered < tokens - 1)
    return some


def build_validation_plan(recipe: Recipe, training: Plan, rows: int) -> ValidationPlan | None:
    """The plan of `recipe.validation` in batches of `rows`; None without one."""
    settings = recipe.validation
    if settings is None:
        return None
    sources = [
        dataclasses.replace(source, documents=source.held_out, held_out=None)
        for source in training.sources
        if source.held_out is not None and source.held_out.tokens
    ]
    sources += _own_sources(settings, training)
    if not sources and recipe.data.held_out_share:
        raise UserError(f"data.held_out_share {recipe.data.held_out_share:g} holds no document out; raise it")
    if not sources:
        raise UserError("validation has no documents; set data.held_out_share or validation.sources")
    amounts = [min(source.documents.tokens, settings.tokens or source.documents.tokens) for source in sources]
    fields = {"seed": 0, "tokens": None, "held_out_share": None, "sources": [source.settings for source in sources]}
    return ValidationPlan(Mix(recipe.data.model_copy(update=fields), sources, amounts), rows_per_step=rows)


def _own_sources(settings: ValidationSettings, training: Plan) -> list[Source]:
    """The sources of validation alone. Raises UserError where they share an id with training."""
    names = [*training.names, *(source.name for source in settings.sources)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"validation.sources: {twice!r} is also the name of another source; rename it")
    found = []
    for source in settings.sources:
        shards = open_token_shards(source.path, verify=False)
        if shards.manifest.identity["tokenizer"] != training.sources[0].manifest.identity["tokenizer"]:
            raise UserError(
                f"validation source {source.name!r} ({source.path}) was tokenized with another tokenizer than the "
                "sources of training; run ipt tokenize with the same one"
            )
        documents: SourceDocuments = open_documents(source.name, shards.path, shards.manifest, None)
        found.append(Source(SourceMix(name=source.name, path=source.path), shards.path, shards.manifest, documents))
    refuse_shared(
        {source.settings.name: (source.path, source.manifest) for source in found},
        {source.settings.name: (source.path, source.manifest) for source in training.sources},
    )
    return found


class Validation:
    """The compiled loss of a program on one plan. `recipe.validation` is set."""

    def __init__(self, settings: ValidationSettings, plan: ValidationPlan, program: Program):
        self._settings, self._plan, self._program = settings, plan, program
        started = time.monotonic()
        self._sums = compile_sums(program, plan)
        if jax.process_index() == 0:
            report(
                f"validation: every {settings.every_steps:,} steps, {plan.tokens:,} tokens of {', '.join(plan.names)} "
                f"in {plan.steps:,} batches; compiled in {time.monotonic() - started:.1f} s"
            )

    def due(self, step: int) -> bool:
        return step % self._settings.every_steps == 0

    def measure(self, params: Params) -> dict[str, Any]:
        """{loss, loss_by_kind, answer_loss, targets, targets_by_kind, answer_targets, seconds} of these parameters.

        A loss is None where it is not finite or nothing counts. Waits for `params` first, then for the result.
        """
        jax.block_until_ready(params)
        started = time.monotonic()
        host, hosts = host_slot(self._program.mesh)
        rows, sharding = self._plan.rows_per_step, batch_sharding(self._program.mesh)
        total, started_sums = np.zeros((2, GROUPS)), deque[Sums]()
        for batch in batches(self._plan, start_step=0, rows_per_step=rows, host=host, hosts=hosts):
            started_sums.append(self._sums(params, place_batch(batch, 1, sharding)))
            if len(started_sums) > IN_FLIGHT:
                total += _fetched(started_sums.popleft())
        for sums in started_sums:
            total += _fetched(sums)
        return losses(*total) | {"seconds": time.monotonic() - started}


def _fetched(sums: Sums) -> np.ndarray:
    found = jax.device_get(sums)
    return np.array([found["loss"], found["targets"]], np.float64)


def losses(loss: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """What `Validation.measure` returns, of sums [GROUPS]."""
    answers = slice(1 + len(KINDS), None)
    by_kind = {kind: [code, code + len(KINDS)] for code, kind in enumerate(KINDS, start=1)}
    by_kind = {kind: groups for kind, groups in by_kind.items() if targets[groups].sum()}

    def mean(groups: Any) -> float | None:
        count = float(targets[groups].sum())
        found = float(loss[groups].sum()) / count if count else math.nan
        return found if math.isfinite(found) else None

    return {
        "loss": mean(slice(None)),
        "loss_by_kind": {kind: mean(groups) for kind, groups in by_kind.items()},
        "answer_loss": mean(answers),
        "targets": int(targets.sum()),
        "targets_by_kind": {kind: int(targets[groups].sum()) for kind, groups in by_kind.items()},
        "answer_targets": int(targets[answers].sum()),
    }


def compile_sums(program: Program, plan: Plan) -> Any:
    """The compiled (parameters, batch [1, M, T]) -> sums [GROUPS] of the loss and the targets."""
    shape = dataclasses.replace(program.shape, accumulation=1, z_loss=0.0)
    function = functools.partial(_sums, program=program, shape=shape)
    params = jax.tree.map(
        lambda value, sharding: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding),
        program.state.params,
        program.shardings.params,
    )
    batch = abstract_batch(plan.settings.seq_len, plan.rows_per_step, 1, batch_sharding(program.mesh))
    everywhere = NamedSharding(program.mesh, PartitionSpec())
    return jax.jit(function, out_shardings=everywhere).lower(params, batch).compile()


def _sums(params: Params, batch: Batch, *, program: Program, shape: StepShape) -> Sums:
    config, mesh = program.model, program.mesh
    device = OnDevice(mesh, config.hidden_size)

    def of_device(params: Params, batch: Batch) -> dict[str, Array]:
        weights = cast_matrices(params, logical_axes(config), shape.compute_dtype) if shape.unroll else params
        rows = {name: rows[0] for name, rows in batch.items()}
        _, sums = loss_of(weights, rows, jnp.float32(1), config=config, shape=shape, device=device, groups=GROUPS)
        found: dict[str, Array] = device.add_up(sums)
        return found

    if not device.manual:
        return of_device(params, batch)
    specs = jax.tree.map(lambda sharding: device.spec(sharding.spec), program.shardings.params)
    rows = device.spec(batch_sharding(mesh).spec)
    on_mesh = jax.shard_map(
        of_device, mesh=mesh, axis_names=device.manual, check_vma=False,
        in_specs=(specs, rows), out_specs=PartitionSpec(),
    )  # fmt: skip
    return on_mesh(params, batch)
