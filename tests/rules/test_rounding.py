"""Rules on stacked gradients of many environments: rounding does not grow with their number."""

from __future__ import annotations

import pytest
import torch

import andmask_ext as am


@pytest.mark.parametrize("environments", [17, 64, 400, 4096, 50_000])
@pytest.mark.parametrize(
    "rule",
    [am.AndMask(0.0), am.rules.Mean(), am.rules.MaskedAverage(0.0), am.rules.AgreementSum()],
    ids=lambda rule: type(rule).__name__,
)
def test_rounding_does_not_grow_with_the_environments(
    rule: am.rules.Rule, environments: int
) -> None:
    """All gradients are positive, so that each rule keeps all, and errors do not cancel."""
    for grads in (torch.full((environments, 5), 0.1), torch.rand(environments, 5)):
        expected = grads.double().mean(0)
        if isinstance(rule, am.rules.AgreementSum):
            expected = expected * environments
        error = (rule(grads).double() - expected).abs() / expected
        assert (error <= 20 * 2.0**-24).all()  # 18, and two of the mean


def test_squares_and_logs_of_many_environments() -> None:
    grads = 3 + 0.01 * torch.randn(20_000, 50)
    mean = grads.double().log().mean(0).exp()
    torch.testing.assert_close(
        am.rules.GeometricMean(0.0)(grads).double(), mean, rtol=30 * 2.0**-24, atol=0
    )
    variance = grads.double().var(0)
    expected = grads.double().mean(0) * torch.tanh(1e-4 * 0.5 / variance)
    torch.testing.assert_close(
        am.rules.SandMask(0.5, 1e-4, rescale=False)(grads).double(), expected, rtol=1e-4, atol=0
    )
