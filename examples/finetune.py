"""Fine-tuning: a trained network gets a new head, its last block follows gently, the rest rests.

The new head starts at random and its first gradients are large. One norm over everything would let
them scale the trained block's down as well, so each has a limit of its own, by parameter group;
the head's opens as it settles.

python examples/finetune.py [STEPS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def fit(model, optimizer, count, target, after=lambda loss: None):
    for _ in range(count):
        chosen = torch.randint(0, len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[chosen]), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        after(loss)
        optimizer.step()


model = nn.Sequential()
model.add_module("stem", nn.Sequential(nn.Linear(64, 128), nn.ReLU()))
model.add_module("block", nn.Sequential(nn.Linear(128, 128), nn.ReLU()))
model.add_module("head", nn.Linear(128, 2))
fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 200, labels % 2)  # odd or even

model.head = nn.Linear(128, 10)
model.stem.requires_grad_(False)
optimizer = torch.optim.AdamW(
    [
        {"params": model.block.parameters(), "lr": 1e-4},
        {"params": model.head.parameters(), "lr": 1e-2},
    ]
)
policy = {
    "version": 1,
    "guard": {"patience": 5},
    "clip": [
        {"groups": 0, "limit": 0.5, "name": "block"},
        {"groups": 1, "limit": {0: 0.2, 100: 1.0}, "name": "head"},
    ],
}
watch = gradwatch.attach(model, optimizer, policy, run="finetune")
fit(model, optimizer, steps, labels, after=lambda loss: watch.log(loss=loss))

print(watch)
watch.close()
