"""Makes programs that were never written for fastlm run on it.

`install()` puts fastlm's functions in the places where torch's own are looked up; `convert()`
changes the modules of one model. Replaced are the functions that modules and programs call, never a
class, so that isinstance, pickling and subclasses of torch's modules stay as they were:

    F.scaled_dot_product_attention   also by nn.MultiheadAttention, nn.Transformer...
    F.cross_entropy                  also by nn.CrossEntropyLoss
    F.linear_cross_entropy           also by nn.LinearCrossEntropyLoss
    F.linear                         also by nn.Linear and whatever else is made of it
    F.embedding                      also by nn.Embedding
    F.gelu                           also by nn.GELU
    torch.gru, torch._VF.gru         what nn.GRU.forward calls, whenever the GRU was made
    torch.gru_cell, torch._VF.gru_cell
    torch.nn.attention.varlen.varlen_attn

and the globals of the same name in modules of the program (`from torch.nn.functional import
cross_entropy`). A reference kept elsewhere (an attribute, another name) stays torch's.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.overrides import has_torch_function

import fastlm.functional
import fastlm.nn
from fastlm import ops
from fastlm.imports import AfterImport
from fastlm.ops import KERNEL_DTYPES
from fastlm.ops.linear import linear as ops_linear
from fastlm.reference import is_causal_bias

VARLEN = "torch.nn.attention.varlen"

_lock = threading.RLock()
_active = False  # whether the replacements forward to fastlm
_by_install = False  # install() was called, so leaving installed() keeps the replacements
_contexts = 0  # installed() blocks that are open


# ---- which calls are ours -----------------------------------------------------------------


def _is_ours(tensors: tuple) -> bool:
    """Whether a kernel family serves a call with these tensors (None where one is not given).

    Others keep torch's function: another device (see `install`), dtype or layout, nested tensors, tensor subclasses
    with behaviour of their own, what is traced into a format that has only torch's operators, and
    functorch transforms, which torch's function knows how to batch.
    """
    if not _active or has_torch_function(tensors) or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return False
    else:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        for x in tensors:
            if x is not None and not _is_plain(x):
                return False
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu" or x.layout is not torch.strided:
            return False
        if x.dtype not in KERNEL_DTYPES and (x.is_floating_point() or x.is_complex()):
            return False
    return True


def _is_plain(x: Any) -> bool:
    """A tensor whose operators are not intercepted by its class."""
    kind = type(x)
    if kind is Tensor or kind is Parameter:
        return True
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return True
    tracing = ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")
    return kind.__module__ in tracing


# ---- replacements: torch's signatures -----------------------------------------------------

_originals: dict[str, Callable] = {
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "cross_entropy": F.cross_entropy,
    "linear": F.linear,
    "embedding": F.embedding,
    "gelu": F.gelu,
    "gru": torch.gru,
    "gru_cell": torch.gru_cell,
}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
    _originals["linear_cross_entropy"] = F.linear_cross_entropy


def _call(name: str, function: Callable, *args, **kwargs):
    """function, fastlm's, of these arguments. What it refuses, torch's own of that name serves, or refuses in
    its own words, which programs and tests know; unless a backend is forced, which serves or says why not."""
    try:
        return function(*args, **kwargs)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if ops._forced is not None or not str(error).startswith("fastlm."):
            raise
    return _originals[name](*args, **kwargs)


def _scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
):
    mask = None if is_causal_bias(attn_mask) else attn_mask  # a tensor subclass that we know
    name = "scaled_dot_product_attention"
    if (
        _is_ours((query, key, value, mask))
        and (attn_mask is None or not is_causal)
        and (torch.compiler.is_compiling() or torch._C._get_math_sdp_enabled())  # else one of torch's by name
    ):
        function = fastlm.functional.scaled_dot_product_attention
    else:
        function = _originals[name]
    return _call(
        name, function, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    if _is_ours((input, target, weight)):
        function = fastlm.functional.cross_entropy
    else:
        function = _originals["cross_entropy"]
    return _call(
        "cross_entropy",
        function,
        input,
        target,
        weight=weight,
        size_average=size_average,
        ignore_index=ignore_index,
        reduce=reduce,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
):
    if _is_ours((input, linear_weight, target, linear_bias, weight)):
        function = fastlm.functional.linear_cross_entropy
    else:
        function = _originals["linear_cross_entropy"]
    return _call(
        "linear_cross_entropy",
        function,
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=options,
    )


def _linear(input, weight, bias=None):
    # Calls for which there is nothing better are F.linear's there, with the fewest questions.
    return ops_linear(input, weight, bias) if _active else _originals["linear"](input, weight, bias)


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    function = fastlm.functional.embedding if _active else _originals["embedding"]
    return function(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


def _gelu(input, *args, **kwargs):
    if _active and not args and kwargs.keys() <= {"approximate"}:
        return fastlm.functional.gelu(input, **kwargs)
    return _originals["gelu"](input, *args, **kwargs)


def _gru(input, *args, **kwargs):
    # (input, hx, params, ...) or, packed, (data, batch_sizes, hx, params, ...)
    given = (input, *args, *kwargs.values())
    tensors = [x for x in given if isinstance(x, Tensor)]
    for x in given:
        if isinstance(x, (list, tuple)):
            tensors += x
    if _is_ours(tuple(tensors)):
        return _call("gru", fastlm.functional.gru, input, *args, **kwargs)
    return _originals["gru"](input, *args, **kwargs)


def _gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    if _is_ours((input, hx, w_ih, w_hh, b_ih, b_hh)):
        return _call("gru_cell", fastlm.functional.gru_cell, input, hx, w_ih, w_hh, b_ih, b_hh)
    return _originals["gru_cell"](input, hx, w_ih, w_hh, b_ih, b_hh)


def _varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **kwargs):
    if _is_ours((query, key, value, cu_seq_q, cu_seq_k, kwargs.get("seqused_k"))):
        function = fastlm.functional.varlen_attn
    else:
        function = _originals["varlen_attn"]
    return function(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **kwargs)


def _wrap(name: str, original: Callable, module: str) -> Callable:
    """The replacement, documented and pickled as `module.name`; TorchScript takes the original."""
    wrapped = functools.wraps(original)(globals()[f"_{name}"])
    wrapped.__module__, wrapped.__name__, wrapped.__qualname__ = module, name, name
    if isinstance(original, type(_wrap)):
        wrapped.__prepare_scriptable__ = lambda: original
    else:
        torch.jit._builtins._register_builtin(wrapped, f"aten::{name}")
    return wrapped


_replacements: dict[str, Callable] = {
    name: _wrap(name, original, "torch" if name.startswith("gru") else "torch.nn.functional")
    for name, original in _originals.items()
}


# ---- places -------------------------------------------------------------------------------

_MISSING = object()
_changed: list[tuple[Any, str, Any]] = []  # (owner, attribute, what its __dict__ had or _MISSING)


def _put(owner: Any, name: str) -> None:
    _changed.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, _replacements[name])


def _is_of_program(name: str) -> bool:
    return name.partition(".")[0] not in ("torch", "fastlm")


def _put_in_program() -> None:
    """Replaces what modules imported by name: globals that are torch's very functions."""
    for module_name, module in list(sys.modules.items()):
        if not _is_of_program(module_name) or not hasattr(module, "__dict__"):
            continue
        for name, original in _originals.items():
            if vars(module).get(name) is original:
                _put(module, name)


def _put_varlen(module: Any) -> None:
    if "varlen_attn" not in _originals:
        _originals["varlen_attn"] = module.varlen_attn
        _replacements["varlen_attn"] = _wrap("varlen_attn", module.varlen_attn, VARLEN)
    _put(module, "varlen_attn")


def _varlen_is_imported(module: Any) -> None:
    with _lock:
        if _active:
            _put_varlen(module)


_late_varlen = AfterImport(VARLEN, _varlen_is_imported)  # an import that takes seconds


def _activate() -> None:
    global _active
    if _active:
        return
    for name in _originals:
        if name in vars(F):
            _put(F, name)
    for name in ("gru", "gru_cell"):
        _put(torch._VF, name)
        _put(torch, name)
    _put_in_program()
    _active = True
    _late_varlen.watch()


def _deactivate() -> None:
    global _active
    if not _active:
        return
    _active = False
    for owner, name, before in reversed(_changed):
        if vars(owner).get(name) is not _replacements[name]:
            continue  # replaced again by somebody else, whose business it is now
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    _changed.clear()
    _late_varlen.stop()
    # Modules imported meanwhile took the replacements by name.
    for module_name, module in list(sys.modules.items()):
        if not _is_of_program(module_name) or not hasattr(module, "__dict__"):
            continue
        for name, replacement in _replacements.items():
            if vars(module).get(name) is replacement:
                setattr(module, name, _originals[name])


# ---- public -------------------------------------------------------------------------------


def install() -> None:
    """Run every program in this process on fastlm, until :func:`uninstall`.

    Calls of F.scaled_dot_product_attention, F.cross_entropy, F.linear_cross_entropy, F.linear, F.embedding,
    F.gelu, varlen_attn, nn.GRU and nn.GRUCell on CPU tensors run on fastlm, from modules made before as well as
    after; what no kernel serves (dtype, tensor subclass, functorch transform) keeps torch's function, and so
    does a GPU, where it depends on the operator what is faster. A second call changes nothing. Threads see the
    change at once.
    """
    global _by_install
    with _lock:
        _by_install = True
        _activate()


def uninstall() -> None:
    """Put back the very objects that :func:`install` replaced. Without one, does nothing."""
    global _by_install
    with _lock:
        _by_install = False
        _deactivate()


class installed:
    """``with fastlm.installed():`` is :func:`install` for the block only."""

    def __enter__(self) -> installed:
        global _contexts
        with _lock:
            _contexts += 1
            _activate()
        return self

    def __exit__(self, *exc) -> None:
        global _contexts
        with _lock:
            _contexts -= 1
            if _contexts == 0 and not _by_install:
                _deactivate()


_converted = {
    getattr(torch.nn, name): getattr(fastlm.nn, name) for name in fastlm.nn.__all__ if hasattr(torch.nn, name)
}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Make the torch.nn modules inside a model fastlm's, in place.

    Embedding, GELU, GRU, GRUCell, Linear, MultiheadAttention, CrossEntropyLoss and LinearCrossEntropyLoss become those
    of :mod:`fastlm.nn` and stay the same objects: parameters, buffers, hooks, optimizers and shared
    references keep working. Subclasses of torch's modules are left alone, as they may compute
    something else.

    Args:
        model: any module; itself converted if it is one of these.

    Returns:
        The model.

    Raises:
        TypeError: model is no Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastlm.convert: model is a {type(model).__name__}, expected a Module")
    for module in model.modules():
        kind = _converted.get(type(module))
        if kind is not None:
            module.__class__ = kind
    return model
