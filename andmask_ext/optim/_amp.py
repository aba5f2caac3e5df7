"""Support for torch.amp.GradScaler in ``step``."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from .._pending import PendingStep, State


def overflowed(optimizer: Optimizer, pending: PendingStep) -> bool:
    """Return whether any environment overflowed. Unscale ``.grad`` if ``write_grads`` filled it.

    GradScaler sets ``found_inf`` and ``grad_scale`` on the optimizer while it calls ``step``.

    Raises:
        RuntimeError: losses were scaled but the scaler did not call ``step``; the scaler called
            ``step`` but losses were not scaled; or gradients were unscaled before
            ``write_grads``.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        if pending.scaler is not None:
            raise RuntimeError(
                "step: the losses were scaled, and only the GradScaler notices an overflow; "
                "call grad_scaler.step(optimizer)"
            )
        return False
    if pending.scaler is None:
        raise RuntimeError(
            "step: expected `with optimizer.environment(grad_scaler=scaler):` around the "
            "backward passes of losses that a GradScaler has scaled"
        )
    if float(found_inf) != 0:
        return True
    if pending.state is State.WRITTEN:
        # Only once, should a step be tried again; not at all after grad_scaler.unscale_.
        if scale is not None and not pending.is_unscaled:
            grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
            torch._foreach_mul_([grad for grad in grads if grad is not None], 1 / float(scale))
            pending.unscaled_grads()
    elif scale is None:
        raise RuntimeError(
            "step: expected optimizer.write_grads() before grad_scaler.unscale_(optimizer): "
            "there are no gradients to unscale yet"
        )
    return False
