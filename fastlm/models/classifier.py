"""A text's label: a linear layer on what a GPT or a GRULM makes of the last token.

    logits = W h[length - 1],  h = body(idx)          idx (B, T), h (B, T, C), W (K, C), logits (B, K)

As the transformers library's models for sequence classification have it, whose folders load here and are
written by :func:`fastlm.export.to_transformers`: labels stand in the configuration as ``id2label`` and
``label2id``, the layer is ``score``. The body is the language model without its head.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlm import functional as fused
from fastlm.models.base import Model, check_tokens
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.gru_lm import GRULM, GRULMConfig
from fastlm.nn import Linear

_BODIES = {kind.config_class: kind for kind in (GPT, GRULM)}


@dataclass
class SequenceClassifierConfig:
    """The language model's configuration and the names of the labels, in the order of the logits. Raises
    ``ValueError`` for less than two labels, or one twice."""

    body: GPTConfig | GRULMConfig
    labels: tuple[str, ...]

    def __post_init__(self):
        self.labels = tuple(self.labels)
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(
                f"SequenceClassifierConfig: labels must be 2 or more different names, got {list(self.labels)}"
            )

    @property
    def vocab_size(self) -> int:
        return self.body.vocab_size

    @property
    def n_layer(self) -> int:
        return self.body.n_layer


class SequenceClassifier(Model):
    """``model(idx)`` gives logits (B, K) after the last token of each row of ``idx`` (B, T), int64; of rows that
    are padded on the right, ``lengths`` (B,) says where that is. ``model(idx, targets, lengths)`` gives the mean
    cross-entropy of the labels ``targets`` (B,); those of -100 don't count.

    ``labels`` are the names of the K labels, ``body`` the GPT or GRULM without a head.
    Raises ``ValueError`` for another shape or dtype, or more tokens than the body's context.
    """

    config_class = SequenceClassifierConfig
    model_type = "classifier"  # of one that is made: its body's
    new_layers = ("score",)

    def __init__(self, config: SequenceClassifierConfig):
        super().__init__()
        self.config, self.labels = config, config.labels
        kind = _BODIES[type(config.body)]
        self.body = kind(config.body)
        setattr(self.body, kind.head_name, None)
        self.model_type, self.max_length = kind.model_type, self.body.max_length
        self.lora_targets = kind.lora_targets
        width = getattr(config.body, "n_hidden", config.body.n_embd)
        self.score = Linear(width, len(self.labels), bias=False)
        nn.init.normal_(self.score.weight, std=0.02)
        self.register_load_state_dict_pre_hook(_accept_their_names)

    def forward(self, idx: Tensor, targets: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        check_tokens("SequenceClassifier", idx, None, self.max_length)
        for name, given in (("targets", targets), ("lengths", lengths)):
            if given is not None and given.shape != idx.shape[:1]:
                raise ValueError(
                    f"SequenceClassifier: {name} must be ({len(idx)},), one for each row of idx, "
                    f"got {tuple(given.shape)}"
                )
        x = self.body.features(idx)
        last = x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]
        logits = self.score(last)
        return logits if targets is None else fused.cross_entropy(logits, targets)

    @torch.no_grad()
    def predict(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Probabilities (B, K) of the labels, float32, for rows of tokens of any lengths >= 1; of more than the
        body's context the first are read."""
        rows = [list(row[: self.max_length]) for row in rows]
        if not all(rows):
            raise ValueError("SequenceClassifier.predict: a row is empty, expected at least one token")
        training, device = self.training, self.score.weight.device
        idx = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        logits = self.eval()(idx.to(device), lengths=lengths.to(device))
        self.train(training)
        return logits.float().softmax(-1)

    def tally(self, idx: Tensor, targets: Tensor, lengths: Tensor) -> list[float]:
        """Loss, number of texts and, of each label, the texts it was given to rightly, those it was given to,
        and those it belongs to."""
        logits = self(idx, lengths=lengths)
        here = targets >= 0
        logits, targets = logits[here].float(), targets[here]
        loss = fused.cross_entropy(logits, targets, reduction="sum").item() if len(targets) else 0.0
        given = logits.argmax(-1)
        counts = [x.bincount(minlength=len(self.labels)) for x in (targets[given == targets], given, targets)]
        return [loss, float(len(targets)), *torch.cat(counts).tolist()]

    def metrics(self, totals: Sequence[float]) -> dict[str, float]:
        """Mean loss, accuracy, and the mean of the labels' F1, where a label that is neither given nor there
        doesn't count."""
        (loss, count), counts = totals[:2], torch.tensor(totals[2:]).view(3, -1)
        right, given, there = counts.double()
        some = given + there > 0
        f1 = 2 * right[some] / (given + there)[some]
        return {"loss": loss / count, "accuracy": float(right.sum()) / count, "macro_f1": float(f1.mean())}

    def config_values(self) -> dict:
        names = dict(enumerate(self.labels))
        return {
            "model_type": self.model_type,
            **dataclasses.asdict(self.config.body),
            "architectures": ["SequenceClassifier"],
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
        }

    @classmethod
    def is_described(cls, values: dict) -> bool:
        """Whether a ``config.json`` is of a classifier, ours or the library's."""
        named = values.get("architectures") or [""]
        return str(named[0]).endswith(("SequenceClassifier", "ForSequenceClassification"))

    @classmethod
    def config_from_dict(cls, values: dict) -> SequenceClassifierConfig:
        kinds = [kind for kind in _BODIES.values() if values.get("model_type") in kind.accepted_types()]
        if not kinds:
            raise ValueError(f"SequenceClassifier: model_type {values.get('model_type')!r} isn't supported")
        problem = values.get("problem_type")
        if problem not in (None, "single_label_classification"):
            raise ValueError(f"SequenceClassifier: problem_type {problem!r} isn't supported")
        names = values.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # the library's, where it has none
        try:
            labels = [names[i] for i in sorted(names, key=int)]
        except (TypeError, ValueError, AttributeError):
            raise ValueError(
                f"SequenceClassifier: id2label must name each label's number, got {names!r}"
            ) from None
        return SequenceClassifierConfig(kinds[0].config_from_dict(values), tuple(map(str, labels)))

    @classmethod
    def accepted_types(cls) -> tuple[str, ...]:
        return tuple(name for kind in _BODIES.values() for name in kind.accepted_types())


def _accept_their_names(model: SequenceClassifier, state_dict: dict, prefix: str, *unused) -> None:
    """The library's classifiers have the body's parameters beside ``score``."""
    for key in list(state_dict):
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not name.startswith(("body.", "score.")):
            state_dict[f"{prefix}body.{name}"] = state_dict.pop(key)
