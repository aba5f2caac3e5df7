"""Execution of the backward passes inside the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .._pending import Hook, PendingStep
from ._accumulator import GradientAccumulator, Target
from ._anchors import Anchor, find_anchors, places
from ._batch import (
    BatchOptions,
    batch_of_loss,
    make_batches,
    note_loss,
    note_second_pass,
    refuse_batch_norms,
    refuse_new_params,
    shares_of,
    weights_of,
)
from ._consumer import Consumer
from ._contributions import Contribution, Shared
from ._current import require_batch
from ._data import DataRecord
from ._engine import Engine
from ._flows import Entrance
from ._formulas import gradient_of, make_contribution
from ._forward import ForwardRecorder
from ._gramian import Gramian
from ._graph import CHECKPOINT, Graph
from ._groups import Groups
from ._layout import Code
from ._mixing import MixingCheck, OtherRegion, make_code
from ._node_gradient import NodeGradient
from ._nodes import leaf, node_of, untouched
from ._plan import Plan, make_plan, suspects
from ._refusals import added_later, refuse_compiled, refuse_compiled_modules
from ._setup import Setup
from ._user_hooks import UserHooks


class BackwardPass:
    """The backward passes of one context.

    Args:
        setup: the model and what is known about it.
        pending: the step that the environments belong to.
        batch: what the user said of the batch.
        grad_scaler: the scaler that scaled the loss.
        gram: whether scalar products of all pairs of environments are wanted.

    Attributes:
        grad_scaler: as above.
        scale: the scale of the gradient scaler; 1 without one.
        started: whether any moments may have changed.
        recorder: records the calls of the model.
        engine: runs backward passes.
        products: the scalar products, after the backward pass.
    """

    def __init__(
        self,
        setup: Setup,
        pending: PendingStep,
        batch: BatchOptions,
        grad_scaler: torch.amp.GradScaler | None,
        gram: bool,
    ) -> None:
        self.grad_scaler = grad_scaler
        self.scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        self.started = False
        self.data = DataRecord(setup.modules)
        self.recorder = ForwardRecorder(
            setup.model, {id(one) for one in setup.modules}, setup.batch_dim, self.data, batch.rows
        )
        self.engine = Engine()
        self.products: Gramian | None = None
        self._setup = setup
        self._pending = pending
        self._batch = batch
        self._gram = gram
        self._tracked = {id(param): number for number, param in enumerate(setup.params)}
        self._targets: list[Target] = []
        self._accumulator: GradientAccumulator | None = None
        self._mixing = mixing = MixingCheck(self.engine, self.data)
        self.hooks = UserHooks(lambda: mixing.running, setup)  # not self: no cycle
        self._inner = 0  # backward passes inside this one
        self._entrance = Entrance()
        self._outer: Any = None  # the key of the plan of the outer one
        self._batches: list[Groups] = []  # the partitions of the batch
        self._of_loss: Groups  # the one that the loss is the mean of
        self._anchors: list[Anchor] = []
        self._code: Code | None = None
        self._passes = 0

    def open(self) -> None:
        """Find the moments of each parameter. The step must be open to this context."""
        slots = self._pending.slots
        for param in self._setup.params:
            if id(param) not in slots:
                raise RuntimeError(
                    f"Agreement: {self._setup.name(param)} is no parameter of the optimizer any "
                    "more; make a new Agreement"
                )
            hooks = param._post_accumulate_grad_hooks or {}
            if any(not isinstance(hook, Hook) for hook in hooks.values()):
                raise RuntimeError(
                    f"Agreement: {self._setup.name(param)} has a hook of "
                    "register_post_accumulate_grad_hook, which would never run (an optimizer in "
                    "the backward pass?); call remove() of what the registration returned, and "
                    "step the optimizer after the context"
                )
        places = [slots[id(param)] for param in self._setup.params]
        self._targets = [
            Target(param, self._pending.moments[group], index)
            for param, (group, index) in zip(self._setup.params, places, strict=True)
        ]

    def module_hooks(self) -> AbstractContextManager[None]:
        """Return a context in which backward hooks of modules do not see the probes."""
        return self.hooks.of_modules(self._setup.modules)

    def close(self) -> None:
        """Release the graph, the moments and the hooks."""
        self.data.close()
        del self._mixing
        self._anchors = []
        self.engine.mode = None

    def receive(self, param: Tensor) -> None:
        """Raise: a backward pass outside of this context's control produced a gradient."""
        if self.engine.dropping:
            return
        if all(param is not known for known in self._setup.params):
            raise RuntimeError(added_later(self._setup.name(param)))
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
        graph = Graph([node_of(root) for root in roots], self._tracked)
        if self._mixing.running:
            self._mixing.inner_pass(graph, roots, grads)
        elif self._accumulator is not None:  # inside another pass: reentrant checkpointing
            self._inner += 1
            plan, partitions = self._plan(graph, roots, grads, self._inner)
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
        if any(target.param._backward_hooks for target in self._targets):
            self._pending.owes_hooks = True
        if not self.recorder.inputs():
            refuse_compiled_modules(self._setup.modules)
        self._batches = make_batches(self._setup, self.recorder, self._batch)
        if len(self._batches) == 1:
            require_batch(self._batches[0].examples)
        environments = self._batches[0].environments
        self._code = None
        if environments > 1:
            refuse_batch_norms(self._setup, self.recorder.batch_norms)
        self.recorder.paused = True
        try:
            try:
                self._paused_pass(graph, roots, grads, retain_graph)
            except OtherRegion:
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
        self._anchors = []
        plan, partitions = self._plan(graph, roots, grads)
        uses = [graph.nodes[consumer.index] for consumer in plan.consumers]
        note_second_pass(self._setup, uses, id(self), self._passes, self.recorder.stale)
        self._inner = 0
        groups = self._batches[plan.batch]
        batch = replace(self._batch, accumulates=self._batch.accumulates or self._passes > 0)
        outputs, scaler = self.recorder.outputs(), self.grad_scaler
        amounts = note_loss(self._setup, graph, groups, batch, outputs, scaler)
        self._of_loss = groups
        scale = self.scale * self._batch.loss_scale
        weights, products = weights_of(groups, self._setup.reduction, scale, amounts), None
        if self._gram or any(target.moments._tracks_norms for target in self._targets):
            products = Gramian(self._gram, groups, weights)
        accumulator = GradientAccumulator(
            self._targets, groups, weights, plan.deferred, self._setup.treatments, products
        )
        self._accumulator = accumulator
        self.started = True
        others = [leaf(graph.nodes[index]) for index in plan.leaves]
        refuse_new_params(self._setup, others)
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

    # ---- the plan ----

    def _plan(
        self, graph: Graph, roots: list[Tensor], grads: list[Tensor], inner: int = 0
    ) -> tuple[Plan, list[Groups]]:
        """Return the plan for a graph, and its partitions. A new graph is checked for mixing first.

        Args:
            graph: the graph of a backward pass.
            roots: its roots.
            grads: their gradients.
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
        if self._setup.check_mixing != "always" and not self._entrance.moved:
            known = plans.find(key, sizes, graph, self._batches, again)
            if known is not None and self._holds(known[0], graph, roots, grads):
                return known
        self._code = self._code or make_code(self._batches[0].environments, graph)
        if not inner:
            self._check(graph)
        elif self._code is not None and not self._anchors and self._setup.check_mixing != "never":
            plans.drop(self._outer)
            raise OtherRegion
        plan, partitions = make_plan(
            graph, self._batches, self._mixing.evidence(inner), self._code, self.data,
            replace(self._entrance, moves_inside=self._mixing.moves_inside),
            [] if inner else places(self._anchors, graph),
            self._setup.batch_dim, self._setup.check_mixing != "never",
        )  # fmt: skip
        if not inner:
            batch = batch_of_loss(self._anchors, self._batches, self._setup.reduction)
            plan = replace(plan, batch=batch)
        plan = replace(plan, quiet=tuple(self._mixing.quiet(inner)))
        if plan.quiet and (inner or plan.deferred):  # gradients inside are not known before
            plan = replace(plan, certain=False)
        if plan.certain:
            plans.keep(key, sizes, graph, self._batches, plan, self._setup.check_mixing == "auto")
        if inner and (plan.moves or not plan.certain):  # next time it may have to be made again
            plans.drop(self._outer)
        return plan, partitions

    def _holds(self, plan: Plan, graph: Graph, roots: list[Tensor], grads: list[Tensor]) -> bool:
        """Return whether gradients are zero where they were when the plan was made."""
        if not plan.quiet:
            return True
        with self._untouched():
            return self._mixing.is_quiet(graph, roots, grads, plan.quiet)

    def _check(self, graph: Graph) -> None:
        """Run the mixing check."""
        setup = self._setup
        never = setup.check_mixing == "never" or self._code is None
        self._anchors = [] if never else find_anchors(
            graph, self.recorder.outputs(), setup.batch_dim, setup.output_batch_dim,
            self._batches, self.data, suspects(graph, self.data)[0],
        )  # fmt: skip
        data = [leaf(node) for node in graph.nodes if self.data.holds(node)]
        with self._untouched(data):
            self._mixing.find(graph, self._anchors, self._tracked, self._batches, self._code, data)

    @contextmanager
    def _untouched(self, data: Sequence[Tensor] = ()) -> Iterator[None]:
        """Keep what probes leave out of ``.grad``."""
        with untouched([*self._setup.model.parameters(), *data]), self.hooks.untouched():
            yield

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
        outside = self._entrance
        self._entrance = outside.of_regions(plan.apart, plan.moves)
        try:
            self.engine(graph, roots, grads, retain_graph, inputs)
        finally:
            self._entrance = outside
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
            none = all(delta is None or delta.numel() == 0 for delta in deltas)
            if consumer.is_new(deltas):
                raise RuntimeError(
                    f"Agreement: {consumer.name} has a gradient that does not come through the "
                    "outputs of the model, so it cannot be checked that environments do not mix "
                    "there; let the model return the tensors that the loss is computed from"
                )
            at = NodeGradient(node, deltas, consumer.layouts, partitions)
            for operand in consumer.operands:
                use: Contribution | None = None
                if not none and consumer.shared:
                    grad = gradient_of(node, operand, deltas)
                    shares = shares_of(self._of_loss, self._setup.reduction)
                    use = Shared(grad, operand.shape, shares)
                elif not none:
                    use = make_contribution(at, consumer.name, operand)
                accumulator.add(use, operand, graph)

        return hook
