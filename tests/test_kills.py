"""Training killed at random moments: tests/kills.py at a small size, and that it can fail."""

import os
import subprocess
import sys
from pathlib import Path

from kills import compare

KILLS = Path(__file__).parent / "kills.py"


def test_killed_at_random_moments():
    done = subprocess.run(
        [sys.executable, str(KILLS), "--kills", "12"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same to the bit") == 2


def test_differences_are_found(tmp_path):
    for side in ("whole", "killed"):
        (tmp_path / side / "run/checkpoints/step-2").mkdir(parents=True)
        (tmp_path / side / "run/metrics.jsonl").write_text(f'{{"step": 1, "seconds": {len(side)}}}\n')
        (tmp_path / side / "run/checkpoints/step-2/model.safetensors").write_bytes(b"weights")
        (tmp_path / side / "cache").mkdir()
    sides = tmp_path / "whole", tmp_path / "killed"
    assert compare(*sides) == []
    (tmp_path / "killed/cache/.building-x").mkdir()
    (tmp_path / "killed/cache/.building-x/train.tokens").write_bytes(b"half")
    assert compare(*sides) == []
    (tmp_path / "killed/run/.metrics.jsonl.7.tmp").write_bytes(b"")
    (tmp_path / "killed/run/metrics.jsonl").write_text('{"step": 2}\n')
    (tmp_path / "killed/run/checkpoints/step-2/model.safetensors").unlink()
    assert compare(*sides) == [
        "run/.metrics.jsonl.7.tmp is left over",
        "run/checkpoints/step-2/model.safetensors is missing",
        "run/metrics.jsonl differs",
    ]
