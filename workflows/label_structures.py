"""Make training labels of structures with Quantum ESPRESSO, through jobflow: shards as in data/site_dos.

    python workflows/label_structures.py --demo --out labels
    python workflows/label_structures.py a.cif b.vasp many.extxyz --out labels

On one machine, `dosmatgen label` does the same without jobflow. Needs Quantum ESPRESSO and the extra "workflows".
`dosmatgen train-predictor` and `dosmatgen train` read OUT/*.npz when they lie in the folder site_dos of their --data.
Through FireWorks: flow_to_workflow(flow), as in inverse_design_fireworks.py, with OUT on a disk that all workers see.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ase.build import bulk
from jobflow import run_locally

from dosmatgen_ase.cli import read_structures
from dosmatgen_ase.flows import LabelMaker
from dosmatgen_ase.flows.jobs import to_structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "files", nargs="*", type=Path, help="anything that ASE reads; several structures per file are welcome"
)
parser.add_argument("--demo", action="store_true", help="Al and Si: at most 3 minutes on 2 cores")
parser.add_argument("--out", type=Path, default=Path("labels"), help="folder of the shards")
arguments = parser.parse_args()
if not arguments.files and not arguments.demo:
    parser.error("give structures, or --demo")

try:
    atoms = read_structures(arguments.files)
except (OSError, ValueError) as error:
    parser.error(str(error))
if arguments.demo:
    atoms = {symbol: bulk(symbol) for symbol in ("Al", "Si")}
structures = {name: to_structure(a) for name, a in atoms.items()}
flow = LabelMaker().make(structures, arguments.out)

arguments.out.mkdir(parents=True, exist_ok=True)
done = run_locally(flow, root_dir=arguments.out, create_folders=True, ensure_success=True)
print(json.dumps(done[flow.output.uuid][1].output, indent=1))
