"""Masks of the transformers library's models, as its AttentionMaskInterface asks for them.

Of a mask only what cannot be said otherwise is held: causality, sliding windows, the offset of a cache and
packed sequences are arguments of the operators, padding is a row of booleans per sequence. A mask of
queries by keys is made where something else than fastlm's attention reads it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from fastlm.integrations.deferred import Deferred


class Structure(NamedTuple):
    """Query at position p sees keys at p - left to p + right (None: no bound), of its own sequence."""

    left: int | None = None
    right: int | None = None
    sequences: Tensor | None = None  # (B, T), equal where positions belong to one packed sequence


def _tightest(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _structure(mask_function) -> Structure | None:
    """What a mask function of the library's says, or None if it is one that we don't know."""
    if mask_function is masking_utils.causal_mask_function:
        return Structure(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Structure()
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    held = inspect.getclosurevars(mask_function).nonlocals
    match mask_function.__qualname__.partition(".")[0]:
        case "and_masks":
            result = Structure()
            for part in map(_structure, held["mask_functions"]):
                if part is None or (part.sequences is not None and result.sequences is not None):
                    return None
                result = Structure(
                    _tightest(result.left, part.left),
                    _tightest(result.right, part.right),
                    part.sequences if result.sequences is None else result.sequences,
                )
            return result
        case "sliding_window_overlay":
            return Structure(left=held["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return Structure(left=held["sliding_window"], right=held["sliding_window"])
        case "packed_sequence_mask_function":
            return Structure(sequences=held["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            # Positions within a sequence follow each other, so their distances are those of the indices;
            # the library never uses this without the mask that keeps sequences apart.
            return _structure(held["mask_function"])
    return None


class Mask(Deferred):
    """A boolean (B, 1, Tq, Tk) as its structure and the keys that are not padding; made when read."""

    @staticmethod
    def make(shape, device, structure: Structure, offset: int, padding: Tensor | None, build) -> Mask:
        mask = Mask(shape, torch.bool, device)
        mask.structure = structure
        mask.offset = offset  # query i is at the position of key i + offset
        mask.padding = padding  # (B, Tk), True for keys to be seen
        mask._build = functools.cache(build)
        mask._bounds = None
        return mask

    def dense(self) -> Tensor:
        return self._build()

    def _take(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name == "to" and not kwargs and args in ((self.device,), (self.dtype,)):
            return self
        return super()._take(name, args, kwargs)

    def bounds(self) -> tuple[Tensor, int]:
        """Where packed sequences begin and the last one ends, int32, and the length of the longest."""
        if self._bounds is None:
            ids = self.structure.sequences
            first = torch.ones_like(ids, dtype=torch.bool)
            first[:, 1:] = ids[:, 1:] != ids[:, :-1]
            starts = first.flatten().nonzero().flatten().int()
            ends = torch.cat([starts, starts.new_tensor([ids.numel()])])
            self._bounds = ends, int(ends.diff().max())
        return self._bounds


def fastlm_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **arguments,
) -> Tensor | None:
    """The mask of a forward, as the library's `sdpa_mask`: None where the operators need none.

    A `Mask` where structure and padding say it all; the library's own (B, 1, Tq, Tk) for the single query of
    a decoding step, for patterns that are neither causal, nor a window, nor packed sequences (chunks, blocks
    of an image, a caller's own function), and inside compiled programs.
    """
    build = functools.partial(
        masking_utils.sdpa_mask, batch_size=batch_size, q_length=q_length, kv_length=kv_length,
        q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, device=device, **arguments,
    )  # fmt: skip
    library = functools.partial(
        build, allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
    )  # fmt: skip
    if _is_tracing(attention_mask):
        plain = mask_function is masking_utils.causal_mask_function and attention_mask is None
        if plain and allow_is_causal_skip and isinstance(q_offset, int) and q_offset == kv_offset == 0:
            return None
        return library()
    structure = _structure(mask_function)
    if q_length == 1 or structure is None or (attention_mask is not None and attention_mask.dim() != 2):
        return library()
    offset = int(q_offset) - kv_offset
    left, right, sequences = structure
    seen = kv_length if right is None else min(kv_length, q_length + offset + right)
    padding = attention_mask
    if padding is not None:
        padding = masking_utils.prepare_padding_mask(padding, kv_length, kv_offset).to(torch.bool)
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if padding[:, :seen].all():
            padding = None
    if padding is None and sequences is None and (left is None or left >= q_length - 1 + offset):
        if allow_is_causal_skip and right == 0 and offset == 0:
            return None
        if allow_is_bidirectional_skip and (right is None or right >= kv_length - 1 - offset):
            return None
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(device)
    dense = functools.partial(build, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return Mask.make(shape, device, structure, offset, padding, dense)


def _is_tracing(x: Tensor | None) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or isinstance(x, torch._subclasses.fake_tensor.FakeTensor)
    )
