"""`synth run`: raw texts and a synthesizer become SynthGroups, group by group, without a barrier between rounds.

Guaranteed: every group of the corpus stands in the output exactly once, whole and in order, wherever runs were killed.
With the scripted engine the shards are equal to the byte however often that was. A run again goes on, a finished one
returns its figures at once, one with other settings is refused. Not guaranteed: equal bytes from vLLM, whose sums of
floats depend on what else is in the batch.
"""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import Fault, UserError
from ipt_jax.core.files import refuse_foreign, writing
from ipt_jax.core.hashing import FileHashCache, FileState, digest, file_digest
from ipt_jax.core.stage import Manifest, Output
from ipt_jax.corpus.records import SynthGroup
from ipt_jax.corpus.sources import source_identity
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.engine import Engine, EngineDied, open_engine, synthesizer_identity, synthesizer_tokenizer
from synth.format.prompt import context_tokens
from synth.format.wire import FORMAT
from synth.generate.few_shot import MEND, Chain, counted
from synth.generate.group_store import DETAILS, GroupStore, failed_texts, take_out_failed
from synth.generate.grouping import Group
from synth.generate.ray_workers import fill_with_ray, with_absolute_paths
from synth.generate.run_progress import RunProgress
from synth.generate.scheduler import run_groups
from synth.generate.seed_examples import load_seed_examples
from synth.generate.work_list import corpus_states, form_groups, list_work, load_work, refuse_changes, save_work
from synth.groups import counts_under, rejection_counts
from synth.verify.verifier import VERSION, make_verifier, score_figures

WORK = "worklist"  # folder in the output: the work list, and digests of the files of corpus and model
LEAST_TEXT_TOKENS = 16  # a budget that leaves a text less than this is a mistake


def run_synth(settings: RunSettings, *, retry_failed: bool = False) -> dict[str, Any]:
    """Runs the stage, or what is left of it; `retry_failed`: with the groups that hold a failed text anew.

    `seconds` are those of this call.
    """
    started = time.monotonic()
    refuse_output(Path(settings.output))
    if settings.executor == "ray":
        settings = with_absolute_paths(settings)
    tokenizer = synthesizer_tokenizer(settings.synthesizer)
    known = FileHashCache(Path(settings.output) / WORK / "digests.json")
    states = corpus_states(settings)
    identity = run_identity(settings, tokenizer, known)
    summary = finished_summary(settings.output, identity)
    if summary is None or (retry_failed and summary["failed"]):
        summary = synthesize(settings, tokenizer, identity, known, states, retry_failed)
    elif retry_failed:
        tell("no text has failed; there is nothing to do")
    if failed := summary["failed"]:
        told = f"{sum(failed.values()):,} of {summary['texts']:,} texts failed ({counted(failed)})"
        tell(f"{told}; --retry-failed asks again")
    return {**summary, "seconds": round(time.monotonic() - started, 3)}


def refuse_output(path: Path) -> None:
    """Raises UserError where no output can be, by a look: it is opened only after a pass over the corpus."""
    found = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not os.path.isdir(found):
        raise UserError(f"output {path}: {found} is no directory; give another path")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"output {path}: {found} cannot be written (its permissions); give another path")
    if found == path and not (path / "manifest.json").exists():
        refuse_foreign(path)


def tell(line: str) -> None:
    print(f"synth run: {line}", file=sys.stderr)


def run_identity(settings: RunSettings, tokenizer: Tokenizer, known: FileHashCache) -> dict[str, Any]:
    """What the groups depend on, by contents: neither paths nor what only changes the speed."""
    seeds = settings.seed_examples
    return {
        "synthesizer": synthesizer_identity(settings.synthesizer, tokenizer, known),
        "format": FORMAT,
        "corpus": source_identity(settings.corpus, known),
        "verify": settings.verify and {"scores": sorted(set(settings.verify)), "version": VERSION},
        "seed_examples": seeds and {"contents": seed_digest(seeds.path), "count": seeds.count},
        **settings.model_dump(include={"rounds", "grouping", "long_texts", "seed", "groups_per_shard"}),
    }


def seed_digest(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"seed_examples {path}: no such file; give JSON Lines of {{context, qa}}, or null")
    return file_digest(path)


def finished_summary(output: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of an output that is complete: nothing of the corpus needs to be read again."""
    if not (Path(output) / "manifest.json").is_file():
        return None
    with open_output(output, identity) as found:
        return found.manifest.summary if found.complete else None


def open_output(path: str, identity: dict[str, Any]) -> Output:
    return Output(path, stage="synth", identity=identity, shard_name="groups")


def synthesize(
    settings: RunSettings,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    known: FileHashCache,
    states: list[FileState],
    retry_failed: bool,
) -> dict[str, Any]:
    """Reads all that a user can get wrong before anything is written, then fills and seals the shards."""
    chain = make_chain(settings, tokenizer, identity)
    listed = Path(settings.output) / WORK / "list.json"
    work = load_work(listed, chain.fingerprint) or list_work(settings, tokenizer, chain.fingerprint)
    work.states = states
    refuse_changes(settings, states)  # a list of other contents than were hashed must not be kept
    fresh = not Path(settings.output).exists()
    with open_output(settings.output, identity) as output:
        with writing(listed):
            save_work(listed, work)
            known.save()
        if retry_failed:
            tell(f"{take_out_failed(output, settings.groups_per_shard):,} groups with failed texts are asked again")
        store = GroupStore(output, work, settings.groups_per_shard)
        try:
            if store.open_shards:
                fill = fill_with_ray if settings.executor == "ray" else fill_here
                fill(settings, chain, store)
        except EngineDied as error:
            raise Fault(
                f"{str(error).rstrip('.')}; {store.counts['texts']:,} of {work.texts:,} texts are stored in "
                f"{settings.output}; run the same command again to go on"
            ) from error
        except UserError:
            # An output that this call made and that holds nothing would only refuse the mended settings: with what was
            # put beside its shards gone, it withdraws itself.
            if fresh and not output.held and not any(file.stat().st_size for file in output.path.glob("spool/*")):
                for folder in ("spool", WORK):
                    shutil.rmtree(output.path / folder, ignore_errors=True)
            raise
        finally:
            store.close()
        store.remove_journals()
        refuse_failure(store.counts, chain.failures.last)
        manifest = output.finish(summarize(output.manifest, settings.synthesizer.engine))
    return manifest.summary


def refuse_failure(counts: Counter[str], last: str) -> None:
    """Raises Fault when every text has failed: such an output is not finished."""
    failed = failed_texts(counts)
    if failed and sum(failed.values()) == counts["texts"]:
        raise Fault(f"all {counts['texts']:,} texts failed ({counted(failed)}){last}; {MEND}")


def make_chain(settings: RunSettings, tokenizer: Tokenizer, identity: dict[str, Any]) -> Chain:
    room = settings.synthesizer.max_prompt_tokens - context_tokens("", tokenizer)
    if room < LEAST_TEXT_TOKENS:
        raise UserError(
            f"synthesizer.max_model_len: {settings.synthesizer.max_model_len} less max_new_tokens leaves a text {room} "
            f"tokens, expected {LEAST_TEXT_TOKENS} or more; raise max_model_len"
        )
    return Chain(
        synthesizer=settings.synthesizer,
        tokenizer=tokenizer,
        seed=settings.seed,
        examples=load_seed_examples(settings, tokenizer),
        name=Path(settings.synthesizer.model).resolve().name,
        weights=identity["synthesizer"]["weights"],
        fingerprint=digest(identity),
        verifier=make_verifier(settings.verify, settings.synthesizer, settings.seed) if settings.verify else None,
    )


def summarize(manifest: Manifest, engine: str) -> dict[str, Any]:
    """The figures of a whole run; shares are over all pairs, those that were cut off by the token limit included."""
    counts = manifest.counts
    rejected = dict(rejection_counts(counts))
    pairs = counts.get("pairs", 0)
    written = pairs + sum(rejected.values())
    names = ("texts_without_pairs", "prompt_tokens", "cached_prompt_tokens", "completion_tokens")
    return {
        "texts": counts.get("texts", 0),
        "groups": counts.get("groups", 0),
        "pairs": pairs,
        "rejected": rejected,
        "well_formed": round(pairs / written, 4) if written else None,
        "dropped": {name: count for name, count in manifest.dropped.items() if count},
        **{name: counts.get(name, 0) for name in names + DETAILS},
        "finished": counts_under(counts, "finished."),
        "failed": failed_texts(counts),
        **score_figures(counts),
        "engine": engine,
    }


def fill_here(settings: RunSettings, chain: Chain, store: GroupStore) -> None:
    """One engine in this process does all that is missing. Stops cleanly on SIGINT and SIGTERM."""
    engine = open_engine(settings.synthesizer, chain.tokenizer)
    stopped_by = asyncio.run(run_engine(engine, settings, chain, store))
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)


async def run_engine(engine: Engine, settings: RunSettings, chain: Chain, store: GroupStore) -> signal.Signals | None:
    try:
        return await fill(engine, settings, chain, store)
    finally:
        await engine.close()


async def fill(engine: Engine, settings: RunSettings, chain: Chain, store: GroupStore) -> signal.Signals | None:
    """Drives the engine through all groups that the store misses; the signal that ended it before that, if one did."""
    groups = form_groups(settings, chain.tokenizer, store.work_list, store.open_shards)
    missing = (group for group in groups if group.number not in store)
    with RunProgress(store) as progress:

        def put(group: Group, answer: SynthGroup) -> None:
            store.put(group.number, answer)
            progress.refresh()

        return await run_groups(engine, chain, missing, put)
