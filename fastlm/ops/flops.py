"""What torch.utils.flop_counter.FlopCounterMode counts for our operators: the matrix products of their kernels,
two operations for each multiplication. As for PyTorch's attention, nothing is taken off for a mask, and the
backward counts five products, since it computes the scores again. Arguments are shapes, but of packed sequences.
"""

import math

import torch

from fastlm.imports import AfterImport
from fastlm.ops import for_namespaces


def _attention(query, key, value, *rest, out_shape=None, **options) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(dout, query, key, value, *rest, out_shape=None, **options) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _pairs(cu_seq_q, cu_seq_k, seqused_k) -> int:
    """Of a query and a key of its sequence."""
    keys = cu_seq_k.diff() if seqused_k is None else seqused_k
    return int((cu_seq_q.diff().long() * keys).sum())


def _varlen(query, key, value, cu_seq_q, cu_seq_k, seqused_k, *rest, out_val=None, **options) -> int:
    pairs = query.size(1) * _pairs(cu_seq_q, cu_seq_k, seqused_k)
    return 2 * pairs * (query.size(-1) + value.size(-1))


def _varlen_backward(
    dout, dlse, query, key, value, out, lse, cu_seq_q, cu_seq_k, *rest, out_val=None, **options
) -> int:
    pairs = query.size(1) * _pairs(cu_seq_q, cu_seq_k, None)
    return 2 * pairs * (3 * query.size(-1) + 2 * value.size(-1))


def _linear_cross_entropy(input, linear_weight, *rest, out_shape=None, **options) -> int:
    input_gradient, weight_gradient, _ = rest[-3:]
    rows = math.prod(input[:-1])
    return 2 * rows * math.prod(linear_weight) * (1 + input_gradient + weight_gradient)


def _linear_cross_entropy_backward(dloss, dlse, *rest, out_shape=None, **options) -> int:
    return _linear_cross_entropy(*rest)


def _linear(input, weight, *rest, out_shape=None, **options) -> int:
    return 2 * math.prod(input[:-1]) * math.prod(weight)


def _gru_layer(input, batch_sizes, hx, *rest, out_shape=None, **options) -> int:
    D, _, H = hx
    return 2 * D * math.prod(input[:-1]) * 3 * H * (input[-1] + H)


def _gru_layer_backward(dout, dhn, input, batch_sizes, hx, *rest, out_shape=None, **options) -> int:
    input_wanted, weights_wanted = rest[-2:]
    (D, _, H), I = hx, input[-1]
    widths = H + (I if input_wanted else 0) + (I + H if weights_wanted else 0)
    return 2 * D * math.prod(input[:-1]) * 3 * H * widths


_FORMULAS = {
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "gru_layer": _gru_layer,
    "gru_layer_backward": _gru_layer_backward,
}
_FORMULAS_OF_VALUES = {"varlen_attention_forward": _varlen, "varlen_attention_backward": _varlen_backward}


def _register(counter) -> None:
    counter.register_flop_formula(torch.ops.fastlm.linear)(_linear)

    def register(namespace: str) -> None:
        operators = getattr(torch.ops, namespace)
        for formulas, of_values in ((_FORMULAS, False), (_FORMULAS_OF_VALUES, True)):
            for name, formula in formulas.items():
                counter.register_flop_formula(getattr(operators, name), get_raw=of_values)(formula)

    for_namespaces(register)


AfterImport("torch.utils.flop_counter", _register).watch()
