"""The environments' losses of a module, as functions of its parameters."""

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

    The losses work on a copy: the model, its buffers and its mode are never changed, and changing
    it later does not change them. The copy is in the mode, train or eval, that the model and each
    of its parts are in now. Batch norm in train mode normalises by the statistics of the
    environment's batch, as in training, and keeps no running ones.

    Args:
        model: whose parameters are the point; those that need no gradient stay fixed.
        environments: pairs (inputs, targets); a tuple of inputs is passed as several arguments.
        loss_fn: maps the model's output and the targets to a 0-dim loss.

    Returns:
        The losses, and the parameters at which the model is now, detached.

    Raises:
        TypeError: ``model`` is no module, ``loss_fn`` cannot be called, or an environment is no
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
    """Copy the model; what would update running statistics uses those of the batch alone."""
    frozen = copy.deepcopy(model)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    for module in frozen.modules():
        if isinstance(module, _NormBase) and module.training:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return frozen
