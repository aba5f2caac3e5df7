"""Passes that draw the same random numbers, and no dropout."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode


def _without_p(position: int, name: str, off: Any) -> Callable[[list[Any], dict[str, Any]], None]:
    """Return a function that sets one argument of a call to what switches dropout off."""

    def change(args: list[Any], kwargs: dict[str, Any]) -> None:
        if len(args) > position:
            args[position] = off
        else:
            kwargs[name] = off

    return change


def _recurrent(args: list[Any], kwargs: dict[str, Any]) -> None:
    # After the last list, the weights, come has_biases, num_layers and dropout.
    weights = max(index for index, arg in enumerate(args) if isinstance(arg, (list, tuple)))
    args[weights + 3] = 0.0


_OFF: dict[Any, Callable[[list[Any], dict[str, Any]], None]] = {
    **{
        function: _without_p(2, "training", False)
        for function in (
            F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
            F.feature_alpha_dropout,
        )
    },
    **{
        function: _without_p(2, "train", False)
        for function in (
            torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_,
            torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout,
            torch.feature_alpha_dropout_, torch.native_dropout,
        )
    },
    **{function: _without_p(3, "training", False) for function in (F.rrelu, torch.rrelu)},
    F.scaled_dot_product_attention: _without_p(4, "dropout_p", 0.0),
    F.multi_head_attention_forward: _without_p(10, "dropout_p", 0.0),
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
}  # fmt: skip


class _NoDropout(TorchFunctionMode):
    """Calls the functions of dropout as outside of training, wherever they are called."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        change = _OFF.get(func)
        if change is None:
            return func(*args, **(kwargs or {}))
        changed, named = list(args), dict(kwargs or {})
        change(changed, named)
        return func(*changed, **named)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch off dropout: of functions, and of modules whose mode can mean nothing else.

    These have no parameters, buffers or children. The mode of other modules is part of the model:
    some take statistics of the batch, and some run in one mode only.
    """
    quiet = [
        module
        for module in model.modules()
        if module.training
        and not isinstance(module, _NormBase)
        and not any(True for _ in module.children())
        and not any(True for _ in (*module.parameters(), *module.buffers()))
    ]
    try:
        for module in quiet:
            module.training = False
        with _NoDropout():
            yield
    finally:
        for module in quiet:
            module.training = True


class RandomNumbers:
    """The random numbers of torch, numpy and Python, from one state on.

    Attributes:
        drawn: whether any were drawn since the first :meth:`rewind`.
    """

    def __init__(self) -> None:
        self._start = self._state()
        self.drawn = False

    @staticmethod
    def _state() -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        if "numpy" in sys.modules:
            state["numpy"] = sys.modules["numpy"].random.get_state(legacy=False)
        return state

    def rewind(self) -> None:
        """Draw the same numbers again from here on."""
        now = self._state()
        self.drawn = self.drawn or not _equal(
            {key: now.get(key) for key in self._start}, self._start
        )
        torch.set_rng_state(self._start["torch"])
        random.setstate(self._start["python"])
        if "cuda" in self._start:
            torch.cuda.set_rng_state_all(self._start["cuda"])
        if "numpy" in self._start:
            sys.modules["numpy"].random.set_state(self._start["numpy"])


def _equal(a: Any, b: Any) -> bool:
    """Compare nested states; tensors and arrays element by element."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and all(_equal(a[key], b.get(key)) for key in a)
    if isinstance(a, (list, tuple)):
        return (
            isinstance(b, (list, tuple))
            and len(a) == len(b)
            and all(_equal(x, y) for x, y in zip(a, b, strict=True))
        )
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
