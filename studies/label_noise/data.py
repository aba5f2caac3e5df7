"""Images, and the labels that are given for them: true, random, or wrong for a share of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATA = ("digits", "cifar10")
LABELS = ("true", "random", "noisy")
DIGITS = 1797  # scikit-learn's
TEST_DIGITS = 357  # leaves 1440 to train on: 18 batches of 80


@dataclass(frozen=True)
class Images:
    """Images to train and to test on, standardised by the training images."""

    train: Tensor
    given: Tensor  # the labels to train with
    truth: Tensor
    test: Tensor
    test_truth: Tensor

    @property
    def mislabeled(self) -> Tensor:
        """Which training images have another label than their true one."""
        return self.given != self.truth

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.truth.max()) + 1


def load(
    data: str, labels: str, noise: float, size: int, examples: int | None, folder: str, seed: int
) -> Images:
    """Load images, scale them to sides of ``size``, and give them labels.

    ``"digits"`` are scikit-learn's 1797 images of 8 x 8, of which ``seed`` sets 357 aside for the
    test; ``"cifar10"`` comes from a local ``folder``. Labels are ``"true"``, ``"random"``: drawn
    anew for every training image, so that one in ten is right by chance, or ``"noisy"``: as
    :func:`mislabel` does it. ``examples`` takes so many of the training images, the first ones.
    """
    images, truth, test, test_truth = digits(seed) if data == "digits" else cifar10(folder)
    if examples is not None:
        if examples > len(images):
            raise ValueError(
                f"examples: expected at most the {len(images)} training images, got {examples}"
            )
        images, truth = images[:examples], truth[:examples]
    # A stream of its own: training shuffles with generators that are seeded by ``seed`` and epoch.
    stream = np.random.SeedSequence((seed, 1)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(stream))
    classes = int(truth.max()) + 1
    given = truth
    if labels == "random":
        given = torch.randint(classes, truth.shape, generator=generator)
    elif labels == "noisy":
        given = mislabel(truth, noise, classes, generator)
    train, test = _scaled(images, size), _scaled(test, size)
    mean = train.mean((0, 2, 3), keepdim=True)
    deviation = train.std((0, 2, 3), keepdim=True)
    return Images((train - mean) / deviation, given, truth, (test - mean) / deviation, test_truth)


def mislabel(truth: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Give a share of the examples a wrong label, drawn evenly from the other classes."""
    chosen = torch.randperm(len(truth), generator=generator)[: round(share * len(truth))]
    given = truth.clone()
    shift = torch.randint(1, classes, chosen.shape, generator=generator)
    given[chosen] = (given[chosen] + shift) % classes
    return given


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [n, 1, 8, 8] in [0, 1] and labels, to train on and to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(loaded.target).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_DIGITS, stratify=loaded.target, random_state=seed
    )
    return images[train], labels[train], images[test], labels[test]


@lru_cache(maxsize=1)
def cifar10(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return CIFAR-10, likewise, from a folder that holds ``cifar-10-batches-py``."""
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # the latter: made for another torch
        raise ValueError(
            "data: expected torchvision to read cifar10 with (one that belongs to torch "
            f"{torch.__version__}), got {type(error).__name__}: {error}"
        ) from error
    parts: list[Tensor] = []
    for train in (True, False):
        try:
            part = CIFAR10(folder, train=train, download=False)
        except RuntimeError as error:
            raise ValueError(
                f"data-dir: expected a folder that holds {CIFAR10.base_folder}, got "
                f"{Path(folder)}: {error}"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255
        parts += [images, torch.tensor(part.targets)]
    return parts[0], parts[1], parts[2], parts[3]


def _scaled(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
