#!/usr/bin/env bash
# GRPO on the environment's own rewards: 8 games a step, played 8 times each, at most 48 tokens a guess.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
export OUTPUT=${OUTPUT:-output/gym/train}

REWARD_FUNCS='' exec bash "$here/../quickstart/train.sh" \
    --use_gym_env true \
    --vllm_server_pass_dataset true \
    --max_completion_length 48 \
    "$@"
