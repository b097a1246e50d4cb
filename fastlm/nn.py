"""Drop-in modules: constructor, attributes, state_dict and repr as in torch.nn."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter, init
from torch.nn.utils.rnn import PackedSequence

from fastlm import functional
from fastlm.functional.gru import check_probability

__all__ = [
    "CrossEntropyLoss",
    "Embedding",
    "GELU",
    "GRU",
    "GRUCell",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
]

# ---- MultiheadAttention -------------------------------------------------------------------


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on fused attention.

    Constructor, attributes, parameters, `state_dict` and `repr` are those of
    torch.nn.MultiheadAttention, of which this is a subclass. With `need_weights=False` the
    heads run through `fastlm.scaled_dot_product_attention`, straight from the packed
    projection and without a (L, S) matrix. `need_weights=True` asks for that very matrix,
    so torch's own formula computes it and the output from it.

    Source: Vaswani et al. 2017, section 3.2.2.
    """

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
        """Attention of `query` over `key` and `value`, projected in and out.

        query: (L, N, E), (N, L, E) if batch_first, (L, E) unbatched; key: (S, N, kdim) and
        value: (S, N, vdim) alike. key_padding_mask: (N, S) or (S,); attn_mask: (L, S) or
        (N * num_heads, L, S); boolean (True: do not attend) or floating (added to the scores).
        is_causal: a hint that attn_mask is causal, which then isn't read.

        Returns the output, of query's shape with embed_dim last, and the weights, (N, L, S)
        averaged over the heads or (N, num_heads, L, S); None without need_weights.
        Raises AssertionError and RuntimeError as torch.nn.MultiheadAttention does.
        """
        tensors = (query, key, value, key_padding_mask, attn_mask)
        if need_weights or query.is_nested or torch.overrides.has_torch_function(tensors):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "fastlm.nn.MultiheadAttention: is_causal is a hint about attn_mask, "
                "so it needs an attn_mask; got None"
            )
        if is_causal and key_padding_mask is None:
            attn_mask = None  # the hint says all of it
        else:
            is_causal = False
        if not is_batched:
            batch_dim = 0 if self.batch_first else 1
            query, key, value = _unsqueeze_same(batch_dim, query, key, value)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        self._check_sizes(query, key, value)

        seq_dim = 1 if self.batch_first else 0
        q, k, v = self._project_in(query, key, value)  # each (N, L|S, E) or (L|S, N, E)
        rows = k.shape[seq_dim]
        if self.bias_k is not None:
            k = torch.cat([k, _row(self.bias_k, k, seq_dim)], dim=seq_dim)
            v = torch.cat([v, _row(self.bias_v, v, seq_dim)], dim=seq_dim)
        if self.add_zero_attn:
            k = torch.cat([k, torch.zeros_like(k.narrow(seq_dim, 0, 1))], dim=seq_dim)
            v = torch.cat([v, torch.zeros_like(v.narrow(seq_dim, 0, 1))], dim=seq_dim)
        q, k, v = (self._split_heads(x) for x in (q, k, v))  # each (N, H, L|S, E/H), a view
        extra = k.shape[2] - rows
        mask = self._merge(attn_mask, key_padding_mask, q, rows, extra)
        out = functional.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal
        )
        out = out.permute(0, 2, 1, 3) if self.batch_first else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (out if is_batched else out.squeeze(batch_dim)), None

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = "fastlm.nn.MultiheadAttention"
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"{name}: query has embedding dimension {query.shape[-1]}, expected {self.embed_dim}"
            )
        if self._qkv_same_embed_dim:
            same = key.shape == value.shape
        else:
            same = key.shape[:2] == value.shape[:2]
        if not same:
            raise AssertionError(
                f"{name}: key has shape {tuple(key.shape)}, which does not fit value's {tuple(value.shape)}"
            )
        batch_dim = 0 if self.batch_first else 1
        if query.shape[batch_dim] != key.shape[batch_dim]:
            raise RuntimeError(
                f"{name}: query has batch size {query.shape[batch_dim]}, key {key.shape[batch_dim]}"
            )

    def _project_in(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three projections, as views of one product where their inputs are one tensor."""
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        elif key is value:
            w_q, w_kv = self.in_proj_weight.split((self.embed_dim, 2 * self.embed_dim))
            b_q, b_kv = None, None
            if self.in_proj_bias is not None:
                b_q, b_kv = self.in_proj_bias.split((self.embed_dim, 2 * self.embed_dim))
            return [F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, dim=-1)]
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _split_heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        q: Tensor,
        rows: int,
        extra: int,
    ) -> Tensor | None:
        """One mask for scaled_dot_product_attention, broadcastable to (N, H, L, S + extra).

        The `extra` keys of add_bias_kv and add_zero_attn are open to every query. Boolean
        masks stay boolean (True: attend, as that function has it), else -inf is added.
        """
        name = "fastlm.nn.MultiheadAttention"
        batch, heads, length, _ = q.shape
        if attn_mask is not None:
            expected = (length, rows) if attn_mask.dim() == 2 else (batch * heads, length, rows)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"{name}: attn_mask has shape {tuple(attn_mask.shape)}, expected {expected}"
                )
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(batch, heads, length, rows)
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, rows):
                raise AssertionError(
                    f"{name}: key_padding_mask has shape {tuple(key_padding_mask.shape)}, "
                    f"expected {(batch, rows)}"
                )
            key_padding_mask = key_padding_mask.view(batch, 1, 1, rows)
        masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
        if not masks:
            return None
        for mask in masks:
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"{name}: masks must be bool or floating, got {mask.dtype}")
        if any(mask.is_floating_point() for mask in masks):
            masks = [_additive(mask, q.dtype) for mask in masks]
            merged = masks[0] if len(masks) == 1 else masks[0] + masks[1]
            return F.pad(merged, (0, extra))
        merged = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return F.pad(merged.logical_not(), (0, extra), value=True)


def _unsqueeze_same(dim: int, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Adds a dimension to each; what was one tensor stays one tensor."""
    q = query.unsqueeze(dim)
    k = q if key is query else key.unsqueeze(dim)
    v = k if value is key else value.unsqueeze(dim)
    return [q, k, v]


def _row(bias: Tensor, like: Tensor, seq_dim: int) -> Tensor:
    """The (1, 1, E) bias as one more row of `like` along seq_dim."""
    return bias.expand_as(like.narrow(seq_dim, 0, 1)).to(like.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


# ---- gru ----------------------------------------------------------------------------------


def _gru_repr(module, text: str) -> str:
    for name in ("zoneout", "recurrent_dropout", "layer_norm"):
        if getattr(module, name):
            text += f", {name}={getattr(module, name)}"
    return text


class GRU(torch.nn.RNNBase):
    """:class:`torch.nn.GRU`, run by :func:`fastlm.functional.gru`: forward and backward are fused, and it
    can be compiled with ``torch.compile(fullgraph=True)`` and exported.

    Constructor, attributes, ``state_dict`` and ``repr`` are those of :class:`torch.nn.GRU`, and a
    checkpoint of either loads into the other. It derives from :class:`torch.nn.RNNBase` and not from
    :class:`torch.nn.GRU`, because torch.compile refuses every instance of the latter.

    Beyond the arguments of :class:`torch.nn.GRU`, and keyword-only:

    Args:
        zoneout (float): probability in [0, 1] that a unit keeps its state at a step.
        recurrent_dropout (float): in [0, 1], dropped share of the recurrent weights, drawn once per call.
        layer_norm (bool): layer norms in the gates, with gains ``norm_ih_l[k]`` and ``norm_hh_l[k]``
            (and ``..._reverse``) of shape ``(3 * hidden_size)`` that start at 1.

    Inputs and outputs are those of :class:`torch.nn.GRU`: ``input`` (T, B, I), (B, T, I) with `batch_first`,
    (T, I) or a packed sequence, and ``hx`` (L D, B, H) or (L D, H); ``output``, as the input with D H features,
    and ``hn``, as hx. float64, float32, bfloat16 or float16. Formulas and sources stand with the function.

    Raises:
        ValueError: a probability outside of [0, 1]; an input of another number of dimensions; `proj_size`.
        RuntimeError: sizes, dtypes or devices that do not fit.
    """

    # Those of torch.nn, from which fastlm.convert makes instances without a constructor.
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    layer_norm: bool = False
    _norm_names: list[str] = []

    def __init__(self, *args, zoneout=0.0, recurrent_dropout=0.0, layer_norm=False, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self._norm_names: list[str] = []
        super().__init__("GRU", *args, **kwargs)
        self.zoneout = check_probability("nn.GRU", "zoneout", zoneout)
        self.recurrent_dropout = check_probability("nn.GRU", "recurrent_dropout", recurrent_dropout)
        self.layer_norm = bool(layer_norm)
        if not self.layer_norm:
            return
        like = self.weight_hh_l0
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]:
                for kind in ("ih", "hh"):
                    name = f"norm_{kind}_l{layer}{suffix}"
                    gain = torch.ones(3 * self.hidden_size, dtype=like.dtype, device=like.device)
                    setattr(self, name, Parameter(gain))
                    self._norm_names.append(name)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self._norm_names:
            init.ones_(getattr(self, name))

    def extra_repr(self) -> str:
        return _gru_repr(self, super().extra_repr())

    def check_forward_args(self, input: Tensor, hidden: Tensor, batch_sizes: Tensor | None) -> None:
        """As torch's, without reading the batch sizes: :func:`fastlm.functional.gru` checks these."""
        self.check_input(input, batch_sizes)
        if batch_sizes is None:
            self.check_hidden_size(hidden, self.get_expected_hidden_size(input, None))

    def _start(self, data: Tensor, batch: int) -> Tensor:
        D = 2 if self.bidirectional else 1
        return torch.zeros(self.num_layers * D, batch, self.hidden_size, dtype=data.dtype, device=data.device)

    def _run(self, data_and_states: tuple[Tensor, ...], *batch_first: bool) -> tuple[Tensor, Tensor]:
        # Looked up by name: right under functional_call, parametrizations and torch.compile.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        gains = [getattr(self, name) for name in self._norm_names] if self.layer_norm else None
        return functional.gru(
            *data_and_states, weights, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, *batch_first, zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout, layer_norm=gains,
        )  # fmt: skip

    def forward(self, input, hx=None):
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            also = "also be 3-D" if batched else "also be 2-D"
            raise RuntimeError(f"For {kind} input, hx should {also} but got {hx.dim()}-D tensor")
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = hx.unsqueeze(1) if hx is not None else None
        if hx is None:
            hx = self._start(input, input.shape[batch_dim])
        self.check_forward_args(input, hx, None)
        output, hn = self._run((input, hx), self.batch_first)
        if not batched:
            output, hn = output.squeeze(batch_dim), hn.squeeze(1)
        return output, hn

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            # Under torch.compile the values of batch_sizes are not known, the shape of the indices is.
            batch = batch_sizes[0].item() if sorted_indices is None else sorted_indices.shape[0]
            hx = self._start(data, batch)
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(data, hx, batch_sizes)
        output, hn = self._run((data, batch_sizes, hx))
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(hn, unsorted_indices)


class GRUCell(torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell`, run by :func:`fastlm.functional.gru_cell`.

    Beyond the arguments of :class:`torch.nn.GRUCell`, and keyword-only:

    Args:
        zoneout (float): probability in [0, 1] that a unit keeps its state.
        recurrent_dropout (float): in [0, 1], dropped share of the recurrent weights, drawn at every call.
        layer_norm (bool): layer norms in the gates, with gains ``norm_ih`` and ``norm_hh`` of shape
            ``(3 * hidden_size)`` that start at 1.

    Inputs and output are those of :class:`torch.nn.GRUCell`: ``input`` (B, I) or (I), ``hx`` and the new state
    (B, H) or (H). Constructor, attributes, ``state_dict`` and ``repr`` are its too.

    Raises:
        ValueError: a probability outside of [0, 1]; an input or state of another number of dimensions.
        RuntimeError: sizes, dtypes or devices that do not fit.
    """

    __constants__ = [*torch.nn.GRUCell.__constants__, "zoneout", "recurrent_dropout", "layer_norm"]

    # Those of torch.nn, from which fastlm.convert makes instances without a constructor.
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    layer_norm: bool = False

    def __init__(self, *args, zoneout=0.0, recurrent_dropout=0.0, layer_norm=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.zoneout = check_probability("nn.GRUCell", "zoneout", zoneout)
        self.recurrent_dropout = check_probability("nn.GRUCell", "recurrent_dropout", recurrent_dropout)
        self.layer_norm = bool(layer_norm)
        if self.layer_norm:
            like = self.weight_hh
            for name in ("norm_ih", "norm_hh"):
                gain = torch.ones(like.shape[0], dtype=like.dtype, device=like.device)
                setattr(self, name, Parameter(gain))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in ("norm_ih", "norm_hh"):
            if hasattr(self, name):
                init.ones_(getattr(self, name))

    def extra_repr(self) -> str:
        return _gru_repr(self, super().extra_repr())

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        for name, x in (("input", input), ("hidden", hx)):
            if x is not None and x.dim() not in (1, 2):
                raise ValueError(f"GRUCell: Expected {name} to be 1D or 2D, got {x.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = hx.unsqueeze(0) if hx is not None else None
        if hx is None:
            hx = input.new_zeros(input.shape[0], self.hidden_size)
        gains = (self.norm_ih, self.norm_hh) if self.layer_norm else None
        output = functional.gru_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh,
            zoneout=self.zoneout, recurrent_dropout=self.recurrent_dropout, layer_norm=gains,
            training=self.training,
        )  # fmt: skip
        return output if batched else output.squeeze(0)


# ---- CrossEntropyLoss ---------------------------------------------------------------------


def _loss_repr(module) -> list[str]:
    """What fastlm adds to torch's constructor, where it is in use."""
    defaults = {"z_loss": 0.0, "softcap": 0.0, "return_lse": False}
    return [f"{k}={getattr(module, k)}" for k, v in defaults.items() if getattr(module, k) != v]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on :func:`fastlm.cross_entropy`.

    Constructor, attributes, `state_dict` and `repr` are those of torch.nn.CrossEntropyLoss, of which
    this is a subclass; `z_loss`, `softcap` and `return_lse` are keyword-only additions, described
    with the function, as are shapes, dtypes and errors.
    """

    z_loss: float = 0.0
    softcap: float = 0.0
    return_lse: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.return_lse = return_lse

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, and with `return_lse` the log-sum-exp of each token."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            return_lse=self.return_lse,
        )

    def extra_repr(self) -> str:
        return ", ".join(_loss_repr(self))


# ---- LinearCrossEntropyLoss ---------------------------------------------------------------

# torch has the module from 2.13 on.
_LinearLoss = getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.modules.loss._WeightedLoss)


def only_multiplies(layer: torch.nn.Module) -> bool:
    """Whether a linear layer's parameters say all that calling it does."""
    hooks = (
        layer._forward_pre_hooks,
        layer._forward_hooks,
        layer._backward_pre_hooks,
        layer._backward_hooks,
    )
    forward = getattr(layer.forward, "__func__", None)
    return forward in (torch.nn.Linear.forward, Linear.forward) and not any(hooks)


class LinearCrossEntropyLoss(_LinearLoss):
    """torch.nn.LinearCrossEntropyLoss on :func:`fastlm.linear_cross_entropy`.

    A linear layer, `self.linear`, and the cross-entropy of its output, which is never held whole; unless
    something waits for the layer's call, which is then made: hooks (Opacus's gradients per sample, FSDP), or
    a layer of another class in its place (adapters).
    Constructor, attributes, `state_dict` and `repr` are those of torch.nn.LinearCrossEntropyLoss
    (a subclass of it where torch has one); `z_loss`, `softcap` and `return_lse` are additions.

    Args:
        in_features (int): D of input (D) or (N, D).
        num_classes (int): C.
        out_features (tuple of int): (d1, ..., dK) of a K-dimensional loss; `self.linear` has
            C * d1 * ... * dK outputs.
        bias (bool): whether the linear layer has one. Default: False.
        weight (Tensor, optional): a weight per class, (C).
        reduction, ignore_index, label_smoothing, options, z_loss, softcap, return_lse: as for the
            function.

    Raises:
        RuntimeError: a weight of another shape, label_smoothing outside [0, 1].
    """

    __constants__ = ["num_classes", "out_features", "reduction", "ignore_index", "label_smoothing"]
    z_loss: float = 0.0
    softcap: float = 0.0
    return_lse: bool = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object | None = None,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        return_lse: bool = False,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        torch.nn.modules.loss._WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = torch.nn.Linear(
            in_features,
            math.prod(out_features, start=num_classes),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.return_lse = return_lse

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, and with `return_lse` the log-sum-exp of each token."""
        shape = (self.num_classes, *self.out_features)
        options = {
            "weight": self.weight,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "return_lse": self.return_lse,
        }
        if not only_multiplies(self.linear):
            ignored = -100 if self.ignore_index is None else self.ignore_index
            logits = self.linear(input).unflatten(-1, shape)
            return functional.cross_entropy(logits, target, ignore_index=ignored, **options)
        bias = self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            ignore_index=self.ignore_index,
            options=self.options,
            **options,
        )

    def extra_repr(self) -> str:
        fields = [
            f"in_features={self.linear.in_features}",
            f"num_classes={self.num_classes}",
            f"out_features={self.out_features}",
            f"bias={self.linear.bias is not None}",
            f"reduction={self.reduction}",
            f"ignore_index={self.ignore_index}",
            f"label_smoothing={self.label_smoothing}",
            f"options={self.options}",
        ]
        return ", ".join(fields + _loss_repr(self))


# ---- Linear -------------------------------------------------------------------------------


class Linear(torch.nn.Linear):
    """torch.nn.Linear on :func:`fastlm.linear`: y = x W^T + b, x (..., in_features), y (..., out_features).

    Constructor, attributes, parameters (`weight` (out_features, in_features), `bias` (out_features) or
    None), initialisation, `state_dict` and `repr` are those of torch.nn.Linear, of which this is a subclass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output; errors are those of the function."""
        return functional.linear(input, self.weight, self.bias)


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding on :func:`fastlm.embedding`: rows of `weight` (num_embeddings, embedding_dim).

    Constructor, attributes, parameters, initialisation, `state_dict` and `repr` are those of torch.nn.Embedding,
    of which this is a subclass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input (...) of int64 or int32 to (..., embedding_dim); errors are those of the function."""
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class GELU(torch.nn.GELU):
    """torch.nn.GELU on :func:`fastlm.gelu`.

    Constructor, attributes and `repr` are those of torch.nn.GELU, of which this is a subclass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input (...) to the same shape; errors are those of the function."""
        return functional.gelu(input, approximate=self.approximate)


# ---- TorchScript ---------------------------------------------------------------------------

_ADDED = {"zoneout": 0.0, "recurrent_dropout": 0.0, "layer_norm": False, "z_loss": 0.0, "softcap": 0.0,
          "return_lse": False}  # fmt: skip


def _scripted(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.jit.script compiles, and leaves in the model, in the place of a module of ours, whose functions
    it can't read: torch's of the same state. A subclass may compute something else, and is compiled as it is."""
    kind = type(module)
    name = kind.__name__
    if kind.__module__ != __name__ or not hasattr(torch.nn, name):
        return module
    for option, default in _ADDED.items():
        if getattr(module, option, default) != default:
            raise RuntimeError(f"fastlm.nn.{name}: torch.nn.{name}, which TorchScript takes, has no {option}")
    twin = getattr(torch.nn, name)
    twin = twin.__new__(twin)
    twin.__dict__ = {k: v for k, v in vars(module).items() if k not in _ADDED and k != "_norm_names"}
    return twin


for _name in __all__:
    globals()[_name].__prepare_scriptable__ = _scripted
