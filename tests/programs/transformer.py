"""torch.nn's transformer, encoder and decoder, its inference path with nested tensors, and its attention."""

import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore", message=".*nested")
torch.manual_seed(0)
E, N, L, S = 16, 3, 5, 7
padding = torch.zeros(N, S, dtype=torch.bool)
padding[1, 4:] = padding[2, 6:] = True


class Translator(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.source, self.target = nn.Embedding(20, E), nn.Embedding(20, E)
        common = dict(dropout=0.0, batch_first=True, norm_first=norm_first)
        layer = nn.TransformerEncoderLayer(E, 4, 32, activation="gelu", **common)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=not norm_first)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, 4, 32, **common), 2)
        self.head = nn.Linear(E, 20)

    def forward(self, source, target):
        memory = self.encoder(self.source(source), src_key_padding_mask=padding)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.decoder(
            self.target(target), memory, tgt_mask=mask, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.head(y)


for norm_first in (False, True):
    model = Translator(norm_first)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    loss_function = nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)
    for step in range(6):
        source, target = torch.randint(1, 20, (N, S)), torch.randint(0, 20, (N, L + 1))
        logits = model(source, target[:, :-1])
        loss = loss_function(logits.flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print("step", step, "loss", loss.item())
    model.eval()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            print("eval", model(source, target[:, :-1]).square().mean().item())

whole = nn.Transformer(E, 2, 1, 1, 32, dropout=0.0)
y = whole(torch.randn(S, N, E), torch.randn(L, N, E), src_key_padding_mask=padding)
print("whole", y.square().mean().item())

for options in ({}, {"kdim": 6, "vdim": 10}, {"add_zero_attn": True, "add_bias_kv": True}, {"bias": False}):
    for batch_first in (False, True):
        attention = nn.MultiheadAttention(E, 4, batch_first=batch_first, **options)
        sizes = (L, E), (S, attention.kdim), (S, attention.vdim)
        shapes = [(N, *size) if batch_first else (size[0], N, size[1]) for size in sizes]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        boolean = torch.rand(L, S) > 0.7
        boolean[:, 0] = False
        for mask in (None, boolean, torch.randn(L, S), torch.randn(N * 4, L, S)):
            floating = mask is not None and mask.is_floating_point()
            padded = torch.zeros(N, S).masked_fill(padding, -torch.inf) if floating else padding
            for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                y, w = attention(*inputs, key_padding_mask=padded, attn_mask=mask, **weights)
                gradients = torch.autograd.grad(y.square().sum(), [*inputs, *attention.parameters()])
                print("attention", y.square().mean().item(), 0 if w is None else w.square().sum().item())
                print("gradients", *(g.square().mean().item() for g in gradients))
    with torch.no_grad():
        attention.eval()
        print("eval", attention(*inputs)[0].square().mean().item())
