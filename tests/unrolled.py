"""A tree of stacked layers beside the same one unrolled, each layer a leaf of its own: what `stacked=` must come to."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.groups import Labels


def unrolled(tree, axis_of, layers=None):
  """The tree as a flat one in the same order: slice i of what has layers along an axis becomes "<name>[i]".

  Args:
    tree: of arrays, traced or not; None stays None, once for each of the `layers` where the leaf has some.
    axis_of: `name -> axis or None`.
    layers: how many there are; for None alone.
  """
  out = collections.OrderedDict()  # JAX keeps its order, and sorts that of a dict.
  for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axis = axis_of(name)
    if axis is None:
      out[name] = x
    elif x is None:
      out.update({f"{name}[{i}]": None for i in range(layers)})
    else:
      x = jnp.moveaxis(x, axis, 0) if isinstance(x, jax.core.Tracer) else np.moveaxis(np.asarray(x), axis, 0)
      out.update({f"{name}[{i}]": x[i] for i in range(len(x))})
  return out


def slices_of(state):
  """The names of all slices in each set of labels of a state, but for those of one global norm."""
  is_labels = lambda x: isinstance(x, Labels)  # noqa: E731
  return [x.slices for x in jax.tree.leaves(state, is_leaf=is_labels) if is_labels(x) and not x.is_whole]


def assert_same_numbers(got, want, rtol=2e-6):
  """The same leaves in the same order, whatever the structures: bits of whole numbers, rounding of others."""
  got, want = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
  assert len(got) == len(want) > 0
  for (path, a), b in zip(got, want, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
    if not jnp.issubdtype(a.dtype, np.inexact):
      np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
      continue
    # What is rounded to 16 bits may have stood between two.
    tolerance = max(rtol, 1.01 * float(jnp.finfo(a.dtype).eps) * (a.dtype.itemsize == 2))
    a, b = (np.asarray(x).astype(np.promote_types(x.dtype, np.float32)) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, err_msg=jax.tree_util.keystr(path))


def assert_as_unrolled(got, want, axis_of, layers=None, rtol=2e-6):
  """`(updates, state)` of stacked layers, and of the same ones unrolled: the same numbers and names."""
  (updates, state), (each, of_each) = got, want
  like = jax.tree.structure(updates)  # What an optimizer keeps of each parameter is unrolled too.
  updates, state = jax.tree.map(
    lambda x: unrolled(x, axis_of, layers) if jax.tree.structure(x) == like else x,
    (updates, state),
    is_leaf=lambda x: jax.tree.structure(x) == like,
  )
  assert jax.tree.structure(updates) == jax.tree.structure(each)
  assert_same_numbers(updates, each, rtol)
  assert_same_numbers(state, of_each, rtol)
  assert slices_of(state) == slices_of(of_each) != []
