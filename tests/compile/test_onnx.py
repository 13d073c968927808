"""torch.onnx.export gives a graph of standard operators, which onnxruntime computes as kl_ext does."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import kl_ext
import oracle

pytest.importorskip("onnxscript", reason="the extra `test` has it")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `test` has it")

import kl_ext.onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


Call = Callable[..., Tensor]


class Model(nn.Module):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(*inputs) for call in self.calls)


def exported(calls: Sequence[Call], inputs: Sequence[Tensor], **how: Any) -> Any:
    return torch.onnx.export(
        Model(calls).eval(),
        tuple(inputs),
        dynamo=True,
        custom_translation_table=kl_ext.onnx.translation_table(),
        verbose=False,
        **how,
    )


def session_of(program: Any) -> Any:
    """On one thread, and without the warnings of graphs that are evaluated before they run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """An input that no output needs is not among the session's."""
    given = {f"inputs_{i}": x.numpy() for i, x in enumerate(inputs)}
    names = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(numpy.asarray(x)) for x in session.run(None, {name: given[name] for name in names})]


HOW: list[dict[str, Any]] = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"reduction": "mean", "keepdim": True},
    {"reduction": "batchmean"},
    {"reduction": "batchmean", "keepdim": True},
    {"reduction": "sum", "dim": -1},
    {"reduction": "mean", "dim": (0, 2), "keepdim": True},
    {"reduction": "mean", "dim": (1,), "dtype": torch.float64},
    {"reduction": "sum", "dim": (), "clamp_min": None, "clamp_max": 0.5},
]


def deviation(x: Tensor) -> Tensor:
    """onnxruntime has no exponential of bfloat16."""
    return x.double().exp().to(x.dtype)


def calls(hows: Sequence[dict[str, Any]]) -> list[Call]:
    """Of two to four tensors of the first inputs, which are the means and log-variances of p and q, and weights after them."""
    made: list[Call] = [
        lambda mu, log_var, *_: kl_ext.kl_div_single_loss(mu, log_var, clamp_min=-1.0),
        lambda mu, log_var, mu_q, log_var_q, *_: kl_ext.kl_div_pair_loss(mu, log_var, mu_q, log_var_q, clamp_max=None),
        lambda mu, log_var, *_: kl_ext.gaussian_kl_div(mu, log_var, 0.5, -0.25, reduction="batchmean"),
        lambda mu, log_var, *_: kl_ext.gaussian_kl_div(mu[0, 0, 0], log_var[0, 0, 0], reduction="sum", dim=0),
    ]
    for how in hows:
        made.append(lambda mu, log_var, *_, how=how: kl_ext.gaussian_kl_div(mu, log_var, **how))
        made.append(lambda *x, how=how: kl_ext.gaussian_kl_div(*x[:4], **how))
        made.append(lambda *x, how=how: kl_ext.gaussian_kl_div(*x[:4], **how, weight=x[4]))
        made.append(lambda *x, how=how: kl_ext.gaussian_kl_div(*x[:2], **how, weight=x[4] > 0.5))
        if "clamp_max" not in how:
            made.append(lambda *x, how=how: kl_ext.normal_kl_div(x[0], deviation(x[1]), x[2], deviation(x[3]), **how))
            made.append(lambda *x, how=how: kl_ext.normal_kl_div(x[0], deviation(x[1]), **how, weight=x[4]))
    return made


def inputs_of(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Means and log-variances of p, a prior for each column, and weights of which some are 0."""
    shapes = [(rows, 3, 4), (rows, 3, 4), (4,), (3, 1), (rows, 1, 1)]
    tensors = [torch.rand(shape, dtype=torch.float64) * 4 - 2 for shape in shapes]
    tensors[4] = tensors[4].clamp_min(0)
    tensors[4][0] = 1
    return tuple(x.to(dtype) for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_operator_and_reduction_gives_what_kl_ext_gives(dtype: torch.dtype) -> None:
    """For other sizes than those of the export, too. Half types pass into the graph and out of it as float32. The optimiser
    takes ten seconds for so many calls: it runs in the other tests."""
    outside = torch.float32 if dtype.itemsize == 2 else dtype
    all_calls = calls(HOW if dtype == torch.float32 else HOW[1:3])

    def narrowed(call: Call) -> Call:
        return lambda *x: call(*(tensor.to(dtype) for tensor in x))

    def widened(call: Call) -> Call:
        return lambda *x: call(*(tensor.to(dtype) for tensor in x)).double()

    rows = Dim("rows")
    shapes = ({0: rows}, {0: rows}, {}, {}, {0: rows})
    program = exported(list(map(widened, all_calls)), inputs_of(5, outside), dynamic_shapes=(shapes,), optimize=False)
    assert {node.domain for node in program.model.graph} == {""}
    session = session_of(program)
    for count in (5, 2):
        inputs = [x.to(dtype).to(outside) for x in inputs_of(count, outside)]
        for i, (call, actual) in enumerate(zip(all_calls, run(session, inputs), strict=True)):
            expected = narrowed(call)(*inputs)
            # 8 + |x_p - x_q| / 2 units for a term, at most 60 additions, and half a unit of the result's type.
            error = 70 * torch.finfo(torch.promote_types(outside, torch.float32)).eps + torch.finfo(expected.dtype).eps
            torch.testing.assert_close(
                actual, expected.double(), rtol=error, atol=0, equal_nan=True, msg=lambda m, i=i: f"call {i}: {m}"
            )


def test_results_have_the_dtypes_of_eager() -> None:
    how: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {"reduction": "mean", "dtype": torch.float16}]
    all_calls: list[Call] = [lambda a, b, c, how=how: kl_ext.gaussian_kl_div(a, b, a, c, **how) for how in how]
    all_calls.append(lambda a, b, c: kl_ext.gaussian_kl_div(a, a, c, c))
    inputs = (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16), torch.zeros((), dtype=torch.float64))
    program = exported(all_calls, inputs)
    for value, call in zip(program.model.graph.outputs, all_calls, strict=True):
        assert value.dtype.name == {torch.float16: "FLOAT16", torch.float32: "FLOAT"}[call(*inputs).dtype]


def points(distance: float, count: int, dtype: torch.dtype) -> list[Tensor]:
    """p and q at a distance from one another, and p from the standard normal."""
    draws = torch.randn(4, count, dtype=torch.float64) * distance
    return [x.to(dtype) for x in (draws[0], draws[1], draws[0] + draws[2], draws[1] + draws[3])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_within_the_documented_bound(dtype: torch.dtype) -> None:
    """Near the prior, where the plain formula loses everything, and far from it."""
    divergence = kl_ext.gaussian_kl_div
    both: list[Call] = [lambda mu, log_var, *_: divergence(mu, log_var), lambda *x: divergence(*x)]
    count = Dim("count")
    session = session_of(exported(both, points(1, 8, dtype), dynamic_shapes=(({0: count},) * 4,)))
    for distance in (1e-6, 1e-3, 0.1, 1, 4):
        inputs = points(distance, 5000, dtype)
        single, pair = run(session, inputs)
        exact = [oracle.to_longdouble(x) for x in inputs]
        right = oracle.single(*exact[:2]).value
        oracle.assert_within(single, right, oracle.ulp_error(single, right), 8, inputs[:2])
        right = oracle.pair(*exact).t / 2
        gap = numpy.abs(oracle.clamp(exact[1], -30, 20) - oracle.clamp(exact[3], -30, 20))
        oracle.assert_within(pair, right, oracle.ulp_error(pair, right) - gap / 2, 8, inputs)
        assert (single >= 0).all()
        assert (pair >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_of_deviations_are_within_the_documented_bound(dtype: torch.dtype) -> None:
    from mpmath import log, mp, mpf

    both: list[Call] = [lambda loc, scale, *_: kl_ext.normal_kl_div(loc, scale), lambda *x: kl_ext.normal_kl_div(*x)]
    count = Dim("count")
    session = session_of(exported(both, [x.exp() for x in points(1, 8, dtype)], dynamic_shapes=(({0: count},) * 4,)))
    for distance in (1e-6, 1e-3, 0.1, 1, 5):
        loc_p, scale_p, loc_q, scale_q = points(distance, 200, dtype)
        inputs = [loc_p, scale_p.exp(), loc_q, scale_q.exp()]
        for result, q in zip(run(session, inputs), ([torch.zeros(200), torch.ones(200)], inputs[2:]), strict=True):
            exact = []
            with mp.workdps(60):
                for a, b, c, d in zip(*(x.tolist() for x in (*inputs[:2], *q)), strict=True):
                    ratio, shift = mpf(b) / mpf(d), (mpf(a) - mpf(c)) / mpf(d)
                    exact.append(oracle.mpf_to_longdouble((ratio**2 - 1 + shift**2) / 2 - log(ratio)))
            right = numpy.array(exact)
            oracle.assert_within(result, right, oracle.ulp_error(result, right), 6, [*inputs[:2], *q])
            assert (result >= 0).all()


def test_what_is_not_finite_stays_so() -> None:
    nan, inf = torch.nan, torch.inf
    mu, log_var = torch.tensor([nan, 0, inf, 0, 0]), torch.tensor([0, nan, 0, inf, -inf])
    both: list[Call] = [lambda a, b: kl_ext.gaussian_kl_div(a, b), lambda a, b: kl_ext.gaussian_kl_div(a, b, b, a)]
    both.append(lambda a, b: kl_ext.gaussian_kl_div(a, b, clamp_min=None, clamp_max=None))
    for actual, call in zip(run(session_of(exported(both, (mu, log_var))), (mu, log_var)), both, strict=True):
        torch.testing.assert_close(actual, call(mu, log_var), equal_nan=True, rtol=1e-5, atol=0)


def test_a_mean_of_nothing_is_nan() -> None:
    session = session_of(exported([lambda x: kl_ext.gaussian_kl_div(x, x, reduction="mean")], [torch.zeros(0, 2)]))
    assert run(session, [torch.zeros(0, 2)])[0].isnan()


def test_without_the_table_torch_says_what_is_missing() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match="No ONNX function found") as raised:
        torch.onnx.export(
            Model([lambda *x: kl_ext.kl_div_single_loss(*x)]), (torch.zeros(2), torch.zeros(2)), dynamo=True, verbose=False
        )
    assert "kl_div_single_loss" in str(raised.value)


def test_the_example_in_the_docstring_runs() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(kl_ext.onnx.translation_table, "translation_table", globs={"torch": torch})
    assert doctest.DocTestRunner().run(example).failed == 0


def test_every_forward_operator_is_translated() -> None:
    """So that one that is added is not forgotten."""
    names = {name.removeprefix("kl_ext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("kl_ext::")}
    forward = {name for name in names if not name.endswith(("_backward", ".out"))}
    assert {operator._schema.name.removeprefix("kl_ext::") for operator in kl_ext.onnx.translation_table()} == forward
