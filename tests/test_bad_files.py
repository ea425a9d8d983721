"""Bad input to the functions that record, read, judge and report a run: full messages, and no file or row is lost."""

import errno
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recording import message_of, recorded, train

import clipjax
from clipjax import cli
from clipjax.runs import HealthLimits, Recorder, diagnose, read_run, suggest_max_norm, write_report
from clipjax.runs.record import run_file as file_of_rows
from clipjax.runs.report.own_pages import START

TX = clipjax.clip_by_global_norm(1.0)
GRADS = {"w": jnp.array([3.0, 4.0])}
WATCHED = clipjax.watch().init(GRADS)
STATES = [TX.init(GRADS), *(state for _, state in train(TX, [1.0] * 5, params=GRADS))]
NAME, INTEGER = "pass the name of a file.", "pass a Python integer."
NO_PATH, NO_NAME = "`path` must be a string or a pathlib.Path, got", "`path` must be the name of a file, got"
BAD_PATHS = {
  "None": (None, TypeError, f"{NO_PATH} a NoneType: {NAME}"),
  "bytes": (b"run.jsonl", TypeError, f"{NO_PATH} a bytes: {NAME}"),
  "empty": ("", ValueError, f"{NO_NAME} '': pass one such as 'run.jsonl'."),
  "a null character": ("a\0b", ValueError, f"{NO_NAME} 'a\\x00b': pass one such as 'run.jsonl'."),
}


@pytest.fixture
def run_file(path):
  """A recorded run of five steps."""
  recorded(path, [(step, STATES[step], {"params": GRADS, "loss": 1.0 / step}) for step in range(1, 6)], every=2)
  return path


# Recorder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD_PATHS)
@pytest.mark.parametrize("function", ["Recorder", "read_run", "write_report"])
def test_anything_but_a_path(case, function, run_file, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path, kind, text = BAD_PATHS[case]
  run = read_run(run_file)
  call = {"Recorder": Recorder, "read_run": read_run, "write_report": lambda path: write_report(run, path)}
  assert message_of(kind, call[function], path) == text
  assert list(tmp_path.iterdir()) == [run_file]


NO_LIMITS = "pass one such as HealthLimits(clip_fraction=0.9)."
EVERY = "`every` must be an integer >= 1, got"
WRITERS = (
  "`writers` must each be a logger that clipjax knows, a function (step, values), or a pair of one and 'leaves', got"
)
RECORDERS = {
  "every 0": ({"every": 0}, ValueError, f"{EVERY} 0: choose one in that range."),
  "every as a string": ({"every": "5"}, TypeError, f"{EVERY} '5' (str): {INTEGER}"),
  "every True": ({"every": True}, TypeError, f"{EVERY} True (bool): {INTEGER}"),
  "one writer": (
    {"writers": object()}, TypeError, "`writers` must be an iterable of writers, got object: pass [writer].",
  ),
  "a writer that is a string": (
    {"writers": ["tensorboard"]}, TypeError, f"{WRITERS} 'tensorboard': pass a function that forwards the values.",
  ),
  "on_finding as a number": (
    {"on_finding": 3}, TypeError, "`on_finding` must be a function of a Finding, got 3 (int): pass one, or None.",
  ),
  "limits as a number": ({"limits": 5}, TypeError, f"`limits` must be a HealthLimits, got 5 (int): {NO_LIMITS}"),
  "a limit below 0": (
    {"limits": HealthLimits(spike_sigma=-1.0)}, ValueError,
    "`limits.spike_sigma` must be a number >= 0, got -1.0: pass one such as 6.0.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDERS)
def test_a_recorder_that_fails_makes_no_file_and_touches_none(case, run_file, tmp_path):
  options, kind, text = RECORDERS[case]
  before = run_file.read_bytes()
  for path in (run_file, tmp_path / "new.jsonl"):
    assert message_of(kind, Recorder, path, **options) == text
  assert run_file.read_bytes() == before and list(tmp_path.iterdir()) == [run_file]


@pytest.mark.parametrize("content", [b"my notes", b"\x89PNG\r\n", b'{"loss": 1}\n', b" \n"])
def test_a_file_of_another_program_is_not_appended_to(content, tmp_path):
  path = tmp_path / "notes"
  path.write_bytes(content)
  assert message_of(ValueError, Recorder, path) == (
    f"`path` must be a new file or one that a Recorder wrote, got {str(path)!r}, which is neither: name another file."
  )
  assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(tmp_path):
  missing = tmp_path / "none" / "run.jsonl"
  assert message_of(FileNotFoundError, Recorder, missing) == f"[Errno 2] No such file or directory: '{missing}'"
  assert message_of(IsADirectoryError, Recorder, tmp_path) == f"[Errno 21] Is a directory: '{tmp_path}'"
  assert list(tmp_path.iterdir()) == []


def push(recorder, **given):
  """Pushes step 9 with what is given; `...` stands for an array inside jit."""
  call = {"step": 9, "opt_state": STATES[2], **given}

  def pushed(x, state):
    traced = {key: state if key == "opt_state" else x for key, value in call.items() if value is ...}
    recorder.push(**call | traced)
    return x

  is_traced = any(value is ... for value in call.values())
  (jax.jit(pushed) if is_traced else pushed)(jnp.float32(1.0), STATES[2])


OPT_STATE, RETURNED = "`opt_state` must be the state of an optimizer, got", "pass what `init` or `update` returned."
STEP, NUMBER = "`step` must be an integer, got", "pass the number of the step."
LOSS, ALONE = "`loss` must be a real number or an array of shape (), got", "push only numbers."
SCALAR, REDUCED = "`loss` must be a scalar, got shape", "reduce it, for example with jnp.mean, or push one entry."
WEIGHTS, TRAINED = "`params` must have floating or complex leaves, got", "pass the parameters that you train."
TRACED = (
  "must be an array with a value, got a traced array: call `push` outside jit, with what the jitted step returns."
)
IN_JIT = "`push` must be called outside jit, got a call in a traced function: push what the jitted step returns."
BATCH, LOOK = "`batch` must be an integer or a short string, got", "pass the name you look the batch up by."
ANOTHER = "must be another key, got one that the Recorder writes itself: rename it."
FAR = "`batch` must be in the range of an int64, got an integer of 64 bits: pass it as a string."
LONG = "`batch` must have at most 100 characters, got 101: pass the name of the batch, not what is in it."
TRACER = []  # The type of an array inside jit; its name differs between releases of JAX.
jax.eval_shape(lambda x: TRACER.append(type(x).__name__), 1.0)
PUSHES = {
  "a transformation": ({"opt_state": TX}, TypeError, f"{OPT_STATE} a GradientTransformationExtraArgs: {RETURNED}"),
  "a transformation in a chain": (
    {"opt_state": (STATES[1], optax.sgd(1.0))}, TypeError, f"{OPT_STATE} a GradientTransformationExtraArgs: {RETURNED}",
  ),
  "arguments swapped": ({"step": STATES[1], "opt_state": 9}, TypeError, f"{STEP} a ClipState: {NUMBER}"),
  "a step that is a float": ({"step": 1.0}, TypeError, f"{STEP} 1.0 (float): {NUMBER}"),
  "a step that is True": ({"step": True}, TypeError, f"{STEP} True (bool): {NUMBER}"),
  "a step that is a vector": ({"step": jnp.arange(2)}, TypeError, f"{STEP} int32[2]: {NUMBER}"),
  "a step beyond int64": (
    {"step": 2**63}, ValueError, f"`step` must be in the range of an int64, got an integer of 64 bits: {NUMBER}",
  ),
  "a step inside jit": ({"step": ...}, TypeError, f"`step` {TRACED}"),
  "a loss inside jit": ({"loss": ...}, TypeError, f"`loss` {TRACED}"),
  "parameters inside jit": ({"params": ...}, TypeError, f"`params` {TRACED}"),
  "a state inside jit": ({"opt_state": ...}, TypeError, f"`opt_state` {TRACED}"),
  "no loss": ({"loss": None}, TypeError, f"{LOSS} a NoneType: {ALONE}"),
  "a complex loss": ({"loss": jnp.complex64(1)}, TypeError, f"{LOSS} complex64[]: {ALONE}"),
  "a key of random numbers": ({"loss": jax.random.key(0)}, TypeError, f"{LOSS} key<fry>[]: {ALONE}"),
  "a loss of each example": ({"loss": jnp.ones(3)}, ValueError, f"{SCALAR} (3,): {REDUCED}"),
  "a number too large": (
    {"tokens": 10**400}, ValueError, "`tokens` must be in the range of a float, got an integer of 1329 bits: scale it.",
  ),
  "a key of metrics": ({"grad/norm": 1.0}, ValueError, f"`grad/norm` {ANOTHER}"),
  "a key of a leaf": ({"grad/norm/w": 1.0, "opt_state": WATCHED}, ValueError, f"`grad/norm/w` {ANOTHER}"),
  "a key of the file": ({"time": 1.0}, ValueError, f"`time` {ANOTHER}"),
  "a key of what is by leaf": ({"leaf": 1.0}, ValueError, f"`leaf` {ANOTHER}"),
  "a batch that is a float": ({"batch": 1.5}, TypeError, f"{BATCH} 1.5 (float): {LOOK}"),
  "a batch that is True": ({"batch": True}, TypeError, f"{BATCH} True (bool): {LOOK}"),
  "a batch that is a list": ({"batch": ["a"]}, TypeError, f"{BATCH} a list: {LOOK}"),
  "a batch beyond int64": ({"batch": 2**63}, ValueError, FAR),
  "a batch of many characters": ({"batch": "x" * 101}, ValueError, LONG),
  "parameters that are a string": ({"params": "w"}, TypeError, f"{WEIGHTS} 'w' (str): {TRAINED}"),
  "parameters that are integers": ({"params": [jnp.arange(3)]}, TypeError, f"{WEIGHTS} int32[3]: {TRAINED}"),
}  # fmt: skip


@pytest.mark.parametrize("case", PUSHES)
def test_a_push_that_fails_leaves_no_trace_and_the_next_ones_are_written(case, path):
  given, kind, text = PUSHES[case]
  with Recorder(path, every=2) as recorder:
    assert message_of(kind, push, recorder, **given) == text  # First of all.
    recorder.push(1, STATES[1], loss=0.5, params=GRADS)
    if "params" not in given:  # Parameters are checked once in `every` pushes.
      assert message_of(kind, push, recorder, **given) == text  # With a push waiting.
    recorder.push(2, STATES[2], loss=0.25)
    recorder.push(3, STATES[3])
  run = read_run(path)
  assert run.steps.tolist() == [1, 2, 3] and run.parameters == 2 and run.weights[0].tolist() == [1]
  np.testing.assert_array_equal(run["loss"], [0.5, 0.25, math.nan])
  assert run["grad/norm"].tolist() == [5.0] * 3 and "tokens" not in run and "user_step" not in run


def test_a_push_inside_jit_of_a_state_from_outside(path):
  with Recorder(path) as recorder:
    assert message_of(TypeError, jax.jit(lambda x: recorder.push(9, STATES[2]) or x), 1.0) == IN_JIT
  assert len(read_run(path)) == 0


def test_a_full_disk_is_one_warning_at_the_caller_and_loses_no_row(path, monkeypatch):
  whole = file_of_rows._write_all

  def half(file, text):
    whole(file, text[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")

  with Recorder(path, every=1) as recorder:

    def push(*steps):
      for step in steps:
        recorder.push(step, STATES[step])
        recorder.flush()

    push(1)
    monkeypatch.setattr(file_of_rows, "_write_all", half)
    with pytest.warns(RuntimeWarning) as caught:
      push(2, 3)
    assert read_run(path).steps.tolist() == [1]  # The earlier row is still whole.
    monkeypatch.setattr(file_of_rows, "_write_all", whole)
    push(4)
  (warning,) = caught
  assert str(warning.message) == (
    f"cannot write {str(path)!r}: No space left on device; training continues, and the last 16 MiB of rows wait "
    "until they can be written: free disk space or fix the path."
  )
  assert pathlib.Path(warning.filename).name == "test_bad_files.py"
  assert read_run(path).steps.tolist() == [1, 2, 3, 4]


# Run files ----------------------------------------------------------------------------------------------------------

HEADER = b'{"clipjax_run": 1, "version": "0.1.0", "leaves": {"grad": ["w"]}, "parameters": 2}\n'
OTHER = (
  "`path` must be a file that `clipjax.runs.Recorder` wrote, got {!r}, which has {}: pass the path that you "
  "gave the Recorder."
)
NO_HEADER, OTHER_HEADER, OTHER_ROWS = "no Recorder header", "a malformed header", "malformed rows ({})"
FOREIGN = {
  "text": (b"hello\nworld\n", NO_HEADER),
  "binary": (bytes(range(256)) * 4, NO_HEADER),
  "JSON of another kind": (b'{"loss": 1}\n{"loss": 2}\n', NO_HEADER),
  "a JSON array": (b"[1, 2]\n", NO_HEADER),
  "UTF-16": ((HEADER + b'{"step": 1}\n').decode().encode("utf-16"), NO_HEADER),
  "a torn header": (HEADER[:40], NO_HEADER),
  "a format of 0": (b'{"clipjax_run": 0}\n', OTHER_HEADER),
  "a format as a string": (b'{"clipjax_run": "1"}\n', OTHER_HEADER),
  "a format that is true": (b'{"clipjax_run": true}\n', OTHER_HEADER),
  "no format": (b'{"clipjax_run": null}\n', OTHER_HEADER),
  "leaves in a list": (b'{"clipjax_run": 1, "leaves": ["w"]}\n', OTHER_ROWS.format("AttributeError")),
  "leaves as one string": (b'{"clipjax_run": 1, "leaves": {"grad": "w"}}\n', OTHER_ROWS.format("TypeError")),
  "an optimizer that is a word": (b'{"clipjax_run": 2, "optimizer": "adam"}\n', OTHER_ROWS.format("TypeError")),
  "an optimizer of numbers": (b'{"clipjax_run": 2, "optimizer": [1]}\n', OTHER_ROWS.format("TypeError")),
  "a batch that is an object": (HEADER + b'{"step": 1, "batch": {"a": 1}}\n', OTHER_ROWS.format("TypeError")),
  "parameters as a word": (b'{"clipjax_run": 1, "parameters": "two"}\n', OTHER_ROWS.format("TypeError")),
  "a number as a string": (HEADER + b'{"step": 1, "grad/norm": "3"}\n', OTHER_ROWS.format("TypeError")),
  "a number as a list": (HEADER + b'{"step": 1, "grad/norm": [3]}\n', OTHER_ROWS.format("TypeError")),
  "a vector of words": (HEADER + b'{"step": 1, "leaf": {"grad/norm": ["x"]}}\n', OTHER_ROWS.format("ValueError")),
  "a vector that is none": (HEADER + b'{"step": 1, "leaf": [1]}\n', OTHER_ROWS.format("AttributeError")),
  "weights without edges": (HEADER + b'{"step": 1, "weights": {"counts": [1]}}\n', OTHER_ROWS.format("KeyError")),
  "weights of other bins": (
    HEADER + b'{"step": 1, "weights": {"edges": [0, 1], "counts": [1, 2]}}\n', OTHER_ROWS.format("ValueError"),
  ),
  "a step beyond int64": (HEADER + b'{"step": 1' + b"0" * 30 + b"}\n", OTHER_ROWS.format("OverflowError")),
  "flags that are none": (HEADER + b'{"step": 1, "nonfinite": [["a"]]}\n', OTHER_ROWS.format("TypeError")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_no_recorder_wrote(case, path):
  content, what = FOREIGN[case]
  path.write_bytes(content)
  assert message_of(ValueError, read_run, path) == OTHER.format(str(path), what)
  assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


WROTE = "`path` must be a file that `clipjax.runs.Recorder` wrote, got"
LATER = b'{"clipjax_run": 3, "version": "9.0"}\n'
UNREADABLE = {
  "missing": (None, FileNotFoundError, f"{WROTE} {{!r}}, which does not exist: check its spelling."),
  "empty": (
    b" \n", ValueError,
    f"{WROTE} {{!r}}, which is empty: a Recorder writes its first rows after `every` steps, or when it is closed.",
  ),
  "of a later format": (
    LATER, ValueError,
    "`path` must be a file of format 2 or below, got {!r} of format 3: read it with the version of clipjax that wrote "
    "it, 9.0, or a later one.",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_run_that_is_missing_empty_or_of_a_later_format(case, path):
  content, kind, text = UNREADABLE[case]
  if content is not None:
    path.write_bytes(content)
  assert message_of(kind, read_run, path) == text.format(str(path))


def test_anything_but_a_file_is_not_a_run(tmp_path):
  assert message_of(ValueError, read_run, tmp_path) == f"{WROTE} the directory {str(tmp_path)!r}: name the file."
  device = "/dev/null"
  assert message_of(ValueError, read_run, device) == f"{WROTE} {device!r}, which is not a regular file: name the file."


def test_a_run_cut_anywhere_gives_the_rows_that_are_whole(run_file):
  data, whole = run_file.read_bytes(), read_run(run_file)
  header = data.index(b"\n")
  for end in range(0, len(data), 7):
    run_file.write_bytes(data[:end])
    if end < header:
      text = message_of(ValueError, read_run, run_file)
      assert "which is empty" in text or NO_HEADER in text
      continue
    run = read_run(run_file)
    complete = sum(b'"step"' in line and line.endswith(b"}") for line in data[:end].split(b"\n"))
    assert run.steps.tolist() == whole.steps[: len(run)].tolist() and abs(len(run) - complete) <= 1
    np.testing.assert_array_equal(run["grad/norm"] if len(run) else [], whole["grad/norm"][: len(run)])


def test_a_run_with_a_flipped_byte_is_read_or_refused(run_file):
  data = run_file.read_bytes()
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(300):
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    run_file.write_bytes(bytes(changed))
    try:
      run = read_run(run_file)
    except ValueError as error:  # Nothing else may come out.
      refused += 1
      assert str(error).startswith("`path` must be a file ")  # noqa: PT017  (most files raise nothing)
    else:
      str(diagnose(run))
  assert refused


# Judging and reporting ----------------------------------------------------------------------------------------------

WHOLE = ("min_steps", "spike_window")


@pytest.mark.parametrize("field", HealthLimits._fields)
def test_a_limit_that_is_no_number_or_out_of_its_range(field, run_file):
  run, least = read_run(run_file), {"min_steps": 1, "spike_window": 8}.get(field, 0)
  rule = f"`limits.{field}` must be a {'whole ' if field in WHOLE else ''}number >= {least}, got"
  wrong = [(TypeError, x, f"{x!r} ({type(x).__name__})") for x in ("0.5", True)]
  wrong += [(TypeError, x, f"a {type(x).__name__}") for x in (None, 1j, [1.0], np.ones(2))]
  wrong += [(ValueError, x, x) for x in ((-1, least - 1) if field in WHOLE else (-1.0, math.nan, -math.inf))]
  for kind, value, got in wrong:
    text = f"{rule} {got}: pass one such as {getattr(HealthLimits(), field)}."
    assert message_of(kind, diagnose, run, limits=HealthLimits(**{field: value})) == text
  # The ends of the range are valid limits.
  for value in (least,) if field in WHOLE else (0, 0.0, math.inf, np.float32(1)):
    assert diagnose(run, limits=HealthLimits(**{field: value})).steps == 5


@pytest.mark.parametrize("limits", [{"min_steps": 1}, {"min_steps": 1, "spike_window": 8, "spike_sigma": math.inf}])
def test_limits_that_let_a_short_run_be_judged(limits, path):
  for steps in range(1, 14):
    rows = [{"step": i, "grad/norm": 1.0 + i, "grad/scale": 0.5, "grad/max_norm": 1.0, "loss": i} for i in range(steps)]
    rows = [{**row, "val_loss": 2.0, "update/ratio": 0.0, "skip/consecutive": 0} for row in rows]
    path.write_bytes(HEADER + "\n".join(map(json.dumps, rows)).encode() + b"\n")
    for warmup in (0, None, 1):
      report = diagnose(clipjax.runs.read_run(path), limits=HealthLimits(**limits), warmup_steps=warmup)
      assert "nan" not in str(report) and report.steps == steps


LIST = "pass clipjax.runs.read_run(path) or a list of numbers."
NORMS = "`norms_or_run` must be a Run or a 1-D array of norms, got"
JUDGED = {
  "a table of no width": (
    lambda run: diagnose(run).table("wide"),
    TypeError, "`width` must be a whole number, got 'wide' (str): pass how many columns the text may have.",
  ),
  "suggest in jit": (lambda run: jax.jit(suggest_max_norm)(jnp.ones(30)), TypeError, f"{NORMS} a {TRACER[0]}: {LIST}"),
  "suggest of NaN": (
    lambda run: suggest_max_norm([math.nan] * 20), ValueError,
    "`norms_or_run` must have finite norms after the warm-up of 2 steps, got none of 20 (0 finite in all): record more "
    "steps, at a learning rate at which they stay finite, or lower `warmup_steps`.",
  ),
  "one rate of two": (
    lambda run: suggest_max_norm(run, new_learning_rate=0.1), ValueError,
    "`learning_rate` and `new_learning_rate` must be given both or neither, got None and 0.1: pass the rate of the "
    "recorded run and the one that the threshold is for.",
  ),
  "a report over its run": (
    lambda run: write_report(run, run.path),
    ValueError, "`path` must not be the file of the run, got {path}: name another file for the page.",
  ),
  "a column that is not there": (
    lambda run: run["grad/nrm"], KeyError, "{path} has no 'grad/nrm'; it has 'grad/norm'",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", JUDGED)
def test_wrong_arguments_of_the_functions_that_judge_a_run(case, run_file, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  call, kind, text = JUDGED[case]
  run, before = read_run(run_file), run_file.read_bytes()
  message = message_of(kind, call, run)
  if kind is KeyError:  # Its text is quoted and continues with other similar names.
    assert message.strip("\"'").startswith(text.format(path=run.path))
  else:
    assert message == text.format(path=repr(run.path))
  assert run_file.read_bytes() == before and list(tmp_path.iterdir()) == [run_file]


def test_a_report_on_a_full_disk_leaves_the_old_one(run_file, tmp_path, monkeypatch):
  page, run = tmp_path / "report.html", read_run(run_file)
  page.write_text(START)
  whole = pathlib.Path.write_bytes

  def half(path, content):
    whole(path, content[:100])
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_bytes", half)
  assert message_of(OSError, write_report, run, page) == f"[Errno 28] No space left on device: '{page}'"
  assert page.read_text() == START and sorted(tmp_path.iterdir()) == sorted([page, run_file])


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_device(run_file, capsys):
  run = read_run(run_file)
  assert message_of(OSError, write_report, run, "/dev/full") == "[Errno 28] No space left on device: '/dev/full'"
  assert cli.main(["report", str(run_file), "-o", "/dev/full"]) == 2
  assert capsys.readouterr().err == "clipjax: cannot write /dev/full: No space left on device\n"
  assert pathlib.Path("/dev/full").is_char_device()


# The command line ---------------------------------------------------------------------------------------------------

COMMANDS = {
  "suggest without a run": (["suggest"], "the following arguments are required: RUN"),
  "a rate that is a word": (
    ["suggest", "RUN", "--learning-rate", "fast"], "argument --learning-rate: invalid float value: 'fast'",
  ),
  "an unknown option": (["report", "RUN", "--loud"], "unrecognized arguments: --loud"),
  "no steps": (["demo", "--steps", "0"], "argument --steps: must be >= 1, got 0"),
  "steps that are a fraction": (["demo", "--steps", "1.5"], "argument --steps: must be a whole number, got '1.5'"),
  "a seed below 0": (["demo", "--seed", "-1"], "argument --seed: must be >= 0 and <= 4294967295, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_wrong_options_are_reported_and_nothing_is_written(case, run_file, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  args, text = COMMANDS[case]
  with pytest.raises(SystemExit) as error:
    cli.main([str(run_file) if arg == "RUN" else arg for arg in args])
  out, err = capsys.readouterr()
  last = err.splitlines()[-1].replace(str(run_file), "RUN")
  assert error.value.code == 2 and out == "" and last.partition(": error: ")[2].startswith(text)
  assert list(tmp_path.iterdir()) == [run_file]


def test_a_page_in_a_missing_directory_is_one_line(run_file, capsys):
  page = run_file.parent / "none" / "x.html"
  assert cli.main(["report", str(run_file), "-o", str(page)]) == 2
  assert capsys.readouterr().err == (
    f"clipjax: cannot write {page}: the directory of the report does not exist, create it first\n"
  )
