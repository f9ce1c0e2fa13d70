"""From a target to crystals: constraints, the only loop over time, and `DOSGenerator`."""
