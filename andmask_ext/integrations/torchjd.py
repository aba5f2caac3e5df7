"""TorchJD: rules as aggregators of Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torchjd.aggregation import Aggregator

from ..rules import Rule
from ..rules._filtering import GramRule

__all__ = ["RuleAggregator", "jac_to_grad"]


class RuleAggregator(Aggregator):  # type: ignore[misc]
    """A rule as a ``torchjd.aggregation.Aggregator``.

    The rows of the matrix are environments. TorchJD joins the Jacobians of all parameters into one
    matrix, so ``rescale`` is then over all coordinates together. :func:`jac_to_grad` applies a rule
    to each parameter alone, as the optimizers of this package do.

    Args:
        rule: any rule of :mod:`andmask_ext.rules`, such as ``AndMask(tau=0.8)``.

    Raises:
        TypeError: ``rule`` is none.

    Example:
        >>> import torch, andmask_ext as am
        >>> from andmask_ext.integrations.torchjd import RuleAggregator
        >>> RuleAggregator(am.AndMask(tau=1.0))(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        tensor([2., 0.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = _check(rule)

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the aggregation ``[n]`` of a matrix ``[environments, n]``."""
        return self.rule(matrix)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r})"


def jac_to_grad(tensors: Iterable[Tensor], /, rule: Rule, *, retain_jac: bool = False) -> None:
    """Aggregate the Jacobian in ``.jac`` of each tensor by a rule, and add it to ``.grad``.

    This is ``torchjd.autojac.jac_to_grad`` with a rule for each tensor alone. No Jacobian is
    joined with another one, so it needs less memory. But
    :class:`andmask_ext.rules.GradientAgreementFiltering` sees those of all tensors together.

    Args:
        tensors: parameters, whose ``.jac`` ``[environments, *shape]`` ``torchjd.autojac.backward``
            has filled.
        rule: any rule of :mod:`andmask_ext.rules`.
        retain_jac: keep ``.jac``.

    Raises:
        TypeError: ``rule`` is no rule.
        ValueError: there is no tensor, or one without ``.jac``; or they have different numbers of
            environments.

    Example:
        >>> import torch, andmask_ext as am
        >>> from torchjd.autojac import backward
        >>> from andmask_ext.integrations.torchjd import jac_to_grad
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> backward([weight @ torch.tensor(x) for x in ([1.0, -2.0], [3.0, 4.0])])
        >>> jac_to_grad([weight], am.AndMask(tau=1.0))
        >>> weight.grad
        tensor([2., 0.])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """
    _check(rule)
    jacobians: list[tuple[Any, Tensor]] = []
    for index, tensor in enumerate(tensors):
        jacobian = getattr(tensor, "jac", None)
        if jacobian is None:
            raise ValueError(
                f"tensors[{index}]: expected a tensor with .jac, but got none; call "
                "torchjd.autojac.backward first, and leave out what it does not reach"
            )
        jacobians.append((tensor, jacobian))
    counts = sorted({len(jacobian) for _, jacobian in jacobians})
    if len(counts) != 1:
        got = f"Jacobians of {', '.join(map(str, counts))} rows" if counts else "no tensor"
        raise ValueError(f"tensors: expected Jacobians of one number of rows, but got {got}")
    apply: Callable[[Tensor], Tensor] = rule
    if isinstance(rule, GramRule):
        apply = rule._of_whole(jacobian for _, jacobian in jacobians)
    for tensor, jacobian in jacobians:
        update = apply(jacobian)
        tensor.grad = update if tensor.grad is None else tensor.grad.add_(update)
        if not retain_jac:
            del tensor.jac


def _check(rule: Rule) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(
            "rule: expected a rule such as andmask_ext.AndMask(tau=0.8), but got "
            f"{type(rule).__name__}"
        )
    return rule
