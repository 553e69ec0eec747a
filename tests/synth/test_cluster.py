"""`executor: ray`: the groups and bytes of one engine, whatever becomes of the actors."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from extras import need
from synthkit import descendants, settings, shard_bytes

from ipt_jax.core.errors import Fault, UserError
from synth.generate import ray_workers
from synth.generate.run import run_synth

CHANGES: dict[str, Any] = {"texts": 150, "groups_per_shard": 10}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = need("ray", extra="ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.extra
def test_ray_gives_the_bytes_of_one_engine(tmp_path: Path, ray: Any) -> None:
    faults = {"malformed": 0.2, "error": 0.1}
    here = settings(tmp_path, synthesizer__faults=faults, groups_per_shard=2, output=str(tmp_path / "here"))
    there = here.model_copy(update={"output": str(tmp_path / "there"), "executor": "ray"})
    expected, result = run_synth(here), run_synth(there)
    assert shard_bytes(there.output) == shard_bytes(here.output)
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.extra
def test_killed_actor_costs_its_unfinished_groups_only(
    tmp_path: Path, ray: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run_synth(here := settings(tmp_path, **CHANGES, output=str(tmp_path / "here")))
    there = settings(tmp_path, **CHANGES, synthesizer__faults={"latency_seconds": 0.1}, executor="ray")
    kept: list[int] = []

    def kill_one() -> None:
        while not (journals := [*Path(there.output).glob("spool/*.spool")]) or not max(map(size, journals)):
            time.sleep(0.01)
        kept.append(sum(map(size, journals)))
        descendants(os.getpid(), "ray::Worker")[0].kill()

    killer = Thread(target=kill_one)
    killer.start()
    with caplog.at_level(logging.WARNING):
        result = run_synth(there)
    killer.join()
    assert kept[0] > 0
    assert caplog.text.count("another is started") == 1 and "lost engine 1 at shard" in caplog.text
    assert shard_bytes(there.output) == shard_bytes(here.output)
    assert result["texts"] == 150


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.extra
def test_engine_that_dies_in_its_actor_is_replaced(tmp_path: Path, ray: Any, caplog: pytest.LogCaptureFixture) -> None:
    run_synth(here := settings(tmp_path, **CHANGES, output=str(tmp_path / "here")))
    dying = settings(tmp_path, **CHANGES, synthesizer__faults={"dies_at": 60}, executor="ray")
    run_synth(dying)
    assert "the scripted engine died (faults.dies_at)" in caplog.text
    assert shard_bytes(dying.output) == shard_bytes(here.output)


@pytest.mark.extra
def test_actors_that_only_die_end_the_run(tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "LOSSES", 1)
    dying = settings(tmp_path, **CHANGES, synthesizer__faults={"dies_at": 1}, executor="ray")
    with pytest.raises(Fault, match=r"3 engines were lost, the last 3 in a row .*0 of 150 texts are stored"):
        run_synth(dying)
    assert run_synth(settings(tmp_path, **CHANGES))["texts"] == 150


@pytest.mark.extra
def test_corpus_that_changes_stops_the_actors(tmp_path: Path, ray: Any) -> None:
    run_synth(here := settings(tmp_path, **CHANGES, output=str(tmp_path / "here")))
    there = settings(tmp_path, **CHANGES, synthesizer__faults={"latency_seconds": 0.05}, executor="ray")
    corpus = tmp_path / "corpus.jsonl"
    kept = corpus.read_bytes()

    def change() -> None:
        while not (journals := [*Path(there.output).glob("spool/*.spool")]) or not max(map(size, journals)):
            time.sleep(0.01)
        corpus.write_bytes(kept.replace(b"river", b"RIVER"))

    changer = Thread(target=change)
    changer.start()
    with pytest.raises(UserError, match=r"corpus\.jsonl: changed since the run began"):
        run_synth(there)
    changer.join()
    corpus.write_bytes(kept)
    assert run_synth(there)["texts"] == 150
    assert shard_bytes(there.output) == shard_bytes(here.output)
