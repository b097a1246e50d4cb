"""The CUDA kernels as a backend: on a GPU by the tables of cases, and everywhere what is said of their absence.
tests/simt runs their source on the CPU."""

from types import SimpleNamespace

import pytest
import torch
from cases import OPERATORS
from harness import case_of, check_tf32, compare
from test_operators import ALL, name_of, names, only_in

import fastlm
from fastlm import cuda, ops

reason = cuda.missing()
on_gpu = pytest.mark.skipif(reason is not None, reason=f"no CUDA kernels here: {reason}")


def runnable(pairs):
    for operator, case in pairs:
        for dtype in case.dtypes:
            if not cuda.refuses(operator.name, case.build(dtype, 0)[0][0]):
                name = f"{names([(operator, case)])[0]}-{name_of(dtype)}"
                yield pytest.param(operator, case, dtype, id=name)


@on_gpu
@pytest.mark.parametrize("operator, case, dtype", list(runnable(ALL)) if reason is None else [])
def test_matches_reference(operator, case, dtype):
    only_in(case, dtype)
    with fastlm.use_backend("cuda"):
        compare(operator, case, dtype, device=torch.device("cuda"))


@on_gpu
@pytest.mark.parametrize("name, id", (("scaled_dot_product_attention", "causal"), ("gru", "plain")))
def test_tf32_follows_torch(name, id):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a GPU without tf32")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with fastlm.use_backend("cuda"):
            check_tf32(OPERATORS[name], case_of(OPERATORS[name], id), "cuda")
    finally:
        torch.set_float32_matmul_precision(before)


# ---- as a backend --------------------------------------------------------------------------


class Library:
    """Stands in for libfastlm_cuda.so."""

    def fastlm_cuda_version(self):
        return 13000

    def fastlm_cuda_archs(self):
        return b"75;80;90"


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A build with CUDA kernels, on a machine that the test describes."""
    (tmp_path / "libfastlm_cuda.so").touch()
    monkeypatch.setattr(cuda, "_path", tmp_path / "libfastlm_cuda.so")
    monkeypatch.setattr(cuda, "_library", Library())
    monkeypatch.setattr(cuda, "driver_version", lambda: 13000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    return monkeypatch


def test_what_is_there_is_noted(built):
    assert cuda.missing() is None
    assert cuda.note() == "CUDA 13.0 kernels for sm_75, sm_80, sm_90, on Some GPU"


@pytest.mark.parametrize(
    "owner, name, value, message",
    (
        (cuda, "_path", cuda._path.with_name("none.so"), "this build of fastlm has no CUDA kernels"),
        (torch.version, "cuda", None, "torch here is built without CUDA"),
        (cuda, "_library", None, "can't be loaded"),
        (cuda, "driver_version", lambda: 0, "no NVIDIA driver here"),
        (cuda, "driver_version", lambda: 12040, "the driver here serves CUDA 12.4, the kernels were built with CUDA 13.0"),
        (torch.cuda, "is_available", lambda: False, "no GPU here"),
        (torch.cuda, "get_device_capability", lambda i: (7, 0), "for sm_75, sm_80, sm_90, the GPU here is sm_70"),
    ),
    ids=("not-built", "torch-without", "not-loaded", "no-driver", "old-driver", "no-gpu", "other-gpu"),
)  # fmt: skip
def test_reasons_for_its_absence(built, owner, name, value, message):
    built.setattr(owner, name, value)
    assert message in ops.missing_backends()["cuda"]
    with pytest.raises(RuntimeError, match=f"backend 'cuda' is not available: .*{message}"):
        fastlm.use_backend("cuda")


class Driver:
    """Stands in for libcuda.so.1, with nothing that would initialise CUDA."""

    def cuDriverGetVersion(self, version):
        version._obj.value = 12040
        return 0


def test_asking_the_driver_leaves_cuda_alone(monkeypatch):
    """A process that has initialised CUDA can't fork others that use it, and importing fastlm asks."""
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: {"libcuda.so.1": Driver()}[name])
    assert cuda.driver_version() == 12040


def test_a_machine_without_a_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert cuda.driver_version() == 0


def test_gpus_that_it_serves(built):
    """Those of the generations built for, not older ones of it, and all that are newer; but code for sm_75 is for
    that alone, as it lacks kernels that others are sent."""
    asked = [(7, 0), (7, 2), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)]
    assert [x for x in asked if cuda.serves(x)] == asked[2:]
    built.setattr(Library, "fastlm_cuda_archs", lambda self: b"86;90")
    assert [x for x in asked if cuda.serves(x)] == asked[4:]
    built.setattr(Library, "fastlm_cuda_archs", lambda self: b"75")
    assert [x for x in asked if cuda.serves(x)] == [(7, 5)]


def test_families_that_are_not_there_are_not_asked(built):
    """tests/test_backends.py has those that are."""

    def families():
        return {tuple(name for name, _ in rules) for rules in ops._on_gpu().values()}

    built.setattr(ops.triton, "installed", lambda: True)
    assert families() == {("cuda", "triton")}
    built.setattr(ops.triton, "installed", lambda: False)
    assert families() == {("cuda",)}
    built.setattr(cuda, "_library", None)
    assert families() == {()}


def test_a_gpu_that_it_is_not_for(built):
    """Beside one that it is for: its tensors go to another family."""
    built.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 0))[i])
    built.setattr(cuda, "_no_code", cuda._no_code.__wrapped__)
    x = [SimpleNamespace(is_cuda=True, get_device=lambda i=i: i, dtype=torch.float32) for i in range(2)]
    assert cuda.missing() is None and cuda.refuses("gru", x[0]) is None
    assert "no kernel for sm_70" in cuda.refuses("gru", x[1])


@pytest.mark.parametrize(
    "function, shape, dtype, message",
    (
        ("scaled_dot_product_attention", (1, 1, 3, 64), torch.float64, "float64"),
        ("varlen_attn", (3, 1, 257), torch.float16, "head size 257"),
        ("gru", (3, 4, 5), torch.float64, "float64"),
        ("gru_cell", (4, 5), torch.float64, "float64"),
    ),
    ids=("attention-float64", "large-head", "gru-float64", "cell-float64"),
)
def test_refusals_are_named(function, shape, dtype, message):
    assert message in cuda.refuses(function, torch.empty(shape, dtype=dtype))
    assert cuda.refuses("cross_entropy", torch.empty(shape, dtype=dtype)) is None


def test_the_tables_name_all_operators():
    """But for the one that the backward of a loss takes beside its own."""
    operators = {name for pair in ops.OPERATORS.values() for name in pair}
    assert set(ops.ON_GPU) == operators == set(ops.triton.MODULES) - {"scale_"}
