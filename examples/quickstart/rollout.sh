#!/usr/bin/env bash
# The rollout server: vLLM grows the trees here. CPU by default; see train_gpu.sh for GPUs.
# MODEL, PORT and TREEPO_CONFIG come from run.py; set them yourself to run this by hand (README.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TREEPO_CONFIG=${TREEPO_CONFIG:-$here/tree.yaml}

swift rollout \
    --model "${MODEL:?path of the model}" \
    --model_type qwen2 \
    --template chatml \
    --torch_dtype float32 \
    --external_plugins "$here/../../plugin/treepo_plugin.py" \
    --multi_turn_scheduler treepo \
    --vllm_use_async_engine true \
    --vllm_enforce_eager true \
    --vllm_max_model_len 384 \
    --vllm_engine_kwargs '{"block_size": 32}' \
    --host 127.0.0.1 \
    --port "${PORT:-8000}" \
    "$@"
