"""Autograd formulas and vmap rules of the ops.

The mask is piecewise constant in the gradients. So ``d masked_mean / d grads[e] = mask / d``
almost everywhere, the same for every environment e. With ``rescale`` it is multiplied by
1 / density(mask), which is piecewise constant too. The function jumps where a coordinate lies
exactly on the threshold. There the formula gives the derivative for a fixed mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import RULES

_masked_mean = torch.ops.andmask.masked_mean.default
_agreement_mask = torch.ops.andmask.agreement_mask.default


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    grads, *ctx.options = inputs
    ctx.keywords = keyword_only_inputs
    ctx.save_for_backward(grads)  # no copy: computing the mask again is cheaper than keeping it


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (grads,) = ctx.saved_tensors
    # The mask is float32 for the 16-bit types.
    mask = _agreement_mask(grads.detach(), *ctx.options, **ctx.keywords)
    column = (grad * mask / grads.shape[0]).to(grads.dtype)
    return column.expand_as(grads), None, None


torch.library.register_autograd("andmask::masked_mean", _backward, setup_context=_setup_context)

# The outputs of the mask, of histograms and of norms never require gradients.
_library = torch.library.Library("andmask", "IMPL")
for _name in (
    "agreement_mask",
    "vote_histogram",
    "_vote_histograms",
    "_squared_norm",
    "_vote_thresholds",
):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _vmap_rule(op: Any) -> Any:
    def rule(
        info: Any,
        in_dims: tuple[int | None, ...],
        grads: Tensor,
        tau: float | None = None,
        rescale: bool = False,
        **keywords: Any,
    ) -> tuple[Tensor, int]:
        (batch_dim, *_) = in_dims
        assert batch_dim is not None  # torch calls the rule only where a tensor is batched
        if (rescale or keywords.get("fdr") is not None) and grads.shape[batch_dim]:
            # Each sample of the vmap batch has its own rescale factor and threshold.
            samples = grads.unbind(batch_dim)
            return torch.stack([op(sample, tau, rescale, **keywords) for sample in samples]), 0
        return op(grads.movedim(batch_dim, 1), tau, False, **keywords), 0

    return rule


torch.library.register_vmap("andmask::masked_mean", _vmap_rule(_masked_mean))
torch.library.register_vmap("andmask::agreement_mask", _vmap_rule(_agreement_mask))


def inside_transform() -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or (
        torch.autograd.forward_ad._current_level >= 0
    )


def masked_mean_for_transforms(grads: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute ``masked_mean`` with a derivative that every transform supports.

    In torch 2.10 to 2.14, transforms cannot differentiate an op whose formula was registered by
    ``register_autograd``: ``torch.func.grad`` raises, and forward mode loses the tangent. So the
    op gives the value, and plain torch ops that add zero to it give the derivative.
    """
    constant = grads.detach()
    mask: Tensor = _agreement_mask(constant, **options)
    linear = (mask * grads.to(mask.dtype).mean(0)).to(grads.dtype)
    value: Tensor = _masked_mean(constant, **options)
    return value + (linear - linear.detach())


# ---- aggregate: rules of all kinds, without derivatives ----

_aggregate = torch.ops.andmask._aggregate.default


def _aggregate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rule = inputs[1]


def _no_derivative(rule: object) -> NotImplementedError:
    return NotImplementedError(
        f"andmask::_aggregate: rule {rule} has no derivative; detach grads, or aggregate them "
        "under torch.no_grad() (and_mask has one in andmask::masked_mean)"
    )


def _aggregate_backward(ctx: Any, grad: Tensor) -> None:
    raise _no_derivative(ctx.rule)


torch.library.register_autograd(
    "andmask::_aggregate", _aggregate_backward, setup_context=_aggregate_context
)


def _aggregate_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grads: Tensor,
    rule: str,
    arguments: list[float],
    rescale: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, int]:
    grads_dim, noise_dim = in_dims[0], in_dims[4] if len(in_dims) > 4 else None
    size = info.batch_size
    # The batch becomes the first dimension of the shape.
    if grads_dim is None:
        grads = grads.unsqueeze(1).expand(-1, size, *grads.shape[1:])
    else:
        grads = grads.movedim(grads_dim, 1)
    if noise is not None:
        noise = (
            noise.expand(size, *noise.shape) if noise_dim is None else noise.movedim(noise_dim, 0)
        )
    tested = len(arguments) > RULES[rule].arguments  # fdr tests the votes of a whole tensor
    if size and (rescale or tested or RULES[rule].per_tensor):
        samples = [
            _aggregate(sample, rule, arguments, rescale, None if noise is None else noise[index])
            for index, sample in enumerate(grads.unbind(1))
        ]
        return torch.stack(samples), 0
    return _aggregate(grads, rule, arguments, rescale, noise), 0


torch.library.register_vmap("andmask::_aggregate", _aggregate_vmap)


def refuse_derivative(grads: Tensor, rule: object) -> None:
    """Raise a clear error inside transforms that need a derivative."""
    if not inside_transform():
        return
    tracked = torch._C._are_functorch_transforms_active() and (
        torch._C._functorch.is_gradtrackingtensor(grads) and grads.requires_grad
    )
    if tracked or torch.autograd.forward_ad.unpack_dual(grads).tangent is not None:
        raise _no_derivative(rule)
