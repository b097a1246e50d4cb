"""Weight-only int8 by torchao, for generation: linear layers of a few tokens and single steps of a GRU read
the weights as they are kept, a byte each.

    q = round(w / s),  s = max |w| / 127.5 for each output,  y = s (x q^T) + b

Source: Dettmers et al. 2022, arXiv:2208.07339, section 2 (absolute maxima of rows).
"""

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, PerRow

import fastlm.nn
from fastlm import functional as fused
from fastlm.functional.gru import gru_arguments
from fastlm.models.gpt import Conv1D


class Int8Weight(Int8Tensor):
    """torchao's int8 tensor (N, K) with a scale for each row, multiplied by fastlm's kernels."""

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """Quantized from a floating weight, or what torchao quantized in this way already."""
        if type(weight) in (Tensor, nn.Parameter):
            weight = Int8Tensor.from_hp(weight.detach(), granularity=PerRow())
        elif not isinstance(weight, Int8Tensor):
            raise ValueError(
                f"quantize_: expected weights that are Tensors or torchao's Int8Tensors, got {type(weight).__name__}"
            )
        more = [getattr(weight, name, None) for name in ("act_quant_kwargs", "act_pre_scale")]
        zero_point = getattr(weight, "zero_point", None)
        if (
            more != [None, None]
            or list(weight.block_size) != [1, weight.shape[1]]
            or (zero_point is not None and zero_point.any())
        ):
            raise ValueError(
                "quantize_: a weight is quantized in another way than Int8WeightOnlyConfig's, a scale for "
                f"each row: {weight!r:.200}"
            )
        return cls(weight.qdata, weight.scale, weight.block_size, weight.dtype)


@Int8Weight.implements_torch_function(nn.functional.linear)
def _linear(function, types, args, kwargs):
    return _product(*args, **kwargs)


def _product(input: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    return fused.linear(input, weight.qdata, bias, scale=weight.scale.view(-1).to(input.dtype))


@Int8Weight.implements_torch_function(fused.gru)
def _gru(function, types, args, kwargs):
    """A single step of layers in one direction, without options, multiplies int8; else weights are widened."""
    options = {name: kwargs.pop(name) for name in ("zoneout", "recurrent_dropout", "layer_norm")}
    a = gru_arguments(args, kwargs)
    if not (any(options.values()) or a["train"] or a["bidirectional"]) and "batch_sizes" not in a:
        input, count = a["input"], 4 if a["has_biases"] else 2
        if input.dim() == 3 and input.shape[1 if a["batch_first"] else 0] == 1:
            x, states = input.flatten(0, 1), []
            for layer in range(a["num_layers"]):
                x = _step(x, a["hx"][layer], *a["params"][layer * count : (layer + 1) * count])
                states.append(x)
            return x.view(*input.shape[:2], -1), torch.stack(states)
    a["params"] = [w.dequantize() if isinstance(w, Int8Weight) else w for w in a["params"]]
    return function(**a, **options)


def _step(x: Tensor, h: Tensor, w_ih, w_hh, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Tensor:
    i_r, i_z, i_n = nn.functional.linear(x, w_ih, b_ih).chunk(3, 1)
    h_r, h_z, h_n = nn.functional.linear(h, w_hh, b_hh).chunk(3, 1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    return torch.lerp(torch.tanh(torch.addcmul(i_n, r, h_n)), h, z)


def quantize_(model: nn.Module) -> None:
    """Keeps the weights of a model in int8, in place, for inference on a CPU: of ``torch.nn.Linear`` and its
    subclasses, of GPT-2's layers that are stored (in, out) (fastlm's, and the transformers library's
    ``Conv1D``), which become :class:`fastlm.nn.Linear`, and of :class:`fastlm.nn.GRU`. Embeddings stay as they
    are; a head that was tied to them becomes a matrix of its own.

    As ``torchao.quantization.quantize_(model, Int8WeightOnlyConfig())``, whose tensors it takes over where a model
    has them, up to which layers it knows and what multiplies them: up to 7 tokens by a kernel that reads
    int8, which in torchao widens the whole weight first.

    Raises ``ValueError`` for weights that torchao quantized in another way, and ``ImportError`` without torchao.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D) or _is_their_conv1d(child):
                setattr(module, name, _as_linear(child))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _set(module, "weight")
        elif isinstance(module, fastlm.nn.GRU):
            for name in module._flat_weights_names:
                if name.startswith("weight"):
                    _set(module, name)


def _is_their_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _as_linear(layer: nn.Module) -> fastlm.nn.Linear:
    inputs, outputs = layer.weight.shape
    linear = fastlm.nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _set(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Parameter(Int8Weight.of(getattr(module, name)), requires_grad=False))
