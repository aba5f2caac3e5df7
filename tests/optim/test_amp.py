"""GradScaler: environments are unscaled before they vote, and overflow in any skips the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

import andmask_ext as am

from .common import (
    MAKERS,
    assert_equal,
    backward,
    environments,
    optim,
    parameters,
    random_grads,
    values,
)

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
RULES = [
    am.AndMask(0.6, True),
    am.rules.GeometricMean(0.5),
    am.rules.SandMask(0.3, 2.0),
    am.rules.MaskedAverage(0.7),
]
SCALE = 2.0**16  # a power of two: scaling and unscaling are exact


def scaler(**options: Any) -> GradScaler:
    return GradScaler(torch.get_default_device().type, init_scale=SCALE, **options)


def pair(make: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Two equal sets of parameters, an optimizer on each."""
    params = parameters(dtype)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    return params, make(params, **options), others, make(others, **options)


def scaled_environments(
    optimizer: Any, scaler: GradScaler, params: list[nn.Parameter], grads: list[Tensor]
) -> None:
    for row in range(len(grads[0])):
        with optimizer.environment(grad_scaler=scaler):
            loss: Any = sum((p * g[row]).sum() for p, g in zip(params, grads, strict=True))
            scaler.scale(loss).backward()


@makers
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["step", "resolve", "unscale"])
def test_equals_the_unscaled_run(
    make: Any, rule: am.rules.Rule, dtype: torch.dtype, how: str
) -> None:
    """Rules that look at magnitudes see the true ones."""
    params, scaled, others, plain = pair(make, dtype, rule=rule)
    grad_scaler = scaler(growth_interval=2)  # the scale changes on the way
    for _ in range(3):
        grads = random_grads(params)
        scaled_environments(scaled, grad_scaler, params, grads)
        environments(plain, others, grads)
        if how != "step":
            scaled.write_grads()
            plain.write_grads()
        if how == "unscale":
            grad_scaler.unscale_(scaled)
            assert_equal([p.grad for p in params], [p.grad for p in others])
        grad_scaler.step(scaled)
        grad_scaler.update()
        plain.step()
        if how == "step" and dtype == torch.bfloat16:
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p, q)
        else:
            assert_equal(params, others)
    assert grad_scaler.get_scale() == 2 * SCALE


@makers
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
@pytest.mark.parametrize("how", ["step", "resolve", "unscale"])
def test_overflow_in_one_environment_skips_the_step(
    make: Any, where: str, value: float, how: str
) -> None:
    params, scaled, others, plain = pair(make)
    grad_scaler = scaler()
    before = values(params)
    grads = random_grads(params)
    grads[0][0 if where == "first" else -1, 0, 0] = value  # 1e38 * 2^16 is infinite
    scaled_environments(scaled, grad_scaler, params, grads)
    if how != "step":
        scaled.write_grads()
    if how == "unscale":
        grad_scaler.unscale_(scaled)
    grad_scaler.step(scaled)
    grad_scaler.update()
    assert_equal(params, before)
    assert grad_scaler.get_scale() == SCALE / 2
    assert scaled._pending.environments == 0  # nothing stays in the moments
    grads = random_grads(params)
    scaled_environments(scaled, grad_scaler, params, grads)
    grad_scaler.step(scaled)
    grad_scaler.update()
    environments(plain, others, grads)
    plain.step()
    assert_equal(params, others)


def test_float16_sums_beyond_the_range_of_float16_are_no_overflow() -> None:
    """64 environments of gradients 2000: the sum is 128,000, the mean is fine."""
    param = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = optim.AndMaskSGD([param], lr=1e-3, tau=1.0)
    grad_scaler = GradScaler(torch.get_default_device().type, init_scale=2.0)
    grads = torch.full((64, 3), 2000.0, dtype=torch.float16)
    scaled_environments(optimizer, grad_scaler, [param], [grads])
    grad_scaler.step(optimizer)
    grad_scaler.update()
    torch.testing.assert_close(param.data, torch.full((3,), -2.0, dtype=torch.float16))


@makers
def test_clipping_under_a_grad_scaler(make: Any) -> None:
    params, scaled, others, plain = pair(make)
    grad_scaler = scaler()
    for _ in range(2):
        grads = random_grads(params)
        scaled_environments(scaled, grad_scaler, params, grads)
        scaled.write_grads()
        grad_scaler.unscale_(scaled)
        norm = clip_grad_norm_(params, 0.1)
        grad_scaler.step(scaled)
        grad_scaler.update()
        environments(plain, others, grads)
        plain.write_grads()
        assert clip_grad_norm_(others, 0.1) == norm
        plain.step()
        assert_equal(params, others)


@makers
def test_weights_and_micro_batches_under_a_grad_scaler(make: Any) -> None:
    params, scaled, others, plain = pair(make, rule=am.rules.Mean())
    grad_scaler = scaler()
    grads = random_grads(params, 4)
    for optimizer, chosen, options in (
        (scaled, params, {"grad_scaler": grad_scaler}),
        (plain, others, {}),
    ):
        for rows, weight in (((0, 1), 0.5), ((2, 3), 1.5)):
            with optimizer.environment(weight=weight, micro_batches=2, **options):
                for row in rows:
                    backward(chosen, [g[row] for g in grads], SCALE if options else 1.0)
    grad_scaler.scale(torch.ones(()))
    grad_scaler.step(scaled)
    plain.step()
    assert_equal(params, others)


@makers
def test_a_disabled_grad_scaler_changes_nothing(make: Any) -> None:
    params, scaled, others, plain = pair(make)
    grad_scaler = GradScaler(torch.get_default_device().type, enabled=False)
    for resolve in (False, True):
        grads = random_grads(params)
        scaled_environments(scaled, grad_scaler, params, grads)
        environments(plain, others, grads)
        if resolve:
            scaled.write_grads()
            grad_scaler.unscale_(scaled)
            clip_grad_norm_(params, 1e9)
        grad_scaler.step(scaled)
        grad_scaler.update()
        plain.step()
        assert_equal(params, others)


@makers
def test_decay_before_the_mask_is_not_scaled(make: Any) -> None:
    if make is MAKERS["wrapper"]:
        return
    params, scaled, others, plain = pair(
        make, weight_decay=0.25, weight_decay_mode="before_mask", tau=0.5
    )
    grad_scaler, grads = scaler(), random_grads(params)
    scaled_environments(scaled, grad_scaler, params, grads)
    grad_scaler.step(scaled)
    environments(plain, others, grads)
    plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


# ---- misuse ----


@makers
def test_a_scaler_that_environments_were_not_told_of(make: Any) -> None:
    params = parameters()
    optimizer, grad_scaler = make(params), scaler()
    before = values(params)
    for row in range(2):
        with optimizer.environment():
            backward(params, [g[row] for g in random_grads(params)], SCALE)
    grad_scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"with optimizer.environment\(grad_scaler=scaler\)"):
        grad_scaler.step(optimizer)
    optimizer.write_grads()
    with pytest.raises(RuntimeError, match=r"with optimizer.environment\(grad_scaler=scaler\)"):
        grad_scaler.step(optimizer)
    assert_equal(params, before)


@makers
@pytest.mark.parametrize("then", ["step", "resolve", "environment"])
@pytest.mark.parametrize("what", ["unscale", "clip"])
def test_unscaling_or_clipping_before_resolve(make: Any, then: str, what: str) -> None:
    params, optimizer, others, plain = pair(make)
    grad_scaler = scaler()
    before, grads = values(params), random_grads(params)
    scaled_environments(optimizer, grad_scaler, params, grads)
    if what == "unscale":
        grad_scaler.unscale_(optimizer)
    else:
        clip_grad_norm_(params, 0.1)
    calls = {
        "step": lambda: grad_scaler.step(optimizer),
        "resolve": optimizer.write_grads,
        "environment": optimizer.environment(grad_scaler=grad_scaler).__enter__,
    }
    if (what, then) != ("clip", "step"):
        with pytest.raises(RuntimeError, match=r"write_grads\(\) before grad_scaler.unscale_"):
            calls[then]()
    assert_equal(params, before)
    optimizer.zero_grad()
    grad_scaler.scale(torch.ones(()))
    grad_scaler = scaler()
    scaled_environments(optimizer, grad_scaler, params, grads)
    grad_scaler.step(optimizer)
    environments(plain, others, grads)
    plain.step()
    assert_equal(params, others)


@makers
@pytest.mark.parametrize("resolved", [False, True])
def test_step_behind_the_back_of_the_scaler(make: Any, resolved: bool) -> None:
    """It would not notice an overflow."""
    params = parameters()
    optimizer, grad_scaler = make(params), scaler()
    before = values(params)
    scaled_environments(optimizer, grad_scaler, params, random_grads(params))
    if resolved:
        optimizer.write_grads()
    with pytest.raises(RuntimeError, match=r"call grad_scaler.step\(optimizer\)"):
        optimizer.step()
    assert_equal(params, before)
    grad_scaler.step(optimizer)
    grad_scaler.update()
    assert not torch.equal(params[0].detach(), before[0])


@makers
def test_one_scaler_for_all_environments_of_a_step(make: Any) -> None:
    params = parameters()
    optimizer = make(params)
    environments(optimizer, params, random_grads(params))
    with pytest.raises(RuntimeError, match="expected the same grad_scaler in all environments"):
        scaled_environments(optimizer, scaler(), params, random_grads(params))


@makers
def test_a_scaled_step_cannot_be_saved_half_way(make: Any) -> None:
    params = parameters()
    optimizer, grad_scaler = make(params), scaler()
    scaled_environments(optimizer, grad_scaler, params, random_grads(params))
    with pytest.raises(RuntimeError, match=r"state_dict: .* scaled half-way"):
        optimizer.state_dict()
    grad_scaler.step(optimizer)
    optimizer.state_dict()
