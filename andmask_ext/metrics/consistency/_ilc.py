"""Invariant learning consistency: the inconsistency score that an algorithm ends up with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..._checks import check_count, check_number
from ._problem import Loss, Params
from ._result import Inconsistency
from ._score import check_eps, inconsistency_score
from ._search import Progress


@dataclass(frozen=True, eq=False, repr=False)
class LearningConsistency:
    """Invariant learning consistency with its confidence interval, and every sample.

    Args:
        mean: minus the mean score; the higher, the more consistent. -inf if any score is infinite.
        standard_error: of ``mean``; NaN with a single sample or an infinite score.
        interval: confidence interval for the expectation, by Student's t. Scores are skewed: with
            few samples it is rough.
        level: of the interval.
        infinite: how many scores are infinite.
        bound: what ``mean`` is of the samples' true mean: ``exact``, ``estimate``, or ``upper
            bound`` where some scores are lower bounds and none is a mere estimate.
        results: the score of each sample, in order.
        eps: the level of the score.
        seed: of the first sample; sample k has ``seed + k``.

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import invariant_learning_consistency
        >>> losses = [lambda x: x.square().sum(), lambda x: 3 * x.square().sum()]
        >>> invariant_learning_consistency(
        ...     train=torch.zeros_like, init=lambda g: torch.randn(2, generator=g), losses=losses,
        ...     eps=0.1, samples=2,
        ... )
        LearningConsistency -0.3 ± 0 (95 % interval [-0.3, -0.3], 2 samples, 0 infinite, exact)
    """

    mean: float
    standard_error: float
    interval: tuple[float, float]
    level: float
    infinite: int
    bound: str
    results: tuple[Inconsistency, ...]
    eps: float
    seed: int

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"LearningConsistency {self.mean:.6g} ± {self.standard_error:.2g} "
            f"({100 * self.level:g} % interval [{low:.6g}, {high:.6g}], {len(self.results)} "
            f"samples, {self.infinite} infinite, {self.bound})"
        )


def invariant_learning_consistency(
    train: Callable[[Params], Params],
    init: Callable[[torch.Generator], Params],
    losses: Sequence[Loss],
    eps: float,
    samples: int = 16,
    *,
    seed: int = 0,
    level: float = 0.95,
    resume: LearningConsistency | None = None,
    progress: Progress | None = None,
    **score: Any,
) -> LearningConsistency:
    r"""Measure how consistent the solutions of a training algorithm are.

    .. math:: \mathrm{ILC}(\mathcal{A}, p) =
        -\mathbb{E}_{\theta_0 \sim p}\left[\mathcal{I}^\epsilon(\mathcal{A}_\infty(\theta_0))\right]

    Sample k starts from ``init`` with a generator seeded ``seed + k``, and its score draws from
    one of the same seed: a sample's result does not depend on how many there are, and a
    run that was ended early goes on with ``resume``. What ``train`` draws is its own affair.

    One infinite score makes the mean infinite. That is the rule, at every solution, where an
    environment's Hessian has flat directions that another's has not, as with fewer examples in an
    environment than parameters; see :func:`leave_one_environment_out` for such cases.

    Args:
        train: the algorithm: from initial to final parameters. It should have converged.
        init: draws initial parameters from a generator.
        losses: one callable per environment, from the parameters to a 0-dim loss.
        eps: the level, positive.
        samples: how many initial points.
        seed: of the first one.
        level: of the confidence interval, in (0, 1).
        resume: an earlier result with this eps and seed, whose samples are not done again.
        progress: called with samples done and their number before each; a true return value ends
            the run, and the samples done are the result.
        **score: passed to :func:`inconsistency_score`: ``method``, ``starts`` and so on.

    Returns:
        Mean, standard error, interval, and the result of each sample.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or ``resume`` has another eps or seed.
        RuntimeError: ``progress`` ended the run before the first sample.
        ImportError: scipy is not installed.

    Example:
        >>> import torch
        >>> from andmask_ext.metrics import invariant_learning_consistency
        >>> losses = [lambda x: (x[0] * x[1] - 1).square(), lambda x: (x[0] - x[1]).square()]
        >>> ilc = invariant_learning_consistency(
        ...     train=lambda start: torch.ones(2, dtype=torch.float64),
        ...     init=lambda generator: torch.randn(2, generator=generator),
        ...     losses=losses, eps=0.01, samples=1, method="quadratic",
        ... )
        >>> ilc.mean, ilc.infinite
        (-inf, 1)

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.1.
    """
    check_eps(eps)
    check_count("samples", samples, 1)
    check_count("seed", seed, 0)
    check_number("level", level, "a number in (0, 1)", lambda value: 0 < value < 1)
    for name, value in (("train", train), ("init", init)):
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, but got {type(value).__name__}")
    for name in ("generator", "progress"):
        if name in score:
            raise TypeError(f"{name}: not passed on to inconsistency_score here, but got one")
    quantile = _student_quantile()  # complains before the samples are taken
    results = _resumed(resume, eps, seed)
    for k in range(len(results), samples):
        if progress is not None and progress(k, samples):
            break
        start = init(torch.Generator("cpu").manual_seed(seed + k))
        solution = train(start)
        generator = torch.Generator("cpu").manual_seed(seed + k)
        results.append(inconsistency_score(losses, solution, eps, generator=generator, **score))
    if not results:
        raise RuntimeError("progress: ended the run before its first sample")
    return _summary(results, float(eps), seed, level, quantile)


def _resumed(resume: LearningConsistency | None, eps: float, seed: int) -> list[Inconsistency]:
    if resume is None:
        return []
    if not isinstance(resume, LearningConsistency):
        raise TypeError(
            f"resume: expected a LearningConsistency or None, but got {type(resume).__name__}"
        )
    if (resume.eps, resume.seed) != (eps, seed):
        raise ValueError(
            f"resume: expected a result with eps {eps} and seed {seed}, "
            f"but got one with eps {resume.eps} and seed {resume.seed}"
        )
    return list(resume.results)


def _student_quantile() -> Callable[[int, float], float]:
    """Return the quantile function of Student's t: of degrees of freedom and a probability."""
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError(
            "invariant_learning_consistency needs scipy: pip install 'andmask_ext[metrics]'"
        ) from error
    return lambda freedom, probability: float(stdtrit(freedom, probability))


def _summary(
    results: list[Inconsistency],
    eps: float,
    seed: int,
    level: float,
    quantile: Callable[[int, float], float],
) -> LearningConsistency:
    scores = [float(result.score) for result in results]
    count, infinite = len(scores), sum(math.isinf(score) for score in scores)
    mean, error = -math.fsum(scores) / count, math.nan
    interval = (-math.inf, math.inf)
    if infinite:
        interval = (-math.inf, -math.inf)
    elif count > 1:
        squares = math.fsum((score + mean) ** 2 for score in scores)
        error = math.sqrt(squares / (count - 1) / count)
        reach = quantile(count - 1, 0.5 + level / 2) * error
        interval = (mean - reach, mean + reach)
    bounds = {result.bound for result in results}
    bound = "exact"
    if "estimate" in bounds:
        bound = "estimate"
    elif "lower bound" in bounds:
        bound = "upper bound"
    return LearningConsistency(
        mean, error, interval, level, infinite, bound, tuple(results), eps, seed
    )
