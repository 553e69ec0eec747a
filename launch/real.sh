#!/usr/bin/env bash
# Run the pipeline on real text and real weights: synthesize with SmolLM2-135M on vLLM, then continue its pre-training.
#
#   launch/real.sh [TEXTS.jsonl]     rows {id, text} or {id, context}; about 10 minutes on two CPU cores
#
# Default texts: 44 story sections of FairytaleQA if ../shared/data exists, otherwise eight short texts of configs/real.
# SmolLM2 is not tuned for synthesis; seed examples in the prompt show it the format.
# Writes to out/real. Rerun to resume. Remove out/real before using other texts.
set -euo pipefail

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
texts=${1:-}
[ -z "$texts" ] || texts=$(cd "$here" && realpath -m "$texts")
[ -z "$texts" ] || [ -f "$texts" ] || { echo "real: $texts: no such file; pass a JSON Lines file with rows {id, text}" >&2; exit 2; }
launch/setup.sh test
bin=${IPT_VENV:-$root/.venv}/bin
out=out/real steps=out/real/steps recipes=configs/real
fairytales=../shared/data/fairytaleqa
seeds=$recipes/seed_examples.jsonl
if [ -z "$texts" ] && [ -f $fairytales/val.jsonl ]; then
  texts=$fairytales/val.jsonl seeds=$fairytales/train.jsonl
fi
texts=${texts:-$recipes/texts.jsonl}
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
mkdir -p "$steps"
source launch/steps.sh

step texts "select the texts to convert, as {id, text}" \
  "$bin/python" examples/texts.py "$texts" -o $out/texts.jsonl --count 44
step smollm2 "convert SmolLM2-135M-Instruct from its package to a Hugging Face directory" \
  "$bin/python" examples/smollm2.py -o $out/smollm2 --json
step synth "generate pairs with vLLM, two texts per group, seed examples from $(basename "$seeds")" \
  "$bin/synth" run $recipes/synth.yaml seed_examples.path="$seeds" --json
step render "render texts and pairs into augmented documents" \
  "$bin/synth" render $recipes/render.yaml --json
step tokens-r "tokenize the raw texts" "$bin/ipt" tokenize $recipes/tokenize_raw.yaml --json
step tokens-a "tokenize the augmented texts" "$bin/ipt" tokenize $recipes/tokenize_augmented.yaml --json
step plan "compute the mix of raw and augmented text, 1:1 by tokens" "$bin/ipt" plan $recipes/train.yaml --json
step import "import the SmolLM2 weights as a checkpoint" "$bin/ipt" import $out/smollm2 -o $out/imported --json
step train "continue pre-training for 20 steps" "$bin/ipt" train $recipes/train.yaml --json
step export "export the run as a Hugging Face model" "$bin/ipt" export $out/run -o $out/model --json
step greedy "compare greedy decoding of the export in ipt_jax, transformers and vLLM" \
  "$bin/python" examples/greedy.py $out/model --texts $out/texts.jsonl --tokens 32 --json

"$bin/python" examples/real_summary.py $out
