"""Changes within a run: extended mixes are exact, the trained rows stay, wanted changes are accepted and recorded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_shards import random_documents, row_pieces, write_tokens

from ipt_jax.core.errors import UserError
from ipt_jax.data import packing as packing_module
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan, continue_plan, open_mix, repeats, run_segments

LENGTHS = {"a": [5, 9, 2, 30, 7, 12, 2], "b": [3] * 25, "c": [40, 2, 2, 11]}  # 67, 75 and 55 tokens


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    for seed, (name, lengths) in enumerate(LENGTHS.items()):
        write_tokens(root / name, random_documents(lengths, seed))
    return root


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Any:
    """Chunks of 3 rows, so that small plans have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipt_jax.data.plan.CHUNK_ROWS", 3)
        assert packing_module.CHUNK_ROWS == 512
        yield


def plan_of(root: Path, packing: str, rows_per_step: int, amounts: dict[str, int], before: Plan | None = None,
            step: int = 0) -> Plan:  # fmt: skip
    sources = [{"name": name, "path": str(root / name), "tokens": tokens} for name, tokens in amounts.items()]
    mix = open_mix(DataSettings.model_validate({"seq_len": 16, "packing": packing, "sources": sources}))
    if before is None:
        return Plan(mix, rows_per_step=rows_per_step)
    return continue_plan(mix, rows_per_step=rows_per_step, past=run_segments(before.identity), step=step)


def given_tokens(plan: Plan, first: int, stop: int) -> dict[str, Counter[tuple[int, int]]]:
    """How often rows [first, stop) hold each (record, token) of each source."""
    found: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in plan.names}
    for row in range(first, stop):
        for piece in row_pieces(plan, row):
            tokens = range(piece.start, piece.start + piece.length)
            found[plan.names[piece.source]].update((piece.record, token) for token in tokens)
    return found


def same_rows(one: Plan, other: Plan, stop: int) -> bool:
    """Whether rows [0, stop) have equal arrays."""
    before, after = (plan.batch(range(stop or 1)) for plan in (one, other))
    return not stop or all((before[name] == after[name]).all() for name in before)


amounts = st.fixed_dictionaries({"a": st.integers(1, 200), "b": st.integers(1, 300)})
extension = st.tuples(
    st.floats(0, 1),  # where in the run
    st.integers(1, 5),  # rows per step
    st.fixed_dictionaries({"a": st.integers(0, 150), "b": st.integers(0, 150)}),  # more tokens
    st.integers(0, 120),  # tokens of a new source
)


@given(st.sampled_from(["concat", "best_fit"]), st.integers(1, 5), amounts, st.lists(extension, min_size=1, max_size=3))
def test_an_extended_run_keeps_its_prefix_and_meets_the_new_mix(
    corpora: Path, packing: str, rows: int, asked: dict[str, int], extensions: list[Any]
) -> None:
    plan = plan_of(corpora, packing, rows, asked)
    step = 0
    for fraction, rows, more, new in extensions:
        step += round(fraction * (plan.steps - step))
        asked = {name: tokens + more.get(name, 0) for name, tokens in asked.items()}
        if new:
            asked["c"] = asked.get("c", 0) + new
        before, plan = plan, plan_of(corpora, packing, rows, asked, plan, step)
        kept = before.first_row(step)
        assert plan.first_row(step) == kept
        assert same_rows(before, plan, kept)
        trained = given_tokens(plan, 0, kept)
        assert plan.taken(step) == {name: trained[name].total() for name in plan.names}
    found = given_tokens(plan, 0, plan.rows)
    assert {name: tokens.total() for name, tokens in found.items()} == asked
    for name, tokens in found.items():  # no token is repeated before all of its source were used as often
        uses = [tokens[record, at] for record, length in enumerate(LENGTHS[name]) for at in range(length)]
        assert max(uses) - min(uses) <= 1
    assert plan.place(plan.first_row(step)) == (step, 0)
    assert plan.first_row(plan.steps) >= plan.rows


@given(st.sampled_from(["concat", "best_fit"]), amounts, st.integers(1, 5), st.integers(1, 5))
def test_another_batch_size_keeps_the_order_of_rows(
    corpora: Path, packing: str, asked: dict[str, int], rows: int, other: int
) -> None:
    before = plan_of(corpora, packing, rows, asked)
    step = before.steps // 2
    plan = plan_of(corpora, packing, other, asked, before, step)
    assert plan.rows == before.rows and plan.fingerprint != before.fingerprint or rows == other
    assert same_rows(before, plan, before.rows)
    left = max(before.rows - step * rows, 0)
    assert plan.steps == step + -(-left // other)


def test_a_continued_plan_without_changes_is_the_same(corpora: Path) -> None:
    first = plan_of(corpora, "concat", 2, {"a": 100, "b": 60})
    assert plan_of(corpora, "concat", 2, {"a": 100, "b": 60}, first, 3).fingerprint == first.fingerprint
    longer = plan_of(corpora, "concat", 2, {"a": 100, "b": 90}, first, 3)
    assert longer.segments[1][:2] == (3, 2) and longer.identity["segments"][0] == [0, 2, [["a", 100], ["b", 60]]]
    again = plan_of(corpora, "concat", 2, {"a": 100, "b": 90}, longer, 5)
    assert again.fingerprint == longer.fingerprint != first.fingerprint


def test_less_than_a_source_has_given_is_refused(corpora: Path) -> None:
    first = plan_of(corpora, "concat", 2, {"a": 100, "b": 60})
    with pytest.raises(
        UserError, match=r"source 'a': has given 80 tokens by step 4, .* asks for 70 .* 10 fewer; raise"
    ):
        plan_of(corpora, "concat", 2, {"a": 70, "b": 60}, first, 4)
    assert sum(first.taken(4).values()) == 4 * 2 * 16


@pytest.mark.parametrize(
    ("amount", "warned"),
    [({"tokens": 67 * 17}, True), ({"tokens": 67 * 16}, False), ({"epochs": 17}, False),
     ({"tokens": 67 * 17, "max_epochs": 20}, False)],
)  # fmt: skip
def test_many_epochs_are_warned_of(corpora: Path, amount: dict[str, int], warned: bool) -> None:
    source = {"name": "a", "path": str(corpora / "a")} | amount
    message = "warning: source 'a' is repeated for 17 epochs of its 67 tokens; set its max_epochs if this is intended"
    data = DataSettings.model_validate({"seq_len": 16, "sources": [source]})
    assert repeats(build_plan(data, rows_per_step=2).summary()) == ([message] if warned else [])
