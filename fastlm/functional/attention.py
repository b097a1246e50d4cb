"""Attention: the public functions. Arguments as PyTorch's, checked here, before any work."""

import math

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastlm import reference
from fastlm.functional.arguments import (
    UnfitType,
    UnfitValue,
    check_flag,
    check_integer,
    check_number,
    check_tensor,
)
from fastlm.ops import (
    KERNEL_DTYPES,
    PLAIN,
    autocast_is_on,
    autocast_is_on_somewhere,
    choose_backend,
    dispatch_modes,
    transforms_are_off,
    under_transform,
)
from fastlm.ops import attention as ops_attention


def _attention_error(message: str) -> UnfitValue:
    return UnfitValue(f"fastlm.scaled_dot_product_attention: {message}")


_NO_WINDOW = (-1, -1)


def _is_no_window(window_size) -> bool:
    return (
        type(window_size) is tuple
        and len(window_size) == 2
        and type(window_size[0]) is type(window_size[1]) is int
        and window_size == _NO_WINDOW
    )


def _check_window(name: str, window_size) -> tuple[int, int]:
    """Both widths, no larger than any need be."""
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or any(isinstance(w, bool) or not isinstance(w, int) or w < -1 for w in window_size)
    ):
        raise ValueError(f"{name}: window_size is {window_size!r}, expected two integers (left, right) >= -1")
    left, right = window_size
    return min(left, reference.WIDEST), min(right, reference.WIDEST)


def _check_scale(name: str, scale: float | None, query: Tensor) -> float:
    if scale is None:
        return ops_attention.default_scale(query.shape[-1])
    check_number(name, "scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{name}: scale is {scale}, expected a finite number")
    return float(scale)


def _plain(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor | None:
    """The result of an eager call without options, by the shortest way; None for tensors that it is not for, which
    the caller's checks are for."""
    if not (type(query) in PLAIN and type(key) in PLAIN and type(value) in PLAIN):
        return None
    if query.dim() != 4:
        return None if enable_gqa else _plain_of_any_rank(query, key, value, is_causal)
    try:
        backend = choose_backend("scaled_dot_product_attention", query, value=value)
        if backend != "cpu" and (backend == "eager" or not _are_usual(query, key, value, enable_gqa)):
            return None
        return ops_attention.plain_attention(query, key, value, is_causal, enable_gqa, backend)
    except RuntimeError:  # from the CPU's operator, which asks what _are_usual does, in less time
        return None


def _plain_of_any_rank(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor | None:
    """The same for (N, T, D), as the heads of one batch, and for more leading dimensions, as one: equal ones."""
    lead = query.shape[:-2]
    n = len(lead)
    if n == 0 or lead != key.shape[:-2] or lead != value.shape[:-2]:
        return None
    if n == 1:
        result = _plain(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), is_causal, False)
        return None if result is None else result.squeeze(0)
    last = n - 2
    result = _plain(query.flatten(0, last), key.flatten(0, last), value.flatten(0, last), is_causal, False)
    return None if result is None else result.unflatten(0, lead[:-1])


def _are_usual(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether these are dense (B, H, T, D) that fit, as they mostly come: a quarter of the time that the checks
    below take, which any others go through."""
    return (
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and not (query.is_nested or key.is_nested or value.is_nested)
        and (dtype := query.dtype) in KERNEL_DTYPES
        and key.dtype is dtype is value.dtype
        and query.layout is key.layout is value.layout is torch.strided
        and (key.is_cpu and value.is_cpu if query.is_cpu else query.device == key.device == value.device)
        and len(q := query.shape) == 4
        and (q == key.shape == value.shape or _fit(q, key.shape, value.shape, enable_gqa))
    )


def _fit(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> bool:
    if len(k) != 4 or k[:3] != v[:-1] or k[0] != q[0] or k[3] != q[3]:
        return False
    return k[1] == q[1] or (enable_gqa and k[1] > 0 and q[1] % k[1] == 0)


def _check_attention_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    error = _attention_error
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"fastlm.scaled_dot_product_attention: {name} is {type(x).__name__}, expected a Tensor"
            )
        if x.layout != torch.strided or x.is_nested:
            raise error(f"{name} has layout {x.layout}, expected a dense torch.strided tensor")
        if x.dim() < 2:
            raise error(f"{name} has shape {tuple(x.shape)}, expected at least 2 dimensions (..., T, D)")
        if x.dtype not in KERNEL_DTYPES:
            raise UnfitType(
                f"fastlm.scaled_dot_product_attention: {name} is {x.dtype}, expected a floating dtype"
            )
        if x.dtype != query.dtype:
            raise UnfitType(
                f"fastlm.scaled_dot_product_attention: {name} is {x.dtype}, expected {query.dtype} as query is"
            )
        if x.device != query.device:
            raise error(f"{name} is on {x.device}, expected {query.device} as query is")
    if key.size(-1) != query.size(-1):
        raise error(
            f"key has head size {key.size(-1)}, expected {query.size(-1)} (query is {tuple(query.shape)})"
        )
    if value.size(-2) != key.size(-2):
        raise error(f"value has {value.size(-2)} rows, expected {key.size(-2)} (key is {tuple(key.shape)})")


def _check_mask(attn_mask: Tensor, query: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(
            f"fastlm.scaled_dot_product_attention: attn_mask is {type(attn_mask).__name__}, expected a Tensor"
        )
    if attn_mask.layout != torch.strided or attn_mask.is_nested:
        raise _attention_error(
            f"attn_mask has layout {attn_mask.layout}, expected a dense torch.strided tensor"
        )
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise UnfitType(
            f"fastlm.scaled_dot_product_attention: attn_mask is {attn_mask.dtype}, expected torch.bool, "
            f"torch.float32 or {query.dtype} as query is"
        )
    if attn_mask.device != query.device:
        raise _attention_error(f"attn_mask is on {attn_mask.device}, expected {query.device} as query is")


def _per_head(name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...], query: Tensor) -> Tensor:
    """A per-head option, checked and in the compute dtype."""
    check_tensor("fastlm.scaled_dot_product_attention", name, x)
    if x.dtype not in KERNEL_DTYPES:
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
    q, k, v = (x.expand(*shape, *x.shape[-2:]) for x, shape in zip((query, key, value), lead, strict=True))
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
    window_size: tuple[int, int] = _NO_WINDOW,
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
        TypeError: an unsupported or unequal dtype. Either is a RuntimeError too, as from PyTorch's function.

    Gradients are deterministic. Second derivatives, forward-mode AD and :mod:`torch.func` transforms go
    through :func:`fastlm.reference.scaled_dot_product_attention`.

    Method: FlashAttention-2 (arXiv:2307.08691) with online softmax (arXiv:1805.02867).
    """
    # A call without options on tensors as they mostly come takes the shortest way; the checks below are for any other.
    if (
        attn_mask is alibi_slopes is sinks is scale is None
        and return_lse is False
        and type(is_causal) is type(enable_gqa) is bool
        and type(dropout_p) in (float, int)
        and type(softcap) is float
        and dropout_p == softcap == 0
        and (window_size is _NO_WINDOW or _is_no_window(window_size))
        and not (
            is_dynamo_compiling()
            or has_torch_function_variadic(query, key, value)
            or autocast_is_on_somewhere()
        )
        and transforms_are_off()
        and not dispatch_modes()
        and (out := _plain(query, key, value, is_causal, enable_gqa)) is not None
    ):
        return out
    if attn_mask is not None and reference.is_causal_bias(attn_mask):
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
    if isinstance(query, Tensor) and autocast_is_on(query.device):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value, attn_mask = (
            x.to(low) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (query, key, value, attn_mask)
        )
    for label, flag in (("enable_gqa", enable_gqa), ("return_lse", return_lse)):
        check_flag("fastlm.scaled_dot_product_attention", label, flag)
    usual = _are_usual(query, key, value, enable_gqa)
    if not usual:
        _check_attention_inputs(query, key, value)
    if attn_mask is not None:
        _check_mask(attn_mask, query)
    name = "fastlm.scaled_dot_product_attention"
    check_number(name, "dropout_p", dropout_p)
    check_flag(name, "is_causal", is_causal)
    check_number(name, "softcap", softcap)
    if not 0.0 <= dropout_p <= 1.0:
        raise _attention_error(f"dropout_p is {dropout_p}, expected a probability between 0 and 1")
    if not _is_no_window(window_size):
        window_size = _check_window(name, window_size)
    if not 0.0 <= softcap < math.inf:
        raise _attention_error(f"softcap is {softcap}, expected a finite number >= 0")
    scale = _check_scale(name, scale, query)
    if usual and attn_mask is None:
        q, k, v, mask, shape = query, key, value, None, None
    else:
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
    backend = "eager" if transformed else choose_backend("scaled_dot_product_attention", query, value=value)
    if backend == "eager":
        result = reference.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, window_size=window_size, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse, seed=seed,
        )  # fmt: skip
    else:
        result = ops_attention.attention(
            backend, return_lse, q, k, v, is_causal, scale, mask, alibi_slopes, sinks, seed, float(dropout_p),
            *window_size, float(softcap),
        )  # fmt: skip
    if shape is None:
        return result
    out, lse = result if return_lse else (result, None)
    out = out.reshape(*shape, v.size(-1))
    return (out, lse.reshape(shape)) if return_lse else out


def _check_indices(name: str, label: str, x, query: Tensor) -> None:
    check_tensor(name, label, x)
    if x.device != query.device and query.device.type != "meta":
        raise ValueError(f"{name}: {label} is on {x.device}, expected {query.device} as query is")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {label} is {x.dtype}, expected torch.int32")


def _check_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa, seqused_k, block_table, num_splits
):
    name = "fastlm.varlen_attn"
    rank = 3 if block_table is None else 4
    for label, x, dims in (("query", query, 3), ("key", key, rank), ("value", value, rank)):
        check_tensor(name, label, x)
        if x.dim() != dims:
            form = "(T, H, D)" if dims == 3 else "(pages, page_size, H, D) with block_table"
            raise ValueError(f"{name}: {label} has shape {tuple(x.shape)}, expected {form}")
        if x.dtype != query.dtype or x.dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"{name}: {label} is {x.dtype}, expected one floating dtype for query, key and value"
            )
        if x.device != query.device:
            raise ValueError(f"{name}: {label} is on {x.device}, expected {query.device} as query is")
    if key.size(-1) != query.size(-1):
        raise ValueError(f"{name}: key has head size {key.size(-1)}, expected {query.size(-1)} as query has")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"{name}: value has shape {tuple(value.shape)}, expected {(*key.shape[:-1], 'Dv')}")
    check_flag(name, "enable_gqa", enable_gqa)
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
    _check_indices(name, "cu_seq_q", cu_seq_q, query)
    N = cu_seq_q.numel() - 1
    for label, x, expected in (
        ("cu_seq_q", cu_seq_q, (N + 1,)), ("cu_seq_k", cu_seq_k, (N + 1,)), ("seqused_k", seqused_k, (N,)),
    ):  # fmt: skip
        if x is None:
            continue
        _check_indices(name, label, x, query)
        if tuple(x.shape) != expected or N < 0:
            raise ValueError(
                f"{name}: {label} has shape {tuple(x.shape)}, expected {expected if N >= 0 else '(N + 1,)'}"
            )
    if block_table is not None:
        _check_indices(name, "block_table", block_table, query)
        if block_table.dim() != 2 or block_table.size(0) != N:
            raise ValueError(
                f"{name}: block_table has shape {tuple(block_table.shape)}, expected ({N}, pages)"
            )
    if num_splits is not None:
        check_integer(name, "num_splits", num_splits)
        if num_splits < 0:
            raise ValueError(f"{name}: num_splits is {num_splits}, expected None or a number >= 0")
    for label, n in (("max_q", max_q), ("max_k", max_k)):
        check_integer(name, label, n)
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
        max_q, max_k (int): bounds on the lengths. They and the offsets are checked where these are on the
            CPU; on a GPU they are trusted, since reading them would make the host wait.
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
            from each sequence's own lengths in any case, so a result never depends on the rest of the batch;
            on a GPU max_q tells whether the queries are few.

    Returns:
        Tensor: :math:`(T_q, H_q, D_v)`; with ``return_aux.lse`` also lse, :math:`(H_q, T_q)`, float64 for
        float64 and else float32. Gradients flow through both.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that don't fit.
        RuntimeError: offsets that decrease, leave the tensors or exceed max_q or max_k; a gradient
            required with seqused_k or block_table.

    Method: as :func:`scaled_dot_product_attention`; pages as in PagedAttention (arXiv:2309.06180).
    """
    if isinstance(query, Tensor) and autocast_is_on(query.device):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            x.to(low) if isinstance(x, Tensor) and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    _check_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa, seqused_k, block_table, num_splits
    )
    if return_aux is not None and not hasattr(return_aux, "lse"):
        raise TypeError(f"fastlm.varlen_attn: return_aux is {return_aux!r}, expected an AuxRequest or None")
    window_size = _check_window("fastlm.varlen_attn", window_size)
    scale = _check_scale("fastlm.varlen_attn", scale, query)
    transformed = under_transform(query, key, value)
    backend = "eager" if transformed else choose_backend("varlen_attn", query, value=value)
    if backend == "eager":
        return reference.varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
            window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table,
        )  # fmt: skip
    cu_seq_q, cu_seq_k, seqused_k, block_table = (
        x if x is None or (x.dtype == torch.int32 and x.is_contiguous()) else x.to(torch.int32).contiguous()
        for x in (cu_seq_q, cu_seq_k, seqused_k, block_table)
    )
    return ops_attention.varlen_attention(
        backend, return_aux is not None and return_aux.lse, query, key, value, cu_seq_q, cu_seq_k, seqused_k,
        block_table, max_q, max_k, *window_size, scale, 0 if num_splits is None else num_splits,
    )  # fmt: skip
