"""What compilers make of a clip: the reader of HLO, the bounds, the page, and the compilers themselves.

Tests marked `aot` need the compilers of the extra `aot`, and take two minutes; no test needs a TPU or a GPU.
"""

import copy
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import accelerators
import accelerators_hlo
import accelerators_page
import accelerators_targets
import jax
import pytest
from accelerators_bounds import BOUNDS, COMPILE, SCALARS, SMALL, verdicts
from accelerators_kept import kept
from speed_trees import BY_LEAF, CLIPJAX, EFFECT, NO_CLIP, OPTAX, WATCHED_LEAVES, ZCLIP

ROOT = pathlib.Path(__file__).parent.parent

# An array f32[8,128] has 4096 bytes, f32[1024] as many, f32[2,128] 1024.
FUSED = """
%fused.1 (p.1: f32[8,128], p.2: f32[1024]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  %p.2 = f32[1024]{0} parameter(1)
  ROOT %fusion.inner = f32[8,128]{1,0} fusion(%p.1, %p.2), kind=kLoop, calls=%fused.2
}
"""
PLAIN = FUSED + """
ENTRY %main (a: f32[8,128], b: f32[1024]) -> (f32[8,128], f32[]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[1024]{0:T(1024)} parameter(1)
  %c = f32[] constant(2)
  %copy-start.1 = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]) copy-start(%b)
  %slice-start.1 = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={}
  %copy-done.1 = f32[1024]{0:T(1024)S(1)} copy-done(%copy-start.1)
  %slice-done.1 = f32[2,128]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %joined = f32[2,128]{1,0:T(8,128)} custom-call(%slice-done.1), custom_call_target="ConcatBitcast"
  %fusion.1 = f32[8,128]{1,0:T(8,128)} fusion(%a, %copy-done.1, /*index=2*/%a), calls=%fused.1, metadata={op=" copy("}
  %gemm = (bf16[4,4]{1,0}, s8[16]{0}) custom-call(%fusion.1), custom_call_target="__cublas$gemm"
  %copy.2 = f32[1024]{0:T(1024)S(1)} copy(%copy-done.1)
  ROOT %tuple.1 = (f32[8,128]{1,0:T(8,128)}, f32[]) tuple(%fusion.1, %c)
}
"""  # fmt: skip


def computation(name, root, argument="f32[1024]{0}", result="f32[1024]"):
  """A computation of one array, which is `%p` in its last instruction."""
  return f"%{name} (p: {argument}) -> {result} {{\n  %p = {argument} parameter(0)\n  ROOT {root}\n}}\n\n"


TWICE = "f32[1024]{0} fusion(%p), kind=kLoop, calls=%fused.1"
BRANCHES = (
  computation("yes", f"%twice = {TWICE}")
  + computation("no", "%h = f32[1024]{0} get-tuple-element(%p), index=0", "(f32[1024]{0})")
  + computation("unused", f"%never = {TWICE}")
  + computation("round", f"%next = {TWICE}")
  + computation("again", "%less = pred[]{:S(6)} compare(%p, %p), direction=LT", result="pred[]")
  + """
ENTRY %main (a: pred[], b: f32[1024]) -> f32[1024] {
  %a = pred[] parameter(0)
  %b = f32[1024]{0} parameter(1)
  %t.1 = (f32[1024]{0}) tuple(%b)
  %c.1 = f32[1024]{0} conditional(%a, %t.1, %t.1), branch_computations={%no, %yes}
  %c.2 = f32[1024]{0} conditional(%a, %t.1, %t.1), true_computation=%yes, false_computation=%no
  ROOT %w = f32[1024]{0} while(%c.1), condition=%again, body=%round, backend_config={"known_trip_count":{"n":"5"}}
}
"""
)
REDUCES = """
%kept (p: f32[1024]) -> f32[512] {
  %p = f32[1024]{0} parameter(0)
  %sum = f32[1024]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %own = f32[512]{0} dynamic-slice(%sum), dynamic_slice_sizes={512}
}

ENTRY %main (a: f32[1024], b: f32[]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %b = f32[]{:S(6)} parameter(1)
  %all-reduce.1 = (f32[1024]{0}, f32[]{:S(6)}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
  %all-reduce-start.1 = f32[1024]{0} all-reduce-start(%a), replica_groups={}, to_apply=%add
  %all-reduce-done.1 = f32[1024]{0} all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%a), dimensions={0}
  %all-gather-done.1 = f32[4096]{0} all-gather-done(%all-gather-start.1)
  ROOT %fusion.1 = f32[512]{0} fusion(%a), kind=kCustom, calls=%kept
}
"""


# The reader ---------------------------------------------------------------------------------------------------------


ROUNDS = ', backend_config={"known_trip_count":{"n":"5"}}'
INNER = "%h = f32[1024]{0} conditional(%a, %p, %p), branch_computations={%yes, %yes}"
# (the text, what is counted, the bytes of traffic and those in branches)
READ = {
  # Others: the slice and the matrix product; "ConcatBitcast" only names memory. The copy reads 4096 and the slice 1024;
  # the fusion reads `a` once and writes as much; the product reads 4096 and writes 32 + 16; the second copy stays in
  # the chip.
  "what runs on its own": (PLAIN, (0, 1, 2, 2, 0), (4096 + 1024 + 2 * 4096 + 4096 + 48, 0)),
  "a second copy from HBM": (
    PLAIN.replace("copy(%copy-done.1)", "copy(%b)"), (0, 1, 2, 2, 0), (2 * 4096 + 1024 + 2 * 4096 + 4096 + 48, 0),
  ),
  # Kernels: one in the branch that both conditionals share, one in the loop. Each round reads and writes, and its
  # condition reads once; the branch counts for each of the conditionals.
  "branches and rounds": (BRANCHES, (2, 2, 1, 0, 0), (5 * (2 * 4096 + 4096), 2 * 2 * 4096)),
  "branches in a branch": (
    BRANCHES.replace("%h = f32[1024]{0} get-tuple-element(%p), index=0", INNER),
    (3, 2, 1, 0, 0), (5 * (2 * 4096 + 4096), 2 * (1 + 2) * 2 * 4096),
  ),
  "rounds that nobody knows": (BRANCHES.replace(ROUNDS, ""), (2, 2, 1, 0, 0), (2 * 4096 + 4096, 2 * 2 * 4096)),
  # 2 x 4096 each for the reduces, 4096 + 16384 for the gather, 4096 + 2048 for the fusion.
  "all-reduces of several arrays": (
    REDUCES, (0, 1, 3, 0, 3), (2 * 4096 + 2 * 4096 + 4096 + 16384 + 4096 + 2048, 0),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_runs_is_counted_and_what_has_its_layout_in_hbm_is_traffic(name):
  text, counted, traffic = READ[name]
  counts = accelerators_hlo.count(text)
  assert counts == counted
  assert counts._fields == ("conditionals", "kernels", "others", "copies", "all_reduces")
  assert accelerators_hlo.traffic(text) == traffic


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("f32[]{:T(128)}", [(4, True)]),
    ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", [(30, False)]),
    ("(pred[7]{0}, (s32[2,0]{1,0}, c64[2]), u32[]{:S(2)})", [(7, True), (0, True), (16, True), (4, False)]),
    ("token[]", []),
  ],
)
def test_sizes_of_arrays(text, found):
  assert accelerators_hlo.arrays(text) == found


def test_a_text_without_an_entry_is_an_error():
  with pytest.raises(ValueError, match=r"^the text must be a module of HLO with an ENTRY computation, found none\.$"):
    accelerators_hlo.count(FUSED)


# Bounds and page ----------------------------------------------------------------------------------------------------

BASE = {
  "conditionals": 0, "kernels": 100, "others": 3, "copies": 5, "temporaries": 10**6, "all_reduces": 1,
  "traffic": 10**9, "traffic_in_branches": 0, "compile": 10.0,
}  # fmt: skip


def case(target, key="tf", dtype="float32", **changes):
  """A case in which every clip is as good as Optax's, with changes of the form `{clip: {key: number}}`."""
  names = (NO_CLIP, OPTAX, CLIPJAX, BY_LEAF, ZCLIP, WATCHED_LEAVES, *([EFFECT] if key == "tf" else []))
  variants = {name: {**BASE, "all_reduces": int(target == "pod" and name != NO_CLIP)} for name in names}
  variants[NO_CLIP] |= {"kernels": 40, "traffic": 9 * 10**8}
  for name, numbers in changes.get("variants", {}).items():
    variants[name] |= numbers
  return {
    "target": target, "key": key, "title": "Transformer of 10 leaves", "dtype": dtype, "leaves": 10,
    "parameters": 10**7, "gradient": 4 * 10**7, "variants": variants, "machine": "2 CPU cores, x86_64",
    "versions": {"jax": "0.10.2"}, "date": "2026-01-01", "quick": False, "rounds": 2, "seconds": 60.0,
  }  # fmt: skip


# What holds by the limit itself and not by one unit more: (what, clip, target, key of the number, the largest one).
LIMITS = [
  ("conditionals", CLIPJAX, "tpu", "conditionals", 0),
  ("conditionals", BY_LEAF, "gpu", "conditionals", 0),
  ("conditionals", ZCLIP, "pod", "conditionals", 0),
  ("conditionals", WATCHED_LEAVES, "gpu", "conditionals", 0),
  ("conditionals, of the Transformer", EFFECT, "gpu", "conditionals", 0),
  ("kernels, of the Transformer", EFFECT, "gpu", "kernels", 100 + 16 + 9 * 10),
  ("HBM traffic, of the Transformer", EFFECT, "tpu", "traffic", 10**9 + 30 * 10**7 + 26 * SCALARS),
  ("kernels", CLIPJAX, "gpu", "kernels", 100 + 16 + 2 * 10),
  ("kernels", BY_LEAF, "tpu", "kernels", 100 + 16 + 2 * 10),
  ("kernels", ZCLIP, "pod", "kernels", 100 + 16 + 2 * 10),
  ("kernels", WATCHED_LEAVES, "gpu", "kernels", 100 + 16 + 5 * 10),
  ("temporaries", CLIPJAX, "gpu", "temporaries", 2 * 10**6),
  ("temporaries", ZCLIP, "tpu", "temporaries", 2 * 10**6),
  ("temporaries", BY_LEAF, "gpu", "temporaries", 10**6 + 10**7),
  ("temporaries", BY_LEAF, "tpu", "temporaries", 10**6 + 10**7 + 8 * 10 * SMALL),
  ("temporaries", BY_LEAF, "pod", "temporaries", 10**6 + 10**7 + 16 * 10 * SMALL),
  ("temporaries", CLIPJAX, "pod", "temporaries", 2 * 10**6 + 16 * 10 * SMALL),
  ("HBM traffic", CLIPJAX, "tpu", "traffic", 10**9 + 18 * 10**6 + 26 * SCALARS),
  ("HBM traffic", ZCLIP, "tpu", "traffic_in_branches", 18 * 10**6 + 26 * SCALARS),
  ("HBM traffic", BY_LEAF, "tpu", "traffic", 10**9 + 9 * 10**5 + 26 * SCALARS),
  ("HBM traffic", WATCHED_LEAVES, "tpu", "traffic", 10**9 + 4 * 10**7 + 26 * SCALARS),
  ("all-reduces, beyond Optax's", CLIPJAX, "pod", "all_reduces", 1),
  ("all-reduces, beyond Optax's", BY_LEAF, "pod", "all_reduces", 1),
  ("HBM traffic, by layer", BY_LEAF, "pod", "traffic", 10**9 + 26 * SCALARS),
  (COMPILE, CLIPJAX, "tpu", "compile", 13),
  (COMPILE, BY_LEAF, "gpu", "compile", 13),
]


@pytest.mark.parametrize(("what", "clip", "target", "key", "largest"), LIMITS)
def test_a_bound_holds_at_its_limit_and_not_above(what, clip, target, key, largest):
  of = "stack" if what.endswith("by layer") else "tf" if clip == EFFECT else "train"
  found = [case(target, of, variants={clip: {key: largest + more}}) for more in (0, 1)]
  assert [x for x in verdicts([case(target, of)]) if not x.holds] == []
  assert [x for x in verdicts(found[:1]) if not x.holds] == []
  failed = [x for x in verdicts(found[1:]) if not x.holds and x.clip == clip]
  assert [(x.bound.what, x.clip, x.target, x.case) for x in failed] == [
    (what, clip, target, "Transformer of 10 leaves, float32")
  ]


def test_every_bound_has_a_limit_in_the_table_above():
  assert {bound.what for bound in BOUNDS} == {what for what, *_ in LIMITS}
  assert {clip for bound in BOUNDS for clip in bound.clips} == {clip for _, clip, *_ in LIMITS}


def test_an_all_reduce_sums_256_numbers():
  verdict = next(x for x in verdicts([{**case("pod"), "leaves": 300}]) if x.bound.what == "all-reduces, beyond Optax's")
  assert verdict.limit == 3


KEYS = ("one", "tf", "many", "stack", "train")


@pytest.mark.parametrize(
  ("keys", "target", "numbers", "what"),
  [
    (KEYS, "gpu", {"compile": 14.0}, COMPILE),  # Only a training step has a bound on it.
    (["tf"], "pod", {"all_reduces": 0}, "all-reduces, beyond Optax's"),  # One is missing.
  ],
)
def test_one_bound_is_broken(keys, target, numbers, what):
  found = [x for key in keys for x in verdicts([case(target, key, variants={CLIPJAX: numbers})])]
  assert [(x.bound.what, x.clip) for x in found if not x.holds] == [(what, CLIPJAX)]


def test_the_page_says_what_its_numbers_say():
  cases = [case(target, dtype=dtype) for target in ("tpu", "pod", "gpu") for dtype in ("float32", "bfloat16")]
  text = accelerators_page.render({"cases": cases})
  assert "no device ran any of this" in text and "no GPU has run it yet" in text
  count = len(verdicts(cases))
  assert f"- Of {count} bounds, one per number, clip and case, {count} hold." in text
  assert "the clip adds 100.0 MB of HBM traffic to the 900.0 MB of Adam's step; Optax's clip adds 100.0 MB." in text
  assert "float32: all-reduces added: 1; by Optax's clip: 1." in text
  assert "kernels without a clip, with it, with Optax's: 40, 100, 100." in text
  assert "| kernels | Optax's + 16 + 2 per leaf | clipjax |" + 3 * " holds in 2 of 2 |" in text
  assert "**" not in text[text.index("## Bounds") : text.index("## One TPU")]
  assert "| clipjax | 0 | 100 | 3 | 5 | 1 | 10.0 | 1.00 |" in text  # The H100, with its other launches.
  assert "A quick run" not in text
  for block in text.split("\n\n"):
    if block.startswith("|"):
      assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_page_names_the_worst_case_of_a_broken_bound():
  cases = [case("gpu", dtype=dtype, variants={CLIPJAX: {"kernels": n}}) for dtype, n in
           (("float32", 150), ("bfloat16", 151))]  # fmt: skip
  text = accelerators_page.render({"cases": [*cases, {**case("gpu", "many"), "quick": True}]})
  row = next(line for line in text.splitlines() if line.startswith("| kernels | Optax's + 16 + 2 per leaf | clipjax |"))
  assert row.endswith("| - | - | **holds in 1 of 3**; worst 151, at most 136: Transformer of 10 leaves, bfloat16 |")
  count = len(verdicts([*cases, case("gpu", "many")]))
  assert f"- Of {count} bounds, one per number, clip and case, {count - 2} hold." in text
  assert "A quick run" in text


@pytest.mark.skipif(not (ROOT / "docs/accelerators.json").exists(), reason="nothing has been compiled")
def test_the_page_in_docs_matches_its_numbers():
  data = json.loads((ROOT / "docs/accelerators.json").read_text(encoding="utf-8"))
  assert (ROOT / "docs/accelerators.md").read_text(encoding="utf-8") == accelerators_page.render(data)
  assert not any(x["quick"] for x in data["cases"])


def test_a_case_takes_the_place_of_an_older_one():
  data = {"cases": [case("tpu"), case("gpu")]}
  new = case("tpu", variants={CLIPJAX: {"compile": 1.23456}})
  found = accelerators.merged(copy.deepcopy(data), new)["cases"]
  assert found == [{**new, "variants": {**new["variants"], CLIPJAX: {**BASE, "all_reduces": 0, "compile": 1.235}}},
                   case("gpu")]  # fmt: skip
  found = accelerators.merged(data, case("tpu", dtype="bfloat16"))["cases"]
  assert [(x["target"], x["dtype"]) for x in found] == [("tpu", "float32"), ("tpu", "bfloat16"), ("gpu", "float32")]


# The processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("plugin", "text"),
  [
    ("1.0", None),
    (None, 'jax-cuda12-plugin not installed. `pip install -e ".[aot]"` installs it.'),
    ("0.9", 'jax-cuda12-plugin 0.9 beside jax 1.0. `pip install -e ".[aot]"` installs one version.'),
  ],
)
def test_what_is_missing_is_named_with_what_installs_it(plugin, text, monkeypatch):
  versions = dict.fromkeys(("jax", "libtpu", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"), "1.0")
  monkeypatch.setattr(accelerators_targets, "version", {**versions, "jax-cuda12-plugin": plugin}.get)
  assert accelerators_targets.missing("tpu") is None
  assert accelerators_targets.missing("gpu") == (text and f"no compiler for one H100: {text}")


def test_a_process_has_the_environment_of_its_target_alone(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  monkeypatch.setenv("JAX_ENABLE_X64", "1")
  monkeypatch.setenv("PATH", "/somewhere")
  tpu, gpu = accelerators_targets.environment("pod"), accelerators_targets.environment("gpu")
  assert "XLA_FLAGS" not in tpu and "JAX_ENABLE_X64" not in tpu and tpu["TPU_SKIP_MDS_QUERY"] == "1"
  assert "device_count" not in gpu["XLA_FLAGS"] and "--xla_gpu_autotune_level=0 " in gpu["XLA_FLAGS"]
  assert gpu["PATH"].endswith(f"cuda_nvcc{os.sep}bin{os.pathsep}/somewhere") and "TPU_SKIP_MDS_QUERY" not in gpu
  assert tpu["JAX_PLATFORMS"] == gpu["JAX_PLATFORMS"] == "cpu"


def test_a_target_without_its_compiler_is_left_out(monkeypatch, capsys, tmp_path):
  out = tmp_path / "page.md"
  monkeypatch.setattr(sys, "argv", ["accelerators.py", "--quick", "--out", str(out)])
  monkeypatch.setattr(accelerators, "missing", lambda target: "no compiler" if target != "gpu" else None)
  monkeypatch.setattr(accelerators, "compile_cases", lambda target, *_, **__: iter([case(target)]))
  assert accelerators.main() == 0
  said = capsys.readouterr().out
  assert said.startswith("no compiler\nno compiler\none H100, 60 s\n### Transformer of 10 leaves, float32\n")
  data = json.loads(out.with_suffix(".json").read_text("utf-8"))
  assert [x["target"] for x in data["cases"]] == ["gpu"]
  assert out.read_text("utf-8") == accelerators_page.render(data)


def test_a_process_that_fails_says_so(monkeypatch, capsys):
  with pytest.raises(RuntimeError, match=r"^compiling for one TPU v5e chip failed:\n"):
    list(accelerators.compile_cases("tpu", ["no such case"], ["float32"], quick=True))

  def fail(*_, **__):
    raise RuntimeError("it failed")

  monkeypatch.setattr(sys, "argv", ["accelerators.py", "--quick", "--target", "gpu"])
  monkeypatch.setattr(accelerators, "missing", lambda _: None)
  monkeypatch.setattr(accelerators, "compile_cases", fail)
  assert accelerators.main() == 1
  assert capsys.readouterr().err == "it failed\n"


ENTRIES = """
import sys, jax, clipjax
from accelerators_compile import sharding
from accelerators_targets import mesh

for shape in ((1 << 24,), (4096, 4096), (17, 999_983)):
  leaf = jax.ShapeDtypeStruct(shape, sys.argv[1], sharding=sharding(mesh("gpu"), ()))
  print(jax.jit(clipjax.global_norm).lower(leaf).compile().as_text())
"""


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_adds_no_long_row_one_after_the_other(dtype):
  # Its sums are a tree: what one thread or block adds up is the square root of the whole. A CPU, which adds the same
  # reduction entry by entry, says nothing of it.
  if reason := accelerators_targets.missing("gpu"):
    pytest.skip(reason)
  env = {**accelerators_targets.environment("gpu"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
  command = [sys.executable, "-c", ENTRIES, dtype]
  text = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
  for module in text.split("HloModule ")[1:]:
    line = r"^ *(?:ROOT )?%([\w.-]+) = \(?\w+\[([\d,]*)\].*? ([a-z-]+)\(%?([\w.-]*)"
    found = re.findall(line, module, re.MULTILINE)
    sizes = {name: math.prod(int(n) for n in shape.split(",") if n) for name, shape, *_ in found}
    added = [sizes[operand] / sizes[name] for name, _, kind, operand in found if kind == "reduce"]
    assert 1000 < max(added) <= 1 << 14


@functools.cache
def compiled(target):
  """The cases of a target that compile in a minute, each program once on a machine."""
  widths = ["float32"] if target == "pod" else ["float32", "bfloat16"]  # A pod differs by what its chips exchange.
  asked = (["tf"], widths), (["many", "stack"], ["float32"])
  options = {"quick": True, "kept": os.environ["CLIPJAX_TESTS_CACHE"]}
  return [case for only, dtypes in asked for case in accelerators.compile_cases(target, only, dtypes, **options)]


def test_a_kept_program_is_compiled_once_and_another_one_again(tmp_path):
  steps = [jax.jit(lambda x, n=n: x + n).lower(jax.ShapeDtypeStruct((), "float32")) for n in (1, 1, 2)]
  asked = iter(range(9))
  facts = [kept(str(tmp_path), "tpu", step, lambda: {"kernels": next(asked)})["kernels"] for step in steps]
  assert facts == [0, 0, 1]
  assert kept(str(tmp_path), "gpu", steps[0], lambda: {"kernels": next(asked)}) == {"kernels": 2}
  assert kept(None, "tpu", steps[0], lambda: {"kernels": next(asked)}) == {"kernels": 3}


def test_flags_are_part_of_a_kept_program_but_not_where_its_compiler_lies(tmp_path, monkeypatch):
  step, asked, facts = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "float32")), iter(range(9)), []
  for flags in ("--xla_a=0 --xla_gpu_cuda_data_dir=/one", "--xla_a=0 --xla_gpu_cuda_data_dir=/two", "--xla_a=1"):
    monkeypatch.setenv("XLA_FLAGS", flags)
    facts.append(kept(str(tmp_path), "tpu", step, lambda: {"kernels": next(asked)})["kernels"])
  assert facts == [0, 0, 1]


@pytest.mark.aot
@pytest.mark.parametrize("what", sorted({bound.what for bound in BOUNDS} - {COMPILE}))  # Time depends on the machine.
@pytest.mark.parametrize("target", accelerators_targets.TARGETS)
def test_bounds_hold(target, what):
  if reason := accelerators_targets.missing(target):
    pytest.skip(reason)
  if not any(target in bound.targets for bound in BOUNDS if bound.what == what):
    pytest.skip("bounded on other targets")
  found = [x for x in verdicts(compiled(target)) if x.bound.what == what]
  assert found
  assert [f"{x.clip}, {x.case}: {x.value:g}, at most {x.limit:g}" for x in found if not x.holds] == []
