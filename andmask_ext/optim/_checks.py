"""Checks of optimizer options."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_dtype
from .._notices import warn_once

WEIGHT_DECAYS = ("before_mask", "after_mask", "decoupled")


def check_params(params: Sequence[Tensor]) -> None:
    """Raise TypeError if a parameter that requires a gradient has an unsupported dtype.

    Frozen parameters of any dtype are passed over, as in torch.
    """
    for index, param in enumerate(params):
        if param.requires_grad:
            check_dtype(f"params[{index}]", param)


def warn_of_typos(optimizer: Optimizer, group: object) -> None:
    """Warn of options of a group that are no option, but nearly have the name of one.

    Others are let pass, as in torch: schedulers and frameworks keep values of their own in groups.
    """
    for name in group if isinstance(group, Mapping) else ():
        if not isinstance(name, str) or name in ("params", *optimizer.defaults):
            continue
        # 0.85 takes "taus" for "tau", but not the "lr_scale" of frameworks for "rescale".
        for option in get_close_matches(name.lower(), optimizer.defaults, 1, 0.85):
            warn_once(
                optimizer,
                f"param_groups: expected the options of {type(optimizer).__name__}, but got "
                f"{name!r}, which nothing reads; if {option!r} is meant, correct the name",
            )


def as_number(name: str, value: Any) -> float:
    """Return a number of Python, numpy or a tensor of one element as a Python number."""
    item = value
    if hasattr(value, "item"):
        try:
            item = value.item()
        except (RuntimeError, ValueError):
            raise TypeError(
                f"{name}: expected a number, but got {type(value).__name__} of shape "
                f"{tuple(value.shape)}"
            ) from None
    if isinstance(item, bool) or not isinstance(item, numbers.Real):
        raise TypeError(f"{name}: expected a number, but got {type(value).__name__}")
    return item if isinstance(item, int) else float(item)


def check_lr(group: dict[str, Any]) -> None:
    """Raise unless ``lr`` is a number >= 0 or a tensor of one, which schedulers change in place."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        check_range(group, "lr", 0.0)
    elif lr.numel() != 1:
        raise ValueError(f"lr: expected a tensor of one element, but got shape {lr.shape}")


def check_range(group: dict[str, Any], name: str, low: float, high: float = float("inf")) -> None:
    """Raise unless an option is a number in ``[low, high)``. It becomes a Python number."""
    group[name] = in_range(name, group[name], low, high)


def in_range(name: str, value: Any, low: float, high: float) -> float:
    """Return a value as a Python number. Raise unless it lies in ``[low, high)``."""
    number = as_number(name, value)
    if not low <= number < high:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}), but got {number}")
    return number


def check_betas(group: dict[str, Any], count: int) -> None:
    """Raise unless ``betas`` are ``count`` numbers in [0, 1). They become a tuple of floats."""
    betas = group["betas"]
    unordered = isinstance(betas, (str, bytes, Mapping, Set)) or not isinstance(betas, Iterable)
    if unordered or (isinstance(betas, Tensor) and betas.dim() == 0):
        raise TypeError(
            f"betas: expected a sequence of {count} numbers, but got {type(betas).__name__}"
        )
    values = list(betas)
    if len(values) != count:
        raise ValueError(f"betas: expected {count} numbers, but got {len(values)}: {betas!r}")
    group["betas"] = tuple(
        in_range(f"betas[{index}]", beta, 0.0, 1.0) for index, beta in enumerate(values)
    )


def check_torch_options(
    name: str, foreach: object, fused: object, capturable: object, differentiable: object
) -> None:
    """Raise unless the options of ``torch.optim`` ask for nothing that a step does not do.

    ``foreach`` and ``fused`` choose between implementations with one result. A step is one fused
    pass over memory in any case.
    """
    for option, value in (("foreach", foreach), ("fused", fused)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{option}: expected a bool or None, but got {type(value).__name__}")
    for option, value, reason in (
        ("capturable", capturable, "the step reads numbers on the host, so a CUDA graph would not "
         "see them change"),
        ("differentiable", differentiable, "the step changes parameters in place without a graph; "
         "use am.backward and an optimizer of torch"),
    ):  # fmt: skip
        if value not in (None, False):
            raise ValueError(f"{option}: {name} expected False, but got {value!r}: {reason}")


def check_weight_decay(group: dict[str, Any]) -> None:
    """Raise unless the weight decay is in range and its mode is known."""
    check_range(group, "weight_decay", 0.0)
    if group["weight_decay_mode"] not in WEIGHT_DECAYS:
        raise ValueError(
            f"weight_decay_mode: expected one of {', '.join(WEIGHT_DECAYS)}, "
            f"but got {group['weight_decay_mode']!r}"
        )


def decay_after_mask(group: dict[str, Any]) -> float:
    """Return the decay that the native step applies: 0 if the moments already include it."""
    return 0.0 if group["weight_decay_mode"] == "before_mask" else group["weight_decay"]
