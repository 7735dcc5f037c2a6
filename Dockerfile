# The service as an image: ONNX Runtime, no torch, no build tools, no root.
#
#   DOCKER_BUILDKIT=1 docker build --target cpu --tag stridevit:cpu .
#   docker run --rm --stop-timeout 50 --read-only --tmpfs /tmp --cap-drop ALL --publish 127.0.0.1:8000:8000 stridevit:cpu
#
# Flags of `python -m service` may follow the image's name, but change the port with `--env STRIDEVIT_PORT=...`: the
# health check asks that one. Docker must wait 50 s before it kills the container: the service goes on for
# STRIDEVIT_SHUTDOWN_DELAY_SECONDS (5), so that proxies notice; accepted requests then have
# STRIDEVIT_GRACEFUL_TIMEOUT_SECONDS (30) to finish, and its threads 10 s to end.
#
# Behind a mirror or a TLS proxy pip takes two secrets, neither of which ends up in the image. Both are optional:
#   --secret id=pip_conf,src=pip.conf           with `cert = /run/secrets/ca_bundle` if the other one is given too
#   --secret id=ca_bundle,src=ca-certificates.crt

FROM python:3.11-slim-bookworm AS build
ENV PATH=/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /source

# Only the engine differs. The lock file first, then the project; then what only the build needed is removed, and of the
# packages what no service needs.
FROM build AS build-cpu
COPY lock/service-cpu.txt lock/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --require-hashes --only-binary :all: --requirement lock/service-cpu.txt
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY stridevit stridevit
COPY service service
COPY deploy/trim.py ./
RUN pip install --quiet --no-cache-dir --no-index --no-build-isolation --no-deps . \
    && pip uninstall --quiet --yes hatchling editables pathspec pluggy tomlkit trove-classifiers setuptools pip \
    && python trim.py /venv/lib/python3.11/site-packages

FROM build AS build-gpu
COPY lock/service-gpu.txt lock/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --require-hashes --only-binary :all: --requirement lock/service-gpu.txt
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY stridevit stridevit
COPY service service
COPY deploy/trim.py ./
RUN pip install --quiet --no-cache-dir --no-index --no-build-isolation --no-deps . \
    && pip uninstall --quiet --yes hatchling editables pathspec pluggy tomlkit trove-classifiers setuptools pip \
    && python trim.py /venv/lib/python3.11/site-packages

FROM python:3.11-slim-bookworm AS runtime
ARG REVISION=unknown
LABEL org.opencontainers.image.title="StrideViT" \
      org.opencontainers.image.description="Image classification with Vision Transformers whose keys and values are compressed." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"
# ONNX Runtime's wheels send telemetry unless this says no.
ENV PATH=/venv/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STRIDEVIT_HOST=0.0.0.0 \
    STRIDEVIT_PORT=8000 \
    STRIDEVIT_REPOSITORY=/models \
    STRIDEVIT_SHUTDOWN_DELAY_SECONDS=5
# Readable for the service whatever umask the bundles were made with, and owned by root: it cannot change them.
COPY --chmod=755 models /models
USER 10001:10001
EXPOSE 8000
# The service listens once all models are loaded and verified. The empty ProxyHandler ignores the environment's proxies.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:%s/healthz' % os.environ['STRIDEVIT_PORT'], timeout=2)"]
# The exec form makes Python process 1, so SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "service"]

# Needs the NVIDIA container toolkit (`docker run --gpus all`); without a GPU it refuses to start. Built, not run on a GPU.
FROM runtime AS gpu
ENV STRIDEVIT_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/venv/lib/python3.11/site-packages/nvidia/cu13/lib:/venv/lib/python3.11/site-packages/nvidia/cudnn/lib
COPY --from=build-gpu /venv /venv

# Last, so that it is what a build without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /venv /venv
