#!/usr/bin/env bash
# Train a model on the accelerators of this machine, or as one host of many.
#
#   launch/pretrain.sh CONFIG [key=value…]     for example: launch/pretrain.sh configs/pretrain/1.3b_instruct.yaml
#
# Writes checkpoints and metrics to run_dir. Rerun the same command to resume from the latest checkpoint.
# Run it once per host:
#   SLURM: srun --ntasks-per-node=1 launch/pretrain.sh CONFIG      (launch/slurm/pretrain.sbatch)
#   TPU slice: the same command on all workers
#   other clusters: IPT_COORDINATOR=HOST:PORT IPT_NUM_PROCESSES=N IPT_PROCESS_ID=I launch/pretrain.sh CONFIG
# IPT_RESTARTS=N restarts a run that fails, up to N times: after every exit code but 0 (finished) and 2 (a mistake), and
# unless a signal stopped this script. It gives up when two tries in a row reach no new checkpoint.
# Exits with code 2 if a GPU is lost, hidden or lacks its driver. JAX_PLATFORMS=cpu trains on the CPU.
# Prints every variable that it sets. Variables that are already set are kept.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
start ipt "launch/setup.sh cuda13 or cuda12 (GPUs), launch/setup.sh tpu, or launch/setup.sh (CPU)" "$@"

default() { # default NAME VALUE WHY: set a variable unless the user did
  if [ -n "${!1+set}" ]; then
    say "$1=${!1}  (set by you)"
  else
    export "$1=$2"
    say "$1=$2  ($3)"
  fi
}
xla_flag() { # xla_flag --NAME=VALUE WHY
  case " ${XLA_FLAGS:-} " in
    *" ${1%%=*}"[=\ ]*) say "XLA_FLAGS has ${1%%=*} already  (set by you)" ;;
    *)
      export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$1"
      say "XLA_FLAGS+=$1  ($2)"
      ;;
  esac
}

on_purpose="set JAX_PLATFORMS=cpu to train on the CPU on purpose"
count_gpus() { # set gpus to the number of visible GPUs; exit if a GPU or its driver is lost
  gpus=0
  if command -v nvidia-smi >/dev/null; then
    local said status=0 limit
    limit=$(command -v timeout || true) # nvidia-smi can hang on a lost GPU
    said=$(${limit:+"$limit" 60} nvidia-smi -L 2>&1) || status=$?
    gpus=$(grep -c '^GPU ' <<<"$said" || true)
    if [ "$status" -ne 0 ] || { [ -n "$said" ] && [ "$gpus" -eq 0 ]; }; then
      said=$(grep -v '^GPU ' <<<"$said" | head -n 1 || true)
      mistake "nvidia-smi fails: ${said:-no message} (exit code $status); repair the GPU or its driver, or $on_purpose"
    fi
  else # containers with GPUs may lack nvidia-smi
    gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2>/dev/null | grep -c . || true)
  fi
  if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    local name visible=0
    for name in ${CUDA_VISIBLE_DEVICES//,/ }; do # CUDA stops at the first name that does not exist
      case $name in
        -1 | NoDevFiles | none | void) break ;;
        *[!0-9]*) ;; # a UUID
        *) [ "$name" -lt "$gpus" ] ||
          mistake "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names GPU $name, but the GPUs here are 0 to $((gpus - 1)); look for a lost GPU with nvidia-smi -L, or correct the list" ;;
      esac
      visible=$((visible + 1))
    done
    [ "$visible" -gt 0 ] ||
      mistake "CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' hides all $gpus GPUs of this machine; unset it, or $on_purpose"
    gpus=$visible
  fi
}

gpus=0
[ "${JAX_PLATFORMS:-}" = cpu ] || count_gpus

if [ "$gpus" -gt 0 ]; then
  installed jax_cuda12_plugin jax_cuda13_plugin ||
    mistake "$gpus GPUs here, but JAX in $venv has no CUDA plugin; run launch/setup.sh cuda13 (or cuda12), or $on_purpose"
  say "$gpus GPUs"
  default JAX_PLATFORMS cuda,cpu "fail if a GPU does not start, instead of running on the CPU"
  default XLA_PYTHON_CLIENT_MEM_FRACTION 0.9 "fraction of GPU memory; default of JAX 0.75; the rest is for NCCL and cuDNN"
  xla_flag --xla_gpu_enable_latency_hiding_scheduler=true "gather the weights of the next layer during compute"
  if [ "${SLURM_STEP_TASKS_PER_NODE:-}" ] && [ "${SLURM_STEP_TASKS_PER_NODE%%(*}" = 1 ]; then
    default JAX_LOCAL_DEVICE_IDS "$(seq -s , 0 $((gpus - 1)))" "one process uses all GPUs; under SLURM, JAX assigns one GPU per process"
  fi
elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then
  installed libtpu || mistake "found a TPU, but libtpu is not installed in $venv; run launch/setup.sh tpu"
  say "TPU"
  default JAX_PLATFORMS tpu,cpu "fail if a TPU does not start, instead of running on the CPU"
else
  case ",${JAX_PLATFORMS:-}," in
    *,cuda,* | *,gpu,* | *,tpu,*)
      mistake "JAX_PLATFORMS=$JAX_PLATFORMS, but no GPU and no TPU was found on this machine; repair the driver, or $on_purpose"
      ;;
  esac
  say "no accelerator found: training on the CPU"
  default JAX_PLATFORMS cpu "do not load plugins for other hardware"
fi

if [ -n "${IPT_COORDINATOR:-}" ]; then
  say "process ${IPT_PROCESS_ID:-?} of ${IPT_NUM_PROCESSES:-?}, coordinator $IPT_COORDINATOR"
elif [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
  say "SLURM: process ${SLURM_PROCID:-?} of $SLURM_STEP_NUM_TASKS"
fi
say "ipt train $*"
restarts=${IPT_RESTARTS:-0}
case $restarts in *[!0-9]*) mistake "IPT_RESTARTS is '$restarts'; set it to a number of restarts" ;; esac
[ "$restarts" -gt 0 ] || exec "$venv/bin/ipt" train "$@"

newest_checkpoint() { # print the step of the run's newest checkpoint, 0 without one
  "$venv/bin/python" -c "
import sys
from pathlib import Path
from ipt_jax.config import Recipe
from ipt_jax.core.checkpoint_digests import numbered
from ipt_jax.core.settings import load_settings
fields = [argument for argument in sys.argv[2:] if not argument.startswith('--')]
found = numbered(Path(load_settings(Recipe, sys.argv[1], fields).run_dir) / 'checkpoints')
print(found[0].name if found else 0)" "$@" 2>/dev/null || echo 0
}

stopped=
for name in TERM INT HUP USR1; do # a command in the background ignores SIGINT, so all are passed on as SIGTERM
  trap 'stopped=yes; kill -TERM "$train" 2>/dev/null || true' "$name"
done
before=$(newest_checkpoint "$@") try=0 stuck=0
while :; do
  "$venv/bin/ipt" train "$@" &
  train=$!
  while wait "$train" || kill -0 "$train" 2>/dev/null; do # a signal ends `wait` before the run ends
    kill -0 "$train" 2>/dev/null || break
  done
  code=0
  wait "$train" || code=$?
  case $code in 0 | 2) exit "$code" ;; esac
  [ -z "$stopped" ] || exit "$code"
  step=$(newest_checkpoint "$@")
  ended="ipt train ended with exit code $code; the newest checkpoint is step $step"
  stuck=$((step > before ? 0 : stuck + 1)) before=$step
  if [ "$stuck" -ge 2 ]; then
    say "$ended, as at the last try; not restarted: the same fault would end it again"
    exit "$code"
  elif [ "$try" -ge "$restarts" ]; then
    say "$ended; not restarted: IPT_RESTARTS=$restarts is used up"
    exit "$code"
  fi
  try=$((try + 1))
  say "$ended; restart $try of $restarts"
done
