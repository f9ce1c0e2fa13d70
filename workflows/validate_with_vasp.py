"""Compute the best candidates of a run again with VASP, through atomate2, and rank them by that DOS.

    python workflows/validate_with_vasp.py inverse_design/result.json --keep 3 --out vasp
    python workflows/validate_with_vasp.py --demo --out vasp_inputs

The machine needs what atomate2 needs: VASP (VASP_CMD of atomate2) and its POTCAR files (PMG_VASP_PSP_DIR
in ~/.pmgrc.yaml). --demo writes the inputs of the static step for Au3Ni and stops: it needs neither. PBE without +U,
as the labels are. Through FireWorks: flow_to_workflow(flow), as in inverse_design_fireworks.py.
"""

import argparse
from pathlib import Path

from atomate2.vasp.flows.core import UniformBandStructureMaker
from atomate2.vasp.powerups import update_user_incar_settings
from jobflow import JobStore, run_locally
from maggma.stores import MemoryStore
from pymatgen.core import Lattice, Structure

from dosmatgen_ase.flows import InverseDesignDoc
from dosmatgen_ase.flows.flows import validate_candidates
from dosmatgen_ase.report import read_result, write_result

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("result", nargs="?", help="result.json of an inverse-design run; left out with --demo")
parser.add_argument("--demo", action="store_true", help="write VASP inputs for Au3Ni and stop")
parser.add_argument("--keep", type=int, default=3, help="how many candidates, best first")
parser.add_argument("--out", type=Path, default=Path("vasp"), help="folder of results and calculations")
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)
# As the labels are: PBE, and without the +U that atomate2 adds for oxides and fluorides of transition metals.
maker = update_user_incar_settings(UniformBandStructureMaker(), {"GGA": "PE", "LDAU": False})

if arguments.demo:
    sites = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0, 0]]
    structure = Structure(Lattice.cubic(4.0), ["Au", "Au", "Au", "Ni"], sites)
    inputs = maker.static_maker.input_set_generator.get_input_set(structure, potcar_spec=True)
    for name in ("INCAR", "POSCAR"):
        inputs[name].write_file(str(arguments.out / name))
        print(arguments.out / name)
    parser.exit()
elif arguments.result is None:
    parser.error("give the result.json of a run, or --demo")

run = read_result(arguments.result)
job = validate_candidates(run, maker, arguments.keep)
store = JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})
run_locally(job, store=store, root_dir=arguments.out, create_folders=True)  # a job that fails costs its candidate
try:
    result = InverseDesignDoc.model_validate(store.get_output(job.output.uuid, load=True))
except ValueError:
    parser.exit(1, "there is no result: the log above tells which job failed\n")
before = {candidate.index: candidate for candidate in run.candidates}
for new in result.candidates:
    old = before[new.index]
    print(new.index, new.formula, f"{old.engine} {old.distance:.3f}, VASP {new.distance}", new.reason or "")
print(f"report: {write_result(result, arguments.out)}")
