"""Seed examples: texts with good pairs that stand before each group's first text, so that an untuned model can serve.

The same examples, in the same tokens, open every group of a run: an engine's prefix cache holds them once. They are
drawn from (seed, id) among those short enough to leave a text its share of the prompt, rows with several pairs first
(SmolLM2-135M, three draws of three FairytaleQA rows: 43 pairs on 76 sections so, 18 by plain draws; the draw itself
matters more than that).
"""

from collections import Counter
from pathlib import Path

from ipt_jax.core.errors import UserError
from ipt_jax.core.seeding import uniform
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.collect.run import DataSet, read_examples
from synth.config import RunSettings
from synth.format.prompt import Prompt

ENOUGH_PAIRS = 4


def load_seed_examples(settings: RunSettings, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each example, BOS to EOS. Raises UserError where the file has too few that fit."""
    if settings.seed_examples is None:
        return []
    path, count = settings.seed_examples.path, settings.seed_examples.count
    share = settings.synthesizer.max_prompt_tokens // (count + 1)
    rows = [example for _, example in read_examples(DataSet("seeds", "generic", [Path(path)]), Counter())]
    rows.sort(key=lambda one: (-min(len(one.pairs), ENOUGH_PAIRS), uniform(settings.seed, "seed_examples", one.id)))
    prompt = Prompt(tokenizer)
    for example in rows:
        if len(prompt.examples) == count:
            break
        prompt.add_example(example.context, example.pairs)
        if len(prompt.examples[-1]) > share:
            prompt.examples.pop()
    if len(prompt.examples) < count:
        raise UserError(
            f"seed_examples {path}: {count} examples are asked for, {len(prompt.examples)} of {len(rows)} rows with "
            f"pairs have at most {share} tokens, a prompt's room for each; lower count or raise max_model_len"
        )
    return prompt.examples
