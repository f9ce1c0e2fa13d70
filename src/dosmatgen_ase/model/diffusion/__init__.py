"""Noise processes, one per field (lattice, coordinates, species), joined in `dosmatgen_ase.model.diffusion.process`.

Time ``t`` runs from 1 (noise) to 0 (data); every process knows how to noise clean data to a level ``t``, by noise
that the caller drew. The steps from ``t`` to ``s < t``, given what the denoiser predicts, are those of
:mod:`dosmatgen_ase.generate.sampler`.
"""
