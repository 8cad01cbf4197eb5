#!/usr/bin/env bash
# On each node for rollouts: two servers of four GPUs (one event loop feeds about four engines, see docs/scale.md).
# Nobody else may reach these ports, nor 51216 and up on the same nodes: docs/gpu.md, Network.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

serve() {
    CUDA_VISIBLE_DEVICES=$1 swift rollout \
        --model "${MODEL:-Qwen/Qwen2.5-7B}" \
        --torch_dtype bfloat16 \
        --external_plugins "$(treepo-swift plugin)" \
        --multi_turn_scheduler treepo \
        --vllm_use_async_engine true \
        --vllm_data_parallel_size 4 \
        --vllm_max_model_len 9216 \
        --host "${HOST:?address of this node in the closed network}" \
        --port "$2"
}

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
serve 0,1,2,3 8000 &
serve 4,5,6,7 8001 &
wait
