"""Linear layers: the public function."""

import torch
from torch import Tensor

from fastlm.functional.arguments import check_tensor
from fastlm.ops import linear as ops_linear


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.linear through the fastest matrix product that torch's libraries have on this CPU.

    Computes ``activation(input @ weight.T + bias)``. On a CPU the forward and the products of both gradients
    are each timed once for a class of shapes, at first use, and then run MKL's (or another BLAS's), oneDNN's,
    for 16-bit types a float32 product, or for up to 7 tokens, as in decoding, a kernel that reads the weights
    at the memory's speed, whichever is fastest; the choice is kept in ~/.cache/fastlm. One
    process gives the same bits for the same inputs; another machine, thread count or cache may not.
    ``FASTLM_LINEAR=torch`` (or ``onednn``, ``float32``) fixes the choice, ``FASTLM_AUTOTUNE=0`` and
    ``torch.use_deterministic_algorithms(True)`` fix it to torch's.

    All else is F.linear's, to the bit: other devices, tensor subclasses, small products, float64, integers,
    sparse and meta tensors, torch.compile, torch.export, functorch transforms and forward-mode AD.

    Args:
        input (Tensor): (..., K), any strides.
        weight (Tensor): (N, K), or (K) for a single output without a dimension.
        bias (Tensor, optional): (N). All three of one dtype, unless autocast makes them so.
        activation (str, optional): ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` (GPT-2's approximation),
            ``"silu"``, ``"sigmoid"`` or ``"tanh"``. oneDNN applies it in the product where no gradient is
            wanted; elsewhere it follows the product.
        scale (Tensor, optional): (N), of input's dtype, for a weight (N, K) of int8 that stands for
            ``scale[:, None] * weight``. Gradients go to input, scale and bias.

    Returns:
        Tensor: (..., N), or (...) for a weight (K); under autocast in its dtype.

    Raises:
        ValueError: for an unknown activation; with a scale, for a weight that isn't int8, and for shapes,
            dtypes and devices that don't fit.
        TypeError: with a scale, for an argument that is no dense tensor.
        RuntimeError: as F.linear, for shapes and dtypes that don't fit; where FASTLM_LINEAR names a product
            that this CPU doesn't have for the dtype.

    Example::

        hidden = fastlm.linear(x, fc.weight, fc.bias, activation="gelu_tanh")
    """
    known = activation is None or isinstance(activation, str) and activation in ops_linear.ACTIVATIONS
    if not known:
        raise ValueError(
            f"fastlm.linear: activation is {activation!r}, expected one of "
            f"{', '.join(ops_linear.ACTIVATIONS)} or None"
        )
    if scale is None:
        return ops_linear.linear(input, weight, bias, activation)
    _check_scaled(input, weight, scale, bias)
    y = ops_linear.linear_int8(input, weight, scale, bias)
    return y if activation is None else ops_linear.ACTIVATIONS[activation].function(y)


def _check_scaled(input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    for name, x in (("input", input), ("weight", weight), ("scale", scale), ("bias", bias)):
        if x is None and name == "bias":
            continue
        check_tensor("fastlm.linear", name, x)
        if x.device != input.device:
            raise ValueError(f"fastlm.linear: {name} is on {x.device}, expected {input.device} as input is")
    if weight.dtype is not torch.int8 or weight.dim() != 2:
        raise ValueError(
            f"fastlm.linear: scale is for a weight (N, K) of int8, got {tuple(weight.shape)} of {weight.dtype}"
        )
    N, K = weight.shape
    if not input.is_floating_point() or input.dim() == 0 or input.shape[-1] != K:
        raise ValueError(
            f"fastlm.linear: input must be (..., {K}) of a floating dtype, as weight is {tuple(weight.shape)}, "
            f"got {tuple(input.shape)} of {input.dtype}"
        )
    for name, x in (("scale", scale), ("bias", bias)):
        if x is not None and (x.shape != (N,) or x.dtype is not input.dtype):
            raise ValueError(
                f"fastlm.linear: {name} must be ({N},) of {input.dtype} as input, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
