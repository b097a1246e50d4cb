"""Fixtures shared by all tests: the ISA, the thread count, the seed, the Triton backend."""

import importlib.util
import os
import sys

import pytest
import torch

# Triton reads it when it is imported. On a machine with a GPU, TRITON_INTERPRET=0 runs its tests there.
os.environ.setdefault("TRITON_INTERPRET", "1")

import fastlm  # noqa: E402
import fastlm.cuda  # noqa: E402
import fastlm.triton  # noqa: E402

# Results are compared with eager's: torch has cuDNN's GRU multiply float32 in tf32 unless it is told not to.
torch.backends.cudnn.allow_tf32 = False

# What tests need beside torch and pytest, which are all that every Python with a GPU has.
TRAINING = ("numpy", "safetensors", "tokenizers")
NEEDS = {
    "test_backends.py": ("ninja", "triton"),
    "test_classifier.py": (*TRAINING, "rich", "typer"),
    "test_cli.py": (*TRAINING, "rich", "typer"),
    "test_cuda_attention.py": ("ninja",),
    "test_cuda_gru.py": ("ninja",),
    "test_cuda_host.py": ("ninja",),
    "test_data.py": TRAINING,
    "test_distributed.py": (*TRAINING, "rich", "typer"),
    "test_finetune.py": (*TRAINING, "rich", "typer"),
    "test_fuzz.py": ("numpy",),
    "test_hypothesis.py": ("hypothesis",),
    "test_int8.py": (*TRAINING, "rich", "torchao", "transformers", "typer"),
    "test_kills.py": TRAINING,
    "test_lora.py": (*TRAINING, "peft", "rich", "typer"),
    "test_opinfo.py": ("expecttest", "numpy"),
    "test_robustness.py": (*TRAINING, "rich", "typer"),
    "test_simt.py": ("ninja",),
    "test_soak.py": (*TRAINING, "rich", "tensorboard"),
    "test_train.py": TRAINING,
    "test_transformers.py": ("accelerate", "peft", "transformers"),
    "test_triton.py": ("triton",),
    "test_triton_targets.py": ("triton",),
    "test_wheels.py": ("auditwheel", "ninja"),
}


class Unreadable(pytest.Module):
    """A file of tests that can't be imported here."""

    def collect(self):
        missing = [name for name in NEEDS[self.path.name] if not importlib.util.find_spec(name)]
        pytest.skip(f"no Python package {', '.join(missing)} here", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if not all(map(importlib.util.find_spec, NEEDS.get(module_path.name, ()))):
        return Unreadable.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def device_is_whole(request):
    """A kernel's fault spoils the device for its process: of the tests behind it, none would say anything."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} leaves the GPU in a fault, which ends this process: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=3)
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(message, file=sys.stderr, flush=True)
        os._exit(3)  # another worker takes its place


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


TINY = fastlm.ops.TINY


@pytest.fixture(autouse=True)
def kernels_for_tiny_calls(monkeypatch):
    """Tests are of few elements, and of the kernels: plain PyTorch takes none of their calls."""
    monkeypatch.setattr(fastlm.ops, "TINY", dict.fromkeys(TINY, 0))


@pytest.fixture
def tiny_calls_as_shipped(monkeypatch, kernels_for_tiny_calls):
    """For tests of these, and for bits that another process is to find again."""
    monkeypatch.setattr(fastlm.ops, "TINY", TINY)


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
def cuda_device():
    """Runs the test on the CUDA kernels; gives the device that they take tensors of."""
    reason = fastlm.cuda.missing()
    if reason:
        pytest.skip(f"no CUDA kernels here: {reason}")
    with fastlm.use_backend("cuda"):
        yield torch.device("cuda")


@pytest.fixture
def cuda_host():
    """Runs the test on the CUDA kernels, in a model of a GPU."""
    pytest.importorskip("ninja", reason="it is built with ninja")
    import tests.simt  # noqa: F401 - adds the backend

    with fastlm.use_backend("cuda-host"):
        yield torch.device("cpu")
