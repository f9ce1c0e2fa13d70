"""jobflow Makers: from a target DOS to relaxed, computed and ranked crystals, on a laptop, FireWorks or a cluster.

`jobs` has one Maker per step, `flows` joins them, `schemas` says what each step leaves in the database. Everything here
is imported and submitted without torch: a job imports the library that does its work when it runs.
"""

from __future__ import annotations

from dosmatgen_ase.flows.flows import InverseDesignMaker, LabelMaker
from dosmatgen_ase.flows.jobs import (
    CompareDOSMaker,
    DOSMaker,
    GenerateMaker,
    PredictDOSMaker,
    RelaxMaker,
    ScreenMaker,
    TrainMaker,
)
from dosmatgen_ase.flows.schemas import CandidateDoc, DOSDoc, GenerationDoc, InverseDesignDoc, RelaxDoc, ScreeningDoc
from dosmatgen_ase.flows.search import SearchMaker

__all__ = [
    "CandidateDoc", "CompareDOSMaker", "DOSDoc", "DOSMaker", "GenerateMaker", "GenerationDoc", "InverseDesignDoc",
    "InverseDesignMaker", "LabelMaker", "PredictDOSMaker", "RelaxDoc", "RelaxMaker", "ScreenMaker", "ScreeningDoc",
    "SearchMaker", "TrainMaker",
]  # fmt: skip
