# Locust and three pictures, for the profile `load` of deploy/compose.yaml. For measurements use `stridevit loadtest`.
FROM python:3.11-slim-bookworm
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    python -m venv /venv && /venv/bin/pip install --quiet --no-cache-dir --only-binary :all: "locust==2.47.0"
COPY service/http/page/samples /samples
COPY deploy/compose/locustfile.py /locustfile.py
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["locust", "--headless", "--only-summary", "--locustfile=/locustfile.py"]
