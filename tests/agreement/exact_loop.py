"""What Agreement has to equal: one forward and one backward pass per environment."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import andmask_ext as am

RULE = am.AndMask(tau=0.6, rescale=True)

# From a model and a batch (or the part of a batch that is an environment) to its mean loss.
Step = Callable[..., Tensor]


@contextmanager
def one_example_is_known(examples: int, environments: int | Tensor | None) -> Iterator[None]:
    """Ignore the warning of a batch that is one example, and so one environment."""
    with warnings.catch_warnings():
        if examples == 1 and environments is None:
            warnings.filterwarnings("ignore", "Agreement: the batch has one example", UserWarning)
        yield


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


class OtherProcessor(TorchDispatchMode):
    """Moves each result by a few roundings, as another processor might.

    A whole number stays: a zero, a size, and the least number, by which masks hide scores.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        results = function(*args, **(kwargs or {}))
        if any(returned.alias_info for returned in function._schema.returns):
            return results  # a view, or in place
        return tree_map_only(Tensor, self.moved, results)

    def moved(self, result: Tensor) -> Tensor:
        if not result.is_floating_point():
            return result
        noise = torch.randn(result.shape, generator=self.generator, device="cpu").to(result)
        moved = result * (1 + 4 * torch.finfo(result.dtype).eps * noise)
        return torch.where(result == result.round(), result, moved)


def is_noise(grads: Tensor, floor: float) -> Tensor:
    """Return where a gradient is not zero, and so small that its sign hangs on rounding."""
    return (grads != 0) & (grads.abs() <= floor)


def difference(
    grads: Tensor,
    got: Tensor | None,
    rule: am.rules.Rule,
    tolerance: float,
    size: float,
    moments: tuple[Tensor | None, Tensor | None],
    unsure: Tensor,
) -> str | None:
    """Say what differs; ``unsure`` are the gradients whose sign may be any. See `compare`."""
    total, votes = moments
    floor, certain = tolerance / 10 * size, ~unsure.any(0)
    error = torch.zeros_like(grads[0]) if total is None else (total - grads.sum(0)).abs()
    if not (error <= tolerance * size * len(grads)).all():  # NaN is an error, too
        return f"sums differ by {float(error.max()):.3g}"
    if votes is not None:
        distance = (votes - grads.sign().where(~unsure, 0).sum(0)).abs()
        right = (distance == 0) | (distance <= unsure.sum(0)) & (error <= floor * len(grads))
        if not right.all():
            return f"{int((~right).sum())} of {right.numel()} votes differ"
    if got is None:
        return "no gradient" if grads.any() else None
    assert got.shape == grads.shape[1:]
    scale = 1.0
    if rule.rescale and not certain.all():  # one coordinate scales all others
        rule = replace(rule, rescale=False)
        plain = rule(grads)[certain]
        if plain.any():
            scale = max(1.0, float((got[certain] * plain).sum() / plain.square().sum()))
    error = (got - scale * rule(grads)).abs().where(certain | ~got.isfinite(), 0)
    right = error <= tolerance * size * scale
    if not right.all():
        return (
            f"{int((~right).sum())} of {right.numel()} coordinates differ, by up to "
            f"{float(error.max()):.3g}"
        )
    return None


def compare(
    name: str,
    grads: Tensor,
    got: Tensor | None,
    rule: am.rules.Rule,
    tolerance: float,
    largest: float = 0.0,
    moments: tuple[Tensor | None, Tensor | None] = (None, None),
    elsewhere: Callable[[], Iterable[Tensor]] = tuple,
) -> None:
    """Compare what the engine made of a parameter with what the rule makes of the loop's.

    The sign of a gradient below the floor, a tenth of the tolerance, is a matter of rounding: such
    an environment may vote as it likes, if the sums agree within the floor. A gradient of exactly
    zero is compared, as that of a dead ReLU or of an unused row has to be zero in the engine, too.
    But a gradient that is zero only mathematically (of the keys' bias in an attention) can be
    exactly zero by chance: it is one that is noise on other processors.

    Args:
        name: of the parameter.
        grads: ``[environments, *shape]``, of the loop.
        got: what is in ``.grad``.
        rule: the rule.
        tolerance: relative to the largest gradient.
        largest: gradient of any parameter.
        moments: the sum and the votes, where they are known.
        elsewhere: returns the loop's gradients on other processors, one after the other, if
            something differs.
    """
    size = max(largest, float(grads.abs().max()), 0.1)
    floor = tolerance / 10 * size
    unsure = is_noise(grads, floor)
    fault = difference(grads, got, rule, tolerance, size, moments, unsure)
    if fault:
        for other in elsewhere():
            unsure |= (grads == 0) & is_noise(other, floor)
            fault = difference(grads, got, rule, tolerance, size, moments, unsure)
            if not fault:
                break
    assert not fault, f"{name}: {fault} (gradients up to {size:.3g})"


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
    with one_example_is_known(examples, environments), agreement(environments):
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

    @cache
    def on_another(seed: int) -> dict[str, Tensor]:
        with OtherProcessor(seed):
            return loop(model, step, batch, environments, dims)

    for name, stack in grads.items():
        both, got = (sums.get(name), votes.get(name)), params[name].grad
        compare(
            name, stack, got, rule, tolerance, largest, both,
            lambda name=name: (on_another(seed)[name] for seed in range(8)),
        )  # fmt: skip
    return agreement
