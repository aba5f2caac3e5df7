"""The ops of bench_cuda.py, and the same in eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import andmask_ext as am

from .measuring import Step
from .roofline import Work

ops = torch.ops.andmask
TAU, COUNT = 0.6, 8
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
Tensors = list[Tensor]
OURS, EAGER, COMPILED = "andmask", "eager", "torch.compile"


# ---- the eager formulas ----


def masked_mean(grads: Tensor) -> Tensor:
    return (grads.sign().sum(0).abs() >= TAU * len(grads)) * grads.mean(0)


def masked_mean_rescaled(grads: Tensor) -> Tensor:
    mask = (grads.sign().sum(0).abs() >= TAU * len(grads)).to(grads.dtype)
    return mask * grads.mean(0) / (1e-10 + mask.mean())


def agreement_mask(grads: Tensor) -> Tensor:
    return (grads.sign().sum(0).abs() >= TAU * len(grads)).to(grads.dtype)


def median(grads: Tensor) -> Tensor:
    ranked = grads.sort(0).values
    last = len(grads) - 1
    return (ranked[last // 2] + ranked[last - last // 2]) / 2


def accumulate(sums: list[Tensor], votes: list[Tensor], grads: list[Tensor]) -> None:
    for total, vote, grad in zip(sums, votes, grads, strict=True):
        total.add_(grad)
        vote.add_(grad.sign().to(torch.int8))


def update(total: Tensor, vote: Tensor) -> Tensor:
    return (vote.abs() >= TAU * COUNT) * (total / COUNT)


def resolve(sums: list[Tensor], votes: list[Tensor]) -> list[Tensor]:
    return [update(total, vote) for total, vote in zip(sums, votes, strict=True)]


def sgd(params: list[Tensor], buffers: list[Tensor], updates: list[Tensor]) -> None:
    for param, buffer, grad in zip(params, buffers, updates, strict=True):
        buffer.mul_(0.9).add_(grad)
        param.add_(buffer, alpha=-ADAM["lr"])


def adam_step(param: Tensor, grad: Tensor, average: Tensor, square: Tensor, step: Tensor) -> Tensor:
    """Move the averages; return by how much the parameter moves."""
    step.add_(1)
    average.lerp_(grad, 1 - ADAM["beta1"])
    square.mul_(ADAM["beta2"]).addcmul_(grad, grad, value=1 - ADAM["beta2"])
    size = ADAM["lr"] / (1 - ADAM["beta1"] ** step)
    return size * average / ((square / (1 - ADAM["beta2"] ** step)).sqrt() + ADAM["eps"])


def adam(params: list[Tensor], *state: list[Tensor]) -> None:
    for param, grad, average, square, step in zip(params, *state, strict=True):
        param.sub_(adam_step(param, grad, average, square, step))


def temporal_adam(params: list[Tensor], *state: list[Tensor]) -> None:
    for param, grad, average, square, step, signs in zip(params, *state, strict=True):
        move = adam_step(param, grad, average, square, step)
        signs.lerp_(grad.sign(), 0.1)
        param.sub_(move * (signs.abs() >= TAU * (1 - 0.9**step)))


def outer(total: Tensor, votes: Tensor, a: Tensor, d: Tensor) -> None:
    """Products of some environments at a time, held; their sum and the sum of their signs."""
    pieces = max(1, (1 << 28) // (4 * total.numel()))
    for some_a, some_d in zip(a.split(pieces), d.split(pieces), strict=True):
        each = torch.bmm(some_d.transpose(1, 2), some_a)
        total.add_(each.sum(0))
        votes.add_(each.sign().sum(0).to(votes.dtype))


# ---- the cases ----


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def on_stacks(work: Work, device: torch.device) -> dict[str, Step]:
    environments, columns = (int(n.replace(",", "")) for n in work.size.split(" x "))
    dtype = torch.bfloat16 if work.op.endswith("bfloat16") else torch.float32
    grads = normal(environments, columns, device=device, dtype=dtype)
    formula, op = {
        "masked_mean": (masked_mean, lambda: ops.masked_mean(grads, TAU)),
        "masked_mean, rescale": (masked_mean_rescaled, lambda: ops.masked_mean(grads, TAU, True)),
        "agreement_mask": (agreement_mask, lambda: ops.agreement_mask(grads, TAU)),
    }.get(work.op.removesuffix(" bfloat16")) or (median, lambda: am.rules.Median()(grads))
    compiled = torch.compile(formula, dynamic=False)
    return {OURS: op, EAGER: lambda: formula(grads), COMPILED: lambda: compiled(grads)}


def on_lists(work: Work, device: torch.device) -> dict[str, Step]:
    count, size = (int(n.replace(",", "")) for n in work.size.split(" x "))

    def lists(fill: float | None = None) -> list[Tensor]:
        if fill is None:
            return [normal(size, device=device) for _ in range(count)]
        return [torch.full((size,), fill, device=device) for _ in range(count)]

    grads, sums, params = lists(), lists(), lists()
    votes = [torch.randint(-COUNT, COUNT + 1, (size,), device=device).to(torch.int8) for _ in grads]
    steps = [torch.zeros((), device=device) for _ in grads]
    own: tuple[Any, ...] = (sums, votes, [], [], [], COUNT, "and_mask", [TAU])

    def pair(formula: Callable[..., object], *arguments: list[Tensor]) -> dict[str, Step]:
        compiled = torch.compile(formula, dynamic=False)
        return {EAGER: lambda: formula(*arguments), COMPILED: lambda: compiled(*arguments)}

    if work.op.startswith("accumulate_"):
        call = lambda: ops._accumulate_(sums, votes, *[[]] * 3, grads, 1)  # noqa: E731
        return {OURS: call, **pair(accumulate, sums, votes, grads)}
    if work.op.startswith("resolve"):
        return {OURS: lambda: ops._resolve(*own), **pair(resolve, sums, votes)}
    if work.op == "sgd_step_":
        buffers = lists(0.0)
        options = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
        flags = ("decoupled_weight_decay", "nesterov", "maximize", "first_step")
        options |= dict.fromkeys(flags, False)

        def resolved_sgd(p: Tensors, b: Tensors, s: Tensors, v: Tensors) -> None:
            sgd(p, b, resolve(s, v))

        return {
            OURS: lambda: ops._sgd_step_(params, buffers, *own, False, **options),
            **pair(resolved_sgd, params, buffers, sums, votes),
        }
    averages, squares, signs = lists(0.0), lists(0.0), lists(0.0)
    options = {**ADAM, "weight_decay": 0.0, "decoupled_weight_decay": True, "maximize": False}
    if work.op == "adam_step_":

        def resolved_adam(
            p: Tensors, a: Tensors, q: Tensors, n: Tensors, s: Tensors, v: Tensors
        ) -> None:
            adam(p, resolve(s, v), a, q, n)

        return {
            OURS: lambda: ops._adam_step_(
                params, averages, squares, [], steps, *own, False, **options
            ),
            **pair(resolved_adam, params, averages, squares, steps, sums, votes),
        }
    options |= {"tau": TAU, "beta3": 0.9, "bias_correction": True}
    return {
        OURS: lambda: ops._temporal_adam_step_(
            params, averages, squares, signs, steps, grads, **options
        ),
        **pair(temporal_adam, params, grads, averages, squares, steps, signs),
    }


def on_rows(work: Work, device: torch.device) -> dict[str, Step]:
    """Moments of a linear layer's weight gradient; the yardstick is the plain gradient."""
    each = int(work.op.split()[1])
    rows, inputs, outputs = (
        int(work.size.split()[0]) * each,
        *(int(n) for n in work.size.split(", ")[1].split(" to ")),
    )
    dtype = torch.bfloat16 if work.kind == "bfloat16" else torch.float32
    a = normal(rows, inputs, device=device, dtype=dtype)
    d = normal(rows, outputs, device=device, dtype=dtype)
    a3, d3 = a.view(-1, each, inputs), d.view(-1, each, outputs)
    total = torch.zeros(outputs, inputs, device=device)
    votes = torch.zeros(outputs, inputs, dtype=torch.int16, device=device)
    compiled = torch.compile(outer, dynamic=False)
    plain = torch.empty(outputs, inputs, dtype=dtype, device=device)
    return {
        OURS: lambda: ops._accumulate_outer_(total, votes, *[None] * 3, a3, d3, None, None, 0),
        EAGER: lambda: outer(total, votes, a3, d3),
        COMPILED: lambda: compiled(total, votes, a3, d3),
        "plain": lambda: torch.mm(d.t(), a, out=plain),
    }


def on_images(work: Work, device: torch.device) -> dict[str, Step]:
    count, side = int(work.size.split()[0]), int(work.size.split()[2])
    channels = int(work.size.split()[-1])
    images = normal(count, channels, side, side, device=device)
    weight = normal(channels, channels, 3, 3, device=device)
    grads = torch.randn_like(F.conv2d(images, weight, padding=1))
    total = torch.zeros_like(weight)
    votes = torch.zeros_like(weight, dtype=torch.int16)
    window = ([1, 1], [1, 1], [1, 1])

    def plain(x: Tensor, d: Tensor) -> Tensor:
        rest = (*window, False, [0, 0], 1, [False, True, False])
        gradient: Tensor = torch.ops.aten.convolution_backward(d, x, weight, None, *rest)[1]
        return gradient

    def eager() -> None:
        for x, d in zip(images.split(1), grads.split(1), strict=True):
            gradient = plain(x, d)
            total.add_(gradient)
            votes.add_(gradient.sign().to(votes.dtype))

    return {
        OURS: lambda: ops._accumulate_convolution_(
            total, votes, None, None, None, images, grads, None, None, 0, *window, 1
        ),
        EAGER: eager,
        "plain": lambda: plain(images, grads),
    }


def build(work: Work, device: torch.device) -> dict[str, Step]:
    if "outer" in work.op:
        return on_rows(work, device)
    if "convolution" in work.op:
        return on_images(work, device)
    contestants = (
        on_lists
        if "step" in work.op or work.op.split()[0] in ("accumulate_", "resolve")
        else on_stacks
    )(work, device)
    source = torch.zeros(int(work.total_bytes) // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {**contestants, "copy": lambda: target.copy_(source)}
