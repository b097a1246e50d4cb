"""What every call must be true to: judge(call) gives what is wrong, or None."""

from __future__ import annotations

import ctypes
import gc
import inspect
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from cases import OPERATORS, Case
from harness import bits, compare, run, tensors_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
import fastlm.nn

from . import nonfinite
from .calls import STRANGE, Call, T, leaves
from .fakes import Fakes

warnings.filterwarnings("ignore")

# What a wrong call may raise: what the functions' docstrings name. NotImplementedError is a RuntimeError.
DOCUMENTED = (TypeError, ValueError, RuntimeError, IndexError)
INTERNAL = re.compile(r"INTERNAL ASSERT|please report a bug|Segmentation|bad_alloc|vector::|std::")
NONFINITE = ("nan", "inf", "-inf")
COMPARED = ("normal", "uniform", "zero", *NONFINITE)


class Unmade(Exception):
    """An argument that torch itself can't make."""


def judge(call: Call) -> str | None:
    """Runs the call, twice; what is wrong with it."""
    torch.set_num_threads(call.threads)
    if call.isa:
        fastlm._C.set_isa(call.isa)
    try:
        with torch.no_grad():
            probe = call.arguments()
    except Exception as error:
        raise Unmade(f"{call}: {error}") from error
    del probe
    before = call.arguments()
    kept = [_memory(x) for x in tensors_of(before)]
    versions = [x._version for x in tensors_of(before)]
    changes = call.name == "ops.scale_"
    try:
        first = answer(call, before)
    except AssertionError as error:
        if not call.name.startswith("nn."):
            return f"{error}"
        return judge_error(call, error)
    except Exception as error:
        return judge_error(call, error)
    if not changes and [x._version for x in tensors_of(before)] != versions:
        return "an input was written to (its version changed)"
    for x, memory in zip(tensors_of(before), kept, strict=True):
        if not changes and memory is not None and not torch.equal(memory, _memory(x)):
            return f"an input of shape {tuple(x.shape)} was changed"
    # As PyTorch's own have it; of the raw operators' results on the CPU, nothing is written then.
    mixed = (call.name in ("linear", "gru_cell") or call.name.startswith("ops.")) and _on_meta(call)
    if not mixed and all(x.device.type == "cpu" for x in first):
        again = answer(call, call.arguments())
        for i, (x, y) in enumerate(zip(first, again, strict=True)):
            if not x.is_nested and (x.shape != y.shape or not _same_bits(x, y)):
                return f"result {i} has other bits when the call is repeated"
    if not _on_meta(call) and (not call.wrong or call.name.startswith("ops.")):
        with Fakes() as fakes:
            answer(call, call.arguments())
        if fakes.problem:
            return fakes.problem
    if call.name.startswith("ops."):
        return None
    return judge_values(call, first)


def answer(call: Call, arguments) -> list[Tensor]:
    """Outputs, and of a public function's the gradients."""
    function = call.function()
    if call.name.startswith("ops."):
        with torch.no_grad():
            return tensors_of(function(*arguments[0], **arguments[1]))
    return differentiated(call, function, arguments)


def differentiated(call: Call, function, arguments) -> list[Tensor]:
    """Outputs and the gradients of the arguments; a module's parameters have some only where arguments have."""
    if isinstance(function, torch.nn.Module):
        function.requires_grad_(any(x.requires_grad for x in tensors_of(arguments)))
    with call.context():
        outputs, gradients, _ = run(function, arguments, call.seed)
    return outputs + gradients


def _memory(x: Tensor) -> Tensor | None:
    """All bytes of a tensor's storage."""
    if x.device.type != "cpu" or x.layout != torch.strided or x.is_nested or x._is_zerotensor():
        return None
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(bits(x.resolve_neg()), bits(y.resolve_neg())) if x.layout == torch.strided else True


# ---- wrong calls ----


def judge_error(call: Call, error: Exception) -> str | None:
    """Whether a call may be refused so."""
    kind, message = type(error).__name__, " ".join(str(error).split())
    said = f"{kind}: {message[:300]}"
    if INTERNAL.search(message):
        return f"an internal error: {said}"
    name = call.name.rpartition(".")[2]
    if name == "gru_cell" and "invalid gradient" in message and _on_meta(call):
        return None  # as torch's own, which serves tiny calls, has it
    if call.name.startswith("nn.") or name == "linear" and "scale" not in call.kwargs:
        return None if _torch_refuses(call) or _names(call, message) else f"refused, but not by torch: {said}"
    if not isinstance(error, DOCUMENTED):
        return f"an error of an undocumented type: {said}"
    if not call.wrong:
        return None if call.name.startswith("ops.") else f"a right call was refused: {said}"
    if call.name.startswith("ops."):
        return None  # tensors that are missing or have no dimensions fail in PyTorch's own questions
    if name not in message and _RAW.get(name, name) not in message:
        return f"the message doesn't name {name}: {said}"
    return None if _names(call, message) else f"the message names no argument: {said}"


_RAW = {
    "varlen_attn": "varlen_attention",
    "scaled_dot_product_attention": "fastlm::attention",
    "gru_cell": "gru_layer",
}
_OTHER_WORDS = {
    "gru": ("weights", "w_ih", "w_hh", "b_ih", "b_hh", "head", "argument"),
    "gru_cell": ("argument",),
}


def _names(call: Call, message: str) -> bool:
    """Whether the message has the name of an argument in it."""
    kind, _, name = call.name.rpartition(".")
    if kind == "nn":
        return f"fastlm.nn.{name}" in message or "fastlm." in message
    function = getattr(fastlm, name)
    names = set(inspect.signature(function).parameters) | set(_OTHER_WORDS.get(name, ()))
    if name == "gru":
        names |= set(fastlm.functional.gru.__globals__["_GRU"]) | {"data", "batch_sizes"}
    return any(re.search(rf"\b{re.escape(n)}\b", message) for n in names) or "unexpected keyword" in message


def _on_meta(call: Call) -> bool:
    return any(x.device != "cpu" for _, x in (*leaves(call.args), *leaves(call.kwargs)) if isinstance(x, T))


def _torch_refuses(call: Call) -> bool:
    try:
        _torch(call)
    except Exception:
        return True
    return False


def _torch(call: Call) -> list[Tensor]:
    """What torch's own module or F.linear gives for these arguments."""
    name = call.name.rpartition(".")[2]
    if name == "linear":
        return differentiated(call, _linear, call.arguments())
    module = call.built(getattr(torch.nn, name))
    module.load_state_dict(call.function().state_dict())
    # The fused attention of torch's CPU gives 0 for a query that is NaN where there is no mask and fewer keys
    # than a vector has lanes. Its formula gives NaN, as it does itself with more keys or a mask.
    with sdpa_kernel(SDPBackend.MATH) if _nonfinite(call) else nullcontext():
        return differentiated(call, module, call.arguments())


def _linear(input, weight, bias=None, *, activation=None, scale=None) -> Tensor:
    if scale is None:
        out = F.linear(input, weight, bias)
    else:
        exact = F.linear(input.double(), weight.double()) * scale.double()
        out = (exact if bias is None else exact + bias).to(input.dtype)
    if activation is None:
        return out
    return F.gelu(out, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(out)


# ---- values ----


def judge_values(call: Call, results: list[Tensor]) -> str | None:
    """Whether they are the reference's, where that can be said."""
    every = [x for _, x in (*leaves(call.args), *leaves(call.kwargs)) if isinstance(x, T)]
    if any(x.device != "cpu" or x.layout in STRANGE for x in every) or call.autocast:
        return None
    if any(isinstance(x.values, str) and x.values not in COMPARED for x in every):
        return None
    kwargs, name = call.kwargs, call.name.rpartition(".")[2]
    large = (kwargs.get(name) for name in ("softcap", "z_loss", "scale"))
    if any(isinstance(x, (int, float)) and x and not 1e-18 < abs(x) < 1e5 for x in large):
        return None  # rounding counts, so multiplied, or is infinite
    if "ignore_index" in kwargs or any(isinstance(x.values, tuple) and -100 in x.values for x in every):
        if _nonfinite(call):
            return None  # a token that doesn't count has gradient 0, whatever its logits; to the formula 0 times NaN
    if name == "gru_cell" and call.wrong:
        return None  # biases that broadcast are refused but in the smallest calls, which are PyTorch's own
    if kwargs.get("layer_norm"):
        if call.wrong:
            return None  # products of equal rows have no norm to compare
        if any(x.dtype in ("bfloat16", "float16") and len(x.shape) == 2 and x.shape[1] == 1 for x in every):
            return (
                None  # nor have those of one number: their gradient is rounding, which depends on its place
            )
    if kwargs.get("dropout_p") or kwargs.get("recurrent_dropout") or kwargs.get("zoneout"):
        return None
    if "scale" in kwargs and name == "linear" and call.wrong:
        return None  # F.linear has none to compare with
    if call.name.startswith("nn.") or name == "linear":
        return _compare_with_torch(call, results)
    if name == "gru" and _drops(call):
        return None
    # To the kernels lse is differentiable wherever out is; to the formula it isn't of value, nor without keys.
    if kwargs.get("return_lse") or kwargs.get("return_aux"):
        if not all(x.grad and 0 not in x.shape for x in call.args[:2]) and any(x.grad for x in every):
            return None
    operator = replace(OPERATORS[name], function=call.function())
    arguments = call.arguments()
    dtype = next(x.dtype for x in tensors_of(arguments) if x.is_floating_point())
    try:
        with torch.no_grad():
            operator.reference(*arguments[0], **arguments[1])
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return f"accepted, but the reference refuses it: {type(error).__name__}: {said}"
    tiny, fastlm.ops.TINY = fastlm.ops.TINY, dict.fromkeys(fastlm.ops.TINY, 0)  # else some are PyTorch's own
    try:
        if _nonfinite(call):
            found = nonfinite.compare(operator, call)
            return found and f"differs from the reference: {found}"
        compare(
            operator, Case("drawn", lambda dtype, seed: call.arguments(), eager=False), dtype, generated=True
        )
    except AssertionError as error:
        return f"differs from the reference: {error}"
    finally:
        fastlm.ops.TINY = tiny
    return None


def _nonfinite(call: Call) -> bool:
    every = (x for _, x in (*leaves(call.args), *leaves(call.kwargs)))
    return any(isinstance(x, T) and x.values in NONFINITE for x in every)


def _drops(call: Call) -> bool:
    """A GRU's dropout between layers, when training."""
    at = 6 if isinstance(call.args[2], T) else 5
    return bool(call.args[at] and call.args[at + 1])


def _compare_with_torch(call: Call, results: list[Tensor]) -> str | None:
    settings = {} if call.module is None else call.module[1]
    if {"z_loss", "softcap", "return_lse"} & settings.keys() or not _torch_has(call):
        return None
    if "Loss" in call.name and call.args[1].dtype in ("int32", "uint8"):
        return None  # class indices that torch doesn't take everywhere
    try:
        expected = _torch(call)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return f"accepted, but torch refuses it: {type(error).__name__}: {said}"
    if _nonfinite(call):
        found = nonfinite.differs(results, expected)
        return found and f"differs from torch's: {found}"
    # What is 0 in exact arithmetic, as some gradients, is rounding of terms of the others' size.
    scale = max(
        (y.detach().abs().nan_to_num(0, 0, 0).max().item() for y in expected if y.numel()), default=0.0
    )
    for x, y in zip(results, expected, strict=False):
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(y.dtype, 3e-2)
        try:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        except AssertionError as error:
            return f"differs from torch's: {error}"
    return None


def _torch_has(call: Call) -> bool:
    kind, _, name = call.name.rpartition(".")
    return kind != "nn" or hasattr(torch.nn, name)


# ---- memory ----

_libc = ctypes.CDLL(None)


def anonymous_bytes() -> int:
    """Of this process, what is free given back first."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def repeat(call: Call) -> None:
    """Runs it once more, whatever comes."""
    torch.set_num_threads(call.threads)
    if call.isa:
        fastlm._C.set_isa(call.isa)
    try:
        answer(call, call.arguments())
    except Exception:
        pass


def leak(call: Call, times: int = 300, allowed: float = 64.0) -> float | None:
    """Bytes that each repetition loses, if it is more than `allowed` three times in a row."""
    for _ in range(times // 4):
        repeat(call)
    lost = []
    for _ in range(3):
        before = anonymous_bytes()
        for _ in range(times):
            repeat(call)
        lost.append((anonymous_bytes() - before) / times)
    return min(lost) if min(lost) > allowed else None
