"""Execution of the backward passes inside the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward

from .._notices import warn_once
from .._pending import PendingStep
from ._accumulator import GradientAccumulator, Target
from ._anchors import Anchor, of_loss, of_outputs
from ._contributions import Contribution, Shared
from ._current import require_batch
from ._data import DataRecord
from ._formulas import gradient_of, make_contribution
from ._forward import ForwardRecorder
from ._gramian import Gramian
from ._graph import Graph
from ._groups import Checked, Groups, make_groups
from ._layout import Code
from ._mixing import MixingCheck, make_code
from ._mode import BackwardMode
from ._node_gradient import NodeGradient
from ._nodes import leaf, untouched
from ._plan import CHECKPOINT, Consumer, Plan, make_plan, refuse_compiled, suspects
from ._setup import Setup


class BackwardPass:
    """The backward passes of one context.

    Args:
        setup: the model and what is known about it.
        pending: the step that the environments belong to.
        environments: as :func:`check_environments` returned it.
        batch_size: the number of examples, if the user gave it.
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
        environments: Checked,
        batch_size: int | None,
        grad_scaler: torch.amp.GradScaler | None,
        gram: bool,
    ) -> None:
        self.grad_scaler = grad_scaler
        self.scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        self.started = False
        self.data = DataRecord(setup.model)
        rows = len(environments) if isinstance(environments, Tensor) else batch_size or 0
        self.recorder = ForwardRecorder(
            setup.model, setup.members, setup.batch_dim, self.data, rows
        )
        self.products: Gramian | None = None
        self._setup = setup
        self._pending = pending
        self._environments = environments
        self._batch_size = batch_size
        self._gram = gram
        self._tracked = {id(param): number for number, param in enumerate(setup.params)}
        self._targets: list[Target] = []
        self._accumulator: GradientAccumulator | None = None
        self._mixing = MixingCheck(self._engine)
        self._inner = 0  # backward passes inside this one
        self._outer: Any = None  # the key of the plan of the outer one
        self._batches: list[Groups] = []  # the partitions of the batch
        self._anchors: list[Anchor] = []
        self._code: Code | None = None
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
        self.data.forget()
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
            plan, partitions = self._plan(graph, self._inner)
            self._pass(graph, plan, partitions, roots, grads, retain_graph, self._accumulator)
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
        self._batches = self._make_batches()
        if len(self._batches) == 1:
            require_batch(self._batches[0].examples)
        environments = self._batches[0].environments
        self._code = None
        if environments > 1:
            self._refuse_batch_norms()
        self.recorder.paused = True
        try:
            self._paused_pass(graph, roots, grads, retain_graph)
        finally:
            self.recorder.paused = False
        self.recorder.passed()
        self.data.forget()
        self._pending.add_environments(environments)
        self._passes += 1

    def _paused_pass(
        self, graph: Graph, roots: list[Tensor], grads: list[Tensor], retain_graph: bool
    ) -> None:
        plan, partitions = self._plan(graph)
        self._inner = 0
        groups = self._batches[plan.batch]
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
            self._pass(graph, plan, partitions, roots, grads, retain_graph, accumulator)
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

    # ---- the batch ----

    def _make_batches(self) -> list[Groups]:
        """Return the partitions of the batch. There are several if its parts differ in size."""
        environments, sizes = self._environments, self.recorder.sizes()
        if self._batch_size is not None:
            sizes = [self._batch_size]
        if isinstance(environments, Tensor):
            return self._batches_of_ids(environments, sizes)
        if not sizes:
            raise RuntimeError(
                "Agreement: expected the model to be called inside the context, before backward: "
                "its first input tells the size of the batch; or pass batch_size=... to the "
                "context, or the environment of each example"
            )
        if len(sizes) > 1 and environments is None:
            raise RuntimeError(
                "Agreement: parts of the model were called with batches of different sizes, "
                f"{', '.join(map(str, sizes))}, so one example cannot be one environment; pass a "
                "number of environments that divides them, each of which then has its share of "
                "every batch; or batch_size=... of the one that counts; or use "
                "andmask_ext.backward, with one loss per environment"
            )
        single = sizes == [1] and self._batch_size is None and environments is None
        if single and not self._setup.partitions:  # the last batch of an epoch may be so small
            warn_once(
                self._setup,
                "Agreement: the batch has one example, so there is one environment and nothing to "
                "agree on; if the batch is packed into one row, pass the environment of each "
                "token; if its size cannot be seen, pass batch_size=... to the context",
            )
        return [self._setup.groups(environments, size) for size in sizes]

    def _batches_of_ids(self, ids: Tensor, sizes: list[int]) -> list[Groups]:
        given = self.recorder.all_sizes() if self._batch_size is None else set(sizes)
        if given and len(ids) not in given:
            raise ValueError(
                "environments: expected one id for each example of the batch, of "
                f"{', '.join(map(str, sizes))}, but got {len(ids)}"
            )
        groups = make_groups(ids, len(ids))
        if groups.environments in (1, groups.examples):
            return [groups]
        # A model may pool rows into one output for each environment, as graph networks do.
        return [groups, make_groups(None, groups.environments)]

    def _weights(self, groups: Groups) -> list[float]:
        factor = (groups.examples if self._setup.reduction == "mean" else 1.0) / self.scale
        if groups.size is not None:
            return [factor / groups.size]
        return [factor / size for size in groups.sizes.tolist()]

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

    # ---- the plan ----

    def _plan(self, graph: Graph, inner: int = 0) -> tuple[Plan, list[Groups]]:
        """Return the plan for a graph, and its partitions. A new graph is checked for mixing first.

        Args:
            graph: the graph of a backward pass.
            inner: 0 for the outer pass, else the number of the backward pass inside it.
        """
        plans = self._setup.plans
        sizes = tuple(tensor.shape for tensor in self.recorder.inputs())
        key = plans.key(graph, self._batches, inner)
        if not inner:
            self._outer = key
        # Functions under reentrant checkpointing run their own backward passes. Their graphs are
        # not known yet, so a plan for other sizes cannot be adapted.
        again = CHECKPOINT not in graph.names and bool(sizes)
        if self._setup.check_mixing != "always":
            known = plans.find(key, sizes, graph, self._batches, again)
            if known is not None:
                return known
        self._code = self._code or make_code(self._batches[0].environments, graph)
        if not inner:
            self._check(graph)
        plan, partitions = make_plan(
            graph, self._batches, self._mixing.evidence(inner), self._code, self.data,
            self._setup.check_mixing != "never",
        )  # fmt: skip
        if not inner:
            plan = replace(plan, batch=self._batch_of_loss())
        if plan.certain:
            plans.keep(key, sizes, graph, plan, self._setup.check_mixing == "auto")
        elif inner:
            plans.drop(self._outer)
        return plan, partitions

    def _check(self, graph: Graph) -> None:
        """Run the mixing check."""
        self._anchors = []
        if self._setup.check_mixing != "never" and self._code is not None:
            setup = self._setup
            self._anchors = of_outputs(
                graph, self.recorder.outputs(), setup.batch_dim, setup.output_batch_dim,
                self._batches, self.data,
            )  # fmt: skip
            below = graph.below(*[graph.nodes.index(anchor.node) for anchor in self._anchors])
            if any(index not in below for index in suspects(graph)):
                dim = setup.batch_dim if setup.output_batch_dim is None else setup.output_batch_dim
                self._anchors += [
                    anchor
                    for anchor in of_loss(graph, dim, self._batches)
                    if graph.nodes.index(anchor.node) not in below
                ]
        with untouched(self._setup.model.parameters()):
            self._mixing.find(graph, self._anchors, self._tracked, self._batches, self._code)

    def _batch_of_loss(self) -> int:
        """Return the partition of the examples that the loss is the mean of."""
        found = sorted({anchor.partition for anchor in self._anchors})
        factors = {tuple(self._weights(self._batches[number])) for number in found}
        if len(factors) > 1:
            raise RuntimeError(
                "Agreement: the loss is made of outputs of different sizes, in which the "
                "environments have different shares, so they have no common mean; let the model "
                "return outputs of one size, or use andmask_ext.backward"
            )
        return found[0] if found else 0

    # ---- the engine ----

    def _pass(
        self,
        graph: Graph,
        plan: Plan,
        partitions: list[Groups],
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
            hook = self._hook(graph, consumer, node, partitions, accumulator)
            handles.append(node.register_prehook(hook))
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
        self,
        graph: Graph,
        consumer: Consumer,
        node: Node,
        partitions: list[Groups],
        accumulator: GradientAccumulator,
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(deltas: tuple[Tensor | None, ...]) -> None:
            none = all(delta is None for delta in deltas)
            if consumer.unseen and any(d is not None and bool(d.any()) for d in deltas):
                raise RuntimeError(
                    f"Agreement: {consumer.name} has a gradient that does not come through the "
                    "outputs of the model, so it cannot be checked that environments do not mix "
                    "there; let the model return the tensors that the loss is computed from"
                )
            for operand in consumer.operands:
                use: Contribution | None = None
                if not none and consumer.shared:
                    grad = gradient_of(node, operand, deltas)
                    use = Shared(grad, operand.shape, self._shares(partitions[0]))
                elif not none:
                    at = NodeGradient(node, deltas, consumer.layouts, partitions)
                    use = make_contribution(at, consumer.name, operand)
                accumulator.add(use, operand, graph)

        return hook

    def _shares(self, groups: Groups) -> Tensor:
        """Return the share of each environment in the loss of the batch."""
        if self._setup.reduction == "sum":
            return torch.ones(groups.environments)
        return groups.sizes / groups.examples

    def _engine(
        self,
        graph: Graph,
        roots: Sequence[Any],
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
