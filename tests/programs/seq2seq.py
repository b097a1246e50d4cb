"""Reverses sequences: a GRU encoder, a GRUCell decoder with attention, teacher forcing, greedy decoding."""

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import optim

START, VOCAB, H = 0, 12, 24


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, H)
        self.gru = nn.GRU(H, H, bidirectional=True)
        self.bridge = nn.Linear(2 * H, H)

    def forward(self, source, hidden=None):
        output, hidden = self.gru(self.embedding(source), hidden)
        return self.bridge(output), torch.tanh(self.bridge(torch.cat(hidden.unbind(0), -1)))


class AttentionDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, H)
        self.query, self.key, self.score = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, 1)
        self.cell = nn.GRUCell(2 * H, H)
        self.out = nn.Linear(2 * H, VOCAB)

    def forward(self, token, hidden, memory):
        energy = self.score(torch.tanh(self.query(hidden) + self.key(memory)))
        context = (F.softmax(energy, dim=0) * memory).sum(0)
        hidden = self.cell(torch.cat((self.embedding(token), context), dim=1), hidden)
        return F.log_softmax(self.out(torch.cat((hidden, context), 1)), dim=-1), hidden


def run(encoder, decoder, source, target, forcing):
    memory, hidden = encoder(source)
    token = torch.full((source.shape[1],), START)
    loss, said = 0, []
    forced = random.random() < forcing
    for t in range(target.shape[0]):
        scores, hidden = decoder(token, hidden, memory)
        loss = loss + F.nll_loss(scores, target[t]) + 0.1 * F.cross_entropy(scores, target[t])
        said.append(scores.argmax(1))
        token = target[t] if forced else said[-1].detach()
    return loss / target.shape[0], torch.stack(said)


random.seed(3)
torch.manual_seed(3)
encoder, decoder = Encoder(), AttentionDecoder()
optimizers = [optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (encoder, decoder)]
for step in range(16):
    source = torch.randint(1, VOCAB, (5, 8))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss, _ = run(encoder, decoder, source, source.flip(0), 0.7)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    print("step", step, "loss", loss.item())
with torch.no_grad():
    encoder.eval(), decoder.eval()
    print("said", run(encoder, decoder, source, source.flip(0), 0.0)[0].item())
