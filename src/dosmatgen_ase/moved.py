"""Old names of modules, importable for one more release with a `DeprecationWarning` that tells the new name.

Every import of the package comes here first, before the command line can hear Ctrl-C: so it loads next to nothing.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False  # that of typing, which takes longer to load than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

PACKAGE = "dosmatgen_ase"
MOVED = {
    "checkpoint": ("model.checkpoint", "files.tensors"),
    "conditioning": ("model.conditioning",),
    "constraints": ("generate.constraints",),
    "coverage": ("data.coverage",),
    "crystal": ("crystals.batch",),
    "denoiser": ("model.denoiser",),
    "diffusion": ("model.diffusion",),
    "diffusion.coordinates": ("model.diffusion.coordinates",),
    "diffusion.lattice": ("model.diffusion.lattice",),
    "diffusion.process": ("model.diffusion.process",),
    "diffusion.species": ("model.diffusion.species",),
    "electronic": ("dft.espresso", "dft.settings", "dft.result", "dft.errors", "dft.batch", "dft.readers"),
    "generator": ("generate.generator", "generate.request"),
    "interpolation": ("dft.interpolation",),
    "labels": ("dft.labels",),
    "metrics": ("judge.metrics",),
    "predictor": ("forward.predictor", "forward.features", "forward.predictor_training", "forward.pseudo_labels"),
    "ranking": ("judge.ranking",),
    "relaxation": ("judge.relaxation", "judge.relaxed_file"),
    "sampler": ("generate.sampler",),
    "screening": ("crystals.screening", "crystals.checks"),
    "stability": ("judge.stability",),
    "training": ("train.trainer",),
}


class MovedModules:
    """Finds a module by its old name, and loads it: a module whose attributes are those of the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name, None for any other."""
        package, _, name = fullname.partition(".")
        if package != PACKAGE or name not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=name == "diffusion")  # type: ignore[arg-type]  # it has what a loader needs

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and hand on every attribute of the new modules."""
        homes = [f"{PACKAGE}.{name}" for name in MOVED[module.__name__.partition(".")[2]]]
        warnings.warn(f"{module.__name__} is now {', '.join(homes)}", DeprecationWarning, stacklevel=2)

        def attribute(name: str) -> object:
            for home in map(import_module, homes):
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"{module.__name__}, now {', '.join(homes)}, has no {name!r}")

        vars(module)["__getattr__"] = attribute


def install() -> None:
    """Make the old names importable; a second call changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
