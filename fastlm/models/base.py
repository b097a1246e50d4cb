"""What the language models share: counting, generating, saving and loading."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlm import functional as fused
from fastlm import generate as decoding
from fastlm.files import read_json, write_file, write_files
from fastlm.nn import only_multiplies

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files, as the transformers library writes them


class Model(nn.Module):
    """What is saved and loaded as a folder. Subclasses define ``config_class`` and put their config, a
    dataclass, in ``self.config``."""

    config_class: type
    model_type: str
    max_length: int | None = None  # tokens of a sequence
    lora_targets: tuple[str, ...] = ()  # layers that get low-rank adapters where none are named
    new_layers: tuple[str, ...] = ()  # those that are trained beside adapters

    def num_params(self, embeddings: bool = True) -> int:
        """Number of parameters, shared ones counted once; without ``embeddings``, those of the
        input embeddings (an untied head counts) are left out."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            total -= sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return total

    def stored_tensors(self) -> dict[str, Tensor]:
        """The state dict, with a tied weight once."""
        seen, tensors = set(), {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = tensor.detach()
        return tensors

    def save_pretrained(
        self, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None, **extra
    ) -> None:
        """Writes ``config.json`` (with ``extra`` entries) and ``model.safetensors`` into
        ``folder``, replaced only by whole new ones; the model's own weights or, as in the
        transformers library, those of ``state_dict``. ``OSError`` where they can't be written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config_values() | extra
        tensors = self.stored_tensors() if state_dict is None else state_dict
        for name, tensor in tensors.items():
            if type(tensor) is not Tensor:
                raise ValueError(
                    f"save_pretrained: {name} is kept as {type(tensor).__name__}; save a model before it is quantized"
                )
        write_files(
            {
                folder / WEIGHTS: packed({name: t.contiguous() for name, t in tensors.items()}),
                folder / CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
            }
        )

    def config_values(self) -> dict:
        """What ``config.json`` says of the model."""
        return {"model_type": self.model_type, **dataclasses.asdict(self.config)}

    def tally(self, *batch: Tensor) -> list[float]:
        """Sums over a batch of evaluation that :meth:`metrics` wants of all: of the losses, the targets, and
        others."""
        raise NotImplementedError

    def metrics(self, totals: Sequence[float]) -> dict[str, float]:
        """The loss, and what else tells how good the model is, of the tallies' sum."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "Model":
        """Loads what :meth:`save_pretrained` wrote. ``ValueError`` where a file is missing, damaged
        or of another model, or a weight isn't finite."""
        config = read_config(folder)
        named = config.get("model_type", cls.model_type)
        if named not in cls.accepted_types():
            raise ValueError(f"{folder}: holds a model of type {named!r}, expected {cls.model_type!r}")
        config = cls.config_from_dict(config)
        cls.check_stored(config, folder)
        model = cls._made(config, folder)
        model.load_tensors(read_weights(folder), folder)
        return model.eval()

    @classmethod
    def _made(cls, config, folder: str | os.PathLike) -> "Model":
        """A model of the configuration in ``folder``, if there can be one of its sizes."""
        try:
            return cls(config)
        except RuntimeError as error:
            raise ValueError(f"{folder}: {CONFIG}: {str(error).splitlines()[0]}") from None

    @classmethod
    def check_stored(cls, config, folder: str | os.PathLike) -> None:
        """``ValueError`` unless the weights in ``folder`` are those of a model of this configuration: asked of
        their names and shapes, before a configuration that is absurd makes anything large."""
        shapes = read_shapes(folder)
        if config.n_layer > len(shapes):
            raise ValueError(
                f"{folder}: {CONFIG} has n_layer {config.n_layer}, the weights are {len(shapes)} tensors"
            )
        with torch.device("meta"):
            tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
            cls._made(config, folder)._load(tensors, folder, assign=True)

    @classmethod
    def accepted_types(cls) -> tuple[str, ...]:
        return (cls.model_type,)

    @classmethod
    def config_from_dict(cls, values: dict):
        names = {field.name for field in dataclasses.fields(cls.config_class)}
        return cls.config_class(**{k: v for k, v in values.items() if k in names})

    def load_tensors(self, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
        """Copies ``tensors``, read from ``path``, into the model; ``ValueError`` where they have other
        names or shapes, or values that aren't finite."""
        check_finite(tensors, path)
        self._load(tensors, path)

    def _load(self, tensors: dict[str, Tensor], path: str | os.PathLike, assign: bool = False) -> None:
        try:
            self.load_state_dict(tensors, assign=assign)
        except RuntimeError as error:
            first, *rest = (line.strip() for line in str(error).splitlines()[1:])
            more = f", and {len(rest)} more" if rest else ""
            raise ValueError(f"{path}: not a checkpoint of this model: {first[:200]}{more}") from None


class LanguageModel(Model):
    """A model of the next token. Subclasses define ``features`` (what the head reads), ``forward``, and
    ``prefill`` and ``decode`` (see ``fastlm/generate.py``)."""

    head_name: str

    def tally(self, idx: Tensor, targets: Tensor) -> list[float]:
        """The sum of the losses, and how many targets there are."""
        loss, count = self(idx, targets).item(), int((targets >= 0).sum())
        return [loss * count if count else 0.0, float(count)]

    def metrics(self, totals: Sequence[float]) -> dict[str, float]:
        return {"loss": totals[0] / totals[1]}

    def generate(self, prompts, max_new_tokens: int, **options) -> list[list[int]]:
        """New tokens for each row of ``prompts``; see :func:`fastlm.generate.stream`."""
        return decoding.generate(self, prompts, max_new_tokens, **options)

    def stream(self, prompts, max_new_tokens: int, **options):
        """Like :meth:`generate`, yielding a step at a time."""
        return decoding.stream(self, prompts, max_new_tokens, **options)


def packed(tensors: dict[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    from safetensors.torch import save

    return save(tensors, metadata={"format": "pt"})


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file as :func:`fastlm.files.write_file` does."""
    write_file(path, packed(tensors))


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first that holds NaN or infinity."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.is_floating_point() and not torch.isfinite(local).all():
            return name
    return None


def check_finite(tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """``ValueError`` where weights, read from ``path``, are no numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected a floating dtype")
    if (name := not_finite(tensors)) is not None:
        raise ValueError(
            f"{path}: {name} holds values that aren't finite; the model has diverged or is damaged"
        )


def read_config(folder: str | os.PathLike) -> dict:
    """The ``config.json`` of a model folder; ``ValueError`` where it is missing or damaged."""
    try:
        return read_json(Path(folder) / CONFIG)
    except FileNotFoundError:
        raise ValueError(f"{folder}: no model here ({CONFIG} is missing)") from None


def _read_safetensors(path: str | os.PathLike, read: Callable):
    from safetensors import SafetensorError

    try:
        return read(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from None


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ``ValueError`` where it is missing, truncated or not
    one."""
    from safetensors.torch import load_file

    return _read_safetensors(path, load_file)


def read_weights(folder: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a model's folder, of one file or of several with an index."""
    return {name: tensor for path in _weight_files(folder) for name, tensor in read_tensors(path).items()}


def read_shapes(folder: str | os.PathLike) -> dict[str, list[int]]:
    """The shapes of the same, which are all that is read."""
    from safetensors import safe_open

    def read(path):
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}

    return {
        name: shape for path in _weight_files(folder) for name, shape in _read_safetensors(path, read).items()
    }


def _weight_files(folder: str | os.PathLike) -> list[Path]:
    index = Path(folder) / INDEX
    if not index.is_file():
        return [Path(folder) / WEIGHTS]
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(file).name != file for file in files):
            raise ValueError("a file outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).removeprefix(f"{index}: damaged: ")
        raise ValueError(f"{index}: damaged: {reason}") from None
    return [Path(folder) / file for file in files]


def head_loss(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``head(x)``, x (B, T, C) and targets (B, T). A plain layer's logits are never in
    memory; what an adapter around it gives is not its weight's alone."""
    if not x.is_contiguous():  # a GRU's, which lie in the order of time, and are read so
        x, targets = x.transpose(0, 1), targets.t()
    x, targets = x.flatten(0, 1), targets.flatten()
    if only_multiplies(head):
        return fused.linear_cross_entropy(x, head.weight, targets, linear_bias=head.bias)
    return fused.cross_entropy(head(x), targets)


def check_tokens(name: str, idx: Tensor, targets: Tensor | None, limit: int | None) -> None:
    """Raises ``ValueError`` unless ``idx`` is (B, T) whole numbers, T within ``limit``, and
    ``targets``, if any, has its shape."""
    if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: idx must be (B, T) of int64 or int32, got {tuple(idx.shape)} of {idx.dtype}"
        )
    if limit is not None and idx.shape[1] > limit:
        raise ValueError(f"{name}: idx has {idx.shape[1]} tokens, the model's context is {limit}")
    if targets is not None and targets.shape != idx.shape:
        raise ValueError(
            f"{name}: targets must have the shape of idx, {tuple(idx.shape)}, got {tuple(targets.shape)}"
        )
