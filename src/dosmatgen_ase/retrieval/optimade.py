"""Crystals of other databases: what speaks OPTIMADE (https://www.optimade.org) gives structures for an index."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dosmatgen_ase.crystals.screening import right_handed, screen_given
from dosmatgen_ase.files import write_atomic
from dosmatgen_ase.parsing import is_real, is_whole, whole_number

if TYPE_CHECKING:
    from ase import Atoms

DEFAULT_LIMIT = 1000  # structures: what a question without a bound is answered with
TIMEOUT = 30.0  # seconds
RETRIES = 4
_FIELDS = (
    *("elements", "nelements", "elements_ratios", "chemical_formula_descriptive", "chemical_formula_reduced"),
    *("chemical_formula_anonymous", "dimension_types", "nperiodic_dimensions", "lattice_vectors", "nsites"),
    *("cartesian_site_positions", "species", "species_at_sites", "structure_features", "last_modified"),
)
_BUSY = (429, 500, 502, 503, 504)  # what a server answers that may do better a little later
_WITHOUT = {  # what a structure may have that a crystal cannot stand for
    "disorder": "disordered: sites are shared or partly empty",
    "assemblies": "disordered: groups of sites exclude each other",
    "implicit_atoms": "some atoms have no position",
    "site_attachments": "some atoms have no position",
}


@dataclass(frozen=True)
class OptimadeStructures:
    """What `read_optimade` found.

    Attributes
    ----------
    crystals : list of Atoms
        ``info["material_id"]`` is ``PREFIX:ID``, the provider's prefix and its name of the structure.
    skipped : dict
        Why a structure is no crystal to look at, by ``material_id``.
    source : dict
        For attribution, as an index keeps it: ``url``, ``filter``, ``provider``, ``homepage``, ``licence``,
        ``retrieved`` (date), ``available`` (structures that fit the filter); None where the database does not tell.
    """

    crystals: list[Atoms]
    skipped: dict[str, str]
    source: dict[str, Any]


def read_optimade(
    url: str,
    filter: str = "",
    *,
    limit: int = DEFAULT_LIMIT,
    timeout: float = TIMEOUT,
    retries: int = RETRIES,
    parts: str | Path | None = None,
    progress: bool = False,
) -> OptimadeStructures:
    """Read crystals from a database that speaks OPTIMADE, page by page.

    Parameters
    ----------
    url : str
        Base URL, such as "https://optimade.materialsproject.org".
    filter : str
        In the grammar of OPTIMADE, such as ``'elements HAS ALL "Ni","Au" AND nsites<=8'``; by default everything.
    limit : int
        Most structures to read.
    timeout : float
        Seconds that the server may be silent.
    retries : int
        How often a request is made again that fails, or is answered by "busy", waiting longer each time.
    parts : path, optional
        Folder that keeps the pages, by which an interrupted run goes on. By default none.
    progress : bool
        Show a progress bar.

    Returns
    -------
    OptimadeStructures
        Molecules, surfaces, and structures with disorder or without positions are left out and counted.

    Raises
    ------
    ImportError
        If the package ``optimade`` is not installed.
    ValueError
        If an argument is not understood, or nothing fits the filter.
    ConnectionError
        If the server is not there, does not speak OPTIMADE, or refuses the question.

    Examples
    --------
    >>> found = read_optimade("https://optimade.materialsproject.org", "nsites<=4")  # doctest: +SKIP
    >>> index = build_index(found.crystals, source=found.source)  # doctest: +SKIP
    """
    limit, retries = whole_number(limit, "limit", 1), whole_number(retries, "retries", 0)
    if not is_real(timeout) or not 0 < timeout < float("inf"):
        raise ValueError(f"timeout={timeout!r} must be a number of seconds above 0")
    base = _base_url(url)
    server = _Server(base, filter, timeout, retries)
    pages = _Pages(None if parts is None else Path(parts), json.dumps([base, filter]))
    if not pages.told or (pages.next is not None and len(pages) < limit):
        with tqdm(total=limit, initial=len(pages), disable=not progress, unit="structure", desc=base) as bar:
            server.read(pages, limit, bar)
    if not len(pages):
        raise ValueError(f"{base} holds no structure that fits {filter!r}: ask for less")
    found = {name: _crystal(name, entry) for name, entry in pages.entries(limit).items()}
    crystals = [atoms for atoms in found.values() if not isinstance(atoms, str)]
    skipped = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    provider = pages.provider
    source = {
        "url": base,
        "filter": filter,
        "provider": provider.get("name"),
        "homepage": _link(provider.get("homepage")),
        "licence": server.licence(),
        "retrieved": datetime.now(UTC).date().isoformat(),
        "available": _count(pages.told[0].get("data_returned")),
    }
    return OptimadeStructures(crystals, skipped, source)


def _base_url(url: str) -> str:
    """The URL without the version and the endpoint, which the client adds."""
    if not isinstance(url, str) or not re.match(r"https?://[^/\s]+", url):
        raise ValueError(f"url={url!r} is no address of a database: give one that begins with https://")
    return re.sub(r"(/v\d[\d.]*)?(/structures)?/*(\?.*)?$", "", url.rstrip("/"))


def _link(value: Any) -> str | None:
    """A link of JSON:API, which is a text or an object."""
    return value.get("href") if isinstance(value, Mapping) else value


def _count(value: Any) -> int | None:
    """A number of structures, which some databases tell as something else."""
    return int(value) if is_whole(value) else None


# -- pages -------------------------------------------------------------------------------------------------------------


class _Pages:
    """The pages read so far, in memory or in files as well."""

    def __init__(self, folder: Path | None, question: str) -> None:
        stem = f"page-{hashlib.sha256(question.encode()).hexdigest()[:12]}"
        self.path: Callable[[int], Path] | None = None if folder is None else lambda i: folder / f"{stem}-{i:06d}.json"
        self.told: list[dict[str, Any]] = []  # of each page: entries, next, provider, data_returned
        while self.path is not None and (path := self.path(len(self.told))).exists():
            try:
                page = json.loads(path.read_text())
            except ValueError:
                page = None
            if not (isinstance(page, dict) and "next" in page and _are_entries(page.get("entries"))):
                break  # damaged: read again from here
            self.told.append(page)

    def __len__(self) -> int:
        return sum(len(page["entries"]) for page in self.told)

    @property
    def provider(self) -> Mapping[str, Any]:
        """What the database tells of its provider."""
        told = self.told[0].get("provider")
        return told if isinstance(told, Mapping) else {}

    @property
    def next(self) -> str | None:
        """Address of the page after the last."""
        return self.told[-1]["next"] if self.told else None

    def add(self, page: dict[str, Any]) -> None:
        """Keep one more."""
        if self.path is not None:
            path = self.path(len(self.told))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(page).encode())
        self.told.append(page)

    def entries(self, limit: int) -> dict[str, dict[str, Any]]:
        """The first structures by name, each once."""
        prefix = self.provider.get("prefix")
        found: dict[str, dict[str, Any]] = {}
        for entry in [entry for page in self.told for entry in page["entries"]][:limit]:
            found.setdefault(f"{prefix}:{entry.get('id')}" if prefix else str(entry.get("id")), entry)
        return found


def _are_entries(value: Any) -> bool:
    """Whether this is a list of structures, as a page has it."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


class _Server:
    """The client of ``optimade``, for one question to one database."""

    def __init__(self, base: str, filter: str, timeout: float, retries: int) -> None:
        try:
            import requests
            from optimade.client import OptimadeClient
            from optimade.exceptions import BadRequest
            from optimade.filterparser import LarkParser
            from requests.adapters import HTTPAdapter, Retry
        except ImportError as error:
            needed = 'pip install "dosmatgen-ase[optimade]"'
            raise ImportError(f"reading structures of other databases needs optimade: {needed}") from error
        if filter:
            try:
                LarkParser().parse(filter)
            except BadRequest as error:
                told = "write it as 'elements HAS \"Ni\" AND nsites<=8'"
                raise ValueError(f"filter={filter!r} is not understood ({error}): {told}") from error

        class Patient(requests.Session):
            def __init__(self) -> None:
                super().__init__()
                again = Retry(total=retries, backoff_factor=0.5, status_forcelist=_BUSY)
                for scheme in ("https://", "http://"):
                    self.mount(scheme, HTTPAdapter(max_retries=again))

        self.base, self.filter = base, filter
        settings = {"http_timeout": timeout, "use_async": False, "silent": True, "http_client": Patient}
        self._client = partial(OptimadeClient, base_urls=base, **settings)

    def read(self, pages: _Pages, limit: int, bar: Any) -> None:
        """Read the pages that are missing."""

        def keep(address: str, answer: dict[str, Any]) -> None:
            meta, entries = answer["meta"], answer["data"]
            if not _are_entries(entries):
                raise ValueError(f"{address.partition('?')[0]} lists no structures")
            meta["data_returned"] = _count(meta.get("data_returned"))  # in place: the client, too, counts with it
            told = {"provider": meta.get("provider"), "data_returned": meta["data_returned"]}
            pages.add({"entries": entries, "next": _link(answer["links"].get("next")), **told})
            bar.total = min(limit, told["data_returned"] or limit)
            bar.update(len(entries))

        client = self._client(max_results_per_provider=limit - len(pages), callbacks=[keep])
        with contextlib.redirect_stderr(io.StringIO()):  # the client prints the errors that it returns
            found = client.get_one(
                "structures", self.filter, self.base, response_fields=list(_FIELDS), override_url=pages.next
            )
        if errors := [error for result in found.values() for error in result.errors]:
            kept = f"; {len(pages)} structures are there, the same call goes on from them" if pages.path else ""
            told = re.sub(r"[?&]response_fields=\S*", "", " ".join(str(errors[0]).split()))[:300]
            raise ConnectionError(f"{self.base} does not answer as an OPTIMADE database: {told}{kept}")

    def licence(self) -> str | None:
        """Licence of the structures, if the database tells it."""
        with contextlib.redirect_stderr(io.StringIO()):
            found = self._client(max_results_per_provider=1).get_one("info", "", self.base, paginate=False)
        result = next(iter(found.values()))
        told = result.data.get("attributes", {}) if isinstance(result.data, dict) else {}
        return ", ".join(told.get("available_licenses") or []) or _link(told.get("license"))


# -- crystals ----------------------------------------------------------------------------------------------------------


def _crystal(name: str, entry: Mapping[str, Any]) -> Atoms | str:
    """The crystal, or why the structure is none."""
    from optimade.adapters import Structure
    from optimade.adapters.exceptions import ConversionError

    attributes = entry.get("attributes") or {}
    for feature in attributes.get("structure_features") or []:
        if feature in _WITHOUT:
            return _WITHOUT[feature]
    if any(list(s.get("concentration") or [1]) != [1] for s in attributes.get("species") or []):
        return _WITHOUT["disorder"]  # also where the database does not say so
    if list(attributes.get("dimension_types") or []) != [1, 1, 1]:
        return "not periodic in all three directions"
    try:
        with warnings.catch_warnings():  # of fields that a database leaves out
            warnings.simplefilter("ignore")
            atoms = right_handed(Structure(dict(entry)).convert("ase"))
    except (ConversionError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return f"not readable: {' '.join(str(error).split())[:100]}"
    reason = screen_given(atoms).reason
    atoms.info = {"material_id": name}
    return reason or atoms
