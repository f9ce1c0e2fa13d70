"""Structures of other databases: against the reference server of OPTIMADE, and against servers that misbehave."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.formula import Formula
from typer.testing import CliRunner

from dosmatgen_ase.cli import app
from dosmatgen_ase.retrieval import optimade
from dosmatgen_ase.retrieval.index import DOSIndex
from dosmatgen_ase.retrieval.optimade import read_optimade

pytest.importorskip("optimade.client")

LEFT_HANDED = Atoms(
    "NiAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[[2.9, 0, 0], [0, 0, 2.9], [0, 2.9, 0]], pbc=True
)
CRYSTALS = {
    "cu": bulk("Cu"),
    "mgo": bulk("MgO", "rocksalt", a=4.21),
    "nial": LEFT_HANDED,
    "si": bulk("Si"),
    "zns": bulk("ZnS", "zincblende", a=5.41),
}


def entry(name: str, atoms: Atoms, **changes: Any) -> dict[str, Any]:
    """A structure as OPTIMADE wants it."""
    symbols = atoms.get_chemical_symbols()
    counts = Formula(atoms.get_chemical_formula()).count()
    elements = sorted(counts)
    names = dict(zip(sorted(counts, key=lambda s: -counts[s]), "ABCDEFG", strict=False))
    number = {s: "" if counts[s] == 1 else str(counts[s]) for s in counts}
    reduced = {s: "" if n == 1 else str(n) for s, n in Formula(str(atoms.symbols)).reduce()[0].count().items()}
    attributes = {
        "elements": elements,
        "nelements": len(elements),
        "elements_ratios": [counts[s] / len(symbols) for s in elements],
        "chemical_formula_descriptive": "".join(s + number[s] for s in elements),
        "chemical_formula_reduced": "".join(s + reduced[s] for s in elements),
        "chemical_formula_anonymous": "".join(names[s] + reduced[s] for s in names),
        "dimension_types": [int(p) for p in atoms.pbc],
        "nperiodic_dimensions": int(sum(atoms.pbc)),
        "lattice_vectors": atoms.cell.tolist() if atoms.pbc.any() else [[None] * 3] * 3,
        "cartesian_site_positions": atoms.positions.tolist(),
        "nsites": len(symbols),
        "species": [{"name": s, "chemical_symbols": [s], "concentration": [1.0]} for s in elements],
        "species_at_sites": symbols,
        "structure_features": [],
        "last_modified": "2026-01-01T00:00:00Z",
        **changes,
    }
    return {"type": "structures", "id": name, "attributes": attributes}


def shared_site() -> dict[str, Any]:
    """Copper and gold on one site."""
    mixed = {"name": "Cu", "chemical_symbols": ["Cu", "Au"], "concentration": [0.5, 0.5]}
    return entry("mixed", bulk("Cu"), species=[mixed], structure_features=["disorder"], elements=["Au", "Cu"],
                 nelements=2, elements_ratios=[0.5, 0.5], chemical_formula_reduced="AuCu",
                 chemical_formula_anonymous="AB", chemical_formula_descriptive="AuCu")  # fmt: skip


def dense() -> dict[str, Any]:
    """A crystal that the screen refuses."""
    return entry("dense", Atoms("Fe", cell=np.eye(3), pbc=True))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of the reference server with its store in memory, two structures a page."""
    folder = tmp_path_factory.mktemp("optimade")
    water = entry("water", molecule("H2O"))
    entries = [*(entry(name, atoms) for name, atoms in CRYSTALS.items()), shared_site(), water, dense()]
    lines = [{"x-optimade": {"api_version": "1.1.0"}}, *entries]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {
        "database_backend": "mongomock",
        "insert_test_data": False,
        "insert_from_jsonl": str(folder / "data.jsonl"),
        "page_limit": 2,
        "provider": {"prefix": "exmpl", "name": "Example", "description": "of a test", "homepage": "https://e.xample"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    listening = socket.create_server(("127.0.0.1", 0))  # what is asked before it is ready waits in the queue
    with listening, (folder / "log").open("w") as log:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        run = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "optimade.server.main:app", "--fd", str(listening.fileno())],
            pass_fds=[listening.fileno()],
            env={**os.environ, "OPTIMADE_CONFIG_FILE": str(folder / "config.json"), "HOME": str(folder)},
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        yield url
    finally:
        run.terminate()
        run.wait()


def test_crystals_come_whole_and_others_are_counted(server: str) -> None:
    found = read_optimade(server)
    assert {a.info["material_id"] for a in found.crystals} == {f"exmpl:{name}" for name in CRYSTALS}
    for atoms in found.crystals:
        given = CRYSTALS[atoms.info["material_id"].removeprefix("exmpl:")]
        assert atoms.pbc.all()
        assert atoms.cell.volume > 0
        assert atoms.numbers.tolist() == given.numbers.tolist()
        np.testing.assert_allclose(atoms.get_all_distances(mic=True), given.get_all_distances(mic=True), atol=1e-9)
    assert found.skipped == {
        "exmpl:mixed": "disordered: sites are shared or partly empty",
        "exmpl:water": "not periodic in all three directions",
        "exmpl:dense": "1 A^3 per atom, less than 2",
    }
    assert found.source["url"] == server
    assert found.source["provider"] == "Example"
    assert found.source["homepage"] == "https://e.xample/"
    assert found.source["licence"] is None
    assert found.source["available"] == 8


def test_filter_and_limit(server: str) -> None:
    oxide = read_optimade(f"{server}/v1/structures", 'elements HAS "O" AND nsites=2')  # as copied from a browser
    assert [a.info["material_id"] for a in oxide.crystals] == ["exmpl:mgo"]
    first = read_optimade(server, limit=3)
    assert len(first.crystals) + len(first.skipped) == 3  # of two pages with two each
    assert first.source["available"] == 8


def test_index_of_a_database_is_searched(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_retrieval import StandIn  # a forward model that costs nothing

    from dosmatgen_ase.retrieval import build

    monkeypatch.setattr(build.DOSPredictor, "load", lambda path: StandIn())
    made = CliRunner().invoke(
        app,
        ["index", "--from-optimade", server, "--filter", "nsites<=2", "--limit", "4", "-o", str(tmp_path / "o.npz")],
    )
    assert made.exit_code == 0, made.output
    assert "4 structures from Example" in made.output
    assert "structures fit: raise --limit" in made.output
    assert not (tmp_path / "o-parts").exists()
    index = DOSIndex.load(tmp_path / "o.npz")
    assert set(index.material_id) <= {f"exmpl:{name}" for name in CRYSTALS}
    assert index.info["source"]["url"] == server
    nickel = Path(__file__).parents[1] / "data" / "ni_in_au3ni.npz"
    told = CliRunner().invoke(app, ["search", str(nickel), "--site", "3", "--index", str(tmp_path / "o.npz")])
    assert told.exit_code == 0, told.output
    assert "exmpl:" in told.output
    assert f"structures: Example ({server}" in " ".join(told.output.split())


# -- servers that misbehave --------------------------------------------------------------------------------------------

Answer = tuple[int, Any] | None  # status and body; None: no answer at all


@contextmanager
def answering(answer: Callable[[str, int], Answer]) -> Iterator[str]:
    """A server that answers the n-th request for a path, counted from 0, as told."""
    asked: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            n = asked.get(self.path, 0)
            asked[self.path] = n + 1
            told = answer(self.path, n)
            if told is None:
                time.sleep(0.6)
                return
            status, body = told
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def page(entries: list[dict[str, Any]], following: str | None = None, **meta: Any) -> Answer:
    return 200, {"data": entries, "links": {"next": following}, "meta": {"data_available": 100, **meta}}


@pytest.fixture(autouse=True)
def patient_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib3.util.Retry.get_backoff_time", lambda self: 0.0)


@pytest.mark.parametrize(
    ("told", "licence"),
    [
        ({"license": {"href": "https://e.xample/licence"}, "available_licenses": None}, "https://e.xample/licence"),
        ({"license": "https://e.xample", "available_licenses": ["CC-BY-4.0", "MIT"]}, "CC-BY-4.0, MIT"),
        ({}, None),
    ],
)
def test_the_licence_is_kept(told: dict[str, Any], licence: str | None) -> None:
    def answer(path: str, n: int) -> Answer:
        return (200, {"data": {"attributes": told}}) if "info" in path else page([entry("cu", bulk("Cu"))])

    with answering(answer) as url:
        assert read_optimade(url).source["licence"] == licence


def test_a_busy_server_is_asked_again() -> None:
    with answering(lambda path, n: (503, b"later") if n < 2 else page([entry("cu", bulk("Cu"))])) as url:
        assert [a.info["material_id"] for a in read_optimade(url).crystals] == ["cu"]  # it names no provider


def test_an_interrupted_download_goes_on(tmp_path: Path) -> None:
    asked: list[str] = []
    down = True

    def answer(path: str, n: int) -> Answer:
        asked.append(path)
        number = int(match[1]) if (match := re.search(r"page=(\d)", path)) else 0
        if "info" in path or (number == 2 and down):
            return 404, {"errors": [{"title": "Not found", "detail": "out of order"}]}
        name = list(CRYSTALS)[number]
        return page([entry(name, CRYSTALS[name])], f"{url}/v1/structures?page={number + 1}" if number < 3 else None)

    with answering(answer) as url:
        with pytest.raises(ConnectionError, match=r"out of order; 2 structures are there, the same call goes on"):
            read_optimade(url, parts=tmp_path)
        down = False
        asked.clear()
        found = read_optimade(url, parts=tmp_path)
        assert [a.info["material_id"] for a in found.crystals] == list(CRYSTALS)[:4]
        assert [path for path in asked if "info" not in path] == ["/v1/structures?page=2", "/v1/structures?page=3"]
        asked.clear()
        assert len(read_optimade(url, parts=tmp_path).crystals) == 4
        assert all("info" in path for path in asked)  # the structures are not asked for again
        for spoilt in ("{", "null", "{}", '{"entries": null, "next": null}'):  # written by something else
            sorted(tmp_path.glob("page-*"))[2].write_text(spoilt)
            assert len(read_optimade(url, parts=tmp_path).crystals) == 4


def test_what_a_database_tells_oddly_of_itself_is_passed_over() -> None:
    with answering(lambda path, n: page([entry("cu", bulk("Cu"))], data_returned="12", provider="us")) as url:
        found = read_optimade(url)
    assert [a.info["material_id"] for a in found.crystals] == ["cu"]
    assert (found.source["available"], found.source["provider"]) == (None, None)


def test_odd_structures_are_told_one_by_one() -> None:
    twice = entry("cu", bulk("Cu"))
    hidden = entry("hidden", bulk("Cu"), species=[{"name": "Cu", "chemical_symbols": ["Cu"], "concentration": [0.9]}])
    loose = entry("loose", bulk("Cu"), structure_features=["implicit_atoms"])
    odd = [twice, twice, hidden, loose, {"id": "empty"}, entry("short", bulk("MgO", "rocksalt", a=4.2), nsites=7)]
    with answering(lambda path, n: page(odd)) as url:
        found = read_optimade(url)
    assert len(found.crystals) == 1
    assert found.skipped["hidden"].startswith("disordered")
    assert found.skipped["loose"] == "some atoms have no position"
    assert found.skipped["empty"] == "not periodic in all three directions"
    assert found.skipped["short"].startswith("not readable")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda path, n: (200, b"<html>welcome</html>"), "does not answer as an OPTIMADE database"),
        (lambda path, n: (200, {"data": {"id": "one"}}), "lists no structures"),
        (lambda path, n: (400, {"errors": [{"title": "Bad Request", "detail": "unknown field"}]}), "unknown field"),
        (lambda path, n: (429, b"slow down"), "429"),
        (lambda path, n: None, "does not answer"),
    ],
)
def test_servers_that_refuse(answer: Callable[[str, int], Answer], told: str) -> None:
    with answering(answer) as url, pytest.raises(ConnectionError, match=told):
        read_optimade(url, timeout=0.2, retries=1)


def test_nothing_fits() -> None:
    with answering(lambda path, n: page([])) as url, pytest.raises(ValueError, match="no structure that fits"):
        read_optimade(url, "nsites=3")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"url": "optimade.example.org"}, "begins with https://"),
        ({"filter": "nsites=<8"}, "is not understood"),
        ({"limit": 0}, "limit=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_arguments_that_are_wrong(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        read_optimade(**{"url": "http://127.0.0.1:9", **change})


def test_without_the_package_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimade.client", None)
    with pytest.raises(ImportError, match=r'pip install "dosmatgen-ase\[optimade\]"'):
        optimade.read_optimade("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give STRUCTURES or --from-optimade URL"),
        (["a.cif", "--from-optimade", "http://127.0.0.1:9"], "one of the two"),
        (["a.cif", "--filter", "nsites=2"], "--filter is for a database"),
    ],
)
def test_the_command_takes_one_source(arguments: list[str], told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["index", *arguments, "-o", str(tmp_path / "o.npz")])
    assert result.exit_code == 1
    assert told in " ".join(result.output.split())
