"""What a clip does to the optimizer's step, as measured by `clip_effect`.

Each effect gets at most one finding about the whole step, and at most one about starved leaves.
"""

from collections.abc import Iterator

from clipjax.metric_names import RATIO
from clipjax.runs.effects import SAME, Effect, effect_of, starved_of
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.roles import effect_names
from clipjax.runs.words import number, percent, several

# Below this median cosine a clip changes the direction of the step. The stricter limit is for a step that keeps its
# length, which would otherwise count as unaffected.
_TURNED, _STRAIGHT = 0.9, 0.99


def clip_starves(view: View) -> Iterator[Finding]:
  """WARN if one leaf triggers the clip and others lose most of their step to it."""
  for name, _ in _effects(view):
    found = starved_of(view.run, name, view.norms.begin, view.limits.starved)
    if found is None:
      continue
    first = found.leaves[0]
    message = f"The clip in {name!r} starves {several(found.leaves, found.among)}: {first!r} keeps "
    message += f"{percent(found.kept)} of its step (mean). {found.holder!r} triggers the clip, which leaves "
    message += f"{percent(found.left)} of the gradient (mean) and would leave {percent(found.without)} without that "
    message += "leaf."
    advice = "Use clip_by_leaf_norm, which clips every leaf by its own norm, or give "
    advice += f"{found.holder!r} its own group in clip_by_group_norm. Or raise max_norm."
    rule = f"every leaf keeps at least {percent(view.limits.starved)} of its step, a clipjax limit"
    yield Finding("WARN", "clip-starves", message, advice, rule, leaves=(*found.leaves, found.holder))


def clip_lengthens(view: View) -> Iterator[Finding]:
  """WARN for a clip that makes the step longer, as happens when Adam's second moment sees clipped gradients."""
  for name, effect in _effects(view):
    if not effect.ratio > view.limits.lengthened:
      continue
    # Name the leaf whose step grows most, if it grows more than the step as a whole.
    names, steps, ratios = view.blocks(name, RATIO)
    longest = medians_of(names, ratios[steps >= view.norms.begin])
    most, leaf = max(((ratio, leaf) for leaf, ratio in longest.items()), key=lambda pair: pair[0], default=(0.0, ""))
    leaves = (leaf,) if most > effect.ratio else ()
    message = f"The clip in {name!r} makes the step {number(effect.ratio)} times as long (median)"
    message += f", and {number(most)} times as long in {leaf!r}." if leaves else "."
    advice = "This acts like a learning rate that many times higher. Raise max_norm to twice the 90th percentile of "
    advice += "the norm, where it catches spikes and leaves other steps alone, or allow for it in the learning rate."
    rule = f"at most {view.limits.lengthened:g} times, a clipjax limit"
    yield Finding("WARN", "clip-lengthens", message, advice, rule, leaves=leaves)


def clip_effect(view: View) -> Iterator[Finding]:
  """INFO: what a clip does to the step when that is not a defect."""
  for name, effect in _effects(view):
    said = f"median ratio {number(effect.ratio)}, cosine {number(effect.cosine)}"
    if effect.ratio > view.limits.lengthened:
      continue  # `clip_lengthens` reports it.
    is_same = abs(effect.ratio - 1) <= SAME
    if effect.cosine < (_STRAIGHT if is_same else _TURNED):
      message = f"The clip in {name!r} changes the direction of the step ({said})."
      advice = "Clips by leaf or by value do this by design, and so do Lion's signs."
      yield Finding("INFO", "clip-turns", message, _unless_starving(view, name, advice))
    elif is_same:
      message = f"The clip in {name!r} barely affects the step ({said}): the length changes by more than "
      message += f"{percent(SAME)} in {percent(effect.changed)} of the steps."
      yield Finding("INFO", "clip-no-effect", message, "The clip is insurance: leave max_norm alone.")
    elif effect.ratio < 1:
      message = f"The clip in {name!r} shortens the step to {percent(effect.ratio)} of its length ({said})."
      advice = "A lower learning rate would do the same to most steps."
      yield Finding("INFO", "clip-shortens", message, _unless_starving(view, name, advice))
    else:
      message = f"The clip in {name!r} lengthens the step to {percent(effect.ratio)} of its length ({said})."
      yield Finding("INFO", "clip-lengthens", message)


def _unless_starving(view: View, name: str, advice: str) -> str:
  """The advice, or "" if a leaf starves: `clip_starves` already gives one."""
  return "" if starved_of(view.run, name, view.norms.begin, view.limits.starved) else advice


def _effects(view: View) -> Iterator[tuple[str, Effect]]:
  """The effects measured over enough steps, by name."""
  for name in effect_names(view.run):
    effect = effect_of(view.run, name, view.norms.begin)
    if effect is not None and view.enough(effect.rows):
      yield name, effect
