"""Speed and memory of `synth render`, with and without a data set for the hub, and a check on malformed pairs.

    python benchmarks/rendering.py [--groups 10000 100000] [--odd 1000000]

Groups of two texts of 250 words with five pairs each, in all four formats, are generated in a temporary directory. Each
stage runs in a process of its own, whose CPU seconds and peak memory are printed. More than 10,000 groups are rendered
by a pool of processes that the system does not account to their parent: only the wall clock is printed there. `--odd`
renders that many random and mutated pairs instead, checks that every span cuts its string out of the document and that
every pair is shown or counted, and prints the counts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ipt_jax.core.stage import Output
from ipt_jax.corpus.records import GroupText, Pair, SynthGroup, encode
from synth.format.wire import wire_pair

ROOT = Path(__file__).resolve().parents[1]
SHARD = ALONE = 10_000  # more groups are rendered by a pool of processes
WORDS = "the old hall of a town by the river stood in rain and wind for years until new people came from north".split()


def make_groups(path: Path, count: int) -> None:
    shards = (count + SHARD - 1) // SHARD
    with Output(path, stage="synth", identity={}, shard_name="groups") as out:
        for shard in range(shards):
            out.seal(shard, shards, made_up(range(shard * SHARD, min((shard + 1) * SHARD, count))))
        out.finish()


def made_up(numbers: range) -> Iterator[bytes]:
    for number in numbers:
        stream = random.Random(number)
        texts = [made_up_text(stream, f"{number}-{place}", place) for place in range(2)]
        yield encode(SynthGroup(f"g{number}", texts, "made-up", "0" * 64, {}, "0" * 64))


def made_up_text(stream: random.Random, name: str, place: int) -> GroupText:
    text = " ".join(stream.choices(WORDS, k=250))
    pairs = [made_up_pair(stream, kind) for kind in (0, 0, 1, 2, 3)]
    return GroupText(name, 0, len(text), text, "made-up", pairs, place, 400, 256, 120, "stop")


def made_up_pair(stream: random.Random, kind: int) -> Pair:
    def words(count: int) -> str:
        return " ".join(stream.choices(WORDS, k=count))

    options = [f"{words(3)} {place}" for place in range(4)] if kind & 1 else []
    answer = stream.choice(options) if options else words(4)
    return wire_pair(f"{words(9)}?", answer, options, words(15) if kind & 2 else None)


def run_stage(folder: Path, count: int, hub: bool) -> str:
    """One line of the table."""
    config = {"groups": str(folder / f"groups{count}"), "output": str(folder / f"documents{count}{hub}")}
    if hub:
        config["hub"] = {"output": str(folder / f"hub{count}"), "name": "x", "license": "mit", "language": ["en"]}
    recipe = folder / f"recipe{count}{hub}.yaml"
    recipe.write_text(json.dumps(config))
    code = "import sys; from synth.cli import app; app(sys.argv[1:])"
    begun = time.perf_counter()
    measured = f"import resource, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, 'render', "
    measured += f"{str(recipe)!r}, '--json'], check=True); used = resource.getrusage(resource.RUSAGE_CHILDREN)"
    measured += "; print(used.ru_maxrss, used.ru_utime + used.ru_stime)"
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True, cwd=ROOT)
    wall = time.perf_counter() - begun
    result, figures = done.stdout.splitlines()
    pairs, peak, cpu = json.loads(result)["pairs"], int(figures.split()[0]) / 1024, float(figures.split()[1])
    alone = f"{cpu:.1f} | {pairs / cpu:,.0f} | {peak:.0f}" if count <= ALONE else "– | – | –"
    return f"| {count:,} | {'yes' if hub else 'no'} | {pairs:,} | {wall:.1f} | {alone} |"


def render_odd(wanted: int) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from renderkit import EVEN, odd_group, recipe
    from test_spans import check_document

    from synth.render.documents import Renderer

    stream, found, seen = random.Random(0), Counter[str](), 0
    recipes = [recipe(layouts=EVEN, one_shot=0.3, seed=seed, epoch=seed) for seed in range(5)]
    while seen < wanted:
        one = odd_group(stream, f"g{found['groups']}")
        dropped: Counter[str] = Counter()
        documents = Renderer(recipes[found["groups"] % 5], Counter(), dropped).documents(one)
        shown = sum(check_document(document, one) for document in documents)
        pairs = sum(len(text.pairs) for text in one.texts)
        assert shown + dropped.total() - dropped["blank_text"] == pairs, one
        seen += pairs
        found.update(groups=1, documents=len(documents), shown=shown)
        found.update({f"dropped: {reason}": count for reason, count in dropped.items()})
    print(f"{seen:,} pairs, no exception, every span cuts its string out")
    for name, count in found.most_common():
        print(f"  {name} {count:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--odd", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.odd:
        render_odd(arguments.odd)
        return
    print("| groups | hub | pairs | wall s | CPU s | pairs a CPU second | peak MiB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.groups:
            make_groups(Path(folder) / f"groups{count}", count)
            for hub in (False, True):
                print(run_stage(Path(folder), count, hub), flush=True)


if __name__ == "__main__":
    main()
