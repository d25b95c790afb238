"""Measurements of the package, and the experiments behind its results; run from the root of the repository."""
