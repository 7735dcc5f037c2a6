#!/usr/bin/env bash
# Starts the service, Prometheus and the load of deploy/compose.yaml, asks all of them, and takes them down again.
#
# Images come from no registry: the service's and Locust's are built, Prometheus is this machine's (Debian's package) under
# the name in the file. Grafana and the profile `gpu` are not run here; `make deploy-check` validates them.
#
#   DOCKER=PROGRAM, DOCKER_BUILD_ARGS=...   as for deploy/image-test.sh
#   DEPLOY_PYTHON=PYTHON                    of the environment of lock/deploy.txt, which has Compose
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

docker=${DOCKER:-docker}
python=${DEPLOY_PYTHON:-.venv-deploy/bin/python}
project=stridevit-compose-test-$$

die() {
    echo "compose-test: $*" >&2
    exit 1
}

"$docker" info >/dev/null 2>&1 || die "no Docker engine answers '$docker info': CONTRIBUTING.md says how to get one"
for program in prometheus promtool; do
    command -v "$program" >/dev/null || die "$program is missing: apt-get install --no-install-recommends prometheus"
done
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
STRIDEVIT_PUBLISH=$(free_port)
PROMETHEUS_PUBLISH=$(free_port)
export STRIDEVIT_PUBLISH PROMETHEUS_PUBLISH LOAD_USERS=2 LOAD_TIME=15s
service=http://127.0.0.1:$STRIDEVIT_PUBLISH
prometheus=http://127.0.0.1:$PROMETHEUS_PUBLISH

work=$(mktemp -d)
# Two models of twelve: to prove all of them takes minutes on a busy machine.
cat >"$work/models.yaml" <<'END'
services:
  stridevit:
    environment: {STRIDEVIT_MODELS: "cifar100-csra-r2,cifar100-csra-r4"}
END
compose() {
    "$(dirname "$python")/docker-compose" --project-name "$project" --file deploy/compose.yaml --file "$work/models.yaml" "$@"
}
clean_up() {
    local status=$?
    set +e
    ((status == 0)) || compose --profile load logs --tail 20 2>&1
    compose --profile load down --timeout 50 --volumes >/dev/null 2>&1
    rm -rf "$work"
    ((status == 0)) && echo "compose-test: passed" || echo "compose-test: FAILED" >&2
}
trap clean_up EXIT

read -r -a arguments <<<"${DOCKER_BUILD_ARGS:-}"
build() { DOCKER_BUILDKIT=1 "$docker" build --quiet "$@" "${arguments[@]}" . >/dev/null; }
build --target cpu --tag stridevit:cpu
build --file deploy/compose/load.Dockerfile --tag stridevit:load
image=$(compose config --format json | python3 -c 'import json, sys; print(json.load(sys.stdin)["services"]["prometheus"]["image"])')
cp "$(command -v prometheus)" "$(command -v promtool)" "$work"
printf 'FROM python:3.11-slim-bookworm\nCOPY prometheus promtool /bin/\nENTRYPOINT ["/bin/prometheus"]\n' |
    "$docker" build --quiet --tag "$image" --file - "$work" >/dev/null
echo "images: stridevit:cpu, stridevit:load, and Debian's Prometheus as $image"

started=$SECONDS
compose up --detach --no-build --wait --wait-timeout 500 stridevit prometheus >"$work/up.log" 2>&1 || die "$(tail -n 20 "$work/up.log")"
echo "service and Prometheus are healthy after $((SECONDS - started)) s"

python3 deploy/ask.py "$service" service/http/page/samples/raccoon.jpg
compose --profile load run --rm --no-deps load >"$work/load.log" 2>&1 || die "the load failed: $(cat "$work/load.log")"
grep --max-count 1 'Aggregated' "$work/load.log"

# What the dashboard's first panel asks, and whether Prometheus has all rules and evaluates them.
ask_prometheus() { curl --silent --fail --noproxy '*' --get "$prometheus/api/v1/$1" "${@:2}"; }
for ((second = 0; second < 60; second++)); do
    images=$(ask_prometheus query --data-urlencode 'query=sum(rate(stridevit_images_total{job="stridevit",outcome="ok"}[1m]))' |
        python3 -c 'import json, sys; found = json.load(sys.stdin)["data"]["result"]; print(found[0]["value"][1] if found else 0)')
    python3 -c 'import sys; sys.exit(not float(sys.argv[1]) > 0)' "$images" && break
    sleep 1
done
python3 -c 'import sys; sys.exit(not float(sys.argv[1]) > 0)' "$images" || die "Prometheus has no images of the load"
echo "Prometheus counts $images images/s, $((SECONDS - started)) s after the start"
ask_prometheus rules | python3 -c '
import json, sys
rules = [rule for group in json.load(sys.stdin)["data"]["groups"] for rule in group["rules"]]
bad = [rule["name"] for rule in rules if rule["health"] == "err"]
assert len(rules) > 10 and not bad, (len(rules), bad)
print(len(rules), "rules are evaluated without an error")'

compose stop stridevit >/dev/null 2>&1
code=$("$docker" inspect --format '{{.State.ExitCode}}' "$(compose ps --all --quiet stridevit)")
[[ $code == 0 ]] || die "SIGTERM must end the service with exit code 0, not $code"
