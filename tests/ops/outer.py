"""Weight gradients whose moments are taken: arguments of the ops, and what they should do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from andmask_ext import reference

from .moments import DTYPES, KINDS, ops, wide


@dataclass(repr=False)  # large tensors
class Outer:
    """One call; a linear layer if ``kernel`` is None, else a convolution."""

    activations: Tensor
    grad_outputs: Tensor
    order: Tensor | None = None
    offsets: Tensor | None = None
    weights: list[float] = field(default_factory=list)
    kernel: Sequence[int] | None = None
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()
    groups: int = 1

    def __repr__(self) -> str:
        shapes = (tuple(self.activations.shape), tuple(self.grad_outputs.shape))
        window = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        dtype, groups = self.activations.dtype, (self.order, self.offsets, self.weights)
        return f"Outer({shapes}, {dtype}, {groups}, {window if self.kernel else 'linear'})"

    @property
    def op(self) -> Any:
        return ops._accumulate_outer_ if self.kernel is None else ops._accumulate_convolution_

    @property
    def environments(self) -> int:
        examples = self.activations.shape[0]
        return examples if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def shape(self) -> tuple[int, ...]:
        if self.kernel is None:
            return self.grad_outputs.shape[2], self.activations.shape[2]
        channels = self.activations.shape[1] // self.groups
        return self.grad_outputs.shape[1], channels, *self.kernel

    def empty(self, votes: torch.dtype = torch.int16) -> list[Tensor]:
        """Moments that hold nothing useful yet."""
        dtype = wide(self.activations.dtype)
        moments = [torch.full(self.shape, torch.nan, dtype=dtype) for _ in KINDS]
        for counted in (1, 4):
            moments[counted] = torch.full(self.shape, 77, dtype=votes)
        return moments

    def args(self, moments: Sequence[Tensor | None], count: int = 0) -> tuple[Any, ...]:
        window = (self.stride, self.padding, self.dilation, self.groups)
        return (
            *moments,
            self.activations,
            self.grad_outputs,
            self.order,
            self.offsets,
            count,
            *(() if self.kernel is None else window),
            self.weights,
        )

    def run(self, kinds: Sequence[str] = KINDS, count: int = 0) -> dict[str, Tensor]:
        moments = [m if k in kinds else None for k, m in zip(KINDS, self.empty(), strict=True)]
        self.op(*self.args(moments, count))
        return {k: m for k, m in zip(KINDS, moments, strict=True) if m is not None}

    def grads(self, magnitudes: bool = False) -> Tensor:
        """The stacked weight gradients; or the sums of the sizes of all their terms."""
        a, d = self.activations, self.grad_outputs
        args = (*((a.abs(), d.abs()) if magnitudes else (a, d)), self.order, self.offsets)
        if self.kernel is None:
            return reference.outer_gradients(*args)
        window = (self.kernel, self.stride, self.padding, self.dilation, self.groups)
        return reference.convolution_gradients(*args, *window)

    def expected(self) -> reference.Moments:
        return reference.moments(self.grads(), self.weights)

    def part(self, first: int, last: int) -> Outer:
        """Environments [first, last) in a call of their own."""
        members = list(reference.environments(self.order, self.offsets, self.activations.shape[0]))[
            first:last
        ]
        sizes = torch.tensor([len(examples) for examples in members])
        index = torch.cat(members)
        return replace(
            self,
            activations=self.activations[index],
            grad_outputs=self.grad_outputs[index],
            order=None,
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
            weights=self.weights[first:last] if len(self.weights) > 1 else self.weights,
        )


WHOLE = [0.0, -0.0, 1.0, -1.0, 2.0, -3.0]  # products and sums are exact: ties are ties
SPECIAL = [0.0, -0.0, 1.0, -0.5, 1e-39, -1e-39, 1e18, torch.inf, -torch.inf, torch.nan]
sizes = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 63, 64, 65, 70, 129, 200]))
kinds = st.sampled_from(
    [KINDS, ("sum",), ("sum", "votes"), ("sum", "votes", "logs"), ("sum", "votes", "voters")]
)


def values(
    draw: st.DrawFn, shape: Sequence[int], palette: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """Noise, or values out of a palette; in memory of another order, or with gaps."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(
        draw(st.integers(0, 2**32 - 1))
    )
    layout = draw(st.sampled_from(["contiguous", "reversed", "gaps"]))
    stored = list(reversed(shape)) if layout == "reversed" else list(shape)
    if layout == "gaps":
        stored[-1] *= 2
    if palette is None:
        tensor = torch.randn(stored, generator=generator)
    else:
        chosen = torch.tensor(draw(st.lists(st.sampled_from(palette), min_size=1, max_size=5)))
        tensor = chosen[torch.randint(len(chosen), stored, generator=generator)]
    tensor = tensor.to(dtype)
    if layout == "reversed":
        return tensor.permute(*reversed(range(len(shape))))
    return tensor[..., ::2] if layout == "gaps" else tensor


def grouped(draw: st.DrawFn, examples: int) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """Environments of one or several examples, in any order; weights that round nothing."""
    order = offsets = None
    if draw(st.booleans()):
        order = torch.tensor(draw(st.permutations(range(examples))))
    if draw(st.booleans()):
        cuts = draw(st.sets(st.integers(1, examples - 1))) if examples > 1 else set()
        offsets = torch.tensor([0, *sorted(cuts), examples])
    count = examples if offsets is None else len(offsets) - 1
    one = st.sampled_from([0.5, 1.0, 2.0, 4.0])
    weights = draw(
        st.one_of(
            st.just([]),
            one.map(lambda w: [w] * count),
            st.lists(one, min_size=count, max_size=count),
        )
    )
    return order, offsets, weights


@st.composite
def linears(draw: st.DrawFn, palette: Sequence[float] | None = None) -> Outer:
    dtype = draw(st.sampled_from(DTYPES))
    examples = draw(st.one_of(st.integers(1, 9), st.sampled_from([40, 124, 125, 130])))
    rows = (
        draw(st.one_of(st.just(1), st.sampled_from([0, 2, 3, 8, 17, 64]))) if examples < 40 else 1
    )
    a = values(draw, (examples, rows, draw(sizes)), palette, dtype)
    d = values(draw, (examples, rows, draw(sizes)), palette, dtype)
    return Outer(a, d, *grouped(draw, examples))


@st.composite
def convolutions(draw: st.DrawFn, palette: Sequence[float] | None = None) -> Outer:
    dtype = draw(st.sampled_from(DTYPES))
    spatial = draw(st.integers(1, 3))
    examples, groups = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2, 3]))
    channels = draw(st.integers(1, 5)) * groups
    outputs = draw(st.sampled_from([1, 2, 7, 16, 33])) * groups

    def ints(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial))

    kernel, stride, padding, dilation = ints(1, 3), ints(1, 3), ints(0, 2), ints(1, 2)
    out = [draw(st.integers(1, 9 if spatial < 3 else 4)) for _ in range(spatial)]
    size = [
        max(1, (out[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i])
        for i in range(spatial)
    ]
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(spatial)
    ]
    a = values(draw, (examples, channels, *size), palette, dtype)
    d = values(draw, (examples, outputs, *out), palette, dtype)
    window = (kernel, stride, padding, dilation, groups)
    return Outer(a, d, *grouped(draw, examples), *window)


def layers(palette: Sequence[float] | None = None) -> st.SearchStrategy[Outer]:
    return st.one_of(linears(palette), convolutions(palette))


def outer(**changes: Any) -> Outer:
    """Two environments of a small linear layer, with some arguments replaced."""
    a, d = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    base = Outer(a, d, torch.tensor([2, 0, 1]), torch.tensor([0, 2, 3]), [1.0, 2.0])
    return replace(base, **changes)


def convolution(**changes: Any) -> Outer:
    """Two environments of a small convolution, with some arguments replaced."""
    base = outer(
        activations=torch.randn(3, 4, 7, 8),
        grad_outputs=torch.randn(3, 6, 3, 8),
        kernel=[3, 3],
        stride=[2, 1],
        padding=[0, 1],
        dilation=[1, 1],
        groups=2,
    )
    return replace(base, **changes)
