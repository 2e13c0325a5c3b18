"""A GAN on scikit-learn's digits: two networks, two optimizers, a watch for each.

A discriminator that wins sends the generator gradients that grow without bound. Each network gets
a limit that follows its own level, and a bound that it never passes; unit by unit clipping keeps a
single row of the discriminator from running away.

python examples/gan.py [STEPS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)

images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1

generator = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())
discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
optimizers = [
    torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.99))
    for network in (generator, discriminator)
]

level = {"limit": {"z": 3, "warmup": 50, "max": 10}, "name": "level"}
watches = [
    gradwatch.attach(
        generator,
        optimizers[0],
        {"version": 1, "guard": {"patience": 10}, "clip": [level]},
        run="gan-generator",
    ),
    gradwatch.attach(
        discriminator,
        optimizers[1],
        {"version": 1, "guard": {"patience": 10}, "clip": [{"use": "agc", "limit": 0.5}, level]},
        run="gan-discriminator",
        port=9465,
    ),
]


def verdict(samples, real):
    labels = torch.ones(len(samples), 1) if real else torch.zeros(len(samples), 1)
    return nn.functional.binary_cross_entropy_with_logits(discriminator(samples), labels)


for _ in range(steps):
    chosen = images[torch.randint(0, len(images), (64,))]
    made = generator(torch.randn(64, 16))

    optimizers[1].zero_grad()
    loss = verdict(chosen, real=True) + verdict(made.detach(), real=False)
    loss.backward()
    watches[1].log(loss=loss)
    optimizers[1].step()

    optimizers[0].zero_grad()
    loss = verdict(made, real=True)
    loss.backward()  # also reaches the discriminator, which forgets it at its next zero_grad
    watches[0].log(loss=loss)
    optimizers[0].step()

for watch in watches:
    print(watch)
    watch.close()
