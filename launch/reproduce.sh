#!/usr/bin/env bash
# Reproduce the paper's claim in miniature: instruction pre-training against vanilla and mix, at equal tokens.
#
#   launch/reproduce.sh [SEED]    planned for 2 hours on two free CPU cores; not measured yet
#
# SEED is the seed of the world and of the synthesizer. The arms have the seeds SEED, SEED+1 and SEED+2. Default: 0.
# Writes to out/reproduce, and for a SEED above 0 to out/seed-SEED/out/reproduce. Rerun to resume; finished steps and
# finished runs are skipped. What is measured and expected: docs/reproduction.md.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
case ${1:-0} in -h | --help) usage; exit 0 ;; *[!0-9]*) mistake "SEED is ${1:-}; pass a number" ;; esac
[ $# -le 1 ] || mistake "too many arguments; pass SEED at most"
seed=$((10#${1:-0}))
cd "$root"
launch/setup.sh
if [ "$seed" -gt 0 ]; then # recipes name paths below the current directory
  mkdir -p "out/seed-$seed"
  cd "out/seed-$seed"
  ln -sfn "$root/configs" configs
  ln -sfn "$root/examples" examples
fi

# ---- sizes. Tokens, model and shares of the arms: configs/reproduce.
articles=3200      # about an eighth as many people, half of whom have pairs
tuning=40000       # articles with pairs that tune the synthesizer
other=6000         # of these, how many the mix has; the limit per data set
filter='combined >= 0.3'

bin=$venv/bin out=out/reproduce steps=out/reproduce/steps quick=configs/quickstart recipes=configs/reproduce
export JAX_PLATFORMS=cpu
mkdir -p "$steps"
source "$root/launch/steps.sh"

# documents NAME GROUPS [KEY=VALUE]… : renders groups and tokenizes the documents
documents() {
  local name=$1 groups=$2
  shift 2
  step "render-$name" "render the documents of $name" \
    "$bin/synth" render $recipes/render.yaml groups=$out/$groups output=$out/documents/$name "$@" --json
  tokens "$name" $out/documents/$name augmented
}

# tokens NAME PATH KIND : tokenizes for the arms, with the quickstart's recipe of that kind
tokens() {
  step "tokens-$1" "tokenize $1" "$bin/ipt" tokenize $quick/tokenize_$3.yaml inputs.0.path="$2" \
    tokenizer=$out/world/tokenizer output=$out/tokens/$1 --json
}

step world "generate a synthetic world" \
  "$bin/synth" miniworld -o $out/world --articles $articles --tuning-articles $tuning --seed $seed --json
step collect "convert question-answering data sets to tuning documents" \
  "$bin/synth" collect $quick/collect.yaml inputs.0.path=$out/world/tuning few_shot.tokenizer=$out/world/tokenizer \
  output=$out/tuning --json
step tokens-t "tokenize the tuning documents, loss on pairs only" \
  "$bin/ipt" tokenize $quick/tokenize_tuning.yaml inputs.0.path=$out/tuning tokenizer=$out/world/tokenizer \
  output=$out/tokens/tuning --json
step synthesizer "train a miniature synthesizer" \
  "$bin/ipt" train $quick/synthesizer.yaml data.sources.0.path=$out/tokens/tuning run_dir=$out/runs/synthesizer \
  train.seed=$seed data.seed=$seed --json
step export "export the synthesizer as a Hugging Face model" \
  "$bin/ipt" export $out/runs/synthesizer -o $out/synthesizer --json

for m in 1 2; do # texts per group: groups of two are for the arms one-shot and few-shot
  step "synth-$m" "generate pairs, $m per group" \
    "$bin/synth" run $quick/synth.yaml synthesizer.model=$out/synthesizer corpus.path=$out/world/raw/articles.jsonl \
    rounds=$m output=$out/groups$([ $m = 1 ] || echo _$m) --json
done
step judge "check the answers against the facts of the world" \
  "$bin/python" examples/judge.py $out/groups $out/world --json
step mine "make pairs by rules" \
  "$bin/synth" mine configs/synth/mine.yaml corpus.path=$out/world/raw/articles.jsonl corpus.source=world rounds=1 \
  output=$out/mined_groups --json
step verify "add scores to the pairs" \
  "$bin/synth" verify configs/synth/verify.yaml groups=$out/groups synthesizer=null 'scores=[grounded, combined]' \
  output=$out/verified_groups --json
step gold "convert the world's own pairs to groups" \
  "$bin/synth" collect $recipes/gold.yaml --json
step other "convert pairs about other people to groups" \
  "$bin/synth" collect $recipes/gold.yaml inputs.0.path=$out/world/tuning max_contexts=$other \
  output=$out/other_groups --json

tokens raw $out/world/raw raw
tokens heldout $out/world/raw/heldout.jsonl raw
documents attached groups
documents gold gold_groups
documents other other_groups
documents detached groups detached=1.0
documents both groups detached=0.5
documents few_shot groups_2
documents one_shot groups_2 one_shot=1.0
documents mined mined_groups
documents filtered verified_groups "keep=\"$filter\""
step pairs "select the detached pairs, without texts" \
  "$bin/python" examples/reproduction.py pairs $out/documents/detached $out/pairs.jsonl
tokens pairs $out/pairs.jsonl augmented

seeds="seeds=[$seed, $((seed + 1)), $((seed + 2))]"
step main "train vanilla, mix, instruct and instruct-gold with three seeds (hours)" \
  "$bin/ipt" ablate $recipes/main.yaml "$seeds" --json
step layouts "train the ablations with three seeds (hours)" \
  "$bin/ipt" ablate $recipes/layouts.yaml "$seeds" --json

"$bin/python" examples/reproduction.py results $steps | tee $out/results.md
printf '\npages    %s\n         %s\n' "$PWD/$out/main/ablation.html" "$PWD/$out/layouts/ablation.html"
