"""Warnings that are given once for each object."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import andmask_ext as am
from andmask_ext._notices import warn_once


class Owner:
    pass


def test_each_object_warns_once() -> None:
    first, second = Owner(), Owner()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for owner in (first, first, second):
            warn_once(owner, "batch: expected more")
        warn_once(first, "batch: expected less")
    assert [str(one.message) for one in given] == [
        "batch: expected more", "batch: expected more", "batch: expected less"
    ]  # fmt: skip


def test_the_warning_points_to_the_caller() -> None:
    with pytest.warns(UserWarning, match="batch") as given:
        warn_once(Owner(), "batch: expected more")
    assert given[0].filename == __file__


def test_a_warning_from_inside_of_torch_points_to_the_caller() -> None:
    model = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match="loss_reduction") as given:
        with am.Agreement(model, am.AndMask(0.5))():
            model(torch.randn(4, 2)).sum().backward()  # torch calls this package
    assert given[0].filename == __file__


def steps(optimizer: am.optim.AndMaskSGD, weight: torch.Tensor, *environments: int) -> list[str]:
    """Return the warnings of steps with so many environments each."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for count in environments:
            for _ in range(count):
                with optimizer.environment():
                    weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(one.message) for one in given]


def test_steps_of_one_environment_each() -> None:
    weight = torch.ones(2, requires_grad=True)

    def optimizer(**options: object) -> am.optim.AndMaskSGD:
        return am.optim.AndMaskSGD([weight], lr=0.1, **options)  # type: ignore[arg-type]

    (message,) = steps(optimizer(tau=0.5), weight, 1, 1, 1, 1, 1)
    assert "each of the first three steps had one, which agrees with itself" in message
    assert steps(optimizer(tau=0.5), weight, 1, 1, 2, 1, 1, 1, 1) == []  # the end of an epoch, say
    assert steps(optimizer(tau=0.5), weight, 2, 1, 1, 1, 1) == []
    (message,) = steps(optimizer(significance=0.05), weight, 1, 1, 1, 1)
    assert "each of the first three steps had one, which agrees with itself" in message
    assert steps(optimizer(significance=0.5), weight, 3, 3, 3) == []
    assert steps(optimizer(tau=0.0), weight, 1, 1, 1) == []  # plain, and meant so
    assert steps(optimizer(rule=am.rules.Mean()), weight, 1, 1, 1) == []


def test_a_threshold_that_masks_nothing() -> None:
    weight = torch.ones(2, requires_grad=True)

    def heard(tau: float, *environments: int) -> list[str]:
        return steps(am.optim.AndMaskSGD([weight], lr=0.1, tau=tau), weight, *environments)

    (message,) = heard(0.2, 3, 3, 3, 3)
    assert "tau: expected a threshold above 1 / d, but got 0.2 with d = 3 environments" in message
    assert heard(0.34, 3, 3, 3) == []  # two of three against one are masked
    assert heard(0.2, 4, 4, 4) == []  # two against two are masked
    assert heard(0.2, 3, 7, 3, 3, 3) == []
    model = nn.Linear(2, 1)
    agreement = am.Agreement(model, am.AndMask(0.2))

    def train() -> None:
        for _ in range(3):
            with agreement():
                model(torch.randn(3, 2)).mean().backward()

    with pytest.warns(UserWarning, match=r"but got 0\.2 with d = 3 environments"):
        train()


def test_fdr_masks_what_other_rules_would_not() -> None:
    weight, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    def optimizer(**options: object) -> am.optim.AndMaskSGD:
        return am.optim.AndMaskSGD([weight], lr=0.1, **options)  # type: ignore[arg-type]

    for _ in range(2):  # each optimizer hears it once
        (message,) = steps(optimizer(fdr=0.0511), weight, 1, 1, 1, 1, 3)
        assert "fdr: expected at least 6 environments for fdr=0.0511, but got 1" in message
        assert "everything is masked" in message
    groups = [{"params": [weight]}, {"params": [other], "fdr": 0.5}]
    mixed = am.optim.AndMaskSGD(groups, lr=0.1, tau=0.2)
    assert not steps(mixed, weight, 3, 3, 3, 3)  # a group masks


def test_the_warning_of_a_level_at_the_end_of_a_context_points_to_the_caller() -> None:
    model = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match="significance: expected at least 15 envir") as given:
        with am.Agreement(model, am.AndMask(significance=7.7e-5))():
            model(torch.randn(4, 2)).mean().backward()
    assert given[0].filename == __file__
