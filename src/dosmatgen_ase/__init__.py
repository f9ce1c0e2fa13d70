"""Crystal structures from an electronic density of states.

Folders, from low to high; each imports lower ones only:

* ``dos``: targets; how they are read (``readers``) and broadened (``broadening``);
* ``data``: structures and labels; ``crystals``: what a crystal is (``checks``), which candidates are rejected
  (``screening``);
* ``model``: the network and its noise (``diffusion``: cell, coordinates, elements); ``train``: its training;
* ``dft``: Quantum ESPRESSO and the label set; ``forward``: the model that predicts a DOS;
* ``judge``: relaxation with any potential (``relaxation``), hull, ranking; ``retrieval``: known crystals by DOS;
* ``generate``: `DOSGenerator`, its settings and its one sampling loop;
* ``flows``: jobflow; ``report``: a run as one page; ``cli``: the commands.

The public names are imported on first use (PEP 562), so that ``import dosmatgen_ase`` loads neither torch nor ASE.
"""

from __future__ import annotations

from importlib import import_module

from dosmatgen_ase.moved import TYPE_CHECKING, install

if TYPE_CHECKING:
    from typing import Any

    from dosmatgen_ase.crystals.screening import KnownCrystals, screen_many
    from dosmatgen_ase.dft.espresso import compute_dos
    from dosmatgen_ase.dos import DOSWarning, EnergyGrid, TargetDOS
    from dosmatgen_ase.forward.bands import predict_bands, predict_levels
    from dosmatgen_ase.forward.predictor import predict_dos
    from dosmatgen_ase.generate.generator import DOSGenerator
    from dosmatgen_ase.generate.settings import GenerationSettings
    from dosmatgen_ase.judge.ranking import Ranking
    from dosmatgen_ase.judge.relaxation import relax
    from dosmatgen_ase.judge.stability import energy_above_hull
    from dosmatgen_ase.retrieval.index import DOSIndex
    from dosmatgen_ase.retrieval.query import search

__version__ = "0.1.0"

__all__ = [
    "DOSGenerator",
    "DOSIndex",
    "DOSWarning",
    "EnergyGrid",
    "GenerationSettings",
    "KnownCrystals",
    "Ranking",
    "TargetDOS",
    "__version__",
    "compute_dos",
    "energy_above_hull",
    "predict_bands",
    "predict_dos",
    "predict_levels",
    "relax",
    "screen_many",
    "search",
]

_HOME = {
    "DOSGenerator": "generate.generator",
    "DOSIndex": "retrieval.index",
    "DOSWarning": "dos",
    "EnergyGrid": "dos",
    "GenerationSettings": "generate.settings",
    "KnownCrystals": "crystals.screening",
    "Ranking": "judge.ranking",
    "TargetDOS": "dos",
    "compute_dos": "dft.espresso",
    "energy_above_hull": "judge.stability",
    "predict_bands": "forward.bands",
    "predict_dos": "forward.predictor",
    "predict_levels": "forward.bands",
    "relax": "judge.relaxation",
    "screen_many": "crystals.screening",
    "search": "retrieval.query",
}

install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
