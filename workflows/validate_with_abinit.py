"""Compute the best candidates of a run again with abinit, through atomate2, and rank them by that DOS.

    python workflows/validate_with_abinit.py inverse_design/result.json --keep 3 --out abinit
    python workflows/validate_with_abinit.py --demo --out abinit

Needs abinit (apt-get install abinit) and the extra "abinit". PAW files (EL.xml) are those of --pseudo-dir, or PBE ones
out of the package gpaw-data. --demo computes fcc Al and compares it with its own DOS by Quantum ESPRESSO, from data/.
Through FireWorks: flow_to_workflow(job), as in inverse_design_fireworks.py.
"""

import argparse
import gzip
import importlib.util
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from atomate2.abinit.flows.core import BandStructureMaker
from atomate2.abinit.jobs.core import StaticMaker, UniformNonSCFMaker
from atomate2.abinit.sets.core import StaticSetGenerator
from jobflow import JobStore, run_locally
from maggma.stores import MemoryStore

from dosmatgen_ase.dft.settings import MAGNETIC
from dosmatgen_ase.flows import CandidateDoc, InverseDesignDoc
from dosmatgen_ase.flows.flows import validate_candidates
from dosmatgen_ase.flows.jobs import to_structure
from dosmatgen_ase.report import read_result, write_result

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("result", nargs="?", help="result.json of an inverse-design run; left out with --demo")
parser.add_argument("--demo", action="store_true", help="fcc Al: at most 3 minutes")
parser.add_argument("--keep", type=int, default=3, help="how many candidates, best first")
parser.add_argument("--out", type=Path, default=Path("abinit"), help="folder of results and calculations")
parser.add_argument("--pseudo-dir", type=Path, help="folder of PAW files, EL.xml")
parser.add_argument("--ecut", type=float, default=15.0, help="plane-wave cut-off, Hartree; twice that inside spheres")
parser.add_argument("--kppa", type=int, default=1000, help="k-points times atoms")
arguments = parser.parse_args()
started = time.perf_counter()

if arguments.demo:
    from dosmatgen_ase.data import load_site_dos
    from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS

    labels = load_site_dos(Path(__file__).parents[1] / "data" / "site_dos")
    number = labels.material_id.tolist().index("mp-134")
    structure = to_structure(labels.atoms(number))
    values, mask = labels.values[number, 0], labels.known[number]
    target = TargetDOS(MODEL_GRID.energies, values, mask, sigma=MODEL_SIGMA, provenance="Quantum ESPRESSO, mp-134")
    known = CandidateDoc(
        index=0, formula="Al", generated=structure, structure=structure, record={}, distance=0.0, engine="itself"
    )
    run = InverseDesignDoc(targets={"0": target}, candidates=[known], generation={})
elif arguments.result is None:
    parser.error("give the result.json of a run, or --demo")
else:
    run = read_result(arguments.result)

arguments.out.mkdir(parents=True, exist_ok=True)
best = [candidate.structure for candidate in run.candidates if candidate.distance is not None][: arguments.keep]
elements = sorted({site.specie.symbol for structure in best for site in structure})
folder = arguments.pseudo_dir
if folder is None:
    package = importlib.util.find_spec("gpaw_data")
    if package is None or package.origin is None:
        parser.error("no PAW files: pip install gpaw-data, or give --pseudo-dir")
    folder = arguments.out / "paw"
    folder.mkdir(exist_ok=True)
    for element in elements:
        packed = Path(package.origin).parent / "setups" / f"{element}.PBE.gz"
        if packed.exists():
            (folder / f"{element}.xml").write_bytes(gzip.decompress(packed.read_bytes()))
files = [folder.resolve() / f"{element}.xml" for element in elements]
for file in files:
    if not file.exists():
        parser.error(f"no PAW file {file}: take another candidate or give --pseudo-dir")

static = StaticSetGenerator(
    pseudos=[str(file) for file in files],
    user_abinit_settings={"ecut": arguments.ecut, "pawecutdg": 2 * arguments.ecut},
    factory_kwargs={
        "kppa": arguments.kppa,
        "spin_mode": "polarized" if MAGNETIC.keys() & set(elements) else "unpolarized",
    },
)
maker = BandStructureMaker(
    static_maker=StaticMaker(input_set_generator=static), bs_maker=None, dos_maker=UniformNonSCFMaker()
)
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
    print(new.index, new.formula, f"{old.engine} {old.distance:.3f}, abinit {new.distance}", new.reason or "")
print(f"{time.perf_counter() - started:.0f} s, report: {write_result(result, arguments.out)}")
