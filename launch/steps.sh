# Named steps that are skipped once finished. Sourced by quickstart.sh and real.sh.
#
#   step NAME "PURPOSE" COMMAND… : run COMMAND, whose stdout is one JSON object, and write it to $steps/NAME.json.
#   A step is skipped if its command and its recipe are unchanged and no earlier step was rerun. A step that was killed
#   is resumed by its command.

steps_begun=$SECONDS
steps_redo=

step() {
  local name=$1 purpose=$2 begun=$SECONDS key recipe
  shift 2
  key=$(for recipe in "$@"; do
    echo "$recipe"
    case $recipe in *.yaml | *.py | *.jsonl) [ ! -f "$recipe" ] || cat "$recipe" ;; esac
  done | cksum)
  if [ -z "$steps_redo" ] && [ -s "$steps/$name.json" ] && [ "$(cat "$steps/$name.key" 2>/dev/null)" = "$key" ]; then
    printf '\033[2m  done   %-12s %s\033[0m\n' "$name" "$purpose"
    return
  fi
  steps_redo=yes
  printf '\033[1m▸ %-12s\033[0m %s\n' "$name" "$purpose"
  printf '\033[2m  %s\033[0m\n' "$*"
  rm -f "$steps/$name.key"
  if ! "$@" >"$steps/$name.tmp"; then
    printf '\n%s failed. Finished work is kept. Rerun this script to resume.\n' "$name" >&2
    exit 1
  fi
  mv "$steps/$name.tmp" "$steps/$name.json"
  echo "$key" >"$steps/$name.key"
  printf '\033[2m  %s s, %s s so far\033[0m\n' "$((SECONDS - begun))" "$((SECONDS - steps_begun))"
}
