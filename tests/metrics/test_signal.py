"""Signal to noise and coherence against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import andmask_ext as am
from andmask_ext import metrics

from .forms import FORMS, in_order, parameters

forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("correction", [0, 1])
def test_signal_to_noise(form: str, correction: int) -> None:
    many = parameters()
    result = in_order(metrics.signal_to_noise(FORMS[form](many), correction=correction))
    for one, grads in zip(result, many, strict=True):
        wide = grads.double()
        expected = wide.mean(0).square() / wide.var(0, correction=correction)
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-9)


def test_signal_to_noise_at_the_edges() -> None:
    grads = torch.tensor([[0.0, 2.0, 1.0, 1.0], [0.0, 2.0, -1.0, torch.nan]])
    for form in (grads, _moments(grads)):
        (result,) = (
            [metrics.signal_to_noise(form)] if form is grads else metrics.signal_to_noise(form)
        )
        assert result[:3].tolist() == [0.0, torch.inf, 0.0]
        assert torch.isnan(result[3])
    assert metrics.signal_to_noise(torch.tensor([[3.0]]), correction=0).tolist() == [torch.inf]


def _moments(grads: torch.Tensor) -> am.Moments:
    moments = am.Moments([grads[0]], ("squares",))
    moments.add_stacked([grads])
    return moments


@forms
def test_coherence(form: str) -> None:
    many = parameters()
    flat = torch.cat([grads.double().reshape(len(grads), -1) for grads in many], 1)
    expected = flat.sum(0).square().sum() / flat.square().sum()
    result = metrics.coherence(FORMS[form](many))
    assert result.dim() == 0
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)
    each = metrics.coherence(FORMS[form](many), per_parameter=True)
    for one, grads in zip(in_order(each), many, strict=True):
        wide = grads.double()
        assert one.item() == pytest.approx(
            (wide.sum(0).square().sum() / wide.square().sum()).item(), rel=1e-5
        )


@given(st.integers(1, 40), st.integers(1, 30))
def test_coherence_of_known_directions(environments: int, columns: int) -> None:
    row = torch.randn(columns)
    assert metrics.coherence(row.expand(environments, columns)).item() == pytest.approx(
        environments, rel=1e-5
    )
    assert metrics.coherence(torch.eye(environments)).item() == pytest.approx(1.0)
    cancel = torch.cat([row, -row]).view(2, columns)
    assert metrics.coherence(cancel).item() == 0.0


def test_coherence_neither_overflows_nor_hides() -> None:
    assert metrics.coherence(torch.full((2, 3), 1e25)).item() == pytest.approx(2.0)
    assert metrics.coherence(torch.full((2, 3), 1e-30)).item() == pytest.approx(2.0)
    assert torch.isnan(metrics.coherence(torch.zeros(2, 3)))
    assert torch.isnan(metrics.coherence(torch.tensor([[1.0, torch.nan], [1.0, 1.0]])))


@pytest.mark.parametrize("weights", [None, [2.0], [1.0, 3.0, 0.5, 2.0, 1.0, 1.0]])
def test_moments_track_norms(weights: list[float] | None) -> None:
    many = parameters()
    stacked = am.Moments([grads[0] for grads in many], kinds=("votes", "norms"))
    single = am.Moments([grads[0] for grads in many], kinds=("votes", "norms"))
    rows = weights if weights and len(weights) > 1 else [1.0 if weights is None else 2.0] * 6
    stacked.add_stacked(many, None if weights is None else rows)
    for row, weight in enumerate(rows):
        single.add([grads[row] for grads in many], weight)
    factors = torch.tensor(rows, dtype=torch.float64)
    for moments in (stacked, single):
        assert moments.squared_norms is not None
        for norm, grads in zip(moments.squared_norms, many, strict=True):
            exact = grads.double().reshape(len(grads), -1).square().sum(1) @ factors.square()
            assert norm.item() == pytest.approx(exact.item(), rel=1e-5)
        scaled = [grads.double() * factors.view(-1, *[1] * (grads.dim() - 1)) for grads in many]
        assert metrics.coherence(moments).item() == pytest.approx(
            metrics.coherence(scaled).item(), rel=1e-5
        )


def test_norms_are_forgotten_merged_and_absent() -> None:
    many = parameters()
    halves = []
    for part in ([grads[:2] for grads in many], [grads[2:] for grads in many]):
        moments = am.Moments([grads[0] for grads in many], kinds=("votes", "norms"))
        moments.add_stacked(part)
        halves.append(moments)
    total = [
        one + two for one, two in zip(halves[0].squared_norms, halves[1].squared_norms, strict=True)
    ]
    halves[0].merge(halves[1])
    assert [n.item() for n in halves[0].squared_norms] == pytest.approx([n.item() for n in total])
    assert metrics.coherence(halves[0]).item() == pytest.approx(
        metrics.coherence(many).item(), rel=1e-5
    )
    plain = am.Moments([grads[0] for grads in many])
    plain.add_stacked(many)
    assert plain.squared_norms is None
    halves[1].merge(plain)  # it does not know all norms any more
    assert halves[1].squared_norms is None
    plain.merge(halves[0])  # nor did this one
    assert plain.squared_norms is None
    empty = am.Moments([grads[0] for grads in many])  # it takes over what the other knows
    empty.merge(halves[0])
    assert [n.item() for n in empty.squared_norms] == pytest.approx([n.item() for n in total])
    halves[0].reset()
    assert halves[0].squared_norms is None


def test_a_parameter_that_comes_late() -> None:
    moments = am.Moments([torch.zeros(2), torch.zeros(2)], kinds=("votes", "norms"))
    moments.add([torch.tensor([3.0, 4.0]), None])
    moments.add([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
    assert [n.item() for n in moments.squared_norms] == pytest.approx([50.0, 1.0])


@pytest.mark.parametrize("metric", [metrics.signal_to_noise, metrics.coherence])
def test_moments_without_squares(metric) -> None:
    moments = am.Moments([torch.ones(2)])
    moments.add([torch.ones(2)])
    moments.add([torch.ones(2)])
    with pytest.raises(
        ValueError, match=r"grads: expected moments with squares, .*but got Moments"
    ):
        metric(moments)


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"correction: expected .* environments - 1 = 0, but got 1"
    ):
        metrics.signal_to_noise(torch.ones(1, 3))
    with pytest.raises(ValueError, match="correction: expected"):
        metrics.signal_to_noise(torch.ones(2, 3), correction=-1)
    with pytest.raises(TypeError, match="correction: expected an int, but got float"):
        metrics.signal_to_noise(torch.ones(2, 3), correction=0.5)
    with pytest.raises(TypeError, match="per_parameter: expected a bool"):
        metrics.coherence(torch.ones(2, 3), per_parameter="yes")


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_signal_to_noise_neither_over_nor_underflows(size: float) -> None:
    grads = torch.tensor([[1.0], [2.0]]) * size
    assert metrics.signal_to_noise(grads).item() == pytest.approx(4.5, rel=1e-5)


def test_norms_when_the_first_environment_is_zero() -> None:
    moments = am.Moments([torch.zeros(2), torch.zeros(2)], kinds=("votes", "norms"))
    moments.add([None, None])
    moments.add([torch.tensor([3.0, 4.0]), None])
    assert [None if n is None else n.item() for n in moments.squared_norms] == [25.0, None]


def test_squared_norms_of_all_lengths_and_layouts() -> None:
    from andmask_ext._norms import squared_norm, squared_norms

    for size in (0, 1, 1 << 14, (1 << 14) + 1, 100_001):
        rows = torch.randn(3, size)
        expected = rows.double().square().sum(1)
        torch.testing.assert_close(squared_norms(rows), expected, rtol=1e-6, atol=0)
    tensors = [
        torch.randn(20, 30).t(),
        torch.randn(2, 3, 40, 5)[..., ::2],
        torch.randn(4, 1).expand(4, 7),
        torch.tensor(3.0),
        torch.randn(5).half(),
    ]
    for tensor in tensors:
        exact = tensor.double().square().sum().item()
        assert squared_norm(tensor).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("size", [3, (1 << 18) + 5])
def test_squared_norms_beyond_float32(size: int) -> None:
    from andmask_ext._norms import squared_norm

    tensor = torch.full((size,), 1e25)
    assert squared_norm(tensor).item() == math.inf
    exact = size * tensor[0].item() ** 2
    assert squared_norm(tensor, torch.float64).item() == pytest.approx(exact, rel=1e-12)
