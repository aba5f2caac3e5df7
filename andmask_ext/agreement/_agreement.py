"""The class Agreement: one backward pass for all environments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_bool, check_count, check_weight
from .._notices import warn_if_nothing_is_masked
from .._pending import PendingStep, State, show_to_hooks
from ..moments import Moments
from ..optim import EnvironmentOptimizer
from ..optim._wrapped import unwrapped
from ..rules import AndMask, Rule
from ._arguments import (
    Called,
    check_optimizer_or_rule,
    check_options,
    check_params,
    names_of,
    refuse_early_decay,
)
from ._backward_pass import BackwardPass
from ._batch import BatchOptions
from ._copies import Copyable
from ._current import activate
from ._groups import Environments, check_environments
from ._mode import BackwardMode
from ._report import Report, make_report
from ._setup import Setup
from ._verify import Losses, Sample, Verification, compare, undisturbed

__all__ = ["Agreement"]


class Agreement(Copyable, Called):
    r"""Aggregate the gradients of all environments of a batch in one ordinary backward pass.

    Inside the context, write a plain training step: one forward pass for the whole batch and one
    ``loss.backward()``. The loss :math:`L_e` of an environment is the mean loss of its examples.
    The rule aggregates the gradients of all :math:`L_e`, as if each had its own backward pass. No
    gradient per environment is kept: sums and votes are computed while the backward pass runs.

    How it works: ``backward`` inside the context reads the autograd graph and finds every node
    that joins a parameter with data. The backward pass does not compute gradients of parameters.
    When the gradient of such a node's output arrives, the votes of the node's parameters are
    computed from it and from what the node has saved. No module is wrapped, and no use is missed.

    The first pass over each graph structure is preceded by a few more, the mixing check. It
    multiplies the gradients of each environment by a power of two of its own. That names the
    environment of every row, and shows whether environments mix.

    Copies and pickles hold the model, the optimizer or rule, and the options. Copy or save them in
    one object, such as a dict, and the copies belong together.

    Args:
        model: the model that is called inside the context.
        optimizer_or_rule: an optimizer of :mod:`andmask_ext.optim` on the same parameters, bare or
            wrapped by a framework, or a rule on moments such as ``AndMask(tau=0.8)``. With an
            optimizer, its rules are used, and its ``step()`` aggregates and updates in one pass.
            With a rule, ``.grad`` holds the aggregated gradient after the context.
        params: the parameters to aggregate. None: all that require gradients of ``model``, or all
            of the optimizer. Other parameters get their plain gradients.
        batch_dim: the batch dimension of the model's inputs and outputs.
        output_batch_dim: the batch dimension of the outputs, if it is another one. None: the
            dimension ``batch_dim``, or the only one that has the size of the batch.
        loss_reduction: ``"mean"`` if the loss is the mean over the examples of the batch,
            ``"sum"`` if it is their sum. The result is that of :math:`L_e` in both cases.
        check_mixing: when to check that environments do not mix. ``"auto"``: at the first backward
            pass of each graph structure, and again where it cannot follow the rows that indices
            pick. ``"once"``: not again. ``"always"``: at each backward pass. ``"never"``: no check;
            a tensor whose batch axis is ambiguous is refused.
        keep_moments: keep the moments of the last context, for metrics. Otherwise a rule writes
            the gradients over them. An optimizer keeps them until its step.

    Raises:
        TypeError: an argument has the wrong type, or the rule needs the gradients of all
            environments at once.
        ValueError: there is no parameter, or an option has an unknown value.

    Example:
        >>> import torch, andmask_ext as am
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> agreement = am.Agreement(model, am.AndMask(tau=1.0))
        >>> with agreement():  # each example is an environment
        ...     model(torch.tensor([[1.0, -2.0], [3.0, 4.0]])).mean().backward()
        >>> model.weight.grad
        tensor([[2., 0.]])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_or_rule: EnvironmentOptimizer | Rule,
        params: Iterable[Tensor] | None = None,
        *,
        batch_dim: int = 0,
        output_batch_dim: int | None = None,
        loss_reduction: str = "mean",
        check_mixing: str = "auto",
        keep_moments: bool = False,
    ) -> None:
        check_options(model, loss_reduction, check_mixing, batch_dim, output_batch_dim)
        rule = unwrapped(optimizer_or_rule)
        self._optimizer: EnvironmentOptimizer | None = None
        self._rule: Rule | None = None
        if isinstance(rule, EnvironmentOptimizer):
            refuse_early_decay(rule)
            self._optimizer, self._pending = rule, rule._pending
            own = [param for group in rule.param_groups for param in group["params"]]
            if params is not None and {id(p) for p in params} != {id(p) for p in own}:
                raise ValueError(
                    "params: expected None or the parameters of the optimizer, but got others"
                )
            chosen = check_params(own, given=params is not None)
        else:
            check_optimizer_or_rule(rule)
            self._rule, self._pending = rule, PendingStep(self, clears_grads=False)
            chosen = check_params(
                model.parameters() if params is None else params, given=params is not None
            )
        self._setup: Setup | None = Setup(
            model=model,
            modules=tuple(model.modules()),
            params=chosen,
            names=names_of(model, given=params is not None),
            batch_dim=batch_dim,
            output_batch_dim=output_batch_dim,
            reduction=loss_reduction,
            check_mixing=check_mixing,
        )
        self._leaves = list({id(p): p for p in (*model.parameters(), *chosen)}.values())
        self._keep = keep_moments
        self._run: BackwardPass | None = None
        self._gram: dict[str, Tensor] | None = None

    _make = __init__

    def _arguments(self) -> dict[str, Any]:
        waiting = self._rule is not None and self._pending.environments
        self._require_idle(self._run is not None, waiting)
        rule = {"optimizer_or_rule": self._optimizer or self._rule, "keep_moments": self._keep}
        return {**self._require_setup("copy").arguments(self._optimizer is None), **rule}

    def _rules(self) -> list[tuple[list[Tensor], Rule]]:
        """Return parameters and rule, for the pending step that this object owns with a rule."""
        if self._setup is None or self._rule is None:  # after detach()
            return []
        return [(self._setup.params, self._rule)]

    # ---- the context ----

    @contextmanager
    def __call__(
        self,
        environments: Environments = None,
        *,
        batch_size: int | None = None,
        loss_scale: float = 1.0,
        write_grads: bool = True,
        grad_scaler: torch.amp.GradScaler | None = None,
        gram: bool = False,
    ) -> Iterator[None]:
        """Return the context of a training step.

        Each backward pass inside adds the environments of one batch. With a rule, the aggregated
        gradient is added to ``.grad`` at the end of the context. If anything raises inside,
        ``.grad`` has not changed.

        Args:
            environments: None: each example of the batch is an environment. An int d: d equal
                groups of consecutive examples. Integers ``[batch]`` in a tensor, list or array: the
                environment of each example, or of each row, if the model packs its examples into
                rows, as graph networks do. Numbers may have gaps, and sizes may differ.
            batch_size: the number of examples. None: the size of the first input that is not
                broadcast, or the one that an input shares with all outputs.
            loss_scale: the factor by which a framework has multiplied the loss, such as 1 / k over
                k micro-batches. It is undone.
            write_grads: False, with a rule: do not write ``.grad`` yet. The next context then adds
                to the same environments. This is for micro-batches that each hold whole
                environments. If one of them raises, the environments of all are dropped. With an
                optimizer, environments accumulate until ``step()`` in any case.
            grad_scaler: the :class:`torch.amp.GradScaler` that scaled the loss.
            gram: also compute the scalar products of the gradients of all pairs of environments.
                See :attr:`gram` and :func:`andmask_ext.metrics.gradient_cosines`. The context may
                then hold only one backward pass.

        Raises:
            RuntimeError: at ``backward``: environments mix, or the model is compiled. At the end:
                no backward pass was seen, or one ran outside of the context's control.
            TypeError: ``environments`` has the wrong type.
            ValueError: the examples cannot be split like that, or an environment is empty.
        """
        checked = check_environments(environments)
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
        check_weight(loss_scale, "loss_scale")
        check_bool("gram", gram)
        setup = self._require_setup("Agreement")
        if self._run is not None:
            raise RuntimeError("Agreement: expected no context inside another of the same object")
        if grad_scaler is not None and not grad_scaler.is_enabled():
            grad_scaler = None
        before = [
            (leaf, leaf.grad, 0 if leaf.grad is None else leaf.grad._version)
            for leaf in self._leaves
        ]
        self._gram = None
        first = self._pending.state is not State.PENDING
        batch = BatchOptions(checked, batch_size, loss_scale, not (write_grads and first))
        run = BackwardPass(setup, self._pending, batch, grad_scaler, gram)
        self._pending.open(run)
        if first:
            setup.treatments.clear()
        self._run = run
        complete = False
        try:
            run.open()
            with BackwardMode(run), activate(checked, batch_size), run.recorder, run.module_hooks():
                yield
            run.require_complete(before)
            self._pending.close()
            complete = True
        finally:
            self._run = None
            if not complete:
                for leaf, grad, _ in before:
                    leaf.grad = grad
                self._abandon(run)
            run.close()
        if run.products is not None and gram:
            self._gram = {
                setup.name(setup.params[number]): products
                for number, products in sorted(run.products.found.items())
            }
        if self._rule is not None and write_grads:
            self._finish(run.scale)

    def _abandon(self, run: BackwardPass) -> None:
        """Drop the environments of this context after an error."""
        pending = self._pending
        pending.abandon(changed=run.started)
        earlier = self._optimizer is not None and pending.environments > 0
        if pending.state is State.BROKEN and not earlier:
            pending.finish()  # no earlier environments are lost

    def _finish(self, scale: float) -> None:
        """Write the gradients of the environments since the last time, if there are any."""
        if self._pending.environments:
            try:
                self._write_grads(scale)
            finally:  # an error must not leave these environments to the next context
                self._pending.finish(keep_moments=True)

    def _write_grads(self, scale: float) -> None:
        groups = self._pending.complete()
        self._pending.observe(groups)
        warn_if_nothing_is_masked(self, self._pending.environments, [g.rule for g in groups])
        written: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for params, moments, rule in groups:
                updates = rule.update(moments) if self._keep else rule._update_in_place(moments)
                if scale != 1:
                    torch._foreach_mul_([update for update in updates if update is not None], scale)
                pairs = zip(params, updates, strict=True)
                written += [(param, update) for param, update in pairs if update is not None]
            show_to_hooks(written, self._require_setup("hook").name)
            for param, update in written:
                param.grad = update if param.grad is None else param.grad.add_(update)

    def _require_setup(self, caller: str) -> Setup:
        if self._setup is None:
            raise RuntimeError(f"{caller}: expected to be used before detach()")
        return self._setup

    # ---- looking at it ----

    @property
    def moments(self) -> list[Moments]:
        """The moments of the last context: one object, or one for each group of the optimizer.

        Raises:
            RuntimeError: with a rule and ``keep_moments=False``, the gradients have been written
                over them.
        """
        self._require_setup("moments")
        idle = self._pending.state is State.IDLE
        if self._rule is not None and idle and not self._keep:
            raise RuntimeError(
                "moments: expected keep_moments=True: the gradients have been written over them"
            )
        return self._pending.moments

    @property
    def gram(self) -> dict[str, Tensor]:
        """Scalar products of the gradients of all pairs of environments, per parameter.

        A dict from the parameter's name to a float64 tensor ``[d, d]``, for the last context, which
        must have had ``gram=True``. Parameters that were not used are missing. The products are
        computed in float32, or in float64 for float64. For a layer with few rows they are computed
        from its inputs and output gradients, without its gradients.

        Raises:
            RuntimeError: the last context did not have ``gram=True``, or it raised.
        """
        if self._gram is None:
            raise RuntimeError(
                "gram: expected a context with gram=True before: "
                "`with agreement(environments, gram=True): loss.backward()`"
            )
        return self._gram

    def report(self) -> Report:
        """Return how each parameter was treated in the last context. ``print`` shows a table.

        While moments are held, it has the threshold of votes, what it keeps, and noise in that.

        Raises:
            RuntimeError: it is called after :meth:`detach`.
        """
        return make_report(self._require_setup("report"), self._pending)

    def verify(
        self,
        batch: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        environments: Environments = None,
        *,
        most: int = 8,
        tolerance: float | None = None,
    ) -> Verification:
        """Compare with the exact loop, one forward and backward pass per environment.

        Do this first with a new model. Gradients, buffers, modes and moments do not change. Dropout
        is off during the comparison. Each pass draws the same random numbers.

        Args:
            batch: the second argument of ``loss_fn``: tensors and arrays in tuples, lists, mappings
                and dataclasses. Every tensor in it whose dimension ``batch_dim`` has the batch size
                is split, and every list with one item per example.
            loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the batch, or with
                ``loss_reduction="sum"`` the sum.
            environments: as for the context.
            most: compare at most this many environments, the first ones.
            tolerance: the allowed difference, as a share of the largest gradient. None: a value
                for the dtype of the parameters. Under autocast pass 0.05.

        Returns:
            The deviation of each parameter. ``.passed`` tells whether all agree up to rounding. If
            they do not, ``.cause`` tells whether the loss is why.

        Raises:
            RuntimeError: it is called inside the context, or after :meth:`detach`.
            TypeError: ``batch`` holds tensors in an object that cannot be split.
            ValueError: ``batch`` holds no tensors, cannot be split into the environments, or can be
                split in two ways, or all gradients are zero.
        """
        checked = check_environments(environments)
        setup = self._require_setup("verify")
        if self._run is not None:
            raise RuntimeError("verify: expected to be called outside of the context")
        model, params = setup.model, [param for param in setup.params if param.requires_grad]
        sample = Sample(batch, setup.batch_dim, checked, most)
        trial = Agreement(
            model, AndMask(tau=1.0), params, batch_dim=setup.batch_dim,
            output_batch_dim=setup.output_batch_dim,
            loss_reduction=setup.reduction, check_mixing=setup.check_mixing, keep_moments=True,
        )  # fmt: skip
        assert trial._setup is not None

        losses = Losses(partial(loss_fn, model), sample, setup.batch_dim, setup.reduction)
        with undisturbed(model, params), torch.enable_grad():
            with trial(sample.groups.ids):
                losses.whole().backward()
            if not setup.treatments:  # no step yet: report this comparison
                numbers = {id(param): number for number, param in enumerate(setup.params)}
                for number, treatment in trial._setup.treatments.items():
                    setup.treatments[numbers[id(params[number])]] = treatment
            names = [setup.name(param) for param in params]
            return compare(names, params, trial.moments[0], losses, tolerance)

    def detach(self) -> None:
        """Release the model, the moments and all plans. The object cannot be used afterwards.

        Raises:
            RuntimeError: it is called inside the context.
        """
        if self._run is not None:
            raise RuntimeError("detach: expected to be called outside of the context")
        self._pending = PendingStep(self, clears_grads=False)
        self._setup, self._optimizer, self._gram = None, None, None
        self._leaves = []
