"""Sequences of unequal lengths, each a row of a batch: JSON lines to memory-mapped arrays, their order, batches.

What a line says is :mod:`fastlm.examples` (instructions and answers) and :mod:`fastlm.labels` (texts and
labels). Encoded, the sequences lie one behind the other: ``tokens`` (N,) and ``starts`` (n + 1,), where each
begins and the last ends, beside what their kind has.

A batch holds one sequence a row, padded on the right to its longest. Causal attention and a recurrence then
keep a sequence to itself without a mask; packed rows would need both a mask and a reset of positions and
states, which the models don't have. Sequences of like length come together.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from fastlm.tokenizer import Tokenizer

SUFFIX = ".jsonl"
IGNORED = -100  # a target that doesn't count
POOL = 50  # steps whose sequences are sorted together, or a quarter of an epoch's


class Row(Protocol):
    """What a line says."""

    place: str  # FILE:LINE

    def digest(self) -> bytes:
        """A hash of all of it."""

    def group(self) -> bytes:
        """Equal for rows that are to be held out together."""

    def size(self) -> int:
        """Bytes, of which so many are held out."""

    def arrays(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """Encoded: ``tokens`` and what else its kind has, and ``text``, the bytes that are predicted."""


R = TypeVar("R", bound=Row)


def are_rows(paths: Sequence[str | os.PathLike] | None) -> bool:
    """Whether the paths are files of JSON lines; ``ValueError`` where only some are."""
    named = [Path(path).suffix == SUFFIX for path in paths or ()]
    if any(named) and not all(named):
        text = paths[named.index(False)]
        raise ValueError(f"{text}: not a {SUFFIX} file; text and examples can't be mixed")
    return any(named)


def read_lines(paths: Sequence[str | os.PathLike]) -> Iterator[tuple[str, dict]]:
    """The place and the values of each line; ``ValueError`` with its place where one is no JSON object."""
    for path in map(Path, paths):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file or folder") from None
        except OSError as error:
            raise ValueError(f"{path}: can't be read: {error.strerror}") from None
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _object(line, place)


def _object(line: bytes, place: str) -> dict:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{place}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}")
    return values


def check_text(value, name: str, place: str) -> str:
    """The value, if it is a string that can be encoded, else ``ValueError``."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name} must be a string, got {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{place}: {name} holds a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {name} holds half of a surrogate pair") from None
    return value


def split_rows(found: list[R], val_bytes: int | None, most: int) -> tuple[list[R], list[R]]:
    """Those to train on and those held out: about ``val_bytes`` of them, else 5 %, at most ``most``. They are
    drawn by the hash of what they say, so that one more moves no other and equal ones stay together."""
    groups: dict[bytes, list[R]] = {}
    for row in found:
        groups.setdefault(row.group(), []).append(row)
    if len(groups) < 2:
        raise ValueError("the corpus is too short: at least 2 different examples are needed, one to hold out")
    sizes = {key: sum(row.size() for row in group) for key, group in groups.items()}
    wanted = min(sum(sizes.values()) // 20, most) if val_bytes is None else val_bytes
    held, total = set(), 0
    for key in sorted(groups)[:-1]:
        if held and total >= wanted:
            break
        held.add(key)
        total += sizes[key]
    parts: tuple[list, list] = ([], [])
    for key, group in groups.items():
        parts[key in held].extend(group)
    return parts


class Rows:
    """Encoded sequences. A kind's ``rows(chosen, block_size)`` are a batch of those ``chosen``, its
    ``counts(block_size)`` (n,) their targets, its ``targets`` how many these are without a block."""

    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def order(self, count: int, first: int, seed: int, step: int = 1) -> np.ndarray:
        """Samples ``first`` to ``first + count - 1`` of the endless order, (count,). Those of a step, of ``step``
        samples from a multiple of it on, are of like length, the shortest first."""
        n, samples = len(self), range(first, first + count)
        return np.array([self._epoch(i // n, seed, step)[i % n] for i in samples], np.int64)

    @lru_cache(maxsize=4)  # noqa: B019 - a program has one corpus or two
    def _epoch(self, epoch: int, seed: int, step: int) -> np.ndarray:
        """A permutation, of which pools of some steps are sorted by length, cut into steps and these shuffled.
        Samples of a step that two epochs share stay as they are."""
        n, random = len(self), np.random.default_rng([seed, epoch])
        order = random.permutation(n)
        begin = -epoch * n % step
        whole = (n - begin) // step
        if step == 1 or whole < 1:
            return order
        body = order[begin : begin + whole * step]
        pool = max(1, min(POOL, whole // 4)) * step
        for i in range(0, len(body), pool):
            body[i : i + pool] = self._by_length(body[i : i + pool])
        body[:] = random.permutation(body.reshape(whole, step)).ravel()
        return order

    def _by_length(self, chosen: np.ndarray) -> np.ndarray:
        lengths = self.starts[chosen + 1] - self.starts[chosen]
        return chosen[lengths.argsort(kind="stable")]

    def window(self, chosen: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of the sequences ``chosen`` (B,) are, at most ``most`` of each, and which of the places
        (B, T) are its own, the first at least; -1: of no sequence."""
        begin = self.starts[chosen.clip(0)]
        length = np.minimum(self.starts[chosen.clip(0) + 1] - begin, most)
        length = np.where(chosen < 0, 1, length)[:, None]
        steps = np.arange(length.max())
        inside = steps < length
        return np.where(inside, begin[:, None] + steps, begin[:, None]), inside

    def batches(
        self, block_size: int, batch_size: int, limit: int | None, part: tuple[int, int]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Each sequence once, as :func:`fastlm.data.evaluation_batches` has the blocks of a text."""
        n, (k, parts) = len(self), part
        chosen = np.arange(n)
        if limit is not None and limit < n:
            chosen = np.arange(limit) * n // limit
        chosen = np.pad(self._by_length(chosen), (0, -len(chosen) % parts), constant_values=-1)[k::parts]
        for i in range(0, len(chosen), batch_size):
            yield self.rows(chosen[i : i + batch_size], block_size)


def encode_rows(found: Iterable[Row], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """In memory."""
    pieces = [row.arrays(tokenizer) for row in found]
    starts = np.cumsum([0, *(len(piece["tokens"]) for piece in pieces)], dtype=np.int64)
    return {kind: np.concatenate([piece[kind] for piece in pieces]) for kind in pieces[0]} | {
        "starts": starts
    }


def write_rows(stem: Path, found: list[Row], tokenizer: Tokenizer, dtype) -> dict[str, int]:
    """Writes them as files that can be mapped, tokens as ``dtype``; returns the files' sizes."""
    files, lengths = {}, [0]
    try:
        for row in found:
            arrays = row.arrays(tokenizer)
            arrays["tokens"] = arrays["tokens"].astype(dtype)
            lengths.append(len(arrays["tokens"]))
            for kind, array in arrays.items():
                if kind not in files:
                    files[kind] = open(f"{stem}.{kind}", "wb")
                files[kind].write(array)
        files["starts"] = open(f"{stem}.starts", "wb")
        files["starts"].write(np.cumsum(lengths, dtype=np.int64))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        return {kind: file.tell() for kind, file in files.items()}
    finally:
        for file in files.values():
            file.close()


def map_rows(stem: Path, **dtypes: str) -> dict[str, np.ndarray]:
    return {kind: np.memmap(f"{stem}.{kind}", of, "r") for kind, of in dtypes.items()}
