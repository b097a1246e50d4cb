"""Models of the transformers library on fastlm.

    import fastlm.integrations.transformers as on_fastlm

    model = AutoModelForCausalLM.from_pretrained(...)
    on_fastlm.apply(model)  # attention and loss on fastlm's operators
    ...                     # Trainer, generate, PEFT as before
    on_fastlm.restore(model)

Attention: importing this module registers "fastlm" with the library's AttentionInterface and
AttentionMaskInterface, so that ``attn_implementation="fastlm"`` is known to from_pretrained and from_config.
Of a mask only what cannot be said otherwise is held: causality, sliding windows, the offset of a cache and
packed sequences are arguments of the operators, padding is a row of booleans per sequence. Keys and values
are never repeated for the queries that share them. Softcaps, sinks and position biases are fused.

Loss: the output layer returns `Logits` that are made when something reads them. A model's own forward
computes its loss as ever, with whatever shift, ignored labels, `num_items_in_batch` and auxiliary losses it
has, and where it calls F.cross_entropy, `fastlm.linear_cross_entropy` runs instead, on hidden states.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.configuration_utils import PreTrainedConfig

from fastlm.functional import scaled_dot_product_attention, varlen_attn
from fastlm.integrations.deferred import Deferred, defer, undo

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # before 5.2: models hand output_attentions on
    _active_collector = None

NAME = "fastlm"

# ---- masks --------------------------------------------------------------------------------


class Structure(NamedTuple):
    """Query at position p sees keys at p - left to p + right (None: no bound), of its own sequence."""

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None  # (B, T), equal where positions belong to one packed sequence


def _tightest(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _structure(mask_function) -> Structure | None:
    """What a mask function of the library's says, or None if it is one that we don't know."""
    if mask_function is masking_utils.causal_mask_function:
        return Structure(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Structure()
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    held = inspect.getclosurevars(mask_function).nonlocals
    match mask_function.__qualname__.partition(".")[0]:
        case "and_masks":
            result = Structure()
            for part in map(_structure, held["mask_functions"]):
                if part is None or (part.sequences is not None and result.sequences is not None):
                    return None
                result = Structure(
                    _tightest(result.left, part.left),
                    _tightest(result.right, part.right),
                    part.sequences if result.sequences is None else result.sequences,
                )
            return result
        case "sliding_window_overlay":
            return Structure(left=held["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return Structure(left=held["sliding_window"], right=held["sliding_window"])
        case "packed_sequence_mask_function":
            return Structure(sequences=held["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            # Positions within a sequence follow each other, so their distances are those of the indices;
            # the library never uses this without the mask that keeps sequences apart.
            return _structure(held["mask_function"])
    return None


class Mask(Deferred):
    """A boolean (B, 1, Tq, Tk) as its structure and the keys that are not padding; made when read."""

    @staticmethod
    def make(shape, device, structure: Structure, offset: int, padding: Tensor | None, build) -> Mask:
        mask = Mask(shape, torch.bool, device)
        mask.structure = structure
        mask.offset = offset  # query i is at the position of key i + offset
        mask.padding = padding  # (B, Tk), True for keys to be seen
        mask._build = functools.cache(build)
        mask._bounds = None
        return mask

    def dense(self) -> Tensor:
        return self._build()

    def _take(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name == "to" and not kwargs and args in ((self.device,), (self.dtype,)):
            return self
        return super()._take(name, args, kwargs)

    def bounds(self) -> tuple[Tensor, int]:
        """Where packed sequences begin and the last one ends, int32, and the length of the longest."""
        if self._bounds is None:
            ids = self.structure.sequences
            first = torch.ones_like(ids, dtype=torch.bool)
            first[:, 1:] = ids[:, 1:] != ids[:, :-1]
            starts = first.flatten().nonzero().flatten().int()
            ends = torch.cat([starts, starts.new_tensor([ids.numel()])])
            self._bounds = ends, int(ends.diff().max())
        return self._bounds


def fastlm_mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **arguments,
) -> Tensor | None:
    """The mask of a forward, as the library's `sdpa_mask`: None where the operators need none.

    A `Mask` where structure and padding say it all; the library's own (B, 1, Tq, Tk) for the single query of
    a decoding step, for patterns that are neither causal, nor a window, nor packed sequences (chunks, blocks
    of an image, a caller's own function), and inside compiled programs.
    """
    if "cache_position" in arguments:  # earlier 5.x: positions of the queries instead of an offset
        position = arguments["cache_position"]
        q_length, q_offset, device = position.shape[0], position[0], position.device
    else:
        q_length, q_offset = arguments["q_length"], arguments.get("q_offset", 0)
        arguments["device"] = device
    build = functools.partial(
        masking_utils.sdpa_mask, batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **arguments,
    )  # fmt: skip
    library = functools.partial(
        build, allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
    )  # fmt: skip
    if _is_tracing(attention_mask):
        plain = mask_function is masking_utils.causal_mask_function and attention_mask is None
        if plain and allow_is_causal_skip and isinstance(q_offset, int) and q_offset == kv_offset == 0:
            return None
        return library()
    structure = _structure(mask_function)
    if q_length == 1 or structure is None or (attention_mask is not None and attention_mask.dim() != 2):
        return library()
    offset = int(q_offset) - kv_offset
    left, right, sequences = structure
    seen = kv_length if right is None else min(kv_length, q_length + offset + right)
    padding = attention_mask
    if padding is not None:
        padding = masking_utils.prepare_padding_mask(padding, kv_length, kv_offset).to(torch.bool)
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if padding[:, :seen].all():
            padding = None
    if padding is None and sequences is None and (left is None or left >= q_length - 1 + offset):
        if allow_is_causal_skip and right == 0 and offset == 0:
            return None
        if allow_is_bidirectional_skip and (right is None or right >= kv_length - 1 - offset):
            return None
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(device)
    dense = functools.partial(build, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return Mask.make(shape, device, structure, offset, padding, dense)


def _is_tracing(x: Tensor | None) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or isinstance(x, torch._subclasses.fake_tensor.FakeTensor)
    )


# ---- attention ----------------------------------------------------------------------------

# Arguments that some models pass on to their own functions and that change the result.
_REFUSED = {
    "output_attentions": "attention weights, which never exist here",
    "cache": "the paged cache of continuous batching",
    "indices": "the keys that a sparse attention selects",
    "block_indices": "the blocks that a sparse attention selects",
    "sinks": "a sink per query",
}


def fastlm_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as the library's AttentionInterface wants it.

    Args:
        module: its `is_causal` holds where neither mask nor `is_causal` are given.
        query, key, value: (B, Hq, Tq, D), (B, H, Tk, D), (B, H, Tk, Dv); H divides Hq.
        attention_mask: None, a `Mask`, or a tensor that says all there is to say: boolean, True for what is
            seen, or added to the scores.
        sliding_window: used where the mask is None; a mask holds its window.
        s_aux: (Hq), sinks.
        position_bias: added to the scores, broadcast to (B, Hq, Tq, Tk), differentiable.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as FlashAttention has
            them; used unless a mask keeps the sequences apart already.

    Returns:
        (B, Tq, Hq, Dv), and None for the weights.

    Raises:
        ValueError: for attention weights and for arguments of a model that this has no answer to.
    """
    if _weights_are_collected():
        kwargs["output_attentions"] = True
    for name, what in _REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"fastlm attention of {type(module).__name__}: {name} asks for {what}; "
                "use the eager attention: model.set_attn_implementation('eager')"
            )
    options = {"dropout_p": dropout, "scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    Tq, Tk = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Mask) and attention_mask.shape[2:] != (Tq, Tk):
        attention_mask = attention_mask.dense()
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        return _attend(query, key, value, _biased(attention_mask, position_bias), (-1, -1), options), None

    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and (Tq > 1 or cu_seq_lens_q is not None)
        # Query 0 is at key 0, but for the single query of a decoding step, which is at the last key.
        structure, padding = Structure(right=0 if causal else None), None
        offset = 0 if causal else Tk - Tq
        if sliding_window is not None:
            structure = structure._replace(left=sliding_window - 1)
            if not causal:
                structure = structure._replace(right=sliding_window - 1)
    else:
        structure, padding = attention_mask.structure, attention_mask.padding
        offset = attention_mask.offset
    left, right, sequences = structure

    if sequences is not None or cu_seq_lens_q is not None:
        if sequences is not None:
            ends, longest = attention_mask.bounds()
            packing = (ends, ends, longest, longest)
        else:
            packing = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if position_bias is not None or padding is not None or any(x is None for x in packing):
            raise ValueError(
                f"fastlm attention of {type(module).__name__}: packed sequences need cu_seq_lens_q, "
                "cu_seq_lens_k, max_length_q and max_length_k, and neither padding nor a position bias"
            )
        window = tuple(-1 if side is None else side for side in (left, right))
        return _attend_packed(query, key, value, packing, window, options), None

    # Keys behind the last that any query sees (room in a static cache) are left out, which aligns the last
    # query with the last key, as window_size wants it.
    seen = Tk if right is None else min(Tk, Tq + offset + right)
    if seen < Tk:
        key, value = key[:, :, :seen], value[:, :, :seen]
        padding = None if padding is None else padding[:, :seen]
        position_bias = position_bias if position_bias is None else position_bias[..., :seen]
    mask = None if padding is None else padding[:, None, None, :]
    shift = offset - (seen - Tq)
    if left is not None and left < shift:  # a last query beyond the window of the last key
        i = torch.arange(offset, offset + Tq, device=query.device)[:, None]
        band = torch.arange(seen, device=query.device) >= i - left
        mask, left = band if mask is None else mask & band, None
    window = (-1 if left is None else left - shift, -1 if right is None else right + shift)
    return _attend(query, key, value, _biased(mask, position_bias), window, options), None


def _weights_are_collected() -> bool:
    """Whether attention weights were asked for in a model that does not tell its layers."""
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in _active_collector.get() or ())


def _biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask for both."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask


def _attend(query, key, value, mask, window, options) -> Tensor:
    out = scaled_dot_product_attention(
        query, key, value, mask, enable_gqa=query.shape[1] != key.shape[1], window_size=window,
        **options,
    )  # fmt: skip
    return out.transpose(1, 2)


def _attend_packed(query, key, value, packing, window, options) -> Tensor:
    """Each sequence for itself: (B, Hq, T, D) hold them one behind the other, through the rows of B."""
    B, _, T, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if not options["dropout_p"] and not options["softcap"] and options["sinks"] is None:
        starts_q, starts_k, longest_q, longest_k = packing
        out = varlen_attn(
            q, k, v, starts_q, starts_k, int(longest_q), int(longest_k), scale=options["scale"],
            window_size=window, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.unflatten(0, (B, T))
    queries, keys = ([*zip(x.tolist(), x[1:].tolist(), strict=False)] for x in packing[:2])
    parts = [
        _attend(*(x[None, a:b].transpose(1, 2) for x, a, b in ((q, *i), (k, *j), (v, *j))), None, window, options)[0]
        for i, j in zip(queries, keys, strict=True)
    ]  # fmt: skip
    return torch.cat(parts).unflatten(0, (B, T))


AttentionInterface.register(NAME, fastlm_attention)
AttentionMaskInterface.register(NAME, fastlm_mask)

# ---- apply and restore --------------------------------------------------------------------

_STATE = "_fastlm_applied"


def _models(model: torch.nn.Module, function: str) -> list[PreTrainedModel]:
    """The library's models in a module, none inside another of these."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"fastlm.integrations.transformers.{function}: model is a {type(model).__name__}, "
            "expected a transformers.PreTrainedModel or a module that contains one (PEFT, DDP)"
        )
    if isinstance(model, PreTrainedModel):
        return [model]
    return [x for child in model.children() for x in _models(child, function)]


def _own_configs(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, PreTrainedConfig, dict]]:
    """Give the model copies of its configurations, which other models may share.

    Values that are no configurations stay shared. Returns (original, copy, the copy's values) for each.
    """
    copies: dict[int, tuple] = {}

    def own(config):
        if id(config) not in copies:
            twin = copy.copy(config)
            copies[id(config)] = config, twin
            for name, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    vars(twin)[name] = own(value)
        return copies[id(config)][1]

    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = own(value)
    return [(config, twin, dict(vars(twin))) for config, twin in copies.values()]


def _return_configs(model: PreTrainedModel, configs: list[tuple]) -> None:
    """Put the originals back, with what was changed since in the copies."""
    originals = {id(twin): config for config, twin, _ in configs}

    def original(value):
        return originals.get(id(value), value)

    for config, twin, before in configs:
        now = {name: value for name, value in vars(twin).items() if name != "_attn_implementation_internal"}
        for name, value in now.items():
            if name not in before or before[name] is not value:
                vars(config)[name] = original(value)
        for name in before.keys() - vars(twin).keys():
            vars(config).pop(name, None)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = original(value)


def apply(model: torch.nn.Module, *, attention: bool = True, loss: bool = True) -> torch.nn.Module:
    """Run a model's attention and its loss on fastlm, in place.

    Attention, of every submodel too (encoders, vision towers): causal and not, cross-attention, grouped
    keys, sliding windows, softcaps, sinks, position biases, dropout, padding on either side, packed
    sequences (by `position_ids` or `cu_seq_lens_q`), dynamic, static and sliding caches. The model's
    configurations become its own, so that other models made of the same ones stay as they are.

    Loss: whatever F.cross_entropy is computed of the output layer's result becomes
    :func:`fastlm.linear_cross_entropy`: in the model's forward with `labels`, or in a program's own loss.
    `outputs.logits` keep their shape and dtype and are made, with gradients, when they are read: a training
    step that only uses the loss never holds them; an evaluation that looks at them, or Trainer's label
    smoothing, which works on log-probabilities, does. Reading them after the weights have changed raises.
    Inside torch.compile, torch.export and functorch transforms, and where the output layer is an FSDP unit
    of its own or under ZeRO-3, and in evaluations (no gradients) of several processes, logits are ordinary
    tensors and the loss is the library's. A training step under FSDP has its loss without logits; reading
    them behind the model's forward raises.

    Args:
        model: a transformers.PreTrainedModel, or a module that contains some (PEFT, DDP). To be
            applied again after `resize_token_embeddings`, which makes another output layer.
        attention, loss: what to replace.

    Returns:
        The model.

    Raises:
        TypeError: no model of the library's.
        ValueError: a model of which nothing can be replaced. Where only a part can, a warning says what
            stays as it is and why.
    """
    models = _models(model, "apply")
    if not models:
        raise TypeError(
            f"fastlm.integrations.transformers.apply: {type(model).__name__} contains no "
            "transformers.PreTrainedModel"
        )
    for one in models:
        _restore(one)
        _apply(one, attention, loss)
    return model


def _apply(model: PreTrainedModel, attention: bool, loss: bool) -> None:
    name = type(model).__name__
    left: list[str] = []
    done = False
    configs: list[tuple] = []
    if attention:
        configs = _own_configs(model)
        submodels = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        able = [m for m in submodels if m._can_set_attn_implementation()]
        if able:
            model.set_attn_implementation(NAME)
        done = bool(able)
        kept = {type(m).__name__ for m in submodels if m not in able}
        left += [f"{x} keeps its own attention, as it does not use AttentionInterface" for x in sorted(kept)]
    heads = []
    if loss:
        head = model.get_output_embeddings()
        if head is not None and defer(head):
            heads = [head]
            done = True
        elif head is not None:
            left.append(
                f"{name} keeps its own loss, as its output layer is a {type(head).__name__}, not a plain "
                "torch.nn.Linear"
            )
    setattr(model, _STATE, {"configs": configs, "heads": heads})
    if not done and left:
        _restore(model)
        raise ValueError(f"fastlm.integrations.transformers.apply: nothing to replace: {'; '.join(left)}")
    if left:
        warnings.warn(f"fastlm.integrations.transformers.apply: {'; '.join(left)}", stacklevel=3)


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`apply`, also of a copy or of an unpickled model; without it, do nothing.

    The configuration objects are those from before, with what was changed in the model's meanwhile.

    Returns:
        The model.
    """
    for one in _models(model, "restore"):
        _restore(one)
    return model


def _restore(model: PreTrainedModel) -> None:
    state = vars(model).pop(_STATE, None)
    if state is None:
        return
    for head in state["heads"]:
        undo(head)
    _return_configs(model, state["configs"])
