"""Rows written out in full, and batches that depend on the step alone: not on hosts, threads or where a run stopped."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from extras import ROOT
from token_shards import random_documents, row_fields, row_pieces, write_tokens

from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import Manifest
from ipt_jax.corpus.records import TokenPage, decode
from ipt_jax.data.loader import batches
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan
from ipt_jax.data.token_reader import PageSpan, TokenReader
from ipt_jax.data.token_shards import open_token_shards


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
        row_fields(plan, 0),
        tokens="1 11 12 13 2 1 21 22",
        targets="11 12 13 2 0 21 22 23",
        loss_mask="1 1 1 1 0 0 0 1",
        segment_ids="1 1 1 1 1 2 2 2",
        positions="0 1 2 3 4 0 1 2",
        kinds="1 1 1 1 1 3 3 3",
    )
    check(
        row_fields(plan, 1),
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
        row_fields(plan, 0),
        tokens="1 11 12 13 2 0 0 0",
        targets="11 12 13 2 0 0 0 0",
        loss_mask="1 1 1 1 0 0 0 0",
        segment_ids="1 1 1 1 1 0 0 0",
        positions="0 1 2 3 4 0 0 0",
        kinds="1 1 1 1 1 0 0 0",
    )
    check(
        row_fields(plan, 1),
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipt_jax.data.token_shards.PAGE_TOKENS", 256)
        for seed, kind in enumerate(("raw", "augmented", "task")):
            lengths = np.clip(draw.lognormal(4, 1, 500), 2, 900).astype(int).tolist()
            write_tokens(root / kind, random_documents(lengths, seed), kind=kind, shards=3)  # type: ignore[arg-type]
    sources = [
        {"name": "raw", "path": str(root / "raw")},
        {"name": "augmented", "path": str(root / "augmented"), "share": 0.25},
        {"name": "tasks", "path": str(root / "task"), "epochs": 1.5},
    ]
    data = DataSettings.model_validate({"seq_len": 64, "tokens": 110_000, "sources": sources})
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
    """Steps 0 to 200; then a stop at step 97 on four hosts, gone on with on two."""
    whole = hashes(plan, start=0, hosts=1)
    assert len(whole) == plan.steps == len(set(whole)) > 200
    for hosts in (2, 4, 8):
        assert hashes(plan, start=0, hosts=hosts) == whole
    assert hashes(plan, start=0, hosts=4)[:97] + hashes(plan, start=97, hosts=2) == whole
    assert hashes(plan, start=plan.steps, hosts=1) == []


def test_a_host_reads_the_pages_of_its_rows_alone(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[tuple[Path, int]] = set()
    read_span = TokenReader._read_span

    def noted(self: TokenReader, low: int, high: int) -> PageSpan:
        read.update((self._paths[0], page) for page in range(low, high))
        return read_span(self, low, high)

    monkeypatch.setattr(TokenReader, "_read_span", noted)
    fresh = build_plan(plan.settings, rows_per_step=8)  # has read nothing yet
    steps = list(batches(fresh, start_step=plan.steps - 20, rows_per_step=8, host=3, hosts=4))
    rows = [step * 8 + slot for step in range(plan.steps - 20, plan.steps) for slot in (6, 7)]
    wanted = set()
    for piece in (piece for row in rows for piece in row_pieces(plan, row)):
        shards = open_token_shards(plan.sources[piece.source].path)
        held = np.cumsum([len(decode(record, TokenPage).ids) for record in shards])  # documents up to each page
        wanted.add((shards.paths[0], int(np.searchsorted(held, piece.record, side="right"))))
    assert read == wanted
    assert len(steps) == 20 and 1 < len(read) < sum(source.manifest.records for source in plan.sources)


def test_the_last_batch_is_filled_with_padding(plan: Plan) -> None:
    (last,) = batches(plan, start_step=plan.steps - 1, rows_per_step=8)
    real = plan.rows - (plan.steps - 1) * 8
    assert last["tokens"].shape == (8, 64) and 0 < real < 8
    assert not any(array[real:].any() for array in last.values())


def test_the_whole_plan_gives_its_tokens(plan: Plan) -> None:
    kinds = np.concatenate([batch["kinds"].ravel() for batch in batches(plan, start_step=0, rows_per_step=8)])
    counted = np.bincount(kinds, minlength=4)[1:4].tolist()
    assert counted == [source["tokens"] for source in plan.summary()["sources"]]
    assert sum(counted) == plan.tokens == 110_000


def test_a_batch_must_split_evenly(plan: Plan) -> None:
    with pytest.raises(UserError, match="8 rows cannot be shared by 3 hosts"):
        batches(plan, start_step=0, rows_per_step=8, hosts=3)


def test_a_row_alone_is_that_of_the_batch(plan: Plan) -> None:
    rows = [3, 4, 5, plan.rows - 1, 700, plan.rows, 0]
    for by_block in (False, True):
        together = plan.batch(rows, by_block=by_block)
        for slot, row in enumerate(rows):
            assert all((values == together[name][slot]).all() for name, values in row_fields(plan, row).items())


# ---- damage


def damaged(root: Path, how: str) -> str:
    """Damages the second of two shards; returns its name."""
    names = [f"tokens-{shard:05d}-of-00002.array_record" for shard in range(2)]
    first, second = (root / "raw" / name for name in names)
    data = bytearray(second.read_bytes())
    assert len(data) == first.stat().st_size
    match how:
        case "truncated":
            second.write_bytes(data[:-4096])
        case "byte flipped":
            data[20_000] ^= 1
            second.write_bytes(data)
        case "deleted":
            second.unlink()
        case "another's copy":
            second.write_bytes(first.read_bytes())
        case "doubled":
            second.write_bytes(data + data)
    return names[1]


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("how", ["truncated", "byte flipped", "deleted", "another's copy", "doubled"])
def test_no_damaged_record_is_trained_on(tmp_path: Path, how: str, hosts: int) -> None:
    """Found when planning by size, or when the record is read, and then named; either way before a batch holds it."""
    write_tokens(tmp_path / "raw", random_documents([300] * 200), shards=2)
    source = {"name": "r", "path": str(tmp_path / "raw"), "epochs": 1}
    data = DataSettings.model_validate({"seq_len": 64, "sources": [source]})
    planned = build_plan(data, rows_per_step=8)
    name = damaged(tmp_path, how)
    late = how in ("byte flipped", "another's copy")
    with pytest.raises(UserError, match=f"{name}: record [0-9]+ .*is damaged" if late else name):
        list(batches(build_plan(data, rows_per_step=8), start_step=0, rows_per_step=8, hosts=hosts))
    with pytest.raises(UserError, match=name):  # the same after a plan that was made before
        list(batches(planned, start_step=0, rows_per_step=8, hosts=hosts))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["identity"].update(tokenizer="x"), "its fingerprint"),
        (lambda m: m.update(tokens=m["tokens"] + 1), "its tokens are not the sum"),
        (lambda m: m["shards"].append(m["shards"][0]), "not those of one run"),
        (lambda m: m["shards"].reverse(), "not those of one run"),
        (lambda m: m["shards"].pop(), "not those of one run"),
        (lambda m: m["shards"][0].update(bytes=5), "tokens-00000-of-00002.array_record: .* bytes, the manifest says 5"),
        (lambda m: (m["shards"][0].update(tokens=301), m.update(tokens=601)), "tokens-00000-of-00002.index.npy"),
        (lambda m: m["summary"]["side_files"].clear(), "tokens-00000-of-00002.index.npy"),
        (lambda m: m.update(complete=False), "has not finished"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, edit: Callable[[dict], None], message: str) -> None:
    write_tokens(tmp_path / "raw", random_documents([300] * 2), shards=2)
    source = {"name": "r", "path": str(tmp_path / "raw"), "epochs": 1}
    data = DataSettings.model_validate({"seq_len": 64, "sources": [source]})
    build_plan(data, rows_per_step=8)
    file = tmp_path / "raw" / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: was edited \(checksum mismatch\)"):
        build_plan(data, rows_per_step=8)
    edited = msgspec.json.decode(file.read_bytes(), type=Manifest)  # by a tool that updates the checksum too
    edited.checksum = edited.digest()
    file.write_bytes(msgspec.json.encode(edited))
    with pytest.raises(UserError, match=message):
        build_plan(data, rows_per_step=8)


def test_an_index_that_changed_after_planning_is_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "raw", random_documents([300] * 50))
    source = {"name": "r", "path": str(tmp_path / "raw"), "epochs": 1}
    data = DataSettings.model_validate({"seq_len": 64, "sources": [source]})
    build_plan(data, rows_per_step=8)
    (file,) = (tmp_path / "raw").glob("*.index.npy")
    index = np.load(file)
    index["tokens"][7] = 299
    np.save(file, index)
    with pytest.raises(UserError, match="the index of records 7 to 7 has changed"):
        build_plan(data, rows_per_step=8).batch([0])


# ---- memory

FLAT = """
import sys
from pathlib import Path
from ipt_jax.data.loader import batches
from ipt_jax.data.plan import build_plan
from ipt_jax.data.mixture import DataSettings

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

source = {"name": "r", "path": sys.argv[1], "epochs": 60}
plan = build_plan(DataSettings.model_validate({"seq_len": 256, "sources": [source]}), rows_per_step=16)
assert plan.rows > 20_000
for step, batch in enumerate(batches(plan, start_step=0, rows_per_step=16), start=1):
    if step == 400:
        early = resident()
print(resident() - early)
"""


def test_memory_is_flat_over_twenty_thousand_rows(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 420).tolist()
    write_tokens(tmp_path / "raw", random_documents(lengths), shards=3)
    command = [sys.executable, "-c", FLAT, str(tmp_path / "raw")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 60 << 20
