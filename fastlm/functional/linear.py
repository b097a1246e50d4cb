"""Linear layers: the public function."""

from torch import Tensor

from fastlm.ops import linear as ops_linear


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """torch.nn.functional.linear through the fastest matrix product that torch's libraries have on this CPU.

    Computes ``activation(input @ weight.T + bias)``. On a CPU the forward and the products of both gradients
    are each timed once for a class of shapes, at first use, and then run MKL's (or another BLAS's), oneDNN's,
    or for 16-bit types a float32 product, whichever is fastest; the choice is kept in ~/.cache/fastlm. One
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

    Returns:
        Tensor: (..., N), or (...) for a weight (K); under autocast in its dtype.

    Raises:
        ValueError: for an unknown activation.
        RuntimeError: as F.linear, for shapes and dtypes that don't fit; where FASTLM_LINEAR names a product
            that this CPU doesn't have for the dtype.

    Example::

        hidden = fastlm.linear(x, fc.weight, fc.bias, activation="gelu_tanh")
    """
    if activation is not None and activation not in ops_linear.ACTIVATIONS:
        raise ValueError(
            f"fastlm.linear: activation is {activation!r}, expected one of "
            f"{', '.join(ops_linear.ACTIVATIONS)} or None"
        )
    return ops_linear.linear(input, weight, bias, activation)
