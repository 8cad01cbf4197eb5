#!/usr/bin/env bash
# GPU 0: GRPO on the trees of rollout.sh. The setting of ms-swift's published example: Qwen2.5-0.5B, NuminaMath-TIR, W=8.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPU:-0} swift rlhf \
    --rlhf_type grpo \
    --model "${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --external_plugins "$(treepo-swift plugin)" \
    --reward_funcs accuracy \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR#1000}" \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host 127.0.0.1 \
    --vllm_server_port 8000 \
    --num_generations 8 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 8 \
    --max_completion_length 2048 \
    --learning_rate 1e-6 \
    --beta 0 \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --logging_steps 1 \
    --save_steps 50 \
    --output_dir "${OUTPUT:-output/two_gpus}"
