"""Statistics over targets: means and ratios with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dosmatgen_ase.judge.metrics import bootstrap_interval


def mean_of(rows: np.ndarray) -> float:
    """Mean of a column of targets."""
    return float(rows.mean())


def ratio_of_means(rows: np.ndarray) -> float:
    """Mean of the first column over the mean of the second."""
    return float(rows[:, 0].mean() / rows[:, 1].mean())


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """A statistic over the targets that have every figure it needs, with its bootstrap interval."""
    whole = rows[np.isfinite(rows.reshape(len(rows), -1)).all(-1)]
    if not len(whole):
        return {"value": None, "interval": [None, None], "targets": 0}
    return {"value": statistic(whole), "interval": bootstrap_interval(whole, statistic), "targets": len(whole)}


def summarise(table: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Per row of the table and figure: mean over targets with its interval."""
    return {
        row: {name: interval(np.array([f[name] for f in figures]), mean_of) for name in figures[0]}
        for row, figures in table.items()
    }


def ratios(table: dict[str, list[dict[str, float]]], over: str, under: str) -> dict[str, Any]:
    """Ratio of two rows of the table, paired by target."""

    def pair(name: str) -> np.ndarray:
        return np.array([[a[name], b[name]] for a, b in zip(table[over], table[under], strict=True)])

    return {name: interval(pair(name), ratio_of_means) for name in table[over][0]}


def share_of_gain(rows: np.ndarray) -> float:
    """What picking gains over the mean, as a share of what an oracle gains; columns mean, picked, best."""
    mean, picked, best = rows.mean(axis=0)
    return float((mean - picked) / (mean - best)) if mean > best else 0.0
