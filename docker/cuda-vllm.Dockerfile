# es_trainer with vLLM on NVIDIA GPUs, with the versions of tests/with_vllm/constraints-*.txt, with which its tests last
# passed (with vLLM's CPU build):
#
#   docker build --file docker/cuda-vllm.Dockerfile --tag es-trainer:cuda-vllm .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" es-trainer:cuda-vllm train --config run.yaml
#
# `--build-arg VLLM=0.31.0` takes another version of vLLM that has a file of constraints. CUDA's libraries are those that
# torch brings along; the driver is the host's, through the NVIDIA Container Toolkit.
#
# Not built yet: no Docker was at hand. hadolint has read it, and tests/test_docker.py resolves what it installs.
FROM python:3.11-slim-bookworm

ARG VLLM=0.32.0
ENV PIP_NO_CACHE_DIR=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Triton compiles what launches its kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY tests/with_vllm/constraints-${VLLM}.txt constraints.txt
RUN pip install --constraint constraints.txt "vllm==${VLLM}"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY es_trainer es_trainer
RUN pip install --constraint constraints.txt '.[agents,math,quickstart,trackers,vllm]'

WORKDIR /work
ENTRYPOINT ["es-trainer"]
CMD ["--help"]
