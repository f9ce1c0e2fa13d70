#!/usr/bin/env bash
# Make .venv with the versions of constraints.txt and install this package into it: scripts/setup.sh [EXTRA]
# A .venv that is there already is kept. Else the newest fit Python is taken; PYTHON names another one.
set -euo pipefail
cd "$(dirname "$0")/.."

# Prints why an interpreter cannot be used; nothing if it can.
unfit() {
    command -v "$1" >/dev/null || { echo "not found"; return; }
    "$1" - 2>/dev/null <<'PYTHON' || echo "does not run"
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

version = sys.version_info[:2]
name = "python%d.%d" % version
if not (3, 11) <= version <= (3, 13):
    print("is Python %d.%d; this package runs on 3.11, 3.12 and 3.13" % version)
elif importlib.util.find_spec("ensurepip") is None:
    print("has no venv module: sudo apt install %s-venv" % name)
elif version == (3, 13) and not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()):
    print("needs a C compiler to build CHGNet, which has no wheel for it: sudo apt install gcc %s-dev" % name)
PYTHON
}

if [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ]; then
    tried=""
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        reason="$(unfit "$python")"
        [ -n "$reason" ] || break
        tried+="  $python $reason"$'\n'
    done
    if [ -n "$reason" ]; then
        printf 'No fit Python:\n%s' "$tried" >&2
        echo "Install one (Debian, Ubuntu: sudo apt install python3-venv python3-dev gcc), or name one: PYTHON=/path/to/python" >&2
        exit 1
    fi
    "$python" -m venv .venv
fi
# torch first and pinned: an unpinned torch pulls gigabytes of CUDA libraries.
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}"
