"""Exact aggregation for any model: one loss and one backward pass per environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ._checks import check_dtype, check_weight
from .moments import Moments
from .rules import Rule

__all__ = ["backward"]


def backward(
    losses: Sequence[Tensor] | Tensor,
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
    ``.grad``. A positive factor common to all losses scales the result of the AND-mask and leaves the
    mask alone, so ``GradScaler.scale`` may be applied to each of them. Rules that look at
    magnitudes otherwise (:class:`andmask_ext.SandMask`, :class:`andmask_ext.GeometricMean`) need
    true magnitudes: give ``weights=[1 / scaler.get_scale()] * d``, and do not unscale afterwards.
    If anything raises, no ``.grad`` has
    changed.

    Hooks: those of ``Tensor.register_hook`` see the gradient of each environment. Those of
    ``register_post_accumulate_grad_hook`` do not run, and so neither does the synchronisation of
    ``DistributedDataParallel`` and FSDP: every process would go its own way.

    Args:
        losses: one scalar loss per environment: a sequence, or a tensor of shape :math:`(d,)`.
            Losses that share a part of their graph (as the elements of one tensor do) each
            back-propagate through all of it.
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
    scalars = _check_losses(losses)
    graphs = [_nodes(loss) for loss in scalars]
    _check_graphs(graphs)
    leaves = _leaves(graphs) if params is None else _check_params(params, "params")
    if not leaves:
        raise ValueError("params: expected at least one leaf tensor that requires grad, but got 0")

    factors = _check_weights(weights, len(scalars))

    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        grads = _environment_grads(scalars, graphs, leaves)
        if isinstance(rule, Rule) and rule.moments is not None:
            updates = _stream(rule, grads, leaves, factors)
        else:
            updates = _stack(rule, grads, leaves, factors)
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


def _environment_grads(
    losses: list[Tensor], graphs: list[dict[Node, None]], leaves: list[Tensor]
) -> Iterator[Grads]:
    """Back-propagate one loss after the other; yield the gradients of its environment."""
    # A graph is freed once no later loss needs it: memory stays low, and compiled models insist.
    last_users = _last_users(graphs)
    for environment, (loss, graph) in enumerate(zip(losses, graphs, strict=True)):
        shared = any(last_users.get(node, 0) > environment for node in graph)
        grads = torch.autograd.grad(loss, leaves, retain_graph=shared, allow_unused=True)
        for index, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
            if leaf.grad is not None:
                raise RuntimeError(
                    f"losses[{environment}]: its backward pass writes to .grad by itself (a custom "
                    "autograd.Function that calls backward?); its gradients cannot be aggregated"
                )
            if grad is not None and grad.layout != torch.strided:
                raise TypeError(
                    f"losses[{environment}]: expected dense gradients, but got layout "
                    f"{str(grad.layout).removeprefix('torch.')} for parameter {index} of shape "
                    f"{tuple(leaf.shape)} (an embedding with sparse=True?)"
                )
        graph.clear()
        yield grads
        del grads


def _stream(
    rule: Rule, environments: Iterator[Grads], leaves: list[Tensor], weights: list[float]
) -> list[Tensor | None]:
    moments = Moments(leaves, rule.moments or ())
    for grads, weight in zip(environments, weights, strict=True):
        moments.add(grads, weight)
        del grads
    return rule.resolve(moments)


def _stack(
    rule: Callable[[Tensor], Tensor],
    environments: Iterator[Grads],
    leaves: list[Tensor],
    weights: list[float],
) -> list[Tensor | None]:
    stacks: list[Tensor | None] = [None] * len(leaves)  # [d, *shape] where any loss touches it
    for environment, (grads, weight) in enumerate(zip(environments, weights, strict=True)):
        for index, grad in enumerate(grads):
            stack = stacks[index]
            if grad is None:
                if stack is not None:
                    stack[environment].zero_()
                continue
            if stack is None:
                stack = stacks[index] = grad.new_empty((len(weights), *grad.shape))
                stack[:environment].zero_()
            stack[environment].copy_(grad if weight == 1 else grad * weight)
        del grads, grad
    updates: list[Tensor | None] = []
    with torch.no_grad():
        for index, leaf in enumerate(leaves):
            stack, stacks[index] = stacks[index], None
            updates.append(None if stack is None else _apply(rule, stack, leaf))
            del stack
    return updates


def _check_weights(weights: Sequence[float] | None, environments: int) -> list[float]:
    if weights is None:
        return [1.0] * environments
    found = list(weights)
    if len(found) != environments:
        raise ValueError(f"weights: expected {environments}, one per loss, but got {len(found)}")
    for weight in found:
        check_weight(weight)
    return found


def _check_losses(losses: Sequence[Tensor] | Tensor) -> list[Tensor]:
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
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses[{index}]: expected a Tensor, but got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"losses[{index}]: expected a scalar, but got shape {tuple(loss.shape)}"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{index}]: expected a loss that requires grad, but got one without a graph"
            )
    return scalars


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
        if param.grad is not None and param.grad.layout != torch.strided:
            raise TypeError(
                f"{name}[{index}].grad: expected a dense tensor, but got layout "
                f"{str(param.grad.layout).removeprefix('torch.')}"
            )
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


def _check_graphs(graphs: list[dict[Node, None]]) -> None:
    """Refuse what would hide parameters: they would get no gradient, and nobody would notice."""
    for index, graph in enumerate(graphs):
        if any(node.name() == "CheckpointFunctionBackward" for node in graph):
            raise ValueError(
                f"losses[{index}]: expected checkpoint(..., use_reentrant=False), but got "
                "use_reentrant=True, which hides parameters from the graph of the loss"
            )


def _leaves(graphs: list[dict[Node, None]]) -> list[Tensor]:
    nodes = dict.fromkeys(node for graph in graphs for node in graph)
    return _check_params([n.variable for n in nodes if hasattr(n, "variable")], "leaves of losses")


def _last_users(graphs: list[dict[Node, None]]) -> dict[Node, int]:
    """For every node that holds saved tensors, the last environment that goes through it."""
    return {
        node: environment
        for environment, graph in enumerate(graphs)
        for node in graph
        if not hasattr(node, "variable")
    }


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
