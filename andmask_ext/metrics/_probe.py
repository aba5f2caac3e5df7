"""A copy of a model to ask questions of, and its environments, as pairs of inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .consistency._models import _without_running_statistics

Index = slice | Tensor


class Probe:
    """A frozen copy of a model with the loss. Nothing that it does changes the model.

    Args:
        model: the model. Its modes, train or eval, are those of the copy.
        loss_fn: a function from output and targets to a 0-dim loss.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, but got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn: expected a callable, but got {type(loss_fn).__name__}")
        self.model = _without_running_statistics(model)
        trained = [param.requires_grad for param in model.parameters()]
        self.params = [p for p, t in zip(self.model.parameters(), trained, strict=True) if t]
        self._loss_fn = loss_fn

    def outputs(self, inputs: Any) -> Any:
        """Call the model. A tuple of inputs is passed as several arguments."""
        return self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch."""
        return self.loss_of(self.outputs(inputs), targets)

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of the outputs for a batch."""
        loss = self._loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a 0-dim loss of each environment, but got {got}")
        return loss

    @contextmanager
    def keeping_random_state(self) -> Iterator[None]:
        """Return a context after which the random numbers of torch go on as before it."""
        cuda = {t.device for t in self.model.parameters() if t.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(cuda)):
            yield


def pairs_of(environments: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield environments one after the other.

    Raises:
        TypeError: an environment is no pair.
    """
    for index, pair in enumerate(environments):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"environments[{index}]: expected a pair (inputs, targets), "
                f"but got {type(pair).__name__}"
            )
        yield pair[0], pair[1]


def examples_in(inputs: Any) -> int:
    """Return the number of examples: the first dimension of the first tensor."""
    first = first_input(inputs)
    if first.dim() == 0 or first.shape[0] == 0:
        raise ValueError(
            f"inputs: expected [examples >= 1, *shape], but got shape {list(first.shape)}"
        )
    return first.shape[0]


def first_input(inputs: Any) -> Tensor:
    """Return the inputs, or the first of a tuple."""
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if not isinstance(first, Tensor):
        raise TypeError(
            f"inputs: expected a Tensor, or a tuple that starts with one, "
            f"but got {type(first).__name__}"
        )
    return first


def rows(value: Any, index: Index, examples: int) -> Any:
    """Return some examples of a batch: of a tensor, or of all tensors in a tuple, list or dict.

    Raises:
        ValueError: something has another number of examples.
    """
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == examples:
        return value[index.to(value.device) if isinstance(index, Tensor) else index]
    if isinstance(value, (tuple, list)):
        return type(value)(rows(part, index, examples) for part in value)
    if isinstance(value, dict):
        return {key: rows(part, index, examples) for key, part in value.items()}
    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"environments: expected tensors of {examples} examples, which can be split into parts, "
        f"but got {got}; put what all examples share into the model or into loss_fn"
    )
