"""Tensors that are computed when something reads them.

A model of another library passes a mask or logits from one place, which we control, to another, which we
control too, through code that we do not. `Deferred` travels that way as an ordinary tensor: its shape,
dtype and device are known, the place that knows it takes what it stands for, and any other operation
computes it first and goes on with the result. Nothing is wrong, then, where it was not expected; it only
costs what it had cost before.

`Logits` stand for hidden @ weight.T + bias. F.cross_entropy of them is `fastlm.linear_cross_entropy`, also
behind what models do to logits first: a cast, a scale, a softcap c * tanh(logits / c), another shape, some
of the positions.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parameter import Parameter
from torch.utils._pytree import tree_map_only

import fastlm.nn
from fastlm.functional import linear_cross_entropy
from fastlm.ops import KERNEL_DTYPES, autocast_is_on, transforms_are_off

# What a wrapper without memory answers itself, and what leaves it as it is.
_METADATA = frozenset(
    "shape dtype device layout ndim is_cpu is_cuda is_meta is_mps is_xpu is_nested is_sparse is_quantized "
    "requires_grad is_leaf grad_fn _base _is_view dim size numel nelement __len__ stride storage_offset is_contiguous "
    "is_floating_point is_complex element_size itemsize nbytes get_device".split()
)
_IDENTITIES = frozenset(("contiguous",))


def _name(function: Any) -> str:
    """That of a torch function, or of the attribute whose getter it is."""
    name = getattr(function, "__name__", "")
    return function.__self__.__name__ if name == "__get__" else name


class Deferred(Tensor):
    """Base class: `dense()` computes the tensor, `_take(name, args, kwargs)` may answer an operation."""

    @staticmethod
    def __new__(cls, shape, dtype: torch.dtype, device: torch.device) -> Deferred:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def dense(self) -> Tensor:
        raise NotImplementedError

    def _take(self, name: str, args: tuple, kwargs: dict) -> Any:
        """The result of an operation whose first argument this is, or NotImplemented."""
        if name in _IDENTITIES and not args and not kwargs:
            return self
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], Deferred):
            result = args[0]._take(name, args[1:], kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(Deferred, lambda x: x.dense(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Callers from C++, below autograd, whose own formulas take care of gradients.
        args, kwargs = tree_map_only(Deferred, lambda x: x.dense().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


# ---- logits -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """steps(hidden @ weight.T + bias) as it was asked for: the grad mode and autocast of that moment."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V)
    steps: tuple[
        tuple[str, Any], ...
    ]  # ("mul" or "div", number), ("add", (V)), ("tanh", None), ("to", dtype)
    versions: tuple[int, ...]
    low: torch.dtype | None  # the dtype of autocast, None where it is off
    grad: bool

    def context(self, low: torch.dtype | None) -> contextlib.AbstractContextManager:
        kind = self.hidden.device.type
        if low is None and not autocast_is_on(self.hidden.device):
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=low, enabled=low is not None)

    def check(self) -> None:
        tensors = (self.hidden, self.weight, self.bias)
        if _versions(*tensors) != self.versions:
            raise RuntimeError(
                "fastlm: these logits were never made, and what they are made of (the hidden states or the "
                "output layer's weight) has changed since: read logits before the optimizer's step"
            )
        if any(x is not None and x.untyped_storage().nbytes() == 0 < x.numel() for x in tensors):
            raise RuntimeError(
                "fastlm: these logits were never made, and the output layer's weight is sharded again: "
                "read logits within the model's forward, or apply(model, loss=False)"
            )

    def compute(self) -> Tensor:
        with torch.set_grad_enabled(self.grad), self.context(self.low):
            y = F.linear(self.hidden, self.weight, self.bias)
            for name, value in self.steps:
                y = y.tanh() if name == "tanh" else getattr(y, name)(value)
        return y

    def folded(self) -> tuple[float, Tensor | None, float] | None:
        """(s, t, c) of the logits c tanh((s z + t) / c), or s z + t with c = 0, where z = hidden @ weight.T
        and t of (V); None if the steps are no such thing."""
        inner, added, outer = 1.0, self.bias, None
        for name, value in self.steps:
            if name in ("mul", "div"):
                factor = value if name == "mul" else 1.0 / value if value else math.inf
                if outer is not None:
                    outer *= factor
                else:
                    inner, added = inner * factor, None if added is None else added * factor
            elif name == "tanh" and outer is None:
                outer = 1.0
            elif name == "add" and outer is None:
                added = value if added is None else added + value
            elif name != "to":
                return None
        if not math.isfinite(inner) or not 0.0 < (1.0 if outer is None else outer) < math.inf:
            return None
        if outer is None:
            return inner, added, 0.0
        return inner * outer, None if added is None else added * outer, outer


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(-1 if x is None or x.is_inference() else x._version for x in tensors)


class _Placeholder(torch.autograd.Function):
    """Ties logits to autograd's graph, for whoever differentiates them without reading them in Python."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, recipe, shape, dtype):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.recipe = replace(recipe, hidden=None, weight=None, bias=None)
        return Logits(shape, dtype, hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits):
        needs = ctx.needs_input_grad[:3]
        inputs = [
            x if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needs, strict=True)
        ]
        recipe = replace(ctx.recipe, hidden=inputs[0], weight=inputs[1], bias=inputs[2])
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(recipe.compute(), wanted, dlogits))
        return (*(next(grads) if need else None for need in needs), None, None, None)


class _Through(torch.autograd.Function):
    """Logits made for good, whose gradient passes the placeholder, where hooks wait for it."""

    @staticmethod
    def forward(ctx, logits):
        return logits._recipe.compute()

    @staticmethod
    def backward(ctx, dlogits):
        return dlogits


class Logits(Deferred):
    """Logits of a linear layer, made when something other than a cross-entropy reads them."""

    _recipe: _Recipe
    _dense: Tensor | None
    _hooked: bool  # someone waits for their gradient, as FSDP's root module does

    @staticmethod
    def make(recipe: _Recipe, dtype: torch.dtype) -> Logits:
        hidden, weight, bias = recipe.hidden, recipe.weight, recipe.bias
        shape = (*hidden.shape[:-1], weight.size(0))
        if recipe.grad:
            with torch.enable_grad():
                logits = _Placeholder.apply(hidden, weight, bias, recipe, shape, dtype)
        else:
            logits = Logits(shape, dtype, hidden.device)
        logits._recipe, logits._dense, logits._hooked = recipe, None, False
        return logits

    def dense(self) -> Tensor:
        if self._dense is None:
            self._recipe.check()
            self._dense = _Through.apply(self) if self._hooked else self._recipe.compute()
        return self._dense

    def _then(self, name: str, value: Any, dtype: torch.dtype | None = None) -> Logits:
        recipe = replace(self._recipe, steps=(*self._recipe.steps, (name, value)))
        return Logits.make(recipe, dtype or self.dtype)

    def _rows(self, hidden: Tensor) -> Logits:
        recipe = self._recipe
        recipe.check()
        versions = (*_versions(hidden), *recipe.versions[1:])
        return Logits.make(replace(recipe, hidden=hidden, versions=versions), self.dtype)

    def _take(self, name: str, args: tuple, kwargs: dict) -> Any:
        if self._dense is not None:  # it may have been written to, and costs nothing any more
            return NotImplemented
        if name == "register_hook":
            self._hooked = True
            with torch._C.DisableTorchFunctionSubclass():
                return self.register_hook(*args)
        if self._hooked:
            return NotImplemented
        if name == "cross_entropy":
            return self._cross_entropy(*args, **kwargs)
        if kwargs:
            return NotImplemented
        hidden = self._recipe.hidden
        match name, args:
            case ("float", ()) | ("to", (torch.float32,)):
                return self if self.dtype == torch.float32 else self._then("to", torch.float32, torch.float32)
            case "tanh", ():
                return self._then("tanh", None)
            case (("mul" | "__mul__" | "__rmul__" | "multiply"), (int() | float() as factor,)):
                return self._then("mul", factor)
            case (("div" | "__truediv__" | "true_divide" | "divide"), (int() | float() as divisor,)):
                return self._then("div", divisor)
            case (("add" | "__add__" | "__radd__"), (Tensor() as bias,)) if self._is_bias(bias):
                return self._then("add", bias.flatten())
            case (("view" | "reshape"), _):
                shape = torch.empty(self.shape, device="meta").reshape(*args).shape
                if shape[-1:] == self.shape[-1:] and (self.numel() or shape == self.shape):
                    return self._rows(hidden.reshape(*shape[:-1], hidden.size(-1)))
            case "__getitem__", (index,) if _leaves_last(index, self.dim()):
                return self._rows(hidden[index])
        return super()._take(name, args, kwargs)

    def _is_bias(self, x: Tensor) -> bool:
        return (
            x.shape[-1:] == self.shape[-1:]
            and x.numel() == x.size(-1)
            and x.dim() <= self.dim()
            and x.dtype == self.dtype
            and x.device == self.device
            and not x.requires_grad
            and _is_plain(x)
        )

    def _cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0, **options,
    ):  # fmt: skip
        recipe = self._recipe
        folded = recipe.folded()
        if folded is None or self.dim() > 2 or isinstance(target, Deferred):
            return NotImplemented
        scale, bias, softcap = folded
        if own := options.pop("softcap", 0.0):
            if softcap:
                return NotImplemented
            softcap = own
        recipe.check()
        if size_average is not None or reduce is not None:
            reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
        hidden = recipe.hidden if abs(scale - 1.0) < 1e-9 else recipe.hidden * scale
        low = recipe.low
        if low is None and self.dtype != hidden.dtype:
            low = hidden.dtype  # a loss in float32, as of logits cast to it
        with torch.set_grad_enabled(recipe.grad and torch.is_grad_enabled()), recipe.context(low):
            return linear_cross_entropy(
                hidden, recipe.weight, target, linear_bias=None if bias is None else bias.to(hidden.dtype), weight=weight, reduction=reduction,
                ignore_index=None if target.is_floating_point() else ignore_index,
                label_smoothing=label_smoothing, softcap=softcap, **options,
            )  # fmt: skip


def _leaves_last(index: Any, dims: int) -> bool:
    """Whether an index keeps the last of dims dimensions whole and last, so that it fits (..., D) as well."""
    index = index if isinstance(index, tuple) else (index,)
    used = 0
    for i in index:
        if i is None or isinstance(i, bool):
            return False
        if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8):
            used += i.dim()
        elif i is not Ellipsis:
            if not isinstance(i, (int, slice, Tensor)):
                return False
            used += 1
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
        last = index[-1]
        return isinstance(last, slice) and last == slice(None)
    if used == dims:
        last = index[-1]
        return isinstance(last, slice) and last == slice(None)
    return used < dims


# ---- the layer that makes them ------------------------------------------------------------


def _is_plain(x: Tensor | None) -> bool:
    return x is None or type(x) is Tensor or type(x) is Parameter


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Deferring:
    def forward(self, input: Tensor) -> Tensor:
        if not self._defers(input):
            return super().forward(input)
        low = torch.get_autocast_dtype(input.device.type) if autocast_is_on(input.device) else None
        if input.dtype == torch.float64:
            low = None
        tensors = (input, self.weight, self.bias)
        grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        recipe = _Recipe(*tensors, steps=(), versions=_versions(*tensors), low=low, grad=grad)
        return Logits.make(recipe, low or input.dtype)

    def _defers(self, input: Tensor) -> bool:
        """Whether logits wait. One position, as in generation, is read at once; compiled and traced
        programs, functorch transforms and tensors with a will of their own get the tensor itself, and so
        does a layer whose weight is there during its forward only (FSDP's own unit, ZeRO-3, offloading).
        An evaluation reads logits behind the forward, when FSDP's root has sharded the weight again."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(input, Tensor):
            return False
        return (
            input.dim() > 1
            and input.size(-2) > 1
            and input.dtype in KERNEL_DTYPES
            and all(map(_is_plain, (input, self.weight, self.bias)))
            and transforms_are_off()
            and (torch.is_grad_enabled() or not _is_distributed())
            and not hasattr(self, "_get_fsdp_state")
            and not hasattr(self, "_hf_hook")
            and not hasattr(self.weight, "ds_id")
        )


class _Linear(_Deferring, torch.nn.Linear):
    pass


class _FastlmLinear(_Deferring, fastlm.nn.Linear):
    pass


_DEFERRING = {torch.nn.Linear: _Linear, fastlm.nn.Linear: _FastlmLinear}


def defer(layer: torch.nn.Module) -> bool:
    """Make a linear layer return `Logits`, in place; False for a layer of another class."""
    kind = _DEFERRING.get(type(layer))
    if kind is None or "forward" in vars(layer):
        return type(layer) in _DEFERRING.values()
    layer.__class__ = kind
    return True


def undo(layer: torch.nn.Module) -> None:
    """Undo `defer`."""
    for kind, deferring in _DEFERRING.items():
        if type(layer) is deferring:
            layer.__class__ = kind
