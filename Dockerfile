# qdora on a CUDA machine; nothing here needs a GPU until a command runs.
#
#   docker build -t qdora .
#   docker run --gpus all -v "$PWD:/work" -v qdora-cache:/cache qdora train --config qdora:quickstart
#
# The CUDA libraries are in torch's wheels; the driver comes from the machine, by the NVIDIA Container Toolkit.

FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md constraints.txt ./
COPY configs configs
COPY qdora qdora
RUN pip install --no-cache-dir -c constraints.txt build && python -m build --wheel --outdir /dist

FROM python:3.12-slim
# Triton, torch.compile and the functions for CPUs compile at their first use.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
COPY --from=build /dist /tmp/dist
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /tmp/dist/*.whl)[gpu,eval,gguf,plots]" \
    && rm -rf /tmp/dist /tmp/constraints.txt

# Models of the hub, packaged models, and what Triton and torch have compiled.
ENV HF_HOME=/cache/huggingface \
    QDORA_CACHE=/cache/qdora \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TORCH_EXTENSIONS_DIR=/cache/extensions \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home qdora && mkdir -p /cache /work && chown qdora:qdora /cache /work
USER qdora
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["qdora"]
CMD ["--help"]
