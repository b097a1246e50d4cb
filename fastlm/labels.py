"""Texts and their labels, one JSON object a line, for a classifier.

    {"text": "...", "label": "joy"}         or a whole number

A sequence is the end-of-text token and the text, cut at a block's end; its last token's target is the label.
Labels are numbered in their order, names by the alphabet, unless the order is given.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlm import rows
from fastlm.rows import IGNORED, check_text
from fastlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class LabelledText:
    place: str  # FILE:LINE
    text: str
    label: str | int
    number: int = IGNORED  # of the label, once all are known

    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps([self.text, self.label, self.number]).encode()).digest()

    def group(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()

    def size(self) -> int:
        return len(self.text.encode())

    def arrays(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        return {
            "tokens": encode_text(self.text, tokenizer),
            "numbers": np.array([self.number], np.int64),
            "text": np.empty(0, np.uint8),
        }


def encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """What a classifier reads of a text: (T,)."""
    return np.concatenate([[tokenizer.end_of_text], tokenizer.encode(text)]).astype(np.uint32)


def parse(place: str, values: dict) -> LabelledText:
    """The text and the label that a line holds, else ``ValueError``."""
    if not {"text", "label"} <= values.keys():
        raise ValueError(f"{place}: expected text and label, got {sorted(values)}")
    label = values["label"]
    if type(label) is not int:
        kind = "a string or a whole number"
        if not isinstance(label, str):
            raise ValueError(f"{place}: label must be {kind}, got {type(label).__name__}")
        if not check_text(label, "label", place).strip():
            raise ValueError(f"{place}: label is empty")
    return LabelledText(place, check_text(values["text"], "text", place), label)


def number(
    found: list[LabelledText], names: Sequence[str] | None
) -> tuple[list[LabelledText], tuple[str, ...]]:
    """The texts with their labels' numbers, and the labels' names: those given, or those that there are.
    ``ValueError`` for a label that isn't one of them, for both names and numbers, or for a single one."""
    if names is None:
        names = _names(found)
    return [dataclasses.replace(one, number=_number(one, names)) for one in found], tuple(names)


def _names(found: list[LabelledText]) -> tuple[str, ...]:
    first: dict[str | int, LabelledText] = {}
    for one in found:
        first.setdefault(one.label, one)
    kinds = {type(label): one for label, one in first.items()}
    if len(kinds) > 1:
        raise ValueError(f"{kinds[int].place}: label {kinds[int].label} is a number, others are strings")
    if len(first) < 2:
        raise ValueError(f"at least 2 different labels are needed, got {', '.join(map(repr, first))} alone")
    return tuple(map(str, sorted(first)))


def _number(one: LabelledText, names: Sequence[str]) -> int:
    """By the label's name or, where names are words, by a number itself."""
    if str(one.label) in names:
        return names.index(str(one.label))
    words = not any(name.lstrip("-").isdigit() for name in names)
    if isinstance(one.label, int) and words and 0 <= one.label < len(names):
        return one.label
    raise ValueError(f"{one.place}: label {one.label!r} is none of the model's: {', '.join(names)}")


@dataclass(eq=False)
class LabelledTexts(rows.Rows):
    """Encoded ones; ``numbers`` (n,) are those of their labels."""

    tokens: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray

    @property
    def targets(self) -> int:
        return len(self.numbers)

    def counts(self, block_size: int) -> np.ndarray:
        return np.ones(len(self.numbers), np.int64)

    def rows(self, chosen: np.ndarray, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, T), targets (B,) and lengths (B,) of int64 of the texts ``chosen`` (B,); -1: a row without a
        target."""
        places, inside = self.window(chosen, block_size)
        tokens = self.tokens[places].astype(np.int64)
        targets = np.where(chosen < 0, IGNORED, self.numbers[chosen])
        return tuple(map(torch.from_numpy, (tokens, targets, inside.sum(1))))
