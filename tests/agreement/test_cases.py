"""Single cases that properties do not draw."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand


def test_one_environment_with_batch_norm_is_plain_training() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = rand(6, 4)
    curved(model, x).backward()
    plain = [param.grad for param in model.parameters()]
    model.zero_grad()
    with am.Agreement(model, am.rules.Mean())(1):
        curved(model, x).backward()
    for param, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(param.grad, expected, rtol=1e-9, atol=1e-12)


def test_functional_batch_norm_is_refused() -> None:
    model = Function(
        lambda s, x: s.h(F.batch_norm(x, None, None, s.w, s.b, training=True)),
        w=rand(4), b=rand(4), h=nn.Linear(4, 3),
    ).double()  # fmt: skip
    with pytest.raises(RuntimeError, match=r"batch_norm in training mode"), \
            am.Agreement(model, RULE)():  # fmt: skip
        curved(model, rand(6, 4)).backward()


@pytest.mark.parametrize("slices", [slice(None, -1), slice(-4, -1), slice(1, -2, 2)], ids=str)
def test_negative_ends_of_slices(slices: slice) -> None:
    model = Function(
        lambda s, x: F.linear(x, s.w[slices]).tanh() + s.b[slices], w=rand(7, 4), b=rand(7)
    )
    check(model, curved, rand(6, 4))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bags(mode: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode), nn.Linear(4, 3)).double()
    for ids in (None, torch.tensor([1, 0, 2, 1, 1, 0])):
        check(model, curved, torch.randint(0, 9, (6, 5)), environments=ids)


def test_complex_gradients() -> None:
    model = Function(
        lambda s, x: s.h(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(s.w), n=6)),
        w=rand(4, 2), h=nn.Linear(6, 3),
    ).double()  # fmt: skip
    check(model, curved, rand(6, 6))


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_scaled_weights_of_as_many_rows_as_examples(scale: float | Tensor) -> None:
    model = Function(lambda s, x: F.linear(x, s.w * scale, s.b / 3), w=rand(6, 4), b=rand(6))
    check(model, curved, rand(6, 4))


def test_verify_where_there_is_no_proof() -> None:
    model = Function(lambda s, x: s.m(x).sin().mean(), m=nn.Linear(4, 3)).double()
    agreement = am.Agreement(model, RULE, check_mixing="never")
    assert agreement.verify(rand(6, 4), lambda model, x: model(x)).passed
    assert [line.uses for line in agreement.report()] == [1, 1]


def test_verify_leaves_gradients_of_other_parameters() -> None:
    model, free = nn.Linear(4, 3).double(), nn.Parameter(rand(3))
    free.grad = marker = torch.ones_like(free)
    agreement = am.Agreement(model, RULE, [*model.parameters(), free], check_mixing="never")
    verified = agreement.verify(rand(6, 4), lambda m, x: (m(x) + 0 * free).sin().mean())
    assert verified.passed
    assert free.grad is marker
    assert bool((marker == 1).all())


def test_a_hook_that_comes_later_is_refused() -> None:
    model = nn.Linear(4, 3).double()
    agreement, x = am.Agreement(model, RULE), rand(6, 4)
    with agreement():
        curved(model, x).backward()
    model.weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(RuntimeError, match="weight has a hook"), agreement():
        curved(model, x).backward()


def test_a_backward_pass_of_another_thread_is_noticed() -> None:
    model, x = nn.Linear(4, 3).double(), rand(6, 4)
    before = model.weight.grad = torch.ones_like(model.weight)

    def both() -> None:
        curved(model, x).backward()
        thread = threading.Thread(target=lambda: curved(model, x).backward())
        thread.start()
        thread.join()

    with pytest.raises(RuntimeError, match="was not seen"), am.Agreement(model, RULE)():
        both()
    assert model.weight.grad is before


def test_gradients_that_are_there_with_reentrant_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    model = Function(
        lambda s, x: s.b(checkpoint(s.m, s.a(x), use_reentrant=True)),
        a=nn.Linear(4, 4), m=nn.Linear(4, 4), b=nn.Linear(4, 3),
    ).double()  # fmt: skip
    agreement, x = am.Agreement(model, RULE), rand(6, 4)
    with agreement():
        curved(model, x).backward()
    once = [param.grad.clone() for param in model.parameters()]
    with agreement():
        curved(model, x).backward()
    for param, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(param.grad, 2 * grad)


def test_plans_do_not_grow_without_bound() -> None:
    model = Function(lambda s, x: s.h(s.e(x)[:, torch.randperm(3)].flatten(1)),
                     e=nn.Linear(4, 4), h=nn.Linear(12, 3)).double()  # fmt: skip
    agreement = am.Agreement(model, RULE)
    for width in range(1, 160):
        with agreement():
            F.pad(model(rand(3, 3, 4)), (0, width)).sin().mean().backward()
    assert len(agreement._setup.plans) <= 2 * 128  # for its sizes and for others, each


def test_nothing_is_held_after_detach() -> None:
    model = nn.Linear(4, 3).double()
    agreement = am.Agreement(model, am.optim.AndMaskSGD(model.parameters(), lr=0.1, tau=1.0))
    with agreement():
        curved(model, rand(6, 4)).backward()
    agreement.detach()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(RuntimeError, match="before detach"):
        agreement.report()


def test_inputs_that_refer_to_themselves() -> None:
    class Tree:
        def __init__(self, x: Tensor) -> None:
            self.x, self.kids = x, [self]

    model = Function(lambda s, tree: s.h(tree.x), h=nn.Linear(4, 3)).double()
    with am.Agreement(model, RULE)():
        curved(model, Tree(rand(6, 4))).backward()  # type: ignore[arg-type]
    assert model.h.weight.grad is not None


def test_large_ids_are_numbered() -> None:
    model = nn.Linear(4, 3).double()
    agreement = am.Agreement(model, RULE, keep_moments=True)
    with agreement(torch.tensor([0, 1, 10**12])):
        curved(model, rand(3, 4)).backward()
    assert agreement.moments[0].count == 3


def test_the_report_says_why() -> None:
    model = Function(
        lambda s, x: F.linear(s.e(x).mean(1), s.e.weight), e=nn.Embedding(9, 4)
    ).double()
    agreement = am.Agreement(model, RULE)
    with agreement():
        curved(model, torch.randint(0, 9, (6, 5))).backward()
    (line,) = agreement.report()
    assert line.uses == 2
    assert "several uses are added up" in line.path
