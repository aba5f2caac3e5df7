"""andmask_ext.backward: exact for any model, and clear about what it cannot do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import andmask_ext as am
from andmask_ext import reference

from .models import mlp

RULE = am.AndMask(tau=0.6, rescale=True)
ENVIRONMENTS = 5


def batches(*shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(12, *shape), torch.randint(0, 3, (12,))) for _ in range(ENVIRONMENTS)]


def expected_grads(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A loop of ordinary backward passes on a copy of the model, and the reference rule."""
    model = copy.deepcopy(model)
    columns: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, param in model.named_parameters():
            columns[name].append(torch.zeros_like(param) if param.grad is None else param.grad)
    return {
        name: reference.masked_mean(torch.stack(grads), RULE.tau, RULE.rescale).float()
        for name, grads in columns.items()
    }


def check(model: nn.Module, data: list[tuple[Tensor, Tensor]], forward: object = None) -> None:
    expected = expected_grads(model, data)
    forward = forward or model
    am.backward([F.cross_entropy(forward(x), y) for x, y in data], RULE, model.parameters())
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


class Tied(nn.Module):
    """One weight used by two layers, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).tanh()).tanh() @ self.first.weight.T
        return self.head(hidden)


def test_equals_a_loop_of_plain_backward_passes() -> None:
    check(mlp(6, 8, 3, nn.ReLU()), batches(6))


def test_batch_norm_in_training_mode_sees_one_environment_at_a_time() -> None:
    check(mlp(6, 8, 3, nn.BatchNorm1d(8), nn.ReLU()), batches(6))


def test_tied_weights_are_summed_before_the_vote() -> None:
    check(Tied(), batches(6))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_model(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = mlp(6, 8, 3, nn.BatchNorm1d(8), nn.ReLU())
    check(model, batches(6), torch.compile(model, dynamic=dynamic))


def test_checkpointing() -> None:
    model = mlp(6, 8)
    check(model, batches(6), lambda x: checkpoint(model, x, use_reentrant=False))


def test_reentrant_checkpointing_is_refused_by_name_and_changes_nothing() -> None:
    model = mlp(6, 8)
    losses = [
        F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=True), y)
        for x, y in batches(6)
    ]
    with pytest.raises(ValueError, match=r"losses\[0\]: expected .*use_reentrant=False"):
        am.backward(losses, RULE, model.parameters())
    assert all(param.grad is None for param in model.parameters())


def test_autocast() -> None:
    model, data = mlp(6, 8), batches(6)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        am.backward([F.cross_entropy(model(x), y) for x, y in data], RULE, model.parameters())
    columns = []
    for x, y in data:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        columns.append(torch.autograd.grad(loss, list(model.parameters())))
    for param, grads in zip(model.parameters(), zip(*columns, strict=True), strict=True):
        assert param.grad.dtype == torch.float32
        torch.testing.assert_close(param.grad, RULE(torch.stack(grads)))


def test_convolution_with_channels_last_keeps_the_layout_of_the_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    model = model.to(memory_format=torch.channels_last)
    check(model, batches(3, 8, 8))
    weight = model[0].weight
    assert weight.grad.stride() == weight.stride()


def test_a_tensor_of_losses_that_share_one_graph() -> None:
    model = mlp(6, 8)
    x, y = torch.randn(ENVIRONMENTS, 6), torch.randint(0, 3, (ENVIRONMENTS,))
    expected = expected_grads(model, [(x[i : i + 1], y[i : i + 1]) for i in range(ENVIRONMENTS)])
    am.backward(F.cross_entropy(model(x)[:, None].mT, y[:, None], reduction="none").mean(1), RULE)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_losses_that_share_a_part_of_their_graph() -> None:
    """A weight computed once from parameters and used in every environment."""
    factor = torch.randn(6, 2, requires_grad=True)
    inputs = torch.randn(ENVIRONMENTS, 7, 6)
    weight = factor @ factor.T
    am.backward([(x @ weight).square().mean() for x in inputs], RULE)
    columns = [
        torch.autograd.grad((x @ (factor @ factor.T)).square().mean(), factor)[0] for x in inputs
    ]
    torch.testing.assert_close(factor.grad, RULE(torch.stack(columns)))


@pytest.mark.parametrize("shared", [False, True])
def test_graphs_are_freed_afterwards(shared: bool) -> None:
    weight = torch.randn(4, requires_grad=True)
    base = weight.exp() if shared else None
    losses = [((base if shared else weight.exp()) * x).sum() for x in torch.randn(3, 4)]
    am.backward(losses, RULE)
    for loss in losses:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_accumulates_into_existing_grads_as_plain_backward_does() -> None:
    model, data = mlp(6, 8), batches(6)
    expected = expected_grads(model, data)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    grads_before = [param.grad for param in model.parameters()]
    am.backward([F.cross_entropy(model(x), y) for x, y in data], RULE)
    for (name, param), before in zip(model.named_parameters(), grads_before, strict=True):
        assert param.grad is before  # in place
        torch.testing.assert_close(param.grad, expected[name] + 1, rtol=1e-4, atol=1e-6)


def test_untouched_parameters() -> None:
    """No gradient in one environment is a zero there; in no environment, nothing at all."""
    weight = torch.ones(2, requires_grad=True)
    once = torch.ones(2, requires_grad=True)
    never = torch.ones(2, requires_grad=True)
    losses = [(weight * 2).sum(), (weight * 4 + once * 6).sum()]
    am.backward(losses, am.AndMask(tau=0.5), [weight, once, never])
    assert weight.grad.tolist() == [3.0, 3.0]
    assert once.grad.tolist() == [3.0, 3.0]  # one vote of two reaches tau = .5
    assert never.grad is None

    losses = [(weight * 2).sum(), (weight * 4 + once * 6).sum()]
    am.backward(losses, am.AndMask(tau=1.0), [once])
    assert once.grad.tolist() == [3.0, 3.0]  # a zero is no vote: unanimity fails, nothing added


@pytest.mark.parametrize("touched", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_untouched_environments_count_as_zeros_wherever_they_stand(touched: tuple[int]) -> None:
    everywhere = torch.ones(500, requires_grad=True)
    sometimes = torch.ones(500, requires_grad=True)
    losses = [
        (everywhere + (sometimes * 6 if environment in touched else 0)).sum()
        for environment in range(3)
    ]
    am.backward(losses, lambda grads: grads.sum(0))
    assert torch.equal(sometimes.grad, torch.full((500,), 6.0 * len(touched)))


def test_params_decide_who_gets_a_gradient() -> None:
    model, data = mlp(6, 8), batches(6)
    model[0].bias.requires_grad_(False)
    am.backward([F.cross_entropy(model(x), y) for x, y in data], RULE, model[0].parameters())
    assert model[0].weight.grad is not None
    assert model[0].bias.grad is None
    assert model[2].weight.grad is None


def test_without_params_every_leaf_gets_one() -> None:
    model, data = mlp(6, 8), batches(6)
    free = torch.zeros(3, requires_grad=True)
    am.backward([F.cross_entropy(model(x) + free, y) for x, y in data], RULE)
    assert all(param.grad is not None for param in [*model.parameters(), free])
    leaf = torch.tensor(2.0, requires_grad=True)
    am.backward([leaf, leaf * 3], am.AndMask(1.0))
    assert leaf.grad.item() == 2.0


def test_a_common_positive_factor_does_not_change_the_mask() -> None:
    """So GradScaler.scale may be applied to every loss."""
    one, data = mlp(6, 8), batches(6)
    other = copy.deepcopy(one)
    am.backward([F.cross_entropy(one(x), y) for x, y in data], RULE)
    am.backward([F.cross_entropy(other(x), y) * 1024 for x, y in data], RULE)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad * 1024, b.grad, rtol=0, atol=0)


def test_non_finite_losses_show_in_the_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    am.backward([weight.sum(), (weight * float("inf")).sum()], am.AndMask(1.0))
    assert not weight.grad.isfinite().any()


def test_any_callable_is_a_rule() -> None:
    weight = torch.ones(2, requires_grad=True)
    am.backward([(weight * k).sum() for k in (1.0, 2.0, 9.0)], lambda grads: grads.median(0).values)
    assert weight.grad.tolist() == [2.0, 2.0]


# ---- streaming ----

STREAMED = [
    am.rules.Mean(),
    am.AndMask(0.6),
    RULE,
    am.rules.GeometricMean(0.6),
    am.rules.SandMask(0.4, k=1.0),
    am.rules.MaskedAverage(0.6),
    am.rules.AgreementSum(),
]


@pytest.mark.parametrize("rule", STREAMED, ids=str)
@pytest.mark.parametrize("lazy", [False, True])
def test_streaming_equals_stacking(rule: am.rules.Rule, lazy: bool) -> None:
    one, data = mlp(6, 8, 3, nn.BatchNorm1d(8), nn.ReLU()), batches(6)
    other = copy.deepcopy(one)
    weights = [1.0, 0.5, 2.0, 1.5, 0.25]
    losses = (F.cross_entropy(one(x), y) for x, y in data)
    am.backward(losses if lazy else list(losses), rule, one.parameters(), weights=weights)
    am.backward(  # a plain callable gets the stack
        [w * F.cross_entropy(other(x), y) for w, (x, y) in zip(weights, data, strict=True)],
        lambda grads: rule(grads),
        other.parameters(),
    )
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("environments", [4, 40])
def test_gradients_are_freed_one_by_one(environments: int) -> None:
    """Memory does not grow with the environments, unless the rule needs all of them."""
    weight = torch.ones(1000, requires_grad=True)

    def most_alive(rule: object) -> int:
        seen: list[StorageWeakRef] = []
        most = 0

        def look(grad: Tensor) -> None:
            nonlocal most
            seen.append(StorageWeakRef(grad.untyped_storage()))
            most = max(most, sum(not storage.expired() for storage in seen))

        handle = weight.register_hook(look)
        losses = ((weight * torch.randn(1000)).sum() for _ in range(environments))
        am.backward(losses, rule, [weight])
        handle.remove()
        return most

    assert most_alive(am.AndMask(0.6)) <= 2
    assert most_alive(am.rules.Median()) == environments


def test_an_iterator_is_asked_when_the_loss_before_is_done() -> None:
    weight = torch.ones(2, requires_grad=True)
    order: list[str] = []
    weight.register_hook(lambda grad: order.append("backward"))

    def losses():
        for factor in (1.0, 2.0):
            order.append("loss")
            yield (weight * factor).sum()

    am.backward(losses(), am.AndMask(1.0), [weight])
    assert order == ["loss", "backward", "loss", "backward"]
    assert weight.grad.tolist() == [1.5, 1.5]
