"""With tau = 0 the optimizers are torch's own, over 100 steps, with any options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

import andmask_ext as am

optim = am.optim
STEPS = 100
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
rates = st.sampled_from([1e-3, 1e-2, 0.1])
decays = st.sampled_from([0.0, 1e-2, 0.1])
modes = st.sampled_from(["after_mask", "before_mask"])  # the same where nothing is masked
betas = st.sampled_from([0.0, 0.5, 0.9, 0.99])


def compare(
    theirs: Callable[[list[nn.Parameter]], Optimizer],
    ours: Callable[[list[nn.Parameter]], Optimizer],
    dtype: torch.dtype,
    environments: int,
    tensor_lr: bool,
) -> None:
    """Both see gradients that depend on where they are."""
    start = [torch.randn(shape, dtype=dtype) for shape in [(2, 3), ()]]
    one, other = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    expected, found = theirs(one), ours(other)
    if tensor_lr:
        for optimizer in (expected, found):
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    for _ in range(STEPS):
        noise = [torch.randn(environments, *s.shape, dtype=dtype) for s in start]
        for param, rows in zip(one, noise, strict=True):
            param.grad = rows.mean(0) + 0.1 * param.detach()
        expected.step()
        if isinstance(found, optim.TemporalAndMaskAdam):
            for param, rows in zip(other, noise, strict=True):
                param.grad = rows.mean(0) + 0.1 * param.detach()
        else:
            for row in range(environments):
                with found.environment():
                    total: Any = 0.0
                    for param, rows in zip(other, noise, strict=True):
                        total = total + (param * rows[row] + 0.05 * param.square()).sum()
                    total.backward()
        found.step()
    tolerance = 1e-9 if dtype == torch.float64 else 5e-3
    scale = max(float(p.detach().abs().max()) for p in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * scale)


@dtypes
@settings(max_examples=30)
@given(data=st.data())
def test_sgd(dtype: torch.dtype, data: st.DataObject) -> None:
    momentum = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = bool(momentum) and data.draw(st.booleans())
    options = {
        "lr": data.draw(rates),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov else data.draw(st.sampled_from([0.0, 0.3])),
        "weight_decay": data.draw(decays),
        "maximize": data.draw(st.booleans()),
    }
    mode = data.draw(modes)
    compare(
        lambda params: torch.optim.SGD(params, **options),
        lambda params: optim.AndMaskSGD(params, **options, tau=0.0, weight_decay_mode=mode),
        dtype,
        data.draw(st.integers(1, 3)),
        data.draw(st.booleans()),
    )


def draw_adam(data: st.DataObject) -> dict[str, Any]:
    return {
        "lr": data.draw(rates),
        "betas": (data.draw(betas), data.draw(st.sampled_from([0.5, 0.9, 0.999]))),
        "eps": data.draw(st.sampled_from([1e-8, 1e-3])),
        "weight_decay": data.draw(decays),
        "amsgrad": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
    }


@dtypes
@settings(max_examples=30)
@given(data=st.data())
def test_adam(dtype: torch.dtype, data: st.DataObject) -> None:
    options, mode = draw_adam(data), data.draw(modes)
    compare(
        lambda params: torch.optim.Adam(params, **options),
        lambda params: optim.AndMaskAdam(params, **options, tau=0.0, weight_decay_mode=mode),
        dtype,
        data.draw(st.integers(1, 3)),
        data.draw(st.booleans()),
    )


@dtypes
@settings(max_examples=30)
@given(data=st.data(), adamw=st.booleans())
def test_adamw(dtype: torch.dtype, data: st.DataObject, adamw: bool) -> None:
    """AndMaskAdam with decoupled decay is AdamW as well."""
    options = draw_adam(data)
    compare(
        lambda params: torch.optim.AdamW(params, **options),
        lambda params: (
            optim.AndMaskAdamW(params, **options, tau=0.0)
            if adamw
            else optim.AndMaskAdam(params, **options, tau=0.0, weight_decay_mode="decoupled")
        ),
        dtype,
        data.draw(st.integers(1, 3)),
        data.draw(st.booleans()),
    )


@dtypes
@settings(max_examples=30)
@given(data=st.data(), decoupled=st.booleans(), beta3=betas)
def test_temporal_adam(
    dtype: torch.dtype, data: st.DataObject, decoupled: bool, beta3: float
) -> None:
    options = {**draw_adam(data), "amsgrad": False}
    own = {name: value for name, value in options.items() if name != "amsgrad"}
    own["betas"] = (*options["betas"], beta3)
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    mode = "decoupled" if decoupled else "after_mask"
    compare(
        lambda params: theirs(params, **options),
        lambda params: optim.TemporalAndMaskAdam(
            params,
            **own,
            tau=0.0,
            bias_correction=True,
            weight_decay_mode=mode,
        ),
        dtype,
        1,
        data.draw(st.booleans()),
    )


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_defaults_are_those_of_torch(name: str) -> None:
    theirs = getattr(torch.optim, name)([nn.Parameter(torch.zeros(1))], lr=1e-3).defaults
    ours = getattr(optim, f"AndMask{name}")([nn.Parameter(torch.zeros(1))], tau=1.0).defaults
    for option in {"lr", "betas", "eps", "momentum", "weight_decay", "amsgrad", "nesterov"}:
        assert ours.get(option) == theirs.get(option), option
