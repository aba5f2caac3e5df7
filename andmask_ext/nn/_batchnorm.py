"""Batch norm with separate statistics for each environment."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._dtypes import wide_dtype
from ..agreement._current import PerEnvironment, current_groups
from ..agreement._groups import Groups
from ._normalize import normalize

__all__ = [
    "EnvironmentBatchNorm1d",
    "EnvironmentBatchNorm2d",
    "EnvironmentBatchNorm3d",
    "convert_batchnorm",
]

Model = TypeVar("Model", bound=nn.Module)


class _PerEnvironment(PerEnvironment, _BatchNorm):
    """Base class of the layers of all dimensions.

    Weight and bias are applied after the normalisation, as separate nodes of the autograd graph.
    There the gradient of each example is visible.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        groups = current_groups(input.shape[0]) if by_batch or learns else None
        if groups is None:
            return super().forward(input)
        if by_batch:
            return self._by_environment(input, groups)
        return self._with_frozen_statistics(input)

    def _by_environment(self, input: Tensor, groups: Groups) -> Tensor:
        if input.shape[1] != self.num_features:
            raise RuntimeError(
                f"input: expected {self.num_features} channels, but got {input.shape[1]}"
            )
        _check_sizes(input, groups)
        if self.eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {self.eps}")
        normal, mean, variance = normalize(_wide(input), groups, self.eps)
        if self.training and self.track_running_stats:
            self._track(mean, variance)
        return self._scale_and_shift(normal, input.dtype)

    def _with_frozen_statistics(self, input: Tensor) -> Tensor:
        wide = _wide(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance = self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype)
        normal = F.batch_norm(wide, mean, variance, eps=self.eps)
        return self._scale_and_shift(normal, input.dtype)

    def _scale_and_shift(self, normal: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (1, -1, *[1] * (normal.dim() - 2))
        if self.weight is None:
            return normal.to(dtype, copy=True)  # a copy, as autograd has saved normal
        output = normal * self.weight.view(shape)
        if self.bias is not None:
            output.add_(self.bias.view(shape))
        return output.to(dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics as separate forward passes would, one per environment."""
        environments = len(mean)
        tracked = self.num_batches_tracked
        if tracked is not None:
            tracked.add_(environments)
        if self.momentum is not None:
            kept = 1.0 - self.momentum
            later = torch.arange(environments - 1, -1, -1, dtype=torch.float64)
            shares, rest = self.momentum * kept**later, kept**environments
        elif tracked is not None:
            share = 1.0 / float(tracked)
            shares = torch.full((environments,), share, dtype=torch.float64)
            rest = 1.0 - environments * share
        else:
            return
        shares = shares.to(mean.device)
        for running, values in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.copy_(rest * running.double() + shares @ values.double())


class EnvironmentBatchNorm1d(_PerEnvironment, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` per environment; see :func:`convert_batchnorm`."""


class EnvironmentBatchNorm2d(_PerEnvironment, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` per environment; see :func:`convert_batchnorm`."""


class EnvironmentBatchNorm3d(_PerEnvironment, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` per environment; see :func:`convert_batchnorm`."""


_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: EnvironmentBatchNorm1d,
    nn.BatchNorm2d: EnvironmentBatchNorm2d,
    nn.BatchNorm3d: EnvironmentBatchNorm3d,
}


def convert_batchnorm(model: Model) -> Model:
    """Make the batch norm layers of a model normalise each environment separately.

    In training mode :class:`torch.nn.BatchNorm2d` mixes all examples of a forward pass. If one
    forward pass holds several environments, the gradient of one environment then depends on the
    others. So each environment must have its own mean and variance.

    Inside the context of :class:`andmask_ext.Agreement`, a converted layer gives the result of one
    forward pass per environment. It has the same outputs, the same gradients, and the running
    statistics of one environment after the other. Outside of the context the layer does not change.

    Layers are converted in place. They stay the same objects with the same parameters, buffers,
    hooks and ``state_dict``. They remain instances of :class:`torch.nn.BatchNorm1d`, ``2d`` or
    ``3d``, and can be copied and pickled. In evaluation mode a layer uses its running statistics. A
    layer without running statistics uses those of each environment.

    Dimension 0 of a layer's input must be the examples of the batch. An environment needs more than
    one value per channel. If each example is an environment, only layers with several positions, as
    in images, can work. They then compute instance norm, which may not be the network you want.

    Args:
        model: any module, including a batch norm layer. Converted layers are skipped.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or a layer in it is :class:`torch.nn.SyncBatchNorm`, is
            lazy and has not seen data yet, or is of a subclass that may compute something else.
            Then no layer has been converted.

    Shape:
        - Input of the layers: :math:`(N, C)`, :math:`(N, C, L)`, :math:`(N, C, H, W)` or
          :math:`(N, C, D, H, W)`
        - Output: as the input

    Example:
        >>> import torch, andmask_ext
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(andmask_ext.nn.convert_batchnorm(model)[1])
        <class 'andmask_ext.nn._batchnorm.EnvironmentBatchNorm2d'>
        >>> isinstance(model[1], torch.nn.BatchNorm2d)
        True

    Reference:
        Ioffe and Szegedy, *Batch normalization*, ICML 2015; statistics by group of examples: Hoffer
        et al., *Train longer, generalize better*, NeurIPS 2017 (ghost batch norm).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    layers: list[nn.Module] = []
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _PerEnvironment):
            if type(layer) not in _COUNTERPARTS:
                raise TypeError(_refusal(name, layer))
            layers.append(layer)
    for layer in layers:
        layer.__class__ = _COUNTERPARTS[type(layer)]
    return model


def _refusal(name: str, layer: nn.Module) -> str:
    place = f"layer {name!r}" if name else "model"
    kind = type(layer).__name__
    if isinstance(layer, nn.SyncBatchNorm):
        why = "SyncBatchNorm, whose statistics are those of all processes"
    elif isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        why = f"{kind}, which does not know its channels yet: run a forward pass first"
    else:
        why = f"the subclass {kind}, whose forward pass may be another"
    return f"{place}: expected BatchNorm1d, BatchNorm2d or BatchNorm3d, but got {why}"


def _check_sizes(input: Tensor, groups: Groups) -> None:
    values = groups.sizes * input.shape[2:].numel()
    alone = (values == 1).nonzero()
    if len(alone):
        raise ValueError(
            f"environment {int(alone[0])}: Expected more than 1 value per channel when training, "
            f"got input size {torch.Size([1, *input.shape[1:]])}"
        )


def _wide(input: Tensor) -> Tensor:
    return input.to(wide_dtype(input)) if input.is_floating_point() else input
