"""The sizes that the network is made for, without any import: every part of the package has the same ones."""

MAX_ATOMS = 20
"""Atoms of a cell."""

MAX_ATOMIC_NUMBER = 94
"""Plutonium is the last element, as in CHGNet."""
