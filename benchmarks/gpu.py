"""Measure one GPU: attention numerics, train-step speed, rivals, synthesis and a roofline by part of the step.

    python benchmarks/gpu.py                                   # all parts, at most 8 minutes
    python benchmarks/gpu.py --parts speed,rivals --minutes 5  # some parts; what does not fit the time is dropped
    python benchmarks/gpu.py --tiny                            # every part at toy size on a CPU, at most 2 minutes

Prints one table and writes all figures to a JSON file after every measurement, so a killed run keeps what it has. Each
measurement is a child process: a crash or a full memory costs one row. Our step is the one that `ipt train` runs, with
bfloat16 compute, float32 parameters and float32 moments, on rows of 2,048 random tokens; the loader is not included.
MFU is model FLOPs (recomputation not counted) over the data sheet's dense bfloat16 peak.

The machine needs JAX with its GPU, flax, optax, orbax-checkpoint and, for two rivals, torch and transformers. If one of
the packages in WHEELS is absent, the script names it and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Pure or small wheels that a machine with JAX usually lacks: 17 MB in all.
WHEELS = {
    "grain": "grain", "array_record": "array-record", "msgspec": "msgspec", "pydantic": "pydantic",
    "pydantic_core": "pydantic-core", "annotated_types": "annotated-types", "typing_inspection": "typing-inspection",
    "rich": "rich", "zstandard": "zstandard", "py3langid": "py3langid", "tensorboardX": "tensorboardX",
}  # fmt: skip
PARTS = ("numbers", "speed", "rivals", "synthesis", "roofline")
LENGTH = 2048  # tokens a row
WARM_UP, STEPS, CHUNK = 5, 20, 5  # steps before the clock starts, timed steps, steps between two looks at the clock
ADAMW = {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One train step to measure."""

    size: str
    rows: int  # of the batch, on an 80 GB device
    remat: str | tuple[str, ...]

    @property
    def label(self) -> str:
        remat = self.remat if isinstance(self.remat, str) else "+".join(self.remat)
        return f"{self.size}, {self.rows} rows, remat {remat}"


SAVED = ("query", "key", "value", "output")
FRONTIER = [  # a size's first case is the one that the roofline and the rivals are held against
    Case("1.3b", 16, "none"), Case("1.3b", 24, "none"), Case("1.3b", 8, "none"), Case("1.3b", 32, SAVED),
    Case("1.3b", 32, "full"), Case("500m", 32, "none"), Case("500m", 16, "none"), Case("500m", 64, "full"),
    Case("tiny", 4, "none"), Case("tiny", 8, "full"),
]  # fmt: skip
TINY = dict(vocab_size=512, hidden_size=64, layers=2, q_heads=4, kv_heads=2, head_dim=16, intermediate_size=128)
SYNTHESIZER = dict(  # the shape of TinyLlama-1.1B
    vocab_size=32_000, hidden_size=2048, layers=22, q_heads=32, kv_heads=4, head_dim=64, intermediate_size=5632,
    eos_id=None,
)  # fmt: skip


# ---- the parent: children in order of what matters most, within the time


@dataclass(frozen=True)
class Unit:
    """A child process and the seconds it takes on an H100."""

    part: str
    argument: str
    seconds: float


def units(parts: list[str], tiny: bool) -> list[Unit]:
    """The children of a run, the most wanted first."""
    if tiny:
        every = [
            Unit("numbers", "", 1), Unit("speed", "tiny", 1), Unit("roofline", "tiny", 1), Unit("synthesis", "", 1),
            *(Unit("rivals", f"{name} tiny", 1) for name in RIVALS),
        ]  # fmt: skip
    else:
        every = [
            Unit("speed", "1.3b", 120), Unit("rivals", "torch-compile 1.3b", 70), Unit("roofline", "1.3b", 45),
            Unit("numbers", "", 60), Unit("synthesis", "", 60), Unit("speed", "500m", 70),
            Unit("rivals", "torch-compile 500m", 50), Unit("rivals", "torch-eager 1.3b", 40),
            Unit("rivals", "naive 1.3b", 35), Unit("rivals", "torch-eager 500m", 30), Unit("rivals", "naive 500m", 30),
        ]  # fmt: skip
    return [Unit("ceilings", "", 10), *(unit for unit in every if unit.part in parts)]


def run_units(todo: list[Unit], deadline: float, work: Path, tiny: bool, save: Callable[[list[Row]], None]) -> None:
    """Runs one child after the other; `save` gets all rows so far after every row."""
    rows: list[Row] = []
    for unit in todo:
        left = deadline - time.monotonic()
        if unit.seconds > left:
            rows.append({"part": unit.part, "case": unit.argument, "note": f"dropped: {left:.0f} s left"})
            save(rows)
            continue
        begun = time.monotonic()
        ceilings = next((row for row in rows if row["part"] == "ceilings"), {})
        for row in child_rows(unit, left, work, tiny, ceilings):
            rows.append(row)
            save(rows)
        print(f"gpu: {unit.part} {unit.argument} took {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def child_rows(unit: Unit, limit: float, work: Path, tiny: bool, ceilings: Row) -> Iterator[Row]:
    """The rows that a child prints; one row that says so if it fails or outlasts the time."""
    command = [sys.executable, __file__, "--child", unit.part, "--argument", unit.argument, "--work", str(work)]
    command += ["--ceilings", json.dumps(ceilings), *(["--tiny"] if tiny else [])]
    log = work / f"{unit.part}-{unit.argument.replace(' ', '-') or 'all'}.log"
    with log.open("w") as errors:
        env = environment(work, tiny)
        if unit.part == "numbers":  # which kernel is fastest is of no interest, and finding out takes a minute
            env["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"
        child = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=errors)
        timer = threading.Timer(limit, child.kill)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield {"part": unit.part, **json.loads(line)}
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()
    if code:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        reason = "out of time" if code == -9 else f"exit {code}: {tail[0][:200]}"
        yield {"part": unit.part, "case": unit.argument, "note": f"failed, {reason}"}


def environment(work: Path, tiny: bool) -> dict[str, str]:
    """What `launch/pretrain.sh` sets, and one compilation cache for all children."""
    env = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "JAX_PLATFORMS": "cuda",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    } | dict(os.environ)
    return env | ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""} if tiny else {})


# ---- ceilings: what this device reaches


def ceilings(context: Context) -> Iterator[Row]:
    """Measured peak of a bfloat16 product and measured bandwidth of a copy."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    size = 512 if context.tiny else 8192
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    long = jax.random.normal(jax.random.key(2), (2**20 if context.tiny else 2**29,), jnp.float32)
    flops = 2 * size**3 / seconds_of(jax.jit(lambda a, b: a @ b), left, right)
    bandwidth = 2 * long.nbytes / seconds_of(jax.jit(lambda x: x + 1), long)
    stats = device.memory_stats() or {}
    yield {
        "case": device.device_kind,
        "flops": flops,
        "bandwidth": bandwidth,
        "memory_bytes": stats.get("bytes_limit", 16 * 2**30),
        "note": f"{flops / 1e12:.3g} TFLOP/s ({size} squared), {bandwidth / 1e9:,.0f} GB/s",
    }


def seconds_of(function: Callable[..., Any], *arguments: Any, repeats: int = 20) -> float:
    """Seconds a call, the least of three means over `repeats` calls."""
    import jax

    jax.block_until_ready(function(*arguments))
    means = []
    for _ in range(3):
        begun = time.perf_counter()
        out = [function(*arguments) for _ in range(repeats)][-1]
        jax.block_until_ready(out)
        means.append((time.perf_counter() - begun) / repeats)
    return min(means)


# ---- numbers: fused attention against XLA's, both against float32


@dataclass(frozen=True)
class Numbers:
    """One shape of attention."""

    name: str
    T: int
    N: int = 8
    K: int = 8
    H: int = 64
    window: int | None = None
    block: bool = False


NUMBERS = [
    Numbers("causal", 1024), Numbers("causal, heads of 128", 1024, H=128), Numbers("causal, 1000 tokens", 1000),
    Numbers("GQA 8/2", 1024, K=2), Numbers("GQA 8/2, 1088 tokens", 1088, K=2), Numbers("window 256", 1024, window=256),
    Numbers("window 256, GQA 8/2, 1000 tokens", 1000, K=2, window=256), Numbers("block", 1024, block=True),
    Numbers("block, GQA 8/2, window 256", 1024, K=2, window=256, block=True),
    Numbers("block, 1088 tokens", 1088, block=True), Numbers("block, 1000 tokens", 1000, block=True),
]  # fmt: skip
ALLOWED = 1.5  # times XLA's own bfloat16 error


def numbers(context: Context) -> Iterator[Row]:
    """Forward and gradients of each shape; the programs are compiled side by side."""

    def row(shape: Numbers) -> Row:
        try:
            return compare_attention(context, shape)
        except Exception as error:  # a shape that cuDNN refuses is a finding
            return {"case": shape.name, "good": False, "note": f"refused: {str(error).splitlines()[0][:160]}"}

    with ThreadPoolExecutor(1 if context.tiny else 8) as pool:
        yield from pool.map(row, NUMBERS[:: 4 if context.tiny else 1])


def compare_attention(context: Context, shape: Numbers) -> Row:
    """Relative errors of the fused and of XLA's kernel in bfloat16 against XLA's in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ipt_jax.model.attention import attend
    from ipt_jax.model.cudnn import attend_cudnn

    B, T, N, K, H = 2, shape.T // (4 if context.tiny else 1), shape.N, shape.K, shape.H
    draw = np.random.default_rng([T, N, K, H])
    q, k, v, pull = (
        jnp.asarray(draw.standard_normal((B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K, N)
    )  # fmt: skip
    ends = np.sort(draw.choice(T, (B, 4)), axis=1)
    segments = jnp.asarray((np.arange(T)[None, :, None] >= ends[:, None, :]).sum(-1) + 1) if shape.block else None

    def outputs(kernel: Callable[..., Any], dtype: Any) -> list[Any]:
        def see(q: Any, k: Any, v: Any) -> Any:
            return kernel(q, k, v, window=shape.window, segment_ids=segments)

        @jax.jit
        def both(q: Any, k: Any, v: Any, pull: Any) -> Any:
            out, back = jax.vjp(see, q, k, v)
            return out, *back(pull)

        return [np.asarray(x, np.float64) for x in both(*(x.astype(dtype) for x in (q, k, v, pull)))]

    fused = attend if context.tiny else attend_cudnn
    with jax.default_matmul_precision("highest"):
        exact = outputs(attend, jnp.float32)
    errors: dict[str, list[float]] = {}
    for name, kernel in (("fused", fused), ("xla", attend)):
        found = outputs(kernel, jnp.bfloat16)
        errors[name] = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]
    ratios = [a / b for a, b in zip(errors["fused"], errors["xla"], strict=True)]
    good = all(np.isfinite(errors["fused"])) and max(ratios) <= ALLOWED
    out, dq, dk, dv = (f"{error:.1e} ({ratio:.2f})" for error, ratio in zip(errors["fused"], ratios, strict=True))
    note = f"{'ok' if good else 'WRONG'}: out {out}, dq {dq}, dk {dk}, dv {dv}"
    return {"case": shape.name, "good": good, "errors": errors, "ratios": ratios, "note": note}


# ---- speed: the step of `ipt train`


def speed(context: Context) -> Iterator[Row]:
    """The frontier of micro-batch and remat of one size. After the first, programs are compiled side by side."""
    import jax
    import numpy as np

    from ipt_jax.train.state import fresh_state

    cases = [case for case in FRONTIER if case.size == context.argument]
    programs = [(case, build(context, case)) for case in cases]
    built = [compile_timed(programs[0][1])]
    with ThreadPoolExecutor(4) as pool:
        built += pool.map(lambda one: compile_timed(one[1]), programs[1:])
    first = programs[0][1]
    state = fresh_state(first.model, first.optimizer, first.shardings, seed=0)
    order = sorted(zip(programs, built, strict=True), key=lambda one: peak_of(one[1][0]))  # peaks only ever rise
    for (case, program), (compiled, compile_seconds) in order:
        row: Row = {"case": dataclasses.replace(case, rows=program.rows).label, "rows": program.rows}
        row["compile_seconds"] = compile_seconds
        row["predicted_peak_bytes"] = peak_of(compiled)
        if row["predicted_peak_bytes"] > context.ceilings["memory_bytes"]:
            yield row | {"note": "does not fit"}
            continue
        batch, losses = random_batch(program), []

        def steps(count: int, compiled: Any = compiled, batch: Any = batch, losses: list[Any] = losses) -> None:
            nonlocal state
            for _ in range(count):
                state, metrics = compiled(state, batch)
            losses.append(jax.block_until_ready(metrics["loss_sums"].sum() / metrics["targets"].sum()))

        row |= timed(context, steps, program.rows)
        stats = jax.devices()[0].memory_stats() or {}
        yield row | {"peak_bytes": stats.get("peak_bytes_in_use"), "losses": np.asarray(losses).tolist()}


def build(context: Context, case: Case) -> Any:
    """The program of `ipt train` for a case."""
    import jax

    from ipt_jax.config import Recipe
    from ipt_jax.model.config import resolve_model
    from ipt_jax.parallel.mesh import make_mesh
    from ipt_jax.train.program import build_program

    rows = rows_that_fit(context, case)
    length = 128 if context.tiny else LENGTH
    recipe = Recipe.model_validate(
        {
            "model": TINY if case.size == "tiny" else {"preset": f"mistral-{case.size}"},
            "data": {"seq_len": length, "sources": [{"name": "raw", "path": "unread", "epochs": 1}]},
            "train": {"batch_tokens": rows * length, "compute_dtype": "bfloat16", "remat": case.remat},
            "run_dir": "unwritten",
        }
    )
    return build_program(recipe, resolve_model(recipe.model), make_mesh(devices=jax.devices()[:1]), total_steps=1000)


def rows_that_fit(context: Context, case: Case) -> int:
    """The rows of a case, halved until the device has its share of the 70 GiB that the case is made for."""
    rows = case.rows
    while rows > 1 and rows * 70 * 2**30 > case.rows * context.ceilings["memory_bytes"] and not context.tiny:
        rows //= 2
    return rows


def compile_timed(program: Any) -> tuple[Any, float]:
    from ipt_jax.train.program import lower

    begun = time.monotonic()
    compiled = lower(program).compile()
    return compiled, round(time.monotonic() - begun, 1)


def peak_of(compiled: Any) -> int:
    """Bytes that the program needs, as `ipt compile` counts them."""
    memory = compiled.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return moved + memory.temp_size_in_bytes


def random_batch(program: Any) -> dict[str, Any]:
    """One batch [A, M, T] of random tokens on the device: whole rows of one document each."""
    import numpy as np

    from ipt_jax.parallel.mesh import batch_sharding, place_batch

    _, _, T = program.batch["tokens"].shape
    tokens = np.random.default_rng(0).integers(0, program.model.vocab_size, (program.rows, T), dtype=np.int32)
    fields = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": np.tile(np.arange(T) < T - 1, (program.rows, 1)),
        "segment_ids": np.ones_like(tokens),
        "positions": np.tile(np.arange(T, dtype=np.int32), (program.rows, 1)),
        "kinds": np.ones_like(tokens),
    }
    return place_batch(fields, program.shape.accumulation, batch_sharding(program.mesh))


def timed(context: Context, steps: Callable[[int], None], rows: int, tokens: int | None = None) -> Row:
    """Median seconds a step over chunks; `steps(n)` runs n steps and returns when the last has ended."""
    from ipt_jax.model.config import ModelConfig
    from ipt_jax.model.flops import model_flops_per_token, peak_flops

    warm_up, count, chunk = (1, 2, 1) if context.tiny else (WARM_UP, STEPS, CHUNK)
    steps(warm_up)
    each = []
    for _ in range(count // chunk):
        begun = time.perf_counter()
        steps(chunk)
        each.append((time.perf_counter() - begun) / chunk)
    length = 128 if context.tiny else LENGTH
    median = statistics.median(each)
    rate = rows * length / median
    model = ModelConfig(**shape_of(context.argument.split()[-1]))
    flops = model_flops_per_token(model, length)
    peak = peak_flops(context.ceilings["case"], 1)
    return {
        "tokens_per_second": rate,
        "step_seconds": median,
        "slowest_over_fastest": max(each) / min(each),
        "mfu": None if peak is None else rate * flops / peak,
        "share_of_measured_peak": rate * flops / context.ceilings["flops"],
    }


def shape_of(size: str) -> dict[str, Any]:
    from ipt_jax.model.config import PRESETS

    return TINY if size == "tiny" else PRESETS[f"mistral-{size}"]


# ---- rivals: the same shape, tokens per row and optimizer


def rivals(context: Context) -> Iterator[Row]:
    """One other step, at the most rows that fit."""
    name, size = context.argument.split()
    most = next(case.rows for case in FRONTIER if case.size == size)
    rows, run = most, RIVALS[name]
    while True:
        try:
            yield {"case": f"{name}, {size}, {rows} rows", "rows": rows} | run(context, size, rows)
            return
        except Exception as error:
            if rows == 1 or not any(word in str(error) for word in ("out of memory", "RESOURCE_EXHAUSTED", "Out of")):
                raise
        release_torch()
        rows //= 2


def release_torch() -> None:
    """Frees what a failed try holds; called outside of `except`, whose traceback would keep it alive."""
    import gc

    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def naive(context: Context, size: str, rows: int) -> Row:
    """`naive_step.py` in bfloat16. Rows beyond its memory are refused by the compiler, before anything runs."""
    from naive_step import make_step

    rows = min(rows, 4)  # scores of T squared: 0.5 GiB a layer and row at 1.3b
    tokens = random_tokens(context, size, rows)
    step = make_step(shape_of(size), tokens, loop=False, init=0.02, adamw=ADAMW, compute_dtype="bfloat16")
    losses: list[float] = []

    def steps(count: int) -> None:
        losses.append([step() for _ in range(count)][-1])

    return timed(context, steps, rows) | {"case": f"naive, {size}, {rows} rows", "losses": losses}


def torch_rival(context: Context, size: str, rows: int, compiled: bool) -> Row:
    """transformers' Mistral with SDPA, bfloat16 autocast, float32 weights and moments, fused AdamW."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return {"case": context.argument, "note": "skipped: torch or transformers is not installed"}
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    device = "cpu" if context.tiny else "cuda"
    shape = shape_of(size)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = MistralConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["q_heads"], num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        intermediate_size=shape["intermediate_size"], max_position_embeddings=LENGTH, sliding_window=None,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        model = MistralForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ADAMW["learning_rate"], betas=(ADAMW["b1"], ADAMW["b2"]), eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"], fused=True,
    )  # fmt: skip
    backend = "aot_eager" if context.tiny else "inductor"  # generating C++ takes a minute on two cores
    run = torch.compile(model, backend=backend) if compiled else model
    ids = torch.tensor(random_tokens(context, size, rows), dtype=torch.int64, device=device)
    losses: list[float] = []

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16):
                loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device

    begun = time.monotonic()
    steps(1)
    first = time.monotonic() - begun
    row = timed(context, steps, rows)
    peak = None if context.tiny else torch.cuda.max_memory_allocated()
    return row | {"compile_seconds": round(first, 1), "peak_bytes": peak, "losses": losses}


def random_tokens(context: Context, size: str, rows: int) -> Any:
    import numpy as np

    length = 128 if context.tiny else LENGTH
    return np.random.default_rng(0).integers(0, shape_of(size)["vocab_size"], (rows, length), dtype=np.int32)


RIVALS: dict[str, Callable[..., Row]] = {
    "torch-compile": functools.partial(torch_rival, compiled=True),
    "torch-eager": functools.partial(torch_rival, compiled=False),
    "naive": naive,
}


# ---- synthesis: `engine: jax`


def synthesis(context: Context) -> Iterator[Row]:
    """Requests through the engine of `synth run`, twice as many as its batch holds."""
    import jax
    import jax.numpy as jnp

    from ipt_jax.generate import LanguageModel
    from ipt_jax.model.config import ModelConfig
    from ipt_jax.model.mistral import abstract_params

    config = ModelConfig(**(TINY | {"eos_id": None} if context.tiny else SYNTHESIZER))
    shapes, tree = jax.tree.flatten(abstract_params(config, jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(lambda keys: [0.02 * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, shapes)])  # noqa: B905
    model = LanguageModel(config, jax.tree.unflatten(tree, draw(keys)))
    prompt, new = (16, 8) if context.tiny else (256, 128)
    for batch in (4, 8) if context.tiny else (64, 256, 512):
        begun = time.monotonic()
        generate(model, batch, batch, prompt, new)
        compile_seconds = time.monotonic() - begun
        seconds = generate(model, batch, 2 * batch, prompt, new)
        tokens = 2 * batch * new
        weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
        cache = batch * (prompt + new / 2) * 2 * config.layers * config.kv_heads * config.head_dim * 2
        limit = 2 * new * (weights + cache) / context.ceilings["bandwidth"]  # each token of a batch reads all of both
        yield {
            "case": f"1.1b-shaped, batch {batch}",
            "tokens_per_second": tokens / seconds,
            "share_of_bandwidth_limit": limit / seconds,
            "compile_seconds": round(compile_seconds, 1),
            "note": f"prompts of {prompt}, {new} new tokens; {limit / seconds:.0%} of the bandwidth limit",
        }


def generate(model: Any, batch: int, requests: int, prompt: int, new: int) -> float:
    """Seconds for `requests` requests that arrive at once."""
    import asyncio

    import numpy as np

    from synth.config import SynthesizerSettings
    from synth.engine.jax_ import JaxEngine

    settings = SynthesizerSettings.model_validate(
        {"model": "random", "engine": "jax", "max_num_seqs": batch, "max_model_len": prompt + new,
         "max_new_tokens": new}
    )  # fmt: skip
    prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (requests, prompt)).tolist()

    async def run() -> float:
        engine = JaxEngine(settings, SimpleNamespace(eos_id=None, vocab_size=0), model)  # type: ignore[arg-type]
        begun = time.perf_counter()
        asked = (
            engine.generate(ids, max_new_tokens=new, temperature=0.0, seed=i, request_id=str(i))
            for i, ids in enumerate(prompts)
        )
        done = await asyncio.gather(*asked)
        seconds = time.perf_counter() - begun
        await engine.close()
        assert all(len(one.ids) == new for one in done)
        return seconds

    return asyncio.run(run())


# ---- roofline: predicted and measured seconds by part of the step


def roofline(context: Context) -> Iterator[Row]:
    """Products at the measured peak, bytes at the measured bandwidth, and what a profile of three steps shows."""
    import jax

    from ipt_jax.compile.roofline import kernels, predict
    from ipt_jax.train.program import lower
    from ipt_jax.train.state import fresh_state

    case = next(case for case in FRONTIER if case.size == context.argument)
    program = build(context, case)
    # A profile names the operations of a command buffer by the buffer alone.
    options = {} if context.tiny else {"xla_gpu_enable_command_buffer": ""}
    compiled = lower(program).compile(compiler_options=options)
    found = kernels(compiled.as_text())
    predicted = predict(found, context.ceilings["flops"], context.ceilings["bandwidth"])
    state, batch = fresh_state(program.model, program.optimizer, program.shardings, seed=0), random_batch(program)
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    trace = context.work / "trace"
    count = 3
    with jax.profiler.trace(str(trace)):
        for _ in range(count):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
    by_name = {name: seconds / count for name, seconds in profile_seconds(trace).items()}
    parts = {kernel.name: (kernel.part, kernel.kind) for kernel in found}
    measured: dict[str, float] = defaultdict(float)
    for name, seconds in by_name.items():
        measured[parts.get(name, ("other", ""))[0]] += seconds
    for part, cost in predicted["parts"].items():
        yield {
            "case": f"{case.label}: {part}",
            "predicted_seconds": cost["seconds"],
            "step_seconds": measured.get(part) or None,
            "flops": cost["flops"],
            "bytes": cost["bytes"],
            "note": f"predicted {cost['seconds'] * 1e3:.2f} ms, {cost['flops'] / 1e12:.2f} TFLOP, "
            f"{cost['bytes'] / 1e9:.2f} GB",
        }
    slowest = sorted(by_name.items(), key=lambda one: -one[1])[:80]
    yield {
        "case": f"{case.label}: whole step",
        "predicted_seconds": predicted["seconds"],
        "step_seconds": sum(by_name.values()) or None,
        "slowest": [[name, *parts.get(name, ("", "")), round(seconds * 1e6)] for name, seconds in slowest],
        "note": f"predicted {predicted['seconds'] * 1e3:.1f} ms, limit {predicted['limit']}",
    }


def profile_seconds(trace: Path) -> dict[str, float]:
    """Device seconds by HLO instruction, from the newest profile under `trace`."""
    from jax.profiler import ProfileData

    path = max(trace.rglob("*.xplane.pb"), key=lambda one: one.stat().st_mtime)
    seconds: dict[str, float] = defaultdict(float)
    for plane in ProfileData.from_file(str(path)).planes:
        on_gpu = plane.name.startswith("/device:GPU")
        if not on_gpu and plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    seconds[str(stats["hlo_op"])] += event.duration_ns * 1e-9
                elif on_gpu:
                    seconds[event.name] += event.duration_ns * 1e-9
    return seconds


# ---- the table and the command line


def table(rows: list[Row]) -> str:
    """One table of all rows."""
    head = ("part", "case", "tokens/s", "MFU", "step s", "peak GiB", "predicted", "compile s", "note")
    body = [
        (
            row["part"], row["case"], number(row.get("tokens_per_second"), ",.0f"), number(row.get("mfu"), ".1%"),
            number(row.get("step_seconds"), ".4f"), gib(row.get("peak_bytes")), gib(row.get("predicted_peak_bytes")),
            number(row.get("compile_seconds"), ".1f"), row.get("note", ""),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = []
    for line in [head, *body]:
        cells = [
            text.ljust(width) if column in (0, 1, 8) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def gib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f}"


def missing_wheels() -> list[str]:
    return [wheel for module, wheel in WHEELS.items() if importlib.util.find_spec(module) is None]


@dataclass(frozen=True)
class Context:
    """What a child knows."""

    argument: str
    work: Path
    tiny: bool
    ceilings: Row


CHILDREN: dict[str, Callable[[Context], Iterator[Row]]] = {
    "ceilings": ceilings, "numbers": numbers, "speed": speed, "rivals": rivals, "synthesis": synthesis,
    "roofline": roofline,
}  # fmt: skip


def child(part: str, context: Context) -> None:
    """Prints each row as a JSON line; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for row in CHILDREN[part](context):
        print(json.dumps(row), file=answers)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit in minutes (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"), help="JSON file (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for logs, programs and profiles (default: a temporary one)")
    for hidden in ("--child", "--argument", "--ceilings"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: unknown part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    if not given.output.parent.is_dir():
        parser.error(f"--output: the folder {given.output.parent} does not exist")
    return given


def main() -> None:
    given = arguments()
    if given.child:
        child(given.child, Context(given.argument, given.work, given.tiny, json.loads(given.ceilings)))
        return
    missing = missing_wheels()
    if missing:
        sys.exit(f"gpu: missing packages; install these wheels: {' '.join(missing)}")
    deadline = time.monotonic() + 60 * given.minutes
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report: dict[str, Any] = {"date": started, "python": platform.python_version(), "versions": versions(), "rows": []}

    def save(rows: list[Row]) -> None:
        report["rows"] = rows
        given.output.write_text(json.dumps(report, indent=1))

    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipt-gpu-")))
        work.mkdir(parents=True, exist_ok=True)
        run_units(units(given.parts.split(","), given.tiny), deadline, work, given.tiny, save)
        shutil.rmtree(work / "cache", ignore_errors=True)
    print(table(report["rows"]))
    if all("note" in row and row["note"].startswith(("failed", "dropped")) for row in report["rows"][1:]):
        sys.exit("gpu: nothing was measured; the rows above say why")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "nvidia-cudnn-cu13", "nvidia-cublas"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
