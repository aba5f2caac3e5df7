"""Moments of weight gradients against the plain weight gradient of the same layer.

The yardstick is torch.mm for linear layers, and the library's own backward for convolutions. What
ours does on top: every environment's share of the gradient votes.

python -m benchmarks.bench_outer --quick
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import andmask_ext  # noqa: F401  # loads the ops

from .common import Row, measure, parser, run
from .contest.models import MODELS

ops = torch.ops.andmask
Moments = tuple[Tensor | None, ...]

# Rows, inputs, outputs of linear layers; rows of an environment.
LINEAR = [(2048, 1024, 1024), (4096, 512, 512), (2048, 256, 1024)]
ENVIRONMENT_ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 1024]
# Channels, outputs, size of the images, taps, stride, groups; 80 images.
IMAGES = 80
CONVOLUTIONS = [
    (3, 64, 32, 3, 1, 1),
    (32, 64, 32, 3, 1, 1),
    (64, 64, 32, 3, 2, 1),
    (64, 128, 16, 3, 1, 1),
    (128, 128, 16, 3, 1, 1),
    (256, 256, 8, 3, 1, 1),
    (512, 512, 4, 3, 1, 1),
    (64, 128, 32, 1, 2, 1),
    (128, 128, 16, 3, 1, 32),
    (128, 128, 16, 3, 1, 128),
]


def compare(
    case: str,
    plain: Callable[[], object],
    ours: Callable[[Moments], object],
    shape: tuple[int, ...],
    environments: int,
) -> list[Row]:
    votes = torch.zeros(shape, dtype=torch.int8 if environments < 128 else torch.int16)
    total, squares, voters = torch.zeros(shape), torch.zeros(shape), votes.clone()
    return measure(
        case,
        {
            "andmask": lambda: ours((total, votes, None, None, None)),
            "andmask with squares": lambda: ours((total, votes, squares, None, None)),
            "andmask with voters": lambda: ours((total, votes, None, None, voters)),
            "plain weight gradient": plain,
        },
        bytes_moved=5 * total.numel(),
        yardstick="plain weight gradient",
    )


def linear(name: str, activations: Tensor, grads: Tensor, environment_rows: int) -> list[Row]:
    """A layer on ``[rows, inputs]``, with as many rows in each environment."""
    inputs = activations.shape[1]
    a, d = (x.reshape(-1, environment_rows, x.shape[1]) for x in (activations, grads))
    weight = torch.empty(grads.shape[1], inputs)
    return compare(
        f"{name}linear {len(a)} x {environment_rows} rows, {inputs} -> {len(weight)}",
        lambda: torch.mm(grads.t(), activations, out=weight),
        lambda moments: ops._accumulate_outer_(*moments, a, d, None, None, 0),
        tuple(weight.shape),
        len(a),
    )


def convolution(
    name: str, layer: nn.Conv2d, images: Tensor, grads: Tensor, environments: int
) -> list[Row]:
    weight = layer.weight.detach()
    window = (layer.stride, layer.padding, layer.dilation)
    rest = (*window, False, [0, 0], layer.groups, [False, True, False])
    offsets = torch.arange(0, len(images) + 1, len(images) // environments)
    layout = "" if images.is_contiguous() else " channels last"
    taps, size = weight.shape[-1], images.shape[-1]
    return compare(
        f"{name}convolution {taps}x{taps}/{layer.stride[0]}, {images.shape[1]} -> {len(weight)}, "
        f"{layer.groups} groups, {size}x{size}{layout}, {environments} environments",
        lambda: torch.ops.aten.convolution_backward(grads, images, weight, None, *rest),
        lambda moments: ops._accumulate_convolution_(
            *moments, images, grads, None, offsets, 0, *window, layer.groups
        ),
        tuple(weight.shape),
        environments,
    )


def random_linear(rows: int, inputs: int, outputs: int, environment_rows: int) -> list[Row]:
    torch.manual_seed(0)
    return linear("", torch.randn(rows, inputs), torch.randn(rows, outputs), environment_rows)


def random_convolution(
    channels: int,
    outputs: int,
    size: int,
    taps: int,
    stride: int,
    groups: int,
    environments: int,
    memory: torch.memory_format,
) -> list[Row]:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, outputs, taps, stride, taps // 2, groups=groups)
    images = torch.randn(IMAGES, channels, size, size).to(memory_format=memory)
    with torch.no_grad():
        grads = torch.randn_like(layer(images))
    return convolution("", layer, images, grads, environments)


def layers(model: str) -> list[Callable[[], list[Row]]]:
    """One case for each layer of a model, on its usual batch; each example an environment."""
    torch.manual_seed(0)
    build, batch, examples = MODELS[model]
    network = build()
    found: list[Callable[[], list[Row]]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, d = inputs[0].detach(), torch.randn_like(output)
        name = f"{model}: "
        if isinstance(layer, nn.Conv2d):
            found.append(lambda: convolution(name, layer, a, d, examples))
        else:
            rows = a.numel() // a.shape[-1] // examples
            flat_a, flat_d = a.reshape(-1, a.shape[-1]), d.reshape(-1, d.shape[-1])
            found.append(lambda: linear(name, flat_a, flat_d, rows))

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(keep)
    with torch.no_grad():
        network.train()(batch(examples)[0])
    return found


def main() -> None:
    options = parser(__doc__).parse_args()
    cases: list[Callable[[], list[Row]]] = []
    shapes = LINEAR[:1] if options.quick else LINEAR
    rows_of_each = ENVIRONMENT_ROWS[::2] if options.quick else ENVIRONMENT_ROWS
    cases += [partial(random_linear, *shape, rows) for shape in shapes for rows in rows_of_each]
    for model in MODELS:
        cases += layers(model)
    for window in CONVOLUTIONS[4:5] if options.quick else CONVOLUTIONS:
        for environments in (IMAGES, 8):
            for memory in (torch.contiguous_format, torch.channels_last):
                cases.append(partial(random_convolution, *window, environments, memory))
    run(options, cases)


if __name__ == "__main__":
    main()
