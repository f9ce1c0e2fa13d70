"""The generator's network: its noise processes, the denoiser, its conditioning, and the weights on disk."""
