"""Gradient agreement filtering: a rule on whole gradients."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap

import andmask_ext as am
from andmask_ext import reference

from .. import strategies
from ..models import mlp

GAF = am.rules.GradientAgreementFiltering
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

limits = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.97, 1.0, 1.05, 1.5, 2.0]), st.floats(0, 2))
rules = st.builds(GAF, limits, st.booleans())


def decided(grads: Tensor, rule: GAF) -> bool:
    """Whether rounding of float64 decides nothing; ties at exact numbers are decided."""
    g = grads.double()
    if not 1e-140 < float(g.abs().max()) < 1e140:
        return not g.any()
    average, count = g[0], 1
    for one in g[1:]:
        a, b = average.norm(), one.norm()
        if a < 1e-6 * g[0].norm() or 0 < b < 1e-140:
            return False  # the average cancels
        size = a * b
        excess = 1 - ((average * one).sum() / size if size else 0.0) - rule.cos_distance_thresh
        if 1e-10 < abs(excess) < 1e-7:
            return False
        if not excess > 1e-9:
            average, count = average + (one - average) / (2 if rule.halve else count + 1), count + 1
    return True


# ---- values ----


@dtypes
@given(data=st.data())
def test_matches_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    counts = strategies.environment_counts.filter(lambda d: d >= 2)
    base = np.float64 if dtype == torch.float64 else np.float32
    values = data.draw(strategies.stacked(base, finite=True, environments=counts))
    grads, rule = torch.as_tensor(values).to(dtype), data.draw(rules)
    out = rule(grads)
    assert out.dtype == dtype
    assert out.shape == grads.shape[1:]
    assert out.is_contiguous()
    if not decided(grads, rule):
        return
    expected = reference.gradient_agreement_filtering(grads, rule.cos_distance_thresh, rule.halve)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = (len(grads) + 8) * torch.finfo(wide).eps * grads.double().abs().amax(0)
    bound += torch.finfo(dtype).eps * expected.abs() + 8 * torch.finfo(dtype).smallest_normal
    assert ((out.double() - expected).abs() <= bound).all()


@dtypes
@given(data=st.data())
def test_nothing_non_finite_is_hidden(dtype: torch.dtype, data: st.DataObject) -> None:
    counts = strategies.environment_counts.filter(lambda d: d >= 2)
    values = data.draw(strategies.stacked(np.float32, finite=True, environments=counts))
    grads, rule = torch.as_tensor(values).to(dtype), data.draw(rules)
    place = data.draw(st.integers(0, len(grads) - 1))
    column = data.draw(st.integers(0, grads.shape[1] - 1))
    grads[place, column] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    out = rule(grads)
    assert not out[column].isfinite()
    assert out[torch.arange(len(out)) != column].isfinite().all()


@given(rule=rules, environments=st.integers(2, 40), seed=st.integers(0, 1000))
def test_weights(rule: GAF, environments: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(environments, 5, generator=generator, dtype=torch.float64).to(
        torch.get_default_device()
    )
    weights = rule.weights(grads @ grads.T)
    assert weights.dtype == torch.float64
    assert weights.device == grads.device
    assert (weights >= 0).all()
    torch.testing.assert_close(weights @ grads, rule(grads))
    if weights.any():
        assert weights.sum().item() == pytest.approx(1)
        assert weights[0] > 0
        assert (weights > 0).sum() > 1
    else:
        average = grads[0]
        assert (1 - F.cosine_similarity(average[None], grads[1:]) > rule.cos_distance_thresh).all()
    # neither the scale nor a rotation matters
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, device=grads.device))[0]
    torch.testing.assert_close(rule(grads @ basis * 8), rule(grads) @ basis * 8)


def test_the_first_one_is_where_it_starts() -> None:
    grads = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, 0.2]])
    assert not GAF(0.5)(grads).any()
    torch.testing.assert_close(GAF(0.5)(grads.roll(-1, 0)), torch.tensor([-1.0, 0.15]))


def test_a_limit_of_two_is_the_mean_and_two_environments_are_kept_or_left() -> None:
    grads = torch.randn(9, 500)
    torch.testing.assert_close(GAF(2.0)(grads), grads.mean(0))
    for halve in (False, True):
        for cosine, kept in [(0.49, False), (0.51, True)]:
            pair = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]])
            expected = pair.mean(0) if kept else torch.zeros(2)
            torch.testing.assert_close(GAF(0.5, halve)(pair), expected)


def test_halving_weighs_the_last_one_by_half() -> None:
    weights = GAF(1.0, halve=True).weights(torch.eye(5))
    assert weights.tolist() == [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]


@pytest.mark.parametrize("halve", [False, True])
def test_ties_are_kept(halve: bool) -> None:
    """Rounding decides no tie: angles of 0, 60, 90 and 180 degrees, and scaled copies."""
    one = torch.randn(1000)
    for factors in ([1.0, 1.0, 1.0], [0.1, 0.3, 0.7], [1e-3, 7.0, 1e5]):
        same = torch.tensor(factors)[:, None] * one
        assert (GAF(0.0, halve).weights(same.double() @ same.double().T) > 0).all()
    sixty = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert GAF(0.5, halve)(sixty).any()
    assert not GAF(0.4999, halve)(sixty).any()
    assert GAF(1.0, halve)(torch.eye(2)).any()
    assert not GAF(0.9999, halve)(torch.eye(2)).any()
    assert (GAF(2.0, halve).weights(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 0.5).all()


def test_zero_gradients_are_at_right_angles() -> None:
    grads = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    assert GAF(1.0)(grads).tolist() == pytest.approx([2 / 3, 4 / 3])
    assert GAF(0.99)(grads).tolist() == [1.0, 2.0]
    assert not GAF(0.99)(grads.roll(1, 0)[1:].flip(0) * 0).any()
    assert not GAF()(torch.zeros(3, 4)).any()


@dtypes
def test_scalars_empty_and_strided(dtype: torch.dtype) -> None:
    rule = GAF(1.2)
    assert rule(torch.tensor([1.0, 3.0, -4.0]).to(dtype)).item() == 2.0
    assert rule(torch.zeros(3, 0, 2, dtype=dtype)).shape == (0, 2)
    grads = torch.randn(6, 4, 5).to(dtype)
    for other in (
        grads.movedim(0, -1).contiguous().movedim(-1, 0),
        torch.stack([grads, torch.ones_like(grads)], -1)[..., 0],
    ):
        assert torch.equal(rule(other), rule(grads))


def test_bits_do_not_depend_on_threads() -> None:
    grads = torch.randn(6, 200_001)
    torch.set_num_threads(1)
    one = GAF(1.0)(grads)
    torch.set_num_threads(2)
    assert torch.equal(GAF(1.0)(grads), one)


def test_the_weights_are_constants_for_a_derivative() -> None:
    grads = torch.randn(5, 7, requires_grad=True)
    rule, factor = GAF(1.0), torch.randn(7)
    weights = rule.weights(grads @ grads.T)
    (found,) = torch.autograd.grad((rule(grads) * factor).sum(), grads)
    torch.testing.assert_close(found, weights[:, None].float() * factor)
    torch.testing.assert_close(grad(lambda g: (rule(g) * factor).sum())(grads.detach()), found)
    with pytest.raises(NotImplementedError, match=r"outside of torch\.vmap"):
        vmap(rule)(torch.randn(2, 5, 7))


# ---- whole models ----


def losses_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [F.cross_entropy(model(x), y) for x, y in data]


def data_of(environments: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(12, 6), torch.randint(0, 3, (12,))) for _ in range(environments)]


def whole(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Stack the gradients of all parameters together, one row for each environment."""
    rows = []
    for loss in losses_of(model, data):
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def written(model: nn.Module) -> Tensor:
    return torch.cat([param.grad.flatten() for param in model.parameters()])


@given(limit=st.sampled_from([0.5, 0.8, 1.0, 1.1, 2.0]), halve=st.booleans())
def test_backward_takes_the_gradients_of_all_parameters_together(limit: float, halve: bool) -> None:
    model, data = mlp(6, 8, 3, nn.ReLU()), data_of(6)
    expected = reference.gradient_agreement_filtering(whole(model, data), limit, halve)
    am.backward(losses_of(model, data), GAF(limit, halve), model.parameters())
    torch.testing.assert_close(written(model).double(), expected, rtol=1e-4, atol=1e-6)


def test_backward_with_weights_and_parameters_that_some_losses_do_not_reach() -> None:
    a, b, unused = (torch.zeros(2, requires_grad=True) for _ in range(3))
    losses = [(2 * a).sum(), a.sum() + b.sum(), (-a).sum()]
    am.backward(losses, GAF(0.5), [a, b, unused], weights=[1.0, 3.0, 1.0])
    assert a.grad.tolist() == [2.5, 2.5]
    assert b.grad.tolist() == [1.5, 1.5]
    assert unused.grad is None


def test_the_way_of_agreement_is_two_passes() -> None:
    """As docs/rules.md says: the weights are known only when the gradients are."""
    torch.manual_seed(0)
    model, rule = mlp(6, 8, 3, nn.ReLU()), GAF(0.9)
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    agreement = am.Agreement(model, am.rules.Mean())
    with agreement(gram=True):
        F.cross_entropy(model(x), y).backward()
    weights = rule.weights(sum(agreement.gram.values()))
    assert 0 < (weights > 0).sum() < 8
    model.zero_grad()
    (weights * F.cross_entropy(model(x), y, reduction="none")).sum().backward()
    found = written(model)
    model.zero_grad()
    am.backward([F.cross_entropy(model(x[k, None]), y[k, None]) for k in range(8)], rule)
    torch.testing.assert_close(found, written(model), rtol=1e-4, atol=1e-6)


def test_optimizers_and_moments_refuse_it_by_name() -> None:
    rule, weight = GAF(), torch.zeros(2, requires_grad=True)
    message = r"GradientAgreementFiltering\(.*\) needs the gradients of all environments at once; "
    with pytest.raises(TypeError, match=message + r"use andmask_ext\.backward"):
        am.optim.AndMaskSGD([weight], lr=0.1, rule=rule)
    with pytest.raises(TypeError, match=message + r"use andmask_ext\.backward"):
        am.Agreement(nn.Linear(2, 1), rule)
    with pytest.raises(TypeError, match="needs the gradients of all environments at once"):
        rule.update(am.Moments([weight], ()))


# ---- as a value ----


def test_is_an_immutable_value() -> None:
    rule = GAF(1)
    assert repr(rule) == "GradientAgreementFiltering(cos_distance_thresh=1.0, halve=False)"
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule == GAF()
    assert len({rule, GAF(1.0), GAF(0.9)}) == 2
    assert type(rule).__module__ == "andmask_ext.rules"
    with pytest.raises(AttributeError):
        rule.halve = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.1,), ValueError, r"cos_distance_thresh: expected a number in \[0, 2\], but got 2.1"),
        ((float("nan"),), ValueError, "cos_distance_thresh: .* but got nan"),
        (("1",), TypeError, "cos_distance_thresh: .* but got str"),
        ((1.0, 1), TypeError, "halve: expected a bool, but got int"),
    ],
)
def test_arguments_are_checked(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GAF(*arguments)  # type: ignore[arg-type]


def test_gradients_and_products_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected at least 2 environments, but got 1"):
        GAF()(torch.randn(1, 3))
    with pytest.raises(TypeError, match="grads: expected a Tensor"):
        GAF()([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"grads: .* but got int32"):
        GAF()(torch.ones(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"gram: expected scalar products .* shape \(2, 3\)"):
        GAF().weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="gram: expected at least 1 environment"):
        GAF().weights(torch.ones(0, 0))
