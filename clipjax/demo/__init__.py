"""The demo: a small model, what clipping does to it, and the threshold that its norms suggest."""
