"""Models for other programs: a folder of the transformers library, and a file of torch.export."""

import dataclasses
import io
import json
import os
from pathlib import Path

import torch

from fastlm import checkpoint, lora
from fastlm.files import write_file, write_files
from fastlm.models import GPT, GPTConfig, SequenceClassifier, llama
from fastlm.models.base import CONFIG, WEIGHTS, Model, packed, read_tensors
from fastlm.tokenizer import TOKENIZER_FILE, ByteTokenizer, FileTokenizer, Tokenizer

# What the library's models are, in GPTConfig's words.
_GPT2 = {"pos": "learned", "norm": "layernorm", "mlp": "gelu"}
_LLAMA = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu"}


def to_transformers(model: Model, tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Writes the folder of a GPT-2 or a Llama that AutoModelForCausalLM, or AutoModelForSequenceClassification of
    a classifier, and AutoTokenizer load.

    ``ValueError`` where the library has no such model, the tokenizer has no ``tokenizer.json``, or the folder
    isn't empty."""
    folder = _new_folder(folder)
    labelled = isinstance(model, SequenceClassifier)
    body = model.body if labelled else model
    values, tensors = _in_their_words(body, body.stored_tensors())
    end = tokenizer.end_of_text
    values |= {"bos_token_id": end, "eos_token_id": end, "dtype": "float32"}
    library, settings = _library_tokenizer(tokenizer)
    if labelled:
        tensors["score.weight"] = model.score.weight.detach()
        labels = {name: value for name, value in model.config_values().items() if "label" in name}
        named = values["architectures"][0].replace("LMHeadModel", "").replace("ForCausalLM", "")
        values |= labels | {"architectures": [f"{named}ForSequenceClassification"], "pad_token_id": end}
        library, settings = _reads_as_a_classifier(library, settings, end)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(
        {
            folder / TOKENIZER_FILE: library.to_str().encode(),
            folder / "tokenizer_config.json": _json(settings),
            folder / WEIGHTS: packed({name: t.float().cpu().contiguous() for name, t in tensors.items()}),
            folder / CONFIG: _json(values),
        }
    )


def to_peft(origin: str | os.PathLike, folder: str | os.PathLike, base: str | None = None) -> None:
    """Writes the adapters of a run, or of one of its checkpoints, as PEFT's folder for the transformers library's
    GPT-2 or Llama; ``base`` is the name or the folder of that model. A Llama's projections that are one matrix
    in GPT get an adapter each, of the same A.

    ``ValueError`` where there are no adapters, or the library has no such model, or the folder isn't empty."""
    folder = _new_folder(folder)
    found = checkpoint.find_model(Path(origin))
    if not lora.holds_one(found):
        raise ValueError(f"{origin}: no low-rank adapters here, which fastlm train --lora makes")
    model = checkpoint.load_base(found)
    body = model.body if isinstance(model, SequenceClassifier) else model
    values, _ = _in_their_words(body, {})
    tensors = {
        name.removeprefix(lora.PREFIX).removeprefix("body."): t
        for name, t in read_tensors(found / lora.WEIGHTS).items()
    }
    if values["model_type"] == "llama":
        tensors = llama.llama_adapters(tensors, values)
    given = lora.read_config(found) | {
        "fan_in_fan_out": values["model_type"] == "gpt2",
        "task_type": "CAUSAL_LM" if body is model else "SEQ_CLS",
        "target_modules": sorted(
            {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}
        ),
    }
    lora.write(folder, given, {lora.PREFIX + name: t for name, t in tensors.items()}, base)


def _new_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")
    return folder


def _in_their_words(model: Model, tensors: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """The library's configuration of a GPT, and its ``tensors`` by the library's names."""
    if not isinstance(model, GPT):
        raise ValueError(
            f"{type(model).__name__} has no counterpart in the transformers library, only GPT has"
        )
    gpt2 = _is(model.config, _GPT2 | {"n_kv_head": model.config.n_head})
    return (_gpt2 if gpt2 else _llama)(model, tensors)


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _is(config: GPTConfig, parts: dict) -> bool:
    return all(getattr(config, name) == value for name, value in parts.items())


def _gpt2(model: GPT, tensors: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """Its own names; where GPT has no biases, GPT-2's are zeros."""
    config, tensors = model.config, dict(tensors)
    ours = {"bias", "n_kv_head", "rope_theta", "rope_scaling", *_GPT2}
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in ours}
    values |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    if not config.bias:
        for name, weight in list(tensors.items()):
            if ".h." in name or ".ln_f." in name:
                tensors[name.replace(".weight", ".bias")] = weight.new_zeros(weight.shape[-1])
    return values, tensors


def _llama(model: GPT, tensors: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    config = model.config
    if not _is(config, _LLAMA):
        has = ", ".join(f"{name}={getattr(config, name)!r}" for name in _GPT2)
        raise ValueError(
            f"the transformers library has no GPT with {has} and {config.n_kv_head} of {config.n_head} heads for "
            f"keys: GPT-2 is {_words(_GPT2)}, n_kv_head = n_head; Llama {_words(_LLAMA)}"
        )
    values = llama.llama_values(config) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return values, llama.llama_tensors(tensors, values)


def _words(parts: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in parts.items())


def _reads_as_a_classifier(library, settings: dict, end: int):
    """Texts begin with the end-of-text token, as in :func:`fastlm.labels.encode_text`, which also fills up
    batches where the tokenizer has a name for it that no text holds."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(library.to_str())
    name = library.id_to_token(end)
    if name is None:
        raise ValueError(
            f"the tokenizer's file has no token {end}, which ends texts, so no classifier can be exported"
        )
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{name}:0 $A:0", special_tokens=[(name, end)]
    )
    return library, settings | ({"pad_token": name} if "eos_token" in settings else {})


def _library_tokenizer(tokenizer: Tokenizer):
    """A tokenizer of the ``tokenizers`` library with the same tokens, and its settings."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, FileTokenizer):
        end = tokenizer.library.id_to_token(tokenizer.end_of_text)
        return tokenizer.library, settings | ({"eos_token": end} if end is not None else {})
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes(), settings
    raise ValueError(f"tokenizer {tokenizer.fingerprint}: has no {TOKENIZER_FILE}, which the folder needs")


def _bytes():
    """Byte-level BPE without merges: each byte is the token of its number."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "a tokenizer of bytes is exported with the tokenizers library: pip install tokenizers"
        ) from None

    # GPT-2's characters for bytes: those that print stand for themselves, the others follow 255.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    vocabulary = {chr(b if b in printed else next(others)): b for b in range(256)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def to_torch_export(model: Model, path: str | os.PathLike) -> None:
    """Writes the model from tokens (B, T) to logits (B, T, V), for any B and any T that its context allows.
    A program that loads it with ``torch.export.load`` imports fastlm first, whose operators are in it."""
    path = Path(path)
    length = {} if model.max_length is None else {"max": model.max_length}
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", **length)},)
    idx = torch.zeros(2, min(8, model.max_length or 8), dtype=torch.int64)
    idx = idx.to(next(model.parameters()).device)
    with torch.no_grad():
        program = torch.export.export(model.eval(), (idx,), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch's own writer of files ends the process where there is no room
    torch.export.save(program, content)
    write_file(path, content.getbuffer())
