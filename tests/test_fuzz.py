"""The fuzzer: a short run of it; and what it is there to find is found, shrunk and printed as a call."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import check, fakes
from fuzz.calls import Call, T
from fuzz.draw import Drawer

FUZZ = Path(__file__).parent / "fuzz"
_spec = importlib.util.spec_from_file_location("fuzz_main", FUZZ / "__main__.py")
main = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(main)


@pytest.fixture(autouse=True)
def keep_threads(restore_threads, isa_as_it_was, tiny_calls_as_shipped):
    """A judged call sets both."""


@pytest.fixture
def isa_as_it_was():
    import fastlm

    before = fastlm._C.isa()
    yield
    fastlm._C.set_isa(before)


def test_short_run():
    """The same calls each time; without the look for leaks, which takes longest."""
    command = [
        sys.executable,
        str(FUZZ),
        "--seed",
        "ci",
        "--minutes",
        "5",
        "--calls",
        "250",
        "--batches",
        "1",
    ]
    done = subprocess.run([*command, "--no-leaks"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " calls, 0 failed" in done.stdout


LOSS = Call("cross_entropy", (T((4, 5), seed=1), T((4,), "int64", values=(0, 1, 2, 3))), {"z_loss": 0.1})


def test_calls_are_printed_as_they_can_be_run():
    call = Call(
        "ops.scale_", ([T((2, 3), layout="strided", grad=True, seed=4)], T((), values="nan")), isa="generic"
    )
    assert main.parsed(repr(call)) == call
    assert check.judge(LOSS) is None


def _changed(x, target, **options):
    x.data.add_(1)
    return x.sum()


def _in_place(x, target, **options):
    return x.add_(1).sum()


def _random(x, target, **options):
    return x.sum() + _random.count.pop()


def _wrong(x, target, **options):
    return torch.nn.functional.cross_entropy(x, target) * 1.001


def _swallowed(x, target, **options):
    return torch.nn.functional.cross_entropy(x, target).nan_to_num(1.0) + 0 * x.nan_to_num(0).sum()


def _unnamed(x, target, **options):
    raise ValueError("no")


def _undocumented(x, target, **options):
    return x.colour


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (_changed, "was changed"),
        (_in_place, "its version changed"),
        (_random, "result 0 has other bits when the call is repeated"),
        (_wrong, "differs from the reference"),
        (_unnamed, "a right call was refused: ValueError: no"),
        (_undocumented, "an error of an undocumented type: AttributeError"),
    ],
)
def test_faults_are_found(monkeypatch, function, problem):
    _random.count = [1.0, 2.0]
    monkeypatch.setattr("fastlm.cross_entropy", function)
    assert problem in check.judge(LOSS)


def test_a_lost_nan_is_found(monkeypatch):
    call = dataclasses.replace(LOSS, args=(dataclasses.replace(LOSS.args[0], values="nan"), LOSS.args[1]))
    assert check.judge(call) is None
    monkeypatch.setattr("fastlm.cross_entropy", _swallowed)
    assert "result 0 has 1 where nan is expected" in check.judge(call)


def test_wrong_fake_kernels_are_found(monkeypatch):
    x = torch.randn(2, 3)
    assert fakes._wrong(torch.clone, (x,), {}, x.clone()) is None
    for other in (x[:1].clone(), x.double(), x.t().contiguous().t()):
        assert "it is" in fakes._wrong(torch.clone, (x,), {}, other)
    monkeypatch.setattr(fakes, "_wrong", lambda function, *rest: f"{function} is wrong")
    assert check.judge(LOSS) == "fastlm.cross_entropy.default is wrong"


@pytest.mark.parametrize("kind", ("attention", "varlen", "cross_entropy", "linear_cross_entropy", "gru_cell"))
def test_nan_and_infinity_in_arguments(kind):
    for seed in range(15):
        drawer = Drawer(f"{kind} {seed}")
        call = drawer.nonfinite(getattr(drawer, kind)())
        assert check.judge(call) is None, call


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ValueError("no"), "the message doesn't name cross_entropy"),
        (ValueError("fastlm.cross_entropy: no"), "the message names no argument"),
        (ValueError("fastlm.cross_entropy: target is odd"), None),
        (KeyError("fastlm.cross_entropy: target is odd"), "an undocumented type"),
        (RuntimeError("cross_entropy: target: INTERNAL ASSERT FAILED"), "an internal error"),
    ],
    ids=str,
)
def test_messages_are_judged(error, problem):
    found = check.judge_error(Call(LOSS.name, LOSS.args, wrong=("args[1]",)), error)
    assert found is problem is None or problem in found


def test_leaks_are_found(monkeypatch):
    lost = []

    def leaking(x, target, **options):
        lost.append(torch.ones(50_000))  # more than what other tests have freed takes in
        return x.sum()

    assert check.leak(LOSS, times=150) is None
    monkeypatch.setattr("fastlm.cross_entropy", leaking)
    assert check.leak(LOSS, times=150) > 150_000


def test_a_crash_is_shrunk_and_printed(monkeypatch):
    """In place of processes that die: a judge who says that they do, as long as the mask is there."""
    call = Call(
        "scaled_dot_product_attention", (T((2, 4, 8, 16), "bfloat16"),) * 3, {"attn_mask": T((8, 8)), "scale": 0.5},
        threads=3, isa="generic",
    )  # fmt: skip
    found, problem = main.shrunk(
        call,
        f"{main.CRASHED} SIGSEGV",
        lambda c: "attn_mask" in c.kwargs and f"{main.CRASHED} SIGSEGV" or None,
        10,
    )
    assert problem == f"{main.CRASHED} SIGSEGV" and (found.threads, found.isa) == (1, None)
    assert found.kwargs.keys() == {"attn_mask"} and found.kwargs["attn_mask"].shape == (1, 1)
    killed = "__import__('os').kill(__import__('os').getpid(), 11)"
    monkeypatch.setattr(Call, "__repr__", lambda self: killed)
    assert main.run_alone(call) == f"{main.CRASHED} SIGSEGV"
