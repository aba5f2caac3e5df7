"""accumulate_outer_ and accumulate_convolution_ against their specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andmask_ext import reference

from .moments import KINDS, dtypes, wide
from .outer import SPECIAL, WHOLE, Outer, convolution, convolutions, kinds, layers, outer

both = pytest.mark.parametrize("case", [outer, convolution])


def assert_moments(found: dict[str, Tensor], case: Outer) -> None:
    """As exact as the type of the moments allows; votes wherever rounding cannot change them."""
    double = found["sum"].dtype == torch.float64
    eps = 1e-13 if double else 1e-5
    grads, sizes = case.grads(), case.grads(magnitudes=True)
    expected = case.expected()
    weights = torch.tensor(case.weights or [1.0], dtype=torch.float64)
    weights = weights.expand(len(grads)).view(-1, *[1] * (grads.dim() - 1))
    errors = eps * sizes * weights  # of each environment's gradient
    # Sums of two numbers that may be as large as all of them.
    assert_within(found["sum"], expected.sum, errors.sum(0))
    if "votes" in found:
        doubtful = (grads.abs() <= eps * sizes) & (sizes > 0)
        assert ((found["votes"] - expected.votes).abs() <= doubtful.sum(0)).all()
    if "squares" in found:
        assert_within(
            found["squares"], expected.squares, 10 * (errors * sizes * weights).sum(0) * len(grads)
        )
    if "logs" in found:
        smallest = (grads.abs() * weights - errors).clamp(min=0) + 1e-10
        rounding = 1e-6 + 1e-7 * len(grads)
        bound = (errors / smallest + rounding * (smallest.log().abs() + 1)).sum(0)
        assert_within(found["logs"], expected.logs, bound)


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (found.double() - expected).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(0.0)
    assert (error <= bound).all(), f"{worst} beyond the bound"


@given(layers(WHOLE), kinds)
def test_exact_where_nothing_is_rounded(case: Outer, kept: tuple[str, ...]) -> None:
    """Whole numbers: ties are ties, zeros of either sign do not vote, no product is lost."""
    found, expected = case.run(kept), case.expected()
    assert torch.equal(found["sum"].double(), expected.sum)
    if "votes" in kept:
        assert torch.equal(found["votes"].long(), expected.votes)
    assert_moments(found, case)


@given(layers(), kinds)
def test_noise(case: Outer, kept: tuple[str, ...]) -> None:
    assert_moments(case.run(kept), case)


@given(layers(SPECIAL))
def test_zeros_subnormals_infinities_and_nan(case: Outer) -> None:
    case = replace(case, weights=[])
    found = case.run()
    # In the type of the moments; none of the drawn numbers is so large that a finite sum overflows.
    grads = case.grads().to(wide(case.activations.dtype)).double()
    sizes = case.grads(magnitudes=True)
    certain = (grads.abs() > 1e-5 * sizes) & (sizes > 1e-37) | (sizes == 0) | ~grads.isfinite()
    voters = certain.all(0)
    assert torch.equal(found["votes"][voters].long(), reference.votes(grads)[voters])
    total = grads.sum(0)
    assert torch.equal(found["sum"].isnan(), total.isnan())
    infinite = total.isinf()
    assert torch.equal(found["sum"].isinf(), infinite)
    assert torch.equal(found["sum"][infinite].double(), total[infinite])
    finite = total.isfinite()
    assert_within(found["sum"][finite], total[finite], 1e-5 * sizes.sum(0)[finite] + 1e-37)


def test_votes_of_one_row_are_products_of_signs() -> None:
    """Also where the product underflows; with another moment it is computed, and does not vote."""
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.inf, -torch.inf, torch.nan])
    case = Outer(values.view(1, 1, -1), values.view(1, 1, -1))
    zeros = (values == 0) | values.isnan()
    signs = torch.where(zeros, 0.0, values.sign())
    assert torch.equal(case.run(("sum", "votes"))["votes"].float(), torch.outer(signs, signs))
    underflow = case.run()["votes"]
    assert not underflow[2:4, 2:4].any()
    assert torch.equal(underflow[4:].float(), torch.outer(signs, signs)[4:])


@given(layers(WHOLE), kinds, st.data())
def test_environments_may_come_in_several_calls(
    case: Outer, kept: tuple[str, ...], data: st.DataObject
) -> None:
    split = data.draw(st.integers(0, case.environments))
    moments = [m if k in kept else None for k, m in zip(KINDS, case.empty(), strict=True)]
    count = 0
    for first, last in ((0, split), (split, case.environments)):
        if first < last:
            part = case.part(first, last)
            part.op(*part.args(moments, count))
            count += part.environments
    found = {k: m for k, m in zip(KINDS, moments, strict=True) if m is not None}
    expected = case.expected()
    assert torch.equal(found["sum"].double(), expected.sum)
    if "votes" in kept:
        assert torch.equal(found["votes"].long(), expected.votes)
    assert_moments(found, case)


@given(layers(WHOLE), kinds, st.sampled_from(["slice", "reversed", "mixed"]))
def test_moments_in_any_layout(case: Outer, kept: tuple[str, ...], layout: str) -> None:
    """Slices of larger parameters: what lies around them stays as it is."""
    around, moments = [], []
    for index, (kind, like) in enumerate(zip(KINDS, case.empty(), strict=True)):
        shape = [size + 3 for size in like.shape]
        if layout == "reversed":
            whole = torch.full(shape[::-1], 5, dtype=like.dtype)
            whole = whole.permute(*reversed(range(like.dim())))
        else:
            whole = torch.full(shape, 5, dtype=like.dtype)
        part = whole[tuple(slice(1, 1 + size) for size in like.shape)]
        if layout == "mixed" and index % 2:
            part = like
        around.append((whole, part))
        moments.append(part if kind in kept else None)
    case.op(*case.args(moments))
    expected = case.run(kept)
    for kind, moment, (whole, part) in zip(KINDS, moments, around, strict=True):
        if moment is not None:
            torch.testing.assert_close(moment, expected[kind], rtol=0, atol=0, equal_nan=True)
        part.zero_()
        edge = whole.clone()
        edge[tuple(slice(1, 1 + size) for size in part.shape)] = 5
        assert (edge == 5).all() or part.numel() == 0 or layout == "mixed"


@pytest.mark.parametrize(("votes", "most"), [("int8", 127), ("int16", 32767), ("int32", 2**20)])
@both
def test_width_of_votes(case: Any, votes: str, most: int) -> None:
    layer = case()
    moments = layer.empty(getattr(torch, votes))
    moments[1].fill_(most - 2)
    layer.op(*layer.args(moments, most - 2))
    assert torch.equal(moments[1].long(), most - 2 + layer.expected().votes)
    if votes != "int32":
        with pytest.raises(RuntimeError, match=f"votes wide enough for {most + 1}"):
            layer.op(*layer.args(moments, most - 1))


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("bits", ["int8", "int16", "int32"])
def test_votes_of_many_environments(rows: int, bits: str) -> None:
    environments = 127 if bits == "int8" else 300
    a = torch.randint(-1, 2, (environments, rows, 70)).float()
    d = torch.randint(-1, 2, (environments, rows, 66)).float()
    a[:, :, 0], d[:, :, 0] = 1, -1  # unanimous
    case = Outer(a, d)
    moments = case.empty(getattr(torch, bits))
    case.op(*case.args([*moments[:2], None, None, None]))
    assert torch.equal(moments[1].long(), case.expected().votes)
    assert moments[1][0, 0] == -environments


def test_more_single_rows_than_are_held_at_a_time() -> None:
    environments = 2500
    a, d = (torch.randint(-2, 3, (environments, 1, 512)).float() for _ in range(2))
    order = torch.randperm(environments)
    weights = torch.randint(1, 4, (environments,)).double()
    case = Outer(a, d, order, weights=weights.tolist())
    found = case.run(("sum", "votes"))
    rows_a, rows_d = a[order, 0].double(), d[order, 0].double()
    assert torch.equal(found["votes"].double(), rows_d.sign().t() @ rows_a.sign())
    assert torch.equal(found["sum"].double(), (rows_d * weights[:, None]).t() @ rows_a)


@given(layers())
def test_bits_do_not_depend_on_threads(case: Outer) -> None:
    """Those of several rows; of one row it is the library's product that says so or not."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run())
    for other in results[1:]:
        for kind in KINDS:
            torch.testing.assert_close(
                other[kind], results[0][kind], rtol=0, atol=0, equal_nan=True
            )


@dtypes
@both
def test_dtypes(case: Any, dtype: torch.dtype) -> None:
    layer = case()
    layer = replace(
        layer,
        activations=layer.activations.to(dtype),
        grad_outputs=layer.grad_outputs.to(dtype),
    )
    assert_moments(layer.run(), layer)


def test_expanded_operands() -> None:
    """Of a sum of outputs, say: its gradient is one number for all."""
    a = torch.randn(1, 1, 5).expand(3, 4, 5)
    d = torch.ones(()).expand(3, 4, 6)
    case = outer(activations=a, grad_outputs=d)
    assert_moments(case.run(), case)
    one = Outer(a[:, :1], d[:, :1])
    assert_moments(one.run(("sum", "votes")), one)


@pytest.mark.parametrize("shape", [(0, 6), (5, 0), (0, 0)])
def test_without_inputs_or_outputs(shape: tuple[int, int]) -> None:
    case = outer(activations=torch.randn(3, 4, shape[0]), grad_outputs=torch.randn(3, 4, shape[1]))
    assert case.run()["sum"].shape == shape[::-1]


@both
def test_large_tiles(case: Any) -> None:
    layer = outer(activations=torch.randn(3, 700, 300), grad_outputs=torch.randn(3, 700, 301))
    if case is convolution:
        layer = convolution(
            activations=torch.randn(3, 40, 31, 33),
            grad_outputs=torch.randn(3, 80, 31, 33),
            stride=[1, 1],
            padding=[1, 1],
        )
    assert_moments(layer.run(), layer)


@both
def test_inside_autograd_and_autocast(case: Any) -> None:
    """The operands of a backward pass may belong to a graph."""
    expected = case_with_seed(case).run()
    layer = case_with_seed(case)
    layer = replace(layer, activations=layer.activations.requires_grad_() * 1)
    with torch.autocast(torch.get_default_device().type):
        found = layer.run()
    for kind in KINDS:
        torch.testing.assert_close(found[kind], expected[kind], rtol=0, atol=0)
    single = Outer(torch.randn(3, 1, 5, requires_grad=True), torch.randn(3, 1, 6))
    assert not single.run(("sum", "votes"))["sum"].requires_grad


def case_with_seed(case: Any) -> Outer:
    torch.manual_seed(1)
    return case()


@given(convolutions())
def test_reference_of_convolutions(case: Outer) -> None:
    """The specification agrees with autograd."""
    call = getattr(torch.nn.functional, f"conv{len(case.kernel)}d")
    weight = torch.zeros(case.shape, dtype=torch.float64, requires_grad=True)
    window = (case.stride, case.padding, case.dilation, case.groups)
    out = call(case.activations.double(), weight, None, *window)
    (out * case.grad_outputs.double()).sum().backward()
    expected = replace(case, weights=[]).expected()
    torch.testing.assert_close(expected.sum, weight.grad)


@both
@pytest.mark.parametrize("kept", [KINDS, ("sum",), ("sum", "votes")])
def test_opcheck(case: Any, kept: tuple[str, ...]) -> None:
    layer = case()
    moments = [m if k in kept else None for k, m in zip(KINDS, layer.empty(), strict=True)]
    torch.library.opcheck(layer.op.default, layer.args(moments))


@both
def test_compiled(case: Any) -> None:
    layer = case()
    moments = layer.empty()

    def step(*args: Any) -> None:
        layer.op(*args)

    torch.compile(step, backend="aot_eager", fullgraph=True)(*layer.args(moments))
    for kind, moment in zip(KINDS, moments, strict=True):
        torch.testing.assert_close(moment, layer.run()[kind], rtol=0, atol=0)


def test_one_row_of_padding() -> None:
    """A window that sees nothing but zeros: no gradient, whatever lies beside it."""
    case = Outer(torch.randn(3, 2, 1, 1), torch.randn(3, 4, 1, 1), kernel=[1, 1])
    window = {"stride": [5, 5], "padding": [1, 1], "dilation": [1, 1]}
    found = replace(case, **window).run(("sum", "votes"))
    assert not found["sum"].any()
    assert not found["votes"].any()
    seen = replace(case, stride=[1, 1], padding=[0, 0], dilation=[1, 1])
    assert_moments(seen.run(("sum", "votes")), seen)
