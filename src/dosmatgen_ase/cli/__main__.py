"""``python -m dosmatgen_ase.cli``."""

from dosmatgen_ase.cli import main

main()
