"""Solvers fitted to a schedule: the rows of its sampler matrix by least squares, on the schedule's own predictions."""
