"""A small convolutional network on scikit-learn's handwritten digits, which come with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from gradwatch.demo.task import Task

__all__ = ["DigitsNet", "digits_task"]

BATCH = 256
LEARNING_RATE = 0.05
NOISE = 0.5
"""Added to each image, so that the 1797 of them are never learnt by heart and the norm stays
level instead of falling for the whole run."""


class DigitsNet(nn.Module):
    """Images [B, 1, 8, 8] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 2 * 2, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = _active(self.conv1(images))
        x = functional.max_pool2d(_active(self.conv2(x)), 2)
        x = functional.max_pool2d(_active(self.conv3(x)), 2)
        logits: torch.Tensor = self.head(_active(self.hidden(x.flatten(1))))
        return logits


def _active(x: torch.Tensor) -> torch.Tensor:
    # A plain ReLU can die for good when the learning rate is wrong, and then nothing explodes.
    return functional.leaky_relu(x, 0.1)


def digits_task(seed: int) -> Task:
    """The network, SGD with momentum, and batches drawn with `seed`."""
    torch.manual_seed(seed)
    model = DigitsNet()
    return Task(
        name="digits",
        title="a small CNN on handwritten digits",
        model=model,
        optimizer=torch.optim.SGD(
            model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4
        ),
        criterion=nn.CrossEntropyLoss(label_smoothing=0.1),
        batches=_batches(seed),
        entry=model.conv1,
        victim=model.conv3,
    )


def _batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = _digits()
    draw = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        noise = NOISE * torch.randn(BATCH, 1, 8, 8, generator=draw)
        yield images[chosen] + noise, labels[chosen]


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 images [N, 1, 8, 8] of mean 0 and deviation 1, and their labels [N]."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return (images - images.mean()) / images.std(), torch.as_tensor(labels)
