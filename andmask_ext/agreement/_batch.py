"""The batch of a backward pass: its partitions, and what a pass cannot be right with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .._checks import DTYPES
from .._dtypes import dtype_name
from .._notices import warn_once
from ._anchors import Anchor
from ._forward import ForwardRecorder
from ._graph import Graph
from ._groups import Checked, Groups, make_groups
from ._losses import is_scaled, losses_that_are_no_mean
from ._setup import Setup
from ._uneven import amounts_of_loss

# The key of the metadata of a node that has been in a backward pass: of which context, and which.
_PASS = "andmask_ext.pass"


@dataclass(frozen=True)
class BatchOptions:
    """What the user said of the batch of a context.

    Attributes:
        environments: as :func:`check_environments` returned it.
        size: the number of examples, or None.
        loss_scale: the factor by which the loss has been multiplied.
        accumulates: whether the context adds to others of the same step.
    """

    environments: Checked
    size: int | None
    loss_scale: float
    accumulates: bool

    @property
    def rows(self) -> int:
        """The number of rows that the user gave; 0: not given."""
        return len(self.environments) if isinstance(self.environments, Tensor) else self.size or 0


def make_batches(setup: Setup, recorder: ForwardRecorder, batch: BatchOptions) -> list[Groups]:
    """Return the partitions of the batch. There are several if its parts differ in size.

    Args:
        setup: the model.
        recorder: the calls of the model.
        batch: what the user said of the batch.

    Raises:
        RuntimeError: the size of the batch is not known, or there are several.
        ValueError: the examples cannot be split into these environments.
    """
    environments, batch_size = batch.environments, batch.size
    sizes = recorder.sizes() if batch_size is None else [batch_size]
    if isinstance(environments, Tensor):
        given = recorder.all_sizes() if batch_size is None else {batch_size}
        return _batches_of_ids(environments, sizes, given)
    if not sizes:
        raise RuntimeError(
            "Agreement: expected the model to be called inside the context, before backward: "
            "its first input tells the size of the batch; or pass batch_size=... to the "
            "context, or the environment of each example"
        )
    if len(sizes) > 1 and environments is None:
        raise RuntimeError(
            "Agreement: parts of the model were called with batches of different sizes, "
            f"{', '.join(map(str, sizes))}, so one example cannot be one environment; pass a "
            "number of environments that divides them, each of which then has its share of "
            "every batch; or batch_size=... of the one that counts; or use "
            "andmask_ext.backward, with one loss per environment"
        )
    single = sizes == [1] and batch_size is None and environments is None
    if single and not setup.partitions:  # the last batch of an epoch may be so small
        warn_once(
            setup,
            "Agreement: the batch has one example, so there is one environment and nothing to "
            "agree on; if the batch is packed into one row, pass the environment of each "
            "token; if its size cannot be seen, pass batch_size=... to the context",
        )
    return [setup.groups(environments, size) for size in sizes]


def _batches_of_ids(ids: Tensor, sizes: list[int], given: set[int]) -> list[Groups]:
    if given and len(ids) not in given:
        raise ValueError(
            "environments: expected one id for each example of the batch, of "
            f"{', '.join(map(str, sizes))}, but got {len(ids)}; if the model takes several views "
            "of each example in one call, one after the other, pass ids.repeat(views) to the "
            "context; if its first input does not tell the size of the batch, pass "
            f"batch_size={len(ids)}, too; verify, which passes one id for each example of its "
            "batch, cannot compare such models: compare with andmask_ext.backward"
        )
    groups = make_groups(ids, len(ids))
    if groups.environments in (1, groups.examples):
        return [groups]
    # A model may pool rows into one output for each environment, as graph networks do.
    return [groups, make_groups(None, groups.environments)]


def refuse_batch_norms(setup: Setup, modules: Sequence[nn.Module]) -> None:
    """Raise RuntimeError if layers have taken statistics over all environments."""
    if not modules:
        return
    names = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in setup.model.named_modules()
        if any(module is one for one in modules)
    ]
    raise RuntimeError(
        f"Agreement: {', '.join(names)} takes statistics over all environments; convert the "
        "model with andmask_ext.nn.convert_batchnorm(model), which takes them in each "
        "environment, or use andmask_ext.backward with one forward pass per environment"
    )


def note_loss(
    setup: Setup,
    graph: Graph,
    groups: Groups,
    batch: BatchOptions,
    outputs: Sequence[Tensor],
    grad_scaler: torch.amp.GradScaler | None,
) -> Tensor | None:
    """Return how much each environment counts in a loss that is seen to divide by it.

    It warns once if the loss is seen to be no mean over the examples, or no sum.

    Args:
        setup: the model.
        graph: the graph of the loss.
        groups: the partition of the examples of the loss.
        batch: what the user said of the batch.
        outputs: of the model.
        grad_scaler: the scaler of the loss, or None.
    """
    nodes = [graph.nodes[root] for root in graph.roots]
    dim = setup.batch_dim if setup.output_batch_dim is None else setup.output_batch_dim
    amounts = None
    if setup.reduction == "mean":
        known = {output.grad_fn for output in outputs if output.grad_fn is not None}
        scale = None if grad_scaler is None else grad_scaler.get_scale()
        amounts = amounts_of_loss(nodes, groups, known, dim, scale)
    if any(node._input_metadata[0].device.type != "cpu" for node in nodes):
        return amounts  # for warnings more would have to be read from the device
    if batch.accumulates and batch.loss_scale == 1.0 and any(map(is_scaled, nodes)):
        warn_once(
            setup,
            "Agreement: expected the mean loss of each micro-batch, as environments are averaged "
            "already, but the loss is divided or multiplied by a number; leave it out, or pass "
            "loss_scale=... to the context, such as 1 / k for a loss that is divided by k",
        )
    message = losses_that_are_no_mean(nodes, groups, dim, setup.reduction, amounts is not None)
    if message is not None:
        warn_once(setup, message)
    return amounts


def note_second_pass(
    setup: Setup, uses: Sequence[Node], context: int, number: int, stale: bool
) -> None:
    """Warn once if a forward pass has a second backward pass in the same context.

    Args:
        setup: what the warning is about.
        uses: the nodes of the backward pass that use parameters.
        context: the number of the context.
        number: that of the pass in it.
        stale: whether the model has not been called since the last pass.
    """
    metadata: list[dict[str, tuple[int, int]]] = [node.metadata for node in uses]  # type: ignore[misc]
    before = {one[_PASS] for one in metadata if _PASS in one}
    if stale and any(other == context and earlier < number for other, earlier in before):
        warn_once(
            setup,
            "Agreement: expected one backward pass for each forward pass, but one has got another, "
            "so its examples count as environments once more, and all are averaged; for several "
            "losses of the same outputs use one pass of their sum: `(a + b).backward()`",
        )
    for one in metadata:
        one[_PASS] = context, number


def refuse_new_params(setup: Setup, others: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a parameter takes part that did not when the Agreement was made."""
    names = setup.names
    new = {id(o) for o in others if isinstance(o, nn.Parameter) and id(o) not in names}
    for name, param in setup.model.named_parameters() if new else ():
        if id(param) in new and param.dtype not in DTYPES:
            raise TypeError(
                f"Agreement: expected {name} to stay without gradients, as when the Agreement was "
                f"made, but it requires them, and its dtype {dtype_name(param.dtype)} cannot be "
                "aggregated; freeze it again, or make an Agreement with a rule and params= without "
                "it, which leaves it its plain gradient"
            )
        if id(param) in new:
            raise RuntimeError(
                f"Agreement: {name} was not in the model when the Agreement was made, so it "
                "would get its plain gradient; make a new Agreement, and a new optimizer over "
                "the parameters that the model has now"
            )


def weights_of(
    groups: Groups, reduction: str, scale: float, amounts: Tensor | None = None
) -> list[float]:
    """Return a factor for the gradient of each environment, or one for all.

    Args:
        groups: the partition of the examples that the loss is the mean or sum of.
        reduction: ``"mean"`` or ``"sum"``.
        scale: the scale of the loss.
        amounts: how much each environment counts in the mean. None: by its examples.
    """
    if amounts is not None:  # an environment that does not count has no gradient
        total = float(amounts.sum()) / scale
        return [total / amount if amount else 1.0 for amount in amounts.tolist()]
    factor = (groups.examples if reduction == "mean" else 1.0) / scale
    if groups.size is not None:
        return [factor / groups.size]
    return [factor / size for size in groups.sizes.tolist()]


def shares_of(groups: Groups, reduction: str) -> Tensor:
    """Return the share of each environment in a term of the loss that all of them have."""
    if reduction == "sum":
        return torch.ones(groups.environments, dtype=torch.float64)
    return groups.sizes.double() / groups.examples


def batch_of_loss(anchors: Sequence[Anchor], batches: Sequence[Groups], reduction: str) -> int:
    """Return the number of the partition of the examples that the loss is the mean or sum of.

    Raises:
        RuntimeError: environments have other shares in one output than in another.
    """
    found = sorted({anchor.partition for anchor in anchors})
    if len({tuple(weights_of(batches[number], reduction, 1.0)) for number in found}) > 1:
        raise RuntimeError(
            "Agreement: the loss is made of outputs of different sizes, in which the "
            "environments have different shares, so they have no common mean; let the model "
            "return outputs of one size, or use andmask_ext.backward"
        )
    return found[0] if found else 0
