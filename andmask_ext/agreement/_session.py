"""One backward pass: uses of parameters come in, moments go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ..moments import Moments
from ._chain import pull_back
from ._graph import Graph, Operand
from ._groups import Groups
from ._uses import Convolution, Lookup, OneByOne, Outer, Stacked, Use, add_up

# Gradients of several environments are held only in buffers of at most this size.
SCRATCH_BYTES = 32 << 20
# Small gradients wait for each other: a call into the native library costs microseconds.
_FLUSH_BYTES = 256 << 10


@dataclass
class Target:
    """Where the moments of a parameter are kept."""

    param: Tensor
    moments: Moments
    index: int


@dataclass
class Record:
    """How a parameter has been treated."""

    uses: int = 0
    paths: list[str] = field(default_factory=list)


@dataclass
class _Entry:
    use: Use
    operand: Operand
    graph: Graph

    @property
    def nodes(self) -> list[Node]:
        """From the node that made the operand down to the parameter's leaf."""
        return [self.graph.nodes[i] for i in self.operand.chain or (self.operand.root,)]


class Session:
    """Collects the uses of each parameter, and adds their sum to its moments when it is complete.

    Args:
        targets: by the parameter's number.
        groups: the environments.
        weights: a factor for each environment, or one for all.
        deferred: treat no parameter before :meth:`finish`: uses may come that are not announced.
        records: by the parameter's number; filled for the report.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        groups: Groups,
        weights: list[float],
        deferred: bool,
        records: dict[int, Record],
    ) -> None:
        self._targets = targets
        self._groups = groups
        self._weights = weights if len(weights) > 1 else weights * groups.environments
        self._deferred = deferred
        self._records = records
        self._expected: dict[int, int] = {}
        self._entries: dict[int, list[_Entry]] = {}
        self._done: set[int] = set()
        self._waiting: dict[int, tuple[list[Target], list[Tensor]]] = {}
        self._bytes = 0

    def expect(self, params: Sequence[int]) -> None:
        """Announce one use of some parameters."""
        for param in params:
            self._expected[param] = self._expected.get(param, 0) + 1

    def add(self, use: Use | None, operand: Operand, graph: Graph) -> None:
        """Take one use of an operand; None: its gradient is zero."""
        for param in operand.params:
            if param in self._done:
                raise RuntimeError(
                    "Agreement: a parameter was used again after all uses known of it: a backward "
                    "pass inside a function's backward has reached it; expected such passes only "
                    "in torch.utils.checkpoint"
                )
            if isinstance(use, OneByOne) and (self._expected[param] > 1 or self._deferred):
                # Its node is released before the last use comes.
                use = Stacked(use.stacked(0, self._groups.environments), use.shape, use.path)
            if use is not None:
                self._entries.setdefault(param, []).append(_Entry(use, operand, graph))
            self._expected[param] -= 1
            if self._expected[param] == 0 and not self._deferred:
                self._complete(param)

    def finish(self) -> None:
        """Treat all parameters that are left."""
        for param in list(self._entries):
            self._complete(param)
        self._flush()

    # ---- one parameter ----

    def _complete(self, param: int) -> None:
        self._done.add(param)
        entries = self._entries.pop(param, [])
        if not entries:
            return
        target = self._targets[param]
        record = self._records.setdefault(param, Record())
        record.uses = len(entries)
        record.paths = sorted({entry.use.path for entry in entries})
        with torch.no_grad():
            outer = _as_outer(entries, target.param)
            if outer is not None:
                self._add_outer(target, outer)
            elif len(entries) > 1 or not self._add_single(target, entries[0]):
                self._add_in_chunks(target, entries, param)
                record.paths.append("gradients of a few environments at a time")

    def _memory(self, target: Target) -> list[Tensor | None]:
        lists = target.moments.open_memory([target.index], self._groups.environments)
        return [one[0] if one else None for one in lists]

    def _add_outer(self, target: Target, outer: Outer) -> None:
        shape = outer.grads.shape[2], outer.activations.shape[2]
        memory = [None if one is None else one.view(shape) for one in self._memory(target)]
        torch.ops.andmask.accumulate_outer_.default(
            *memory, outer.activations, outer.grads, outer.groups.order, outer.groups.offsets,
            target.moments.count, self._weights,
        )  # fmt: skip

    def _add_single(self, target: Target, entry: _Entry) -> bool:
        use, same = entry.use, entry.operand.order == "same"
        if isinstance(use, Convolution) and same and target.param.is_contiguous():
            memory = [None if m is None else m.view(use.shape) for m in self._memory(target)]
            torch.ops.andmask.accumulate_convolution_.default(
                *memory, use.images, use.grads, use.groups.order, use.groups.offsets,
                target.moments.count, use.stride, use.padding, use.dilation, use.channel_groups,
                self._weights,
            )  # fmt: skip
            return True
        if isinstance(use, Stacked):
            grads: Tensor | None = use.grads
            if not same or use.shape != target.param.shape:
                grads = pull_back(use.grads, entry.nodes, 1) if entry.operand.chain else None
            if grads is None:
                return False
            indices, waiting = self._waiting.setdefault(id(target.moments), ([], []))
            indices.append(target)
            waiting.append(grads)
            self._bytes += grads.nbytes
            if self._bytes >= _FLUSH_BYTES:
                self._flush()
            return True
        if isinstance(use, Lookup) and same and target.moments.kinds in ((), ("votes",)):
            self._add_lookup(target, use)
            return True
        return False

    def _flush(self) -> None:
        """Add the gradients that have been waiting for others, in one call."""
        for targets, grads in self._waiting.values():
            moments = targets[0].moments
            indices = [target.index for target in targets]
            lists = moments.open_memory(indices, self._groups.environments)
            torch.ops.andmask.accumulate_.default(
                *lists, grads, moments.count, self._weights, True
            )
        self._waiting.clear()
        self._bytes = 0

    def _add_lookup(self, target: Target, use: Lookup) -> None:
        total, votes = self._memory(target)[:2]
        gradients, lines, environments = use.segments()
        for memory in (total, votes):
            if memory is not None and target.moments.count == 0:
                memory.zero_()
        if votes is not None:
            signs = (gradients > 0).to(votes.dtype) - (gradients < 0).to(votes.dtype)
            votes.index_add_(0, lines, signs)
        assert total is not None
        if len(set(self._weights)) > 1:
            weights = torch.tensor(self._weights, dtype=total.dtype, device=total.device)
            gradients *= weights[environments].unsqueeze(1)
            total.index_add_(0, lines, gradients)
        else:
            total.index_add_(0, lines, gradients, alpha=self._weights[0])

    def _add_in_chunks(self, target: Target, entries: Sequence[_Entry], param: int) -> None:
        lists = target.moments.open_memory([target.index], self._groups.environments)
        total = lists[0][0]
        parts = [partial(self._gradients, entry, target.param) for entry in entries]
        count = self._groups.environments
        step = max(1, SCRATCH_BYTES // max(1, total.numel() * total.element_size()))
        for begin in range(0, count, step):
            end = min(begin + step, count)
            weights = self._weights[begin:end]
            torch.ops.andmask.accumulate_.default(
                *lists, [add_up(parts, begin, end)], target.moments.count + begin, weights, True
            )

    def _gradients(self, entry: _Entry, param: Tensor, begin: int, end: int) -> Tensor:
        stacked = entry.use.stacked(begin, end)
        if entry.operand.chain:
            pulled = pull_back(stacked, entry.nodes, 1)
            if pulled is not None:
                return pulled
        root = entry.nodes[0]
        metadata = root._input_metadata[entry.operand.output]
        edge = GradientEdge(root, entry.operand.output)
        return torch.stack([
            torch.autograd.grad([edge], [param], [grad.to(metadata.dtype)], True)[0]
            for grad in stacked
        ])  # fmt: skip


def _as_outer(entries: Sequence[_Entry], param: Tensor) -> Outer | None:
    """Return all uses as one sum of outer products in the parameter's own order, if they are."""
    parts: list[Outer] = []
    if not param.is_contiguous():
        return None
    for entry in entries:
        if not isinstance(entry.use, Outer) or entry.operand.order is None:
            return None
        same = entry.operand.order == "same"
        parts.append(entry.use if same else entry.use.transposed())
        if {parts[-1].grads.dtype, parts[-1].activations.dtype} != {parts[0].grads.dtype}:
            return None
    if len(parts) == 1:
        return parts[0]
    return Outer(
        torch.cat([part.activations for part in parts], 1),
        torch.cat([part.grads for part in parts], 1),
        parts[0].groups,
        parts[0].shape,
    )
