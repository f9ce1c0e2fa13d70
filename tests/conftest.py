"""What every test runs under: one thread, no display, reproducible examples; and the tiny network that they share."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a second thread slows cells of a few atoms down
os.environ["MPLBACKEND"] = "Agg"  # both are read when torch, numpy and matplotlib are imported

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from dosmatgen_ase.model.conditioning import ConditionalDenoiser
    from dosmatgen_ase.model.denoiser import DenoiserConfig
    from dosmatgen_ase.model.diffusion.lattice import LatticeProcess

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def tiny_config() -> DenoiserConfig:
    """A network of a few thousand parameters: its symmetries and promises are those of the large one."""
    from dosmatgen_ase.model.denoiser import DenoiserConfig

    return DenoiserConfig(width=16, pair_width=16, vector_channels=4, num_layers=2, num_radial=6)


@pytest.fixture(scope="session")
def lattice() -> LatticeProcess:
    """Cells of about 15 A^3 per atom, within some 20 % of a cube."""
    from dosmatgen_ase.model.diffusion.lattice import LatticeProcess

    return LatticeProcess((0.0, 0.0, 0.0, 0.0, 0.0, 1.56), (0.2, 0.2, 0.2, 0.2, 0.2, 0.1))


@pytest.fixture(scope="session")
def tiny_model(tiny_config: DenoiserConfig, lattice: LatticeProcess) -> ConditionalDenoiser:
    """Untrained, in evaluation mode. The learned nulls are not zero, so that a test sees where they go."""
    import torch

    from dosmatgen_ase.model.conditioning import ConditionalDenoiser
    from dosmatgen_ase.model.denoiser import Denoiser

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConditionalDenoiser(Denoiser(tiny_config, lattice))
        torch.nn.init.normal_(model.encoder.null_site)
        torch.nn.init.normal_(model.encoder.null_total)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: ConditionalDenoiser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as a weights file."""
    from dosmatgen_ase.model.checkpoint import save_model

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(path, tiny_model, {})
    return path


def in_a_new_thread(job: Callable[[], Any]) -> Any:
    """What a job returns in a thread of its own."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(job()))
    thread.start()
    thread.join()
    return result[0]
