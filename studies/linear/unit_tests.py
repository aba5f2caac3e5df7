"""The linear unit tests: three small problems on which shortcuts are known, and their rotations.

Inputs have ``INVARIANT`` dimensions that tell the answer in every environment, and then
``SPURIOUS`` ones that tell it in a training environment and no more at test time, where they are
shuffled over examples. *Scrambled* means that a random orthogonal matrix has been applied to the
inputs: the same problem, in another basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INVARIANT = SPURIOUS = 5
EXAMPLES = (1, 2, 3)

Array = NDArray[np.float64]
Sampler = Callable[[np.random.Generator, int], tuple[Array, Array]]

_FOREGROUND = 0.01  # scale of the animal in example 2; that of the background is 1
_MARGIN = 0.1  # of the invariant dimensions in example 3


@dataclass(frozen=True)
class Split:
    """Examples of all environments."""

    inputs: Tensor  # [d, n, 10]
    answers: Tensor  # [d, n]: zeros and ones, or numbers in example 1


@dataclass(frozen=True)
class Problem:
    """A drawn unit test."""

    classification: bool
    train: Split
    validation: Split  # the same distribution again, for the choice of options
    test: Split  # with the spurious dimensions shuffled
    oracle_train: Split  # train, shuffled likewise
    oracle_validation: Split
    rotation: Tensor  # [10, 10], what the inputs were multiplied by


def draw_problem(
    example: int, environments: int, samples: int, scrambled: bool, seed: int
) -> Problem:
    """Draw a unit test.

    - Example 1, regression: causes ``x ~ N(0, s^2)``, answers ``y = x A + N(0, s^2)``, effects
      ``z = y B + N(0, 1)``; the inputs are x and z, the answer is the sum of y. Entries of A and B
      are N(0, 1/25). The scale s of the environments is .1, 1.5, 2, then 10^U(-2, 1).
    - Example 2, cows and camels: an animal (1, ..., 1) or (-1, ..., -1), a background likewise,
      each with noise N(0, 1/10); the animal is shown at a hundredth of its size. Animal and
      background match with probability p = .95, .97, .99, then U(.9, 1), and the first animal has
      the share s = .3, .5, .7, then U(.3, .7). The answer is the sign of the animal's sum.
    - Example 3, a small invariant margin: both classes are N(m, 1/100) and N(-m, 1/100), where m is
      .1 in the invariant dimensions, and N(0, 1) in the spurious ones, drawn for each environment.

    Inputs that are scrambled are those of the same seed that are not, rotated.

    Reference:
        Aubin et al., *Linear unit-tests for invariance discovery*, 2021, arXiv 2102.10867, section
        3; the scales of further environments are those of the authors' code.
    """
    if example not in EXAMPLES:
        raise ValueError(f"example: expected one of {EXAMPLES}, got {example}")
    if environments < 3:
        raise ValueError(f"environments: expected at least 3, got {environments}")
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    rng = np.random.default_rng((seed, example))
    samplers = {1: _cause_and_effect, 2: _cows_and_camels, 3: _small_margin}[example](
        rng, environments
    )
    size = INVARIANT + SPURIOUS
    turned = np.linalg.qr(np.random.default_rng((seed, 0)).standard_normal((size, size)))[0]
    rotation = turned if scrambled else np.eye(size)
    drawn = [_draw(samplers, rng, samples) for _ in ("train", "validation", "test")]
    shuffled = [(_shuffle(inputs, rng), answers) for inputs, answers in drawn]
    train, validation, _, oracle_train, oracle_validation, test = (
        Split(torch.from_numpy(inputs @ rotation).float(), torch.from_numpy(answers).float())
        for inputs, answers in (*drawn, *shuffled)
    )
    return Problem(
        example != 1,
        train,
        validation,
        test,
        oracle_train,
        oracle_validation,
        torch.from_numpy(rotation),
    )


def _draw(samplers: list[Sampler], rng: np.random.Generator, samples: int) -> tuple[Array, Array]:
    inputs, answers = zip(*(sample(rng, samples) for sample in samplers), strict=True)
    return np.stack(inputs), np.stack(answers)


def _shuffle(inputs: Array, rng: np.random.Generator) -> Array:
    """Give each example the spurious dimensions of another of its environment."""
    shuffled = inputs.copy()
    for environment in shuffled:
        environment[:, INVARIANT:] = environment[rng.permutation(len(environment)), INVARIANT:]
    return shuffled


def _cause_and_effect(rng: np.random.Generator, environments: int) -> list[Sampler]:
    scales = [0.1, 1.5, 2.0, *10 ** rng.uniform(-2, 1, environments - 3)]
    to_answer = rng.standard_normal((INVARIANT, INVARIANT)) / INVARIANT
    to_effect = rng.standard_normal((INVARIANT, SPURIOUS)) / SPURIOUS

    def sampler(scale: float) -> Sampler:
        def sample(rng: np.random.Generator, samples: int) -> tuple[Array, Array]:
            causes = scale * rng.standard_normal((samples, INVARIANT))
            answers = causes @ to_answer + scale * rng.standard_normal((samples, INVARIANT))
            effects = answers @ to_effect + rng.standard_normal((samples, SPURIOUS))
            return np.hstack((causes, effects)), answers.sum(axis=1)

        return sample

    return [sampler(scale) for scale in scales]


def _cows_and_camels(rng: np.random.Generator, environments: int) -> list[Sampler]:
    matches = [0.95, 0.97, 0.99, *rng.uniform(0.9, 1, environments - 3)]
    shares = [0.3, 0.5, 0.7, *rng.uniform(0.3, 0.7, environments - 3)]

    def sampler(match: float, share: float) -> Sampler:
        def sample(rng: np.random.Generator, samples: int) -> tuple[Array, Array]:
            animal = np.where(rng.random(samples) < share, 1.0, -1.0)
            background = np.where(rng.random(samples) < match, animal, -animal)
            noise = rng.standard_normal((samples, INVARIANT + SPURIOUS)) / 10**0.5
            shown = np.repeat(np.stack((animal, background), 1), (INVARIANT, SPURIOUS), axis=1)
            inputs = shown + noise
            inputs[:, :INVARIANT] *= _FOREGROUND
            return inputs, (inputs[:, :INVARIANT].sum(axis=1) > 0).astype(float)

        return sample

    return [sampler(*one) for one in zip(matches, shares, strict=True)]


def _small_margin(rng: np.random.Generator, environments: int) -> list[Sampler]:
    def sampler(shortcut: Array) -> Sampler:
        centre = np.hstack((np.full(INVARIANT, _MARGIN), shortcut))

        def sample(rng: np.random.Generator, samples: int) -> tuple[Array, Array]:
            answers = np.arange(samples) % 2  # as many of each class
            noise = 0.1 * rng.standard_normal((samples, INVARIANT + SPURIOUS))
            return noise + np.where(answers[:, None] == 0, centre, -centre), answers.astype(float)

        return sample

    return [sampler(rng.standard_normal(SPURIOUS)) for _ in range(environments)]
