"""What types say of a mesh: unreduced and reduced leaves, axes of vmap, nested shard_maps, and pmap."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clipjax

pytestmark = pytest.mark.usefixtures("standard_promotion")

has_unreduced = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="JAX of before cannot make such an array")
has_vmap = pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="JAX of before cannot batch a psum in shard_map")


def mesh_of(kind):
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def some_unreduced():
  """A product whose contracted axis is split, of which every device keeps its own summand."""
  left = jax.device_put(jnp.ones((4, 8)), NamedSharding(jax.sharding.get_mesh(), P(None, "data")))
  right = jax.device_put(jnp.ones((8, 2)), NamedSharding(jax.sharding.get_mesh(), P("data", None)))
  product = jax.jit(lambda a, b: jnp.einsum("ij,jk->ik", a, b, out_sharding=P(None, None, unreduced={"data"})))
  return product(left, right)


def entries(axis_name=None):
  """Each entry, as `grads -> what it gives`, and what it calls its gradients; with a state it takes parameters too."""
  by = {"axis_name": axis_name}

  def update(tx):
    def run(grads, params=None):
      is_manual = jax.sharding.get_abstract_mesh().manual_axes
      ones = grads if is_manual else jax.tree.map(lambda x: jnp.ones(x.shape), grads)
      return tx.update(grads, tx.init(grads), ones if params is None else params)

    return run

  return {
    "global_norm": (lambda g: clipjax.global_norm(g, **by), "tree"),
    "leaf_norms": (lambda g: clipjax.leaf_norms(g, jnp.inf, **by), "tree"),
    "clip_grad_norm": (lambda g: clipjax.clip_grad_norm(g, 1.0, **by), "grads"),
    "clip_grad_norm of a norm": (lambda g: clipjax.clip_grad_norm(g, 1.0, norm=2.0), "grads"),
    "clip_grad_value": (lambda g: clipjax.clip_grad_value(g, 1.0), "grads"),
    "clip_grad_per_example": (lambda g: clipjax.clip_grad_per_example(g, 1.0, **by), "grads"),
    "clip_by_global_norm": (update(clipjax.clip_by_global_norm(1.0, **by)), "updates"),
    "clip_by_leaf_norm": (update(clipjax.clip_by_leaf_norm(1.0, **by)), "updates"),
    "clip_by_value": (update(clipjax.clip_by_value(1.0, **by)), "updates"),
    "watch": (update(clipjax.watch(**by)), "updates"),
    "skip_steps": (update(clipjax.skip_steps(optax.sgd(1.0), **by)), "updates"),
    "clip_effect": (update(clipjax.clip_effect(optax.identity(), optax.sgd(1.0), **by)), "updates"),
    "adaptive_grad_clip": (update(clipjax.adaptive_grad_clip(0.1)), "updates"),
  }


# Unreduced and reduced -----------------------------------------------------------------------------------------------


@has_unreduced
@pytest.mark.parametrize("name", list(entries()))
def test_an_unreduced_leaf_is_an_error_that_names_it(name):
  run, argument = entries()[name]
  message = re.escape(
    f"`{argument}` must be reduced over all mesh axes, got float32[4,2] at 'w' whose type is unreduced over ['data']: "
    "reduce it first, with jax.sharding.reshard(x, jax.sharding.PartitionSpec(...)), or with jax.lax.psum inside "
    "shard_map."
  )
  with jax.set_mesh(mesh_of(AxisType.Explicit)):
    grads = {"w": some_unreduced()}
    with pytest.raises(ValueError, match=f"^{message}"):
      run(grads)
    with pytest.raises(ValueError, match=message.replace("got", "got traced")):
      jax.jit(run)(grads)


@has_unreduced
@pytest.mark.parametrize("name", ["clip_by_global_norm", "watch", "adaptive_grad_clip", "skip_steps", "clip_effect"])
def test_so_are_unreduced_parameters(name):
  run, _ = entries()[name]
  message = r"^`params` must be reduced over all mesh axes, got .* at 'w'"
  with jax.set_mesh(mesh_of(AxisType.Explicit)), pytest.raises(ValueError, match=message):
    run({"w": jnp.ones((4, 2))}, {"w": some_unreduced()})


@has_unreduced
def test_the_remedies_for_an_unreduced_leaf():
  def split(reduce):
    norm = lambda x: clipjax.global_norm({"w": reduce(x)})  # noqa: E731
    return jax.jit(jax.shard_map(norm, in_specs=P(None, None, unreduced={"data"}), out_specs=P()))

  with jax.set_mesh(mesh_of(AxisType.Explicit)):
    grads = some_unreduced()
    whole = jax.jit(lambda x: jax.sharding.reshard(x, P()))
    for norm in (jax.jit(lambda x: clipjax.global_norm({"w": whole(x)})), split(lambda x: lax.psum(x, "data"))):
      np.testing.assert_allclose(norm(grads), np.linalg.norm(whole(grads)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^`tree` must be reduced over all mesh axes"):
      split(lambda x: x)(grads)


@has_unreduced
def test_a_leaf_that_is_marked_as_reduced_is_measured():
  measure = jax.jit(lambda x: {name: run({"w": x}) for name, (run, _) in entries().items()})
  with jax.set_mesh(mesh_of(AxisType.Explicit)):
    grads = jax.jit(lambda x: jax.sharding.reshard(x, P(None, None, reduced={"data"})))(jnp.full((4, 2), 3.0))
    chex.assert_trees_all_close(measure(grads), measure(jnp.full((4, 2), 3.0)), rtol=1e-6)


@has_unreduced
def test_a_leaf_that_is_marked_as_reduced_is_refused_inside_shard_map():
  spec = P(None, None, reduced={"data"})

  def split(spec):
    return jax.jit(jax.shard_map(lambda x: clipjax.global_norm({"w": x}), in_specs=spec, out_specs=P()))

  with jax.set_mesh(mesh_of(AxisType.Explicit)):
    grads = jax.jit(lambda x: jax.sharding.reshard(x, spec))(jnp.full((4, 2), 3.0))
    with pytest.raises(
      ValueError, match=r"^`tree` must have no leaves marked as reduced .* at 'w' reduced over \['data"
    ):
      split(spec)(grads)
    as_it_says = split(P())(jnp.full((4, 2), 3.0))
    np.testing.assert_allclose(as_it_says, 3 * 8**0.5, rtol=1e-6)


# vmap and shard_map ---------------------------------------------------------------------------------------------------

SOME = np.arange(1.0, 65.0, dtype=np.float32).reshape(4, 8, 2)


def numbers(axis_name=None):
  """What some entries say of one gradient, as a vector."""
  by = {"axis_name": axis_name}
  tx = optax.chain(clipjax.watch(**by), clipjax.clip_by_global_norm(1.0, **by))
  skip = clipjax.skip_steps(optax.sgd(1.0), **by)

  def of(x):
    grads = {"w": x}
    return jnp.stack(
      [
        clipjax.global_norm(grads, **by),
        clipjax.leaf_norms(grads, jnp.inf, **by)["w"],
        clipjax.metrics(tx.update(grads, tx.init(grads), grads)[1])["grad/norm"],
        skip.update(grads, skip.init(grads), grads)[1].norm,
      ]
    )

  return of


def shard(fn, spec=None, **options):
  return jax.shard_map(fn, in_specs=P("data") if spec is None else spec, out_specs=P(), **options)


def scanned(x):
  return lax.scan(lambda carry, grads: (carry, numbers()(grads)), 0, x)[1]


WAYS = {
  "vmap of shard_map": lambda: jax.vmap(shard(numbers())),
  "vmap with the name of a mesh axis, of shard_map": lambda: jax.vmap(shard(numbers()), axis_name="model"),
  "spmd_axis_name and no checks": lambda: jax.vmap(shard(numbers("data"), check_vma=False), spmd_axis_name="model"),
  "shard_map of vmap": lambda: shard(jax.vmap(numbers()), P(None, "data")),
  "shard_map of vmap with the name of an idle axis": lambda: shard(
    jax.vmap(numbers(), axis_name="model"), P(None, "data")
  ),
  "scan in shard_map": lambda: shard(scanned, P(None, "data")),
  "partly manual": lambda: shard(jax.vmap(numbers()), P(None, "data"), axis_names={"data"}),
  "partly manual, no checks": lambda: shard(
    jax.vmap(numbers("data")), P(None, "data"), axis_names={"data"}, check_vma=False
  ),
  "nested": lambda: shard(
    shard(jax.vmap(numbers()), P(None, None, "model"), axis_names={"model"}), P(None, "data"), axis_names={"data"}
  ),
  "nested, no checks": lambda: shard(
    shard(jax.vmap(numbers(("data", "model"))), P(None, None, "model"), axis_names={"model"}, check_vma=False),
    P(None, "data"),
    axis_names={"data"},
    check_vma=False,
  ),
}


@has_vmap
@pytest.mark.parametrize("way", list(WAYS))
def test_vmap_and_shard_map_in_each_other(way):
  norms, largest = np.linalg.norm(SOME, axis=(1, 2)), SOME.max(axis=(1, 2))
  with jax.set_mesh(mesh_of(AxisType.Auto)):
    got = jax.jit(WAYS[way]())(SOME)
  np.testing.assert_allclose(got, np.stack([norms, largest, norms, norms], axis=1), rtol=1e-6)


@has_vmap
@pytest.mark.parametrize("name", [name for name in entries() if name != "adaptive_grad_clip"])
def test_spmd_axis_name_around_checks_is_an_error_that_names_the_leaf(name):
  run, _ = entries()[name]

  def step(x):
    run({"w": x})
    return lax.psum(jnp.sum(x), "data")

  message = re.escape(
    "`spmd_axis_name` must be left out of a vmap around a shard_map with its checks on, got 'w' batched over "
    "['model']: JAX cannot branch there. Leave it out, or pass `check_vma=False` to shard_map and `axis_name=` here."
  )
  with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(ValueError, match=f"^{message}"):
    jax.jit(jax.vmap(shard(step), spmd_axis_name="model"))(SOME)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_vmap_that_hides_a_mesh_axis_is_an_error(check_vma):
  axis_name = None if check_vma else "data"
  lanes = SOME[:3]  # Without the checks only another size than that of the mesh axis tells.
  message = (
    r"^`axis_name` of a vmap must differ from the mesh axes around it, got 'data', over which '\.' is to be summed: "
    r"give the axis of the vmap another name\."
  )

  def norms(name):
    return jax.vmap(lambda x: clipjax.global_norm(x, axis_name=axis_name), axis_name=name)

  with jax.set_mesh(mesh_of(AxisType.Auto)):
    with pytest.raises(ValueError, match=message):
      jax.jit(shard(norms("data"), P(None, "data"), check_vma=check_vma))(lanes)
    if jax.__version_info__ >= (0, 9) or not check_vma:
      got = jax.jit(shard(norms("lane"), P(None, "data"), check_vma=check_vma))(lanes)
      np.testing.assert_allclose(got, np.linalg.norm(lanes, axis=(1, 2)), rtol=1e-6)


def test_the_axis_of_a_vmap_is_summed_over_only_without_checks():
  def norms(axis_name):
    return jax.vmap(lambda x: clipjax.global_norm(x, axis_name=axis_name), axis_name="lane")

  message = (
    r"^`axis_name` must name mesh axes inside a shard_map with its checks on, got 'lane' for '\.', the axis of a vmap, "
    r"over which JAX does not sum there: pass `check_vma=False` to shard_map\."
  )
  with jax.set_mesh(mesh_of(AxisType.Auto)):
    for axis_name in ("lane", ("lane", "data")):
      with pytest.raises(ValueError, match=message):
        jax.jit(shard(norms(axis_name), P(None, "data")))(SOME)
    got = jax.jit(shard(norms(("lane", "data")), P(None, "data"), check_vma=False))(SOME)
  np.testing.assert_allclose(got, np.full(4, np.linalg.norm(SOME)), rtol=1e-6)


# pmap -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_name", [None, "i"])
def test_in_pmap_leaves_are_whole_and_there_is_no_warning(axis_name):
  def step(x):  # Warnings are errors here.
    grads = {"w": lax.pmean(x, "i") if axis_name else x}
    values = [run(grads) for name, (run, _) in entries().items() if "example" not in name]
    return values[0], lax.scan(lambda carry, x: (carry, jax.jit(numbers())(x)), 0, jnp.stack([grads["w"]] * 2))[1]

  norm, scanned = jax.pmap(step, axis_name=axis_name)(np.ones((8, 3), np.float32))
  np.testing.assert_allclose(norm, np.full(8, 3**0.5), rtol=1e-6)
  np.testing.assert_allclose(scanned[:, :, 0], norm[:, None] * np.ones((8, 2)), rtol=1e-6)


WITHOUT_NORMS = {"clip_grad_value", "clip_grad_norm of a norm", "clip_grad_per_example", "adaptive_grad_clip"}


@pytest.mark.parametrize("name", [name for name in entries() if name not in WITHOUT_NORMS])
def test_in_shard_map_without_checks_the_warning_stays(name):
  def trace(axis_name, name):
    entry, _ = entries(axis_name)[name]
    step = lambda x: x + sum(jnp.sum(v) for v in jax.tree.leaves(entry({"w": x})))  # noqa: E731
    options = {"mesh": mesh_of(AxisType.Auto), "in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    jax.eval_shape(jax.shard_map(step, **options), SOME[0])

  with pytest.warns(UserWarning, match=r"^inside shard_map\(check_vma=False\) the types do not say"):
    trace(None, name)
  trace((), name)  # Warnings are errors here.
  trace(None, "clip_grad_value")  # It has no norm, so nothing to sum.
