"""Fused attention, GRU and softmax cross-entropy for PyTorch."""

import importlib
import warnings

import fastlm.ops.flops  # noqa: F401 - what FlopCounterMode counts
from fastlm import distributed, nn
from fastlm.functional import (
    cross_entropy,
    embedding,
    gelu,
    gru,
    gru_cell,
    linear,
    linear_cross_entropy,
    scaled_dot_product_attention,
    varlen_attn,
)
from fastlm.imports import AfterImport
from fastlm.ops import use_backend
from fastlm.patch import convert, install, installed, uninstall

__version__ = "0.1.0"
__all__ = [
    "convert",
    "cross_entropy",
    "distributed",
    "embedding",
    "gelu",
    "gru",
    "gru_cell",
    "install",
    "installed",
    "linear",
    "linear_cross_entropy",
    "nn",
    "scaled_dot_product_attention",
    "uninstall",
    "use_backend",
    "varlen_attn",
]


def _is_imported(library) -> None:
    """Opacus and PEFT know modules by their class; Opacus would take wrong gradients from those that it doesn't
    know, PEFT refuse them."""
    name = library.__name__
    try:
        importlib.import_module(f"fastlm.integrations.{name}")
    except ImportError as error:
        warnings.warn(f"fastlm: this {name} can't train modules of fastlm: {error}", stacklevel=2)


for _name in ("opacus", "peft"):
    AfterImport(_name, _is_imported).watch()
