#!/usr/bin/env bash
# GPU 1: vLLM grows the trees. Start it first, train.sh in another terminal.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPU:-1} swift rollout \
    --model "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --torch_dtype bfloat16 \
    --external_plugins "$(treepo-swift plugin)" \
    --multi_turn_scheduler treepo \
    --vllm_use_async_engine true \
    --vllm_max_model_len 4096 \
    --host 127.0.0.1 \
    --port 8000
