"""Execution of the backward passes inside the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward

from .._pending import PendingStep
from ._accumulator import GradientAccumulator, Target
from ._constants import Constants, storage
from ._current import require_batch
from ._formulas import make_contribution
from ._forward import ForwardRecorder
from ._gramian import Gramian
from ._graph import Graph
from ._groups import Environments, Groups
from ._mixing import MixingCheck
from ._mode import BackwardMode
from ._node_gradient import NodeGradient
from ._nodes import leaf, untouched
from ._plan import CHECKPOINT, Consumer, Plan, make_plan, refuse_compiled
from ._setup import Setup

_MOST_PLANS = 128


class BackwardPass:
    """The backward passes of one context.

    Args:
        setup: the model and what is known about it.
        pending: the step that the environments belong to.
        environments: as given to the context.
        grad_scaler: the scaler that scaled the loss.
        gram: whether scalar products of all pairs of environments are wanted.

    Attributes:
        grad_scaler: as above.
        scale: the scale of the gradient scaler; 1 without one.
        started: whether any moments may have changed.
        recorder: records the calls of the model.
        products: the scalar products, after the backward pass.
    """

    mode: BackwardMode

    def __init__(
        self,
        setup: Setup,
        pending: PendingStep,
        environments: Environments,
        grad_scaler: torch.amp.GradScaler | None,
        gram: bool,
    ) -> None:
        self.grad_scaler = grad_scaler
        self.scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        self.started = False
        self.recorder = ForwardRecorder(setup.model, setup.members, setup.batch_dim)
        self.constants = Constants(setup.model)
        self.products: Gramian | None = None
        self._setup = setup
        self._pending = pending
        self._environments = environments
        self._gram = gram
        self._tracked = {id(param): number for number, param in enumerate(setup.params)}
        self._targets: list[Target] = []
        self._accumulator: GradientAccumulator | None = None
        self._mixing = MixingCheck(self._engine)
        self._inner = 0  # backward passes inside this one
        self._outer: Any = None  # the key of the plan of the outer one
        self._groups: Groups | None = None
        self._passes = 0
        self._dropping = 0  # > 0: plain gradients that arrive are discarded

    def open(self) -> None:
        """Find the moments of each parameter. The step must be open to this context."""
        slots = self._pending.slots
        for param in self._setup.params:
            if id(param) not in slots:
                raise RuntimeError(
                    f"Agreement: {self._setup.name(param)} is no parameter of the optimizer any "
                    "more; make a new Agreement"
                )
        places = [slots[id(param)] for param in self._setup.params]
        self._targets = [
            Target(param, self._pending.moments[group], index)
            for param, (group, index) in zip(self._setup.params, places, strict=True)
        ]

    def close(self) -> None:
        """Release the graph, the moments and the hooks."""
        self.constants.forget()
        del self._mixing
        self.__dict__.pop("mode", None)  # it is not there if the context failed to open

    def receive(self, param: Tensor) -> None:
        """Raise: a backward pass outside of this context's control produced a gradient."""
        if self._dropping:
            return
        raise RuntimeError(
            f"Agreement: {self._setup.name(param)} received a gradient from a backward pass that "
            "was not seen; expected loss.backward() in the thread of the context (for a function "
            "that runs a backward pass inside its backward, as reversible layers do, use "
            "environment(micro_batches=None) of an optimizer of andmask_ext.optim)"
        )

    def require_complete(self, before: Sequence[tuple[Tensor, Tensor | None, int]]) -> None:
        """Raise unless there was a backward pass, and none outside of this context's control.

        Args:
            before: all leaves, their gradients before the context, and the versions of these.
        """
        if self._passes == 0:
            raise RuntimeError(
                "Agreement: expected a backward pass inside the context, but there was none"
            )
        for param, grad, version in before:
            now = param.grad
            if id(param) not in self._tracked or now is None:
                continue
            if (now is not grad or now._version != version) and bool(now.any()):
                self.receive(param)

    # ---- one backward pass ----

    def backward(self, roots: list[Tensor], grads: list[Tensor], retain_graph: bool) -> None:
        """Run a backward pass: moments for tracked parameters, plain gradients for others."""
        graph = Graph([_node(root) for root in roots], self._tracked)
        if self._mixing.running:
            self._mixing.inner_pass(graph, roots, grads)
        elif self._accumulator is not None:  # inside another pass: reentrant checkpointing
            self._inner += 1
            plan = self._plan(graph, self._inner)
            self._pass(graph, plan, roots, grads, retain_graph, self._accumulator)
        else:
            self._outer_pass(graph, roots, grads, retain_graph)

    def _outer_pass(
        self, graph: Graph, roots: list[Tensor], grads: list[Tensor], retain_graph: bool
    ) -> None:
        refuse_compiled(graph)
        if self._gram and self._passes:
            raise RuntimeError(
                "Agreement: expected one backward pass in a context with gram=True, but got another"
            )
        for target in self._targets:
            if target.param._backward_hooks:
                raise RuntimeError(
                    f"Agreement: {self._setup.name(target.param)} has a hook "
                    "(Tensor.register_hook), which would have to change the gradient of each "
                    "environment; remove it, or use andmask_ext.backward"
                )
        groups = self._groups = self._make_groups()
        require_batch(groups.examples)
        if groups.environments > 1:
            self._refuse_batch_norms()
        self.recorder.paused = True
        try:
            self._paused_pass(graph, groups, roots, grads, retain_graph)
        finally:
            self.recorder.paused = False
        self.recorder.passed()
        self.constants.forget()
        self._pending.add_environments(groups.environments)
        self._passes += 1

    def _paused_pass(
        self,
        graph: Graph,
        groups: Groups,
        roots: list[Tensor],
        grads: list[Tensor],
        retain_graph: bool,
    ) -> None:
        plan = self._plan(graph)
        self._inner = 0
        weights, products = self._weights(groups), None
        if self._gram or any(target.moments._tracks_norms for target in self._targets):
            products = Gramian(self._gram, groups, weights)
        accumulator = GradientAccumulator(
            self._targets, groups, weights, plan.deferred, self._setup.treatments, products
        )
        self._accumulator = accumulator
        self.started = True
        others = [leaf(graph.nodes[index]) for index in plan.leaves]
        before = [other.grad for other in others]
        try:
            for other in others:
                other.grad = None
            self._pass(graph, plan, roots, grads, retain_graph, accumulator)
            accumulator.finish()
            if products is not None:
                self._take(products)
        except BaseException:
            for other, grad in zip(others, before, strict=True):
                other.grad = grad
            raise
        finally:
            self._accumulator = None
        for other, grad in zip(others, before, strict=True):
            if grad is not None:  # not in place: the context may still fail
                other.grad = grad if other.grad is None else grad + other.grad

    def _take(self, products: Gramian) -> None:
        self.products = products
        for number, found in products.found.items():
            target = self._targets[number]
            norms = found.diagonal() if products.pairs else found
            target.moments._add_squared_norm(target.index, norms.sum())

    def _make_groups(self) -> Groups:
        environments, sizes = self._environments, self.recorder.sizes
        if isinstance(environments, Tensor):
            if sizes and environments.shape[0] not in sizes:
                raise ValueError(
                    "environments: expected one id for each example of the batch, of "
                    f"{', '.join(map(str, sorted(sizes)))}, but got {environments.shape[0]}"
                )
            return self._setup.groups(environments, environments.shape[0])
        if not sizes:
            raise RuntimeError(
                "Agreement: expected the model to be called inside the context, before backward: "
                "its first input tells the size of the batch; or give the environment of each "
                "example as an int64 tensor"
            )
        if len(sizes) > 1:
            raise RuntimeError(
                "Agreement: parts of the model were called with batches of different sizes: "
                f"{', '.join(map(str, sorted(sizes)))}; give the environment of each example as an "
                "int64 tensor"
            )
        (examples,) = sizes
        return self._setup.groups(environments, examples)

    def _weights(self, groups: Groups) -> list[float]:
        factor = (groups.examples if self._setup.reduction == "mean" else 1.0) / self.scale
        if groups.size is not None:
            return [factor / groups.size]
        return [factor / size for size in groups.sizes.tolist()]

    def _plan(self, graph: Graph, inner: int = 0) -> Plan:
        """Return the plan for a graph. A new graph is checked for mixing first.

        Args:
            graph: the graph of a backward pass.
            inner: 0 for the outer pass, else the number of the backward pass inside it.
        """
        groups, check_mixing = self._groups, self._setup.check_mixing
        assert groups is not None
        signature = graph.structure(groups.examples, check_mixing != "once")
        structure = (signature, inner, groups.environments, groups.examples)
        sizes = tuple(tensor.shape for tensor in self.recorder.inputs)
        known = {} if check_mixing == "always" else self._setup.plans
        plan = known.get((structure, sizes)) if sizes else None
        if plan is not None and plan.fits(graph, groups.examples):
            if not inner:
                self._outer = structure, sizes
            return plan
        # Functions under reentrant checkpointing run their own backward passes. Their graphs are
        # not known yet, so the mixing check must run again.
        plan = None if CHECKPOINT in graph.names else known.get(structure)
        plan = None if plan is None else plan.at(graph, groups.examples)
        if plan is None:
            if not inner:
                nodes = set(graph.nodes)
                anchors = [
                    one
                    for one in self.recorder.anchors(groups.examples)
                    if check_mixing != "never" and one.grad_fn in nodes
                ]
                self.constants.data = {storage(one) for one in self.recorder.inputs}
                probe = Graph([_node(anchor) for anchor in anchors], self._tracked)
                with untouched(self._setup.model.parameters()):
                    self._mixing.find(graph, probe, anchors, self.recorder.batch_dim, groups)
            evidence = self._mixing.evidence(inner)
            plan = make_plan(graph, groups, evidence, self.constants, check_mixing != "never")
        if not inner:
            self._outer = structure, sizes
        if plan.certain:
            self._setup.plans.setdefault(structure, plan)
            if sizes:
                self._setup.plans[structure, sizes] = plan
        elif inner:
            self._setup.plans.pop(self._outer, None)
        while len(self._setup.plans) > _MOST_PLANS:
            self._setup.plans.pop(next(iter(self._setup.plans)))
        return plan

    def _refuse_batch_norms(self) -> None:
        modules = self.recorder.batch_norms
        if not modules:
            return
        names = [
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in self._setup.model.named_modules()
            if any(module is one for one in modules)
        ]
        raise RuntimeError(
            f"Agreement: {', '.join(names)} takes statistics over all environments; convert the "
            "model with andmask_ext.nn.convert_batchnorm(model), which takes them in each "
            "environment, or use andmask_ext.backward with one forward pass per environment"
        )

    def _pass(
        self,
        graph: Graph,
        plan: Plan,
        roots: list[Tensor],
        grads: list[Tensor],
        retain_graph: bool,
        accumulator: GradientAccumulator,
    ) -> None:
        handles = []
        for consumer in plan.consumers:
            node = graph.nodes[consumer.index]
            for operand in consumer.operands:
                accumulator.expect(operand.params)
            handles.append(node.register_prehook(self._hook(graph, consumer, node, accumulator)))
        inputs: list[Any] = [GradientEdge(graph.nodes[c.index], 0) for c in plan.consumers]
        inputs += [leaf(graph.nodes[index]) for index in plan.leaves]
        if not inputs:
            raise RuntimeError(
                "Agreement: expected a loss that depends on a parameter, but none was reached"
            )
        try:
            self._engine(graph, roots, grads, retain_graph, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, graph: Graph, consumer: Consumer, node: Node, accumulator: GradientAccumulator
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        groups = self._groups
        assert groups is not None

        def hook(deltas: tuple[Tensor | None, ...]) -> None:
            at = NodeGradient(node, deltas, consumer.layouts, groups)
            none = all(delta is None for delta in deltas)
            if consumer.unseen and any(d is not None and bool(d.any()) for d in deltas):
                raise RuntimeError(
                    f"Agreement: {consumer.name} has a gradient that does not come through the "
                    "outputs of the model, so it cannot be checked that environments do not mix "
                    "there; let the model return the tensors that the loss is computed from"
                )
            for operand in consumer.operands:
                use = None if none else make_contribution(at, consumer.name, operand)
                accumulator.add(use, operand, graph)

        return hook

    def _engine(
        self,
        graph: Graph,
        roots: list[Tensor],
        grads: list[Tensor],
        retain_graph: bool,
        inputs: list[Any],
    ) -> None:
        if CHECKPOINT not in graph.names:
            torch.autograd.backward(roots, grads, retain_graph, inputs=inputs)
            return
        # Reentrant checkpointing forbids `inputs`, so plain gradients are computed too, and
        # dropped. The checkpointed function runs a backward pass, which BackwardMode sends to this
        # object. The graph is kept, as contributions wait until the pass is over.
        keep = {id(one) for one in inputs if isinstance(one, Tensor)}
        leaves = [leaf(node) for node, name in zip(graph.nodes, graph.names, strict=True)
                  if isinstance(name, tuple)]  # fmt: skip
        dropped = [(one, one.grad) for one in leaves if id(one) not in keep]
        self._dropping += 1
        try:
            for one, _ in dropped:
                one.grad = None
            with self.mode:
                _engine_run_backward(
                    tuple(roots), tuple(grads), True, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        finally:
            self._dropping -= 1
            for one, grad in dropped:
                one.grad = grad


def _node(tensor: Tensor) -> Node:
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    return torch.autograd.graph.get_gradient_edge(tensor).node
