#!/usr/bin/env bash
# Makes the model, serves it, trains it and shows what came of it: bash examples/tools/run.sh --steps 20
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$here/../../scripts/cpu_env.sh"
exec "$here/../../.venv/bin/python" "$here/../run_recipe.py" --recipe "$here" --task tool_task.py "$@"
