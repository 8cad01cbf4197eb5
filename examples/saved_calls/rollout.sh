#!/usr/bin/env bash
# The rollout server: turns of one step each, as trees. SCHEDULER=one_step samples every conversation by itself.
# MODEL, PORT and MAX_TURNS come from count_calls.py; set them yourself to run this by hand (README.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export SCHEDULER=${SCHEDULER:-one_step_tree}

exec bash "$here/../quickstart/rollout.sh" \
    --external_plugins "$here/../../plugin/treepo_plugin.py" "$here/step_scheduler.py" \
    --max_turns "${MAX_TURNS:-5}" \
    --vllm_max_model_len 512 \
    "$@"
