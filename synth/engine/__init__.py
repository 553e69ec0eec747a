"""Engines behind one interface: vLLM in this process, any OpenAI-compatible server, this project's own model in JAX,
and a scripted one for tests and rehearsals."""

from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import DigestOf, digest, file_digest
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import (
    FAILURES,
    Completion,
    Engine,
    EngineDied,
    GenerationRequest,
    RequestFailed,
    weights_digest,
    with_retries,
)

__all__ = [
    "FAILURES",
    "Completion",
    "Engine",
    "EngineDied",
    "GenerationRequest",
    "RequestFailed",
    "model_digest",
    "open_engine",
    "synthesizer_identity",
    "synthesizer_tokenizer",
    "with_retries",
]


def synthesizer_tokenizer(settings: SynthesizerSettings) -> Tokenizer:
    """The tokenizer of an HF directory, a run directory, one step's directory, or what `ipt import` wrote."""
    model = Path(settings.model)
    if not model.is_dir():
        raise UserError(f"synthesizer.model {model}: no such directory; give an HF directory with a tokenizer")
    for folder in (model, model / "tokenizer", model.parent.parent / "tokenizer"):
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return load_tokenizer(folder)
    raise UserError(f"synthesizer.model {model}: no tokenizer.json or tokenizer.model in it; copy the model's there")


def model_digest(settings: SynthesizerSettings, tokenizer: Tokenizer, digest_of: DigestOf = file_digest) -> str:
    """What answers, by its contents. The scripted engine has no weights, a server's are known by the name it gives."""
    if settings.engine == "scripted":
        return digest({"engine": "scripted", "tokenizer": tokenizer.digest})
    if settings.engine == "openai":
        return digest({"engine": "openai", "tokenizer": tokenizer.digest, "served_model": settings.served_name})
    return weights_digest(settings.model, digest_of)


def synthesizer_identity(
    settings: SynthesizerSettings, tokenizer: Tokenizer, digest_of: DigestOf = file_digest
) -> dict[str, Any]:
    """What decides the answers, by contents: neither paths nor what only changes the speed."""
    return {
        **settings.meaning,
        "weights": model_digest(settings, tokenizer, digest_of),
        "tokenizer": {"digest": tokenizer.digest, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
    }


def open_engine(settings: SynthesizerSettings, tokenizer: Tokenizer) -> Engine:
    """Starts the engine that the settings name; only its own packages are imported."""
    if settings.engine == "vllm":
        from synth.engine.vllm_ import VllmEngine

        return VllmEngine(settings, tokenizer)
    if settings.engine == "openai":
        from synth.engine.openai_ import OpenAIEngine

        return OpenAIEngine(settings, tokenizer)
    if settings.engine == "jax":
        from synth.engine.jax_ import JaxEngine

        return JaxEngine(settings, tokenizer)
    from synth.engine.scripted import ScriptedEngine

    return ScriptedEngine(settings, tokenizer)
