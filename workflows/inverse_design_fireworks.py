"""The flow of inverse_design_local.py through FireWorks: submitted here, run by any worker, at any time.

    python workflows/inverse_design_fireworks.py submit --demo --out fw
    python workflows/inverse_design_fireworks.py launch --out fw
    python workflows/inverse_design_fireworks.py report --out fw

The database is two files in OUT for one worker at a time, or a MongoDB for as many as you like: --uri
mongodb://HOST/DATABASE in all three. A submitting machine needs no torch, a worker needs the extra "workflows" and
Quantum ESPRESSO (or submit --predict).
"""

import argparse
import os
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")  # cells of a few atoms: more threads are slower

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("action", choices=["submit", "launch", "report"])
parser.add_argument("dos_file", nargs="?", help="submit: vasprun.xml, JSON, npz or two columns; left out with --demo")
parser.add_argument("--site", type=int, help="site of the file whose DOS is wanted")
parser.add_argument("--demo", action="store_true", help="Ni in Au3Ni, 4 candidates")
parser.add_argument("--out", type=Path, default=Path("inverse_design"), help="folder of database, launches and report")
parser.add_argument("--uri", help="mongodb://HOST/DATABASE in place of files in OUT")
parser.add_argument("-n", type=int, default=32, help="structures to generate")
parser.add_argument("--keep", type=int, default=4, help="how many of them to relax and compute, best prediction first")
parser.add_argument("--num-atoms", type=int, nargs="+", default=[4], help="atoms per cell")
parser.add_argument("--elements", nargs="+", help="allow these elements only")
parser.add_argument("--predict", action="store_true", help="predict the DOS of the relaxed crystals: no DFT")
parser.add_argument("--weights", default="default")
arguments = parser.parse_args()
out = arguments.out.resolve()
out.mkdir(parents=True, exist_ok=True)

if arguments.uri:
    from fireworks import LaunchPad
    from jobflow import JobStore
    from maggma.stores import MongoStore
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    try:
        MongoClient(arguments.uri, serverSelectionTimeoutMS=5000).admin.command("ping")
    except PyMongoError as error:
        parser.error(f"cannot reach the database of --uri: {error}"[:300])
    database = urlsplit(arguments.uri).path.strip("/")
    outputs, data = (MongoStore(database, name, uri=arguments.uri) for name in ("outputs", "outputs_data"))
    store = JobStore(outputs, additional_stores={"data": data})
    launchpad = LaunchPad(host=arguments.uri, name=database, uri_mode=True)
else:
    from dosmatgen_ase.flows.database import file_job_store, file_launchpad

    launchpad, store = file_launchpad(out / "launchpad.json"), file_job_store(out)

from fireworks import FWorker
from fireworks.core.rocket_launcher import rapidfire
from jobflow.managers.fireworks import flow_to_workflow

if arguments.action == "submit":
    from dosmatgen_ase import TargetDOS
    from dosmatgen_ase.flows import DOSMaker, GenerateMaker, InverseDesignMaker, PredictDOSMaker, ScreenMaker

    if arguments.demo:
        arguments.dos_file, arguments.site = Path(__file__).parents[1] / "data" / "ni_in_au3ni.npz", 3
    elif arguments.dos_file is None:
        parser.error("give a DOS file, or --demo")
    if arguments.weights != "default":  # jobs run in folders of their own
        arguments.weights = str(Path(arguments.weights).resolve())
    flow = InverseDesignMaker(
        generate_maker=GenerateMaker(
            n=arguments.n, num_atoms=arguments.num_atoms, elements=arguments.elements, weights=arguments.weights
        ),
        screen_maker=ScreenMaker(keep=arguments.keep),
        dos_maker=PredictDOSMaker() if arguments.predict else DOSMaker(),
    ).make(TargetDOS.from_file(arguments.dos_file, arguments.site))
    if not launchpad.get_fw_ids():
        launchpad.reset("", require_password=False)  # a new database: makes its indices, there is nothing to lose
    launchpad.add_wf(flow_to_workflow(flow, store, metadata={"result": flow.output.uuid}))
    launchpad.to_file(str(out / "my_launchpad.yaml"))  # for lpad -l and rlaunch -l
elif arguments.action == "launch":
    (out / "launches").mkdir(exist_ok=True)
    os.chdir(out / "launches")
    rapidfire(launchpad, FWorker())
else:
    from dosmatgen_ase.flows import InverseDesignDoc
    from dosmatgen_ase.report import write_result

    store.connect()
    last = launchpad.workflows.find_one({"metadata.result": {"$exists": True}}, sort=[("_id", -1)])
    if last is None or not store.count({"uuid": last["metadata"]["result"], "index": 2}):  # 1 replaced itself
        parser.error("there is no result yet: submit, launch, and look for failed jobs with lpad get_fws -s FIZZLED")
    result = InverseDesignDoc.model_validate(store.get_output(last["metadata"]["result"], load=True))
    print(write_result(result, out))
print({state: len(launchpad.get_fw_ids({"state": state})) for state in ("READY", "WAITING", "COMPLETED", "FIZZLED")})
