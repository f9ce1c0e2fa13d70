"""Tables of numbers in text, as programs and spreadsheets write them: header, names of the columns, rows.

Read are the minus sign U+2212, Fortran's ``1.0D-05`` and ``0.12-101``, decimal commas, semicolons, byte order marks,
Windows line ends, and comments after the numbers. What cannot be read is an error that names the line; no row is
dropped.
"""

from __future__ import annotations

import codecs
import io
import math
import re
from dataclasses import dataclass

import numpy as np

from dosmatgen_ase.dos.grid import Array
from dosmatgen_ase.dos.readers.common import Content

COMMENT_MARKS = "#!%@&"
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
# Fortran leaves the letter out where the exponent has three digits.
FORTRAN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))[dDqQ]([+-]?\d+)|([+-]?\d*\.\d+)([+-]\d{3})")
NUMBER_START = re.compile(r"[+-]?\.?\d|\*\*|[+-]?(?:nan|inf)(?:inity)?$", re.IGNORECASE)
# A name with its units in brackets, which may hold brackets themselves: "DOS (states/(eV atom))".
NAME = re.compile(r"[^\s(\[,;]+(?:\s*[(\[](?:[^()\[\]]|[(\[][^()\[\]]*[)\]])*+[)\]])*")
DECIMAL_COMMA = re.compile(r"[+-]?\d+(?:,\d+)?(?:[eEdD][+-]?\d+)?")
# Typeset signs and blanks as ASCII.
PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2010": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " "})
HEADER_LINES = 200  # longest header that is looked for names and units


@dataclass(frozen=True)
class Table:
    """What a text file holds.

    Attributes
    ----------
    name : str
        Of the file, for messages.
    header : tuple of str
        Comment and header lines before the first row, without their marks, at most `HEADER_LINES`.
    names : tuple of str
        One for each column if the last header line that can name them does; empty otherwise.
    rows : array, shape (N, C)
        NaN where a value is written as nan or left empty.
    lines : array of int, shape (N,)
        Line of each row in the file, from 1.
    notes : tuple of str
        How numbers were read where that is not plain.
    """

    name: str
    header: tuple[str, ...]
    names: tuple[str, ...]
    rows: Array
    lines: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The header as one line."""
        return " ".join(" ".join(self.header).split())

    def error(self, told: str, row: int | None = None) -> ValueError:
        """What is wrong with the file, or with one of its rows."""
        line = "" if row is None else f", line {self.lines[row]}"
        return ValueError(f"{self.name}{line}: {told}")


def decoded(content: bytes, name: str) -> str:
    """The text in UTF-8, in UTF-16 with a byte order mark, or in Latin-1; ValueError if it is no text."""
    try:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if re.search(r"[\x00-\x08\x0e-\x1a\x7f-\x84\x86-\x9f]", text):
        raise ValueError(f"{name} is neither vasprun.xml, JSON, .npz nor two-column text")
    return text.translate(PLAIN).replace("\r\n", "\n").replace("\r", "\n")


def read_table(content: Content) -> Table:
    """Read a file.

    Raises
    ------
    ValueError
        If a line cannot be read, rows differ in length, or there is no row; the line is named.
    """
    name, text = content.name, decoded(content.data, content.name)
    header, offset = _header(text)
    if offset is None:
        raise ValueError(f"{name} holds no numbers: expected two columns, energy (eV) and DOS (states/eV)")
    body = text[offset:]
    style = _Style.of(body, name, len(header) + 1)
    rows, lines = _fast(body, style, len(header) + 1) or _slow(body, style, name, len(header) + 1)
    texts = tuple(line.strip().lstrip(COMMENT_MARKS).strip() for line in header[-HEADER_LINES:])
    texts = tuple(line for line in texts if line)
    notes = ("decimal commas read as points",) if style.decimal_comma else ()
    return Table(name, texts, column_names(texts, rows.shape[1], style.separator), rows, lines, notes)


def counted(columns: int) -> str:
    """``"1 column"``, ``"2 columns"``."""
    return f"{columns} column{'' if columns == 1 else 's'}"


def is_number_like(word: str) -> bool:
    """Whether a word is, or was meant to be, a number."""
    return bool(NUMBER_START.match(word.strip("\"'")))


def _header(text: str) -> tuple[list[str], int | None]:
    """Lines before the first row, and where that starts in `text`; None if there is none."""
    header: list[str] = []
    offset = 0
    for line in io.StringIO(text):
        words = line.replace(",", " ").replace(";", " ").split()
        if words and words[0][0] not in COMMENT_MARKS and is_number_like(words[0]):
            return header, offset
        header.append(line)
        offset += len(line)
    return header, None


@dataclass(frozen=True)
class _Style:
    """How the rows of a file are written: what separates columns (None: blanks), and the decimal mark."""

    separator: str | None
    decimal_comma: bool = False

    @classmethod
    def of(cls, body: str, name: str, start: int) -> _Style:
        """Of the first hundred rows, as one style holds for a file."""
        sample = [line for line in map(_bare, body[:20000].splitlines()[:100]) if line]
        joined = "\n".join(sample)
        if "," not in (body if ";" in joined else joined):
            return cls(";" if ";" in joined else None)
        pointed = bool(re.search(r"\d\.|\.\d", joined))
        if ";" in joined:
            if pointed:
                what = "commas, points and semicolons in its numbers: write decimal points, and one separator"
                raise ValueError(f"{name}, line {start}: there are {what}")
            return cls(";", True)
        words = [line.split() for line in sample]
        pairs = all(len(row) > 1 for row in words) and not re.search(r",[ \t]|[ \t],|,$", joined, re.MULTILINE)
        if pairs and not pointed and all(DECIMAL_COMMA.fullmatch(word) for row in words for word in row):
            return cls(None, True)
        fields = [line.split(",") for line in sample]
        whole = not pointed and not re.search(r"[eEdD]|nan", joined) and all(len(row) > 2 for row in fields)
        if whole:
            what = f"{len(fields[0])} whole numbers between commas may be decimal commas"
            raise ValueError(f"{name}, line {start}: {what}: separate columns by semicolons, or write decimal points")
        return cls(",")

    def split(self, line: str) -> list[str]:
        """The words of a row; an empty one is a value that was left out."""
        if self.separator is None:
            return line.split()
        fields = [field.strip().strip("\"'") for field in line.split(self.separator)]
        return fields[:-1] if len(fields) > 1 and not fields[-1] else fields

    def number(self, word: str, where: str) -> float:
        """The number that a word is; ValueError that says where it stands if it is none."""
        if word.lower() in ("", "nan", "na", "n/a"):
            return math.nan
        plain = word.replace(",", ".") if self.decimal_comma else word
        if match := FORTRAN.fullmatch(plain):
            plain = f"{match[1]}e{match[2]}" if match[1] else f"{match[3]}e{match[4]}"
        found = f"{where}: {word[:40]!r}"
        if word.lower().lstrip("+-").startswith("inf") or (NUMBER.fullmatch(plain) and math.isinf(float(plain))):
            raise ValueError(f"{found} is infinite: write nan where the DOS is unknown")
        if NUMBER.fullmatch(plain):
            return float(plain)
        if word.startswith("*"):
            raise ValueError(f"{found} is a number that did not fit its field: write it with more digits")
        if not is_number_like(word):
            raise ValueError(f"{where}: expected numbers, found {word[:40]!r}")
        commas = "," in word and self.separator is None
        fix = ": separate columns by blanks or semicolons, and write decimal points" if commas else ""
        raise ValueError(f"{found} is not a number{fix}")


def _bare(line: str) -> str:
    """A line without the comment at its end."""
    return re.split(r"[#!]|//", line, maxsplit=1)[0].strip()


def _fast(body: str, style: _Style, start: int) -> tuple[Array, np.ndarray] | None:
    """Rows of a plain table, by numpy's parser; None if it is not plain."""
    if style.decimal_comma or re.search(r"[%@&\"']|inf", body, re.IGNORECASE):
        return None
    if re.search(r"[!#/]", body):
        body = re.sub(r"[ \t]*(?:[#!]|//).*", "", body)
    try:
        rows = np.loadtxt(io.StringIO(body), delimiter=style.separator, comments=None, ndmin=2)
    except ValueError:
        return None
    if np.isinf(rows).any():
        return None
    kept = [i for i, line in enumerate(io.StringIO(body), start=start) if line.strip()]
    return (rows, np.array(kept)) if len(kept) == len(rows) else None


def _slow(body: str, style: _Style, name: str, start: int) -> tuple[Array, np.ndarray]:
    """Rows, one by one, with an error for the first that cannot be read."""
    rows: list[list[float]] = []
    lines = []
    for number, line in enumerate(io.StringIO(body), start=start):
        if not line.strip() or line.strip()[0] in COMMENT_MARKS:
            continue
        words = style.split(_bare(line))
        rows.append([style.number(word, f"{name}, line {number}") for word in words])
        lines.append(number)
        if len(rows[-1]) != len(rows[0]):
            told = f"{counted(len(rows[-1]))}, but {len(rows[0])} in line {lines[0]}"
            raise ValueError(f"{name}, line {number}: {told}")
    return np.array(rows), np.array(lines)


def column_names(header: tuple[str, ...], count: int, separator: str | None) -> tuple[str, ...]:
    """The names of `count` columns in the last header line that has as many; empty if none has."""
    for line in reversed(header[-3:]):
        ways = [re.split(r"[,;]", line)] if separator in (",", ";") else []
        ways += [NAME.findall(line), re.split(r"\s{2,}|\t", line), line.split()]
        for names in ways:
            names = [name.strip().strip("\"'") for name in names]
            if len(names) == count and all(names) and not any(is_number_like(name) for name in names[:1]):
                return tuple(names)
    return ()
