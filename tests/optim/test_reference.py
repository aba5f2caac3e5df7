"""Every optimizer against its twin in andmask_ext.optim.reference, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext.optim import reference

from .common import environments

# Some draws have one environment in each step, or three with a small tau.
pytestmark = pytest.mark.filterwarnings("ignore:step. expected several", "ignore:tau. expected a")

optim = am.optim
STEPS = 6
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:]
)
# What a parameter in this type may be off by after a few steps.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02}
modes = st.sampled_from(["after_mask", "before_mask", "decoupled"])


@st.composite
def draw_grads(draw: st.DrawFn, environments: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Gradients of all steps: multiples of 1/4, so that ties, zeros and cancellation are common."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.randint(-8, 9, (STEPS, environments, 3, 5)).to(dtype) / 4
    zeros = torch.rand(noise.shape) < draw(st.sampled_from([0.0, 0.3]))
    return torch.where(zeros, torch.tensor(0.0, dtype=dtype), noise)


def draw_rule(data: st.DataObject, environments: int) -> dict[str, Any]:
    """``tau`` and ``rescale``, or a rule; thresholds that some vote counts meet exactly."""
    tau = data.draw(st.integers(0, environments)) / environments
    largest = {"max_norm": data.draw(st.sampled_from([None, 0.1, 2.0, 100.0]))}
    if data.draw(st.booleans()):
        rescale, zeros = data.draw(st.booleans()), data.draw(st.sampled_from(["count", "abstain"]))
        voting = data.draw(
            st.sampled_from([{"tau": tau}, {"fdr": 0.3}, {"fdr": 0.9}, {"significance": 0.4}])
        )
        return {**voting, "zeros": zeros, "rescale": rescale, **largest}
    rule = data.draw(
        st.sampled_from(
            [
                am.rules.Mean(),
                am.rules.MaskedAverage(tau),
                am.AndMask(tau),
                am.rules.GeometricMean(tau),
                am.rules.GeometricMean(fdr=0.5, zeros="abstain"),
                am.rules.MaskedAverage(significance=0.3),
            ]
        )
    )
    return {"rule": rule, **largest}


def compare(found: Any, twin: Any, param: nn.Parameter, grads: Tensor, lr: float) -> None:
    tolerance = TOLERANCES[param.dtype]
    for stack in grads:
        before = param.detach().clone()
        twin.param = before.double()  # so that rounding of the parameter does not add up
        environments(found, [param], [stack])
        found.step()
        expected = twin.step(stack)
        torch.testing.assert_close(
            param.detach().double(),
            expected,
            rtol=tolerance,
            atol=tolerance * max(1.0, lr * float(stack.double().abs().max())),
        )


@dtypes
@settings(max_examples=50)
@given(data=st.data())
def test_sgd(dtype: torch.dtype, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 2, 3, 4, 5, 10]))
    momentum = data.draw(st.sampled_from([0.0, 0.9]))
    nesterov = bool(momentum) and data.draw(st.booleans())
    options = {
        "lr": data.draw(st.sampled_from([0.01, 0.5])),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else data.draw(st.sampled_from([0.0, 0.3])),
        "nesterov": nesterov,
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "weight_decay_mode": data.draw(modes),
        "maximize": data.draw(st.booleans()),
        **draw_rule(data, count),
    }
    grads = data.draw(draw_grads(count, dtype))
    param = nn.Parameter(torch.randn(3, 5).to(dtype))
    if dtype == torch.bfloat16 and options["weight_decay_mode"] == "before_mask":
        options["weight_decay"] = 0.0  # each environment's sum is rounded to bfloat16
    found, twin = optim.AndMaskSGD([param], **options), reference.AndMaskSGD(param, **options)
    compare(found, twin, param, grads, options["lr"])


@dtypes
@settings(max_examples=50)
@given(data=st.data(), adamw=st.booleans())
def test_adam(dtype: torch.dtype, data: st.DataObject, adamw: bool) -> None:
    count = data.draw(st.sampled_from([1, 2, 3, 4, 5, 10]))
    options = {
        "lr": data.draw(st.sampled_from([0.01, 0.1])),
        "betas": data.draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.3, 0.9)])),
        # Not so small that it turns a rounding error of a sum into a step.
        "eps": data.draw(st.sampled_from([1e-6 if dtype == torch.float64 else 0.05, 0.1])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "amsgrad": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        **draw_rule(data, count),
    }
    if not adamw or data.draw(st.booleans()):
        options["weight_decay_mode"] = data.draw(modes)
        if dtype == torch.bfloat16 and options["weight_decay_mode"] == "before_mask":
            options["weight_decay"] = 0.0
    grads = data.draw(draw_grads(count, dtype))
    param = nn.Parameter(torch.randn(3, 5).to(dtype))
    name = "AndMaskAdamW" if adamw else "AndMaskAdam"
    found, twin = (
        getattr(optim, name)([param], **options),
        getattr(reference, name)(param, **options),
    )
    compare(found, twin, param, grads, options["lr"])


@dtypes
@settings(max_examples=50)
@given(data=st.data())
def test_temporal_adam(dtype: torch.dtype, data: st.DataObject) -> None:
    options = {
        "lr": data.draw(st.sampled_from([0.01, 0.1])),
        "betas": (
            data.draw(st.sampled_from([0.0, 0.21, 0.9])),
            data.draw(st.sampled_from([0.5, 0.999])),
            data.draw(st.sampled_from([0.0, 0.5, 0.79])),
        ),
        "eps": data.draw(st.sampled_from([1e-6 if dtype == torch.float64 else 0.05, 0.1])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "weight_decay_mode": data.draw(st.sampled_from(["after_mask", "decoupled"])),
        "bias_correction": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        **data.draw(
            st.one_of(
                st.sampled_from([0.0, 0.25, 0.36, 0.5, 0.75, 1.0]).map(lambda tau: {"tau": tau}),
                st.sampled_from([0.05, 0.3, 0.9]).map(lambda level: {"significance": level}),
            )
        ),
    }
    grads = data.draw(draw_grads(1, dtype))
    param = nn.Parameter(torch.randn(3, 5).to(dtype))
    found = optim.TemporalAndMaskAdam([param], **options)
    twin = reference.TemporalAndMaskAdam(param, **options)
    for grad in grads[:, 0]:
        twin.param = param.detach().double()
        param.grad = grad.clone()
        found.step()
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(
            param.detach().double(), twin.step(grad), rtol=tolerance, atol=tolerance
        )


def test_the_decay_votes_before_the_mask_and_only_there() -> None:
    """Gradients disagree; the penalty is larger than either, and pulls both its way."""
    for mode, expected in [("before_mask", 0.8), ("after_mask", 0.8), ("decoupled", 0.8)]:
        param = nn.Parameter(torch.tensor([1.0]))
        optimizer = optim.AndMaskSGD(
            [param], lr=0.1, weight_decay=2.0, tau=1.0, weight_decay_mode=mode
        )
        environments(optimizer, [param], [torch.tensor([[1.0], [-1.0]])])
        optimizer.step()
        assert param.item() == pytest.approx(expected)
    for mode, expected in [("before_mask", 1.0), ("after_mask", 0.95), ("decoupled", 0.95)]:
        param = nn.Parameter(torch.tensor([1.0]))
        optimizer = optim.AndMaskSGD(
            [param], lr=0.1, weight_decay=0.5, tau=1.0, weight_decay_mode=mode
        )
        environments(optimizer, [param], [torch.tensor([[1.0], [-1.0]])])
        optimizer.step()
        assert param.item() == pytest.approx(expected)


def test_the_decay_before_the_mask_is_not_weighted() -> None:
    for weight in (0.25, 1.0, 4.0):
        param = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = optim.AndMaskSGD(
            [param], lr=0.1, weight_decay=0.5, tau=1.0, weight_decay_mode="before_mask"
        )
        environments(optimizer, [param], [torch.tensor([[2.0], [4.0]]).double()], weight=weight)
        optimizer.step()
        assert param.item() == pytest.approx(1 - 0.1 * (3 * weight + 0.5))


def test_temporal_adam_as_printed_in_the_paper() -> None:
    """Without bias correction nothing moves until the votes have added up."""
    param = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = optim.TemporalAndMaskAdam([param], lr=0.1, betas=(0.5, 0.5, 0.5), tau=0.7)
    moved = []
    for step in range(3):
        param.grad = torch.tensor([1.0, (-1.0) ** step])
        before = param.detach().clone()
        optimizer.step()
        moved.append((param.detach() != before).tolist())
    assert moved == [[False, False], [True, False], [True, False]]  # |a| = .5, .75, .875
