"""Models of the transformers library on fastlm.

    import fastlm.integrations.transformers as on_fastlm

    model = AutoModelForCausalLM.from_pretrained(...)
    on_fastlm.apply(model)  # attention and loss on fastlm's operators
    ...                     # Trainer, generate, PEFT as before
    on_fastlm.restore(model)

Attention: importing this module registers "fastlm" with the library's AttentionInterface and
AttentionMaskInterface, so that ``attn_implementation="fastlm"`` is known to from_pretrained and from_config.
Masks are those of transformers_masks.py. Keys and values are never repeated for the queries that share them.
Softcaps, sinks and position biases are fused.

Loss: the output layer returns `Logits` that are made when something reads them. A model's own forward
computes its loss as ever, with whatever shift, ignored labels, `num_items_in_batch` and auxiliary losses it
has, and where it calls F.cross_entropy, `fastlm.linear_cross_entropy` runs instead, on hidden states.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.output_capturing import _active_collector
from transformers.utils.versions import require_version

from fastlm.functional import scaled_dot_product_attention, varlen_attn
from fastlm.integrations.deferred import defer, undo
from fastlm.integrations.transformers_masks import Mask, Structure, fastlm_mask

require_version(
    "transformers>=5.4", "fastlm.integrations.transformers: masks are asked for in another way before"
)

NAME = "fastlm"

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
    if torch.compiler.is_compiling():
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
