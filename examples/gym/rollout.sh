#!/usr/bin/env bash
# The rollout server: games of an environment of ms-swift's gym interface, grown as trees.
# MODEL and PORT come from run.sh; set them yourself to run this by hand (README.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export SCHEDULER=${SCHEDULER:-treepo_gym}

exec bash "$here/../quickstart/rollout.sh" \
    --external_plugins "$here/../../plugin/treepo_plugin.py" "$here/number_game.py" \
    --use_gym_env true \
    --gym_env number_game \
    --max_turns 5 \
    "$@"
