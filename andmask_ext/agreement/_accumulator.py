"""One backward pass: uses of parameters come in, moments go out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._devices import by_device
from .._dtypes import wide_dtype
from .._norms import squared_norm
from ..moments import Moments
from ._contributions import Contribution, Convolution, Lookup, OneByOne, Outer, Stacked, add_up
from ._gramian import Gramian, Part, exact
from ._graph import Graph, Operand
from ._groups import Groups
from ._views import View

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
class Treatment:
    """How a parameter has been treated."""

    uses: int = 0
    paths: list[str] = field(default_factory=list)


@dataclass
class _Entry:
    use: Contribution
    operand: Operand
    graph: Graph


class GradientAccumulator:
    """Collects the uses of each parameter, and adds their sum to its moments when it is complete.

    Args:
        targets: by the parameter's number.
        groups: the environments.
        weights: a factor for each environment, or one for all.
        deferred: treat no parameter before :meth:`finish`: uses may come that are not announced.
        treatments: by the parameter's number; filled for the report.
        products: takes scalar products of the gradients, if there is one.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        groups: Groups,
        weights: list[float],
        deferred: bool,
        treatments: dict[int, Treatment],
        products: Gramian | None = None,
    ) -> None:
        self.products = products
        self._targets = targets
        self._groups = groups
        self._weights = weights
        self._deferred = deferred
        self._treatments = treatments
        self._expected: dict[int, int] = {}
        self._entries: dict[int, list[_Entry]] = {}
        self._done: set[int] = set()
        self._waiting: dict[int, tuple[list[Target], list[Tensor]]] = {}
        self._bytes = 0

    def expect(self, params: Sequence[int]) -> None:
        """Announce one use of some parameters."""
        for param in params:
            self._expected[param] = self._expected.get(param, 0) + 1

    def add(self, use: Contribution | None, operand: Operand, graph: Graph) -> None:
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
        with torch.no_grad():  # as it is while the engine runs
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
        paths = sorted({entry.use.path for entry in entries})
        record = self._treatments[param] = Treatment(len(entries), paths)
        squares = None
        if self.products is not None and not self._take_products(param, entries):
            squares = torch.empty_like(target.param, dtype=wide_dtype(target.param))
        reason = self._add_directly(target, entries, squares)
        if reason:
            self._add_in_chunks(target, entries, param)
            record.paths.append(f"gradients of a few environments at a time ({reason})")

    def _take_products(self, param: int, entries: list[_Entry]) -> bool:
        """Take scalar products; or return False, if they will be had from squares almost for free.

        Squares are those that the native ops add up with the moments, in memory of their own.
        """
        products, target = self.products, self._targets[param]
        assert products is not None
        joined = _joined(entries)
        use, view = joined[0].use, joined[0].operand.view
        if len(joined) == 1 and view is not None:
            if isinstance(use, Outer) and products.of_factors(param, use):
                return True
            tiled = isinstance(use, Convolution) or (
                isinstance(use, Outer) and use.activations[..., 0].numel() > products.environments
            )
            first = target.moments.count == 0 and "squares" not in target.moments.kinds
            if not products.pairs and tiled and first and self._is_whole(target, joined[0]):
                return False
            # In whatever order of elements: it is the same in all environments.
            parts: list[Part] = [use.stacked]
        else:
            parts = [partial(self._gradients, entry, target.param) for entry in entries]
        with exact(target.param):
            products.of_gradients(param, parts, target.param)
        return True

    def _is_whole(self, target: Target, entry: _Entry) -> bool:
        """Return whether a native op adds this use to all of a parameter."""
        view = entry.operand.view
        assert view is not None
        return view.full and target.param.is_contiguous() and self._is_direct(target, entry)

    def _add_directly(self, target: Target, entries: list[_Entry], squares: Tensor | None) -> str:
        """Add uses that nothing has to be added to before they vote; or say why that cannot be.

        Args:
            target: where to.
            entries: the uses.
            squares: memory for them, only to know the norms of the gradients; None: they are not
                wanted.
        """
        entries = _joined(entries)
        if not target.param.is_contiguous():
            return "the parameter is not contiguous"
        if any(entry.operand.view is None for entry in entries):
            return "it is used through a function"
        covered = _covered(entries, target.param)
        if covered is None:
            return "several uses are added up"
        if covered < target.param.numel() and target.moments._counts_zeros:
            return "a part of it is used, and the rule counts zeros"
        if not all(self._is_direct(target, entry) for entry in entries):
            return "no kernel adds such a use to such a view"
        use, view = entries[0].use, entries[0].operand.view
        if len(entries) == 1 and isinstance(use, Stacked) and view is not None:
            whole = len(use.grads) * target.param.nbytes
            if view.size == target.param.shape or whole <= _FLUSH_BYTES:
                self._wait(target, use, view)
                return ""
        memory = self._memory(target)
        if squares is not None:
            memory[2] = squares
        if covered < target.param.numel() and target.moments.count == 0:
            for one in memory:
                if one is not None:
                    one.zero_()
        for entry in entries:
            view = entry.operand.view
            assert view is not None
            self._add(target, [None if one is None else view.of(one) for one in memory], entry.use)
        if squares is not None and memory[0] is not None:
            count = self._groups.environments
            norms = squares.sum(dtype=torch.float64)
            norms += squared_norm(memory[0]) / count
            target.moments._add_squared_norm(target.index, norms)
        return ""

    def _is_direct(self, target: Target, entry: _Entry) -> bool:
        use, view = entry.use, entry.operand.view
        assert view is not None
        if isinstance(use, Outer):
            return _is_matrix(view, use)
        if isinstance(use, Convolution):
            return view.order == "same"
        if isinstance(use, Lookup):
            return view.order == "same" and not target.moments._counts_zeros
        return isinstance(use, Stacked)

    def _memory(self, target: Target) -> list[Tensor | None]:
        lists = target.moments._open_memory([target.index], self._groups.environments)
        return [one[0] if one else None for one in lists]

    def _add(self, target: Target, memory: list[Tensor | None], use: Contribution) -> None:
        count = target.moments.count
        if isinstance(use, Outer):
            shape = use.grads.shape[2], use.activations.shape[2]
            matrices = [None if one is None else one.view(shape) for one in memory]
            if matrices[0].stride(0) == 1 and shape[1] > 1:  # type: ignore[union-attr]
                use = use.transposed()
                matrices = [None if one is None else one.t() for one in matrices]
            torch.ops.andmask._accumulate_outer_.default(
                *matrices, use.activations, use.grads, use.groups.order, use.groups.offsets,
                count, self._weights,
            )  # fmt: skip
        elif isinstance(use, Convolution):
            torch.ops.andmask._accumulate_convolution_.default(
                *memory, use.images, use.grads, use.groups.order, use.groups.offsets,
                count, use.stride, use.padding, use.dilation, use.channel_groups, self._weights,
            )  # fmt: skip
        elif isinstance(use, Lookup):
            self._add_lookup(memory, use, count)
        else:
            assert isinstance(use, Stacked)
            torch.ops.andmask._accumulate_.default(
                *[[] if one is None else [one] for one in memory], [use.grads], count,
                self._weights, True,
            )  # fmt: skip

    def _wait(self, target: Target, use: Stacked, view: View) -> None:
        if view.size == target.param.shape:
            grads = use.grads
        else:
            grads = use.grads.new_zeros(len(use.grads), *target.param.shape)
            view.of(grads, 1).copy_(use.grads)
        targets, waiting = self._waiting.setdefault(id(target.moments), ([], []))
        targets.append(target)
        waiting.append(grads)
        self._bytes += grads.nbytes
        if self._bytes >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Add the gradients that have been waiting for others, in one call."""
        for targets, grads in self._waiting.values():
            moments = targets[0].moments
            for places in by_device(grads):
                indices = [targets[place].index for place in places]
                lists = moments._open_memory(indices, self._groups.environments)
                some = [grads[place] for place in places]
                torch.ops.andmask._accumulate_.default(
                    *lists, some, moments.count, self._weights, True
                )
        self._waiting.clear()
        self._bytes = 0

    def _add_lookup(self, memory: list[Tensor | None], use: Lookup, count: int) -> None:
        total, votes = memory[:2]
        gradients, lines, environments = use.segments()
        for one in (total, votes):
            if one is not None and count == 0:
                one.zero_()
        if votes is not None:
            signs = (gradients > 0).to(votes.dtype) - (gradients < 0).to(votes.dtype)
            votes.index_add_(0, lines, signs)
        assert total is not None
        if len(self._weights) > 1:
            weights = torch.tensor(self._weights, dtype=total.dtype, device=total.device)
            gradients *= weights[environments].unsqueeze(1)
            total.index_add_(0, lines, gradients)
        else:
            total.index_add_(0, lines, gradients, alpha=self._weights[0])

    def _add_in_chunks(self, target: Target, entries: Sequence[_Entry], param: int) -> None:
        lists = target.moments._open_memory([target.index], self._groups.environments)
        total: Tensor = lists[0][0]
        parts = [partial(self._gradients, entry, target.param) for entry in entries]
        count, step = self._groups.environments, _at_once(total)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            weights = self._weights if len(self._weights) == 1 else self._weights[begin:end]
            torch.ops.andmask._accumulate_.default(
                *lists, [add_up(parts, begin, end)], target.moments.count + begin, weights, True
            )

    def _gradients(self, entry: _Entry, param: Tensor, begin: int, end: int) -> Tensor:
        stacked, operand = entry.use.stacked(begin, end), entry.operand
        if operand.view is not None:
            if operand.view.order == "same":
                return stacked.reshape(end - begin, *param.shape)
            gradients = stacked.new_zeros(end - begin, *param.shape)
            operand.view.of(gradients, 1).copy_(stacked)
            return gradients
        root = entry.graph.nodes[operand.root]
        edge = GradientEdge(root, operand.output)
        dtype = root._input_metadata[operand.output].dtype
        return torch.stack([
            torch.autograd.grad([edge], [param], [grad.to(dtype)], True)[0] for grad in stacked
        ])  # fmt: skip


def _at_once(param: Tensor) -> int:
    """Return of how many environments parts of gradients, their stack and sum are held at once."""
    return max(1, SCRATCH_BYTES // max(1, 3 * param.numel() * max(4, param.element_size())))


def _is_matrix(view: View, use: Outer) -> bool:
    """Return whether a view of the moments is a matrix that the native op can add to."""
    if view.order is not None:
        return True
    memory = torch.empty_strided(view.size, view.stride, device="meta")
    try:
        return 1 in memory.view(use.grads.shape[2], use.activations.shape[2]).stride()
    except RuntimeError:
        return False


def _joined(entries: list[_Entry]) -> list[_Entry]:
    """Join outer products that belong to one view of a parameter: they are one, of more rows."""
    first = entries[0]
    if len(entries) == 1 or not all(
        isinstance(entry.use, Outer) and entry.operand.view == first.operand.view
        for entry in entries
    ):
        return entries
    uses = [entry.use for entry in entries if isinstance(entry.use, Outer)]
    if len({use.grads.dtype for use in uses}) > 1:
        return entries
    joined = Outer(
        torch.cat([use.activations for use in uses], 1),
        torch.cat([use.grads for use in uses], 1),
        uses[0].groups,
        uses[0].shape,
    )
    return [_Entry(joined, first.operand, first.graph)]


def _covered(entries: Sequence[_Entry], param: Tensor) -> int | None:
    """Return how many elements of a parameter are used, if no two uses share one."""
    views = [entry.operand.view for entry in entries]
    if len(views) == 1 and views[0] is not None:
        return param.numel() if views[0].full else math.prod(views[0].size)
    intervals = []
    for view in views:
        interval = None if view is None else view.interval
        if interval is None:
            return None
        intervals.append(interval)
    intervals.sort()
    if any(one[1] > two[0] for one, two in itertools.pairwise(intervals)):
        return None
    return sum(end - begin for begin, end in intervals)
