#!/usr/bin/env bash
# The lock holds on every Python; the wheel and the sdist are whole, and the wheel works in an empty environment.
# Needs the .venv that scripts/setup.sh makes, whose Python it takes. A few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=.venv-release/bin
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
install() { "$1/pip" install --quiet --disable-pip-version-check -c constraints.txt "${@:2}"; }

.venv/bin/python -m venv .venv-release
install $tools build twine check-wheel-contents uv hatchling

# A dry resolution: what all extras need on each Python, with wheels alone where there are any.
for python in 3.11 3.12 3.13; do
    sdists="--no-binary bibtexparser --no-binary nvidia-ml-py3 --no-binary python-hostlist"
    [ $python != 3.13 ] || sdists+=" --no-binary chgnet"
    # shellcheck disable=SC2086  # one word each
    $tools/uv pip compile pyproject.toml --all-extras --python-version $python --constraints constraints.txt \
        --only-binary :all: $sdists --quiet --no-header --no-annotate --output-file "$work/$python.txt"
    # What is not pinned comes with torch's CUDA build alone.
    loose="$(cut -d= -f1 "$work/$python.txt" | grep -vxF -f <(cut -d= -f1 constraints.txt) | grep -vE '^(cuda-|nvidia-|triton$)' || true)"
    [ -z "$loose" ] || { echo "constraints.txt does not pin, for Python $python:" $loose >&2; exit 1; }
    echo "Python $python: $(wc -l <"$work/$python.txt") packages resolve together"
done

$tools/python -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" || { cat "$work/build.log" >&2; exit 1; }
$tools/twine check --strict "$work"/dist/*
$tools/check-wheel-contents "$work"/dist/*.whl
ls -sh "$work/dist"

.venv/bin/python -m venv "$work/empty"
install "$work/empty/bin" torch==2.13.0
install "$work/empty/bin" "$work"/dist/*.whl
cp data/ni_in_au3ni.npz "$work"
cd "$work"
empty/bin/dosmatgen generate ni_in_au3ni.npz --site 3 -n 2 --num-atoms 4 --seed 1 -o out.extxyz
empty/bin/python -c "import ase.io; assert len(ase.io.read('out.extxyz', ':')) == 2"
