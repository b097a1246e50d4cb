"""A run's folder, and checkpoints in it that are there whole or not at all.

    RUN/run.json              the options of the run and the hash of its corpus
    RUN/metrics.jsonl         one line a step and one an evaluation
    RUN/tensorboard/
    RUN/checkpoints/step-N/   model.safetensors, config.json, tokenizer.json; to go on from step N,
                              trainer.safetensors (AdamW's moments, random states), trainer.json
    RUN/best/step-N/          the best model so far, kept where early stopping was asked for

A run of low-rank adapters keeps these alone, and what they change once:

    RUN/base/                 the model without them
    RUN/checkpoints/step-N/   adapter_config.json, adapter_model.safetensors, trainer.*

A folder is written under a temporary name, flushed to the disk and renamed. The last two
checkpoints are kept. Nothing is pickled.

Several processes write the same files: the first of them gathers what the others hold. The format of
torch.distributed.checkpoint is not used, since to read it is to unpickle its metadata; and these files
are read by one process or any number."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastlm import lora
from fastlm.files import leftovers, naming, read_json, write_file
from fastlm.models import from_pretrained, model_class, read_config
from fastlm.models.base import WEIGHTS, Model, read_tensors, write_tensors
from fastlm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

_KEPT = {"checkpoints": 2, "best": 1}
BASE = "base"


class Run:
    """A run's folder, locked against a second run for as long as this object lives. Only the first
    of a run's processes locks it; the others don't touch it."""

    def __init__(self, folder: Path, locked: bool = True):
        self.folder = folder
        if not locked:
            return
        self._lock = open(folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another process is training there") from None
        for leftover in leftovers(folder):
            leftover.unlink()

    @classmethod
    def create(cls, folder: Path, options: dict, overwrite: bool = False) -> "Run":
        """A new run. ``ValueError`` where the folder holds anything, unless that is a run and is to
        be overwritten."""
        check_free(folder, overwrite)
        if folder.exists():
            run = cls(folder)
            # run.json goes last: until then the folder can be recognised as a run.
            for entry in sorted(folder.iterdir(), key=lambda path: path.name == "run.json"):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            run._lock.close()
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "run.json", (json.dumps(options, indent=2) + "\n").encode())
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> "Run":
        read_options(folder)
        run = cls(folder)
        for kind, kept in _KEPT.items():
            _tidy(folder / kind, kept)
        return run

    def save(
        self,
        step: int,
        model: Model,
        tokenizer: Tokenizer,
        weights: dict[str, Tensor],
        tensors: dict[str, Tensor],
        state: dict,
    ) -> None:
        """Writes checkpoint ``step`` and drops the oldest ones."""

        def write(folder: Path) -> None:
            _save_trained(folder, model, tokenizer, weights)
            write_tensors(folder / "trainer.safetensors", tensors)
            write_file(folder / "trainer.json", (json.dumps(state, indent=2) + "\n").encode())

        self._publish("checkpoints", step, write)

    def save_best(self, step: int, model: Model, tokenizer: Tokenizer, weights: dict[str, Tensor]) -> None:
        self._publish("best", step, lambda folder: _save_trained(folder, model, tokenizer, weights))

    def save_base(self, model: Model, tokenizer: Tokenizer) -> None:
        """Writes the model that adapters are about to be trained for."""
        save_model(self.folder / BASE, model, tokenizer)
        _sync(self.folder / BASE)

    def _publish(self, kind: str, step: int, write: Callable[[Path], None]) -> None:
        parent = self.folder / kind
        temporary, target = parent / f".step-{step}", parent / f"step-{step}"
        try:
            with naming(temporary):
                temporary.mkdir(parents=True)
            write(temporary)
            _sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # else half a checkpoint stays on a full disk
            raise
        if target.exists():  # the same step, come to again after a kill
            os.rename(target, parent / f".old-{step}")
        os.rename(temporary, target)
        _sync(parent)
        _tidy(parent, _KEPT[kind])


def _tidy(parent: Path, kept: int) -> None:
    """Drops all checkpoints but the last, and what a process that was killed here left."""
    for old in list_steps(parent)[:-kept]:
        os.rename(old, parent / f".old-{old.name}")
    for leftover in parent.glob(".*"):
        shutil.rmtree(leftover)


def check_free(folder: Path, overwrite: bool) -> None:
    """``ValueError`` unless a run can begin in ``folder``."""
    if not folder.exists() or folder.is_dir() and not set(folder.iterdir()) - set(leftovers(folder)):
        return
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder}: exists and is not a run of fastlm train; choose another --out")
    if not overwrite:
        raise ValueError(f"{folder}: holds a run already; --resume goes on with it, --overwrite replaces it")


def read_options(folder: Path) -> dict:
    """The options a run was begun with; ``ValueError`` where there is none or the file is
    damaged."""
    return _read_json(folder / "run.json", f"{folder}: no run of fastlm train here")


def _read_json(path: Path, missing: str) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise ValueError(missing) from None


def list_steps(parent: Path) -> list[Path]:
    """The folders ``step-N`` in ``parent``, by N."""
    found = [p for p in parent.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def load_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """What :meth:`Run.save` got as ``weights``, ``tensors`` and ``state``."""
    state = _read_json(
        checkpoint / "trainer.json",
        f"{checkpoint}: no checkpoint of a run (trainer.json is missing)",
    )
    tensors = read_tensors(checkpoint / "trainer.safetensors")
    return load_weights(checkpoint), tensors, state


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Those that a checkpoint, perhaps of the run in ``folder``, holds: of a model or of its adapters."""
    folder = find_model(folder)
    return read_tensors(folder / (lora.WEIGHTS if lora.holds_one(folder) else WEIGHTS))


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: all of it, or its adapters."""
    return lora.stored_tensors(model) if lora.is_adapted(model) else model.stored_tensors()


def load_trained(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    """The inverse; ``ValueError`` where the tensors, read from ``path``, are of another model."""
    if lora.is_adapted(model):
        lora.load_tensors(model, tensors, path)
    else:
        model.load_tensors(tensors, path)


def _save_trained(folder: Path, model: Model, tokenizer: Tokenizer, weights: dict[str, Tensor]) -> None:
    if lora.is_adapted(model):
        lora.save(folder, model, weights, base=f"../../{BASE}")
    else:
        save_model(folder, model, tokenizer, weights)


def save_model(
    folder: str | os.PathLike,
    model: Model,
    tokenizer: Tokenizer,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes a model and its tokenizer, for :func:`load_model`; with ``weights`` instead of its own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"tokenizer": tokenizer.save(folder), "eos_token_id": tokenizer.end_of_text}
    model.save_pretrained(folder, weights, **names)


def load_model(folder: str | os.PathLike) -> tuple[Model, Tokenizer]:
    """The model and tokenizer of a run (its best model where one was kept, else its last), of one
    of its checkpoints, or of a folder in the layout of the transformers library; adapters are merged."""
    tokenizer = describe(folder)[-1]
    found = find_model(Path(folder))
    model = load_base(found)
    return lora.merge(model, found) if lora.holds_one(found) else model, tokenizer


def load_base(folder: Path) -> Model:
    """The model in ``folder`` without the adapters there may be."""
    return from_pretrained(base_of(folder))


def describe(folder: str | os.PathLike) -> tuple[type[Model], object, Tokenizer]:
    """The class, configuration and tokenizer of what :func:`load_model` loads."""
    folder = base_of(find_model(Path(folder)))
    values = read_config(folder)
    spec = values.get("tokenizer")
    if spec is None:
        if not (folder / TOKENIZER_FILE).is_file():
            raise ValueError(f"{folder}: no tokenizer here ({TOKENIZER_FILE} is missing)")
        spec = TOKENIZER_FILE
    elif spec not in ("bytes", TOKENIZER_FILE) and not str(spec).startswith("tiktoken:"):
        raise ValueError(f"{folder}: names a tokenizer outside of the folder, {spec!r}")
    model = model_class(folder)
    end = values.get("eos_token_id")
    if isinstance(end, list):  # the first ends a text, others a turn of a conversation
        end = end[0] if end else None
    if not (end is None or type(end) is int and end >= 0):
        raise ValueError(f"{folder}: eos_token_id must be a token, got {end!r}")
    config, tokenizer = model.config_from_dict(values), load_tokenizer(spec, folder, end)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}: they don't belong together"
        )
    return model, config, tokenizer


def find_model(folder: Path) -> Path:
    """The folder of weights that ``folder``, perhaps a run, stands for."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / "run.json").is_file():
        steps = list_steps(folder / "best") or list_steps(folder / "checkpoints")
        if not steps:
            raise ValueError(f"{folder}: this run has no checkpoint yet")
        return steps[-1]
    return folder


def base_of(folder: Path) -> Path:
    """The folder of a whole model: this one or, where it holds adapters, that of the model they belong to."""
    if not lora.holds_one(folder):
        return folder
    named = str(lora.read_config(folder).get("base_model_name_or_path"))
    for base in (folder / named, Path(named)):
        if base.is_dir():
            return base
    raise ValueError(f"{folder / lora.CONFIG}: the adapters' model, {named!r}, is no folder here")


def _sync(folder: Path) -> None:
    """Flushes a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: ``KEY.PARAMETER``."""
    return {
        f"{key}.{name}": value
        for name, p in _trained(model).items()
        for key, value in optimizer.state[p].items()
    }


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse; ``ValueError`` where the tensors are of another model."""
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        state.setdefault(name, {})[key] = value
    parameters = _trained(model)
    if state.keys() != parameters.keys() or any(
        v.dim() and v.shape != parameters[n].shape for n, values in state.items() for v in values.values()
    ):
        raise ValueError("the optimizer's state is of another model")
    for name, p in parameters.items():
        optimizer.state[p] = {k: v.to(p.device) for k, v in state[name].items()}
