"""What the labels cover: elements, sizes, symmetry, gaps, energies. Shown by ``dosmatgen data`` and the datasheet."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols

from dosmatgen_ase.data.dataset import SiteDOSLabels, Structures
from dosmatgen_ase.data.shards import ORIGINS
from dosmatgen_ase.dos import MODEL_GRID

CRYSTAL_SYSTEMS = {
    "triclinic": 1, "monoclinic": 3, "orthorhombic": 16, "tetragonal": 75, "trigonal": 143, "hexagonal": 168,
    "cubic": 195,
}  # fmt: skip
"""First space group of each crystal system."""

GAP_CLASSES = {"metal": 0.0, "up to 1 eV": 1.0, "1 to 3 eV": 3.0, "above 3 eV": np.inf}
"""Largest gap of each class, eV."""

COMMON = 40  # usable structures from which on an element is worth labels

UNLABELLED = {
    **dict.fromkeys((2, 10, 18, 36, 54, 86), "a noble gas"),
    **dict.fromkeys(range(57, 72), "a lanthanide"),
    **dict.fromkeys(range(89, 104), "an actinide"),
}
"""Atomic numbers that no label holds, and what they are."""

MAX_LABELLED_VOLUME_PER_ATOM = 60.0
"""A^3; a crystal with more is not computed: its plane waves cost too much."""

ENOUGH = 15
"""Labels of an element after which ``order="coverage"`` no longer prefers it."""


@dataclass(frozen=True)
class Coverage:
    """Counts of labels, and of the structures that could have one.

    Attributes
    ----------
    splits : split to (labels, sites, labels with a gap)
    recipes : labels by the recipe that they were computed by, see `dft.settings.RECIPE`
    origins : labels by what their crystals are, see `data.ORIGINS`
    elements, usable : labels, and structures that can be labelled, that hold an element
    num_atoms, structure_sizes : labels, and all structures, by atoms per cell
    crystal_systems : labels by crystal system; those without a structure in the table are left out
    num_spacegroups : distinct space groups of the labels
    gaps : labels by class of the gap
    known : share of the labels that are known at an energy (eV)
    """

    splits: dict[str, tuple[int, int, int]]
    recipes: Counter[int]
    origins: Counter[str]
    elements: Counter[str]
    usable: Counter[str]
    num_atoms: Counter[int]
    structure_sizes: Counter[int]
    crystal_systems: dict[str, int]
    num_spacegroups: int
    gaps: dict[str, int]
    known: dict[int, float]

    @classmethod
    def of(cls, labels: SiteDOSLabels, structures: Structures) -> Coverage:
        """Count."""
        splits = {}
        for split in ("train", "val", "test"):
            rows = labels.split == split
            splits[split] = (int(rows.sum()), int(labels.num_atoms[rows].sum()), int((labels.band_gap[rows] > 0).sum()))
        fit = np.abs(np.linalg.det(structures.cell)) <= MAX_LABELLED_VOLUME_PER_ATOM * structures.num_atoms
        fit &= ~np.isin(structures.atomic_numbers, list(UNLABELLED)).any(axis=1)
        groups = structures.spacegroup[np.isin(structures.material_id, labels.material_id)]
        systems = np.searchsorted(list(CRYSTAL_SYSTEMS.values()), groups, side="right") - 1
        classes = np.searchsorted(list(GAP_CLASSES.values()), labels.band_gap)
        return cls(
            splits=splits,
            recipes=Counter(sorted(labels.recipe.tolist())),
            origins=Counter(labels.origin.tolist()),
            elements=_elements(labels.atomic_numbers),
            usable=_elements(structures.atomic_numbers[fit]),
            num_atoms=Counter(labels.num_atoms.tolist()),
            structure_sizes=Counter(structures.num_atoms.tolist()),
            crystal_systems={name: int((systems == i).sum()) for i, name in enumerate(CRYSTAL_SYSTEMS)},
            num_spacegroups=len(set(groups.tolist())),
            gaps={name: int((classes == i).sum()) for i, name in enumerate(GAP_CLASSES)},
            known={e: float(labels.known[:, np.abs(MODEL_GRID.energies - e).argmin()].mean()) for e in range(-1, 6)},
        )

    @property
    def scarce(self) -> dict[str, int]:
        """Labels of the elements that many structures hold and few labels."""
        common = (symbol for symbol, count in self.usable.items() if count >= COMMON)
        return {symbol: self.elements[symbol] for symbol in common if self.elements[symbol] < ENOUGH}

    def facts(self) -> dict[str, str]:
        """What there is to say, beside the table of `splits`, by heading."""
        sizes = {"1 to 2": (1, 2), "3 to 4": (3, 4), "5 to 8": (5, 8), "9 to 20": (9, 20)}
        by_size = {name: sum(self.num_atoms[n] for n in range(a, b + 1)) for name, (a, b) in sizes.items()}
        order = [symbol for symbol in chemical_symbols if self.elements[symbol]]
        return {
            "recipe": _listed({str(number): count for number, count in self.recipes.items()}, ": "),
            "crystals": _listed({name: self.origins[name] for name in ORIGINS}, ": "),
            "atoms per cell": _listed(by_size, ": "),
            f"crystal systems ({self.num_spacegroups} space groups)": _listed(self.crystal_systems),
            "gap": _listed(self.gaps, ": "),
            "known": ", ".join(f"{e:+d} eV {share:.0%}" for e, share in self.known.items()),
            f"labels per element ({len(order)} elements)": _listed({symbol: self.elements[symbol] for symbol in order}),
            f"fewer than {ENOUGH} labels, though in {COMMON} structures or more": _listed(self.scarce) or "none",
        }


def _elements(atomic_numbers: np.ndarray) -> Counter[str]:
    """Rows of padded atomic numbers (n, 20) that hold each element."""
    present = np.zeros((len(atomic_numbers), len(chemical_symbols)), dtype=bool)
    np.put_along_axis(present, atomic_numbers, True, axis=1)
    return Counter({chemical_symbols[z]: int(count) for z, count in enumerate(present.sum(0)) if z and count})


def _listed(counts: dict[str, int], between: str = " ") -> str:
    return ", ".join(f"{name}{between}{count}" for name, count in counts.items())
