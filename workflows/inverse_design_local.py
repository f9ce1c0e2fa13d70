"""From a target DOS to relaxed, computed and ranked crystals, in this process: no database, no queue.

    python workflows/inverse_design_local.py --demo --out demo
    python workflows/inverse_design_local.py vasprun.xml --site 3 --num-atoms 4 6 -n 64 --keep 8 --out run

Needs Quantum ESPRESSO (or --predict) and the extra "workflows". Open OUT/report.html; go on with OUT/result.json
and OUT/candidates.extxyz.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # cells of a few atoms: more threads are slower

from jobflow import JobStore, run_locally
from maggma.stores import MemoryStore

from dosmatgen_ase import TargetDOS
from dosmatgen_ase.flows import (
    DOSMaker,
    GenerateMaker,
    InverseDesignDoc,
    InverseDesignMaker,
    PredictDOSMaker,
    RelaxMaker,
    ScreenMaker,
)
from dosmatgen_ase.report import write_result

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dos_file", nargs="?", help="vasprun.xml, JSON, npz or two columns; left out with --demo")
parser.add_argument("--site", type=int, help="site of the file whose DOS is wanted")
parser.add_argument("--demo", action="store_true", help="Ni in Au3Ni, 4 candidates: at most 10 minutes on 2 cores")
parser.add_argument("--out", type=Path, default=Path("inverse_design"), help="folder of results and calculations")
parser.add_argument("-n", type=int, default=32, help="structures to generate")
parser.add_argument("--keep", type=int, default=4, help="how many of them to relax and compute, best prediction first")
parser.add_argument("--num-atoms", type=int, nargs="+", default=[4], help="atoms per cell")
parser.add_argument("--elements", nargs="+", help="allow these elements only")
parser.add_argument("--calculator", default="chgnet", help='"chgnet" or the file of a MACE model')
parser.add_argument("--trust-model", action="store_true", help="load a MACE file: a pickle may run any code")
parser.add_argument("--predict", action="store_true", help="predict the DOS of the relaxed crystals: no DFT")
parser.add_argument("--weights", default="default")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
if arguments.demo:
    arguments.dos_file, arguments.site = Path(__file__).parents[1] / "data" / "ni_in_au3ni.npz", 3
elif arguments.dos_file is None:
    parser.error("give a DOS file, or --demo")
if arguments.weights != "default":  # jobs run in folders of their own
    arguments.weights = str(Path(arguments.weights).resolve())
if Path(arguments.calculator).is_file():
    arguments.calculator = str(Path(arguments.calculator).resolve())

started = time.perf_counter()
flow = InverseDesignMaker(
    generate_maker=GenerateMaker(
        n=arguments.n,
        num_atoms=arguments.num_atoms,
        elements=arguments.elements,
        seed=arguments.seed,
        weights=arguments.weights,
    ),
    screen_maker=ScreenMaker(keep=arguments.keep),
    relax_maker=RelaxMaker(calculator=arguments.calculator, trust_model=arguments.trust_model),
    dos_maker=PredictDOSMaker() if arguments.predict else DOSMaker(),
).make(TargetDOS.from_file(arguments.dos_file, arguments.site))

arguments.out.mkdir(parents=True, exist_ok=True)
store = JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})
run_locally(flow, store=store, root_dir=arguments.out, create_folders=True)  # a job that fails costs its candidate
try:
    result = InverseDesignDoc.model_validate(store.get_output(flow.output.uuid, load=True))
except ValueError:
    parser.exit(1, "there is no result: the log above tells which job failed\n")
for candidate in result.candidates:
    distance = "-" if candidate.distance is None else f"{candidate.distance:.3f}"
    print(candidate.index, candidate.formula, distance, candidate.reason or "")
print(f"{time.perf_counter() - started:.0f} s, report: {write_result(result, arguments.out)}")
