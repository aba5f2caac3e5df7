"""Mixtures of experts: each row is multiplied by the matrix of its expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext.agreement._groups import group_blocks, group_rows

from .exact_loop import check as check_in_float64
from .exact_loop import loop

EXPERTS, INTO, OUT = 4, 8, 16  # torch multiplies groups of rows of 16 bytes, not in float64
RULES = {
    "AndMask": am.AndMask(0.6),
    "SandMask": am.rules.SandMask(0.3),
    "GeometricMean": am.rules.GeometricMean(0.3),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as stored": lambda w: w,
    "transposed": lambda w: w.transpose(1, 2),
    "experts in the middle": lambda w: w.transpose(0, 1),
    "scaled": lambda w: 2 * w,
}
SHAPES = {
    "transposed": (EXPERTS, OUT, INTO),
    "experts in the middle": (INTO, EXPERTS, OUT),
}


check = partial(check_in_float64, tolerance=1e-4)


class Mixture(nn.Module):
    """Rows are sorted by expert, multiplied and put back, as transformers does.

    Args:
        view: from the parameter to the matrices ``[experts, INTO, OUT]``.
        multiply: multiplies rows by matrices, given where each expert's rows end.
        twice: use the matrices for two products.
    """

    def __init__(self, view: str, multiply: Callable[..., Tensor], twice: bool = False) -> None:
        super().__init__()
        shape = SHAPES.get(view, (EXPERTS, INTO, OUT))
        self.below = nn.Linear(INTO, INTO)
        self.experts = nn.Parameter(torch.randn(shape))
        self.view, self.multiply, self.twice = WEIGHTS[view], multiply, twice

    def forward(self, tokens: Tensor, routes: Tensor) -> Tensor:
        chosen = routes.flatten()
        order = chosen.argsort()
        rows = self.below(tokens).flatten(0, 1)[order]
        ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
        matrices = self.view(self.experts)
        products = self.multiply(rows, matrices, ends)
        if self.twice:
            products = products + self.multiply(rows.sin(), matrices, ends).cos()
        back = torch.zeros_like(products).index_copy(0, order, products)
        return back.unflatten(0, tokens.shape[:2])


def grouped(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(rows, matrices, offs=ends)


def one_by_one(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    parts = rows.tensor_split(ends[:-1].long())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def step(model: nn.Module, tokens: Tensor, routes: Tensor) -> Tensor:
    return torch.sin(model(tokens, routes)).flatten(1).sum(1).mean()


def batch(examples: int = 6, length: int = 5, used: int = EXPERTS) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, length, INTO), torch.randint(used, (examples, length))


def paths(agreement: am.Agreement, model: nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    return " ".join(agreement._setup.treatments[names.index("experts")].paths)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("view", WEIGHTS)
@pytest.mark.parametrize("environments", [None, 3, torch.tensor([0, 1, 1, 0, 2, 2])])
def test_grouped_products(rule: str, view: str, environments: int | Tensor | None) -> None:
    """Each step has other routes; in the last, experts have no rows at all."""
    model, agreement = Mixture(view, grouped), None
    for used in (EXPERTS, EXPERTS, 2):
        agreement = check(
            model, step, *batch(used=used), environments=environments, rule=RULES[rule],
            agreement=agreement,
        )  # fmt: skip
    assert agreement is not None
    found = paths(agreement, model)
    assert "once per environment" not in found
    direct = view != "scaled" and rule == "AndMask"
    assert ("at a time" in found) == (not direct)


@pytest.mark.parametrize("rule", RULES)
def test_one_product_for_each_expert(rule: str) -> None:
    model, agreement = Mixture("transposed", one_by_one), None
    for _ in range(2):
        agreement = check(model, step, *batch(), rule=RULES[rule], agreement=agreement)


@pytest.mark.parametrize("view", ["as stored", "scaled"])
def test_matrices_that_are_used_twice(view: str) -> None:
    check(Mixture(view, grouped, twice=True), step, *batch())


def test_several_contexts_before_the_gradients() -> None:
    """Experts that the first batch does not use begin with zeros."""
    model = Mixture("as stored", grouped)
    batches = [batch(used=2), batch(used=EXPERTS), batch(used=1)]
    grads = torch.cat([loop(model, step, one)["experts"] for one in batches])
    rule = am.AndMask(0.4)
    agreement = am.Agreement(model, rule)
    for number, one in enumerate(batches):
        with agreement(write_grads=number == 2):
            step(model, *one).backward()
    torch.testing.assert_close(model.experts.grad, rule(grads), rtol=1e-4, atol=1e-5)


def test_norms_and_scalar_products() -> None:
    model, data = Mixture("transposed", grouped), batch()
    grads = loop(model, step, data)["experts"].flatten(1)
    agreement = am.Agreement(model, am.AndMask(0.4))
    with agreement(gram=True):
        step(model, *data).backward()
    torch.testing.assert_close(
        agreement.gram["experts"].float(), grads @ grads.T, rtol=1e-4, atol=1e-5
    )


def test_under_autocast() -> None:
    """The matrices are cast to bfloat16, and so are the sums of their rows."""
    torch.manual_seed(0)
    model, data = Mixture("transposed", grouped), batch()
    model.view = lambda w: w.bfloat16().transpose(1, 2)
    model.multiply = lambda rows, *others: grouped(rows.bfloat16(), *others).float()
    agreement = am.Agreement(model, am.AndMask(0.0))
    with agreement():
        step(model, *data).backward()
    got, model.experts.grad = model.experts.grad, None
    step(model, *data).backward()
    torch.testing.assert_close(got, model.experts.grad, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("matrices", [2, 3])
def test_a_batch_of_matrices(matrices: int) -> None:
    """Each example is multiplied by every matrix."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below = nn.Linear(INTO, INTO)
            self.weight = nn.Parameter(torch.randn(matrices, INTO, OUT))

        def forward(self, tokens: Tensor, routes: Tensor) -> Tensor:
            rows = self.below(tokens).flatten(0, 1).expand(matrices, -1, -1)
            return torch.bmm(rows, self.weight).mean(0).unflatten(0, tokens.shape[:2])

    for rule in RULES.values():
        for environments in (None, 3):
            check(Ensemble(), step, *batch(), rule=rule, environments=environments)


def test_relu_between_two_products_leaves_rows_where_they_are() -> None:
    class Two(Mixture):
        def forward(self, tokens: Tensor, routes: Tensor) -> Tensor:
            hidden = F.relu(super().forward(tokens, routes))
            return super().forward(hidden[..., :INTO], routes.roll(1, 1))

    check(Two("as stored", grouped), step, *batch())


@pytest.mark.parametrize("counts", [(3, 5, 2), (0, 4, 0), (6,), (0, 0), (1, 1, 8)])
@pytest.mark.parametrize("environments", [1, 2, 5])
def test_blocks_of_rows_are_partitioned_as_one_by_one(
    counts: tuple[int, ...], environments: int
) -> None:
    ids = torch.randint(environments, (11,))  # the last rows are in no block
    blocks = group_blocks(ids, environments, counts)
    for rows, found in zip(ids[: sum(counts)].split(counts), blocks, strict=True):
        if not len(rows):
            assert found is None
            continue
        expected = group_rows(rows, environments)
        assert found is not None
        assert found.filled == expected.filled
        for environment in range(environments):
            assert (
                found.members(environment).tolist()
                == (rows == environment).nonzero()[:, 0].tolist()
            )
