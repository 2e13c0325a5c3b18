"""An LSTM that reads Python's argparse, in half precision with a GradScaler.

On a GPU the same loop runs with device "cuda"; `fused=True` lets the optimizer clip and skip by
itself, so that nothing waits for the device.

python examples/lstm.py [STEPS]
"""

import argparse
import inspect
import sys

import torch
from torch import nn

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

text = inspect.getsource(argparse)
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(character) for character in text])


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(alphabet), 32)
        self.lstm = nn.LSTM(32, 128, batch_first=True)
        self.head = nn.Linear(128, len(alphabet))

    def forward(self, characters):
        hidden, _ = self.lstm(self.embed(characters))
        return self.head(hidden)


model = Reader().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
scaler = torch.amp.GradScaler(device, init_scale=2.0**16, growth_interval=100)

policy = {
    "version": 1,
    "guard": {"nonfinite": "skip", "patience": 30},
    "clip": [{"limit": 0.25}, {"params": "embed", "per": "tensor", "limit": 0.1}],
}
watch = gradwatch.attach(model, optimizer, policy, run="lstm", scaler=scaler)

for _ in range(steps):
    starts = torch.randint(0, len(codes) - 65, (16,))
    window = torch.stack([codes[start : start + 65] for start in starts]).to(device)
    with torch.autocast(device, dtype=torch.bfloat16 if device == "cpu" else torch.float16):
        logits = model(window[:, :-1])
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), window[:, 1:])
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    watch.log(loss=loss)
    scaler.step(optimizer)  # unscaled, measured, clipped: in that order, by gradwatch's hook
    scaler.update()

print(watch)
watch.close()
