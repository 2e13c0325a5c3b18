"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import gradwatch

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")

TENSORFLOW = Path(__file__).parent / "tensorflow"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """TensorFlow's tests run where they are asked for by path, in a process of their own: devices
    have to be set before it begins, and it does not like to share one with torch."""
    if collection_path != TENSORFLOW:
        return None
    asked = (Path(str(arg).partition("::")[0]).resolve() for arg in config.invocation_params.args)
    return None if any(path.is_relative_to(TENSORFLOW) for path in asked) else True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device is here")


@pytest.fixture
def attach() -> Iterator[Callable[..., gradwatch.Watch]]:
    """`gradwatch.attach` that serves and records nothing unless asked."""
    watches = []

    def attach_quietly(*args, **kwargs) -> gradwatch.Watch:
        watch = gradwatch.attach(*args, **{"port": None, "recording": None, **kwargs})
        watches.append(watch)
        return watch

    yield attach_quietly
    for watch in watches:
        watch.close()
