# Rollout server and trainer on GPUs, over vLLM's own image. From the repository's root:
#
#   docker build -f docker/cuda.Dockerfile -t treepo-swift:cuda .
#   docker run --rm --gpus all --ipc=host -v "$PWD/output:/workspace/output" treepo-swift:cuda treepo-swift doctor
#
# Not built or run by the authors: they have no GPU with Docker. The versions are the pair that is tested on CPUs.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
ARG SWIFT=4.6.0

WORKDIR /treepo_swift
COPY pyproject.toml README.md LICENSE ./
COPY treepo_swift treepo_swift
# vLLM and torch are the image's: the resolver must not replace them.
RUN pip install --no-cache-dir "ms-swift==${SWIFT}" "deepspeed>=0.19.8,<0.20" "math_verify>=0.9,<0.10" . \
    && treepo-swift plugin

WORKDIR /workspace
ENTRYPOINT []
CMD ["treepo-swift", "doctor"]
