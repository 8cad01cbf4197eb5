#!/usr/bin/env bash
# GRPO on what rollout.sh gives: 8 prompts a step, 8 conversations each, at most 64 tokens a turn.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export OUTPUT=${OUTPUT:-output/saved_calls/train}

exec bash "$here/../quickstart/train.sh" --max_completion_length 64 "$@"
