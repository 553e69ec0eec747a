#!/usr/bin/env bash
# Run the full pipeline in miniature on a laptop. No torch, no GPU, no network after the install.
#
#   launch/quickstart.sh        about 7 minutes on two CPU cores after the install
#
# A synthetic world replaces the web corpus, and a two-layer model replaces Mistral-7B. Writes to out/quickstart.
# Rerun to resume; finished steps are skipped.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup.sh
bin=${IPT_VENV:-$PWD/.venv}/bin
out=out/quickstart steps=out/quickstart/steps recipes=configs/quickstart
export JAX_PLATFORMS=cpu # the miniature is sized for a CPU, also on machines with GPUs
mkdir -p "$steps"
source launch/steps.sh

step world "generate a synthetic world: articles, some with questions and answers" \
  "$bin/synth" miniworld -o $out/world --articles 1920 --people 240 --paired 0.667 \
  --tuning-articles 40000 --json
step collect "convert question-answering data sets to tuning documents" \
  "$bin/synth" collect $recipes/collect.yaml --json
step tokens-t "tokenize the tuning documents, loss on pairs only" \
  "$bin/ipt" tokenize $recipes/tokenize_tuning.yaml --json
step synthesizer "train a miniature synthesizer that writes pairs for a text (longest step)" \
  "$bin/ipt" train $recipes/synthesizer.yaml --json
step export-s "export the synthesizer as a Hugging Face model" \
  "$bin/ipt" export $out/runs/synthesizer -o $out/synthesizer --json
step synth "generate pairs for raw articles that were not in its training data" \
  "$bin/synth" run $recipes/synth.yaml --json
step judge "check the answers against the facts of the world" \
  "$bin/python" examples/judge.py $out/groups $out/world --json
step render "render texts and pairs into augmented documents" \
  "$bin/synth" render $recipes/render.yaml --json
step collect-t "convert tuning articles and their pairs to groups" "$bin/synth" collect $recipes/collect_texts.yaml --json
step render-t "render them as the augmented documents" "$bin/synth" render $recipes/render_texts.yaml --json
step tokens-tt "tokenize them" "$bin/ipt" tokenize $recipes/tokenize_texts.yaml --json
step tokens-r "tokenize the raw articles" \
  "$bin/ipt" tokenize $recipes/tokenize_raw.yaml --json
step tokens-a "tokenize the augmented articles" \
  "$bin/ipt" tokenize $recipes/tokenize_augmented.yaml --json
step plan-m "compute the token mix of the baseline: texts without pairs" \
  "$bin/ipt" plan $recipes/mix.yaml --json
step plan-i "compute the token mix of instruction pre-training, without the converted raw articles" \
  "$bin/ipt" plan $recipes/instruct.yaml --json
step mix "pre-train from scratch on raw text and tuning articles" \
  "$bin/ipt" train $recipes/mix.yaml --json
step instruct "pre-train from scratch on augmented text, raw text and tuning articles, as many tokens" \
  "$bin/ipt" train $recipes/instruct.yaml --json
tasks=choice=$out/world/heldout/recall.jsonl,answer=$out/world/heldout/recall_answers.jsonl
step eval-m "evaluate mix on closed-book questions about people without pairs" \
  "$bin/ipt" eval $out/runs/mix --tasks $tasks -o $out/eval/mix.json --json
step eval-i "evaluate instruct on the same questions" \
  "$bin/ipt" eval $out/runs/instruct --tasks $tasks -o $out/eval/instruct.json --json
step export-i "export the pre-trained model as a Hugging Face model" \
  "$bin/ipt" export $out/runs/instruct -o $out/model --json
step report "write a report: loss curves, token mix, samples" \
  "$bin/ipt" report $out/runs/mix $out/runs/instruct -o $out/report.html \
  --eval $out/eval/mix.json --eval $out/eval/instruct.json --groups $out/groups --title Quickstart --json

"$bin/python" examples/summary.py $steps
printf '\nmodel    %s (Hugging Face)\npairs    synth inspect %s\nreport   %s\n' \
  "$PWD/$out/model" "$out/groups" "$PWD/$out/report.html"
