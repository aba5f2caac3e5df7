"""Losses of a module in each environment, as functions of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ._problem import Loss, Params


def model_losses(
    model: nn.Module,
    environments: Iterable[tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], Tensor],
) -> tuple[list[Loss], dict[str, Tensor]]:
    r"""Return one loss per environment as a function of a model's parameters.

    The losses use a copy of the model. So they do not change the model, its buffers or its mode,
    and later changes of the model do not affect them. The copy keeps the current mode, train or
    eval, of the model and each of its modules. Batch norm in train mode normalises by the
    statistics of the environment's batch, as in training. It keeps no running statistics.

    Args:
        model: the model. Parameters that do not require a gradient stay fixed.
        environments: pairs (inputs, targets). A tuple of inputs is passed as several arguments.
        loss_fn: a function from the model's output and the targets to a 0-dim loss.

    Returns:
        The losses, and a dict of the current parameters of the model, detached.

    Raises:
        TypeError: ``model`` is no module, ``loss_fn`` is not callable, or an environment is no
            pair.
        ValueError: no parameter needs a gradient, or there is no environment.

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import inconsistency_score, model_losses
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> environments = [(x, model(x).detach()), (2 * x, model(2 * x).detach())]
        >>> losses, params = model_losses(model, environments, torch.nn.functional.mse_loss)
        >>> round(float(inconsistency_score(losses, params, eps=0.1).score), 4)
        0.4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, but got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a callable, but got {type(loss_fn).__name__}")
    params = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model: expected parameters that need a gradient, but got none")
    pairs = list(environments)
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"environments[{index}]: expected a pair (inputs, targets), "
                f"but got {type(pair).__name__}"
            )
    if not pairs:
        raise ValueError("environments: expected at least 1, but got none")
    frozen = _without_running_statistics(model)

    def loss_of(inputs: Any, targets: Any) -> Loss:
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)

        def loss(current: Params) -> Tensor:
            if isinstance(current, Tensor):
                raise TypeError("params: expected the dict of model_losses, but got a Tensor")
            return loss_fn(torch.func.functional_call(frozen, current, arguments), targets)

        return loss

    return [loss_of(*pair) for pair in pairs], params


def _without_running_statistics(model: nn.Module) -> nn.Module:
    """Copy the model. Modules that would update running statistics use batch statistics only."""
    frozen = copy.deepcopy(model)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    for module in frozen.modules():
        if isinstance(module, _NormBase) and module.training:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return frozen
