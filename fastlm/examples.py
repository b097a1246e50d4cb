"""Instructions and their answers, one JSON object a line, as sequences whose loss counts on the answers.

    {"prompt": "...", "response": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

An example is the end-of-text token, the prompt, the response and end-of-text again: what a model reads and
writes when it is given the prompt. A conversation is one prompt, in which each message stands after a line
`<|ROLE|>`, and an end-of-text token after each of the assistant's. The targets are the answers' tokens, their
end-of-text included. What is longer than a block is cut at its end.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastlm import rows
from fastlm.rows import IGNORED, check_text
from fastlm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    place: str  # FILE:LINE
    parts: tuple[tuple[str, bool], ...]  # texts, and whether each is an answer

    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(self.parts).encode()).digest()

    group = digest

    def answers(self) -> bytes:
        """Each answer and a NUL, as a document of a text corpus."""
        return "".join(f"{text}\0" for text, is_answer in self.parts if is_answer).encode()

    def size(self) -> int:
        return len(self.answers())

    def arrays(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """``answers`` (T,) are true where ``tokens`` (T,) are answers'."""
        end = np.array([tokenizer.end_of_text], np.uint32)
        tokens, answers = [end], [np.zeros(1, bool)]
        for text, is_answer in self.parts:
            part = tokenizer.encode(text).astype(np.uint32)
            tokens += [part, end] if is_answer else [part]
            answers.append(np.full(len(part) + is_answer, is_answer))
        return {
            "tokens": np.concatenate(tokens),
            "answers": np.concatenate(answers),
            "text": np.frombuffer(self.answers(), np.uint8),
        }


def parse(place: str, values: dict) -> Example:
    """The example that a line holds, else ``ValueError``."""
    pair, talk = {"prompt", "response"} & values.keys(), "messages" in values
    if talk and pair:
        raise ValueError(f"{place}: has both messages and {min(pair)}")
    if talk:
        return Example(place, _conversation(values["messages"], place))
    if len(pair) < 2:
        raise ValueError(f"{place}: expected prompt and response, or messages, got {sorted(values)}")
    prompt, response = (check_text(values[name], name, place) for name in ("prompt", "response"))
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
        content = check_text(message.get("content"), f"content of {name}", place)
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


@dataclass(eq=False)
class Examples(rows.Rows):
    """Encoded ones; ``answers`` (N,) is true where a token is a target."""

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray

    @property
    def targets(self) -> int:
        return int(self.answers.sum())

    @lru_cache(maxsize=2)  # noqa: B019 - a program has one corpus or two
    def counts(self, block_size: int) -> np.ndarray:
        """Targets of each example, as far as it fits a block: (n,)."""
        ends = np.minimum(self.starts[:-1] + block_size + 1, self.starts[1:])
        bounds = np.stack((self.starts[:-1], ends), 1).ravel()
        if bounds[-1] == len(self.answers):  # reduceat takes no bound at the very end
            bounds = bounds[:-1]
        return np.add.reduceat(self.answers, bounds, dtype=np.int64)[::2]

    def rows(self, chosen: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of int64 of the examples ``chosen`` (B,); -1: a row without targets."""
        places, inside = self.window(chosen, block_size + 1)
        if places.shape[1] == 1:  # of no example at all
            places, inside = np.repeat(places, 2, 1), np.pad(inside, ((0, 0), (0, 1)))
        tokens = self.tokens[places].astype(np.int64)
        counted = inside[:, 1:] & self.answers[places[:, 1:]].astype(bool)
        targets = np.where(counted, tokens[:, 1:], IGNORED)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets)


def check_answers_fit(examples: Examples, found: list[Example], block_size: int) -> None:
    """``ValueError`` where a block ends before an example's first answer."""
    counts = examples.counts(block_size)
    if not counts.all():
        raise ValueError(
            f"{found[int(counts.argmin())].place}: its prompt fills a block of {block_size} tokens; "
            "give a larger block_size"
        )
