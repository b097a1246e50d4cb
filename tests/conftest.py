"""Fixtures shared by all tests: the ISA, the thread count, the seed, the Triton backend."""

import os

import pytest
import torch

# Triton reads it when it is imported. On a machine with a GPU, TRITON_INTERPRET=0 runs its tests there.
os.environ.setdefault("TRITON_INTERPRET", "1")

import fastlm  # noqa: E402
import fastlm.triton  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(params=fastlm._C.isas())
def isa(request):
    """Runs the test on every instruction set that this machine has."""
    before = fastlm._C.isa()
    fastlm._C.set_isa(request.param)
    yield request.param
    fastlm._C.set_isa(before)


@pytest.fixture
def restore_threads():
    """Lets a test call torch.set_num_threads; the count is put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=(1, 2, 3), ids="threads{}".format)
def threads(request, restore_threads):
    """Runs the test with each of these thread counts."""
    torch.set_num_threads(request.param)
    return request.param


_patched = set()


def _patch_helpers_once(monkeypatch):
    """The interpreter searches all of triton.language for what to replace at each call of a helper, for a
    millisecond: once for each helper is enough, since it never takes that back."""
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        if self.fn not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture
def triton_device(monkeypatch):
    """Runs the test on the Triton kernels; gives the device that they take tensors of."""
    if fastlm.triton.INTERPRETING:
        _patch_helpers_once(monkeypatch)
    with fastlm.use_backend("triton"):
        yield torch.device(fastlm.triton.devices()[0])


@pytest.fixture
def cuda_host():
    """Runs the test on the CUDA kernels, in a model of a GPU."""
    import tests.simt  # noqa: F401 - adds the backend

    with fastlm.use_backend("cuda-host"):
        yield torch.device("cpu")
