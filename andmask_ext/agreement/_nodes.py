"""Access to single nodes of an autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils import checkpoint


def leaf(node: Node) -> Tensor:
    """Return the tensor of an AccumulateGrad node."""
    variable: Tensor = node.variable  # type: ignore[attr-defined]
    return variable


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of one output of a node in the forward pass."""
    return tuple(int(size) for size in node._input_metadata[output].shape)


class _KeepHandles(dict[int, Any]):
    """The handles of a checkpointed tensor, which its node and this package both unpack."""

    def __setitem__(self, task: int, handle: Any) -> None:
        if handle is not None:
            super().__setitem__(task, handle)


def saved(node: Node, name: str) -> Any:
    """Return what a node saved for its backward pass."""
    keep_checkpoints(node, name)
    value = getattr(node, f"_saved_{name}")
    return value.detach() if isinstance(value, Tensor) else value


def keep_checkpoints(node: Node, name: str) -> None:
    """Allow a checkpointed saved tensor to be unpacked more than once."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    for tensor in raw if isinstance(raw, (tuple, list)) else (raw,):
        if tensor is not None and isinstance(tensor.data, checkpoint._Holder):
            tensor.data.handles = _KeepHandles(tensor.data.handles)


def saved_tensors(node: Node) -> list[Tensor]:
    """Return all tensors that a node of a native function has saved."""
    tensors: list[Tensor] = []
    for name in dir(node):
        if name.startswith("_saved_"):
            keep_checkpoints(node, name.removeprefix("_saved_"))
            value = getattr(node, name)
            items = value if isinstance(value, (tuple, list)) else (value,)
            tensors += [item for item in items if isinstance(item, Tensor)]
    return tensors


def call_node(node: Node, edge: int, deltas: Sequence[Tensor | None]) -> Tensor | None:
    """Return the gradient of one input of a node, given the gradients of its outputs.

    The node is not released, so it can be called again. Hooks do not run.
    """
    if not hasattr(node, "apply"):
        gradients: Any = node(*deltas)  # type: ignore[operator]
        return gradients[edge] if isinstance(gradients, tuple) else gradients  # type: ignore[no-any-return]
    # The node of a Python function accepts no None for zeros. It returns a gradient for each
    # argument, tensor or not.
    if getattr(node, "materialize_grads", True):
        deltas = [_zeros(node, i) if delta is None else delta for i, delta in enumerate(deltas)]
    gradients = node.apply(*deltas)
    needed = [i for i, needs in enumerate(node.needs_input_grad) if needs]  # type: ignore[attr-defined]
    joined = [i for i, (after, _) in enumerate(node.next_functions) if after is not None]
    argument = needed[joined.index(edge)]
    return gradients[argument] if isinstance(gradients, tuple) else gradients  # type: ignore[no-any-return]


def _zeros(node: Node, output: int) -> Tensor:
    metadata = node._input_metadata[output]
    return torch.zeros(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)


class _Aside(torch.autograd.Function):
    """Runs a function inside a separate backward pass."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, body: Callable[[], None]) -> Tensor:
        ctx.body = body
        return start.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        ctx.body()
        return delta, None


def aside(body: Callable[[], None]) -> None:
    """Run ``body`` in a separate backward pass, so that nodes compute all gradients.

    In a backward pass with ``inputs``, a node that is called computes only the gradients that this
    pass needs. No mode may turn the separate pass into one with ``inputs``.
    """
    with torch._C.DisableTorchFunction():
        with torch.enable_grad():
            end: Tensor = _Aside.apply(  # type: ignore[no-untyped-call]
                torch.zeros((), requires_grad=True), body
            )
        torch.autograd.backward(end)


def computes_all() -> bool:
    """Return whether a node that is called now computes gradients that no pass has asked for."""
    with torch.enable_grad():
        node = (torch.ones((), requires_grad=True) * 2).grad_fn
    assert node is not None
    return call_node(node, 0, [torch.ones(())]) is not None


def refuse_sparse() -> NoReturn:
    """Raise TypeError: a gradient is sparse."""
    raise TypeError(
        "Agreement: expected dense gradients, but got a sparse one, as of an embedding with "
        "sparse=True; construct it with sparse=False"
    )


def has_hooks(node: Node, output: int) -> bool:
    """Return whether hooks of a tensor change the gradient of a node's output."""
    metadata = node._input_metadata[output]
    edge = GradientEdge(node, output)
    ones = torch.ones(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)
    try:
        (seen,) = torch.autograd.grad([edge], [edge], [ones], retain_graph=True)
    except Exception:  # a hook has raised
        return True
    return not torch.equal(seen, ones)
