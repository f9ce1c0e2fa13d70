"""What every test runs under: one thread, no display. Set before torch, numpy and matplotlib are imported."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a second thread slows cells of a few atoms down
os.environ["MPLBACKEND"] = "Agg"
