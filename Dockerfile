# mm-piece on NVIDIA GPUs. torch, as pip installs it, brings the CUDA libraries; the host has the driver.
#
#   docker build -t mm-piece .
#   docker run --rm --gpus all mm-piece train pipelines/tiny.yaml
FROM python:3.11-slim

# Folders that you mount belong to you: --build-arg UID="$(id -u)" where you are not user 1000.
ARG UID=1000

# Triton, which torch brings, compiles a launcher for each kernel when it first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid "$UID" piece

COPY pyproject.toml README.md LICENSE /tmp/mm-piece/
COPY mm_piece /tmp/mm-piece/mm_piece
RUN pip install --no-cache-dir "/tmp/mm-piece[tensorboard]"

USER $UID
WORKDIR /home/piece
COPY --chown=piece checkpoints checkpoints
COPY --chown=piece pipelines pipelines

ENTRYPOINT ["mm-piece"]
CMD ["--help"]
