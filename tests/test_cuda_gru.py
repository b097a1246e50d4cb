"""The CUDA family's GRU beyond the tables of cases: every way to divide the walk, on tests/simt."""

import pytest
import torch
from cases import OPERATORS, gru_case
from harness import check_tf32, compare

import fastlm
from tests import simt

GRU = OPERATORS["gru"]
PLANS = ("alone", "together", "steps")
# Two tiles of 16 sequences, of which the second ends sooner, and one that ends within it.
LENGTHS = (5, 5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 1)

# Tiles are 16 sequences by 8 units, backwards 16, and 64 bytes of K; the device has 4 multiprocessors.
CASES = [
    gru_case("T1-B1-H1", 1, 1, 1, 1),
    gru_case("T2-B7-H8", 2, 7, 3, 8),
    gru_case("T2-B8-H16-no-bias", 2, 8, 3, 16, bias=False),
    gru_case("T3-B9-H17-both-directions", 3, 9, 3, 17, directions=2),
    gru_case("T2-B17-H64", 2, 17, 3, 64),
    gru_case("tiles-in-rounds", 2, 33, 3, 70),
    gru_case("slices-in-rounds", 2, 17, 3, 136),
    gru_case("packed", 0, 0, 3, 40, directions=2, lengths=LENGTHS),
    gru_case("packed-layer-norm", 0, 0, 3, 17, directions=2, lengths=LENGTHS, norm=True, eager=False),
    gru_case("layer-norm-no-bias", 3, 2, 3, 40, bias=False, norm=True, eager=False),
    gru_case("zoneout", 3, 5, 3, 24, zoneout=0.3, eager=False),
    gru_case("frozen-weights", 3, 5, 3, 24, frozen="weights"),
    gru_case("frozen-input", 3, 5, 3, 24, frozen="input"),
]


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch, cuda_host):
    monkeypatch.setenv("FASTLM_GRU_PLAN", request.param)
    return request.param


def dtypes_of(plan, number):
    """The tables' cases are alone in all types; here the types of 16 bits share the cases."""
    if plan == "alone":
        return (torch.float32,)
    return torch.float32, (torch.bfloat16, torch.float16)[number % 2]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_every_plan_matches_reference(number, plan):
    if plan == "alone" and CASES[number].id == "slices-in-rounds":
        pytest.skip("its weights are too many for one block")
    for dtype in dtypes_of(plan, number):
        compare(GRU, CASES[number], dtype)


@pytest.mark.parametrize("id", ("T3-B9-H17-both-directions", "T2-B17-H64", "packed-layer-norm", "zoneout"))
def test_tf32(id, plan):
    with simt.gpu(tf32=True):
        check_tf32(GRU, next(case for case in CASES if case.id == id))


def gradients(module, x, grad_output):
    output, hn = module(x)
    return output, hn, *torch.autograd.grad((output * grad_output).sum(), [x, *module.parameters()])


def test_masks_of_zoneout(plan):
    """Drawn above the kernels, so one seed gives the formula's own."""
    module = fastlm.nn.GRU(3, 24, bidirectional=True, zoneout=0.4)
    x, grad = torch.randn(4, 5, 3, requires_grad=True), torch.randn(4, 5, 48)
    torch.manual_seed(3)
    actual = gradients(module, x, grad)
    with fastlm.use_backend("eager"):
        torch.manual_seed(3)
        expected = gradients(module, x, grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm", (False, True), ids=("plain", "layer-norm"))
def test_same_bits_in_any_order_of_threads(plan, norm):
    module = fastlm.nn.GRU(3, 40, bidirectional=True, layer_norm=norm, dtype=torch.bfloat16)
    x = torch.randn(3, 17, 3, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for seed in (1, 2):
        simt.seed(seed)
        results.append(gradients(module, x, torch.ones(3, 17, 80, dtype=torch.bfloat16)))
    simt.seed(0)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_no_steps(cuda_host):
    """torch refuses these above the operators; the operators take them."""
    ops = torch.ops.fastlm_cuda_host
    x, h, grad = torch.randn(0, 2, 3), torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    weights = [torch.randn(24, 3), torch.randn(24, 8)]
    options = weights, False, False, None, 0.0
    output, hn, *kept = ops.gru_layer(x, None, h, *options, True)
    assert output.shape == (0, 2, 8) and torch.equal(hn, h)
    dx, dh, dw = ops.gru_layer_backward(None, grad, x, None, h, *options, output, *kept, True, True)
    assert dx.shape == x.shape and torch.equal(dh, grad)
    assert all(torch.equal(g, torch.zeros_like(w)) for g, w in zip(dw, weights, strict=True))


@pytest.mark.parametrize(
    "dtype, tf32",
    ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)),
    ids=("float32", "bfloat16", "tf32"),
)
def test_no_bank_conflicts_and_full_sectors(plan, dtype, tf32):
    module = fastlm.nn.GRU(16, 64, dtype=dtype)
    x = torch.randn(3, 18, 16, dtype=dtype, requires_grad=True)
    with simt.gpu(tf32=tf32), simt.counting() as counts:
        gradients(module, x, torch.ones(3, 18, 64, dtype=dtype))
    walks = {c.kernel.split("<")[0] for c in counts}
    assert any("gru_forward" in name for name in walks) and any("gru_backward" in name for name in walks)
    for c in counts:
        assert c.conflicts == 0 and c.sectors == c.fewest_sectors, c


def test_unknown_plan(monkeypatch, cuda_host):
    monkeypatch.setenv("FASTLM_GRU_PLAN", "some")
    with pytest.raises(RuntimeError, match="FASTLM_GRU_PLAN is some"):
        fastlm.nn.GRU(3, 8)(torch.zeros(2, 1, 3))
