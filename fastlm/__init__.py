"""Fused attention, GRU and softmax cross-entropy for PyTorch."""

from fastlm.ops import use_backend

__version__ = "0.1.0"
__all__ = ["use_backend"]
