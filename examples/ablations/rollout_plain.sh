#!/usr/bin/env bash
# A plain rollout server: examples/quickstart/rollout.sh without the tree scheduler, so every answer is sampled by itself.
# The plugin is loaded for what it patches where there is no GPU. MODEL and PORT come from compare.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

swift rollout \
    --model "${MODEL:?path of the model}" \
    --model_type qwen2 \
    --template chatml \
    --torch_dtype float32 \
    --external_plugins "$here/../../plugin/treepo_plugin.py" \
    --vllm_use_async_engine true \
    --vllm_enforce_eager true \
    --vllm_max_model_len 384 \
    --vllm_engine_kwargs '{"block_size": 32}' \
    --host 127.0.0.1 \
    --port "${PORT:-8000}" \
    "$@"
