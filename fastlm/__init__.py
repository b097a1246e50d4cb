"""Fused attention, GRU and softmax cross-entropy for PyTorch."""

from fastlm import nn
from fastlm.functional import (
    cross_entropy,
    gru,
    gru_cell,
    linear_cross_entropy,
    scaled_dot_product_attention,
    varlen_attn,
)
from fastlm.ops import use_backend

__version__ = "0.1.0"
__all__ = [
    "cross_entropy",
    "gru",
    "gru_cell",
    "linear_cross_entropy",
    "nn",
    "scaled_dot_product_attention",
    "use_backend",
    "varlen_attn",
]
