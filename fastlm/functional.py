"""The public functions: arguments as PyTorch's, checked here, before any work."""

import math
import re
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from fastlm import reference
from fastlm.ops import attention as ops_attention
from fastlm.ops import choose_backend, under_transform
from fastlm.ops import cross_entropy as ops_cross_entropy
from fastlm.ops import gru as ops_gru
from fastlm.ops.cross_entropy import compute_dtype

# ---- attention ----------------------------------------------------------------------------


def _attention_error(message: str) -> ValueError:
    return ValueError(f"fastlm.scaled_dot_product_attention: {message}")


def _check_window(name: str, window_size) -> None:
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or any(isinstance(w, bool) or not isinstance(w, int) or w < -1 for w in window_size)
    ):
        raise ValueError(
            f"{name}: window_size is {window_size!r}, expected two integers (left, right) >= -1"
        )


def _check_scale(name: str, scale: float | None, D: int) -> float:
    if scale is None:
        return D**-0.5 if D > 0 else 1.0
    if not math.isfinite(scale):
        raise ValueError(f"{name}: scale is {scale}, expected a finite number")
    return float(scale)


def _check_attention_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    error = _attention_error
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"fastlm.scaled_dot_product_attention: {name} is {type(x).__name__}, expected a Tensor")
        if x.layout != torch.strided or x.is_nested:
            raise error(f"{name} has layout {x.layout}, expected a dense torch.strided tensor")
        if x.dim() < 2:
            raise error(f"{name} has shape {tuple(x.shape)}, expected at least 2 dimensions (..., T, D)")
        if not x.is_floating_point():
            raise TypeError(f"fastlm.scaled_dot_product_attention: {name} is {x.dtype}, expected a floating dtype")
        if x.dtype != query.dtype:
            raise TypeError(
                f"fastlm.scaled_dot_product_attention: {name} is {x.dtype}, expected {query.dtype} as query is"
            )
        if x.device != query.device:
            raise error(f"{name} is on {x.device}, expected {query.device} as query is")
    if key.size(-1) != query.size(-1):
        raise error(f"key has head size {key.size(-1)}, expected {query.size(-1)} (query is {tuple(query.shape)})")
    if value.size(-2) != key.size(-2):
        raise error(f"value has {value.size(-2)} rows, expected {key.size(-2)} (key is {tuple(key.shape)})")


def _check_mask(attn_mask: Tensor, query: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"fastlm.scaled_dot_product_attention: attn_mask is {type(attn_mask).__name__}, expected a Tensor"
        )
    if attn_mask.layout != torch.strided:
        raise _attention_error(f"attn_mask has layout {attn_mask.layout}, expected torch.strided")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"fastlm.scaled_dot_product_attention: attn_mask is {attn_mask.dtype}, expected torch.bool, "
            f"torch.float32 or {query.dtype} as query is"
        )
    if attn_mask.device != query.device:
        raise _attention_error(f"attn_mask is on {attn_mask.device}, expected {query.device} as query is")


def _per_head(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...], query: Tensor) -> Tensor:
    """A per-head option, checked and in the compute dtype."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"fastlm.scaled_dot_product_attention: {name} must be a floating Tensor")
    if tuple(x.shape) not in shapes:
        raise _attention_error(
            f"{name} has shape {tuple(x.shape)}, expected {' or '.join(map(str, shapes))}"
            f" (query is {tuple(query.shape)})"
        )
    if x.device != query.device:
        raise _attention_error(f"{name} is on {x.device}, expected {query.device} as query is")
    return x.to(ops_attention.compute_dtype(query.dtype))


def _share_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads that divides the query's (enable_gqa=True)."""
    if min(query.dim(), key.dim(), value.dim()) < 3:
        raise _attention_error("enable_gqa needs a dimension of heads: (..., H, T, D)")
    H, Hk, Hv = query.size(-3), key.size(-3), value.size(-3)
    if Hk == 0 or Hv == 0 or H % Hk or H % Hv:
        raise _attention_error(
            f"{Hk} key heads and {Hv} value heads cannot be shared by {H} query heads: "
            "enable_gqa needs divisors of the number of query heads"
        )
    if Hk != Hv:
        key = key.repeat_interleave(H // Hk, -3)
        value = value.repeat_interleave(H // Hv, -3)
    return key, value


def _four_dimensions(query, key, value, attn_mask, enable_gqa):
    """Views (copies where memory asks for it) as (B, H, T, D) with equal batches, and the shape to undo it."""
    if query.dim() == key.dim() == value.dim() == 4 and (attn_mask is None or attn_mask.dim() == 4):
        batch = query.shape[:1] if key.size(0) == query.size(0) == value.size(0) else None
        H = query.size(1)
        if batch and key.size(1) == value.size(1) and (enable_gqa or key.size(1) == H):
            return query, key, value, attn_mask, None
    try:
        if enable_gqa:
            batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
            lead = [(*batch, x.size(-3)) for x in (query, key, value)]
        else:
            heads = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            lead = [heads] * 3
            batch = heads[:-1]
    except RuntimeError:
        raise _attention_error(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not "
            f"broadcast over their leading dimensions{'' if enable_gqa else '; fewer key heads need enable_gqa=True'}"
        ) from None
    q, k, v = (
        x.expand(*shape, *x.shape[-2:]) for x, shape in zip((query, key, value), lead, strict=True)
    )
    shape = q.shape[:-1]
    B = math.prod(batch)

    def flat(x):
        if x.dim() < 4:
            return x.reshape(1, *(1,) * (3 - x.dim()), *x.shape)
        return x if x.dim() == 4 else x.reshape(B, *x.shape[-3:])

    if attn_mask is not None:
        scores = (*q.shape[:-1], k.size(-2))
        if attn_mask.dim() > len(scores) or any(
            m not in (1, s) for m, s in zip(reversed(attn_mask.shape), reversed(scores), strict=False)
        ):
            raise _attention_error(
                f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to the scores' {scores}"
            )
        if attn_mask.dim() > 4 and math.prod(attn_mask.shape[:-3]) > 1:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:])
            attn_mask = attn_mask.reshape(B, *attn_mask.shape[-3:])
        elif attn_mask.dim() > 4:
            attn_mask = attn_mask.reshape(1, *attn_mask.shape[-3:])
        elif attn_mask.dim() < 4:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        elif len(scores) > 4 and attn_mask.dim() == 4 and attn_mask.size(0) > 1:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).reshape(B, *attn_mask.shape[-3:])
    return flat(q), flat(k), flat(v), attn_mask, shape


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention without its :math:`T_q \times T_k` matrix in memory, forward and backward.

    .. math::
        S = c \tanh(\text{scale} \cdot Q K^T / c) + \text{bias}, \qquad
        O = \text{dropout}(\text{softmax}(S)) V

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention`; the keyword-only arguments
    are fastlm's own.

    Args:
        query (Tensor): :math:`(..., H_q, T_q, D)`, float64, float32, bfloat16 or float16. Any number of
            leading dimensions, which broadcast against those of key and value; any strides.
        key (Tensor): :math:`(..., H, T_k, D)`, dtype and device of query.
        value (Tensor): :math:`(..., H, T_k, D_v)`, dtype and device of query.
        attn_mask (Tensor, optional): broadcastable to the scores :math:`(..., H_q, T_q, T_k)`. Boolean:
            True where a key takes part. Floating (query's dtype or float32): added to the scores, and
            differentiated at its own shape. Also a :class:`torch.nn.attention.bias.CausalBias`.
        dropout_p (float): probability in [0, 1] of dropping an attention weight; applied whatever the
            mode. The mask is drawn from a seed that torch's default generator gives.
        is_causal (bool): query i sees keys :math:`j \le i` (query 0 is aligned with key 0). May be
            combined with attn_mask.
        scale (float, optional): factor of the scores, default :math:`1/\sqrt{D}`.
        enable_gqa (bool): key and value may have fewer heads than query, each shared by
            :math:`H_q / H` consecutive query heads.
        window_size (tuple[int, int]): (left, right), keys visible to either side of
            :math:`i + T_k - T_q`: the last query is aligned with the last key. -1: no bound.
        softcap (float): bound c of the scores, in the unit of scores; 0 for none (Gemma 2, arXiv:2408.00118).
        alibi_slopes (Tensor, optional): :math:`(H_q)` or :math:`(B, H_q)`; adds
            :math:`-\text{slope} \cdot |i + T_k - T_q - j|` to the scores (ALiBi, arXiv:2108.12409).
            Differentiable.
        sinks (Tensor, optional): :math:`(H_q)`, a logit per head that joins the softmax's denominator and
            has no value (gpt-oss, arXiv:2508.10925; arXiv:2309.17453). Differentiable.
        return_lse (bool): also return the logarithm of the softmax's denominator.

    Returns:
        Tensor: :math:`(..., H_q, T_q, D_v)` in query's dtype. A query without any key gives 0, with
        gradient 0. With `return_lse` also lse, :math:`(..., H_q, T_q)`, float64 for float64 and else
        float32, -inf for a query without any key; gradients flow through it.

    Raises:
        ValueError: shapes, devices or layouts that don't fit, options out of range.
        TypeError: an unsupported or unequal dtype.

    Gradients are deterministic. Second derivatives, forward-mode AD and :mod:`torch.func` transforms go
    through :func:`fastlm.reference.scaled_dot_product_attention`.

    Method: FlashAttention-2 (arXiv:2307.08691) with online softmax (arXiv:1805.02867).
    """
    if reference.is_causal_bias(attn_mask):
        if is_causal:
            raise _attention_error("a CausalBias as attn_mask cannot be combined with is_causal=True")
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (query.size(-2), key.size(-2)):
            raise _attention_error(
                f"attn_mask is a CausalBias of {attn_mask.seq_len_q} x {attn_mask.seq_len_kv}, expected "
                f"{query.size(-2)} x {key.size(-2)} (query is {tuple(query.shape)}, key is {tuple(key.shape)})"
            )
        attn_mask, is_causal, window_size = reference.split_causal_bias(attn_mask, is_causal, window_size)
    if has_torch_function_variadic(query, key, value):
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value), query, key, value, attn_mask, dropout_p, is_causal,
            scale, enable_gqa, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            return_lse=return_lse,
        )  # fmt: skip
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value, attn_mask = (
            x.to(low) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value, attn_mask)
        )
    _check_attention_inputs(query, key, value)
    if attn_mask is not None:
        _check_mask(attn_mask, query)
    if not 0.0 <= dropout_p <= 1.0:
        raise _attention_error(f"dropout_p is {dropout_p}, expected a probability between 0 and 1")
    if window_size != (-1, -1):
        _check_window("fastlm.scaled_dot_product_attention", window_size)
    if not 0.0 <= softcap < math.inf:
        raise _attention_error(f"softcap is {softcap}, expected a finite number >= 0")
    scale = _check_scale("fastlm.scaled_dot_product_attention", scale, query.size(-1))
    if enable_gqa:
        key, value = _share_heads(query, key, value)
    q, k, v, mask, shape = _four_dimensions(query, key, value, attn_mask, enable_gqa)
    B, H, Tq, _ = q.shape
    if mask is not None and shape is None:
        full = (B, H, Tq, k.size(2))
        if any(m not in (1, s) for m, s in zip(mask.shape, full, strict=True)):
            raise _attention_error(
                f"attn_mask has shape {tuple(mask.shape)}, which does not broadcast to the scores' {full}"
            )
    if alibi_slopes is not None:
        alibi_slopes = _per_head("alibi_slopes", alibi_slopes, ((H,), (B, H)), query).expand(B, H)
    if sinks is not None:
        sinks = _per_head("sinks", sinks, ((H,),), query)
    seed = reference.draw_seed() if dropout_p > 0.0 else None

    transformed = under_transform(query, key, value, attn_mask, alibi_slopes, sinks)
    if transformed or choose_backend("scaled_dot_product_attention", query) == "eager":
        out, lse = reference.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, window_size=window_size, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, return_lse=True, seed=seed,
        )  # fmt: skip
    else:
        out, lse = ops_attention.attention(
            q, k, v, mask, alibi_slopes, sinks, seed, float(dropout_p), is_causal, *window_size, scale, float(softcap)
        )
    if shape is not None:
        out, lse = out.reshape(*shape, v.size(-1)), lse.reshape(shape)
    return (out, lse) if return_lse else out


def _check_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa, seqused_k, block_table, num_splits):
    name = "fastlm.varlen_attn"
    rank = 3 if block_table is None else 4
    for label, x, dims in (("query", query, 3), ("key", key, rank), ("value", value, rank)):
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise TypeError(f"{name}: {label} must be a dense Tensor")
        if x.dim() != dims:
            form = "(T, H, D)" if dims == 3 else "(pages, page_size, H, D) with block_table"
            raise ValueError(f"{name}: {label} has shape {tuple(x.shape)}, expected {form}")
        if x.dtype != query.dtype or not x.is_floating_point():
            raise TypeError(f"{name}: {label} is {x.dtype}, expected one floating dtype for query, key and value")
        if x.device != query.device:
            raise ValueError(f"{name}: {label} is on {x.device}, expected {query.device} as query is")
    if key.size(-1) != query.size(-1):
        raise ValueError(f"{name}: key has head size {key.size(-1)}, expected {query.size(-1)} as query has")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"{name}: value has shape {tuple(value.shape)}, expected {(*key.shape[:-1], 'Dv')}")
    Hq, Hkv = query.size(1), key.size(-2)
    if not enable_gqa and Hq != Hkv:
        raise ValueError(
            f"{name}: Expect query and key/value to have the same number of heads but got Hq={Hq} and Hkv={Hkv}. "
            "Try setting enable_gqa=True for GQA."
        )
    if enable_gqa and (Hkv == 0 or Hq % Hkv):
        raise ValueError(
            f"{name}: Expect number of query heads to be a multiple of kv heads for GQA "
            f"but got Hq={Hq} and Hkv={Hkv}."
        )
    if cu_seq_k is None and block_table is None:
        raise ValueError(f"{name}: cu_seq_k is None, which only block_table allows")
    if block_table is not None and seqused_k is None:
        raise ValueError(f"{name}: block_table requires seqused_k")
    N = cu_seq_q.numel() - 1
    for label, x, expected in (
        ("cu_seq_q", cu_seq_q, (N + 1,)), ("cu_seq_k", cu_seq_k, (N + 1,)), ("seqused_k", seqused_k, (N,)),
    ):  # fmt: skip
        if x is None:
            continue
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {label} is {x.dtype}, expected torch.int32")
        if tuple(x.shape) != expected or N < 0:
            raise ValueError(f"{name}: {label} has shape {tuple(x.shape)}, expected {expected if N >= 0 else '(N + 1,)'}")
    if block_table is not None and (block_table.dim() != 2 or block_table.size(0) != N):
        raise ValueError(f"{name}: block_table has shape {tuple(block_table.shape)}, expected ({N}, pages)")
    if num_splits is not None and num_splits < 0:
        raise ValueError(f"{name}: num_splits is {num_splits}, expected None or a number >= 0")
    for label, n in (("max_q", max_q), ("max_k", max_k)):
        if n < 0:
            raise ValueError(f"{name}: {label} is {n}, expected a length >= 0")


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: reference.AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention within each of N packed sequences, without padding.

    A drop-in for :func:`torch.nn.attention.varlen.varlen_attn`, which needs a GPU.

    Args:
        query (Tensor): :math:`(T_q, H_q, D)`, all sequences one behind the other; float64, float32,
            bfloat16 or float16.
        key (Tensor): :math:`(T_k, H, D)`; with block_table a pool of pages
            :math:`(\text{pages}, \text{page\_size}, H, D)`.
        value (Tensor): as key, with head size :math:`D_v`.
        cu_seq_q (Tensor): int32 :math:`(N + 1)`: sequence n holds the queries cu_seq_q[n] up to
            cu_seq_q[n + 1]. Sequences may be empty. Queries of no sequence give 0.
        cu_seq_k (Tensor): the same for keys; None only with block_table.
        max_q, max_k (int): bounds on the lengths, checked.
        return_aux (AuxRequest, optional): with ``lse=True`` lse is returned too.
        scale (float, optional): factor of the scores, default :math:`1/\sqrt{D}`.
        window_size (tuple[int, int]): keys to the left and right that a query sees, the last query of a
            sequence aligned with its last key. (-1, -1): all; (-1, 0): causal.
        enable_gqa (bool): :math:`H` may be a divisor of :math:`H_q`.
        seqused_k (Tensor, optional): int32 :math:`(N)`, keys of each sequence that count, the first ones.
            Inference only.
        block_table (Tensor, optional): int32 :math:`(N, \text{pages of a sequence})`, which pages hold a
            sequence's keys and values. Requires seqused_k. Inference only.
        num_splits (int, optional): 1 keeps the keys of few queries in one piece. The division follows
            from each sequence's own lengths in any case, so a result never depends on the rest of the batch.

    Returns:
        Tensor: :math:`(T_q, H_q, D_v)`; with ``return_aux.lse`` also lse, :math:`(H_q, T_q)`, float64 for
        float64 and else float32. Gradients flow through both.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that don't fit.
        RuntimeError: offsets that decrease, leave the tensors or exceed max_q or max_k; a gradient
            required with seqused_k or block_table.
    """
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(low) if x.dtype != torch.float64 else x for x in (query, key, value))
    _check_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa, seqused_k, block_table, num_splits
    )
    _check_window("fastlm.varlen_attn", window_size)
    scale = _check_scale("fastlm.varlen_attn", scale, query.size(-1))
    if under_transform(query, key, value) or choose_backend("varlen_attn", query) == "eager":
        return reference.varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
            window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table,
        )  # fmt: skip
    cu_seq_q, cu_seq_k, seqused_k, block_table = (
        x if x is None or (x.dtype == torch.int32 and x.is_contiguous()) else x.to(torch.int32).contiguous()
        for x in (cu_seq_q, cu_seq_k, seqused_k, block_table)
    )
    out, lse = ops_attention.varlen_attention(
        query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, *window_size, scale,
        0 if num_splits is None else num_splits,
    )  # fmt: skip
    if return_aux is not None and return_aux.lse:
        return out, lse
    return out


# ---- gru ----------------------------------------------------------------------------------

_GRU = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional",
    "batch_first",
)  # fmt: skip
_GRU_PACKED = ("data", "batch_sizes", *_GRU[1:-1])


def _gru_arguments(args: tuple, kwargs: dict) -> dict:
    """The arguments of either overload of torch._VF.gru by name."""
    packed = "batch_sizes" in kwargs or "data" in kwargs or (len(args) > 2 and isinstance(args[2], Tensor))
    names = _GRU_PACKED if packed else _GRU
    if len(args) > len(names):
        raise TypeError(f"fastlm.gru: {len(args)} positional arguments, expected {len(names)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names or name in given:
            raise TypeError(f"fastlm.gru: unexpected or repeated argument {name!r}")
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise TypeError(f"fastlm.gru: missing arguments {', '.join(missing)}")
    return given


def _check_probability(function: str, name: str, p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"fastlm.{function}: {name} is {p!r}, expected a probability in [0, 1]")
    return float(p)


def _check_gru_tensors(function: str, tensors: list[tuple[str, Tensor]], like: Tensor, casting: bool) -> None:
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"fastlm.{function}: {name} is {type(x).__name__}, expected a Tensor")
        if x.layout != torch.strided:
            raise RuntimeError(f"fastlm.{function}: {name} has layout {x.layout}, expected torch.strided")
        if not x.is_floating_point():
            raise RuntimeError(f"fastlm.{function}: {name} is {x.dtype}, expected a floating dtype")
        if x.dtype != like.dtype and not casting:
            raise RuntimeError(f"fastlm.{function}: {name} is {x.dtype}, expected {like.dtype} as the input is")
        if x.device != like.device:
            raise RuntimeError(f"fastlm.{function}: {name} is on {x.device}, expected {like.device} as the input is")


def _check_gru_weights(function: str, weights: list[tuple[str, Tensor]], I: int, H: int) -> None:
    shapes = {"w_ih": (3 * H, I), "w_hh": (3 * H, H)}
    for name, w in weights:
        shape = shapes.get(name.split("[")[0], (3 * H,))
        if w.shape != shape:
            raise RuntimeError(
                f"fastlm.{function}: {name} has shape {tuple(w.shape)}, expected {shape} "
                f"(input size {I}, hidden size {H})"
            )


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast, if it is on, wants products of x to be in; float64 is left alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _check_batch_sizes(batch_sizes: Tensor, rows: int, B: int) -> None:
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type not in ("cpu", "meta"):
        raise RuntimeError("fastlm.gru: batch_sizes must be an int64 vector on the CPU")
    symbolic = torch.compiler.is_compiling() or isinstance(batch_sizes, FakeTensor)
    if symbolic or batch_sizes.device.type == "meta":
        return  # the values are not known; the kernel checks them
    if batch_sizes.shape[0] == 0:
        raise RuntimeError("fastlm.gru: batch_sizes is empty, expected at least one time step")
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or any(a < b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise RuntimeError(f"fastlm.gru: batch_sizes is {sizes}, expected positive sizes that never grow")
    if sum(sizes) != rows:
        raise RuntimeError(f"fastlm.gru: batch_sizes adds up to {sum(sizes)}, expected the {rows} rows of data")
    if sizes[0] != B:
        raise RuntimeError(f"fastlm.gru: hx has batch size {B}, expected {sizes[0]} (batch_sizes[0])")


def _run_gru(function, stack, tensors, arguments):
    """Calls stack(layer, *arguments) with tensors cast as autocast wants it: states keep the dtype that
    promotion gives them, as in torch.nn.GRU."""
    input, hx = tensors
    layer = ops_gru.gru_layer if choose_backend(function, input) == "cpu" else reference.gru_layer
    dtype = _autocast(input)
    if dtype is None:
        return stack(layer, *arguments)
    result = torch.promote_types(hx.dtype, dtype)

    def cast(x):
        if isinstance(x, Tensor):
            return x.to(dtype) if x.is_floating_point() else x
        return [cast(y) for y in x] if isinstance(x, (list, tuple)) else x

    output = stack(layer, *(cast(x) for x in arguments))
    return output.to(result) if isinstance(output, Tensor) else tuple(x.to(result) for x in output)


@overload
def gru(
    input: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool, *, zoneout: float = 0.0,
    recurrent_dropout: float = 0.0, layer_norm: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def gru(
    data: Tensor, batch_sizes: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, *, zoneout: float = 0.0,
    recurrent_dropout: float = 0.0, layer_norm: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def gru(*args, zoneout=0.0, recurrent_dropout=0.0, layer_norm=None, **kwargs):
    r"""A gated recurrent unit over whole sequences; both forms of ``torch._VF.gru``, which
    :class:`torch.nn.GRU` calls::

        gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        gru(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    .. math::
        r = \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}), \quad
        z = \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}), \\
        n = \tanh(W_{in} x + b_{in} + r (W_{hn} h + b_{hn})), \quad
        h' = (1 - z) n + z h

    Args:
        input (Tensor): :math:`(T, B, I)`, or :math:`(B, T, I)` with `batch_first`; at least one step.
        data (Tensor): :math:`(N, I)`, the rows of a :class:`~torch.nn.utils.rnn.PackedSequence`.
        batch_sizes (Tensor): its batch sizes, int64 :math:`(T)` on the CPU.
        hx (Tensor): initial states, :math:`(L D, B, H)` for L layers and D directions.
        params (list of Tensor): for each layer and direction ``w_ih`` :math:`(3H, I)`, ``w_hh``
            :math:`(3H, H)` and, with `has_biases`, ``b_ih`` and ``b_hh`` :math:`(3H)`; gates r, z, n.
            Behind the first layer I is :math:`D H`.
        dropout (float): dropped share of every layer's output but the last one's, when training.
        train (bool): training; gradients are right in either mode.
        zoneout (float): probability that a unit keeps its state at a step. In training a mask is drawn
            for each step, otherwise its expectation is used: ``h' = p h + (1 - p) h'`` (Krueger et al.,
            Zoneout, ICLR 2017).
        recurrent_dropout (float): dropped share of the elements of each ``w_hh`` in training, drawn
            once per call and scaled by ``1 / (1 - p)`` (DropConnect on the recurrent weights: Merity et
            al., Regularizing and Optimizing LSTM Language Models, ICLR 2018).
        layer_norm (list of Tensor): for each layer and direction two gains :math:`(3H)`: ``W_i x`` and
            ``W_h h`` are normalised over their 3H values, eps 1e-5, and scaled by them before the biases
            are added (Ba et al., Layer Normalization, 2016, in the form of the library haste).

    Returns:
        ``output`` :math:`(T, B, D H)`, :math:`(B, T, D H)` or :math:`(N, D H)`, and the last states
        ``hn`` :math:`(L D, B, H)`.

    All tensors have one dtype: float64, float32, bfloat16 or float16; the 16-bit ones are computed in
    float32. Under autocast they are cast as for torch.nn.GRU. Masks come from torch's generator.

    Raises:
        TypeError: an argument is missing or is no tensor.
        ValueError: a probability outside [0, 1].
        RuntimeError: shapes, dtypes or devices that do not fit; no time step; bad batch sizes.
    """
    a = _gru_arguments(args, kwargs)
    batch_sizes = a.get("batch_sizes")
    packed = "batch_sizes" in a
    input, hx, params = a["data" if packed else "input"], a["hx"], a["params"]
    gains = list(layer_norm) if layer_norm is not None else []
    if not isinstance(params, (list, tuple)):
        raise TypeError(f"fastlm.gru: params is {type(params).__name__}, expected a list of Tensors")
    everything = (input, hx, *params, *gains)
    if has_torch_function(everything):
        options = dict(zoneout=zoneout, recurrent_dropout=recurrent_dropout, layer_norm=layer_norm)
        return handle_torch_function(gru, everything, *args, **options, **kwargs)

    has_biases, bidirectional = bool(a["has_biases"]), bool(a["bidirectional"])
    layers, D = a["num_layers"], 2 if bidirectional else 1
    dropout = _check_probability("gru", "dropout", a["dropout"])
    zoneout = _check_probability("gru", "zoneout", zoneout)
    recurrent_dropout = _check_probability("gru", "recurrent_dropout", recurrent_dropout)
    names = ("w_ih", "w_hh", "b_ih", "b_hh")[: 4 if has_biases else 2]
    if layers < 1 or len(params) != layers * D * len(names):
        raise RuntimeError(
            f"fastlm.gru: {len(params)} weights, expected {len(names)} for each of "
            f"{layers} layers and {D} directions"
        )
    if layer_norm is not None and len(gains) != 2 * layers * D:
        raise RuntimeError(f"fastlm.gru: {len(gains)} layer_norm gains, expected {2 * layers * D}")
    if not isinstance(input, Tensor):
        raise TypeError(f"fastlm.gru: input is {type(input).__name__}, expected a Tensor")
    weights = [
        (f"{name}[{i}]", params[i * len(names) + j])
        for i in range(layers * D)
        for j, name in enumerate(names)
    ]
    weights += [(f"layer_norm[{i}]", g) for i, g in enumerate(gains)]
    _check_gru_tensors("gru", [("hx", hx), *weights], input, _autocast(input) is not None)

    if input.dim() != (2 if packed else 3):
        raise RuntimeError(
            f"fastlm.gru: {'data' if packed else 'input'} has shape {tuple(input.shape)}, expected "
            f"{'(N, I)' if packed else '3 dimensions'}"
        )
    batch_first = not packed and a["batch_first"]
    if batch_first:
        input = input.transpose(0, 1)
    if hx.dim() != 3 or hx.shape[0] != layers * D or hx.shape[2] < 1:
        raise RuntimeError(
            f"fastlm.gru: hx has shape {tuple(hx.shape)}, expected ({layers * D}, B, H) for "
            f"{layers} layers and {D} directions"
        )
    I, H = input.shape[-1], hx.shape[2]
    if packed:
        _check_batch_sizes(batch_sizes, input.shape[0], hx.shape[1])
        batch_sizes = batch_sizes.contiguous()
    else:
        T, B = input.shape[:2]
        if T == 0:
            raise RuntimeError("fastlm.gru: Expected sequence length to be larger than 0 in RNN")
        if hx.shape[1] != B:
            raise RuntimeError(
                f"fastlm.gru: hx has batch size {hx.shape[1]}, expected {B} (input is (T={T}, B={B}, I={I}))"
            )
    count = len(names) * D
    for layer in range(layers):
        _check_gru_weights(
            "gru", weights[layer * count : (layer + 1) * count], I if layer == 0 else D * H, H
        )
    _check_gru_weights("gru", weights[layers * count :], I, H)

    output, hn = _run_gru(
        "gru", reference.gru_stack, (input, hx),
        (input, batch_sizes, hx, list(params), has_biases, layers, dropout, bool(a["train"]),
         bidirectional, zoneout, recurrent_dropout, gains or None),
    )  # fmt: skip
    return output.transpose(0, 1) if batch_first else output, hn


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, zoneout: float = 0.0, recurrent_dropout: float = 0.0,
    layer_norm: tuple[Tensor, Tensor] | None = None, training: bool = True,
) -> Tensor:  # fmt: skip
    r"""One step of :func:`gru`; ``torch.gru_cell``, which :class:`torch.nn.GRUCell` calls.

    Args:
        input (Tensor): :math:`(B, I)`.
        hx (Tensor): states, :math:`(B, H)`.
        w_ih, w_hh (Tensor): :math:`(3H, I)` and :math:`(3H, H)`, gates r, z, n.
        b_ih, b_hh (Tensor): :math:`(3H)`, or None.
        zoneout, recurrent_dropout (float): as for :func:`gru`; masks are drawn at every call. To drop
            the same recurrent weights at all steps of a sequence, drop them out of `w_hh` beforehand.
        layer_norm (pair of Tensor): the gains of the norms of ``W_i x`` and ``W_h h``, :math:`(3H)`.
        training (bool): draw masks for zoneout and recurrent dropout.

    Returns:
        The new states, :math:`(B, H)`.

    Raises: as :func:`gru`.
    """
    biases = [(name, b) for name, b in (("b_ih", b_ih), ("b_hh", b_hh)) if b is not None]
    gains = list(layer_norm) if layer_norm is not None else []
    everything = (input, hx, w_ih, w_hh, *(b for _, b in biases), *gains)
    if has_torch_function(everything):
        return handle_torch_function(
            gru_cell, everything, input, hx, w_ih, w_hh, b_ih, b_hh, zoneout=zoneout,
            recurrent_dropout=recurrent_dropout, layer_norm=layer_norm, training=training,
        )  # fmt: skip
    zoneout = _check_probability("gru_cell", "zoneout", zoneout)
    recurrent_dropout = _check_probability("gru_cell", "recurrent_dropout", recurrent_dropout)
    if layer_norm is not None and len(gains) != 2:
        raise RuntimeError(f"fastlm.gru_cell: {len(gains)} layer_norm gains, expected 2")
    if not isinstance(input, Tensor):
        raise TypeError(f"fastlm.gru_cell: input is {type(input).__name__}, expected a Tensor")
    weights = [("w_ih", w_ih), ("w_hh", w_hh), *biases]
    weights += [(f"layer_norm[{i}]", g) for i, g in enumerate(gains)]
    _check_gru_tensors("gru_cell", [("hx", hx), *weights], input, _autocast(input) is not None)
    for name, x in (("input", input), ("hx", hx)):
        if x.dim() != 2:
            raise RuntimeError(f"fastlm.gru_cell: {name} has shape {tuple(x.shape)}, expected 2 dimensions")
    if hx.shape[0] != input.shape[0]:
        raise RuntimeError(
            f"fastlm.gru_cell: hx has batch size {hx.shape[0]}, expected {input.shape[0]} as the input"
        )
    if hx.shape[1] < 1:
        raise RuntimeError(f"fastlm.gru_cell: hx has shape {tuple(hx.shape)}, expected a hidden unit at least")
    _check_gru_weights("gru_cell", weights, input.shape[1], hx.shape[1])
    return _run_gru(
        "gru_cell", reference.gru_cell_stack, (input, hx),
        (input, hx, w_ih, w_hh, b_ih, b_hh, zoneout, recurrent_dropout, gains or None, training),
    )  # fmt: skip


# ---- cross_entropy ------------------------------------------------------------------------

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)


def _check_loss_options(
    name: str, reduction: str, label_smoothing: float, z_loss: float, softcap: float
) -> int:
    """The number of the reduction, once the options make sense."""
    code = _REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(
            f"{name}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'"
            f" ({reduction} is not a valid value for reduction)"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            f"{name}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
        )
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss is {z_loss}, expected a finite value >= 0")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}, expected a finite value >= 0 (0: none)")
    return code


def _check_target(
    name: str, what: str, logits: tuple[int, ...], dtype: torch.dtype, target: Tensor,
    weight: Tensor | None, ignore_index: int, same_weight_dtype: bool,
) -> bool:  # fmt: skip
    """Whether target holds probabilities, once its shape, its dtype and those of weight fit."""
    classes = logits[0] if len(logits) == 1 else logits[1]
    probabilities = tuple(target.shape) == logits
    if probabilities:
        if not target.is_floating_point():
            raise RuntimeError(
                f"{name}: target has the shape of {what}, {logits}, so it holds class probabilities:"
                f" expected a floating dtype, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"{name}: ignore_index is not supported for floating point target,"
                f" got ignore_index={ignore_index}"
            )
    else:
        expected = () if len(logits) == 1 else (logits[0], *logits[2:])
        if tuple(target.shape) != expected and not (len(logits) == 1 and target.shape == (1,)):
            message = (
                f"{name}: target has shape {tuple(target.shape)}, expected {expected} (class indices)"
                f" or {logits} (probabilities), since {what} has shape {logits}"
            )
            batch = target.shape[0] if target.dim() else 0
            error = ValueError if len(logits) > 1 and batch != logits[0] else RuntimeError
            raise error(message)
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
        if not weight.is_floating_point():
            raise RuntimeError(f"{name}: weight has dtype {weight.dtype}, expected a floating dtype")
        if weight.device != target.device:
            raise RuntimeError(
                f"{name}: weight is on {weight.device} and target on {target.device},"
                " expected one device"
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
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy between logits and targets, as :func:`torch.nn.functional.cross_entropy`.

    For a token with logits :math:`x_c`, class weights :math:`w_c`, label smoothing :math:`e` and the
    class index :math:`y`, with :math:`\mathrm{lse} = \log \sum_c \exp x_c`:

    .. math::
        (1 - e)\, w_y (\mathrm{lse} - x_y) + \frac{e}{C} \sum_c w_c (\mathrm{lse} - x_c)
        + z \cdot \mathrm{lse}^2

    Loss and gradient are computed in one sweep over the logits.

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
    name = "fastlm.cross_entropy"
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    code = _check_loss_options(name, reduction, label_smoothing, z_loss, softcap)
    shape = tuple(input.shape)
    dtype = input.dtype
    if not shape:
        raise RuntimeError(f"{name}: input has no dimension, expected (C), (N, C) or (N, C, d1, ...)")
    if not dtype.is_floating_point:
        raise RuntimeError(f"{name}: input has dtype {dtype}, expected a floating dtype")
    if input.device != target.device:
        raise RuntimeError(
            f"{name}: input is on {input.device} and target on {target.device}, expected one device"
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    probabilities = _check_target(
        name, "input", shape, dtype, target, weight, ignore_index, not autocast
    )
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
        ops_cross_entropy.cross_entropy, input, target, weight, code, ignore_index,
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
        raise RuntimeError(f"{name}: expected input with dimensionality 1 or 2, got shape {x}")
    if len(w) < 2:
        raise RuntimeError(
            f"{name}: expected linear_weight with dimensionality at least 2, got shape {w}"
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
        raise RuntimeError(
            f"{name}: expected linear_bias shape {w[:-1]}, got {tuple(linear_bias.shape)}"
        )
    if not input.dtype.is_floating_point:
        raise RuntimeError(f"{name}: input has dtype {input.dtype}, expected a floating dtype")
    for what, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype and not autocast:
            raise RuntimeError(
                f"{name}: {what} has dtype {tensor.dtype}, expected {input.dtype} as input"
            )
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
    if options is not None and not (_Options and isinstance(options, _Options)):
        raise TypeError(
            f"{name}: options is a {type(options).__name__},"
            " expected a torch.nn.LinearCrossEntropyOptions or None"
        )
    device = input.device
    autocast = torch.is_autocast_enabled(device.type)
    logits = _check_linear(name, input, linear_weight, linear_bias, autocast)
    if target.device != device:
        raise RuntimeError(
            f"{name}: input is on {device} and target on {target.device}, expected one device"
        )
    if ignore_index is not None and tuple(target.shape) == logits:
        raise RuntimeError(
            f"{name}: ignore_index cannot be specified when target contains probabilities"
        )
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
        ops_cross_entropy.linear_cross_entropy, input.to(dtype), linear_weight.to(dtype), target,
        None if linear_bias is None else linear_bias.to(dtype), weight, code, ignore_index,
        label_smoothing, z_loss, softcap, return_lse, autocast,
    )  # fmt: skip
