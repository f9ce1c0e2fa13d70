"""The known error of the labels: a random draw of them recomputed at 75 Ry on meshes twice as dense.

python benchmarks/label_error.py                                   # about an hour on one core; goes on where it was
python benchmarks/label_error.py --vasp PATH/dos_mp_elements.npz   # and the labels that are elements against VASP

**The draw.** 40 labels, shared out over the three densities of the DOS mesh (3.0, 2.5 and 2.0 points per A^-1, by
symmetry) as all labels are, at least 2 each. Within each the order is that of a random number made from the seed and
the id, so that new labels hardly change the draw. Labels whose dense calculation is estimated above `--max-cost`
seconds are passed over and counted: large cells of low symmetry with heavy elements are missing. Those that are still
of an earlier recipe than the latest (with as many labels as are drawn) are left out and counted. Where a drawn
structure has a label of an earlier recipe, too, that one is measured beside it, which gives the error of the whole set.
The worst are computed with cut-off, SCF mesh and DOS mesh raised one at a time, which tells what their error is of.

Results of single structures are kept in runs/label_error; --report makes the tables of those that are there, computing
nothing. The draw that was asked for and what was computed of it both stand in the results.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, ROOT
from _tables import write_results
from _targets import rng_for
from ase import Atoms
from electronic import OCCUPIED, SHIFTS, in_shape, vasp_elements
from tqdm import tqdm

from dosmatgen_ase.data import SiteDOSLabels, load_site_dos
from dosmatgen_ase.dft.batch import compute_many
from dosmatgen_ase.dft.interpolation import IrreducibleMesh
from dosmatgen_ase.dft.result import ElectronicStructure
from dosmatgen_ase.dft.settings import MAGNETIC, EspressoSettings, dos_kpoint_density
from dosmatgen_ase.dos import MODEL_GRID, normalised_l1_arrays

CUTOFF = 75.0  # Ry
SETTINGS = ("ecutwfc", "scf_kpoint_density", "dos_kpoint_density")  # that make the error
SECONDS = 3.4e-4  # per k-point, spin, band and A^3 at 75 Ry, on a core that made labels; an SCF costs 4 such sweeps


def dense_settings(atoms: Atoms) -> EspressoSettings:
    """What the labels are measured against."""
    own = EspressoSettings().resolved(atoms)
    assert own.scf_kpoint_density is not None
    assert own.dos_kpoint_density is not None
    return EspressoSettings(CUTOFF, 2 * own.scf_kpoint_density, 2 * own.dos_kpoint_density, time_limit=1800.0)


def cost(atoms: Atoms, num_electrons: float) -> float:
    """Estimated seconds of the dense calculation."""
    bands = num_electrons / 2 + 2 + 3 * len(atoms)
    spins = 2 if set(atoms.symbols) & set(MAGNETIC) else 1
    settings = dense_settings(atoms)
    meshes = ((settings.dos_kpoint_density, 1), (settings.scf_kpoint_density, 4))
    sweeps = sum(n * len(IrreducibleMesh.of(atoms, density).points) for density, n in meshes)
    return SECONDS * sweeps * spins * bands * atoms.get_volume()


def electron_counts(directory: Path) -> dict[str, float]:
    """Valence electrons of every label."""
    counts: dict[str, float] = {}
    for path in sorted(directory.glob("*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            counts |= dict(zip(shard["material_id"].tolist(), shard["num_electrons"].tolist(), strict=True))
    return counts


def draw(
    labels: SiteDOSLabels, electrons: dict[str, float], n: int, seed: int, max_cost: float
) -> tuple[list[int], dict[str, Any]]:
    """Rows of `n` labels, and how they were drawn."""
    density = np.array([dos_kpoint_density(labels.atoms(i)) for i in range(len(labels))])
    order = np.argsort([rng_for(seed, name).random() for name in labels.material_id.tolist()])
    strata_rows = {level: order[density[order] == level] for level in (3.0, 2.5, 2.0)}
    rows, strata = [], {}
    for level, wanted in _quotas(n, {level: len(inside) for level, inside in strata_rows.items()}).items():
        inside, passed = strata_rows[level], 0
        taken: list[int] = []
        for i in inside.tolist():
            if len(taken) == wanted:
                break
            if cost(labels.atoms(i), electrons[str(labels.material_id[i])]) <= max_cost:
                taken.append(i)
            else:
                passed += 1
        rows += taken
        strata[f"{level:g}"] = {"labels": len(inside), "drawn": len(taken), "passed_over": passed}
    rows.sort(key=order.tolist().index)  # a part of them is a random draw too
    return rows, {"seed": seed, "max_cost": max_cost, "strata": strata}


def _quotas(n: int, sizes: dict[float, int]) -> dict[float, int]:
    """Share out `n` in proportion to the sizes by largest remainder, but at least 2 each where there are as many."""
    exact = {level: n * size / sum(sizes.values()) for level, size in sizes.items()}
    quotas = {level: min(size, max(2, int(exact[level]))) for level, size in sizes.items()}
    for level in sorted(exact, key=lambda level: int(exact[level]) - exact[level]):
        quotas[level] += int(sum(quotas.values()) < min(n, sum(sizes.values())) and quotas[level] < sizes[level])
    return quotas


def dense(atoms: Atoms, name: str, folder: Path) -> ElectronicStructure | str:
    """Compute one structure, or read it back; the reason where it failed."""
    result = compute_many({name: atoms}, folder, dense_settings(atoms))[name]
    return result if isinstance(result, ElectronicStructure) else str(result)


def error_by(setting: str, labels: SiteDOSLabels, i: int, folder: Path) -> float | None:
    """What of a label's error one setting makes: its distance to a calculation that is dense in that one alone."""
    name, atoms = str(labels.material_id[i]), labels.atoms(i)
    raised = dense_settings(atoms)
    settings = EspressoSettings(**{setting: getattr(raised, setting)}, time_limit=raised.time_limit)
    result = compute_many({name: atoms}, folder / setting, settings)[name]
    return compare(labels, i, result)["l1"] if isinstance(result, ElectronicStructure) else None


def compare(labels: SiteDOSLabels, i: int, result: ElectronicStructure) -> dict[str, Any]:
    """Normalised L1 of each site of a label to the dense result, and where it comes from.

    The shift is the rigid one that fits best: what it removes is an error of the zero of energy, not of the shape.
    """
    atoms, sites = labels.atoms(i), [site.on_grid() for site in result.sites]
    theirs, values = np.array([site.values for site in sites]), labels.values[i, : labels.num_atoms[i]].astype(float)
    known = np.array([site.known for site in sites]) & labels.known[i]
    error = normalised_l1_arrays(values, theirs, known)

    def shifted(shift: float) -> float:
        moved = [dos.shift(shift).on_grid() for dos in labels.targets(i)]
        both = known & np.array([dos.known for dos in moved])
        return float(np.nanmean(normalised_l1_arrays(np.array([dos.values for dos in moved]), theirs, both)))

    tried = [shifted(float(s)) for s in SHIFTS]
    difference = np.where(known, np.abs(values - theirs), 0.0).sum(0)
    return {
        "id": str(labels.material_id[i]),
        "formula": atoms.get_chemical_formula(),
        "num_atoms": len(atoms),
        "density": dos_kpoint_density(atoms),
        "l1_sites": [float(x) for x in error],
        "l1": float(np.nanmean(error)),
        "l1_occupied": float(np.nanmean(normalised_l1_arrays(values, theirs, known & OCCUPIED))),
        "l1_shifted": min(tried),
        "shift": float(SHIFTS[int(np.argmin(tried))]),
        "worst_energy": float(MODEL_GRID.energies[int(difference.argmax())]),
        "gap": result.band_gap,
        "label_gap": float(labels.band_gap[i]),
        "magnetic_moment": result.magnetic_moment,
    }


def against_vasp(labels: SiteDOSLabels, path: Path) -> list[dict[str, Any]]:
    """Distance in shape of the first site of every label that VASP computed too."""
    table = []
    for name, (_, theirs) in vasp_elements(path).items():
        found = np.flatnonzero(labels.material_id == name)
        if not found.size:
            continue
        ours = labels.targets(int(found[0]))[0]
        everywhere = np.ones_like(OCCUPIED)
        tried = [in_shape(ours.shift(float(s)), theirs, everywhere) for s in SHIFTS]
        shift = float(SHIFTS[int(np.argmin(tried))])
        table.append(
            {
                "id": name,
                "formula": labels.atoms(int(found[0])).get_chemical_formula(),
                "l1": in_shape(ours, theirs, everywhere),
                "l1_shifted": min(tried),
                "shift": shift,
                "l1_occupied_shifted": in_shape(ours.shift(shift), theirs, OCCUPIED),
            }
        )
    return table


def recipes_in(directory: Path) -> set[int]:
    """Recipes of the shards of known crystals."""
    recipes = set()
    for path in directory.glob("*.npz"):
        with np.load(path, allow_pickle=False) as shard:
            if "origin" not in shard or (shard["origin"] == "given").any():
                recipes.add(int(shard["recipe"]) if "recipe" in shard else 1)
    return recipes


def by_recipe(directory: Path, latest: SiteDOSLabels, results: dict[str, ElectronicStructure]) -> dict[str, Any]:
    """Median error of the sites by every recipe on the structures computed, and by all as the set holds them.

    Structures that were drawn may have been computed anew before others, so the set's figures are not those of the
    labels that they happen to have: each recipe counts by its share of the set.
    """
    table, errors, weights = {}, [], []
    for recipe in sorted(recipes_in(directory)):
        theirs = load_site_dos(directory, recipe)
        rows = [i for i, name in enumerate(theirs.material_id) if str(name) in results]
        if rows:
            found = [x for i in rows for x in compare(theirs, i, results[str(theirs.material_id[i])])["l1_sites"]]
            share = float(np.mean(latest.recipe == recipe))
            table[str(recipe)] = {
                "share": share,
                "structures": len(rows),
                "quartiles": np.nanquantile(found, [0.25, 0.5, 0.75]).tolist(),
            }
            known = [x for x in found if math.isfinite(x)]
            errors += known
            weights += [share / len(known)] * len(known)
    quartiles = np.quantile(errors, [0.25, 0.5, 0.75], weights=weights, method="inverted_cdf")
    return table | {"all": {"share": sum(r["share"] for r in table.values()), "quartiles": quartiles.tolist()}}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Median and quartiles over the sites."""
    figures: dict[str, Any] = {}
    for level in ("all", *report["draw"]["strata"]):
        rows = [r for r in report["labels"] if level in ("all", f"{r['density']:g}")]
        sites = np.array([x for r in rows for x in r["l1_sites"]])
        if not rows:
            continue
        figures[level] = {
            "structures": len(rows),
            "sites": len(sites),
            "quartiles": np.nanquantile(sites, [0.25, 0.5, 0.75]).tolist(),
            "p90": float(np.nanquantile(sites, 0.9)),
            "max": float(np.nanmax(sites)),
            "structure_median": float(np.median([r["l1"] for r in rows])),
            "structure_median_occupied": float(np.median([r["l1_occupied"] for r in rows])),
            "structure_median_shifted": float(np.median([r["l1_shifted"] for r in rows])),
        }
    return figures


def mesh_table(report: dict[str, Any]) -> list[str]:
    """Error by the density of the label's mesh."""
    lines = [
        "| DOS mesh, points per A^-1 | structures | sites | median | quartiles | 90 % | worst | occupied | shifted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for level, f in report["summary"].items():
        low, median, high = f["quartiles"]
        lines.append(
            f"| {level} | {f['structures']} | {f['sites']} | **{median:.3f}** | {low:.3f} to {high:.3f} | "
            f"{f['p90']:.3f} | {f['max']:.3f} | {f['structure_median_occupied']:.3f} | "
            f"{f['structure_median_shifted']:.3f} |"
        )
    how = report["draw"]
    passed = sum(s["passed_over"] for s in how["strata"].values())
    current = how["drawn"] - how["of_earlier_recipes"]
    return [
        *lines,
        "",
        "Normalised L1 of the sites to a calculation at 75 Ry with the meshes twice as dense (SCF and DOS), at sigma "
        "0.2 eV. Occupied (below the zero of energy) and shifted (after the best rigid shift): medians over "
        f"structures. {current} of {how['drawn']} drawn labels are of recipe {how['recipe']}, {len(report['labels'])} "
        f"of them computed; {passed} were passed over as too costly. By cut-off, SCF mesh, DOS mesh: how far that one "
        "alone, raised, takes a label.",
    ]


def worst_table(rows: list[dict[str, Any]]) -> list[str]:
    """The labels with the largest errors, and where these come from."""
    lines = [
        "| worst | | atoms | normalised L1 | by cut-off | SCF mesh | DOS mesh | occupied | shifted (by, eV) | "
        "most at | gap (label), eV |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: -r["l1"])[:8]:
        by = " | ".join(_figure(r.get(f"l1_{setting}")) for setting in SETTINGS)
        lines.append(
            f"| {r['id']} | {r['formula']} | {r['num_atoms']} | {r['l1']:.3f} | {by} | {r['l1_occupied']:.3f} | "
            f"{r['l1_shifted']:.3f} ({r['shift']:+.2f}) | {r['worst_energy']:+.1f} | "
            f"{r['gap']:.2f} ({r['label_gap']:.2f}) |"
        )
    return lines


def recipe_table(recipes: dict[str, Any]) -> list[str]:
    """Error by recipe, and of the set."""
    lines = ["| recipe | share of the set | structures | median | quartiles |", "|---|---|---|---|---|"]
    for recipe, row in recipes.items():
        low, median, high = row["quartiles"]
        lines.append(
            f"| {recipe} | {row['share']:.0%} | {row.get('structures', '')} | {median:.3f} | {low:.3f} to {high:.3f} |"
        )
    told = "Labels of the drawn structures by every recipe that computed them; all: each by its share of the set."
    return [*lines, "", told]


def vasp_table(rows: list[dict[str, Any]]) -> list[str]:
    """Elements against VASP."""
    medians = [np.median([r[key] for r in rows]) for key in ("l1", "l1_shifted", "l1_occupied_shifted")]
    return [
        "| element | | shape against VASP | shifted (by, eV) | occupied, shifted |",
        "|---|---|---|---|---|",
        *(
            f"| {r['id']} | {r['formula']} | {r['l1']:.3f} | {r['l1_shifted']:.3f} ({r['shift']:+.2f}) | "
            f"{r['l1_occupied_shifted']:.3f} |"
            for r in rows
        ),
        "",
        "Labels that are elements against VASP's projections (Materials Project), both with as many states in the "
        f"energies compared. Median {medians[0]:.3f}, {medians[1]:.3f} after the best rigid shift, "
        f"{medians[2]:.3f} in the occupied states of it: spheres that miss charge unevenly and another Fermi "
        "level, on top of the error above.",
    ]


def markdown(report: dict[str, Any]) -> str:
    """The tables and how to read them."""
    lines = [*mesh_table(report), "", *worst_table(report["labels"]), "", *recipe_table(report["recipes"])]
    if report["failed"]:
        lines += ["", "Failed: " + "; ".join(f"{name}: {reason}" for name, reason in report["failed"].items())]
    if report["vasp"]:
        lines += ["", *vasp_table(report["vasp"])]
    return "\n".join([*lines, ""])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Distribution over the sites, and each structure's error with and without the shift."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = list(report["draw"]["strata"])
    groups = [[x for r in report["labels"] if f"{r['density']:g}" == lv for x in r["l1_sites"]] for lv in levels]
    top = max((x for group in groups for x in group if math.isfinite(x)), default=0.1)
    names = [f"{lv} per Å⁻¹" for lv in levels]
    left.hist(groups, bins=np.linspace(0, top * 1.001, 21), stacked=True, label=names)
    left.axvline(report["summary"]["all"]["quartiles"][1], color="0.2", linestyle="--", label="median")
    left.set(xlabel="normalised L1 to the dense mesh", ylabel="sites")
    left.legend(frameon=False, title="DOS mesh of the label")
    rows = sorted(report["labels"], key=lambda r: r["l1"])
    right.plot([r["l1"] for r in rows], range(len(rows)), "o", markersize=3, label="as it is")
    right.plot([r["l1_shifted"] for r in rows], range(len(rows)), "o", markersize=3, label="best rigid shift")
    right.set_yticks(range(len(rows)), [r["formula"] for r in rows], fontsize=4)
    right.set(xlabel="normalised L1, mean over sites", xlim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Draw, compute, compare and write the results."""
    parser = argparse.ArgumentParser(description="Error of the labels against denser meshes, and against VASP.")
    parser.add_argument("--vasp", type=Path, help="dos_mp_elements.npz")
    parser.add_argument("--labels", type=Path, default=ROOT / "data" / "site_dos", help="folder of shards")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("-n", type=int, default=40, help="labels to recompute")
    parser.add_argument("--explain", type=int, default=5, help="worst labels computed with one dense setting each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-cost", type=float, default=150.0, help="estimated seconds for one structure")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "label_error", help="where results are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    labels = load_site_dos(options.labels)
    rows, how = draw(labels, electron_counts(options.labels), options.n, options.seed, options.max_cost)
    counts = Counter(labels.recipe.tolist())
    latest = max((r for r, count in counts.items() if count >= options.n), default=max(counts))
    current = [i for i in rows if labels.recipe[i] == latest]
    recipes = {"recipe": latest, "of_earlier_recipes": len(rows) - len(current)}
    report: dict[str, Any] = {"draw": {**how, "drawn": len(rows), **recipes}, "labels": [], "failed": {}}
    results: dict[str, ElectronicStructure] = {}
    for i in tqdm(current, unit="structure"):
        name = str(labels.material_id[i])
        if options.report and not (options.folder / f"{name}.json").exists():
            continue
        result = dense(labels.atoms(i), name, options.folder)
        if isinstance(result, str):
            report["failed"][name] = result
        else:
            results[name] = result
            report["labels"].append(compare(labels, i, result))
    if not results:
        raise SystemExit(f"nothing is computed in {options.folder}: leave out --report, or look at its logs")
    for row in sorted(report["labels"], key=lambda r: -r["l1"])[: options.explain]:
        i = labels.material_id.tolist().index(row["id"])
        for setting in SETTINGS:
            if not options.report or (options.folder / setting / f"{row['id']}.json").exists():
                row[f"l1_{setting}"] = error_by(setting, labels, i, options.folder)
    report["recipes"] = by_recipe(options.labels, labels, results)
    report["vasp"] = against_vasp(labels, options.vasp) if options.vasp else []
    report["summary"] = summary(report)
    table = markdown(report)
    print(table)
    write_results(options.out, "label_error", report, table)
    plot(report, options.out / "label_error.png")


if __name__ == "__main__":
    main()
