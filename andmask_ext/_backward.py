"""Exact aggregation for any model, with one loss and one backward pass per environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ._checks import check_dense_grad, check_dtype, check_weight
from ._loss_nodes import SAME, SCALINGS, TERMS, ends
from ._notices import warn_of_processes, warn_once
from ._pending import Hook
from .moments import Moments
from .rules import Rule
from .rules._filtering import GramRule

__all__ = ["backward"]


def backward(
    losses: Iterable[Tensor] | Tensor,
    rule: Callable[[Tensor], Tensor],
    params: Iterable[Tensor] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """Aggregate the gradients of several environments, and add the result to ``param.grad``.

    Call it instead of ``loss.backward()``. It back-propagates each loss separately, so the result
    is exact for any model. That includes batch norm in training mode, tied weights, checkpointing
    (``use_reentrant=False``), autocast and ``torch.compile``. The cost is one backward pass per
    environment. If anything raises, no ``.grad`` has changed.

    Memory: a rule on moments (``rule.moments`` is not None) adds each gradient to
    :class:`andmask_ext.Moments` and frees it. The memory is then that of plain training and the
    moments, for any number of environments. Other rules hold the gradients of all environments.
    A graph is freed after its backward pass, unless a later loss shares a part of it.

    Zero gradients: a parameter that a loss does not reach has gradient zero in that environment.
    Zero votes for neither sign, so with ``tau=1`` the parameter does not move. A parameter that no
    loss reaches keeps its ``.grad``. If no loss reaches any parameter, it raises.

    Scaled losses: a common factor of all losses scales the result of the AND-mask, but does not
    change the mask. So ``GradScaler.scale`` may be applied to each loss. Some rules depend on
    magnitudes (:class:`andmask_ext.rules.SandMask`, :class:`andmask_ext.rules.GeometricMean`). For
    them pass ``weights=[1 / scaler.get_scale()] * d``, and do not unscale afterwards.

    Hooks: hooks of ``Tensor.register_hook`` see the gradient of each environment. Parameters with
    hooks of ``register_post_accumulate_grad_hook`` are refused, as these would never run.
    ``DistributedDataParallel`` would not synchronise the gradients.

    Args:
        losses: one scalar loss per environment: a sequence, a tensor of shape :math:`(d,)`, or an
            iterator. The losses of d examples make each example an environment. Losses of a
            sequence may share parts of their graphs. An iterator must yield losses with separate
            graphs, and needs ``params``. Its next loss is requested after the backward pass of the
            last one, so only one graph is in memory at a time.
        rule: a rule such as :class:`andmask_ext.AndMask`, or a callable that maps stacked
            gradients ``[d, *shape]`` to one gradient ``[*shape]``. It is called once per parameter,
            without gradient tracking. :class:`andmask_ext.rules.GradientAgreementFiltering` sees
            the gradients of all parameters together.
        params: the leaf tensors that get gradients. Leaves that do not require grad are skipped.
            Default: every leaf that the losses depend on.
        weights: one positive factor per environment. It acts like a factor of the loss. With n_e
            examples in environment e and N in all, ``d * n_e / N`` makes the unmasked mean the
            gradient of the pooled loss.

    Raises:
        TypeError: ``losses`` or ``params`` is not an iterable of tensors, a parameter is a DTensor,
            a gradient is sparse or has an unsupported dtype, or ``rule`` is not callable or returns
            no dense tensor.
        ValueError: there is no loss or no parameter; a loss is not scalar, does not require grad or
            uses reentrant checkpointing; a parameter is not a leaf, has a post-accumulate hook, or
            none is reached by a loss; ``rule`` returns a wrong shape or device; or the weights are
            not positive, or not one per loss.
        RuntimeError: a backward pass writes to ``.grad`` itself.

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
        # A graph is freed as soon as no later loss needs it. Compiled models require that.
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

    warn_of_processes(backward)
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

    if all(update is None for update in updates):
        raise ValueError(
            "params: expected parameters that the losses depend on, but no loss reaches any of "
            f"these {len(leaves)}; pass those that the model computes with, as model.parameters() "
            "of the module that was called"
        )
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
    """Back-propagate one loss after the other, and yield the gradients of each environment."""
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
    rule._warn_of(moments.count)
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
    updates: list[Tensor | None] = [None] * len(leaves)
    reached = [i for i, column in enumerate(columns) if any(grad is not None for grad in column)]
    with torch.no_grad():
        if isinstance(rule, GramRule) and reached:
            rule = rule._of_whole(_stacked(columns[index], leaves[index]) for index in reached)
        for index in reached:
            stack = _stacked(columns[index], leaves[index])
            columns[index].clear()
            updates[index] = _apply(rule, stack, leaves[index])
            del stack
    return updates


def _stacked(column: list[Tensor | None], leaf: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(leaf) if grad is None else grad for grad in column])


def _check_losses(losses: Iterable[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                "losses: expected a sequence of scalar losses or a tensor of shape (d,), "
                f"but got shape {tuple(losses.shape)}"
            )
        _note_unreduced(losses)
        with torch.enable_grad():
            scalars = list(losses.unbind())
    else:
        scalars = _as_list(losses, "losses")
    if not scalars:
        raise ValueError("losses: expected at least one loss, but got 0")
    for index, loss in enumerate(scalars):
        _check_loss(loss, index)
    return scalars


def _note_unreduced(losses: Tensor) -> None:
    """Warn if a vector of losses comes straight from a loss function with reduction="none"."""
    if losses.grad_fn is None:
        return
    for node in ends([losses.grad_fn], (*SAME, *TERMS, *SCALINGS)):
        if node.name() == "CtcLossBackward0" or getattr(node, "_saved_reduction", None) == 0:
            warn_once(
                backward,
                "losses: expected one loss per environment, but got the losses of single examples "
                "(reduction='none'), so that each example is an environment; take their mean in "
                "each environment, or pass list(losses) if each example shall be one",
            )
            return


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
        label = f"{name}[{index}] of shape {tuple(param.shape)}"
        _check_plain(label, param)
        check_dtype(label, param)
        if param.grad is not None:
            check_dense_grad(f"{name}[{index}].grad", param.grad)
        leaves[id(param)] = param
    return list(leaves.values())


def _check_plain(label: str, param: Tensor) -> None:
    """Raise if a parameter is spread over processes, or waits for hooks that would not run."""
    if hasattr(param, "device_mesh"):
        raise TypeError(
            f"{label}: expected a plain tensor, but got a {type(param).__name__}, of which this "
            "process holds a part; use the module before fully_shard or parallelize_module"
        )
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    if any(not isinstance(hook, Hook) for hook in hooks.values()):
        raise ValueError(
            f"{label}: expected no hook of register_post_accumulate_grad_hook, but got one, which "
            "would never run (an optimizer in the backward pass?); call remove() of what the "
            "registration returned, and step the optimizer after andmask_ext.backward"
        )


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
    """Refuse reentrant checkpointing: it hides parameters, which would silently get no gradient."""
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
    """Return for each graph whether a later loss shares a node that may hold saved tensors."""
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
    # The copy has the layout and dtype of the parameter. It shares no memory.
    return torch.empty_like(leaf).copy_(update)
