"""Accelerate: the context of a training step, with what the accelerator knows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator

from ..agreement import Agreement
from ._contexts import micro_batch

__all__ = ["agreement_step"]


def agreement_step(
    accelerator: Accelerator, agreement: Agreement, environments: Any = None, **options: Any
) -> AbstractContextManager[None]:
    """Return the context of :class:`~andmask_ext.Agreement` for a step under an accelerator.

    With ``gradient_accumulation_steps=k`` the environments of all k batches vote once, and what
    ``accelerator.backward`` divides the loss by is undone. ``accelerator.clip_grad_norm_`` then
    clips the gradient that is applied. A gradient scaler is taken from the accelerator.

    Args:
        accelerator: the :class:`accelerate.Accelerator`.
        agreement: of the model and the optimizer, before or after ``accelerator.prepare``, or of
            the model and a rule.
        environments: as for :class:`~andmask_ext.Agreement`.
        options: of the context, such as ``batch_size``.

    Raises:
        TypeError: an argument is something else.

    Example:
        >>> from andmask_ext.integrations.accelerate import agreement_step
        >>> for batch in loader:  # doctest: +SKIP
        ...     with accelerator.accumulate(model):
        ...         with agreement_step(accelerator, agreement):
        ...             accelerator.backward(model(**batch).loss)
        ...         if accelerator.sync_gradients:
        ...             accelerator.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        ...         optimizer.zero_grad()

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    for name, value, kind in (
        ("accelerator", accelerator, Accelerator), ("agreement", agreement, Agreement)
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise TypeError(
                f"{name}: expected {kind.__module__.partition('.')[0]}.{kind.__name__}, but got "
                f"{type(value).__name__}"
            )
    return micro_batch(
        agreement,
        environments,
        divided_by=accelerator.gradient_accumulation_steps,
        last=accelerator.sync_gradients,
        grad_scaler=accelerator.scaler,
        **options,
    )
