"""A convolutional network on scikit-learn's digits, in a plain loop.

python examples/cnn.py [STEPS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

watch = gradwatch.attach(model, optimizer, policy="examples/policy.yaml", run="cnn")

for _ in range(steps):
    chosen = torch.randint(0, len(images), (64,))
    loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    watch.log(loss=loss)
    optimizer.step()
    scheduler.step()

print(watch)
watch.close()
