# Start of pretrain.sh and synthesize.sh, sourced by them: usage, messages, and checks of the recipe and the environment.
#
#   start COMMAND SETUP "$@": exit unless the first argument is a recipe and $venv has COMMAND, which SETUP installs
#   installed MODULE…: whether $venv has one of these Python modules

script=${BASH_SOURCE[1]}
root=$(cd "$(dirname "$script")/.." && pwd)
venv=${IPT_VENV:-$root/.venv}

say() { printf '%s: %s\n' "$(basename "$script" .sh)" "$*" >&2; }
mistake() { say "$*"; exit 2; }
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$script"; }
installed() { "$venv/bin/python" -c "import importlib.util, sys; sys.exit(not any(map(importlib.util.find_spec, sys.argv[1:])))" "$@"; }

start() {
  case ${3:-} in
    "") usage >&2; exit 2 ;;
    -h | --help) usage; exit 0 ;;
  esac
  [ -f "$3" ] || mistake "no such recipe: $3"
  [ -x "$venv/bin/$1" ] || mistake "no environment in $venv; run $2"
}
