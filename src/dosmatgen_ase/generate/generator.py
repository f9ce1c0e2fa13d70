"""`DOSGenerator`: from a DOS to ``ase.Atoms``.

Reading order: :class:`Request` turns what the user wrote into sizes, targets and constraints, or into one clear error;
:class:`DOSGenerator` draws structures in batches, screens them, draws rejected ones again, and tells in ``atoms.info``
how each was made.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import atomic_numbers as NUMBER_OF
from ase.data import chemical_symbols
from ase.formula import Formula
from tqdm import tqdm

from dosmatgen_ase import __version__
from dosmatgen_ase.crystals.batch import MAX_ATOMIC_NUMBER, MAX_ATOMS, CrystalBatch, check_atoms
from dosmatgen_ase.crystals.reduction import niggli_operation, plane_spacings
from dosmatgen_ase.crystals.screening import MAX_VOLUME_PER_ATOM, digest, right_handed, screen
from dosmatgen_ase.dos import MODEL_GRID, MODEL_SIGMA, TargetDOS
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.generate.constraints import Constraints
from dosmatgen_ase.generate.sampler import Randomness, SamplerConfig, sample
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS, load_model
from dosmatgen_ase.model.conditioning import DOSCondition, Guidance
from dosmatgen_ase.model.denoiser import MAX_IMAGES
from dosmatgen_ase.model.diffusion.lattice import symmetric_exp, symmetric_log
from dosmatgen_ase.threads import cpu_threads

if TYPE_CHECKING:
    from dosmatgen_ase.judge.ranking import Ranking

DOSInput = TargetDOS | Sequence[TargetDOS] | Mapping[int, TargetDOS] | None
MAX_ATTEMPTS = 5  # draws per structure before the generator gives up on it
# The defaults where the targets know less than half of the model's energies; the guidance ends with the species.
WINDOW_GUIDANCE, WINDOW_TEMPERATURE = Guidance(3.0, (SamplerConfig.species_end, 1.0)), 0.35
BATCH_PAIRS = 2048  # a batch of b crystals of N sites has b N^2 at most this: bounds memory


@dataclass(frozen=True)
class Request:
    """What the user asks for, checked: site targets, sizes to choose from, and pins."""

    site_targets: dict[int, TargetDOS]
    total_target: TargetDOS | None
    sizes: tuple[int, ...] | None
    template: Atoms | None
    strength: float
    fixed_species: dict[int, int]
    fixed_sites: frozenset[int]
    fixed_cell: bool
    composition: dict[int, int]
    allowed: frozenset[int]

    @classmethod
    def parse(
        cls,
        dos: DOSInput,
        num_atoms: int | Sequence[int] | None,
        sites: Sequence[int] | None,
        template: Atoms | None,
        strength: float,
        fixed_species: Mapping[int, str | int] | None,
        fixed_sites: Sequence[int] | None,
        fixed_cell: bool,
        composition: str | Mapping[str, int] | None,
        elements: Sequence[str] | None,
        exclude_elements: Sequence[str] | None,
    ) -> Request:
        """Check the arguments of :meth:`DOSGenerator.generate` against each other.

        Raises
        ------
        TypeError, ValueError
            With both culprits named where two arguments contradict each other.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength={strength} must lie between 0 (the template) and 1 (noise)")
        total, targets = _targets(dos, sites)
        pinned = dict(fixed_species or {})
        pins = {i: _element(pinned[i], f"fixed_species[{i}]") for i in _indices(pinned, "fixed_species")}
        held = set(_indices(() if fixed_sites is None else fixed_sites, "fixed_sites"))
        if template is not None:
            check_atoms(template, "template")
            template = right_handed(template)
            for constraint in template.constraints:
                if not isinstance(constraint, FixAtoms):
                    raise ValueError(
                        f"template has a {type(constraint).__name__}: only FixAtoms is understood, remove it"
                    )
                held |= {int(i) if i >= 0 else int(i) + len(template) for i in constraint.get_indices()}
                fixed_cell = True  # FixAtoms holds Cartesian positions, which a changing cell would move
        elif fixed_cell or held:
            name = "fixed_cell" if fixed_cell else "fixed_sites"
            raise ValueError(f"{name} needs a template to take its values from")
        counts = _composition(composition)
        allowed = _allowed(elements, exclude_elements)
        if extra := [chemical_symbols[z] for z in counts if z not in allowed]:
            raise ValueError(f"composition={composition!r} contradicts elements/exclude_elements: {extra[0]}")
        chosen, source = _sizes(num_atoms), "num_atoms"
        whole = isinstance(dos, Sequence)
        for name, size in (
            ("template", len(template) if template is not None else None),
            ("the list of targets", len(targets) if whole else None),
            ("composition", sum(counts.values()) or None),
        ):
            if size is None:
                continue
            if size > MAX_ATOMS:
                raise ValueError(f"{name} has {size} atoms: a cell has at most {MAX_ATOMS}, use a smaller one")
            if chosen is None:
                chosen, source = (size,), name
            multiple = name == "composition" and all(s % size == 0 for s in chosen)
            if set(chosen) != {size} and not multiple:
                first = (
                    f"num_atoms={sorted(set(chosen))}" if source == "num_atoms" else f"{source} with {chosen[0]} atoms"
                )
                raise ValueError(f"{first} contradicts {name}, which has {size} atoms")
        limit, source = (min(chosen), source) if chosen else (MAX_ATOMS, "the limit of this package")
        for name, used in (("dos", set(targets)), ("fixed_species", set(pins)), ("fixed_sites", held)):
            for i in sorted(used):
                if not 0 <= i < limit:
                    raise ValueError(f"{name} names site {i}, but there are {limit} sites by {source}")
        request = cls(
            targets, total, chosen, template, strength if template is not None else 1.0, pins, frozenset(held),
            fixed_cell, counts, allowed,
        )  # fmt: skip
        for i, z in request.pinned_species().items():
            name = f"site {i} is to stay {chemical_symbols[z]}, which"
            if z not in allowed:
                raise ValueError(f"{name} contradicts elements/exclude_elements: allow it, or leave the site free")
            if counts and z not in counts:
                raise ValueError(f"{name} contradicts composition={composition!r}: add it, or leave the site free")
        for size in chosen or ():
            for z, left in request.remaining(size).items():
                if left < 0:
                    used_up = [i for i, other in request.pinned_species().items() if other == z]
                    raise ValueError(
                        f"composition has fewer {chemical_symbols[z]} than sites {used_up}, which are to stay "
                        f"{chemical_symbols[z]} by fixed_species or template: change it, or leave some of them free"
                    )
        return request

    def remaining(self, size: int) -> dict[int, int]:
        """Atoms of each element of the composition that are left for free sites in a cell of ``size`` atoms."""
        if not self.composition:
            return {}
        factor = size // sum(self.composition.values())
        pinned = list(self.pinned_species().values())
        return {z: factor * count - pinned.count(z) for z, count in self.composition.items()}

    def pinned_species(self) -> dict[int, int]:
        """Fixed species, and those of the template on fixed sites (strength 0: on all sites)."""
        if self.template is None:
            return self.fixed_species
        return {**{i: int(self.template.numbers[i]) for i in self.held_sites()}, **self.fixed_species}

    def held_sites(self) -> list[int]:
        """Sites that stay where the template has them."""
        return list(range(len(self.template or ()))) if self.strength == 0 else sorted(self.fixed_sites)

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
        if template is None or self.strength == 0:
            return
        if (spacing := plane_spacings(np.asarray(template.cell)).min()) < shortest:
            raise ValueError(
                f"template is collapsed: its lattice repeats every {spacing:.2f} Angstrom, and the network sees all "
                f"neighbours from {shortest:.2f} on only; use a crystal with atoms farther apart"
            )

    @property
    def max_volume_per_atom(self) -> float:
        """Bound of the screen, A^3; a cell that was asked for is not too sparse."""
        if self.template is None or self.held_cell is None:
            return MAX_VOLUME_PER_ATOM
        return max(MAX_VOLUME_PER_ATOM, 1.01 * self.template.get_volume() / len(self.template))

    def sampling(self, config: SamplerConfig, scale: float | None = None) -> tuple[Guidance, SamplerConfig]:
        """Guidance (by the given scale or the default) and settings: a window leaves elements open, so is sharpened."""
        targets = [*self.site_targets.values(), *([] if self.total_target is None else [self.total_target])]
        known = [float(_on_model_grid(target)[1].float().mean()) for target in targets]
        window = bool(known) and np.mean(known) < 0.5
        guidance = (WINDOW_GUIDANCE if window else Guidance()) if scale is None else Guidance(float(scale))
        if window and guidance.scale != 0:  # scale 0 ignores the target in everything
            config = replace(config, species_temperature=WINDOW_TEMPERATURE)
        return guidance, config

    def condition(self, sizes: Sequence[int]) -> DOSCondition | None:
        """Targets on the model's grid for crystals of these sizes; None if there are none."""
        if not self.site_targets and self.total_target is None:
            return None
        empty = DOSCondition.none(len(sizes), max(sizes), MODEL_GRID.size)
        for i, target in self.site_targets.items():
            empty.site[:, i], empty.site_known[:, i] = _on_model_grid(target)
        if self.total_target is not None:
            empty.total[:], empty.total_known[:] = _on_model_grid(self.total_target)
        return empty

    def constraints(self, sizes: Sequence[int]) -> Constraints:
        """Pins and masks for crystals of these sizes."""
        result = Constraints.none(torch.tensor(sizes))
        if (template := self.reduced_template()) is not None:
            result = replace(result, start=CrystalBatch.from_atoms([template] * len(sizes)))
        result.fixed_coords[:, list(self.fixed_sites)] = True
        for i, z in self.pinned_species().items():
            result.start.atomic_numbers[:, i] = z
            result.fixed_species[:, i] = True
        result.fixed_cell[:] = self.fixed_cell
        forbidden = [z for z in range(MAX_ATOMIC_NUMBER + 1) if z not in self.allowed]
        result.allowed[:, forbidden] = False
        if self.composition:
            for k, size in enumerate(sizes):
                result.remaining[k] = 0
                for z, left in self.remaining(size).items():
                    result.remaining[k, z] = left
        return result

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
            "fixed_cell": self.fixed_cell,
            "composition": {chemical_symbols[z]: count for z, count in self.composition.items()},
            "forbidden_elements": [
                chemical_symbols[z] for z in range(1, MAX_ATOMIC_NUMBER + 1) if z not in self.allowed
            ],
        }


class DOSGenerator:
    """Generate crystals whose sites have a given density of states.

    Parameters
    ----------
    weights : str or path
        "default" for the weights shipped with the package, or a ``.safetensors`` file made by ``dosmatgen train``.
    device : str, optional
        "cpu", "cuda", ...; CUDA where there is one by default.
    threads : int
        CPU threads while the network runs, whatever ``OMP_NUM_THREADS`` says; afterwards the caller's number is back.
        One is best for cells of a few atoms: more threads wait for each other. On idle cores more of them (such as
        ``threads=4``) can shorten large batches, at a higher cost in CPU time.

    Raises
    ------
    FileNotFoundError, ValueError
        If the weights are absent or damaged, the device does not exist, or ``threads`` is below 1.

    Examples
    --------
    >>> from dosmatgen_ase import DOSGenerator, TargetDOS
    >>> dos = TargetDOS.from_peaks([(-0.65, 6.0, 0.3)], window=(-3, 1))
    >>> atoms = DOSGenerator().generate(dos, num_atoms=4, seed=0)
    >>> len(atoms)
    4
    """

    def __init__(self, weights: str | Path = "default", *, device: str | None = None, threads: int = 1) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or threads < 1:
            raise ValueError(f"threads={threads!r} must be a whole number of at least 1")
        self.device, self.threads = select_device(device), int(threads)
        model, self.header = load_model(DEFAULT_WEIGHTS if weights == "default" else weights)
        self.model = model.to(self.device)

    @overload
    def generate(self, dos: DOSInput, n: None = None, **settings: Any) -> Atoms: ...
    @overload
    def generate(self, dos: DOSInput, n: int, **settings: Any) -> list[Atoms]: ...
    def generate(  # type: ignore[misc]  # the overloads do not spell the settings again
        self,
        dos: DOSInput,
        n: int | None = None,
        *,
        num_atoms: int | Sequence[int] | None = None,
        sites: Sequence[int] | None = None,
        template: Atoms | None = None,
        strength: float = 0.6,
        fixed_species: Mapping[int, str | int] | None = None,
        fixed_sites: Sequence[int] | None = None,
        fixed_cell: bool = False,
        composition: str | Mapping[str, int] | None = None,
        elements: Sequence[str] | None = None,
        exclude_elements: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_steps: int = SamplerConfig.num_steps,
        seed: int | None = None,
        progress: bool = False,
        out: str | Path | None = None,
        oversample: int = 1,
        relax: Any = None,
        ranking: Ranking | None = None,
    ) -> Atoms | list[Atoms]:
        """Generate one structure, or a list of ``n``; draw more, relax and rank them if asked.

        Parameters
        ----------
        dos : TargetDOS, sequence of TargetDOS, mapping {site: TargetDOS}, or None
            One site target goes on ``sites``; a total target conditions the cell; a sequence has one target per site;
            None generates without a condition.
        n : int, optional
            Number of structures in all; without it one ``Atoms`` is returned instead of a list.
        num_atoms : int or sequence of int, optional
            Atoms per cell, 1 to 20. A sequence is taken in turn. By default it is drawn from what the model learned
            about the sizes of cells that have such a DOS.
        sites : sequence of int, optional
            Sites that get a single target, by default ``[0]``.
        template : Atoms, optional
            Start from this crystal; sets the number and order of the sites, the choice of lattice vectors and the
            orientation. The network sees its Niggli-reduced cell.
        strength : float
            How far the template is noised: 0 returns it, 1 forgets it; its species stay up to 0.4.
        fixed_species : mapping {site: symbol or atomic number}, optional
        fixed_sites : sequence of int, optional
            Sites of the template that keep their fractional coordinates, and their species unless ``fixed_species``
            says otherwise. ``FixAtoms`` on the template adds its sites and fixes the cell, for it holds Cartesian
            positions.
        fixed_cell : bool
            Keep the template's cell.
        composition : str or mapping, optional
            Formula of the cell, or of a unit that divides ``num_atoms``.
        elements, exclude_elements : sequence of str, optional
            Elements that may, or may not, appear.
        guidance_scale : float, optional
            0 ignores the DOS, 1 is the plain conditional model, larger amplifies; all but 0 and 1 double the cost. By
            default 1; where less than half of [-10, 5] eV is known of the DOS, as with a narrow window, 3 until the
            species are settled. There the species are also drawn at a lower temperature.
        num_steps : int
            Sampler steps from pure noise.
        seed : int, optional
            The same seed and settings give the same structures, whatever ``n``: to the last bit for the same ``n``, to
            about 1e-4 Angstrom for another, because rounding depends on what is computed together.
        progress : bool
            Show a bar.
        out : path, optional
            Append each structure to this extxyz file as it is made, by index, before any ranking; a file of the same
            request is continued, with the seed of that file if none is given. After an interruption the same call
            completes it, on a CPU to the last byte as if there had been none.
        oversample : int
            Draw so many times ``n`` and return the best, by the DOS predicted for them (`ranking`).
        relax : ASE calculator, "chgnet", or the path or name of a MACE model, optional
            Relax what was drawn (`relaxation.relax`), then rank. Every atom and the cell move, so it contradicts
            ``fixed_sites``, ``fixed_cell`` and a template with ``FixAtoms``.
        ranking : Ranking, optional
            What makes a structure good; the predicted distance to the DOS by default. Given, relaxed or oversampled
            structures come best first, a duplicate only where too few others are left, with ``info["scores"]``.

        Returns
        -------
        Atoms or list of Atoms
            ``info["dosmatgen"]`` tells version, weights, seed, index, settings and target, enough to make it again
            (as it was before relaxation).

        Raises
        ------
        TypeError, ValueError
            For arguments that are wrong or contradict each other.
        RejectedError
            A RuntimeError: if a structure is rejected by the screen five times in a row. The others are made first;
            they are in ``error.structures`` and in ``out``. Where more are drawn than wanted (``oversample``) and
            enough are left, a warning tells it instead.
        """
        if isinstance(oversample, bool) or not isinstance(oversample, int | np.integer) or oversample < 1:
            raise ValueError(f"oversample={oversample!r} must be a whole number of at least 1")
        wanted = 1 if n is None else n
        if ranked := oversample > 1 or relax is not None or ranking is not None:
            from dosmatgen_ase.judge.ranking import best, score  # brings CHGNet, which plain generation does without

            if relax is not None:
                check_relaxable(template, fixed_sites, fixed_cell)
            total, targets = _targets(dos, sites)
            score([], targets, total, ranking=ranking, relax=relax)  # what cannot be is told before the work
        made = self.generate_iter(
            dos, wanted * oversample if ranked else wanted, num_atoms=num_atoms, sites=sites, template=template,
            strength=strength, fixed_species=fixed_species, fixed_sites=fixed_sites, fixed_cell=fixed_cell,
            composition=composition, elements=elements, exclude_elements=exclude_elements,
            guidance_scale=guidance_scale, num_steps=num_steps, seed=seed, progress=progress, out=out,
        )  # fmt: skip
        ordered: list[Atoms] = []
        try:
            ordered.extend(made)  # keeps what came before an error
        except RejectedError as error:
            error.structures = ordered
            if not ranked or len(ordered) < wanted:
                raise
            warnings.warn(f"{error}. The {len(ordered)} others are ranked.", stacklevel=2)
        if ranked:
            with cpu_threads(self.threads):
                ordered = best(score(ordered, targets, total, ranking=ranking, relax=relax, progress=progress), wanted)
        return ordered[0] if n is None else ordered

    def generate_iter(
        self,
        dos: DOSInput,
        n: int = 1,
        *,
        num_atoms: int | Sequence[int] | None = None,
        sites: Sequence[int] | None = None,
        template: Atoms | None = None,
        strength: float = 0.6,
        fixed_species: Mapping[int, str | int] | None = None,
        fixed_sites: Sequence[int] | None = None,
        fixed_cell: bool = False,
        composition: str | Mapping[str, int] | None = None,
        elements: Sequence[str] | None = None,
        exclude_elements: Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_steps: int = SamplerConfig.num_steps,
        seed: int | None = None,
        progress: bool = False,
        out: str | Path | None = None,
    ) -> Iterator[Atoms]:
        """Yield structures by index as they are made, batch by batch; parameters and errors as :meth:`generate`."""
        request = Request.parse(
            dos, num_atoms, sites, template, strength, fixed_species, fixed_sites, fixed_cell, composition, elements,
            exclude_elements,
        )  # fmt: skip
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"n={n!r} must be a whole number of at least 1")
        if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or not 1 <= num_steps <= 10000:
            raise ValueError(f"num_steps={num_steps!r} must be a whole number from 1 to 10000")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
            raise ValueError(f"seed={seed!r} must be a whole number of at least 0")
        request.check_template(self.model.denoiser.config.cutoff)
        # A target outside of the model's grid is told by `sampling`, before any file.
        guidance, config = request.sampling(SamplerConfig(num_steps=int(num_steps)), guidance_scale)
        if not (math.isfinite(guidance.scale) and guidance.scale >= 0):
            raise ValueError(f"guidance_scale={guidance_scale} must be a finite number, 0 or larger")
        writer = None if out is None else _Stream(Path(out))
        if seed is None and writer is not None:
            seed = writer.seed()
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        record = {
            "version": __version__,
            "weights": self.header["sha256"],
            "seed": int(seed),
            "guidance_scale": guidance.scale,
            "guidance_interval": list(guidance.interval),
            "num_steps": int(num_steps),
            "num_atoms": None if request.sizes is None else list(request.sizes),
            **request.record(),
        }
        return self._run(request, int(n), config, record, progress, writer)

    def regenerate(self, atoms: Atoms, dos: DOSInput, *, template: Atoms | None = None) -> Atoms:
        """Make a structure again from its own record; the target (and the template) must be given again.

        Raises
        ------
        ValueError
            If ``atoms`` has no record, or target or weights are not those of the record.
        """
        info = atoms.info.get("dosmatgen")
        if info is None:
            raise ValueError("atoms.info has no 'dosmatgen' record: it was not made by DOSGenerator")
        whole = isinstance(dos, Sequence)
        request = Request.parse(
            dos, len(atoms), None if whole or isinstance(dos, Mapping | None) else [int(i) for i in info["targets"]] or
            None, template, 1.0 if info["strength"] is None else info["strength"], {int(i): e for i, e in
            info["fixed_species"].items()}, info["fixed_sites"], info["fixed_cell"], info["composition"] or None, None,
            info["forbidden_elements"],
        )  # fmt: skip
        if self.header["sha256"] != info["weights"] or request.record() != {k: info[k] for k in request.record()}:
            raise ValueError("weights, target or template are not those of the record: give the same ones again")
        _, config = request.sampling(SamplerConfig(num_steps=info["num_steps"]), info["guidance_scale"])
        rng = np.random.default_rng((info["seed"], info["index"], info["attempt"]))
        guidance = Guidance(info["guidance_scale"], tuple(info["guidance_interval"]))
        made, _ = self._draw(request, [len(atoms)], [rng], config, guidance)
        made[0].info["dosmatgen"] = dict(info)
        return made[0]

    def _run(
        self,
        request: Request,
        n: int,
        config: SamplerConfig,
        record: dict[str, Any],
        progress: bool,
        out: _Stream | None,
    ) -> Iterator[Atoms]:
        seed = record["seed"]
        guidance = Guidance(record["guidance_scale"], tuple(record["guidance_interval"]))
        ready = {} if out is None else {a.info["dosmatgen"]["index"]: a for a in out.resume(record)}
        sizes = self._sizes(request, n, seed, guidance)
        done: dict[int, Atoms | None] = {i: a for i, a in ready.items() if i < n}  # None: given up
        reasons: dict[int, str | None] = {}  # of what was given up
        tried: set[int] = set()
        accepted = bool(ready)
        turn = 0
        with tqdm(total=n, initial=len(done), disable=not progress, unit="crystal") as bar:
            for batch in batches(sizes):
                if any(i not in done for i in batch):
                    # The whole batch, even if some of it is there: the others then come out to the last bit as before.
                    made, failed = self._complete(request, batch, sizes[batch[0]], record, config, guidance)
                    reasons |= failed
                    accepted |= bool(made)
                    new: dict[int, Atoms | None] = {i: made.get(i) for i in batch if i not in done}
                    bar.update(sum(atoms is not None for atoms in new.values()))
                    done |= new
                while turn in done:
                    if (atoms := done.pop(turn)) is not None:
                        if out is not None and turn not in ready:
                            out.append(atoms)
                        yield atoms
                    turn += 1
                tried.add(sizes[batch[0]])
                if reasons and not accepted and tried == set(sizes):
                    break  # a hopeless wish ends early
        if reasons:
            which = f"structure {min(reasons)} was" if len(reasons) == 1 else f"{len(reasons)} of {n} structures were"
            told = f"{which} rejected {MAX_ATTEMPTS} times, last because: {reasons[max(reasons)]}"
            raise RejectedError(f"{told}; loosen the constraints or change the seed")

    def _complete(
        self,
        request: Request,
        batch: list[int],
        size: int,
        record: dict[str, Any],
        config: SamplerConfig,
        guidance: Guidance,
    ) -> tuple[dict[int, Atoms], dict[int, str | None]]:
        """Draw a batch until the screen accepts each or gives it up; structures, and why others failed, by index."""
        made: dict[int, Atoms] = {}
        reasons: dict[int, str | None] = {}
        for attempt in range(MAX_ATTEMPTS):
            waiting = [i for i in batch if i not in made]
            if not waiting:
                break
            rngs = [np.random.default_rng((record["seed"], i, attempt)) for i in waiting]
            drawn, calls = self._draw(request, [size] * len(waiting), rngs, config, guidance)
            for i, atoms in zip(waiting, drawn, strict=True):
                result = screen(atoms, max_volume_per_atom=request.max_volume_per_atom)
                reasons[i] = result.reason
                if result.accepted:
                    atoms.info["dosmatgen"] = {**record, "index": i, "attempt": attempt, "network_calls": calls}
                    made[i] = atoms
        return made, {i: reason for i, reason in reasons.items() if i not in made}

    def _draw(
        self,
        request: Request,
        sizes: list[int],
        rngs: list[np.random.Generator],
        config: SamplerConfig,
        guidance: Guidance,
    ) -> tuple[list[Atoms], int]:
        """One batch through the sampler."""
        constraints = request.constraints(sizes)
        randomness = Randomness.draw(constraints.start.num_atoms, rngs).to(self.device)
        condition = request.condition(sizes)
        denoise = guidance.wrap(self.model, condition if condition is None else condition.to(self.device))
        lattice = self.model.denoiser.lattice
        with cpu_threads(self.threads):
            result = sample(
                denoise, lattice, constraints.to(self.device), randomness, config, strength=request.strength
            )
        structures = result.crystals.to_atoms()
        for atoms in structures:
            _orient(atoms, request)
        return structures, result.network_calls

    def _sizes(self, request: Request, n: int, seed: int, guidance: Guidance) -> list[int]:
        """Number of atoms of each structure: in turn from what the user gave, else drawn from the model."""
        if request.sizes is not None:
            return [request.sizes[i % len(request.sizes)] for i in range(n)]
        smallest = 1 + max([0, *request.site_targets, *request.fixed_species])  # that has every site named
        condition = request.condition([smallest])
        if condition is None or guidance.scale == 0:  # scale 0 ignores the target in everything
            condition = DOSCondition.none(1, 1, MODEL_GRID.size)
        with torch.no_grad(), cpu_threads(self.threads):
            logits = self.model.encoder.size_logits(condition.to(self.device))[0].double().cpu()
        logits[:smallest] = -torch.inf
        probability = torch.softmax(logits, 0).numpy()
        return [int(np.random.default_rng((seed, i, 0, 1)).choice(len(probability), p=probability)) for i in range(n)]


def batches(sizes: Sequence[int]) -> list[list[int]]:
    """Which structures are drawn together: indices of one number of atoms, in the order of their first.

    It depends on the sizes alone, not on what is there already: the last digits of a structure depend on its batch, so
    a run that is continued makes the same batches.
    """
    planned: list[list[int]] = []
    latest: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        if size not in latest or len(latest[size]) >= max(1, BATCH_PAIRS // size**2):
            latest[size] = []
            planned.append(latest[size])
        latest[size].append(i)
    return planned


class RejectedError(RuntimeError):
    """The screen rejected some structures in every attempt.

    Attributes
    ----------
    structures : list of Atoms
        The others, by index, where :meth:`DOSGenerator.generate` raised this.
    """

    structures: Sequence[Atoms] = ()


class _Stream:
    """An extxyz file that grows structure by structure and survives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist, create it")
        try:
            with path.open("a"):
                pass
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}; choose another place") from error

    def seed(self) -> int | None:
        """Seed of the structures already there, None if there are none; ``ValueError`` as :meth:`resume`."""
        frames, _, _ = self._read()
        return int(frames[0].info["dosmatgen"]["seed"]) if frames else None

    def resume(self, record: dict[str, Any]) -> list[Atoms]:
        """Structures already there; a frame cut short by a kill is dropped from the file.

        Raises
        ------
        ValueError
            If the file holds structures of another request.
        """
        frames, whole, rest = self._read()
        wanted = json.loads(json.dumps(record))
        if any(atoms.info["dosmatgen"].get(k) != v for atoms in frames for k, v in wanted.items()):
            raise self._another()
        if rest:
            write_atomic(self.path, whole.encode())
        return frames

    def _read(self) -> tuple[list[Atoms], str, str]:
        """Whole frames, their text, and what follows; ``ValueError`` if any of it was not written here."""
        try:
            lines = self.path.read_text().splitlines(keepends=True)
        except UnicodeDecodeError:
            raise self._another() from None
        end = 0
        while end < len(lines) and lines[end].strip().isdecimal():
            after = end + 2 + int(lines[end])
            if after > len(lines) or not lines[after - 1].endswith("\n"):
                break
            end = after
        try:
            frames = ase.io.read(io.StringIO("".join(lines[:end])), index=":", format="extxyz") if end else []
        except (OSError, ValueError):
            raise self._another() from None
        if any("dosmatgen" not in atoms.info for atoms in frames):
            raise self._another()
        rest = lines[end:]
        if rest and not _torn(rest):
            raise self._another()  # it is not ours to drop
        return frames, "".join(lines[:end]), "".join(rest)

    def _another(self) -> ValueError:
        return ValueError(f"{self.path} holds structures of another request: choose another file or delete it")

    def append(self, atoms: Atoms) -> None:
        """Add one structure and flush it."""
        try:
            ase.io.write(self.path, atoms, format="extxyz", append=True)
        except OSError as error:
            fix = "make room, then ask for the same again: what it holds is kept"
            raise OSError(f"cannot go on writing {self.path}: {error.strerror}; {fix}") from error


def _torn(lines: Sequence[str]) -> bool:
    """Whether these are the beginning of a frame of ours, as a kill or a full disk leaves it."""
    count, comment, opening = lines[0].strip(), "".join(lines[1:2]), 'Lattice="'
    if not (count.isdecimal() and len(count) <= 2 and opening.startswith(comment[: len(opening)])):
        return False
    return len(lines) <= 2 or "dosmatgen" in comment


def _targets(dos: DOSInput, sites: Sequence[int] | None) -> tuple[TargetDOS | None, dict[int, TargetDOS]]:
    """Split what the user gave as ``dos`` into a target for the cell's total and targets per site."""
    if sites is not None and not isinstance(dos, TargetDOS):
        raise ValueError("sites goes with one target: with a list or a mapping of targets, leave it out")
    if dos is None:
        return None, {}
    if isinstance(dos, TargetDOS):
        if dos.kind == "total":
            if sites is not None:
                raise ValueError(
                    "sites contradicts a target of kind 'total', which belongs to the cell: drop one of them"
                )
            return dos, {}
        chosen = [0] if sites is None else _indices(sites, "sites")
        if not chosen:
            raise ValueError("sites is empty: name at least one site, or leave it out for site 0")
        return None, dict.fromkeys(chosen, dos)
    pairs = list(dos.items() if isinstance(dos, Mapping) else enumerate(dos if isinstance(dos, Sequence) else ()))
    if not pairs or not all(isinstance(t, TargetDOS) for _, t in pairs):
        raise TypeError(
            "dos must be a TargetDOS, a list of them, a mapping {site: TargetDOS}, or None: see TargetDOS.from_*"
        )
    if any(t.kind == "total" for _, t in pairs):
        raise ValueError("a target of kind 'total' belongs to the cell: give it alone, not in a list or mapping")
    return None, dict(zip(_indices([i for i, _ in pairs], "dos"), (t for _, t in pairs), strict=True))


@lru_cache(maxsize=64)
def _on_model_grid(target: TargetDOS) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and known mask, shape (G,), on the model's grid."""
    resampled = target.on_grid(MODEL_GRID, MODEL_SIGMA)
    return torch.tensor(resampled.values * resampled.known, dtype=torch.float32), torch.tensor(resampled.known)


def _indices(values: Iterable[Any], name: str) -> list[int]:
    try:
        chosen = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of sites such as [0], not {values!r}") from None
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in chosen):
        raise TypeError(f"{name} must name sites by whole numbers, counted from 0, not {chosen!r}")
    return [int(i) for i in chosen]


def _element(value: str | int, name: str) -> int:
    z = NUMBER_OF.get(value, 0) if isinstance(value, str) else value
    if not isinstance(z, int | np.integer) or not 1 <= z <= MAX_ATOMIC_NUMBER:
        raise ValueError(f"{name}={value!r} is not an element from H to Pu: use a symbol such as 'Co'")
    return int(z)


def _composition(composition: str | Mapping[str, int] | None) -> dict[int, int]:
    if composition is None:
        return {}
    try:
        counts = Formula(composition).count() if isinstance(composition, str) else dict(composition)
    except ValueError as error:
        raise ValueError(f"composition={composition!r} is not a formula: write it as 'NiAu3'") from error
    if not counts or not all(isinstance(c, int | np.integer) and c > 0 for c in counts.values()):
        raise ValueError(f"composition={composition!r} must count at least one atom of each element it names")
    return {_element(e, "composition"): int(c) for e, c in counts.items()}


def _allowed(elements: Sequence[str] | None, exclude: Sequence[str] | None) -> frozenset[int]:
    for name, value in (("elements", elements), ("exclude_elements", exclude)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a list such as ['{value}'], not a string")
    chosen = range(1, MAX_ATOMIC_NUMBER + 1) if elements is None else [_element(e, "elements") for e in elements]
    allowed = frozenset(chosen) - {_element(e, "exclude_elements") for e in exclude or ()}
    if not allowed:
        raise ValueError("elements and exclude_elements together leave no element: allow at least one")
    return allowed


def _sizes(num_atoms: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if num_atoms is None:
        return None
    sizes = tuple(num_atoms) if isinstance(num_atoms, Iterable) else (num_atoms,)
    if not sizes or not all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in sizes):
        raise ValueError(f"num_atoms={num_atoms!r} must be a whole number or a list of them")
    if not all(1 <= s <= MAX_ATOMS for s in sizes):
        raise ValueError(f"num_atoms={num_atoms!r} must lie between 1 and {MAX_ATOMS}")
    return tuple(int(s) for s in sizes)


def select_device(name: str | None) -> torch.device:
    """Return the device of that name, or CUDA where there is one and else the CPU.

    Raises
    ------
    ValueError
        If nothing can be computed on it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: leave device out, or use 'cpu'") from error
    return device


def check_relaxable(template: Atoms | None, fixed_sites: Sequence[int] | None, fixed_cell: bool) -> None:
    """Raise ``ValueError`` where a relaxation would move what was asked to stay; arguments are those of `generate`."""
    held = {
        "fixed_cell": fixed_cell,
        "fixed_sites": fixed_sites is not None and bool(_indices(fixed_sites, "fixed_sites")),
        "FixAtoms on the template": isinstance(template, Atoms) and bool(template.constraints),
    }
    if names := " and ".join(name for name, given in held.items() if given):
        raise ValueError(f"relax moves every atom and the cell, which contradicts {names}: leave one of them out")


def _orient(atoms: Atoms, request: Request) -> None:
    """Turn the canonical cell: into the template's basis and orientation, else into the standard form (a along x)."""
    if request.template is None:
        atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
        return
    operation = request.to_reduced
    if (operation != np.eye(3)).any():
        atoms.set_cell(np.rint(np.linalg.inv(operation)) @ np.asarray(atoms.cell))
        atoms.set_scaled_positions(atoms.get_scaled_positions(wrap=True))
    if request.held_cell is not None:
        atoms.set_cell(request.held_cell, scale_atoms=True)
        # Held sites have their positions to the last digit, not by way of float32.
        atoms.positions[request.held_sites()] = request.template.positions[request.held_sites()]
        return
    reduced = torch.tensor(operation @ np.asarray(request.template.cell))[None]
    rotation = symmetric_exp(-symmetric_log(reduced)) @ reduced
    atoms.set_cell(np.asarray(atoms.cell) @ rotation[0].numpy(), scale_atoms=True)
