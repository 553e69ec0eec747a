"""`ipt train`: from a recipe to a trained model, in order.

Guarantees: a run resumes by itself from its newest checkpoint that verifies, and steps k+1 … N after a kill give the
bits that an undisturbed run gives (same hardware); SIGTERM, SIGINT, SIGHUP and SIGUSR1 save and end the run when the
save is on disk, which `ipt train` reports as unfinished by exit code 143; weights that are not finite are never saved;
a run that finishes no step for `train.stall_minutes` ends; two processes never write into one run directory.
The host never waits for the step it has just started: metrics are fetched a logging interval later.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from ipt_jax.config import ProfileSettings, Recipe, check_schedule, last_step, rows_per_step
from ipt_jax.core.checkpoint_path import resolve_checkpoint
from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.files import lock_directory, writing
from ipt_jax.core.manifest import flatten
from ipt_jax.corpus.tokenizer import load_tokenizer
from ipt_jax.data.loader import batches
from ipt_jax.data.plan import Plan, open_mix
from ipt_jax.hf.config import read_model_config, resolve_model
from ipt_jax.hf.params import load_params
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import abstract_params
from ipt_jax.parallel.devices import training_devices
from ipt_jax.parallel.distributed import (
    enable_compile_cache,
    initialize_distributed,
    refuse_different_hosts,
    refuse_unshared,
)
from ipt_jax.parallel.mesh import batch_sharding, host_slot, make_mesh, place_batch
from ipt_jax.parallel.peers import watch_peers
from ipt_jax.train.bad_steps import all_finite, write_dump
from ipt_jax.train.checkpoint import CheckpointRecord, Checkpoints
from ipt_jax.train.metrics import Ledger, check_wandb, last_line
from ipt_jax.train.resume import Start, copy_metrics, find_start, set_aside, start_line
from ipt_jax.train.run_info import (
    SEGMENT,
    copy_tokenizer,
    describe,
    first_start,
    git_commit,
    report,
    report_start,
    versions,
    write_record,
)
from ipt_jax.train.segments import (
    Changes,
    accept_changes,
    change_lines,
    continue_run,
    extend_history,
    made_with,
    read_history,
)
from ipt_jax.train.state import TrainState, check_layout, fresh_state, state_from_params
from ipt_jax.train.step import Program, build_program, learning_rate, lower
from ipt_jax.train.validation import Validation, build_validation_plan

SAMPLE = "The quick brown fox jumps over 13 lazy dogs: naïve café, 東京!\n\tdef f(x): return x**2"
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # save, then exit


def run_train(recipe: Recipe, *, change: bool = False) -> dict[str, Any]:
    """Trains to the end of the plan or until a signal: {run_dir, step, steps (of the plan), tokens, loss}.

    `change`: settings that differ from those of the last checkpoint hold from its step on.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs with a traceback each error that it raises as well
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # so do its tasks, once for each array of a failed save
    with exit_on_signals():
        processes = initialize_distributed()
        enable_compile_cache()
        with watch_peers():
            return run(recipe, processes, change)


def run(recipe: Recipe, processes: str, change: bool) -> dict[str, Any]:
    """`run_train` of one process of several, of which `processes` says how they were found."""
    devices = training_devices(recipe.mesh.devices)  # before a plan that may take minutes
    run_dir = Path(recipe.run_dir)
    check_wandb(recipe.train.wandb)

    compared = flatten(recipe.model_dump(by_alias=True)) | versions()
    refuse_different_hosts(compared | {"git_commit": git_commit(), "--change": change})
    mix = open_mix(recipe.data)
    model = resolve_model(recipe.model, mix.vocab_size, *control_ids(mix.tokenizer_dir))
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor, devices)
    rows = rows_per_step(recipe)

    with claim(run_dir), contextlib.ExitStack() as stack:
        refuse_unshared(run_dir)
        start = find_start(recipe)
        found, changed = start.record, Changes()
        if found is not None:
            now, consent = made_with(recipe, model, mix.identity(rows)), change or start.branches
            changed = accept_changes(run_dir, found.step, found.made_with, now, recipe.data, consent=consent)
        plan = continue_run(mix, recipe, found.made_with, found.step) if found else Plan(mix, rows_per_step=rows)
        refuse_different_hosts({"plan fingerprint": plan.fingerprint})
        check_schedule(recipe, plan.steps)
        program = build_program(recipe, model, mesh, plan.steps)
        held_out = build_validation_plan(recipe, plan, program.rows // program.shape.accumulation)
        set_aside(start)
        steps = last_step(recipe, plan.steps)
        end = min(steps, recipe.train.stop_at_step or steps)
        if found is not None and found.step >= end:
            if start.branches:
                raise UserError(
                    f"train.branch_from is at step {found.step}, but this run ends at step {end}; raise data.tokens"
                )
            return result(recipe, end, found, last_line(run_dir))

        checkpoints = stack.enter_context(Checkpoints(run_dir, model, recipe.train))
        record = found or CheckpointRecord(0, 0, plan.fingerprint, {})
        record.plan_fingerprint, record.made_with = plan.fingerprint, made_with(recipe, model, plan.identity)
        if jax.process_index() == 0:
            begin(recipe, start, changed, plan, describe(recipe, plan, program, processes))
        step = compile_step(program, recipe.train.on_spike == "skip")
        if found is not None:
            state = checkpoints.restore(start.checkpoint, program.state, program.shardings)
        else:
            state = initial_state(recipe, plan, program)
        layout = check_layout(state, program.shardings)
        if jax.process_index() == 0:
            for line in layout:
                report(line)
        validation = Validation(recipe.validation, held_out, program) if recipe.validation and held_out else None
        with Ledger.open(run_dir, record, program, plan, recipe.train, steps) as ledger:
            train(recipe, plan, end, program, step, state, ledger, checkpoints, validation)
        return result(recipe, end, ledger.record, ledger.last)


def begin(recipe: Recipe, start: Start, changed: Changes, plan: Plan, described: dict[str, Any]) -> None:
    """What the first process prints and writes before the first step."""
    run_dir, step = Path(recipe.run_dir), start.record.step if start.record else 0
    entry = {"step": step, "tokens": start.record.tokens if start.record else 0, "changed": changed}
    entry |= {name: described[name] for name in SEGMENT}
    if start.branches:
        entry["branched_from"] = str(start.checkpoint)
    report(start_line(start, recipe))
    for line in change_lines(step, changed):
        report(line)
    if changed:
        rate = float(learning_rate(recipe.optimizer, step, plan.steps))
        report(f"step {step + 1} has learning rate {rate:.4g}; the run ends at step {last_step(recipe, plan.steps)}")
    report_start(described, run_dir, step, plan.steps)
    described["started_unix_seconds"] = first_start(start.run_dir)  # of a branch: that of its run, as metrics.jsonl
    write_record(run_dir, described | {"segments": extend_history(read_history(start.run_dir), entry)})
    copy_metrics(start, run_dir)
    copy_tokenizer(plan, run_dir)


def train(
    recipe: Recipe, plan: Plan, end: int, program: Program, step: Any, state: TrainState, ledger: Ledger,
    checkpoints: Checkpoints, validation: Validation | None,
) -> None:  # fmt: skip
    """The loop, from the ledger's step to step `end`."""
    done, settings = ledger.record.step, recipe.train
    host, hosts = host_slot(program.mesh)
    source = batches(plan, start_step=done, rows_per_step=program.rows, host=host, hosts=hosts)
    sharding = batch_sharding(program.mesh)
    with (
        stop_signal() as stop_asked, stall_limit(settings.stall_minutes) as alive,
        traced(step, settings.profile, Path(recipe.run_dir), done) as step,
    ):  # fmt: skip
        while done < end:
            with ledger.waiting_for_data():
                rows = next(source)
            if done + 1 in settings.skip_steps:
                rows["loss_mask"] = np.zeros_like(rows["loss_mask"])
            batch = place_batch(rows, program.shape.accumulation, sharding)
            done += 1
            state, metrics = step(state, batch, *ledger.loss_limit(done))
            ledger.add(done, metrics)
            stop = stop_asked(done)
            last = stop or done == end
            due = last or checkpoints.due(done)
            validated = validation is not None and not stop and (
                done == end or validation.due(done) or (due and settings.keep_best is not None)
            )  # fmt: skip
            if validation is not None and validated:
                ledger.validated(done, validation.measure(state.params))
            if due or validated or done % settings.log_every == 0:
                alive()
                ledger.settle(done if due or validated else done - 1)  # the devices are busy with step `done` meanwhile
                if len(ledger.bad) >= settings.max_bad_steps or (due and ledger.bad and not all_finite(state.params)):
                    raise bad_steps(Path(recipe.run_dir), ledger.bad, state, plan, program)
            if due:
                checkpoints.save(state, ledger.record, last=last)
            if last:
                checkpoints.finish()  # a further signal waits for it
            if stop:
                report(f"stopped by a signal: saved at step {done} of {end}; rerun the same command to resume")
                return


def bad_steps(run_dir: Path, steps: list[int], state: TrainState, plan: Plan, program: Program) -> Fault:
    """The error of a run whose last steps were not finite, after it wrote what is known of them."""
    write_dump(run_dir / "bad_steps.json", steps, state.params, plan, program)
    kept = "the weights are finite" if all_finite(state.params) else "the weights are not finite"
    return Fault(
        f"steps {steps[0]} to {steps[-1]}: loss or gradient is not finite, or a spike ({kept}); see "
        f"{run_dir / 'bad_steps.json'}; to train on from the last checkpoint, add steps to train.skip_steps or raise "
        "train.max_bad_steps"
    )


def result(recipe: Recipe, end: int, record: CheckpointRecord, last: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "run_dir": recipe.run_dir,
        "step": record.step,
        "steps": end,
        "tokens": record.tokens,
        "loss": last["loss"] if last else None,
    }


def control_ids(tokenizer_dir: Path) -> tuple[int | None, int | None]:
    """BOS and EOS of the sources' tokenizer."""
    if not tokenizer_dir.is_dir():
        return None, None
    tokenizer = load_tokenizer(tokenizer_dir)
    return tokenizer.bos_id, tokenizer.eos_id


def initial_state(recipe: Recipe, plan: Plan, program: Program) -> TrainState:
    """Step 0: fresh parameters, or those of `model.from`, each put into its shards as it is read."""
    if recipe.model.from_ is None:
        return fresh_state(program.model, program.optimizer, program.shardings, recipe.train.seed)
    source = resolve_checkpoint(recipe.model.from_)
    refuse_other_shapes(recipe.model.from_, read_model_config(source), program.model)
    if source.tokenizer is not None and plan.tokenizer_dir.is_dir():
        refuse_other_tokenizer(recipe.model.from_, source.tokenizer, plan.tokenizer_dir)

    def place(path: tuple[str, ...], value: np.ndarray) -> jax.Array:
        sharding: Any = functools.reduce(operator.getitem, path, program.shardings.params)
        return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])

    _, params = load_params(source, "float32", place, program.model.vocab_size)
    return state_from_params(params, program.optimizer, program.shardings)


def refuse_other_shapes(path: str, stored: ModelConfig, wanted: ModelConfig) -> None:
    """Raises UserError when the recipe overrides a field that the stored weights cannot follow."""
    for field, value in wanted.model_dump().items():
        if field == "vocab_size" and value > stored.vocab_size:
            continue  # `load_params` adds the rows
        if abstract_params(stored.model_copy(update={field: value})) != abstract_params(stored):
            raise UserError(
                f"model.{field} is {value}, but the weights of {path} have {getattr(stored, field)}; "
                f"remove model.{field}, or train from scratch with a preset"
            )


def refuse_other_tokenizer(path: str, of_model: Path, of_data: Path) -> None:
    """Raises UserError when the weights were trained with other ids than those of the data."""
    theirs, ours = (load_tokenizer(directory).encode(SAMPLE) for directory in (of_model, of_data))
    if theirs != ours:
        raise UserError(
            f"model.from {path}: its tokenizer differs from that of the data: {SAMPLE[:19]!r}… is {theirs[:5]}… "
            f"there and {ours[:5]}… in {of_data}; run ipt tokenize with the tokenizer in {of_model}"
        )


def compile_step(program: Program, skips_spikes: bool = False) -> Callable[..., Any]:
    """The compiled step, of which `skips_spikes` takes a limit of the loss. Prints the time and memory it takes."""
    started = time.monotonic()
    limit = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(program.mesh, PartitionSpec()))
    compiled = lower(program, *[limit] * skips_spikes).compile()
    memory = compiled.memory_analysis()
    needs = f", {memory.temp_size_in_bytes / 2**20:,.1f} MiB of temporaries a device" if memory else ""
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    report(f"step compiled in {time.monotonic() - started:.1f} s{needs}; compile cache in {cache}")
    return compiled


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Holds the run directory's lock (the first process for all of them) and reports a full disk as a UserError."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(run_dir) if jax.process_index() == 0 else None
    try:
        yield
    except (OSError, ValueError) as error:  # Orbax reports a failed write as ValueError
        if isinstance(error, UserError) or "No space left on device" not in str(error):
            raise
        raise UserError(
            f"run_dir {run_dir}: cannot be written (No space left on device); free space and rerun the same command "
            "to resume from the last checkpoint"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Until the loop starts, SIGHUP and SIGUSR1 end the process with a stopped run's exit code, as SIGTERM does."""

    def leave(number: int, frame: Any) -> None:
        os.write(2, f"ipt train: {signal.Signals(number).name}: stopped before the first step\n".encode())
        raise SystemExit(128 + signal.SIGTERM)

    main = threading.current_thread() is threading.main_thread()
    default = [one for one in (signal.SIGHUP, signal.SIGUSR1) if main and signal.getsignal(one) == signal.SIG_DFL]
    for number in default:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function that returns, at a step, whether to save and stop: after one of STOPS, on all hosts alike."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can listen for signals
        yield lambda step: False
        return
    several = jax.process_count() > 1  # then jax.distributed handles SIGTERM and agrees with the others on a step
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        again = asked.is_set()  # os.write: a print that this signal interrupts cannot be entered again
        os.write(2, f"ipt train: {name}{' again' if again else ''}: the run ends when its save is on disk\n".encode())
        asked.set()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    handled = [number for number in STOPS if not (several and number == signal.SIGTERM)]
    handled = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stall_limit(minutes: float | None) -> Iterator[Callable[[], None]]:
    """Ends the process with the stack traces of all threads when the function it yields is not called in time."""
    try:
        file = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # None, or not a file of the system, as in a notebook
        file = 2

    def restart() -> None:
        if minutes is not None:
            faulthandler.dump_traceback_later(60 * minutes, exit=True, file=file)

    restart()
    try:
        yield restart
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def traced(
    step: Callable[..., Any], window: ProfileSettings | None, run_dir: Path, done: int
) -> Iterator[Callable[..., Any]]:
    """Yields `step`, which writes an XPlane trace of the steps of `window` (the first process alone)."""
    if window is None or jax.process_index() != 0:
        yield step
        return
    number, tracing, directory = done, False, run_dir / "profile"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would slow the steps down

    def end() -> None:
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        report(f"trace of the steps from {window.start} to {number} in {directory}")

    def run(*arguments: Any) -> Any:
        nonlocal number, tracing
        number += 1
        if number == window.start:
            jax.profiler.start_trace(directory, profiler_options=options)
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step(*arguments)
        if tracing and number == window.start + window.steps - 1:
            jax.block_until_ready(result)
            end()
        return result

    try:
        yield run
    finally:
        if tracing:
            end()
