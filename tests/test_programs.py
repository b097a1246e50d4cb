"""Programs that were not written for fastlm print the same numbers on it, with no line of them changed."""

import contextlib
import io
import os
import runpy
import sys

import pytest
import torch
from torch import nn

import fastlm

FOLDER = os.path.join(os.path.dirname(__file__), "programs")
ATTENTION, LOSS, GRU, CELL = "scaled_dot_product_attention", "cross_entropy", "gru", "gru_cell"


def printed(name, *arguments):
    """What the program prints, word by word."""
    path, before = os.path.join(FOLDER, f"{name}.py"), sys.argv
    sys.argv = [path, *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output, torch.random.fork_rng(devices=[]):
            runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before
        if "accelerate" in sys.modules:  # which allows one precision a process
            sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    return output.getvalue().split()


def assert_same(actual, expected, tolerance):
    """Words alike, and numbers within the tolerance, relative above 1e-2 and else of that."""
    assert len(actual) == len(expected) > 20
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        try:
            number = float(theirs)
        except ValueError:
            assert ours == theirs, expected[:i]
        else:
            assert abs(float(ours) - number) <= tolerance * max(abs(number), 1e-2), (ours, *expected[: i + 1])


@pytest.fixture
def ran(monkeypatch):
    """Names of fastlm's functions that calls of torch's have reached."""
    names = set()

    def noting(name, function):
        def noted(*args, **kwargs):
            names.add(name)
            return function(*args, **kwargs)

        return noted

    for name in (ATTENTION, LOSS, GRU, CELL):
        monkeypatch.setattr(fastlm.functional, name, noting(name, getattr(fastlm.functional, name)))
    return names


PROGRAMS = (
    ("gpt", (), {ATTENTION, LOSS}),
    ("gpt", ("--manual",), {LOSS}),
    ("gpt", ("--dtype", "bfloat16"), {ATTENTION, LOSS}),
    ("gpt", ("--dtype", "float16"), {ATTENTION, LOSS}),
    ("classifier", ("fork", "2"), {GRU, LOSS}),
    ("seq2seq", (), {GRU, CELL, LOSS}),
    ("policy", (), {GRU, LOSS}),
    ("transformer", (), {ATTENTION, LOSS}),
    ("with_lightning", ("32-true",), {ATTENTION, GRU, LOSS}),
    ("with_lightning", ("bf16-mixed",), {ATTENTION, GRU, LOSS}),
    ("with_accelerate", ("no",), {ATTENTION, GRU, LOSS}),
    ("with_accelerate", ("bf16",), {ATTENTION, GRU, LOSS}),
)
NEEDS = {"policy": "gymnasium", "with_lightning": "lightning", "with_accelerate": "accelerate"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name,arguments,functions",
    PROGRAMS,
    ids=["-".join((name, *arguments)) for name, arguments, _ in PROGRAMS],
)
def test_program(name, arguments, functions, ran):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    expected = printed(name, *arguments)
    assert not ran
    with fastlm.installed():
        actual = printed(name, *arguments)
    assert ran == functions
    low = any(word in argument for argument in arguments for word in ("bf16", "bfloat16", "float16"))
    assert_same(actual, expected, 2e-2 if low else 1e-4)


def test_compiled_program(ran):
    torch.compiler.reset()
    expected = printed("gpt", "--steps", "2")
    with fastlm.installed():
        assert_same(printed("gpt", "--steps", "2", "--compile", "aot_eager"), expected, 1e-4)
    assert ran == {ATTENTION, LOSS}


@pytest.mark.filterwarnings("ignore")
def test_spawned_workers():
    """They unpickle the program's own classes."""
    expected = printed("classifier", "fork", "1")
    with fastlm.installed():
        assert_same(printed("classifier", "spawn", "1"), expected, 1e-4)


class Attended(nn.Module):
    """Classes of continuous inputs, from torch.nn's modules or those of fastlm.nn."""

    def __init__(self, modules):
        super().__init__()
        self.gru = modules.GRU(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = modules.MultiheadAttention(16, 2, batch_first=True)
        self.head = modules.Linear(16, 3)

    def forward(self, x):
        y, hidden = self.gru(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head(y.mean(1) + torch.cat([hidden[-2], hidden[-1]], 1))


@pytest.mark.filterwarnings("ignore")
def test_attributions_of_captum():
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    ours, theirs = Attended(fastlm.nn).eval(), Attended(nn).eval()
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(2, 5, 6), torch.tensor([2, 0])
    gradients, delta = captum.IntegratedGradients(ours).attribute(
        x, target=target, n_steps=32, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-3  # attributions add up to the difference that the input makes
    torch.testing.assert_close(
        gradients, captum.IntegratedGradients(theirs).attribute(x, target=target, n_steps=32)
    )
    for method in (captum.Saliency, captum.FeatureAblation, captum.DeepLift):
        torch.testing.assert_close(
            method(ours).attribute(x, target=target), method(theirs).attribute(x, target=target)
        )
    for method in (captum.LayerIntegratedGradients, captum.LayerGradCam):
        torch.testing.assert_close(
            method(ours, ours.head).attribute(x, target=target),
            method(theirs, theirs.head).attribute(x, target=target),
        )
