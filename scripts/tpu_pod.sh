#!/usr/bin/env bash
# Train on every host of a TPU VM pod, from your own machine. Start it again after a preemption: the run goes on.
#
#   TPU=my-pod ZONE=us-east5-a WORKDIR=gs://my-bucket/runs/pi0 scripts/tpu_pod.sh --config configs/pi0_metaworld.py \
#       --config.mesh.fsdp=16 --config.batch_size=128
#
# REPOSITORY and REVISION say what is installed; WORKDIR is a folder that every host sees (a mounted bucket or NFS).
set -euo pipefail
: "${TPU:?the pod: TPU=my-pod}" "${ZONE:?its zone: ZONE=us-east5-a}" "${WORKDIR:?a folder that every host sees}"
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
# No address is given: JAX asks the TPU's metadata for the other hosts.
on_all "cd pi0 && .venv/bin/pi0-train --workdir $(printf %q "$WORKDIR") $(printf '%q ' "$@")"
