"""The CUDA kernels by the tables of cases: their own source, in a model of a GPU on the CPU (tests/simt)."""

import collections

import pytest
import torch
from cases import OPERATORS
from harness import check_bits, check_dropout, check_layout, check_pages, compare
from test_operators import name_of, only_in, sampled

import fastlm
import tests.simt
from fastlm import cuda, ops

ATTENTION = OPERATORS["scaled_dot_product_attention"]
sdpa = fastlm.scaled_dot_product_attention


@pytest.mark.parametrize("operator, case, dtype", list(sampled(cuda.refuses)))
def test_matches_reference(operator, case, dtype, cuda_host):
    only_in(case, dtype)
    compare(operator, case, dtype)


def test_all_operators_are_there():
    assert tests.simt.missing() is None
    for name in ops.triton.MODULES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlm_cuda_host::{name}", "CPU")


@pytest.mark.parametrize("layout", ("transposed", "strided", "offset"))
def test_any_memory_layout(layout, cuda_host):
    check_layout(ATTENTION, "alibi-batch", layout, cuda_host)


@pytest.mark.parametrize(
    "name, id",
    (
        ("scaled_dot_product_attention", "mask-gradient-heads"),
        ("scaled_dot_product_attention", "few-queries-splits"),
        ("gru", "plain"),
        ("linear_cross_entropy", "several-blocks"),
    ),
)
def test_same_bits_in_any_order(name, id, cuda_host):
    """Threads and blocks run in another order each time."""
    check_bits(OPERATORS[name], id, torch.bfloat16, cuda_host)


@pytest.mark.parametrize("T", ((5, 7), (97, 70), (1, 1030)), ids="{0[0]}x{0[1]}".format)
def test_dropout_follows_the_reference(T, cuda_host):
    check_dropout(T, cuda_host)


def test_packed_bias_free_rows_and_pages(cuda_host):
    check_pages(cuda_host)


# ---- what a profiler would count -----------------------------------------------------------


def attention_call(dtype):
    q, k, v = (torch.randn(1, 1, T, 64, dtype=dtype, requires_grad=True) for T in (130, 300, 300))
    return sdpa(q, k, v, window_size=(-1, 0))


def cross_entropy_call(dtype):
    x = torch.randn(4, 2048, dtype=dtype, requires_grad=True)
    return fastlm.cross_entropy(x, torch.arange(4))


def linear_cross_entropy_call(dtype):
    x, w = (torch.randn(n, 64, dtype=dtype, requires_grad=True) for n in (16, 256))
    return fastlm.linear_cross_entropy(x, w, torch.arange(16))


def gru_call(dtype):
    return fastlm.nn.GRU(64, 64, dtype=dtype)(torch.randn(2, 16, 64, dtype=dtype))[0]


CALLS = attention_call, cross_entropy_call, linear_cross_entropy_call, gru_call
COUNTED = [
    *((call, dtype, False) for dtype in (torch.float32, torch.bfloat16) for call in CALLS),
    *((call, torch.float32, True) for call in (attention_call, gru_call)),
]


@pytest.mark.parametrize(
    "call, dtype, tf32",
    COUNTED,
    ids=[f"{call.__name__}-{'tf32' if tf32 else name_of(dtype)}" for call, dtype, tf32 in COUNTED],
)
def test_no_bank_conflicts_and_full_sectors(call, dtype, tf32, cuda_host):
    """In main loops, which are the lines that make more than a twentieth of a kernel's accesses; where rows
    are of full sectors."""
    with tests.simt.gpu(tf32=tf32), tests.simt.counting() as counts:
        call(dtype).sum().backward()
    totals = collections.Counter()
    for count in counts:
        totals[count.kernel, count.memory] += count.requests
    main = [x for x in counts if 20 * x.requests > totals[x.kernel, x.memory]]
    assert len(main) > 1
    short = [x for x in main if x.conflicts or x.sectors > x.fewest_sectors]
    assert not short, "\n".join(map(str, short))


# ---- as a backend --------------------------------------------------------------------------


def test_runs_the_kernels():
    """Where the backend is forced, and nowhere else."""
    x = torch.randn(1, 1, 3, 8)
    with tests.simt.counting() as counts:
        with fastlm.use_backend("cuda-host"):
            sdpa(x, x, x)
    assert {"attention_forward"} <= {count.kernel.partition("<")[0] for count in counts}
    with tests.simt.counting() as counts:
        sdpa(x, x, x)
    assert not counts


def test_refusals_are_named(cuda_host):
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'cuda-host' is forced.*float64"):
        sdpa(x, x, x)
