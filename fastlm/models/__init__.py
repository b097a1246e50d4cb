"""Language models built on fastlm's functions and modules."""

import os

from fastlm.models.base import LanguageModel, Model, read_config
from fastlm.models.classifier import SequenceClassifier, SequenceClassifierConfig
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.models.gru_lm import GRULM, GRULMConfig

MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT, "gru": GRULM}

__all__ = [
    "GPT",
    "GPTConfig",
    "GRULM",
    "GRULMConfig",
    "LanguageModel",
    "MODELS",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "from_pretrained",
]


def from_pretrained(folder: str | os.PathLike) -> Model:
    """Loads the model in ``folder``, whichever it is; ``ValueError`` where there is none that
    fastlm has."""
    return model_class(folder).from_pretrained(folder)


def model_class(folder: str | os.PathLike) -> type[Model]:
    """That of the model in ``folder``."""
    values = read_config(folder)
    model_type = values.get("model_type")
    for model in MODELS.values():
        if model_type in model.accepted_types():
            return SequenceClassifier if SequenceClassifier.is_described(values) else model
    raise ValueError(f"{folder}: holds a model of type {model_type!r}, expected one of {sorted(MODELS)}")
