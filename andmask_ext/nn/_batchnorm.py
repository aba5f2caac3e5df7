"""Batch norm with separate statistics for each environment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .._dtypes import wide_dtype
from ..agreement._current import PerEnvironment, current_groups, is_open
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
        tracks = not self.training or self.track_running_stats
        output = self._normalized(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            by_batch,
            self.momentum,
            self.eps,
        )
        return super().forward(input) if output is None else output

    def _normalized(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor | None:
        """Return what batch norm gives in each environment; None: the same as without them."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        found = current_groups(input.shape[0]) if training or learns else None
        if found is None:
            return None
        if not training:
            assert running_mean is not None
            assert running_var is not None
            wide = _wide(input)
            mean, variance = running_mean.to(wide.dtype), running_var.to(wide.dtype)
            normal = F.batch_norm(wide, mean, variance, eps=eps)
            return _scale_and_shift(normal, weight, bias, input.dtype)
        groups, each = found
        if input.shape[1] != self.num_features:
            raise RuntimeError(
                f"input: expected {self.num_features} channels, but got {input.shape[1]}"
            )
        _check_sizes(input, groups)
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        wide = _wide(input)
        if each > 1 and torch.is_grad_enabled() and not wide.requires_grad:
            wide = wide.detach().requires_grad_()  # its gradient shows the order of the rows
        normal, mean, variance = normalize(wide, groups, eps)
        if running_mean is not None or running_var is not None:
            self._track(running_mean, mean, running_var, variance, momentum)
        return _scale_and_shift(normal, weight, bias, input.dtype)

    @torch.no_grad()
    def _track(
        self,
        running_mean: Tensor | None,
        mean: Tensor,
        running_var: Tensor | None,
        variance: Tensor,
        momentum: float | None,
    ) -> None:
        """Update the running statistics as separate forward passes would, one per environment."""
        environments = len(mean)
        tracked = self.num_batches_tracked
        if tracked is not None:
            tracked.add_(environments)
        if momentum is not None:
            kept = 1.0 - momentum
            later = torch.arange(environments - 1, -1, -1, dtype=torch.float64)
            shares, rest = momentum * kept**later, kept**environments
        elif tracked is not None:
            share = 1.0 / float(tracked)
            shares = torch.full((environments,), share, dtype=torch.float64)
            rest = 1.0 - environments * share
        else:
            return
        shares = shares.to(mean.device)
        for running, values in ((running_mean, mean), (running_var, variance)):
            if running is not None:
                running.copy_(rest * running.double() + shares @ values.double())


class _Inserted(TorchFunctionMode):
    """Takes the place of :func:`torch.nn.functional.batch_norm` in the forward pass of a layer."""

    def __init__(self, layer: _Subclass) -> None:
        super().__init__()
        self._layer = layer
        tracked = layer.num_batches_tracked
        self._tracked = 0 if tracked is None else int(tracked)
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._batch_norm(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        layer, tracked = self._layer, self._layer.num_batches_tracked
        counts = tracked is not None and int(tracked) != self._tracked
        if tracked is not None:
            tracked.fill_(self._tracked)  # environments are counted instead
        output = layer._normalized(
            input, running_mean, running_var, weight, bias, training,
            None if layer.momentum is None else momentum, eps,
        )  # fmt: skip
        if tracked is not None and not counts:
            tracked.fill_(self._tracked)
        if output is None:
            output = F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        return output


class _Subclass(_PerEnvironment):
    """Mixin for a subclass of batch norm with a forward pass of its own, as one with activation."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not is_open():
            return super(_PerEnvironment, self).forward(*args, **kwargs)
        with _Inserted(self) as inserted:
            output = super(_PerEnvironment, self).forward(*args, **kwargs)
        if self.training and inserted.calls != 1:
            raise RuntimeError(
                f"{type(self).__name__}: expected a forward pass that calls "
                f"torch.nn.functional.batch_norm once, but it did {inserted.calls} times, so its "
                "statistics cannot be taken in each environment; use andmask_ext.backward with "
                "one forward pass per environment, or eval() to keep the statistics fixed"
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the name of the original class: this one is made when it is needed."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, (kind, *arguments), *state = reduced
        return _make, (make, kind.__bases__[1], *arguments), *state


def _make(make: Callable[..., Any], kind: Any, *arguments: Any) -> Any:
    return make(_subclass(kind), *arguments)


@cache
def _subclass(kind: Any) -> Any:
    return type(kind)(f"Environment{kind.__name__}", (_Subclass, kind), {})


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
    layer without running statistics uses those of each environment. A subclass of these layers must
    call :func:`torch.nn.functional.batch_norm` once in its forward pass, itself or by ``super()``.
    All else that it does, such as an activation, stays.

    Dimension 0 of a layer's input must be the examples of the batch, or the rows of each example
    one after the other, as in ``tokens.flatten(0, 1)`` of ``[batch, tokens, channels]``. The check
    for mixing refuses rows in another order. An environment needs more than one value per channel.
    If each example is an environment, only layers with several positions or rows of each example
    can work. They then compute instance norm, which may not be the network you want.

    Args:
        model: any module, including a batch norm layer. Converted layers are skipped.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or a layer in it is :class:`torch.nn.SyncBatchNorm`, or
            is lazy and has not seen data yet. Then no layer has been converted.

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
            _refuse(name, layer)
            layers.append(layer)
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _COUNTERPARTS[kind] if kind in _COUNTERPARTS else _subclass(kind)
    return model


def _refuse(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.SyncBatchNorm):
        why = "SyncBatchNorm, whose statistics are those of all processes"
    elif isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        kind = type(layer).__name__
        why = f"{kind}, which does not know its channels yet: run a forward pass first"
    else:
        return
    place = f"layer {name!r}" if name else "model"
    raise TypeError(f"{place}: expected BatchNorm1d, BatchNorm2d or BatchNorm3d, but got {why}")


def _check_sizes(input: Tensor, groups: Groups) -> None:
    values = groups.sizes * input.shape[2:].numel()
    alone = (values == 1).nonzero()
    if len(alone):
        raise ValueError(
            f"environment {int(alone[0])}: Expected more than 1 value per channel when training, "
            f"got input size {torch.Size([1, *input.shape[1:]])}; use environments of two or more "
            "examples, or a norm without a batch, such as torch.nn.GroupNorm"
        )


def _wide(input: Tensor) -> Tensor:
    return input.to(wide_dtype(input)) if input.is_floating_point() else input


def _scale_and_shift(
    normal: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    shape = (1, -1, *[1] * (normal.dim() - 2))
    if weight is None:
        return normal.to(dtype, copy=True)  # a copy, as autograd has saved normal
    output = normal * weight.view(shape)
    if bias is not None:
        output.add_(bias.view(shape))
    return output.to(dtype)
