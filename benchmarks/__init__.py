"""The benchmarks: `pytest benchmarks`, or `fastlm bench` for the tables and the page."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT / "tests") not in sys.path:  # cases.py and harness.py, which the tests share
    sys.path.append(str(ROOT / "tests"))
