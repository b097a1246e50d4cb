"""Sample inputs, shapes and references, one section per operator.

The tests run every case on every ISA and in every dtype (test_operators.py); the
benchmarks time each operator's `bench` cases. Adding an operator is one `register(...)`.

A case builds its arguments from a dtype and a seed. Values are drawn in float64 and then
rounded, so the same seed gives the same problem in every dtype. Floating tensors that the
operator differentiates have requires_grad=True. Arguments may nest (a list of weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastlm

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# One vector of any ISA holds 2 to 16 floats; lengths around these are where kernels break.
LAYOUTS = ("contiguous", "strided", "transposed", "expanded", "offset")


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    id: readable, as in "causal-gqa-T65".
    build: (dtype, seed) -> (args, kwargs).
    eager: torch's own function takes these arguments (False for what only fastlm offers).
    random: draws from torch's generator, so that only its own repetition is comparable.
    dtypes: those that the case makes sense in.
    """

    id: str
    build: Callable[[torch.dtype, int], tuple[tuple, dict]]
    eager: bool = True
    random: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass(frozen=True)
class Operator:
    """A public function, what it is measured against, and its cases.

    function: fastlm.<name>.
    reference: fastlm.reference.<name>, same signature, any dtype.
    eager: the torch function that it is a drop-in for; None where torch has none on a CPU.
    cases: for tests. bench: for benchmarks, larger.
    flops, bytes: (*args, **kwargs) -> (forward, backward), the least that any
        implementation must compute and move; the benchmarks' floor.
    """

    name: str
    function: Callable
    reference: Callable
    eager: Callable | None
    cases: tuple[Case, ...]
    bench: tuple[Case, ...] = ()
    flops: Callable[..., tuple[int, int]] | None = None
    bytes: Callable[..., tuple[int, int]] | None = None


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> None:
    ids = [case.id for case in operator.cases]
    assert operator.name not in OPERATORS, f"{operator.name} is registered twice"
    assert len(ids) == len(set(ids)), f"{operator.name} has two cases of one id"
    OPERATORS[operator.name] = operator


class Draw:
    """A seeded source of tensors of one dtype: `draw = Draw(dtype, seed); q = draw(2, 64)`."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, *shape: int, layout: str = "contiguous", scale: float = 1.0, grad: bool = True
    ) -> Tensor:
        """Normal values of standard deviation `scale`, as a leaf in the given layout."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return self.lay(values.to(self.dtype), layout).requires_grad_(grad)

    def uniform(self, *shape: int, layout: str = "contiguous", grad: bool = False) -> Tensor:
        """Values in [0, 1)."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self.lay(values.to(self.dtype), layout).requires_grad_(grad)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """int64 values in [low, high)."""
        return torch.randint(low, high, tuple(shape), generator=self.generator)

    def mask(self, *shape: int, keep: float = 0.75) -> Tensor:
        """bool, True with probability `keep`."""
        return torch.rand(shape, generator=self.generator) < keep

    @staticmethod
    def lay(values: Tensor, layout: str) -> Tensor:
        """The same values in another memory layout (expanded: the first row repeated)."""
        if layout == "contiguous" or values.dim() == 0:
            return values
        unused = float("nan") if values.is_floating_point() else 0  # between the values
        if layout == "strided":  # every other element along the last dimension
            wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), unused)
            wide[..., ::2] = values
            return wide[..., ::2]
        if layout == "transposed":  # the first dimension is the innermost in memory
            return values.movedim(0, -1).contiguous().movedim(-1, 0)
        if layout == "expanded":  # stride 0 along the first dimension
            return values[:1].expand(values.shape)
        if layout == "offset":  # starts one element into its storage: misaligned for vectors
            flat = values.new_full((values.numel() + 1,), unused)
            flat[1:] = values.flatten()
            return flat[1:].view(values.shape)
        raise ValueError(f"layout is {layout!r}, expected one of {LAYOUTS}")


# ---- scaled_dot_product_attention ---------------------------------------------------------


# ---- varlen_attn --------------------------------------------------------------------------


# ---- gru ----------------------------------------------------------------------------------


# ---- gru_cell -----------------------------------------------------------------------------


# ---- cross_entropy ------------------------------------------------------------------------


# ---- linear_cross_entropy -----------------------------------------------------------------
