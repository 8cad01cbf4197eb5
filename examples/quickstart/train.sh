#!/usr/bin/env bash
# GRPO on trees: 8 prompts a step, 8 trajectories each. Start rollout.sh first, with the same MODEL and PORT; or set
# COLOCATE=1, and vLLM runs in this process (with an empty SCHEDULER without trees). With an empty REWARD_FUNCS the
# rewards come from elsewhere (an environment).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
eval "$(python -m treepo_swift.compat.cpu)"  # beside vLLM's CPU build: torch shall use neither GPU nor NCCL
REWARD_FUNCS=${REWARD_FUNCS-digit_sum}
SCHEDULER=${SCHEDULER-treepo}
if [ -n "${COLOCATE:-}" ]; then
    # vLLM would bind this process, and so the trainer in it, to cores of its own choice.
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    rollout=(
        --vllm_mode colocate
        ${SCHEDULER:+--multi_turn_scheduler "$SCHEDULER"}
        --vllm_enforce_eager true
        --vllm_max_model_len 384
        --vllm_engine_kwargs '{"block_size": 32}'
    )
else
    rollout=(
        --vllm_mode server
        --vllm_server_host 127.0.0.1
        --vllm_server_port "${PORT:-8000}"
        --vllm_server_group_port "${GROUP_PORT:-51216}"
    )
fi

swift rlhf \
    --rlhf_type grpo \
    --model "${MODEL:?path of the model}" \
    --model_type qwen2 \
    --template chatml \
    --tuner_type full \
    --torch_dtype float32 \
    --bf16 false \
    --external_plugins "$(treepo-swift plugin)" "$here/reward.py" \
    ${REWARD_FUNCS:+--reward_funcs $REWARD_FUNCS} \
    --dataset "${DATASET:?path of train.jsonl}" \
    --load_from_cache_file false \
    --split_dataset_ratio 0 \
    --dataset_num_proc 1 \
    --dataloader_num_workers 0 \
    --use_vllm true \
    "${rollout[@]}" \
    --num_generations 8 \
    --per_device_train_batch_size 64 \
    --gradient_accumulation_steps 1 \
    --max_length 128 \
    --max_completion_length 256 \
    --max_steps "${STEPS:-40}" \
    --seed "${SEED:-42}" \
    --data_seed "${SEED:-42}" \
    --learning_rate 1e-4 \
    --lr_scheduler_type constant \
    --warmup_ratio 0 \
    --beta 0 \
    --loss_type dapo \
    --epsilon 0.2 \
    --epsilon_high 0.28 \
    --temperature 1.0 \
    --gradient_checkpointing false \
    --logging_steps 1 \
    --log_completions true \
    --save_steps "${SAVE_STEPS:-${STEPS:-40}}" \
    --save_only_model true \
    --output_dir "${OUTPUT:-output/quickstart/train}" \
    --add_version false \
    --report_to none \
    "$@"
