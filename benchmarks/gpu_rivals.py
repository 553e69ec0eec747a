"""The rivals of benchmarks/gpu.py: other train steps of the same shape, tokens per row and optimizer."""

from __future__ import annotations

import functools
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_parts import ADAMW, FRONTIER, LENGTH, Context, Row, shape_of, timed


def rivals(context: Context) -> Iterator[Row]:
    """One other step, at the most rows that fit."""
    name, size = context.argument.split()
    most = next(case.rows for case in FRONTIER if case.size == size)
    rows, run = most // 2, RIVALS[name]  # the rows of ours did not fit on 80 GB, which took torch.compile 100 s to find
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
    """Frees the memory of a failed try. Called outside of `except`, whose traceback would keep it alive."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def naive(context: Context, size: str, rows: int) -> Row:
    """`naive_step.py` in bfloat16. The compiler rejects rows beyond the memory before anything runs."""
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
