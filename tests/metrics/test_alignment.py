"""Cosines of pairs of environments, and correlation with signals, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import andmask_ext as am
from andmask_ext import metrics, reference

from .forms import FORMS, as_moments, parameters

STACKED = [form for form in FORMS if form != "moments"]


def cosines(grads: Tensor) -> Tensor:
    flat = grads.double().reshape(len(grads), -1)
    return torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=2, eps=1e-300)


@pytest.mark.parametrize("form", STACKED)
def test_cosines(form: str) -> None:
    many = parameters()
    result = metrics.gradient_cosines(FORMS[form](many))
    expected = cosines(torch.cat([grads.reshape(len(grads), -1) for grads in many], 1))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert torch.equal(result, result.t())
    assert result.diagonal().tolist() == [1.0] * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cosines_of_other_types_and_layouts(dtype: torch.dtype) -> None:
    grads = torch.randn(4, 5, 6).to(dtype).transpose(1, 2)
    torch.testing.assert_close(metrics.gradient_cosines(grads), cosines(grads), rtol=0, atol=1e-12)


def test_cosines_over_several_chunks() -> None:
    grads = torch.randn(3, 1_000_003)
    torch.testing.assert_close(metrics.gradient_cosines(grads), cosines(grads), rtol=0, atol=1e-11)


def test_cosines_at_the_edges() -> None:
    grads = torch.tensor(
        [[1e30, 0.0], [-2e30, 0.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf]]
    )
    result = metrics.gradient_cosines(grads)
    assert result[:2, :2].tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    assert result[2, :3].tolist() == [0.0, 0.0, 0.0]
    assert torch.isnan(result[3]).all()
    assert torch.isnan(result[4, 4])
    assert metrics.gradient_cosines(torch.ones(1, 3)).tolist() == [[1.0]]
    assert metrics.gradient_cosines(torch.ones(2, 0)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_moments_keep_no_single_environments() -> None:
    with pytest.raises(
        TypeError, match="grads: expected the stacked gradients of all environments"
    ):
        metrics.gradient_cosines(as_moments(parameters()))


# ---- correlation ----


def expected_correlation(one: Tensor, other: Tensor) -> tuple[float, int]:
    both = (one != 0) & (other != 0)
    if both.sum() < 2:
        return float("nan"), int(both.sum())
    with np.errstate(all="ignore"):
        return float(np.corrcoef(one[both], other[both])[0, 1]), int(both.sum())


def flat(many: list[Tensor]) -> Tensor:
    return torch.cat([grads.double().reshape(len(grads), -1) for grads in many], 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask_signals", [False, True])
@pytest.mark.parametrize("xor", [False, True])
def test_correlation(form: str, mask_signals: bool, xor: bool) -> None:
    whole, signal = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    taus = [0.0, 0.3, 0.6, 1.0]
    result = metrics.gradient_correlation(
        FORMS[form](whole), {"signal": FORMS[form](signal)}, taus,
        mask_signals=mask_signals, xor=xor,
    )  # fmt: skip
    assert result.tau.tolist() == taus
    one, other = flat(whole), flat(signal)
    for index, tau in enumerate(taus):
        masks = [reference.agreement_mask(grads, tau) for grads in (one, other)]
        masks = [1 - mask for mask in masks] if xor else masks
        updates = one.mean(0) * masks[0], other.mean(0) * (masks[1] if mask_signals else 1)
        correlation, count = expected_correlation(*updates)
        assert result.coordinates["signal"][index].item() == count
        assert result.correlations["signal"][index].item() == pytest.approx(
            correlation, rel=1e-9, nan_ok=True
        )


def test_a_mechanism_and_a_shortcut_are_told_apart() -> None:
    """Environments share a mechanism, and each has a shortcut of its own."""
    mechanism = (torch.randn(400) * (torch.arange(400) < 200)).expand(8, 400)
    shortcut = torch.randn(8, 400) * (torch.arange(400) >= 200)
    result = metrics.gradient_correlation(
        mechanism + shortcut, {"mechanism": mechanism, "shortcut": shortcut},
        [0.0, 1.0], mask_signals=False,
    )  # fmt: skip
    assert result.correlations["mechanism"].tolist() == pytest.approx([1.0, 1.0])
    assert result.coordinates["shortcut"][0] == 200
    assert result.coordinates["shortcut"][1] < 10  # chance alone
    control = metrics.gradient_correlation(
        mechanism + shortcut, {"mechanism": mechanism}, [1.0], xor=True, mask_signals=False
    )
    assert control.coordinates["mechanism"].item() == 0
    assert torch.isnan(control.correlations["mechanism"])


@given(st.floats(0.1, 1e6), st.floats(-1e3, 1e3))
def test_correlation_of_a_multiple_is_one(factor: float, shift: float) -> None:
    grads = torch.randn(4, 30, dtype=torch.float64)
    result = metrics.gradient_correlation(grads, {"same": grads * factor}, [0.0])
    assert result.correlations["same"].item() == pytest.approx(1.0)
    result = metrics.gradient_correlation(grads, {"opposite": -grads * factor}, [0.0])
    assert result.correlations["opposite"].item() == pytest.approx(-1.0)


def test_correlation_that_is_not_defined() -> None:
    grads = torch.tensor([[1.0, 2.0, 3.0]])
    constant = torch.full((1, 3), 2.0)
    result = metrics.gradient_correlation(grads, {"constant": constant, "none": grads * 0}, [0.0])
    assert torch.isnan(result.correlations["constant"])
    assert torch.isnan(result.correlations["none"])
    bad = torch.tensor([[1.0, torch.nan, 3.0]])
    result = metrics.gradient_correlation(grads, {"bad": bad}, [0.0])
    assert torch.isnan(result.correlations["bad"])


def test_errors_of_correlation() -> None:
    grads = torch.randn(2, 3)
    with pytest.raises(TypeError, match="signals: expected a dict from names to gradients"):
        metrics.gradient_correlation(grads, [grads])
    with pytest.raises(ValueError, match=r"signals\['x'\]: expected gradients for parameters of"):
        metrics.gradient_correlation(grads, {"x": torch.randn(2, 4)})
    with pytest.raises(TypeError, match=r"signals\['x'\]: expected stacked gradients"):
        metrics.gradient_correlation(grads, {"x": None})
    with pytest.raises(ValueError, match="tau: expected a number"):
        metrics.gradient_correlation(grads, {"x": grads}, [0.5, 1.5])
    with pytest.raises(ValueError, match="taus: expected at least one number, but got none"):
        metrics.gradient_correlation(grads, {"x": grads}, [])
    with pytest.raises(
        ValueError, match=r"signals\['x'\]: expected gradients for the parameters of"
    ):
        metrics.gradient_correlation({"a": grads, "b": grads}, {"x": {"b": grads, "a": grads}})
    with pytest.raises(TypeError, match="taus: expected a sequence of numbers, but got float"):
        metrics.gradient_correlation(grads, {"x": grads}, 0.4)
    with pytest.raises(TypeError, match="xor: expected a bool"):
        metrics.gradient_correlation(grads, {"x": grads}, xor=1)


def test_reach_of_the_agreement() -> None:
    model = torch.nn.Linear(3, 2)
    agreement = am.Agreement(model, am.AndMask(1.0))
    with pytest.raises(RuntimeError, match="gram: expected a context with gram=True before"):
        metrics.gradient_cosines(agreement)


def test_moments_of_other_parameters_are_no_signal() -> None:
    params = [torch.zeros(3), torch.zeros(3)]
    one, other = am.Moments(params), am.Moments(params)
    one.add([torch.ones(3), None])
    other.add([None, torch.ones(3)])
    with pytest.raises(ValueError, match="expected gradients for the parameters of grads, in thei"):
        metrics.gradient_correlation(one, {"s": other}, [0.0])
