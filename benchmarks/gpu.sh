#!/bin/bash
# A table of sampling and training on one GPU, within --minutes (default 9), without a network: see benchmarks/gpu.py.
#
# benchmarks/gpu.sh                     π0, π0.5 and π0-FAST, 1 to 3 cameras, batch 1, 8 and 32, both frameworks
# benchmarks/gpu.sh --models pi0        one of them
# PYTHON=venv/bin/python benchmarks/gpu.sh --out gpu.json
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. HF_HUB_OFFLINE=1
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
