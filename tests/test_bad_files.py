"""Bad input to what records, reads, judges and reports a run: the whole message, and no file or row lost by it."""

import errno
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clipjax
from clipjax import cli
from clipjax.runs.record import run_file as file_of_rows
from clipjax.runs.report.mark import START

TX = clipjax.clip_by_global_norm(1.0)
GRADS = {"w": jnp.array([3.0, 4.0])}
STATES = [TX.init(GRADS)]
for _ in range(5):
  STATES.append(TX.update(GRADS, STATES[-1])[1])
OPT_STATE = "`opt_state` must be the state of an optimizer"
RETURNED = "pass what `init` or `update` returned."
NUMBERS = "push numbers alone."
NAME, INTEGER = "pass the name of a file.", "pass a Python integer."
BAD_PATHS = {
  "None": (None, TypeError, f"`path` must be a string or a pathlib.Path, got a NoneType: {NAME}"),
  "a number": (3, TypeError, f"`path` must be a string or a pathlib.Path, got 3 (int): {NAME}"),
  "bytes": (b"run.jsonl", TypeError, f"`path` must be a string or a pathlib.Path, got a bytes: {NAME}"),
  "an array": (np.ones(2), TypeError, f"`path` must be a string or a pathlib.Path, got a ndarray: {NAME}"),
  "empty": ("", ValueError, "`path` must be the name of a file, got '': pass one such as 'run.jsonl'."),
  "a null character": (
    "a\0b", ValueError, "`path` must be the name of a file, got 'a\\x00b': pass one such as 'run.jsonl'.",
  ),
}  # fmt: skip


@pytest.fixture
def run_file(tmp_path):
  """A recorded run of five steps."""
  path = tmp_path / "run.jsonl"
  with clipjax.runs.Recorder(path, every=2) as recorder:
    for step, state in enumerate(STATES[1:], 1):
      recorder.push(step, state, params=GRADS, loss=1.0 / step)
  return path


def error_of(kind, call):
  with pytest.raises(kind) as error:
    call()
  assert type(error.value) is kind
  return str(error.value)


# Recorder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD_PATHS)
@pytest.mark.parametrize("function", ["Recorder", "read_run", "write_report"])
def test_what_is_no_path(case, function, run_file, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path, kind, text = BAD_PATHS[case]
  run = clipjax.runs.read_run(run_file)
  call = {
    "Recorder": clipjax.runs.Recorder,
    "read_run": clipjax.runs.read_run,
    "write_report": lambda path: clipjax.runs.write_report(run, path),
  }
  assert error_of(kind, lambda: call[function](path)) == text
  assert list(tmp_path.iterdir()) == [run_file]


RECORDERS = {
  "every 0": ({"every": 0}, ValueError, "`every` must be an integer >= 1, got 0: choose one in that range."),
  "every NaN": ({"every": math.nan}, TypeError, f"`every` must be an integer >= 1, got nan (float): {INTEGER}"),
  "every as a string": ({"every": "5"}, TypeError, f"`every` must be an integer >= 1, got '5' (str): {INTEGER}"),
  "every True": ({"every": True}, TypeError, f"`every` must be an integer >= 1, got True (bool): {INTEGER}"),
  "writers None": ({"writers": None}, TypeError, "`writers` must be a sequence, got NoneType: pass [writer]."),
  "a writer that is a string": (
    {"writers": ["tensorboard"]}, TypeError,
    "`writers` must each be a logger that clipjax knows, a function (step, values), or a pair of one and 'leaves', got "
    "'tensorboard': pass a function that hands the values on.",
  ),
  "a writer's class": (
    {"writers": [pathlib.Path]}, TypeError,
    "`writers` must each be a logger that clipjax knows, a function (step, values), or a pair of one and 'leaves', got "
    "<class 'pathlib.Path'>: pass an instance.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDERS)
def test_a_recorder_that_fails_makes_no_file_and_touches_none(case, run_file, tmp_path):
  options, kind, text = RECORDERS[case]
  before = run_file.read_bytes()
  for path in (run_file, tmp_path / "new.jsonl"):
    assert error_of(kind, lambda: clipjax.runs.Recorder(path, **options)) == text  # noqa: B023  (called at once)
  assert run_file.read_bytes() == before and list(tmp_path.iterdir()) == [run_file]


@pytest.mark.parametrize("content", [b"my notes", b"\x89PNG\r\n", b'{"loss": 1}\n', b" \n"])
def test_a_file_of_somebody_else_is_not_appended_to(content, tmp_path):
  path = tmp_path / "notes"
  path.write_bytes(content)
  assert error_of(ValueError, lambda: clipjax.runs.Recorder(path)) == (
    f"`path` must be a new file or one that a Recorder wrote, got {str(path)!r}, which is neither: name another file."
  )
  assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(tmp_path):
  missing = tmp_path / "none" / "run.jsonl"
  assert error_of(FileNotFoundError, lambda: clipjax.runs.Recorder(missing)) == (
    f"[Errno 2] No such file or directory: '{missing}'"
  )
  assert (
    error_of(IsADirectoryError, lambda: clipjax.runs.Recorder(tmp_path)) == f"[Errno 21] Is a directory: '{tmp_path}'"
  )
  assert list(tmp_path.iterdir()) == []


def inside_jit(recorder, **pushed):
  def step(x):
    given = {key: x if value is ... else value for key, value in pushed.items()}
    recorder.push(given.pop("step", 9), given.pop("state", STATES[2]), **given)
    return x

  jax.jit(step)(jnp.float32(1.0))


TRACED = (
  "`{}` must be an array with a value, got a traced one: call `push` outside jit, with what the jitted step returns."
)
IN_JIT = "`push` must be called outside jit, got a call in a traced function: push what the jitted step returns."
TRACER = []  # What JAX calls an array inside jit, which differs from release to release.
jax.eval_shape(lambda x: TRACER.append(type(x).__name__), 1.0)
ANOTHER = "must be another key, got one that the Recorder writes itself: rename it."
PUSHES = {
  "a transformation": (
    lambda r: r.push(9, TX), TypeError, f"{OPT_STATE}, got a GradientTransformationExtraArgs: {RETURNED}",
  ),
  "a chain of transformations": (
    lambda r: r.push(9, (STATES[1], optax.sgd(1.0))),
    TypeError, f"{OPT_STATE}, got a GradientTransformationExtraArgs: {RETURNED}",
  ),
  "a string for a state": (
    lambda r: r.push(9, "state"), TypeError, f"{OPT_STATE}, got 'state' (str): {RETURNED}",
  ),
  "arguments swapped": (
    lambda r: r.push(STATES[1], 9),
    TypeError, "`step` must be an integer, got a ClipState: pass the number of the step.",
  ),
  "a step that is a float": (
    lambda r: r.push(1.0, STATES[1]),
    TypeError, "`step` must be an integer, got 1.0 (float): pass the number of the step.",
  ),
  "a step that is True": (
    lambda r: r.push(True, STATES[1]),
    TypeError, "`step` must be an integer, got True (bool): pass the number of the step.",
  ),
  "a step that is a vector": (
    lambda r: r.push(jnp.arange(2), STATES[1]),
    TypeError, "`step` must be an integer, got int32[2]: pass the number of the step.",
  ),
  "a step beyond int64": (
    lambda r: r.push(2**63, STATES[1]),
    ValueError, "`step` must be in the range of an int64, got a larger integer: pass the number of the step.",
  ),
  "a step inside jit": (lambda r: inside_jit(r, step=...), TypeError, TRACED.format("step")),
  "a loss inside jit": (lambda r: inside_jit(r, loss=...), TypeError, TRACED.format("loss")),
  "parameters inside jit": (lambda r: inside_jit(r, params=...), TypeError, TRACED.format("params")),
  "a call inside jit of what is outside": (inside_jit, TypeError, IN_JIT),
  "a state inside jit": (
    lambda r: jax.jit(lambda s: (r.push(9, s), s)[1])(STATES[2]), TypeError, TRACED.format("opt_state"),
  ),
  "no loss": (
    lambda r: r.push(9, STATES[2], loss=None),
    TypeError, f"`loss` must be a real number or an array of shape (), got a NoneType: {NUMBERS}",
  ),
  "a loss that is a string": (
    lambda r: r.push(9, STATES[2], loss="1"),
    TypeError, f"`loss` must be a real number or an array of shape (), got '1' (str): {NUMBERS}",
  ),
  "a complex loss": (
    lambda r: r.push(9, STATES[2], loss=jnp.complex64(1)),
    TypeError, f"`loss` must be a real number or an array of shape (), got complex64[]: {NUMBERS}",
  ),
  "a loss of each example": (
    lambda r: r.push(9, STATES[2], loss=jnp.ones(3)),
    ValueError, "`loss` must be a scalar, got shape (3,): reduce it, for example with jnp.mean, or push an entry.",
  ),
  "a number too large": (
    lambda r: r.push(9, STATES[2], tokens=10**400),
    ValueError, "`tokens` must be in the range of a float, got a larger integer: scale it.",
  ),
  "a key of metrics": (
    lambda r: r.push(9, STATES[2], **{"grad/norm": 1.0}), ValueError, f"`grad/norm` {ANOTHER}",
  ),
  "a key of the file": (lambda r: r.push(9, STATES[2], time=1.0), ValueError, f"`time` {ANOTHER}"),
  "parameters that are a string": (
    lambda r: r.push(9, STATES[2], params="w"),
    TypeError, "`params` must have floating or complex leaves, got 'w' (str): pass the parameters that you train.",
  ),
  "parameters that are integers": (
    lambda r: r.push(9, STATES[2], params=[jnp.arange(3)]),
    TypeError, "`params` must have floating or complex leaves, got int32[3]: pass the parameters that you train.",
  ),
  "the states of several models": (
    lambda r: r.push(9, jax.tree.map(lambda x: jnp.stack([x, x]), STATES[2])),
    ValueError,
    "`opt_state` must be that of one model, got 'grad' with leading axes (2,), as under vmap or pmap: push one of "
    "them, jax.tree.map(lambda x: x[0], opt_state).",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", PUSHES)
def test_a_push_that_fails_leaves_no_trace_and_the_next_ones_are_written(case, tmp_path):
  push, kind, text = PUSHES[case]
  path = tmp_path / "run.jsonl"
  with clipjax.runs.Recorder(path, every=2) as recorder:
    assert error_of(kind, lambda: push(recorder)) == text  # First of all.
    recorder.push(1, STATES[1], loss=0.5, params=GRADS)
    if not case.startswith("parameters"):  # They are looked at once in `every` pushes.
      assert error_of(kind, lambda: push(recorder)) == text  # With a push waiting.
    recorder.push(2, STATES[2], loss=0.25)
    recorder.push(3, STATES[3])
  run = clipjax.runs.read_run(path)
  assert run.steps.tolist() == [1, 2, 3] and run.parameters == 2 and run.weights[0].tolist() == [1]
  np.testing.assert_array_equal(run["loss"], [0.5, 0.25, math.nan])
  assert run["grad/norm"].tolist() == [5.0] * 3 and "tokens" not in run and "user_step" not in run


def test_a_push_after_close_writes_nothing(run_file):
  before = run_file.read_bytes()
  recorder = clipjax.runs.Recorder(run_file)
  recorder.close()
  after_open = run_file.read_bytes()
  assert error_of(ValueError, lambda: recorder.push(6, STATES[5])) == (
    "`push` must be called before `close`, got a closed Recorder: make another, of the same path."
  )
  recorder.close()
  assert run_file.read_bytes() == after_open and after_open.startswith(before)


def test_a_full_disk_is_one_warning_at_the_caller_and_loses_no_row(tmp_path, monkeypatch):
  path, whole = tmp_path / "run.jsonl", file_of_rows._write_all

  def half(file, text):
    whole(file, text[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")

  with clipjax.runs.Recorder(path, every=1) as recorder:
    recorder.push(1, STATES[1])
    recorder.flush()
    monkeypatch.setattr(file_of_rows, "_write_all", half)
    with pytest.warns(RuntimeWarning) as caught:  # noqa: PT031  (one warning for all of it)
      recorder.push(2, STATES[2])
      recorder.flush()
      recorder.push(3, STATES[3])
      recorder.flush()
    assert clipjax.runs.read_run(path).steps.tolist() == [1]  # What was there is still whole.
    monkeypatch.setattr(file_of_rows, "_write_all", whole)
    recorder.push(4, STATES[4])
  (warning,) = caught
  assert str(warning.message) == (
    f"cannot write {str(path)!r}: No space left on device; the training goes on, and the last 16 MiB of rows are kept "
    "to be written when it is possible again: free disk space or fix the path."
  )
  assert pathlib.Path(warning.filename).name == "test_bad_files.py"
  assert clipjax.runs.read_run(path).steps.tolist() == [1, 2, 3, 4]


# Run files ----------------------------------------------------------------------------------------------------------

HEADER = b'{"clipjax_run": 1, "version": "0.1.0", "leaves": {"grad": ["w"]}, "parameters": 2}\n'
OTHER = (
  "`path` must be a file that `clipjax.runs.Recorder` wrote, got {!r}, which has {}: pass the path that the "
  "Recorder was "
  "given."
)
NO_HEADER, OTHER_HEADER, OTHER_ROWS = "no header of one", "a header of another kind", "rows of another kind ({})"
FOREIGN = {
  "text": (b"hello\nworld\n", NO_HEADER),
  "one word": (b"x", NO_HEADER),
  "binary": (bytes(range(256)) * 4, NO_HEADER),
  "a gzip": (b"\x1f\x8b\x08\x00" + b"\0" * 30, NO_HEADER),
  "JSON of another kind": (b'{"loss": 1}\n{"loss": 2}\n', NO_HEADER),
  "a JSON array": (b"[1, 2]\n", NO_HEADER),
  "CSV": (b"step,grad/norm\n1,2.0\n", NO_HEADER),
  "UTF-16": ((HEADER + b'{"step": 1}\n').decode().encode("utf-16"), NO_HEADER),
  "a torn header": (HEADER[:40], NO_HEADER),
  "rows alone": (b'{"step": 1, "grad/norm": 1.0}\n', NO_HEADER),
  "a format of 0": (b'{"clipjax_run": 0}\n', OTHER_HEADER),
  "a format below 0": (b'{"clipjax_run": -1}\n{"step": 1}\n', OTHER_HEADER),
  "a format as a string": (b'{"clipjax_run": "1"}\n', OTHER_HEADER),
  "a format that is true": (b'{"clipjax_run": true}\n', OTHER_HEADER),
  "no format": (b'{"clipjax_run": null}\n', OTHER_HEADER),
  "leaves in a list": (b'{"clipjax_run": 1, "leaves": ["w"]}\n', OTHER_ROWS.format("AttributeError")),
  "leaves as one string": (b'{"clipjax_run": 1, "leaves": {"grad": "w"}}\n', OTHER_ROWS.format("TypeError")),
  "leaves as a number": (b'{"clipjax_run": 1, "leaves": {"grad": 1}}\n', OTHER_ROWS.format("TypeError")),
  "parameters as a word": (b'{"clipjax_run": 1, "parameters": "two"}\n', OTHER_ROWS.format("TypeError")),
  "a number as a string": (HEADER + b'{"step": 1, "grad/norm": "3"}\n', OTHER_ROWS.format("TypeError")),
  "a number as a list": (HEADER + b'{"step": 1, "grad/norm": [3]}\n', OTHER_ROWS.format("TypeError")),
  "an object of no meaning": (HEADER + b'{"step": 1, "loss": {"a": 1}}\n', OTHER_ROWS.format("TypeError")),
  "a vector of words": (HEADER + b'{"step": 1, "leaf": {"grad/norm": ["x"]}}\n', OTHER_ROWS.format("ValueError")),
  "a vector that is none": (HEADER + b'{"step": 1, "leaf": [1]}\n', OTHER_ROWS.format("AttributeError")),
  "weights that are a number": (HEADER + b'{"step": 1, "weights": 3}\n', OTHER_ROWS.format("TypeError")),
  "weights without edges": (HEADER + b'{"step": 1, "weights": {"counts": [1]}}\n', OTHER_ROWS.format("KeyError")),
  "weights of other bins": (
    HEADER + b'{"step": 1, "weights": {"edges": [0, 1], "counts": [1, 2]}}\n', OTHER_ROWS.format("ValueError"),
  ),
  "a step beyond int64": (HEADER + b'{"step": 1' + b"0" * 30 + b"}\n", OTHER_ROWS.format("OverflowError")),
  "flags that are none": (HEADER + b'{"step": 1, "nonfinite": [["a"]]}\n', OTHER_ROWS.format("TypeError")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_no_recorder_wrote(case, tmp_path, capsys):
  content, what = FOREIGN[case]
  path = tmp_path / "run.jsonl"
  path.write_bytes(content)
  text = OTHER.format(str(path), what)
  assert error_of(ValueError, lambda: clipjax.runs.read_run(path)) == text
  for command in ("report", "suggest"):
    assert cli.main([command, str(path)]) == 2
    assert capsys.readouterr() == ("", f"clipjax: {text}\n")
  assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_run_that_is_not_there_or_of_a_later_format(tmp_path):
  name = "`path` must be a file that `clipjax.runs.Recorder` wrote, got"
  path = tmp_path / "run.jsonl"
  assert error_of(FileNotFoundError, lambda: clipjax.runs.read_run(path)) == (
    f"{name} {str(path)!r}, which does not exist: look at its spelling."
  )
  assert error_of(ValueError, lambda: clipjax.runs.read_run(tmp_path)) == (
    f"{name} the directory {str(tmp_path)!r}: name the file."
  )
  path.write_bytes(b" \n")
  assert error_of(ValueError, lambda: clipjax.runs.read_run(path)) == (
    f"{name} {str(path)!r}, which is empty: a Recorder writes its first rows after `every` steps, or when it is closed."
  )
  path.write_bytes(b'{"clipjax_run": 3, "version": "9.0"}\n')
  assert error_of(ValueError, lambda: clipjax.runs.read_run(path)) == (
    f"`path` must be a file of format 2 or below, got {str(path)!r} of format 3: read it with the version of clipjax "
    "that wrote it, 9.0, or a later one."
  )


def test_a_run_cut_anywhere_gives_the_rows_that_are_whole(run_file):
  data, whole = run_file.read_bytes(), clipjax.runs.read_run(run_file)
  header = data.index(b"\n")
  for end in range(0, len(data), 7):
    run_file.write_bytes(data[:end])
    if end < header:
      assert (
        "which is empty" in (text := error_of(ValueError, lambda: clipjax.runs.read_run(run_file))) or NO_HEADER in text
      )
      continue
    run = clipjax.runs.read_run(run_file)
    complete = sum(b'"step"' in line and line.endswith(b"}") for line in data[:end].split(b"\n"))
    assert run.steps.tolist() == whole.steps[: len(run)].tolist() and abs(len(run) - complete) <= 1
    np.testing.assert_array_equal(run["grad/norm"] if len(run) else [], whole["grad/norm"][: len(run)])


def test_a_run_with_a_byte_flipped_is_read_or_refused(run_file):
  data = run_file.read_bytes()
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(300):
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    run_file.write_bytes(bytes(changed))
    try:
      run = clipjax.runs.read_run(run_file)
    except ValueError as error:  # Nothing else may come out.
      refused += 1
      assert str(error).startswith("`path` must be a file ")  # noqa: PT017  (most files raise nothing)
    else:
      str(clipjax.runs.diagnose(run))
  assert refused


# Judging and reporting ----------------------------------------------------------------------------------------------

WHOLE = ("min_steps", "spike_window")


@pytest.mark.parametrize("field", clipjax.runs.HealthLimits._fields)
@pytest.mark.parametrize("value", ["0.5", None, True, 1j, [1.0], np.ones(2)])
def test_a_limit_that_is_no_number(field, value, run_file):
  least = {"min_steps": 1, "spike_window": 8}.get(field, 0)
  got = f"{value!r} ({type(value).__name__})" if isinstance(value, str | bool) else f"a {type(value).__name__}"
  run = clipjax.runs.read_run(run_file)
  assert error_of(
    TypeError, lambda: clipjax.runs.diagnose(run, limits=clipjax.runs.HealthLimits(**{field: value}))
  ) == (
    f"`limits.{field}` must be a {'whole ' if field in WHOLE else ''}number >= {least}, got {got}: pass one such as "
    f"{clipjax.runs.HealthLimits._field_defaults[field]}."
  )


@pytest.mark.parametrize("field", clipjax.runs.HealthLimits._fields)
def test_a_limit_out_of_its_range(field, run_file):
  least = {"min_steps": 1, "spike_window": 8}.get(field, 0)
  run = clipjax.runs.read_run(run_file)
  for value in (-1, least - 1) if field in WHOLE else (-1.0, math.nan, -math.inf):
    assert error_of(
      ValueError, lambda value=value: clipjax.runs.diagnose(run, limits=clipjax.runs.HealthLimits(**{field: value}))
    ) == (
      f"`limits.{field}` must be a {'whole ' if field in WHOLE else ''}number >= {least}, got {value}: pass one such "
      f"as {clipjax.runs.HealthLimits._field_defaults[field]}."
    )
  # The ends of the range are limits like others.
  for value in (least,) if field in WHOLE else (0, 0.0, math.inf, np.float32(1)):
    assert clipjax.runs.diagnose(run, limits=clipjax.runs.HealthLimits(**{field: value})).steps == 5


@pytest.mark.parametrize("limits", [{"min_steps": 1}, {"min_steps": 1, "spike_window": 8, "spike_sigma": math.inf}])
def test_limits_that_let_a_short_run_be_judged(limits, tmp_path):
  path = tmp_path / "run.jsonl"
  for steps in range(1, 14):
    rows = [{"step": i, "grad/norm": 1.0 + i, "grad/scale": 0.5, "grad/max_norm": 1.0, "loss": i} for i in range(steps)]
    rows = [{**row, "val_loss": 2.0, "update/ratio": 0.0, "skip/consecutive": 0} for row in rows]
    path.write_bytes(HEADER + "\n".join(map(json.dumps, rows)).encode() + b"\n")
    for warmup in (0, None, 1):
      report = clipjax.runs.diagnose(
        clipjax.runs.read_run(path), limits=clipjax.runs.HealthLimits(**limits), warmup_steps=warmup
      )
      assert "nan" not in str(report) and report.steps == steps


LIST = "pass clipjax.runs.read_run(path) or a list of numbers."
NORMS = "`norms_or_run` must be a Run or a 1-D array of norms"
NO_RUN = "read the file with clipjax.runs.read_run(path)."
JUDGED = {
  "diagnose of a path": (
    lambda run: clipjax.runs.diagnose("run.jsonl"), TypeError, f"`run` must be a Run, got 'run.jsonl' (str): {NO_RUN}",
  ),
  "diagnose of nothing": (
    lambda run: clipjax.runs.diagnose(None), TypeError, f"`run` must be a Run, got a NoneType: {NO_RUN}",
  ),
  "limits as a dict": (
    lambda run: clipjax.runs.diagnose(run, limits={"rise": 2.0}),
    TypeError, "`limits` must be a HealthLimits, got a dict: pass one such as HealthLimits(clip_fraction=0.9).",
  ),
  "the class of limits": (
    lambda run: clipjax.runs.diagnose(run, limits=clipjax.runs.HealthLimits),
    TypeError, "`limits` must be a HealthLimits, got a type: pass one such as HealthLimits(clip_fraction=0.9).",
  ),
  "a warm-up below 0": (
    lambda run: clipjax.runs.diagnose(run, warmup_steps=-1),
    ValueError, "`warmup_steps` must be >= 0, got -1: pass 0 to leave no step out.",
  ),
  "a warm-up as a string": (
    lambda run: clipjax.runs.suggest_max_norm(run, warmup_steps="3"),
    TypeError, "`warmup_steps` must be a whole number or None, got '3' (str): pass how many steps to leave out.",
  ),
  "a table of no width": (
    lambda run: clipjax.runs.diagnose(run).table("wide"),
    TypeError, "`width` must be a whole number, got 'wide' (str): pass how many columns the text may have.",
  ),
  "suggest of a path": (
    lambda run: clipjax.runs.suggest_max_norm("run.jsonl"), TypeError, f"{NORMS}, got 'run.jsonl' (str): {LIST}",
  ),
  "suggest of a dict": (
    lambda run: clipjax.runs.suggest_max_norm({"norm": [1.0]}), TypeError, f"{NORMS}, got a dict: {LIST}",
  ),
  "suggest of flags": (lambda run: clipjax.runs.suggest_max_norm([True]), TypeError, f"{NORMS}, got a list: {LIST}"),
  "suggest of complex numbers": (
    lambda run: clipjax.runs.suggest_max_norm(np.ones(3) * 1j), TypeError, f"{NORMS}, got a ndarray: {LIST}",
  ),
  "suggest of a matrix": (
    lambda run: clipjax.runs.suggest_max_norm(np.ones((2, 2))),
    ValueError, f"{NORMS}, got shape (2, 2): pass the norm of each step.",
  ),
  "suggest of one number": (
    lambda run: clipjax.runs.suggest_max_norm(3.0), ValueError, f"{NORMS}, got shape (): pass the norm of each step.",
  ),
  "suggest of nothing": (
    lambda run: clipjax.runs.suggest_max_norm([]), ValueError, f"{NORMS}, got shape (0,): pass the norm of each step.",
  ),
  "suggest inside jit": (
    lambda run: jax.jit(clipjax.runs.suggest_max_norm)(jnp.ones(30)), TypeError, f"{NORMS}, got a {TRACER[0]}: {LIST}",
  ),
  "suggest of a negative norm": (
    lambda run: clipjax.runs.suggest_max_norm([1.0, -2.0]),
    ValueError, "`norms_or_run` must be norms, which are >= 0, got -2 at index 1: pass norms, not their logarithms.",
  ),
  "suggest of NaN": (
    lambda run: clipjax.runs.suggest_max_norm([math.nan] * 20),
    ValueError,
    "`norms_or_run` must have finite norms after the warm-up of 2 steps, got none of 20 (0 finite in all): record more "
    "steps, at a learning rate at which they stay finite, or lower `warmup_steps`.",
  ),
  "suggest of zeros": (
    lambda run: clipjax.runs.suggest_max_norm([0.0] * 20),
    ValueError,
    "`norms_or_run` must have norms above 0, got 0 in 100% of 18: look why the gradient is zero before you clip it.",
  ),
  "one rate of two": (
    lambda run: clipjax.runs.suggest_max_norm(run, new_learning_rate=0.1),
    ValueError,
    "`learning_rate` and `new_learning_rate` must be given both or neither, got None and 0.1: pass the rate of the "
    "recorded run and the one that the threshold is for.",
  ),
  "a rate of 0": (
    lambda run: clipjax.runs.suggest_max_norm(run, learning_rate=0, new_learning_rate=0.1),
    ValueError, "`learning_rate` must be > 0 and finite, got 0: pass a float such as 0.1.",
  ),
  "a rate that is NaN": (
    lambda run: clipjax.runs.suggest_max_norm(run, learning_rate=0.1, new_learning_rate=math.nan),
    ValueError, "`new_learning_rate` must be > 0 and finite, got nan: pass a float such as 0.1.",
  ),
  "a complex rate": (
    lambda run: clipjax.runs.suggest_max_norm(run, learning_rate=np.complex64(1), new_learning_rate=0.1),
    TypeError, "`learning_rate` must be a number, got a complex64: pass a float such as 0.1.",
  ),
  "a model that is a number": (
    lambda run: clipjax.runs.suggest_max_norm(run, model=3),
    ValueError,
    "`model` must be one of feed-forward, cnn, rnn, lstm, transformer or None, got 3 (int): pass the nearest.",
  ),
  "scale_free as a number": (
    lambda run: clipjax.runs.suggest_max_norm(run, scale_free=1),
    TypeError, "`scale_free` must be True, False or None, got 1 (int): pass one of them.",
  ),
  "plot of a path": (
    lambda run: clipjax.runs.plot_norms(pathlib.PurePosixPath("a")),
    TypeError, f"`run` must be a Run, got a PurePosixPath: {NO_RUN}",
  ),
  "a report, arguments swapped": (
    lambda run: clipjax.runs.write_report("out.html", run),
    TypeError, f"`run` must be a Run, got 'out.html' (str): {NO_RUN}",
  ),
  "a report over its run": (
    lambda run: clipjax.runs.write_report(run, run.path),
    ValueError, "`path` must not be the file of the run, got {path}: name another file for the page.",
  ),
  "a column that is not there": (
    lambda run: run["grad/nrm"], KeyError, "{path} has no 'grad/nrm'; it has 'grad/norm'",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", JUDGED)
def test_wrong_arguments_of_what_judges_a_run(case, run_file, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  call, kind, text = JUDGED[case]
  run, before = clipjax.runs.read_run(run_file), run_file.read_bytes()
  message = error_of(kind, lambda: call(run))
  if kind is KeyError:  # Its text is quoted, and goes on with other near names.
    assert message.strip("\"'").startswith(text.format(path=run.path))
  else:
    assert message == text.format(path=repr(run.path))
  assert run_file.read_bytes() == before and list(tmp_path.iterdir()) == [run_file]


def test_a_report_on_a_full_disk_leaves_the_old_one(run_file, tmp_path, monkeypatch):
  page, run = tmp_path / "report.html", clipjax.runs.read_run(run_file)
  page.write_text(START)
  whole = pathlib.Path.write_bytes

  def half(path, content):
    whole(path, content[:100])
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_bytes", half)
  assert (
    error_of(OSError, lambda: clipjax.runs.write_report(run, page)) == f"[Errno 28] No space left on device: '{page}'"
  )
  assert page.read_text() == START and sorted(tmp_path.iterdir()) == sorted([page, run_file])


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_device(run_file, capsys):
  run = clipjax.runs.read_run(run_file)
  assert error_of(OSError, lambda: clipjax.runs.write_report(run, "/dev/full")) == (
    "[Errno 28] No space left on device: '/dev/full'"
  )
  assert cli.main(["report", str(run_file), "-o", "/dev/full"]) == 2
  assert capsys.readouterr().err == "clipjax: cannot write /dev/full: No space left on device\n"
  assert pathlib.Path("/dev/full").is_char_device()
  assert error_of(ValueError, lambda: clipjax.runs.Recorder("/dev/full")) == (
    "`path` must be a new file or one that a Recorder wrote, got '/dev/full', which is no regular file: name a "
    "file on a disk."
  )


# The command line ---------------------------------------------------------------------------------------------------

COMMANDS = {
  "an unknown command": (["judge"], "argument COMMAND: invalid choice: 'judge' (choose from"),
  "suggest without a run": (["suggest"], "the following arguments are required: RUN"),
  "report without a run": (["report"], "the following arguments are required: RUN"),
  "a rate that is a word": (
    ["suggest", "RUN", "--learning-rate", "fast"], "argument --learning-rate: invalid float value: 'fast'",
  ),
  "an option without a value": (["suggest", "RUN", "--model"], "argument --model: expected one argument"),
  "an output without a name": (["report", "RUN", "-o"], "argument -o/--output: expected one argument"),
  "an unknown option": (["report", "RUN", "--loud"], "unrecognized arguments: --loud"),
  "two runs": (["suggest", "RUN", "RUN"], "unrecognized arguments: RUN"),
  "no steps": (["demo", "--steps", "0"], "argument --steps: must be >= 1, got 0"),
  "steps that are a fraction": (["demo", "--steps", "1.5"], "argument --steps: must be a whole number, got '1.5'"),
  "a seed below 0": (["demo", "--seed", "-1"], "argument --seed: must be >= 0 and <= 4294967295, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_wrong_options_are_told_and_nothing_is_written(case, run_file, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  args, text = COMMANDS[case]
  with pytest.raises(SystemExit) as error:
    cli.main([str(run_file) if arg == "RUN" else arg for arg in args])
  out, err = capsys.readouterr()
  last = err.splitlines()[-1].replace(str(run_file), "RUN")
  assert error.value.code == 2 and out == "" and last.partition(": error: ")[2].startswith(text)
  assert list(tmp_path.iterdir()) == [run_file]


ONE_LINE = {
  "no such run": (["suggest", "none.jsonl"], "cannot read none.jsonl: there is no such file"),
  "a directory": (
    ["report", "."], "`path` must be a file that `clipjax.runs.Recorder` wrote, got the directory '.': name the file.",
  ),
  "a directory for the page": (["report", "run.jsonl", "-o", "."], "cannot write .: Is a directory"),
  "no such directory": (
    ["report", "run.jsonl", "-o", "none/x.html"],
    "cannot write none/x.html: the directory of the report does not exist, create it first",
  ),
  "the run for its page": (
    ["report", "run.jsonl", "-o", "run.jsonl"],
    "the report must not be the file of the run, got 'run.jsonl': name another file with -o",
  ),
  "an unknown family": (
    ["suggest", "run.jsonl", "--model", "gan"],
    "`model` must be one of feed-forward, cnn, rnn, lstm, transformer or None, got 'gan' (str): pass the nearest.",
  ),
  "a rate of 0": (
    ["suggest", "run.jsonl", "--learning-rate", "0", "--new-learning-rate", "1"],
    "`learning_rate` must be > 0 and finite, got 0.0: pass a float such as 0.1.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_LINE)
def test_wrong_files_are_one_line_and_exit_code_2(case, run_file, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  args, text = ONE_LINE[case]
  before = run_file.read_bytes()
  assert cli.main(args) == 2
  assert capsys.readouterr().err == f"clipjax: {text}\n"
  assert run_file.read_bytes() == before and list(tmp_path.iterdir()) == [run_file]


def test_a_run_without_norms_is_one_line(tmp_path, capsys):
  path = tmp_path / "run.jsonl"
  path.write_bytes(HEADER + json.dumps({"step": 1, "loss": 1.0}).encode() + b"\n")
  assert cli.main(["suggest", str(path)]) == 2
  assert capsys.readouterr() == (
    "",
    "clipjax: `norms_or_run` must have finite norms after the warm-up of 0 steps, got none of 0 (0 finite in all): "
    "record more steps, at a learning rate at which they stay finite, or lower `warmup_steps`.\n",
  )
