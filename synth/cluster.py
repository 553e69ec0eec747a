"""`executor: ray`: one engine a Ray actor, a shard at a time, on the cluster of RAY_ADDRESS or on this machine alone.

An actor takes the GPUs of one engine where the cluster has any (`tensor_parallel_size` of them), else one CPU. It fills
the shard's spool; the driver seals. Groups and bytes are those of `executor: local`. Corpus, model and output must lie
on a file system that all nodes share. An actor that dies ends the run; what is spooled stays for the next.
"""

import os
from pathlib import Path
from typing import Any

from ipt_jax.corpus.progress import Progress
from ipt_jax.corpus.records import SynthGroup, encode
from ipt_jax.corpus.settings import UserError
from synth.chain import Chain
from synth.config import RunSettings
from synth.drive import drive
from synth.engine import Engine, open_engine
from synth.grouping import Group
from synth.spool import Spool
from synth.store import Store
from synth.worklist import WorkList, form_groups


def with_absolute_paths(settings: RunSettings) -> RunSettings:
    """Actors have a working directory of their own."""
    corpus = settings.corpus.model_copy(update={"path": os.path.abspath(settings.corpus.path)})
    synthesizer = settings.synthesizer.model_copy(update={"model": os.path.abspath(settings.synthesizer.model)})
    changed = {"corpus": corpus, "synthesizer": synthesizer, "output": os.path.abspath(settings.output)}
    return settings.model_copy(update=changed)


class Worker:
    """An engine and the work list, by which the corpus is read from each shard's own place on."""

    def __init__(self, settings: RunSettings, chain: Chain, work: WorkList) -> None:
        self.settings, self.chain, self.work = settings, chain, work
        self.engine: Engine | None = None

    async def fill(self, shard: int, path: Path) -> int:
        """Completes the shard's spool; returns the shard."""
        if self.engine is None:
            self.engine = open_engine(self.settings.synthesizer, self.chain.tokenizer)
        first = shard * self.settings.groups_per_shard
        spool = Spool(path)

        def put(group: Group, answer: SynthGroup) -> None:
            spool.append(group.number - first, encode(answer))

        groups = form_groups(self.settings, self.chain.tokenizer, self.work, [shard])
        missing = (group for group in groups if group.number - first not in spool)
        try:
            await drive(self.engine, self.chain, missing, put, self.settings.synthesizer.max_num_seqs)
        finally:
            spool.close()
        return shard

    async def close(self) -> None:
        if self.engine is not None:
            await self.engine.close()


def fill_with_ray(settings: RunSettings, chain: Chain, store: Store) -> None:
    """Hands the open shards to actors, each the next when it is done with one, and seals what comes back."""
    ray = connect()
    store.release()
    shards = iter(store.open_shards)
    workers = start_workers(ray, settings, chain, store.survey, len(store.open_shards))
    running = {worker.fill.remote(first := next(shards), store.spool_path(first)): worker for worker in workers}
    with Progress(store.survey.texts, "texts", "synth run", done=store.counts["texts"]) as progress:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            worker = running.pop(done)
            before = store.counts["texts"]
            store.resume(finished(ray, done))
            progress.advance(store.counts["texts"] - before, pairs=store.counts["pairs"], engines=len(workers))
            if (shard := next(shards, None)) is not None:
                running[worker.fill.remote(shard, store.spool_path(shard))] = worker
    ray.get([worker.close.remote() for worker in workers])


def finished(ray: Any, reference: Any) -> int:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None


def start_workers(ray: Any, settings: RunSettings, chain: Chain, work: WorkList, shards: int) -> list[Any]:
    """As many actors as the cluster has places for an engine, at most one a shard."""
    found = ray.cluster_resources()
    kind = "GPU" if found.get("GPU") and settings.synthesizer.engine != "scripted" else "CPU"
    each = settings.synthesizer.tensor_parallel_size if kind == "GPU" else 1
    places = int(found.get(kind, 0)) // each
    if not places:
        raise UserError(f"executor ray: {found.get(kind, 0)} {kind}s in the cluster, an engine takes {each}; add nodes")
    resources = {"num_gpus": each} if kind == "GPU" else {"num_cpus": each}
    actor = ray.remote(**resources)(Worker)
    listed = ray.put(work)
    return [actor.remote(settings, chain, listed) for _ in range(min(places, shards))]


def connect() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("executor ray: Ray is not installed; launch/setup.sh ray, or use executor: local") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray
