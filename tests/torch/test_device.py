"""A decision stays on the device of the norms: rules never read a value.

On the meta device there are no values, so whatever reads one raises.
"""

from __future__ import annotations

import pytest
import torch

import gradwatch
from gradwatch.policy import load_policy
from gradwatch.records import Layout, Parameter
from gradwatch.rules.chain import Chain
from gradwatch.rules.clipping import Rule, decide
from gradwatch.torch.arrays import TorchArrays
from gradwatch.torch.readback import Readback
from gradwatch.torch.refusals import is_captured

META = torch.device("meta")
LAYOUT = Layout.of(
    [
        Parameter(name="embed.weight", shape=(10, 4), module="Embedding"),
        Parameter(name="head.weight", shape=(4, 4), module="Linear", group=1),
        Parameter(name="head.bias", shape=(4,), module="Linear", group=1),
    ]
)


def test_a_whole_chain_decides_without_a_value():
    policy = load_policy(
        {
            "version": 1,
            "clip": [
                {"name": "all", "limit": 1.0},
                {"name": "tensor", "per": "tensor", "limit": 0.5, "params": ["head.*"]},
                {"name": "layer", "per": "layer", "limit": 0.5},
                {"name": "group", "per": "group", "limit": {0: 1.0, 100: 0.1}},
                {"name": "skipping", "limit": 10.0, "then": "skip"},
            ],
        }
    )
    chain = Chain(policy, LAYOUT, TorchArrays(META))
    norms = {2.0: torch.empty(3, device=META)}
    decision = decide(chain.rules(b"\1\1\1"), norms, chain.limits(50), TorchArrays(META))
    assert decision.coefs_P.shape == (3,)
    assert {part.device for part in (decision.total_norm, decision.coefs_P, *decision.over)} == {
        META
    }
    assert {over.shape for over in decision.over} == {()}


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_no_norm_type_needs_a_value(norm_type):
    xp = TorchArrays(META)
    rule = Rule(
        name="r",
        then="scale",
        key=norm_type,
        norm_type=norm_type,
        unit_of=xp.indices([0, 0, 1]),
        num_units=2,
    )
    norms = {2.0: torch.empty(3, device=META), norm_type: torch.empty(3, device=META)}
    assert decide([rule], norms, [1.0], xp).coefs_P.device == META


def test_a_step_inside_a_cuda_graph_is_refused_where_a_policy_is_to_hold(monkeypatch, caplog):
    cuda = torch.device("cuda")
    assert not is_captured(torch.device("cpu"), enforcing=True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert is_captured(cuda, enforcing=False) is capturing
    assert "neither measured nor clipped. Capture forward and backward alone" in caplog.text
    with pytest.raises(gradwatch.PolicyError, match="captured in a CUDA graph"):
        is_captured(cuda, enforcing=True)


def test_a_loss_that_is_on_a_device_is_logged_without_a_look_at_it(task, attach, monkeypatch):
    """float() of a tensor without a value raises: `nan` is what the host would have read."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    watch = attach(task.model, optimizer, {"version": 1})
    sent = []
    for step in range(3):
        task.gradient(step)
        with monkeypatch.context() as patch:
            patch.setattr(watch._backend, "reads_host", False)
            patch.setattr(watch._backend, "send", lambda *what: sent.append(what))
            watch.log(loss=torch.empty((), device=META, requires_grad=True))
        ((vector, come),) = sent
        assert (vector.shape, vector.device) == ((1,), META)
        come([step / 4])
        sent.clear()
        optimizer.step()
    assert [record.scalars for record in watch.history(9)] == [{"loss": i / 4} for i in range(3)]


def test_what_is_sent_beside_steps_does_not_hurry_them(monkeypatch):
    """Processes read their steps equally late, also where only one of them logs."""
    readback = Readback(torch.device("cpu"), lag=2)
    monkeypatch.setattr(readback, "_event", lambda: Ready())
    monkeypatch.setattr(readback, "_buffer", lambda vector: torch.empty_like(vector))
    seen = []
    for step in range(5):
        readback.send(torch.zeros(1), print)
        readback.send(torch.zeros(1), step)
        readback.send(torch.zeros(1), print)
        seen.append([what for _, what in readback.arrived(wait=False) if what is not print])
    assert seen == [[], [], [0], [1], [2]]


class Ready:
    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...
