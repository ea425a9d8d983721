"""`read_run` on files written by hand: rows of the run, superseded rows, and lines that a crash tore."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recording import message_of

import clipjax
from clipjax.runs.reading import lines, uniform_rows
from clipjax.runs.reading import read as reading

HEADER = '{"clipjax_run": 1, "version": "0.1.0", "leaves": {"grad": ["w", "b"]}, "parameters": null, "every": 2}\n'


def header(format=2, **fields):
  return {"clipjax_run": format, "version": "0.2.0", "started": 1.0, "leaves": {}, "every": 2, **fields}


def row(step, update=None, **fields):
  return {"step": step, **({} if update is None else {"update": update}), **fields}


def written(path, *entries):
  """The run of a file with these lines; a string is one as it stands."""
  path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in entries))
  return clipjax.runs.read_run(path)


# Format 1 -----------------------------------------------------------------------------------------------------------


def test_reading_by_hand(path):
  path.write_text(
    HEADER + '{"step": 2, "time": 5.5, "grad/norm": 3, "leaf": {"grad/norm": [1, null]}}\n'
    '{"step": 4, "grad/norm": null, "nonfinite": {"grad/norm": "inf"}, "loss": 0.5}\n'
    '{"step": 3, "gr' + "\n" + HEADER + '{"step": 3, "grad/norm": 7, "leaf": {"grad/norm": [1, 2, 3]}}\n'
    '\n[1]\n7\n{"step": 9, "grad/norm": null, "nonfinite": {"grad/norm": "nan"}}\n{"step": 9, "grad/norm": 1}\n{"ste'
  )
  run = clipjax.runs.read_run(path)
  assert run.steps.dtype == np.int64 and run.steps.tolist() == [2, 3, 9] and len(run) == 3
  np.testing.assert_array_equal(run["grad/norm"], [3, 7, 1])
  np.testing.assert_array_equal(run["grad/norm/w"], [1, np.nan, np.nan])
  np.testing.assert_array_equal(run.vectors["grad/norm"][1], [[1, np.inf]])
  assert run.flags == {} and run.weights is None and run.parameters is None and run.path == str(path)
  assert run.keys() == ("time", "grad/norm", "grad/norm/w", "grad/norm/b")
  assert "grad/norm/b" in run and "grad/norm/c" not in run and "loss" not in run and 3 not in run
  assert (run.superseded, run.unreadable) == (1, 4)
  assert message_of(KeyError, run.__getitem__, "grad/nrm").startswith(f"\"{path} has no 'grad/nrm'; it has 'grad/norm'")
  assert "has no 3; it has" in message_of(KeyError, run.__getitem__, 3)


def test_run_without_rows(path):
  clipjax.runs.Recorder(path).close()
  run = clipjax.runs.read_run(path)
  assert len(run) == 0 and run.keys() == () and repr(run) == f"Run({str(path)!r}, 0 steps, 0 columns)"


def test_a_resumed_run_of_format_1_drops_what_follows_its_first_step(path):
  first = [row(step, loss=1.0, user_step=step - 1) for step in range(1, 7)]
  second = [row(step, loss=2.0) for step in (4, 5)]
  run = written(path, header(1), *first, header(1, started=2.0), *second)
  assert run.steps.tolist() == [1, 2, 3, 4, 5] and run["loss"].tolist() == [1, 1, 1, 2, 2] and run.superseded == 3
  # The header of the same recorder, written again for more leaves, drops nothing; nor does a row that goes back.
  run = written(path, header(1), *first, header(1, leaves={"grad": ["w"]}), row(4, loss=2.0), row(2, loss=3.0))
  assert run.steps.tolist() == [1, 2, 3, 4, 5, 6] and run["loss"].tolist() == [1, 3, 1, 2, 1, 1]
  assert run.superseded == 0
  np.testing.assert_array_equal(run["user_step"], [0, 1, 2, 3, 4, 5])


# Format 2 -----------------------------------------------------------------------------------------------------------


def test_a_late_row_adds_to_its_step_and_one_that_goes_back_supersedes(path):
  course = [row(step, time=float(step), loss=1.0, leaf={"grad/norm": [1.0]}) for step in (1, 2, 3)]
  run = written(path, header(), *course, row(1, time=9.0, val_loss=2.0), row(2, leaf={"grad/ratio": [3.0]}))
  assert run.steps.tolist() == [1, 2, 3] and run.superseded == 0
  np.testing.assert_array_equal(run["val_loss"], [2.0, np.nan, np.nan])
  assert run.vectors["grad/ratio"][0].tolist() == [2] and run.leaves == {"grad": ("leaf 0",)}
  for step, steps in ((3, [1, 2, 3]), (2, [1, 2]), (0, [0]), (4, [1, 2, 3, 4])):
    run = written(path, header(), *course, row(step, loss=5.0, back=True))
    dropped = max(0, 4 - max(step, 1))
    assert run.steps.tolist() == steps and run.superseded == dropped and run["loss"][-1] == 5
    assert (f", {dropped} superseded rows)" in repr(run)) == (dropped > 0)
    assert "back" not in run.columns


def test_rows_that_are_written_twice_are_the_same_rows(path):
  part = [row(step, step, time=float(step), loss=None, nonfinite={"loss": "nan"}, batch="a") for step in range(1, 6)]
  torn = json.dumps(row(6, 6, time=6.0))[:20]
  run = written(path, header(), *part, torn, *part, row(6, 6, time=6.0), row(7, 7))
  assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7] and (run.superseded, run.unreadable) == (0, 1)
  assert repr(run) == f"Run({str(path)!r}, 7 steps, 3 columns, 1 unreadable lines)"


def test_batches(path):
  run = written(path, header(), row(1, 1, batch=7), row(2, 2, batch="shard-3"), row(3, 3), row(4, 4, batch=[1, "a"]))
  assert run.batches.dtype == object and run.batches.tolist() == [7, "shard-3", None, (1, "a")]
  assert written(path, header(), row(1, 1), row(2, 2)).batches is None
  assert written(path, header(), row(1, 1, x=1), row(2, 2, batch=3), row(1, 1, x=2, back=True)).batches is None


def test_vectors_and_weights_of_an_abandoned_course_are_gone(path):
  weights = {"edges": [0, 1, 2], "counts": [1, 2]}
  entry = lambda step, update, x: row(  # noqa: E731
    step, update, loss=x, leaf={"grad/norm": [x]}, weights=weights | {"counts": [x, x]}
  )
  course = [entry(step, step, 1.0) for step in (1, 2, 3)]
  run = written(path, header(leaves={"grad": ["w"]}), *course, entry(2, 2, 5.0) | {"back": True}, row(3, 3, loss=5.0))
  assert run.vectors["grad/norm"][0].tolist() == [1, 2] and run["grad/norm/w"][:2].tolist() == [1, 5]
  assert run.weights[0].tolist() == [1, 2] and run.weights[2].tolist() == [[1, 1], [5, 5]]
  run = written(path, header(leaves={"grad": ["w"]}), *course, row(1, 1, loss=5.0, back=True))
  assert run.vectors == {} and run.weights is None and run["loss"].tolist() == [5.0]


def test_weights_of_other_bins_are_left_out(path):
  old, new = {"edges": [0, 1], "counts": [1]}, {"edges": [0, 2], "counts": [2]}
  run = written(path, header(), row(1, 1, weights=old), row(2, 2, weights=new), row(3, 3, weights=new))
  assert [x.tolist() for x in run.weights] == [[2, 3], [0, 2], [[2], [2]]]


def test_rows_under_a_torn_header_count(path):
  names = header(leaves={"grad": ["w"]})
  torn = json.dumps(names)[:30]
  rows = [row(1, 1, loss=1.0, leaf={"grad/norm": [2.0]}), row(2, 2, loss=1.0)]
  run = written(path, torn, *rows, names, row(3, 3, loss=1.0))
  assert run.steps.tolist() == [1, 2, 3] and run.unreadable == 1 and run["grad/norm/w"][0] == 2
  run = written(path, torn, *rows)
  assert run.steps.tolist() == [1, 2] and run.leaves == {"grad": ("leaf 0",)} and run.vectors["grad/norm"][1] == [[2.0]]
  # A torn header of 0.1.0 still tells the format of the rows.
  assert written(path, torn, row(2, loss=1.0), row(1, loss=2.0, back=True)).steps.tolist() == [1]
  run = written(path, torn.replace("2", "1", 1), row(2, loss=1.0), row(1, loss=2.0))
  assert run.steps.tolist() == [1, 2]
  assert "which has no Recorder header" in message_of(ValueError, written, path, *rows)


def test_a_byte_order_mark_and_blank_lines_are_nothing(path):
  path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b'\n\r\n{"step": 1, "loss": 2}\n\n')
  run = clipjax.runs.read_run(path)
  assert run["loss"].tolist() == [2] and run.unreadable == 0


# Against an oracle --------------------------------------------------------------------------------------------------

KEYS = ("loss", "grad/norm", "val_loss")


class Oracle:
  """The rules of both formats, on a dict of rows, a line at a time."""

  def __init__(self):
    self.rows, self.names, self.all_names = {}, {}, {}
    self.format, self.started, self.is_first = 2, None, False
    self.superseded = 0

  def add(self, entry):
    if "clipjax_run" in entry:
      self.format = entry["clipjax_run"]
      self.is_first, self.started = entry["started"] != self.started, entry["started"]
      for name, labels in entry["leaves"].items():
        self.names[name] = labels
        self.all_names[name] = list(dict.fromkeys([*self.all_names.get(name, []), *labels]))
      return
    step, new = entry["step"], self.parts(entry)
    if self.goes_back(entry):
      self.superseded += sum(s >= step for s in self.rows)
      self.rows = {s: kept for s, kept in self.rows.items() if s < step}
    self.is_first = False
    self.rows.setdefault(step, {}).update(new)

  def goes_back(self, entry):
    return self.is_first if self.format == 1 else "back" in entry

  def parts(self, entry):
    """The entries of a row: of scalars the number or what it was, of vectors the names and numbers."""
    out = {}
    for key, value in entry.items():
      if key == "leaf":
        for vector, numbers in value.items():
          if len(numbers) == len(self.names.get(vector.split("/")[0], ())):
            out["vector", vector] = (tuple(self.names[vector.split("/")[0]]), tuple(numbers))
      elif key not in ("step", "nonfinite", "back"):
        out[key] = entry["nonfinite"][key] if value is None else value
    return out


def assert_reads_as(run, oracle):
  steps = sorted(oracle.rows)
  assert run.steps.tolist() == steps and run.superseded == oracle.superseded
  at = [oracle.rows[step] for step in steps]
  scalars = {key for row in at for key in row if isinstance(key, str) and key != "batch"}
  assert set(run.columns) == scalars
  for key in scalars:
    values = [row.get(key, np.nan) for row in at]
    np.testing.assert_array_equal(run[key], [np.nan if isinstance(x, str) else x for x in values])
    flags = [isinstance(x, str) for x in values]
    assert run.flags.get(key, np.zeros(len(at), bool)).tolist() == flags and (key in run.flags) == any(flags)
  batches = [row.get("batch") for row in at]
  assert (run.batches is None and not any(x is not None for x in batches)) or run.batches.tolist() == batches
  assert run.leaves == {name: tuple(labels) for name, labels in oracle.all_names.items()}
  vectors = {key[1] for row in at for key in row if not isinstance(key, str)}
  assert set(run.vectors) == vectors
  for key in vectors:
    kept = [(step, row["vector", key]) for step, row in zip(steps, at, strict=True) if ("vector", key) in row]
    assert run.vectors[key][0].tolist() == [step for step, _ in kept]
    for (_, (names, numbers)), got in zip(kept, run.vectors[key][1], strict=True):
      want = dict(zip(names, [np.inf if x is None else x for x in numbers], strict=True))
      np.testing.assert_array_equal(got, [want.get(name, np.nan) for name in run.leaves[key.split("/")[0]]])


@st.composite
def rows_of(draw, step):
  """A row of this step, with any of the keys; ones that go on are the most."""
  entry = {"step": step}
  if draw(st.integers(0, 3)):
    entry |= {"update": draw(st.integers(0, 3)), "time": draw(st.sampled_from([1.0, 2.5]))}
  for key in draw(st.lists(st.sampled_from(KEYS), unique=True)):
    entry[key] = draw(st.sampled_from([0, 1, 0.1, -(2.0**60), None]))
  if flags := {key: "nan" for key in entry if entry[key] is None}:
    entry["nonfinite"] = flags
  if not draw(st.integers(0, 4)):
    number = st.sampled_from([1.0, 2.0, None])
    entry["leaf"] = {"grad/norm": draw(st.lists(number, min_size=1, max_size=3))}
  if not draw(st.integers(0, 7)):
    entry["back"] = True
  if not draw(st.integers(0, 4)):
    entry["batch"] = draw(st.sampled_from([1, "a"]))
  return entry


@st.composite
def files(draw):
  """The lines of a file, and which of them are torn."""
  format, entries, step = draw(st.sampled_from([1, 2, 2])), [], 0
  for _ in range(draw(st.integers(1, 40))):
    kind = draw(st.integers(0, 19))
    if kind == 0 or not entries:
      names = draw(st.sampled_from([{}, {"grad": ["a"]}, {"grad": ["b", "a"]}, {"grad": ["c", "b", "a"]}]))
      started = draw(st.sampled_from([1.0, 2.0]))
      entries.append({"clipjax_run": format, "started": started, "leaves": names or {"grad": ["a", "b"]}})
    elif kind == 1:
      entries.append(draw(st.sampled_from(['{"step": 3, "lo', "", "[1]", '{"step": 1.5}', '{"step": true}'])))
    else:
      step += draw(st.sampled_from([1, 1, 1, 1, 1, 2, 0, 0, -1, -3]))
      entries.append(draw(rows_of(step)))
  return entries


@given(files(), st.sampled_from([20, 60, 300, 2**18]), st.sampled_from([1, 2, 50]))
def test_any_file_is_read_as_the_rules_say(tmp_path_factory, entries, size, many):
  oracle, torn = Oracle(), 0
  for entry in entries:
    if isinstance(entry, str):
      torn += bool(entry)
    else:
      oracle.add(entry)
  path = tmp_path_factory.getbasetemp() / "any.jsonl"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lines, "_PART", size)
    patch.setattr(lines, "_MANY", many)  # Uniform rows are read by numpy or by the parser.
    run = written(path, *entries)
  assert_reads_as(run, oracle)
  assert run.unreadable == torn


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.one_of(
  FLOATS.map(repr), FLOATS.map(lambda x: f"{x:.9g}"), st.floats(0, 100).map(lambda x: f"{x:.9g}"),
  st.integers(-(10**20), 10**20).map(str), st.integers(0, 10**9).map(str),
  st.sampled_from(["0", "-0.0", "0.0", "1e-05", "1E+05", "0.30000000000000004", "9007199254740993"]),
)  # fmt: skip


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=8), st.sampled_from([1, 100, 2**18]))
def test_numbers_equal_those_of_the_parser_to_the_bit(rows, size):
  keys = "loss", "grad/norm", "lr"
  text = [
    f'{{"step": {step}, ' + ", ".join(f'"{key}": {x}' for key, x in zip(keys, row, strict=True)) + "}\n"
    for step, row in enumerate(rows)
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(uniform_rows, "_PIECE", size)
    found = uniform_rows.block("".join(text).encode())
  assert found.keys == ("step", *keys) and found.steps.tolist() == list(range(len(rows)))
  want = np.array([[*json.loads(line, parse_int=float).values()] for line in text])
  assert found.values.tobytes() == want.tobytes()


GOOD = '{"step": 7, "loss": 0.5, "grad/norm": 12}\n'
STRANGE = [
  "01", ".5", "5.", "1.2.3", "--1", "1e", "0x1", "null", "true", "NaN", "", " 1", "1 ", '"1"', "[1]", "{}", "1_0", "+1",
  "1,2", "1}", '1, "x": 2', "\n1", "1\n",
]  # fmt: skip


@pytest.mark.parametrize("number", STRANGE)
def test_unusual_lines_are_left_to_the_parser(number):
  assert uniform_rows.block((GOOD * 3).encode()).values.tolist() == [[7, 0.5, 12]] * 3
  for old in ("7", "0.5", "12"):
    strange = GOOD.replace(old, number)
    for text in (GOOD + strange + GOOD, strange * 3, GOOD + strange):
      assert uniform_rows.block(text.encode()) is None or all(json.loads(line) for line in text.splitlines())


@pytest.mark.parametrize("place", range(len(GOOD)))
def test_any_other_character_is_left_to_the_parser(place):
  for character in '0 x,."{}:\n':
    if character != GOOD[place] and not (character.isdigit() and GOOD[place].isdigit()):
      text = GOOD + GOOD[:place] + character + GOOD[place + 1 :] + GOOD
      assert uniform_rows.block(text.encode()) is None


def test_rows_of_several_kinds_by_turns(path):
  kinds = [{"loss": 0.5}, {"loss": 0.5, "val_loss": 1.5}, {"loss": None, "nonfinite": {"loss": "nan"}}, {"rate": 2.0}]
  entries = [row(step, step, **kinds[step % 7 % 4]) for step in range(400)]
  run = written(path, header(), *entries)
  for key in ("update", "loss", "val_loss", "rate"):
    want = [np.nan if (x := entry.get(key)) is None else x for entry in entries]
    np.testing.assert_array_equal(run[key], want)
  assert run.flags["loss"].tolist() == ["nonfinite" in entry for entry in entries]


def test_a_block_that_goes_back(path):
  entries = [row(step, step, loss=1.0) for step in range(200)] + [row(150, 150, loss=2.0, back=True)]
  entries += [row(step, step, loss=2.0) for step in range(151, 160)] + [row(155, 155, loss=3.0, back=True)]
  run = written(path, header(), *entries, *[row(step, step, loss=3.0) for step in range(156, 255)])
  assert run.steps.tolist() == list(range(255)) and run.superseded == 55
  assert run["loss"].tolist() == [1.0] * 150 + [2.0] * 5 + [3.0] * 100


def test_more_rows_than_there_was_room_for(path, monkeypatch):
  monkeypatch.setattr(lines, "_PART", 2000)  # A part with only long rows.
  entries = [row(step, step, loss=1.0, batch="x" * 400) for step in range(9)]
  run = written(path, header(), *entries, *[row(step, loss=2.0) for step in range(9, 3000)], row(-1, x=1.0))
  assert run.steps.tolist() == list(range(-1, 3000)) and np.nansum(run["loss"]) == 9 + 2 * 2991
  assert run.batches[9:11].tolist() == ["x" * 400, None]


def test_the_file_may_grow_while_it_is_read(path, monkeypatch):
  written(path, header(), row(1, 1))
  look = reading.survey

  def survey(name):
    seen = look(name)
    path.write_text(path.read_text() + "".join(f'{{"step": {step}}}\n' for step in range(2, 9)))
    return seen

  monkeypatch.setattr(reading, "survey", survey)
  assert clipjax.runs.read_run(path).steps.tolist() == [1]  # The next reading has the rest.


# The end of a file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 2**16])
def test_tail_is_the_end_of_what_read_run_gives(path, monkeypatch, size):
  monkeypatch.setattr(lines, "_TAIL", size)
  course = [row(step, step, loss=float(step), leaf={"grad/norm": [1.0]}) for step in range(1, 201)]
  late = [row(5, val_loss=1.0), row(200, val_loss=1.0), row(150, 150, loss=0.0, leaf={"grad/norm": [1.0]})]
  late.append(row(3, val_loss=1.0))
  for entries in (course, [*course, *late], course[:3], [], [*course, header(), *course[:2]]):
    whole = written(path, header(), *entries)
    for count in (0, 1, 7):
      run, first = reading.tail(path, count), max(len(whole) - count, 0)
      np.testing.assert_array_equal(run.steps, whole.steps[first:])
      for key in run.columns:
        np.testing.assert_array_equal(run[key], whole[key][first:])
      if len(whole) and count:
        assert run.vectors["grad/norm"][0].tolist() == run.steps.tolist()


def test_tail_of_a_large_file_reads_its_end_alone(path, monkeypatch):
  written(path, header(), *[row(step, step, loss=1.0) for step in range(20_000)])
  read, entries = [], lines._entries
  monkeypatch.setattr(lines, "_entries", lambda some: (read.append(len(some)), entries(some))[1])
  assert reading.tail(path, 16).steps.tolist() == list(range(19_984, 20_000))
  assert 33 <= sum(read) < 3000


# Long runs ----------------------------------------------------------------------------------------------------------


def test_reading_takes_little_more_memory_than_the_columns(path, monkeypatch):
  monkeypatch.setattr(lines, "_PART", 2**17)  # A part is small beside a long run.
  keys = [f"grad/{i}" for i in range(20)]
  rows = (row(step, step, **dict.fromkeys(keys, step / 7), leaf={"grad/norm": [1.0] * 9}) for step in range(1, 20_001))
  with path.open("w") as file:
    file.write(json.dumps(header(leaves={"grad": list("abcdefghi")})) + "\n")
    file.writelines(json.dumps(entry) + "\n" for entry in rows)
  tracemalloc.start()
  run = clipjax.runs.read_run(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  own = sum(x.nbytes for x in (run.steps, *run.columns.values(), *run.vectors["grad/norm"]))
  assert len(run) == 20_000 and len(run.columns) == 21
  assert own < peak < 2.5 * own, peak / own


def test_judging_takes_a_few_columns(path):
  rng, n = np.random.default_rng(0), 100_000
  columns = {key: rng.lognormal(size=n) for key in ("grad/norm", "grad/scale", "grad/max_norm", "loss", "time", "x")}
  run = clipjax.runs.Run.from_arrays(columns)
  for call in (clipjax.runs.diagnose, clipjax.runs.suggest_max_norm):
    call(run)
    tracemalloc.start()
    call(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * run["loss"].nbytes + 20e6, (call, peak / run["loss"].nbytes)  # For the windows of a detector.
