#!/usr/bin/env bash
# The whole pipeline in miniature, on a laptop: no torch, no GPU, no network after the install. Asks for nothing.
#
#   launch/quickstart.sh        about ten minutes on two cores; run again, it skips what is done
#
# An invented world stands in for the web, a two-layer model for Mistral-7B. All it writes lies in out/quickstart.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup.sh
bin=${IPT_VENV:-$PWD/.venv}/bin
out=out/quickstart steps=out/quickstart/steps recipes=configs/quickstart
export JAX_PLATFORMS=cpu # the miniature is sized for a CPU, whatever else the machine has
mkdir -p "$steps"
source launch/steps.sh

step world "an invented world: articles, and questions with answers on some of them" \
  "$bin/synth" miniworld -o $out/world --articles 1500 --tuning-articles 80000 --json
step collect "question-answering data sets become the documents that tune a synthesizer" \
  "$bin/synth" collect $recipes/collect.yaml --json
step tokens-t "the tuning documents as token ids, loss on pairs alone" \
  "$bin/ipt" tokenize $recipes/tokenize_tuning.yaml --json
step synthesizer "a miniature synthesizer learns to read a text and write pairs (the longest step)" \
  "$bin/ipt" train $recipes/synthesizer.yaml --json
step export-s "the synthesizer as a Hugging Face model, as every engine reads it" \
  "$bin/ipt" export $out/runs/synthesizer -o $out/synthesizer --json
step synth "it reads raw articles that it never saw, and writes pairs" \
  "$bin/synth" run $recipes/synth.yaml --json
step judge "the world itself says which answers are right" \
  "$bin/python" launch/judge.py $out/groups $out/world --json
step render "pairs join their texts through templates" \
  "$bin/synth" render $recipes/render.yaml --json
step tokens-r "raw articles as token ids" \
  "$bin/ipt" tokenize $recipes/tokenize_raw.yaml --json
step tokens-a "augmented articles as token ids" \
  "$bin/ipt" tokenize $recipes/tokenize_augmented.yaml --json
step plan-v "the mix of vanilla pre-training, solved to the token" \
  "$bin/ipt" plan $recipes/vanilla.yaml --json
step plan-i "the mix of instruction pre-training: converted articles leave the raw part" \
  "$bin/ipt" plan $recipes/instruct.yaml --json
step vanilla "pre-training from scratch on raw text" \
  "$bin/ipt" train $recipes/vanilla.yaml --json
step instruct "pre-training from scratch on raw and augmented text, equal tokens" \
  "$bin/ipt" train $recipes/instruct.yaml --json
tasks=choice=$out/world/heldout/questions.jsonl,answer=$out/world/heldout/answers.jsonl
step eval-v "closed-book questions on articles that no pair was written for: vanilla" \
  "$bin/ipt" eval $out/runs/vanilla --tasks $tasks -o $out/eval/vanilla.json --json
step eval-i "the same questions: instruct" \
  "$bin/ipt" eval $out/runs/instruct --tasks $tasks -o $out/eval/instruct.json --json
step export-i "the pre-trained model as a Hugging Face directory" \
  "$bin/ipt" export $out/runs/instruct -o $out/model --json
step report "one page with curves, the mix and samples" \
  "$bin/ipt" report $out/runs/vanilla $out/runs/instruct -o $out/report.html \
  --eval $out/eval/vanilla.json --eval $out/eval/instruct.json --groups $out/groups --title Quickstart --json

"$bin/python" launch/summary.py $steps
printf '\nmodel    %s (Hugging Face)\npairs    synth inspect %s\nreport   %s\n' \
  "$PWD/$out/model" "$out/groups" "$PWD/$out/report.html"
