"""PEFT's LoRA on what is made of fastlm: GPT's layers, whose weights are (in, out), and GRUs.

PEFT knows layers by their class. Every LoraConfig made here knows these two as well, so that
`peft.get_peft_model(model, LoraConfig(target_modules=["c_attn"]))`, or `["gru"]`, works as it does on a
model of the transformers library: merging, several adapters and PEFT's folders included. An adapter of a GPT
has the names and shapes that it has on a GPT-2.
Imported, and thereby registered, when `peft` is.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

import copy
import inspect
import math

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

import fastlm.nn
from fastlm.models.gpt import Conv1D

if "config" not in inspect.signature(Linear).parameters:
    raise ImportError("PEFT 0.19 or later is needed")


class Conv1DAdapter(Linear):
    """PEFT's LoRA of a linear layer, on one whose weight is (in, out)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs):
        config = copy.copy(config)
        config.fan_in_fan_out = True
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=True, **kwargs)

    def _get_in_out_features(self, module: Conv1D) -> tuple[int, int]:
        return tuple(module.weight.shape)


class GRUAdapter(nn.Module, LoraLayer):
    """W + scaling B A in the place of each weight matrix W (3 H, I) or (3 H, H) of a GRU, of all layers and
    directions. Biases and the gains of layer norms stay as they are.

    Raises ``ValueError`` for variants of LoRA, and for dropout: a recurrence reads its weights at every step,
    so there is no one input to drop from."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.adapter_layer_names = tuple(f"lora_{side}_{name}" for name in self._matrices() for side in "AB")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: fastlm.nn.GRU) -> tuple[int, int]:
        return module.input_size, 3 * module.hidden_size

    def _matrices(self) -> dict[str, nn.Parameter]:
        gru = self.get_base_layer()
        return {name: getattr(gru, name) for name in gru._flat_weights_names if name.startswith("weight")}

    def _pair(self, name: str) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        """A (r, I) and B (3 H, r) of a matrix, for each adapter. PEFT's files name them lora_A_weight_ih_l0."""
        return getattr(self, f"lora_A_{name}"), getattr(self, f"lora_B_{name}")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        if r < 1:
            raise ValueError(f"LoRA of a GRU: r must be at least 1, got {r}")
        for name, plain in (("lora_dropout", 0.0), ("lora_bias", False), ("use_dora", False)):
            if getattr(config, name) != plain:
                raise ValueError(f"LoRA of a GRU: {name} must be {plain}, got {getattr(config, name)}")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"LoRA of a GRU: init_lora_weights must be True, False or 'gaussian', got {config.init_lora_weights!r}"
            )
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Identity()
        for name, weight in self._matrices().items():
            a, b = (weight.new_empty(shape) for shape in ((r, weight.shape[1]), (len(weight), r)))
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(a, std=1 / r)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            if config.init_lora_weights:
                nn.init.zeros_(b)
            else:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            for side, value in zip(self._pair(name), (a, b), strict=True):
                side[adapter_name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter_name: str) -> dict[str, Tensor]:
        """What the adapter adds to each matrix, by its name."""
        deltas = {}
        for name in self._matrices():
            a, b = (side[adapter_name] for side in self._pair(name))
            deltas[name] = self.scaling[adapter_name] * (b @ a)
        return deltas

    def forward(self, *args, **kwargs):
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("LoRA of a GRU: adapter_names, one of a row each, is not supported")
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self.active_adapters
        deltas = [self.get_delta_weight(name) for name in active if name in self.r]
        if not deltas:
            return self.base_layer(*args, **kwargs)
        weights = {
            name: sum((delta[name] for delta in deltas), start=weight)
            for name, weight in self._matrices().items()
        }
        return torch.func.functional_call(self.base_layer, weights, args, kwargs)

    @torch.no_grad()
    def _add(self, adapter_name: str, sign: int) -> None:
        deltas = self.get_delta_weight(adapter_name)
        for name, weight in self._matrices().items():
            weight.add_(deltas[name], alpha=sign)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.r:
                continue
            if safe_merge and not all(d.isfinite().all() for d in self.get_delta_weight(name).values()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._add(name, 1)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1)


ADAPTERS = {Conv1D: Conv1DAdapter, fastlm.nn.GRU: GRUAdapter}
_post_init = LoraConfig.__post_init__


def _know_ours(config: LoraConfig) -> None:
    _post_init(config)
    config._register_custom_module(ADAPTERS)


LoraConfig.__post_init__ = _know_ours
