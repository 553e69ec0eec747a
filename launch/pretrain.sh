#!/usr/bin/env bash
# Trains a recipe on this machine's accelerators, or as one host of many.
#
#   launch/pretrain.sh CONFIG [key=value…]           for example: launch/pretrain.sh configs/pretrain/1.3b_instruct.yaml
#
# Start it once a host. Hosts find each other
#   under SLURM by themselves: srun --ntasks-per-node=1 launch/pretrain.sh CONFIG      (launch/slurm/pretrain.sbatch)
#   on a TPU slice by themselves: the same command on all workers
#   elsewhere by addresses: IPT_COORDINATOR=HOST:PORT IPT_NUM_PROCESSES=N IPT_PROCESS_ID=I launch/pretrain.sh CONFIG
# Stopped runs go on from their latest checkpoint when started again. What it sets, it prints; what you set, it keeps.
set -euo pipefail

say() { printf 'pretrain: %s\n' "$*" >&2; }
mistake() { say "$*"; exit 2; }
usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

case ${1:-} in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit 0 ;;
esac
[ -f "$1" ] || mistake "no such recipe: $1"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${IPT_VENV:-$root/.venv}
[ -x "$venv/bin/ipt" ] || mistake "no environment in $venv: launch/setup.sh cuda13 or cuda12 (GPUs), tpu, or no extra for the CPU"
installed() { "$venv/bin/python" -c "import importlib.util, sys; sys.exit(not any(map(importlib.util.find_spec, sys.argv[1:])))" "$@"; }

default() { # default NAME VALUE WHY: sets what the user left open
  if [ -n "${!1+set}" ]; then
    say "$1=${!1}  (yours)"
  else
    export "$1=$2"
    say "$1=$2  ($3)"
  fi
}
xla_flag() { # xla_flag --NAME=VALUE WHY
  case " ${XLA_FLAGS:-} " in
    *" ${1%%=*}"[=\ ]*) say "XLA_FLAGS has ${1%%=*} already  (yours)" ;;
    *)
      export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$1"
      say "XLA_FLAGS+=$1  ($2)"
      ;;
  esac
}

gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ -z "${CUDA_VISIBLE_DEVICES+set}" ] || gpus=$(printf %s "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c . || true)
fi

if [ "$gpus" -gt 0 ]; then
  installed jax_cuda12_plugin jax_cuda13_plugin ||
    mistake "$gpus GPUs here, but the JAX in $venv runs on the CPU: launch/setup.sh cuda13 (or cuda12), or JAX_PLATFORMS=cpu to train on the CPU"
  say "$gpus GPUs"
  default JAX_PLATFORMS cuda,cpu "a GPU that does not start is an error, not a silent run on the CPU"
  default XLA_PYTHON_CLIENT_MEM_FRACTION 0.9 "the trainer owns the GPU; JAX takes 0.75 of it by itself, the rest is for NCCL and cuDNN"
  xla_flag --xla_gpu_enable_latency_hiding_scheduler=true "gathers the next layer's weights while this one computes"
  if [ "${SLURM_STEP_TASKS_PER_NODE:-}" ] && [ "${SLURM_STEP_TASKS_PER_NODE%%(*}" = 1 ]; then
    default JAX_LOCAL_DEVICE_IDS "$(seq -s , 0 $((gpus - 1)))" "under SLURM, JAX gives each process one GPU; here one process has them all"
  fi
elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then
  installed libtpu || mistake "a TPU is here, but libtpu is not in $venv: launch/setup.sh tpu"
  say "TPU"
  default JAX_PLATFORMS tpu,cpu "a TPU that does not start is an error, not a silent run on the CPU"
else
  say "no accelerator found: training on the CPU"
  default JAX_PLATFORMS cpu "keeps plugins of absent hardware quiet"
fi

if [ -n "${IPT_COORDINATOR:-}" ]; then
  say "process ${IPT_PROCESS_ID:-?} of ${IPT_NUM_PROCESSES:-?}, meeting at $IPT_COORDINATOR"
elif [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  say "SLURM: process ${SLURM_PROCID:-?} of $SLURM_STEP_NUM_TASKS"
fi
say "ipt train $*"
exec "$venv/bin/ipt" train "$@"
