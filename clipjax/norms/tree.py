"""The public norms of a tree: one norm over all leaves, and one for each leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from clipjax.checks import check_ord
from clipjax.norms.derivatives import measure_jit
from clipjax.norms.sums import NormSpec, norm_dtype, spec_of_slices
from clipjax.stacks import stacks_of
from clipjax.trees import prepare


def global_norm(tree: Any, ord: float | None = None, *, axis_name: Any = None) -> jax.Array:
  """The p-norm of all entries of a tree as one vector, `(sum |x|^p)^(1/p)`.

  Right to about 1e-6 if the true norm is a normal float32, for entries of any magnitude (1e-30, 1e30) and any dtype
  (16-bit leaves are summed in float32). 0 for an empty tree and for zeros, with derivative 0 there; inf for an inf
  entry and for a true norm above the largest number of its dtype; NaN for a NaN entry. Inside `shard_map`, the shards
  of a leaf are summed over the axes that it varies over.

  Args:
    tree: pytree of floating or complex arrays of any shape; None and float0 leaves are ignored.
    ord: 2 when None; 1, `jnp.inf` or any p > 0; 0 counts the nonzero entries; `-jnp.inf` is the smallest magnitude.
    axis_name: mesh axes to reduce over, for `pmap` and `shard_map(check_vma=False)`: a name, a tuple of names, or a
      prefix tree of them. None takes them from the types of the leaves.

  Returns:
    The norm, shape (), float32 (float64 when x64 is enabled).

  Raises:
    TypeError: for an integer, bool or other leaf, with its path; for an `ord` that is not a Python number.
    ValueError: for an `ord` that is NaN, or negative other than -inf.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    >>> print(clipjax.global_norm(grads), clipjax.global_norm(grads, 1), clipjax.global_norm(grads, jnp.inf))
    13.0 19.0 12.0
    >>> print(clipjax.global_norm(jnp.full(4, 1e30)))
    2e+30

  References:
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063; algorithm 1.
  """
  p = check_ord(ord, for_clip=False)
  prepared = prepare(tree, "tree", axis_name=axis_name)
  spec = NormSpec(p, (tuple(range(len(prepared.measured))),), prepared.axes)
  return measure_jit(spec, prepared.measured).norms[0]


def leaf_norms(tree: Any, ord: float | None = None, *, stacked: Any = None, axis_name: Any = None) -> Any:
  """The p-norm of each leaf, `(sum |x|^p)^(1/p)`, in a tree of the same structure.

  Each norm is as accurate as `global_norm`, even beside leaves of another magnitude. 0 for an empty leaf, for zeros and
  for a float0 leaf; inf and NaN stay in their leaf, and in their layer.

  Args:
    tree: pytree of floating or complex arrays of any shape; None stays None.
    ord: see `global_norm`.
    stacked: which axis of a leaf counts layers; see `clip_by_leaf_norm`.
    axis_name: see `global_norm`.

  Returns:
    The tree with a norm, shape (), float32 (float64 when x64 is enabled), in place of each leaf; a stacked leaf gets
    its norms by layer, shape (layers,).

  Raises:
    TypeError: for a stacked axis that is not a Python integer; also as `global_norm` does.
    ValueError: for a stacked axis that a leaf does not have; also as `global_norm` does.

  Example:
    >>> import jax.numpy as jnp, clipjax
    >>> norms = clipjax.leaf_norms({"w": jnp.array([3.0, 4.0]), "b": jnp.array([1e-25])})
    >>> print(norms["w"], norms["b"])
    5.0 1e-25
    >>> print(clipjax.leaf_norms({"blocks": jnp.array([[3.0, 4.0], [6.0, 8.0]])}, stacked=0)["blocks"])
    [ 5. 10.]
  """
  p = check_ord(ord, for_clip=False)
  prepared = prepare(tree, "tree", axis_name=axis_name)
  spec = spec_of_slices(p, prepared.measured, prepared.axes, stacks_of(tree, stacked, axis_name=axis_name))
  norms = [n.ravel() if n.ndim else n for n in measure_jit(spec, prepared.measured).norms]
  return prepared.with_all(norms, lambda _: jnp.zeros((), norm_dtype()))
