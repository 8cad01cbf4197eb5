#!/usr/bin/env bash
# GPUs 0 to 3: all weights of a 7B model, ZeRO-3. The paper's script, but for 64 prompts a rollout instead of 512: a
# rollout of 64 x 16 answers is trained on in two steps of 32 x 16.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

CUDA_VISIBLE_DEVICES=${GPUS:-0,1,2,3} NPROC_PER_NODE=${RANKS:-4} swift rlhf \
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
    --vllm_server_host 127.0.0.1 \
    --vllm_server_port 8000 \
    --num_generations 16 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 32 \
    --steps_per_generation 64 \
    --dynamic_sample true \
    --max_resample_times 2 \
    --max_completion_length 7168 \
    --learning_rate 1e-6 \
    --lr_scheduler_type constant_with_warmup \
    --warmup_steps 10 \
    --beta 0 \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --logging_steps 1 \
    --save_steps 50 \
    --output_dir "${OUTPUT:-output/eight_gpus_full}"
