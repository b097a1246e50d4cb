"""The soak run can pass and can fail: its verdict on samples that were made up, and short runs with a leak and
without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from soak import verdict

SOAK = Path(__file__).parent / "soak.py"


def rows(memory, files=lambda i: 12, threads=lambda i: 3):
    return [(float(i), memory(i), files(i), threads(i)) for i in range(400)]


@pytest.mark.parametrize(
    ("sampled", "flat", "words"),
    [
        (rows(lambda i: 200.0), True, "growth +0.00 MiB"),
        (rows(lambda i: 200.0 + (i < 40) * (i - 40)), True, "growth +0.00 MiB"),  # before the warm-up's end
        (rows(lambda i: 200.0 + 30 * (i % 9 == 0)), True, "growth +0.00 MiB"),  # needed for a moment
        (rows(lambda i: 200.0 + i / 40), False, "growth +8.97 MiB, allowed 5"),
        (rows(lambda i: 200.0 + i // 80 * 3), False, "allowed 5"),  # in steps
        (rows(lambda i: 200.0, files=lambda i: 12 + i // 150), False, "open files +2"),
        (rows(lambda i: 200.0, files=lambda i: 12 + (i == 390)), True, "open files +0"),  # for a moment
        (rows(lambda i: 200.0, threads=lambda i: 3 + i // 300), False, "threads +1"),
        (rows(lambda i: 200.0)[:45], False, "only 5 samples"),
    ],
    ids="flat warm-up peaks leak leak-in-steps files file threads too-short".split(),
)
def test_verdict(sampled, flat, words):
    answer = verdict(sampled, warm_up=40, allowed=5)
    assert answer[0] == flat and words in answer[1], answer[1]


@pytest.mark.parametrize("leak", [0, 32768])
def test_short_run(leak):
    """A step's leak of 32 KiB is seen within seconds."""
    command = [sys.executable, str(SOAK), "--minutes", "0.1", "--every", "0.1", "--leak", str(leak)]
    done = subprocess.run(
        command + ["--allowed", "10"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == bool(leak), done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("GROWS" if leak else "flat"), done.stdout + done.stderr
