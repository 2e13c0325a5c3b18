"""Four steps by each trainer equal the loop that is written by hand, and the norms are its own."""

from __future__ import annotations

import copy

import pytest

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "fused AdamW"])
@pytest.mark.parametrize(
    "name", ["Accelerate", "Hugging Face", "Lightning automatic", "Lightning manual"]
)
@pytest.mark.parametrize("policy", [CLIP, None], ids=["clips", "observes"])
def test_four_steps_are_those_of_the_loop_by_hand(name, kind, scaled, policy, kit, tmp_path):
    net = kit.Net()
    plain = copy.deepcopy(net)
    scaler = kit.make_scaler() if scaled else None
    watch = kit.TRAINERS[name](net, kit.make_optimizer(kind, net), policy, scaler, tmp_path)
    norms = kit.by_hand(
        plain,
        kit.make_optimizer(kind, plain),
        1.0 if policy else None,
        kit.make_scaler() if scaled else None,
        half=scaled and "Lightning" in name,  # its loss scaler comes with autocast
    )
    largest = kit.largest_difference(net, plain)
    print(f"{name}, {kind}: parameters differ by {largest:.1e}")
    records = watch.history(9)
    assert largest <= (2e-8 if kind == "fused AdamW" else 0.0)
    assert [record.total_norm for record in records] == pytest.approx(norms, rel=1e-6)
    assert [record.micro_batches for record in records] == [2, 2, 2, 2]
    assert [record.skipped for record in records] == [None] * 4
    assert all(record.clipped == (policy is not None) for record in records)
    assert max(norms) > 2.0
