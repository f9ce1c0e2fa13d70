"""What the jobs leave in the database: pydantic documents.

Fields are pymatgen structures, targets, numbers, text and lists of them. What is not known is None, never NaN, which a
database would store without a word. ``reason`` is None for what went well and one line for what did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, InstanceOf, PlainSerializer, WithJsonSchema
from pymatgen.core import Structure

from dosmatgen_ase import __version__
from dosmatgen_ase.dos import TargetDOS
from dosmatgen_ase.dos.readers.common import READ_ERRORS
from dosmatgen_ase.files import finite


def _target(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    try:
        return TargetDOS.from_dict(value)
    except READ_ERRORS as error:
        raise ValueError(f"not the dict of a TargetDOS: {error}") from None


def _crystal(value: Any) -> Any:
    """Read a crystal by hand: pydantic would leave its dict to monty, which imports whatever ``@module`` names."""
    if not isinstance(value, Mapping):
        return value
    try:
        return Structure.from_dict(_without_classes(value))
    except READ_ERRORS as error:
        raise ValueError(f"not the dict of a pymatgen Structure: {type(error).__name__} {error}") from None


def _without_classes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_classes(v) for k, v in value.items() if k not in ("@module", "@class", "@callable")}
    return [_without_classes(item) for item in value] if isinstance(value, list) else value


DOS = Annotated[
    InstanceOf[TargetDOS],
    BeforeValidator(_target),
    PlainSerializer(TargetDOS.as_dict),
    WithJsonSchema({"type": "object", "description": "TargetDOS.to_dict"}),
]
Crystal = Annotated[Structure, BeforeValidator(_crystal), PlainSerializer(Structure.as_dict)]
Figure = Annotated[float | None, BeforeValidator(finite)]
Targets = dict[str, DOS]
"""Targets by site, counted from "0" (JSON has text for keys), or one under "total"."""

FORWARD_MODEL = "forward model"
"""The engine of `PredictDOSMaker`, which computes nothing."""

LARGE = ["targets", "site_dos", "total_dos", "achieved", "electronic_structure"]
"""Fields that hold arrays; jobs keep them in the job store's additional store "data"."""


class GenerationDoc(BaseModel):
    """Structures as the generator made them; `settings` and `targets` are enough to make them again."""

    structures: list[Crystal]
    records: list[dict[str, Any]] = Field(description="Weights, seed, index, ...: how each was made")
    targets: Targets
    settings: dict[str, Any] = Field(description="Fields of the GenerateMaker")
    reason: str | None = Field(default=None, description="Why there are fewer structures than asked for")
    version: str = __version__


class CandidateDoc(BaseModel):
    """One structure on its way: generated, screened, relaxed, computed, compared."""

    index: int = Field(description="Place in the generation")
    formula: str
    generated: Crystal
    record: dict[str, Any] = Field(description="How the generator made it")
    known_as: str | None = Field(default=None, description="The known crystal that it is, if it is one")
    predicted_distance: Figure = Field(default=None, description="Of the DOS predicted for it as generated")
    structure: Crystal | None = Field(default=None, description="As computed: relaxed, if it was, its symmetry exact")
    held: dict[str, Any] = Field(default={}, description="What the relaxation was to hold: fixed_cell, fixed_sites")
    energy_per_atom: Figure = Field(default=None, description="eV/atom, of the calculator that relaxed")
    energy_above_hull: Figure = Field(default=None, description="eV/atom; known where CHGNet relaxed")
    relaxation: str | None = Field(default=None, description="How the relaxation ended, in words")
    achieved: Targets = Field(default={}, description="The computed DOS of what had a target")
    distance: Figure = Field(default=None, description="Normalised L1 to the targets, mean over sites")
    near_gap_distance: Figure = Field(default=None, description="The same on [-2, 2] eV")
    mae: Figure = Field(default=None, description="Mean absolute difference, states/eV")
    band_gap: Figure = Field(default=None, description="eV; 0 for a metal")
    engine: str | None = Field(default=None, description="What computed the DOS")
    directory: str | None = Field(default=None, description="Where its files are")
    reason: str | None = Field(default=None, description="Why it was rejected, or what failed")


class ScreeningDoc(BaseModel):
    """All candidates: those without a reason go on."""

    candidates: list[CandidateDoc]
    targets: Targets
    generation: dict[str, Any] = Field(description="Settings, version and shortfall of the generation")

    @property
    def survivors(self) -> list[CandidateDoc]:
        """Candidates that go on."""
        return [candidate for candidate in self.candidates if candidate.reason is None]


class RelaxDoc(BaseModel):
    """A relaxed structure; None where the relaxation broke down."""

    structure: Crystal | None
    energy: Figure = Field(default=None, description="eV/atom")
    energy_start: Figure = Field(default=None, description="eV/atom before")
    energy_above_hull: Figure = Field(default=None, description="eV/atom; known where CHGNet relaxed")
    converged: bool | None = Field(default=None, description="None where the engine does not tell")
    steps: int | None = None
    rmsd: Figure = Field(default=None, description="How far the atoms moved within the cell, Angstrom")
    reason: str | None = None


class DOSDoc(BaseModel):
    """The DOS of a structure, site by site."""

    engine: str
    structure: Crystal | None = Field(default=None, description="What was computed, where it is not what was given")
    site_dos: list[DOS | None] = Field(default=[], description="None where the engine does not know it")
    total_dos: DOS | None = None
    electronic_structure: dict[str, Any] | None = Field(default=None, description="ElectronicStructure.to_dict()")
    band_gap: Figure = Field(default=None, description="eV")
    fermi_level: Figure = Field(default=None, description="eV, the engine's zero")
    energy: Figure = Field(default=None, description="eV per cell, of the engine")
    settings: dict[str, Any] = {}
    directory: str | None = None
    reason: str | None = None


class InverseDesignDoc(BaseModel):
    """The result of a run: candidates, best match first, then those that fell out, each with its reason."""

    kind: Literal["dosmatgen inverse design"] = "dosmatgen inverse design"
    targets: Targets
    candidates: list[CandidateDoc]
    generation: dict[str, Any]
    version: str = __version__


class TrainDoc(BaseModel):
    """A trained generator."""

    weights: str = Field(description="Path of the weights file")
    sha256: str
    structures: int
    labelled: int = Field(description="Of these, with a computed DOS")
    config: dict[str, Any]
