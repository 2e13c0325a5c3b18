"""The full policy, and whatever a policy may hold."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def full_text() -> str:
    """A policy with every key that works."""
    return Path(__file__).with_name("full.yaml").read_text()
