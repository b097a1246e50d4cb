"""Calls every CUDA kernel of a library for the CPU (tests/simt), in the smallest sizes that reach its branches:
for the sanitizers, under which a kernel takes long. Fails where a result is wrong, or a kernel has not run.

FASTLM_SIMT_LIBRARY: the library. Attention's kernels are there for heads up to 32, in float32 and bfloat16.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from cases import OPERATORS, Case, Draw, attention, gru_case, packed, paged  # noqa: E402
from harness import case_of, compare, run  # noqa: E402

import fastlm  # noqa: E402
from tests import simt  # noqa: E402

FLOATS = (torch.float32, torch.bfloat16)

# Blocks own up to 128 rows or keys, what streams past them comes by 16 to 64. The 264 rows of a key head of "parts"
# are enough to be shared out for dK and dV.
ATTENTION = (
    attention("blocks", 1, (2, 1), (70, 131), 32, is_causal=True),
    attention("parts", 1, (8, 1), (33, 9), (8, 17)),
    attention(
        "options", 1, (2, 1), (9, 40), 8, mask=(1, 2, 9, 40), mask_dtype="same", slopes=(2,), sinks=True,
        softcap=4.0, window_size=(30, 5), return_lse=True,
    ),
    attention("dropout", 1, 1, (5, 33), 8, mask=(33,), dropout_p=0.5),
    attention("mask-in-parts", 1, (2, 1), (5, 9), 8, mask=(9,), mask_dtype="float32"),
    attention("splits", 1, (2, 1), (1, 600), 8, grad=False, return_lse=True),
)  # fmt: skip
PACKED = (
    packed("packed", (5, 0, 3, 18), (4, 9, 0, 20), (2, 1), 8, behind=2, lse=True, window_size=(9, 0)),
    packed("packed-splits", (1, 1), (300, 3), 1, 8),
    paged("paged", (1, 2), (300, 6), 16),
)
# On a GPU with products of warpgroups: blocks of 128 rows, tiles of 128 keys.
HOPPER = {"shared_bytes": 227 << 10, "warpgroups": True}
BY_WARPGROUPS = (
    ("scaled_dot_product_attention", attention("rows", 1, (2, 1), (70, 300), 32, grad=False, is_causal=True)),
    ("varlen_attn", paged("paged", (65, 2), (300, 6), 16)),
)
# Blocks meet in groups of two or three; tiles are of 16 sequences and 8 units.
GRU = {
    "alone": (
        gru_case("two-tiles", 2, 17, 3, 17, directions=2, zoneout=0.3, eager=False),
        gru_case("packed-norm", 0, 0, 3, 9, lengths=(3, 3, 1), norm=True, eager=False),
    ),
    "together": (
        gru_case("three-blocks", 3, 3, 3, 24),
        gru_case("packed-norm", 0, 0, 3, 17, directions=2, lengths=(3, 2, 2), norm=True, eager=False),
    ),
    "steps": (
        gru_case("two-tiles", 2, 17, 3, 17),
        gru_case("packed-norm", 0, 0, 3, 17, directions=2, lengths=(2, 2, 1), norm=True, eager=False),
    ),
}
LOSSES = {
    "cross_entropy": (
        "mean",
        "smooth-C70",
        "two-blocks-C2050",
        "all",
        "prob-all",
        "image",
        "image-all",
        "image-prob-grad",
    ),
    "linear_cross_entropy": ("one", "mean", "all", "heads", "heads-prob", "prob-smooth-weight-none"),
}


def _many_tokens(dtype, seed):
    """More than one block sums up."""
    return (Draw(dtype, seed)(1, 2, 8200), torch.ones(1, 8200, dtype=torch.int64)), {}


def calls():
    """(operator, case, dtype) for all of the above."""
    for name, cases in (("scaled_dot_product_attention", ATTENTION), ("varlen_attn", PACKED)):
        yield from ((name, *call) for call in itertools.product(cases, FLOATS))
    for plan, cases in GRU.items():
        os.environ["FASTLM_GRU_PLAN"] = plan
        yield from (("gru", *call) for call in itertools.product(cases, FLOATS))
    for name, ids in LOSSES.items():
        for case in (case_of(OPERATORS[name], id) for id in ids):
            yield from ((name, case, dtype) for dtype in case.dtypes)
    for dtype in (torch.float64, torch.float32):
        yield "cross_entropy", Case("many-tokens", _many_tokens), dtype


def kernels(library):
    """Mangled names of the kernels that a library holds: some of each that the sources have."""
    source = "".join(path.read_text() for path in sorted(ROOT.glob("csrc/cuda/*.cuh")))
    names = re.findall(r"__global__[^;{]*?(\w+)\(const __grid_constant__", source)
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    for name in names:
        found = {x for x in symbols if re.match(rf"_ZN6fastlm4cuda{len(name)}{name}[IE]", x)}
        assert found, f"{name} is not in {library}"
        yield from found


def main():
    torch.set_num_threads(1)
    number = 0
    with fastlm.use_backend("cuda-host"):
        for name, case, dtype in calls():
            compare(OPERATORS[name], case, dtype, generated=True)
            number += 1
            if name == "gru" and dtype == torch.float32:
                with simt.gpu(tf32=True):
                    run(fastlm.gru, case.build(dtype, 0), seed=0)
                number += 1
        with simt.gpu(**HOPPER):
            for name, case in BY_WARPGROUPS:
                compare(OPERATORS[name], case, torch.bfloat16, generated=True)
                number += 1
    every = set(kernels(os.environ["FASTLM_SIMT_LIBRARY"]))
    idle = every - simt.ran()
    assert not idle, "kernels that no call reaches:\n" + "\n".join(sorted(idle))
    print(f"{number} calls of {len(every)} kernels ok", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # torch's own teardown unlocks a mutex that is gone, which the thread sanitizer reports
