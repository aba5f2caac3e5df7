"""Two interlocked spirals that share a mechanism, and shortcuts that do not last.

Every example has two *mechanism* dimensions, in which the classes are two arms of one spiral, and
a number of *shortcut* dimensions. Inside one training environment the shortcut is a fixed vector,
shown with a plus sign for one class and a minus sign for the other: it separates the classes
perfectly, by a plane, but along a direction that no other environment shares. At test time the
shortcut is drawn afresh for every example and says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]

RADIUS_MIN, RADIUS_MAX, RADIUS_NOISE = 0.08, 1.0, 0.02


@dataclass(frozen=True)
class SpiralsConfig:
    """What is drawn: sizes, and the two details in which the paper and its code differ.

    Args:
        environments: number of training environments, ``d``.
        examples: training examples in each environment, ``n``.
        test_examples: size of the test set.
        shortcut_dims: number of shortcut dimensions, ``s``.
        shortcut_variance: variance of each entry of a shortcut vector. The paper writes
            ``N(0, .1)``, read here as a variance of .1 (standard deviation .316); the authors'
            code draws from ``N(0, 1)``.
        revolutions: turns that a spiral makes between its centre and its rim; need not be whole.
        standardize: divide both mechanism dimensions by their standard deviation in the environment
            (the authors' code does, the paper does not say so).

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 4.1.
    """

    environments: int = 32
    examples: int = 1280
    test_examples: int = 2000
    shortcut_dims: int = 32
    shortcut_variance: float = 0.1
    revolutions: float = 1.0
    standardize: bool = False

    def __post_init__(self) -> None:
        for name in ("environments", "examples", "test_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.shortcut_dims < 0:
            raise ValueError(f"shortcut_dims: expected at least 0, got {self.shortcut_dims}")
        if not 0 <= self.shortcut_variance < float("inf"):
            raise ValueError(
                f"shortcut_variance: expected a finite number >= 0, got {self.shortcut_variance}"
            )
        if not 0 < self.revolutions < float("inf"):
            raise ValueError(f"revolutions: expected a finite number > 0, got {self.revolutions}")


@dataclass(frozen=True)
class Spirals:
    """A drawn data set; columns 0 and 1 of the inputs are the mechanism, the rest the shortcut."""

    train_inputs: Array  # [d, n, 2 + s]
    train_labels: Array  # [d, n], zeros and ones
    test_inputs: Array  # [m, 2 + s]
    test_labels: Array
    validation_inputs: Array  # drawn as the test set is, from another random stream
    validation_labels: Array
    shortcuts: Array  # [d, s], what each environment adds for class 1 and subtracts for class 0

    def largest_vote(self) -> int:
        """Count by how much the environments agree, at best, on the sign of a shortcut dimension.

        Shortcuts are drawn at random, so now and then all or most environments happen to share the
        sign of a dimension. There the shortcut *is* invariant, and no vote on signs can tell it
        from a mechanism. Among 16 environments and 16 dimensions this befalls one seed in 2048.
        """
        return int(np.abs(np.sign(self.shortcuts).sum(axis=0)).max(initial=0))


def draw_mechanism(
    rng: np.random.Generator, count: int, revolutions: float, standardize: bool = False
) -> tuple[Array, Array]:
    """Draw points on the two spiral arms.

    The angle follows from the radius before noise is added to it, so noise moves a point along its
    ray, never around the centre.
    """
    radius = rng.uniform(RADIUS_MIN, RADIUS_MAX, count)
    labels = rng.integers(0, 2, count)
    angle = 2 * np.pi * revolutions * radius + np.pi * labels
    radius = radius + rng.uniform(-RADIUS_NOISE, RADIUS_NOISE, count)
    points = radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    if standardize:
        points = points / points.std(axis=0)
    return points.astype(np.float32), labels.astype(np.float32)


def draw_spirals(config: SpiralsConfig, seed: int) -> Spirals:
    """Draw a whole data set.

    Every environment has a random stream of its own, so environment 3 is the same data whether it
    is one of 4 or one of 400, and the test set does not depend on the number of environments. A
    validation set, for those who choose settings, is drawn like the test set.

    Reference:
        Parascandolo et al., ICLR 2021, section 4.1.
    """
    if seed < 0:
        raise ValueError(f"seed: expected a number >= 0, got {seed}")
    scale = config.shortcut_variance**0.5
    inputs, labels, shortcuts = [], [], []
    for environment in range(config.environments):
        rng = _stream(seed, 1 + environment)
        shortcut = scale * rng.standard_normal(config.shortcut_dims)
        points, classes = draw_mechanism(
            rng, config.examples, config.revolutions, config.standardize
        )
        shown = np.outer(2 * classes - 1, shortcut)
        inputs.append(np.hstack((points, shown)).astype(np.float32))
        labels.append(classes)
        shortcuts.append(shortcut)
    return Spirals(
        np.stack(inputs),
        np.stack(labels),
        *_without_shortcut(config, _stream(seed, 0)),
        *_without_shortcut(config, _stream(seed, 0, 1)),
        shortcuts=np.stack(shortcuts).astype(np.float32),
    )


def _without_shortcut(config: SpiralsConfig, rng: np.random.Generator) -> tuple[Array, Array]:
    points, labels = draw_mechanism(
        rng, config.test_examples, config.revolutions, config.standardize
    )
    uninformative = config.shortcut_variance**0.5 * rng.standard_normal(
        (config.test_examples, config.shortcut_dims)
    )
    return np.hstack((points, uninformative)).astype(np.float32), labels


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))
