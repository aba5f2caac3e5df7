"""Invariant learning consistency: minus the expected inconsistency score of an algorithm."""

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
        mean: minus the mean score. Higher is more consistent. It is -inf if any score is infinite.
        standard_error: standard error of ``mean``. NaN with one sample or an infinite score.
        interval: confidence interval of the expectation, by Student's t. It is rough for few
            samples, as scores are skewed.
        level: confidence level of the interval.
        infinite: number of infinite scores.
        bound: how ``mean`` relates to the true mean of the samples: ``exact``, ``estimate``, or
            ``upper bound`` if some scores are lower bounds and none is an estimate.
        results: the score of each sample, in order.
        eps: the level of the score.
        seed: seed of the first sample. Sample k has ``seed + k``.

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

    Sample k takes its initial parameters from ``init`` with a generator of seed ``seed + k``. Its
    score uses another generator of the same seed. So the result of a sample does not depend on the
    number of samples, and ``resume`` can continue an earlier result. The function does not seed the
    random numbers of ``train``.

    One infinite score makes the mean infinite. If the Hessian of an environment has flat directions
    that another's does not have, every solution has an infinite score. An example is an environment
    with fewer examples than parameters. Use :func:`leave_one_environment_out` in such cases.

    Args:
        train: the algorithm, a function from initial to final parameters. It should converge.
        init: a function from a generator to initial parameters.
        losses: one callable per environment, from the parameters to a 0-dim loss.
        eps: the level, positive.
        samples: number of initial points.
        seed: seed of the first sample.
        level: level of the confidence interval, in (0, 1).
        resume: an earlier result with the same eps and seed. Its samples are reused.
        progress: called before each sample with the number of samples done and the number of all.
            If it returns a true value, the function returns the samples done.
        **score: arguments of :func:`inconsistency_score`, such as ``method`` and ``starts``.

    Returns:
        The mean, its standard error and interval, and the result of each sample.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or ``resume`` has a different eps or seed.
        RuntimeError: ``progress`` returned a true value before the first sample.
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
    quantile = _student_quantile()  # raises before the first sample
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
    """Return the quantile function of Student's t. It takes degrees of freedom and probability."""
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError(
            "invariant_learning_consistency needs scipy: `pip install scipy`"
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
