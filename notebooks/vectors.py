"""Angles between gradients, and the pictures of notebook 01.

Nothing here clips: the notebook does, and passes what came out. Gradients that are drawn are arrays of shape (n, 2).
"""

import jax
import matplotlib.pyplot as plt
import numpy as np

BLUE, RED, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})


def show(x):
  """An array as text, with three digits."""
  return np.array2string(np.asarray(x), precision=3)


def angle(a, b):
  """Degrees between two trees, each taken as one long vector."""
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64) for tree in (a, b))
  return np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def directions(count):
  """`count` unit vectors around the circle; the first is repeated at the end."""
  theta = np.linspace(0, 2 * np.pi, count + 1)
  return np.stack([np.cos(theta), np.sin(theta)], axis=1).astype(np.float32)


def draw_limit(before, after, max_norm, lengths, lengths_after):
  """Arrows before and after a clip, and the norm after as a function of the norm before, `{max_norm: norms}`."""
  _, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
  for vectors, colour, width, label in (
    (before, GREY, 0.006, "gradient"),
    (after, BLUE, 0.012, f"clipped to {max_norm:g}"),
  ):
    origin = np.zeros(len(vectors))
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 1}
    left.quiver(origin, origin, *vectors.T, color=colour, width=width, label=label, **arrows)
  left.add_patch(plt.Circle((0, 0), max_norm, fill=False, color=BLUE, linestyle="--"))
  left.set(xlim=(-5, 5), ylim=(-4.5, 4.5), aspect="equal", xlabel="first entry", ylabel="second entry")
  left.set_title("Long arrows end on the circle, short ones stay")
  left.legend(loc="upper left")
  for (limit, norms), colour in zip(lengths_after.items(), (GREEN, BLUE, RED), strict=True):
    right.plot(lengths, norms, color=colour, label=f"max_norm = {limit:g}")
  right.set(xlabel="norm before the clip", ylabel="norm after the clip", title="Equal up to the limit, then constant")
  right.legend()
  plt.show()


def draw_value_and_norm(before, by_value, by_norm, turned):
  """Where both clips put the gradients, and degrees turned per degree of direction, `{label: degrees}`."""
  _, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
  for start, end in zip(before, by_value, strict=True):
    left.plot(*np.stack([start, end]).T, color=RED, linewidth=0.8)
    left.plot(*np.stack([start, 0 * start]).T, color=BLUE, linewidth=0.8, linestyle=":")
  left.plot([1, 1, -1, -1, 1], [1, -1, -1, 1, 1], color=RED, linestyle="--")
  left.add_patch(plt.Circle((0, 0), 1, fill=False, color=BLUE, linestyle="--"))
  left.plot(*before.T, "o", color=GREY, label="gradient")
  left.plot(*by_value.T, "s", color=RED, label="by value")
  left.plot(*by_norm.T, "o", color=BLUE, label="by norm")
  left.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), aspect="equal", xlabel="first entry", ylabel="second entry")
  left.set_title("By value: onto a square. By norm: inwards")
  left.legend(loc="upper right", fontsize=8)
  styles = {"color": RED, "linestyle": ":"}, {"color": RED, "linestyle": "--"}, {"color": RED}, {"color": BLUE}
  for (label, degrees), style in zip(turned.items(), styles, strict=True):
    right.plot(degrees, label=label, **style)
  right.set(xlabel="direction of the gradient (degrees)", ylabel="turned by (degrees)", ylim=(-2, 55))
  right.set_title("The longer the gradient, the more a value clip turns it")
  right.legend(fontsize=8, loc="upper center", ncols=2)
  plt.show()


def draw_orders(balls, sizes, growth):
  """Gradients clipped by several norms, `{label: vectors}`, and how each norm grows, `{label: norms of the sizes}`."""
  _, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
  for (label, ball), norms, colour in zip(balls.items(), growth.values(), (GREEN, BLUE, PINK, RED), strict=True):
    left.plot(*ball.T, color=colour, label=label)
    right.loglog(sizes, norms, "o-", color=colour, label=label)
  left.set(aspect="equal", xlabel="first entry", ylabel="second entry", xlim=(-1.8, 1.8), ylim=(-1.2, 1.2))
  left.set_title("Gradients of length 3, clipped to a norm of 1")
  right.set_title("All norms but ord = inf grow with the model")
  right.set(xlabel="number of entries, all of them 1", ylabel="norm")
  right.legend()
  plt.show()
