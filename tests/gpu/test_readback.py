"""Decisions come back in order and whole, however far the host runs ahead of the device."""

from __future__ import annotations

import pytest
import torch

from gradwatch.torch.readback import MOST_UNDER_WAY, Readback

pytestmark = pytest.mark.gpu

BUSY = 20_000_000
"""Cycles for which the device is kept busy: some 10 ms."""


def test_vectors_come_in_order_from_a_device_that_is_behind():
    readback = Readback(torch.device("cuda"))
    seen = []
    for step in range(4 * MOST_UNDER_WAY):
        torch.cuda._sleep(BUSY)
        readback.send(torch.full((64,), float(step), device="cuda"), step)
        seen += [(what, array.tolist()) for array, what in readback.arrived(wait=False)]
        assert step - len(seen) < MOST_UNDER_WAY
    assert len(seen) < 4 * MOST_UNDER_WAY
    seen += [(what, array.tolist()) for array, what in readback.arrived(wait=True)]
    assert seen == [(step, [float(step)] * 64) for step in range(4 * MOST_UNDER_WAY)]


def test_a_buffer_is_not_used_again_before_its_copy_has_come():
    readback = Readback(torch.device("cuda"))
    for step in range(3):
        torch.cuda._sleep(BUSY)
        readback.send(torch.full((8,), float(step), device="cuda"), step)
    places = {buffer.data_ptr() for _, buffer, _ in readback._under_way}
    assert len(places) == 3
    assert [array[0] for array, _ in readback.arrived(wait=True)] == [0.0, 1.0, 2.0]


def test_a_run_under_load_records_each_norm(attach, model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    watch = attach(model, optimizer, {"version": 1, "clip": [{"limit": 0.5}]})
    norms = []
    for step in range(60):
        torch.cuda._sleep(BUSY)
        model(batches[step % len(batches)]).square().mean().backward()
        grads = [parameter.grad.double().norm() for parameter in model.parameters()]
        norms.append(torch.linalg.vector_norm(torch.stack(grads)))
        optimizer.step()
        optimizer.zero_grad()
    watch.flush()
    records = watch.history(99)
    assert [record.step for record in records] == list(range(60))
    expected = torch.stack(norms).tolist()
    assert [record.total_norm for record in records] == pytest.approx(expected, rel=5e-7)
