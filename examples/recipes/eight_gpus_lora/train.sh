#!/usr/bin/env bash
# GPUs 0 to 3: LoRA of a 7B model, ZeRO-2, 16 prompts x 16 a step.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPUS:-0,1,2,3} NPROC_PER_NODE=${RANKS:-4} swift rlhf \
    --rlhf_type grpo \
    --model "${MODEL:-Qwen/Qwen2.5-7B-Instruct}" \
    --tuner_type lora \
    --lora_rank 64 \
    --lora_alpha 64 \
    --lora_dropout 0 \
    --torch_dtype bfloat16 \
    --deepspeed zero2 \
    --external_plugins "$(treepo-swift plugin)" \
    --reward_funcs accuracy \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR}" \
    --use_vllm true \
    --vllm_mode server \
    --vllm_server_host 127.0.0.1 \
    --vllm_server_port 8000 \
    --num_generations 16 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 4 \
    --max_completion_length 3584 \
    --learning_rate 1e-5 \
    --beta 0 \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --logging_steps 1 \
    --save_steps 50 \
    --output_dir "${OUTPUT:-output/eight_gpus_lora}"
