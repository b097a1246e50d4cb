"""GRU: fake kernels, autograd and entry point of one layer.

fastlm::gru_layer(input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout, save)
    input        (T, B, I), or (N, I) packed: N rows, step t holding the first batch_sizes[t] sequences
    batch_sizes  int64 (T) on the CPU, positive and never growing; None where input is not packed
    hx           (D, B, H), one state per direction
    weights      per direction w_ih (3H, I), w_hh (3H, H), then b_ih and b_hh (3H) with has_biases, then
                 the gains of the two layer norms (3H) with layer_norm; gates in torch's order r, z, n
    update       (N, D * H), what zoneout leaves of each unit's change (0 keeps the old state), or None:
                 then 1 - zoneout everywhere
    -> output (T, B, D * H) or (N, D * H), hn (D, B, H), and what the backward takes, empty unless
       `save`, in the compute dtype: gates (D, N, 4H), normed (D, N, 6H) and rstd (D, N, 2)
fastlm::gru_layer_backward(grad_output, grad_hn, ...) -> (grad_input, grad_hx, grad_weights)
    grad_output and grad_hn may be None; grad_input and grad_weights are empty unless wanted
"""

import math

import torch
from torch import Tensor

from fastlm import reference
from fastlm.ops import (
    asks_for_graph,
    choose_backend,
    eager_call,
    kernel,
    reference_backward,
    register_autograd,
    register_fake,
    requires_grad,
    under_transform,
)

_below_autograd = torch._C._AutoDispatchBelowAutograd


@register_fake("gru_layer")
def _(input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout, save):
    D, B, H = hx.shape
    rows = input.shape[:-1]
    N = math.prod(rows)  # rows.numel() would fix the sizes of a dynamic shape
    compute = reference.compute_dtype(input.dtype)
    norms = D if save and layer_norm else 0
    return (
        input.new_empty((*rows, D * H)),
        input.new_empty((D, B, H)),
        input.new_empty((D if save else 0, N, 4 * H), dtype=compute),
        input.new_empty((norms, N, 6 * H), dtype=compute),
        input.new_empty((norms, N, 2), dtype=compute),
    )


@register_fake("gru_layer_backward")
def _(
    grad_output, grad_hn, input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout,
    output, gates, normed, rstd, input_wanted, weights_wanted,
):  # fmt: skip
    return (
        input.new_empty(input.shape if input_wanted else 0),
        hx.new_empty(hx.shape),
        [w.new_empty(w.shape) for w in weights] if weights_wanted else [],
    )


def _save(ctx, input, batch_sizes, hx, update, weights, options, output):
    ctx.set_materialize_grads(False)
    ctx.options = options
    out, _, *kept = output
    ctx.save_for_backward(input, batch_sizes, hx, update, out, *kept, *weights)


def _gradients(ctx, dout, dhn, input_wanted, hx_wanted, weights_wanted):
    """Gradients to input, hx and each weight."""
    input, batch_sizes, hx, update, out, gates, normed, rstd, *weights = ctx.saved_tensors
    has_biases, layer_norm, zoneout = ctx.options
    if dout is None and dhn is None:
        return None, None, [None] * len(weights)
    backend = choose_backend("gru", input, backward=True)
    if backend == "eager" or asks_for_graph(dout, dhn):

        def formula(input, hx, *weights):
            return reference.gru_layer(
                input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout
            )

        dx, dhx, *dw = reference_backward(
            formula, (input, hx, *weights), (input_wanted, hx_wanted, *weights_wanted), (dout, dhn)
        )
        return dx, dhx, dw
    if gates.shape[0] == 0:
        raise RuntimeError("fastlm::gru_layer: a gradient needs a forward with save=True")
    dx, dhx, dw = kernel(backend, "gru_layer_backward")(
        dout, dhn, input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout,
        out, gates, normed, rstd, input_wanted, any(weights_wanted),
    )  # fmt: skip
    dw = dw or weights_wanted
    return (
        dx if input_wanted else None,
        dhx if hx_wanted else None,
        [g if need else None for g, need in zip(dw, weights_wanted, strict=True)],
    )


def _setup_context(ctx, inputs, output):
    input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout, _ = inputs
    _save(ctx, input, batch_sizes, hx, update, weights, (has_biases, layer_norm, zoneout), output)


def _library_backward(ctx, dout, dhn, *unused):
    needs = ctx.needs_input_grad
    wanted = needs[3] if isinstance(needs[3], (list, tuple)) else [needs[3]] * len(ctx.saved_tensors[8:])
    dx, dhx, dw = _gradients(ctx, dout, dhn, needs[0], needs[2], list(wanted))
    return dx, None, dhx, dw, None, None, None, None, None


register_autograd("gru_layer", _library_backward, _setup_context)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, input, batch_sizes, hx, update, has_biases, layer_norm, zoneout, *weights):
        with _below_autograd():
            output = op(input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout, True)
        _save(ctx, input, batch_sizes, hx, update, weights, (has_biases, layer_norm, zoneout), output)
        return output[:2]

    @staticmethod
    def backward(ctx, dout, dhn):
        needs = ctx.needs_input_grad
        dx, dhx, dw = _gradients(ctx, dout, dhn, needs[1], needs[3], needs[8:])
        return None, dx, None, dhx, None, None, None, None, *dw


_layer = eager_call(_Layer)


def gru_layer(
    backend: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    weights: list[Tensor],
    has_biases: bool,
    layer_norm: bool,
    update: Tensor | None,
    zoneout: float,
) -> tuple[Tensor, Tensor]:
    """Output and last states of one layer, differentiable; see the head of this file."""
    if under_transform(input, hx, *weights):
        return reference.gru_layer(input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout)
    op = kernel(backend, "gru_layer")
    save = requires_grad(input, hx, *weights)
    compiling = torch.compiler.is_compiling()
    if save and not compiling:
        return _layer(op, input, batch_sizes, hx, update, has_biases, layer_norm, zoneout, *weights)
    arguments = (input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout, save)
    if compiling:
        return op(*arguments)[:2]
    with _below_autograd():
        return op(*arguments)[:2]
