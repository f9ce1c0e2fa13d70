"""The report of a run: what it says, that it needs no other file, and that a browser sorts its table."""

from __future__ import annotations

import re
import shutil
import subprocess
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import ase.io
import pytest
from typer.testing import CliRunner

pytest.importorskip("pydantic")

from pymatgen.core import Lattice, Structure

from dosmatgen_ase import report
from dosmatgen_ase.cli import app
from dosmatgen_ase.dos import TargetDOS
from dosmatgen_ase.flows.schemas import CandidateDoc, InverseDesignDoc
from dosmatgen_ase.plotting import plot_dos
from dosmatgen_ase.report import read_result, write_report, write_result

TARGET = TargetDOS.from_peaks([(-1.0, 8.0, 0.5)], window=(-5.0, 2.0)).on_grid()


def candidate(
    index: int, element: str, distance: float | None, energy: float | None, reason: str | None
) -> CandidateDoc:
    structure = Structure(Lattice.cubic(3.0), [element, "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return CandidateDoc(
        index=index,
        formula=f"{element}Au",
        generated=structure,
        record={"seed": 1},
        structure=structure,
        distance=distance,
        energy_per_atom=energy,
        achieved={} if distance is None else {"0": replace(TARGET, values=TARGET.values * (1 - distance))},
        engine="<b>an engine</b>",
        directory="/somewhere/else" if index == 0 else None,
        reason=reason,
    )


@pytest.fixture
def result() -> InverseDesignDoc:
    return InverseDesignDoc(
        targets={"0": TARGET},
        candidates=[
            candidate(0, "Ni", 0.1, -3.0, None),
            candidate(2, "Co", 0.3, -5.0, None),
            candidate(3, "Pd", 0.5, None, None),
            candidate(1, "Fe", None, None, "SCF <did> not converge"),
        ],
        generation={"settings": {"seed": 1}},
    )


class Page(HTMLParser):
    """Text, links and sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_prediction_is_not_called_a_computation(result: InverseDesignDoc, tmp_path: Path) -> None:
    engines = ("forward model", "Quantum ESPRESSO", "forward model", None)
    candidates = [c.model_copy(update={"engine": e}) for c, e in zip(result.candidates, engines, strict=True)]
    page = Page(write_report(result.model_copy(update={"candidates": candidates}), tmp_path / "r.html").read_text())
    said = " ".join(page.words)
    assert "3 with a DOS by Quantum ESPRESSO and the forward model (predicted, not computed); the best" in said
    assert "computed DOS" not in said


def test_the_report_tells_all_and_needs_no_other_file(result: InverseDesignDoc, tmp_path: Path) -> None:
    text = write_report(result, tmp_path / "report.html").read_text()
    page = Page(text)
    said = " ".join(page.words)
    assert "4 candidates, 3 with a DOS by <b>an engine</b>; the best is NiAu at a distance of 0.100" in said
    assert "SCF <did> not converge" in said
    assert "did" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("img") == 1 + 2 * 3
    outside = [link for link in page.links if not link.startswith(("data:", "#"))]
    assert len(outside) == 1
    assert outside[0].endswith("somewhere/else")


@pytest.mark.parametrize(("directory", "link"), [("myhost:/far/away", "far/away"), ("/my:disk/run", "my:disk/run")])
def test_the_link_to_a_calculation_is_a_path(
    result: InverseDesignDoc, tmp_path: Path, directory: str, link: str
) -> None:
    result.candidates[0].directory = directory  # abinit's come from atomate2, with the host
    links = [unquote(x) for x in Page(write_report(result, tmp_path / "r.html").read_text()).links]
    (outside,) = [x for x in links if x.endswith(link)]
    assert (tmp_path / outside).resolve() == Path("/", link)


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{", "javascript:alert(1)", "a'b&lt;"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_a_hostile_result_are_text(result: InverseDesignDoc, tmp_path: Path, name: str) -> None:
    def write(name: str) -> Page:
        best, lost = result.candidates[0], result.candidates[-1]
        best.formula = best.engine = best.relaxation = best.known_as = best.directory = name
        lost.formula = lost.reason = result.version = name
        return Page(write_report(result, tmp_path / "r.html").read_text())

    page = write(name)
    assert page.tags == write("Au").tags
    assert name in "".join(page.words)
    assert all(link.startswith(("data:", "#", "./")) for link in page.links)


@pytest.mark.parametrize("folder", ["javascript:alert(1)", "x:y", "//host/a", "h:javascript:alert(1)", "a b%2e#c?d"])
def test_a_link_is_a_path_below_the_report(result: InverseDesignDoc, tmp_path: Path, folder: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    result.candidates[0].directory = str(home / folder)
    page = Page(write_report(result, home / "r.html").read_text())
    (link,) = [link for link in page.links if not link.startswith(("data:", "#"))]
    assert link.startswith("./")
    assert not urlsplit(link).scheme
    assert not urlsplit(link).netloc
    assert (home / unquote(urlsplit(link).path)).resolve() == (home / folder).resolve()


def test_the_policy_allows_the_script_and_the_style_of_the_page(result: InverseDesignDoc, tmp_path: Path) -> None:
    text = write_report(result, tmp_path / "r.html").read_text()
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_a_run_in_which_nothing_went_well_has_a_report(result: InverseDesignDoc, tmp_path: Path) -> None:
    failed = result.model_copy(update={"candidates": result.candidates[-1:]})
    said = " ".join(Page(write_report(failed, tmp_path / "report.html").read_text()).words)
    assert "1 candidates, 0 with a DOS." in said
    assert "None has a DOS" in said


def test_a_candidate_without_distance_and_reason_is_told(result: InverseDesignDoc, tmp_path: Path) -> None:
    result.candidates.append(candidate(4, "Cu", None, None, None))
    said = " ".join(" ".join(Page(write_report(result, tmp_path / "r.html").read_text()).words).split())
    assert "5 candidates, 3 with a DOS by" in said
    assert "CuAu #4 no distance is known" in said


@pytest.mark.parametrize(
    ("targets", "achieved", "fault"),
    [
        ({"0": TARGET}, {}, "has a distance, but no DOS for the target of site 0"),
        ({"7": TARGET}, {"7": TARGET}, "has no site 7, for which there is a target"),
        ({"x": TARGET}, {"x": TARGET}, "has no site x"),
        ({"0": TARGET}, {"0": replace(TARGET, kind="total")}, "has a total DOS for the target of site 0"),
    ],
)
def test_a_candidate_that_does_not_fit_the_targets_is_named(
    targets: dict[str, TargetDOS], achieved: dict[str, TargetDOS], fault: str, tmp_path: Path
) -> None:
    wrong = candidate(5, "Ni", 0.1, None, None).model_copy(update={"achieved": achieved})
    with pytest.raises(ValueError, match=rf"^candidate 5 \(NiAu\) {fault}.*leave it out$"):
        write_report(InverseDesignDoc(targets=targets, candidates=[wrong], generation={}), tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_target_of_the_cell_has_a_report(result: InverseDesignDoc, tmp_path: Path) -> None:
    total = replace(TARGET, kind="total")
    best = result.candidates[0].model_copy(update={"achieved": {"total": total}})
    page = Page(
        write_report(
            InverseDesignDoc(targets={"total": total}, candidates=[best], generation={}), tmp_path / "r.html"
        ).read_text()
    )
    assert page.tags.count("img") == 3


def test_curves_are_drawn_as_they_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A total whose Fermi level lies in the gap, and the same crystal's DOS of DFT, whose zero is the valence band."""
    drawn: list[list[TargetDOS]] = []

    def look(curves: TargetDOS | list[TargetDOS], labels: list[str]) -> Any:
        drawn.append(curves if isinstance(curves, list) else [curves])
        return plot_dos(curves, labels)

    monkeypatch.setattr(report, "plot_dos", look)
    bands = [(-1.0, 6.0, 0.2), (4.0, 6.0, 0.2)]
    made = TargetDOS.from_peaks(bands, window=(-8, 6), kind="total", reference="fermi").aligned()
    target = replace(made.on_grid(sigma=0.3).shift(-1.5), reference="fermi")
    best = candidate(0, "Ni", 0.0, None, None).model_copy(update={"achieved": {"total": made}})
    write_report(InverseDesignDoc(targets={"total": target}, candidates=[best], generation={}), tmp_path / "r.html")
    tops = [[float(dos.energies[dos.values.argmax()]) for dos in curves] for curves in drawn]
    assert sorted(map(len, tops)) == [1, 2]
    assert max(abs(top - tops[0][0]) for pair in tops for top in pair) < 0.11
    assert {dos.sigma for curves in drawn for dos in curves} == {0.3}


def test_a_result_folder_is_read_again(result: InverseDesignDoc, tmp_path: Path) -> None:
    write_result(result, tmp_path / "run")
    again = read_result(tmp_path / "run" / "result.json")
    assert again.model_dump_json() == result.model_dump_json()
    frames = ase.io.read(tmp_path / "run" / "candidates.extxyz", ":")
    assert [frame.info["index"] for frame in frames] == [0, 2, 3, 1]
    assert frames[0].info["distance"] == pytest.approx(0.1)
    assert frames[3].info["reason"] == "SCF <did> not converge"


def test_the_command_line_makes_the_report(result: InverseDesignDoc, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(result.model_dump_json())
    done = CliRunner().invoke(app, ["report", str(file)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_text() == write_report(result, tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    ("content", "out", "fragment"),
    [
        (None, "report.html", "no result"),
        ("{", "report.html", "is not the result of an inverse-design run"),
        ('{"a": 1}', "report.html", "is not the result of an inverse-design run"),
        ("{}", "report.txt", "must end in .html"),
        ("{}", "nowhere/report.html", "does not exist, create it"),
    ],
)
def test_wrong_files_give_one_line(content: str | None, out: str, fragment: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    done = CliRunner().invoke(app, ["report", str(file), "-o", str(tmp_path / out)])
    assert done.exit_code == 1
    assert fragment in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_sorts_the_table(result: InverseDesignDoc, tmp_path: Path) -> None:
    path = write_report(result, tmp_path / "report.html")
    clicks = ["distance", "energy", "energy", "formula"]
    script = f"""
    const rows = document.querySelector("tbody").rows
    const order = () => [...rows].map(row => row.cells[0].textContent.slice(0, 2)).join()
    const orders = [order()]
    for (const name of {clicks}) {{
      [...document.querySelectorAll("th button")].find(button => button.textContent === name).click()
      orders.push(order())
    }}
    document.title = orders.join(" ")
    """
    policy = '<meta http-equiv="Content-Security-Policy"[^>]*>'
    page = re.sub(policy, "", path.read_text())  # it would refuse the script of this test
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(["chromium", *options, path.as_uri()], capture_output=True, text=True, check=True)
    title = re.search("<title>(.*)</title>", done.stdout)
    # As written; distance down; energy up and down, what has none comes last; formula up.
    assert title is not None
    assert title[1].split() == ["Ni,Co,Pd", "Pd,Co,Ni", "Co,Ni,Pd", "Ni,Co,Pd", "Co,Ni,Pd"]
