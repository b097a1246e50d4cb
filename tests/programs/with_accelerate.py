"""A classifier trained under Accelerate, with accumulated gradients and a state saved and loaded."""

import sys
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, mixed_precision=sys.argv[1], gradient_accumulation_steps=2)
set_seed(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder, self.gru = nn.TransformerEncoder(layer, 1), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.gru(self.encoder(x))[1][-1])


x = torch.randn(32, 6, 16)
loader = DataLoader(
    TensorDataset(x, x.sum((1, 2)).gt(0).long() + 2 * x[:, 0, 0].gt(0).long()), 8, shuffle=True
)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
criterion = nn.CrossEntropyLoss()


def evaluate():
    model.eval()
    with torch.no_grad():
        right = [accelerator.gather_for_metrics(criterion(model(a), b)).mean().item() for a, b in loader]
    model.train()
    print("evaluation", sum(right) / len(right))


for epoch in range(3):
    for a, b in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(a), b)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.print("epoch", epoch, "loss", loss.item())
    if epoch == 1:
        evaluate()
        with tempfile.TemporaryDirectory() as folder:
            accelerator.save_state(folder)
            nn.init.zeros_(accelerator.unwrap_model(model).head.weight)
            accelerator.load_state(folder)
evaluate()
