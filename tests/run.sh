#!/usr/bin/env bash
# All tests, from nothing: `bash tests/run.sh`. Arguments go to pytest, e.g. `bash tests/run.sh tests/unit`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/cpu_env.sh
.venv/bin/python -m flake8 treepo_swift plugin tests examples
.venv/bin/python -m isort --check-only --quiet treepo_swift plugin tests examples
exec .venv/bin/python -m pytest "$@"
