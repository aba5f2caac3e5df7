"""Autograd formulas and vmap rules of the ops.

The mask is piecewise constant in the gradients, so almost everywhere
``d masked_mean / d grads[e] = mask / d``, the same for every environment e. With ``rescale`` the
factor 1 / density(mask) is piecewise constant too and multiplies. Where a coordinate sits exactly
on the threshold the function jumps; there the formula gives the derivative with the mask held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_masked_mean = torch.ops.andmask.masked_mean.default
_agreement_mask = torch.ops.andmask.agreement_mask.default


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
    grads, ctx.tau, ctx.rescale = inputs
    ctx.save_for_backward(grads)  # no copy: the mask is cheaper to count again than to keep


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (grads,) = ctx.saved_tensors
    mask = _agreement_mask(grads.detach(), ctx.tau, ctx.rescale)
    return (grad * mask / grads.shape[0]).expand_as(grads), None, None


torch.library.register_autograd("andmask::masked_mean", _backward, setup_context=_setup_context)

# The mask has no gradient: its output never requires one.
_library = torch.library.Library("andmask", "IMPL")
_library.impl("agreement_mask", torch.library.fallthrough_kernel, "Autograd")


def _vmap_rule(op: Any) -> Any:
    def rule(
        info: Any,
        in_dims: tuple[int | None, ...],
        grads: Tensor,
        tau: float = 1.0,
        rescale: bool = False,
    ) -> tuple[Tensor, int]:
        (batch_dim, *_) = in_dims
        assert batch_dim is not None  # torch calls the rule only where a tensor is batched
        if rescale and grads.shape[batch_dim]:
            # The factor belongs to one sample's tensor, not to the whole batch.
            return torch.stack([op(sample, tau, True) for sample in grads.unbind(batch_dim)]), 0
        return op(grads.movedim(batch_dim, 1), tau, False), 0

    return rule


torch.library.register_vmap("andmask::masked_mean", _vmap_rule(_masked_mean))
torch.library.register_vmap("andmask::agreement_mask", _vmap_rule(_agreement_mask))


class _MaskedMean(torch.autograd.Function):
    """``masked_mean`` for ``torch.func`` transforms and forward-mode differentiation.

    torch (2.10 to 2.14) can take neither *through* an op that has its formula from
    ``register_autograd``: ``torch.func.grad`` raises, forward mode loses the tangent. An
    ``autograd.Function`` like this one has no such hole.
    """

    @staticmethod
    def forward(grads: Tensor, tau: float, rescale: bool) -> Tensor:
        out: Tensor = _masked_mean(grads, tau, rescale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (grads,) = ctx.saved_tensors
        mask: Tensor = _agreement_mask(grads.detach(), ctx.tau, ctx.rescale)
        return mask * tangent.mean(0)

    vmap = staticmethod(_vmap_rule(lambda *args: masked_mean_function(*args)))


masked_mean_function: Callable[[Tensor, float, bool], Tensor] = _MaskedMean.apply


def needs_function() -> bool:
    """Whether the caller runs under a transform that only :func:`masked_mean_function` supports."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )
