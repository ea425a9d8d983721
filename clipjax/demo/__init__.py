"""The demo: a small model, what it shows of clipping, and the advice that it takes."""
