"""What Agreement has to equal: one forward and one backward pass per environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import andmask_ext as am

RULE = am.AndMask(tau=0.6, rescale=True)

# From a model and a batch (or the part of a batch that is an environment) to its mean loss.
Step = Callable[..., Tensor]


def members_of(environments: int | Tensor | None, examples: int) -> list[Tensor]:
    """Return the examples of each environment."""
    if isinstance(environments, Tensor):
        return [(environments == e).nonzero()[:, 0] for e in range(int(environments.max()) + 1)]
    return list(torch.arange(examples).chunk(examples if environments is None else environments))


def loop(
    model: nn.Module,
    step: Step,
    batch: Sequence[Tensor],
    environments: int | Tensor | None = None,
    dims: Sequence[int] | None = None,
    params: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the gradients ``[environments, *shape]`` of each parameter; ``model`` stays as it is.

    Args:
        model: the model.
        step: of a part of the batch.
        batch: tensors that hold the batch.
        environments: as in the context.
        dims: where the batch lies in each tensor of it; None: first.
        params: names; None: all that require gradients.
    """
    model = copy.deepcopy(model)
    model.zero_grad()
    dims = [0] * len(batch) if dims is None else dims
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    chosen = {n: p for n, p in named.items() if params is None or n in params}
    columns: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for members in members_of(environments, batch[0].shape[dims[0]]):
        part = [t.index_select(dim, members) for t, dim in zip(batch, dims, strict=True)]
        model.zero_grad()
        step(model, *part).backward()
        for name, param in chosen.items():
            columns[name].append(torch.zeros_like(param) if param.grad is None else param.grad)
    return {name: torch.stack(grads) for name, grads in columns.items()}


@contextmanager
def or_refused() -> Iterator[None]:
    """Let the engine refuse what it cannot do: what is within is exact, or raises by name."""
    try:
        yield
    except RuntimeError as error:
        if "Agreement" not in str(error):
            raise


def sure(grads: Tensor, below: float) -> Tensor:
    """Return where no sign hangs on rounding: each gradient is zero, or not below that.

    A gradient that is zero in the loop has to be zero in the engine, too.
    """
    return ~((grads != 0) & (grads.abs() <= below)).any(0)


def compare(
    name: str,
    grads: Tensor,
    got: Tensor | None,
    rule: am.rules.Rule,
    tolerance: float,
    largest: float = 0.0,
    moments: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Compare what the engine made of a parameter with what the rule makes of the loop's.

    Args:
        name: of the parameter.
        grads: ``[environments, *shape]``, of the loop.
        got: what is in ``.grad``.
        rule: the rule.
        tolerance: relative to the largest gradient.
        largest: gradient of any parameter.
        moments: the sum and the votes, where they are known.
    """
    total, votes = moments
    size = max(largest, float(grads.abs().max()), 0.1)
    certain = sure(grads, tolerance / 10 * size)
    if total is not None:
        error = (total - grads.sum(0)).abs().max()
        assert error <= tolerance * size * len(grads), (
            f"{name}: sums differ by {float(error):.3g} (gradients up to {size:.3g})"
        )
    if votes is not None:
        wrong = (votes != grads.sign().sum(0)) & certain
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} votes differ"
    if got is None:
        assert not grads.any(), f"{name}: no gradient, but the loop's are up to {size:.3g}"
        return
    assert got.shape == grads.shape[1:]
    if rule.rescale and not certain.all():
        return  # one coordinate moves all others
    expected = rule(grads)
    wrong = ((got - expected).abs() > tolerance * size) & certain
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} coordinates differ, by up to "
        f"{float((got - expected).abs()[certain].max()):.3g} (gradients up to {size:.3g})"
    )


def check(
    model: nn.Module,
    step: Step,
    *batch: Tensor,
    environments: int | Tensor | None = None,
    rule: am.rules.Rule = RULE,
    dims: Sequence[int] | None = None,
    agreement: am.Agreement | None = None,
    tolerance: float = 1e-10,
    total: bool = False,
    **options: Any,
) -> am.Agreement:
    """Compare one step under an Agreement with the loop, in moments and in gradients.

    Args:
        model: in float64.
        step: returns the mean loss over the batch that it is given; with ``total`` under an
            Agreement their sum is used, and ``loss_reduction="sum"``.
        batch: tensors that hold the batch.
        environments: as in the context.
        rule: aggregates.
        dims: where the batch lies in each tensor of it.
        agreement: one that has seen other batches, to be used again.
        tolerance: relative.
        total: see ``step``.
        options: of Agreement.
    """
    grads = loop(model, step, batch, environments, dims)
    if agreement is None:
        if total:
            options["loss_reduction"] = "sum"
        agreement = am.Agreement(model, rule, keep_moments=True, **options)
    model.zero_grad()
    examples = batch[0].shape[dims[0] if dims else 0]
    with agreement(environments):
        (step(model, *batch) * (examples if total else 1)).backward()
    assert len(agreement.moments) == 1
    moments = agreement.moments[0]
    assert moments.count == len(members_of(environments, examples))
    names = {id(param): name for name, param in model.named_parameters()}
    sums = dict(zip((names.get(id(p)) for p in agreement._setup.params), moments.sum, strict=True))
    votes: dict[str | None, Tensor | None] = {}
    if "votes" in moments.kinds:
        votes = dict(zip(sums, moments.votes, strict=True))
    params = dict(model.named_parameters())
    largest = max(float(stack.abs().max()) for stack in grads.values())
    for name, stack in grads.items():
        both = sums.get(name), votes.get(name)
        compare(name, stack, params[name].grad, rule, tolerance, largest, both)
    return agreement
