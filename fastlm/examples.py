"""Instructions and their answers, one JSON object a line, as sequences whose loss counts on the answers.

    {"prompt": "...", "response": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

An example is the end-of-text token, the prompt, the response and end-of-text again: what a model reads and
writes when it is given the prompt. A conversation is one prompt, in which each message stands after a line
`<|ROLE|>`, and an end-of-text token after each of the assistant's. The targets are the answers' tokens, their
end-of-text included.

A batch holds one example a row, padded on the right to its longest; examples of like length come together. Causal attention and a recurrence then
keep an example to itself without a mask; packed rows would need both a mask and a reset of positions and
states, which the models don't have. What is longer than a block is cut at its end.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm.tokenizer import Tokenizer

SUFFIX = ".jsonl"
IGNORED = -100  # a target that doesn't count
ROLES = ("system", "user", "assistant")
POOL = 50  # steps of which the examples are sorted together, or a quarter of an epoch's


@dataclass(frozen=True)
class Example:
    place: str  # FILE:LINE
    parts: tuple[tuple[str, bool], ...]  # texts, and whether each is an answer

    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(self.parts).encode()).digest()

    def answers(self) -> str:
        """Each answer and a NUL, as a document of a text corpus."""
        return "".join(f"{text}\0" for text, is_answer in self.parts if is_answer)

    def encode(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens and which of them are answers', (T,) each."""
        end = np.array([tokenizer.end_of_text], np.uint32)
        tokens, answers = [end], [np.zeros(1, bool)]
        for text, is_answer in self.parts:
            part = tokenizer.encode(text).astype(np.uint32)
            tokens += [part, end] if is_answer else [part]
            answers.append(np.full(len(part) + is_answer, is_answer))
        return np.concatenate(tokens), np.concatenate(answers)


def are_examples(paths: Sequence[str | os.PathLike] | None) -> bool:
    """Whether the paths are files of examples; ``ValueError`` where only some are."""
    named = [Path(path).suffix == SUFFIX for path in paths or ()]
    if any(named) and not all(named):
        text = paths[named.index(False)]
        raise ValueError(f"{text}: not a {SUFFIX} file; text and examples can't be mixed")
    return any(named)


def read_examples(paths: Sequence[str | os.PathLike]) -> list[Example]:
    """All of them; ``ValueError`` with the file and the line of the first that isn't one."""
    found = []
    for path in map(Path, paths):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file or folder") from None
        except OSError as error:
            raise ValueError(f"{path}: can't be read: {error.strerror}") from None
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                found.append(_parse(line, f"{path}:{number}"))
    if not found:
        raise ValueError(f"the corpus is empty: no examples in {', '.join(map(str, paths))}")
    return found


def _parse(line: bytes, place: str) -> Example:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{place}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(values).__name__}")
    pair, talk = {"prompt", "response"} & values.keys(), "messages" in values
    if talk and pair:
        raise ValueError(f"{place}: has both messages and {min(pair)}")
    if talk:
        return Example(place, _conversation(values["messages"], place))
    if len(pair) < 2:
        raise ValueError(f"{place}: expected prompt and response, or messages, got {sorted(values)}")
    prompt, response = (_text(values[name], name, place) for name in ("prompt", "response"))
    if not response:
        raise ValueError(f"{place}: the response is empty")
    return Example(place, ((prompt, False), (response, True)))


def _conversation(messages, place: str) -> tuple[tuple[str, bool], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: messages must be a list of at least one")
    parts, before = [], ""
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{place}: {name} must be an object, got {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{place}: role of {name} must be one of {', '.join(ROLES)}, got {role!r}")
        content = _text(message.get("content"), f"content of {name}", place)
        before += f"<|{role}|>\n"
        if role == "assistant":
            if not content:
                raise ValueError(f"{place}: the content of {name} is empty")
            parts += [(before, False), (content, True)]
            before = ""
        else:
            before += f"{content}\n"
    if not parts:
        raise ValueError(f"{place}: no message is the assistant's")
    return tuple(parts)  # what follows the last answer would only be read


def _text(value, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name} must be a string, got {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{place}: {name} holds a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {name} holds half of a surrogate pair") from None
    return value


def split_examples(
    found: list[Example], val_bytes: int | None, most: int
) -> tuple[list[Example], list[Example]]:
    """Those to train on and those held out: about ``val_bytes`` of their answers, else 5 %, at most ``most``.
    They are drawn by the hash of what they say, so that one more moves no other and equal ones stay
    together."""
    groups: dict[bytes, list[Example]] = {}
    for example in found:
        groups.setdefault(example.digest(), []).append(example)
    if len(groups) < 2:
        raise ValueError("the corpus is too short: at least 2 different examples are needed, one to hold out")
    sizes = {key: sum(len(e.answers().encode()) for e in group) for key, group in groups.items()}
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


@dataclass(eq=False)
class Examples:
    """Encoded ones, one behind the other: ``tokens`` (N,), ``answers`` (N,), true where a token is a target,
    and ``starts`` (n + 1,), where each begins and the last ends."""

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray

    @lru_cache(maxsize=2)  # noqa: B019 - a program has one corpus or two
    def counts(self, block_size: int) -> np.ndarray:
        """Targets of each example, as far as it fits a block: (n,)."""
        ends = np.minimum(self.starts[:-1] + block_size + 1, self.starts[1:])
        bounds = np.stack((self.starts[:-1], ends), 1).ravel()
        if bounds[-1] == len(self.answers):  # reduceat takes no bound at the very end
            bounds = bounds[:-1]
        return np.add.reduceat(self.answers, bounds, dtype=np.int64)[::2]

    def order(self, count: int, first: int, seed: int, step: int = 1) -> np.ndarray:
        """Samples ``first`` to ``first + count - 1`` of the endless order, (count,). Those of a step, of ``step``
        samples from a multiple of it on, are of like length, the shortest first."""
        n = len(self.starts) - 1
        samples = range(first, first + count)
        return np.array([self._epoch(i // n, seed, step)[i % n] for i in samples], np.int64)

    @lru_cache(maxsize=4)  # noqa: B019 - a program has one corpus or two
    def _epoch(self, epoch: int, seed: int, step: int) -> np.ndarray:
        """A permutation, of which pools of some steps are sorted by length, cut into steps and these shuffled.
        Samples of a step that two epochs share stay as they are."""
        n = len(self.starts) - 1
        random = np.random.default_rng([seed, epoch])
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

    def rows(self, chosen: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of int64 of the examples ``chosen`` (B,); -1: a row without targets."""
        begin = self.starts[chosen.clip(0), None]
        length = np.where(
            chosen < 0, 1, np.minimum(self.starts[chosen.clip(0) + 1] - begin[:, 0], block_size + 1)
        )
        T = max(1, int(length.max()) - 1)
        inside = np.arange(T + 1) < length[:, None]
        places = np.where(inside, begin + np.arange(T + 1), begin)
        window = self.tokens[places].astype(np.int64)
        counted = inside[:, 1:] & self.answers[places[:, 1:]].astype(bool)
        targets = np.where(counted, window[:, 1:], IGNORED)
        return torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(targets)

    def batches(
        self, block_size: int, batch_size: int, limit: int | None, part: tuple[int, int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each example once, as :func:`fastlm.data.evaluation_batches` has the blocks of a text."""
        n, (k, parts) = len(self.starts) - 1, part
        chosen = np.arange(n)
        if limit is not None and limit < n:
            chosen = np.arange(limit) * n // limit
        chosen = np.pad(self._by_length(chosen), (0, -len(chosen) % parts), constant_values=-1)[k::parts]
        for i in range(0, len(chosen), batch_size):
            yield self.rows(chosen[i : i + batch_size], block_size)


def encode_examples(found: Iterable[Example], tokenizer: Tokenizer) -> tuple[Examples, np.ndarray]:
    """In memory, and the bytes of their answers."""
    found = list(found)
    tokens, answers = zip(*(example.encode(tokenizer) for example in found), strict=True)
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    text = np.frombuffer("".join(e.answers() for e in found).encode(), np.uint8)
    return Examples(np.concatenate(tokens), np.concatenate(answers), starts), text


def write_examples(stem: Path, found: list[Example], tokenizer: Tokenizer, dtype) -> dict[str, int]:
    """Writes the files that :func:`open_examples` maps; returns their sizes."""
    sizes, lengths = {}, [0]
    kinds = ("tokens", "answers", "text", "starts")
    files = {kind: open(f"{stem}.{kind}", "wb") for kind in kinds}
    try:
        for example in found:
            tokens, answers = example.encode(tokenizer)
            files["tokens"].write(tokens.astype(dtype))
            files["answers"].write(answers)
            files["text"].write(example.answers().encode())
            lengths.append(len(tokens))
        files["starts"].write(np.cumsum(lengths, dtype=np.int64))
        for kind, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[kind] = file.tell()
    finally:
        for file in files.values():
            file.close()
    return sizes


def open_examples(stem: Path, dtype: str) -> Examples:
    kinds = {"tokens": dtype, "answers": "bool", "starts": "int64"}
    return Examples(**{kind: np.memmap(f"{stem}.{kind}", of, "r") for kind, of in kinds.items()})


def check_answers_fit(examples: Examples, found: list[Example], block_size: int) -> None:
    """``ValueError`` where a block ends before an example's first answer."""
    counts = examples.counts(block_size)
    if not counts.all():
        raise ValueError(
            f"{found[int(counts.argmin())].place}: its prompt fills a block of {block_size} tokens; "
            "give a larger block_size"
        )
