"""Cloning: settings, optimizers, one level a step, what is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import andmask_ext as am

from ..records import History, RunFiles, Stateful
from ..study import Report, Settings, Weights
from .data import States, load
from .game.world import ACTIONS
from .network import PolicyNetwork

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class CoinRunSettings(Settings):
    """What decides a run.

    Args:
        role: ``trial`` of the search, measured on validation levels; ``final``, measured on test
            levels, too, and in the game; ``reference``, a policy that learns nothing.
        method: ``adam``, ``temporal``, or a policy of :data:`.study.REFERENCES`.
        data: which data, by name.
        epochs: a step on each training level, in a new order each time.
        batch: states of a step.
        width: of the network.
        lr, beta1, beta2: of Adam.
        weight_decay: factor of the decay.
        decoupled: shrink the weights instead of a penalty.
        beta3, tau, bias_correction: of the temporal AND-mask.
        measure_every: epochs between measurements.
        limit: decisions after which a level that goes on counts as lost.
        file: where the data lie.
        command: that of the game's side.
    """

    role: str
    method: str
    data: str
    epochs: int = 0
    batch: int = 32
    width: int = 16
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    decoupled: bool = True
    beta3: float = 0.0
    tau: float = 0.0
    bias_correction: bool = True
    measure_every: int = 5
    limit: int = 100
    file: Path = field(default=Path(), kw_only=True)
    command: tuple[str, ...] = field(default=(), kw_only=True)

    def identity(self) -> dict[str, Any]:
        """Return all but paths."""
        return {key: val for key, val in asdict(self).items() if key not in ("file", "command")}


def build_optimizer(settings: CoinRunSettings, model: PolicyNetwork) -> torch.optim.Optimizer:
    """Return a run's optimizer."""
    if settings.method == "adam":
        kind = torch.optim.AdamW if settings.decoupled else torch.optim.Adam
        return kind(
            model.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
    return am.optim.TemporalAndMaskAdam(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2, settings.beta3),
        weight_decay=settings.weight_decay,
        tau=settings.tau,
        weight_decay_mode="decoupled" if settings.decoupled else "after_mask",
        bias_correction=settings.bias_correction,
    )


def batches(states: States, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one batch of each level, levels in random order: the steps of an epoch."""
    numbers = states.level.unique()
    for level in numbers[torch.randperm(len(numbers))]:
        rows = (states.level == level).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows))[:size]]
        yield states.frames[rows], states.targets[rows]


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return KL(π* ‖ π̂), the mean over states."""
    return F.kl_div(logits.log_softmax(1), targets, reduction="batchmean")


@torch.inference_mode()
def measure(model: torch.nn.Module, states: States) -> dict[str, float]:
    """Measure how near a policy is to the expert's.

    ``accuracy`` is the share of states where the most likely action is one of those that the
    expert likes best.
    """
    frames = states.frames.split(EVALUATION_BATCH)
    logits = torch.cat([model(part) for part in frames])
    choice = states.targets.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    right = choice >= states.targets.max(1).values - 1e-6
    return {
        "loss": divergence(logits, states.targets).item(),
        "accuracy": right.double().mean().item(),
    }


def some(states: States, count: int) -> States:
    """Return states evenly taken from all, about ``count`` of them."""
    rows = torch.arange(0, len(states.frames), max(1, len(states.frames) // count))
    return States(
        states.frames[rows],
        states.targets[rows],
        states.level[rows],
        states.levels,
        states.plans,
        states.rewards,
        states.durations,
    )


def train(
    settings: CoinRunSettings, seed: int, files: RunFiles, report: Report
) -> tuple[PolicyNetwork, History]:
    """Clone the expert."""
    splits = ("validation",) if settings.role == "trial" else ("validation", "test")
    states = load(settings.file, "train")
    measured = {split: load(settings.file, split) for split in splits}
    measured["train"] = some(states, len(measured["validation"].frames))
    torch.manual_seed(seed)
    model = PolicyNetwork(settings.width, len(ACTIONS))
    optimizer = build_optimizer(settings, model)
    history: History = {"epoch": []}
    for split in measured:
        history[f"{split}_loss"], history[f"{split}_accuracy"] = [], []
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer}
    for epoch in files.epochs(settings.epochs, seed, history, parts):
        for frames, targets in batches(states, settings.batch):
            optimizer.zero_grad()
            divergence(model(frames), targets).backward()
            optimizer.step()
        if (epoch + 1) % settings.measure_every == 0 or epoch + 1 == settings.epochs:
            history["epoch"].append(epoch + 1)
            for split, part in measured.items():
                for name, value in measure(model, part).items():
                    history[f"{split}_{name}"].append(value)
        losses = [history[f"{split}_loss"][-1:] for split in ("train", splits[-1])]
        words = " / ".join(f"{one[0]:.3f}" for one in losses if one)
        report(epoch + 1, settings.epochs, f"loss {words}" if words else "")
    return model, history


def at_its_best(history: History) -> dict[str, float]:
    """Return what was measured where the loss on validation levels was lowest."""
    losses = [math.inf if math.isnan(loss) else loss for loss in history["validation_loss"]]
    place = losses.index(min(losses))
    return {
        "best_epoch": history["epoch"][place],
        "best_test_loss": history["test_loss"][place],
    }


def load_model(settings: CoinRunSettings, weights: Weights) -> PolicyNetwork:
    """Return the network of a run that is done."""
    model = PolicyNetwork(settings.width, len(ACTIONS))
    model.load_state_dict(dict(weights))
    return model
