"""The measurements of benchmarks/gpu.py. Each runs in a child process and yields one row per figure.

A row is a dict: `case` names it, `note` is for people, the other keys are figures in SI units (bytes, seconds, FLOP/s).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


FRONTIER = [  # a size's first case is the one that the roofline and the rivals are held against
    Case("1.3b", 16, "none"), Case("1.3b", 24, "none"), Case("1.3b", 8, "none"), Case("1.3b", 32, "full"),
    Case("500m", 32, "none"), Case("500m", 16, "none"), Case("500m", 64, "full"),
    Case("tiny", 4, "none"), Case("tiny", 8, "full"),
]  # fmt: skip
TINY = dict(vocab_size=512, hidden_size=64, layers=2, q_heads=4, kv_heads=2, head_dim=16, intermediate_size=128)
SYNTHESIZER = dict(  # the shape of TinyLlama-1.1B
    vocab_size=32_000, hidden_size=2048, layers=22, q_heads=32, kv_heads=4, head_dim=64, intermediate_size=5632,
    eos_id=None,
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """The settings of a child process."""

    argument: str
    work: Path
    tiny: bool
    ceilings: Row


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
        except Exception as error:  # a shape that cuDNN rejects is a result
            return {"case": shape.name, "good": False, "note": f"rejected: {str(error).splitlines()[0][:160]}"}

    with ThreadPoolExecutor(1 if context.tiny else 8) as pool:
        yield from pool.map(row, NUMBERS[:: 4 if context.tiny else 1])


def compare_attention(context: Context, shape: Numbers) -> Row:
    """Relative errors of the fused and of XLA's kernel in bfloat16 against XLA's in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ipt_jax.model.attention import attend, attend_cudnn

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
    from ipt_jax.hf.config import resolve_model
    from ipt_jax.parallel.mesh import make_mesh
    from ipt_jax.train.step import build_program

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
    """The rows of a case, halved until they fit the device. The case is sized for 70 GiB."""
    rows = case.rows
    while rows > 1 and rows * 70 * 2**30 > case.rows * context.ceilings["memory_bytes"] and not context.tiny:
        rows //= 2
    return rows


def compile_timed(program: Any) -> tuple[Any, float]:
    from ipt_jax.train.step import lower

    begun = time.monotonic()
    compiled = lower(program).compile()
    return compiled, round(time.monotonic() - begun, 1)


def peak_of(compiled: Any) -> int:
    """Bytes that the program needs, as `ipt compile` counts them."""
    memory = compiled.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return moved + memory.temp_size_in_bytes


def random_batch(program: Any) -> dict[str, Any]:
    """One batch [A, M, T] of random tokens on the device, one document per row."""
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


# ---- synthesis: `engine: jax`


def synthesis(context: Context) -> Iterator[Row]:
    """Requests through the engine of `synth run`, twice as many as fit in its batch."""
    import jax
    import jax.numpy as jnp

    from ipt_jax.inference.language_model import LanguageModel
    from ipt_jax.model.config import ModelConfig
    from ipt_jax.model.decoder import abstract_params

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
    from synth.engine.base import GenerationRequest
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
            engine.generate(GenerationRequest(str(i), ids, max_new_tokens=new, seed=i)) for i, ids in enumerate(prompts)
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

    from ipt_jax.compile.roofline import Rates, kernels, predict
    from ipt_jax.train.state import fresh_state
    from ipt_jax.train.step import lower

    case = next(case for case in FRONTIER if case.size == context.argument)
    program = build(context, case)
    # A profile names the operations of a command buffer by the buffer alone.
    options = {} if context.tiny else {"xla_gpu_enable_command_buffer": ""}
    compiled = lower(program).compile(compiler_options=options)
    found = kernels(compiled.as_text())
    predicted = predict(found, Rates(context.ceilings["flops"], context.ceilings["bandwidth"]))
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
