"""Lightning: a callback for automatic optimization.

Manual optimization and Fabric need none: ``with agreement(): self.manual_backward(loss)``.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack
from typing import Any

from ..agreement import Agreement
from ..rules import Rule
from ._contexts import Environments, TrainingContexts

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

__all__ = ["AgreementCallback"]


class _NoLoss(Exception):
    """A training step returned None, so Lightning skips the backward pass."""


class AgreementCallback(Callback):  # type: ignore[misc]
    """Let the environments of each batch vote, in a Lightning module with automatic optimization.

    The context of :class:`~andmask_ext.Agreement` is opened before each ``training_step`` and
    closed after the backward pass. With ``accumulate_grad_batches=k`` the environments of all k
    batches vote once, and what Lightning divides the loss by is undone. Clipping, schedulers,
    precision and checkpoints work as before.

    Args:
        rule: a rule such as ``AndMask(tau=0.2)``, for any optimizer of torch. None: the optimizer
            that ``configure_optimizers`` returns is one of :mod:`andmask_ext.optim`, and has rules.
        environments: None: each example is an environment. An int d: d equal groups of consecutive
            examples. A string: the key or attribute of the batch that holds the environment of each
            example. A function: from the batch to one of these, or to integer ids.
        whole_batches: each batch is one environment, and k accumulated ones vote. This works for
            models that :class:`~andmask_ext.Agreement` refuses, with an optimizer of
            :mod:`andmask_ext.optim`.
        options: of :class:`~andmask_ext.Agreement`, such as ``loss_reduction="sum"``.

    Attributes:
        agreement: the :class:`~andmask_ext.Agreement` of the run, from the first step on. None
            before, and with ``whole_batches=True``.

    Raises:
        RuntimeError: at the start of training: the module has manual optimization, is compiled, or
            takes ``dataloader_iter``.
        TypeError: at the start: there is no rule, and the optimizer is one of torch.
        ValueError: there are rules in both places; or the batch has no such key.

    Example:
        >>> import lightning as L
        >>> import andmask_ext as am
        >>> from andmask_ext.integrations.lightning import AgreementCallback
        >>> callback = AgreementCallback(am.AndMask(tau=0.8), environments="site")
        >>> trainer = L.Trainer(callbacks=[callback], gradient_clip_val=1.0)  # doctest: +SKIP

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        environments: Environments = None,
        *,
        whole_batches: bool = False,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        self._contexts = TrainingContexts(name, rule, environments, whole_batches, options)
        self._strategy: Any = None
        self._open = ExitStack()
        self._batch: tuple[Any, int] = None, 0

    @property
    def agreement(self) -> Agreement | None:
        """The Agreement of the run."""
        return self._contexts.agreement

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the context around the training step."""
        self._refuse(pl_module)
        self._contexts.reset()
        self._contexts.prepare(pl_module, trainer.optimizers[0])
        self._restore()
        self._strategy = strategy = trainer.strategy
        # Not the module's: that may be copied, pickled, or have a step of its own there.
        original = strategy.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            automatic = trainer.fit_loop.epoch_loop.automatic_optimization
            if self._contexts.whole or getattr(automatic, "_skip_backward", False):
                return original(*args, **kwargs)
            try:
                with ExitStack() as stack:
                    stack.enter_context(self._context(trainer))
                    output = original(*args, **kwargs)
                    if output is None:
                        raise _NoLoss
                    self._open = stack.pop_all()
            except _NoLoss:
                return None
            return output

        strategy.training_step = training_step

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, and take parameters that another callback has added."""
        self._batch = batch, batch_idx
        self._contexts.prepare(pl_module, trainer.optimizers[0])

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Drop what a step has left that never came to its end."""
        self._contexts.drop()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Open the context of a whole batch, whose forward pass needs none."""
        if self._contexts.whole:
            self._open.enter_context(self._context(trainer))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Close the context: the environments have voted."""
        self._open.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the environments vote, if the last batch of a step has had no loss."""
        self._contexts.finish(getattr(trainer.precision_plugin, "scaler", None))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Drop the environments of a backward pass that raised."""
        self._open.__exit__(type(exception), exception, exception.__traceback__)
        self._open = ExitStack()
        self._restore()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the strategy as it was."""
        self._restore()

    def _refuse(self, module: Any) -> None:
        """Raise RuntimeError if a module cannot be trained like that."""
        name = type(self).__name__
        if not module.automatic_optimization:
            raise RuntimeError(
                f"{name}: expected automatic optimization; with manual optimization leave the "
                "callback out, and write `with self.agreement(): self.manual_backward(loss)`, "
                "where self.agreement = andmask_ext.Agreement(self, self.optimizers()) is made in "
                "on_train_start"
            )
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise RuntimeError(
                f"{name}: expected a training_step that takes a batch, but got one that takes "
                "dataloader_iter, whose batches a callback does not see; take (batch, batch_idx), "
                "or use manual optimization"
            )
        if getattr(module, "_compiler_ctx", None) is not None and not self._contexts.whole:
            raise RuntimeError(
                f"{name}: expected a module that is not compiled, but got one of torch.compile, "
                "which Agreement cannot read; pass the module itself, or use whole_batches=True"
            )

    def _restore(self) -> None:
        if self._strategy is not None:
            self._strategy.__dict__.pop("training_step", None)
            self._strategy = None
        self._batch = None, 0

    def _context(self, trainer: Any) -> Any:
        batch, index = self._batch
        whole = index + 1 >= trainer.num_training_batches or trainer.is_last_batch
        return self._contexts.step(
            batch,
            divided_by=trainer.accumulate_grad_batches,
            last=whole or (index + 1) % trainer.accumulate_grad_batches == 0,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
