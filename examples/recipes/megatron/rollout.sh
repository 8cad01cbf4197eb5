#!/usr/bin/env bash
# GPUs 4 to 7: two vLLM engines of two GPUs each behind one server. Start it first, train.sh in another terminal.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPUS:-4,5,6,7} swift rollout \
    --model "${MODEL:-Qwen/Qwen2.5-7B-Instruct}" \
    --torch_dtype bfloat16 \
    --external_plugins "$(treepo-swift plugin)" \
    --multi_turn_scheduler treepo \
    --vllm_use_async_engine true \
    --vllm_data_parallel_size 2 \
    --vllm_tensor_parallel_size 2 \
    --vllm_max_model_len 5120 \
    --host 127.0.0.1 \
    --port 8000
