"""Train one network on the spirals, by the AND-mask or in the ordinary way.

The lesson is :func:`train_epoch`: ordinary training pools the environments into one batch; the
AND-mask has an optimizer of its own, and a backward pass for each environment inside
``with optimizer.environment():``. Nothing else differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import andmask_ext as am

from ..records import RunFiles
from .data import draw_spirals
from .settings import Settings

CHECKPOINT_SECONDS = 1.0


@dataclass
class History:
    """What was seen after each epoch; equal lengths.

    Args:
        train_accuracy: share of right answers during the epoch, while the network was changing.
        test_accuracy: share of right answers on the test set after the epoch.
        loss: mean training loss during the epoch.
    """

    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)


def build_model(settings: Settings, seed: int) -> nn.Sequential:
    """Build the LeakyReLU network of the paper, with the initial weights of the authors' code.

    Args:
        settings: gives the number of inputs, hidden layers and hidden units.
        seed: decides the initial weights.

    Returns:
        A module that maps inputs to one logit each.

    Shape:
        Input [..., 2 + s], output [...].

    Example:
        >>> build_model(Settings(), seed=0)(torch.zeros(5, 34)).shape
        torch.Size([5])
    """
    generator = torch.Generator().manual_seed(seed)
    widths = [2 + settings.shortcut_dims] + [settings.width] * settings.layers + [1]
    modules: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_normal_(linear.weight, generator=generator)
        nn.init.constant_(linear.bias, 0.01)
        modules += [linear, nn.LeakyReLU()]
    modules[-1] = nn.Flatten(-2)
    return nn.Sequential(*modules)


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer: a stock one for ordinary training, else its AND-mask counterpart.

    The L2 penalty is added to the aggregated gradient, thus *after* the mask and before Adam's
    moments: weights without agreement shrink. The authors have it there too.

    Args:
        settings: gives method, optimizer, learning rate and L2 penalty.
        model: what to train.

    Returns:
        The optimizer of all parameters.
    """
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.l2}
    if settings.optimizer == "adam":
        options["betas"] = (0.9, settings.beta2)
    else:
        options["momentum"] = 0.9
    if settings.method == "mean":
        stock = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
        return stock(model.parameters(), **options)
    masked = am.optim.AndMaskAdam if settings.optimizer == "adam" else am.optim.AndMaskSGD
    return masked(model.parameters(), **options, tau=settings.tau, rescale=settings.rescale)


def batches(
    inputs: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle every environment by itself and cut it into batches; a rest is left out.

    Args:
        inputs: examples of all environments.
        labels: their labels.
        size: examples from each environment in one batch.
        generator: source of the shuffle.

    Yields:
        Inputs and labels of one step.

    Shape:
        ``inputs`` [d, n, f] and ``labels`` [d, n] give [d, size, f] and [d, size].
    """
    environments, examples = labels.shape
    order = torch.rand(environments, examples, generator=generator).argsort(dim=1)
    rows = torch.arange(environments)[:, None]
    for start in range(0, examples - size + 1, size):
        chosen = order[:, start : start + size]
        yield inputs[rows, chosen], labels[rows, chosen]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[tuple[Tensor, Tensor]],
) -> tuple[float, float]:
    """Train for one epoch.

    Args:
        model: network to train.
        optimizer: one of :mod:`andmask_ext.optim`, or a stock one for ordinary training.
        steps: inputs [d, b, f] and labels [d, b] of each step.

    Returns:
        Training accuracy and mean loss during the epoch.
    """
    losses, hits = [], []
    for inputs, labels in steps:
        optimizer.zero_grad()
        if isinstance(optimizer, am.optim.MomentOptimizer):
            for x, y in zip(inputs, labels, strict=True):
                with optimizer.environment():
                    logits = model(x)
                    loss = binary_cross_entropy_with_logits(logits, y)
                    loss.backward()
                losses.append(loss.detach())
                hits.append(((logits > 0) == (y > 0.5)).double().mean())
        else:
            logits = model(inputs.flatten(0, 1)).view_as(labels)
            loss = binary_cross_entropy_with_logits(logits, labels)
            loss.backward()
            losses.append(loss.detach())
            hits.append(((logits > 0) == (labels > 0.5)).double().mean())
        optimizer.step()
    return torch.stack(hits).mean().item(), torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Measure the share of right answers.

    Args:
        model: network that gives one logit for each example.
        inputs: examples [..., f].
        labels: zeros and ones [...].

    Returns:
        A number between 0 and 1.
    """
    right = (model(inputs) > 0) == (labels > 0.5)
    return float(right.double().mean())


def train(
    settings: Settings,
    seed: int,
    files: RunFiles,
    report: Callable[[int, History], None] = lambda epoch, history: None,
) -> dict[str, Any]:
    """Train one network from start, or from its checkpoint, to its record.

    Every random draw follows from the seed (and, for the shuffle, the epoch) alone. An epoch
    therefore needs nothing from the one before but weights and optimizer state, and a run that was
    interrupted and resumed ends with the same bits as one that was not.

    Args:
        settings: data, network, rule and schedule.
        seed: decides data, initial weights and shuffle.
        files: where checkpoint, weights and record are kept.
        report: called after each epoch with the number of finished epochs and the history.

    Returns:
        The part of the record that was measured: ``final``, ``history``, ``largest_shortcut_vote``,
        ``seconds``, ``build``.
    """
    data = draw_spirals(settings.data_config(), seed)
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)
    test = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_labels)
    model = build_model(settings, seed)
    optimizer = build_optimizer(settings, model)

    history, seconds = History(), 0.0
    if state := files.read_checkpoint():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, seconds = History(**state["history"]), state["seconds"]

    started = saved = time.perf_counter()
    while (lr := settings.learning_rate(len(history), history.train_accuracy)) is not None:
        epoch = len(history)
        for group in optimizer.param_groups:
            group["lr"] = lr
        shuffle = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        steps = batches(inputs, labels, settings.batch, shuffle)
        train_accuracy, loss = train_epoch(model, optimizer, steps)
        history.train_accuracy.append(train_accuracy)
        history.loss.append(loss)
        history.test_accuracy.append(accuracy(model, *test))
        report(epoch + 1, history)

        now = time.perf_counter()
        if now - saved >= CHECKPOINT_SECONDS:
            saved = now
            files.write_checkpoint(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": vars(history),
                    "seconds": seconds + now - started,
                }
            )

    seconds += time.perf_counter() - started
    results = {
        "final": {
            "train_accuracy": accuracy(model, inputs, labels),
            "test_accuracy": history.test_accuracy[-1],
            "loss": history.loss[-1],
        },
        "history": vars(history),
        "largest_shortcut_vote": data.largest_vote(),
        "seconds": seconds,
        "build": am.build_info(),
    }
    files.finish(results, model.state_dict())
    return results
