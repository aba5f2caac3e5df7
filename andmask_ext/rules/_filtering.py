"""Rules on whole gradients: a weight for each environment, from scalar products of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_bool, check_grads, check_number
from .._dtypes import wide_dtype
from .._norms import scalar_products
from ._base import Rule

# Rounding of scalar products must not decide about a distance that equals the limit.
_TOLERANCE = 1e-9


class GramRule(Rule):
    r"""Base class of rules whose update is :math:`\sum_e w_e g_e`, one weight per environment.

    The weights depend only on the scalar products of the whole gradients.
    """

    def weights(self, gram: Tensor) -> Tensor:
        """Return the weight of each environment, float64 ``[d]``, from products ``[d, d]``."""
        raise NotImplementedError

    def __call__(self, grads: Tensor) -> Tensor:
        """Aggregate stacked gradients; see :meth:`Rule.__call__`."""
        check_grads(grads)
        return self._of_whole([grads])(grads)

    def _of_whole(self, stacks: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the rule with the weights of environments whose gradients lie in all stacks."""
        gram: Tensor | None = None
        for stack in stacks:
            products = scalar_products(stack.detach())
            gram = products if gram is None else gram + products.to(gram.device)
        weights = [] if gram is None else self.weights(gram).tolist()

        def weighted_sum(grads: Tensor) -> Tensor:
            total = grads.new_zeros(grads.shape[1:], dtype=wide_dtype(grads))
            for weight, grad in zip(weights, grads, strict=True):
                if weight:
                    total.add_(grad, alpha=weight)
            return total.to(grads.dtype)

        return weighted_sum


@dataclass(frozen=True)
class GradientAgreementFiltering(GramRule):
    r"""GAF: gradients join the average while their cosine distance to it is within a limit.

    It starts with the first environment. The others follow in their order. One joins if
    :math:`1 - \cos(a, g_e) \le` ``cos_distance_thresh``, where a is the average of those that have
    joined. The update is that average. If none joins the first one, the update is zero.

    The cosine is that of whole gradients: :func:`andmask_ext.backward` takes those of all
    parameters together. ``rule(grads)`` takes ``grads`` for the whole gradient. The order matters.
    The authors draw it anew for each step, so shuffle environments that have one.

    A gradient of zero has cosine 0. Gradients that are not finite join, so that NaN shows. The
    limit has a tolerance of 1e-9, so that rounding decides no tie. Scalar products and weights are
    float64, and sums over environments at least float32.

    If none joins, the authors take no step. An optimizer with momentum or weight decay moves by a
    gradient of zero. To leave the step out, set ``.grad`` to None if all are zero.

    Args:
        cos_distance_thresh: the largest distance, in [0, 2]. 0: the same direction. 1, the default
            of the authors' code: an angle of 90 degrees. 2: the mean. The authors recommend 0.9 to
            1.
        halve: True: one that joins counts as much as all before it together, as in the authors'
            code, so that the last one weighs one half. False: all count the same. For two
            environments there is no difference.

    Raises:
        ValueError: when called with one environment.

    Example:
        >>> import torch, andmask_ext
        >>> rule = andmask_ext.rules.GradientAgreementFiltering(cos_distance_thresh=0.5)
        >>> grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [3.0, 1.0]])
        >>> rule(grads)  # without the second one
        tensor([2.0000, 0.5000])
        >>> rule.weights(grads @ grads.T)
        tensor([0.5000, 0.0000, 0.5000], dtype=torch.float64)

    Reference:
        Chaubard et al., *Beyond gradient averaging in parallel optimization: improved robustness
        through gradient agreement filtering*, 2024, arXiv 2412.18052, and its released code.
    """

    cos_distance_thresh: float = 1.0
    halve: bool = False

    def __post_init__(self) -> None:
        limit = self.cos_distance_thresh
        check_number("cos_distance_thresh", limit, "a number in [0, 2]", lambda x: 0 <= x <= 2)
        check_bool("halve", self.halve)
        object.__setattr__(self, "cos_distance_thresh", float(limit))

    def weights(self, gram: Tensor) -> Tensor:
        """Return by how much each environment counts, from scalar products of whole gradients.

        They are 0 for those that have not joined, and for all if none joins the first one.

        Args:
            gram: ``[d, d]``, the scalar products of the gradients of all pairs of environments,
                such as the sum of the values of :attr:`andmask_ext.Agreement.gram`. Any
                floating-point dtype.

        Returns:
            Weights, float64 ``[d]``, on the device of ``gram``.

        Raises:
            TypeError: ``gram`` is not a dense floating-point tensor.
            ValueError: ``gram`` is not square, or there is only one environment.
            NotImplementedError: inside ``torch.vmap``.
        """
        check_grads(gram, "gram")
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(
                "gram: expected scalar products [environments, environments], "
                f"but got shape {tuple(gram.shape)}"
            )
        if gram.shape[0] < 2:
            raise ValueError(
                "grads: GradientAgreementFiltering expected at least 2 environments, but got 1"
            )
        if torch._C._functorch.is_batchedtensor(gram):
            raise NotImplementedError(
                "GradientAgreementFiltering: expected a call outside of torch.vmap, as its weights "
                "are numbers of Python; call it in a loop over samples"
            )
        products = gram.detach().to("cpu", torch.float64)
        squares = products.diagonal().tolist()
        total = products[0].clone()  # the products of the sum of those that joined with each
        square = squares[0]  # of that sum
        joined = [0]
        for environment in range(1, len(squares)):
            product = total[environment].item()
            if self._joins(product, square, squares[environment]):
                joined.append(environment)
                total += products[environment]
                square += 2 * product + squares[environment]
                if self.halve:  # any factor will do: the cosine does not depend on it
                    total, square = total / 2, square / 4
        weights = torch.zeros_like(total)
        if len(joined) > 1:
            count = len(joined)
            for place, environment in enumerate(joined):
                last = 0.5 ** min(count - place, count - 1)
                weights[environment] = last if self.halve else 1 / count
        return weights.to(gram.device)

    def _joins(self, product: float, square: float, other: float) -> bool:
        size = math.sqrt(max(square, 0.0)) * math.sqrt(other)  # rounding can make the first < 0
        if not math.isfinite(size):
            return True
        cosine = product / size if size else 0.0
        return not 1 - cosine > self.cos_distance_thresh + _TOLERANCE
