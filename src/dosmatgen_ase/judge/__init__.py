"""Judgement of finished crystals: relaxation, hull, ranking, metrics."""
