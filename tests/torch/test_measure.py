"""Norms that can be trusted: against float64, for every dtype and layout."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.torch.backend import TorchBackend
from gradwatch.torch.gradients import gather
from gradwatch.torch.measure import measure


def error(gradient: torch.Tensor) -> float:
    """Relative to float64."""
    reference = torch.linalg.vector_norm(gradient.to(torch.float64)).item()
    return abs(measure([gradient]).item() / reference - 1)


@pytest.mark.parametrize("size", [1, 1000, 65_536, 65_537, 1_000_003, 5_000_000])
def test_a_norm_of_random_elements_is_within_2e_6_of_float64(size):
    torch.manual_seed(size)
    assert error(torch.randn(size)) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("make", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_a_norm_of_50_million_random_elements_is_within_2e_6_of_float64(make):
    torch.manual_seed(0)
    gradient = make(50_000_000)
    assert error(gradient) < 2e-6


@pytest.mark.parametrize("size", [65_536, 65_537, 3_000_001, 20_000_000])
def test_a_norm_of_any_data_is_within_5e_5_of_float64(size):
    for gradient in (torch.full((size,), 0.1), torch.linspace(-1, 1, size), _one_large(size)):
        assert error(gradient) < 5e-5


def _one_large(size: int) -> torch.Tensor:
    gradient = torch.full((size,), 1e-3)
    gradient[size // 2] = 1e3
    return gradient


@pytest.mark.parametrize("size", [100_000, 65_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_norm_beyond_65504_is_finite(dtype, size):
    gradient = torch.full((size,), 400.0, dtype=dtype)
    assert measure([gradient]).item() == pytest.approx(400 * math.sqrt(size), rel=5e-5)


def test_norms_up_to_64_ki_elements_are_those_of_torch_to_the_bit():
    torch.manual_seed(1)
    gradients = [torch.randn(n) for n in (3, 64, 1000, 65_536)]
    assert measure(gradients).tolist() == [g.norm().item() for g in gradients]


def test_memory_layout_makes_no_difference():
    torch.manual_seed(2)
    channels_last = torch.randn(64, 64, 8, 8).to(memory_format=torch.channels_last)
    strided = torch.randn(600, 600)[:, ::2]
    for gradient in (channels_last, strided, torch.randn(500, 400).T):
        assert error(gradient) < 1e-6


def test_norms_come_in_the_order_of_the_gradients_whatever_their_dtype_and_size():
    gradients = [
        torch.ones(4, dtype=torch.float64),
        torch.ones(90_000),
        torch.ones(9, dtype=torch.bfloat16),
        torch.ones(16),
    ]
    assert measure(gradients).tolist() == pytest.approx([2, 300, 3, 4])


def norms_of(*gradients: torch.Tensor) -> torch.Tensor:
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    backend = TorchBackend(parameters)
    return backend.measure(backend.gather(), 2.0)


@pytest.mark.parametrize("magnitude", [1e20, 1e-23, 3e38, 1e-45])
@pytest.mark.parametrize("size", [10, 100_000])
def test_finite_elements_whose_squares_leave_float32_have_their_true_norm(magnitude, size):
    gradient = torch.full((size,), magnitude)
    element = gradient[0].item()
    expected = element * math.sqrt(size)
    assert norms_of(gradient, torch.ones(4)).tolist() == pytest.approx([expected, 2.0], rel=1e-6)


def test_float64_elements_whose_squares_leave_float64_have_their_true_norm():
    assert norms_of(torch.full((4,), 1e200, dtype=torch.float64)).item() == pytest.approx(2e200)


def test_zero_gradients_have_norm_zero_and_real_infinities_stay():
    zero, infinite, nan = torch.zeros(5), torch.tensor([1.0, -math.inf]), torch.tensor([math.nan])
    measured = norms_of(zero, infinite, nan).tolist()
    assert measured[0] == 0
    assert measured[1] == math.inf
    assert math.isnan(measured[2])


def test_a_sparse_gradient_counts_repeated_rows_as_their_sum():
    table = torch.nn.Embedding(10, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    # Row 1 was used twice: its gradient is 2, so the norm is sqrt(3 * 2^2 + 3 * 1^2).
    gradients = gather([table.weight])
    assert measure(gradients.values).item() == pytest.approx(math.sqrt(15))


def test_a_complex_gradient_counts_real_and_imaginary_parts():
    gradient = torch.tensor([3 + 4j, 0 + 12j])
    assert measure([gradient]).item() == pytest.approx(13.0)
    assert norms_of(gradient * 1e20).item() == pytest.approx(13e20, rel=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 2.5, 3.0, math.inf])
@pytest.mark.parametrize("size", [1, 1000, 1025, 65_537, 3_000_001])
def test_every_p_norm_is_within_1e_6_of_float64(norm_type, size):
    torch.manual_seed(size)
    for gradient in (torch.randn(size), torch.rand(size) * 1e-3, torch.randn(size).bfloat16()):
        reference = torch.linalg.vector_norm(gradient.to(torch.float64), norm_type).item()
        assert measure([gradient], norm_type).item() == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize(("norm_type", "magnitude"), [(1.0, 3e38), (3.0, 1e20), (3.0, 1e-20)])
def test_powers_that_leave_float32_are_measured_again_in_float64(norm_type, magnitude):
    parameter = torch.nn.Parameter(torch.zeros(64))
    parameter.grad = torch.full((64,), magnitude)
    backend = TorchBackend([parameter])
    expected = parameter.grad[0].item() * 64 ** (1 / norm_type)
    measured = backend.measure(backend.gather(), norm_type).item()
    assert measured == pytest.approx(expected, rel=1e-6)


def test_the_largest_element_of_nothing_is_zero_and_nan_is_kept():
    assert measure([torch.zeros(0)], math.inf).item() == 0
    assert math.isnan(measure([torch.tensor([1.0, math.nan])], math.inf).item())


def test_buckets_are_kept_for_each_set_of_gradients_and_made_anew_after_a_cast():
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    backend = TorchBackend(parameters)

    def norms() -> list[float]:
        return backend.measure(backend.gather(), 2.0).tolist()

    for parameter in parameters:
        parameter.grad = torch.full((4,), 1.5)
    assert norms() == [3.0, 3.0, 3.0]
    parameters[1].grad = None
    assert norms() == [3.0, 3.0]
    for parameter in parameters:
        parameter.data = parameter.data.half()
        parameter.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    assert norms() == [120000.0] * 3
    parameters[1].grad = torch.full((4,), 60000.0, dtype=torch.float16)
    assert norms() == [120000.0] * 3
