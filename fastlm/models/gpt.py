"""GPT: a decoder-only transformer, with GPT-2's architecture and parameter names.

The state dict of the transformers library's ``GPT2LMHeadModel`` loads as it is. RoPE, RMSNorm,
SwiGLU and grouped-query attention replace GPT-2's parts by config; with all of them it is Llama, whose
state dict loads too. Attention and loss are fastlm's:
no T x T matrix and, in training, no (tokens x vocabulary) matrix of logits is ever in memory.

Dimensions: B batch, T time, C width (n_embd), H heads, D head size (C / H), V vocabulary.

Sources: Radford et al. 2019 (GPT-2); Zhang and Sennrich 2019, arXiv:1910.07467 (RMSNorm); Shazeer 2020, arXiv:2002.05202 (SwiGLU); Ainslie et
al. 2023, arXiv:2305.13245 (GQA)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm import functional as fused
from fastlm.models import llama
from fastlm.models.base import LanguageModel, check_tokens, head_loss
from fastlm.models.rope import check_scaling, rope_tables, rotate
from fastlm.nn import Embedding, Linear


@dataclass
class GPTConfig:
    """Names and defaults are those of the transformers library's ``GPT2Config`` where it has
    them."""

    vocab_size: int = 50257
    n_positions: int = 1024  # context length
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # None: n_head; fewer is grouped-query attention
    n_inner: int | None = None  # None: 4 C, or 8/3 C for SwiGLU (the same parameters)
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bias: bool = True  # in linear layers and LayerNorm
    pos: str = "learned"  # or "rope"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # for longer contexts, see rope.py
    norm: str = "layernorm"  # or "rmsnorm"
    mlp: str = "gelu"  # or "swiglu"
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_inner is None:
            wide = 4 * self.n_embd if self.mlp == "gelu" else 8 * self.n_embd // 3
            self.n_inner = -(-wide // 32) * 32 if self.mlp == "swiglu" else wide
        for name in (
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_inner",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"GPTConfig: {name} must be a whole number >= 1, got {getattr(self, name)!r}"
                )
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} must be in [0, 1), got {getattr(self, name)!r}")
        choices = {
            "pos": ("learned", "rope"),
            "norm": ("layernorm", "rmsnorm"),
            "mlp": ("gelu", "swiglu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"GPTConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"GPTConfig: n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})"
            )
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"GPTConfig: RoPE needs an even head size, got {self.n_embd // self.n_head}")
        if self.rope_scaling is not None:
            if self.pos != "rope":
                raise ValueError(f"GPTConfig: rope_scaling needs pos='rope', got {self.pos!r}")
            check_scaling(self.rope_scaling)


class KVCache:
    """Keys and values of every layer, allocated once: ``keys[layer]`` is (B, Hkv, capacity, D).

    Row b holds ``lengths[b]`` tokens. Rows may differ: a right-padded prompt leaves junk after its
    end, which is masked until the row's own tokens overwrite it. It starts as zeros because a
    masked value is still multiplied by its weight of 0, and memory may hold NaN."""

    def __init__(self, config: GPTConfig, lengths: Tensor, capacity: int, like: Tensor):
        shape = (len(lengths), config.n_kv_head, capacity, config.n_embd // config.n_head)
        self.keys = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.even = int(lengths.min()) == self.longest

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the prompts' keys and values, (B, Hkv, T, D)."""
        self.keys[layer][:, :, : k.shape[2]] = k
        self.values[layer][:, :, : v.shape[2]] = v

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores one token a row, (B, Hkv, 1, D); returns all keys, all values and the mask."""
        keys, values, end = self.keys[layer], self.values[layer], self.longest + 1
        if self.even:
            keys[:, :, end - 1] = k[:, :, 0]
            values[:, :, end - 1] = v[:, :, 0]
            return keys[:, :, :end], values[:, :, :end], None
        rows = torch.arange(len(self.lengths), device=k.device)
        keys[rows, :, self.lengths] = k[:, :, 0]
        values[rows, :, self.lengths] = v[:, :, 0]
        mask = torch.arange(end, device=k.device) <= self.lengths[:, None]
        return keys[:, :, :end], values[:, :, :end], mask[:, None, None, :]

    def advance(self) -> None:
        self.lengths = self.lengths + 1
        self.longest += 1


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2 does."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return fused.linear(x, self.weight.t(), self.bias)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention, with n_kv_head <= n_head key and value heads."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        self.head_size = config.n_embd // config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_size, config.bias)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, config.bias)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None, prefill: bool
    ) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_size).transpose(1, 2)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        mask = None
        if cache is not None and prefill:
            cache.fill(self.layer, k, v)
        elif cache is not None:
            k, v, mask = cache.append(self.layer, k, v)
        y = fused.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attn_pdrop if self.training else 0.0,
            is_causal=cache is None or prefill,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """c_proj(gelu(c_fc(x))), or c_proj(silu(gate) * up) with gate and up both from c_fc."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.c_fc = Conv1D(config.n_embd, config.n_inner * (2 if self.gated else 1), config.bias)
        self.c_proj = Conv1D(config.n_inner, config.n_embd, config.bias)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.c_fc(x).chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            # Outside of the layer, which adapters and hooks take for a linear one.
            x = fused.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, cache, prefill: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache, prefill)
        return x + self.mlp(self.ln_2(x))


class GPT(LanguageModel):
    """``model(idx)`` gives logits (B, T, V); ``model(idx, targets)`` the mean loss in nats, without
    holding the logits. Targets of -100 don't count. ``idx`` and ``targets`` are (B, T) of int64.

    Raises ``ValueError`` for another shape or dtype, or more tokens than ``config.n_positions``.
    """

    config_class = GPTConfig
    model_type = "gpt"
    lora_targets = ("c_attn", "c_proj", "c_fc")
    head_name = "lm_head"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.max_length = config.n_positions
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config.vocab_size, config.n_embd),
                "drop": nn.Dropout(config.embd_pdrop),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": make_norm(config),
            }
        )
        if config.pos == "learned":
            self.transformer["wpe"] = Embedding(config.n_positions, config.n_embd)
        else:
            cos, sin = rope_tables(config)
            self.register_buffer("rope_cos", cos, persistent=False)  # (n_positions, D/2)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer["wte"].weight
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_accept_their_names)

    def reset_parameters(self) -> None:
        """GPT-2's: normal with ``initializer_range``, the two layers of each block that write to
        the residual stream divided by sqrt(2 n_layer), biases 0, norms 1."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        check_tokens("GPT", idx, targets, self.max_length)
        x = self.features(idx)
        if targets is None:
            return self.lm_head(x)
        return head_loss(self.lm_head, x, targets)

    def features(self, idx: Tensor) -> Tensor:
        """The final hidden states (B, T, C) for tokens (B, T)."""
        return self._hidden(idx, torch.arange(idx.shape[1], device=idx.device))

    def _hidden(
        self, idx: Tensor, positions: Tensor, cache: KVCache | None = None, prefill: bool = False
    ) -> Tensor:
        """The final hidden states (B, T, C); positions is (T,), or (B, 1) for rows of unequal
        length."""
        x, rope = self.transformer["wte"](idx), None
        if self.config.pos == "learned":
            x = x + self.transformer["wpe"](positions)
        else:
            rope = self.rope_cos[positions], self.rope_sin[positions]
            if positions.dim() == 2:
                rope = rope[0].unsqueeze(1), rope[1].unsqueeze(1)
        x = self.transformer["drop"](x)
        for block in self.transformer["h"]:
            x = block(x, rope, cache, prefill)
        return self.transformer["ln_f"](x)

    def prefill(self, idx: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, KVCache]:
        """Reads right-padded prompts (B, T) into a new cache with room for ``capacity`` tokens a
        row; returns the logits (B, V) after each row's last token, and the cache."""
        check_tokens("GPT.prefill", idx, None, self.max_length)
        cache = KVCache(self.config, lengths, capacity, self.transformer["wte"].weight)
        x = self._hidden(idx, torch.arange(idx.shape[1], device=idx.device), cache, prefill=True)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]
        return self.lm_head(last), cache

    def decode(self, tokens: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """One more token a row, (B,); returns the logits (B, V) after it, and the cache."""
        x = self._hidden(tokens[:, None], cache.lengths[:, None], cache)
        cache.advance()
        return self.lm_head(x[:, 0]), cache

    @classmethod
    def accepted_types(cls) -> tuple[str, ...]:
        return ("gpt", "gpt2", "llama")

    @classmethod
    def config_from_dict(cls, values: dict) -> GPTConfig:
        if values.get("model_type") == "llama":
            return GPTConfig(**llama.gpt_values(values))
        activation = values.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"GPT: activation_function {activation!r} isn't supported, only 'gelu_new'")
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if values.get(name):
                raise ValueError(f"GPT: a config with {name} isn't supported")
        if not values.get("scale_attn_weights", True):
            raise ValueError("GPT: a config without scale_attn_weights isn't supported")
        return super().config_from_dict(values)


def _accept_their_names(model: GPT, state_dict: dict, prefix: str, *unused) -> None:
    """Renames, in place, Llama's parameters and what GPT-2's checkpoints may hold otherwise: no
    ``transformer.`` prefix (GPT2Model), constant mask buffers (old releases), no ``lm_head.weight``
    where it is tied."""
    if any(f"{prefix}{name}embed_tokens.weight" in state_dict for name in ("model.", "")):
        llama.rename(state_dict, prefix)
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            del state_dict[key]
        elif name.split(".")[0] in ("wte", "wpe", "h", "ln_f"):
            state_dict[f"{prefix}transformer.{name}"] = state_dict.pop(key)
    embedding = f"{prefix}transformer.wte.weight"
    if model.config.tie_word_embeddings and embedding in state_dict:
        state_dict.setdefault(f"{prefix}lm_head.weight", state_dict[embedding])
