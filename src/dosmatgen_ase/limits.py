"""The sizes that the network is made for, and those that anything is made for, without any import."""

MAX_ATOMS = 20
"""Atoms of a cell that the network makes."""

MAX_GIVEN_ATOMS = 2000
"""Atoms of a cell that is given: all pairs of them are looked at."""

MAX_ATOMIC_NUMBER = 94
"""Plutonium is the last element, as in CHGNet."""
