"""What a clip does to the step of its optimizer, where `clip_effect` has measured it.

Of each effect at most one thing is said of the step as a whole, and one of leaves that are starved.
"""

from collections.abc import Iterator

from clipjax.quantities import RATIO
from clipjax.runs.effects import SAME, Effect, effect_of, starved_of
from clipjax.runs.health.findings import Finding
from clipjax.runs.health.leaves import medians_of
from clipjax.runs.health.view import View
from clipjax.runs.roles import effect_names
from clipjax.runs.words import number, percent, several

_TURNED, _STRAIGHT = 0.9, 0.99  # Median cosines: below, the direction is another; above, it is the same.


def clip_starves(view: View) -> Iterator[Finding]:
  """WARN where one leaf makes the clip act, and others lose most of their step by it."""
  for name, _ in _effects(view):
    found = starved_of(view.run, name, view.norms.begin, view.limits.starved)
    if found is None:
      continue
    first = found.leaves[0]
    message = f"The clip of {name!r} starves {several(found.leaves, found.among)}: {first!r} keeps "
    message += f"{percent(found.kept)} of its step (mean). {found.holder!r} makes the clip act: it leaves "
    message += f"{percent(found.left)} of the gradient (mean), and without that leaf would leave "
    message += f"{percent(found.without)}."
    advice = f"Clip {found.holder!r} by itself, with clip_by_leaf_norm, or with clip_by_group_norm and a group for it. "
    advice += "Or raise max_norm."
    rule = f"each leaf at least {percent(view.limits.starved)} of its step, a limit of clipjax"
    yield Finding("WARN", "clip-starves", message, advice, rule, leaves=(*found.leaves, found.holder))


def clip_lengthens(view: View) -> Iterator[Finding]:
  """WARN for a clip that makes the step longer, as it does where a second moment is made of clipped gradients."""
  for name, effect in _effects(view):
    if not effect.ratio > view.limits.lengthened:
      continue
    names, steps, ratios = view.blocks(name, RATIO)
    longest = medians_of(names, ratios[steps >= view.norms.begin])
    most, leaf = max(((ratio, leaf) for leaf, ratio in longest.items()), key=lambda pair: pair[0], default=(0.0, ""))
    leaves = (leaf,) if most > effect.ratio else ()
    message = f"With the clip of {name!r} the step is {number(effect.ratio)} times as long as without it (median)"
    message += f", in {leaf!r} {number(most)} times." if leaves else "."
    advice = "It acts like a learning rate that is as many times higher. Raise max_norm to twice the 90th percentile "
    advice += "of the norm, where it catches spikes and leaves the step alone, or count it into the learning rate."
    rule = f"at most {view.limits.lengthened:g} times, a limit of clipjax"
    yield Finding("WARN", "clip-lengthens", message, advice, rule, leaves=leaves)


def clip_effect(view: View) -> Iterator[Finding]:
  """INFO: what a clip does to the step, where that is no defect."""
  for name, effect in _effects(view):
    said = f"median ratio {number(effect.ratio)}, cosine {number(effect.cosine)}"
    if effect.ratio > view.limits.lengthened:
      continue
    is_same = abs(effect.ratio - 1) <= SAME
    if effect.cosine < (_STRAIGHT if is_same else _TURNED):
      message = f"The clip of {name!r} turns the step ({said})."
      advice = "A clip by leaf or by value does so by design, and Lion's signs do."
      yield Finding("INFO", "clip-turns", message, _unless_starving(view, name, advice))
    elif is_same:
      message = f"The clip of {name!r} leaves the step as it is ({said}); in {percent(effect.changed)} of the steps it "
      message += f"changes the length by more than {percent(SAME)}."
      yield Finding("INFO", "clip-no-effect", message, "The clip is insurance: leave max_norm alone.")
    elif effect.ratio < 1:
      message = f"The clip of {name!r} shortens the step to {percent(effect.ratio)} ({said})."
      advice = "A lower learning rate would do the same to most steps."
      yield Finding("INFO", "clip-shortens", message, _unless_starving(view, name, advice))
    else:
      message = f"The clip of {name!r} lengthens the step to {percent(effect.ratio)} ({said})."
      yield Finding("INFO", "clip-lengthens", message)


def _unless_starving(view: View, name: str, advice: str) -> str:
  """The advice, or none where a leaf starves, for which there is one already."""
  return "" if starved_of(view.run, name, view.norms.begin, view.limits.starved) else advice


def _effects(view: View) -> Iterator[tuple[str, Effect]]:
  """The effects with steps enough, by name."""
  for name in effect_names(view.run):
    effect = effect_of(view.run, name, view.norms.begin)
    if effect is not None and view.enough(effect.rows):
      yield name, effect
