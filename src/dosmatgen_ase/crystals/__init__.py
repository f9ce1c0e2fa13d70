"""Crystals: the batch of tensors that networks work on, and the screen that rejects what is no crystal."""
