"""One small task, trained by hand and by each trainer: 8 micro-batches, a step for each 2."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
import gradwatch.lightning
import gradwatch.transformers

NUM_MICRO, WINDOW, SIZE = 8, 2, 8
QUIET = {"port": None, "recording": None}


class Net(torch.nn.Module):
    """What the Hugging Face Trainer wants: a loss among its outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Linear(6, 16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.relu(self.stem(x)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels) * 10, "logits": logits}


def dataset(num_micro: int = NUM_MICRO) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_micro * SIZE, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (len(x),), generator=generator))


def loader(num_micro: int = NUM_MICRO, *, named: bool = False) -> DataLoader:
    def by_name(items: list[Any]) -> dict[str, torch.Tensor]:
        xs, labels = zip(*items, strict=True)
        return {"x": torch.stack(xs), "labels": torch.stack(labels)}

    return DataLoader(dataset(num_micro), batch_size=SIZE, collate_fn=by_name if named else None)


def make_optimizer(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=kind == "fused AdamW")


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)


def norm_of(model: torch.nn.Module) -> float:
    squares = [float(p.grad.double().square().sum()) for p in model.parameters()]
    return math.sqrt(sum(squares))


def by_hand(
    model: Net,
    optimizer: torch.optim.Optimizer,
    max_norm: float | None,
    scaler: torch.amp.GradScaler | None = None,
    *,
    half: bool = False,
    windows: tuple[int, ...] = (WINDOW,) * (NUM_MICRO // WINDOW),
) -> list[float]:
    """The loop that every trainer is compared with; the norms before clipping."""
    norms, batches = [], iter(loader(sum(windows)))
    for size in windows:
        for _ in range(size):
            with torch.autocast("cpu", torch.half) if half else nullcontext():
                loss = model(*next(batches))["loss"] / size
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norms.append(norm_of(model))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return norms


def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return largest_difference(one, other) == 0.0


class OfLightning(pl.LightningModule):
    """Automatic optimization."""

    def __init__(self, net: Net, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(*batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


class OfLightningByHand(OfLightning):
    """Manual optimization, which accumulates itself."""

    def __init__(self, net: Net, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        loss = self.net(*batch)["loss"]
        self.manual_backward(loss / WINDOW)
        if (batch_idx + 1) % WINDOW == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return {"loss": loss}


class InOrder(transformers.Trainer):
    """Batches in the order of the data, and an optimizer that is given."""

    num_micro = NUM_MICRO

    def get_train_dataloader(self) -> DataLoader:
        return loader(self.num_micro, named=True)


def fit(
    module: pl.LightningModule,
    callback: gradwatch.lightning.GradWatch,
    *,
    num_micro: int = NUM_MICRO,
    checkpoint: str | None = None,
    **settings: Any,
) -> pl.Trainer:
    defaults = {"max_epochs": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *settings.pop("callbacks", [])],
        **{**defaults, **settings},
    )
    trainer.fit(module, loader(num_micro), ckpt_path=checkpoint)
    return trainer


def hf_trainer(
    model: Net,
    optimizer: torch.optim.Optimizer,
    callback: gradwatch.transformers.GradWatch,
    folder: Any,
    **settings: Any,
) -> InOrder:
    defaults = {
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": WINDOW,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=SIZE, **{**defaults, **settings},
    )  # fmt: skip
    return InOrder(
        model, arguments, optimizers=(optimizer, None), callbacks=[callback],
        train_dataset=dataset(),
    )  # fmt: skip


def train_by_accelerate(net: Net, optimizer: Any, policy: Any, scaler: Any, _: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
    accelerator.scaler = scaler
    model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    watch = gradwatch.attach(model, optimizer, policy, **QUIET)
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(*batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    watch.close()
    return watch


def train_by_transformers(net: Net, optimizer: Any, policy: Any, scaler: Any, folder: Any) -> Any:
    callback = gradwatch.transformers.GradWatch(policy, **QUIET)
    trainer = hf_trainer(net, optimizer, callback, folder)
    trainer.accelerator.scaler = scaler
    trainer.train()
    return callback.watch


def _plugins(scaler: Any) -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if scaler else {}


def train_by_lightning(net: Net, optimizer: Any, policy: Any, scaler: Any, _: Any) -> Any:
    callback = gradwatch.lightning.GradWatch(policy, **QUIET)
    settings = {"accumulate_grad_batches": WINDOW, **_plugins(scaler)}
    fit(OfLightning(net, optimizer), callback, **settings)
    return callback.watch


def train_by_lightning_by_hand(net: Net, optimizer: Any, policy: Any, scaler: Any, _: Any) -> Any:
    callback = gradwatch.lightning.GradWatch(policy, **QUIET)
    fit(OfLightningByHand(net, optimizer), callback, **_plugins(scaler))
    return callback.watch


TRAINERS = {
    "Accelerate": train_by_accelerate,
    "Hugging Face": train_by_transformers,
    "Lightning automatic": train_by_lightning,
    "Lightning manual": train_by_lightning_by_hand,
}


@pytest.fixture(autouse=True)
def _no_state_of_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in singletons."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def kit() -> ModuleType:
    """What is defined here."""
    return sys.modules[__name__]
