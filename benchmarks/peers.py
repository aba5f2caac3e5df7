"""The ways that exist to the AND-mask's gradient of one batch with many environments.

A contestant is a function of a model, a batch and the number of environments (equal groups of
consecutive examples; as many as examples: each is one). It returns a function that writes the
gradient to ``.grad`` of the model's parameters. What a library cannot do raises, with its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from models import Batch, loss
from torch import Tensor, nn

import andmask_ext as am

TAU = 0.6
Step = Callable[[], object]
Contestant = Callable[[nn.Module, Batch, int], Step]


def formula(grads: Tensor) -> Tensor:
    """Return what the authors' code makes of stacked gradients."""
    mask = (grads.sign().mean(0).abs() >= TAU).to(grads.dtype)
    return mask * grads.mean(0)


def apply_formula(
    params: Sequence[Tensor],
    stacks: Iterable[Tensor],
    aggregate: Callable[[Tensor], Tensor] = formula,
) -> None:
    """Write the masked gradients; ``stacks`` is asked for one parameter after the other."""
    with torch.no_grad():
        for param, stack in zip(params, stacks, strict=True):
            param.grad = aggregate(stack)


def means(per_example: Tensor, environments: int) -> Tensor:
    """Return the gradients of environments, given those of the loss of each example."""
    if len(per_example) == environments:
        return per_example
    return per_example.unflatten(0, (environments, -1)).mean(1)


def split(batch: Batch, environments: int) -> list[Batch]:
    return list(zip(*(part.chunk(environments) for part in batch), strict=True))


def clear(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad = None


def plain(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Forward and backward pass of the batch, without environments: the yardstick."""
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        loss(model, batch).backward()

    return step


def authors(model: nn.Module, batch: Batch, environments: int) -> Step:
    """A forward and a backward pass for each environment, a stack, the formula."""
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        rows = [torch.autograd.grad(loss(model, b), params) for b in split(batch, environments)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        del rows

        def stacks() -> Iterable[Tensor]:
            for column in columns:
                stack = torch.stack(column)
                column.clear()
                yield stack

        apply_formula(params, stacks())

    return step


def domainbed(model: nn.Module, batch: Batch, environments: int) -> Step:
    """DomainBed's AND-mask: one forward pass, and through its whole graph once per environment."""
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        parts = zip(model(batch[0]).chunk(environments), batch[1].chunk(environments), strict=True)
        rows = [
            torch.autograd.grad(F.cross_entropy(logits, labels), params, retain_graph=True)
            for logits, labels in parts
        ]
        apply_formula(params, (torch.stack(column) for column in zip(*rows, strict=True)))

    return step


def vmap(
    model: nn.Module,
    batch: Batch,
    environments: int,
    aggregate: Callable[[Tensor], Tensor] = formula,
) -> Step:
    """``torch.func``: ``vmap(grad(loss))`` over environments, the formula."""
    names, params = zip(*model.named_parameters(), strict=True)

    def one(values: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return F.cross_entropy(output, y)

    gradients = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0), randomness="error")
    parts = [part.unflatten(0, (environments, -1)) for part in batch]

    def step() -> None:
        clear(params)
        values = tuple(param.detach() for param in params)
        stacks = list(gradients(values, *parts))
        stacks.reverse()
        apply_formula(params, (stacks.pop() for _ in params), aggregate)

    return step


def vmap_and_op(model: nn.Module, batch: Batch, environments: int) -> Step:
    """The same, with the operator of ``andmask_ext`` in the place of the formula."""
    return vmap(model, batch, environments, am.AndMask(TAU))


def opacus(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Opacus' gradients per example, the formula."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    params, own = list(model.parameters()), list(wrapped.parameters())

    def step() -> None:
        clear(params)
        loss(wrapped, batch).backward()

        def stacks() -> Iterable[Tensor]:
            for param in own:
                stack, param.grad_sample, param.grad = param.grad_sample, None, None
                yield means(stack, environments)

        apply_formula(params, stacks())

    return step


def backpack(model: nn.Module, batch: Batch, environments: int) -> Step:
    """BackPACK's ``BatchGrad``, the formula."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    extended, criterion = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    params, own = list(model.parameters()), list(extended.parameters())
    examples = len(batch[1])

    def step() -> None:
        clear(params)
        with backpack(BatchGrad()):
            criterion(extended(batch[0]), batch[1]).backward()
        missing = [name for name, p in extended.named_parameters() if not hasattr(p, "grad_batch")]
        if missing:
            raise NotImplementedError(f"no gradients per example of {missing[0]}")

        def stacks() -> Iterable[Tensor]:
            for param in own:
                stack = param.grad_batch * examples  # of the mean loss
                del param.grad_batch
                param.grad = None
                yield means(stack, environments)

        apply_formula(params, stacks())

    return step


def torchjd(model: nn.Module, batch: Batch, environments: int) -> Step:
    """TorchJD's Jacobian of the environments' losses, the formula."""
    from torchjd.autojac import jac

    params = list(model.parameters())

    def step() -> None:
        clear(params)
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        stacks = list(jac(means(losses, environments), params))
        stacks.reverse()
        apply_formula(params, (stacks.pop() for _ in params))

    return step


def backward(model: nn.Module, batch: Batch, environments: int) -> Step:
    """``andmask_ext.backward``: a forward and a backward pass for each environment."""
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        losses = (loss(model, part) for part in split(batch, environments))
        am.backward(losses, am.AndMask(TAU), params)

    return step


def agreement(model: nn.Module, batch: Batch, environments: int) -> Step:
    """``andmask_ext.Agreement``: one forward and one backward pass."""
    context = am.Agreement(model, am.AndMask(TAU))
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        with context(environments):
            loss(model, batch).backward()

    return step


def plain_training(model: nn.Module, batch: Batch, environments: int) -> Step:
    """A whole step of plain training with torch's fused AdamW: the yardstick of whole steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def agreement_training(model: nn.Module, batch: Batch, environments: int) -> Step:
    """A whole step of ``Agreement`` with ``AndMaskAdamW``."""
    optimizer = am.optim.AndMaskAdamW(model.parameters(), lr=1e-5, tau=TAU)
    context = am.Agreement(model, optimizer)

    def step() -> None:
        with context(environments):
            loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PLAIN, EXACT, OURS = "plain", "authors' loop", "Agreement"
GRADIENTS: dict[str, Contestant] = {
    PLAIN: plain,
    OURS: agreement,
    "am.backward": backward,
    EXACT: authors,
    "DomainBed": domainbed,
    "vmap(grad)": vmap,
    "vmap(grad) + am.AndMask": vmap_and_op,
    "Opacus": opacus,
    "BackPACK": backpack,
    "TorchJD": torchjd,
}
PLAIN_STEP = "plain + AdamW(fused)"
STEPS: dict[str, Contestant] = {
    PLAIN_STEP: plain_training,
    "Agreement + AndMaskAdamW": agreement_training,
}
