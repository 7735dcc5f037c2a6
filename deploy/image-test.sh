#!/usr/bin/env bash
# Builds the image's target `cpu` and asks the running container for a photo's classes.
#
#   bash deploy/image-test.sh                              with a JPEG that the image's own Pillow draws
#   STRIDEVIT_DATA=<folder> bash deploy/image-test.sh      with the first .jpg of <folder>/photos
#
# With a Docker engine that answers it uses that one. Without, as root on Debian, it needs no registry either: it installs
# mmdebstrap and docker.io, makes the base image from Debian's packages and starts a private engine for itself. Afterwards
# container, engine and temporary files are gone; the two packages and the network rules every Docker engine adds remain.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base_image=python:3.11-slim-bookworm
image=stridevit:image-test
container=stridevit-image-test-$$
docker=docker # the client
dockerd=      # pid of the private engine
mmdebstrap=   # pid, while it makes the base image
policy=       # a policy-rc.d of ours, while apt installs

step() { printf '== %3d s  %s\n' "$SECONDS" "$*"; }

die() {
    printf 'image-test: %s\n' "$*" >&2
    exit 1
}

# Memory, where there is plenty and programs and devices work in it: a private engine there is several times faster.
temporary_parent() {
    local plenty=$((6 * 1024 * 1024)) # KiB
    if [[ -w /dev/shm ]] && (($(df --output=avail -k /dev/shm | tail -n 1) > plenty)) &&
        (($(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo) > plenty)) &&
        [[ ! $(findmnt --noheadings --output OPTIONS --target /dev/shm) =~ nodev|noexec ]]; then
        echo /dev/shm
    else
        echo "${TMPDIR:-/tmp}"
    fi
}

# --- Cleaning up, however the script ends ---------------------------------------------------------------------------

terminate() { # pid
    local tenth
    kill -TERM "$1" 2>/dev/null
    for ((tenth = 0; tenth < 300; tenth++)); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$1"
}

clean_up() {
    local status=$? mount_point
    trap '' INT TERM HUP
    set +e
    step "cleaning up"
    if [[ -n $("$docker" ps --all --quiet --filter "name=$container" 2>/dev/null) ]]; then
        ((status == 0)) || "$docker" logs --tail 40 "$container"
        "$docker" rm --force "$container" >/dev/null
    fi
    if [[ -n $dockerd ]]; then
        terminate "$(cat "$work/dockerd.pid" 2>/dev/null || echo "$dockerd")"
    else
        "$docker" image rm "$image" >/dev/null 2>&1 # a known engine keeps its build cache
    fi
    [[ -z $mmdebstrap ]] || terminate "$mmdebstrap"
    [[ -z $policy ]] || rm -f "$policy"
    awk -v below="$work/" 'index($2, below) == 1 { print $2 }' /proc/self/mounts 2>/dev/null | sort -r |
        while read -r mount_point; do umount "$mount_point"; done
    rm -rf "$work"
    ((status == 0)) && echo "image-test: passed" || echo "image-test: FAILED" >&2
    exit "$status"
}
work=$(mktemp -d "$(temporary_parent)/image-test.XXXXXX")
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# --- An engine and a base image from Debian's packages ----------------------------------------------------------------

apt_install() {
    if ! DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "$@" >"$work/apt.log" 2>&1; then
        cat "$work/apt.log" >&2
        die "apt-get could not install $*"
    fi
}

start_private_engine() {
    local need_docker=
    [[ -x /usr/bin/docker ]] && command -v dockerd >/dev/null || need_docker=1
    if [[ -n $need_docker ]] || ! command -v mmdebstrap >/dev/null; then
        step "installing mmdebstrap and docker.io"
        apt-get update -qq
        command -v mmdebstrap >/dev/null || apt_install mmdebstrap
    fi

    step "making $base_image from Debian's packages, in the background"
    make_base_image &
    mmdebstrap=$!

    if [[ -n $need_docker ]]; then
        # Only the package: its service must not start, it would share the private engine's bridge.
        if [[ ! -e /usr/sbin/policy-rc.d ]]; then
            policy=/usr/sbin/policy-rc.d
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod +x "$policy"
        fi
        apt_install docker.io
    fi

    step "starting a private engine under $work"
    docker=/usr/bin/docker # a client from elsewhere on the PATH may lack BuildKit
    export DOCKER_HOST=unix://$work/docker.sock
    # A session of its own keeps Ctrl-C from stopping it before its container is gone.
    setsid dockerd --storage-driver overlay2 --data-root "$work/data" --exec-root "$work/exec" \
        --pidfile "$work/dockerd.pid" --host "$DOCKER_HOST" >"$work/dockerd.log" 2>&1 &
    dockerd=$!
    local deadline=$((SECONDS + 60))
    until "$docker" info >/dev/null 2>&1; do
        if ((SECONDS > deadline)) || ! kill -0 "$dockerd" 2>/dev/null; then
            tail -n 20 "$work/dockerd.log" >&2
            die "the private engine did not start"
        fi
        sleep 0.2
    done

    wait "$mmdebstrap" || die "mmdebstrap could not make the base image"
    mmdebstrap=
    step "importing it ($(du -h "$work/base.tar" | cut -f1))"
    "$docker" import --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' "$work/base.tar" "$base_image" >/dev/null
    rm "$work/base.tar"
}

make_base_image() {
    local sources=() file
    for file in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do # this machine's mirror, if it has bookworm
        if grep --quiet --no-messages bookworm "$file"; then
            sources=("$file")
            break
        fi
    done
    # The hooks give Python the places it has in the official image and leave nothing of this machine behind.
    # shellcheck disable=SC2016 # "$1" is mmdebstrap's: the new root
    TMPDIR=$work exec mmdebstrap --quiet --mode=root --variant=minbase \
        --include=python3,python3-venv,ca-certificates \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --customize-hook='ln -s /usr/bin/python3 "$1/usr/local/bin/python3"; ln -s python3 "$1/usr/local/bin/python"' \
        --customize-hook='rm -f "$1/etc/hostname"; : >"$1/etc/resolv.conf"' \
        bookworm "$work/base.tar" "${sources[@]}"
}

# --- The build ------------------------------------------------------------------------------------------------------------

# This machine's way to a package index: without local paths, which mean nothing inside the build.
write_pip_conf() { # file, CA bundle or nothing
    { python3 -m pip config list 2>/dev/null || true; } | python3 -c '
import ast, sys

keep = {"index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries"}
kept = {"cert": sys.argv[1]} if sys.argv[1] else {}
for line in sorted(sys.stdin, key=lambda line: line.startswith(":env:")):  # the environment wins
    key, _, value = line.strip().partition("=")
    section, _, name = key.rpartition(".")
    if section in ("global", "install", ":env:") and name in keep:
        words = [word for word in ast.literal_eval(value).split() if not word.startswith(("/", "file:"))]
        if words:
            kept[name] = " ".join(words)
print("[global]", *(f"{name} = {value}" for name, value in kept.items()), sep="\n")
' "$2" >"$1"
}

build() {
    local ca_bundle=${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt} secrets=()
    if [[ -r $ca_bundle ]]; then
        secrets+=(--secret "id=ca_bundle,src=$ca_bundle")
        write_pip_conf "$work/pip.conf" /run/secrets/ca_bundle
    else
        write_pip_conf "$work/pip.conf" ""
    fi
    secrets+=(--secret "id=pip_conf,src=$work/pip.conf")
    DOCKER_BUILDKIT=1 "$docker" build --progress plain --target cpu --tag "$image" "${secrets[@]}" .
}

# --- The test -------------------------------------------------------------------------------------------------------------

start_container() {
    "$docker" run --detach --name "$container" --read-only --tmpfs /tmp --cap-drop ALL \
        --security-opt no-new-privileges --publish 127.0.0.1::8000 --health-interval 1s "$image" >/dev/null
    local second state=
    for ((second = 0; second < 90; second++)); do
        state=$("$docker" inspect --format '{{.State.Status}} {{.State.Health.Status}}' "$container")
        [[ $state != "running healthy" ]] || return 0
        [[ $state == running* ]] || break
        sleep 1
    done
    die "the container is not healthy but: $state"
}

inside() { "$docker" exec "$container" python -c "$1"; } # Python in the running container

check_container() {
    local uid
    uid=$(inside 'import os; print(os.stat("/proc/1").st_uid)')
    [[ $uid != 0 ]] || die "the service runs as root"
    echo "the service runs as uid $uid"

    ! inside 'import torch' 2>"$work/torch.log" || die "torch is in the image"
    grep --quiet "No module named 'torch'" "$work/torch.log" || die "$(cat "$work/torch.log")"
    echo "torch is not in the image"

    inside 'import os, sys; sys.exit(os.path.exists("/etc/pip.conf") or os.path.exists("/run/secrets/ca_bundle"))' ||
        die "a secret of the build is in the image"
    echo "no secret of the build is in the image"

    # With its telemetry on, the engine complains that it cannot write its identifier to the read-only disk.
    ! "$docker" logs "$container" 2>&1 | grep --ignore-case telemetry || die "ONNX Runtime's telemetry is on"
    echo "ONNX Runtime's telemetry is off"
}

choose_photo() { # sets photo
    photo=$work/photo.jpg
    if [[ -n ${STRIDEVIT_DATA:-} ]]; then
        photo=$(find "$STRIDEVIT_DATA/photos/" -name '*.jpg' | sort | sed -n 1p)
        [[ -n $photo ]] || die "no .jpg in $STRIDEVIT_DATA/photos"
    else
        inside 'import sys; from PIL import Image
Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(sys.stdout.buffer, "JPEG")' >"$photo"
    fi
}

ask() { # address, photo
    python3 - "$@" <<'PYTHON'
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

address, photo = sys.argv[1], Path(sys.argv[2])
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def classify(body, query=""):
    request = urllib.request.Request(f"http://{address}/v1/classify{query}", data=body)
    try:
        with direct.open(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expect(what, wanted, found, answer):
    print(f"{what}: {found}")
    if found != wanted:
        sys.exit(f"image-test: {what} must give {wanted}: {answer}")


status, answer = classify(photo.read_bytes())
expect(f"{photo.name}, {photo.stat().st_size} bytes", 200, status, answer)
predictions = answer["results"][0]["predictions"]
expect("predictions", 5, len(predictions), answer)
print(f"{answer['model']} says:", ", ".join(f"{p['label']} {p['probability']:.3f}" for p in predictions))
expect("an unknown model", 404, *classify(b"any", "?model=no-such-model"))
expect("bytes that are no image", 415, *classify(b"no image " * 100))
PYTHON
}

stop_container() {
    "$docker" stop --time 40 "$container" >/dev/null
    local code
    code=$("$docker" inspect --format '{{.State.ExitCode}}' "$container")
    [[ $code == 0 ]] || die "SIGTERM must end the service with exit code 0, not $code"
    echo "exit code after SIGTERM: 0"
}

command -v python3 >/dev/null || die "python3 is needed"
if [[ -n ${STRIDEVIT_DATA:-} && ! -d $STRIDEVIT_DATA/photos ]]; then
    die "STRIDEVIT_DATA has no folder photos: $STRIDEVIT_DATA"
fi
if docker info >/dev/null 2>&1; then
    step "using the Docker engine that answers"
elif [[ $(id -u) == 0 ]] && grep --quiet --no-messages '^ID=debian' /etc/os-release && command -v apt-get >/dev/null; then
    start_private_engine
else
    die "no Docker engine answers. Install and start one (https://docs.docker.com/engine/install), or run this as root on Debian"
fi
step "building the target cpu"
build
step "starting the container: read-only, without capabilities"
start_container
step "testing it"
check_container
choose_photo
ask "$("$docker" port "$container" 8000/tcp | sed -n 1p)" "$photo"
step "stopping it"
stop_container
echo "image size: $(($("$docker" image inspect --format '{{.Size}}' "$image") / 1000000)) MB"
