"""`synth run`: generates SynthGroups from raw texts with a synthesizer, without a barrier between rounds.

Guaranteed: every group of the corpus is in the output exactly once, complete and in order, after any number of kills
and reruns. With the scripted engine the shards are byte-identical. A rerun resumes, returns the figures of a finished
output at once, and refuses other settings. Not guaranteed: equal bytes from vLLM, whose float sums depend on the batch.
"""

import asyncio
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.files import refuse_foreign, writing
from ipt_jax.core.hashing import FileHashCache
from ipt_jax.core.manifest import Manifest
from ipt_jax.core.stage import Output, format_counts
from ipt_jax.corpus.records import SynthGroup
from ipt_jax.corpus.sources import Corpus
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.engine import open_engine, synthesizer_identity, synthesizer_tokenizer
from synth.engine.base import Engine, EngineDied, EngineNotStarted
from synth.format.wire import FORMAT
from synth.generate.acceptance import Acceptance
from synth.generate.few_shot import RERUN, Chain, make_chain, seed_identity
from synth.generate.group_store import (
    DETAILS,
    RARE_DETAILS,
    GroupStore,
    failed_texts,
    first_new_shard,
    journals_before,
    next_shard,
    remove_failed,
    seal_journals,
    show_progress,
)
from synth.generate.ray_workers import fill_with_ray, with_absolute_paths
from synth.generate.scheduler import run_groups
from synth.generate.work_list import (
    Earlier,
    WorkList,
    corpus_states,
    form_groups,
    list_work,
    load_work,
    refuse_changes,
    save_work,
)
from synth.groups import Group, counts_under, rejection_counts
from synth.verify.verifier import VERSION, score_figures

WORK = "worklist"  # folder in the output: the work list, and digests of the files of corpus and model


def run_synth(settings: RunSettings, *, retry_failed: bool = False, extend: bool = False) -> dict[str, Any]:
    """Generates the missing groups; `retry_failed`: and the groups with a failed text. Returns the run's figures.

    `extend`: the corpus has more texts than that of the output; groups of the new ones are added. `seconds` are those
    of this call.
    """
    started = time.monotonic()
    refuse_output(Path(settings.output))
    fresh = not Path(settings.output).exists()
    settings = with_absolute_paths(settings)
    tokenizer = synthesizer_tokenizer(settings.synthesizer)
    hashes = FileHashCache(Path(settings.output) / WORK / "digests.json")
    corpus = Corpus(settings.corpus)
    states = corpus_states(corpus)  # before the files are hashed
    identity = run_identity(settings, corpus, tokenizer, hashes)
    chain = make_chain(settings, tokenizer, identity)
    acceptance = Acceptance(report)
    with open_output(settings, identity, corpus, extend) as output, withdrawn_if_empty(output, fresh):
        if not output.manifest.complete or output.extension or (retry_failed and output.manifest.summary["failed"]):
            if retry_failed:
                report(f"{remove_failed(output, settings.groups_per_shard):,} groups with failed texts are retried")
            with writing(output.path):
                work = open_work(settings, chain, output, corpus)
                work.states = states
                refuse_changes(states)  # a list of other contents than were hashed must not be stored
                save_work(output.path / WORK / "list.json", work)
                hashes.save()
            with closing(GroupStore(output, work, settings.groups_per_shard, acceptance)) as store:
                fill(settings, chain, store)
                store.remove_journals()
                refuse_failure(store.counts, chain.failures.last)
            output.finish(summarize(output.manifest, settings.synthesizer.engine))
        elif retry_failed or extend:
            report(
                "no text has failed; there is nothing to do" if retry_failed else "the corpus has no new files or rows"
            )
        summary = output.manifest.summary
    if failed := summary["failed"]:
        count = f"{sum(failed.values()):,} of {summary['texts']:,}"
        report(f"{count} texts failed ({format_counts(failed)}); rerun with --retry-failed to retry them")
    acceptance.judge(summary)
    return {**summary, "seconds": round(time.monotonic() - started, 3)}


def refuse_output(path: Path) -> None:
    """Raises UserError for an unusable output before the corpus is read."""
    found = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not os.path.isdir(found):
        raise UserError(f"output {path}: {found} is not a directory; use another path")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"output {path}: {found} cannot be written (its permissions); use another path")
    if found == path and not (path / "manifest.json").exists():
        refuse_foreign(path)


def report(line: str) -> None:
    print(f"synth run: {line}", file=sys.stderr)


def run_identity(settings: RunSettings, corpus: Corpus, tokenizer: Tokenizer, hashes: FileHashCache) -> dict[str, Any]:
    """What the groups depend on, by contents: neither paths nor settings that change only the speed."""
    return {
        "synthesizer": synthesizer_identity(settings.synthesizer, tokenizer, hashes),
        "format": FORMAT,
        "corpus": corpus.identity(hashes),
        **settings.model_dump(include={"drop_duplicates"}, exclude_defaults=True),
        "verify": settings.verify and {"scores": sorted(set(settings.verify)), "version": VERSION},
        "seed_examples": seed_identity(settings.seed_examples),
        **settings.model_dump(include={"rounds", "grouping", "long_texts", "seed", "groups_per_shard"}),
    }


def open_output(settings: RunSettings, identity: dict[str, Any], corpus: Corpus, extend: bool) -> Output:
    return Output(
        settings.output,
        stage="synth",
        identity=identity,
        shard_name="groups",
        inputs=corpus.inputs(),
        extend=extend,
        cure=", convert new texts with --extend",
    )


def open_work(settings: RunSettings, chain: Chain, output: Output, corpus: Corpus) -> WorkList:
    """The work list of the output, stored or new.

    An extension lists what the shards before it lack. These cannot be completed, as their corpus has changed: open ones
    are sealed with the groups that they hold. What a lost shard of them held is listed in a further extension.
    """
    path, first = output.path / WORK / "list.json", first_new_shard(output)
    corpus.restore(output.extension or output.manifest)
    work = None if output.extension else load_work(path, chain.fingerprint, first)
    earlier = Earlier(output, first, journals_before(output, first)) if first else None
    lost = work is None and next_shard(output) > first
    if output.extension or (earlier and (lost or earlier.open or (work and work.texts_before != len(earlier)))):
        first = next_shard(output)
        work = load_work(path, chain.fingerprint, first)  # a kill came before the extension began
        earlier = Earlier(output, first, journals_before(output, first))
        if work is None or work.texts_before != len(earlier):
            work = list_work(settings, chain.tokenizer, chain.fingerprint, corpus, earlier)
            save_work(path, work)
        output.begin_extension(first)
        seal_journals(output)
    if work is None:
        work = list_work(settings, chain.tokenizer, chain.fingerprint, corpus)
    work.files, work.earlier = corpus.files, earlier
    return work


@contextmanager
def withdrawn_if_empty(output: Output, fresh: bool) -> Iterator[None]:
    """After an error, empties an output that this call made and that holds no group, so that `Output` removes it.

    It would refuse the corrected settings.
    """
    try:
        yield
    except (UserError, Fault):
        if fresh and not output.entries and not any(file.stat().st_size for file in output.path.glob("spool/*")):
            for folder in ("spool", WORK):
                shutil.rmtree(output.path / folder, ignore_errors=True)
        raise


def fill(settings: RunSettings, chain: Chain, store: GroupStore) -> None:
    """Generates the groups that the store lacks."""
    try:
        if store.open_shards and settings.executor == "ray":
            fill_with_ray(settings, chain, store)
        elif store.open_shards:
            asyncio.run(fill_here(open_engine(settings.synthesizer, chain.tokenizer), settings, chain, store))
    except EngineDied as error:
        if isinstance(error, EngineNotStarted):
            raise
        raise Fault(
            f"{str(error).rstrip('.')}; {store.counts['texts']:,} of {store.texts:,} texts are stored in "
            f"{settings.output}; rerun the same command to resume"
        ) from error


async def fill_here(engine: Engine, settings: RunSettings, chain: Chain, store: GroupStore) -> None:
    """Generates them with one engine in this process."""
    groups = form_groups(settings, chain.tokenizer, store.work_list, store.open_shards)
    missing = (group for group in groups if group.number not in store)

    def put(group: Group, answer: SynthGroup) -> None:
        store.put(group.number, answer)
        refresh()

    try:
        with show_progress(store) as refresh:
            await run_groups(engine, chain, missing, put)
    finally:
        await engine.close()


def refuse_failure(counts: Counter[str], last: str) -> None:
    """Raises Fault when every text has failed: such an output is not finished."""
    failed = failed_texts(counts)
    if failed and sum(failed.values()) == counts["texts"]:
        raise Fault(f"all {counts['texts']:,} texts failed ({format_counts(failed)}){last}; {RERUN}")


def summarize(manifest: Manifest, engine: str) -> dict[str, Any]:
    """The figures of a finished run. `well_formed` is a share of all pairs, truncated ones included."""
    counts = manifest.counts
    rejected = rejection_counts(counts)
    pairs = manifest.count("pairs")
    found = pairs + rejected.total()
    names = ("texts_without_pairs", "prompt_tokens", "cached_prompt_tokens", "completion_tokens")
    return {
        **{name: manifest.count(name) for name in ("texts", "groups", "pairs")},
        "rejected": dict(rejected),
        "well_formed": round(pairs / found, 4) if found else None,
        "dropped": {name: count for name, count in manifest.dropped.items() if count},
        **{name: manifest.count(name) for name in names + DETAILS},
        **{name: counts[name] for name in RARE_DETAILS if name in counts},
        "finished": counts_under(counts, "finished."),
        "failed": failed_texts(counts),
        **score_figures(counts),
        "engine": engine,
    }
