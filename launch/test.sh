#!/usr/bin/env bash
# The whole test suite with every extra that a CPU can run, the real vLLM included. Installs what is missing first. With
# CI=true the compilers for GPUs and TPUs too (6.5 GB, in .venv-compile): without them, tests of `ipt compile` skip.
#
#   launch/test.sh [PYTEST ARGUMENT…]        for example: launch/test.sh tests/test_parse.py -k nested
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" test
if [ "${CI:-}" = true ]; then
  export IPT_COMPILE_VENV=${IPT_COMPILE_VENV:-$root/.venv-compile}
  IPT_VENV=$IPT_COMPILE_VENV "$root/launch/setup.sh" compile-gpu compile-tpu
fi
cd "$root"
exec "${IPT_VENV:-$root/.venv}/bin/python" -m pytest -q --durations=15 "$@"
