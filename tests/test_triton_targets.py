"""Every Triton kernel in every configuration compiles for GPUs that are not here, into binaries that spill no
register, fit into shared memory and, where they multiply matrices of 16 bits, use tensor cores."""

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: here, kernels are for the interpreter.
TABLE = """
import json, sys
from fastlm.triton import targets
for row in targets.table(sys.argv[1], sys.argv[2:]):
    print(json.dumps([row._asdict(), row.problems()]))
"""
# All samples on all targets take the compiler some ten minutes: `fastlm info --kernels` does that, and so
# does this test with FASTLM_ALL_KERNELS=1. Otherwise each target sees some, each kernel several targets.
# Products in float32, loops of multiply-adds, take longest and are the same on all of NVIDIA's.
SAMPLES = {
    "sm_80": ("attention 64", "attention decode", "cross-entropy options"),
    "sm_90": ("attention 64", "attention 128 gqa", "attention packed", "gru layer norm"),
    "sm_100": ("attention 64", "attention dropout"),
    "gfx942": (
        "attention 64",
        "attention 64 float32",
        "attention 256",
        "attention biases",
        "attention paged",
        "linear cross-entropy",
    ),
}


@pytest.mark.parametrize("target", SAMPLES)
def test_kernels_fit_their_target(target, tmp_path):
    names = () if os.environ.get("FASTLM_ALL_KERNELS") == "1" else SAMPLES[target]
    run = subprocess.run(
        [sys.executable, "-c", TABLE, target, *names],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows, "nothing was compiled"
    problems = [f"{row['sample']}: {row['kernel']} {row['config']}: {found}" for row, found in rows if found]
    assert not problems, "\n".join(problems)


FORMS = """
import torch
from fastlm.targets import TARGETS
from fastlm.triton import launch
from fastlm.triton.cross_entropy import _scale
memory, factor, found = torch.empty(64), torch.empty(()), {}
near = [n for middle in (0, 1 << 31, 1 << 32, 1 << 63) for n in range(middle - 33, middle + 34)]
calls = [(memory, n) for n in near if -(1 << 31) <= n < 1 << 64] + [(memory[i:], 3) for i in range(9)]
calls += [(memory.to(dtype), 3) for dtype in (torch.bfloat16, torch.float16)]
with launch.ahead_of_time(TARGETS["sm_90"]):
    for x, n in calls:
        binary = _scale.compiled((x, factor, n), {}, launch.Config({"BLOCK": 64}))
        found.setdefault((launch.form_of(x), launch.form_of(n)), set()).add(binary.hash)
assert all(len(binaries) == 1 for binaries in found.values()), found
assert len(set.union(*found.values())) >= 8, found
"""


def test_what_a_binary_depends_on(tmp_path):
    """Arguments of one form have one binary: launch.Kernel keeps it for them."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", FORMS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
