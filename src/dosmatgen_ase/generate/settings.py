"""`GenerationSettings`: what crystals are to be made, and how. The one place where a setting has its default, its words
and its check; ``DOSGenerator.generate``, the Makers and the command line take theirs from here. Needs no torch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack

from dosmatgen_ase import parsing
from dosmatgen_ase.crystals.checks import check_atoms
from dosmatgen_ase.parsing import ElementLike

if TYPE_CHECKING:
    from ase import Atoms

MAX_STEPS = 10_000
DEFAULT_COUNT = 8  # crystals that the command line and the Makers make if not told
_Function = TypeVar("_Function", bound=Callable[..., Any])


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationSettings` as keywords, for editors and type checkers; a test keeps the two the same."""

    num_atoms: int | Iterable[int] | None
    sites: Iterable[int] | None
    template: Atoms | None
    strength: float
    fixed_species: Mapping[int, ElementLike] | None
    fixed_sites: Iterable[int] | None
    free_species: Iterable[int] | None
    fixed_cell: bool
    composition: str | Mapping[Any, float] | None
    elements: Iterable[ElementLike] | None
    exclude_elements: Iterable[ElementLike] | None
    guidance_scale: float | None
    num_steps: int
    seed: int | None
    new_only: bool


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Which crystals are made, and how; checked as far as possible without the target.

    Lists may be whatever counts as one (array, range, set), elements symbols, atomic numbers, or Element and Species
    of pymatgen. Fields hold tuples of Python integers, symbols, and ``{site: symbol}``.

    Attributes
    ----------
    num_atoms : int or several, optional
        Atoms per cell, 1 to 20; several are taken in turn. By default the model draws what such a DOS has.
    sites : several int, optional
        Sites of the new crystal that have the DOS. By default site 0.
    template : Atoms, optional
        Start from this crystal instead of noise. It gives the number and the order of the sites, the
        choice of lattice vectors, and the orientation. The network sees its Niggli-reduced cell.
    strength : float
        How far the template is noised: 0 returns it, 1 forgets it. Its elements stay up to 0.4. A left-handed cell
        comes back right-handed: its vectors negated, the same crystal.
    fixed_species : mapping {site: element}, optional
        Elements of single sites.
    fixed_sites : several int, optional
        Sites of the template that keep their position in the cell and their element. FixAtoms on the template adds its
        sites and fixes the cell.
    free_species : several int, optional
        Sites of the template whose element is drawn anew, even if `fixed_sites` or strength 0 hold the position. The
        model then tells which dopant fits there.
    fixed_cell : bool
        Keep the cell of the template; a left-handed one is negated, as with `strength`.
    composition : str or mapping, optional
        Formula of the cell, or of a unit that divides it.
    elements : several elements, optional
        Only these elements may appear.
    exclude_elements : several elements, optional
        These elements may not appear.
    guidance_scale : float, optional
        0 ignores the DOS, 1 is the plain conditional model, more amplifies it. Values other than 0 and 1 double the
        cost. By default 1. If less than half of the energies are known, it is 3 until the elements are settled.
    num_steps : int
        Steps of the sampler from pure noise.
    seed : int, optional
        The same seed and settings give the same crystals, for any number of them. By default every run differs, and
        tells its seed.
    new_only : bool
        Reject known crystals of the index that ships, before and after relaxation, and draw others.

    Raises
    ------
    TypeError, ValueError
        For a value that is wrong, or two that contradict each other.

    Examples
    --------
    >>> settings = GenerationSettings(num_atoms=range(4, 6), elements=["Ni", 79])
    >>> settings.num_atoms, settings.elements
    ((4, 5), ('Ni', 'Au'))
    >>> GenerationSettings.from_dict(settings.to_dict()) == settings
    True
    """

    num_atoms: int | Iterable[int] | None = None
    sites: Iterable[int] | None = None
    template: Atoms | None = None
    strength: float = 0.6
    fixed_species: Mapping[int, ElementLike] | None = None
    fixed_sites: Iterable[int] | None = None
    free_species: Iterable[int] | None = None
    fixed_cell: bool = False
    composition: str | Mapping[Any, float] | None = None
    elements: Iterable[ElementLike] | None = None
    exclude_elements: Iterable[ElementLike] | None = None
    guidance_scale: float | None = None
    num_steps: int = 10
    seed: int | None = None
    new_only: bool = False

    def __post_init__(self) -> None:
        if not parsing.is_real(self.strength) or not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength!r} must lie between 0 (the template) and 1 (noise)")
        scale = self.guidance_scale
        if scale is not None and not (parsing.is_real(scale) and math.isfinite(scale) and scale >= 0):
            raise ValueError(f"guidance_scale={scale!r} must be a finite number, 0 or larger")
        for name in ("fixed_cell", "new_only"):
            if getattr(self, name) not in (True, False):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        free = () if self.free_species is None else self.free_species
        values = {
            "sites": None if self.sites is None else parsing.site_numbers(self.sites, "sites"),
            "fixed_sites": parsing.site_numbers(() if self.fixed_sites is None else self.fixed_sites, "fixed_sites"),
            "free_species": parsing.site_numbers(free, "free_species"),
            "num_atoms": parsing.cell_sizes(self.num_atoms),
            "template": _bare(self.template),
            "strength": float(self.strength),
            "fixed_species": parsing.site_elements(self.fixed_species or {}),
            "fixed_cell": bool(self.fixed_cell),
            "new_only": bool(self.new_only),
            "composition": parsing.formula_counts(self.composition),
            "elements": parsing.element_list(self.elements, "elements"),
            "exclude_elements": parsing.element_list(self.exclude_elements, "exclude_elements"),
            "guidance_scale": None if scale is None else float(scale),
            "num_steps": parsing.whole_number(self.num_steps, "num_steps", 1, MAX_STEPS),
            "seed": None if self.seed is None else parsing.whole_number(self.seed, "seed", 0),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if both := sorted({*(self.free_species or ())} & {*(self.fixed_species or {})}):
            raise ValueError(f"free_species and fixed_species both name site {both[0]}: leave it out of one of them")

    def replace(self, **changes: Unpack[GenerationOptions]) -> Self:
        """Return a copy with some fields changed.

        Raises
        ------
        TypeError
            For a name that is no field, with the nearest that is one; else as the class.
        """
        own = vars(self)
        for name in changes:
            if name not in own:
                near = difflib.get_close_matches(name, own, 1)
                raise TypeError(
                    f"there is no setting {name!r}: {f'did you mean {near[0]}?' if near else ', '.join(own)}"
                )
        return type(self)(**{**own, **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict; `from_dict` is its inverse."""
        values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        values["fixed_species"] = {str(i): symbol for i, symbol in values["fixed_species"].items()}
        if self.template is not None:
            from ase.io.jsonio import encode

            values["template"] = json.loads(encode(self.template))
        return values

    def as_dict(self) -> dict[str, Any]:
        """`to_dict` in the form by which monty finds the class again: so jobflow carries it between machines."""
        return {"@module": type(self).__module__, "@class": type(self).__name__, **self.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; fields that are not there have their defaults. Raises as the class and `replace`."""
        if not isinstance(data, Mapping):
            raise TypeError(f"settings are read from a mapping, as to_dict() gives it, not from {data!r}")
        values: Any = {name: value for name, value in data.items() if not name.startswith("@")}
        pins = values.get("fixed_species") or {}
        if not isinstance(pins, Mapping):
            raise TypeError(f"fixed_species must name the element of each site, such as {{'0': 'Co'}}, not {pins!r}")
        values["fixed_species"] = {int(i): symbol for i, symbol in pins.items()}
        if isinstance(values.get("template"), Mapping):
            from ase.io.jsonio import decode

            from dosmatgen_ase.files import DAMAGE

            try:
                values["template"] = decode(json.dumps(values["template"]))
            except DAMAGE as error:
                raise ValueError(f"template is not ASE's JSON of a structure: {type(error).__name__} {error}") from None
        return cls().replace(**values)


def described() -> dict[str, str]:
    """What each field of `GenerationSettings` means, from its docstring; the command line shows the same."""
    text = inspect.cleandoc(GenerationSettings.__doc__ or "")
    entries = re.findall(r"^(\w+) : .*\n((?: .*\n)+)", text.partition("Attributes\n")[2], re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def spelled(function: _Function) -> _Function:
    """Show the fields of `GenerationSettings` in the signature of a function that takes them as ``**options``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.signature(GenerationSettings).parameters.values()
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


def _bare(template: Any) -> Atoms | None:
    """Return what generation reads of a template: cell, positions, elements, constraints that hold something."""
    if template is None:
        return None
    check_atoms(template, "template")
    from ase import Atoms
    from ase.constraints import FixAtoms

    for constraint in template.constraints:
        if not isinstance(constraint, FixAtoms):
            raise ValueError(f"template has a {type(constraint).__name__}: only FixAtoms is understood, remove it")
    numbers, cell = template.numbers, template.cell
    constraints = [constraint for constraint in template.constraints if len(constraint.get_indices())]
    return Atoms(numbers, positions=template.positions, cell=cell, pbc=True, constraint=constraints)
