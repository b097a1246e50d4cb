"""Opacus's private training of models made of fastlm.nn."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm

pytest.importorskip("opacus")

import opacus  # noqa: E402
from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.gru = modules.GRU(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = modules.MultiheadAttention(16, 2, batch_first=True)
        self.cell = modules.GRUCell(16, 16)
        self.head = modules.Linear(16, 3)

    def forward(self, x):
        y, hidden = self.gru(x)
        a, _ = self.attention(y, y, y, need_weights=False)
        h = torch.cat([hidden[-2], hidden[-1]], 1)
        for t in range(a.shape[1]):
            h = self.cell(a[:, t], h)
        return self.head(h)


def rows(model, x, target):
    """The gradient of each sample's loss, one pass each."""
    found = []
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), target[i : i + 1]).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return {name: torch.stack([g[i] for g in found]) for i, (name, _) in enumerate(model.named_parameters())}


@pytest.mark.parametrize("installed", (False, True), ids=("plain", "installed"))
def test_fixed_models_have_gradients_per_sample(installed):
    torch.manual_seed(0)
    model, x, target = Model(fastlm.nn), torch.randn(4, 5, 6), torch.tensor([0, 2, 1, 1])
    expected = rows(model, x, target)
    fixed = ModuleValidator.fix(model)
    assert not ModuleValidator.validate(fixed)
    assert type(fixed.head) is fastlm.nn.Linear and type(fixed.gru) is opacus.layers.DPGRU
    private = GradSampleModule(fixed, loss_reduction="sum")
    with fastlm.installed() if installed else contextlib.nullcontext():
        with torch.no_grad():
            torch.testing.assert_close(private(x), model(x))
        F.cross_entropy(private(x), target, reduction="sum").backward()
    actual = {name: p.grad_sample for name, p in fixed.named_parameters()}
    same = [name for name in expected if name.startswith(("gru", "head"))]
    assert len(same) == 18
    for name in same:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
    # Attention and cell have their weights under other names there.
    norms = [sum(g.flatten(1).square().sum(1) for g in found.values()) for found in (actual, expected)]
    torch.testing.assert_close(*norms)


class WithLoss(nn.Module):
    """A model whose output layer is part of its loss."""

    def __init__(self, reduction):
        super().__init__()
        self.hidden = fastlm.nn.Linear(6, 8)
        self.loss = fastlm.nn.LinearCrossEntropyLoss(
            8, 5, bias=True, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0
        )

    def forward(self, x, target):
        return self.loss(torch.tanh(self.hidden(x)), target)


@pytest.mark.parametrize("functorch", (False, True), ids=("hooks", "functorch"))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_a_loss_with_its_output_layer_has_gradients_per_sample(reduction, functorch):
    torch.manual_seed(0)
    model, x, target = WithLoss(reduction), torch.randn(4, 6), torch.tensor([0, 4, 1, 1])
    expected = [
        torch.autograd.grad(model(x[i : i + 1], target[i : i + 1]), list(model.parameters()))
        for i in range(4)
    ]
    private = GradSampleModule(model, loss_reduction=reduction, force_functorch=functorch)
    private(x, target).backward()
    for i, (name, p) in enumerate(model.named_parameters()):
        torch.testing.assert_close(p.grad_sample, torch.stack([g[i] for g in expected]), msg=name)


@pytest.mark.parametrize("batch_first", (True, False), ids=("batch_first", "time_first"))
@pytest.mark.parametrize(
    "options",
    ({}, {"bias": False}, {"kdim": 4, "vdim": 10}, {"add_zero_attn": True, "add_bias_kv": True}),
    ids=lambda options: "-".join(options) or "plain",
)
def test_fixed_attention_is_the_same_function(options, batch_first):
    torch.manual_seed(0)
    module = fastlm.nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)
    fixed = ModuleValidator.fix(module)
    sizes = (3, 6), (5, module.kdim), (5, module.vdim)
    inputs = [torch.randn((2, *s) if batch_first else (s[0], 2, s[1])) for s in sizes]
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    masks = (
        {} if not batch_first else {"key_padding_mask": padding, "attn_mask": torch.ones(3, 5).triu(2) > 0}
    )
    for given in ({}, masks):
        for weights in (True, False):
            torch.testing.assert_close(
                fixed(*inputs, need_weights=weights, **given),
                module(*inputs, need_weights=weights, **given),
            )


@pytest.mark.parametrize("mode", ("hooks", "functorch", "ghost"))
def test_private_training_of_linear_layers(mode):
    """The step without noise is that of clipped gradients, from torch.nn's modules and ours."""

    def trained(modules):
        torch.manual_seed(0)
        model = nn.Sequential(modules.Linear(6, 8), nn.Tanh(), modules.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        data = torch.utils.data.TensorDataset(torch.randn(12, 6), torch.randint(0, 3, (12,)))
        loader = torch.utils.data.DataLoader(data, 6)
        made = opacus.PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=0.3,
            poisson_sampling=False, grad_sample_mode=mode, criterion=modules.CrossEntropyLoss(),
        )  # fmt: skip
        private, optimizer, *criterion, loader = made
        criterion = criterion[0] if criterion else modules.CrossEntropyLoss()
        for x, target in loader:
            optimizer.zero_grad()
            criterion(private(x), target).backward()
            optimizer.step()
        return [p.detach() for p in private.parameters()]

    torch.testing.assert_close(trained(fastlm.nn), trained(nn))


def test_what_opacus_can_not_do_is_refused():
    x = torch.randn(2, 5, 6)
    for module, call in (
        (fastlm.nn.GRU(6, 6, batch_first=True), lambda m: m(x)[0]),
        (fastlm.nn.MultiheadAttention(6, 2, batch_first=True), lambda m: m(x, x, x, need_weights=False)[0]),
        (fastlm.nn.GRUCell(6, 6), lambda m: m(x[:, 0], x[:, 1])),
    ):
        name = f"fastlm.nn.{type(module).__name__} has no"
        with pytest.raises(UnsupportedModuleError, match=name):
            ModuleValidator.validate(module, strict=True)
        with pytest.raises(UnsupportedModuleError, match=name):
            call(GradSampleModule(copy.deepcopy(module))).sum().backward()
    with pytest.raises(UnsupportedModuleError, match="fastlm.nn.GRU with layer_norm=True has no counterpart"):
        ModuleValidator.fix(fastlm.nn.GRU(6, 6, layer_norm=True))


def test_either_is_imported_first():
    check = "assert fastlm.nn.GRU in opacus.validators.ModuleValidator.FIXERS"
    subprocess.run([sys.executable, "-c", f"import opacus, fastlm.nn; {check}"], check=True)
