"""The inconsistency score of a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..._checks import check_count, check_generator, check_number
from ._diagonal import diagonal
from ._problem import Loss, Params, Problem
from ._quadratic import DENSE_LIMIT, default_rtol, quadratic
from ._result import Inconsistency
from ._search import Progress, Settings, search

METHODS = ("auto", "quadratic", "diagonal", "search")


def inconsistency_score(
    losses: Sequence[Loss],
    params: Params,
    eps: float,
    method: str = "auto",
    *,
    probes: int = 64,
    starts: int = 8,
    steps: int = 300,
    checks: int = 8,
    rtol: float | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Inconsistency:
    r"""Return how far the loss of one environment can move while another's stays within eps.

    .. math:: \mathcal{I}^\epsilon(\theta^*) = \max_{e, e'} \max_{\theta \in N^\epsilon_e}
        |L_{e'}(\theta) - L_e(\theta^*)|

    The maximum is over ordered pairs of different environments. :math:`N^\epsilon_e`, the level
    set of e, is the largest path-connected set around :math:`\theta^*` in which
    :math:`|L_e(\theta) - L_e(\theta^*)| \le \epsilon`. A low score is consistent.

    The methods are:

    - ``quadratic`` uses second-order models of the losses. At a shared minimum the score is
      :math:`\epsilon \max_{e, e'} \lambda_{\max}(H_e^{-1} H_{e'})`. The models
      include losses that differ at ``params`` and gradients that are not zero there. If a direction
      is flat for e but not for e', the score is infinite, and ``direction`` is this direction.
      Directions that are flat for both are left out. Negative curvature is an error. The losses are
      then evaluated at the extreme of each pair and at random points on the edges of the level
      sets. If they differ from the models, ``bound`` is ``estimate``. The Hessians are dense, so
      there may be up to 1000 parameters.
    - ``diagonal`` is for networks. It uses the diagonals of the Hessians, estimated by random
      probes. Coordinates whose curvature is negative or within three standard errors of zero are
      left out, and ``notes`` counts them. The score tends to be too large, as it is the largest of
      many noisy ratios.
    - ``search`` increases :math:`|L_{e'}|` along paths from ``params``. Each path is a chain of
      segments. A segment must stay in the level set of e at ``checks`` points. The score is a lower
      bound, attained at the witness. A thin wall between two of these points is missed. More
      ``checks`` find thinner walls. If the true score is infinite, the result is a large number
      that grows with ``steps``.
    - ``auto`` is ``quadratic`` if that is exact, else ``search``.

    Args:
        losses: one callable per environment, from the parameters to a 0-dim loss. See
            :func:`model_losses` for the losses of a module.
        params: the point, a Tensor or a dict of Tensors, float32 or float64. The dtype limits the
            precision of the curvature, so use float64 if possible.
        eps: the level, positive.
        method: ``auto``, ``quadratic``, ``diagonal`` or ``search``.
        probes: for ``diagonal``: number of Hessian-vector products per environment.
        starts: for ``search``: number of paths per pair. Every fourth decreases the loss instead.
        steps: for ``search``: the largest number of steps per path.
        checks: for ``search``: number of points per segment at which the kept loss is evaluated.
        rtol: a curvature below this share of the largest one counts as zero. Default: the machine
            epsilon to the power 2/3, which is 4e-11 in float64 and 2e-5 in float32.
        generator: the generator of probes and starts; the default generator if None.
        progress: for ``search``: called with the number of steps done and the largest number of
            steps. If it returns a true value, the search returns its result so far.

    Returns:
        The score, the pair of environments, the witness, and whether the score is exact, an
        estimate or a lower bound.

    Raises:
        TypeError: an argument has the wrong type, or ``params`` has the wrong dtype.
        ValueError: a number is out of range; ``eps`` is below the rounding of the losses; or a loss
            is not finite or not a function of the parameters alone. ``quadratic``: ``params`` is no
            minimum of a quadratic model, or has more than 1000 numbers. ``diagonal``: no curvature
            is significant.

    Shape:
        - losses: d callables
        - values of the result: :math:`(d, d)`

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import inconsistency_score
        >>> def loss(curvature):
        ...     return lambda x: (torch.tensor(curvature, dtype=torch.float64) * x * x).sum() / 2
        >>> losses = [loss([1.0, 4.0]), loss([2.0, 1.0])]
        >>> inconsistency_score(losses, torch.zeros(2, dtype=torch.float64), eps=0.1)
        Inconsistency 0.4 at eps 0.1: environment 1 kept, 0 moves (quadratic, exact)

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.1.
    """
    check_eps(eps)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, but got {method!r}")
    check_count("probes", probes, 2)
    for name, value in (("starts", starts), ("steps", steps), ("checks", checks)):
        check_count(name, value, 1)
    check_generator(generator)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a callable, but got {type(progress).__name__}")
    if rtol is not None:
        check_number("rtol", rtol, "a number in [0, 1)", lambda value: 0 <= value < 1)
    problem = Problem(losses, params, float(eps))
    rtol = default_rtol(problem.point.dtype) if rtol is None else rtol
    settings = Settings(starts, steps, checks, generator, progress)
    eps = float(eps)
    if method == "search":
        return search(problem, eps, settings)
    if method == "diagonal":
        return diagonal(problem, eps, rtol, probes, generator)
    if method == "quadratic":
        if problem.size > DENSE_LIMIT:
            raise ValueError(
                f"method: expected 'search', 'diagonal' or 'auto' for more than {DENSE_LIMIT} "
                f"parameters, but got 'quadratic' for {problem.size}"
            )
        return quadratic(problem, eps, rtol)
    return _auto(problem, eps, rtol, settings)


def _auto(problem: Problem, eps: float, rtol: float, settings: Settings) -> Inconsistency:
    if problem.size > DENSE_LIMIT:
        return search(problem, eps, settings)
    try:
        score = quadratic(problem, eps, rtol)
    except ValueError as error:
        why = str(error).removeprefix("params: ").removesuffix("; method='search' needs no minimum")
        return search(problem, eps, settings, (f"not quadratic: {why}",))
    if score.bound == "exact":
        return score
    return search(problem, eps, settings, (f"not quadratic: {score.notes[-1]}",))


def check_eps(eps: object) -> None:
    """Raise unless ``eps`` is a positive finite number."""
    check_number("eps", eps, "a positive finite number", lambda value: 0 < value < math.inf)
