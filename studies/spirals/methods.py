"""How each method turns the examples of a step into gradients: one function each.

A method leaves gradients where ``optimizer.step()`` finds them. It is given the examples of every
environment, and may pool them. Networks are in :mod:`.networks`; what a method does not say here
(data, schedule, optimizer, initial weights) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import andmask_ext as am

from .networks import Adversaries
from .settings import Settings

ROWS = 2048  # examples of a backward pass over several environments; more leave the cache


@dataclass
class Learner:
    """What a step works on."""

    settings: Settings
    model: nn.Module
    optimizer: torch.optim.Optimizer  # one of andmask_ext.optim for rules on moments
    epoch: int = 0
    agreement: am.Agreement | None = None  # of the model and the optimizer


# Inputs [d, b, f] and labels [d, b] of a step -> logits [d, b] and mean loss, for the records.
Step: TypeAlias = Callable[[Learner, Tensor, Tensor], tuple[Tensor, Tensor]]

RULES: dict[str, Callable[[Settings], am.rules.Rule]] = {
    "and-mask": lambda s: am.AndMask(rescale=s.rescale, **s.threshold),
    "geometric-mean": lambda s: am.rules.GeometricMean(rescale=s.rescale, **s.threshold),
    "sand-mask": lambda s: am.rules.SandMask(k=s.sharpness, rescale=s.rescale, **s.threshold),
    "masked-average": lambda s: am.rules.MaskedAverage(**s.threshold),
    "median": lambda s: am.rules.Median(),
    "sign-dropout": lambda s: am.rules.SignDropout(),
    "agreement-filtering": lambda s: am.rules.GradientAgreementFiltering(s.cos_distance, s.halve),
}


def pooled(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Train in the plain way: one batch; regularisers are in the network or the optimizer."""
    logits = learner.model(inputs.flatten(0, 1)).view_as(labels)
    loss = binary_cross_entropy_with_logits(logits, labels)
    loss.backward()
    return logits, loss


def absolute(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add the sum of absolute weights to the loss (L1)."""
    size = torch.stack([param.abs().sum() for param in learner.model.parameters()]).sum()
    (learner.settings.l1 * size).backward()
    return pooled(learner, inputs, labels)


def by_moments(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a rule on moments: a backward pass for each environment, in its context."""
    if learner.agreement is not None:
        return at_once(learner.agreement, learner.model, inputs, labels)
    assert isinstance(learner.optimizer, am.optim.EnvironmentOptimizer)
    logits, losses = [], []
    for x, y in zip(inputs, labels, strict=True):
        with learner.optimizer.environment():
            answer = learner.model(x)
            loss = binary_cross_entropy_with_logits(answer, y)
            loss.backward()
        logits.append(answer.detach())
        losses.append(loss.detach())
    return torch.stack(logits), torch.stack(losses).mean()


def at_once(
    agreement: am.Agreement, model: nn.Module, inputs: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a rule on moments: one backward pass for as many environments as fit the cache."""
    logits, losses = [], []
    most = max(1, ROWS // labels.shape[1])
    environments = max(n for n in range(1, len(labels) + 1) if len(labels) % n == 0 and n <= most)
    with agreement(environments):
        for x, y in zip(inputs.split(environments), labels.split(environments), strict=True):
            answer = model(x.flatten(0, 1)).view_as(y)
            loss = binary_cross_entropy_with_logits(answer, y)
            loss.backward()
            logits.append(answer.detach())
            losses.append(loss.detach())
    return torch.cat(logits), torch.stack(losses).mean()


def by_columns(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a rule that needs all gradients at once: ``am.backward`` stacks them.

    The gradients weigh 1 / d in :class:`andmask_ext.rules.SignDropout`, which sums, not averages.
    """
    rule = RULES[learner.settings.method](learner.settings)
    weight = 1 / len(labels) if isinstance(rule, am.rules.SignDropout) else 1.0
    logits, losses = [], []

    def each() -> Iterator[Tensor]:
        for x, y in zip(inputs, labels, strict=True):
            answer = learner.model(x)
            loss = binary_cross_entropy_with_logits(answer, y)
            logits.append(answer.detach())
            losses.append(loss.detach())
            yield loss

    params = learner.model.parameters()
    am.backward(each(), rule, params, weights=[weight] * len(labels))
    return torch.stack(logits), torch.stack(losses).mean()


def filtered(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Filter whole gradients, in a new order at each step, which is left out if none agree."""
    order = torch.randperm(len(labels))
    logits, loss = by_columns(learner, inputs[order], labels[order])
    params = list(learner.model.parameters())
    if not any(param.grad is not None and param.grad.any() for param in params):
        learner.optimizer.zero_grad(set_to_none=True)  # so that momentum and decay rest, too
    return logits[order.argsort()], loss


def invariant(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Penalise the squared derivative of each environment's loss by a scale of the logits (IRMv1).

    While its weight is above 1 the whole loss is divided by it, as in its authors' code, and so is
    the L2 penalty, which is a part of the loss there.

    Reference:
        Arjovsky et al., *Invariant risk minimization*, 2019, arXiv 1907.02893, section 3.1.
    """
    logits = learner.model(inputs.flatten(0, 1)).view_as(labels)
    scale = torch.ones(len(labels), 1, requires_grad=True)
    losses = binary_cross_entropy_with_logits(scale * logits, labels, reduction="none").mean(1)
    (slope,) = torch.autograd.grad(losses.sum(), scale, create_graph=True)
    settings = learner.settings
    weight = settings.penalty if learner.epoch >= settings.anneal else 1.0
    loss = losses.mean() + weight * slope.square().mean()
    (loss / max(weight, 1.0)).backward()
    for group in learner.optimizer.param_groups:
        group["weight_decay"] = settings.l2 / max(weight, 1.0)
    return logits, losses.mean()


def adversarial(learner: Learner, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Make features that serve the labels and hide the environment (DANN).

    Reference:
        Ganin et al., *Domain-adversarial training of neural networks*, JMLR 2016.
    """
    model, reversal = learner.model, learner.settings.reversal
    assert isinstance(model, Adversaries)
    features = model.features(inputs.flatten(0, 1))
    logits = model.label(features).view_as(labels)
    loss = binary_cross_entropy_with_logits(logits, labels)
    hidden = features.clone()
    hidden.register_hook(lambda grad: -reversal * grad)
    environment = torch.arange(len(labels)).repeat_interleave(labels.shape[1])
    (loss + cross_entropy(model.environment(hidden), environment)).backward()
    return logits, loss


STEPS: dict[str, Step] = {
    "mean": pooled,
    "dropout": pooled,
    "l1": absolute,
    "l2": pooled,
    "batch-norm": pooled,
    "dann": adversarial,
    "irm": invariant,
    "and-mask": by_moments,
    "geometric-mean": by_moments,
    "sand-mask": by_moments,
    "masked-average": by_moments,
    "median": by_columns,
    "sign-dropout": by_columns,
    "agreement-filtering": filtered,
}
