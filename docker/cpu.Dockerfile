# es_trainer on CPUs, with the versions with which its tests last passed (constraints.txt):
#
#   docker build --file docker/cpu.Dockerfile --tag es-trainer:cpu .
#   docker run --rm --volume "$PWD:/work" es-trainer:cpu train --recipe smollm2/conciseness --output_dir brief
#
# PyPI's torch brings some gigabytes for CUDA along on x86. `--build-arg PIP_EXTRA_INDEX_URL=...` with the index of
# PyTorch's CPU builds takes one without them.
#
# Not built with Docker yet: none was at hand. Its steps were run in a clean virtual environment, which then trained for
# a step; hadolint has read it, and tests/test_docker.py resolves what it installs.
FROM python:3.11-slim-bookworm

ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1

WORKDIR /source
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY es_trainer es_trainer
RUN pip install --constraint constraints.txt '.[agents,math,quickstart,trackers]'

WORKDIR /work
ENTRYPOINT ["es-trainer"]
CMD ["--help"]
