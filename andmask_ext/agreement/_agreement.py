"""One backward pass for all environments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_bool
from .._pending import PendingStep, State
from ..moments import Moments
from ..optim import EnvironmentOptimizer
from ..rules import AndMask, Rule
from ._arguments import check_optimizer_or_rule, check_params, refuse_early_decay
from ._backward_pass import BackwardPass
from ._current import activate
from ._groups import Environments, check_environments
from ._mode import BackwardMode
from ._report import Report, make_report
from ._setup import Setup
from ._verify import Verification, compare, sample, take, undisturbed

__all__ = ["Agreement"]


class Agreement:
    r"""Aggregate the gradients of all environments of a batch in one ordinary backward pass.

    Inside the context, write a plain training step: one forward pass for the whole batch, one
    ``loss.backward()``. The gradient of a parameter is then that of ``rule`` over the environments
    :math:`L_e`, the mean losses of their examples, as if each had had a backward pass of its own.
    No gradient per environment is kept: sums and votes are taken while the backward pass runs.

    How it is done: ``backward`` inside the context reads the autograd graph and finds every node
    that joins a parameter with data. The backward pass runs without computing gradients of
    parameters; when the gradient of such a node's output arrives, the votes of the node's
    parameters are computed from it and from what the node has saved. No module is wrapped, and no
    use of a parameter can be missed. At the first pass of each structure three more, in which the
    gradients of each environment are multiplied by a power of two of its own, prove that
    environments do not mix, and show where in each tensor the batch lies.

    Args:
        model: the model that is called inside the context.
        optimizer_or_rule: an optimizer of :mod:`andmask_ext.optim` on the same parameters: its
            rules are used, and its ``step()`` aggregates and updates in one pass. Or a rule on
            moments, as ``AndMask(tau=0.8)``: ``.grad`` holds the aggregated gradient after the
            context.
        params: the parameters to aggregate; None: all of ``model`` that require gradients (for an
            optimizer, all of its own). Others get their plain gradients.
        batch_dim: which dimension of the model's inputs and outputs is the batch.
        loss_reduction: ``"mean"`` or ``"sum"``: whether the loss is the mean over the examples of
            the batch or their sum. The result is the same: that of :math:`L_e`.
        check_mixing: ``"auto"``: prove that environments do not mix, at the first backward pass of
            each structure, and again where indices pick other rows; refuse a model for which there
            is no proof (one that returns only its loss, say). ``"once"``: not again for other
            indices. ``"always"``: at each backward pass. ``"never"``: no proof; accept what can be
            treated in one way only.
        keep_moments: keep the moments of the last context, for metrics, instead of writing the
            gradients over them. (With an optimizer they are kept until its step.)

    Raises:
        TypeError: an argument has another type, or the rule needs the gradients of all environments
            at once.
        ValueError: there is no parameter, or an option has another value.

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
        loss_reduction: str = "mean",
        check_mixing: str = "auto",
        keep_moments: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction: expected 'mean' or 'sum', but got {loss_reduction!r}"
            )
        if check_mixing not in ("auto", "once", "always", "never"):
            raise ValueError(
                "check_mixing: expected 'auto', 'once', 'always' or 'never', "
                f"but got {check_mixing!r}"
            )
        if not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(f"batch_dim: expected a dimension from 0 on, but got {batch_dim!r}")
        rule = optimizer_or_rule
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
            members={id(module) for module in model.modules()},
            params=chosen,
            names={id(param): name for name, param in model.named_parameters()},
            batch_dim=batch_dim,
            reduction=loss_reduction,
            check_mixing=check_mixing,
        )
        self._leaves = list({id(p): p for p in (*model.parameters(), *chosen)}.values())
        self._keep = keep_moments
        self._run: BackwardPass | None = None
        self._gram: dict[str, Tensor] | None = None

    def _rules(self) -> list[tuple[list[Tensor], Rule]]:
        """Return parameters and rule, for the step that this object owns if it has a rule."""
        assert self._setup is not None
        assert self._rule is not None
        return [(self._setup.params, self._rule)]

    # ---- the context ----

    @contextmanager
    def __call__(
        self,
        environments: Environments = None,
        *,
        write_grads: bool = True,
        grad_scaler: torch.amp.GradScaler | None = None,
        gram: bool = False,
    ) -> Iterator[None]:
        """Return the context of a training step.

        Each backward pass inside adds the environments of one batch. With a rule, ``.grad`` is
        written (added to what was there) at the end of the context; until then it is None.
        If anything raises inside, gradients are left as they were.

        Args:
            environments: None: each example of the batch is an environment. An int d: d equal
                groups of consecutive examples. An int64 tensor ``[batch]``: the environment of each
                example, numbered from 0 without gaps; they may have different sizes.
            write_grads: False: leave ``.grad`` as it is, and let the next context add to the same
                environments: for micro-batches that each hold whole environments. If one of them
                raises, the environments of all are dropped. With an optimizer environments add up
                until ``step()`` in any case.
            grad_scaler: the :class:`torch.amp.GradScaler` whose ``scale`` the loss goes through.
            gram: also take the scalar products of the gradients of all pairs of environments: see
                :attr:`gram` and :func:`andmask_ext.metrics.gradient_cosines`. One backward pass.

        Raises:
            RuntimeError: at ``backward``: environments mix, or the model is compiled; at the end:
                there was no backward pass, or one that was not seen.
            TypeError: ``environments`` has another type.
            ValueError: examples cannot be split like that, or an environment has none.
        """
        check_environments(environments)
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
        if self._pending.state is not State.PENDING:
            setup.treatments.clear()
        run = BackwardPass(setup, self._pending, environments, grad_scaler, gram)
        self._pending.open(run)
        self._run = run
        complete = False
        try:
            run.open()
            with BackwardMode(run), activate(environments), run.recorder:
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
            self._write_grads(run.scale)

    def _abandon(self, run: BackwardPass) -> None:
        """Forget the environments of this context, as it has raised."""
        pending = self._pending
        pending.abandon(changed=run.started)
        earlier = self._optimizer is not None and pending.environments > 0
        if pending.state is State.BROKEN and not earlier:
            pending.finish()  # nothing is lost but what has just raised

    def _write_grads(self, scale: float) -> None:
        groups = self._pending.complete()
        self._pending.observe(groups)
        with torch.no_grad():
            for params, moments, rule in groups:
                updates = rule.update(moments) if self._keep else rule._update_in_place(moments)
                if scale != 1:
                    torch._foreach_mul_([update for update in updates if update is not None], scale)
                for param, update in zip(params, updates, strict=True):
                    if update is not None:
                        param.grad = update if param.grad is None else param.grad.add_(update)
        self._pending.finish(keep_moments=True)

    def _require_setup(self, caller: str) -> Setup:
        if self._setup is None:
            raise RuntimeError(f"{caller}: expected to be used before detach()")
        return self._setup

    # ---- looking at it ----

    @property
    def moments(self) -> list[Moments]:
        """The moments of the last context: one object, or one for each group of the optimizer.

        Raises:
            RuntimeError: with a rule and ``keep_moments=False`` they became the gradients.
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
        """Scalar products of the gradients of all pairs of environments, of each parameter.

        Of the last context, which must have had ``gram=True``: by name, float64 ``[d, d]``.
        Parameters that were not used are not there. They are computed in float32 (float64 for
        float64), for a layer with few rows from its inputs and output gradients alone.

        Raises:
            RuntimeError: the last context had not ``gram=True``, or raised.
        """
        if self._gram is None:
            raise RuntimeError(
                "gram: expected a context with gram=True before: "
                "`with agreement(environments, gram=True): loss.backward()`"
            )
        return self._gram

    def report(self) -> Report:
        """Return how each parameter was treated in the last context. Print it.

        Raises:
            RuntimeError: after :meth:`detach`.
        """
        setup = self._require_setup("report")
        named = [(setup.name(param), param) for param in setup.params]
        return make_report(named, setup.treatments)

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

        The first thing to do with a new model. Gradients, buffers and modes of the model are left
        as they were, and so are the moments; dropout is switched off meanwhile.

        Args:
            batch: what ``loss_fn`` takes: a tensor, or tensors in tuples, lists and dicts. Every
                tensor in it whose dimension ``batch_dim`` has the size of the batch is split.
            loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the batch (with
                ``loss_reduction="sum"`` their sum).
            environments: as for the context.
            most: how many of the environments to compare: the first ones.
            tolerance: what rounding may change, as a share of the largest gradient; None: by the
                dtype of the parameters. Under autocast say 0.05.

        Returns:
            The deviation of each parameter; ``.passed`` says whether all agree up to rounding.

        Raises:
            ValueError: ``batch`` holds no tensors, or cannot be split into the environments.
        """
        check_environments(environments)
        setup = self._require_setup("verify")
        if self._run is not None:
            raise RuntimeError("verify: expected to be called outside of the context")
        model, params = setup.model, [param for param in setup.params if param.requires_grad]
        chosen, groups = sample(batch, setup.batch_dim, environments, most)
        trial = Agreement(
            model, AndMask(tau=1.0), params, batch_dim=setup.batch_dim,
            loss_reduction=setup.reduction, check_mixing=setup.check_mixing, keep_moments=True,
        )  # fmt: skip
        assert trial._setup is not None

        def losses() -> Iterator[Callable[[], Tensor]]:
            for environment in range(groups.environments):
                members = groups.members(environment)
                part = take(chosen, members, setup.batch_dim, groups.examples)
                factor = 1 if setup.reduction == "mean" else 1 / len(members)
                yield partial(_scaled_loss, loss_fn, model, part, factor)

        with undisturbed(model, params), torch.enable_grad():
            with trial(groups.ids):
                loss_fn(model, chosen).backward()
            if not setup.treatments:  # no step yet: show what was done here
                numbers = {id(param): number for number, param in enumerate(setup.params)}
                for number, treatment in trial._setup.treatments.items():
                    setup.treatments[numbers[id(params[number])]] = treatment
            names = [setup.name(param) for param in params]
            return compare(names, params, trial.moments[0], losses(), tolerance)

    def detach(self) -> None:
        """Let go of the model, the memory of the moments and all that was learnt of the model."""
        if self._run is not None:
            raise RuntimeError("detach: expected to be called outside of the context")
        if self._rule is not None:
            self._pending.replace_moments()
        self._setup, self._optimizer, self._gram = None, None, None
        self._leaves = []


def _scaled_loss(
    loss_fn: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any, factor: float
) -> Tensor:
    return loss_fn(model, batch) * factor
