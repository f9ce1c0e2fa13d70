"""Known crystals as candidates: found by their DOS, they go through the same steps as the generated ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ase import Atoms
from jobflow import Maker, job

from dosmatgen_ase.crystals.convert import to_structure
from dosmatgen_ase.flows.jobs import targets_by_site, whole_keys
from dosmatgen_ase.flows.schemas import LARGE, GenerationDoc
from dosmatgen_ase.parsing import DOSInput


@dataclass
class SearchMaker(Maker):
    """Find known crystals that have a DOS (`retrieval.query.search`).

    Attributes
    ----------
    n
        Most crystals.
    elements, exclude_elements, composition, num_atoms, max_above_hull, gap
        As in ``search``.
    index
        File made by ``dosmatgen index``; the index that ships by default. The path is made absolute at once.
    """

    name: str = "search"
    n: int = 5
    elements: list[str] | None = None
    exclude_elements: list[str] | None = None
    composition: str | None = None
    num_atoms: int | list[int] | None = None
    max_above_hull: float | None = None
    gap: list[float] | None = None
    index: str | None = None

    def __post_init__(self) -> None:
        if self.index is not None:
            self.index = str(Path(self.index).absolute())

    @job(output_schema=GenerationDoc, data=LARGE)
    def make(self, dos: DOSInput, sites: Iterable[int] | None = None) -> GenerationDoc:
        """Search; parameters as in ``DOSGenerator.generate``.

        The sites of every crystal are in an order in which those that match stand where the targets belong, and
        ``records`` have what ``search`` tells of it.
        """
        from dosmatgen_ase.retrieval.index import DOSIndex, default_index
        from dosmatgen_ase.retrieval.query import search

        given = whole_keys(dos)
        settings = asdict(self)
        filters = {key: value for key, value in settings.items() if key not in ("name", "n", "index")}
        index = default_index() if self.index is None else DOSIndex.load(self.index)
        hits = search(given, self.n, sites=sites, index=index, **filters)
        targets = targets_by_site(given, sites)
        wanted = [int(key) for key in targets if key != "total"]
        return GenerationDoc(
            structures=[to_structure(in_order_of_targets(atoms, wanted)) for atoms in hits],
            records=[{"index": i, "search": atoms.info["search"]} for i, atoms in enumerate(hits)],
            targets=targets,
            settings=settings,
            reason=None if hits else "no known crystal fits what was asked for",
        )


def in_order_of_targets(atoms: Atoms, wanted: list[int]) -> Atoms:
    """A crystal that `search` found, with the site for each target at the index `wanted` for it.

    As many cells as the targets fill, more where an index lies beyond them.
    """
    told = atoms.info["search"]
    size = len(atoms)
    cells = max(told["cells"], -(-(max(wanted, default=0) + 1) // size))
    whole = atoms.repeat((cells, 1, 1))
    used = dict.fromkeys(told["sites"], 0)
    places = {}
    for target, site in zip(wanted, told["sites"], strict=True):
        places[target] = used[site] * size + site  # the first copy that is still free
        used[site] += 1
    rest = iter(sorted(set(range(len(whole))) - set(places.values())))
    order = [places[i] if i in places else next(rest) for i in range(len(whole))]
    return whole[order]


@job(output_schema=GenerationDoc, data=LARGE)
def with_known(generation: GenerationDoc, known: GenerationDoc) -> GenerationDoc:
    """Put known crystals before generated ones, with numbers that follow theirs."""
    generation, known = GenerationDoc.model_validate(generation), GenerationDoc.model_validate(known)
    first = 1 + max((record["index"] for record in generation.records), default=-1)
    records = [{**record, "index": first + record["index"]} for record in known.records]
    return generation.model_copy(
        update={
            "structures": [*known.structures, *generation.structures],
            "records": [*records, *generation.records],
            "settings": {**generation.settings, "search": known.settings},
            "reason": "; ".join(filter(None, (generation.reason, known.reason))) or None,
        }
    )
