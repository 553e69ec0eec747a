#!/usr/bin/env bash
# Tune SmolLM2-135M to write question-answer pairs for a text.
#
#   launch/tune_synthesizer.sh [TRAIN]    estimated an hour on two free CPU cores; 10 GB of free memory
#
# TRAIN is a JSON Lines file of rows {id, context, qa: [{question, answer, options, rationale}]}.
# Default: the training split of FairytaleQA in ../shared/data.
# A small synthetic world is added, whose pairs have options and chains of thought. Writes to out/tune_synthesizer.
# Rerun to resume; finished steps are skipped, and a killed step resumes. Remove out/tune_synthesizer for other rows.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
case ${1:-} in -h | --help) usage; exit 0 ;; esac
[ $# -le 1 ] || mistake "too many arguments; pass TRAIN at most"
[ -z "${1:-}" ] || [ -f "$1" ] || mistake "$1: no such file; pass JSON Lines with rows {id, context, qa}"
train=${1:+$(realpath "$1")}
cd "$root"
name=$(basename "${train%%.json*}")
fairytales=../shared/data/fairytaleqa
if [ -z "$train" ]; then
  name=fairytaleqa train=$fairytales/train.jsonl
  [ -f $train ] || mistake "no $train; pass your own rows: launch/tune_synthesizer.sh TRAIN.jsonl"
fi
launch/setup.sh test
bin=$venv/bin out=out/tune_synthesizer steps=out/tune_synthesizer/steps recipes=configs/synthesizer
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
mkdir -p "$steps"
source launch/steps.sh

step smollm2 "convert SmolLM2-135M-Instruct from its package to a Hugging Face directory" \
  "$bin/python" examples/smollm2.py -o $out/smollm2 --json
step world "generate a small world, for pairs with options and chains of thought" \
  "$bin/synth" miniworld -o $out/world --articles 50 --tuning-articles 160 --json
step collect "convert $train and the world to few-shot documents" \
  "$bin/synth" collect $recipes/smollm2_collect.yaml inputs.0.path="$train" inputs.0.name="$name" --json
step tokens "tokenize the documents, loss on pairs only" \
  "$bin/ipt" tokenize $recipes/smollm2_tokenize.yaml --json
step import "import the weights as a checkpoint" "$bin/ipt" import $out/smollm2 -o $out/imported --json
step plan "compute the rows and steps" "$bin/ipt" plan $recipes/smollm2.yaml --json
step train "tune the model (longest step)" "$bin/ipt" train $recipes/smollm2.yaml --json
step export "export it as a Hugging Face model" "$bin/ipt" export $out/run -o $out/model --json

printf '\nmodel    %s (Hugging Face)\n' "$PWD/$out/model"
