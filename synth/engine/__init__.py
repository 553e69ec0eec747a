"""Engines with one interface: vLLM in this process, any OpenAI-compatible server, this project's own model in JAX,
and a scripted one for tests and rehearsals."""

from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import DigestOf, digest, directory_digest, file_digest
from ipt_jax.corpus.tokenizer import Tokenizer, load_tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import Engine, model_directory
from synth.format.chat import chat_format


def synthesizer_tokenizer(settings: SynthesizerSettings) -> Tokenizer:
    """The tokenizer of an HF directory, a name of the hub, a run, one step of it, or the output of `ipt import`."""
    model = model_directory(settings.model)
    if not model.is_dir():
        raise UserError(f"synthesizer.model {model}: no such directory; set it to an HF directory with a tokenizer")
    for folder in (model, model / "tokenizer", model.parent.parent / "tokenizer"):
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return load_tokenizer(folder)
    raise UserError(f"synthesizer.model {model}: it has no tokenizer.json or tokenizer.model; copy the model's there")


def model_digest(settings: SynthesizerSettings, tokenizer: Tokenizer, digest_of: DigestOf = file_digest) -> str:
    """Digest of the weights. The scripted engine has none, and those of a server are known by name."""
    if settings.engine == "scripted":
        return digest({"engine": "scripted", "tokenizer": tokenizer.digest})
    if settings.engine == "openai":
        return digest({"engine": "openai", "tokenizer": tokenizer.digest, "served_model": settings.served_name})
    return weights_digest(settings.model, digest_of)


def weights_digest(model: str, digest_of: DigestOf = file_digest) -> str:
    """SHA-256 over config and weights of an HF directory or a checkpoint, independent of paths."""
    directory = model_directory(model)
    if (directory / "config.json").is_file():
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise UserError(f"synthesizer.model {model}: config.json but no *.safetensors; copy the weights there")
        return directory_digest([directory / "config.json", *weights], digest_of)
    checkpoint = latest_checkpoint(directory)
    folders = [checkpoint / name for name in ("params", "checkpoint")]  # of a training run, of `ipt import`
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(checkpoint)) for path in files]
    return digest([digest_of(checkpoint / "model.json"), *zip(names, map(digest_of, files), strict=True)])


def adapter_digest(path: str, digest_of: DigestOf = file_digest) -> str:
    """SHA-256 over config and weights of a LoRA adapter."""
    files = [Path(path) / "adapter_config.json", *sorted(Path(path).glob("adapter_model*"))]
    if len(files) < 2 or not files[0].is_file():
        raise UserError(
            f"synthesizer.lora {path}: no adapter_config.json and adapter_model.safetensors; set its directory"
        )
    return directory_digest(files, digest_of)


def latest_checkpoint(directory: Path) -> Path:
    """The newest step of a run directory, one step's directory, or the output of `ipt import`."""
    steps = [path for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    for found in (directory, *sorted(steps, key=lambda path: -int(path.name))):
        if (found / "model.json").is_file():
            return found
    raise UserError(f"synthesizer.model {directory}: no config.json and no checkpoint; set it to a model's directory")


def synthesizer_identity(
    settings: SynthesizerSettings, tokenizer: Tokenizer, digest_of: DigestOf = file_digest
) -> dict[str, Any]:
    """What the completions depend on, by contents: neither paths nor settings that change only the speed."""
    extras = {"lora": adapter_digest(settings.lora, digest_of)} if settings.lora else {}
    if chat := chat_format(settings, tokenizer):
        extras["chat"] = chat.digest
    return {
        **settings.meaning,
        **extras,
        "weights": model_digest(settings, tokenizer, digest_of),
        "tokenizer": {"digest": tokenizer.digest, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
    }


def open_engine(settings: SynthesizerSettings, tokenizer: Tokenizer) -> Engine:
    """Starts the engine that the settings name. Imports only its packages."""
    if settings.engine == "vllm":
        from synth.engine.vllm_ import VllmEngine as Opened
    elif settings.engine == "openai":
        from synth.engine.openai_ import OpenAIEngine as Opened  # type: ignore[assignment]
    elif settings.engine == "jax":
        from synth.engine.jax_ import JaxEngine as Opened  # type: ignore[assignment]
    else:
        from synth.engine.scripted import ScriptedEngine as Opened  # type: ignore[assignment]
    return Opened(settings, tokenizer)
