"""Activations: the public function."""

from torch import Tensor

from fastlm.ops import activation


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    r"""torch.nn.functional.gelu by a kernel of its own on a CPU, forward and gradient.

    Computes ``input * Phi(input)`` for the normal distribution's :math:`\Phi`, or with ``"tanh"``
    ``input * (1 + tanh(sqrt(2 / pi) * (input + 0.044715 * input ** 3))) / 2`` (Hendrycks and Gimpel 2016,
    arXiv:1606.08415), in float32 and rounded once. Far below 0, where F.gelu's formulas cancel, results keep their
    leading digits.

    All else is F.gelu's, to the bit: other devices, tensor subclasses, float64, fewer than 2^14 elements, strides
    with gaps, torch.compile, torch.export, functorch transforms and forward-mode AD.

    Args:
        input (Tensor): (...), of a floating dtype.
        approximate (str): ``"none"`` or ``"tanh"``, GPT-2's.

    Returns:
        Tensor: as input.

    Raises:
        RuntimeError, TypeError: as F.gelu.

    Example::

        hidden = fastlm.gelu(x, approximate="tanh")
    """
    return activation.gelu(input, approximate)
