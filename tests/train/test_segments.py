"""Changes within a run: extended mixes are exact, the trained rows stay, wanted changes are accepted and recorded."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_shards import random_documents, row_pieces, write_tokens
from trainkit import recipe_of, run_python, write_corpus

from ipt_jax.config import Recipe
from ipt_jax.core.checkpoint_path import LiteralPath
from ipt_jax.core.errors import UserError
from ipt_jax.data import packing as packing_module
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan, continue_plan, open_mix, plan_warnings, run_segments
from ipt_jax.train import trainer
from ipt_jax.train.checkpoint import CheckpointRecord
from ipt_jax.train.resume import Start, start_line
from ipt_jax.train.segments import accept_changes, change_lines, find_changes, plan_of_run
from ipt_jax.train.trainer import run_train

LENGTHS = {"a": [5, 9, 2, 30, 7, 12, 2], "b": [3] * 25, "c": [40, 2, 2, 11]}  # 67, 75 and 55 tokens


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    for seed, (name, lengths) in enumerate(LENGTHS.items()):
        write_tokens(root / name, random_documents(lengths, seed))
    return root


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
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
    assert plan_warnings(build_plan(data, rows_per_step=2).summary()) == ([message] if warned else [])


@pytest.mark.parametrize(
    ("shares", "warned"),
    [
        ({"raw": 0.96, "augmented": 0.04}, "augmented text is 4.0% of the tokens"),
        ({"raw": 0.5, "raw+augmented": 0.5}, None),
        ({"raw": 0.69, "task": 0.11, "instruction": 0.2}, "instructions and tuning data are 31% of the tokens"),
        ({"raw": 0.7, "instruction": 0.3}, None),
        ({"augmented": 0.5, "instruction": 0.5}, None),  # the paper's mix of a domain
        ({"task": 1.0}, None),
    ],
)
def test_mixes_that_are_known_to_fail_are_warned_of(shares: dict[str, float], warned: str | None) -> None:
    whole = {"epochs": 1.0, "max_epochs": None, "asked": "share"}
    sources = [{"name": kind, "kind": kind, "share": share} | whole for kind, share in shares.items()]
    found = plan_warnings({"sources": sources})
    assert len(found) == (warned is not None) and all(f"warning: {warned}" in line for line in found)


# ---- training


CONSTANT = {"schedule": "constant"}


def recipe(folder: Path, run: str = "run", **blocks: dict[str, Any]) -> Recipe:
    blocks["train"] = {"keep_checkpoints": 9, "checkpoint_every": 3} | blocks.get("train", {})
    blocks["optimizer"] = CONSTANT | blocks.get("optimizer", {})
    return recipe_of(folder, **blocks).model_copy(update={"run_dir": str(folder / run)})


def epochs(folder: Path, count: float) -> dict[str, Any]:
    return {"sources": [{"name": "raw", "path": str(folder / "raw"), "epochs": count}]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A corpus and a finished run of two epochs, 11 steps at a constant rate. Tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPT_COMPILE_CACHE", str(folder / "compiled"))
        assert run_train(recipe(folder))["step"] == 11
        yield folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def same_weights(one: Path, other: Path, step: int) -> None:
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "optimizer"):
            trees = [reader.restore(LiteralPath(run / "checkpoints" / str(step) / item)) for run in (one, other)]
            jax.tree.map(np.testing.assert_array_equal, *trees)


def metrics(run_dir: Path) -> list[tuple[int, int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["loss"]) for line in lines]


def history(run_dir: Path) -> list[dict[str, Any]]:
    return json.loads((run_dir / "run.json").read_text())["segments"]


def forget(run_dir: Path, step: int) -> None:
    """Removes the checkpoints after `step`."""
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_a_finished_run_is_extended(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    longer = recipe(folder, data=epochs(folder, 3))
    before = metrics(folder / "run")
    with pytest.raises(
        UserError, match=r"step 11 .* data.sources.0.epochs \(tokens of source 'raw'\)=5\d\d\d, now"
    ) as no:
        run_train(longer)
    assert "add --change to change this from step 11 on" in str(no.value)
    plan, done = plan_of_run(longer)
    summary = plan.summary(done)
    assert done == 11 and summary["trained_tokens"] == before[-1][1] == summary["segments"][0]["tokens"]
    assert summary["tokens"] == summary["sources"][0]["available_tokens"] * 3
    result = run_train(longer, change=True)
    assert f"from step 11: tokens of source 'raw' {before[-1][1]:,} -> {plan.tokens:,}" in capfd.readouterr().err
    assert (result["step"], result["tokens"]) == (plan.steps, plan.tokens) and plan.steps == 17
    assert metrics(folder / "run")[: len(before)] == before
    first, second = history(folder / "run")
    assert (first["step"], second["step"], second["tokens"]) == (0, 11, before[-1][1])
    assert second["changed"] == {"tokens of source 'raw'": [before[-1][1], plan.tokens]}
    assert second["plan_fingerprint"] == plan.fingerprint != first["plan_fingerprint"]
    assert {"git_commit", "versions", "devices"} <= second.keys()
    shutil.copytree(folder / "run", folder / "whole")
    forget(folder / "run", 15)
    assert run_train(longer)["step"] == 17  # a restart needs no consent
    same_weights(folder / "run", folder / "whole", 17)
    assert [one["step"] for one in history(folder / "run")] == [0, 11]


CHILD = """
import sys, time
import ipt_jax.train.trainer as loop
from ipt_jax.config import Recipe
place = loop.place_batch
def slow(*arguments):
    time.sleep(0.3)
    return place(*arguments)
loop.place_batch = slow  # time for the parent to kill it
loop.run_train(Recipe.model_validate_json(sys.argv[1]), change=True)
"""


def test_a_changed_run_that_is_killed_equals_an_undisturbed_one(folder: Path) -> None:
    """Another mix, rate and batch size from step 6 on; SIGKILL after the first checkpoint of the changed run."""
    forget(folder / "run", 6)
    shutil.copytree(folder / "run", folder / "whole")
    changed = {"data": epochs(folder, 3), "train": {"batch_tokens": 256}, "optimizer": {"learning_rate": 0.002}}
    asked = recipe(folder, **changed)
    process = run_python(CHILD, asked.model_dump_json(by_alias=True, exclude_unset=True), JAX_NUM_CPU_DEVICES="8")
    deadline = time.monotonic() + 200
    while not (folder / "run" / "checkpoints" / "9").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (folder / "run" / "checkpoints" / "21").exists()
    assert run_train(asked)["step"] == 26, "no further consent; 249 rows less 6 batches of 16, in batches of 8"
    assert run_train(recipe(folder, "whole", **changed), change=True)["step"] == 26
    same_weights(folder / "run", folder / "whole", 26)
    assert metrics(folder / "run") == metrics(folder / "whole")
    assert [one["step"] for one in history(folder / "run")] == [0, 6]


def test_decay_from_a_checkpoint_equals_the_planned_decay(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the run itself, and in a branch of it, which leaves the run as it is."""
    decay = {"optimizer": {"schedule": "wsd", "decay_start": 6, "decay_steps": 3}}
    planned = run_train(recipe(folder, "planned", **decay))
    assert (planned["step"], planned["steps"]) == (9, 9)
    branch = {"train": {"branch_from": str(folder / "run" / "checkpoints" / "6")}} | decay
    assert run_train(recipe(folder, "branch", **branch))["step"] == 9
    said = capfd.readouterr().err
    assert f"branching from step 6 of {folder / 'run'}" in said
    assert "from step 6: optimizer.schedule constant -> wsd" in said
    assert run_train(recipe(folder, "branch", **branch))["step"] == 9
    assert history(folder / "branch")[-1]["branched_from"] == str(folder / "run" / "checkpoints" / "6")
    assert run_train(recipe(folder))["step"] == 11
    forget(folder / "run", 6)
    assert run_train(recipe(folder, **decay), change=True)["step"] == 9
    for run in ("branch", "run"):
        same_weights(folder / "planned", folder / run, 9)
        assert metrics(folder / run) == metrics(folder / "planned")


def test_another_rate_and_batch_size_from_a_step_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forget(folder / "run", 6)
    changed = recipe(folder, train={"batch_tokens": 256}, optimizer={"learning_rate": 0.002})
    with pytest.raises(
        UserError, match=r"learning_rate=0.01, now 0.002, train.batch_tokens=512, now 256; add --change"
    ):
        run_train(changed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "train", interrupt)
        run_train(changed, change=True)
    assert run_train(changed)["step"] == 6 + 9  # consent was given, and 166 - 6 * 16 rows are left
    said = capfd.readouterr().err
    assert "from step 6: optimizer.learning_rate 0.01 -> 0.002\n" in said
    assert "from step 6: train.batch_tokens 512 -> 256\n" in said
    assert "step 7 has learning rate 0.002; the run ends at step 15" in said
    plan = json.loads((folder / "run" / "run.json").read_text())["plan"]
    assert metrics(folder / "run")[-1][:2] == (15, plan["tokens"]) and plan["steps"] == 15


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_consent_to_nothing_changes_nothing(folder: Path) -> None:
    shutil.copytree(folder / "run", folder / "whole")
    forget(folder / "run", 6)
    assert run_train(recipe(folder), change=True)["step"] == 11
    same_weights(folder / "run", folder / "whole", 11)
    assert metrics(folder / "run") == metrics(folder / "whole")
    assert history(folder / "run") == history(folder / "whole")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"model": {"layers": 1}}, r"model.layers=2, now 1; .* \(a run keeps its model; model.from starts another"),
        ({"data": {"seed": 1}}, r"data.seed=0, now 1; .* \(the order of rows follows from it"),
        ({"data": {"seq_len": 16}}, r"data.seq_len=32, now 16"),
        ({"optimizer": {"name": "sgd"}}, r"optimizer.name='adamw', now 'sgd'"),
        ({"train": {"seed": 2}}, r"train.seed=0, now 2; .* \(the weights were drawn with it"),
        ({"data": {"sources": [{"name": "b", "path": "RAW", "epochs": 2}]}}, r"data.sources=\['raw'\], now \[\]"),
    ],
)
def test_what_never_changes_is_refused_with_the_reason(folder: Path, blocks: dict[str, Any], message: str) -> None:
    if "sources" in blocks.get("data", {}):
        blocks = {"data": {"sources": [blocks["data"]["sources"][0] | {"path": str(folder / "raw")}]}}
    with pytest.raises(UserError, match=f"its checkpoint at step 11 was made with {message}"):
        run_train(recipe(folder, **blocks), change=True)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"schedule": "wsd", "decay_start": 5, "decay_steps": 9}, "from step 5 to 14, .* the plan at 11"),
        ({"schedule": "wsd", "decay_start": 1, "decay_steps": 3}, "from step 1 to 4, but the warm-up ends at step 2"),
    ],
)
def test_a_decay_outside_the_plan_is_refused(folder: Path, optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_train(recipe(folder, "other", optimizer=optimizer))


def test_a_new_source_is_a_change_of_its_tokens_alone(corpora: Path) -> None:
    before, now = (
        {"data": plan_of(corpora, "concat", 2, asked).identity} for asked in ({"a": 50}, {"a": 50, "b": 1000})
    )
    changed = find_changes(before, now)
    assert changed == {"tokens of source 'b'": [0, 1000]}
    assert change_lines(3, changed) == ["from step 3: tokens of source 'b' 0 -> 1,000"]
    assert list(find_changes(now, before))[0] == "data.sources"


def test_a_new_source_is_refused_where_documents_are_held_out(corpora: Path) -> None:
    """A new source may hold copies of texts that are trained on, so another document would be held out."""
    before, now = (
        {"data": plan_of(corpora, "concat", 2, asked).identity | {"held_out_share": 0.1}, "model": {}}
        for asked in ({"a": 50}, {"a": 50, "b": 1000})
    )
    data = DataSettings.model_validate({"seq_len": 16, "sources": [{"name": "a", "path": "a", "tokens": 50}]})
    with pytest.raises(UserError) as refused:
        accept_changes(corpora, 3, before, now, data, consent=True)
    assert "data.sources=['a'], now ['a', 'b']; set another run_dir, or restore the old value" in str(refused.value)
    assert "data.held_out_share: which documents are held out would change with a new source" in str(refused.value)


@pytest.mark.parametrize(
    ("start", "blocks", "line"),
    [
        (None, {}, "starting from new weights"),
        (None, {"model": {"from": "hf"}}, "starting from the weights of model.from hf"),
        (9, {}, "resuming from step 9 of run"),
        (9, {"model": {"from": "hf"}}, "resuming from step 9 of run; the weights of model.from are not read"),
        (9, {"model": {"from": "hf"}, "train": {"branch_from": "b"}},
         "resuming from step 9 of run; the weights of model.from and train.branch_from are not read"),
    ],
)  # fmt: skip
def test_the_first_line_says_what_is_read(start: int | None, blocks: dict[str, Any], line: str) -> None:
    record = CheckpointRecord(start, 0, "", {}) if start else None
    asked = recipe_of(**blocks)
    if "model" in blocks:
        asked = asked.model_copy(update={"model": asked.model.model_copy(update={"from_": "hf"})})
    assert start_line(Start(Path("run"), record, []), asked) == line
