"""The public functions, with PyTorch's names, argument order and defaults."""

from fastlm.functional.activation import gelu
from fastlm.functional.attention import scaled_dot_product_attention, varlen_attn
from fastlm.functional.cross_entropy import cross_entropy, linear_cross_entropy
from fastlm.functional.embedding import embedding
from fastlm.functional.gru import gru, gru_cell
from fastlm.functional.linear import linear

__all__ = [
    "cross_entropy",
    "embedding",
    "gelu",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
    "varlen_attn",
]
