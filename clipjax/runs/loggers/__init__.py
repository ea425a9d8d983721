"""Loggers: rows for TensorBoard, wandb and others."""
