# nemo_minitron without a GPU, to try it; see README.md in this folder.
#
#   docker build -f docker/cpu.Dockerfile -t nemo_minitron:cpu .
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
FROM ${PYTHON_IMAGE}

# What pip is told for torch: "--index-url <index of CPU wheels> torch" keeps CUDA out of the image.
ARG TORCH=torch

COPY requirements/tested-3.12.txt /opt/tested.txt
# hadolint ignore=SC2086,DL3013
RUN pip install --no-cache-dir -c /opt/tested.txt ${TORCH}

COPY . /opt/nemo_minitron
RUN pip install --no-cache-dir -c /opt/tested.txt /opt/nemo_minitron \
    && minitron prune pruning=llama31_minitron_4b_width --cfg job > /dev/null

# Any user may run it, one without a name or a home too: see Dockerfile.
ENV HOME=/tmp USER=minitron MPLCONFIGDIR=/tmp/matplotlib
RUN mkdir -m 1777 /workspace
WORKDIR /workspace
