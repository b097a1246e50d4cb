"""The model of a CUDA device (tests/simt): kernels that it must accept, and kernels that it must reject."""

import os
import platform
import re
import subprocess

import pytest
import torch

from fastlm import reference
from tests.simt.build import KINDS, build

GOOD = (
    "block_sums", "turn_in_warp", "transpose", "pipeline", "ldmatrix", "mma_bf16", "mma_f16", "mma_tf32", "products_bf16",
    "products_f16", "products_tf32", "products_float", "warpgroups_bf16", "warpgroups_f16", "conversions", "shuffles", "partial_warp", "grid_barrier", "last_block",
    "atomics",
)  # fmt: skip

# What goes wrong, and what is said of it, whatever the order of the threads.
BAD = {
    "missing_barrier": "wrong result",
    "missing_syncwarp": "wrong result",
    "shuffle_for_barrier": r"races with thread .* for word \d+ of shared memory \(kernels.cpp",
    "missing_second_barrier": "races with thread",
    "copy_over_reads": "races with thread",
    "missing_wait": "wrong result",
    "wait_for_too_few": "wrong result",
    "missing_commit": "returns with copies under way",
    "missing_barrier_after_wait": "wrong result",
    "missing_last_wait": "returns with copies under way",
    "missing_grid_barrier": "wrong result",
    "barrier_of_blocks_apart": "blocks do not run together",
    "large_block": "1 to 1024 threads",
    "large_shared": "more shared memory than a block can have",
    "barrier_and_return": r"do not come: 32 returned from the kernel, 32 waiting at __syncthreads \(kernels.cpp",
    "barrier_in_branches": r"threads diverge.*__syncthreads \(kernels.cpp:\d+\).*__syncthreads",
    "barrier_and_shuffle": r"do not come: .*1 waiting at __syncthreads \(kernels.cpp",
    "shuffle_from_other_half": "lane .* reads from lane 20, which the mask does not name",
    "mask_without_caller": "the mask does not name the calling lane",
    "mask_with_returned": "names a lane that has returned|1 returned from the kernel, .* waiting at a vote",
    "mask_differs": "does not name the calling lane|lanes diverge|do not come",
    "ops_differ": "lanes diverge: .*(shuffle|vote)",
    "factor_not_rounded": r"a factor is not rounded to tf32 \(kernels.cpp",
    "product_without_wgmma_fence": "a product without wgmma_fence",
    "product_without_fence": r"has written \(product.cuh:\d+\) without fence_for_products before a barrier",
    "product_before_fence": "without fence_for_products before a barrier",
    "product_without_wait": "wrong result",
    "product_without_last_wait": "returns with products under way",
    "sums_written_under_way": "registers of a product under way have been written",
    "factors_written_under_way": "registers of a product under way have been written",
    "matrix_written_under_way": "races with thread",
    "three_warps_of_four": "warps of a warpgroup have started different products",
    "matrix_not_at_1024_bytes": "don't begin at a multiple of 1024 bytes",
    "part_of_warpgroup": "part of a warpgroup multiplies",
    "part_of_mma": "names a lane that has returned|waiting at mma",
    "part_of_block_in_grid_barrier": "32 waiting at grid_barrier",
    "wrong_round": "counter is 0 where round 1",
    "shared_beyond": "outside of the block's shared memory",
    "shared_beyond_plain": "behind the end of its shared memory",
    "shared_misaligned": "misaligned access of shared",
    "global_misaligned": "misaligned access of global",
    "matrix_misaligned": "misaligned access of shared",
    "copy_beyond": "outside of the block's shared memory",
    "copy_misaligned": "source of a copy is misaligned",
    "shared_as_global": "shared memory as global",
}

# What only the thread sanitizer sees, or sees too.
RACES = ("missing_barrier", "missing_syncwarp", "missing_barrier_after_wait", "missing_grid_barrier",
         "missing_fence", "blocks_race")  # fmt: skip
MEMORY = ("shared_beyond_plain", "global_beyond")

# The thread sanitizer needs fixed addresses on kernels with large address-space randomness.
FIXED = ("setarch", platform.machine(), "-R")


def run(kind, name, seed=0):
    """Exit status and output of one test kernel."""
    environment = os.environ | {"FASTLM_SIMT_SEED": str(seed), "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(
        [*FIXED, build(kind, "kernels"), name], env=environment, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD)
def test_accepts(name, kind):
    for seed in range(1 if kind == "thread" else 3):
        assert run(kind, name, seed) == (0, "ok\n")


@pytest.mark.parametrize("name", BAD)
def test_rejects(name):
    for seed in range(3):
        status, output = run("plain", name, seed)
        assert status == 1 and re.search(BAD[name], output), output


# The thread sanitizer takes a shuffle for an order, knows no fence for products, and forgets some of many accesses.
UNSEEN = ("shuffle_for_barrier", "product_without_fence", "product_before_fence", "matrix_written_under_way")


@pytest.mark.parametrize("name", [x for x in BAD if BAD[x] != "wrong result" and x not in UNSEEN])
def test_rejects_with_threads(name):
    status, output = run("thread", name)
    assert status and re.search(f"{BAD[name]}|ThreadSanitizer: data race", output), output


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_sees_races(name):
    status, output = run("thread", name)
    assert status and "ThreadSanitizer: data race" in output, output


@pytest.mark.parametrize("name", MEMORY)
def test_address_sanitizer_sees_memory(name):
    status, output = run("address", name)
    assert status and "AddressSanitizer: heap-buffer-overflow" in output, output


def test_every_kernel_is_listed():
    status, output = run("plain", "")
    others = {"philox", "counts", "many_mma", *RACES, *MEMORY}
    assert set(output.split()) == {*GOOD, *BAD, *others}


def test_counts():
    """Bank conflicts and sectors of known patterns."""
    assert run("plain", "counts") == (0, "ok\n")


def test_philox_is_the_references():
    status, output = run("plain", "philox")
    words = torch.tensor([int(x) for x in output.split()[:-1]])
    keep = reference.dropout_keep(torch.tensor(0x123456789ABCDEF), 4, 8, 32, 0.5)
    assert status == 0 and torch.equal(keep[3, 7], words >= 2**31)
