"""A checkpoint that is never overwritten by a bad one.

    python examples/checkpoints.py [steps]

Two files: `latest.pt`, to go on from after a crash, and `healthy.pt`, to go back to when a run has
gone wrong. A checkpoint becomes the healthy one only when the run has stayed without an alert for
PROVEN steps behind it: detection needs a few steps to be sure.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import gradwatch

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 400
EVERY, PROVEN = 50, 50
BREAKS_AT = STEPS * 3 // 4
"""Where this example provokes what a healthy checkpoint is for."""


class Checkpoints:
    """Call `save` behind `optimizer.step()`."""

    def __init__(self, directory: Path, watch: gradwatch.Watch) -> None:
        directory.mkdir(exist_ok=True)
        self.latest, self.healthy = directory / "latest.pt", directory / "healthy.pt"
        self._waiting = directory / "waiting.pt"
        self._watch = watch
        self._waits_since: int | None = None
        watch.on_anomaly(self.told)

    def told(self, anomaly: gradwatch.Anomaly) -> None:
        if anomaly.level == "alert":
            print(f"step {anomaly.step}: {anomaly.kind}: {self.healthy} stays as it is")

    def save(self, step: int, state: dict[str, object]) -> None:
        self._watch.flush()  # so that every step so far is diagnosed
        healthy_since = self._watch.healthy_since
        if self._waits_since is not None and (
            healthy_since is None or healthy_since > self._waits_since
        ):
            self._waits_since = None  # an alert came meanwhile: it is not to be trusted
        if self._waits_since is not None and step - self._waits_since >= PROVEN:
            os.replace(self._waiting, self.healthy)
            self._waits_since = None
        state = {**state, "step": step, "gradwatch": self._watch.state_dict()}
        torch.save(state, self.latest)
        if self._waits_since is None and healthy_since is not None:
            torch.save(state, self._waiting)
            self._waits_since = step


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16
    targets = torch.tensor(data.target)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with gradwatch.attach(model, optimizer, run="checkpoints", port=None) as watch:
        checkpoints = Checkpoints(Path("checkpoints"), watch)
        for step in range(STEPS):
            if step == BREAKS_AT:
                optimizer.param_groups[0]["lr"] = 1.0
            chosen = torch.randint(0, len(inputs), (64,))
            loss = torch.nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
            if step % EVERY == EVERY - 1:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoints.save(step, state)
        print(watch)
    kept = torch.load(checkpoints.healthy, weights_only=True)
    model.load_state_dict(kept["model"])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    print(f"{checkpoints.healthy} is of step {kept['step']}, its loss is {float(loss):.3f}")


if __name__ == "__main__":
    main()
