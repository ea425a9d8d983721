"""Norms that are right in every dtype and at every magnitude: `sums` reads the leaves, `derivatives` differentiates."""
