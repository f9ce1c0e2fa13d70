"""Learned tight binding: a crystal's DOS and bands from a Hamiltonian whose matrix elements a small network writes."""
