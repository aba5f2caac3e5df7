"""Fake kernels: what the ops return in shape, dtype and device, for torch.compile and export."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_grads, check_tau


def _masked_mean(grads: Tensor, tau: float = 1.0, rescale: bool = False) -> Tensor:
    check_grads(grads)
    check_tau(tau)
    return grads.new_empty(grads.shape[1:])


def _agreement_mask(grads: Tensor, tau: float = 1.0, rescale: bool = False) -> Tensor:
    wide = torch.float64 if grads.dtype == torch.float64 else torch.float32
    return _masked_mean(grads, tau, rescale).to(wide)


torch.library.register_fake("andmask::masked_mean", _masked_mean)
torch.library.register_fake("andmask::agreement_mask", _agreement_mask)
