"""Runs Accelerate's own test of gradient synchronisation, watching what it prepares.

Not a test itself: a program, in one process or under torchrun. Prints what was watched.
"""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from accelerate.test_utils.scripts import test_sync

import gradwatch

POLICY = {"version": 1, "clip": [{"limit": 1e9}]}
"""Enforced, and never with a reason to."""


def attach_to_prepared(watches: list[gradwatch.Watch]) -> None:
    """Each model that an Accelerator prepares from now on is watched, with its optimizer."""
    prepare = accelerate.Accelerator.prepare

    def prepare_and_attach(self: accelerate.Accelerator, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, *args, **kwargs)
        things = prepared if isinstance(prepared, tuple) else (prepared,)
        models = [thing for thing in things if isinstance(thing, torch.nn.Module)]
        optimizers = [thing for thing in things if isinstance(thing, torch.optim.Optimizer)]
        for model in models:
            optimizer = optimizers[0] if optimizers else None
            watches.append(gradwatch.attach(model, optimizer, POLICY, port=None, recording=None))
        return prepared

    accelerate.Accelerator.prepare = prepare_and_attach


def main() -> None:
    watches: list[gradwatch.Watch] = []
    attach_to_prepared(watches)
    test_sync.main()
    for watch in watches:
        watch.close()
    records = [record for watch in watches for record in watch.history(99)]
    windows = [record.micro_batches for record in records]
    print(f"gradwatch: {len(watches)} models, windows {windows}")


if __name__ == "__main__":
    main()
