"""Measure the quality of pairs synthesized from a mini-world, by looking up each answer in its facts.

    python examples/judge.py GROUPS WORLD [--json]

Prints two fractions and writes no output. `well_formed`: pairs that the parser accepts. `right`: accepted pairs whose
answer is correct. A question with an unknown wording counts as not correct.
"""

import json
import sys
from collections import Counter

from ipt_jax.core.errors import UserError
from synth import read_groups
from synth.miniworld import judge, open_world


def main() -> None:
    paths = [argument for argument in sys.argv[1:] if argument != "--json"]
    if len(paths) != 2:
        sys.exit(__doc__)
    try:
        figures = score(*paths)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(figures) if "--json" in sys.argv else "\n".join(f"{key} {figures[key]}" for key in figures))


def score(groups: str, directory: str) -> dict[str, float | int]:
    world = open_world(directory)
    verdicts: Counter[str] = Counter()
    texts = rejected = 0
    for group in read_groups(groups):
        for text in group.texts:
            texts += 1
            rejected += len(text.pairs) - len(text.accepted_pairs)
            verdicts.update(judge(world, text.raw_id, pair.question, pair.answer) for pair in text.accepted_pairs)
    accepted = sum(verdicts.values())
    return {
        "texts": texts,
        "pairs": accepted + rejected,
        "pairs_per_text": accepted / max(texts, 1),
        "well_formed": accepted / max(accepted + rejected, 1),
        **{verdict: verdicts[verdict] / max(accepted, 1) for verdict in ("right", "wrong", "unknown_question")},
    }


if __name__ == "__main__":
    main()
