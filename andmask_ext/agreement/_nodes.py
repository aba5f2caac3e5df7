"""Access to single nodes of an autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

BACKWARDS = (torch.Tensor.backward, torch.autograd.backward)


def leaf(node: Node) -> Tensor:
    """Return the tensor of an AccumulateGrad node."""
    variable: Tensor = node.variable  # type: ignore[attr-defined]
    return variable


def rows_of(node: Node) -> Tensor | None:
    """Return the environment of each row that a function relies on, int64; None: on none."""
    rows: Tensor | None = getattr(node, "environment_of_rows", None)
    return rows


def node_of(tensor: Tensor) -> Node:
    """Return the node that made a tensor, or that of a leaf."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    return torch.autograd.graph.get_gradient_edge(tensor).node


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of one output of a node in the forward pass."""
    return tuple(map(int, node._input_metadata[output].shape))


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


def keep_all_checkpoints(node: Node) -> None:
    """Allow each checkpointed saved tensor of a node to be unpacked more than once."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            keep_checkpoints(node, name.removeprefix("_raw_saved_"))


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


PYTHON = torch.autograd.function.BackwardCFunction  # the node of a Python function


def integers_in(node: Any) -> list[Any]:
    """Return the whole numbers that the node of a Python function holds, and tensors of such."""
    found: list[Any] = []
    seen: set[int] = set()
    stack = [*vars(node).values(), *node.saved_tensors]
    while stack:
        value = stack.pop()
        if id(value) in seen and isinstance(value, (list, tuple, dict)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found += [] if value.is_floating_point() or value.is_complex() else [value]
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, (int, slice)):
            found.append(value)
    return found


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
    with _NoBackward(node.name()):
        gradients = node.apply(*deltas)
    needed = [i for i, needs in enumerate(node.needs_input_grad) if needs]  # type: ignore[attr-defined]
    joined = [i for i, (after, _) in enumerate(node.next_functions) if after is not None]
    argument = needed[joined.index(edge)]
    return gradients[argument] if isinstance(gradients, tuple) else gradients  # type: ignore[no-any-return]


class _NoBackward(TorchFunctionMode):
    """Refuses the backward passes of a function that is called once per environment.

    Each would add to ``.grad``, and be run once more for the data.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in BACKWARDS:
            raise RuntimeError(
                f"Agreement: {self._name} has a parameter as argument and runs a backward pass "
                "inside its backward, as reversible layers do, so the gradients of the "
                "environments cannot be told apart; use environment(micro_batches=None) of an "
                "optimizer of andmask_ext.optim"
            )
        return func(*args, **(kwargs or {}))


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
    pass needs. The engine is called directly: BackwardMode would turn this pass into such a one.
    """
    with torch.enable_grad():
        end: Tensor = _Aside.apply(  # type: ignore[no-untyped-call]
            torch.zeros((), requires_grad=True), body
        )
    _engine_run_backward(
        (end,), (torch.ones_like(end),), False, False, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


def computes_all() -> bool:
    """Return whether a node that is called now computes gradients that no pass has asked for."""
    with torch.enable_grad():
        node = (torch.ones((), requires_grad=True) * 2).grad_fn
    assert node is not None
    return call_node(node, 0, [torch.ones(())]) is not None


@contextmanager
def untouched(params: Iterable[Tensor]) -> Iterator[None]:
    """Keep what a function's own backward pass adds to ``.grad`` out of it."""
    before = [(param, param.grad) for param in params]
    try:
        for param, _ in before:
            param.grad = None
        yield
    finally:
        for param, grad in before:
            param.grad = grad


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
