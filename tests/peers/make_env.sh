#!/usr/bin/env bash
# Make the environment of the peers' tests: the real LeRobot 0.6.1, on CPU, in FOLDER (default: .cache/peers).
#
#   tests/peers/make_env.sh [FOLDER]
#   PI0_PEERS=FOLDER pytest tests/peers --run-peers
#
# LeRobot asks for Python 3.12 and torch below 2.12. It runs with what is pinned here, and on Python 3.11 after its PEP
# 695 generics are rewritten (rewrite_generics.py). PYTHON names the interpreter, PIP_ARGS more arguments for pip, for
# instance --extra-index-url of a torch without CUDA.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-.cache/peers}
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-})
"${pip[@]}" torch==2.13.0 torchvision==0.28.0
"${pip[@]}" --no-deps --ignore-requires-python lerobot==0.6.1
"${pip[@]}" -r "$here/requirements.txt"
"$folder/bin/python" "$here/rewrite_generics.py"
"$folder/bin/python" -c "import sys; sys.path.insert(0, '$here')
from run_lerobot import import_torchvision; import_torchvision()
import lerobot.datasets, lerobot.policies.pi0, lerobot.policies.pi05, lerobot.policies.pi0_fast"
echo "made $folder: PI0_PEERS=$folder pytest tests/peers --run-peers"
