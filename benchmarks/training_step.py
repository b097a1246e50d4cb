"""The training step of the two models: fastlm's, and the same in plain PyTorch, which also runs
under torch.compile and under fastlm.install()."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm
from fastlm.models import GPT, GRULM
from fastlm.models.gpt import GPTConfig
from fastlm.models.gru_lm import GRULMConfig

DROPOUT_FREE = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}

# name -> model, B, T
STEPS = {
    "GPT-2-124M-B4-T256": (GPTConfig(**DROPOUT_FREE), 4, 256),
    "GRU-bytes-E64-H256-B32-T128": (
        GRULMConfig(vocab_size=256, n_embd=64, n_hidden=256, n_layer=1, dropout=0.0), 32, 128,
    ),
    "GRU-V50257-E1024-H1024-B16-T64": (
        GRULMConfig(vocab_size=50257, n_embd=1024, n_hidden=1024, n_layer=1, dropout=0.0), 16, 64,
    ),
}  # fmt: skip


class PlainBlock(nn.Module):
    """A transformer block as it is usually written; parameters named as in GPT-2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        y = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](y)


class PlainGPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, C),
                "wpe": nn.Embedding(config.n_positions, C),
                "h": nn.ModuleList(PlainBlock(C, config.n_head) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(C),
            }
        )
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.transformer["wte"](idx)
        x = x + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainGRULM(nn.Module):
    def __init__(self, config: GRULMConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.gru = nn.GRU(config.n_embd, config.n_hidden, config.n_layer, batch_first=True)
        self.head = nn.Linear(config.n_hidden, config.vocab_size)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x, _ = self.gru(self.embedding(idx))
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def as_linear(name: str, x: Tensor) -> Tensor:
    """GPT-2 stores the weights of its linear layers (in, out), nn.Linear (out, in)."""
    transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return x.t() if transposed else x


class TrainingStep:
    """Loss, gradients and fused AdamW on one batch; in bfloat16 under autocast.

    The learning rate is 0: the same work, and every step starts from the same parameters, so that
    results can be compared. The plain contenders share their parameters and optimizer.
    """

    operator = "training step"
    contenders = ("eager", "torch.compile", "fastlm.install", "fastlm")
    kinds = ("step",)
    stateful = True
    shapes = ()

    def __init__(self, shape: str, dtype: torch.dtype):
        config, B, T = STEPS[shape]
        self.autocast = dtype != torch.float32
        torch.manual_seed(0)
        is_gpt = isinstance(config, GPTConfig)
        fused = (GPT if is_gpt else GRULM)(config)
        plain = (PlainGPT if is_gpt else PlainGRULM)(config)
        plain.load_state_dict({k: as_linear(k, v) for k, v in fused.state_dict().items()})
        self.models = {"fastlm": fused, "plain": plain}
        self.optimizers = {
            name: torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
            for name, model in self.models.items()
        }
        tokens = torch.randint(0, config.vocab_size, (B, T + 1))
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.floor = {"step": (gpt_floor if is_gpt else gru_floor)(config, plain, B, T)}

    def truth(self) -> list[Tensor]:
        plain = self.models["plain"]
        loss = plain(*self.batch)
        named = dict(plain.named_parameters())
        return [loss, *torch.autograd.grad(loss, list(named.values()))]

    def draw_cotangents(self, shapes) -> None:
        """The loss needs none."""

    def call(self, contender: str, kind: str) -> Callable[[], list[Tensor]]:
        which = "fastlm" if contender == "fastlm" else "plain"
        model, optimizer = self.models[which], self.optimizers[which]
        order = [n for n, _ in self.models["plain"].named_parameters()]
        forward = torch.compile(model, dynamic=False) if contender == "torch.compile" else model
        named = dict(model.named_parameters())

        def step():
            optimizer.zero_grad()
            with torch.autocast("cpu", enabled=self.autocast):
                loss = forward(*self.batch)
            loss.backward()
            optimizer.step()
            if which == "plain":
                return [loss, *(named[n].grad for n in order)]
            return [loss, *(as_linear(n, named[n].grad) for n in order)]

        def installed_step():
            with fastlm.installed():
                return step()

        return installed_step if contender == "fastlm.install" else step


def gpt_floor(config: GPTConfig, model: nn.Module, B: int, T: int) -> tuple[int, int]:
    """Operations and bytes of a step: every product once forward and twice backward; AdamW reads
    parameter, gradient and two moments and writes three."""
    products = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    pairs = T * (T + 1) // 2  # causal
    attention = 4 * config.n_layer * config.n_embd * pairs * B
    return 3 * (2 * products * B * T + attention), optimizer_bytes(model)


def gru_floor(config: GRULMConfig, model: nn.Module, B: int, T: int) -> tuple[int, int]:
    E, H, V = config.n_embd, config.n_hidden, config.vocab_size
    return 3 * 2 * (3 * H * (E + H) + H * V) * B * T, optimizer_bytes(model)


def optimizer_bytes(model: nn.Module) -> int:
    return 28 * sum(p.numel() for p in model.parameters())
