"""The report of an Agreement: the threshold of each parameter, what it keeps, and noise in that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext import metrics, reference

CASES: list[dict[str, Any]] = [
    {"tau": 0.6},
    {"fdr": 0.3},
    {"significance": 0.05},
    {"fdr": 0.3, "zeros": "abstain"},
    {"tau": 0.6, "zeros": "abstain"},
]


def model_and_gradients() -> tuple[nn.Sequential, Tensor, list[Tensor]]:
    """A model, inputs, and the gradients of environments of two examples, with many zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 2)).double()
    x = torch.randn(16, 6).double()
    rows = [torch.autograd.grad(loss(model, part), list(model.parameters())) for part in x.split(2)]
    return model, x, [torch.stack(column) for column in zip(*rows, strict=True)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    target = x[:, :2].relu() * torch.tensor([1.0, 0.0], dtype=torch.float64)
    return nn.functional.mse_loss(model(x), target)


def assert_shows(report: Any, grads: list[Tensor], options: dict[str, Any]) -> None:
    for line, one in zip(report, grads, strict=True):
        thresholds = reference.vote_thresholds(one, **options)
        kept = (reference.votes(one).abs() >= thresholds).double().mean().item()
        assert line.environments == 8
        assert line.kept_fraction == pytest.approx(kept)
        expected = metrics.vote_threshold(one, **options)
        assert line.threshold == expected.votes.flatten()[-1].item()
        assert line.noise_share == pytest.approx(expected.noise_share.item(), nan_ok=True)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_rule_that_keeps_its_moments(options: dict[str, Any]) -> None:
    model, x, grads = model_and_gradients()
    agreement = am.Agreement(model, am.AndMask(**options), keep_moments=True)
    assert [line.threshold for line in agreement.report()] == [None] * 4
    with agreement(8):
        loss(model, x).backward()
    assert_shows(agreement.report(), grads, options)
    assert_shows(agreement.report(), grads, options)  # a look changes nothing


@pytest.mark.parametrize("options", CASES, ids=str)
def test_an_optimizer_between_context_and_step(options: dict[str, Any]) -> None:
    model, x, grads = model_and_gradients()
    optimizer = am.optim.AndMaskSGD(
        [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}],
        lr=0.1,
        **options,
    )
    agreement = am.Agreement(model, optimizer)
    with agreement(8):
        loss(model, x).backward()
        assert all(line.threshold is None for line in agreement.report())
    assert_shows(agreement.report(), grads, options)
    optimizer.step()
    assert all(line.threshold is None for line in agreement.report())
    assert "threshold" not in str(agreement.report())


def test_micro_batches_and_gradients_that_are_written() -> None:
    model, x, grads = model_and_gradients()
    agreement = am.Agreement(model, am.AndMask(fdr=0.3))
    with agreement(4, write_grads=False):
        loss(model, x[:8]).backward()
    assert {line.environments for line in agreement.report()} == {4}
    with agreement(4, write_grads=False):
        loss(model, x[8:]).backward()
    assert_shows(agreement.report(), grads, {"fdr": 0.3})
    with agreement(4):  # writes gradients over the moments
        loss(model, x[8:]).backward()
    assert all(line.kept_fraction is None for line in agreement.report())


def test_after_an_error_there_is_nothing_to_show() -> None:
    model, x, _ = model_and_gradients()
    agreement = am.Agreement(model, am.AndMask(fdr=0.3), keep_moments=True)

    def broken() -> None:
        with agreement(8):
            loss(model, x).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert all(line.threshold is None for line in agreement.report())


@pytest.mark.parametrize(
    ("rule", "threshold"), [(am.rules.Mean(), None), (am.rules.AgreementSum(), 8)]
)
def test_rules_without_a_level(rule: am.rules.Rule, threshold: int | None) -> None:
    model, x, _ = model_and_gradients()
    agreement = am.Agreement(model, rule, keep_moments=True)
    metrics.Monitor(agreement)  # has the votes counted
    with agreement(8):
        loss(model, x).backward()
    assert {line.threshold for line in agreement.report()} == {threshold}


def test_the_table() -> None:
    """What is masked whole has no share of noise; a parameter without gradient has empty cells."""
    model = nn.Linear(200, 3)
    model.bias.requires_grad_(False)
    agreement = am.Agreement(model, am.AndMask(significance=0.001), keep_moments=True)
    x = torch.ones(16, 200)
    x[:8, 100:] = -1  # half of the coordinates have no net votes
    with agreement():
        model(x).mean().backward()
    rows = str(agreement.report()).splitlines()
    assert rows[:2] == [
        "parameter  shape     uses  threshold  kept  noise    path",
        "weight     (3, 200)  1     13/16      50 %  0.104 %  "
        "outer products, one row per environment",
    ]
    agreement = am.Agreement(model, am.AndMask(fdr=1e-6), keep_moments=True)
    with agreement(4):
        model(x).mean().backward()
    assert "5/4        0 %          outer" in str(agreement.report())
