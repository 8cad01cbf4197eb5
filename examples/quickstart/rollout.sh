#!/usr/bin/env bash
# The rollout server: vLLM grows the trees here. For a CPU; ../recipes has the like for GPUs.
# MODEL, PORT and TREEPO_CONFIG come from run.py; set them yourself to run this by hand (README.md). With an empty
# SCHEDULER there are no trees: every answer is sampled by itself.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCHEDULER=${SCHEDULER-treepo}
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}
eval "$(python -m treepo_swift.compat.cpu)"  # beside vLLM's CPU build: torch shall use neither GPU nor NCCL

swift rollout \
    --model "${MODEL:?path of the model}" \
    --model_type qwen2 \
    --template chatml \
    --torch_dtype float32 \
    --external_plugins "$(treepo-swift plugin)" \
    ${SCHEDULER:+--multi_turn_scheduler "$SCHEDULER"} \
    --vllm_use_async_engine true \
    --vllm_enforce_eager true \
    --vllm_max_model_len 384 \
    --vllm_engine_kwargs '{"block_size": 32}' \
    --host 127.0.0.1 \
    --port "${PORT:-8000}" \
    "$@"
