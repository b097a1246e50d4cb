"""Folders of the transformers library's Llama, as GPT's configuration and parameter names.

Rotary positions, RMSNorm, SwiGLU and grouped keys are all of it, so GPT computes the same. Its projections
that read the same input are one matrix, stored (in, out):

    c_attn = [q; k; v]^T,  c_fc = [gate; up]^T

Source: Touvron et al. 2023, arXiv:2302.13971.
"""

import re

import torch
from torch import Tensor

from fastlm.models.rope import SCALINGS

# GPT's parameter of a block, and Llama's that it is made of.
_BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}
_REST = {
    "embed_tokens.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}


def gpt_values(values: dict) -> dict:
    """Those of a GPTConfig, for a Llama's ``config.json``; ``ValueError`` where GPT hasn't what it asks for."""

    def refuse(name: str, value: object, required: str) -> None:
        raise ValueError(f"Llama: {name} {value!r} isn't supported, only {required}")

    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if not isinstance(values.get(name), int):
            raise ValueError(f"Llama: {name} must be a whole number, got {values.get(name)!r}")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        refuse("hidden_act", activation, "'silu'")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind in SCALINGS:
        length = {"original_max_position_embeddings": values.get("max_position_embeddings", 2048)}
        known = length | rope
        scaling = {"rope_type": kind} | {name: known.get(name) for name in SCALINGS[kind]}
    elif kind != "default":
        refuse("rope_type", kind, ", ".join(map(repr, ("default", *SCALINGS))))
    if rope.get("partial_rotary_factor", 1.0) != 1:
        refuse("partial_rotary_factor", rope["partial_rotary_factor"], "1")
    H, head = values["num_attention_heads"], values.get("head_dim")
    if head is not None and head * H != values["hidden_size"]:
        refuse("head_dim", head, f"hidden_size / num_attention_heads, {values['hidden_size'] / H:g}")
    bias = values.get("attention_bias", False)
    if values.get("mlp_bias", False) != bias:
        refuse("mlp_bias", not bias, f"that of attention_bias, {bias}")
    return {
        "vocab_size": values["vocab_size"],
        "n_positions": values.get("max_position_embeddings", 2048),
        "n_embd": values["hidden_size"],
        "n_layer": values["num_hidden_layers"],
        "n_head": H,
        "n_kv_head": values.get("num_key_value_heads"),
        "n_inner": values["intermediate_size"],
        "embd_pdrop": 0.0,
        "attn_pdrop": values.get("attention_dropout", 0.0),
        "resid_pdrop": 0.0,
        "layer_norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "initializer_range": values.get("initializer_range", 0.02),
        "bias": bias,
        "pos": "rope",
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "rope_scaling": scaling,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
    }


def rename(state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Llama's parameters become GPT's, in place, as far as they are there: with ``model.`` before all but
    the head (LlamaForCausalLM) or without (LlamaModel)."""
    blocks = set()
    for key in list(state_dict):
        name = key.removeprefix(prefix).removeprefix("model.")
        if key.startswith(prefix) and name in _REST:
            state_dict[prefix + _REST[name]] = state_dict.pop(key)
        elif name.endswith("rotary_emb.inv_freq"):  # a constant, in old releases
            del state_dict[key]
        elif match := re.match(r"layers\.\d+\.", name):
            blocks.add((key[: len(key) - len(name)] + match[0], match[0][len("layers.") :]))
    for block, place in blocks:
        for ours, theirs in _BLOCK.items():
            for kind in ("weight", "bias"):
                keys = [f"{block}{name}.{kind}" for name in theirs]
                if all(key in state_dict for key in keys):
                    whole = torch.cat([state_dict.pop(key) for key in keys])
                    state_dict[f"{prefix}transformer.h.{place}{ours}.{kind}"] = (
                        whole.t() if whole.dim() == 2 else whole
                    )


def llama_values(config) -> dict:
    """The inverse of :func:`gpt_values`."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_positions,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "intermediate_size": config.n_inner,
        "attention_dropout": config.attn_pdrop,
        "rms_norm_eps": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}
        | (config.rope_scaling or {}),
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _rows(values: dict) -> dict[str, list[int]]:
    """Of a GPT's matrix, how many are of each of a Llama's."""
    D = values["hidden_size"] // values["num_attention_heads"]
    kv = values["num_key_value_heads"] * D
    return {"attn.c_attn": [values["hidden_size"], kv, kv], "mlp.c_fc": [values["intermediate_size"]] * 2}


def llama_tensors(tensors: dict[str, Tensor], values: dict) -> dict[str, Tensor]:
    """The inverse of :func:`rename`, for the ``values`` of a Llama."""
    rows, rest, renamed = _rows(values), {ours: theirs for theirs, ours in _REST.items()}, {}
    for name, tensor in tensors.items():
        if name in rest:
            body = "" if name.startswith("lm_head") else "model."
            renamed[body + rest[name]] = tensor
            continue
        layer, ours, kind = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name).groups()
        whole = tensor.t() if tensor.dim() == 2 else tensor
        for theirs, part in zip(_BLOCK[ours], whole.split(rows.get(ours, len(whole))), strict=True):
            renamed[f"model.layers.{layer}.{theirs}.{kind}"] = part
    return renamed


def llama_adapters(tensors: dict[str, Tensor], values: dict) -> dict[str, Tensor]:
    """Low-rank adapters of GPT's layers as those of a Llama with these ``values``: of the parts of a matrix, each
    has its A (r, in) and their rows of its B (out, r). Other tensors (a classifier's) keep their names."""
    rows, renamed = _rows(values), {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(lora_([AB])\.weight)", name):
            layer, ours, rest, side = match.groups()
            parts = _BLOCK[ours]
            split = (
                tensor.split(rows.get(ours, len(tensor))) if side == "B" else [tensor.clone() for _ in parts]
            )
            for theirs, part in zip(parts, split, strict=True):
                renamed[f"model.layers.{layer}.{theirs}.{rest}"] = part
        else:
            renamed[name.replace("transformer.wte.", "model.embed_tokens.")] = tensor
    return renamed
