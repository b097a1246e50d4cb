"""Runs that train low-rank adapters alone: W + alpha/r B A, of which only A and B change.

PEFT makes the adapters; see :mod:`fastlm.integrations.peft`. Kept are they alone, in PEFT's own format:

    FOLDER/adapter_config.json           PEFT's, with base_model_name_or_path, as seen from FOLDER
    FOLDER/adapter_model.safetensors

A model is read from such a folder with its adapters merged.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlm.files import read_json, write_files
from fastlm.models.base import Model, check_finite, packed, read_tensors
from fastlm.options import TrainOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in PEFT's files


def _peft():
    try:
        import peft

        import fastlm.integrations.peft  # noqa: F401 - makes our layers known to it
    except ImportError as error:
        raise ValueError(
            f"low-rank adapters are made by PEFT: pip install 'fastlm[peft]' ({error})"
        ) from None
    return peft


def config(model: Model, options: TrainOptions):
    """PEFT's, for a run with these options; ``ValueError`` where the model has no layer of a name, or one that
    can't have an adapter."""
    peft, targets = _peft(), list(options.lora_targets or model.lora_targets)
    check_targets(model, targets)
    return peft.LoraConfig(
        r=options.lora,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        modules_to_save=list(model.new_layers) or None,
    )


def check_targets(model: Model, targets: list[str]) -> None:
    able = {name: module for name, module in model.named_modules() if _can_have_one(module)}
    shared = [
        p for p in model.parameters() if sum(m.weight is p for m in able.values() if hasattr(m, "weight")) > 1
    ]
    for target in targets:
        found = [name for name in able if name == target or name.endswith(f".{target}")]
        if not found:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in able}))
            raise ValueError(f"lora_targets: no layer {target!r} to adapt here, but {names}")
        for name in found:
            if any(getattr(able[name], "weight", None) is p for p in shared):
                raise ValueError(
                    f"lora_targets: {target!r} shares its weight with another layer, which its adapter would miss"
                )


def _can_have_one(module: nn.Module) -> bool:
    from fastlm.integrations.peft import ADAPTERS

    return isinstance(module, (nn.Linear, nn.Embedding, *ADAPTERS))


def adapt(model: Model, options: TrainOptions) -> None:
    """Gives the model adapters, in place, and freezes the rest. What they begin with is drawn from torch's
    random state; they change no result yet."""
    _peft().inject_adapter_in_model(config(model, options), model)


def is_adapted(model: Model) -> bool:
    return hasattr(model, "peft_config")


def stored_tensors(model: Model) -> dict[str, Tensor]:
    """What is trained of an adapted model, by its name in PEFT's file."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = _peft().get_peft_model_state_dict(model, trained, save_embedding_layers=False)
    return {PREFIX + name: p for name, p in found.items()}


@torch.no_grad()
def load_tensors(model: Model, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """The inverse; ``ValueError`` where they have other names or shapes, or values that aren't finite."""
    check_finite(tensors, path)
    places = stored_tensors(model)
    wrong = places.keys() ^ tensors.keys()
    wrong |= {name for name, p in places.items() if name in tensors and tensors[name].shape != p.shape}
    if wrong:
        raise ValueError(f"{path}: not an adapter of this model: {min(wrong)}")
    for name, p in places.items():
        p.copy_(tensors[name])


def save(folder: Path, model: Model, tensors: dict[str, Tensor], base: str) -> None:
    """Writes PEFT's two files; ``base`` is the folder of the model without adapters."""
    write(folder, model.peft_config["default"].to_dict(), tensors, base)


def write(folder: Path, values: dict, tensors: dict[str, Tensor], base: str | None) -> None:
    values |= {"base_model_name_or_path": base, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_files(
        {
            folder / WEIGHTS: packed({name: t.detach().cpu().contiguous() for name, t in tensors.items()}),
            folder / CONFIG: (json.dumps(values, indent=2, default=sorted) + "\n").encode(),
        }
    )


def read_config(folder: Path) -> dict:
    """PEFT's, as :func:`save` wrote it; ``ValueError`` where it is damaged."""
    return read_json(folder / CONFIG)


def holds_one(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def merge(model: Model, folder: Path) -> Model:
    """The model with the adapters in ``folder`` added to its weights."""
    peft, tensors = _peft(), read_tensors(folder / WEIGHTS)
    if read_json(folder / CONFIG).get("megatron_config"):  # PEFT would import a module that the file names
        raise ValueError(f"{folder}: adapters of Megatron's layers aren't supported")
    try:
        given = peft.LoraConfig.from_pretrained(folder)
        given.inference_mode = False  # else what it trains is not known
        tuner = peft.LoraModel(model, given, "default")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}: not adapters of this model: {error}") from None
    load_tensors(model, tensors, folder)
    return tuner.merge_and_unload().eval()
