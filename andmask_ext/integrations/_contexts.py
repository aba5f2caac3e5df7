"""The contexts of training steps, as a framework asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from .._pending import State
from ..agreement import Agreement
from ..optim import EnvironmentOptimizer
from ..optim._wrapped import unwrapped
from ..rules import Rule

# None, a number, the key of the ids in the batch, or a function of the batch.
Environments = int | str | Callable[[Any], Any] | None


class TrainingContexts:
    """Makes the context of each training step of one run.

    Args:
        name: of the callback or trainer, for messages.
        rule: a rule on moments, or None: the optimizer is one of :mod:`andmask_ext.optim`.
        environments: what the environments of a batch are.
        whole_batches: whether each batch is one environment.
        options: of :class:`~andmask_ext.Agreement`.

    Attributes:
        whole: whether each batch is one environment.
        agreement: the Agreement of the run, once there is one.
    """

    def __init__(
        self,
        name: str,
        rule: Rule | None,
        environments: Environments,
        whole_batches: bool,
        options: Mapping[str, Any],
    ) -> None:
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(
                f"{name}: expected rule=None or a rule such as andmask_ext.AndMask(tau=0.8), but "
                f"got {type(rule).__name__}"
            )
        if whole_batches and (rule is not None or environments is not None or options):
            raise ValueError(
                f"{name}: whole_batches=True takes no rule, environments or options of Agreement; "
                "expected an optimizer of andmask_ext.optim, such as "
                "EnvironmentWrapper(your_optimizer, rule)"
            )
        self._name, self._rule, self.whole = name, rule, whole_batches
        self._environments, self._options = environments, dict(options)
        self.reset()

    def reset(self) -> None:
        """Forget the model and the optimizer of an earlier run, and what it has left."""
        self._optimizer: EnvironmentOptimizer | None = None
        self._known: list[int] = []  # the ids of the model and of its parameters
        self.agreement: Agreement | None = None

    @property
    def key(self) -> str | None:
        """The key of the ids in the batch, which is no argument of the model."""
        return self._environments if isinstance(self._environments, str) else None

    def prepare(self, model: nn.Module, optimizer: Any) -> None:
        """Take the model and the optimizer of the run.

        Raises:
            RuntimeError: the model is compiled.
            TypeError: there is no rule, and the optimizer is none of :mod:`andmask_ext.optim`.
            ValueError: there is a rule, and the optimizer has rules of its own.
        """
        inner = unwrapped(optimizer)
        ours = isinstance(inner, EnvironmentOptimizer)
        if self._rule is None and not ours:
            given = type(getattr(optimizer, "optimizer", optimizer)).__name__
            raise TypeError(
                f"{self._name}: expected an optimizer of andmask_ext.optim, or rule=..., such as "
                f"rule=andmask_ext.AndMask(tau=0.8), but got {given} and no rule"
            )
        if self._rule is not None and ours:
            raise ValueError(
                f"{self._name}: expected a rule or an optimizer of andmask_ext.optim, but got "
                f"{self._rule} and {type(inner).__name__}, which has its own; leave out rule="
            )
        if hasattr(model, "_orig_mod") and not self.whole:
            raise RuntimeError(
                f"{self._name}: expected a model that is not compiled, but got one of "
                "torch.compile, which Agreement cannot read; leave out torch_compile=True or "
                "torch.compile(), or use whole_batches=True"
            )
        params = [param for group in inner.param_groups for param in group["params"]]
        known = [id(model), id(inner), *map(id, params)]
        if known == self._known:
            return
        self._known, self._optimizer = known, inner if ours else None
        if not self.whole:
            self.agreement = Agreement(model, self._rule or inner, **self._options)

    def step(
        self,
        batch: Any,
        *,
        divided_by: float,
        last: bool,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> AbstractContextManager[None]:
        """Return the context of one forward and backward pass.

        Args:
            batch: as the framework hands it out.
            divided_by: the number by which the framework divides the loss.
            last: whether the optimizer steps after this pass.
            grad_scaler: the scaler of the loss, if there is one.
        """
        if self.whole:
            assert self._optimizer is not None
            context = self._optimizer.environment(weight=divided_by, grad_scaler=grad_scaler)
            return _with_grads(context, self._optimizer if last and grad_scaler else None)
        assert self.agreement is not None
        return micro_batch(
            self.agreement, self._environments_of(batch),
            divided_by=divided_by, last=last, grad_scaler=grad_scaler,
        )  # fmt: skip

    def finish(self, grad_scaler: torch.amp.GradScaler | None) -> None:
        """Write the gradients, if no pass was the last one of the step."""
        if self._rule is not None and self.agreement is not None:
            self.agreement._finish(1.0 if grad_scaler is None else grad_scaler.get_scale())
        pending = None if self._optimizer is None else self._optimizer._pending
        if pending is not None and grad_scaler is not None and pending.state is State.PENDING:
            assert self._optimizer is not None
            self._optimizer.write_grads()

    def drop(self) -> None:
        """Drop the environments of a rule that have not voted, as an optimizer does by itself.

        A context that is open goes on.
        """
        if self._rule is not None and self.agreement is not None:
            self.agreement._pending.drop()

    def _environments_of(self, batch: Any) -> Any:
        if isinstance(self._environments, str):
            return ids_of(batch, self._environments, self._name)
        return self._environments(batch) if callable(self._environments) else self._environments


def micro_batch(
    agreement: Agreement,
    environments: Any,
    *,
    divided_by: float,
    last: bool,
    grad_scaler: torch.amp.GradScaler | None,
    **options: Any,
) -> AbstractContextManager[None]:
    """Return the context of one of the passes of a step, all of whose environments vote once.

    Args:
        agreement: of the model.
        environments: those of the batch.
        divided_by: the number by which the loss is divided.
        last: whether the optimizer steps after this pass.
        grad_scaler: the scaler of the loss, if there is one.
        options: others of the context.
    """
    context = agreement(
        environments, loss_scale=1 / divided_by, write_grads=last, grad_scaler=grad_scaler,
        **options,
    )  # fmt: skip
    return _with_grads(context, agreement._optimizer if last and grad_scaler else None)


@contextmanager
def _with_grads(
    context: AbstractContextManager[None], optimizer: EnvironmentOptimizer | None
) -> Iterator[None]:
    """Write ``.grad`` after a context, for a framework to unscale and clip."""
    with context:
        yield
    if optimizer is not None:
        optimizer.write_grads()


def ids_of(batch: Any, key: str, name: str) -> Any:
    """Return what a batch has under a key, or as an attribute.

    Raises:
        ValueError: it has none.
    """
    if isinstance(batch, Mapping) and key in batch:
        return batch[key]
    if not isinstance(batch, Mapping) and hasattr(batch, key):
        return getattr(batch, key)
    has = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"{name}: environments={key!r} expects a batch with the environment of each example under "
        f"this key, but got {has or 'nothing'}; keep the column in the data set and the collate "
        "function, or pass a function of the batch, such as lambda batch: batch[2]"
    )
