#!/usr/bin/env bash
# On each node for training, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT as torchrun wants them:
#
#   ROLLOUT_NODES="10.0.0.1 10.0.0.2" NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.3 MASTER_PORT=29500 bash train.sh
#
# 256 prompts x 16 a step over 16 GPUs; each prompt grows whole on one of the servers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

hosts=() ports=()
for node in ${ROLLOUT_NODES:?addresses of the nodes where rollout.sh runs}; do
    hosts+=("$node" "$node") ports+=(8000 8001)
done

NNODES=${NNODES:?} NODE_RANK=${NODE_RANK:?} NPROC_PER_NODE=${RANKS:-8} swift rlhf \
    --rlhf_type grpo \
    --model "${MODEL:-Qwen/Qwen2.5-7B}" \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --deepspeed zero3 \
    --external_plugins "$(treepo-swift plugin)" \
    --reward_funcs accuracy soft_overlong \
    --soft_max_length 7168 \
    --soft_cache_length 512 \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR}" \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host "${hosts[@]}" \
    --vllm_server_port "${ports[@]}" \
    --num_generations 16 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 64 \
    --max_completion_length 7168 \
    --learning_rate 1e-6 \
    --beta 0 \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --logging_steps 1 \
    --save_steps 50 \
    --output_dir "${OUTPUT:-output/several_nodes}"
