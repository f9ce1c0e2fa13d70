#!/usr/bin/env bash
# Make .venv with the versions of constraints.txt and install this package into it: scripts/setup.sh [EXTRA]
# PYTHON names another interpreter than python3.11.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3.11}"
command -v "$python" >/dev/null || { echo "$python not found: install Python 3.11 or set PYTHON" >&2; exit 1; }
"$python" -m venv .venv || { echo "no venv module: sudo apt install python3.11-venv" >&2; exit 1; }
# torch first and pinned: an unpinned torch pulls gigabytes of CUDA libraries.
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}"
