"""A LightningModule with a GRU, trained, validated, saved and loaded by the Trainer."""

import logging
import sys
import tempfile
import warnings

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Model(lightning.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(13, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 13)

    def forward(self, tokens):
        x, _ = self.gru(self.embedding(tokens))
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x + y)

    def loss(self, batch):
        tokens, targets = batch
        return cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def training_step(self, batch, index):
        loss = self.loss(batch)
        print("loss", loss.item())
        return loss

    def validation_step(self, batch, index):
        print("validation", self.loss(batch).item())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]


if __name__ == "__main__":
    lightning.seed_everything(2, verbose=False)
    tokens = torch.randint(0, 13, (24, 9))
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, precision=sys.argv[1], gradient_clip_val=1.0,
            accumulate_grad_batches=2, default_root_dir=folder, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model = Model(16)
        trainer.fit(model, loader, loader)
        again = Model.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    with torch.no_grad():
        print("again", again.eval().loss(next(iter(loader))).item())
