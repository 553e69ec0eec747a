#!/usr/bin/env bash
# The whole test suite with every extra that a CPU can run, the real vLLM included. Installs what is missing first.
#
#   launch/test.sh [PYTEST ARGUMENT…]        for example: launch/test.sh tests/test_parse.py -k nested
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/setup.sh" test
cd "$root"
exec "${IPT_VENV:-$root/.venv}/bin/python" -m pytest -q --durations=15 "$@"
