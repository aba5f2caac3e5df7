"""Hugging Face Trainer: a mixin for it and its subclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from .._notices import warn_once
from ..agreement import Agreement
from ..optim import EnvironmentOptimizer
from ..optim._wrapped import unwrapped
from ..rules import Rule
from ._contexts import Environments, TrainingContexts

__all__ = ["AgreementMixin", "AgreementTrainer"]


class AgreementMixin:
    """Let the environments of each batch vote, in a ``transformers.Trainer`` or a subclass of it.

    Put it before the trainer: ``class MyTrainer(AgreementMixin, Seq2SeqTrainer): pass``.

    Each ``training_step`` runs in the context of :class:`~andmask_ext.Agreement`. With
    ``gradient_accumulation_steps=k`` the environments of all k batches vote once. The loss of an
    environment is the mean over its own labels: what the trainer divides by (accumulation, the
    number of tokens in all batches of the step) is undone. ``max_grad_norm`` clips the gradient
    that is applied.

    Args:
        args, kwargs: of the trainer.
        rule: a rule such as ``AndMask(tau=0.2)``, for any optimizer of torch. None: the optimizer
            of the trainer is one of :mod:`andmask_ext.optim`, and has rules. Pass it with
            ``optimizers=(optimizer, None)``, or as ``optimizer_cls_and_kwargs=(AndMaskAdamW,
            {"lr": 5e-5, "tau": 0.2})``.
        environments: None: each example is an environment. An int d: d equal groups of consecutive
            examples. A string: the column that holds the environment of each example, an integer.
            The model does not see this column. A function: from the inputs to one of these, or to
            integer ids.
        whole_batches: each batch is one environment, and k accumulated ones vote. This works for
            models that :class:`~andmask_ext.Agreement` refuses, with an optimizer of
            :mod:`andmask_ext.optim`.
        agreement_options: options of :class:`~andmask_ext.Agreement`.

    Attributes:
        agreement: the :class:`~andmask_ext.Agreement` of the run, from the first step on. None
            before, and with ``whole_batches=True``.

    Raises:
        RuntimeError: at the first step: the model is compiled (``torch_compile=True``).
        TypeError: at the first step: there is no rule, and the optimizer is one of torch.
        ValueError: there are rules in both places; or the inputs have no such column.

    Example:
        >>> import andmask_ext as am
        >>> from andmask_ext.integrations.transformers import AgreementTrainer
        >>> trainer = AgreementTrainer(  # doctest: +SKIP
        ...     model=model, args=args, train_dataset=data, rule=am.AndMask(tau=0.8),
        ...     environments="site",
        ... )
        >>> trainer.train()  # doctest: +SKIP

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    def __init__(
        self,
        *args: Any,
        rule: Rule | None = None,
        environments: Environments = None,
        whole_batches: bool = False,
        agreement_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._contexts = TrainingContexts(
            type(self).__name__, rule, environments, whole_batches, agreement_options or {}
        )
        super().__init__(*args, **kwargs)

    @property
    def agreement(self) -> Agreement | None:
        """The Agreement of the run."""
        return self._contexts.agreement

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, without what an earlier run has left that was interrupted inside a step."""
        self._contexts.reset()
        optimizer = unwrapped(getattr(self, "optimizer", None))
        if isinstance(optimizer, EnvironmentOptimizer):
            optimizer._pending.drop()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run the trainer's step in the context, with a loss that is a mean over the batch."""
        self._contexts.prepare(model, self.optimizer)
        self._check_smoothing(inputs.get("labels"))
        # Without a number of items the loss is a mean, which the trainer divides, unless somebody
        # else is known to have done so.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None
        steps = 1 if scaled else self.current_gradient_accumulation_steps
        accelerator = self.accelerator
        with self._contexts.step(
            inputs,
            divided_by=steps * accelerator.gradient_accumulation_steps,
            last=accelerator.sync_gradients,
            grad_scaler=accelerator.scaler,
        ):
            loss: Tensor = super().training_step(model, inputs)  # type: ignore[misc]
        # The trainer adds up the losses of the step for its log.
        return loss / self.current_gradient_accumulation_steps if scaled else loss

    def _check_smoothing(self: Any, labels: Any) -> None:
        smoothed = self.label_smoother is not None and self.compute_loss_func is None
        if not smoothed or self.agreement is None or labels is None or labels.dim() < 2:
            return
        counts = (labels != self.label_smoother.ignore_index).flatten(1).sum(1)
        if bool((counts != counts[0]).any()):
            warn_once(
                self,
                f"{type(self).__name__}: label_smoothing_factor expects examples with equally many "
                "labels, as its loss is divided by the labels of the batch, but some have more, so "
                "an environment counts by its labels; pass compute_loss_func=..., which takes "
                "losses = cross_entropy(..., label_smoothing=..., reduction='none'), their mean "
                "over the labels of each example, and the mean of these",
            )

    def _prepare_inputs(self, inputs: Any) -> Any:
        key = self._contexts.key
        if key is not None and isinstance(inputs, Mapping) and key in inputs:
            inputs = {name: value for name, value in inputs.items() if name != key}
        return super()._prepare_inputs(inputs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        key = self._contexts.key
        if key is not None and key not in self._signature_columns:
            self._signature_columns.append(key)  # not a column that is not used


class AgreementTrainer(AgreementMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with :class:`AgreementMixin`."""
