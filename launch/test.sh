#!/usr/bin/env bash
# Runs the test suite. Installs what is missing first.
#
#   launch/test.sh [PYTEST ARGUMENT…]        all tests, with every extra that a CPU can run, the real vLLM included (5 GB)
#   launch/test.sh core [PYTEST ARGUMENT…]   the core tests: those without the mark "extra"; no torch, no vLLM, no Ray (1 GB)
#
# For example: launch/test.sh core tests/test_parse.py -k nested. With CI=true, all tests include those of `ipt compile`,
# which need the compilers for GPUs and TPUs (6.5 GB, in .venv-compile); elsewhere those are skipped.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=test select=()
if [ "${1:-}" = core ]; then
  shift
  extra=test-core select=(-m "not extra")
fi
"$root/launch/setup.sh" "$extra"
if [ "${CI:-}" = true ] && [ "$extra" = test ]; then
  export IPT_COMPILE_VENV=${IPT_COMPILE_VENV:-$root/.venv-compile}
  IPT_VENV=$IPT_COMPILE_VENV "$root/launch/setup.sh" compile-gpu compile-tpu
fi
cd "$root"
exec "${IPT_VENV:-$root/.venv}/bin/python" -m pytest -q --durations=15 "${select[@]}" "$@"
