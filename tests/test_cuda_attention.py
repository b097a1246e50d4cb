"""The CUDA attention kernels where the tables of cases don't reach: every head size, division of warps and of
keys. On the CPU, in a model of a GPU (tests/simt)."""

import math

import pytest
import torch
from cases import OPERATORS, attention, packed, paged
from harness import check_tf32, compare
from test_operators import name_of

import fastlm
from fastlm import reference
from tests import simt

# Head sizes are padded to 32, 64, 128 and 256. 140 rows: several blocks of each kernel, the last partly filled.
FORWARD = (
    attention("rows-64", 1, (2, 1), (70, 90), 64, grad=False, is_causal=True),
    attention("rows-128", 1, 1, (140, 90), (72, 128), grad=False, window_size=(40, 9)),
    attention("rows-256", 1, 1, (70, 40), (136, 256), grad=False, is_causal=True),
    attention("options-64", 1, (2, 1), (70, 70), 64, mask=(70, 70), softcap=5.0, grad=False, return_lse=True),
    attention("options-128", 1, 1, (70, 40), 128, slopes=(1,), grad=False, window_size=(-1, 3)),
    attention("options-256", 1, 1, (33, 40), 256, mask=(1, 40), mask_dtype="constant", grad=False),
    # Rows of one warp and of two: the others take keys.
    attention("keys-32", 1, (5, 1), (1, 600), 32, sinks=True, grad=False, return_lse=True),
    attention("keys-64", 1, (33, 1), (1, 200), 64, grad=False),
    attention("keys-128", 1, (3, 1), (1, 300), 128, softcap=3.0, grad=False),
    attention("keys-256", 1, 1, (3, 300), 256, window_size=(100, -1), grad=False),
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("case", FORWARD, ids=lambda case: case.id)
def test_forward(case, dtype, cuda_host):
    compare(OPERATORS["scaled_dot_product_attention"], case, dtype)


# Blocks of 128 rows, tiles of 128 keys in two pieces.
WARPGROUPS = (
    attention("one-piece", 1, 1, (128, 64), 64, grad=False, return_lse=True),
    attention("one-key", 1, 1, (65, 1), 40, grad=False),
    attention("no-key", 1, 1, (70, 0), 64, grad=False, return_lse=True),
    attention("tiles-64", 1, (4, 2), (65, 257), 64, grad=False, is_causal=True),
    attention("tiles-128", 1, 1, (129, 450), 128, grad=False, return_lse=True),
    attention("rising", 1, 1, (80, 400), 64, scale=20.0, grad=False),
    attention("causal", 1, (2, 1), (150, 150), 128, grad=False, is_causal=True),
    attention("window", 2, 1, (200, 520), (72, 128), grad=False, window_size=(70, 9), return_lse=True),
    attention("sinks", 1, (2, 1), (300, 90), (128, 64), sinks=True, grad=False, window_size=(20, 0)),
)


def by_warpgroups():
    return any("attention_forward_warpgroups" in kernel for kernel in simt.ran())


@pytest.mark.parametrize("case", WARPGROUPS, ids=lambda case: case.id)
def test_warpgroups(case, cuda_host):
    with simt.gpu(**DEVICES["sm_90"]):
        for dtype in (torch.bfloat16, torch.float16):
            compare(OPERATORS["scaled_dot_product_attention"], case, dtype)
    assert by_warpgroups()


# Sequences of no row, of some of a block, of several blocks; of no key.
PACKED = (
    packed("packed", (1, 70, 0, 200), (30, 0, 9, 300), (4, 2), 72, lse=True),
    paged("pages", (90, 3), (270, 20), 16, 64, window_size=(-1, 0)),
)


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_warpgroups(case, cuda_host):
    with simt.gpu(**DEVICES["sm_90"]):
        compare(OPERATORS["varlen_attn"], case, torch.bfloat16)
    assert by_warpgroups()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("case", (*FORWARD, *WARPGROUPS), ids=lambda case: case.id)
def test_on_a_gpu(case, dtype, cuda_device):
    compare(OPERATORS["scaled_dot_product_attention"], case, dtype, device=cuda_device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.id)
def test_packed_on_a_gpu(case, dtype, cuda_device):
    compare(OPERATORS["varlen_attn"], case, dtype, device=cuda_device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_packed_keys_in_splits(dtype, cuda_host):
    """Some sequences in several splits, one in one, one without keys."""
    compare(
        OPERATORS["varlen_attn"],
        packed("splits", (1, 1, 2, 1), (700, 30, 520, 0), (4, 2), 40, lse=True),
        dtype,
    )


def test_a_sequence_has_its_bits_in_any_batch(cuda_host):
    q, k, v = torch.randn(3, 4, 16), torch.randn(1350, 2, 16), torch.randn(1350, 2, 16)

    def run(at_q, at_k):
        offsets = (torch.tensor(at, dtype=torch.int32) for at in (at_q, at_k))
        return fastlm.varlen_attn(q, k, v, *offsets, 1, 1350, enable_gqa=True)

    together = run((0, 1, 2, 3), (0, 40, 640, 1350))
    alone = torch.cat(
        [run((i, i + 1), at)[i : i + 1] for i, at in enumerate(((0, 40), (40, 640), (640, 1350)))]
    )
    assert torch.equal(together, alone)


@pytest.mark.parametrize("Tq", (1, 20))
def test_sinks_of_rows_without_keys(Tq, cuda_host):
    """A sink that is NaN is not lost there, in one split of the keys or several; one of -inf is none."""
    q, k = torch.randn(1, 3, Tq, 8), torch.randn(1, 3, 300, 8)
    mask = torch.rand(Tq, 300) < 0.5
    mask[0] = False
    options = {"sinks": torch.tensor([0.5, math.nan, -math.inf]), "return_lse": True}
    ours, formula = (
        f(q, k, k, mask, **options)
        for f in (fastlm.scaled_dot_product_attention, reference.scaled_dot_product_attention)
    )
    torch.testing.assert_close(ours, formula, equal_nan=True)


# ---- backward ----

# Blocks own 32 to 128 rows or keys, tiles that stream past have 8 to 32.
BACKWARD = (
    attention("backward-32", 1, (2, 1), (70, 131), 32, is_causal=True),
    attention("backward-64", 1, (2, 1), (70, 131), 64, window_size=(40, 0)),
    attention("backward-128", 1, (2, 1), (35, 70), (72, 128), window_size=(-1, 0)),
    attention("backward-256", 1, (2, 1), (19, 37), (136, 256), window_size=(-1, 0)),
    attention(
        "options-64", 1, (2, 1), (35, 131), 64, mask=(2, 35, 131), mask_dtype="same", slopes=(2,), softcap=3.0
    ),
    attention(
        "options-128", 1, (2, 1), (35, 70), 128, mask=(1, 70), mask_dtype="same", sinks=True, is_causal=True
    ),
    attention("options-256", 1, 1, (19, 37), 256, mask=(19, 1), mask_dtype="float32", slopes=(1,)),
    # Rows of 20 columns, the rows of a block of keys shared out in parts.
    attention("parts-20", 1, (8, 1), (33, 40), (20, 17)),
    attention("mask-of-one", 2, 2, (70, 66), mask=(1, 1), mask_dtype="same", return_lse=True),
)
# Multiprocessors, and shared memory that a block may use. With one, the rows of a block of keys are not shared.
DEVICES = {
    "sm_75": {"multiprocessors": 1, "shared_bytes": 64 << 10},
    "sm_86": {},
    "sm_90": {"multiprocessors": 64, "shared_bytes": 227 << 10, "warpgroups": True},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.id)
def test_backward(case, device, cuda_host):
    turn = BACKWARD.index(case) + list(DEVICES).index(device)
    with simt.gpu(**DEVICES[device]):
        for dtype in (torch.float32, (torch.bfloat16, torch.float16)[turn % 2]):
            compare(OPERATORS["scaled_dot_product_attention"], case, dtype)


# ---- tf32 ----


@pytest.mark.parametrize("case", (*FORWARD, *BACKWARD), ids=lambda case: case.id)
def test_tf32(case, cuda_host):
    with simt.gpu(tf32=True):
        check_tf32(OPERATORS["scaled_dot_product_attention"], case)


def test_packed_tf32(cuda_host):
    with simt.gpu(tf32=True):
        check_tf32(OPERATORS["varlen_attn"], packed("tf32", (7, 1, 30), (7, 130, 0), (4, 2), 40, lse=True))
