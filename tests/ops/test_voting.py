"""Ops with a level instead of tau: transforms, compilation, derivatives, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import andmask_ext as am
from andmask_ext import reference

ops = torch.ops.andmask
VOTINGS: list[dict[str, Any]] = [
    {"fdr": 0.1},
    {"fdr": 0.1, "zeros": "abstain"},
    {"significance": 0.05},
    {"significance": 0.05, "zeros": "abstain"},
    {"tau": 0.5, "zeros": "abstain"},
]
votings = pytest.mark.parametrize("voting", VOTINGS, ids=str)
rescales = pytest.mark.parametrize("rescale", [False, True])


def gradients(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    grads = torch.randn(12, *shape, dtype=dtype)
    grads += (torch.rand(shape, dtype=dtype) < 0.3) * 2
    return grads * (torch.rand(12, *shape) < 0.9)


@votings
@rescales
def test_opcheck(voting: dict[str, Any], rescale: bool) -> None:
    options = {"rescale": rescale, **voting}
    for op in (ops.masked_mean, ops.agreement_mask):
        torch.library.opcheck(op.default, (gradients(5, 6),), options)
        torch.library.opcheck(op.default, (gradients(5, 6, dtype=torch.bfloat16),), options)
    grads = gradients(5, 6).requires_grad_()
    torch.library.opcheck(ops.masked_mean.default, (grads,), options)
    rule = am.AndMask(rescale=rescale, **voting)
    torch.library.opcheck(
        ops._aggregate.default, (gradients(4, 3), "and_mask", rule.arguments, rescale)
    )


@votings
@rescales
def test_the_derivative_is_that_of_a_fixed_mask(voting: dict[str, Any], rescale: bool) -> None:
    grads = gradients(40).requires_grad_()
    weights = torch.randn(40, dtype=torch.float64)
    expected = reference.agreement_mask(grads.detach(), rescale=rescale, **voting) * weights / 12
    out = am.ops.masked_mean(grads, rescale=rescale, **voting)
    (found,) = torch.autograd.grad((out * weights).sum(), grads)
    torch.testing.assert_close(found, expected.expand(12, 40))

    def loss(grads: Tensor) -> Tensor:
        return (am.ops.masked_mean(grads, rescale=rescale, **voting) * weights).sum()

    torch.testing.assert_close(torch.func.grad(loss)(grads.detach()), expected.expand(12, 40))
    tangent = torch.randn_like(grads)
    _, moved = torch.func.jvp(loss, (grads.detach(),), (tangent,))
    torch.testing.assert_close(moved, (expected * tangent).sum())


@votings
@rescales
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_tests_each_sample_by_itself(voting: dict[str, Any], rescale: bool, dim: int) -> None:
    batch = gradients(3, 30).movedim(1, dim)
    for function in (am.ops.masked_mean, am.ops.agreement_mask):
        found = torch.vmap(lambda g, f=function: f(g, rescale=rescale, **voting), in_dims=dim)(
            batch
        )
        expected = [function(one, rescale=rescale, **voting) for one in batch.unbind(dim)]
        assert torch.equal(found, torch.stack(expected))
    for rule in (am.rules.GeometricMean(rescale=rescale, **voting), am.rules.FedILC(**voting)):
        found = torch.vmap(rule, in_dims=dim)(batch)
        torch.testing.assert_close(found, torch.stack([rule(one) for one in batch.unbind(dim)]))


@votings
def test_compiles_and_exports(voting: dict[str, Any]) -> None:
    grads = gradients(5, 6, dtype=torch.float32)
    for function in (
        lambda g: am.ops.masked_mean(g, **voting),
        lambda g: ops.masked_mean(g, **voting),
        am.rules.MaskedAverage(**voting),
        am.rules.FedILC(**voting),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(grads), function(grads))

    class Module(torch.nn.Module):
        def forward(self, grads: Tensor) -> Tensor:
            return ops.masked_mean(grads, **voting)

    exported = torch.export.export(Module(), (grads,))
    assert torch.equal(exported.module()(grads), Module()(grads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.5, "fdr": 0.1}, "exactly one of tau .* but got tau=0.5, fdr=0.1"),
        ({"fdr": 0.1, "significance": 0.1}, "but got significance=0.1, fdr=0.1"),
        ({"fdr": 0.0}, r"fdr: expected a Python number in \(0, 1\), but got 0.0"),
        ({"significance": 1.0}, r"significance: expected a Python number in \(0, 1\), but got 1.0"),
        ({"fdr": float("nan")}, "fdr: .* but got nan"),
        ({"fdr": 0.1, "zeros": "skip"}, "zeros: expected 'count' or 'abstain', but got 'skip'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    names = ".*".join(name for name in options if name != "zeros" or options[name] == "skip")
    for call in (
        lambda: am.AndMask(**options),
        lambda: am.ops.masked_mean(torch.ones(2, 3), **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: am.optim.AndMaskSGD([parameter], **options),
        lambda: am.optim.EnvironmentWrapper(torch.optim.SGD([parameter], lr=1.0), **options),
    ):
        with pytest.raises(ValueError, match=names.split(".*")[-1]):
            call()
    with pytest.raises(RuntimeError, match="andmask::masked_mean: expected"):
        ops.masked_mean(torch.ones(2, 3), **options)


def test_wrong_types_are_named() -> None:
    for name in ("fdr", "significance"):
        with pytest.raises(TypeError, match=f"{name}: expected a Python number"):
            am.AndMask(**{name: "0.1"})
        with pytest.raises(TypeError, match=f"{name}: expected a Python number"):
            am.AndMask(**{name: True})


def test_rules_are_values() -> None:
    rule = am.AndMask(fdr=0.005, zeros="abstain")
    assert repr(rule) == "AndMask(fdr=0.005, zeros='abstain', rescale=False)"
    assert rule == am.AndMask(fdr=0.005, zeros="abstain") != am.AndMask(fdr=0.005)
    assert rule.moments == ("votes", "voters")
    assert am.AndMask(fdr=0.005).moments == ("votes",)
    assert am.rules.GeometricMean(0.5, zeros="abstain").moments == ("votes", "logs", "voters")
    assert len({rule, am.AndMask(fdr=0.005, zeros="abstain"), am.AndMask(0.5)}) == 2
