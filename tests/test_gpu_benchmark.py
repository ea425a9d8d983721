"""benchmarks/gpu.py in short, on a CPU: it runs from end to end and says what it should, whatever the times."""

import json
import sys

import gpu
from speed_trees import BY_LEAF, CLIPJAX, NO_CLIP, OPTAX, WATCHED_LEAVES, ZCLIP


def test_the_gpu_benchmark_runs_in_short(tmp_path, monkeypatch, capsys, standard_promotion):
  monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(tmp_path / "gpu.json")])
  gpu.main()
  data = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
  assert [(x["key"], x["dtype"]) for x in data["steps"]] == [("many", "float32"), ("many", "bfloat16")]
  assert list(data["steps"][0]["variants"]) == [NO_CLIP, OPTAX, CLIPJAX, BY_LEAF, ZCLIP, WATCHED_LEAVES]
  assert [x["holds"] for x in data["accuracy"]] == [True] * 6
  assert max(x["error"] for x in data["accuracy"]) > 0
  assert [x["bytes"] for x in data["norm"]] == [100_000, 100_000]
  text = capsys.readouterr().out
  assert text.count("\n| 3 leaves of 8x8 |") == 12 and "no nominal bandwidth known" in text
