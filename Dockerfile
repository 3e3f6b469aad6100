# softvllm in a container: target `server` (the default) and target `trainer` (no vLLM).
#
#   docker build -t softvllm .                                    for NVIDIA GPUs
#   docker build -t softvllm:cpu --build-arg FLAVOUR=cpu .
#   docker build -t softvllm-trainer --target trainer .
#
# The CUDA libraries come with the packages, so a plain Python image is base enough; only the
# driver is the host's. docs/docker.md: use, compose, mirrors, and what was checked.

# Debian 12 with Python 3.11, the pair that constraints*.txt were tested with.
ARG BASE=python:3.11-slim-bookworm
# cuda or cpu.
ARG FLAVOUR=cuda
# Of torch's CPU builds, which are not on PyPI; or your mirror of it.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# Fixed and the same in both images, so that each may write what the other left in a volume.
ARG USER_ID=1000
ARG VERSION=0.1.0
ARG REVISION=unknown

# ---- what both images share ------------------------------------------------------------------
FROM ${BASE} AS base
ARG USER_ID
RUN groupadd --gid "${USER_ID}" softvllm \
    && useradd --uid "${USER_ID}" --gid "${USER_ID}" --create-home --shell /usr/sbin/nologin \
        softvllm \
    && install -d -o softvllm -g softvllm /cache /weights /runs

# Everything that is fetched or compiled at run time lands in /cache, a volume.
# PIP_CONFIG_FILE names the build secret `pip_conf`; without that secret there is no such file.
ENV PATH=/opt/softvllm/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_CONFIG_FILE=/run/secrets/pip_conf \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    HF_HOME=/cache/huggingface \
    SOFTVLLM_CACHE=/cache/softvllm \
    VLLM_CACHE_ROOT=/cache/vllm \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba \
    VLLM_NO_USAGE_STATS=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/softvllm

# ---- with a C++ compiler and Python.h, which python:* images bring and Debian's python3 does not --
FROM base AS compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && headers=$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("INCLUDEPY"))') \
    && apt-get install --yes --no-install-recommends g++ \
    && { [ -e "$headers/Python.h" ] \
        || apt-get install --yes --no-install-recommends python3-dev; } \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

# ---- trainer: torch and transformers, no vLLM; some packages of the rewards are compiled ---------
FROM compiler AS trainer-packages
ARG FLAVOUR
ARG TORCH_CPU_INDEX

COPY pyproject.toml LICENSE constraints.txt constraints-cpu.txt ./
# Editable, and before the sources: the packages stay one layer that a change of ours leaves alone.
# torch goes first, as in scripts/install.sh; both flavours use the version that the CPU file pins.
# hadolint ignore=DL3013,DL3042
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca \
    touch README.md \
    && torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints-cpu.txt) \
    && case "${FLAVOUR}" in \
        cpu) versions=constraints-cpu.txt ;; \
        cuda) versions=constraints.txt; torch=${torch%%+*} ;; \
        *) echo "FLAVOUR=${FLAVOUR}: must be cuda or cpu" >&2; exit 1 ;; \
    esac \
    && python3 -m venv .venv \
    && { .venv/bin/pip install --quiet --no-deps "$torch" \
        || { [ "${FLAVOUR}" = cpu ] && .venv/bin/pip install --quiet --no-deps "$torch" \
            --extra-index-url "${TORCH_CPU_INDEX}"; }; } \
    && .venv/bin/pip install --quiet --constraint "$versions" "$torch" --editable ".[trainer]" \
    && .venv/bin/python -c 'import torch, transformers'

FROM base AS trainer
ARG USER_ID

COPY --from=trainer-packages /opt/softvllm/.venv .venv
COPY . .
RUN python -m compileall -q softvllm trainer

ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="softvllm-trainer" \
      org.opencontainers.image.description="Reinforcement learning on soft chains of thought" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER ${USER_ID}:${USER_ID}
WORKDIR /runs
VOLUME ["/cache"]
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "trainer.rl"]
CMD ["--help"]

# ---- server: vLLM with softvllm; last, hence the default -------------------------------------
# The compiler stays: Triton builds a C launcher for its kernels at run time, and so does
# torch.compile on a CPU with its C++ kernels.
FROM compiler AS server
ARG FLAVOUR
ARG TORCH_CPU_INDEX
ARG USER_ID

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml LICENSE constraints.txt constraints-cpu.txt ./
COPY scripts/install.sh scripts/
# install.sh brings the tools of the extra `dev` too; they leave again before the layer is closed,
# and with them what its import check wrote to /cache as root.
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca \
    touch README.md \
    && EXTRA="${FLAVOUR}" TORCH_CPU_INDEX="${TORCH_CPU_INDEX}" bash scripts/install.sh \
    && python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["optional-dependencies"]["dev"], sep="\n")' >/tmp/dev.txt \
    && pip uninstall --quiet --yes --requirement /tmp/dev.txt \
    && rm -rf /tmp/dev.txt /cache/*

COPY . .
RUN python -m compileall -q softvllm server clients

ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="softvllm" \
      org.opencontainers.image.description="vLLM with soft chain-of-thought decoding per request" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER ${USER_ID}:${USER_ID}
WORKDIR /home/softvllm
VOLUME ["/cache"]
EXPOSE 8000
# Set HEALTH_URL along with --port or TLS. No proxy, whatever the environment says: it is loopback.
ENV HEALTH_URL=http://127.0.0.1:8000/health
# The first start fetches weights and compiles kernels; until the start period is over, only
# success counts.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["softvllm"]
CMD ["serve"]
