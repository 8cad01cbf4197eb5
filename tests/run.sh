#!/usr/bin/env bash
# All checks and tests, from nothing: `bash tests/run.sh`. Arguments go to pytest, e.g. `bash tests/run.sh tests/unit`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/cpu_env.sh
bash scripts/browser_env.sh
bash scripts/check.sh
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"
# One test process keeps one core busy, so two run side by side; what the second says comes when both have ended.
said=$(mktemp)
measured() { COVERAGE_FILE=.coverage.$1 .venv/bin/python -m pytest "tests/$1" --cov --cov-report= --cov-fail-under=0 "${@:2}"; }
{ measured unit -q && bash scripts/older_swift.sh; } >"$said" 2>&1 &
beside=$!
trap 'rm -f "$said"' EXIT
passed=yes
measured integration --durations=8 || passed=
wait "$beside" || passed=
cat "$said"
[ -n "$passed" ]
# Below the coverage that pyproject.toml asks for it ends here.
.venv/bin/python -m coverage combine --quiet
.venv/bin/python -m coverage report
.venv/bin/python -m pytest tests/e2e --durations=12
