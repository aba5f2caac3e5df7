"""Backward passes of autograd's engine, also over regions under reentrant checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from ._graph import CHECKPOINT, Graph
from ._nodes import leaf


class Engine:
    """Runs backward passes.

    Attributes:
        mode: sends backward passes inside of functions to their replacement.
        dropping: whether plain gradients that arrive are dropped.
    """

    def __init__(self) -> None:
        self.mode: TorchFunctionMode | None = None
        self._dropping = 0

    @property
    def dropping(self) -> bool:
        return self._dropping > 0

    def __call__(
        self,
        graph: Graph,
        roots: Sequence[Any],
        grads: list[Tensor],
        retain_graph: bool,
        inputs: list[Any],
    ) -> None:
        """Run a backward pass.

        Args:
            graph: the graph.
            roots: its roots.
            grads: their gradients.
            retain_graph: whether to keep what the graph has saved.
            inputs: the nodes and leaves to reach.
        """
        if CHECKPOINT not in graph.names:
            torch.autograd.backward(roots, grads, retain_graph, inputs=inputs)
            return
        # Reentrant checkpointing forbids `inputs`, so plain gradients are computed too, and
        # dropped. The checkpointed function runs a backward pass, which BackwardMode sends to its
        # replacement. The graph is kept, as contributions wait until the pass is over.
        assert self.mode is not None
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
