"""The arguments of metrics: stacked gradients or moments, of one or several parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import check_grads
from .._devices import call_by_device
from .._notices import warn_once
from ..moments import Moments

Stacked: TypeAlias = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Gradients: TypeAlias = Stacked | Moments


@dataclass(frozen=True)
class Entries:
    """The gradients of some parameters.

    Attributes:
        environments: the number of environments.
        stacked: ``[environments, *shape]`` for each parameter; None if moments are given.
        moments: moments; None if stacked gradients are given.
        keys: the keys of a dict, or the indices of a list or of moments.
        like: puts one value per entry into the form of the argument: a tensor, dict or list. For
            moments it is a list, with None for parameters without a gradient.
    """

    environments: int
    stacked: list[Tensor] | None
    moments: Moments | None
    keys: list[Any]
    like: Callable[[Sequence[Any]], Any]

    def with_kinds(self, *kinds: str) -> Moments:
        """Return moments with these kinds. Stacked gradients need one pass to compute them."""
        if self.moments is None:
            assert self.stacked is not None
            # The gradient of one environment has the shape and dtype of the parameter.
            moments = Moments([grads[0] for grads in self.stacked], kinds)
            moments.add_stacked(self.stacked)
            return moments
        for kind in kinds:
            if kind not in self.moments.kinds:
                raise ValueError(
                    f"grads: expected moments with {kind}, but got {self.moments}; make them with "
                    f"kinds=(..., {kind!r}), or give the optimizer a rule that needs {kind}"
                )
        return self.moments

    def histograms(self) -> tuple[Tensor, Tensor]:
        """Return counts and squares, ``[entries, environments + 1]``, on the first device."""
        if self.stacked is not None:
            pairs = [torch.ops.andmask.vote_histogram.default(grads) for grads in self.stacked]
            device = self.stacked[0].device
            counts = torch.stack([count.to(device) for count, _ in pairs])
            return counts, torch.stack([square.to(device) for _, square in pairs])
        moments = self.with_kinds("votes")
        return vote_histograms(
            without_none(moments.sum), without_none(moments.votes), self.environments
        )


def without_none(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are not None: those of parameters with a gradient."""
    return [value for value in values if value is not None]


def vote_histograms(sums: list[Tensor], votes: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Call the op on lists of tensors on several devices. The results are on the first device."""
    op = torch.ops.andmask._vote_histograms.default
    counts, squares = call_by_device(lambda *lists: op(*lists, count), sums, votes)
    return counts, squares


def entries_of(grads: Gradients, name: str = "grads") -> Entries:
    """Check gradients of any form, and return them as a list.

    Raises:
        TypeError: they have the wrong form, or an entry is not a dense floating-point tensor.
        ValueError: there is no entry, or entries differ in the number of environments.
    """
    if isinstance(grads, Moments):
        if grads.count == 0 or not grads._touched:
            raise ValueError(
                f"{name}: expected moments of at least 1 environment with gradients, "
                f"but got {grads}"
            )
        places = grads._touched
        return Entries(grads.count, None, grads, places, _in_places(places, len(grads.sum)))
    if isinstance(grads, Tensor):
        check_grads(grads, name)
        return Entries(grads.shape[0], [grads.detach()], None, [0], lambda values: values[0])
    if isinstance(grads, Mapping):
        keys = list(grads)
        labelled = [(f"{name}[{key!r}]", grads[key]) for key in keys]
    elif isinstance(grads, Sequence) and not isinstance(grads, str):
        keys = []
        labelled = [(f"{name}[{index}]", entry) for index, entry in enumerate(grads)]
        if len(labelled) > 1 and all(_is_vector(entry) for entry in grads):
            warn_once(
                entries_of,
                f"{name}: expected in a list the stacked gradients of one parameter after the "
                "other, but got vectors, each of which is read as the gradients of a parameter "
                "with one element; torch.stack a list of one gradient per environment, or pass a "
                "dict of parameters",
            )
    else:
        hint = "; its moments are in .moments" if hasattr(type(grads), "moments") else ""
        raise TypeError(
            f"{name}: expected stacked gradients (a Tensor, or a dict or list of them) or Moments, "
            f"but got {type(grads).__name__}{hint}"
        )
    if not labelled:
        raise ValueError(f"{name}: expected gradients of at least 1 parameter, but got none")
    for label, entry in labelled:
        check_grads(entry, label)
    first_label, first = labelled[0]
    for label, entry in labelled:
        if entry.shape[0] != first.shape[0]:
            raise ValueError(
                f"{label}: expected {first.shape[0]} environments (dim 0), as {first_label} has, "
                f"but got {entry.shape[0]}"
            )
    stacked = [entry.detach() for _, entry in labelled]
    if isinstance(grads, Mapping):
        return Entries(
            first.shape[0], stacked, None, keys, lambda values: dict(zip(keys, values, strict=True))
        )
    return Entries(first.shape[0], stacked, None, list(range(len(stacked))), list)


def _is_vector(entry: object) -> bool:
    return isinstance(entry, Tensor) and entry.dim() == 1


def stacked_of(grads: object, name: str = "grads") -> list[Tensor]:
    """Return stacked gradients as a list. Raise TypeError for moments."""
    if isinstance(grads, Moments):
        raise TypeError(
            f"{name}: expected the stacked gradients of all environments, but got Moments, which "
            "do not keep them"
        )
    stacked = entries_of(grads, name).stacked  # type: ignore[arg-type]
    assert stacked is not None
    return stacked


def _in_places(places: list[int], size: int) -> Callable[[Sequence[Any]], list[Any]]:
    def like(values: Sequence[Any]) -> list[Any]:
        filled: list[Any] = [None] * size
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return filled

    return like
