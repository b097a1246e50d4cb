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
assert calls, "no cases"
print(f"{calls} calls ok", flush=True)
os._exit(0)  # torch's own teardown unlocks a mutex that is gone, which the thread sanitizer reports
