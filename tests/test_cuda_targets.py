"""Every CUDA kernel compiles for GPUs that are not here, into code that spills no register, fits into shared
memory, and uses tensor cores and 16-byte loads where it should."""

import os

import cuda_targets
import pytest

from fastlm.targets import TARGETS, Row, Unavailable, occupancy

# All of them take the compiler half an hour: `make cuda-targets` does that, and so does this test with
# FASTLM_ALL_KERNELS=1. Otherwise some kernels are compiled, for two targets at once.
EVERY = os.environ.get("FASTLM_ALL_KERNELS") == "1"
COMPILED = cuda_targets.ALL if EVERY else ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    try:
        return list(cuda_targets.table(COMPILED, EVERY))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("target", COMPILED)
def test_kernels_fit_their_target(target, rows):
    here = [row for row in rows if row.target == target]
    assert here, "nothing was compiled"
    problems = [f"{row.kernel} {row.config}: {row.problems()}" for row in here if row.problems()]
    assert not problems, "\n".join(problems)


def test_kernels_are_known(rows):
    """Each kernel is said to be bound by products, by memory or by neither."""
    known = cuda_targets.MATRIX | cuda_targets.MEMORY | cuda_targets.OTHERS
    assert {row.kernel for row in rows} == known


def test_every_kernel_is_launched(rows):
    """What no case and no size reaches is not tested either."""
    idle = {f"{row.kernel} {row.config}" for row in rows if not row.occupancy}
    for row in rows:
        if row.occupancy:
            idle.discard(f"{row.kernel} {row.config}")
    assert not idle, "\n".join(sorted(idle))


@pytest.mark.parametrize(
    "readable, expected",
    (
        ("void fastlm::cuda::f<float, 64>(fastlm::cuda::P)", ("f", "float 64")),
        ("void fastlm::cuda::f<fastlm::cuda::S<fastlm::cuda::bf16, (int)2>, true>(P)", ("f", "S<bf16 2> 1")),
        ("fastlm::cuda::f(fastlm::cuda::P)", ("f", "")),
    ),
    ids=("plain", "nested", "no-template"),
)
def test_names_are_taken_apart(readable, expected):
    assert cuda_targets.parts(readable) == expected


@pytest.mark.parametrize(
    "target, registers, warps, shared, share",
    (
        ("sm_80", 32, 4, 0, 1),
        ("sm_80", 128, 8, 0, 16 / 64),  # 64 Ki registers
        ("sm_80", 129, 8, 0, 8 / 64),
        ("sm_90", 64, 8, 100 << 10, 16 / 64),  # twice 101 KiB of 228
        ("sm_86", 64, 8, 60 << 10, 8 / 48),
        ("sm_75", 64, 4, 32 << 10, 8 / 32),
    ),
)
def test_occupancy(target, registers, warps, shared, share):
    assert occupancy(TARGETS[target], registers, warps, shared) == share
