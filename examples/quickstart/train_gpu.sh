#!/usr/bin/env bash
# The same loop on two GPUs: vLLM grows trees on GPU 1, GRPO trains on GPU 0. Two terminals, or `&` as here.
# Needs two GPUs with bfloat16 and room for the model (24 GB each for the default), ms-swift 4.6 and vLLM 0.32
# (`pip install -e ".[vllm]"`). It was not run by the authors on this hardware; the flags are those of the CPU scripts.
#
#   bash train_gpu.sh                      # Qwen2.5-0.5B on NuminaMath-TIR, both by their dataset and model ids
#   MODEL=Qwen/Qwen2.5-7B DATASET=... bash train_gpu.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
plugin=$here/../../plugin/treepo_plugin.py
model=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
dataset=${DATASET:-AI-MO/NuminaMath-TIR#1000}
export TREEPO_SEGMENT_LENGTH=${TREEPO_SEGMENT_LENGTH:-256} TREEPO_MAX_DEPTH=${TREEPO_MAX_DEPTH:-8}

CUDA_VISIBLE_DEVICES=1 swift rollout \
    --model "$model" \
    --torch_dtype bfloat16 \
    --external_plugins "$plugin" \
    --multi_turn_scheduler treepo \
    --vllm_use_async_engine true \
    --vllm_max_model_len 4096 \
    --host 127.0.0.1 \
    --port 8000 &
server=$!
trap 'kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

CUDA_VISIBLE_DEVICES=0 swift rlhf \
    --rlhf_type grpo \
    --model "$model" \
    --tuner_type full \
    --torch_dtype bfloat16 \
    --external_plugins "$plugin" \
    --reward_funcs accuracy \
    --dataset "$dataset" \
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
    --output_dir output/treepo_gpu
