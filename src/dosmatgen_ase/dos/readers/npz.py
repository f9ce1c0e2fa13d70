"""An ``.npz`` of one structure in the layout of the label set."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np

from dosmatgen_ase.dos.broadening import scale_sites_to_total
from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.readers.common import Content, Request, check_site, most_unpacked, naming, record
from dosmatgen_ase.dos.readers.densities import HIGHEST, real_rows
from dosmatgen_ase.dos.target import TargetDOS
from dosmatgen_ase.files import DAMAGE, read_member

_WANTED = ("energies", "total", "pdos", "emax", "gap")
_SIGMA = 0.1  # eV, the broadening of the label set, whose layout this is


def is_npz(content: Content) -> bool:
    """Whether a file is a zip archive."""
    return content.data.startswith(b"PK")


def read_npz(content: Content, request: Request) -> TargetDOS:
    """Read the total DOS or one site's."""
    name = content.name
    with naming(name, DAMAGE, f" is not an .npz with {', '.join(_WANTED)}"):
        arrays = _arrays(content.data)
    with naming(name, ValueError):
        return _target(arrays, content.basename, request)


def _arrays(data: bytes) -> dict[str, Any]:
    """The arrays that are wanted; their size is looked at before they are unpacked."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if lacking := [key for key in _WANTED if key not in members]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        size = sum(members[key].file_size for key in _WANTED)
        if size > most_unpacked(len(data)):
            raise ValueError(
                f"it unpacks to {size / 2**20:.0f} MiB from {len(data) / 2**20:.2g} MiB, which no DOS does"
            )
        return {key: read_member(archive, members[key], f'"{key}"') for key in _WANTED}


def _scalar(arrays: dict[str, Any], key: str) -> float:
    array = real_rows(arrays[key], key)
    if array.size != 1 or array.ndim > 1:
        raise ValueError(f"{key} must be one number (eV), not an array of shape {array.shape}")
    value = float(array.ravel()[0])
    if not np.isfinite(value):
        raise ValueError(f"{key} is {value}: it must be a finite number (eV)")
    return value


def _checked(arrays: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Energies (G,), total (G,) and projections (sites, l, G) that fit each other."""
    energies, total, pdos = (real_rows(arrays[key], key) for key in ("energies", "total", "pdos"))
    size = energies.size
    if energies.ndim != 1 or total.shape != (size,):
        raise ValueError(f"energies and total must have one common length, not {energies.shape} and {total.shape}")
    if pdos.ndim != 3 or pdos.shape[2] != size or not 0 < pdos.shape[1] <= 4 or not len(pdos):
        raise ValueError(f"pdos must have shape (sites, l, {size}) with l = s, p, d, f at most, not {pdos.shape}")
    for key, array in (("energies", energies), ("total", total), ("pdos", pdos)):
        if not np.isfinite(array).all():
            raise ValueError(f"{key} holds NaN or infinite numbers")
    if size and abs(energies).max() > HIGHEST:
        raise ValueError(f"energies reach {abs(energies).max():.0f} eV from zero: are they in meV?")
    for key, array in (("total", total), ("pdos", pdos)):
        if array.size and array.min() < 0:
            raise ValueError(f"{key} must not be negative (lowest {array.min():.3g} states/eV)")
    return energies, total, pdos


def _target(arrays: dict[str, Any], basename: str, request: Request) -> TargetDOS:
    energies, total, pdos = _checked(arrays)
    e_max, gap = _scalar(arrays, "emax"), _scalar(arrays, "gap")
    if gap < 0:
        raise ValueError(f"gap must not be negative ({gap:g} eV)")
    reference, source, site = "vbm" if gap > 0 else "fermi", f"npz {basename}", request.site
    if site is None:
        return TargetDOS(energies, total, energies <= e_max, reference, _SIGMA, "total", record(source))
    check_site(site, len(pdos))
    scaled, known = scale_sites_to_total(pdos.sum(axis=1), total, energies=energies, e_max=e_max)
    told = record(source, [f"site {site}, sites scaled to add up to the total"])
    return TargetDOS(energies, scaled[site], known, reference, _SIGMA, "site", told)
