"""Rotary positions: at position p, the pair (x_i, x_(i + D/2)) of a query or key is turned by p w_i,

    w_i = theta^(-2i/D).

For contexts longer than the one that was learned, of length L, frequencies are divided by `factor`: all alike
("linear"), or only those that turn less than `high_freq_factor` times in L, wholly from `low_freq_factor`
times down ("llama3"):

    w_i (s + (1 - s) / factor),  s = clamp((L w_i / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)

with L = `original_max_position_embeddings`. "dynamic" scales behind n_positions alone, where a GPT has no positions.
The names are the transformers library's.

Sources: Su et al. 2021, arXiv:2104.09864, section 3.4; Chen et al. 2023, arXiv:2306.15595 (linear);
Grattafiori et al. 2024, arXiv:2407.21783, and Meta's code beside it (llama3).
"""

import math

import torch
from torch import Tensor

SCALINGS = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_scaling(scaling: dict) -> None:
    """Raises ``ValueError``, as of a GPTConfig."""
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if kind not in SCALINGS:
        raise ValueError(f"GPTConfig: rope_scaling needs a rope_type of {tuple(SCALINGS)}, got {scaling!r}")
    if scaling.keys() != {"rope_type", *SCALINGS[kind]}:
        raise ValueError(
            f"GPTConfig: rope_scaling of rope_type {kind!r} is by {', '.join(SCALINGS[kind])}, got {scaling!r}"
        )
    for name in SCALINGS[kind]:
        value = scaling[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"GPTConfig: {name} of rope_scaling must be a number > 0, got {value!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"GPTConfig: high_freq_factor of rope_scaling must be larger than low_freq_factor, got {scaling!r}"
        )


def frequencies(D: int, theta: float, scaling: dict | None) -> Tensor:
    """w, (D/2) of float64."""
    w = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    if scaling is None or scaling["rope_type"] == "dynamic":
        return w
    if scaling["rope_type"] == "linear":
        return w / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * w / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return w * (kept + (1 - kept) / scaling["factor"])


def rope_tables(config) -> tuple[Tensor, Tensor]:
    """cos and sin of a GPTConfig's angles: two (n_positions, D/2) of float32."""
    w = frequencies(config.n_embd // config.n_head, config.rope_theta, config.rope_scaling)
    angle = torch.arange(config.n_positions, dtype=torch.float64)[:, None] * w
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in its half-split form: x (B, H, T, D), cos and sin (T, D/2) or (B, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
