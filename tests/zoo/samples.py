"""Samples of torch's databases: a function with its arguments, and how it takes a batch.

A sample has no batch, or one of two or three examples. A search finds out which of its tensors can
hold a batch, and where. It tries the choices in turn, and takes those with which the function of a
batch is the function of each example.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

NEW = -1  # the batch gets a dimension of its own, in front
PROBE = 7  # examples in the search: few tensors have this size
TRIES = 60

Places = tuple[int | None, ...]


@dataclass
class Sample:
    """A function and its arguments.

    Attributes:
        function: a module, or an op.
        arguments: positional ones and those by name.
    """

    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __post_init__(self) -> None:
        self.leaves, self.tree = tree_flatten(self.arguments)
        self.numbers = [n for n, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self.leaves[number].detach() for number in self.numbers]

    def __call__(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of the function of other tensors that can have a gradient."""
        leaves = list(self.leaves)
        for number, tensor in zip(self.numbers, tensors, strict=True):
            leaves[number] = tensor
        args, kwargs = tree_unflatten(leaves, self.tree)
        found, _ = tree_flatten(function(*args, **kwargs))
        return [
            out
            for out in found
            if isinstance(out, Tensor)
            and out.layout == torch.strided
            and (out.is_floating_point() or out.is_complex())
        ]


def like(tensor: Tensor, place: int, size: int) -> Tensor:
    """Return a batch of tensors like the one of a sample; whole numbers stay, as of labels."""
    if place == NEW:
        rows = tensor.unsqueeze(0).repeat_interleave(size, 0)
        where = 0
    else:
        rows = tensor.index_select(place, torch.randint(0, tensor.shape[place], (size,)))
        where = place
    fractions = tensor.is_floating_point() and not torch.equal(tensor, tensor.round())
    if fractions or tensor.is_complex():
        rows = rows * (1 + 0.1 * torch.randn(rows.shape, dtype=torch.float64)).to(rows.dtype)
    return rows.movedim(where, 0)


def placed(batch: Tensor, place: int) -> Tensor:
    return batch if place == NEW else batch.movedim(0, place)


class Batched(nn.Module):
    """A sample's function of a batch, with a parameter.

    Args:
        sample: the function and what it takes.
        places: where the batch lies in each tensor; None: the tensor is constant.
        learned: this tensor is the parameter.
        scaled: these are multiplied by the parameter.
        outputs: where the batch lies in the outputs; None: not known yet, or the function is a
            loss.

    Attributes:
        reduction: ``"mean"`` or ``"sum"`` of a loss. Its model returns what the loss is made of.
    """

    def __init__(
        self,
        sample: Sample,
        places: Places,
        learned: int | None = None,
        scaled: Sequence[int] = (),
        outputs: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__()
        self.sample, self.places, self.outputs = sample, places, outputs
        self.learned, self.scaled, self.reduction = learned, scaled, ""
        self.function = copy.deepcopy(sample.function)
        if learned is not None:
            self.param = nn.Parameter(sample.tensors[learned].clone())
        elif scaled:
            self.param = nn.Parameter(torch.tensor(0.8, dtype=sample.tensors[scaled[0]].dtype))

    def forward(self, *batch: Tensor) -> tuple[Tensor, ...]:
        given = iter(batch)
        tensors = []
        for number, constant in enumerate(self.sample.tensors):
            tensor = constant if self.places[number] is None else next(given)
            if number == self.learned:
                tensor = self.param
            elif number in self.scaled:
                tensor = tensor * self.param
            tensors.append(tensor)
        return tuple(tensors) if self.reduction else self.call(tensors)

    def call(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs of the function of all its tensors, whose batch is in front."""
        pairs = zip(tensors, self.places, strict=True)
        outs = self.sample(
            self.function, [t if place is None else placed(t, place) for t, place in pairs]
        )
        if self.outputs is None:
            return tuple(outs)
        found = zip(outs, self.outputs, strict=True)
        return tuple(out.movedim(place, 0) for out, place in found if place is not None)

    def batch(self, size: int) -> list[Tensor]:
        """Return tensors with the batch in front."""
        found = zip(self.sample.tensors, self.places, strict=True)
        return [like(tensor, place, size) for tensor, place in found if place is not None]


def same(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.complex64) else 1e-8
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def rows(whole: Tensor, parts: Sequence[Tensor]) -> int | None:
    """Return the dimension in which the output for a batch consists of those for its examples."""
    for place in range(whole.dim()):
        if whole.shape[place] != len(parts) or all(same(part, parts[0]) for part in parts):
            continue
        if all(same(whole.narrow(place, e, 1), part) for e, part in enumerate(parts)):
            return place
    return None


def has_no_parameters(function: Callable[..., Any]) -> bool:
    return not isinstance(function, nn.Module) or not list(function.parameters())


def reduction(whole: Tensor, parts: Tensor) -> str:
    """Return how a loss reduces those of its examples; ``""``: in no way that is known."""
    if same(parts, torch.zeros_like(parts)):
        return ""
    if same(whole, parts.mean()):
        return "mean"
    return "sum" if same(whole, parts.sum()) else ""


def one_by_one(model: Batched, batch: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return the outputs for each example, which lies in memory of its own."""
    return [model(*(t[e : e + 1].clone() for t in batch)) for e in range(len(batch[0]))]


def choices(sample: Sample, learned: int | None, scaled: Sequence[int]) -> Iterator[Places]:
    """Return all places of a batch, those in most tensors first."""
    options: list[list[int | None]] = []
    for number, tensor in enumerate(sample.tensors):
        found: list[int | None] = [] if number == learned else [NEW]
        if number != learned:
            found = [d for d in (0, 1) if d < tensor.dim() and tensor.shape[d]][:1] + found
            found += [1] if tensor.dim() > 1 and tensor.shape[1] else []
        options.append([*found, None] if number not in scaled else found)
    every = sorted(itertools.product(*options), key=lambda places: places.count(None))
    return iter([places for places in every if any(place is not None for place in places)])


def batched(
    sample: Sample, learned: int | None = None, scaled: Sequence[int] = (), most: int = 1
) -> list[Batched]:
    """Return the sample's function of batches, with at most so many choices of their places."""
    found: list[Batched] = []
    for places in itertools.islice(choices(sample, learned, scaled), TRIES):
        model = Batched(sample, places, learned, scaled)
        try:
            with torch.no_grad():
                batch = model.batch(PROBE)
                whole, parts = model(*batch), one_by_one(model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            continue  # what torch says of arguments that do not fit
        outputs = [
            rows(out, each) for out, each in zip(whole, zip(*parts, strict=True), strict=False)
        ]
        if scaled and len(whole) == 1 and whole[0].dim() == 0 and has_no_parameters(model.function):
            model.reduction = reduction(whole[0], torch.stack([part[0] for part in parts]))
        elif any(place is not None for place in outputs):
            model.outputs = outputs
        if model.reduction or model.outputs:
            found.append(model)
            if len(found) == most:
                break
    return found


class Joined(nn.Module):
    """The sample's function of a parameter alone, which then meets data."""

    def __init__(self, sample: Sample, learned: int) -> None:
        super().__init__()
        self.sample, self.learned = sample, learned
        self.param = nn.Parameter(sample.tensors[learned].clone())

    def values(self) -> list[Tensor]:
        tensors = [*self.sample.tensors]
        tensors[self.learned] = self.param
        return [out for out in self.sample(self.sample.function, tensors) if out.requires_grad]

    def forward(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * v + x.cos() * v for x, v in zip(batch, self.values(), strict=True))

    def batch(self, size: int) -> list[Tensor]:
        return [
            torch.randn(size, *value.shape, dtype=torch.float64).to(value.real.dtype)
            for value in self.values()
        ]
