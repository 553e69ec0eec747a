"""Error of `ipt compile`'s prediction on this CPU: the same roofline, with this CPU's measured peaks.

    python benchmarks/predict_cpu.py                   # shape A of train_step.py in float32 and bfloat16: two minutes
    python benchmarks/predict_cpu.py --shape B

Measures products (a square matrix product in the step's dtype) and memory (adding one to an array much larger than the
caches), compiles the train step of train_step.py, predicts its time from its program, and times it. Peaks are measured
before and after the steps and the better is used, because the machine may be shared. Does not apply to accelerators.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from train_step import LENGTH, ROWS, SHAPES, machine, our_program

from ipt_jax.compile.roofline import Rates, kernels, predict

SIZE = 2048  # of the matrices
COPIED = 2**28  # bytes


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the best of ten products."""
    x = jnp.ones((SIZE, SIZE), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * SIZE**3 / best(lambda: product(x, x))


def bandwidth() -> float:
    """Bytes/s read and written, the best of ten passes over one buffer: a new one would cost its page faults."""
    x = jnp.zeros(COPIED // 4, jnp.float32)
    add = jax.jit(jnp.add, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal x
        x = add(x, 1.0)
        return x

    return 2 * COPIED / best(run)


def best(run: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of ten runs, after one that is not timed."""
    seconds = []
    for _ in range(11):
        begun = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def measure(shape: str, dtype: str, steps: int) -> str:
    """One line of the table."""
    tokens = np.random.default_rng(0).integers(0, SHAPES[shape]["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    peaks, speeds = [matmul_peak(dtype)], [bandwidth()]
    program, state, batch = our_program(SHAPES[shape], tokens, dtype)
    found = kernels(program.step.lower(state, batch).compile().as_text())
    seconds = []
    for _ in range(steps + 2):
        begun = time.perf_counter()
        state, metrics = program.step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
    peaks.append(matmul_peak(dtype))
    speeds.append(bandwidth())
    predicted = predict(found, Rates(max(peaks), max(speeds)))
    measured = statistics.median(seconds[2:])
    return (
        f"| {shape} | {dtype} | {max(peaks) / 1e9:,.0f} | {max(speeds) / 1e9:.1f} | "
        f"{predicted['products_seconds']:.3f} + {predicted['memory_seconds']:.3f} = {predicted['seconds']:.3f} | "
        f"{predicted['limit']} | {measured:.3f} ({min(seconds[2:]):.3f} to {max(seconds[2:]):.3f}) | "
        f"{measured / predicted['seconds']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="A", choices=SHAPES, help="model of train_step.py (default: A)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="compute dtypes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after 2 that are not (default: 8)")
    given = parser.parse_args()
    print(f"{datetime.date.today()} · {machine(2)} · jax {jax.__version__}")
    print(
        "| shape | dtype | products GFLOP/s | memory GB/s | predicted s (products + memory) | predicted limit | "
        "measured s | measured / predicted |"
    )
    print("|---" * 8 + "|")
    for dtype in given.dtypes.split(","):
        print(measure(given.shape, dtype, given.steps), flush=True)


if __name__ == "__main__":
    main()
