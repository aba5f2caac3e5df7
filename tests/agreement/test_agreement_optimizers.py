"""An Agreement that feeds an optimizer equals the loop over ``optimizer.environment()``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import members_of
from .layers import rand

IDS = torch.tensor([1, 0, 2, 1, 1, 0])
STEPS = 5

Make = Callable[[nn.Module], am.optim.AndMaskSGD]


def network() -> nn.Sequential:
    return nn.Sequential(*mlp(), nn.LayerNorm(3)).double()


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Weights vote, biases are averaged, the norm is masked in another way."""
    return [
        {"params": [model[0].weight, model[2].weight], "tau": 0.4},
        {"params": [model[0].bias, model[2].bias], "rule": am.rules.Mean()},
        {"params": model[3].parameters(), "rule": am.rules.GeometricMean(0.3)},
    ]


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: am.optim.AndMaskSGD(m.parameters(), lr=0.3, momentum=0.9, tau=0.6),
    "sgd, decoupled": lambda m: am.optim.AndMaskSGD(
        m.parameters(), lr=0.3, tau=0.6, weight_decay=0.1, weight_decay_mode="decoupled"
    ),
    "adam": lambda m: am.optim.AndMaskAdam(m.parameters(), lr=0.1, tau=0.6, weight_decay=0.1),
    "adamw": lambda m: am.optim.AndMaskAdamW(m.parameters(), lr=0.1, tau=0.6, rescale=True),
    "groups": lambda m: am.optim.AndMaskAdamW(groups(m), lr=0.1),
    "wrapped": lambda m: am.optim.EnvironmentWrapper(
        torch.optim.RMSprop(m.parameters(), lr=0.01), am.AndMask(0.6)
    ),
    "counted": lambda m: am.optim.AndMaskSGD(
        m.parameters(), lr=0.3, expected_environments=3, tau=1.0
    ),
}


def loop_step(
    model: nn.Module, optimizer: am.optim.AndMaskSGD, x: Tensor, environments: int | Tensor | None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:  # fmt: skip
    for members in members_of(environments, len(x)):
        with optimizer.environment(grad_scaler=scaler):
            loss = curved(model, x[members])
            (loss if scaler is None else scaler.scale(loss)).backward()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("environments", [None, 3, IDS], ids=["each", "3", "ids"])
def test_five_steps(make: str, environments: int | Tensor | None) -> None:
    if make == "counted" and environments is None:
        environments = 3
    model = network()
    other = copy.deepcopy(model)
    optimizer, twin = (OPTIMIZERS[make](m) for m in (model, other))
    agreement = am.Agreement(model, optimizer)
    for step in range(STEPS):
        x = rand(6, 4)
        with agreement(environments):
            curved(model, x).backward()
        optimizer.step()
        if step % 2:
            optimizer.zero_grad()
        loop_step(other, twin, x, environments)
        twin.step()
        assert_close(model, other)


def test_environments_add_up_until_the_step() -> None:
    """Over contexts, over backward passes, and with environments of the optimizer's own."""
    model = network()
    other = copy.deepcopy(model)
    optimizer, twin = (OPTIMIZERS["groups"](m) for m in (model, other))
    agreement = am.Agreement(model, optimizer)
    batches = [rand(6, 4), rand(3, 4), rand(4, 4), rand(5, 4)]
    with agreement():
        curved(model, batches[0]).backward()
        curved(model, batches[1]).backward()
    with agreement(2):
        curved(model, batches[2]).backward()
    with optimizer.environment():
        curved(model, batches[3]).backward()
    optimizer.step()
    for x, environments in zip(batches, (None, None, 2, 1), strict=True):
        loop_step(other, twin, x, environments)
    twin.step()
    assert_close(model, other)


def test_resolve_and_clip() -> None:
    model = network()
    other = copy.deepcopy(model)
    optimizer, twin = (OPTIMIZERS["adamw"](m) for m in (model, other))
    agreement = am.Agreement(model, optimizer)
    for _ in range(2):
        x = rand(6, 4)
        with agreement():
            curved(model, x).backward()
        loop_step(other, twin, x, None)
        for m, o in ((model, optimizer), (other, twin)):
            o.write_grads()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01)
            o.step()
            o.zero_grad()
        assert_close(model, other)


def test_a_gradient_scaler_skips_a_step() -> None:
    model = network().float()
    other = copy.deepcopy(model)
    optimizer, twin = (OPTIMIZERS["adamw"](m) for m in (model, other))
    agreement = am.Agreement(model, optimizer)
    scalers = [
        torch.amp.GradScaler(torch.get_default_device().type, init_scale=256.0, growth_interval=2)
        for _ in range(2)
    ]
    for step in range(STEPS):
        x = torch.randn(6, 4)
        if step == 2:
            x[1] = float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        with agreement(grad_scaler=scalers[0]):
            scalers[0].scale(curved(model, x)).backward()
        loop_step(other, twin, x, None, scalers[1])
        for scaler, one in zip(scalers, (optimizer, twin), strict=True):
            scaler.step(one)
            scaler.update()
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert moved == (step != 2)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_number_of_environments_is_checked() -> None:
    model, x = network(), rand(6, 4)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, expected_environments=3, tau=1.0)
    with am.Agreement(model, optimizer)(2):
        curved(model, x).backward()
    with pytest.raises(RuntimeError, match=r"expected 3 environments .* but got 2"):
        optimizer.step()


def test_decay_before_the_mask_is_refused() -> None:
    model = network()
    optimizer = am.optim.AndMaskSGD(
        model.parameters(), lr=0.1, weight_decay=0.1, weight_decay_mode="before_mask", tau=1.0
    )
    with pytest.raises(ValueError, match=r"before_mask.*optimizer\.environment\(\)"):
        am.Agreement(model, optimizer)


def test_parameters_of_the_optimizer_only() -> None:
    """Others get plain gradients."""
    model, x = network(), rand(6, 4)
    expected = torch.autograd.grad(curved(model, x), [model[0].weight, model[3].bias])
    optimizer = am.optim.AndMaskSGD(model[2].parameters(), lr=0.1, tau=1.0)
    with pytest.raises(ValueError, match="params: expected None or the parameters of the"):
        am.Agreement(model, optimizer, params=model.parameters())
    with am.Agreement(model, optimizer, params=list(model[2].parameters()))():
        curved(model, x).backward()
    torch.testing.assert_close(model[0].weight.grad, expected[0])
    torch.testing.assert_close(model[3].bias.grad, expected[1])
    optimizer.step()


def test_frozen_and_unused_parameters_of_the_optimizer() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = am.optim.AndMaskSGD([*model.parameters(), idle], lr=0.1, tau=0.0)
    before = [p.detach().clone() for p in (model[0].bias, model[2].weight, idle)]
    x = rand(6, 4)
    with am.Agreement(model, optimizer)():
        curved(model, x).backward()
    optimizer.step()
    after = model[0].bias, model[2].weight, idle
    assert [torch.equal(p, q) for p, q in zip(before, after, strict=True)] == [True, False, True]


def test_a_scheduler_a_state_and_another_agreement() -> None:
    """An Agreement holds nothing that a checkpoint needs."""
    model = network()
    optimizer = OPTIMIZERS["adamw"](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    agreement, batches = am.Agreement(model, optimizer), [rand(6, 4) for _ in range(6)]
    for number, x in enumerate(batches):
        if number == 3:
            other = copy.deepcopy(model)
            resumed = OPTIMIZERS["adamw"](other)
            later = torch.optim.lr_scheduler.StepLR(resumed, 2, 0.5)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            later.load_state_dict(scheduler.state_dict())
            second = am.Agreement(other, resumed)
        with agreement():
            curved(model, x).backward()
        optimizer.step()
        scheduler.step()
    for x in batches[3:]:
        with second():
            curved(other, x).backward()
        resumed.step()
        later.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_exception_after_other_environments_breaks_the_step() -> None:
    model, x = network(), rand(6, 4)
    optimizer = OPTIMIZERS["sgd"](model)
    agreement = am.Agreement(model, optimizer)
    with agreement():
        curved(model, x).backward()
    with pytest.raises(ZeroDivisionError), agreement():  # noqa: PT012
        curved(model, x).backward()
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    optimizer.zero_grad()
    other = copy.deepcopy(model)
    twin = OPTIMIZERS["sgd"](other)
    with agreement():
        curved(model, x).backward()
    optimizer.step()
    loop_step(other, twin, x, None)
    twin.step()
    assert_close(model, other)


def test_a_context_within_an_environment_is_refused() -> None:
    model, x = network(), rand(6, 4)
    optimizer = OPTIMIZERS["sgd"](model)
    agreement = am.Agreement(model, optimizer)
    with agreement():
        with pytest.raises(RuntimeError, match="inside another"), optimizer.environment():
            pass
        curved(model, x).backward()
    optimizer.step()


def test_parameters_that_were_added_later_are_named() -> None:
    model, head, x = network(), nn.Linear(3, 2).double(), rand(6, 4)
    optimizer = OPTIMIZERS["sgd"](model)
    agreement = am.Agreement(model, optimizer)
    optimizer.add_param_group({"params": head.parameters()})
    message = r"of shape .* received a gradient, but was added .* make a new Agreement"
    with pytest.raises(RuntimeError, match=message), agreement():
        head(model(x)).square().mean().backward()


def test_the_moments_of_each_group() -> None:
    model, x = network(), rand(6, 4)
    optimizer = OPTIMIZERS["groups"](model)
    agreement = am.Agreement(model, optimizer)
    with agreement():
        curved(model, x).backward()
    assert [moments.kinds for moments in agreement.moments] == [("votes",), (), ("votes", "logs")]
    assert [moments.count for moments in agreement.moments] == [6, 6, 6]
