#!/usr/bin/env bash
# The quickstart's server with rules of one's own. MODEL and PORT as there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

exec bash "$here/../quickstart/rollout.sh" --external_plugins "$here/own_rules.py" "$@"
