"""Exact aggregation for any model: one loss and one backward pass per environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ._checks import check_dense_grad, check_dtype, check_weight
from .moments import Moments
from .rules import Rule

__all__ = ["backward"]


def backward(
    losses: Iterable[Tensor] | Tensor,
    rule: Callable[[Tensor], Tensor],
    params: Iterable[Tensor] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Add the gradient that a rule makes of several environments to ``param.grad``.

    Takes the place of ``loss.backward()``. Each loss is back-propagated by itself, so the result is
    exact for any model: batch norm in training mode, tied weights, checkpointing
    (``use_reentrant=False``), autocast and ``torch.compile`` included. It costs one backward pass
    per environment. With a rule on moments (``rule.moments`` is not None) each gradient is added to
    :class:`andmask_ext.Moments` and freed: the memory is that of plain training and the moments,
    however many environments there are. Other rules need the gradients of all environments at once.
    As after ``loss.backward()``, a graph is freed once its pass is done; that of a loss which
    shares a part with a later one stays until the losses are released.

    A parameter that an environment's loss does not touch has gradient zero there, which is a vote
    for neither sign: with ``tau=1`` it will not move. A parameter that no loss touches keeps its
    ``.grad``. A positive factor common to all losses scales the result of the AND-mask and leaves
    the mask alone, so ``GradScaler.scale`` may be applied to each of them. Rules that look at
    magnitudes otherwise (:class:`andmask_ext.rules.SandMask`,
    :class:`andmask_ext.rules.GeometricMean`) need true magnitudes: give
    ``weights=[1 / scaler.get_scale()] * d``, and do not unscale afterwards. If anything raises, no
    ``.grad`` has changed.

    Hooks: those of ``Tensor.register_hook`` see the gradient of each environment. Those of
    ``register_post_accumulate_grad_hook`` do not run, and so neither does the synchronisation of
    ``DistributedDataParallel`` and FSDP: every process would go its own way.

    Args:
        losses: one scalar loss per environment: a sequence, a tensor of shape :math:`(d,)`, or an
            iterator. Losses of a sequence may share a part of their graph; each back-propagates
            through all of it. An iterator is asked for a loss only when the one before has been
            back-propagated, so that only one graph is in memory at a time; it needs ``params``.
        rule: a rule such as :class:`andmask_ext.AndMask`, or any callable that maps stacked
            gradients ``[d, *shape]`` to one gradient ``[*shape]``; it is called once per parameter,
            without gradient tracking.
        params: the leaf tensors to give gradients to; those that do not require grad are passed
            over. Default: every leaf that the losses depend on.
        weights: one positive factor per environment for its gradients, as if its loss had been
            multiplied by it. Environments of n_e examples, N in all, have ``d * n_e / N`` if their
            unmasked mean is to be the gradient of the pooled loss.

    Raises:
        TypeError: ``losses`` or ``params`` cannot be iterated over or hold something else than
            tensors, a gradient is sparse or of an unsupported dtype, or ``rule`` is not callable or
            returns no dense tensor.
        ValueError: there is no loss or no parameter, a loss is not scalar, does not require
            grad or uses reentrant checkpointing, a parameter is not a leaf, ``rule`` returns
            another shape or device, or the weights are not as many as the losses or not positive.
        RuntimeError: a backward pass writes to ``.grad`` by itself, behind the back of this
            function.

    Example:
        >>> import torch, andmask_ext
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> losses = [(weight * x).sum() for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]])]
        >>> andmask_ext.backward(losses, andmask_ext.AndMask(tau=1.0))
        >>> weight.grad
        tensor([2., 0.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    if not callable(rule):
        raise TypeError(f"rule: expected a callable, but got {type(rule).__name__}")
    if isinstance(rule, type):
        raise TypeError(f"rule: expected a rule such as {rule.__name__}(), but got the class")
    if isinstance(losses, Iterator):
        if params is None:
            raise ValueError("params: expected the leaf tensors, as losses is an iterator")
        environments = _one_after_the_other(losses)
        leaves = _check_params(params, "params")
    else:
        scalars = _check_losses(losses)
        graphs = [_nodes(loss) for loss in scalars]
        _check_graphs(graphs)
        leaves = _leaves(graphs) if params is None else _check_params(params, "params")
        # A graph is freed once no later loss needs it: compiled models insist on that.
        environments = zip(scalars, _shared(graphs), strict=True)
        if weights is not None and len(weights) != len(scalars):
            raise ValueError(
                f"weights: expected {len(scalars)}, one per loss, but got {len(weights)}"
            )
        del graphs
    if not leaves:
        raise ValueError("params: expected at least one leaf tensor that requires grad, but got 0")
    for weight in weights or ():
        check_weight(weight)

    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        grads = _weighted(_environment_grads(environments, leaves), weights)
        if isinstance(rule, Rule) and rule.moments is not None:
            updates = _stream(rule, grads, leaves)
        else:
            updates = _stack(rule, grads, leaves)
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad

    with torch.no_grad():
        for leaf, update in zip(leaves, updates, strict=True):
            if update is None:
                continue
            if leaf.grad is None:
                leaf.grad = update
            else:
                leaf.grad += update


Grads = tuple[Tensor | None, ...]


def _one_after_the_other(losses: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    for index, loss in enumerate(losses):
        _check_loss(loss, index)
        _check_graphs([_nodes(loss)], index)
        yield loss, False


def _environment_grads(
    losses: Iterable[tuple[Tensor, bool]], leaves: list[Tensor]
) -> Iterator[Grads]:
    """Back-propagate one loss after the other; yield the gradients of its environment."""
    for environment, (loss, keep_graph) in enumerate(losses):
        grads = torch.autograd.grad(loss, leaves, retain_graph=keep_graph, allow_unused=True)
        del loss
        for index, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
            if leaf.grad is not None:
                raise RuntimeError(
                    f"losses[{environment}]: its backward pass writes to .grad by itself (a custom "
                    "autograd.Function that calls backward?); its gradients cannot be aggregated"
                )
            if grad is not None:
                check_dense_grad(f"losses[{environment}], parameter {index}", grad)
        yield grads
        del grads, grad


def _weighted(
    environments: Iterator[Grads], weights: Sequence[float] | None
) -> Iterator[tuple[Grads, float]]:
    count = 0
    for grads in environments:
        if weights is not None and count == len(weights):
            raise ValueError(f"weights: expected one per loss, but got only {count}")
        yield grads, 1.0 if weights is None else weights[count]
        count += 1
        del grads
    if count == 0:
        raise ValueError("losses: expected at least one loss, but got 0")
    if weights is not None and count < len(weights):
        raise ValueError(f"weights: expected {count}, one per loss, but got {len(weights)}")


def _stream(
    rule: Rule, environments: Iterator[tuple[Grads, float]], leaves: list[Tensor]
) -> list[Tensor | None]:
    moments = Moments(leaves, rule.moments or ())
    for grads, weight in environments:
        moments.add(grads, weight)
        del grads
    return rule._update_in_place(moments)


def _stack(
    rule: Callable[[Tensor], Tensor],
    environments: Iterator[tuple[Grads, float]],
    leaves: list[Tensor],
) -> list[Tensor | None]:
    columns: list[list[Tensor | None]] = [[] for _ in leaves]  # per parameter: d gradients
    for grads, weight in environments:
        for column, grad in zip(columns, grads, strict=True):
            column.append(grad if grad is None or weight == 1 else grad * weight)
        del grads, grad
    updates: list[Tensor | None] = []
    with torch.no_grad():
        for column, leaf in zip(columns, leaves, strict=True):
            if all(grad is None for grad in column):
                updates.append(None)
                continue
            stack = torch.stack([torch.zeros_like(leaf) if g is None else g for g in column])
            column.clear()
            updates.append(_apply(rule, stack, leaf))
            del stack
    return updates


def _check_losses(losses: Iterable[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                "losses: expected a sequence of scalar losses or a tensor of shape (d,), "
                f"but got shape {tuple(losses.shape)}"
            )
        with torch.enable_grad():
            scalars = list(losses.unbind())
    else:
        scalars = _as_list(losses, "losses")
    if not scalars:
        raise ValueError("losses: expected at least one loss, but got 0")
    for index, loss in enumerate(scalars):
        _check_loss(loss, index)
    return scalars


def _check_loss(loss: object, index: int) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"losses[{index}]: expected a Tensor, but got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"losses[{index}]: expected a scalar, but got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            f"losses[{index}]: expected a loss that requires grad, but got one without a graph"
        )


def _check_params(params: Iterable[Tensor], name: str) -> list[Tensor]:
    leaves: dict[int, Tensor] = {}  # by identity: tied weights may be listed twice
    for index, param in enumerate(_as_list(params, name)):
        if not isinstance(param, Tensor):
            raise TypeError(f"{name}[{index}]: expected a Tensor, but got {type(param).__name__}")
        if not param.is_leaf:
            raise ValueError(f"{name}[{index}]: expected a leaf tensor, but got a computed one")
        if not param.requires_grad:
            continue
        check_dtype(f"{name}[{index}] of shape {tuple(param.shape)}", param)
        if param.grad is not None:
            check_dense_grad(f"{name}[{index}].grad", param.grad)
        leaves[id(param)] = param
    return list(leaves.values())


def _as_list(values: Iterable[Tensor], name: str) -> list[Tensor]:
    if isinstance(values, Tensor) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name}: expected an iterable of tensors, but got one {type(values).__name__}"
        )
    return list(values)


def _nodes(loss: Tensor) -> dict[Node, None]:
    """Return every autograd node below ``loss``, in a reproducible order."""
    root = get_gradient_edge(loss).node
    found = {root: None}
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in found:
                found[node] = None
                stack.append(node)
    return found


def _check_graphs(graphs: list[dict[Node, None]], first: int = 0) -> None:
    """Refuse what would hide parameters: they would get no gradient, and nobody would notice."""
    for index, graph in enumerate(graphs, first):
        if any(node.name() == "CheckpointFunctionBackward" for node in graph):
            raise ValueError(
                f"losses[{index}]: expected checkpoint(..., use_reentrant=False), but got "
                "use_reentrant=True, which hides parameters from the graph of the loss"
            )


def _leaves(graphs: list[dict[Node, None]]) -> list[Tensor]:
    nodes = dict.fromkeys(node for graph in graphs for node in graph)
    return _check_params([n.variable for n in nodes if hasattr(n, "variable")], "leaves of losses")


def _shared(graphs: list[dict[Node, None]]) -> list[bool]:
    """Whether a later loss goes through any node of a graph that holds saved tensors."""
    last_users = {
        node: environment
        for environment, graph in enumerate(graphs)
        for node in graph
        if not hasattr(node, "variable")
    }
    return [
        any(last_users.get(node, 0) > environment for node in graph)
        for environment, graph in enumerate(graphs)
    ]


def _apply(rule: Callable[[Tensor], Tensor], stack: Tensor, leaf: Tensor) -> Tensor:
    update = rule(stack)
    if not isinstance(update, Tensor):
        raise TypeError(f"rule: expected it to return a Tensor, but got {type(update).__name__}")
    if update.shape != leaf.shape:
        raise ValueError(
            f"rule: expected it to return shape {tuple(leaf.shape)} for grads of shape "
            f"{tuple(stack.shape)}, but got {tuple(update.shape)}"
        )
    if update.layout != torch.strided:
        raise TypeError(f"rule: expected it to return a dense tensor, but got {update.layout}")
    if update.device != leaf.device:
        raise ValueError(
            f"rule: expected it to return a tensor on {leaf.device}, but got one on {update.device}"
        )
    # A copy has the layout and dtype of the parameter, and shares memory with nothing.
    return torch.empty_like(leaf).copy_(update)
