"""Calls every case of every operator, forward and backward, with three threads: for the sanitizers."""

import itertools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from cases import DTYPES, FEW_LAYOUTS, FEW_SHAPES, OPERATORS, few_inputs  # noqa: E402
from harness import run  # noqa: E402

torch.set_num_threads(3)
calls = 0
for operator in OPERATORS.values():
    for case in operator.cases:
        for dtype in case.dtypes:
            run(operator.function, case.build(dtype, 0), seed=0)
            calls += 1
for shape, layout, dtype, int8 in itertools.product(FEW_SHAPES, FEW_LAYOUTS, DTYPES, (False, True)):
    torch.ops.fastlm.linear(*few_inputs(shape, dtype, layout, int8, biased=int8))
    calls += 1
for size, dtype in itertools.product((0, 1, 7, 33, 130, 70001), DTYPES):
    if dtype != torch.float64:
        x, dy = torch.randn(2, size, dtype=dtype)
        for tanh in (False, True):
            torch.ops.fastlm.gelu(x, tanh)
            torch.ops.fastlm.gelu_backward(dy, x, tanh)
            calls += 2
    for rows in (0, 1, 5, 300):
        x = torch.randn(rows, min(size, 130), dtype=dtype)
        torch.ops.fastlm.sum_rows(x)
        torch.ops.fastlm.sum_rows(x.t().contiguous().t())
        calls += 2
assert calls, "no cases"
print(f"{calls} calls ok", flush=True)
os._exit(0)  # torch's own teardown unlocks a mutex that is gone, which the thread sanitizer reports
