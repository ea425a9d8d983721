"""Exits with 1 if less than 99% of lines and branches ran. `.ci/run` gives it the JSON that slipcover wrote."""

import json
import sys
from pathlib import Path

LEAST = 99.0

found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
for name, file in sorted(found["files"].items()):
  missing = [*file["missing_lines"], *(f"{a}->{b}" for a, b in file["missing_branches"])]
  if missing:
    print(f"{name}: {', '.join(map(str, missing))}")
percent = found["summary"]["percent_covered"]
print(f"{percent:.2f}% of lines and branches ran, at least {LEAST:g}% must")
sys.exit(percent < LEAST)
