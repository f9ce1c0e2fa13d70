"""What is said of a finished crystal: relaxation, hull, ranking, metrics."""
