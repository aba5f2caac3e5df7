"""The result of an inconsistency score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._problem import Params, Problem

_LETTERS = 120  # the length of a note in the repr


@dataclass(frozen=True, eq=False, repr=False)
class Inconsistency:
    r"""An inconsistency score with the pair of environments and the point that attain it.

    Args:
        score: :math:`I^\epsilon(\theta^*)`, 0-dim float64. It may be infinite.
        environments: the pair (e, e') that attains it: the loss of e stays within ``eps``, and the
            loss of e' moves by ``score``.
        method: the method: ``quadratic``, ``diagonal`` or ``search``.
        bound: ``exact``, ``estimate``, or ``lower bound`` of the true score.
        eps: the level.
        values: the score of each ordered pair (e, e'), float64, NaN on the diagonal.
        witness: parameters that attain ``score``. None if it is infinite or estimated.
        direction: the unit vector from :math:`\theta^*` towards the witness. If the score is
            infinite: the direction in which the loss of e' grows and that of e does not change.
        standard_error: the standard error of ``score``, if it was estimated by random probes.
        notes: remarks on the result, such as coordinates that were left out.

    Shape:
        - values: :math:`(d, d)`

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import inconsistency_score
        >>> losses = [lambda x: x.square().sum(), lambda x: 3 * x.square().sum()]
        >>> result = inconsistency_score(losses, torch.zeros(2, dtype=torch.float64), eps=0.1)
        >>> result
        Inconsistency 0.3 at eps 0.1: environment 0 kept, 1 moves (quadratic, exact)
        >>> result.values
        tensor([[   nan, 0.3000],
                [0.0333,    nan]], dtype=torch.float64)

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.1.
    """

    score: Tensor
    environments: tuple[int, int]
    method: str
    bound: str
    eps: float
    values: Tensor
    witness: Params | None = None
    direction: Params | None = None
    standard_error: float | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        kept, moved = self.environments
        notes = ""
        if self.notes:  # the repr shows one note: the last is the most important
            short, more = self.notes[-1], len(self.notes) - 1
            short = short if len(short) <= _LETTERS else f"{short[:_LETTERS].rstrip()} …"
            notes = f"; {short}" + (f"; {more} more in .notes" if more else "")
        return (
            f"Inconsistency {float(self.score):.6g}{error} at eps {self.eps:g}: environment {kept} "
            f"kept, {moved} moves ({self.method}, {self.bound}{notes})"
        )


def best_pair(values: Tensor) -> tuple[int, int]:
    """Return the ordered pair with the largest value; ``values`` is NaN on the diagonal."""
    index = int(values.nan_to_num(nan=-torch.inf, posinf=torch.inf).argmax())
    return divmod(index, len(values))


def result(
    problem: Problem,
    eps: float,
    values: Tensor,
    method: str,
    bound: str,
    *,
    witness: Tensor | None = None,
    direction: Tensor | None = None,
    standard_error: float | None = None,
    notes: tuple[str, ...] = (),
) -> Inconsistency:
    """Return the result of a method, given flat vectors. ``values`` gives the pair and score."""
    pair = best_pair(values)
    point = problem.point
    return Inconsistency(
        score=values[pair].to(point.device),
        environments=pair,
        method=method,
        bound=bound,
        eps=eps,
        values=values.to(point.device),
        witness=None if witness is None else problem.layout.unflatten(witness.to(point)),
        direction=None if direction is None else problem.layout.unflatten(direction.to(point)),
        standard_error=standard_error,
        notes=problem.notes() + notes,
    )
