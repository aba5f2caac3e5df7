"""The layer that takes a model's input, and the gradients of its weights by input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._probe import Probe, first_input

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *Conv, nn.Embedding)
_NAMES = "nn.Linear, nn.Conv1d to 3d or nn.Embedding"


class CannotTellInputsApart(ValueError):
    """No layer takes the input element by element, or several do.

    Args:
        message: what is wrong, and what to do.
        instead: the name of the first layer that was called, if there is one.
    """

    def __init__(self, message: str, instead: str | None = None) -> None:
        super().__init__(message)
        self.instead = instead


@dataclass(frozen=True)
class InputLayer:
    """The layer that takes the input.

    Attributes:
        probe: the copy of the model.
        name: its name in the model.
        shape: the shape of one example, if the layer is linear and takes it flattened.
    """

    probe: Probe
    name: str
    shape: tuple[int, ...] | None

    @property
    def module(self) -> nn.Module:
        """The layer in the copy."""
        return self.probe.model.get_submodule(self.name)

    @property
    def kind(self) -> str:
        """What an input is: "tokens", "pixels" or "features"."""
        if isinstance(self.module, nn.Embedding):
            return "tokens"
        return "pixels" if isinstance(self.module, Conv) or self.shape else "features"

    def gradients(
        self, inputs: Any, targets: Any, parts: int, silenced: Tensor | None = None
    ) -> Iterator[Gradient]:
        """Yield the gradients of this many parts of a batch: examples 0, parts, 2 parts and so on.

        They add up to the gradient of the batch. One backward pass, which ends at the layer,
        serves all parts.

        Args:
            inputs: the inputs of the batch.
            targets: its targets.
            parts: the number of parts.
            silenced: bool ``[inputs]``: inputs that the model does not see. It gets their mean over
                the batch (zero for the embedding of a token), and gradients are those of the
                deviations from it.
        """
        taken: list[Tensor] = []
        given: list[Tensor] = []
        tokens = isinstance(self.module, nn.Embedding)
        if silenced is not None:
            silenced = silenced.to(first_input(inputs).device)

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            seen = args[0].detach()
            if silenced is None or tokens:
                taken.append(seen)
                return None
            mean = seen.mean(0, keepdim=True)
            taken.append(seen - mean)
            hidden = silenced.view(seen.shape[1:] if seen[0].numel() == len(silenced) else (-1,))
            return (torch.where(hidden, mean, seen), *args[1:])

        def cut(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            values = output.detach()
            if silenced is not None and tokens:
                values = values * ~silenced[args[0]].unsqueeze(-1)
            given.append(values.requires_grad_())
            return given[-1]

        handles = [
            self.module.register_forward_pre_hook(see),
            self.module.register_forward_hook(cut),
        ]
        try:
            loss = self.probe.loss(inputs, targets)
        finally:
            for handle in handles:
                handle.remove()
        if len(taken) != 1:
            raise CannotTellInputsApart(
                f"model: expected one call of {self.name!r} in a forward pass, but got "
                f"{len(taken)}; pass layer= the name of another layer"
            )
        delta = torch.autograd.grad(loss, given[0], allow_unused=True)[0]
        if delta is None:
            raise ValueError(f"loss_fn: expected a loss that depends on {self.name!r}")
        examples = first_input(inputs).shape[0]
        if taken[0].shape[:1] != (examples,) or delta.shape[:1] != (examples,):
            raise CannotTellInputsApart(
                f"layer: expected {self.name!r} to take [{examples} examples, *shape], but got "
                f"shape {list(taken[0].shape)}; pass layer= the name of another layer"
            )
        for part in range(parts):
            yield self._gradient(taken[0][part::parts], delta[part::parts])

    def _gradient(self, taken: Tensor, delta: Tensor) -> Gradient:
        module = self.module
        if isinstance(module, nn.Embedding):
            return _of_embedding(module, taken, delta)
        if isinstance(module, Conv):
            return _of_convolution(module, taken, delta, self.name)
        weight = delta.flatten(0, -2).mT @ taken.flatten(0, -2)
        shape = self.shape or (weight.shape[1],)
        return Gradient(weight.mT, shape, torch.ones(1, 1, dtype=torch.bool, device=delta.device))


@dataclass(frozen=True)
class Gradient:
    """The gradients of a layer's weights, by input.

    Attributes:
        values: ``[inputs, coordinates]``, zero where an input has no such coordinate.
        shape: the shape in which inputs are shown.
        real: whether a coordinate exists, bool, broadcasts to ``values``.
    """

    values: Tensor
    shape: tuple[int, ...]
    real: Tensor


def _of_embedding(module: nn.Embedding, ids: Tensor, delta: Tensor) -> Gradient:
    values = delta.new_zeros(module.num_embeddings, module.embedding_dim)
    values.index_add_(0, ids.flatten().long(), delta.reshape(-1, module.embedding_dim))
    if module.padding_idx is not None:
        values[module.padding_idx] = 0
    real = torch.ones(1, 1, dtype=torch.bool, device=delta.device)
    return Gradient(values, (module.num_embeddings,), real)


def _of_convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, taken: Tensor, delta: Tensor, name: str
) -> Gradient:
    """Return gradients as if the layer had weights of its own at each position.

    A weight belongs to a pixel, an output channel and an offset in the kernel, which say the
    position of the output. Offsets that lead outside, or between the strides, have no weight.
    """
    if module.padding_mode != "zeros":
        raise CannotTellInputsApart(
            f"model: expected {name!r} to be padded by zeros, but got padding_mode "
            f"{module.padding_mode!r}; pad before the model, or pass layer="
        )
    dims = len(module.kernel_size)
    size, places = taken.shape[2:], delta.shape[2:]
    pads = [
        (dilation * (kernel - 1)) // 2 if module.padding == "same" else 0
        for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)
    ]
    if not isinstance(module.padding, str):
        pads = list(module.padding)
    # Output gradients, at the place in the padded input where their kernel begins.
    reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    ends = [
        r + max(n + p, (q - 1) * s + 1)
        for r, n, p, q, s in zip(reach, size, pads, places, module.stride, strict=True)
    ]
    canvas = delta.new_zeros(*delta.shape[:2], *ends)
    exists = torch.zeros(ends, dtype=torch.bool, device=delta.device)
    begins: tuple[slice, ...] = tuple(
        slice(r, r + (q - 1) * s + 1, s)
        for r, q, s in zip(reach, places, module.stride, strict=True)
    )
    canvas[(slice(None), slice(None), *begins)] = delta
    exists[begins] = True
    groups = module.groups
    pixels = taken.flatten(2).unflatten(1, (groups, -1))  # [examples, groups, channels, pixels]
    values, real = [], []
    for offset in itertools.product(*map(range, module.kernel_size)):
        starts = [
            r + p - o * d for r, p, o, d in zip(reach, pads, offset, module.dilation, strict=True)
        ]
        window: tuple[slice, ...] = tuple(
            slice(start, start + n) for start, n in zip(starts, size, strict=True)
        )
        reached = canvas[(slice(None), slice(None), *window)].flatten(2).unflatten(1, (groups, -1))
        values.append(torch.einsum("ngcp,ngop->gcpo", pixels, reached).flatten(0, 1))
        real.append(exists[window].flatten())
    channels, outputs = taken.shape[1], delta.shape[1] // groups
    mask = torch.stack(real, 1).repeat(channels, 1).repeat_interleave(outputs, 1)
    stacked = torch.stack(values, 2).flatten(0, 1).flatten(1)
    return Gradient(stacked, tuple(taken.shape[1 : 2 + dims]), mask)


# ---- finding the layer ----


def find_input_layer(probe: Probe, inputs: Any, layer: str | None) -> InputLayer:
    """Return the layer of this name, or the one that takes the input.

    Raises:
        TypeError: the layer is of another kind, or inputs are neither floating-point nor tokens.
        ValueError: there is no such layer, or none or several take the input.
    """
    named = dict(probe.model.named_modules())
    if layer is not None:
        if layer not in named:
            raise ValueError(f"layer: expected the name of a module, but got {layer!r}")
        if not isinstance(named[layer], LAYERS):
            raise TypeError(
                f"layer: expected {_NAMES}, but {layer!r} is {type(named[layer]).__name__}"
            )
        return InputLayer(probe, layer, None)
    calls = _calls(probe, inputs, {n: m for n, m in named.items() if isinstance(m, LAYERS)})
    found = [(name, shape) for name, takes, shape in calls if takes]
    if len(found) == 1:
        return InputLayer(probe, *found[0])
    if found:
        names = ", ".join(repr(name) for name, _ in found)
        raise CannotTellInputsApart(
            f"model: expected one layer that takes the input, but got {names}; "
            "pass layer= the name of one",
            found[0][0],
        )
    first = (
        f"; the first that was called, {calls[0][0]!r}, takes something else: pass layer= its name "
        "for a share of each element of that"
        if calls
        else ""
    )
    raise CannotTellInputsApart(
        f"model: expected one of {_NAMES} to take the input, flattened or scaled element by "
        f"element at most, but none does{first}",
        calls[0][0] if calls else None,
    )


def _calls(
    probe: Probe, inputs: Any, layers: dict[str, nn.Module]
) -> list[tuple[str, bool, tuple[int, ...] | None]]:
    """Call the model. Return each call of a layer, and whether the layer took the input."""
    asked = first_input(inputs).detach()
    if asked.is_floating_point():
        asked = asked.clone().requires_grad_()
    rest = inputs[1:] if isinstance(inputs, tuple) else ()
    seen: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.append((name, args[0])) if args else None
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.enable_grad():
            probe.outputs((asked, *rest))
    finally:
        for handle in handles:
            handle.remove()
    return [
        (
            name,
            isinstance(layers[name], nn.Embedding) != asked.is_floating_point()
            and _takes(asked, taken),
            tuple(asked.shape[1:]) if _is_flattened(layers[name], asked, taken) else None,
        )
        for name, taken in seen
    ]


def _is_flattened(layer: nn.Module, asked: Tensor, taken: Tensor) -> bool:
    return isinstance(layer, nn.Linear) and taken.dim() == 2 and asked.dim() > 2


def _takes(asked: Tensor, taken: Tensor) -> bool:
    """Return whether ``taken`` is a function of ``asked`` element by element, in its order."""
    if taken.shape[:1] != asked.shape[:1] or taken.numel() != asked.numel():
        return False
    if not asked.requires_grad:
        return not taken.is_floating_point() and torch.equal(taken.reshape(asked.shape), asked)
    if not taken.requires_grad:
        return False
    # The Jacobian is diagonal, or its product with random numbers is another one than that of
    # a diagonal with the sums of its columns.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(asked.shape, generator=generator).add_(0.5).to(asked)
    ones = torch.ones_like(taken)
    diagonal, product = (
        torch.autograd.grad(taken, asked, weight, retain_graph=True, allow_unused=True)[0]
        for weight in (ones, drawn.reshape(taken.shape).to(taken.dtype))
    )
    if diagonal is None or product is None or not bool(diagonal.any()):
        return False
    error = (product - drawn * diagonal).abs().max()
    exact = 64 * torch.finfo(taken.dtype).eps
    return bool(error <= exact * diagonal.abs().max())
