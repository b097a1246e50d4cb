"""The shapes that the operators are timed on, with what each must compute and move at the least:
the operations and bytes of its floor, forward and backward."""

from dataclasses import dataclass

import torch
from torch import Tensor


class Draw:
    """A seeded source of tensors: normal values that want gradients."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(shape, generator=self.generator).mul_(scale)
        return values.to(self.dtype).requires_grad_(grad)

    def classes(self, count: int, N: int) -> Tensor:
        return torch.randint(count, (N,), generator=self.generator)


@dataclass(frozen=True)
class Attention:
    """Causal self-attention; with Tq = 1, the decoding of one token behind Tk of a cache."""

    B: int
    H: int
    Tk: int
    D: int
    Hkv: int | None = None
    Tq: int | None = None
    causal: bool = True

    @property
    def name(self) -> str:
        heads = f"{self.H}" if self.Hkv is None else f"{self.H}on{self.Hkv}"
        kind = "decode" if self.Tq == 1 else "causal" if self.causal else "full"
        return f"{kind}-B{self.B}-H{heads}-T{self.Tk}-D{self.D}"

    def arguments(self, draw: Draw) -> tuple[tuple, dict]:
        B, D, Hkv, Tq = self.B, self.D, self.Hkv or self.H, self.Tq or self.Tk
        trained = Tq > 1
        q = draw(B, self.H, Tq, D, grad=trained)
        k, v = (draw(B, Hkv, self.Tk, D, grad=trained) for _ in range(2))
        return (q, k, v), {"is_causal": self.causal and trained, "enable_gqa": Hkv != self.H}

    def floor(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        B, H, D, T, Hkv, Tq = (
            self.B,
            self.H,
            self.D,
            self.Tk,
            self.Hkv or self.H,
            self.Tq or self.Tk,
        )
        pairs = T * (T + 1) // 2 if self.causal and Tq == T else Tq * T
        product = 2 * B * H * pairs * D
        q, kv = B * H * Tq * D * size, 2 * B * Hkv * T * D * size
        # Forward: q k^T and p v. Backward: q k^T again, since it is never stored, and one product
        # for each of dv, dp, dq and dk; reads q, k, v, o, do and writes dq, dk, dv.
        return (2 * product, 2 * q + kv), (5 * product, 4 * q + 2 * kv)


@dataclass(frozen=True)
class Gru:
    """`packed`: a PackedSequence with lengths spread evenly from T down to T / B."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int
    packed: bool = False

    @property
    def name(self) -> str:
        kind = "packed-" if self.packed else ""
        return f"{kind}T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.layers}"

    @property
    def batch_sizes(self) -> list[int]:
        lengths = [max(1, self.T * (self.B - b) // self.B) for b in range(self.B)]
        return [sum(n > t for n in lengths) if self.packed else self.B for t in range(self.T)]

    def arguments(self, draw: Draw) -> tuple[tuple, dict]:
        rows, H, params = sum(self.batch_sizes), self.H, []
        for layer in range(self.layers):
            I = H if layer else self.I  # noqa: E741
            params += [draw(3 * H, I, scale=I**-0.5), draw(3 * H, H, scale=H**-0.5)]
            params += [draw(3 * H, scale=0.1), draw(3 * H, scale=0.1)]
        hx = torch.zeros(self.layers, self.B, H, dtype=draw.dtype)
        if self.packed:
            head = (draw(rows, self.I), torch.tensor(self.batch_sizes), hx)
            return (*head, params, True, self.layers, 0.0, True, False), {}
        x = draw(self.T, self.B, self.I)
        return (x, hx, params, True, self.layers, 0.0, True, False, False), {}

    def floor(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, H = sum(self.batch_sizes), self.H
        weights = sum(3 * H * ((H if layer else self.I) + H) for layer in range(self.layers))
        ends = rows * (self.I + H) * size  # input and output; weights and states stay in cache
        forward = 2 * rows * weights
        return (forward, ends + weights * size), (2 * forward, 2 * ends + weights * size)


@dataclass(frozen=True)
class CrossEntropy:
    N: int
    V: int

    @property
    def name(self) -> str:
        return f"{self.N}x{self.V}"

    def arguments(self, draw: Draw) -> tuple[tuple, dict]:
        return (draw(self.N, self.V), draw.classes(self.V, self.N)), {}

    def floor(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        logits = self.N * self.V  # read once, and the gradient written once; an exp is some 16
        return (16 * logits, logits * size), (2 * logits, logits * size)


@dataclass(frozen=True)
class LinearCrossEntropy:
    N: int
    V: int
    C: int

    @property
    def name(self) -> str:
        return f"{self.N}x{self.V}x{self.C}"

    def arguments(self, draw: Draw) -> tuple[tuple, dict]:
        x, w = draw(self.N, self.C), draw(self.V, self.C, scale=self.C**-0.5)
        return (x, w, draw.classes(self.V, self.N)), {}

    def floor(self, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        product = 2 * self.N * self.V * self.C  # logits; then one each for dx and dw
        moved = (self.N + self.V) * self.C * size
        return (product, moved), (2 * product, moved)


SHAPES = {
    "scaled_dot_product_attention": (
        Attention(B=4, H=12, Tk=1024, D=64),
        Attention(B=1, H=12, Tk=4096, D=64),
        Attention(B=1, H=32, Hkv=8, Tk=2048, D=128),
        Attention(B=8, H=12, Tq=1, Tk=4096, D=64),
        Attention(B=1, H=2, Tk=8, D=16, causal=False),
    ),
    "gru": (
        Gru(T=128, B=1, I=256, H=256, layers=1),
        Gru(T=128, B=32, I=256, H=256, layers=1),
        Gru(T=256, B=32, I=512, H=512, layers=2),
        Gru(T=128, B=64, I=1024, H=1024, layers=1),
        Gru(T=128, B=32, I=256, H=256, layers=1, packed=True),
        Gru(T=4, B=2, I=8, H=8, layers=1),
    ),
    "cross_entropy": (
        CrossEntropy(1024, 50257),
        CrossEntropy(4096, 50257),
        CrossEntropy(4, 8),
    ),
    "linear_cross_entropy": (
        LinearCrossEntropy(1024, 50257, 768),
        LinearCrossEntropy(4096, 50257, 768),
    ),
}
