"""Scalar products of all pairs of environments, from one backward pass, against the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext.agreement import _accumulator, _gramian

from ..models import curved
from .exact_loop import loop, one_example_is_known
from .layers import LAYERS, batches
from .test_layers import Scaled, environments

EXAMPLES = max(6, settings().max_examples // 8)


def gram_of(grads: Tensor) -> Tensor:
    flat = grads.double().reshape(len(grads), -1)
    return flat @ flat.t()


def check(
    model: nn.Module,
    x: Tensor,
    groups: int | Tensor | None,
    tolerance: float = 1e-10,
    **options: Any,
) -> am.Agreement:
    grads = loop(model, curved, (x,), groups)
    results = []
    for gram in (True, False):
        agreement = am.Agreement(model, am.AndMask(0.6), keep_moments=True, **options)
        monitor = am.metrics.Monitor(agreement)  # has norms tracked
        with one_example_is_known(len(x), groups), agreement(groups, gram=gram):
            curved(model, x).backward()
        assert torch.isfinite(monitor.total("norm")).all()
        results.append(agreement)
        model.zero_grad()
    largest = max(float(gram_of(one).abs().max()) for one in grads.values())
    used = results[0].gram
    for name, one in grads.items():
        if name not in used:
            assert not one.any()
            continue
        assert used[name].dtype == torch.float64
        error = (used[name] - gram_of(one)).abs().max()
        assert error <= tolerance * max(largest, 1e-3), f"{name}: {error}"
    for agreement in results:
        norms = agreement.moments[0].squared_norms
        assert norms is not None
        total = sum(float(norm) for norm in norms if norm is not None)
        exact = sum(float(gram_of(one).trace()) for one in grads.values())
        assert total == pytest.approx(exact, rel=1e-8, abs=1e-12)
    return results[0]


@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_of_every_layer(layer: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch = data.draw(batches)
    module, x = LAYERS[layer](data.draw, batch)
    model = Scaled(module, x.is_floating_point() and data.draw(st.booleans())).double()
    check(model, x, data.draw(environments(batch)))


IDS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0])


@pytest.mark.parametrize("groups", [None, 4, 2, 8, IDS], ids=str)
@pytest.mark.parametrize("rows", [(), (3,), (40,)])
def test_from_factors_and_from_gradients(
    groups: int | Tensor | None, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same; which one is taken is a matter of cost."""
    taken = []
    original = _gramian.Gramian.of_factors

    def of_factors(self: _gramian.Gramian, *args: Any) -> bool:
        taken.append(original(self, *args))
        return taken[-1]

    monkeypatch.setattr(_gramian.Gramian, "of_factors", of_factors)
    model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x = torch.randn(8, *rows, 50, dtype=torch.float64)
    check(model, x, groups)
    assert taken
    if rows == ():
        assert any(taken)


@pytest.mark.parametrize("scratch", [1, 20_000])
def test_a_few_environments_at_a_time(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_gramian, _accumulator):
        monkeypatch.setattr(module, "SCRATCH_BYTES", scratch)
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(30, 4)).double()
    check(model, torch.randn(8, 2, 8, dtype=torch.float64), None)
    check(model, torch.randn(8, 2, 8, dtype=torch.float64), IDS)


def test_norms_of_several_batches_add_up() -> None:
    """Norms from squares hold for the first environments only; for others there is another way."""
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(30, 4)).double()
    batches = torch.randn(3, 4, 2, 8, dtype=torch.float64)
    agreement = am.Agreement(model, am.AndMask(0.6), keep_moments=True)
    am.metrics.Monitor(agreement)
    exact = 0.0
    for number, x in enumerate(batches):
        exact += sum(float(g.square().sum()) for g in loop(model, curved, (x,)).values())
        with agreement(write_grads=number == 2):
            curved(model, x).backward()
    norms = agreement.moments[0].squared_norms
    assert sum(float(norm) for norm in norms) == pytest.approx(exact, rel=1e-10)


def test_a_parameter_that_is_used_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x).tanh()) + F.linear(x, self.one.weight.t())

    check(Tied().double(), torch.randn(6, 6, dtype=torch.float64), 3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_each_environment(reduction: str) -> None:
    model = nn.Linear(5, 2).double()
    x = torch.randn(8, 5, dtype=torch.float64)
    grads = loop(model, curved, (x,), IDS)
    agreement = am.Agreement(model, am.AndMask(1.0), loss_reduction=reduction)
    with agreement(IDS, gram=True):
        (curved(model, x) * (8 if reduction == "sum" else 1)).backward()
    for name, one in grads.items():
        torch.testing.assert_close(agreement.gram[name], gram_of(one))
    torch.testing.assert_close(
        am.metrics.gradient_cosines(agreement), am.metrics.gradient_cosines(grads)
    )


def test_with_an_optimizer_and_a_gradient_scaler() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 5)
    grads = loop(model, curved, (x,), 3)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    agreement = am.Agreement(model, optimizer)
    with agreement(3, gram=True, grad_scaler=scaler):
        scaler.scale(curved(model, x)).backward()
    cosines = am.metrics.gradient_cosines(agreement)
    torch.testing.assert_close(cosines, am.metrics.gradient_cosines(grads), rtol=0, atol=1e-5)
    for name, one in grads.items():
        torch.testing.assert_close(agreement.gram[name], gram_of(one), rtol=1e-4, atol=1e-7)
    scaler.step(optimizer)


def test_bfloat16() -> None:
    model = nn.Linear(5, 4).bfloat16()
    x = torch.randn(6, 5).bfloat16()
    agreement = am.Agreement(model, am.AndMask(0.5))
    with agreement(gram=True):
        model(x).float().square().mean().backward()
    assert agreement.gram["weight"].dtype == torch.float64
    wide = nn.Linear(5, 4)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    grads = loop(wide, lambda m, part: m(part).square().mean(), (x.float(),))
    expected = gram_of(grads["weight"])
    assert (agreement.gram["weight"] - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_is_refused() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    agreement = am.Agreement(model, am.AndMask(1.0))
    with pytest.raises(TypeError, match="gram: expected a bool, but got int"):
        with agreement(gram=1):
            pass

    def two_passes() -> None:
        with agreement(gram=True):
            curved(model, x).backward()
            curved(model, x).backward()

    with pytest.raises(RuntimeError, match="expected one backward pass in a context with gram="):
        two_passes()
    with pytest.raises(RuntimeError, match="gram: expected a context with gram=True before"):
        agreement.gram  # noqa: B018
    with agreement(gram=True):
        curved(model, x).backward()
    assert set(agreement.gram) == {"weight", "bias"}
    with agreement():
        curved(model, x).backward()
    with pytest.raises(RuntimeError, match="gram: expected a context with gram=True before"):
        agreement.gram  # noqa: B018
    agreement.detach()
    with pytest.raises(RuntimeError, match="gram: expected"):
        agreement.gram  # noqa: B018


def test_gradients_are_the_same_with_and_without() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 5)
    results = []
    for gram in (False, True):
        model.zero_grad()
        with am.Agreement(model, am.AndMask(0.5))(gram=gram):
            curved(model, x).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [(), (40,)])
def test_autocast_does_not_reach_the_products(rows: tuple[int, ...]) -> None:
    """One layer: the gradient of its output comes from no matrix product."""
    model = nn.Linear(50, 40)
    x = torch.randn(8, *rows, 50)
    results = []
    for enabled in (False, True):
        agreement = am.Agreement(model, am.AndMask(0.5))
        with agreement(gram=True):
            loss = curved(model, x)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss.backward()
        results.append(agreement.gram["weight"])
        model.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_a_context_that_cannot_begin_leaves_no_old_products() -> None:
    model = nn.Linear(3, 2)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=1.0)
    agreement = am.Agreement(model, optimizer)
    x = torch.randn(4, 3)
    with agreement(gram=True):
        curved(model, x).backward()
    assert agreement.gram
    optimizer.step()
    curved(model, x).backward()  # a gradient from outside
    with pytest.raises(RuntimeError, match=r"has a \.grad from outside"), agreement(gram=True):
        pass
    with pytest.raises(RuntimeError, match="gram: expected a context with gram=True before"):
        agreement.gram  # noqa: B018


def test_tied_parameters_have_the_name_that_the_model_gives() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    agreement = check(model, torch.randn(4, 4, dtype=torch.float64), None)
    assert set(agreement.gram) == {name for name, _ in model.named_parameters()}


def test_cosines_without_any_parameter() -> None:
    model = nn.Linear(3, 2)
    agreement = am.Agreement(model, am.AndMask(1.0))
    other = torch.ones((), requires_grad=True)
    with agreement(gram=True):
        model(torch.randn(4, 3))
        (other * 1).backward()
    with pytest.raises(RuntimeError, match="gradient_cosines: expected a backward pass that reach"):
        am.metrics.gradient_cosines(agreement)
