"""Compare greedy decoding of a Hugging Face directory in ipt_jax, transformers and vLLM, in float32.

    python examples/greedy.py HF_DIR --texts TEXTS.jsonl [--tokens 32] [--count 4] [--json]

Checks an export. Each implementation runs in its own process, because vLLM does not release its memory. Prints how
many continuations are equal. Exits with code 1 if any token differs. Writes no output.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

READERS = ("ipt_jax", "transformers", "vllm")
PROMPT_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--texts", type=Path, required=True, help="JSON Lines file of prompts, rows {id, text}")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt (default: 32)")
    parser.add_argument("--count", type=int, default=4, help="number of prompts (default: 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout (default: stderr only)")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        answers = READ[options.reader](options.model, json.load(sys.stdin), options.tokens)
        options.answers.write_text(json.dumps(answers))
        return
    sys.exit(compare(options))


def compare(options: argparse.Namespace) -> int:
    from ipt_jax.corpus.text_files import read_jsonl
    from ipt_jax.corpus.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    rows = itertools.islice(read_jsonl(options.texts), options.count)
    texts = [row.get("text") or row["context"] for _, row in rows]
    lead = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [(lead + tokenizer.encode(text))[:PROMPT_TOKENS] for text in texts]
    answers = {reader: ask(reader, options, prompts) for reader in READERS}
    differ = 0
    for number, ours in enumerate(answers["ipt_jax"]):
        same = {reader: answers[reader][number] == ours for reader in READERS}
        differ += not all(same.values())
        verdict = "equal" if all(same.values()) else f"DIFFERENT {[name for name in same if not same[name]]}"
        print(f"text {number + 1}: {options.tokens} tokens {verdict}: {tokenizer.decode(ours)[:60]!r}", file=sys.stderr)
    print(f"{len(prompts) - differ} of {len(prompts)} continuations equal in {', '.join(READERS)}", file=sys.stderr)
    if options.json:
        print(json.dumps({"prompts": len(prompts), "equal": len(prompts) - differ, "tokens": options.tokens}))
    return 1 if differ else 0


def ask(reader: str, options: argparse.Namespace, prompts: list[list[int]]) -> list[list[int]]:
    """The reader's continuations, through a file: vLLM's processes may print on stdout."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.json")
        command = [sys.executable, __file__, str(options.model), "--texts", str(options.texts)]
        command += ["--tokens", str(options.tokens), "--reader", reader, "--answers", str(answers)]
        done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{reader} failed:\n{done.stderr[-4000:]}")
        return json.loads(answers.read_text())


def read_ipt_jax(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    import ipt_jax

    return ipt_jax.load(model).generate(prompts, max_new_tokens=tokens, temperature=0.0, eos=False)


def read_transformers(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        out = network.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def read_vllm(model: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=512, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


READ = {"ipt_jax": read_ipt_jax, "transformers": read_transformers, "vllm": read_vllm}

if __name__ == "__main__":
    main()
