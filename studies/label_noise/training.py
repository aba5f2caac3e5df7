"""One run: a network, a method, labels; accuracies after each epoch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..masks import Mask, passed
from ..records import History, RunFiles, Stateful
from ..study import Outcome, Report, Settings
from .data import DATA, LABELS, Images, load
from .networks import NORMS, fast_resnet

GROUPS = 4  # of the group norm where the network is narrower than the paper's
WIDE = 64  # from here on it has 32, as others use it
EVALUATION_BATCH = 500
ZEROS = ("count", "abstain")


@dataclass(frozen=True)
class NoiseSettings(Settings):
    """What decides a run of this study, but its seed.

    Args:
        data: ``"digits"`` or ``"cifar10"``.
        labels: ``"true"``, ``"random"`` or ``"noisy"``.
        noise: share of wrong labels, if they are noisy.
        tau: threshold of the AND-mask; None, and neither of the next two: plain Adam.
        fdr: false discovery rate that sets the threshold in each tensor at each step.
        significance: level of the sign test that sets it once for all.
        zeros: whether an exact zero counts as an environment (``count``) or not (``abstain``).
        smoothing: share of a label that is spread over all classes.
        rescale: whether the mask makes up for the coordinates that it drops.
        norm: ``"group"`` or ``"batch"``: see :func:`.networks.fast_resnet`.
        width: channels after the first convolution.
        size: side of the images.
        examples: number of training images; None: all.
        batch: examples, and so environments, in a step; the last, smaller batch is left out.
        lr: learning rate.
        epochs: how often all examples are seen.
        folder: where CIFAR-10 lies; it does not decide anything, as the files are checked.
    """

    data: str = "digits"
    labels: str = "true"
    noise: float = 0.25
    tau: float | None = None
    fdr: float | None = None
    significance: float | None = None
    zeros: str = "count"
    smoothing: float = 0.0
    rescale: bool = False
    norm: str = "group"
    width: int = 8
    size: int = 16
    examples: int | None = None
    batch: int = 80
    lr: float = 5e-4
    epochs: int = 40
    folder: str = ""

    def __post_init__(self) -> None:
        for name, known in (("data", DATA), ("labels", LABELS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if len(self.threshold) > 1:
            raise ValueError(f"tau, fdr, significance: expected one of them, got {self.threshold}")
        for name in ("fdr", "significance"):
            if (level := getattr(self, name)) is not None and not 0 < level < 1:
                raise ValueError(f"{name}: expected a number in (0, 1), got {level}")
        if self.zeros not in ZEROS:
            raise ValueError(f"zeros: expected one of {', '.join(ZEROS)}, got {self.zeros!r}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a share in [0, 1), got {self.smoothing}")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"tau: expected a number in [0, 1], got {self.tau}")
        if not 0 < self.noise < 1:
            raise ValueError(f"noise: expected a share between 0 and 1, got {self.noise}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a finite number > 0, got {self.lr}")
        smallest = {"epochs": 1, "batch": 1, "width": 1, "examples": self.batch, "size": 8}
        if self.norm == "batch":
            smallest["size"] = 16  # its statistics need two positions after three poolings
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.data == "cifar10" and not self.folder:
            raise ValueError("data-dir: expected a folder that holds CIFAR-10, got none")

    def identity(self) -> dict[str, Any]:
        """Return what decides the outcome, as JSON can hold it."""
        unused = {"folder"}
        if self.labels != "noisy":
            unused.add("noise")
        if not self.threshold:
            unused.add("rescale")
        # What older records had no name for is left out where it is what they had.
        unused |= {
            name
            for name in ("fdr", "significance", "zeros", "smoothing")
            if getattr(self, name) == getattr(NoiseSettings, name)
        }
        return {name: value for name, value in super().identity().items() if name not in unused}

    @property
    def threshold(self) -> dict[str, Any]:
        """What sets the threshold, as arguments of a rule; empty for plain Adam."""
        return {
            name: level
            for name in ("tau", "fdr", "significance")
            if (level := getattr(self, name)) is not None
        }

    @property
    def method(self) -> str:
        """What people call it."""
        smoothing = f" smoothing={self.smoothing:g}" if self.smoothing else ""
        for name, level in self.threshold.items():
            abstain = " zeros abstain" if self.zeros == "abstain" else ""
            return f"AND-mask {name}={level:g}{abstain}{smoothing}"
        return f"Adam{smoothing}"

    def load(self, seed: int) -> Images:
        """Load the images and their labels."""
        images = load(
            self.data, self.labels, self.noise, self.size, self.examples, self.folder, seed
        )
        if self.batch > len(images.train):
            raise ValueError(
                f"batch: expected at most the {len(images.train)} training images, got {self.batch}"
            )
        return images

    def network(self, images: Images) -> nn.Module:
        """Build the network for these images, with weights of torch's generator."""
        groups = 32 if self.width >= WIDE else GROUPS
        return fast_resnet(images.train.shape[1], images.classes, self.width, self.norm, groups)


class Trainer:
    """A model, its optimizer, and how they take a step."""

    def __init__(self, model: nn.Module, settings: NoiseSettings, mask: Mask | None = None) -> None:
        self.model = model
        self.mask = mask  # takes the place of the settings' threshold
        self.optimizer: torch.optim.Optimizer
        self._agreement: am.Agreement | None = None
        self._settings = settings
        if mask is not None or not settings.threshold:
            self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
            if mask is not None:
                self._agreement = am.Agreement(model, am.AndMask(0.0), keep_moments=True)
        else:
            zeros: dict[str, Any] = {} if settings.zeros == "count" else {"zeros": settings.zeros}
            rule = am.AndMask(rescale=settings.rescale, **settings.threshold, **zeros)
            optimizer = am.optim.AndMaskAdam(model.parameters(), lr=settings.lr, rule=rule)
            self.optimizer, self._agreement = optimizer, am.Agreement(model, optimizer)

    def step(self, images: Tensor, labels: Tensor, measure: bool = False) -> tuple[Tensor, float]:
        """Take a step on a batch; every example is an environment.

        Returns the loss, and the share of coordinates that the mask keeps: 1 without a mask, NaN
        if it is not measured.
        """
        context: Callable[[], contextlib.AbstractContextManager[None]]
        context = self._agreement or contextlib.nullcontext
        with context():
            smoothing = self._settings.smoothing
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=smoothing)
            loss.backward()
        kept = math.nan
        if self.mask is not None:
            assert self._agreement is not None
            params, moments = [*self.model.parameters()], self._agreement.moments[0]
            kept, _ = self.mask.apply(params, moments, self._settings.rescale)
        elif measure:
            kept = self._kept(self._agreement.moments[0]) if self._agreement else 1.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), kept

    def _kept(self, moments: am.Moments) -> float:
        """Return the share of coordinates that the mask keeps."""
        if self._settings.tau is not None and self._settings.zeros == "count":
            return float(am.metrics.kept_fraction(moments, self._settings.tau))
        return passed(self.optimizer.param_groups[0]["rule"], moments)[0]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the predicted class of each image, in evaluation mode."""
    model.eval()
    classes = [model(part).argmax(1) for part in images.split(EVALUATION_BATCH)]
    model.train()
    return torch.cat(classes)


def accuracies(model: nn.Module, images: Images) -> dict[str, float]:
    """Measure a model; NaN where there are no such images.

    ``train``: share of training images predicted as labelled; ``mislabeled``: the same of those
    with a wrong label; ``recovered``: share of these predicted as what they truly are; ``test``:
    share of test images that are right.
    """
    predicted = predict(model, images.train)
    wrong = images.mislabeled

    def share(right: Tensor) -> float:
        return right.double().mean().item()

    return {
        "train": share(predicted == images.given),
        "mislabeled": share((predicted == images.given)[wrong]),
        "recovered": share((predicted == images.truth)[wrong]),
        "test": share(predict(model, images.test) == images.test_truth),
    }


def train(
    settings: NoiseSettings,
    seed: int,
    files: RunFiles,
    report: Report,
    mask: Mask | None = None,
) -> Outcome:
    """Do one run: see :meth:`studies.study.Study.execute`; ``mask`` replaces the threshold."""
    images = settings.load(seed)
    torch.manual_seed(seed)
    trainer = Trainer(settings.network(images), settings, mask)
    history: History = {
        name: [] for name in ("train", "mislabeled", "recovered", "test", "loss", "kept")
    }
    parts: dict[str, Stateful] = {"model": trainer.model, "optimizer": trainer.optimizer}
    if mask is not None:
        parts["mask"] = mask
    for epoch in files.epochs(settings.epochs, seed, history, parts):
        losses: list[Tensor] = []
        kept = math.nan
        batches = [
            batch
            for batch in torch.randperm(len(images.train)).split(settings.batch)
            if len(batch) == settings.batch
        ]
        for number, batch in enumerate(batches, start=1):
            loss, kept = trainer.step(
                images.train[batch], images.given[batch], measure=number == len(batches)
            )
            losses.append(loss)
        now = accuracies(trainer.model, images)
        for name, value in (*now.items(), ("loss", torch.stack(losses).mean().item())):
            history[name].append(value)
        history["kept"].append(kept)
        report(
            epoch + 1,
            settings.epochs,
            f"train {now['train']:.1%}  mislabeled {now['mislabeled']:.1%}  test {now['test']:.1%}",
        )
    final = {name: history[name][-1] for name in ("train", "mislabeled", "test")}
    return Outcome({"final": final, "history": history})
