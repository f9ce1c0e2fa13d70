"""Real DFT: runs of Quantum ESPRESSO, interpolation of bands, a reader of abinit, and the label set made with them."""
