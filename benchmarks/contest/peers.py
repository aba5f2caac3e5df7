"""The ways that exist to the AND-mask's gradient of one batch with many environments.

A contestant is a function of a model, a batch and the number of environments (equal groups of
consecutive examples; as many as examples: each is one). It returns a function that writes the
gradient to ``.grad`` of the model's parameters. What a library cannot do raises, with its reason.
Libraries other than torch are imported when their contestant is made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..measuring import Step
from .models import Batch, loss

TAU = 0.6
Contestant = Callable[[nn.Module, Batch, int], Step]
# Contestant: the module to import, and the name under which pip knows it.
LIBRARIES = {
    "Opacus": ("opacus", "opacus"),
    "BackPACK": ("backpack", "backpack-for-pytorch"),
    "TorchJD": ("torchjd", "torchjd"),
}


def versions() -> dict[str, str | None]:
    """Return the versions of the other libraries, None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name, (_, package) in LIBRARIES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def formula(grads: Tensor) -> Tensor:
    """Return what the authors' code makes of stacked gradients."""
    mask = (grads.sign().mean(0).abs() >= TAU).to(grads.dtype)
    return mask * grads.mean(0)


def apply_formula(
    params: Sequence[Tensor],
    stacks: Iterable[Tensor],
    aggregate: Callable[[Tensor], Tensor] = formula,
) -> None:
    """Write the masked gradients; stacks are asked for one parameter after the other."""
    with torch.no_grad():
        for param, stack in zip(params, stacks, strict=True):
            param.grad = aggregate(stack)


def means(per_example: Tensor, environments: int) -> Tensor:
    """Return the gradients or losses of environments, given those of single examples."""
    if len(per_example) == environments:
        return per_example
    return per_example.reshape(environments, -1, *per_example.shape[1:]).mean(1)


def split(batch: Batch, environments: int) -> list[Batch]:
    """Return the batches of the environments."""
    inputs, labels = (part.chunk(environments) for part in batch)
    return list(zip(inputs, labels, strict=True))


def clear(params: Sequence[Tensor]) -> None:
    """Forget gradients."""
    for param in params:
        param.grad = None


def plain(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Make a forward and a backward pass without environments: the yardstick."""
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        loss(model, batch).backward()

    return step


def authors(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Make a forward and a backward pass for each environment, a stack, the formula."""
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
    """Do as DomainBed: one forward pass, and back through its whole graph for each environment."""
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
    """Use ``torch.func``: ``vmap(grad(loss))`` over environments, the formula."""
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
    """Do the same with the operator of ``andmask_ext`` in the place of the formula."""
    return vmap(model, batch, environments, am.AndMask(TAU))


def opacus(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Use Opacus' gradients per example, the formula.

    A copy of the model, whose hooks would stay, is made; peak memory includes it.
    """
    wrapped = import_module("opacus").GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    params = list(model.parameters())
    own: list[Any] = list(wrapped.parameters())

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
    """Use BackPACK's ``BatchGrad``, the formula.

    A copy of the model, whose hooks would stay, is made; peak memory includes it.
    """
    library, extensions = import_module("backpack"), import_module("backpack.extensions")
    extended = library.extend(copy.deepcopy(model))
    criterion = library.extend(nn.CrossEntropyLoss())
    params = list(model.parameters())
    own: list[Any] = list(extended.parameters())
    examples = len(batch[1])

    def step() -> None:
        clear(params)
        with library.backpack(extensions.BatchGrad()):
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
    """Use TorchJD's Jacobian of the environments' losses, the formula."""
    jacobian = import_module("torchjd.autojac").jac
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        stacks = list(jacobian(means(losses, environments), params))
        stacks.reverse()
        apply_formula(params, (stacks.pop() for _ in params))

    return step


def backward(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Use ``andmask_ext.backward``: a forward and a backward pass for each environment."""
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        losses = (loss(model, part) for part in split(batch, environments))
        am.backward(losses, am.AndMask(TAU), params)

    return step


def agreement(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Use ``andmask_ext.Agreement``: one forward and one backward pass."""
    context = am.Agreement(model, am.AndMask(TAU))
    params = list(model.parameters())

    def step() -> None:
        clear(params)
        with context(environments):
            loss(model, batch).backward()

    return step


def plain_training(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Train plainly with torch's fused AdamW: the yardstick of whole steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def agreement_training(model: nn.Module, batch: Batch, environments: int) -> Step:
    """Train with ``Agreement`` and ``AndMaskAdamW``: a whole step."""
    optimizer = am.optim.AndMaskAdamW(model.parameters(), lr=1e-5, tau=TAU)
    context = am.Agreement(model, optimizer)

    def step() -> None:
        with context(environments):
            loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PLAIN, EXACT, OURS = "plain", "authors' loop", "Agreement"
PLAIN_STEP, OUR_STEP = "plain + AdamW(fused)", "Agreement + AndMaskAdamW"
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
STEPS: dict[str, Contestant] = {
    PLAIN_STEP: plain_training,
    OUR_STEP: agreement_training,
}
