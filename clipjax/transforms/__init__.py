"""Clipping, skipping and watching as Optax transformations; all clips share the stages of `engine`."""
