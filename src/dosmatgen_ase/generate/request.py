"""`Request`: what the user asks for, checked as a whole, in the form that the sampler takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from ase.data import atomic_numbers as NUMBER_OF
from ase.data import chemical_symbols

from dosmatgen_ase.crystals.batch import CrystalBatch
from dosmatgen_ase.crystals.reduction import niggli_operation, plane_spacings
from dosmatgen_ase.crystals.screening import MAX_DRAWN_VOLUME_PER_ATOM, digest, right_handed
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS, on_common_zero
from dosmatgen_ase.dos.checks import DOSWarning, labelled_elements, warn_of_doubts
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.sampler import SamplerConfig
from dosmatgen_ase.generate.settings import GenerationSettings
from dosmatgen_ase.limits import MAX_ATOMIC_NUMBER, MAX_ATOMS
from dosmatgen_ase.model.conditioning import DOSCondition, Guidance
from dosmatgen_ase.model.denoiser import MAX_IMAGES
from dosmatgen_ase.model.diffusion.species import MASKED
from dosmatgen_ase.parsing import DOSInput, is_list, split_targets

if TYPE_CHECKING:
    from ase import Atoms

# The defaults where the targets know less than half of the model's energies; the guidance ends with the species.
WINDOW_GUIDANCE, WINDOW_TEMPERATURE = Guidance(3.0, (SamplerConfig.species_end, 1.0)), 0.35


@dataclass(frozen=True)
class Request:
    """Targets and settings that fit each other.

    Attributes
    ----------
    settings : GenerationSettings
        As given.
    site_targets : dict {site: TargetDOS}
    total_target : TargetDOS or None
    on_grid : dict
        Values and known mask of each target on the model's grid, both of shape (G,), by site; by None for the total.
    sizes : tuple of int or None
        Atoms per cell to take in turn; None where the model draws them.
    template : Atoms or None
        Right-handed.
    strength : float
        How far the template is noised; 1 without one.
    fixed_species : dict {site: atomic number}
    fixed_sites : frozenset of int
    free_species : frozenset of int
        Sites that start without an element, whatever the template has there.
    fixed_cell : bool
    composition : dict {atomic number: count}
        Empty where there is none.
    allowed : frozenset of int
        Atomic numbers.
    """

    settings: GenerationSettings
    site_targets: dict[int, TargetDOS]
    total_target: TargetDOS | None
    on_grid: dict[int | None, tuple[torch.Tensor, torch.Tensor]]
    sizes: tuple[int, ...] | None
    template: Atoms | None
    strength: float
    fixed_species: dict[int, int]
    fixed_sites: frozenset[int]
    free_species: frozenset[int]
    fixed_cell: bool
    composition: dict[int, int]
    allowed: frozenset[int]

    @classmethod
    def of(cls, dos: DOSInput, settings: GenerationSettings) -> Request:
        """Check targets and settings against each other.

        Raises
        ------
        TypeError, ValueError
            With both culprits named where two arguments contradict each other.
        """
        # Here and not in the settings: a Maker's template comes with the call, its settings before.
        for name in ("fixed_cell", "fixed_sites", "free_species"):
            if getattr(settings, name) and settings.template is None:
                raise ValueError(f"{name} needs a template to take its values from")
        total, targets = split_targets(dos, settings.sites)
        targets = on_common_zero(targets)
        total = None if total is None else on_common_zero({0: total})[0]
        composition, allowed = _lists(settings)
        template = None if settings.template is None else right_handed(settings.template)
        held = set(settings.fixed_sites or ())
        if template is not None:
            for constraint in template.constraints:  # FixAtoms
                held |= {int(i) if i >= 0 else int(i) + len(template) for i in constraint.get_indices()}
        sizes, source = _sizes(settings, template, composition, len(targets) if is_list(dos) else None)
        pins = {i: NUMBER_OF[symbol] for i, symbol in (settings.fixed_species or {}).items()}
        limit, source = (min(sizes), source) if sizes else (MAX_ATOMS, "the limit of this package")
        free = set(settings.free_species or ())
        placed = "dos" if settings.sites is None else "sites (--on-sites)"
        named = {placed: set(targets), "fixed_species": set(pins), "fixed_sites": held, "free_species": free}
        for name, used in named.items():
            for i in sorted(used):
                if not 0 <= i < limit:
                    there = "site 0" if limit == 1 else f"sites 0 to {limit - 1}"
                    raise ValueError(f"{name} names site {i}, but {source} allows {there} only")
        wanted: list[tuple[int | None, TargetDOS]] = [*targets.items(), *([] if total is None else [(None, total)])]
        request = cls(
            settings=settings,
            site_targets=targets,
            total_target=total,
            on_grid={i: _on_grid(target) for i, target in wanted},
            sizes=sizes,
            template=template,
            strength=1.0 if template is None else settings.strength,
            fixed_species=pins,
            fixed_sites=frozenset(held),
            free_species=frozenset(free),
            # FixAtoms holds Cartesian positions, which a changing cell would move.
            fixed_cell=settings.fixed_cell or bool(template is not None and template.constraints),
            composition=composition,
            allowed=allowed,
        )
        request._check_species()
        return request

    def warn_of_doubts(self) -> None:
        """Issue a `DOSWarning` for what a target probably has wrong."""
        targets = dict(enumerate([*self.site_targets.values(), *([self.total_target] if self.total_target else [])]))
        sizes = self.sizes or (1, MAX_ATOMS)
        warn_of_doubts(targets, (min(sizes), max(sizes)), stacklevel=5)
        unknown = {i: chemical_symbols[z] for i, z in self.pinned_species().items() if i in self.site_targets}
        for i, symbol in unknown.items():
            if symbol not in labelled_elements():
                told = f"site {i} must be {symbol}, of which no label exists: whether it has this DOS is a guess"
                warnings.warn(told, DOSWarning, stacklevel=4)

    def _check_species(self) -> None:
        for i, z in self.pinned_species().items():
            name = f"site {i} must be {chemical_symbols[z]}, which"
            if z not in self.allowed:
                raise ValueError(f"{name} contradicts elements/exclude_elements: allow it, or leave the site free")
            if self.composition and z not in self.composition:
                formula = _formula(self.composition)
                raise ValueError(f"{name} contradicts composition={formula!r}: add it, or leave the site free")
        for size in self.sizes or ():
            for z, left in self.remaining(size).items():
                if left < 0:
                    used_up = [i for i, other in self.pinned_species().items() if other == z]
                    raise ValueError(
                        f"composition has fewer {chemical_symbols[z]} than the sites {used_up}, where fixed_species or "
                        f"template hold {chemical_symbols[z]}: change it, or leave some of these sites free"
                    )

    def remaining(self, size: int) -> dict[int, int]:
        """Atoms of each element of the composition that are left for free sites in a cell of ``size`` atoms."""
        if not self.composition:
            return {}
        factor = size // sum(self.composition.values())
        pinned = list(self.pinned_species().values())
        return {z: factor * count - pinned.count(z) for z, count in self.composition.items()}

    def pinned_species(self) -> dict[int, int]:
        """Fixed species, and those of the template on fixed sites (strength 0: on all sites) unless they are free."""
        if self.template is None:
            return self.fixed_species
        held = [i for i in self.held_sites() if i not in self.free_species]
        return {**{i: int(self.template.numbers[i]) for i in held}, **self.fixed_species}

    def held_sites(self) -> list[int]:
        """Sites that stay where the template has them."""
        return list(range(len(self.template or ()))) if self.strength == 0 else sorted(self.fixed_sites)

    @property
    def start_level(self) -> float:
        """Noise level that the sampler starts from. Free elements of a crystal that is held take the whole way."""
        return 1.0 if self.strength == 0 and self.free_species else self.strength

    @property
    def held_cell(self) -> np.ndarray | None:
        """The template's cell where the result keeps it, shape (3, 3)."""
        if self.template is None or not (self.fixed_cell or self.strength == 0):
            return None
        return np.asarray(self.template.cell)

    @cached_property
    def to_reduced(self) -> np.ndarray:
        """Integer matrix from the template's cell to the reduced one that the network sees, shape (3, 3)."""
        return np.eye(3, dtype=int) if self.template is None else niggli_operation(np.asarray(self.template.cell))

    def reduced_template(self) -> Atoms | None:
        """The template in its reduced cell: the same crystal, atoms not moved."""
        if self.template is None or (self.to_reduced == np.eye(3)).all():
            return self.template
        reduced = self.template.copy()
        reduced.set_cell(self.to_reduced @ np.asarray(self.template.cell), apply_constraint=False)
        return reduced

    def check_template(self, cutoff: float) -> None:
        """Raise ``ValueError`` for a template that is so thin that the network misses neighbours within ``cutoff``."""
        template, shortest = self.reduced_template(), cutoff / (MAX_IMAGES + 0.5)
        if template is None or self.start_level == 0:
            return
        if (spacing := plane_spacings(np.asarray(template.cell)).min()) < shortest:
            raise ValueError(
                f"template is collapsed: its lattice repeats every {spacing:.2f} Angstrom, and the network needs at "
                f"least {shortest:.2f} to see all neighbours; use a crystal with atoms farther apart"
            )

    @property
    def max_volume_per_atom(self) -> float:
        """Bound of the screen, A^3; a cell that was asked for is not too sparse."""
        if self.template is None or self.held_cell is None:
            return MAX_DRAWN_VOLUME_PER_ATOM
        return max(MAX_DRAWN_VOLUME_PER_ATOM, 1.01 * float(self.template.get_volume()) / len(self.template))

    def sampling(self, config: SamplerConfig, scale: float | None = None) -> tuple[Guidance, SamplerConfig]:
        """Guidance (by the given scale or the default) and settings: a window leaves elements open, so is sharpened."""
        known = [float(mask.float().mean()) for _, mask in self.on_grid.values()]
        window = bool(known) and np.mean(known) < 0.5
        guidance = (WINDOW_GUIDANCE if window else Guidance()) if scale is None else Guidance(float(scale))
        if window and guidance.scale != 0:  # scale 0 ignores the target in everything
            config = replace(config, species_temperature=WINDOW_TEMPERATURE)
        return guidance, config

    def condition(self, sizes: Sequence[int]) -> DOSCondition | None:
        """Targets on the model's grid for crystals of these sizes; None if there are none."""
        if not self.on_grid:
            return None
        empty = DOSCondition.none(len(sizes), max(sizes), MODEL_GRID.size)
        for i, (values, known) in self.on_grid.items():
            if i is None:
                empty.total[:], empty.total_known[:] = values, known
            else:
                empty.site[:, i], empty.site_known[:, i] = values, known
        return empty

    def constraints(self, sizes: Sequence[int]) -> Constraints:
        """Pins and masks for crystals of these sizes."""
        result = Constraints.none(torch.tensor(sizes))
        if (template := self.reduced_template()) is not None:
            result = replace(result, start=CrystalBatch.from_atoms([template] * len(sizes)))
        result.fixed_coords[:, self.held_sites()] = True
        result.start.atomic_numbers[:, sorted(self.free_species)] = MASKED
        for i, z in self.pinned_species().items():
            result.start.atomic_numbers[:, i] = z
            result.fixed_species[:, i] = True
        result.fixed_cell[:] = self.held_cell is not None
        forbidden = [z for z in range(MAX_ATOMIC_NUMBER + 1) if z not in self.allowed]
        result.allowed[:, forbidden] = False
        if self.composition:
            for k, size in enumerate(sizes):
                result.remaining[k] = 0
                for z, left in self.remaining(size).items():
                    result.remaining[k, z] = left
        return result

    @property
    def held(self) -> dict[str, Any]:
        """What a relaxation must keep, as keywords of `relaxation.relax`."""
        return {"fixed_cell": self.fixed_cell, "fixed_sites": sorted(self.fixed_sites)}

    def record(self) -> dict[str, Any]:
        """What was asked, JSON-able, for ``atoms.info``."""
        return {
            "targets": {str(i): t.digest() for i, t in self.site_targets.items()},
            "total_target": self.total_target.digest() if self.total_target is not None else None,
            "template": self.template.get_chemical_formula() if self.template is not None else None,
            "template_sha256": digest(self.template) if self.template is not None else None,
            "strength": self.strength if self.template is not None else None,
            "fixed_species": {str(i): chemical_symbols[z] for i, z in self.fixed_species.items()},
            "fixed_sites": sorted(self.fixed_sites),
            "free_species": sorted(self.free_species),
            "fixed_cell": self.fixed_cell,
            "composition": {chemical_symbols[z]: count for z, count in self.composition.items()},
            "forbidden_elements": [
                chemical_symbols[z] for z in range(1, MAX_ATOMIC_NUMBER + 1) if z not in self.allowed
            ],
            "new_only": self.settings.new_only,
        }


def completed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with what version 0.1.0 did not write yet, and sites as text, which ASE's files make numbers."""
    by_site = {key: {str(i): value for i, value in record[key].items()} for key in ("targets", "fixed_species")}
    return {"free_species": [], "new_only": False, **record, **by_site}


def settings_of(record: Mapping[str, Any], num_atoms: int, dos: DOSInput, template: Atoms | None) -> GenerationSettings:
    """Return the settings by which the structure of a record was made, for the same targets and template."""
    return GenerationSettings(
        num_atoms=num_atoms,
        sites=([int(i) for i in record["targets"]] or None) if isinstance(dos, TargetDOS) else None,
        template=template,
        strength=1.0 if record["strength"] is None else record["strength"],
        fixed_species={int(i): symbol for i, symbol in record["fixed_species"].items()},
        fixed_sites=record["fixed_sites"],
        free_species=record["free_species"],
        new_only=record["new_only"],
        fixed_cell=record["fixed_cell"],
        composition=record["composition"] or None,
        exclude_elements=record["forbidden_elements"],
        guidance_scale=record["guidance_scale"],
        num_steps=record["num_steps"],
        seed=record["seed"],
    )


def _on_grid(target: TargetDOS) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and known mask, shape (G,), on the model's grid."""
    resampled = target.on_grid(MODEL_GRID, MODEL_SIGMA)
    return torch.tensor(resampled.values * resampled.known, dtype=torch.float32), torch.tensor(resampled.known)


def _lists(settings: GenerationSettings) -> tuple[dict[int, int], frozenset[int]]:
    """Composition and allowed elements, as atomic numbers."""
    every = chemical_symbols[1 : MAX_ATOMIC_NUMBER + 1]
    allowed = set(every if settings.elements is None else settings.elements) - set(settings.exclude_elements or ())
    if not allowed:
        raise ValueError("elements and exclude_elements together leave no element: allow at least one")
    composition = cast("dict[str, int]", settings.composition or {})
    if extra := [symbol for symbol in composition if symbol not in allowed]:
        formula = _formula({NUMBER_OF[e]: count for e, count in composition.items()})
        raise ValueError(f"composition={formula!r} contradicts elements/exclude_elements: {extra[0]}")
    return {NUMBER_OF[e]: c for e, c in composition.items()}, frozenset(NUMBER_OF[e] for e in allowed)


def _formula(composition: Mapping[int, int]) -> str:
    return "".join(f"{chemical_symbols[z]}{count if count > 1 else ''}" for z, count in composition.items())


def _sizes(
    settings: GenerationSettings, template: Atoms | None, composition: Mapping[int, int], targets: int | None
) -> tuple[tuple[int, ...] | None, str]:
    """Sizes to choose from, None for any, and what they come from; ``targets`` counts those of a list."""
    chosen = cast("tuple[int, ...] | None", settings.num_atoms)
    source = "num_atoms"
    for name, size in (
        ("template", None if template is None else len(template)),
        ("the list of targets", targets),
        ("composition", sum(composition.values()) or None),
    ):
        if size is None:
            continue
        if size > MAX_ATOMS:
            raise ValueError(f"{name} has {size} atoms: a cell has at most {MAX_ATOMS}, use a smaller one")
        if chosen is None:
            chosen, source = (size,), name
        multiple = name == "composition" and all(s % size == 0 for s in chosen)
        if set(chosen) != {size} and not multiple:
            first = f"num_atoms={sorted(set(chosen))}" if source == "num_atoms" else f"{source} with {chosen[0]} atoms"
            raise ValueError(f"{first} contradicts {name}, which has {size} atoms")
    return chosen, source
