#!/usr/bin/env bash
# The main job on a fresh machine: crystals whose first site has the DOS of Ni in Au3Ni.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
# Without actinides: no label holds one, and there is no pseudopotential to compute their DOS with.
.venv/bin/dosmatgen generate data/ni_in_au3ni.npz --site 3 -n 8 --num-atoms 4-7 --exclude-elements Ac,Th,Pa,U,Np,Pu -o out.extxyz --plot out.png
