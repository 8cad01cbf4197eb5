#!/usr/bin/env bash
# Tests a pair of vLLM (CPU build) and ms-swift in an environment of its own:
#
#   bash scripts/versions.sh 0.20.2x4.6.0               # VLLMxSWIFT; the environment stays in output/versions/
#   bash scripts/versions.sh 0.20.2x4.6.0 unit training # only these parts: env, unit, integration, training
#
# `training` is tests/e2e/test_loop.py: 3 GRPO steps of the quickstart's scripts against a real rollout server, with the
# weight sync proven and the log-probs compared with the saved model's. What each part said is in PAIR.log beside the
# environment; the last lines here are the summary. A part that fails does not keep the next ones from running.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pair=${1:?the first argument is a pair of versions, VLLMxSWIFT, for instance 0.20.2x4.6.0}
shift
folder=${VERSIONS_DIR:-$root/output/versions}
venv=$folder/$pair
log=$folder/$pair.log
mkdir -p "$folder"
cd "$root"

part() {
    case $1 in
        env) bash scripts/cpu_env.sh --pair "$pair" --venv "$venv" ;;
        unit) tests tests/unit ;;
        integration) tests tests/integration ;;
        training) tests -s tests/e2e/test_loop.py::test_training_on_trees ;;
        *) echo "$1 is no part: they are env, unit, integration and training" >&2 && return 2 ;;
    esac
}
# The package of this folder, whichever one the environment was installed from.
tests() { CI=true PYTHONPATH=$root "$venv/bin/python" -m pytest -q -p no:cacheprovider "$@"; }

failed=
summary=
[ $# -gt 0 ] || set -- env unit integration training
: >"$log"
for name in "$@"; do
    began=$SECONDS
    part "$name" >"$log.part" 2>&1 && status=ok || { status=FAILED; failed=yes; }
    { echo "== $name"; cat "$log.part"; } >>"$log"
    said=$(grep -E '([0-9]+ (passed|failed)|\[environment\] (ready|.*stop))' "$log.part" | tail -n 1)
    saved=$(grep -o 'tokens saved: .*' "$log.part" | tail -n 1)
    summary+="$status  $name, $((SECONDS - began)) s: ${said:-$(tail -n 1 "$log.part")}${saved:+; $saved}"$'\n'
    rm -f "$log.part"
    [ "$name$status" = envFAILED ] && break
done
echo "vLLM x ms-swift $pair, $(date +%F), $("$venv/bin/python" -m pip list 2>/dev/null |
    grep -iE '^(torch|transformers|trl|accelerate|deepspeed) ' | awk '{printf "%s%s %s", s, $1, $2; s=", "}')"
printf '%s' "$summary"
echo "The whole log: $log"
[ -z "$failed" ]
