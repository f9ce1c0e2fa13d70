"""Textbook compounds in their prototypes, for `build_hull.py --prototypes`: tables of crystals lack some of them.

About one in sixteen of these compounds is missing in the tables that the hull is made from, BN, InP, SrF2 and HfO2
among them. A crystal that decomposes into such a compound would come out as stable without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal

CLOSEST = 1.0  # shortest distance at the start, over the sum of covalent radii
CHAINS = 0.8  # of Cr3Si, whose chains are denser than other metals


def _simple(name: str, **ratio: float) -> Callable[[str, str], Atoms]:
    return lambda a, b: bulk(a + b, name, a=1.0, **ratio)


def _fluorite(a: str, b: str, *more: tuple[float, float, float]) -> Atoms:
    sites = [(0, 0, 0), (0.25, 0.25, 0.25), *more]
    return crystal([a, b, b][: len(sites)], sites, spacegroup=225, cellpar=[10] * 3 + [90] * 3, primitive_cell=True)


def _group(
    group: int, *sites: tuple[float, ...], shape: tuple[float, ...] = (1, 1, 1, 90, 90, 90)
) -> Callable[..., Atoms]:
    """Prototype of a space group with one position per element of the name."""

    def make(*symbols: str) -> Atoms:
        cell = [10.0 * x for x in shape[:3]] + list(shape[3:])
        return crystal(list(symbols), sites, spacegroup=group, cellpar=cell, primitive_cell=True)

    return make


HEX = (90, 90, 120)
PROTOTYPES: dict[str, tuple[Callable[..., Atoms], str]] = {
    "zincblende": (
        _simple("zincblende"),
        "BN BP BAs AlN AlP AlAs AlSb GaN GaP GaAs GaSb InN InP InAs InSb BeS BeSe BeTe ZnS ZnSe ZnTe CdS CdSe CdTe "
        "HgS HgSe HgTe CuF CuCl CuBr CuI AgI SiC",
    ),
    "wurtzite": (_simple("wurtzite", c=1.63), "BeO ZnO AlN GaN InN ZnS CdS CdSe BN SiC AgI"),
    "rocksalt": (
        _simple("rocksalt"),
        "LiH NaH KH RbH CsH LiF LiCl LiBr LiI NaF NaCl NaBr NaI KF KCl KBr KI RbF RbCl RbBr RbI CsF AgF AgCl AgBr "
        "MgO MgS MgSe CaO CaS CaSe CaTe SrO SrS SrSe SrTe BaO BaS BaSe BaTe TiC TiN TiO VC VN VO CrN ZrC ZrN HfC "
        "HfN NbC NbN TaC TaN ScN ScP ScAs ScSb YN YP YAs YSb LaN LaP LaAs LaSb MnO MnS MnSe FeO CoO NiO CdO EuO EuS "
        "EuSe PbS PbSe PbTe SnTe SnSe SnAs GeTe CeN UN UC ThN ThC",
    ),
    "cesiumchloride": (
        _simple("cesiumchloride"),
        "CsCl CsBr CsI TlCl TlBr TlI AlNi AlCo AlFe AlRu AlPd AlIr AlRh CuZn AgMg AuZn AgZn NiTi FeTi CoTi RuTi "
        "OsTi GaNi GaCo GaRu CaTl MgTl SrTl BeCu BeNi BeCo BePd AgSc AgY CuY CuSc LiAg LiTl LiHg LiZn LiCd MgHg "
        "MgAu CdAu CdAg InPd RhSc RhY AlSc RuHf RuZr CoZr CoHf CoSc RuSc NiSc PtSc PdSc OsZr OsHf IrTi RhTi RhZr "
        "RhHf RhMn CaCd CaHg SrCd SrHg BaCd BaHg YCd YZn YMg LaMg LaZn LaCd LaAg LaHg FeV RuV RuNb",
    ),
    "fluorite": (  # the first element has eight neighbours
        _fluorite,
        "CaF SrF BaF CdF PbF HgF EuF SrCl BaCl ZrO HfO CeO ThO UO OLi ONa OK ORb SLi SNa SK SRb SeLi SeNa SeK SeRb "
        "TeLi TeNa TeK TeRb CBe SiMg GeMg SnMg PbMg AuAl PtAl PtGa AuGa AuIn PtIn PtSn IrSn NiSi CoSi TiH ZrH ScH "
        "YH LaH NbH CrH VH PIr PRh AsRh GaPd BIr",
    ),
    "Cu3Au": (
        _group(221, (0, 0, 0), (0.5, 0.5, 0)),
        "AlNi GaNi GeNi SiNi FeNi InNi SnNi AuCu CuAu PtCu CoPt FePt TiPt AlPt GaPt InPt SnPt PbPt MnPt ZnPt CrPt "
        "TiCo ScAl LaIn YIn ScIn CaSn CaPb CaTl LaSn LaPb YPb YTl LaTl AlZr InZr TiIr ZrIr HfIr NbIr TaIr VIr ScIr "
        "TiRh ZrRh HfRh NbRh TaRh VRh ScRh YPd ScPd FePd MnPd SnPd PbPd InPd GeFe GaFe IrMn PtMn AlCu MnNi PdMg "
        "CaHg SrHg LiCa NaSr YAl ZnTi HgTi AlTi CrIr MnIr MnRh YRh",
    ),
    "AuCu": (
        _group(123, (0, 0, 0), (0.5, 0.5, 0.5), shape=(0.7, 0.7, 0.95, 90, 90, 90)),
        "AuCu FePt CoPt NiPt TiAl TiGa FePd ZnPt ZnPd CdPt CdPd HgPt HgPd MnNi MnPt MnPd MnIr VPt CrPt CrPd MgPd "
        "MgPt InMg LiPb LiBi NaBi TiCu TiAu",
    ),
    "NiAs": (
        _group(194, (0, 0, 0), (1 / 3, 2 / 3, 0.25), shape=(1, 1, 1.35, *HEX)),
        "NiAs NiSb NiTe NiSe NiS CoSb CoTe CoSe CoS CrSb CrTe CrSe MnAs MnSb MnTe FeTe FeSb PtSn PtSb PtBi PtPb "
        "PdSb PdTe PdSn AuSn NiSn NiBi CuSn VS VSe VTe TiS TiSe TiTe TiAs TiP IrSb IrTe RhTe RhBi MnBi",
    ),
    "AlB2": (
        _group(191, (0, 0, 0), (1 / 3, 2 / 3, 0.5), shape=(1, 1, 1.07, *HEX)),
        "MgB ScB YB TiB ZrB HfB VB NbB TaB CrB MoB MnB AlB LaCu LaGa SrGa CaGa YGa YSi",
    ),
    "rutile": (
        _group(136, (0, 0, 0), (0.305, 0.305, 0), shape=(1, 1, 0.65, 90, 90, 90)),
        "TiO SnO PbO MnO RuO IrO OsO RhO VO CrO GeO NbO TaO WO MoO TeO SiO MgF ZnF NiF CoF FeF MnF PdF VF CrF MgH "
        "CaCl CaBr",
    ),
    "CdI2": (
        _group(164, (0, 0, 0), (1 / 3, 2 / 3, 0.25), shape=(1, 1, 1.6, *HEX)),
        "CdI MgBr MgI CaI MnI FeI CoI FeBr CoBr MnBr TiS TiSe TiTe ZrS ZrSe ZrTe HfS HfSe HfTe SnS SnSe PtS PtSe "
        "PtTe NiTe CoTe PdTe RhTe IrTe VS VSe TaS PbI GeI TmI ZnI",
    ),
    "CdCl2": (
        _group(166, (0, 0, 0), (0, 0, 0.25), shape=(1, 1, 4.6, *HEX)),
        "CdCl CdBr MgCl MnCl FeCl CoCl NiCl NiBr NiI ZnCl ZnBr",
    ),
    "MoS2": (
        _group(194, (1 / 3, 2 / 3, 0.25), (1 / 3, 2 / 3, 0.621), shape=(1, 1, 3.9, *HEX)),
        "MoS MoSe MoTe WS WSe WTe NbS NbSe TaS TaSe",
    ),
    "pyrite": (
        _group(205, (0, 0, 0), (0.385, 0.385, 0.385)),
        "FeS CoS NiS MnS RuS OsS FeSe NiSe CoSe RuSe OsSe MnSe RuTe OsTe MnTe CoTe NiTe PtP PtAs PtSb PtBi PdAs "
        "PdSb AuSb RhSe IrSe RhS CuS CuSe",
    ),
    "Cr3Si": (
        _group(223, (0, 0, 0), (0.25, 0, 0.5)),
        "SnNb SiV AlNb GeNb GaV GaNb GeV SiCr GeCr SiMo GeMo OsCr IrCr RuCr RhCr PtCr IrNb PtNb AuNb OsNb IrV PtV "
        "RhV AuV SnV SbNb SbTi IrTi AuTi PtTi SbV IrMo OsMo PtTa AuZr",
    ),
    "MgCu2": (
        _group(227, (0, 0, 0), (0.625, 0.625, 0.625)),
        "MgCu CaAl YAl LaAl ZrMo HfMo ZrV HfV TiCr ZrCr HfCr TaCr NbCr ZrFe HfFe YFe ZrCo HfCo TaCo NbCo ScCo YCo "
        "ZrW HfW NaAu BiAu PbAu KBi RbBi CsBi CaPd SrPd BaPd CaPt SrPt BaPt CaRh SrRh YRh LaRh ScIr ZrIr YIr LaIr "
        "SrIr CaIr YPt YNi LaNi CaNi TiCo YMn YRu LaRu",
    ),
    "BiF3": (
        lambda a, b: _fluorite(a, b, (0.5, 0.5, 0.5)),
        "AlFe SiFe SiMn GaFe BiLi SbLi BiCs SbCs BiRb BiK SbRb HgLi CeMg LaMg AlCu SbCu YMg LaH YH",
    ),
    "Al2O3": (
        _group(167, (0, 0, 0.352), (0.306, 0, 0.25), shape=(1, 1, 2.73, *HEX)),
        "AlO CrO FeO VO TiO GaO RhO InO",
    ),
    "ReO3": (_group(221, (0, 0, 0), (0.5, 0, 0)), "ReO WO AlF ScF NCu TiF NbF TaF ZrF"),
    "perovskite": (
        _group(221, (0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)),
        "SrTiO BaTiO PbTiO CaTiO KNbO KTaO NaTaO NaNbO BaZrO SrZrO CaZrO BaSnO SrSnO BaHfO SrHfO BaPbO BaBiO LaAlO "
        "LaGaO LaCrO LaMnO LaFeO LaCoO LaNiO YAlO SrVO SrCrO SrMnO SrFeO SrCoO SrRuO SrMoO SrNbO BaMoO BaNbO BaFeO "
        "CaVO CaCrO KMgF KZnF KMnF KFeF KCoF KNiF KCaF RbMgF RbMnF RbFeF RbCoF RbZnF RbCaF RbCdF RbSrF CsCaF CsCdF "
        "CsSrF CsPbF CsPbCl CsPbBr CsPbI CsSnCl CsSnBr CsSnI CsGeCl CsGeBr CsGeI NaMgF BaLiF CsHgF CsHgCl TlMnF "
        "TlCoF SnOCa SrLiH BaLiH KMgH RbMgH RbCaH CsCaH KMnF",
    ),
    "antiperovskite": (
        _group(221, (0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)),
        "SnNMn GaNMn ZnNMn CuNMn NiNMn AgNMn GaCMn AlCMn SnCMn ZnCMn SnCFe AlCFe ZnCFe AlNFe GaCCo ZnCNi MgCNi "
        "AlCTi InCTi TlCTi AlNTi AlCSc InCSc SnCSc InNSc PbNCa SnNCa SbNCa BiNCa PNCa AsNCa SbNMg AsNMg BiNSr SbNSr "
        "SnOSr PbOCa PbOSr PbOBa GeOCa SiOCa SiOSr GeOSr ClOLi BrOLi ClONa",
    ),
    "half-Heusler": (
        _group(216, (0, 0, 0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5)),
        "TiNiSn ZrNiSn HfNiSn TiCoSb ZrCoSb HfCoSb NbFeSb VFeSb TaFeSb TiPtSn ZrPtSn HfPtSn TiPdSn ZrPdSn NbCoSn "
        "TaCoSn NbRhSn VCoSn TaIrSn ScNiSb YNiSb ScPdSb YPdSb ScPtSb YPtSb ScPtBi YPtBi LaPtBi YPdBi ScNiBi YNiBi "
        "LiNMg LiPMg LiAsMg LiNZn LiPZn LiAsZn LiPCd LiAsCd MnNiSb MnPtSb MnCuSb MnPdSb AlLiSi GaLiSi InLiGe NbIrSn "
        "MgNiSb MgCuSb NbCoGe TiIrSb ZrRhSb ZrIrSb TiRhSb HfRhSb HfIrSb TiFeTe AgMgAs CuMgSn",
    ),
    "Heusler": (
        _group(225, (0, 0, 0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5)),
        "MnNiGa MnCoSi VFeAl MnCuAl MnNiSn MnCoGe MnCoSn MnCoGa MnCoAl TiNiAl TiFeSi TiFeSn VFeGa MnNiIn MnCuSn "
        "MnCuIn MnAuAl MnPdSn MnPdIn MnPdSb MnRhSn FeCoSi FeCoAl FeCoGa FeCoGe TiCoAl TiCoSi TiCoGe TiCoSn TiCoGa "
        "VCoAl VCoGa CrCoAl CrCoGa ZrCoSn ZrCoAl ZrNiAl HfNiAl ScNiAl NbNiSn TaNiAl NbNiAl ZrNiSn HfNiSn VNiSn "
        "MnRuSi MnRuGe MnRuSn VMnAl TaFeAl NbFeAl TiFeAl HfCoSn NbCoSn NbCoAl TaCoAl MnFeSi MnFeAl TiCuAl ZrCuAl "
        "ScCuAl HfCuAl ScPdSn YPdSn ZrPdAl ScAuIn YPdPb YPdIn YCuIn YAgIn YAuIn ScAgIn ScPdIn MgAgIn MgCuIn LiCuSn "
        "LiCuSi LiNiSn LiPdSn LiPdGe LiIrAl LiRhAl MgLiSn ZnLiSn ZnLiGe CdLiSn HgLiSi",
    ),
}


def prototypes() -> Iterator[Atoms]:
    """Yield every compound once per prototype; the shortest distance starts near the sum of covalent radii."""
    for prototype, (make, names) in PROTOTYPES.items():
        for name in sorted(set(names.split())):
            atoms = make(*re.findall("[A-Z][a-z]?", name))
            atoms = Atoms(atoms.numbers, scaled_positions=atoms.get_scaled_positions(), cell=atoms.cell.array, pbc=True)
            i, j, distance = neighbor_list("ijd", atoms, 1.5 * (atoms.get_volume() / len(atoms)) ** (1 / 3))
            radii = covalent_radii[atoms.numbers]
            scale = (CHAINS if prototype == "Cr3Si" else CLOSEST) / np.min(distance / (radii[i] + radii[j]))
            atoms.set_cell(atoms.cell.array * scale, scale_atoms=True)
            atoms.info = {
                "material_id": f"{prototype}-{atoms.get_chemical_formula(empirical=True)}",
                "split": "prototype",
            }
            yield atoms
