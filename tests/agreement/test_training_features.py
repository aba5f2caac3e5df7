"""Checkpointing, autocast, gradient scaling, dtypes, frozen parameters, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE, check, compare, loop, members_of
from .layers import Function, rand
from .outcomes import REENTRANT_ARGUMENT, outcome

IDS = torch.tensor([1, 0, 2, 1, 1, 0])


# ---- checkpointing ----

Region = Callable[[Function, Tensor, bool], Tensor]


def one(self: Function, x: Tensor, reentrant: bool) -> Tensor:
    return self.b(checkpoint(self.m, self.a(x), use_reentrant=reentrant))


def several(self: Function, x: Tensor, reentrant: bool) -> Tensor:
    x = self.a(x)
    for layer in (self.m, self.b, self.m):
        x = checkpoint(layer, x, use_reentrant=reentrant)
    return self.a(x)


def nested(self: Function, x: Tensor, reentrant: bool) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return self.b(checkpoint(self.m, self.b(y), use_reentrant=reentrant))

    return self.a(checkpoint(inner, self.a(x), use_reentrant=reentrant))


def shared(self: Function, x: Tensor, reentrant: bool) -> Tensor:
    """Parameters that are used within and outside, and as an argument."""

    def inner(y: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.m(y) * self.w, weight)

    hidden = self.m(self.a(x)) + self.w
    return checkpoint(inner, hidden, self.a.weight, use_reentrant=reentrant) @ self.a.weight


def two_outputs(self: Function, x: Tensor, reentrant: bool) -> Tensor:
    def inner(y: Tensor) -> tuple[Tensor, Tensor]:
        return self.m(y), self.b(y)

    left, right = checkpoint(inner, self.a(x), use_reentrant=reentrant)
    return left * right


def sequential(self: Function, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint_sequential([self.m, self.b, self.m], 2, self.a(x), use_reentrant=reentrant)


REGIONS: tuple[Region, ...] = (one, several, nested, shared, two_outputs, sequential)


def with_regions(region: Region, reentrant: bool) -> Function:
    return Function(
        lambda s, x: region(s, x, reentrant),
        a=nn.Linear(4, 4), b=nn.Linear(4, 4), m=mlp(4, 5, 4), w=rand(4),
    ).double()  # fmt: skip


# A parameter as argument of a reentrant region has a test of its own.
KINDS = pytest.mark.parametrize(
    ("region", "reentrant"),
    [(r, kind) for r in REGIONS for kind in (True, False) if not (r is shared and kind)],
    ids=lambda value: value.__name__ if callable(value) else ("not ", "")[value] + "reentrant",
)
# A region within a reentrant region is called without gradients at first.
WITHIN = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


@WITHIN
@KINDS
@pytest.mark.parametrize("rows", [(), (6,)], ids=str)
def test_checkpointing(region: Region, reentrant: bool, rows: tuple[int, ...]) -> None:
    model, agreement = with_regions(region, reentrant), None
    for environments in (None, IDS, None):
        agreement = check(
            model, curved, rand(6, *rows, 4), environments=environments, agreement=agreement
        )


@WITHIN
@KINDS
def test_checkpointing_with_several_batches_in_one_context(region: Region, reentrant: bool) -> None:
    """What is computed again during a backward pass is no call of the model."""
    model = with_regions(region, reentrant)
    batches = [rand(*shape, 4) for shape in ((4, 3), (4, 2), (6, 2), (6, 1), (6, 2))]
    grads = [loop(model, curved, [x]) for x in batches]
    agreement = am.Agreement(model, RULE, keep_moments=True)
    with agreement():
        for x in batches:
            curved(model, x).backward()
    assert agreement.moments[0].count == 26
    for name, param in model.named_parameters():
        compare(name, torch.cat([g[name] for g in grads]), param.grad, RULE, 1e-10)


def test_a_parameter_as_argument_of_a_reentrant_region_is_refused() -> None:
    model = with_regions(shared, True)
    assert outcome(lambda: check(model, curved, rand(6, 4))) == REENTRANT_ARGUMENT


def test_mixing_within_a_checkpointed_region_is_refused() -> None:
    for reentrant in (True, False):
        model = Function(
            lambda s, x, r=reentrant: s.b(checkpoint(s.mix, s.a(x), use_reentrant=r)),
            a=nn.Linear(4, 4), b=nn.Linear(4, 4),
            mix=Function(lambda s, x: s.c(s.c(x) - s.c(x).mean(0)), c=nn.Linear(4, 4)),
        ).double()  # fmt: skip
        with pytest.raises(RuntimeError, match="environments mix"), am.Agreement(model, RULE)():
            curved(model, rand(6, 4)).backward()
        assert all(p.grad is None for p in model.parameters())


# ---- precision ----


def close_to_loop(
    model: nn.Module, step: Callable[..., Tensor], x: Tensor, tolerance: float, count: int
) -> None:
    """Compare sums, and votes where no gradient is within rounding of zero."""
    grads = loop(model, step, [x])
    agreement = am.Agreement(model, RULE, keep_moments=True)
    with agreement():
        step(model, x).backward()
    moments = agreement.moments[0]
    assert moments.count == count
    for (name, param), total, votes in zip(
        model.named_parameters(), moments.sum, moments.votes, strict=True
    ):
        g = grads[name].double()
        assert param.grad.dtype == param.dtype
        size = float(g.abs().max())
        assert (total - g.sum(0)).abs().max() <= tolerance * size * count, name
        sure = (g.abs() > tolerance * size).all(0)
        assert torch.equal(votes[sure].long(), g.sign().sum(0)[sure].long()), name


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "tokens": (lambda: nn.Sequential(mlp(4, 5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (5, 4)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.PReLU(4)),
        (2, 5, 5),
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), (5, 4)
    ),
    "tied": (
        lambda: Function(lambda s, x: (x @ s.w).tanh() @ s.w.t() * s.v, w=rand(4, 3), v=rand(4)),
        (5, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_other_dtypes(model: str, dtype: torch.dtype) -> None:
    build, shape = MODELS[model]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    close_to_loop(build().to(dtype), curved, torch.randn(6, *shape, dtype=dtype), tolerance, 6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model: str, dtype: torch.dtype) -> None:
    build, shape = MODELS[model]

    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(torch.get_default_device().type, dtype):
            return curved(model, x)

    close_to_loop(build().float(), step, torch.randn(6, *shape), 0.05, 6)


def test_backward_within_autocast() -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        return curved(model, x)

    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        close_to_loop(mlp(4, 5, 4), step, torch.randn(6, 4), 0.05, 6)


def test_a_gradient_scaler_changes_nothing_that_is_seen() -> None:
    """Also for a rule that looks at magnitudes."""
    for rule in (RULE, am.rules.GeometricMean(0.6), am.rules.SandMask(0.3, k=1.0)):
        torch.manual_seed(3)
        model, x = mlp(4, 5, 4), torch.randn(6, 4)
        plain = copy.deepcopy(model)
        with am.Agreement(plain, rule)():
            curved(plain, x).backward()
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
        with am.Agreement(model, rule)(grad_scaler=scaler):
            scaler.scale(curved(model, x)).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.unscale_(optimizer)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_a_gradient_scaler_skips_the_step_where_anything_overflows() -> None:
    model, x = mlp(4, 5, 4), torch.randn(6, 4)
    x[2] = float("inf")
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with am.Agreement(model, RULE)(grad_scaler=scaler):
        scaler.scale(curved(model, x)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_disabled_gradient_scaler_is_none() -> None:
    model, x = mlp(4, 5, 4).double(), rand(6, 4)
    expected = loop(model, curved, [x])
    scaler = torch.amp.GradScaler(torch.get_default_device().type, enabled=False)
    with am.Agreement(model, RULE)(grad_scaler=scaler):
        scaler.scale(curved(model, x)).backward()
    torch.testing.assert_close(model[0].weight.grad, RULE(expected["0.weight"]))


# ---- which parameters ----


def test_frozen_parameters() -> None:
    for frozen in ([0], [2], [0, 4], [2, 4]):
        model = nn.Sequential(
            mlp(4, 5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
        ).double()
        for index in frozen:
            model[index].requires_grad_(False)
        check(model, curved, rand(6, 4))
        assert model[frozen[0]].state_dict()  # nothing was done to it
        assert all(p.grad is None for index in frozen for p in model[index].parameters())


def test_a_subset_of_parameters_and_plain_gradients_for_the_others() -> None:
    model, x = mlp(4, 5, 4).double(), rand(6, 4)
    model[2].bias.grad = torch.ones(4, dtype=torch.float64)
    grads = loop(model, curved, [x])
    with am.Agreement(model, RULE, params=[model[0].weight, model[2].weight])(IDS):
        curved(model, x).backward()
    torch.testing.assert_close(model[0].bias.grad, grads["0.bias"].mean(0))
    torch.testing.assert_close(model[2].bias.grad, 1 + grads["2.bias"].mean(0))
    grads = loop(model, curved, [x], IDS)
    for index in (0, 2):
        torch.testing.assert_close(model[index].weight.grad, RULE(grads[f"{index}.weight"]))


def test_inputs_that_require_gradients_get_plain_ones() -> None:
    model, x = mlp(4, 5, 4).double(), rand(6, 4).requires_grad_()
    (expected,) = torch.autograd.grad(curved(model, x), [x])
    grads = loop(model, curved, [x.detach()])
    with am.Agreement(model, RULE)():
        curved(model, x).backward()
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(model[0].weight.grad, RULE(grads["0.weight"]))


def test_channels_last_parameters_keep_their_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2)).double()
    model = model.to(memory_format=torch.channels_last)
    check(model, curved, rand(6, 3, 5, 5).to(memory_format=torch.channels_last), environments=IDS)
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


# ---- randomness ----


@pytest.mark.parametrize("environments", [None, 3, IDS], ids=["each", "3", "ids"])
def test_dropout(environments: int | Tensor | None) -> None:
    """Each example has a mask of its own; the reference shares the forward pass."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 8), nn.Dropout1d(0.4),
                          nn.Linear(8, 3)).double()  # fmt: skip
    other, x = copy.deepcopy(model), rand(6, 5, 4)
    torch.manual_seed(5)
    by_example = other(x).sin().mean((1, 2))
    losses = [by_example[members].mean() for members in members_of(environments, 6)]
    am.backward(losses, RULE, other.parameters())
    torch.manual_seed(5)
    with am.Agreement(model, RULE)(environments):
        model(x).sin().mean().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_random_numbers_are_not_touched() -> None:
    model, x = mlp(4, 5, 4), torch.randn(6, 4)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with am.Agreement(model, RULE)():
        curved(model, x).backward()
    assert torch.equal(torch.rand(3), expected)
