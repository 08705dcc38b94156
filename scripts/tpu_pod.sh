#!/usr/bin/env bash
# Train on every host of a TPU VM pod, from your own machine. Start it again after a preemption: the run resumes.
#
#   TPU=my-pod ZONE=us-east5-a WORKDIR=gs://my-bucket/runs/pi0 scripts/tpu_pod.sh --config pi0_metaworld \
#       --config.mesh.fsdp=16 --config.batch_size=128
#
# REPOSITORY and REVISION are installed; WORKDIR is a folder that every host mounts (a bucket or NFS).
set -euo pipefail
: "${TPU:?the pod: TPU=my-pod}" "${ZONE:?its zone: ZONE=us-east5-a}" "${WORKDIR:?a folder that every host mounts}"
: "${REPOSITORY:?where this project is cloned from: REPOSITORY=https://...}"
REVISION=${REVISION:-main}

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

on_all "set -e
    test -d pi0 || git clone $(printf %q "$REPOSITORY") pi0
    cd pi0 && git fetch -q && git checkout -q $(printf %q "$REVISION")
    test -d .venv || python3 -m venv .venv
    .venv/bin/pip install -q -e '.[jax,tpu]' -c constraints.txt"
# Without --coordinator, JAX finds the other hosts in the TPU's metadata.
on_all "cd pi0 && .venv/bin/pi0-train --workdir $(printf %q "$WORKDIR") $(printf '%q ' "$@")"
