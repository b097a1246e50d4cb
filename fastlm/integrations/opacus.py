"""Opacus's differentially private training of models made of fastlm.nn.

Opacus knows modules by their exact class. Here fastlm.nn's become known as torch.nn's are: a Linear has its
gradients per sample from the rule for torch's (and a LinearCrossEntropyLoss those of its layer, which it calls
where there are hooks), GRU, GRUCell and MultiheadAttention are refused by `ModuleValidator.validate`, and
`ModuleValidator.fix` makes them Opacus's own modules, with their weights.
Gradients per sample of these three, were they taken by hooks, would miss what arrives through hx, key, value
and hn, so a GradSampleModule that has not been fixed raises in its backward.
Imported, and thereby registered, when `opacus` is.
"""

import math

import torch.nn.functional as F
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
    register_norm_sampler,
)
from opacus.layers import DPMultiheadAttention
from opacus.layers.dp_rnn import DPGRUCell
from opacus.validators.errors import (
    ShouldReplaceModuleError,
    UnsupportableModuleError,
    UnsupportedModuleError,
)
from opacus.validators.module_validator import ModuleValidator
from opacus.validators.utils import register_module_fixer, register_module_validator
from torch import Tensor, nn

import fastlm.nn
from fastlm.functional import scaled_dot_product_attention

_EXTRAS = ("zoneout", "recurrent_dropout", "layer_norm")  # which no module of Opacus has
_REPLACED = (fastlm.nn.GRU, fastlm.nn.GRUCell, fastlm.nn.MultiheadAttention)


def _refusal(module: nn.Module) -> UnsupportedModuleError:
    name = f"fastlm.nn.{type(module).__name__}"
    extras = [f"{extra}={getattr(module, extra)}" for extra in _EXTRAS if getattr(module, extra, False)]
    if extras:
        return UnsupportableModuleError(f"{name} with {', '.join(extras)} has no counterpart in Opacus")
    return ShouldReplaceModuleError(
        f"{name} has no gradients per sample: opacus.validators.ModuleValidator.fix(model) replaces it by "
        "Opacus's own module, with its weights"
    )


class BatchFirstAttention(DPMultiheadAttention):
    """Opacus's attention as torch.nn.MultiheadAttention computes it: in Opacus 1.6, with batch_first, a token's
    output has features of other tokens' heads."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As fastlm.nn.MultiheadAttention's; query (N, L, E), key (N, S, kdim), value (N, S, vdim)."""
        if query.dim() != 3:
            raise ValueError(f"MultiheadAttention: query has shape {tuple(query.shape)}, expected (N, L, E)")
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadAttention: is_causal is a hint about attn_mask, got None")
        q, k, v = self.qlinear(query), self.klinear(key), self.vlinear(value)  # each (N, L|S, E)
        rows = k.shape[1]
        if self.add_bias_kv:
            k = self.seq_bias_k(k.transpose(0, 1)).transpose(0, 1)
            v = self.seq_bias_v(v.transpose(0, 1)).transpose(0, 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        extra = k.shape[2] - rows
        mask = fastlm.nn.MultiheadAttention._merge(self, attn_mask, key_padding_mask, q, rows, extra)
        weights = None
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            if mask is not None:
                scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -math.inf)
            weights = self.dropout(scores.softmax(-1))  # (N, H, L, S + extra)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            p = self.dropout.p if self.training else 0.0
            out = scaled_dot_product_attention(q, k, v, mask, p)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights


@register_module_validator(_REPLACED)
def _validate(module: nn.Module) -> list[UnsupportedModuleError]:
    return [_refusal(module)]


@register_module_fixer(_REPLACED)
def _fix(module: nn.Module, **options) -> nn.Module:
    refusal = _refusal(module)
    if isinstance(refusal, UnsupportableModuleError):
        raise refusal
    if isinstance(module, fastlm.nn.GRUCell):
        cell = DPGRUCell(module.input_size, module.hidden_size, module.bias)
        names = {f"{gate}.{kind}": f"{kind}_{gate}" for gate in ("ih", "hh") for kind in ("weight", "bias")}
        weights = module.state_dict()
        cell.load_state_dict({new: weights[old] for new, old in names.items() if old in weights})
        return cell
    if isinstance(module, fastlm.nn.GRU):
        return ModuleValidator.FIXERS[nn.GRU](module, **options)
    attention = ModuleValidator.FIXERS[nn.MultiheadAttention](module, **options)
    if module.batch_first:
        attention.__class__ = BatchFirstAttention
    return attention


@register_grad_sampler(_REPLACED)
def _refuse(module, activations, backprops):
    raise _refusal(module)


for _ours, _theirs in ((fastlm.nn.Linear, nn.Linear), (fastlm.nn.Embedding, nn.Embedding)):
    register_grad_sampler(_ours)(GradSampleModule.GRAD_SAMPLERS[_theirs])
    register_norm_sampler(_ours)(GradSampleModuleFastGradientClipping.NORM_SAMPLERS[_theirs])
