"""am.backward refuses by name and changes nothing."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext import _notices, reference

from .test_backward import RULE

LEAF = torch.ones(2, requires_grad=True)
Y = torch.tensor([0, 1, 2, 0])


def good_losses() -> list[Tensor]:
    return [LEAF.sum(), (LEAF * 2).sum()]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"losses": 3.0}, TypeError, "losses: expected an iterable of tensors, but got one float"),
        ({"params": 5}, TypeError, "params: expected an iterable of tensors, but got one int"),
        (
            {"rule": lambda grads: grads[0].to_sparse()},
            TypeError,
            "rule: .* return a dense tensor, but got torch.sparse_coo",
        ),
        (
            {"rule": lambda grads: grads[0].to("meta")},
            ValueError,
            "rule: .* on cpu, but got one on meta",
        ),
        ({"losses": []}, ValueError, "losses: expected at least one loss, but got 0"),
        ({"losses": [1.0]}, TypeError, r"losses\[0\]: expected a Tensor, but got float"),
        ({"losses": torch.tensor(1.0)}, ValueError, r"tensor of shape \(d,\), but got shape \(\)"),
        ({"losses": torch.ones(2, 2)}, ValueError, r"but got shape \(2, 2\)"),
        ({"losses": [torch.ones(())]}, ValueError, r"losses\[0\]: .* requires grad"),
        ({"losses": [LEAF * 2]}, ValueError, r"losses\[0\]: .* scalar, but got shape \(2,\)"),
        ({"rule": am.AndMask}, TypeError, r"rule: expected a rule such as AndMask\(\), but got"),
        ({"rule": 0.5}, TypeError, "rule: expected a callable, but got float"),
        ({"rule": lambda grads: 1.0}, TypeError, "rule: .* return a Tensor, but got float"),
        ({"rule": lambda grads: grads}, ValueError, r"shape \(2,\) .* but got \(2, 2\)"),
        ({"params": []}, ValueError, "params: expected at least one leaf"),
        ({"params": [torch.ones(2)]}, ValueError, "params: expected at least one leaf"),
        ({"params": LEAF}, TypeError, "iterable of tensors, but got one Tensor"),
        ({"params": [("weight", LEAF)]}, TypeError, r"params\[0\]: .* but got tuple"),
        ({"params": [LEAF, LEAF * 2]}, ValueError, r"params\[1\]: expected a leaf"),
        (
            {"params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]},
            TypeError,
            r"params\[0\] of shape .*: expected dtype .* but got complex64",
        ),
    ],
)
def test_errors_name_the_argument_and_change_nothing(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    LEAF.grad = None
    arguments = {"losses": good_losses(), "rule": RULE, "params": [LEAF], **change}
    with pytest.raises(error, match=message):
        am.backward(**arguments)
    assert LEAF.grad is None


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    losses = [embedding(torch.tensor([i])).sum() for i in range(2)]
    with pytest.raises(TypeError, match=r"losses\[0\], parameter 0: .* sparse_coo .*sparse=True"):
        am.backward(losses, RULE, embedding.parameters())
    assert embedding.weight.grad is None


def test_a_sparse_grad_from_before_is_refused_by_name() -> None:
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    first.grad = torch.ones(2)
    second.grad = torch.ones(2).to_sparse()
    losses = [(first + second).sum() for _ in range(2)]
    with pytest.raises(TypeError, match=r"params\[1\].grad: expected a dense gradient"):
        am.backward(losses, RULE, [first, second])
    assert first.grad.tolist() == [1.0, 1.0]


def test_a_function_that_writes_grad_by_itself_is_refused() -> None:
    hidden = torch.ones(2, requires_grad=True)

    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * hidden

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            with torch.enable_grad():
                (hidden * grad).sum().backward()
            return grad * hidden.detach()

    x = torch.ones(2, requires_grad=True)
    hidden.grad = torch.full((2,), 7.0)
    losses = [(Hides.apply(x) + hidden * 0).sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"losses\[0\]: its backward pass writes to .grad"):
        am.backward(losses, RULE)
    assert hidden.grad.tolist() == [7.0, 7.0]
    assert x.grad is None


@pytest.mark.parametrize(
    "rule",
    [lambda grads: grads[0], reference.masked_mean, lambda grads: LEAF.detach()],
    ids=["view of the stack", "float64", "memory of another tensor"],
)
def test_grads_belong_to_their_parameter_alone(rule: object) -> None:
    weight = torch.ones(2, requires_grad=True)
    am.backward([(weight * k).sum() for k in (1.0, 2.0)], rule)
    assert weight.grad.dtype == torch.float32
    assert weight.grad._base is None
    assert weight.grad.untyped_storage().nbytes() == 8
    am.backward([(weight * k).sum() for k in (1.0, 2.0)], rule)
    assert LEAF.tolist() == [1.0, 1.0]


def test_works_under_no_grad_once_the_losses_exist() -> None:
    weight = torch.ones(2, requires_grad=True)
    losses = (weight * torch.tensor([[1.0], [3.0]])).sum(1)
    with torch.no_grad():
        am.backward(losses, RULE)
    assert weight.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("losses", "kwargs", "message"),
    [
        (lambda: iter(good_losses()), {"params": None}, "params: expected the leaf tensors"),
        (lambda: iter([]), {}, "losses: expected at least one loss, but got 0"),
        (lambda: iter(good_losses()), {"weights": [1.0]}, "weights: expected one per loss"),
        (lambda: iter(good_losses()), {"weights": [1.0] * 3}, "weights: expected 2, .* but got 3"),
        (lambda: good_losses(), {"weights": [1.0]}, "weights: expected 2"),
        (
            lambda: good_losses(),
            {"weights": [1.0, 0.0]},
            "weight: expected a positive finite number",
        ),
        (lambda: good_losses(), {"weights": [1.0, float("nan")]}, "weight: expected a positive"),
        (lambda: iter([torch.ones(())]), {}, r"losses\[0\]: .* requires grad"),
    ],
)
def test_errors_of_iterators_and_weights(losses, kwargs, message) -> None:
    LEAF.grad = None
    with pytest.raises(ValueError, match=message):
        am.backward(losses(), RULE, **{"params": [LEAF], **kwargs})
    assert LEAF.grad is None


@pytest.mark.parametrize(
    "unreduced",
    [
        lambda x: F.cross_entropy(x, Y, reduction="none"),
        lambda x: F.cross_entropy(x, Y, reduction="none", label_smoothing=0.1),
        lambda x: 0.5 * F.mse_loss(x[:, 0], torch.zeros(4), reduction="none"),
        lambda x: (
            F.mse_loss(x[:, :1], torch.zeros(4, 1), reduction="none").squeeze(1) + x.exp()[:, 0]
        ),
    ],
    ids=["cross_entropy", "smoothed", "mse", "a term"],
)
def test_losses_of_single_examples_are_noted_once(
    unreduced: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_notices, "_given", weakref.WeakKeyDictionary())
    x = torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            am.backward(unreduced(x), RULE)
    (one,) = given
    assert "reduction='none'" in str(one.message)
    assert "pass list(losses)" in str(one.message)
    assert one.filename == __file__


def test_losses_of_environments_are_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_notices, "_given", weakref.WeakKeyDictionary())
    x = torch.randn(4, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        am.backward(list(F.cross_entropy(x, Y, reduction="none")), RULE)
        am.backward(torch.stack([F.mse_loss(row, torch.zeros(3)) for row in x]), RULE)
        am.backward(F.mse_loss(x, torch.zeros(4, 3), reduction="none").mean(1), RULE)
        am.backward(x.sum(1), RULE)


def test_hooks_that_would_not_run_are_refused() -> None:
    model = nn.Linear(3, 2)
    handle = model.weight.register_post_accumulate_grad_hook(lambda param: None)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"params\[0\] .* would never run .*call remove\(\)"):
        am.backward([model(x).sum(), model(x).sum()], RULE, model.parameters())
    assert model.weight.grad is None
    handle.remove()
    am.backward([model(x).sum(), model(x).sum()], RULE, model.parameters())
    assert model.weight.grad is not None


def test_parameters_of_an_optimizer_of_this_package() -> None:
    """Its own hooks, which pass gradients on inside its contexts, are no hindrance."""
    model = nn.Linear(3, 2)
    optimizer = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.5)
    x = torch.randn(4, 3)
    with optimizer.environment():
        model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    am.backward([model(x).sum(), model(x).sum()], RULE)
    assert model.weight.grad is not None


def test_parameters_that_no_loss_reaches_are_refused() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.weight.grad = before = torch.ones(2, 3)
    losses = [model(torch.randn(4, 3)).sum() for _ in range(2)]
    for rule in (RULE, am.rules.Median()):
        with pytest.raises(ValueError, match="no loss reaches any of these 2"):
            am.backward(list(losses), rule, other.parameters())
        losses = [model(torch.randn(4, 3)).sum() for _ in range(2)]
    assert other.weight.grad is before
    assert bool((before == 1).all())


def test_sharded_parameters_are_refused() -> None:
    class Sharded(torch.Tensor):
        device_mesh = "a mesh"

    weight = torch.randn(3).as_subclass(Sharded).requires_grad_()
    with pytest.raises(TypeError, match="got a Sharded, of which this process holds a part"):
        am.backward([LEAF.sum()], RULE, [weight])
