#!/usr/bin/env bash
# Runs the pod that the chart renders with `podman play kube`, asks it, and stops it with requests in flight.
#
# There is no Kubernetes in it: Podman enforces the pod's security context, volumes, limits and environment; it knows no
# probes, Services, disruption budgets or network policies. As root, with podman and runc (Debian: podman runc catatonit).
# The network rules that Podman adds to a machine remain.
#
#   DOCKER=PROGRAM, DOCKER_BUILD_ARGS=...   as for deploy/image-test.sh, whose image this is
#   DEPLOY_PYTHON=PYTHON                    of the environment of lock/deploy.txt (default: .venv-deploy/bin/python)
#   SCRATCH=FOLDER                          for Podman's images (default: TMPDIR or /tmp)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

docker=${DOCKER:-docker}
python=${DEPLOY_PYTHON:-.venv-deploy/bin/python}
image=localhost/stridevit:kube-test
pod=demo-stridevit-pod-0
container=$pod-stridevit

die() {
    echo "kube-test: $*" >&2
    exit 1
}

"$docker" info >/dev/null 2>&1 || die "no Docker engine answers '$docker info': CONTRIBUTING.md says how to get one"
for program in podman runc; do
    command -v "$program" >/dev/null || die "$program is missing: apt-get install --no-install-recommends podman runc catatonit"
done

work=$(mktemp -d "${SCRATCH:-${TMPDIR:-/tmp}}/kube-test.XXXXXX")
# A store of its own. The limits of files and processes are those that this machine can grant.
cat >"$work/containers.conf" <<END
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=$(ulimit -Hn | sed 's/unlimited/1048576/'):$(ulimit -Hn | sed 's/unlimited/1048576/')", "nproc=32768:32768"]
END
export CONTAINERS_CONF=$work/containers.conf
podman() { # without what it says about health checks, for which it wants systemd
    command podman --log-level fatal --root "$work/root" --runroot "$work/run" --tmpdir "$work/tmp" --network-config-dir "$work/net" "$@"
}

clean_up() {
    local status=$? mount_point
    set +e
    ((status == 0)) || podman logs --tail 20 "$container" 2>&1
    podman pod rm --force --time 5 "$pod" >/dev/null 2>&1
    podman network rm --force podman-default-kube-network >/dev/null 2>&1
    "$docker" image rm "$image" >/dev/null 2>&1
    awk -v below="$work/" 'index($2, below) == 1 { print $2 }' /proc/self/mounts | sort -r |
        while read -r mount_point; do umount "$mount_point"; done
    rm -rf "$work"
    ((status == 0)) && echo "kube-test: passed" || echo "kube-test: FAILED" >&2
}
trap clean_up EXIT

read -r -a arguments <<<"${DOCKER_BUILD_ARGS:-}"
DOCKER_BUILDKIT=1 "$docker" build --quiet --target cpu --tag "$image" "${arguments[@]}" . >/dev/null
"$docker" save "$image" | podman load --quiet >/dev/null

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$python" -m deploy.check.pod "$image" "$port" >"$work/pod.yaml"
podman play kube "$work/pod.yaml" >/dev/null
echo "the pod runs"

ready() { [[ $(curl --silent --output /dev/null --noproxy '*' --write-out '%{http_code}' "$url/readyz") == 200 ]]; }
address=$(podman inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$(podman pod inspect --format '{{.InfraContainerID}}' "$pod")")
url=http://127.0.0.1:$port
for ((second = 0; second < 300; second++)); do
    ready && break
    [[ $(podman inspect --format '{{.State.Status}}' "$container") == running ]] || die "the container has ended"
    sleep 1
done
ready || die "the service is not ready after 300 s"

# shellcheck disable=SC2016
podman exec "$container" python -c '
import os
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
assert status["Uid"].split()[0] == status["Gid"].split()[0] == "10001", status
assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0, status
assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2", status
open("/tmp/file", "w").close()
try:
    open("/file", "w")
except OSError as error:
    print(f"uid 10001, no capabilities, no new privileges, seccomp; /tmp is writable, / is not ({error.strerror})")
else:
    raise AssertionError("the root file system is writable")
assert os.environ["STRIDEVIT_CONFIG"] and "PORT_80" not in " ".join(os.environ), os.environ
'
memory=$(podman inspect --format '{{.HostConfig.Memory}}' "$container")
[[ $memory == 2147483648 ]] || die "the limit of memory is $memory, not 2 GiB"

photo=$work/photo.jpg
podman exec "$container" python -c 'import sys; from PIL import Image
Image.radial_gradient("L").resize((1280, 960)).convert("RGB").save(sys.stdout.buffer, "JPEG")' >"$photo"
python3 deploy/ask.py "$url" "$photo"

# By the pod's own address: a published port is a proxy that accepts connections for a pod that is gone. The container
# first and then the pod with its network, as Kubernetes does; `podman pod stop` takes the network away at once. Podman
# is given the time; Kubernetes takes terminationGracePeriodSeconds.
grace=$(sed -n 's/^ *terminationGracePeriodSeconds: //p' "$work/pod.yaml")
export -f podman
export work
python3 deploy/inflight.py "http://$address:8000" "$photo" \
    bash -c 'podman stop --time "$0" "$1" >/dev/null' "$grace" "$container"
code=$(podman inspect --format '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || die "SIGTERM must end the service with exit code 0, not $code"
