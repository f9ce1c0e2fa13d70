"""Crystal structures from an electronic density of states.

The public names are imported on first use (PEP 562), so that ``import dosmatgen_ase`` loads neither torch nor ASE.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dosmatgen_ase.dos import EnergyGrid, TargetDOS
    from dosmatgen_ase.electronic import compute_dos
    from dosmatgen_ase.generator import DOSGenerator
    from dosmatgen_ase.predictor import predict_dos
    from dosmatgen_ase.ranking import Ranking
    from dosmatgen_ase.relaxation import relax
    from dosmatgen_ase.stability import energy_above_hull

__version__ = "0.1.0"

__all__ = [
    "DOSGenerator",
    "EnergyGrid",
    "Ranking",
    "TargetDOS",
    "__version__",
    "compute_dos",
    "energy_above_hull",
    "predict_dos",
    "relax",
]

_HOME = {
    "DOSGenerator": "generator",
    "EnergyGrid": "dos",
    "Ranking": "ranking",
    "TargetDOS": "dos",
    "compute_dos": "electronic",
    "energy_above_hull": "stability",
    "predict_dos": "predictor",
    "relax": "relaxation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
