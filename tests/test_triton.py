"""The Triton kernels by the tables of cases: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

import os

import pytest
import torch
from cases import OPERATORS
from harness import check_bits, check_dropout, check_layout, check_pages, compare
from test_operators import only_in, sampled

import fastlm
import fastlm.triton
from fastlm import ops
from fastlm.triton import launch, matmul

# Logarithms of 0 and differences of infinities are meant; numpy, which interprets, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ATTENTION = OPERATORS["scaled_dot_product_attention"]
sdpa = fastlm.scaled_dot_product_attention


@pytest.mark.parametrize("operator, case, dtype", list(sampled(fastlm.triton.refuses)))
def test_matches_reference(operator, case, dtype, triton_device):
    only_in(case, dtype)
    compare(operator, case, dtype, device=triton_device)


@pytest.mark.parametrize("layout", ("transposed", "strided", "offset"))
def test_any_memory_layout(layout, triton_device):
    check_layout(ATTENTION, "alibi-batch", layout, triton_device)


@pytest.mark.parametrize("id", ("mask-gradient-heads", "few-queries-splits"))
def test_same_bits_again(id, triton_device):
    check_bits(ATTENTION, id, torch.bfloat16, triton_device)


@pytest.mark.parametrize("T", ((5, 7), (97, 70), (1, 1030)), ids="{0[0]}x{0[1]}".format)
def test_dropout_follows_the_reference(T, triton_device):
    check_dropout(T, triton_device)


def test_packed_bias_free_rows_and_pages(triton_device):
    check_pages(triton_device)


# ---- as a backend --------------------------------------------------------------------------


class Calls:
    """Counts the calls of Triton's attention_forward."""

    def __init__(self, monkeypatch):
        self.count = 0
        kernel = fastlm.triton.kernel

        def counting(operator):
            self.count += operator == "attention_forward"
            return kernel(operator)

        monkeypatch.setattr(fastlm.triton, "kernel", counting)


interpreted = pytest.mark.skipif(not fastlm.triton.INTERPRETING, reason="a GPU's kernels are not forced")


@interpreted
def test_forcing_and_leaving(monkeypatch):
    """The kernels run where they are forced, nested too, and nowhere else."""
    calls = Calls(monkeypatch)
    x = torch.randn(1, 1, 3, 8)
    counts = []

    def step():
        sdpa(x, x, x)
        counts.append(calls.count)

    step()
    with fastlm.use_backend("triton"):
        step()
        with fastlm.use_backend("eager"):
            step()
        with fastlm.use_backend("cpu"):
            step()
        with fastlm.use_backend("triton"):
            step()
        step()
    step()
    assert counts == [0, 1, 1, 1, 2, 3, 3]


@interpreted
def test_backward_on_another_family():
    """What one family keeps, the other reads."""
    inputs = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    with fastlm.use_backend("triton"):
        out = sdpa(*inputs, is_causal=True)
    expected = sdpa(*inputs, is_causal=True)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


@interpreted
def test_compiles_whole(monkeypatch):
    calls = Calls(monkeypatch)
    inputs = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v).sin(), fullgraph=True, backend="aot_eager")
    expected = compiled(*inputs)
    with fastlm.use_backend("triton"):
        out = compiled(*inputs)
    assert calls.count == 1
    torch.testing.assert_close(out, expected)


@interpreted
@pytest.mark.parametrize(
    "shape, dtype, reason",
    (((1, 1, 3, 8), torch.float64, "float64"), ((1, 1, 3, 520), torch.float32, "head size 520")),
    ids=("float64", "large-head"),
)
def test_refusals_are_named(shape, dtype, reason):
    x = torch.randn(shape, dtype=dtype)
    with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match=f"'triton' is forced.*{reason}"):
        sdpa(x, x, x)


def test_reasons_for_its_absence(monkeypatch):
    monkeypatch.setattr(fastlm.triton, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here" in ops.missing_backends()["triton"]
    with pytest.raises(RuntimeError, match="'triton' is not available: no GPU here"):
        fastlm.use_backend("triton")
    monkeypatch.setattr(fastlm.triton, "installed", lambda: False)
    assert "not installed" in ops.missing_backends()["triton"]


@pytest.mark.parametrize(
    "at_q, at_k, message",
    (((0, 5, 3), (0, 5, 9), "never decrease"), ((0, 5, 10), (0, 5, 9), "offsets of 9 rows"), ((0, 1, 9), (0, 5, 9), "max_q")),
    ids=("decreasing", "outside", "longer-than-max"),
)  # fmt: skip
@interpreted
def test_wrong_offsets_are_errors(at_q, at_k, message):
    x = torch.randn(9, 1, 8)
    at_q, at_k = (torch.tensor(at, dtype=torch.int32) for at in (at_q, at_k))
    with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        fastlm.varlen_attn(x, x, x, at_q, at_k, 5, 5)


# ---- choice of configurations --------------------------------------------------------------


class Function:
    """Stands in for a jitted function."""

    fn, arg_names, cache_key = (lambda: None), ["x"], "0123456789abcdef0123"


def test_choice_is_timed_once_and_kept(monkeypatch, tmp_path):
    configs = [launch.Config({"BLOCK": size}) for size in (16, 32, 64)]
    timed = []

    def time(self, shape, args, constants, config):
        timed.append(config)
        return abs(config.blocks["BLOCK"] - 32)

    def choose(FLAG=1):
        kernel = launch.Kernel(Function, lambda target, dtype, **_: configs)
        key = (torch.device("cuda"), torch.float32, FLAG)
        return kernel._choose(key, lambda blocks: (1,), (), {"FLAG": FLAG}, torch.float32)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "target_of", lambda device: launch.TARGETS["sm_90"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(launch.Kernel, "_time", time)
    monkeypatch.setattr(launch.Kernel, "_fits", lambda self, args, constants, c, target: c != configs[0])

    monkeypatch.setenv("FASTLM_AUTOTUNE", "0")
    assert choose() == configs[1] and not timed  # the first that fits
    monkeypatch.delenv("FASTLM_AUTOTUNE")
    assert choose() == configs[1] and timed == configs
    assert choose() == configs[1] and timed == configs  # another process
    assert choose(FLAG=2) == configs[1] and timed == configs * 2
    (file,) = tmp_path.rglob("*.jsonl")
    assert len(list(filter(None, file.read_text().splitlines()))) == 2
    file.write_text('["half a li')
    assert choose() == configs[1] and len(timed) == 9
    os.chmod(file.parent, 0o500)  # a cache that can't be written costs time only
    assert choose(FLAG=3) == configs[1]

    def room(elements):  # on a GPU with little shared memory
        monkeypatch.setattr(
            launch.Kernel,
            "_fits",
            lambda self, args, constants, c, target: c.blocks["BLOCK"] * c.stages <= elements,
        )

    room(32)
    assert choose(FLAG=4) == configs[1]._replace(stages=1)
    room(16)
    assert choose(FLAG=4) == configs[0]._replace(stages=1)
    room(8)
    assert choose(FLAG=4).smaller() is None  # its launch says what is lacking


class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, other):
        return 1.0


@interpreted
def test_tuning_leaves_what_a_kernel_adds_to(monkeypatch, tmp_path):
    """The launches that are timed add to a copy, laid out as the result is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "target_of", lambda device: launch.TARGETS["sm_90"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(launch.Kernel, "_fits", lambda *_: True)
    monkeypatch.setattr(matmul._matmul, "_chosen", {})
    monkeypatch.setattr(matmul._matmul, "_ready", {})
    monkeypatch.setattr(matmul._matmul.function, "cache_key", "0123456789abcdef", raising=False)
    a, b, sums = (torch.randn(shape) for shape in ((5, 7), (7, 6), (5, 9)))
    expected = sums.clone()
    expected[:, :6] += a @ b
    out = sums[:, :6]
    matmul.matmul(a, b, out, addend=out)
    assert list(tmp_path.rglob("*.jsonl"))
    torch.testing.assert_close(sums, expected)


def test_precision_of_float32_follows_torch():
    target, before = launch.TARGETS["sm_90"], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert launch.dot_precision(torch.float32, target) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launch.dot_precision(torch.float32, target) == "tf32"
        assert launch.dot_precision(torch.float32, launch.TARGETS["gfx942"]) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
