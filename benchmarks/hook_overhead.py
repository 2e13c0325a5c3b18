"""What gradwatch costs beside the clip call that it replaces, as ratios from one run.

    python benchmarks/hook_overhead.py [--rounds 15] [--threads 2] [--device cuda]

Each round times `torch.nn.utils.clip_grad_norm_(foreach=True)` and the whole of gradwatch's hook
(measuring, deciding, clipping, recording to disk, with export and detection on) one after the
other on the same gradients, so that both see the same machine. Printed are medians over rounds and
the median of the ratios of each round. With `--device cuda` each call is timed until the device is
done; what the host itself takes is less.

Prediction, from memory traffic alone. With n bytes of gradients `clip_grad_norm_` reads n to
measure and always reads and writes n again to multiply: 3 n. gradwatch reads n when nothing is
clipped (0.33x) and moves 3 n when all is (1.0x). A fused AdamW step reads 4 n and writes 3 n; with
`clip_grad_norm_` before it that makes 10 n. gradwatch has the kernel multiply, which then writes
the gradient too: 1 n + 8 n (0.9x), and 8 n when nothing is clipped (0.8x).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import gradwatch
from gradwatch.policy import KINDS


def gpt2_small(device: str) -> torch.nn.Module:
    """The parameter shapes of GPT-2 small: 148 tensors, 124 million elements."""
    model = torch.nn.Module()
    wide = 768
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257, wide), "wpe": (1024, wide)}
    for block in range(12):
        shapes |= {
            f"h_{block}_ln_1_weight": (wide,),
            f"h_{block}_ln_1_bias": (wide,),
            f"h_{block}_attn_qkv": (wide, 3 * wide),
            f"h_{block}_attn_qkv_bias": (3 * wide,),
            f"h_{block}_attn_proj": (wide, wide),
            f"h_{block}_attn_proj_bias": (wide,),
            f"h_{block}_ln_2_weight": (wide,),
            f"h_{block}_ln_2_bias": (wide,),
            f"h_{block}_mlp_fc": (wide, 4 * wide),
            f"h_{block}_mlp_fc_bias": (4 * wide,),
            f"h_{block}_mlp_proj": (4 * wide, wide),
            f"h_{block}_mlp_proj_bias": (wide,),
        }
    shapes |= {"ln_f_weight": (wide,), "ln_f_bias": (wide,)}
    return _with_gradients(model, shapes, device)


def many_small(count: int, device: str) -> torch.nn.Module:
    """`count` tensors of 8 kB: all cost is per call, none per byte."""
    return _with_gradients(torch.nn.Module(), {f"w{i}": (2048,) for i in range(count)}, device)


def _with_gradients(
    model: torch.nn.Module, shapes: dict[str, tuple[int, ...]], device: str
) -> torch.nn.Module:
    torch.manual_seed(0)
    for name, shape in shapes.items():
        parameter = torch.nn.Parameter(torch.empty(shape, device=device))
        parameter.grad = torch.randn(shape, device=device).mul_(1e-3)
        model.register_parameter(name, parameter)
    return model


@dataclass
class Case:
    name: str
    model: torch.nn.Module
    clips: bool
    bar: float | None = None
    fused_step: bool = False
    """Whether the step of a fused AdamW is timed with it."""


def cases(device: str) -> Iterator[Case]:
    large = gpt2_small(device)
    yield Case("124 M in 148 tensors, nothing clipped", large, clips=False, bar=0.6)
    yield Case("124 M in 148 tensors, all clipped", large, clips=True, bar=1.05)
    yield Case("the same and fused AdamW, all clipped", large, True, 1.0, fused_step=True)
    yield Case("the same and fused AdamW, nothing clipped", large, False, 1.0, fused_step=True)
    for count, bar in ((1000, 1.0), (10, None), (100, None), (5000, None)):
        name = f"{count} tensors of 8 kB, nothing clipped"
        yield Case(name, many_small(count, device), clips=False, bar=bar)


def timed(call: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    """For the device, where there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(case: Case, rounds: int) -> tuple[float, float, float]:
    """Median seconds of clip_grad_norm_, of gradwatch, and the median ratio."""
    parameters = list(case.model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    limit = norm / 100 if case.clips else norm * 100
    policy = {"version": 1, "clip": [{"limit": limit}]}
    theirs, ours = [], []
    plain = watched = None
    if case.fused_step:
        plain, watched = (torch.optim.AdamW(parameters, lr=0.0, fused=True) for _ in range(2))

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        if plain is not None:
            plain.step()

    with tempfile.TemporaryDirectory() as directory:
        with gradwatch.attach(
            case.model, watched, policy, port=0, recording=directory, linger=0
        ) as watch:
            for round_ in range(rounds + 3):
                _refresh(gradients, norm, case.clips)
                clip = timed(clip_and_step)
                _refresh(gradients, norm, case.clips)
                hook = timed(watch.process if watched is None else watched.step)
                if round_ >= 3:
                    theirs.append(clip)
                    ours.append(hook)
            watch.flush()
            record = watch.latest
            assert record is not None
            assert record.clipped is case.clips
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    return statistics.median(theirs), statistics.median(ours), statistics.median(ratios)


def _refresh(gradients: list[torch.Tensor], norm: float, clipped: bool) -> None:
    """Brings clipped gradients back to their norm, so that each call clips."""
    if clipped:
        now = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, norm / now)


def added_per_layer(count: int, rounds: int, device: str) -> float:
    """Median seconds that a step takes with `count` layers of 64 elements, hardly any data."""
    model = _with_gradients(torch.nn.Module(), {f"w{i}": (64,) for i in range(count)}, device)
    policy = {"version": 1, "layers": "parameter", "clip": [{"limit": 1e9}]}
    with tempfile.TemporaryDirectory() as directory:
        with gradwatch.attach(model, None, policy, port=0, recording=directory, linger=0) as watch:
            seconds = [timed(watch.process) for _ in range(rounds + 3)]
    return statistics.median(seconds[3:])


ADAPTIVE = [
    {"limit": {"z": 4}},
    {"per": "layer", "limit": {"z": 4}},
    {"limit": {"z": 6, "space": "raw", "window": 128}, "then": "skip", "name": "spikes"},
]


def added_by_learning(model: torch.nn.Module, rounds: int) -> float:
    """The hook with three rules that learn over the hook with one fixed rule, interleaved."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        fixed, learning = (
            stack.enter_context(
                gradwatch.attach(
                    model, None, {"version": 1, "clip": clip}, port=0, recording=directory, linger=0
                )
            )
            for clip in ([{"limit": 1e9}], ADAPTIVE)
        )
        for _ in range(110):  # behind the warm-up
            learning.process()
        ratios = []
        for _ in range(rounds):
            once = timed(fixed.process)
            ratios.append(timed(learning.process) / once)
    return statistics.median(ratios)


SAMPLED = 10
"""Steps of which one is sampled: blocks of so many are compared."""


def added_by_detection(model: torch.nn.Module, rounds: int) -> float:
    """The hook with every detector on over the hook without any, blocks of steps interleaved."""
    parameters = list(model.parameters())
    off = {"version": 1, "detect": {"culprit": "none", **dict.fromkeys(KINDS, "none")}}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        watches = [
            stack.enter_context(
                gradwatch.attach(
                    model, torch.optim.SGD(parameters, lr=0.0), policy,
                    port=0, recording=directory, linger=0,
                )
            )
            for policy in (off, {"version": 1})
        ]  # fmt: skip

        def block(watch: Any) -> None:
            for _ in range(SAMPLED):
                watch.process()
                watch._disarm()  # what the hook behind the step calls

        ratios = []
        for round_ in range(rounds + 10):
            without, on = (timed(lambda watch=watch: block(watch)) for watch in watches)
            if round_ >= 10:
                ratios.append(on / without)
    return statistics.median(ratios)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--device", default="cpu")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        arguments.error("no CUDA device is here")
    where = f"{options.threads} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {where}, {options.rounds} rounds")
    print(f"{'case':44} {'clip_grad_norm_':>15} {'gradwatch':>11} {'ratio':>7}  bar")
    for case in cases(device):
        theirs, ours, ratio = compare(case, options.rounds)
        bar = (
            ""
            if case.bar is None
            else f"<= {case.bar:g}x {'met' if ratio <= case.bar else 'MISSED'}"
        )
        print(
            f"{case.name:44} {theirs * 1e3:12.2f} ms {ours * 1e3:8.2f} ms {ratio:6.2f}x  {bar}",
            flush=True,
        )
    print()
    print(f"{'layers of 64 elements':44} {'added':>15} {'a layer':>11}")
    for count in (10, 100, 1000, 5000):
        seconds = added_per_layer(count, 5 * options.rounds, device)
        print(f"{count:44} {seconds * 1e3:12.2f} ms {seconds / count * 1e6:8.2f} us", flush=True)
    print()
    for name, model in {
        "148 tensors, 124 M": gpt2_small(device),
        "1000 tensors": many_small(1000, device),
    }.items():
        ratio = added_by_learning(model, 4 * options.rounds)
        said = "met" if ratio <= 1.05 else "MISSED"
        print(f"three rules that learn over one fixed: {name:23} {ratio:6.3f}x  <= 1.05x {said}")
    print()
    for name, model in {
        "148 tensors, 124 M": gpt2_small(device),
        "148 tensors of 8 kB": many_small(148, device),
    }.items():
        ratio = added_by_detection(model, 2 * options.rounds)
        said = "met" if ratio <= 1.1 else "MISSED"
        print(f"every detector over none: {name:36} {ratio:6.3f}x  <= 1.1x {said}")


if __name__ == "__main__":
    main()
