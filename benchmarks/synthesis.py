"""Output tokens per second of `synth run` on real vLLM, compared with the engine's ceiling and the official procedure.

    python benchmarks/synthesis.py --model walking --rounds 1 2 3
    python benchmarks/synthesis.py --model smollm2 --rounds 2 --groups 160 --against ceiling
    python benchmarks/synthesis.py --weights out/tuned --rounds 2 --groups 40 --speculation 4 --repeats 3

All contestants run in turn in one engine process that is started once. Its prefix cache is emptied before each.

chains    the code of `synth run`: reader, chains, driver, parser, records, journal, shards, progress.
ceiling   the requests of the preceding run of the chains, known in advance: same prompts, same number of tokens (EOS is
          ignored), same shared prefixes, independent of each other. All are submitted at once, in the order that
          preserves cache hits: some groups' first texts, the same groups' second texts, and so on.
official  the procedure of the paper's released script, reimplemented from its description: text i is linked to texts
          i + B, i + 2B. A round is one batch of strings and ends before the next begins. All history is dropped if
          words times 1.5 exceed the window. Improved for it: tokenizing and detokenizing in one batched call each (the
          engine's own would be one by one), no double BOS, no file written.

drafts    with `--speculation N`, in place of the others: the chains on a second engine that drafts up to N tokens by
          n-gram look-up. Prints accepted tokens per draft, and how many answers equal those without drafts.

The texts are FairytaleQA (../shared next to the checkout, or random words if absent) cut to lengths drawn from
`--tokens`. `walking` is a random model that writes in the format (see walking_model.py) and samples at temperature 1.
`smollm2` is SmolLM2-135M-Instruct as in `configs/real`, untuned, greedy, with seed examples. `--weights DIR` is
a tuned synthesizer, greedy. Hits of the prefix cache
are the engine's own count. Possible hits are, per request, the complete blocks that the group's former request computed
and this one repeats.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tokenizing import source_texts
from walking_model import write_walking_model

from ipt_jax.core.hashing import FileHashCache
from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.records import Pair
from synth.config import RunSettings
from synth.engine import open_engine, synthesizer_tokenizer
from synth.engine.base import Completion, GenerationRequest
from synth.format.prompt import common_prefix
from synth.format.wire import context_block, pairs_text
from synth.generate.few_shot import Chain, make_chain
from synth.generate.group_store import GroupStore
from synth.generate.run import fill_here, open_output, run_identity
from synth.generate.scheduler import in_flight
from synth.generate.work_list import list_work

ROOT = Path(__file__).resolve().parents[1]
MODELS: dict[str, dict[str, Any]] = {
    "walking": {"max_model_len": 4096, "max_new_tokens": 160, "temperature": 1.0, "max_num_seqs": 16},
    "smollm2": {"max_model_len": 2048, "max_new_tokens": 40, "dtype": "bfloat16", "max_num_seqs": 6},
    "weights": {"max_model_len": 2048, "max_new_tokens": 200, "max_num_seqs": 8},
}
TEXT_TOKENS = {"walking": "64-1000", "smollm2": "24-96", "weights": "100-400"}  # the paper's are of some 500 tokens
GROUPS_PER_FLIGHT = 20  # so that the tail of a run does not count


@dataclass
class Request:
    prompt: list[int]
    ids: list[int]
    ended: bool
    cached: int
    group: str
    round: int
    seed: int = 0
    drafts: int = 0
    accepted: int = 0

    @property
    def new_tokens(self) -> int:
        """What the engine wrote, the EOS that ended it included."""
        return len(self.ids) + self.ended


@dataclass
class Run:
    seconds: float = 0.0
    requests: list[Request] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        return sum(request.new_tokens for request in self.requests)

    @property
    def speed(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def computed(self) -> int:
        return self.prompt_tokens - sum(request.cached for request in self.requests)


class Recorder:
    """The engine, and what was asked of it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.tokenizer, self.places = engine, engine.tokenizer, engine.places
        self.requests: list[Request] = []

    async def generate(self, request: GenerationRequest) -> Completion:
        found = await self.engine.generate(request)
        group, number, _ = request.id.split("/")
        ended = found.finish_reason == "stop"
        answered = (request.prompt_ids, found.ids, ended, found.cached_prompt_tokens)
        drafted = found.drafts, found.accepted_draft_tokens
        self.requests.append(Request(*answered, group, int(number), request.seed, *drafted))
        return found

    async def close(self) -> None: ...


async def chains(engine: Any, settings: RunSettings, chain: Chain) -> Run:
    recorder = Recorder(engine)
    with tempfile.TemporaryDirectory(prefix="ipt-chains-") as folder, open_output(f"{folder}/groups", {}) as output:
        store = GroupStore(output, list_work(settings, engine.tokenizer, chain.fingerprint), settings.groups_per_shard)
        run = await timed(lambda: fill_here(recorder, settings, chain, store), engine)
        store.close()
    run.requests = recorder.requests
    return run


async def ceiling(engine: Any, settings: RunSettings, known: Run) -> Run:
    """Groups in the order in which they began, `window` of them at a time, round after round."""
    window = 4 * engine.places
    begun = {request.group: place for place, request in enumerate(known.requests) if request.round == 1}
    order = {group: place // window for place, group in enumerate(sorted(begun, key=begun.__getitem__))}
    wanted = sorted(known.requests, key=lambda one: (order[one.group], one.round, begun[one.group]))

    async def all_at_once() -> list[Request]:
        asked = (write(engine, settings, one.prompt, f"{n}", one.seed, one.new_tokens) for n, one in enumerate(wanted))
        return await asyncio.gather(*asked)

    return await timed(all_at_once, engine)


async def official(engine: Any, settings: RunSettings, texts: list[str], examples: list[list[int]]) -> Run:
    tokenizer = engine.tokenizer
    seeds = "".join(spelled_seed(tokenizer, example) for example in examples)
    bos, eos = (tokenizer.control_name(one) for one in (tokenizer.bos_id, tokenizer.eos_id))
    size = -(-len(texts) // settings.rounds)
    limit = settings.synthesizer.max_prompt_tokens

    async def rounds() -> list[Request]:
        found: list[Request] = []
        shown: list[str] = [""] * size
        for number in range(settings.rounds):
            batch = texts[number * size : (number + 1) * size]
            opened = [f"{bos}{context_block(text)}" for text in batch]
            prompts = []
            for history, start in zip(shown, opened, strict=False):
                whole = seeds + history + start
                prompts.append(whole if len(whole.split(" ")) * 1.5 <= limit else seeds + start)
            ids = encode_strings(tokenizer, prompts, bos, eos)
            asked = (write(engine, settings, one, f"{number}/{place}", place) for place, one in enumerate(ids))
            answers = await asyncio.gather(*asked)
            found += answers
            for place, answer in enumerate(answers):
                pairs = read_pairs(tokenizer.decode(answer.ids))
                before = shown[place] if len(prompts[place]) > len(seeds + opened[place]) else ""
                shown[place] = f"{before}{opened[place]}{pairs_text(pairs)}{eos}" if pairs else ""
        return found

    return await timed(rounds, engine)


def spelled_seed(tokenizer: Any, ids: list[int]) -> str:
    bos, eos = (tokenizer.control_name(one) for one in (tokenizer.bos_id, tokenizer.eos_id))
    return f"{bos} {tokenizer.decode(ids).lstrip()}{eos}"


def encode_strings(tokenizer: Any, prompts: list[str], bos: str, eos: str) -> list[list[int]]:
    """Strings with spelled-out control tokens. One batched call for all pieces between them."""
    pieces: list[str] = []
    layout: list[list[int]] = []  # per prompt: a control token's id as it is, a piece as -1 - its place
    for prompt in prompts:
        row: list[int] = []
        for example in prompt.split(bos)[1:]:
            text, closed, _ = example.partition(eos)
            row += [tokenizer.bos_id, -1 - len(pieces), *([tokenizer.eos_id] if closed else [])]
            pieces.append(text)
        layout.append(row)
    ids = tokenizer.encode_batch(pieces)
    return [[token for one in row for token in (ids[-1 - one] if one < 0 else [one])] for row in layout]


def read_pairs(text: str) -> list[Pair]:
    """The released script's rules: complete records only, one answer tag, no question twice."""
    pairs: dict[str, Pair] = {}
    for piece in text.split("</END>")[:-1]:
        question, *answers = piece.split("<ANS>")
        question, answer = question.strip(), answers[0].strip() if len(answers) == 1 else ""
        if answer and question.startswith("<QUE>"):
            question = question.replace("<QUE>", "").strip()
            pairs.setdefault(question.lower(), Pair(question, answer))
    return list(pairs.values())


async def write(
    engine: Any, settings: RunSettings, prompt: list[int], name: str, seed: int, new_tokens: int | None = None
) -> Request:
    """One request to vLLM without anything of this project around it. `new_tokens`: exactly so many."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    eos, temperature = engine.tokenizer.eos_id, settings.synthesizer.temperature
    sampling = SamplingParams(
        temperature=temperature,
        seed=seed if temperature else None,
        max_tokens=new_tokens or settings.synthesizer.max_new_tokens,
        ignore_eos=new_tokens is not None,
        stop_token_ids=None if new_tokens else [eos],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    final: Any = None
    async for output in engine.engine.generate(tokens_input(prompt), sampling, name):
        final = output
    answer = final.outputs[0]
    ended = answer.finish_reason == "stop"
    ids = list(answer.token_ids)
    return Request(prompt, ids[:-1] if ended else ids, ended, final.num_cached_tokens or 0, name, 0)


async def timed(work: Callable[[], Awaitable[Any]], engine: Any) -> Run:
    assert await engine.engine.reset_prefix_cache()
    before, began = processor_seconds(), time.monotonic()
    found = await work()
    run = Run(time.monotonic() - began)
    run.cpu = {name: used - before.get(name, 0.0) for name, used in processor_seconds().items()}
    run.requests = found if isinstance(found, list) else []
    return run


def processor_seconds() -> dict[str, float]:
    """CPU seconds so far: of this process (vLLM's front end and all that drives it), of vLLM's core and its worker."""
    here = psutil.Process()
    seconds = {"front": sum(here.cpu_times()[:2])}
    for process in here.children(recursive=True):
        name = "worker" if "orker" in process.name() + " ".join(process.cmdline()[:1]) else "core"
        seconds[name] = seconds.get(name, 0.0) + sum(process.cpu_times()[:2])
    return seconds


def possible_cached(run: Run, block: int) -> tuple[int, int]:
    """(cached, possible) prompt tokens of the requests that extend a former one of their group."""
    last: dict[str, Request] = {}
    cached = possible = 0
    for request in sorted(run.requests, key=lambda one: one.round):
        if former := last.get(request.group):
            kept = [*former.prompt, *former.ids][: len(former.prompt) + former.new_tokens - 1]
            shared = min(common_prefix(kept, request.prompt), len(request.prompt) - 1)
            possible += shared // block * block
            cached += request.cached
        last[request.group] = request
    return cached, possible


def write_corpus(path: Path, count: int, least: int, most: int, tokenizer: Any) -> list[str]:
    """Texts of `least` to `most` tokens, log-uniform; returns them in the order of the file."""
    known = source_texts(300)
    rng, texts = random.Random(1), []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = int(math.exp(rng.uniform(math.log(least), math.log(most))))
            long = f"{number} " + " ".join(known[(number * 7 + i) % len(known)] for i in range(4))
            ends = tokenizer.char_ends(long[: 8 * size])[1]
            texts.append(long[: ends[min(size, len(ends)) - 1]].strip())
            file.write(json.dumps({"id": str(number), "text": texts[-1]}, ensure_ascii=False) + "\n")
    return texts


def recipe(model: Path, folder: Path, rounds: int, arguments: argparse.Namespace, drafts: int = 0) -> RunSettings:
    synthesizer = {"model": str(model), "engine": "vllm", "dtype": "float32", **MODELS[arguments.model]}
    if drafts:
        synthesizer["speculation"] = {"tokens": drafts}
    if arguments.places:
        synthesizer["max_num_seqs"] = arguments.places
    seeds = {"path": str(ROOT / "configs" / "real" / "seed_examples.jsonl"), "count": 2}
    plain = {
        "synthesizer": synthesizer,
        "corpus": {"path": str(folder / f"{rounds}.jsonl")},
        "rounds": rounds,
        "seed": 1,
        "seed_examples": seeds if arguments.model == "smollm2" else None,
        "groups_per_shard": 100,
        "output": str(folder / "unused"),
    }
    return check_settings(RunSettings, plain, where="benchmark")


def make_model(name: str, folder: Path) -> Path:
    model = folder / name
    if name == "walking" and not (model / "config.json").exists():
        write_walking_model(model)
    if name == "smollm2":
        subprocess.run([sys.executable, str(ROOT / "examples" / "smollm2.py"), "-o", str(model)], check=True)
    return model


async def compare(arguments: argparse.Namespace, folder: Path) -> None:
    model = arguments.weights or make_model(arguments.model, folder)
    settings = {rounds: recipe(model, folder, rounds, arguments) for rounds in arguments.rounds}
    first = settings[arguments.rounds[0]]
    tokenizer = synthesizer_tokenizer(first.synthesizer)
    engine: Any = open_engine(first.synthesizer, tokenizer)
    drafting = None
    if arguments.speculation:
        one = recipe(model, folder, arguments.rounds[0], arguments, arguments.speculation)
        drafting = open_engine(one.synthesizer, tokenizer)
    groups = arguments.groups or GROUPS_PER_FLIGHT * in_flight(engine.places)
    block = engine.engine.vllm_config.cache_config.block_size
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {arguments.model}: ", end="")
    print(f"{engine.places} places, {groups} groups, texts of {arguments.tokens} tokens, blocks of {block}, ", end="")
    print(f"a cache of {engine.cache_tokens:,} tokens", flush=True)
    least, most = map(int, arguments.tokens.split("-"))
    warm = [[engine.tokenizer.bos_id, *range(10 + n, 210 + n)] for n in range(4 * engine.places)]
    await asyncio.gather(*(write(engine, first, ids, f"warm {n}", 0, 32) for n, ids in enumerate(warm)))
    for rounds, one in settings.items():
        texts = write_corpus(folder / f"{rounds}.jsonl", groups * rounds, least, most, tokenizer)
        chain = make_chain(one, tokenizer, run_identity(one, tokenizer, FileHashCache(folder / "digests.json")))
        held: dict[str, list[Run]] = {}
        for _ in range(arguments.repeats):
            ours = await chains(engine, one, chain)
            held.setdefault("chains", []).append(ours)
            tell("chains", rounds, ours, block)
            for rival in arguments.against:
                if rival == "drafts":
                    run = await chains(drafting, one, chain)
                elif rival == "ceiling":
                    run = await ceiling(engine, one, ours)
                else:
                    run = await official(engine, one, texts, chain.examples)
                held.setdefault(rival, []).append(run)
                tell(rival, rounds, run, block)
                if rival == "drafts":
                    compare_answers(ours, run)
        for rival in arguments.against:
            pairs = zip(held["chains"], held[rival], strict=True)
            print(f"M={rounds} chains/{rival} in tokens/s: {spread([a.speed / b.speed for a, b in pairs])}", flush=True)
    await engine.close()
    if drafting:
        await drafting.close()


def compare_answers(plain: Run, drafted: Run) -> None:
    """Prints how many answers to equal prompts are equal, and how often drafts were right."""
    answers = {(one.group, one.round): one for one in plain.requests}
    both = [(one, answers[one.group, one.round]) for one in drafted.requests]
    asked = [(one.ids, other.ids) for one, other in both if one.prompt == other.prompt]
    equal = sum(one == other for one, other in asked)
    drafts, accepted = (sum(getattr(one, name) for one in drafted.requests) for name in ("drafts", "accepted"))
    print(
        f"    {accepted / max(1, drafts):.2f} tokens accepted per draft, {drafts:,} drafts, {accepted:,} of "
        f"{drafted.new_tokens:,} tokens; {equal} of {len(asked)} answers to equal prompts are equal",
        flush=True,
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def tell(name: str, rounds: int, run: Run, block: int) -> None:
    cpu = ", ".join(f"{part} {seconds:.1f}" for part, seconds in sorted(run.cpu.items()))
    print(
        f"M={rounds} {name:8} {run.speed:7.0f} tokens/s  {len(run.requests)} requests, {run.new_tokens:,} tokens in "
        f"{run.seconds:.1f} s; prompt tokens {run.prompt_tokens:,}, computed {run.computed:,}; CPU s: {cpu}",
        flush=True,
    )
    if name == "chains":
        cached, possible = possible_cached(run, block)
        ended = sum(request.ended for request in run.requests) / len(run.requests)
        share = f"{cached / possible:.3f} of the possible {possible:,}" if possible else "no former requests"
        print(f"    cached of later rounds: {share}; ended by EOS: {ended:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="walking")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 3], help="texts a group (default 1 2 3)")
    parser.add_argument("--weights", type=Path, help="directory of a tuned synthesizer, in place of --model")
    parser.add_argument("--speculation", type=int, help="tokens of a draft; compare with and without")
    parser.add_argument("--against", nargs="+", choices=["ceiling", "official"], default=["ceiling", "official"])
    parser.add_argument("--repeats", type=int, default=1, help="times that each contestant runs, in turn (default 1)")
    parser.add_argument("--groups", type=int, help=f"default {GROUPS_PER_FLIGHT} for each one in flight")
    parser.add_argument("--places", type=int, help="max_num_seqs (default 16; smollm2 6)")
    parser.add_argument("--tokens", help=f"shortest and longest text, by model (default {TEXT_TOKENS})")
    parser.add_argument("--directory", type=Path, help="where models are made, and kept; default a temporary one")
    arguments = parser.parse_args()
    if arguments.weights:
        arguments.model = "weights"
    if arguments.speculation:
        arguments.against = ["drafts"]
    arguments.tokens = arguments.tokens or TEXT_TOKENS[arguments.model]
    with tempfile.TemporaryDirectory(prefix="ipt-synthesis-") as temporary:
        folder = arguments.directory or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        asyncio.run(compare(arguments, folder.resolve()))


if __name__ == "__main__":
    main()
