"""What `synth run` shows while it works: progress and ETA, pairs a text, refusals, the cache's share, new tokens/s."""

import time
from collections import Counter
from types import TracebackType
from typing import Self

from ipt_jax.core.progress import Progress
from synth.generate.group_store import GroupStore
from synth.groups import rejection_counts

REASONS = 3  # of refusals that are named, the most frequent first
REFRESH_SECONDS = 0.5


class RunProgress:
    """The figures of all that the store holds; the speed is that of this call. Cheap enough to call for every group."""

    def __init__(self, store: GroupStore, **fixed: object) -> None:
        self._progress = Progress(store.work_list.texts, "texts", "synth run", done=store.counts["texts"])
        self._counts, self._fixed = store.counts, fixed
        self._told = store.counts["texts"]
        self._tokens = store.counts["completion_tokens"]
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def refresh(self) -> None:
        if time.monotonic() - self._shown >= REFRESH_SECONDS:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        new, seconds = self._counts["completion_tokens"] - self._tokens, max(self._shown - self._began, 1e-9)
        speed = {"new_tokens_per_second": round(new / seconds)}
        self._progress.advance(self._counts["texts"] - self._told, **figures(self._counts), **speed, **self._fixed)
        self._told = self._counts["texts"]

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()
        self._progress.__exit__(error, value, trace)


def figures(counts: Counter[str]) -> dict[str, object]:
    """Shares of refusals are over all pairs written, the cache's over all prompt tokens."""
    refused = rejection_counts(counts)
    written = counts["pairs"] + refused.total()
    reasons = ", ".join(f"{name} {count / written:.0%}" for name, count in refused.most_common(REASONS))
    return {
        "pairs": counts["pairs"],
        "pairs_per_text": f"{counts['pairs'] / max(1, counts['texts']):.2f}",
        "rejected": reasons or "none",
        "cached": f"{counts['cached_prompt_tokens'] / max(1, counts['prompt_tokens']):.0%}",
    }
