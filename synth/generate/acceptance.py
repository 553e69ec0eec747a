"""What `synth run` says about accepted pairs: the first one, a warning after a hundred texts, and a verdict at the end.

A run is worth its time only if the parser accepts pairs. An untuned model, a wrong tokenizer or a prompt in another
format are seen here early, with examples of what the model wrote.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ipt_jax.corpus.records import Pair, SynthGroup
from synth.format.parser import REASONS
from synth.groups import rejection_counts

EARLY_TEXTS = 100
LEAST_SHARE = 0.2  # of accepted pairs; below it the run warns
NAMED_REASONS = 3
EXAMPLE_LETTERS = 160
HINT = (
    "a model that was not tuned needs seed_examples or prompt: chat (docs/reference/synthesis.md); synth inspect "
    "shows the answers"
)


class Acceptance:
    """Sees every group that this process stores or reads from a journal, and reports each thing once."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.examples: dict[str, str] = {}  # of rejected pairs, by reason
        self.has_shown = self.has_checked = False

    def see(self, group: SynthGroup) -> None:
        for pair in (pair for text in group.texts for pair in text.pairs):
            if not pair.accepted:
                self.examples.setdefault(str(pair.rejection), shortened(pair))
            elif not self.has_shown:
                self.has_shown = True
                self.report(f"first accepted pair: Q: {one_line(pair.question)} A: {one_line(pair.answer)}")

    def check(self, counts: Mapping[str, int]) -> None:
        """Warns once, when `counts` reach a hundred texts, if few of the pairs were accepted."""
        if self.has_checked or counts["texts"] < EARLY_TEXTS:
            return
        self.has_checked = True
        rejected = rejection_counts(counts)
        if is_low(counts["pairs"], rejected):
            self.report(f"warning: {accepted_share(counts['pairs'], rejected, counts['texts'])}; {hint(rejected)}")
            for reason, count in rejected.most_common(NAMED_REASONS):
                example = f", for example: {self.examples[reason]}" if reason in self.examples else ""
                self.report(f"{reason} {count / rejected.total():.0%}: {REASONS.get(reason, reason)}{example}")

    def judge(self, summary: Mapping[str, Any]) -> None:
        """Reports at the end of a run, or of a rerun of a finished one, that few or no pairs were accepted."""
        rejected = Counter(summary["rejected"])
        if is_low(summary["pairs"], rejected):
            reasons = (f"{reason} {count}" for reason, count in rejected.most_common(NAMED_REASONS))
            said = ", ".join(reasons) or "the answers hold no pairs"
            self.report(f"{accepted_share(summary['pairs'], rejected, summary['texts'])}: {said}; {hint(rejected)}")


def is_low(pairs: int, rejected: Counter[str]) -> bool:
    return pairs < LEAST_SHARE * (pairs + rejected.total()) or not pairs


def hint(rejected: Counter[str]) -> str:
    cut = [reason for reason, _ in rejected.most_common(1)] == ["truncated"]
    return ("raise synthesizer.max_new_tokens if the answers are good; " if cut else "") + HINT


def accepted_share(pairs: int, rejected: Counter[str], texts: int) -> str:
    if not pairs:
        return f"0 pairs of {texts:,} texts were accepted"
    found = pairs + rejected.total()
    return f"{pairs:,} of {found:,} pairs ({pairs / found:.1%}) of {texts:,} texts were accepted"


def shortened(pair: Pair) -> str:
    """'<QUE> Who? <ANS> Ann <ANS> Bo …', on one line."""
    text = one_line(f"{pair.question} {pair.answer}")
    return repr(text if len(text) <= EXAMPLE_LETTERS else text[:EXAMPLE_LETTERS] + "…")


def one_line(text: str) -> str:
    return " ".join(text.split())
