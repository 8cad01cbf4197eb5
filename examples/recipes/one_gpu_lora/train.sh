#!/usr/bin/env bash
# One GPU: vLLM and the training share it (colocate mode), LoRA. See README.md beside this folder for what was run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPU:-0} swift rlhf \
    --rlhf_type grpo \
    --model "${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}" \
    --tuner_type lora \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0 \
    --torch_dtype bfloat16 \
    --external_plugins "$(treepo-swift plugin)" \
    --multi_turn_scheduler treepo \
    --reward_funcs accuracy \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR#1000}" \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_gpu_memory_utilization 0.4 \
    --vllm_max_model_len 3072 \
    --sleep_level 1 \
    --num_generations 8 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 8 \
    --max_completion_length 2048 \
    --learning_rate 1e-5 \
    --beta 0 \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --logging_steps 1 \
    --save_steps 50 \
    --output_dir "${OUTPUT:-output/one_gpu_lora}"
