"""Rows written out in full, and batches that depend on the step alone: not on hosts, threads or where a run stopped."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from token_shards import random_documents, write_tokens

from ipt_jax.corpus.settings import UserError
from ipt_jax.data.loader import batches
from ipt_jax.data.plan import Plan, build_plan
from ipt_jax.data.settings import DataSettings


def tiny_plan(tmp_path: Path, packing: str) -> Plan:
    """One raw document of five tokens, one task of seven, of which tokens 3 to 4 and the EOS are targets."""
    write_tokens(tmp_path / "raw", [[1, 11, 12, 13, 2]])
    write_tokens(tmp_path / "task", [[1, 21, 22, 23, 24, 25, 2]], kind="task", loss_runs=[[(3, 5), (6, 7)]])
    sources = [{"name": name, "path": str(tmp_path / name), "epochs": 1} for name in ("raw", "task")]
    data = DataSettings.model_validate({"seq_len": 8, "packing": packing, "sources": sources})
    return build_plan(data, rows_per_step=2)


def check(row: dict[str, np.ndarray], **expected: str) -> None:
    for name, text in expected.items():
        assert row[name].tolist() == [int(word) for word in text.split()], name
    assert all(array.dtype == (bool if name == "loss_mask" else np.int32) for name, array in row.items())


def test_rows_of_concat(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, "concat")
    assert (plan.rows, plan.steps, plan.tokens) == (2, 1, 12)
    check(
        plan.row(0),
        tokens="1 11 12 13 2 1 21 22",
        targets="11 12 13 2 0 21 22 23",
        loss_mask="1 1 1 1 0 0 0 1",
        segment_ids="1 1 1 1 1 2 2 2",
        positions="0 1 2 3 4 0 1 2",
        kinds="1 1 1 1 1 3 3 3",
    )
    check(
        plan.row(1),
        tokens="23 24 25 2 0 0 0 0",
        targets="24 25 2 0 0 0 0 0",
        loss_mask="1 0 1 0 0 0 0 0",
        segment_ids="1 1 1 1 0 0 0 0",
        positions="0 1 2 3 0 0 0 0",
        kinds="3 3 3 3 0 0 0 0",
    )


def test_rows_of_best_fit(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, "best_fit")
    check(
        plan.row(0),
        tokens="1 11 12 13 2 0 0 0",
        targets="11 12 13 2 0 0 0 0",
        loss_mask="1 1 1 1 0 0 0 0",
        segment_ids="1 1 1 1 1 0 0 0",
        positions="0 1 2 3 4 0 0 0",
        kinds="1 1 1 1 1 0 0 0",
    )
    check(
        plan.row(1),
        tokens="1 21 22 23 24 25 2 0",
        targets="21 22 23 24 25 2 0 0",
        loss_mask="0 0 1 1 0 1 0 0",
        segment_ids="1 1 1 1 1 1 1 0",
        positions="0 1 2 3 4 5 6 0",
        kinds="3 3 3 3 3 3 3 0",
    )


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_long_documents_keep_their_targets_across_rows(tmp_path: Path, packing: str) -> None:
    (document,) = random_documents([21])
    write_tokens(tmp_path / "raw", [document], loss_runs=[[(1, 8), (9, 17), (20, 21)]])
    sources = [{"name": "raw", "path": str(tmp_path / "raw"), "epochs": 1}]
    plan = build_plan(
        DataSettings.model_validate({"seq_len": 8, "packing": packing, "sources": sources}), rows_per_step=1
    )
    rows = plan.batch(range(3))
    assert rows["targets"].ravel()[:20].tolist() == document[1:]
    wanted = [at for at in range(20) if at + 1 not in (8, 17, 18, 19)]
    assert np.flatnonzero(rows["loss_mask"].ravel()).tolist() == wanted


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("mix")
    draw = np.random.default_rng(0)
    for seed, kind in enumerate(("raw", "augmented", "task")):
        lengths = np.clip(draw.lognormal(4, 1, 400), 2, 900).astype(int).tolist()
        write_tokens(root / kind, random_documents(lengths, seed), kind=kind, shards=3)  # type: ignore[arg-type]
    sources = [
        {"name": "raw", "path": str(root / "raw")},
        {"name": "augmented", "path": str(root / "augmented"), "share": 0.25},
        {"name": "tasks", "path": str(root / "task"), "epochs": 1.5},
    ]
    data = DataSettings.model_validate({"seq_len": 64, "tokens": 90_000, "sources": sources})
    return build_plan(data, rows_per_step=8)


def hashes(plan: Plan, *, start: int, hosts: int) -> list[str]:
    """One hash a global batch, put together from what each host loads."""
    streams = [batches(plan, start_step=start, rows_per_step=8, host=host, hosts=hosts) for host in range(hosts)]
    found = []
    for parts in zip(*streams, strict=True):
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        found.append(hashlib.sha256(b"".join(joined[name].tobytes() for name in sorted(joined))).hexdigest())
    return found


def test_hosts_and_stops_change_no_batch(plan: Plan) -> None:
    whole = hashes(plan, start=0, hosts=1)
    assert len(whole) == plan.steps == len(set(whole)) > 170
    for hosts in (2, 4, 8):
        assert hashes(plan, start=0, hosts=hosts) == whole
    assert hashes(plan, start=97, hosts=2) == whole[97:]
    assert hashes(plan, start=plan.steps, hosts=1) == []


def test_the_last_batch_is_filled_with_padding(plan: Plan) -> None:
    (last,) = batches(plan, start_step=plan.steps - 1, rows_per_step=8)
    real = plan.rows - (plan.steps - 1) * 8
    assert last["tokens"].shape == (8, 64) and 0 < real < 8
    assert not any(array[real:].any() for array in last.values())


def test_the_whole_plan_gives_its_tokens(plan: Plan) -> None:
    kinds = np.concatenate([batch["kinds"].ravel() for batch in batches(plan, start_step=0, rows_per_step=8)])
    counted = np.bincount(kinds, minlength=4)[1:4].tolist()
    assert counted == [source["tokens"] for source in plan.summary()["sources"]]
    assert sum(counted) == plan.tokens == 90_000


def test_mistakes_and_damage_after_planning(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 rows cannot be shared by 3 hosts"):
        batches(plan, start_step=0, rows_per_step=8, hosts=3)
    write_tokens(tmp_path / "raw", random_documents([5000] * 40))
    data = DataSettings.model_validate(
        {"seq_len": 64, "sources": [{"name": "r", "path": str(tmp_path / "raw"), "epochs": 1}]}
    )
    made = build_plan(data, rows_per_step=8)
    shard = tmp_path / "raw" / made.sources[0].manifest.shards[0].name
    content = bytearray(shard.read_bytes())
    content[1000 : len(content) // 2] = bytes(len(content) // 2 - 1000)
    shard.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        list(batches(made, start_step=0, rows_per_step=8))
