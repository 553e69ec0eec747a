"""Seed examples: texts with good pairs that stand before each group's first text, so that an untuned model can serve.

The same examples, in the same tokens, open every group of a run: an engine's prefix cache holds them once. They are
drawn from (seed, file) among those short enough to leave a text its share of the prompt.
"""

from typing import Any

from ipt_jax.corpus.records import Pair
from ipt_jax.corpus.settings import UserError, draw
from ipt_jax.corpus.sources import read_jsonl
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import RunSettings
from synth.prompt import Prompt, wire_pair


def load_seed_examples(settings: RunSettings, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each example, BOS to EOS. Raises UserError where the file has too few that fit."""
    if settings.seed_examples is None:
        return []
    path, count = settings.seed_examples.path, settings.seed_examples.count
    share = settings.synthesizer.max_prompt_tokens // (count + 1)
    rows = [read_example(row, f"seed_examples {path}: line {line}") for line, row in read_jsonl(path)]
    prompt, read = Prompt(tokenizer), len(rows)
    draw(settings.seed, "seed_examples").shuffle(rows)
    for context, pairs in rows:
        if len(prompt.examples) == count:
            break
        prompt.add_example(context, pairs)
        if not pairs or len(prompt.examples[-1]) > share:
            prompt.examples.pop()
    if len(prompt.examples) < count:
        raise UserError(
            f"seed_examples {path}: {len(prompt.examples)} of {read} rows have pairs and at most {share} tokens (a "
            f"prompt's part for one of {count} + 1), {count} are asked for; lower count or raise max_model_len"
        )
    return prompt.examples


def read_example(row: dict[str, Any], where: str) -> tuple[str, list[Pair]]:
    """A row {context, qa: [{question, answer, options?, rationale?}]}."""
    context, qa = row.get("context"), row.get("qa")
    if not isinstance(context, str) or not isinstance(qa, list):
        raise UserError(
            f"{where}: expected {{context, qa: [{{question, answer}}]}}, found {', '.join(row) or 'nothing'}"
        )
    try:
        return context, [
            wire_pair(one["question"], one["answer"], one.get("options"), one.get("rationale")) for one in qa
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: a pair without question or answer ({error}); mend or remove the row") from error
