"""The driver on the scripted engine: how many groups at once, who goes first, what a signal or an error leaves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthkit import settings, write_tokenizer

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Document, Segment, SynthGroup
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth.config import FaultSettings, SynthesizerSettings
from synth.engine.base import Completion, GenerationRequest
from synth.engine.scripted import ScriptedEngine
from synth.generate.few_shot import Chain
from synth.generate.run import run_synth
from synth.generate.scheduler import in_flight, run_groups
from synth.groups import Group


class Watched(ScriptedEngine):
    """Remembers the requests in the order in which they were answered, and how many there were at once."""

    def __init__(self, folder: Path, places: int) -> None:
        faults = FaultSettings(latency_seconds=0.002)
        synthesizer = SynthesizerSettings(
            model="m", engine="scripted", max_model_len=2000, max_new_tokens=600, max_num_seqs=places, faults=faults
        )
        super().__init__(synthesizer, load_tokenizer(write_tokenizer(folder / "model")))
        self.chain = Chain(synthesizer, self.tokenizer, 0, [], "m", "w", "f")
        self.answered: list[str] = []
        self.asked = self.most = 0

    async def generate(self, request: GenerationRequest) -> Completion:
        self.asked += 1
        self.most = max(self.most, self.asked)
        try:
            completion = await super().generate(request)
        finally:
            self.asked -= 1
        self.answered.append(request.id.rpartition("/")[0])
        return completion


def groups(count: int, rounds: int) -> Iterator[Group]:
    for number in range(count):
        texts = [f"Anna walks to hill {number} and sees mill {place}." for place in range(rounds)]
        documents = [Document(f"{number}.{n}", "s", "raw", [Segment(text)]) for n, text in enumerate(texts)]
        yield Group(number, str(number), documents, [(0, len(text)) for text in texts])


def run(engine: Watched, work: Iterator[Group], put: Callable[[Group, SynthGroup], None]) -> None:
    asyncio.run(run_groups(engine, engine.chain, work, put))


def test_more_groups_than_places_and_no_more_read_than_that(tmp_path: Path) -> None:
    engine, read, stored = Watched(tmp_path, places=10), [0], list[int]()
    ahead = 0

    def reader() -> Iterator[Group]:
        nonlocal ahead
        for group in groups(60, rounds=2):
            read[0] += 1
            ahead = max(ahead, read[0] - len(stored))
            yield group

    run(engine, reader(), lambda group, _: stored.append(group.number))
    assert sorted(stored) == list(range(60))
    assert (engine.most, ahead) == (15, 15)


@pytest.mark.parametrize(("places", "expected"), [(1, 5), (8, 12), (64, 96)])
def test_groups_in_flight(places: int, expected: int) -> None:
    assert in_flight(places) == expected


def test_groups_that_go_on_are_served_before_those_that_begin(tmp_path: Path) -> None:
    """While a group's next prompt is built, the one place takes another's; the group then has the next turn."""
    engine = Watched(tmp_path, places=1)
    run(engine, groups(6, rounds=2), lambda *_: None)
    assert engine.answered == ["0/1", "1/1", "0/2", "1/2", "2/1", "3/1", "2/2", "3/2", "4/1", "5/1", "4/2", "5/2"]


def test_a_signal_keeps_what_is_whole_and_the_rest_can_be_done_later(tmp_path: Path) -> None:
    engine, stored = Watched(tmp_path, places=4), dict[int, int]()

    def put(group: Group, answer: SynthGroup) -> None:
        assert group.number not in stored
        stored[group.number] = len(answer.texts)
        if len(stored) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        run(engine, groups(40, rounds=3), put)
    assert 7 <= len(stored) < 40
    assert engine.asked == 0
    run(engine, (group for group in groups(40, rounds=3) if group.number not in stored), put)
    assert stored == dict.fromkeys(range(40), 3)


def test_an_engine_that_is_gone_ends_the_drive(tmp_path: Path) -> None:
    engine, stored = Watched(tmp_path, places=4), list[int]()

    async def dead(*_: Any, **__: Any) -> Completion:
        raise RuntimeError("the engine is gone")

    def put(group: Group, _: SynthGroup) -> None:
        stored.append(group.number)
        engine.generate = dead  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="the engine is gone"):
        run(engine, groups(40, rounds=2), put)
    assert 1 <= len(stored) < 40
    assert engine.asked == 0


@pytest.mark.parametrize("at_fault", ["reader", "writer"])
def test_a_fault_of_reader_or_writer_ends_the_drive(tmp_path: Path, at_fault: str) -> None:
    engine, stored = Watched(tmp_path, places=4), list[int]()

    def reader() -> Iterator[Group]:
        yield from groups(20, rounds=1)
        if at_fault == "reader":
            raise UserError("the corpus has vanished")
        yield from groups(20, rounds=1)

    def put(group: Group, _: SynthGroup) -> None:
        if at_fault == "writer" and len(stored) == 5:
            raise UserError("the disk is full")
        stored.append(group.number)

    with pytest.raises(UserError, match="vanished" if at_fault == "reader" else "full"):
        run(engine, reader(), put)
    assert len(set(stored)) == len(stored) < 20


def test_progress_tells_pairs_refusals_speed_and_the_caches_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_synth(settings(tmp_path, synthesizer__faults={"malformed": 0.5}))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("synth run: 30/30 texts (100%) in ")
    assert f" pairs {result['pairs']} pairs_per_text {result['pairs'] / 30:.2f} rejected " in last
    cached = result["cached_prompt_tokens"] / result["prompt_tokens"]
    assert f" cached {cached:.0%} new_tokens_per_second " in last
    reasons = re.findall(r"(\w+) (\d+)%", last.partition(" rejected ")[2].partition(" cached ")[0])
    most = sorted(result["rejected"].values(), reverse=True)[:3]
    written = result["pairs"] + sum(result["rejected"].values())
    assert [share for _, share in reasons] == [f"{100 * count / written:.0f}" for count in most]
    assert all(name in result["rejected"] for name, _ in reasons)
