#!/usr/bin/env bash
# The quickstart's training with rules of one's own. MODEL, DATASET and PORT as there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export OUTPUT=${OUTPUT:-output/own_rules/train}

exec bash "$here/../quickstart/train.sh" --external_plugins "$here/own_rules.py" "$here/../quickstart/reward.py" "$@"
