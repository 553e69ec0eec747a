"""What every engine offers: token ids in, token ids out, one awaitable a request, many requests at once.

An engine streams: a request comes back when it is done, whatever the others do. A failure of one request is a
`RequestFailed`; anything else that `generate` raises means that the engine itself is gone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ipt_jax.corpus.settings import UserError, digest, directory_digest
from ipt_jax.corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """`ids` go without the EOS that closed them; `finish_reason` is `stop` (EOS) or `length`."""

    ids: list[int]
    finish_reason: str
    prompt_tokens: int
    cached_prompt_tokens: int


class RequestFailed(RuntimeError):
    """One request came to nothing; the engine serves the others."""


class Engine(Protocol):
    tokenizer: Tokenizer

    async def generate(
        self, prompt_ids: list[int], *, max_new_tokens: int, temperature: float, seed: int, request_id: str
    ) -> Completion:
        """One completion. Equal arguments mean the same request; `request_id` is '<group id>/<round>' or the like."""
        ...

    async def close(self) -> None: ...


def without_eos(ids: list[int], eos_id: int | None) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def weights_digest(model: str) -> str:
    """SHA-256 over the config and the weights of an HF directory or a checkpoint, wherever it lies.

    Raises UserError where there are none.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise UserError(f"synthesizer {model}: no such directory; give an HF directory with config, weights, tokenizer")
    if (directory / "config.json").is_file():
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise UserError(f"synthesizer {model}: config.json but no *.safetensors; export the model to it again")
        return directory_digest([directory / "config.json", *weights])
    checkpoint = latest_checkpoint(directory)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return digest({str(path.relative_to(checkpoint)): directory_digest([path]) for path in files})


def latest_checkpoint(directory: Path) -> Path:
    """The checkpoint behind a run directory, one step's directory, or what `ipt import` wrote."""
    steps = [path for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    for found in (directory / "checkpoint", *sorted(steps, key=lambda path: -int(path.name))):
        if found.is_dir():
            return found
    if (directory / "_CHECKPOINT_METADATA").exists():
        return directory
    raise UserError(f"synthesizer {directory}: neither config.json nor a checkpoint in it; give a model's directory")
