#!/usr/bin/env bash
# GPUs 0 to 3: Megatron-SWIFT, tensor parallel 4, 32 prompts x 16 a step.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPUS:-0,1,2,3} NPROC_PER_NODE=${RANKS:-4} megatron rlhf \
    --rlhf_type grpo \
    --model "${MODEL:-Qwen/Qwen2.5-7B-Instruct}" \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --external_plugins "$(treepo-swift plugin)" \
    --reward_funcs accuracy \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR}" \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host 127.0.0.1 \
    --vllm_server_port 8000 \
    --tensor_model_parallel_size 4 \
    --sequence_parallel true \
    --num_generations 16 \
    --micro_batch_size 4 \
    --global_batch_size 512 \
    --steps_per_generation 1 \
    --num_iterations 1 \
    --max_completion_length 3584 \
    --lr 1e-6 \
    --beta 0 \
    --loss_type grpo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --recompute_granularity selective \
    --attention_backend flash \
    --num_train_epochs 1 \
    --logging_steps 1 \
    --save_steps 50 \
    --output_dir "${OUTPUT:-output/megatron}"
