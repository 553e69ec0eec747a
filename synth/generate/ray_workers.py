"""`executor: ray`: one engine per Ray actor, on the cluster of RAY_ADDRESS or on this machine.

An actor takes `tensor_parallel_size` GPUs if the cluster has any, else one CPU. It fills the journal of one shard at a
time; the driver seals it. Groups and bytes are those of `executor: local`. Corpus, model and output must be on a file
system that all nodes share.

An actor that is lost, alone or with its node, costs its unfinished groups: another actor takes over the journal of its
shard when the lock on it is free. Each loss is reported; too many in a row without a finished shard end the run.
"""

import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.core.executor import connect_ray
from ipt_jax.corpus.paths import is_remote
from ipt_jax.corpus.records import SynthGroup, encode
from synth.config import RunSettings
from synth.engine import open_engine
from synth.engine.base import HUB, Engine, EngineDied
from synth.generate.few_shot import Chain
from synth.generate.group_store import GroupStore, show_progress
from synth.generate.journal import Journal
from synth.generate.scheduler import run_groups
from synth.generate.work_list import WorkList, form_groups
from synth.groups import Group

LOSSES = 3  # in a row, per engine: a lost node takes all of its engines with it
LOST_LOCK_SECONDS = 150.0  # a node that is cut off ends its actors, and their locks, after a minute
log = logging.getLogger(__name__)


def with_absolute_paths(settings: RunSettings) -> RunSettings:
    """With `executor: ray`: actors have another working directory."""
    if settings.executor != "ray":
        return settings
    corpus = [
        one
        if is_remote(one.path) or one.path.startswith(HUB)
        else one.model_copy(update={"path": os.path.abspath(one.path)})
        for one in settings.corpus
    ]
    given = settings.synthesizer.model_dump(include={"model", "lora", "prompt_file"})
    absolute = {name: os.path.abspath(path) for name, path in given.items() if path and not path.startswith(HUB)}
    synthesizer = settings.synthesizer.model_copy(update=absolute)
    changed = {"corpus": corpus, "synthesizer": synthesizer, "output": os.path.abspath(settings.output)}
    return settings.model_copy(update=changed)


class Worker:
    """An actor: an engine and the work list, from which it reads the texts of a shard."""

    def __init__(self, settings: RunSettings, chain: Chain, work: WorkList) -> None:
        self.settings, self.chain, self.work = settings, chain, work
        self.engine: Engine | None = None

    def is_up(self) -> None:
        """Returns when the actor has started."""

    async def fill(self, shard: int, path: Path) -> int:
        """Completes the shard's journal; returns the shard."""
        if self.engine is None:
            self.engine = open_engine(self.settings.synthesizer, self.chain.tokenizer)
        first = shard * self.settings.groups_per_shard
        journal = Journal(path, LOST_LOCK_SECONDS)

        def put(group: Group, answer: SynthGroup) -> None:
            journal.append(group.number - first, encode(answer))

        groups = form_groups(self.settings, self.chain.tokenizer, self.work, [shard])
        missing = (group for group in groups if group.number - first not in journal)
        try:
            await run_groups(self.engine, self.chain, missing, put)
        finally:
            journal.close()
        return shard


def fill_with_ray(settings: RunSettings, chain: Chain, store: GroupStore) -> None:
    """Fills the open shards with actors, one shard at a time each, and seals them."""
    ray = connect_ray()
    store.release()
    crew = WorkerPool(ray, settings, chain, store)
    try:
        with show_progress(store, engines=crew.size) as refresh:
            while crew.is_busy:
                if (shard := crew.next_done()) is not None:
                    store.resume(shard)
                    refresh()
    finally:
        crew.end()


class WorkerPool:
    """Actors with an engine each and the shards that they fill. Lost actors are replaced."""

    def __init__(self, ray: Any, settings: RunSettings, chain: Chain, store: GroupStore) -> None:
        self.ray, self.settings, self.chain, self.store = ray, settings, chain, store
        self.shards = deque(store.open_shards)
        resources, places = engine_places(ray, settings)
        self.actor, self.work = ray.remote(**resources)(Worker), ray.put(store.work_list)
        self.size = min(places, len(self.shards))
        self.lost = self.lost_in_a_row = 0
        self.running: dict[Any, tuple[Any, int | None]] = {}  # by pending call: the actor, its shard
        for _ in range(self.size):
            self._start()

    @property
    def is_busy(self) -> bool:
        """Whether shards are open. Actors that have not started are not waited for."""
        return bool(self.shards) or any(shard is not None for _, shard in self.running.values())

    def _start(self) -> None:
        actor = self.actor.remote(self.settings, self.chain, self.work)
        self.running[actor.is_up.remote()] = (actor, None)

    def next_done(self) -> int | None:
        """Waits for an actor and assigns it a shard. Returns the shard that it has filled, if any."""
        (done,), _ = self.ray.wait(list(self.running), num_returns=1)
        actor, shard = self.running.pop(done)
        try:
            self.ray.get(done)
        except self.ray.exceptions.RayActorError as error:
            self._replace(actor, shard, error)
            return None
        except self.ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, EngineDied) or self.settings.synthesizer.engine == "openai":
                raise error.cause from None  # without Ray's traceback
            self._replace(actor, shard, error.cause)
            return None
        if shard is not None:
            self.lost_in_a_row = 0
        self._assign(actor)
        return shard

    def _assign(self, actor: Any) -> None:
        if self.shards:
            shard = self.shards.popleft()
            self.running[actor.fill.remote(shard, self.store.journal_path(shard))] = (actor, shard)
        else:  # makes room for one that takes over a lost shard; the watchdog ends the engine's processes
            self.ray.kill(actor)

    def _replace(self, actor: Any, shard: int | None, error: Exception) -> None:
        """Starts another actor. The lost one's shard is next."""
        self.lost += 1
        self.lost_in_a_row += 1
        if shard is not None:
            self.shards.appendleft(shard)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if self.lost_in_a_row > LOSSES * self.size:
            raise EngineDied(f"{self.lost} engines were lost, the last {self.lost_in_a_row} in a row ({reason})")
        where = "without a shard" if shard is None else f"at shard {shard}"
        log.warning("lost engine %d %s, another is started: %s", self.lost, where, reason)
        self.ray.kill(actor)  # it may be alive on a node that is cut off
        self._start()

    def end(self) -> None:
        for actor, _ in self.running.values():
            self.ray.kill(actor)


def engine_places(ray: Any, settings: RunSettings) -> tuple[dict[str, int], int]:
    """The resources of one engine, and the number of engines that the cluster can run."""
    found = ray.cluster_resources()
    kind = "GPU" if found.get("GPU") and settings.synthesizer.engine not in ("scripted", "openai") else "CPU"
    each = settings.synthesizer.tensor_parallel_size if kind == "GPU" else 1
    places = int(found.get(kind, 0)) // each
    if not places:
        raise UserError(f"executor ray: {found.get(kind, 0)} {kind}s in the cluster, an engine needs {each}; add nodes")
    return ({"num_gpus": each} if kind == "GPU" else {"num_cpus": each}), places
