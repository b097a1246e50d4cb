"""GRU LM: embedding, a stack of GRU layers, a softmax over the vocabulary.

    e = dropout(E[idx]);  h = GRU(e, state);  logits = W dropout(h) + b        (W = E where tied)

The recurrence is fastlm's fused GRU; the loss is fused with the head, so that no (tokens x
vocabulary) matrix of logits is in memory in training. The state is one hidden vector a layer, so
text of any length can be read and generated, and training can carry the state from one piece of a
text to the next (truncated backpropagation through time).

Dimensions: B batch, T time, E embedding (n_embd), H hidden (n_hidden), L layers, V vocabulary.

Sources: Cho et al. 2014, arXiv:1406.1078 (GRU); Press and Wolf 2017, arXiv:1608.05859 (tying).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlm.models.base import LanguageModel, check_tokens, head_loss
from fastlm.nn import GRU, Embedding, Linear


@dataclass
class GRULMConfig:
    """Sizes and rates of a :class:`GRULM`. Raises ``ValueError`` for a value out of its range."""

    vocab_size: int = 50257
    n_embd: int = 512
    n_hidden: int = 512
    n_layer: int = 2
    dropout: float = 0.1  # of embeddings, between layers and before the head
    zoneout: float = 0.0  # share of units that keep their state at a step
    recurrent_dropout: float = 0.0  # dropped share of the recurrent weights
    layer_norm: bool = False  # in the gates
    tie_word_embeddings: bool = False  # the head is the embedding matrix; needs n_embd == n_hidden

    def __post_init__(self):
        for name in ("vocab_size", "n_embd", "n_hidden", "n_layer"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"GRULMConfig: {name} must be a whole number >= 1, got {getattr(self, name)!r}"
                )
        for name in ("dropout", "zoneout", "recurrent_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GRULMConfig: {name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.tie_word_embeddings and self.n_embd != self.n_hidden:
            raise ValueError(
                "GRULMConfig: tie_word_embeddings needs n_embd == n_hidden, "
                f"got {self.n_embd} and {self.n_hidden}"
            )


class GRULM(LanguageModel):
    """``model(idx)`` gives logits (B, T, V); ``model(idx, targets)`` the mean loss in nats, without
    holding the logits. Targets of -100 don't count. ``idx`` and ``targets`` are (B, T) of int64.
    With ``return_state=True`` the result is a pair with the state (L, B, H) after the last token,
    which a later call takes as ``state``.

    Raises ``ValueError`` for another shape or dtype.
    """

    config_class = GRULMConfig
    model_type = "gru"
    lora_targets = ("gru",)
    head_name = "head"

    def __init__(self, config: GRULMConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.gru = GRU(
            config.n_embd,
            config.n_hidden,
            config.n_layer,
            batch_first=True,
            dropout=config.dropout if config.n_layer > 1 else 0.0,
            zoneout=config.zoneout,
            recurrent_dropout=config.recurrent_dropout,
            layer_norm=config.layer_norm,
        )
        self.head = Linear(config.n_hidden, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_restore_tied_head)

    def reset_parameters(self) -> None:
        """Embeddings standard normal or, where tied, small enough for a head; orthogonal recurrent
        weights (one block a gate), Xavier input weights, biases 0."""
        nn.init.normal_(
            self.embedding.weight,
            std=self.config.n_hidden**-0.5 if self.config.tie_word_embeddings else 1.0,
        )
        self.gru.reset_parameters()
        for name, p in self.gru.named_parameters():
            for gate in p.chunk(3):
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(gate)
                elif name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(gate)
                elif name.startswith("bias"):
                    nn.init.zeros_(gate)
        if not self.config.tie_word_embeddings:
            nn.init.normal_(self.head.weight, std=self.config.n_hidden**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        state: Tensor | None = None,
        return_state: bool = False,
    ):
        check_tokens("GRULM", idx, targets, None)
        x, state = self._hidden(idx, state)
        if targets is None:
            result = self.head(x)
        else:
            result = head_loss(self.head, x, targets)
        return (result, state) if return_state else result

    def features(self, idx: Tensor) -> Tensor:
        """The hidden states (B, T, H) that the head reads for tokens (B, T)."""
        return self._hidden(idx, None)[0]

    def _hidden(self, idx: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.dropout(self.embedding(idx))
        if state is None and torch.is_autocast_enabled(x.device.type):
            # Of autocast's dtype, which states without one would leave for x's on a CPU and the head take up again.
            size = (self.config.n_layer, x.shape[0], self.config.n_hidden)
            state = x.new_zeros(size, dtype=torch.get_autocast_dtype(x.device.type))
        x, state = self.gru(x, state)
        return self.dropout(x), state

    def prefill(self, idx: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Reads right-padded prompts (B, T); returns the logits (B, V) after each row's last token
        and the state. The state has no bound, so ``capacity`` is not needed."""
        check_tokens("GRULM.prefill", idx, None, None)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(idx), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, state = self.gru(packed)
        return self.head(state[-1]), state

    def decode(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One more token a row, (B,); returns the logits (B, V) after it, and the new state."""
        x, state = self.gru(self.embedding(tokens[:, None]), state)
        return self.head(x[:, 0]), state


def _restore_tied_head(model: GRULM, state_dict: dict, prefix: str, *unused) -> None:
    """A saved model keeps a tied weight once, under ``embedding.weight``."""
    embedding = f"{prefix}embedding.weight"
    if model.config.tie_word_embeddings and embedding in state_dict:
        state_dict.setdefault(f"{prefix}head.weight", state_dict[embedding])
