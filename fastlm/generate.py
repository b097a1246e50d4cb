"""Decoding: from a model's next-token logits to tokens.

Every row of a batch keeps its own length: prompts are padded on the right, the model returns the
logits after each row's last token, and from there on all rows advance together. A model offers

    prefill(tokens (B, T), lengths (B,), capacity) -> logits (B, V), state
    decode(tokens (B,), state)                     -> logits (B, V), state
    max_length: int | None                         tokens its state can hold; None: any number

Nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token a row from ``logits`` (B, V); returns (B,) int64.

    ``temperature`` 0 takes the most probable token. ``top_k`` keeps the k most probable tokens,
    then ``top_p`` the fewest of them whose probabilities add up to at least ``top_p``.
    Raises ``ValueError`` for options out of range.
    """
    check_options(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        values, tokens = values[:, :top_k], tokens[:, :top_k]
    probabilities = values.softmax(-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # mass of the more probable tokens
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ``ValueError`` where a sampling option is out of its range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"fastlm.generate: temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and (int(top_k) != top_k or top_k < 1):
        raise ValueError(f"fastlm.generate: top_k must be a whole number >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"fastlm.generate: top_p must be in (0, 1], got {top_p}")


def stream(
    model,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Iterable[int] = (),
) -> Iterator[list[int | None]]:
    """Yields, a step at a time, the token that each row got, and ``None`` for rows that have ended.

    ``prompts`` is one sequence of tokens a row, of any lengths >= 1, or a (B, T) tensor. A row ends
    after its first token in ``stop_tokens`` (yielded too) or after ``max_new_tokens``. With
    ``seed`` the same call gives the same tokens; without it, torch's global generator is used. When
    a model with a bounded context is full, it goes on from the last half of it.

    Raises ``ValueError`` for an empty prompt, a token outside the vocabulary or a bad option,
    before the first step."""
    rows = _check_prompts(model, prompts)
    check_options(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"fastlm.generate: max_new_tokens must be >= 0, got {max_new_tokens}")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _steps(model, rows, max_new_tokens, options, seed, frozenset(stop_tokens))


def generate(
    model, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, **options
) -> list[list[int]]:
    """The new tokens of each row; options and errors are those of :func:`stream`."""
    steps = list(stream(model, prompts, max_new_tokens, **options))
    return [[step[b] for step in steps if step[b] is not None] for b in range(len(prompts))]


def _check_prompts(model, prompts) -> list[list[int]]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype.is_floating_point:
            raise ValueError(
                "fastlm.generate: a prompt tensor must be (B, T) of whole numbers, got "
                f"{tuple(prompts.shape)} of {prompts.dtype}"
            )
        prompts = prompts.tolist()
    rows = [list(map(int, row)) for row in prompts]
    vocab_size = model.config.vocab_size
    if not rows:
        raise ValueError("fastlm.generate: prompts is empty, expected at least one row")
    for b, row in enumerate(rows):
        if not row:
            raise ValueError(f"fastlm.generate: prompt {b} is empty, expected at least one token")
        if min(row) < 0 or max(row) >= vocab_size:
            raise ValueError(
                f"fastlm.generate: prompt {b} has a token outside the vocabulary 0..{vocab_size - 1}"
            )
    return rows


def _steps(model, rows, max_new_tokens, options, seed, stop_tokens) -> Iterator[list[int | None]]:
    device = next(model.parameters()).device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    alive = [True] * len(rows)
    state, room = None, 0
    for step in range(max_new_tokens):
        with _inference(model, whole=step == 0):
            if room == 0:
                logits, state, room = _prefill(model, rows, max_new_tokens, device)
            else:
                last = torch.tensor([row[-1] for row in rows], device=device)
                logits, state = model.decode(last, state)
                room -= 1
            drawn = sample(logits, generator=generator, **options).tolist()
        for row, token in zip(rows, drawn, strict=True):
            row.append(token)
        yield [token if live else None for token, live in zip(drawn, alive, strict=True)]
        alive = [live and token not in stop_tokens for token, live in zip(drawn, alive, strict=True)]
        if not any(alive):
            return


def _prefill(model, rows, max_new_tokens, device):
    """Fills a fresh state from the rows; returns (logits, state, tokens that still fit)."""
    limit = model.max_length
    longest = max(map(len, rows))
    capacity = longest + max_new_tokens
    if limit is not None and capacity > limit:
        capacity = limit
        if longest >= limit:
            longest = max(1, limit // 2)
    tails = [row[-longest:] for row in rows]
    longest = max(map(len, tails))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, tail in enumerate(tails):
        tokens[b, : len(tail)] = torch.tensor(tail)
    lengths = torch.tensor([len(tail) for tail in tails])
    logits, state = model.prefill(tokens.to(device), lengths.to(device), capacity)
    return logits, state, capacity - longest


class _inference:
    """Evaluation mode without gradients for one step, so that a caller who stops reading a stream
    midway, or trains between two of its steps, finds the model as it was.

    A walk through the modules takes as long as a small layer: behind the first step, a model whose own mode is
    evaluation is one as a whole."""

    def __init__(self, model, whole: bool):
        self.model, self.whole, self.no_grad = model, whole, torch.no_grad()

    def __enter__(self):
        look = self.whole or self.model.training
        self.trained = [m for m in self.model.modules() if m.training] if look else []
        for module in self.trained:
            module.training = False
        self.no_grad.__enter__()

    def __exit__(self, *error):
        self.no_grad.__exit__(*error)
        for module in self.trained:
            module.training = True
