"""Autograd formulas and vmap rules of the ops.

The mask is piecewise constant in the gradients, so almost everywhere
``d masked_mean / d grads[e] = mask / d``, the same for every environment e. With ``rescale`` the
factor 1 / density(mask) is piecewise constant too and multiplies. Where a coordinate sits exactly
on the threshold the function jumps; there the formula gives the derivative with the mask held.
"""

from __future__ import annotations

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
    mask = _agreement_mask(grads.detach(), ctx.tau, ctx.rescale)  # float32 for the 16-bit types
    column = (grad * mask / grads.shape[0]).to(grads.dtype)
    return column.expand_as(grads), None, None


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


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or (
        torch.autograd.forward_ad._current_level >= 0
    )


def masked_mean_for_transforms(grads: Tensor, tau: float, rescale: bool) -> Tensor:
    """``masked_mean`` with a derivative that every transform understands.

    torch (2.10 to 2.14) cannot differentiate *through* an op that has its formula from
    ``register_autograd`` here: ``torch.func.grad`` raises, forward mode loses the tangent. So the
    value comes from the op, and the derivative from plain torch ops that add nothing to it.
    """
    constant = grads.detach()
    mask: Tensor = _agreement_mask(constant, tau, rescale)
    linear = (mask * grads.to(mask.dtype).mean(0)).to(grads.dtype)
    value: Tensor = _masked_mean(constant, tau, rescale)
    return value + (linear - linear.detach())
