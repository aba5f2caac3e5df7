"""What users do around a model: hooks, several losses, clipping, pairs, parts that change size."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE, check
from .layers import Function, rand
from .outcomes import EXACT
from .test_attacks import UNEQUAL, built, outcomes


def warnings_of(step: Callable[[], object]) -> list[str]:
    """Run a step, and return the warnings of Agreement."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step()
    return [str(one.message) for one in found if "Agreement" in str(one.message)]


# ---- hooks that change gradients ----

CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "looked at": lambda grad: None,
    "given back": lambda grad: grad,
    "doubled": lambda grad: 2 * grad,
    "reversed": lambda grad: -0.3 * grad,
    "masked": lambda grad: grad * (torch.arange(grad.shape[-1]) > 0),
    "guided": lambda grad: grad.clamp(min=0),
}
OTHER_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "clipped": lambda grad: grad.clamp(-0.01, 0.01),
    "normalized": lambda grad: grad / grad.norm(),
    "normalized by row": lambda grad: grad / grad.norm(dim=-1, keepdim=True),
    "centred": lambda grad: grad - grad.mean(0),
    "noisy": lambda grad: grad + torch.randn_like(grad),
    "clipped in place": lambda grad: grad.clamp_(-0.01, 0.01),
}


def of_tensor(change: Callable[[Tensor], Tensor | None]) -> Function:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        hidden.register_hook(change)
        return self.c(hidden)

    return built(forward)


def of_module(change: Callable[[Tensor], Tensor | None]) -> Function:
    def hook(module: nn.Module, before: Any, after: Any) -> tuple[Tensor] | None:
        changed = change(before[0])
        return None if changed is None else (changed,)

    model = built(lambda s, x: s.c(s.d(s.a(x).tanh())))
    model.d.register_full_backward_hook(hook)
    return model


def before_module(change: Callable[[Tensor], Tensor | None]) -> Function:
    def hook(module: nn.Module, after: Any) -> tuple[Tensor] | None:
        changed = change(after[0])
        return None if changed is None else (changed,)

    model = built(lambda s, x: s.c(s.d(s.a(x).tanh())))
    model.d.register_full_backward_pre_hook(hook)
    return model


WAYS = [of_tensor, of_module, before_module]


@pytest.mark.parametrize("environments", [None, UNEQUAL], ids=["each", "ids"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_hooks_that_treat_rows_alone(
    change: str, way: Callable[..., Function], environments: Tensor | None
) -> None:
    if change == "guided" and way is of_module:
        return  # the sign of a gradient next to zero
    check(way(CHANGES[change]), curved, rand(4, 3), environments=environments)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", OTHER_CHANGES)
def test_other_hooks_are_said_once(change: str, way: Callable[..., Function]) -> None:
    model = way(OTHER_CHANGES[change])
    agreement = am.Agreement(model, RULE)

    def step() -> None:
        with agreement():
            curved(model, rand(4, 3)).backward()

    [message] = warnings_of(lambda: [step() for _ in range(3)])
    assert "row by row" in message
    assert "andmask_ext.backward" in message


def test_hooks_that_are_not_full_may_only_look() -> None:
    model, seen = mlp().double(), []
    handle = model[2].register_backward_hook(lambda *args: seen.append(args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        check(model, curved, rand(4, 4))
        handle.remove()
        model[2].register_backward_hook(lambda module, before, after: before)
        with pytest.raises(RuntimeError, match="register_full_backward_hook"):
            check(model, curved, rand(4, 4))
    assert seen


# ---- several backward passes ----


def test_two_losses_of_one_forward_pass() -> None:
    model, agreement = mlp().double(), None

    def both(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return out.exp().mean() + out.square().mean()

    agreement = check(model, both, rand(4, 4))

    def apart() -> None:
        with agreement():
            out = model(rand(4, 4))
            out.exp().mean().backward(retain_graph=True)
            out.square().mean().backward()

    [message] = warnings_of(lambda: [apart(), apart()])
    assert "(a + b).backward()" in message


def test_losses_that_are_divided_inside_one_context() -> None:
    model = mlp().double()
    agreement = am.Agreement(model, RULE)

    def step() -> None:
        with agreement():
            for _ in range(4):
                (curved(model, rand(4, 4)) / 4).backward()

    [message] = warnings_of(lambda: [step(), step()])
    assert "loss_scale" in message


def test_contexts_inside_one_another() -> None:
    first, second = mlp().double(), mlp().double()
    outer, inner = am.Agreement(first, RULE), am.Agreement(second, RULE)
    with pytest.raises(RuntimeError, match="one open context at a time"), outer(), inner():
        pass
    check(first, curved, rand(4, 4))


# ---- pairs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("environments", [None, 2, torch.tensor([0, 1, 1, 2, 0, 2, 2, 2])])
@pytest.mark.parametrize("bias", [False, True])
def test_what_both_of_a_pair_share_has_no_votes(
    bias: bool, environments: int | Tensor | None, dtype: torch.dtype
) -> None:
    """As a query in a ranking: in the loop its two gradients add up to zero exactly."""
    query = torch.randn(8, 6, dtype=dtype)
    a, b = (torch.cat([query, torch.randn(8, 4, dtype=dtype)], 1) for _ in range(2))
    model = nn.Linear(10, 1, bias=bias).to(dtype)
    agreement = am.Agreement(model, RULE, keep_moments=True)
    with agreement(environments):
        F.softplus(model(b) - model(a)).mean().backward()
    votes = agreement.moments[0].votes
    assert not votes[0][0, :6].any()
    assert votes[0][0, 6:].any()
    assert not bias or not votes[1].any()


def test_rows_that_cancel() -> None:
    """`codes(hard - soft) + codes(soft)`: the codes that are not chosen have no gradient."""

    def forward(self: Function, x: Tensor) -> Tensor:
        soft = self.a(x).softmax(1)
        hard = F.one_hot(soft.argmax(1), 4).to(soft)
        return self.c((hard - soft).detach() @ self.codes + soft @ self.codes)

    model = built(forward, codes=rand(4, 4))
    assert outcomes(model, [0, 0, 0], None) == [EXACT] * 3


# ---- parts that change their size ----


@pytest.mark.parametrize("optimizer", [False, True])
def test_parameters_that_are_pruned_through_data(optimizer: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    rule: Any = am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=0.6) if optimizer else RULE
    agreement = am.Agreement(model, rule)
    for kept in (6, 3, 5):
        rows = torch.arange(kept) % len(model[0].bias)
        for param, dim in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
            param.data = param.data.index_select(dim, rows)
        with agreement():
            curved(model, rand(4, 4)).backward()
        if optimizer:
            rule.step()
        else:
            assert model[0].weight.grad.shape == (kept, 4)
            model.zero_grad()
    check(model, curved, rand(4, 4))


# ---- compiled in place ----


def test_a_model_that_compiles_itself() -> None:
    model = mlp().double()
    model.compile(backend="eager")
    agreement = am.Agreement(model, RULE)
    with pytest.raises(RuntimeError, match=r"model\.forward"), agreement():
        curved(model, rand(4, 4)).backward()
    with agreement():
        curved(model.forward, rand(4, 4)).backward()
    check(mlp().double(), curved, rand(4, 4))


def test_a_context_leaves_no_graph_behind() -> None:
    """Not even until Python collects cycles."""

    def alive() -> int:
        kinds = [type(one).__name__ for one in gc.get_objects()]
        return kinds.count("AccumulateGrad") + kinds.count("BackwardPass")

    model = mlp().double()
    agreement = am.Agreement(model, RULE)
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(2):
            with agreement():
                curved(model, rand(4, 4)).backward()
        assert alive() == before
    finally:
        gc.enable()


# ---- learned weights of losses ----

Weighed = Callable[[Tensor, Tensor], Tensor]

WHOLE: dict[str, Weighed] = {
    "stacked": lambda s, losses: (losses.mean(0) * torch.exp(-s) + s).sum(),
    "softmax": lambda s, losses: (losses.mean(0) * s.softmax(0)).sum(),
    "product": lambda s, losses: losses.mean(0) @ torch.exp(-s),
    "one by one": lambda s, losses: losses[:, 0].mean() * torch.exp(-s[0]) + losses[:, 1].mean(),
}
BY_EXAMPLE: dict[str, Weighed] = {
    "stacked": lambda s, losses: (losses * torch.exp(-s) + s).sum(1).mean(),
    "softmax": lambda s, losses: (losses * s.softmax(0)).sum(1).mean(),
    "product": lambda s, losses: (losses @ torch.exp(-s)).mean(),
}


def weighed(model: Function, x: Tensor, weigh: Weighed) -> Tensor:
    out = model(x)
    return weigh(model.s, torch.stack([out.square().mean(1), out.abs().mean(1)], 1))


@pytest.mark.parametrize("how", WHOLE)
def test_learned_weights_of_mean_losses(how: str) -> None:
    model = built(lambda s, x: s.c(s.a(x).tanh()), s=torch.zeros(2))
    with pytest.raises(RuntimeError, match="learned weight"), am.Agreement(model, RULE)():
        weighed(model, rand(4, 3), WHOLE[how]).backward()


@pytest.mark.parametrize("how", BY_EXAMPLE)
def test_learned_weights_of_the_losses_of_examples(how: str) -> None:
    model = built(lambda s, x: s.c(s.a(x).tanh()), s=torch.zeros(2))
    check(model, lambda m, x: weighed(m, x, BY_EXAMPLE[how]), rand(4, 3))


def test_a_term_that_is_added_twice() -> None:
    """Both uses of what is made of the parameter count, and each in full."""
    model = built(lambda s, x: s.c(s.a(x).tanh()), s=torch.tensor(0.3))

    def step(model: Function, x: Tensor) -> Tensor:
        term = model.s.exp()
        return (curved(model, x) + term) + term

    for environments in (None, 2, UNEQUAL):
        check(model, step, rand(4, 3), environments=environments)
