#!/usr/bin/env bash
# Builds the image's target `cpu`, runs it without any privilege, asks it about a photo, and ends it with SIGTERM.
#
#   DOCKER=PROGRAM           another client than `docker`
#   DOCKER_BUILD_ARGS=...    more arguments for the build, such as the secrets that the Dockerfile describes
#   STRIDEVIT_DATA=FOLDER    takes the first .jpg of FOLDER/photos instead of a JPEG that the image's own Pillow draws
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

max_megabytes=450 # without the models, on the base that .ci/engine makes

docker=${DOCKER:-docker}
image=stridevit:image-test
container=stridevit-image-test-$$

die() {
    echo "image-test: $*" >&2
    exit 1
}

"$docker" info >/dev/null 2>&1 || die "no Docker engine answers '$docker info': CONTRIBUTING.md says how to get one"

work=$(mktemp -d)
clean_up() {
    local status=$?
    ((status == 0)) || "$docker" logs --tail 40 "$container" 2>&1 || true
    "$docker" rm --force "$container" >/dev/null 2>&1 || true
    "$docker" image rm "$image" >/dev/null 2>&1 || true # the build cache stays
    rm -rf "$work"
    ((status == 0)) && echo "image-test: passed" || echo "image-test: FAILED" >&2
}
trap clean_up EXIT

inside() { "$docker" exec "$container" python -c "$1"; } # Python in the running container

read -r -a arguments <<<"${DOCKER_BUILD_ARGS:-}"
DOCKER_BUILDKIT=1 "$docker" build --progress plain --target cpu --tag "$image" "${arguments[@]}" .
megabytes=$(($("$docker" image inspect --format '{{.Size}}' "$image") / 1000000))
models=$(($(du --summarize --bytes models | cut -f1) / 1000000))
echo "image size: $megabytes MB, of which $models MB are models"
((megabytes - models <= max_megabytes)) ||
    die "without models the image has $((megabytes - models)) MB, more than $max_megabytes: see deploy/trim.py"

"$docker" run --detach --name "$container" --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
    --publish 127.0.0.1::8000 --health-interval 1s --health-start-period 300s "$image" >/dev/null
for ((second = 0; second < 300; second++)); do
    state=$("$docker" inspect --format '{{.State.Status}} {{.State.Health.Status}}' "$container")
    [[ $state == "running starting" ]] || break
    sleep 1
done
[[ $state == "running healthy" ]] || die "the container is not healthy but: $state"

[[ $(inside 'import os; print(os.stat("/proc/1").st_uid)') != 0 ]] || die "the service runs as root"
! inside 'import torch' 2>"$work/torch.log" || die "torch is in the image"
grep --quiet "No module named 'torch'" "$work/torch.log" || die "$(cat "$work/torch.log")"
inside 'import os, sys; sys.exit(os.path.exists("/etc/pip.conf") or os.path.exists("/run/secrets/ca_bundle"))' ||
    die "a secret of the build is in the image"
# With its telemetry on, ONNX Runtime complains that it cannot write its identifier to the read-only disk.
! "$docker" logs "$container" 2>&1 | grep --ignore-case telemetry || die "ONNX Runtime's telemetry is on"
[[ $("$docker" exec "$container" stridevit --version) == "stridevit "* ]] || die "the command stridevit is not in the image"
echo "no root, no torch, no secret of the build, no telemetry"

photo=$work/photo.jpg
if [[ -n ${STRIDEVIT_DATA:-} ]]; then
    photo=$(find "$STRIDEVIT_DATA/photos/" -name '*.jpg' | sort | sed -n 1p)
    [[ -n $photo ]] || die "no .jpg in $STRIDEVIT_DATA/photos"
else
    inside 'import sys; from PIL import Image
Image.radial_gradient("L").resize((640, 480)).convert("RGB").save(sys.stdout.buffer, "JPEG")' >"$photo"
fi
python3 deploy/ask.py "http://$("$docker" port "$container" 8000/tcp | sed -n 1p)" "$photo"

"$docker" stop --time 50 "$container" >/dev/null
code=$("$docker" inspect --format '{{.State.ExitCode}}' "$container")
[[ $code == 0 ]] || die "SIGTERM must end the service with exit code 0, not $code"
