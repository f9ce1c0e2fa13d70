"""Where the header of a table says that zero energy lies: at the Fermi level, at the valence-band maximum, elsewhere.

A header states a zero ("E - E_F"), denies one ("not shifted to the Fermi level"), or gives an energy ("E_F = 5.3 eV").
Only a statement that nothing denies, or an energy of 0, settles it.
"""

from __future__ import annotations

import re
from typing import Any

from dosmatgen_ase.dos.readers.numbers import Table

HARTREE = 27.211386245988
# eV (CODATA 2018) of the units that energies are written in.
ENERGY_UNITS = {"ev": 1.0, "mev": 1e-3, "ha": HARTREE, "hartree": HARTREE, "ry": HARTREE / 2, "rydberg": HARTREE / 2}

OTHER_ZERO = re.compile(
    r"(?<![a-z])(vacuum|e_?\{?vac|homo|mid-?gap|core[ -]level|n\.?h\.?e|s\.?h\.?e|average potential|"
    r"absolute (?:scale|energ\w+)|cbm|conduction[ -]band minimum|"
    r"bottom of (?:the )?(?:\w+ )?bands?|(?:valence[ -])?band bottom|valence[ -]band minimum)(?![a-z])",
    re.IGNORECASE,
)

# Names of the two levels. The capital letter tells a lone E_v from the unit eV.
_E_F = r"(?<![a-z])E_?[{(]?F(?:ermi)?(?![a-z])[})]?"
_MU = r"(?<!\w)(?:mu|[μµ])(?!\w)"
_E_V = r"(?<![a-z])(?-i:E_\{?[vV]\}?|Ev)(?!\w)"
_E_VBM = r"(?<![a-z])E_?[{(]?VBM?(?!\w)[})]?"
_FERMI = rf"(?:{_E_F}|(?<![a-z])fermi(?![a-z])|chemical potential|{_MU})"
_VBM = rf"(?:{_E_V}|{_E_VBM}|(?<![a-z])VBM?(?!\w)|valence[ -]band(?! min| bottom)|valence[ -](?:max|top|edge))"

_IS = r"(?:(?:is|was|at|of|[=:]|->)\s*)"
_UNIT = r"m?eV|Ry|Ha|a\.u\."
_NUMBER = rf"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?!\d|\.\d)(?:\s*(?P<after>{_UNIT}))?"
_MOMENT = r"\s*(?:mu|[μµu])_?\{?B"
_VALUE_FOLLOWS = rf"(?:\s*[(\[]\w+[)\]])?\s*{_IS}?[+-]?\.?\d"

_ENERGY = r"E(?:nerg(?:y|ies))?(?:\s*\(\w+\))?"
# Between "relative" and the level stand no words that name another zero or turn the sentence round.
_WORDS = (
    rf"(?:(?!(?:not|nor|but|than|instead|from)\b|\d|{_E_F}|fermi|valence|vbm|vac|homo|lumo|mid|core|cbm|conduction|average|"
    r"bottom)[\w-]+ ){0,5}"
)


def _stated(level: str, difference: str) -> re.Pattern[str]:
    """What says that zero is a level, known by the names `level`, and in differences as `difference`."""
    return re.compile(
        rf"{difference}|"
        r"(?<![\w-])(?:relative|referenced|aligned|shifted|respect|wrt\.?|w\.r\.t\.|(?:measured|counted|taken) from) "
        rf"{_WORDS}{level}|"
        rf"(?:energ(?:y|ies)|\bE)(?: ?\(\w+\)| in \w+)? (?:above|vs\.?|versus) (?:the )?(?:top of the )?{level}|"
        rf"[(\[]eV (?:above|vs\.?) (?:the )?{level}|"
        r"(?:zero|reference)(?: of (?:the )?energ(?:y|ies)| energy| level| point)?\s*(?:(?:is|set|at|to|[=:])\s*)+"
        rf"(?:the )?(?:top of the )?{level}(?!{_VALUE_FOLLOWS})|"
        rf"{level}(?:[ -](?:level|energy|maximum|max|top))?\s*(?:is )?(?:(?:set |shifted )?(?:at|to)|[=:])\s*"
        r"(?:zero|0(?:\.0*)?(?:\s*eV)?)(?![\w.])",
        re.IGNORECASE,
    )


def _valued(plain: str, doubtful: str) -> re.Pattern[str]:
    """What gives the energy of a level; after a doubtful name only behind an equals sign, or the like."""
    return re.compile(
        rf"(?:(?:{plain})(?:\s*[(\[](?P<before>[\w.]+)[)\]])?|(?:{doubtful})(?:\s*[(\[](?P<unit>{_UNIT})[)\]])?(?=\s*{_IS}))"
        rf"\s*{_IS}*{_NUMBER}(?!{_MOMENT})",
        re.IGNORECASE,
    )


# What says that zero is a level. "E-fermi :  5.3" is no difference, but how VASP gives a value.
STATED = {
    "vbm": _stated(_VBM, rf"{_ENERGY}\s*-\s*(?:{_E_V}|{_E_VBM}|VBM?(?!\w))(?!{_VALUE_FOLLOWS})|E\s*-\s*(?-i:EV)(?!\w)"),
    "fermi": _stated(_FERMI, rf"{_ENERGY}\s*-\s*(?:{_E_F}|{_MU})"),
}

# What gives the energy of a level.
VALUES = {
    "fermi": _valued(rf"{_E_F}|fermi[\s_-]*(?:level|energy)|chemical potential", rf"fermi|{_MU}"),
    "vbm": _valued(
        rf"{_E_VBM}|(?<![a-z])VBM(?!\w)|(?:VB|valence[ -]band)[ -](?:max(?:imum)?|top|edge)|"
        r"top of (?:the )?valence[ -]band",
        _E_V,
    ),
}

# What denies a statement: words before it in the same line, or a "no" after it.
_DENIED = re.compile(
    r"(?:\b(?:can)?not|\bnever|\bneither|\bnor|\bwithout being|\binstead of|\brather than|\bno longer|\b\w+n't)"
    r"(?:\s+|(?: (?!but\b)[\w-]+){1,3} )$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(r"(?: level| energy)?\s*[:=?]\s*\.?(?:no|false)\b", re.IGNORECASE)
# What says, without a statement to deny, that energies are as the program has them.
NOT_SHIFTED = re.compile(
    r"\b(?:un|non)-?shifted|"
    r"\b(?:not|never|without|no|\w+n't)(?: (?:yet|been|be|any|a|energy|rigid|further))* shift\w*|"
    rf"(?:{_FERMI}|{_VBM})(?: level| energy| maximum)?(?: (?:is|was|has))? not (?:been |yet )*"
    r"(?:at|set|subtracted|zero|the zero|shifted|aligned)\b",
    re.IGNORECASE,
)


def header_lines(table: Table) -> str:
    """The header with its line breaks: as long as ``table.text``, in which they are blanks."""
    return "\n".join(" ".join(line.split()) for line in table.header)


def claims(pattern: re.Pattern[str], lines: str) -> tuple[list[str], list[str]]:
    """What of a header matches, and what of that it denies, with the denial."""
    text = lines.replace("\n", " ")
    stated, denied = list[str](), list[str]()
    for found in pattern.finditer(text):
        start = found.start()
        before, after = _DENIED.search(lines, max(0, start - 100), start), _DENIED_AFTER.match(text, found.end())
        if before or after:
            denied.append(text[before.start() if before else start : after.end() if after else found.end()])
        else:
            stated.append(found[0])
    return stated, denied


def _values(reference: str, text: str, unit: float | None) -> list[float]:
    """Energies (eV) that the header gives of a level; without a unit of their own in that of the energies."""
    units = ENERGY_UNITS | {"a.u.": HARTREE}
    named = (
        (found, found["before"] or found["unit"] or found["after"] or "") for found in VALUES[reference].finditer(text)
    )
    return [float(found["number"]) * units.get(name.lower(), unit or 1.0) for found, name in named]


def zero_of_header(table: Table, unit: float | None) -> dict[str, Any]:
    """The fields ``zero``, ``reference`` and ``absolute`` of a `Layout`, as far as the header tells.

    Parameters
    ----------
    table : Table
    unit : float or None
        eV of the unit of the energies.
    """
    lines = header_lines(table)
    values = {reference: _values(reference, table.text, unit) for reference in STATED}
    denials: list[str] = []
    for reference, pattern in STATED.items():
        stated, denied = claims(pattern, lines)
        if 0.0 in values[reference] or (stated and not denied):
            return {"zero": 0.0, "reference": reference}
        denials += denied
    if not denials and (found := NOT_SHIFTED.search(table.text)):
        denials = [found[0]]
    says = f" says {denials[0][:80]!r}: " if denials else ""
    what = f" and{says}" if says else ", but not whether its energies are relative to it: "
    if values["fermi"]:
        return {"absolute": f"its header has a Fermi level of {values['fermi'][0]:.6g} eV{what}"}
    if values["vbm"]:
        level = f"{values['vbm'][0]:.6g}"
        answer = f'say efermi={level}, reference="vbm" (--efermi {level} --reference vbm) to put zero there, '
        return {"absolute": f"its header has a valence-band maximum of {level} eV{what}{answer}"}
    if says:
        return {"absolute": f"its header{says}"}
    if other := OTHER_ZERO.search(table.text):
        return {"absolute": f"its header names another zero of energy ({other[0]}): "}
    return {}
