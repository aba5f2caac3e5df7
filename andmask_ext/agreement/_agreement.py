"""One backward pass for all environments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_bool, check_dtype
from .._observers import Observer, begin_all
from ..moments import Moments
from ..optim._base import EnvironmentOptimizer
from ..rules import AndMask, Rule
from ._accumulator import Target, Treatment
from ._backward_pass import BackwardPass
from ._constants import Constants
from ._current import activate
from ._forward import ForwardRecorder
from ._groups import Environments, Groups, check_environments, make_groups
from ._mode import BackwardMode
from ._plan import Plan
from ._report import Report, make_report
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
        rule: a rule on moments, as ``AndMask(tau=0.8)``: ``.grad`` holds the aggregated gradient
            after the context. Or an optimizer of :mod:`andmask_ext.optim` on the same parameters:
            its rules are used, and its ``step()`` resolves and updates in one pass.
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
        rule: Rule | EnvironmentOptimizer,
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
        self._model: nn.Module | None = model
        self._rule = rule
        self._optimizer = rule if isinstance(rule, EnvironmentOptimizer) else None
        self._check_rule()
        self._params = self._choose(params)
        self._leaves = list({id(p): p for p in (*model.parameters(), *self._params)}.values())
        self._members = {id(module) for module in model.modules()}
        self._batch_dim = batch_dim
        self._reduction = loss_reduction
        self._check_mixing = check_mixing
        self._keep = keep_moments
        self._moments: list[Moments] = []
        if self._optimizer is None:
            self._moments = [Moments(self._params, rule.moments or ())]  # type: ignore[union-attr]
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._plans: dict[Any, Plan] = {}
        self._records: dict[int, Treatment] = {}
        self._run: BackwardPass | None = None
        self._last_groups: tuple[Any, Groups] | None = None
        self._open = False  # there are environments that have not been resolved
        self._gram: dict[str, Tensor] | None = None
        self._observers: list[Observer] = []

    def _check_rule(self) -> None:
        rule = self._rule
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                if group.get("weight_decay") and group.get("weight_decay_mode") == "before_mask":
                    raise ValueError(
                        "rule: expected an optimizer whose weight decay comes after the mask or is "
                        "decoupled, but got weight_decay_mode='before_mask', which changes the "
                        "gradient of each environment; use optimizer.environment()"
                    )
            return
        if not isinstance(rule, Rule):
            got = rule.__name__ if isinstance(rule, type) else type(rule).__name__
            raise TypeError(
                "rule: expected a rule such as andmask_ext.AndMask() or an optimizer of "
                f"andmask_ext.optim that takes environments, but got {got}"
            )
        if rule.moments is None:
            raise TypeError(
                f"rule: expected a rule on moments, but {rule} needs the gradients of all "
                "environments at once; use andmask_ext.backward with it"
            )

    def _choose(self, params: Iterable[Tensor] | None) -> list[Tensor]:
        assert self._model is not None
        if self._optimizer is not None:
            own = [p for group in self._optimizer.param_groups for p in group["params"]]
            if params is not None and {id(p) for p in params} != {id(p) for p in own}:
                raise ValueError(
                    "params: expected None or the parameters of the optimizer, but got others"
                )
            chosen = own
        else:
            chosen = list(self._model.parameters() if params is None else params)
        seen: dict[int, Tensor] = {}
        for index, param in enumerate(chosen):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"params[{index}]: expected a Tensor, but got {type(param).__name__}"
                )
            if params is None and not (param.requires_grad or param.is_floating_point()):
                continue  # quantized, and frozen for good
            check_dtype(f"params[{index}]", param)
            if params is not None and not (param.is_leaf and param.requires_grad):
                raise ValueError(f"params[{index}]: expected a leaf that requires gradients")
            if param.requires_grad or params is None:
                seen[id(param)] = param
        if not seen:
            raise ValueError("params: expected at least one parameter, but got none")
        return list(seen.values())

    # ---- the context ----

    @contextmanager
    def __call__(
        self,
        environments: Environments = None,
        *,
        resolve: bool = True,
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
            resolve: False: leave ``.grad`` as it is, and let the next context add to the same
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
        if self._model is None:
            raise RuntimeError("Agreement: expected to be used before detach()")
        if self._run is not None:
            raise RuntimeError("Agreement: expected no context inside another of the same object")
        if grad_scaler is not None and not grad_scaler.is_enabled():
            grad_scaler = None
        before = [
            (leaf, leaf.grad, 0 if leaf.grad is None else leaf.grad._version)
            for leaf in self._leaves
        ]
        self._gram = None
        run = self._run = self._begin(environments, grad_scaler)
        run.gram = gram
        complete = False
        try:
            with BackwardMode(run), activate(environments), run.watch:
                yield
            run.require_complete(before)
            complete = True
        finally:
            self._run = None
            if not complete:
                for leaf, grad, _ in before:
                    leaf.grad = grad
                self._abandon(run)
            run.close()
        if gram and run.products is not None:
            self._gram = {
                self._name(self._params[number]): products
                for number, products in sorted(run.products.found.items())
            }
        self._end(run, resolve)

    def _begin(
        self, environments: Environments, scaler: torch.amp.GradScaler | None
    ) -> BackwardPass:
        assert self._model is not None
        if self._optimizer is not None:
            optimizer = self._optimizer
        watch = ForwardRecorder(self._members, self._batch_dim)
        run = BackwardPass(
            self, environments, watch, Constants(self._model), scaler, self._reduction,
            self._plans, self._records,
        )  # fmt: skip
        if self._optimizer is None:
            if not self._open:
                self._records.clear()
                self._moments[0].reset()
                self._moments[0].observed = begin_all(self._observers)
            targets = [
                Target(param, self._moments[0], index) for index, param in enumerate(self._params)
            ]
        else:
            optimizer._enter(run)  # type: ignore[arg-type]
            targets = []
            for param in self._params:
                group, index = optimizer._slots[id(param)]
                targets.append(Target(param, optimizer._moments[group], index))
        run.targets = targets
        return run

    def _abandon(self, run: BackwardPass) -> None:
        """Forget the environments of this context, as it has raised."""
        if self._optimizer is not None:
            self._optimizer._current = None
            if run.started:
                if self._optimizer._environments:
                    self._optimizer._broken = True
                else:
                    self._optimizer._forget()
        elif run.started:
            self._moments[0].reset()
            self._open = False

    def _end(self, run: BackwardPass, resolve: bool) -> None:
        if self._optimizer is not None:
            self._optimizer._current = None
            self._optimizer._leave(0)
            return
        self._open = not resolve
        if not resolve:
            return
        moments, rule = self._moments[0], self._rule
        assert isinstance(rule, Rule)
        for observer in self._observers:
            observer.end([(self._params, moments, rule)])
        with torch.no_grad():
            updates = rule.resolve(moments) if self._keep else moments.resolve_and_release(rule)
            if run.scale != 1:
                torch._foreach_mul_([u for u in updates if u is not None], run.scale)
            for param, update in zip(self._params, updates, strict=True):
                if update is not None:
                    param.grad = update if param.grad is None else param.grad.add_(update)

    def _groups(self, environments: Environments, examples: int) -> Groups:
        if isinstance(environments, Tensor):
            return make_groups(environments, examples)
        key = (environments, examples)
        if self._last_groups is None or self._last_groups[0] != key:
            self._last_groups = (key, make_groups(environments, examples))
        return self._last_groups[1]

    def _name(self, param: Tensor) -> str:
        return self._names.get(id(param), f"a parameter of shape {tuple(param.shape)}")

    # ---- looking at it ----

    @property
    def moments(self) -> list[Moments]:
        """The moments of the last context: one object, or one for each group of the optimizer.

        Raises:
            RuntimeError: with a rule and ``keep_moments=False`` they became the gradients.
        """
        if self._model is None:
            raise RuntimeError("moments: expected to be asked for before detach()")
        if self._optimizer is not None:
            return self._optimizer._moments
        if not self._keep and not self._open:
            raise RuntimeError(
                "moments: expected keep_moments=True: the gradients have been written over them"
            )
        return self._moments

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
        if self._model is None:
            raise RuntimeError("report: expected to be called before detach()")
        return make_report([(self._name(param), param) for param in self._params], self._records)

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
        if self._model is None or self._run is not None:
            raise RuntimeError("verify: expected no context that is open, and no detach() before")
        model, params = self._model, [p for p in self._params if p.requires_grad]
        chosen, groups = sample(batch, self._batch_dim, environments, most)
        trial = Agreement(
            model, AndMask(), params, batch_dim=self._batch_dim,
            loss_reduction=self._reduction, check_mixing=self._check_mixing, keep_moments=True,
        )  # fmt: skip

        def losses() -> Iterator[Callable[[], Tensor]]:
            for environment in range(groups.environments):
                members = groups.members(environment)
                part = take(chosen, members, self._batch_dim, groups.examples)
                factor = 1 if self._reduction == "mean" else 1 / len(members)
                yield partial(_scaled_loss, loss_fn, model, part, factor)

        with undisturbed(model, params), torch.enable_grad():
            with trial(groups.ids):
                loss_fn(model, chosen).backward()
            if not self._records:  # no step yet: show what was done here
                numbers = {id(param): number for number, param in enumerate(self._params)}
                for number, record in trial._records.items():
                    self._records[numbers[id(params[number])]] = record
            names = [self._name(param) for param in params]
            return compare(names, params, trial.moments[0], losses(), tolerance)

    def detach(self) -> None:
        """Let go of the model, the memory of the moments and all that was learnt of the model."""
        if self._run is not None:
            raise RuntimeError("detach: expected to be called outside of the context")
        self._model = None
        self._optimizer, self._last_groups, self._gram = None, None, None
        self._params, self._leaves, self._moments, self._names = [], [], [], {}
        self._plans.clear()
        self._records.clear()


def _scaled_loss(
    loss_fn: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any, factor: float
) -> Tensor:
    return loss_fn(model, batch) * factor
