#!/usr/bin/env bash
# Make the environment of tests/peers/test_openpi_client.py: the real openpi-client 0.1.2, with NumPy < 2, in FOLDER.
#
#   tests/peers/make_openpi_client_env.sh [FOLDER]      # default: .cache/openpi_client
#   PI0_OPENPI_CLIENT=FOLDER pytest tests/peers/test_openpi_client.py --run-peers
#
# To test the newest form too, name a checkout's package: PI0_OPENPI_CLIENT_SRC=openpi/packages/openpi-client/src.
# PYTHON names the interpreter.
set -euo pipefail
folder=${1:-.cache/openpi_client}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check openpi-client==0.1.2 typing_extensions "numpy<2" "websockets>=15"
"$folder/bin/python" -c "import openpi_client.websocket_client_policy, openpi_client.action_chunk_broker"
echo "made $folder"
