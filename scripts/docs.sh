#!/usr/bin/env bash
# Build the documentation in an environment of its own, warnings as errors; then check the links between its pages.
# PYTHON names another interpreter than that of .venv (or python3).
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
venv=.venv-docs/bin
"$python" -m venv .venv-docs
$venv/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
$venv/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
$venv/python -m sphinx -b html -W --keep-going --quiet -d docs/_build/doctrees docs docs/_build/html
$venv/python -m sphinx -b linkcheck -W --keep-going --quiet -d docs/_build/doctrees docs docs/_build/linkcheck
echo "built: docs/_build/html/index.html"
