#!/usr/bin/env bash
# Train on every host of a TPU VM pod, from your own machine. Start it again after a preemption: the run resumes.
#
#   TPU=my-pod ZONE=us-east5-a REPOSITORY=https://... WORKDIR=gs://my-bucket/runs/pi0 scripts/tpu_pod.sh \
#       --config pi0_metaworld --config.mesh.fsdp=16 --config.batch_size=128
#
# With ACCELERATOR (v5litepod-16, v6e-16, v5p-16, ...) it asks for the pod as a queued resource, on SPOT machines unless
# SPOT=0, waits for it, and when it was preempted asks again, up to RESTARTS times, until the training has ended.
# RUNTIME is the TPU's software version. REPOSITORY and REVISION are installed; WORKDIR is a folder in a bucket that the
# pod's service account may write to, or one that every host mounts. Compiled programs are kept beside it.
set -euo pipefail
: "${TPU:?the pod: TPU=my-pod}" "${ZONE:?its zone: ZONE=us-east5-a}" "${WORKDIR:?a folder: WORKDIR=gs://bucket/run}"
: "${REPOSITORY:?where this project is cloned from: REPOSITORY=https://...}"
REVISION=${REVISION:-main}
ACCELERATOR=${ACCELERATOR:-}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1}
RESTARTS=${RESTARTS:-20}
WAIT=${WAIT:-60}

queued() {
    gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"
}

state() {
    queued describe --format 'value(state.state)' 2>/dev/null || echo NONE
}

# Wait until the pod is there. A queued resource that failed, or whose machines were taken, is asked for anew.
provide() {
    local spot=()
    if [ "$SPOT" = 1 ]; then spot=(--spot); fi
    while true; do
        case "$(state)" in
            ACTIVE) return ;;
            NONE)
                queued create --node-id "$TPU" --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" "${spot[@]}"
                ;;
            FAILED | SUSPENDED) queued delete --force --quiet ;;
        esac
        sleep "$WAIT"
    done
}

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

install() {
    on_all "set -e
        test -d pi0 || git clone $(printf %q "$REPOSITORY") pi0
        cd pi0 && git fetch -q && git checkout -q $(printf %q "$REVISION")
        test -d .venv || python3 -m venv .venv
        .venv/bin/pip install -q -e '.[jax,tpu,gcs]' -c constraints.txt"
}

# Without --coordinator, JAX finds the other hosts in the TPU's metadata.
train() {
    local cache=()
    case "$WORKDIR" in gs://*) cache=(--compilation-cache "${WORKDIR%/*}/compiled") ;; esac
    on_all "cd pi0 && .venv/bin/pi0-train --workdir $(printf %q "$WORKDIR") $(printf '%q ' "${cache[@]}" "$@")"
}

if [ -z "$ACCELERATOR" ]; then
    install
    train "$@"
    exit
fi
for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
    provide
    if install && train "$@"; then
        exit 0
    fi
    sleep "$WAIT"
    if [ "$(state)" = ACTIVE ]; then
        echo "the training failed, and the pod is still there: see the message above" >&2
        exit 1
    fi
done
echo "the pod was taken $RESTARTS times; start this again to go on" >&2
exit 1
