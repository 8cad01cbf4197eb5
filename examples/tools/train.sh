#!/usr/bin/env bash
# GRPO on tool calls: 8 questions a step, 8 conversations each, at most 96 tokens a turn.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export OUTPUT=${OUTPUT:-output/tools/train}

exec bash "$here/../quickstart/train.sh" \
    --agent_template hermes \
    --max_length 768 \
    --max_completion_length 96 \
    "$@"
