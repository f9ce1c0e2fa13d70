#!/usr/bin/env bash
# The main job on a fresh machine: 64 crystals are drawn whose first site is to have the DOS of Ni in Au3Ni, all of them
# in out.extxyz; the best 8 by their predicted DOS are in out-best.extxyz.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
# Without f elements: no label holds one, so their DOS is unknown.
f_elements=La,Ce,Pr,Nd,Pm,Sm,Eu,Gd,Tb,Dy,Ho,Er,Tm,Yb,Lu,Ac,Th,Pa,U,Np,Pu
.venv/bin/dosmatgen generate data/ni_in_au3ni.npz --site 3 -n 8 --oversample 8 --num-atoms 4-7 --exclude-elements "$f_elements" -o out.extxyz --plot out.png
