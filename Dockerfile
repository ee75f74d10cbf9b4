# The three images of manthanquant:
#     docker build --target operator   -t manthanquant-operator .
#     docker build --target server-cpu -t manthanquant-server:cpu .
#     docker build --target server-gpu -t manthanquant-server:gpu .
# podman and buildah take the same options. Behind a mirror or a proxy, say so with --build-arg BASE_IMAGE=, PACKAGE_INDEX=
# and --secret id=ca_bundle,src=FILE; the bundle is only used during the build. Dependencies come before the sources, so
# a change of the sources rebuilds a small last layer.

# A Debian 12: the lock files are for its Python 3.11. `image/base.sh` makes one where no registry can be reached.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

# -- what all images share ---------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home --home-dir /work --shell /usr/sbin/nologin manthanquant
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1

# -- the package installer, which the images only mount, and this project's wheel --------------------------------------
# What a step reads is copied before it, not mounted: buildah's cache does not see a change in what is mounted.
FROM python AS build-tools
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY image/install.sh /opt/image/
ARG PACKAGE_INDEX=https://pypi.org/simple
RUN --mount=type=secret,id=ca_bundle /opt/image/install.sh tools /opt/tools

# An empty stage: buildah 1.28 mounts a stage whose last step came from its cache as it was before that step.
FROM build-tools AS tools

FROM tools AS wheel
COPY pyproject.toml README.md LICENSE /src/
COPY manthanquant /src/manthanquant
RUN /opt/image/install.sh wheel /src /dist

# -- operator: no PyTorch, no compiler ---------------------------------------------------------------------------------
FROM python AS operator
ARG PACKAGE_INDEX=https://pypi.org/simple
COPY image/install.sh image/operator.lock /opt/image/
RUN --mount=type=secret,id=ca_bundle --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/image/install.sh lock /opt/image/operator.lock
COPY --from=wheel /dist /opt/image/
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools /opt/image/install.sh package /opt/image
COPY operator/manthanquant_operator /opt/operator/manthanquant_operator
ENV PYTHONPATH=/opt/operator
RUN python -m compileall -q /opt/operator
USER 1000:1000
ENTRYPOINT ["python", "-m", "manthanquant_operator"]

# -- what the servers share: a C++ compiler for the extension that a pod builds for its machine ------------------------
FROM python AS server
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner=1000 --group=1000 /work /models /var/cache/manthanquant
# The root file system may be read-only: whatever is written goes to these two folders.
ENV HOME=/work TMPDIR=/work \
    MANTHANQUANT_CACHE_DIR=/var/cache/manthanquant \
    VLLM_CACHE_ROOT=/var/cache/manthanquant/vllm \
    XDG_CACHE_HOME=/var/cache/manthanquant/xdg \
    VLLM_NO_USAGE_STATS=1

# -- server-cpu --------------------------------------------------------------------------------------------------------
FROM server AS server-cpu
ARG PACKAGE_INDEX=https://pypi.org/simple
# An index with `+cpu` builds, for example https://download.pytorch.org/whl/cpu. Without it PyTorch's build for CUDA is
# installed from PACKAGE_INDEX, less CUDA, whose libraries image/cuda_stubs.py stands in for.
ARG TORCH_CPU_INDEX=
COPY image/install.sh image/cuda_stubs.py image/server-cpu.lock image/torch-cpu.lock /opt/image/
RUN --mount=type=secret,id=ca_bundle --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/image/install.sh lock /opt/image/server-cpu.lock \
    && /opt/image/install.sh torch-cpu /opt/image "${TORCH_CPU_INDEX}"
COPY --from=wheel /dist /opt/image/
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools /opt/image/install.sh package /opt/image
USER 1000:1000
ENTRYPOINT ["manthanquant"]

# -- server-gpu: vLLM with CUDA, and nvcc with its headers from the package index --------------------------------------
FROM server AS server-gpu
ARG PACKAGE_INDEX=https://pypi.org/simple
COPY image/install.sh image/server-gpu.lock /opt/image/
RUN --mount=type=secret,id=ca_bundle --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/image/install.sh lock /opt/image/server-gpu.lock && /opt/image/install.sh cuda-home /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=wheel /dist /opt/image/
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools /opt/image/install.sh package /opt/image
USER 1000:1000
ENTRYPOINT ["manthanquant"]
