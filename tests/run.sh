#!/usr/bin/env bash
# All checks and tests, from nothing: `bash tests/run.sh`. Arguments go to pytest, e.g. `bash tests/run.sh tests/unit`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/cpu_env.sh
bash scripts/browser_env.sh
bash scripts/check.sh
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"
# Below the coverage that pyproject.toml asks for it ends here.
.venv/bin/python -m pytest tests/unit tests/integration --cov --durations=8
bash scripts/older_swift.sh
exec .venv/bin/python -m pytest tests/e2e --durations=12
