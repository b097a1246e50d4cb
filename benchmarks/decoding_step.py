"""A step of generation for one row: a token in, the next token's logits out. GPT-2 against the transformers
library's, a GRU language model against the same in plain PyTorch (both "eager"); int8 against float32."""

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.training_step import PlainGRULM
from fastlm.models import GPT, GRULM, GPTConfig, GRULMConfig

CONTEXT = 64  # tokens that were read before

CONFIGS = {
    "GPT-2-124M": GPTConfig(),
    "GRU-V50257-E1024-H1024-L2": GRULMConfig(n_embd=1024, n_hidden=1024, n_layer=2, dropout=0.0),
}


class DecodingStep:
    operator = "decoding step"
    contenders = ("eager", "fastlm")
    kinds = ("token",)
    stateful = False
    shapes = ()

    @staticmethod
    def cases() -> list[tuple[str, torch.dtype]]:
        """(shape, dtype) of all that can run here."""
        dtypes = [torch.float32, torch.bfloat16]
        dtypes += [torch.int8] if importlib.util.find_spec("torchao") else []
        shapes = [s for s in CONFIGS if "GRU" in s or importlib.util.find_spec("transformers")]
        return [(shape, dtype) for shape in shapes for dtype in dtypes]

    def __init__(self, shape: str, dtype: torch.dtype):
        torch.manual_seed(0)
        config = CONFIGS[shape]
        self.is_gpt, self.dtype = isinstance(config, GPTConfig), dtype
        self.model = (GPT if self.is_gpt else GRULM)(config).eval()
        self.prompt, self.token = torch.randint(config.vocab_size, (1, CONTEXT)), torch.tensor([5])
        operations = sum(p.numel() for p in self.model.parameters())
        tables = ("transformer.wpe.weight", "embedding.weight")  # of which a row is read
        operations -= sum(p.numel() for name, p in self.model.named_parameters() if name in tables)
        self.floor = {"token": (2 * operations, operations * dtype.itemsize)}

    def truth(self) -> list[Tensor]:
        with torch.no_grad():
            whole = torch.cat((self.prompt, self.token[None]), 1)
            return [self.model(whole)[:, -1]]

    def draw_cotangents(self, shapes) -> None:
        """There is no backward."""

    @torch.no_grad()
    def call(self, contender: str, kind: str) -> Callable[[], list[Tensor]]:
        if contender == "fastlm":
            return self._ours()
        dtype = torch.float32 if self.dtype is torch.int8 else self.dtype
        return (self._transformers if self.is_gpt else self._eager)(dtype)

    def _ours(self):
        model = copy.deepcopy(self.model)
        if self.dtype is torch.int8:
            from fastlm.integrations.torchao import quantize_

            quantize_(model)
        else:
            model.to(self.dtype)
        _, state = model.prefill(self.prompt, torch.tensor([CONTEXT]), CONTEXT + 1)

        def step():
            with torch.no_grad():
                logits, after = model.decode(self.token, state)
            if self.is_gpt:  # its cache is one object, whose last token the next call writes again
                after.lengths, after.longest = after.lengths - 1, after.longest - 1
            return [logits]

        return step

    def _transformers(self, dtype: torch.dtype):
        from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config()).eval()
        model.load_state_dict(self.model.state_dict())
        model.to(dtype)
        cache = DynamicCache(config=model.config)
        model(self.prompt, past_key_values=cache)

        def step():
            with torch.no_grad():
                logits = model(self.token[None], past_key_values=cache).logits[:, -1]
            cache.crop(-1)
            return [logits]

        return step

    def _eager(self, dtype: torch.dtype):
        model = PlainGRULM(self.model.config).eval()
        model.load_state_dict(self.model.state_dict())
        model.to(dtype)
        _, state = model.gru(model.embedding(self.prompt))

        def step():
            with torch.no_grad():
                x, _ = model.gru(model.embedding(self.token[None]), state)
                return [model.head(x[:, -1])]

        return step
