#!/usr/bin/env bash
# The rollout server: a model that may call a calculator and a search, grown as trees.
# MODEL and PORT come from run.sh; set them yourself to run this by hand (README.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export SCHEDULER=${SCHEDULER:-tool_tree}

exec bash "$here/../quickstart/rollout.sh" \
    --external_plugins "$here/../../plugin/treepo_plugin.py" "$here/tool_scheduler.py" \
    --agent_template hermes \
    --max_turns 3 \
    --vllm_max_model_len 1024 \
    "$@"
