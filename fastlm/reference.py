"""Each operator in plain PyTorch: differentiable to any order, for any dtype and device.

These formulas are the oracle of the tests, the documentation of what the kernels compute, and the
``eager`` backend. float16 and bfloat16 are computed in float32 and rounded at the end.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


# ---- attention ----------------------------------------------------------------------------


def _philox_4x32(counter: tuple[Tensor, Tensor, Tensor, int], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, heads: int, Tq: int, Tk: int, dropout_p: float) -> Tensor:
    """Which attention weights dropout keeps: bool (heads, Tq, Tk), heads counted over the batch.

    Key j of query i in head h takes word j % 4 of Philox-4x32-10 at counter (j // 4, i, h, 0)
    under the key `seed` (int64 scalar); it is kept if the word is at least dropout_p * 2**32.
    The kernels compute the same words, so forward, backward and this formula agree.
    """

    def index(n):
        return torch.arange(n, dtype=torch.int64, device=seed.device)

    quads = (Tk + 3) // 4
    counter = (index(quads), index(Tq)[:, None], index(heads)[:, None, None])
    c0, c1, c2 = (c.expand(heads, Tq, quads) for c in counter)
    words = torch.stack(_philox_4x32((c0, c1, c2, 0), seed), dim=-1)
    return words.flatten(-2)[..., :Tk] >= int(dropout_p * 2.0**32)


WIDEST = 1 << 40  # of a window: with 64 bits' largest numbers sums would wrap


def band(Tq: int, Tk: int, is_causal: bool, window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Query i sees key j if i - lower <= j <= i + upper; None stands for no bound.

    is_causal aligns query 0 with key 0, window_size the last query with the last key.
    """
    left, right = (min(width, WIDEST) for width in window_size)
    lower = left - (Tk - Tq) if left >= 0 else None
    upper = right + (Tk - Tq) if right >= 0 else None
    if is_causal:
        upper = 0 if upper is None else min(0, upper)
    return lower, upper


class AuxRequest(NamedTuple):
    """torch.nn.attention.varlen.AuxRequest, without importing its module."""

    lse: bool = False


def is_causal_bias(mask) -> bool:
    """Whether it is a torch.nn.attention.bias.CausalBias: importing that class takes seconds."""
    return type(mask).__name__ == "CausalBias" and hasattr(mask, "variant")


def split_causal_bias(attn_mask, is_causal, window_size):
    """torch.nn.attention.bias.CausalBias as (attn_mask, is_causal, window_size)."""
    if is_causal_bias(attn_mask):
        if attn_mask.variant.name == "UPPER_LEFT":
            return None, True, window_size
        left, right = window_size
        return None, is_causal, (left, 0 if right < 0 else min(right, 0))
    return attn_mask, is_causal, window_size


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
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale * query key^T) + bias) value, the weights whole in memory.

    softcap(s) = c tanh(s / c). The bias of query i and key j is attn_mask (a bool one counts
    as 0 where True, -inf where False) - alibi_slopes |i + Tk - Tq - j|, and -inf outside of the
    band of is_causal and window_size. A row without any key gives 0. `sinks` joins the softmax
    as one more logit per head that has no value. Dropout draws `seed` from torch's generator
    unless it is given. Low precision is computed in float32. Shapes as in fastlm.functional.
    """
    attn_mask, is_causal, window_size = split_causal_bias(attn_mask, is_causal, window_size)
    dtype = query.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    Tq, Tk = query.size(-2), key.size(-2)
    scale = query.size(-1) ** -0.5 if scale is None and query.size(-1) > 0 else scale
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    if enable_gqa:
        k = k.repeat_interleave(q.size(-3) // k.size(-3), -3)
        v = v.repeat_interleave(q.size(-3) // v.size(-3), -3)

    logits = q @ k.mT * (1.0 if scale is None else scale)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    i = torch.arange(Tq, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(wide)[..., None, None] * (i + (Tk - Tq) - j).abs().to(wide)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=wide, device=q.device).masked_fill(
                ~attn_mask, -math.inf
            )
        logits = logits + attn_mask.to(wide)
    lower, upper = band(Tq, Tk, is_causal, window_size)
    if lower is not None:
        logits = logits.masked_fill(j < i - lower, -math.inf)
    if upper is not None:
        logits = logits.masked_fill(j > i + upper, -math.inf)

    if sinks is not None:
        sink = sinks.to(wide)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    # A row without any key: its logits are replaced before the softmax, so that no gradient of it is NaN.
    empty = (logits == -math.inf).all(-1, keepdim=True)
    safe = logits.masked_fill(empty, 0.0)
    weights = torch.softmax(safe, -1).masked_fill(empty, 0.0)[..., :Tk]
    if dropout_p > 0.0:
        seed = draw_seed() if seed is None else seed
        heads = math.prod(weights.shape[:-2])
        keep = dropout_keep(seed.to(weights.device), heads, Tq, Tk, dropout_p).view(weights.shape)
        weights = torch.where(keep, weights / (1.0 - dropout_p), 0.0) if dropout_p < 1.0 else weights * 0.0
    out = (weights @ v).to(dtype)
    if not return_lse:
        return out
    if safe.size(-1) == 0:
        return out, safe.sum(-1) - math.inf  # differentiable, as with keys
    return out, torch.logsumexp(safe, -1).masked_fill(empty.squeeze(-1), -math.inf)


def draw_seed() -> Tensor:
    """An int64 scalar from torch's default CPU generator."""
    return torch.randint(0, 2**63 - 1, (), device="cpu")


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One call of scaled_dot_product_attention per packed sequence. Shapes as in fastlm.functional."""
    q_ends = cu_seq_q.tolist()
    N, Hq = len(q_ends) - 1, query.size(1)
    k_ends = cu_seq_k.tolist() if cu_seq_k is not None else None
    out = query.new_zeros(*query.shape[:-1], value.size(-1))
    lse = query.new_full(
        (Hq, query.size(0)), -math.inf, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    # Tokens before the first sequence and behind the last belong to none; the empty sum keeps the
    # result a function of the inputs where there is no sequence at all.
    nothing = (query[:0].sum() + key[:0].sum() + value[:0].sum()).to(lse.dtype)
    outs, lses = [out[: q_ends[0]] + nothing.to(out.dtype)], [lse[:, : q_ends[0]] + nothing]
    for n in range(N):
        q = query[q_ends[n] : q_ends[n + 1]]
        if block_table is not None:
            length, pages = int(seqused_k[n]), block_table[n].long()
            used = pages[: -(-length // key.size(1))]
            k, v = key[used].flatten(0, 1)[:length], value[used].flatten(0, 1)[:length]
        else:
            begin = k_ends[n]
            end = k_ends[n + 1] if seqused_k is None else begin + int(seqused_k[n])
            k, v = key[begin:end], value[begin:end]
        o, l = scaled_dot_product_attention(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            scale=scale,
            enable_gqa=enable_gqa,
            window_size=window_size,
            return_lse=True,
        )
        outs.append(o.transpose(0, 1))
        lses.append(l)
    outs.append(out[q_ends[-1] :])
    lses.append(lse[:, q_ends[-1] :])
    out, lse = torch.cat(outs, 0), torch.cat(lses, 1)
    if return_aux is not None and return_aux.lse:
        return out, lse
    return out


# ---- gru ----------------------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gru_step(x: Tensor, h: Tensor, w_hh, b_hh, g_hh, update: Tensor | float) -> Tensor:
    """The state after one step: x is the input's share of the gates (B, 3H), h the state (B, H)."""
    y = h @ w_hh.t()
    if g_hh is not None:
        y = F.layer_norm(y, y.shape[-1:], g_hh)
    if b_hh is not None:
        y = y + b_hh
    xr, xz, xn = x.chunk(3, -1)
    yr, yz, yn = y.chunk(3, -1)
    r = torch.sigmoid(xr + yr)
    z = torch.sigmoid(xz + yz)
    n = torch.tanh(xn + r * yn)
    if isinstance(update, float) and update == 1.0:
        return n + z * (h - n)
    return h + update * (1 - z) * (n - h)


def gru_layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    weights: list[Tensor],
    has_biases: bool,
    layer_norm: bool,
    update: Tensor | None,
    zoneout: float,
) -> tuple[Tensor, Tensor]:
    """One layer of a GRU in one or both directions (the arguments are those of fastlm.ops.gru)::

        r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        n  = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        h' = h + u (1 - z) (n - h)

    u = 1 without zoneout: then h' = (1 - z) n + z h. With layer norm, W_i x and W_h h are normalised over their 3H values, and
    scaled by a gain, before the biases are added.
    """
    dtype, compute = input.dtype, compute_dtype(input.dtype)
    D, B, H = hx.shape
    rows = input.shape[:-1]
    sizes = [B] * input.shape[0] if batch_sizes is None else batch_sizes.tolist()
    x = input.to(compute).flatten(0, -2)
    weights = [w.to(compute) for w in weights]
    per_direction = len(weights) // D
    updates = None if update is None else update.to(compute).reshape(-1, D, H)

    outputs, finals = [], []
    for d in range(D):
        w_ih, w_hh, *rest = weights[d * per_direction : (d + 1) * per_direction]
        b_ih, b_hh = rest[:2] if has_biases else (None, None)
        g_ih, g_hh = rest[-2:] if layer_norm else (None, None)
        gates = x @ w_ih.t()
        if g_ih is not None:
            gates = F.layer_norm(gates, gates.shape[-1:], g_ih)
        if b_ih is not None:
            gates = gates + b_ih
        steps = gates.split(sizes)
        kept = [1.0 - zoneout] * len(sizes) if updates is None else updates[:, d].split(sizes)
        h0 = hx[d].to(compute)
        h = h0[: sizes[-1]] if d else h0
        states, ended = [], []
        for t in reversed(range(len(sizes))) if d else range(len(sizes)):
            if sizes[t] > h.shape[0]:  # backwards in time: sequences that end here begin
                h = torch.cat([h, h0[h.shape[0] : sizes[t]]])
            elif sizes[t] < h.shape[0]:
                ended.append(h[sizes[t] :])
                h = h[: sizes[t]]
            h = _gru_step(steps[t], h, w_hh, b_hh, g_hh, kept[t])
            states.append(h)
        outputs.append(torch.cat(states[::-1] if d else states))
        finals.append(torch.cat([h, *reversed(ended)]))
    output = torch.cat(outputs, -1) if D > 1 else outputs[0]
    return output.reshape(*rows, D * H).to(dtype), torch.stack(finals).to(dtype)


def gru_stack(
    layer, input, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional,
    zoneout, recurrent_dropout, layer_norm,
):  # fmt: skip
    """The layers of a GRU, each computed by `layer` (this module's gru_layer or the kernels'), with
    what is drawn at random: in each layer the dropped weights, then zoneout, then dropout. Dropout
    draws as in torch, so a seed gives the masks of torch.nn.GRU."""
    D = 2 if bidirectional else 1
    count = 4 if has_biases else 2
    finals = []
    for index in range(num_layers):
        weights = []
        for d in range(index * D, (index + 1) * D):
            w_ih, w_hh, *biases = params[d * count : (d + 1) * count]
            if train and recurrent_dropout > 0:
                w_hh = F.dropout(w_hh.contiguous(), recurrent_dropout)  # drawn in one order
            gains = layer_norm[2 * d : 2 * d + 2] if layer_norm is not None else ()
            weights += [w_ih, w_hh, *biases, *gains]
        update, kept = None, zoneout
        if train and zoneout > 0:
            size = (math.prod(input.shape[:-1]), D * hx.shape[-1])
            update = torch.empty(size, dtype=input.dtype, device=input.device).bernoulli_(1 - zoneout)
            kept = 0.0
        states = hx if num_layers == 1 else hx[index * D : (index + 1) * D]
        input, hn = layer(
            input, batch_sizes, states, weights, has_biases, layer_norm is not None, update, kept
        )
        finals.append(hn)
        if dropout > 0 and train and index + 1 < num_layers:
            input = F.dropout(input, dropout)
    return input, finals[0] if num_layers == 1 else torch.cat(finals)


def gru(*args, zoneout=0.0, recurrent_dropout=0.0, layer_norm=None):
    """fastlm.gru: the overload with batch_sizes has hx, not a list of weights, in the third place."""
    batch_sizes, batch_first = None, False
    if isinstance(args[2], Tensor):
        data, batch_sizes, *rest = args
    else:
        data, *rest, batch_first = args
    if batch_first:
        data = data.transpose(0, 1)
    output, hn = gru_stack(gru_layer, data, batch_sizes, *rest, zoneout, recurrent_dropout, layer_norm)
    return output.transpose(0, 1) if batch_first else output, hn


def gru_cell(
    input, hx, w_ih, w_hh, b_ih=None, b_hh=None, *, zoneout=0.0, recurrent_dropout=0.0,
    layer_norm=None, training=True,
):  # fmt: skip
    """fastlm.gru_cell: one step of gru."""
    return gru_cell_stack(
        gru_layer, input, hx, w_ih, w_hh, b_ih, b_hh, zoneout, recurrent_dropout, layer_norm, training
    )


def gru_cell_stack(
    layer, input, hx, w_ih, w_hh, b_ih, b_hh, zoneout, recurrent_dropout, layer_norm, training
):
    """A cell as a GRU of one layer and one step. Its last states, of which the backward takes nothing, may
    be changed in place as those of torch.nn.GRUCell."""
    biases = [] if b_ih is None and b_hh is None else [
        b if b is not None else w_ih.new_zeros(w_ih.shape[0]) for b in (b_ih, b_hh)
    ]  # fmt: skip
    _, hn = gru_stack(
        layer, input.unsqueeze(0), None, hx.unsqueeze(0), [w_ih, w_hh, *biases], len(biases) > 0, 1, 0.0,
        training, False, zoneout, recurrent_dropout, layer_norm,
    )  # fmt: skip
    return hn.squeeze(0)


# ---- cross_entropy ------------------------------------------------------------------------


def cross_entropy_formula(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp in the compute dtype: float32 for float16 and bfloat16."""
    classes = 0 if input.dim() == 1 else 1
    x = input.float() if input.dtype in LOW_PRECISION else input
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    log_p = torch.log_softmax(x, classes)
    lse = torch.logsumexp(x, classes)
    C = x.shape[classes]
    if weight is None:
        per_class = None
    else:
        weight = weight.to(x.dtype)
        per_class = weight.reshape(-1, *[1] * (x.dim() - classes - 1))
        log_p_weighted = log_p * per_class

    if target.shape == input.shape:  # probabilities
        q = target.to(x.dtype)
        if label_smoothing:
            q = q * (1 - label_smoothing) + label_smoothing / C
        loss = -(q * (log_p if weight is None else log_p_weighted)).sum(classes)
        kept = None
        denominator = loss.numel()
    else:
        target = target.long()
        if target.dim() == x.dim():  # an unbatched target of shape (1,)
            target = target.squeeze(0)
        kept = target != ignore_index
        y = torch.where(kept, target, 0)
        w = torch.ones_like(y, dtype=x.dtype) if weight is None else weight[y]
        loss = -w * log_p.gather(classes, y.unsqueeze(classes)).squeeze(classes)
        if label_smoothing:
            smooth = -(log_p if weight is None else log_p_weighted).sum(classes)
            loss = (1 - label_smoothing) * loss + label_smoothing / C * smooth
        denominator = torch.where(kept, w, 0).sum()
    if z_loss:
        loss = loss + z_loss * lse.square()
    if kept is not None:
        loss = torch.where(kept, loss, 0)
    if reduction == "mean":
        # Zero tokens give nan, as 0 / 0 does.
        loss = loss.sum() / denominator if loss.numel() else loss.sum() * float("nan")
    elif reduction == "sum":
        loss = loss.sum()
    return loss, lse


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
    """Softmax cross-entropy: see :func:`fastlm.cross_entropy`."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    dtype = input.dtype
    if target.shape == input.shape and target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if dtype in LOW_PRECISION and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    loss, lse = cross_entropy_formula(
        input.to(dtype) if dtype not in LOW_PRECISION else input,
        target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss


# ---- linear -------------------------------------------------------------------------------

_ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """activation(x W^T + b) for x (..., K), W (N, K), b (N)."""
    dtype = input.dtype
    if dtype in LOW_PRECISION:
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    y = input @ weight.t()
    return _ACTIVATIONS[activation](y if bias is None else y + bias).to(dtype)


# ---- linear_cross_entropy -----------------------------------------------------------------


def linear_cross_entropy_formula(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp in the compute dtype, in which the logits are too."""
    if input.dtype in LOW_PRECISION:
        input, linear_weight = input.float(), linear_weight.float()
        linear_bias = None if linear_bias is None else linear_bias.float()
    flat_bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), flat_bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return cross_entropy_formula(
        logits, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap
    )


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
    """Cross-entropy of a linear layer's output: see :func:`fastlm.linear_cross_entropy`."""
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        low = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(low), linear_weight.to(low)
        linear_bias = None if linear_bias is None else linear_bias.to(low)
        dtype = torch.float32
    loss, lse = linear_cross_entropy_formula(
        input, linear_weight, target, linear_bias, weight, reduction,
        -100 if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
    loss = loss.to(dtype)
    return (loss, lse) if return_lse else loss
