"""Softmax cross-entropy, over logits and over hidden states: the public functions. Arguments as PyTorch's,
checked here, before any work."""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastlm import ops, reference
from fastlm.functional.arguments import check_flag, check_integer, check_number, check_tensor
from fastlm.ops import KERNEL_DTYPES, PLAIN, autocast_is_on, choose_backend, memory, under_transform
from fastlm.ops import cross_entropy as ops_cross_entropy
from fastlm.ops.cross_entropy import compute_dtype

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_OFF, _IGNORED = 0.0, -100  # defaults, known by their identity


def _check_loss_options(
    name: str, reduction: str, label_smoothing: float, z_loss: float, softcap: float
) -> int:
    """The number of the reduction, once the options make sense."""
    code = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(
            f"{name}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'"
            f" ({reduction} is not a valid value for reduction)"
        )
    check_number(name, "label_smoothing", label_smoothing)
    check_number(name, "z_loss", z_loss)
    check_number(name, "softcap", softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss is {z_loss}, expected a finite value >= 0")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}, expected a finite value >= 0 (0: none)")
    return code


def _are_torchs(z_loss: float, softcap: float, label_smoothing: float) -> bool:
    """Whether PyTorch has what these options ask for."""
    return (
        type(z_loss) is type(softcap) is float
        and z_loss == softcap == 0.0
        and type(label_smoothing) in (float, int)
        and label_smoothing >= 0  # else PyTorch takes it for none
    )


def _check_tensors(name: str, **tensors) -> None:
    """``TypeError`` where one isn't a dense tensor; options may be None."""
    for what, x in tensors.items():
        if x is not None or what not in ("linear_bias", "weight"):
            check_tensor(name, what, x)


def _check_target(
    name: str, what: str, logits: tuple[int, ...], dtype: torch.dtype, target: Tensor,
    weight: Tensor | None, ignore_index: int, same_weight_dtype: bool,
) -> bool:  # fmt: skip
    """Whether target holds probabilities, once its shape, its dtype and those of weight fit."""
    classes = logits[0] if len(logits) == 1 else logits[1]
    probabilities = tuple(target.shape) == logits
    if probabilities:
        if target.dtype not in KERNEL_DTYPES:
            raise RuntimeError(
                f"{name}: Expected floating point type for target with class probabilities, got {target.dtype}"
                f" (target has the shape of {what}, {logits})"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"{name}: ignore_index is not supported for floating point target,"
                f" got ignore_index={ignore_index}"
            )
    else:
        expected = () if len(logits) == 1 else (logits[0], *logits[2:])
        if tuple(target.shape) != expected and not (len(logits) == 1 and target.shape == (1,)):
            batch = target.shape[0] if target.dim() else 0
            if len(logits) > 1 and batch != logits[0]:
                error = ValueError
                torchs = f"Expected input batch_size ({logits[0]}) to match target batch_size ({batch})"
            elif len(logits) == 1 and target.dim() == 1:
                error = ValueError
                torchs = f"For 1D input, 1D target must have size 1, but got target size: {batch}"
            else:
                error = RuntimeError
                torchs = f"Expected target size {list(expected)}, got {list(target.shape)}"
            raise error(
                f"{name}: {torchs}: target has shape {tuple(target.shape)}, expected {expected} (class indices)"
                f" or {logits} (probabilities), since {what} has shape {logits}"
            )
        if target.dtype not in _INDEX_DTYPES:
            raise RuntimeError(
                f"{name}: expected target dtype to be Long or Byte (int64, int32 or uint8 class"
                f" indices), got {target.dtype}"
            )
        if weight is not None and weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name}: weight requires a gradient, but the loss is not differentiable with"
                " respect to class weights when target holds class indices"
            )
    if weight is not None:
        if weight.shape != (classes,):
            raise RuntimeError(
                f"{name}: weight tensor should be defined either for all {classes} classes or no"
                f" classes but got weight tensor of shape: {list(weight.shape)}"
            )
        if same_weight_dtype and not probabilities and weight.dtype != dtype:
            raise RuntimeError(f"{name}: weight has dtype {weight.dtype}, expected {dtype} as {what}")
        if weight.dtype not in KERNEL_DTYPES:
            raise RuntimeError(f"{name}: weight has dtype {weight.dtype}, expected a floating dtype")
        if weight.device != target.device:
            raise RuntimeError(
                f"{name}: weight is on {weight.device} and target on {target.device}, expected one device"
            )
    return probabilities


def _call(operator: Callable, *args):
    """operator(*args), with a target out of range raised as PyTorch's type of error."""
    if torch.compiler.is_compiling():
        return operator(*args)
    try:
        return operator(*args)
    except RuntimeError as error:
        found = re.search("fastlm.* is out of bounds for .*", str(error))
        if not found:
            raise
        raise IndexError(found[0]) from None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = _IGNORED,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = _OFF,
    *,
    z_loss: float = _OFF,
    softcap: float = _OFF,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy between logits and targets, as :func:`torch.nn.functional.cross_entropy`.

    For a token with logits :math:`x_c`, class weights :math:`w_c`, label smoothing :math:`e` and the
    class index :math:`y`, with :math:`\mathrm{lse} = \log \sum_c \exp x_c`:

    .. math::
        (1 - e)\, w_y (\mathrm{lse} - x_y) + \frac{e}{C} \sum_c w_c (\mathrm{lse} - x_c)
        + z \cdot \mathrm{lse}^2

    Loss and gradient are computed in one sweep over the logits. A tiny call on the CPU (see
    :data:`fastlm.ops.TINY`), with none of the options below that PyTorch lacks, is PyTorch's own.

    Args:
        input (Tensor): logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``; float64, float32,
            bfloat16 or float16, any strides.
        target (Tensor): class indices, of input's shape without ``C``, int64, int32 or uint8; or
            class probabilities, of input's shape, floating.
        weight (Tensor, optional): a weight per class, ``(C)``, of input's dtype.
        size_average, reduce: deprecated, as in PyTorch; see `reduction`.
        ignore_index (int): tokens with this class index do not count, whether or not it is a class.
            Not with probabilities. Default: -100.
        reduction (str): ``'none'``: a loss per token. ``'sum'``: their sum. ``'mean'`` (default): the
            sum over the sum of the tokens' class weights, or over their number with probabilities.
        label_smoothing (float): in [0, 1]; the share of the uniform distribution in the target
            (Szegedy et al., https://arxiv.org/abs/1512.00567).

    Keyword args:
        z_loss (float): adds ``z_loss * lse ** 2`` to the loss of every token that counts, before the
            reduction (PaLM, https://arxiv.org/abs/2204.02311, section 5).
        softcap (float): if not 0, logits become ``softcap * tanh(input / softcap)`` first (Gemma 2,
            https://arxiv.org/abs/2408.00118, section 2).
        return_lse (bool): also return the log-sum-exp of each token's (capped) logits.

    Returns:
        Tensor: the loss, in input's dtype (float32 under autocast): ``()``, or with ``'none'``
        input's shape without ``C``. With `return_lse`, a tuple of it and the log-sum-exp, of input's
        shape without ``C``, float64 for float64 and float32 otherwise; differentiable too.

    Gradients flow to input, to a target of probabilities, and to weight with probabilities. The mean
    over no token is nan, with zero gradients, as in PyTorch.

    Raises:
        IndexError: a class index outside ``[0, C)`` that is not ignore_index (inside a compiled
            graph, RuntimeError).
        ValueError: batch sizes differ, an unknown reduction, a z_loss or softcap out of range.
        RuntimeError: any other shape, dtype or device that doesn't fit, label_smoothing out of range,
            ignore_index >= 0 with probabilities, a weight that requires a gradient with indices.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight=weight,
            size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
    usual = z_loss is softcap is label_smoothing is _OFF
    if (
        size_average is reduce is None
        and return_lse is False
        and (usual or _are_torchs(z_loss, softcap, label_smoothing))
        and ops._forced is None  # what is_tiny asks, without a call
        and type(input) in PLAIN
        and not is_dynamo_compiling()
        and input.is_cpu
        and type(size := input.numel()) is int
        and 0 < size <= ops.TINY["cross_entropy"]
    ):
        try:
            code = _REDUCTIONS[reduction]
            if input.ndim > 1 or target.ndim == 0:  # of (C) and (1) PyTorch has no gradient
                if usual and weight is None and ignore_index is _IGNORED:  # what it need not read
                    return torch._C._nn.cross_entropy_loss(input, target, None, code)
                return torch._C._nn.cross_entropy_loss(
                    input, target, weight, code, ignore_index, label_smoothing
                )
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # arguments that don't fit: the checks below say so
    name = "fastlm.cross_entropy"
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    code = _check_loss_options(name, reduction, label_smoothing, z_loss, softcap)
    check_flag(name, "return_lse", return_lse)
    _check_tensors(name, input=input, target=target, weight=weight)
    check_integer(name, "ignore_index", ignore_index)
    shape = tuple(input.shape)
    dtype = input.dtype
    if not shape:
        raise RuntimeError(f"{name}: input has no dimension, expected (C), (N, C) or (N, C, d1, ...)")
    if dtype not in KERNEL_DTYPES:
        raise RuntimeError(f"{name}: input has dtype {dtype}, expected a floating dtype")
    if input.device != target.device:
        raise RuntimeError(
            f"{name}: input is on {input.device} and target on {target.device}, expected one device"
        )
    autocast = autocast_is_on(input.device)
    probabilities = _check_target(name, "input", shape, dtype, target, weight, ignore_index, not autocast)
    unsupported = None
    if probabilities:
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
            if weight.requires_grad and torch.is_grad_enabled():
                unsupported = "no kernel for a gradient to class weights"
        dtype = torch.promote_types(dtype, target.dtype)
    backend = choose_backend("cross_entropy", input, unsupported)
    if backend == "eager" or under_transform(input, target, weight):
        return reference.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, return_lse=return_lse,
        )  # fmt: skip
    if probabilities:
        input, target = input.to(dtype), target.to(dtype)
    else:
        if target.dtype != torch.int64:
            target = target.long()
        if target.dim() == input.dim():
            target = target.squeeze(0)
    if weight is not None:
        weight = weight.to(compute_dtype(dtype))
    return _call(
        ops_cross_entropy.cross_entropy, backend, input, target, weight, code, ignore_index,
        label_smoothing, z_loss, softcap, return_lse, autocast,
    )  # fmt: skip


# ---- linear_cross_entropy -----------------------------------------------------------------

_Options = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # torch 2.13 and later


def _check_linear(
    name: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, autocast: bool
) -> tuple[int, ...]:
    """Shape of the logits, once those of input, linear_weight and linear_bias fit."""
    x, w = tuple(input.shape), tuple(linear_weight.shape)
    if len(x) not in (1, 2):
        raise RuntimeError(f"{name}: expected input with dimensionality 1 or 2, got {len(x)}: {x}")
    if len(w) < 2:
        raise RuntimeError(
            f"{name}: expected linear_weight with dimensionality at least 2, got {len(w)}: {w}"
        )
    if x[-1] != w[-1]:
        raise RuntimeError(
            f"{name}: expected equal input and linear_weight last dimensions (in_features),"
            f" got {x[-1]} and {w[-1]}, respectively"
        )
    if len(w) > 2 and len(x) == 1:
        raise RuntimeError(
            f"{name}: K-dimensional loss defined by linear_weight shape {w} requires batched input,"
            f" (N, {w[-1]}), got unbatched input with shape {x}"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != w[:-1]:
        raise RuntimeError(f"{name}: expected linear_bias shape {w[:-1]}, got {tuple(linear_bias.shape)}")
    if input.dtype not in KERNEL_DTYPES:
        raise RuntimeError(f"{name}: input has dtype {input.dtype}, expected a floating dtype")
    for what, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(f"{name}: {what} has dtype {tensor.dtype}, expected {input.dtype} as input")
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {what} is on {tensor.device} and input on {input.device}, expected one device"
            )
    return (*x[:-1], *w[:-1])


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy of a linear layer's output, as :func:`torch.nn.functional.linear_cross_entropy`.

    The loss of :func:`fastlm.cross_entropy` for the logits
    ``input @ linear_weight.T + linear_bias``, which are never held whole: the memory beyond inputs
    and gradients does not grow with the number of tokens. A scalar loss computes its gradients in the
    forward pass, with three matrix products for all; a loss per token recomputes the logits in the
    backward (compare Wijmans et al., https://arxiv.org/abs/2411.09009).

    Args:
        input (Tensor): ``(D)`` or ``(N, D)``; float64, float32, bfloat16 or float16.
        linear_weight (Tensor): ``(C, D)``, or ``(C, d1, ..., dK, D)`` for a K-dimensional loss, which
            needs a batched input; of input's dtype.
        target (Tensor): class indices ``()``, ``(N)`` or ``(N, d1, ..., dK)``, int64, int32 or uint8;
            or class probabilities ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``, floating.

    Keyword args:
        linear_bias (Tensor, optional): ``(C)`` or ``(C, d1, ..., dK)``, of input's dtype.
        weight (Tensor, optional): a weight per class, ``(C)``, of input's dtype.
        reduction (str): ``'none'``, ``'mean'`` (default) or ``'sum'``, as for
            :func:`fastlm.cross_entropy`.
        ignore_index (int, optional): tokens with this class index do not count; -100 if None. Must be
            None with probabilities.
        label_smoothing (float): in [0, 1].
        options (torch.nn.LinearCrossEntropyOptions, optional): how PyTorch's implementation is to
            chunk. It changes neither the loss nor its gradients, and these kernels always work in
            chunks of their own: any value asks for what is done anyway, with any number of backward
            passes and derivatives of any order.
        z_loss, softcap, return_lse: as for :func:`fastlm.cross_entropy`.

    Returns:
        Tensor: the loss, in input's dtype (float32 under autocast): ``()``, or with ``'none'`` the
        shape of class indices. With `return_lse`, a tuple of it and the log-sum-exp, of that shape,
        float64 for float64 and float32 otherwise.

    Gradients flow to input, linear_weight and linear_bias; with probabilities also to target and
    weight (through the plain formula, which holds the logits).

    Raises:
        IndexError: a class index outside ``[0, C)`` that is not ignore_index (inside a compiled
            graph, RuntimeError).
        ValueError: batch sizes differ, an unknown reduction, a z_loss or softcap out of range.
        TypeError: options of another type.
        RuntimeError: any other shape, dtype or device that doesn't fit, label_smoothing out of range,
            ignore_index with probabilities, a weight that requires a gradient with indices.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias,
            weight=weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, options=options, z_loss=z_loss, softcap=softcap,
            return_lse=return_lse,
        )  # fmt: skip
    name = "fastlm.linear_cross_entropy"
    code = _check_loss_options(name, reduction, label_smoothing, z_loss, softcap)
    check_flag(name, "return_lse", return_lse)
    if options is not None and not (_Options and isinstance(options, _Options)):
        raise TypeError(
            f"{name}: options is a {type(options).__name__},"
            " expected a torch.nn.LinearCrossEntropyOptions or None"
        )
    _check_tensors(
        name, input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias, weight=weight
    )
    if ignore_index is not None:
        check_integer(name, "ignore_index", ignore_index)
    device = input.device
    autocast = autocast_is_on(device)
    logits = _check_linear(name, input, linear_weight, linear_bias, autocast)
    if target.device != device:
        raise RuntimeError(f"{name}: input is on {device} and target on {target.device}, expected one device")
    if ignore_index is not None and tuple(target.shape) == logits:
        raise RuntimeError(f"{name}: ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    probabilities = _check_target(
        name, "the logits", logits, input.dtype, target, weight, ignore_index, not autocast
    )
    unsupported = None
    if probabilities and torch.is_grad_enabled():
        if target.requires_grad:
            unsupported = "no kernel for a gradient to probabilities"
        elif weight is not None and weight.requires_grad:
            unsupported = "no kernel for a gradient to class weights"
    backend = choose_backend("linear_cross_entropy", input, unsupported)
    if backend == "eager" or under_transform(*tensors):
        return reference.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, return_lse=return_lse,
        )  # fmt: skip
    dtype = input.dtype
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if probabilities:  # rounded as autocast does, then in the dtype that holds the target too
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        target = target.to(dtype)
    else:
        if target.dtype != torch.int64:
            target = target.long()
        if target.dim() == len(logits):
            target = target.squeeze(0)
    if weight is not None:
        weight = weight.to(compute_dtype(dtype))
    return _call(
        ops_cross_entropy.linear_cross_entropy, backend, input.to(dtype), memory.to(linear_weight, dtype), target,
        None if linear_bias is None else linear_bias.to(dtype), weight, code, ignore_index,
        label_smoothing, z_loss, softcap, return_lse, autocast,
    )  # fmt: skip
