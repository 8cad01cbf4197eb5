#!/usr/bin/env bash
# The whole loop on a CPU, from nothing: environment, model, rollout server, training, result. See README.md here.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
bash "$root/scripts/cpu_env.sh"
exec "$root/.venv/bin/python" "$here/run.py" "$@"
