"""Sequences of several lengths classified by a bidirectional GRU over packed batches."""

import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset


class Sentences(Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
        self.items = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index], int(self.items[index].sum()) % 3


def collate(items):
    sequences, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(x) for x in sequences])
    return pad_sequence(sequences, batch_first=True), lengths, torch.tensor(labels)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 12, padding_idx=0)
        self.gru = nn.GRU(12, 16, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.dropout = nn.Dropout(0.0)
        self.fc = nn.Linear(64, 3)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        self.gru.flatten_parameters()
        output, hidden = self.gru(packed)
        output, _ = pad_packed_sequence(output, batch_first=True)
        pooled = output.sum(1) / lengths[:, None]
        return self.fc(self.dropout(torch.cat([pooled, hidden[-2], hidden[-1]], dim=1)))


def main(method, workers):
    torch.manual_seed(0)
    loader = DataLoader(
        Sentences(48),
        16,
        shuffle=True,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=method if workers else None,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(1),
    )
    model = Classifier()
    model.gru.dropout = 0.0  # whose masks no two implementations draw alike
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=3 * len(loader))
    for epoch in range(3):
        model.train()
        for tokens, lengths, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(tokens, lengths), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            print(f"epoch {epoch} loss {loss.item()}")
        model.eval()
        with torch.inference_mode():
            scores = [model(tokens, lengths).log_softmax(-1).mean().item() for tokens, lengths, _ in loader]
        print("eval", *scores)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
