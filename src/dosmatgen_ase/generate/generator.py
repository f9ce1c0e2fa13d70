"""`DOSGenerator`: from a DOS to ``ase.Atoms``.

Reading order: `settings.GenerationSettings` is what the user may write; `request.Request` makes sizes, targets and
constraints of it, or one clear error; `DOSGenerator` draws structures in batches, screens them, draws rejected ones
again, and tells in ``atoms.info`` how each was made; `stream.Stream` keeps them in a file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from tqdm import tqdm

from dosmatgen_ase import __version__
from dosmatgen_ase.crystals.screening import screen
from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.files import exclusive
from dosmatgen_ase.generate.request import Request, completed, settings_of
from dosmatgen_ase.generate.sampler import Randomness, SamplerConfig, sample
from dosmatgen_ase.generate.settings import GenerationOptions, GenerationSettings, spelled
from dosmatgen_ase.generate.stream import Stream
from dosmatgen_ase.model.checkpoint import DEFAULT_WEIGHTS, load_model
from dosmatgen_ase.model.conditioning import DOSCondition, Guidance
from dosmatgen_ase.model.diffusion.lattice import symmetric_exp, symmetric_log
from dosmatgen_ase.parsing import DOSInput, whole_number
from dosmatgen_ase.threads import cpu_threads

if TYPE_CHECKING:
    from dosmatgen_ase.judge.ranking import Ranking

MAX_ATTEMPTS = 5  # draws per structure before the generator gives up on it
BATCH_PAIRS = 2048  # a batch of b crystals of N sites has b N^2 at most this: bounds memory


class _Keywords(GenerationOptions, total=False):
    """The keywords of `DOSGenerator.generate`, for editors and type checkers: ``n`` alone tells what it returns."""

    settings: GenerationSettings | None
    oversample: int
    relax: Any
    trust_model: bool
    ranking: Ranking | None
    progress: bool
    out: str | Path | None
    overwrite: bool


@dataclass(frozen=True)
class _Plan:
    """A checked request with everything that its draws need beside the network."""

    request: Request
    config: SamplerConfig
    guidance: Guidance
    record: dict[str, Any]
    """What ``atoms.info`` tells of every structure."""


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
        self.device, self.threads = select_device(device), whole_number(threads, "threads", 1)
        model, self.header = load_model(DEFAULT_WEIGHTS if weights == "default" else weights)
        self.model = model.to(self.device)

    @overload
    def generate(self, dos: DOSInput, n: None = None, **options: Unpack[_Keywords]) -> Atoms: ...
    @overload
    def generate(self, dos: DOSInput, n: int, **options: Unpack[_Keywords]) -> list[Atoms]: ...
    @spelled
    def generate(
        self,
        dos: DOSInput,
        n: int | None = None,
        *,
        settings: GenerationSettings | None = None,
        oversample: int = 1,
        relax: Any = None,
        trust_model: bool = False,
        ranking: Ranking | None = None,
        progress: bool = False,
        out: str | Path | None = None,
        overwrite: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Atoms | list[Atoms]:
        """Generate one structure, or a list of ``n``; draw more, relax and rank them if asked.

        Parameters
        ----------
        dos : TargetDOS, sequence of TargetDOS, mapping {site: TargetDOS}, or None
            One site target goes on ``sites``; a total target conditions the cell; a sequence has one target per site;
            None generates without a condition.
        n : int, optional
            Number of structures in all; without it one ``Atoms`` is returned instead of a list.
        settings : GenerationSettings, optional
            What to generate, and how.
        oversample : int
            Draw so many times ``n`` and return the best, by the DOS predicted for them (`ranking`).
        relax : ASE calculator, "chgnet", or the path or name of a MACE model, optional
            Relax what was drawn (`relaxation.relax`), then rank. Of many draws, the best are relaxed, four for each
            that is wanted, and ranked again. What is fixed stays; fixed sites hold the cell, too.
        trust_model : bool
            Load the file of a MACE model for `relax`. It is a pickle, which may run any code: trust its maker.
        ranking : Ranking, optional
            What makes a structure good; the predicted distance to the DOS by default. Given, relaxed or oversampled
            structures come best first, a duplicate only where too few others are left, with ``info["scores"]``.
        progress : bool
            Show a bar.
        out : path, optional
            Keep each structure in this file, by index, before any ranking. An extxyz file (.extxyz, .xyz) grows as
            they are made. A file of the same request is continued, with the seed of that file if none is given: after
            an interruption the same call completes it, on a CPU to the last byte as if there had been none. Other
            formats (.cif, .vasp or POSCAR, .traj, .db, .json) are written at the end, from the extxyz file beside it.
        overwrite : bool
            Replace a file that holds something else, instead of an error. What can be continued is.
        **options
            Fields of `GenerationSettings`: ``num_atoms``, ``sites``, ``template``, ``strength``, ``fixed_species``,
            ``composition``, ``elements``, ``seed`` and the others. They replace those of ``settings``.

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
        chosen = _chosen(settings, options)
        oversample, wanted = whole_number(oversample, "oversample", 1), 1 if n is None else n
        request = Request.of(dos, chosen)
        if ranked := oversample > 1 or relax is not None or ranking is not None:
            # They bring CHGNet, which plain generation does without.
            from dosmatgen_ase.judge.ranking import best, score, score_and_relax
            from dosmatgen_ase.judge.relaxation import relax as relax_atoms

            targets, total = request.site_targets, request.total_target
            # Errors come before the work.
            score([], targets, total, ranking=ranking, relax=relax, trust_model=trust_model)
        made = self._start(request, wanted * oversample if ranked else wanted, progress, out, overwrite)
        ordered: list[Atoms] = []
        try:
            ordered.extend(made)  # keeps what came before an error
        except RejectedError as error:
            error.structures = ordered
            if not ranked or len(ordered) < wanted:
                raise
            warnings.warn(f"{error}. The {len(ordered)} others are ranked.", stacklevel=2)
        if ranked:
            work = partial(relax_atoms, calculator=relax, progress=progress, trust_model=trust_model, **request.held)
            how: dict[str, Any] = {"ranking": ranking, "progress": progress, "relaxed": None if relax is None else work}
            with cpu_threads(self.threads):
                new = score_and_relax(
                    ordered, wanted, targets, total, accepts=lambda atoms: not_new(request, atoms) is None, **how
                )  # some relax into known ones
            if len(new) < min(wanted, len(ordered)):
                told = f"only {len(new)} of {len(ordered)} structures are new after relaxation"
                failure = RejectedError(f"{told}; raise oversample, or allow known crystals")
                failure.structures = new
                raise failure
            ordered = best(new, wanted)
        return ordered[0] if n is None else ordered

    @spelled
    def generate_iter(
        self,
        dos: DOSInput,
        n: int = 1,
        *,
        settings: GenerationSettings | None = None,
        progress: bool = False,
        out: str | Path | None = None,
        overwrite: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Atoms]:
        """Yield structures by index as they are made, batch by batch; parameters and errors as :meth:`generate`."""
        return self._start(Request.of(dos, _chosen(settings, options)), n, progress, out, overwrite)

    def _start(
        self, request: Request, n: int, progress: bool, out: str | Path | None, overwrite: bool
    ) -> Iterator[Atoms]:
        """Check what is left to check, and settle the record; then draw one by one."""
        n, settings = whole_number(n, "n", 1), request.settings
        stream = None if out is None else Stream(Path(out), n, overwrite)
        request.check_template(self.model.denoiser.config.cutoff)
        guidance, config = request.sampling(SamplerConfig(num_steps=settings.num_steps), settings.guidance_scale)
        request.warn_of_doubts()
        seed = settings.seed
        if seed is None and stream is not None:
            seed = stream.seed()
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        record = {
            "version": __version__,
            "weights": self.header["sha256"],
            "seed": seed,
            "guidance_scale": guidance.scale,
            "guidance_interval": list(guidance.interval),
            "num_steps": settings.num_steps,
            "num_atoms": None if request.sizes is None else list(request.sizes),
            **request.record(),
        }
        return self._run_alone(_Plan(request, config, guidance, record), n, progress, stream)

    def regenerate(self, atoms: Atoms, dos: DOSInput, *, template: Atoms | None = None) -> Atoms:
        """Make a structure again from its own record; the target (and the template) must be given again.

        Raises
        ------
        ValueError
            If ``atoms`` has no record, or target or weights are not those of the record.
        """
        if "dosmatgen" not in atoms.info:
            raise ValueError("atoms.info has no 'dosmatgen' record: it was not made by DOSGenerator")
        info = completed(atoms.info["dosmatgen"])
        request = Request.of(dos, settings_of(info, len(atoms), dos, template))
        if self.header["sha256"] != info["weights"] or request.record() != {k: info[k] for k in request.record()}:
            raise ValueError("weights, target or template are not those of the record: give the same ones again")
        _, config = request.sampling(SamplerConfig(num_steps=info["num_steps"]), info["guidance_scale"])
        rng = np.random.default_rng((info["seed"], info["index"], info["attempt"]))
        guidance = Guidance(info["guidance_scale"], tuple(info["guidance_interval"]))
        made, _ = self._draw(request, [len(atoms)], [rng], config, guidance)
        made[0].info["dosmatgen"] = dict(atoms.info["dosmatgen"])
        return made[0]

    def _run_alone(self, plan: _Plan, n: int, progress: bool, stream: Stream | None) -> Iterator[Atoms]:
        """As `_run`, while no other run writes the same file."""
        with contextlib.nullcontext() if stream is None else exclusive(stream.path):
            yield from self._run(plan, n, progress, stream)

    def _run(self, plan: _Plan, n: int, progress: bool, stream: Stream | None) -> Iterator[Atoms]:
        ready = {} if stream is None else {a.info["dosmatgen"]["index"]: a for a in stream.resume(plan.record)}
        sizes = self._sizes(plan, n)
        done: dict[int, Atoms | None] = {i: a for i, a in ready.items() if i < n}  # None: given up
        reasons: dict[int, str | None] = {}  # of what was given up
        tried: set[int] = set()
        accepted = bool(ready)
        turn = 0
        with tqdm(total=n, initial=len(done), disable=not progress, unit="crystal") as bar:
            for batch in batches(sizes):
                if missing := [i for i in batch if i >= turn and i not in done]:  # what came before its turn is gone
                    # The whole batch, even if some of it is there: the others then come out to the last bit as before.
                    made, failed = self._complete(plan, batch, sizes[batch[0]])
                    reasons |= failed
                    accepted |= bool(made)
                    done |= {i: made.get(i) for i in missing}
                    bar.update(len(made.keys() & set(missing)))
                while turn in done:
                    if (atoms := done.pop(turn)) is not None:
                        if stream is not None and turn not in ready:
                            stream.append(atoms)
                        if stream is not None and turn == n - 1:
                            stream.finish()  # now: who takes just n of them, as zip does, never comes back
                        yield atoms
                    turn += 1
                tried.add(sizes[batch[0]])
                if reasons and not accepted and tried == set(sizes):
                    break  # a hopeless wish ends early
        if stream is not None and (turn < n or n - 1 in reasons):  # the last was given up
            stream.finish()
        if reasons:
            which = f"structure {min(reasons)} was" if len(reasons) == 1 else f"{len(reasons)} of {n} structures were"
            told = f"{which} rejected {MAX_ATTEMPTS} times, last because: {reasons[max(reasons)]}"
            raise RejectedError(f"{told}; loosen the constraints or change the seed")

    def _complete(self, plan: _Plan, batch: list[int], size: int) -> tuple[dict[int, Atoms], dict[int, str | None]]:
        """Draw a batch until the screen accepts each or gives it up; structures, and why others failed, by index."""
        made: dict[int, Atoms] = {}
        reasons: dict[int, str | None] = {}
        for attempt in range(MAX_ATTEMPTS):
            waiting = [i for i in batch if i not in made]
            if not waiting:
                break
            rngs = [np.random.default_rng((plan.record["seed"], i, attempt)) for i in waiting]
            drawn, calls = self._draw(plan.request, [size] * len(waiting), rngs, plan.config, plan.guidance)
            for i, atoms in zip(waiting, drawn, strict=True):
                result = screen(atoms, max_volume_per_atom=plan.request.max_volume_per_atom)
                reasons[i] = result.reason or not_new(plan.request, atoms)
                if reasons[i] is None:
                    atoms.info["dosmatgen"] = {**plan.record, "index": i, "attempt": attempt, "network_calls": calls}
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
                denoise, lattice, constraints.to(self.device), randomness, config, strength=request.start_level
            )
        structures = result.crystals.to_atoms()
        for atoms in structures:
            _orient(atoms, request)
            if request.fixed_cell and request.fixed_sites:  # for whoever relaxes it later
                atoms.set_constraint(FixAtoms(sorted(request.fixed_sites)))
        return structures, result.network_calls

    def _sizes(self, plan: _Plan, n: int) -> list[int]:
        """Number of atoms of each structure: in turn from what the user gave, else drawn from the model."""
        request = plan.request
        if request.sizes is not None:
            return [request.sizes[i % len(request.sizes)] for i in range(n)]
        smallest = 1 + max([0, *request.site_targets, *request.fixed_species])  # that has every site named
        condition = request.condition([smallest])
        if condition is None or plan.guidance.scale == 0:  # scale 0 ignores the target in everything
            condition = DOSCondition.none(1, 1, MODEL_GRID.size)
        with torch.no_grad(), cpu_threads(self.threads):
            logits = self.model.encoder.size_logits(condition.to(self.device))[0].double().cpu()
        logits[:smallest] = -torch.inf
        probability = torch.softmax(logits, 0).numpy()
        rngs = (np.random.default_rng((plan.record["seed"], i, 0, 1)) for i in range(n))
        return [int(rng.choice(len(probability), p=probability)) for rng in rngs]


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


def not_new(request: Request, atoms: Atoms) -> str | None:
    """Why a structure is rejected if only new ones are wanted; None if it is accepted."""
    if not request.settings.new_only:
        return None
    from dosmatgen_ase.retrieval.index import default_index

    twin = default_index().find(atoms)
    return None if twin is None else f"not new: the same crystal as {twin}"


class RejectedError(RuntimeError):
    """The screen rejected some structures in every attempt.

    Attributes
    ----------
    structures : list of Atoms
        The others, by index, where :meth:`DOSGenerator.generate` raised this.
    """

    structures: Sequence[Atoms] = ()


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


def _chosen(settings: GenerationSettings | None, options: GenerationOptions) -> GenerationSettings:
    if settings is not None and not isinstance(settings, GenerationSettings):
        raise TypeError(f"settings must be a GenerationSettings, not {type(settings).__name__}")
    return (settings or GenerationSettings()).replace(**options)


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
