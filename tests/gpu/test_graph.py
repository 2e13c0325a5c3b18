"""CUDA graphs: forward and backward may be captured, a step that is watched may not."""

from __future__ import annotations

import pytest
import torch

import gradwatch

pytestmark = pytest.mark.gpu
CLIP = {"version": 1, "clip": [{"limit": 0.05}]}


def warmed_up(model, x) -> None:
    """What a capture needs: a few passes on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)


def test_gradients_of_a_graph_are_measured_and_clipped_at_each_replay(attach, model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    watch = attach(model, optimizer, CLIP)
    x = batches[0].clone()
    warmed_up(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
    norms = []
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        grads = [parameter.grad.double().norm() for parameter in model.parameters()]
        norms.append(float(torch.linalg.vector_norm(torch.stack(grads))))
        optimizer.step()
    watch.flush()
    records = watch.history(99)
    assert [record.total_norm for record in records] == pytest.approx(norms, rel=5e-7)
    assert all(record.clipped for record in records)


def test_other_work_is_captured_while_decisions_are_on_their_way(attach, model, batches):
    """Asking an event from another thread would break the capture: nobody does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    watch = attach(model, optimizer, CLIP)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    graph, y = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        y += 1
    graph.replay()
    watch.flush()
    assert float(y[0]) == 1.0
    assert len(watch.history(99)) == len(batches)


def captured(model, optimizer, x) -> torch.cuda.CUDAGraph:
    warmed_up(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
        optimizer.step()
    return graph


def test_a_step_that_is_captured_is_refused_where_a_policy_is_to_hold(attach, model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    attach(model, optimizer, CLIP)
    with pytest.raises(gradwatch.PolicyError, match="captured in a CUDA graph"):
        captured(model, optimizer, batches[0].clone())


def test_a_step_that_is_captured_is_told_where_it_is_only_observed(attach, model, batches, caplog):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    watch = attach(model, optimizer)
    captured(model, optimizer, batches[0].clone()).replay()
    assert "captured in a CUDA graph" in caplog.text
    assert watch.latest is None
