"""CHGNet as an ASE calculator: energy, forces and stress by one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from dosmatgen_ase.forward.features import chgnet_graph, load_chgnet
from dosmatgen_ase.threads import without_warnings

MAX_BONDS = 50_000
"""Most bonds and angles of a crystal whose forces are wanted: each takes 20 kB, 1 GB in all. Copper of 230 atoms."""


class CHGNetForces(Calculator):
    """CHGNet 0.3.0: ``energy`` (eV), ``forces`` (eV/A), ``stress`` (eV/A^3, Voigt order).

    The numbers are those of ``chgnet.model.CHGNetCalculator``, which keeps the graph of the gradient for a training
    that never comes: that takes seven times the memory and three times the time.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces", "stress"]

    def __init__(self) -> None:
        super().__init__()
        load_chgnet()  # what cannot be loaded is told at once

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: Sequence[str] = all_changes
    ) -> None:
        """Fill ``results``.

        Raises
        ------
        ValueError
            As `features.chgnet_graph`.
        """
        from chgnet.model.model import BatchedGraph

        super().calculate(atoms, properties, system_changes)
        model, graph = load_chgnet(), chgnet_graph(self.atoms, MAX_BONDS)
        with without_warnings():  # of its own code
            batch = BatchedGraph.from_graphs(
                [graph],
                bond_basis_expansion=model.bond_basis_expansion,
                angle_basis_expansion=model.angle_basis_expansion,
                compute_stress=True,
            )
        per_atom = model._compute(batch)["e"]  # the part that depends on the geometry
        energy = (per_atom + model.composition_model([graph])).sum() * len(graph.atomic_number)
        wanted = batch.atom_positions[0], batch.strains[0]
        forces, stress = torch.autograd.grad(per_atom.sum() * len(graph.atomic_number), wanted)
        self.results = {
            "energy": float(energy.detach()),
            "forces": -forces.numpy(),
            "stress": full_3x3_to_voigt_6_stress((stress / batch.volumes[0]).numpy()),
        }
