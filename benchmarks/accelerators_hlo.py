"""Counts conditionals, kernels, copies, all-reduces and HBM traffic in the optimized HLO of a step.

It uses only the standard library, and everything is a pure function of the text. Instructions in branches, loops and
calls count. Instructions in computations that a fusion or reduction applies to its entries do not run by themselves and
do not count.

The traffic estimates the bytes between HBM and the cores of a TPU. Every instruction that runs moves its operands and
results, unless their layouts are in the chip's own memory, marked `S(1)`, where a program keeps what it uses again.
`cost_analysis()["bytes accessed"]` does not help, as it counts that memory too. A gather counts its whole table, a loop
as many rounds as the compiler knows, and branches of conditionals are counted separately.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
  **dict.fromkeys(("f32", "s32", "u32"), 4),
  **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
# Constants and new names for existing data: nothing runs. Of an asynchronous pair, the start counts.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier"}
FREE |= {"partition-id", "replica-id"}
FREE_CALLS = {"ConcatBitcast", "AllocateBuffer"}  # Custom calls that only name memory.
CONTROL = {"conditional", "while", "call", "async-start"}  # The computations that they call run.

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ATTRIBUTE = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Counts(NamedTuple):
  """The instructions of a program.

  Attributes:
    conditionals: instructions that wait for a number to choose a branch.
    kernels: fusions; each is a launch on a GPU.
    others: all other instructions that run, such as custom calls.
    copies: `copy` and `copy-start`.
    all_reduces: `all-reduce` and `all-reduce-start`; one that reduces several arrays together counts once.
  """

  conditionals: int
  kernels: int
  others: int
  copies: int
  all_reduces: int


class Instruction(NamedTuple):
  """A line of HLO: result, type, operation, names of the operands, and the rest of the line."""

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str


class Program(NamedTuple):
  """Computations by name, each a list of instructions, and the name of the entry."""

  computations: dict[str, list[Instruction]]
  entry: str


# Parsing -------------------------------------------------------------------------------------------------------------


def parse(text: str) -> Program:
  """The program of an HLO text as `compiled.as_text()` prints it.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if head := _HEAD.fullmatch(line):
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (match := _INSTRUCTION.match(line.strip())):
      name, type_text, op, after = match.groups()
      inside, rest = _split_at_close(after)
      current.append(Instruction(name, type_text, op, tuple(_OPERAND.findall(inside)), rest))
  if not entry:
    raise ValueError("the text must be a module of HLO with an ENTRY computation, found none.")
  return Program(computations, entry)


def _split_at_close(text: str) -> tuple[str, str]:
  """The text before and after the parenthesis that closes one opened before the text."""
  depth = 1
  for i, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return text[:i], text[i + 1 :]
  return text, ""


def arrays(type_text: str) -> list[tuple[int, bool]]:
  """`(bytes, whether in HBM)` of each array in a type."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(type_text):
    if dtype in SIZES:
      found.append((math.prod(int(n) for n in dims.split(",") if n) * SIZES[dtype], "S(" not in layout))
  return found


def called(instruction: Instruction) -> dict[str, list[str]]:
  """The computations that a control instruction runs, by attribute."""
  attributes = instruction.rest.split(", metadata={")[0]
  found = {key: [name] for key, name in _ATTRIBUTE.findall(attributes)}
  if branches := _BRANCHES.search(attributes):
    found["branches"] = [name.strip(" %") for name in branches[1].split(",")]
  return found


# Counting ------------------------------------------------------------------------------------------------------------


def count(text: str) -> Counts:
  """The counts of an optimized HLO text."""
  program = parse(text)
  ops = [(x.op, _is_free(x)) for name in running(program) for x in program.computations[name]]
  kernels = sum(op == "fusion" for op, _ in ops)
  conditionals = sum(op == "conditional" for op, _ in ops)
  copies = sum(op in ("copy", "copy-start") for op, _ in ops)
  ran = sum(not free and op not in CONTROL for op, free in ops)
  # A fusion may contain an all-reduce, for instance if each chip keeps its part of the sum: count all in the text.
  everywhere = (x.op for instructions in program.computations.values() for x in instructions)
  all_reduces = sum(op in ("all-reduce", "all-reduce-start") for op in everywhere)
  return Counts(conditionals, kernels, ran - kernels - copies, copies, all_reduces)


def running(program: Program) -> list[str]:
  """Names of the computations that run by themselves: the entry, and those called by control instructions."""
  found = [program.entry]
  for name in found:  # The list grows during the loop.
    for instruction in program.computations[name]:
      if instruction.op in CONTROL:
        names = (name for group in called(instruction).values() for name in group)
        found += [name for name in dict.fromkeys(names) if name not in found and name in program.computations]
  return found


def _is_free(instruction: Instruction) -> bool:
  if instruction.op == "custom-call":
    target = _TARGET.search(instruction.rest)
    return target is not None and target[1] in FREE_CALLS
  return instruction.op in FREE or instruction.op.endswith("-done")


# Traffic -------------------------------------------------------------------------------------------------------------


def traffic(text: str) -> tuple[int, int]:
  """Bytes that a step moves to and from HBM: `(in every step, in all branches together)`."""
  program = parse(text)
  return _traffic(program, program.entry)


def _traffic(program: Program, computation: str) -> tuple[int, int]:
  always = branches = 0
  types = {x.name: x.type for x in program.computations.get(computation, ())}
  for instruction in program.computations.get(computation, ()):
    if instruction.op not in CONTROL:
      always += 0 if _is_free(instruction) else sum(_moved(instruction, types))
      continue
    rounds = int(trips[1]) if (trips := _TRIPS.search(instruction.rest)) else 1
    for key, names in called(instruction).items():
      for name in names:
        here, below = _traffic(program, name)
        if key in ("branches", "true_computation", "false_computation"):
          branches += here + below
        else:
          always, branches = always + rounds * here, branches + rounds * below
  return always, branches


def _moved(instruction: Instruction, types: dict[str, str]) -> Iterator[int]:
  """Bytes of one instruction, array by array."""
  op, results = instruction.op, arrays(instruction.type)
  if op == "copy-start":  # Target, source, and a token.
    yield from (size for size, in_hbm in results[:2] if in_hbm)
  elif op in ("slice-start", "dynamic-slice-start"):  # ((source and indices), target, token): only the slice moves.
    operands, _ = _split_at_close(instruction.type.removeprefix("(("))
    (_, from_hbm), (size, to_hbm) = results[0], results[len(arrays(operands))]
    yield size * (from_hbm + to_hbm)
  else:
    if op in ("all-gather-start", "collective-permute-start"):  # Their types repeat the operands before the results.
      results = results[len(instruction.operands) :]
    yield from (size for size, in_hbm in results if in_hbm)
    for name in dict.fromkeys(instruction.operands):
      yield from (size for size, in_hbm in arrays(types.get(name, "")) if in_hbm)
