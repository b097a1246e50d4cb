"""A language model trained from scratch on the characters of a file: evaluation, checkpoints, sampling."""

import argparse
import inspect
import math
import os
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    context: int = 24
    vocab: int = 64
    layers: int = 2
    heads: int = 4
    width: int = 32
    dropout: float = 0.0
    bias: bool = False
    fused: bool = True


class LayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.project = nn.Linear(config.width, config.width, bias=config.bias)
        self.heads, self.p, self.fused = config.heads, config.dropout, config.fused
        mask = torch.ones(config.context, config.context).tril()
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.heads, C // self.heads).transpose(1, 2) for y in self.qkv(x).split(C, dim=2)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=self.p if self.training else 0.0, is_causal=True
            )
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
            y = F.dropout(F.softmax(scores, dim=-1), self.p, self.training) @ v
        return self.project(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(config.width, config.bias) for _ in range(2))
        self.attention = CausalAttention(config)
        self.mlp = nn.ModuleDict(
            {
                "up": nn.Linear(config.width, 4 * config.width, bias=config.bias),
                "down": nn.Linear(4 * config.width, config.width, bias=config.bias),
            }
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp["down"](F.gelu(self.mlp["up"](self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width, config.bias)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.tokens.weight = self.head.weight
        self.apply(self.initialize)

    @staticmethod
    def initialize(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens, targets=None):
        position = torch.arange(tokens.size(1), device=tokens.device)
        x = self.tokens(tokens) + self.positions(position)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def optimizer(self, rate):
        decayed = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)

    @torch.no_grad()
    def generate(self, tokens, count, temperature=1.0, top_k=None):
        for _ in range(count):
            logits, _ = self(tokens[:, -self.config.context :])
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                least = torch.topk(logits, min(top_k, logits.size(-1)))[0][:, [-1]]
                logits[logits < least] = -float("inf")
            tokens = torch.cat((tokens, torch.multinomial(F.softmax(logits, dim=-1), 1)), dim=1)
        return tokens


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", default="")
    parser.add_argument("--manual", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(1337)
    with open(__file__) as file:
        text = file.read()
    data = torch.tensor([ord(c) % 64 for c in text])
    parts = {"train": data[: len(data) * 9 // 10], "val": data[len(data) * 9 // 10 :]}
    config = Config(fused=not options.manual)

    def batch(part):
        starts = torch.randint(len(parts[part]) - config.context, (4,))
        x = torch.stack([parts[part][i : i + config.context] for i in starts])
        y = torch.stack([parts[part][i + 1 : i + 1 + config.context] for i in starts])
        return x, y

    low = options.dtype != "float32"
    context = torch.amp.autocast("cpu", dtype=getattr(torch, options.dtype)) if low else nullcontext()
    scaler = torch.amp.GradScaler("cpu", enabled=options.dtype == "float16")
    raw = GPT(config)
    optimizer = raw.optimizer(3e-3)
    model = torch.compile(raw, backend=options.compile) if options.compile else raw

    @torch.no_grad()
    def estimate():
        model.eval()
        for part in parts:
            losses = []
            for _ in range(2):
                with context:
                    losses.append(model(*batch(part))[1].item())
            print("estimate", part, sum(losses) / len(losses))
        model.train()

    def rate(step, warmup=2, low=3e-4, high=3e-3):
        if step < warmup:
            return high * (step + 1) / (warmup + 1)
        ratio = (step - warmup) / (options.steps - warmup)
        return low + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (high - low)

    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        if step % 4 == 0:
            estimate()
        for _ in range(2):
            with context:
                _, loss = model(*batch("train"))
                loss = loss / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step} loss {loss.item() * 2} norm {norm.item()}")

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt.pt")
        state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "config": asdict(config)}
        torch.save(state, path)
        state = torch.load(path, map_location="cpu")
    again = GPT(Config(**state["config"]))
    again.load_state_dict(state["model"])
    again.optimizer(3e-3).load_state_dict(state["optimizer"])
    again.eval()
    with torch.no_grad():
        print("again", again(*batch("val"))[1].item())
    if not low:
        tokens = again.generate(torch.zeros((1, 1), dtype=torch.long), 4, 0.8, top_k=1)[0]
        print("text", "-".join(chr(64 + token) for token in tokens.tolist()))


if __name__ == "__main__":
    main()
