"""On a device for which there are no kernels the operators are plain torch formulas, behind the same interface and checks. The
device is one that torch lets a test define (simulated_device.cpp)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import other_device_cases as cases
from operators import DTYPES, OPERATORS, REDUCING, Operator, each_operator, each_reducing_operator
from reduction_cases import REDUCTIONS, SHAPES, each_operator_and_reduction, shapes_for
from simulated_device import DeviceProcess
from weight_cases import WEIGHT_DTYPES

EVERY = [(operator, count) for operator in OPERATORS for count in operator.counts]
each_operator_and_count = pytest.mark.parametrize(("operator", "count"), EVERY, ids=str)
CLAMPED = [(operator, count) for operator, count in EVERY if operator.bounds]


@pytest.fixture(scope="module")
def process() -> Iterator[DeviceProcess]:
    with_device = DeviceProcess()
    yield with_device
    with_device.stop()


@each_operator_and_reduction
def test_values_and_gradients(operator: Operator, how: dict[str, Any], process: DeviceProcess) -> None:
    for shapes in shapes_for(operator):
        process.run(cases.check_values_and_gradients, operator.name, shapes, torch.float64, how)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(operator: Operator, dtype: torch.dtype, process: DeviceProcess) -> None:
    for count in operator.counts:
        process.run(cases.check_values_and_gradients, operator.name, [(3, 4)] * count, dtype, {})


@each_reducing_operator
@pytest.mark.parametrize("how", REDUCTIONS.values(), ids=REDUCTIONS.keys())
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_terms_of_weight_0_are_left_out_whatever_stands_there(
    operator: Operator, how: dict[str, Any], dtype: torch.dtype, process: DeviceProcess
) -> None:
    for name in ("standard", "prior [D]", "all broadcast"):
        process.run(cases.check_weights, operator.name, SHAPES[name], dtype, how)


@each_reducing_operator
def test_a_mean_of_no_weight_is_nan_and_its_gradients_0(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_a_mean_without_weight, operator.name)


@pytest.mark.parametrize(("operator", "count"), CLAMPED, ids=str)
def test_the_clamp_passes_gradients_at_its_bounds_and_stops_them_outside(
    operator: Operator, count: int, process: DeviceProcess
) -> None:
    process.run(cases.check_clamps, operator.name, count)


@each_operator
def test_errors_are_those_of_the_cpu(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_errors, operator.name)


@each_operator
def test_a_tensor_of_the_cpu_is_refused_beside_others(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_a_tensor_of_the_cpu_beside_the_device, operator.name)


def test_one_warning_names_the_device_and_what_is_lost(process: DeviceProcess) -> None:
    process.run(cases.check_one_warning)


@each_operator
def test_nothing_is_computed_in_float64_unless_asked_for(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_without_float64, operator.name, has_float64=False)


@each_operator_and_count
def test_derivatives_of_every_kind(operator: Operator, count: int, process: DeviceProcess) -> None:
    for how in [{}, {"reduction": "mean", "dim": 0}, {"reduction": "batchmean"}] if operator in REDUCING else [{}]:
        process.run(cases.check_derivatives, operator.name, count, how)


@each_operator
def test_vmap(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_vmap, operator.name)


@each_operator
def test_the_backward_operator_has_forward_mode_derivatives(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_tangents_of_the_backward, operator.name)


@each_operator
def test_without_gradients_and_in_inference_mode(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_modes, operator.name)


@each_operator_and_count
def test_only_wanted_gradients_are_returned_or_written(operator: Operator, count: int, process: DeviceProcess) -> None:
    process.run(cases.check_masks_and_given_gradients, operator.name, count)


@each_operator
def test_0_dim_tensors_of_the_cpu_go_with_those_of_the_device(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_numbers_of_the_cpu, operator.name)


@each_operator
def test_halves_of_one_tensor(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_halves, operator.name)


@each_operator
def test_results_have_the_strides_that_they_have_on_the_cpu(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_layouts, operator.name)


@each_operator
def test_autocast_gives_float32(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_autocast, operator.name)


@each_operator
def test_torch_compile(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_compile, operator.name)


@each_operator
def test_jagged_tensors(operator: Operator, process: DeviceProcess) -> None:
    process.run(cases.check_jagged, operator.name)
