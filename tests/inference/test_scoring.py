"""Packed scores: the prefix tree holds every sequence, and no mesh and no neighbour changes a score."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainkit import train_processes

from ipt_jax.inference.language_model import LanguageModel
from ipt_jax.inference.scoring import Pair, Scorer, pack, row_size
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import abstract_params, init_params, logical_axes
from ipt_jax.parallel.mesh import make_mesh
from ipt_jax.parallel.rules import place_params

CONFIG = ModelConfig(
    vocab_size=53, hidden_size=32, layers=2, q_heads=4, kv_heads=2, head_dim=8, intermediate_size=48, max_positions=400,
    initializer_range=0.4,
)  # fmt: skip


def pairs() -> list[Pair]:
    """Twelve contexts of 1 to 110 tokens, half of them with a beginning in common, four continuations each."""
    draw = np.random.default_rng(0)
    beginning = draw.integers(3, 53, size=70).tolist()
    found = []
    for number in range(12):
        own = draw.integers(3, 53, size=int(draw.integers(1, 40))).tolist()
        context = own if number % 2 else beginning + own
        found += [(context, draw.integers(3, 53, size=int(size)).tolist()) for size in draw.integers(1, 30, size=4)]
    return found


ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=30))
def test_a_packed_row_shows_each_token_its_own_sequence(asked: list[Pair]) -> None:
    seen: set[int] = set()
    for row in pack(asked):
        tokens, at = np.array(row.tokens), 0
        for number, count in row.owners:
            seen.add(number)
            context, continuation = asked[number]
            assert row.targets[at : at + count] == continuation
            for offset, place in enumerate(row.places[at : at + count]):
                visible = [k for k in range(place + 1) if place < row.ends[k]]
                assert tokens[visible].tolist() == context + continuation[:offset]
                assert [row.positions[k] for k in visible] == list(range(len(visible)))
            at += count
        assert len(row.targets) <= row_size(max(64, len(row.tokens))) or len(row.targets) <= 256
    assert seen == set(range(len(asked)))


def test_what_is_shared_is_computed_once() -> None:
    context = list(range(100))
    (row,) = pack([(context, [n]) for n in range(4)])
    assert len(row.tokens) == 100, "choices of one token add none"
    (row,) = pack([(context, [n, 7, 8]) for n in range(4)])
    assert len(row.tokens) == 100 + 4 * 2
    rows = pack([(context * 4 + [n] * 20, [1, 2]) for n in range(8)])
    assert [len(row.tokens) for row in rows] == [400 + 8 * 21], "examples that questions share"


def test_row_sizes_are_few() -> None:
    sizes = {row_size(n) for n in range(1, 8193)}
    assert len(sizes) == 24 and all(n <= row_size(n) < max(n + 64, 1.25 * n + 1) for n in range(1, 8193))


@pytest.mark.parametrize("window", [None, 16])
def test_scores_are_those_of_the_logits(window: int | None) -> None:
    config = CONFIG.model_copy(update={"sliding_window": window})
    model = LanguageModel(config, init_params(config, jax.random.key(0)))
    asked = pairs()
    for (context, continuation), score in zip(asked, model.scorer(1024).score(asked), strict=True):
        row = context + continuation
        logits = model.logits(row + [0] * (160 - len(row)))[len(context) - 1 : len(row) - 1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logprobs[np.arange(len(continuation)), continuation].sum()
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert score.greedy == (logits.argmax(-1) == continuation).all() and score.tokens == len(continuation)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_gives_the_scores_and_texts_of_one_device(sizes: tuple[int, int, int]) -> None:
    params = init_params(CONFIG, jax.random.key(0))
    one, asked = LanguageModel(CONFIG, params), pairs()
    mesh = make_mesh(*sizes)
    placed = jax.device_put(params, place_params(logical_axes(CONFIG), abstract_params(CONFIG), mesh).shardings)
    eight = LanguageModel(CONFIG, placed, mesh=mesh)
    expected, found = one.scorer(512).score(asked), eight.scorer(512).score(asked)
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], rel=1e-5)
    assert [score.greedy for score in found] == [score.greedy for score in expected]
    prompts = [context[:50] for context, _ in asked[::4]]
    assert eight.generate(prompts, 8) == one.generate(prompts, 8)
    held = {shard.data.unsafe_buffer_pointer() for shard in placed["embedding"].addressable_shards}
    kept = {shard.data.unsafe_buffer_pointer() for shard in eight.params["embedding"].addressable_shards}
    assert held == kept, "a second copy of the parameters"


CHILD = """
import json, sys
import jax, numpy as np
from ipt_jax.parallel.distributed import initialize_distributed
initialize_distributed()
from test_scoring import CONFIG, pairs
from ipt_jax.inference.language_model import LanguageModel
from ipt_jax.model.decoder import abstract_params, init_params, logical_axes
from ipt_jax.parallel.mesh import make_mesh
from ipt_jax.parallel.rules import place_params
from ipt_jax.evaluate.harness import RequestJournal
mesh = make_mesh(1, -1, 1)
shardings = place_params(logical_axes(CONFIG), abstract_params(CONFIG), mesh).shardings
params = jax.jit(lambda: init_params(CONFIG, jax.random.key(0)), out_shardings=shardings)()
model = LanguageModel(CONFIG, params, mesh=mesh)
scores = model.scorer(512).score(pairs())
texts = model.generate([context[:50] for context, _ in pairs()[::4]], 8)
journal = RequestJournal(__import__("pathlib").Path(sys.argv[1] + ".journal"), "x")
found = [[one.logprob for one in scores], texts, journal.get("0" * 64)]
json.dump(found, open(sys.argv[1] + str(jax.process_index()), "w"))
"""


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    (tmp_path / "out.journal").write_text("x\n" + "0" * 64 + " [1.5, true]\n")
    train_processes(CHILD, (str(tmp_path / "out"),), [1, 1])
    model = LanguageModel(CONFIG, init_params(CONFIG, jax.random.key(0)))
    expected = Scorer(CONFIG, model.params, batch_tokens=512).score(pairs())
    for process in (0, 1):
        scores, texts, known = json.loads((tmp_path / f"out{process}").read_text())
        assert scores == pytest.approx([score.logprob for score in expected], rel=1e-5)
        assert texts == model.generate([context[:50] for context, _ in pairs()[::4]], 8)
        assert known == [1.5, True], "every process resumes from the journal of the first"
