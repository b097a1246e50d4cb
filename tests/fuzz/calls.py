"""Calls as data: what is fuzzed is drawn, written down before it runs, shrunk and printed as Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from cases import OPERATORS, Draw
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest

import fastlm
import fastlm.nn

LAYOUTS = ("contiguous", "strided", "transposed", "expanded", "offset", "permuted", "overlapping", "negated")
STRANGE = ("sparse", "nested", "zero-tensor", "subclass")  # no plain dense tensors


class Subclass(Tensor):
    """One without a rule of its own for anything."""


class _Data:
    """repr() leaves defaults out."""

    def __repr__(self) -> str:
        parts = [repr(getattr(self, f.name)) for f in dataclasses.fields(self) if f.default is dataclasses.MISSING
                 and f.default_factory is dataclasses.MISSING]  # fmt: skip
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if len(parts) and (
                f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            ):
                default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
                if value != default:
                    parts.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class T(_Data):
    """A tensor. values: normal, uniform, zero, tiny, huge; nan, inf, -inf: one of normal values is that; or the
    values themselves."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    values: str | tuple = "normal"
    scale: float = 1.0
    grad: bool = False
    device: str = "cpu"
    seed: int = 0

    def make(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        x = _lay(self._drawn().to(dtype), self.layout)
        if self.device != "cpu":
            x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=self.device)
        if self.grad and (dtype.is_floating_point or dtype.is_complex):
            x = x.detach().requires_grad_()
        return x

    def _drawn(self) -> Tensor:
        if isinstance(self.values, tuple):
            kind = torch.float64 if any(isinstance(v, float) for v in self.values) else torch.int64
            return torch.tensor(self.values, dtype=kind).reshape(self.shape)
        generator = torch.Generator().manual_seed(self.seed)
        if self.values == "uniform":
            return torch.rand(self.shape, generator=generator, dtype=torch.float64) * self.scale
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.scale
        if self.values in ("zero", "tiny", "huge"):
            return x * {"zero": 0.0, "tiny": 1e-41, "huge": 1e30}[self.values]
        if self.values != "normal" and x.numel():
            x.view(-1)[torch.randint(x.numel(), (1,), generator=generator)] = float(self.values)
        return x


def _lay(x: Tensor, layout: str) -> Tensor:
    if layout in ("strided", "transposed", "expanded", "offset"):
        return Draw.lay(x, layout)
    if layout == "permuted":  # the first dimension is the innermost in memory, the last the outermost
        backwards = tuple(reversed(range(x.dim())))
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "overlapping":  # every stride is 1
        flat = x.flatten()[: sum(n - 1 for n in x.shape) + 1].clone() if x.numel() else x.flatten()
        return torch.as_strided(flat, x.shape, (1,) * x.dim())
    if layout == "negated" and x.dtype.is_floating_point:  # negative when it is read
        return torch._neg_view(x.neg())
    if layout == "sparse":
        return x.to_sparse()
    if layout == "nested":
        return torch.nested.nested_tensor([x])
    if layout == "zero-tensor":
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)
    if layout == "subclass":
        return x.as_subclass(Subclass)
    return x


@dataclass(frozen=True, repr=False)
class Call(_Data):
    """`name` is that of a public function, nn.CLASS, or ops.OPERATOR: the raw operator. Tensors are T, also in
    lists and tuples. module: arguments and keywords of a class's constructor. wrong: what was altered."""

    name: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    module: tuple[tuple, dict] | None = None
    wrong: tuple[str, ...] = ()
    isa: str | None = None
    threads: int = 1
    autocast: str | None = None
    seed: int = 0

    def arguments(self) -> tuple[tuple, dict]:
        return made(self.args), made(self.kwargs)

    def function(self) -> Callable:
        """What the arguments are given to."""
        kind, _, rest = self.name.rpartition(".")
        if kind == "ops":
            return getattr(torch.ops.fastlm, rest).default
        if kind == "nn":
            return self.built(getattr(fastlm.nn, rest))
        return getattr(fastlm, rest)

    def built(self, kind: type) -> torch.nn.Module:
        """A module of fastlm.nn or torch.nn, of the same parameters."""
        args, kwargs = made(self.module)
        kwargs = dict(kwargs)
        train, dtype = kwargs.pop("train", True), getattr(torch, kwargs.pop("dtype", "float32"))
        torch.manual_seed(self.seed)
        return kind(*args, **kwargs).to(dtype).train(train)

    def context(self):
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=getattr(torch, self.autocast))


def made(tree):
    """The tree with its tensors; a list of AuxRequest's arguments is one."""
    if isinstance(tree, T):
        return tree.make()
    if isinstance(tree, dict):
        return {
            k: AuxRequest(lse=v) if k == "return_aux" and isinstance(v, bool) else made(v)
            for k, v in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(made(x) for x in tree)
    return tree


def described(x):
    """The inverse, for arguments that were seen: values of floating tensors are drawn anew."""
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        values = "uniform" if x.is_floating_point() else tuple(x.flatten().tolist())
        return T(tuple(x.shape), dtype, values=values)
    if isinstance(x, (list, tuple)):
        return type(x)(described(y) for y in x)
    return x


def leaves(tree, path: tuple = ()):
    """(path, value) of everything in it, lists and tuples of arguments included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key), value
        if isinstance(value, (list, tuple, dict)):
            yield from leaves(value, (*path, key))


def replaced(tree, path: tuple, value):
    """A copy of the tree with another value there."""
    key, *rest = path
    if rest:
        value = replaced(tree[key], tuple(rest), value)
    if isinstance(tree, dict):
        return {**tree, key: value}
    return type(tree)((*tree[:key], value, *tree[key + 1 :]))


def without(tree, path: tuple):
    """A copy of the tree without what is there."""
    key, *rest = path
    if rest:
        return replaced(tree, (key,), without(tree[key], tuple(rest)))
    if isinstance(tree, dict):
        return {k: v for k, v in tree.items() if k != key}
    return type(tree)((*tree[:key], *tree[key + 1 :]))


OPERATOR_NAMES = tuple(OPERATORS)
