"""Clipping, skipping and watching as Optax transformations; `engine` is the flow that all clips share."""
