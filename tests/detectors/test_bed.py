"""Real runs of small networks: each fault is found by its kind, and its twin raises no alert.

The same runs as `python -m benchmarks.detectors`, with seeds of their own.
"""

from __future__ import annotations

import pytest

from benchmarks.detectors.faults import FAULTS
from benchmarks.detectors.runs import Setting, healthy_settings, played

SEED = 3000
pytestmark = pytest.mark.slow


def setting(name):
    fault = FAULTS[name]
    return fault, Setting(fault.models[0], fault.optimizer, seed=SEED, steps=fault.steps)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    fault, how = setting(name)
    found = played(how, fault.hook, fault.at, prepare=fault.prepare, policy=fault.policy)
    after = [a for a in found if a.step >= fault.at]
    assert [a for a in found if a.step < fault.at and a.level == "alert"] == []
    assert {a.kind for a in after if a.level == fault.level} & set(fault.kinds), after


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.twin])
def test_its_healthy_twin_raises_no_alert(name):
    fault, how = setting(name)
    prepare = fault.twin_prepare or fault.prepare
    found = played(how, fault.twin, fault.at, prepare=prepare)
    assert [a for a in found if a.level == "alert"] == []


@pytest.mark.parametrize("how", list(healthy_settings(SEED))[::4], ids=str)
def test_a_healthy_run_raises_no_alert(how):
    assert [a for a in played(how) if a.level == "alert"] == []
