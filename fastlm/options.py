"""The options of a training run."""

import math
from dataclasses import dataclass, field

from fastlm.models import MODELS

# What a model has by default: sizes for a few minutes on a small CPU. Options override it.
PRESETS = {
    "gpt": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "bias": False,
        "pos": "rope",
        "norm": "layernorm",  # PyTorch has no fused RMSNorm for CPUs: a seventh of the step
        "mlp": "swiglu",
        "initializer_range": 0.06,  # GPT-2's 0.02 is for a width of 768 and up: learns later here
        "dropout": 0.0,
        "lr": 3e-3,
        "batch_size": 4,
    },
    "gru": {
        "n_layer": 1,
        "n_embd": 128,
        "n_hidden": 384,
        "dropout": 0.0,
        "lr": 3e-3,
        "batch_size": 8,
    },
}
DEFAULT_SECONDS = 100
FRESH = {"model": "gpt", "tokenizer": "bytes", "tie": True}
FINE_TUNING = {"lr": 1e-4, "batch_size": 4}  # whatever the model
LORA = {"lora_dropout": 0.0, "lr": 1e-3}  # and lora_alpha twice the rank
_OF_MODEL = {
    "gpt": {"n_layer", "n_head", "n_kv_head", "n_embd", "pos", "norm", "mlp", "dropout"},
    "gru": {
        "n_layer", "n_embd", "n_hidden", "dropout", "zoneout", "recurrent_dropout", "layer_norm",
    },
}  # fmt: skip
# What a model to start from brings along.
_OF_ORIGIN = (*FRESH, *sorted(set().union(*_OF_MODEL.values())))
_POSITIVE = (
    "val_bytes", "block_size", "batch_size", "accumulate", "lr", "warmup", "max_steps",
    "max_seconds", "eval_every", "eval_blocks", "save_every", "patience", "threads", "lora", "lora_alpha",
)  # fmt: skip


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainOptions:
    """Options of a run, and those of ``fastlm train``. ``None`` for the model's sizes means its
    preset's."""

    model: str | None = _option(None, "gpt or gru [default: gpt]")
    data: list[str] | None = _option(
        None,
        "text files or folders, or .jsonl files of instructions and answers, or of texts and labels "
        "[default: the source of Python's standard library]",
    )
    tokenizer: str | None = _option(
        None, "bytes, the path of a tokenizer.json, tiktoken:NAME or hub:NAME [default: bytes]"
    )
    val_bytes: int | None = _option(None, "about how much text to hold out [default: 5%, at most 128 KiB]")
    cache: str | None = _option(None, "folder of token files [default: ~/.cache/fastlm]")
    init_from: str | None = _option(
        None,
        "folder of a run, a checkpoint, or a GPT-2 or Llama of the transformers library to go on from: "
        "its weights, sizes and tokenizer",
    )
    lora: int | None = _option(
        None, "rank of low-rank adapters (PEFT's LoRA), trained instead of the weights (with --init-from)"
    )
    lora_alpha: int | None = _option(None, "adapters count lora_alpha / lora-fold [default: twice the rank]")
    lora_dropout: float | None = _option(None, "dropped share of what adapters read [default: 0]")
    lora_targets: list[str] | None = _option(
        None, "layers that get adapters [default: gpt c_attn c_proj c_fc; gru gru]"
    )
    n_layer: int | None = _option(None, "layers")
    n_head: int | None = _option(None, "attention heads (gpt)")
    n_kv_head: int | None = _option(None, "key and value heads (gpt)")
    n_embd: int | None = _option(None, "width (gpt), or of the embedding (gru)")
    n_hidden: int | None = _option(None, "hidden units (gru)")
    pos: str | None = _option(None, "learned or rope (gpt)")
    norm: str | None = _option(None, "layernorm or rmsnorm (gpt)")
    mlp: str | None = _option(None, "gelu or swiglu (gpt)")
    zoneout: float | None = _option(None, "share of hidden units kept at a step (gru)")
    recurrent_dropout: float | None = _option(None, "dropped share of recurrent weights (gru)")
    layer_norm: bool | None = _option(None, "layer norm in the gates (gru)")
    tie: bool | None = _option(
        None, "share the weights of embedding and head (gru: where their widths agree) [default: share]"
    )
    dropout: float | None = _option(None, "dropout rate")
    block_size: int = _option(256, "tokens in a sequence")
    batch_size: int | None = _option(
        None, f"sequences in a pass [default: gpt 4, gru 8; with --init-from {FINE_TUNING['batch_size']}]"
    )
    accumulate: int = _option(1, "passes in a step")
    lr: float | None = _option(
        None,
        f"highest learning rate [default: 3e-3; with --init-from {FINE_TUNING['lr']:g}, with --lora {LORA['lr']:g}]",
    )
    min_lr: float = _option(0.02, "last learning rate, as a share of the highest")
    warmup: int = _option(50, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "of matrices; vectors have none")
    beta1: float = _option(0.9, "AdamW's decay of the mean")
    beta2: float = _option(0.95, "AdamW's decay of the square")
    clip: float = _option(1.0, "largest norm of the gradient; 0: no limit")
    max_steps: int | None = _option(None, "steps to train")
    max_seconds: float | None = _option(
        None,
        "seconds to train instead: sets the number of steps from their speed "
        f"[default: {DEFAULT_SECONDS}, where no steps are given]",
    )
    eval_every: int = _option(100, "steps between evaluations")
    eval_blocks: int = _option(64, "blocks of the validation text in these")
    save_every: int = _option(100, "steps between checkpoints")
    patience: int | None = _option(None, "stop after so many evaluations in a row without a new best")
    seed: int = _option(0, "of weights, data order and dropout")
    dtype: str = _option("float32", "float32, or bfloat16 (autocast)")
    device: str = _option("cpu", "torch device")
    threads: int | None = _option(None, "CPU threads [default: torch's choice]")
    parallel: str = _option(
        "ddp", "of several processes (torchrun) each holds the whole model, ddp, or a shard of it, fsdp"
    )
    tensorboard: bool = _option(True, "write TensorBoard logs")

    def __post_init__(self):
        if self.init_from is None:
            self._fill(FRESH)
        self._check_ranges()
        self._check_combination()
        if self.lora is not None:
            self._fill(LORA | {"lora_alpha": 2 * self.lora})
        preset = FINE_TUNING if self.init_from is not None else PRESETS[self.model]
        self._fill({name: preset[name] for name in FINE_TUNING})
        if self.max_steps is None and self.max_seconds is None:
            self.max_seconds = DEFAULT_SECONDS

    @property
    def step_size(self) -> int:
        """Sequences of a step, over its passes and processes."""
        return self.batch_size * self.accumulate

    def _fill(self, defaults: dict) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_ranges(self) -> None:
        if self.model is not None and self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("min_lr", "weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def _check_lora(self) -> None:
        if self.lora is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of low-rank adapters: give lora, their rank, too")
        elif self.init_from is None:
            raise ValueError("lora needs init_from: adapters are trained for a model that is there")
        elif self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")

    def _check_combination(self) -> None:
        self._check_lora()
        if self.max_steps is not None and self.max_seconds is not None:
            raise ValueError("max_steps and max_seconds can't be given together")
        given = [name for name in _OF_ORIGIN if getattr(self, name) is not None]
        if self.init_from is not None:
            if given:
                raise ValueError(f"{given[0]} can't be given with init_from, whose model has its own")
            return
        for name in given:
            if name not in FRESH and name not in _OF_MODEL[self.model]:
                raise ValueError(f"{name} is no option of model {self.model!r}")
