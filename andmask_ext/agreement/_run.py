"""What happens to backward passes inside the context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward
from torch.overrides import TorchFunctionMode

from ._batch import Watch
from ._constants import Constants
from ._consumers import Arrival, axes_of, make_use
from ._graph import Graph
from ._groups import Environments, Groups
from ._layout import Evidence
from ._nodes import leaf, shape_of
from ._plan import CHECKPOINT, Consumer, Plan, make_plan, suspects
from ._session import Record, Session, Target

if TYPE_CHECKING:
    from ._agreement import Agreement

_BACKWARDS = (torch.Tensor.backward, torch.autograd.backward)
_RECURRENT = frozenset(
    (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
)  # their fused kernels hide the steps from autograd


@contextmanager
def _without_fused_kernels() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class BackwardMode(TorchFunctionMode):
    """Leads backward passes to a :class:`Run`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        run.mode = self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _BACKWARDS:
            return _call_backward(self._run, *args, **(kwargs or {}))
        if func in _RECURRENT:
            with _without_fused_kernels():
                return func(*args, **(kwargs or {}))
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, (Tensor, tuple)):
            self._run.constants.watch(result, args, kwargs)
        return result


def _call_backward(
    run: Run,
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
    *,
    gradient: Tensor | None = None,
) -> None:
    if create_graph or inputs is not None or grad_variables is not None:
        raise RuntimeError(
            "Agreement: expected a plain loss.backward() inside the context, but got "
            "create_graph, inputs or grad_variables"
        )
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = gradient if gradient is not None else grad_tensors
    grads = [given] if given is None or isinstance(given, Tensor) else list(given)
    if len(grads) == 1 and grads[0] is None:
        grads = [None] * len(roots)
    for root, grad in zip(roots, grads, strict=True):
        if grad is None and root.numel() != 1:
            raise RuntimeError(
                "Agreement: expected a scalar loss, or its gradient, but got an output of shape "
                f"{tuple(root.shape)}"
            )
    starts = [torch.ones_like(r) if g is None else g for r, g in zip(roots, grads, strict=True)]
    live = [(r, g) for r, g in zip(roots, starts, strict=True) if r.requires_grad]
    if not live:
        raise RuntimeError("Agreement: expected a loss that requires gradients, but none does")
    run.backward([r for r, _ in live], [g.detach() for _, g in live], bool(retain_graph))


class Run:
    """The backward passes of one context.

    Attributes:
        grad_scaler: as given to the context (read by the optimizers).
        scale: of the gradient scaler.
        started: whether any moments may have been changed.
        targets: where the moments of each parameter are.
    """

    targets: list[Target]
    mode: BackwardMode

    def __init__(
        self,
        owner: Agreement,
        environments: Environments,
        watch: Watch,
        constants: Constants,
        grad_scaler: torch.amp.GradScaler | None,
        reduction: str,
        plans: dict[Any, Plan],
        records: dict[int, Record],
    ) -> None:
        self.watch = watch
        self.constants = constants
        self.grad_scaler = grad_scaler
        self.scale = 1.0 if grad_scaler is None else grad_scaler.get_scale()
        self.started = False
        self._owner = owner
        self._environments = environments
        self._reduction = reduction
        self._plans = plans
        self._records = records
        self._tracked = {id(param): number for number, param in enumerate(owner._params)}
        self._session: Session | None = None
        self._evidence: dict[Any, dict[int, list[Evidence]]] = {}
        self._probing = False
        self._factors: Tensor | None = None  # of the examples, in this probe
        self._groups: Groups | None = None
        self._passes = 0
        self._dropping = 0  # plain gradients of parameters arrive, and are not wanted

    def receive(self, param: Tensor) -> None:
        """Complain of a gradient that came without us (called by hooks of the optimizers)."""
        if self._dropping:
            return
        raise RuntimeError(
            f"Agreement: {self._owner._name(param)} received a gradient from a backward pass that "
            "was not seen; expected loss.backward() in the thread of the context"
        )

    def require_complete(self) -> None:
        """Raise unless there was a backward pass."""
        if self._passes == 0:
            raise RuntimeError(
                "Agreement: expected a backward pass inside the context, but there was none"
            )

    # ---- one backward pass ----

    def backward(self, roots: list[Tensor], grads: list[Tensor], retain_graph: bool) -> None:
        """Run a backward pass: plain gradients for what is not tracked, moments for the rest."""
        graph = Graph([_node(root) for root in roots], self._tracked)
        if self._probing:
            self._probe_pass(graph, roots, grads, True, inner=True)
        elif self._session is not None:  # inside another: reentrant checkpointing
            self._pass(graph, self._plan(graph), roots, grads, retain_graph, self._session)
        else:
            self._outer_pass(graph, roots, grads, retain_graph)

    def _outer_pass(
        self, graph: Graph, roots: list[Tensor], grads: list[Tensor], retain_graph: bool
    ) -> None:
        groups = self._groups = self._make_groups()
        if groups.environments > 1:
            self._refuse_batch_norms()
        plan = self._plan(graph)
        self.watch.clear()
        session = Session(
            self.targets, groups, self._weights(groups), plan.deferred, self._records
        )
        self._session = session
        self.started = True
        others = [leaf(graph.nodes[index]) for index in plan.leaves]
        before = [other.grad for other in others]
        try:
            for other in others:
                other.grad = None
            self._pass(graph, plan, roots, grads, retain_graph, session)
            session.finish()
        except BaseException:
            for other, grad in zip(others, before, strict=True):
                other.grad = grad
            raise
        finally:
            self._session = None
        for other, grad in zip(others, before, strict=True):
            if grad is not None:  # not in place: the context may still fail
                other.grad = grad if other.grad is None else grad + other.grad
        for moments in {id(t.moments): t.moments for t in self.targets}.values():
            moments.end_environments(groups.environments)
        optimizer = self._owner._optimizer
        if optimizer is not None:
            optimizer._environments += groups.environments
        self._passes += 1

    def _make_groups(self) -> Groups:
        environments, sizes = self._environments, self.watch.sizes
        if isinstance(environments, Tensor):
            return self._owner._groups(environments, environments.shape[0])
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
        return self._owner._groups(environments, examples)

    def _weights(self, groups: Groups) -> list[float]:
        factor = (groups.examples if self._reduction == "mean" else 1.0) / self.scale
        if groups.size is not None:
            return [factor / groups.size]
        return [factor / size for size in groups.sizes.tolist()]

    def _plan(self, graph: Graph) -> Plan:
        """Return what to do with a graph, after probes if it is new."""
        groups = self._groups
        assert groups is not None
        prove = self._owner._prove
        signature = graph.structure(groups.examples, prove == "auto")
        structure = (signature, groups.environments, groups.examples)
        sizes = tuple(tensor.shape for tensor in self.watch.inputs)
        plan = self._plans.get((structure, sizes)) if sizes else None
        if plan is not None:
            return plan
        plan = self._plans.get(structure)
        plan = None if plan is None else plan.at(graph, groups.examples)
        if plan is None:
            if self._session is None:
                self._find_evidence(graph, groups, signature)
            evidence = self._evidence.get(signature, {})
            plan = make_plan(graph, groups, evidence, self.constants, prove != "never")
        if plan.certain:
            self._plans[structure] = plan
            if sizes and self._session is None:
                self._plans[structure, sizes] = plan
        return plan

    def _refuse_batch_norms(self) -> None:
        modules = self.watch.batch_norms
        model = self._owner._model
        if not modules or model is None:
            return
        names = [
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in model.named_modules()
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
        session: Session,
    ) -> None:
        busy: list[bool] = []
        handles = []
        for consumer in plan.consumers:
            node = graph.nodes[consumer.index]
            for operand in consumer.operands:
                session.expect(operand.params)
            hook = self._hook(graph, consumer, node, session, busy)
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
        self, graph: Graph, consumer: Consumer, node: Node, session: Session, busy: list[bool]
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        groups = self._groups
        assert groups is not None

        def hook(deltas: tuple[Tensor | None, ...]) -> None:
            if busy:  # the node is being called by a use
                return
            busy.append(True)
            try:
                at = Arrival(node, deltas, consumer.layouts, groups)
                none = all(delta is None for delta in deltas)
                if consumer.unseen and any(d is not None and bool(d.any()) for d in deltas):
                    raise RuntimeError(
                        f"Agreement: {consumer.name} has a gradient that does not come through the "
                        "outputs of the model, so that it cannot be proved that environments do "
                        "not mix there; return what the loss is made of from the model"
                    )
                for operand in consumer.operands:
                    use = None if none else make_use(at, consumer.name, operand)
                    session.add(use, operand, graph)
            finally:
                busy.pop()

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
        # Reentrant checkpointing allows no `inputs`: plain gradients are computed as well, and
        # dropped. Its function runs a backward pass of its own, which the mode leads to us.
        keep = {id(one) for one in inputs if isinstance(one, Tensor)}
        leaves = [leaf(node) for node, name in zip(graph.nodes, graph.names, strict=True)
                  if isinstance(name, tuple)]  # fmt: skip
        dropped = [(one, one.grad) for one in leaves if id(one) not in keep]
        self._dropping += 1
        try:
            with self.mode:
                _engine_run_backward(
                    tuple(roots), tuple(grads), retain_graph, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        finally:
            self._dropping -= 1
            for one, grad in dropped:
                one.grad = grad

    # ---- probes ----

    def _find_evidence(self, graph: Graph, groups: Groups, signature: Any) -> None:
        """Run backward passes from the model's outputs, as :class:`Evidence` wants them."""
        self._evidence = {}
        anchors = self.watch.anchors(groups.examples)
        if groups.environments == 1 or not anchors or self._owner._prove == "never":
            return
        generator = torch.Generator().manual_seed(0)
        probe = Graph([_node(anchor) for anchor in anchors], self._tracked)
        noise = [torch.randn(one.shape, generator=generator).to(one) for one in anchors]
        powers = 8 if any(one.dtype == torch.float16 for one in anchors) else 16
        found: dict[int, list[Evidence]] = {}
        for round in range(3):
            self._factors = None
            grads = noise
            if round:
                places = torch.randperm(groups.environments, generator=generator)
                self._factors = torch.pow(2.0, places % powers).double()[groups.ids]
                grads = [
                    one * self.watch.along_batch(self._factors, anchor)
                    for one, anchor in zip(noise, anchors, strict=True)
                ]
            self._probing = True
            try:
                found = self._probe_pass(probe, anchors, grads, True, inner=False)
            finally:
                self._probing = False
        own = {node: index for index, node in enumerate(graph.nodes)}
        self._evidence[signature] = {
            own[probe.nodes[index]]: seen
            for index, seen in found.items()
            if probe.nodes[index] in own
        }

    def _probe_pass(
        self,
        graph: Graph,
        roots: list[Tensor],
        grads: list[Tensor],
        retain_graph: bool,
        inner: bool,
    ) -> dict[int, list[Evidence]]:
        groups, factors = self._groups, self._factors
        assert groups is not None
        signature = graph.structure(groups.examples, self._owner._prove == "auto")
        found = self._evidence.setdefault(signature, {})
        handles, inputs = [], []

        def watch(index: int, node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
            def hook(deltas: tuple[Tensor | None, ...]) -> None:
                for evidence, delta in zip(found[index], deltas, strict=True):
                    if delta is not None:
                        evidence.add(delta, factors)

            return hook

        for index in suspects(graph):
            node = graph.nodes[index]
            axes = axes_of(graph.names[index])  # type: ignore[arg-type]
            found.setdefault(
                index,
                [
                    Evidence(shape_of(node, output), groups.examples, axes)
                    for output in range(len(node._input_metadata))
                ],
            )
            handles.append(node.register_prehook(watch(index, node)))
            inputs.append(GradientEdge(node, 0))
        if inner:
            inputs += [
                leaf(node) for i, node in enumerate(graph.nodes) if graph.is_untracked_leaf(i)
            ]
        try:
            if inputs:
                self._engine(graph, roots, grads, retain_graph, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _node(tensor: Tensor) -> Node:
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    return torch.autograd.graph.get_gradient_edge(tensor).node
