"""Accumulation of one backward pass: contributions to parameters become moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .._devices import by_device
from .._dtypes import wide_dtype
from .._norms import squared_norm
from ..moments import Moments
from ._contributions import (
    Contribution,
    Convolution,
    Lookup,
    Matrices,
    OneByOne,
    Outer,
    Stacked,
    add_up,
)
from ._entries import Entry, by_operand, covered, gradients_of, join_outer_products
from ._gramian import Gramian, Part, exact
from ._graph import Graph, Operand
from ._groups import Groups
from ._views import View

# A buffer that holds the gradients of several environments is at most this large.
SCRATCH_BYTES = 32 << 20
# Small gradients are collected up to this size: each native call costs microseconds.
_FLUSH_BYTES = 256 << 10


@dataclass
class Target:
    """Where the moments of a parameter are kept."""

    param: Tensor
    moments: Moments
    index: int


@dataclass
class Treatment:
    """How the gradients of a parameter were computed, for the report."""

    uses: int = 0
    paths: list[str] = field(default_factory=list)


class GradientAccumulator:
    """Collects the contributions to each parameter. After the last, adds them to the moments.

    Args:
        targets: where the moments of each parameter are, by the parameter's number.
        groups: the environments.
        weights: a factor for each environment, or one for all.
        deferred: complete all parameters in :meth:`finish`, as some uses are not announced.
        treatments: output for the report, by the parameter's number.
        gramian: computes scalar products of the gradients; None: they are not wanted.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        groups: Groups,
        weights: list[float],
        deferred: bool,
        treatments: dict[int, Treatment],
        gramian: Gramian | None = None,
    ) -> None:
        self._targets = targets
        self._groups = groups
        self._weights = weights
        self._deferred = deferred
        self._treatments = treatments
        self._gramian = gramian
        self._expected: dict[int, int] = {}
        self._entries: dict[int, list[Entry]] = {}
        self._done: set[int] = set()
        self._waiting: dict[int, tuple[list[Target], list[Tensor]]] = {}
        self._bytes = 0

    def expect(self, params: Sequence[int]) -> None:
        """Announce one use of each of these parameters."""
        for param in params:
            self._expected[param] = self._expected.get(param, 0) + 1

    def add(self, contribution: Contribution | None, operand: Operand, graph: Graph) -> None:
        """Add the contribution of one use of an operand; None: its gradient is zero."""
        for param in operand.params:
            if param in self._done:
                raise RuntimeError(
                    "Agreement: a parameter was used again after all uses known of it: a backward "
                    "pass inside a function's backward has reached it; expected such passes only "
                    "in torch.utils.checkpoint"
                )
            if isinstance(contribution, OneByOne) and (self._expected[param] > 1 or self._deferred):
                # The node is released before the last use of the parameter arrives.
                stacked = contribution.stacked(0, self._groups.environments)
                contribution = Stacked(stacked, contribution.shape, contribution.path)
            if contribution is not None:
                self._entries.setdefault(param, []).append(Entry(contribution, operand, graph))
            self._expected[param] -= 1
            if self._expected[param] == 0 and not self._deferred:
                self._complete(param)

    def finish(self) -> None:
        """Complete all parameters that are left."""
        with torch.no_grad():  # the engine does the same while it runs
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
        paths = sorted({entry.contribution.path for entry in entries})
        treatment = self._treatments[param] = Treatment(len(entries), paths)
        squares = None
        if self._gramian is not None and not self._take_products(param, entries):
            squares = torch.empty_like(target.param, dtype=wide_dtype(target.param))
        reason = self._add_directly(target, entries, squares)
        if reason:
            self._add_in_chunks(target, entries)
            treatment.paths.append(f"gradients of a few environments at a time ({reason})")

    def _take_products(self, param: int, entries: list[Entry]) -> bool:
        """Compute scalar products. Return False if the squares will give them almost for free.

        The native ops can add up the squares together with the moments, in separate memory.
        """
        gramian, target = self._gramian, self._targets[param]
        assert gramian is not None
        entry, *rest = join_outer_products(entries)
        contribution = entry.contribution
        if not rest and entry.operand.view is not None:
            if isinstance(contribution, Outer) and gramian.of_factors(param, contribution):
                return True
            tiled = isinstance(contribution, Convolution) or (
                isinstance(contribution, Outer)
                and contribution.activations[..., 0].numel() > gramian.environments
            )
            first = target.moments.count == 0 and "squares" not in target.moments.kinds
            if not gramian.pairs and tiled and first and self._is_whole(target, entry):
                return False
            # The order of elements does not matter, as it is the same in all environments.
            parts: list[Part] = [contribution.stacked]
        else:
            parts = _parts(target, entries)
        with exact(target.param):
            gramian.of_gradients(param, parts, target.param)
        return True

    def _is_whole(self, target: Target, entry: Entry) -> bool:
        """Return whether a native op can add this entry, and the entry covers the parameter.

        All environments must have rows: the squares are of deviations from the mean.
        """
        contiguous = target.param.is_contiguous()
        return entry.view.full and contiguous and entry.is_direct(target.param, True)

    def _add_directly(self, target: Target, entries: list[Entry], squares: Tensor | None) -> str:
        """Let native ops add entries whose gradients need not be summed before they vote.

        Args:
            target: the parameter and its moments.
            entries: all contributions to the parameter.
            squares: scratch memory for squares, if the norms of the gradients are wanted; else
                None.

        Returns:
            An empty string, or the reason why the entries cannot be added directly.
        """
        entries = join_outer_products(entries)
        if not target.param.is_contiguous():
            return "the parameter is not contiguous"
        if any(entry.operand.view is None for entry in entries):
            return "it is used through a function"
        elements = covered(entries, target.param)
        if elements is None:
            return "several uses are added up"
        partial_use = elements < target.param.numel()
        if partial_use and target.moments._counts_zeros:
            return "a part of it is used, and the rule counts zeros"
        zeros = target.moments._counts_zeros
        if not all(entry.is_direct(target.param, zeros) for entry in entries):
            return "no kernel adds such a use to such a view"
        contribution, view = entries[0].contribution, entries[0].view
        if len(entries) == 1 and isinstance(contribution, Stacked):
            whole = len(contribution.grads) * target.param.nbytes
            if view.order == "same" or whole <= _FLUSH_BYTES:
                self._wait(target, contribution, view)
                return ""
        memory = self._memory(target)
        if squares is not None:
            memory[2] = squares
        if partial_use and target.moments.count == 0:
            _clear(memory)
        for entry in entries:
            views = [None if tensor is None else entry.view.of(tensor) for tensor in memory]
            self._add(target, views, entry.contribution)
        if squares is not None and memory[0] is not None:
            count = self._groups.environments
            norms = squares.sum(dtype=torch.float64)
            norms += squared_norm(memory[0]) / count
            target.moments._add_squared_norm(target.index, norms)
        return ""

    def _memory(self, target: Target) -> list[Tensor | None]:
        """Return sum, votes, squares, logs, voters of a parameter; those not kept are None."""
        lists = target.moments._open_memory([target.index], self._groups.environments)
        return [tensors[0] if tensors else None for tensors in lists]

    def _add(self, target: Target, memory: list[Tensor | None], contribution: Contribution) -> None:
        count = target.moments.count
        if isinstance(contribution, Outer):
            shape = contribution.grads.shape[2], contribution.activations.shape[2]
            if memory[0].shape != shape:  # type: ignore[union-attr]
                memory = [None if tensor is None else tensor.view(shape) for tensor in memory]
        if isinstance(contribution, (Outer, Matrices)):
            total: Tensor = memory[0]  # type: ignore[assignment]
            if total.stride(-2) == 1 and total.shape[-1] > 1:
                contribution = contribution.transposed()
                memory = [None if tensor is None else tensor.mT for tensor in memory]
        if isinstance(contribution, Outer):
            groups = contribution.groups
            torch.ops.andmask._accumulate_outer_.default(
                *memory, contribution.activations, contribution.grads,
                groups.order, groups.filled_offsets, count, self._weights_of(groups),
            )  # fmt: skip
        elif isinstance(contribution, Convolution):
            groups = contribution.groups
            torch.ops.andmask._accumulate_convolution_.default(
                *memory, contribution.images, contribution.grads, groups.order,
                groups.filled_offsets, count, contribution.stride, contribution.padding,
                contribution.dilation, contribution.channel_groups, self._weights_of(groups),
            )  # fmt: skip
        elif isinstance(contribution, Matrices):
            none = [None] * len(contribution.products)
            by_kind = [none if tensor is None else tensor.unbind() for tensor in memory]
            for product, *matrix in zip(contribution.products, *by_kind, strict=True):
                if product is not None:
                    self._add(target, matrix, product)
                elif count == 0:
                    _clear(matrix)
        elif isinstance(contribution, Lookup):
            self._add_lookup(memory, contribution, count)
        else:
            assert isinstance(contribution, Stacked)
            torch.ops.andmask._accumulate_.default(
                *[[] if tensor is None else [tensor] for tensor in memory], [contribution.grads],
                count, self._weights, True,
            )  # fmt: skip

    def _weights_of(self, groups: Groups) -> list[float]:
        """Return the factors of the environments that have rows."""
        if groups.filled is None or len(self._weights) == 1:
            return self._weights
        return [self._weights[environment] for environment in groups.filled]

    def _wait(self, target: Target, contribution: Stacked, view: View) -> None:
        grads, shape = contribution.grads, target.param.shape
        if view.order == "same":
            grads = grads.reshape(len(grads), *shape)
        else:
            grads = grads.new_zeros(len(grads), *shape)
            view.of(grads, 1).copy_(contribution.grads)
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
                torch.ops.andmask._accumulate_.default(
                    *lists, [grads[place] for place in places], moments.count, self._weights, True
                )
        self._waiting.clear()
        self._bytes = 0

    def _add_lookup(self, memory: list[Tensor | None], lookup: Lookup, count: int) -> None:
        total, votes, _, _, voters = memory
        gradients, lines, environments = lookup.segments()
        if count == 0:
            _clear(memory)
        if votes is not None:
            signs = (gradients > 0).to(votes.dtype) - (gradients < 0).to(votes.dtype)
            votes.index_add_(0, lines, signs)
            if voters is not None:
                voters.index_add_(0, lines, signs.abs())
        assert total is not None
        if len(self._weights) > 1:
            weights = torch.tensor(self._weights, dtype=total.dtype, device=total.device)
            gradients *= weights[environments].unsqueeze(1)
            total.index_add_(0, lines, gradients)
        else:
            total.index_add_(0, lines, gradients, alpha=self._weights[0])

    def _add_in_chunks(self, target: Target, entries: Sequence[Entry]) -> None:
        lists = target.moments._open_memory([target.index], self._groups.environments)
        total: Tensor = lists[0][0]
        parts = _parts(target, entries)
        count, step = self._groups.environments, _at_once(total)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            weights = self._weights if len(self._weights) == 1 else self._weights[begin:end]
            torch.ops.andmask._accumulate_.default(
                *lists, [add_up(parts, begin, end)], target.moments.count + begin, weights, True
            )


def _clear(memory: Sequence[Tensor | None]) -> None:
    for tensor in memory:
        if tensor is not None:
            tensor.zero_()


def _parts(target: Target, entries: Sequence[Entry]) -> list[Part]:
    return [partial(gradients_of, uses, target.param) for uses in by_operand(entries)]


def _at_once(param: Tensor) -> int:
    """Return how many environments fit into the scratch memory: part, stack and sum of each."""
    return max(1, SCRATCH_BYTES // max(1, 3 * param.numel() * max(4, param.element_size())))
