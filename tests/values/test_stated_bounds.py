"""The terms of every operator are within the bound that its entry in operators.py states, on numbers of the usual sizes."""

import pytest
import torch

from operators import Operator, each_operator
from oracle import assert_within, to_longdouble, ulp_error


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_terms_are_within_the_stated_bound(operator: Operator, dtype: torch.dtype, device: torch.device, rng) -> None:
    for count in operator.counts:
        inputs = [x.to(device) for x in operator.wide_range(rng, *[(20_000,)] * count, dtype=dtype)]
        exact = operator.exact(*(to_longdouble(x) for x in inputs))
        terms = operator(*inputs)
        assert_within(terms, exact, ulp_error(terms, exact), operator.bound, inputs)
