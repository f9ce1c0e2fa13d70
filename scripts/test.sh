#!/usr/bin/env bash
# Everything that has to pass, on a fresh machine: install, ruff, mypy, the default tests.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -q -n 2 --dist loadfile
