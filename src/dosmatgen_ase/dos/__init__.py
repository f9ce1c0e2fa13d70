"""The density of states as a target: energy grid, values with a known mask, readers, broadening, distances.

Conventions, followed by every part of the package:

* energies in eV; zero is the Fermi level of a metal (``reference="fermi"``) or the valence-band maximum of a gapped
  solid (``"vbm"``);
* values in states/eV, both spins summed, of one site (``kind="site"``) or of the cell (``"total"``);
* ``sigma`` is the standard deviation of the Gaussian broadening in eV, ``None`` where it is not known;
* energies that were neither computed nor asked for are *unknown*, which is not the same as zero.

numpy is all that importing this folder needs; scipy, ASE and pymatgen are imported by the functions that use them.

Reading order: `grid`, `broadening`, `target` (the class), `readers` (one module a format), `checks`
(zero of energy, number of states), `distances`.
"""

from dosmatgen_ase.dos.broadening import resample, scale_sites_to_total
from dosmatgen_ase.dos.checks import DOSWarning, on_common_zero
from dosmatgen_ase.dos.distances import (
    MIN_SHARED,
    band_centre_difference,
    fingerprint_similarity,
    mae,
    mae_arrays,
    mean_distance,
    normalised_l1,
    normalised_l1_arrays,
    wasserstein,
)
from dosmatgen_ase.dos.grid import GAP_DOS, MIN_GAP, MODEL_GRID, MODEL_SIGMA, NEAR_GAP, Array, EnergyGrid, Mask
from dosmatgen_ase.dos.target import TargetDOS

__all__ = [
    "GAP_DOS",
    "MIN_GAP",
    "MIN_SHARED",
    "MODEL_GRID",
    "MODEL_SIGMA",
    "NEAR_GAP",
    "Array",
    "DOSWarning",
    "EnergyGrid",
    "Mask",
    "TargetDOS",
    "band_centre_difference",
    "fingerprint_similarity",
    "mae",
    "mae_arrays",
    "mean_distance",
    "normalised_l1",
    "normalised_l1_arrays",
    "on_common_zero",
    "resample",
    "scale_sites_to_total",
    "wasserstein",
]
