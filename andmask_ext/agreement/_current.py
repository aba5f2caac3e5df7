"""The environments of the open context, for layers that take statistics per environment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from ._groups import Checked, Groups, make_groups


@dataclass
class _Open:
    """An open context.

    Attributes:
        environments: its argument.
        batch: the size of the batch of the last call of the model, as far as its inputs show it.
        fixed: whether the user gave the size of the batch.
        assumed: the sizes that layers have relied on.
    """

    environments: Checked
    batch: int | None = None
    fixed: bool = False
    assumed: set[int] = field(default_factory=set)


_open: ContextVar[_Open | None] = ContextVar("open", default=None)


@contextmanager
def activate(environments: Checked, batch_size: int | None = None) -> Iterator[None]:
    """Show the arguments of a context to layers that take statistics per environment."""
    token = _open.set(_Open(environments, batch_size, fixed=batch_size is not None))
    try:
        yield
    finally:
        _open.reset(token)


def is_open() -> bool:
    """Return whether a context is open."""
    return _open.get() is not None


def announce(inputs: Iterable[Tensor], batch_dim: int) -> None:
    """Take the size of the batch from the inputs of a call, before the layers run.

    Args:
        inputs: tensors. The first one counts that is not broadcast (of size 1).
        batch_dim: the batch dimension.
    """
    context = _open.get()
    if context is None or context.fixed:
        return
    sizes = [tensor.shape[batch_dim] for tensor in inputs if tensor.dim() > batch_dim]
    context.batch = next((size for size in sizes if size != 1), 1 if sizes else None)


def require_batch(examples: int) -> None:
    """Raise RuntimeError if layers have relied on another size of the batch."""
    context = _open.get()
    if context is None or context.environments is not None:
        return  # ids tell the size, and equal groups do not depend on it
    wrong = context.assumed - {examples}
    context.assumed = set()
    if wrong:
        raise RuntimeError(
            f"Agreement: layers of convert_batchnorm took the batch to have {min(wrong)} examples, "
            f"as the first tensor that the model was given, but it has {examples}; pass "
            f"batch_size={examples} to the context"
        )


def current_groups(rows: int) -> tuple[Groups, int] | None:
    """Return the partition of the rows of a layer's input, and how many rows an example has.

    The rows of an example lie one after the other. None: no context is open.

    Raises:
        RuntimeError: the rows are not those of the examples of the batch.
        ValueError: the examples cannot be split into these environments.
    """
    context = _open.get()
    if context is None:
        return None
    environments = context.environments
    if isinstance(environments, Tensor):
        each = rows // len(environments) if rows % len(environments) == 0 else 1
        return make_groups(environments.repeat_interleave(each), rows), each
    batch = context.batch or rows
    if rows % batch:
        raise RuntimeError(
            f"Agreement: expected as many rows for each of the {batch} examples of the batch, but "
            f"a layer of convert_batchnorm got {rows} rows; use andmask_ext.backward with one "
            "forward pass per environment"
        )
    context.assumed.add(batch)
    groups = make_groups(batch if environments is None else environments, rows)
    return groups, rows // batch


class PerEnvironment:
    """Mixin of layers that take their statistics per environment (see current_groups)."""
