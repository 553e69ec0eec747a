#!/usr/bin/env bash
# Run the test suite. Missing packages are installed first.
#
#   launch/test.sh [PYTEST ARGUMENT…]        all tests, with every extra that runs on a CPU, including vLLM (5 GB)
#   launch/test.sh core [PYTEST ARGUMENT…]   tests without the mark "extra": no torch, no vLLM, no Ray (1 GB)
#
# Example: launch/test.sh core tests/synth/test_parse.py -k nested
# CI=true also runs the tests of `ipt compile` and installs their compilers for GPUs and TPUs in .venv-compile (6.5 GB).
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
