# The whole loop without a GPU: environment, quickstart, tests. From the repository's root:
#
#   docker build -f docker/cpu.Dockerfile -t treepo-swift:cpu .
#   docker run --rm --ipc=host treepo-swift:cpu                     # the quickstart, about 7 minutes on 2 cores
#   docker run --rm --ipc=host treepo-swift:cpu bash tests/run.sh   # all tests
#
# No image was built by the authors yet; scripts/cpu_env.sh, which does the work, runs in every test.
FROM python:3.11-slim-bookworm

# g++ and git are for torch's compiler and pip; libnuma1 for vLLM's CPU build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /treepo_swift
COPY . .
RUN bash scripts/cpu_env.sh
ENV PATH="/treepo_swift/.venv/bin:$PATH"
CMD ["bash", "examples/quickstart/run.sh"]
