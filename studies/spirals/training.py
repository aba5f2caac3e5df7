"""Train one network on the spirals.

All methods share what stands here. Where they differ, :mod:`.methods` has a function for each:
ordinary training pools the environments into one batch; the AND-mask has an optimizer of its own,
and a backward pass for each environment inside ``with optimizer.environment():``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import andmask_ext as am

from ..masks import Mask, passed
from ..records import RunFiles, Stateful
from ..study import Outcome, Report
from .data import draw_spirals
from .methods import RULES, STEPS, Learner
from .networks import build_model
from .settings import METHODS, Settings

CHUNK = 2**14  # examples that are in memory with all their hidden units, when accuracy is measured


def build_optimizer(
    settings: Settings, model: nn.Module, plain: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer: one of ours for a rule on moments unless ``plain``, else a stock one.

    The L2 penalty is added to the aggregated gradient, thus *after* the mask and before Adam's
    moments: weights without agreement shrink. The authors have it there too.
    """
    options: dict[str, Any] = {"lr": settings.lr}
    if "l2" in METHODS[settings.method]:
        options["weight_decay"] = settings.l2
    adam = settings.optimizer == "adam"
    options |= {"betas": (0.9, settings.beta2)} if adam else {"momentum": 0.9}
    rule = RULES[settings.method](settings) if settings.method in RULES else None
    if plain or rule is None or rule.moments is None:
        return (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), **options)
    masked = am.optim.AndMaskAdam if adam else am.optim.AndMaskSGD
    return masked(model.parameters(), **options, rule=rule)


def batches(inputs: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle every environment by itself and cut it into batches; a rest is left out.

    The shuffle comes from torch's global generator.
    """
    environments, examples = labels.shape
    order = torch.rand(environments, examples).argsort(dim=1)
    rows = torch.arange(environments)[:, None]
    for start in range(0, examples - size + 1, size):
        chosen = order[:, start : start + size]
        yield inputs[rows, chosen], labels[rows, chosen]


def train_epoch(
    learner: Learner,
    steps: Iterator[tuple[Tensor, Tensor]],
    rate: Callable[[int], float],
    before: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Train for one epoch; return training accuracy and mean loss during it.

    ``before`` is called before each step of the optimizer.
    """
    make_gradients = STEPS[learner.settings.method]
    losses, hits = [], []
    learner.model.train()
    for number, (inputs, labels) in enumerate(steps):
        for group in learner.optimizer.param_groups:
            group["lr"] = rate(number)
        learner.optimizer.zero_grad()
        logits, loss = make_gradients(learner, inputs, labels)
        before()
        learner.optimizer.step()
        losses.append(loss.detach())
        hits.append(((logits > 0) == (labels > 0.5)).double().mean())
    return torch.stack(hits).mean().item(), torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Measure the share of right answers, with dropout and batch norm as at test time."""
    model.eval()
    right = sum(
        int(((model(x) > 0) == (y > 0.5)).sum())
        for x, y in zip(
            inputs.flatten(0, -2).split(CHUNK), labels.flatten().split(CHUNK), strict=True
        )
    )
    return right / labels.numel()


def train(
    settings: Settings,
    seed: int,
    files: RunFiles,
    report: Report = lambda done, total, text: None,
    mask: Mask | None = None,
) -> Outcome:
    """Train one network from start, or from its checkpoint, to its end.

    The history has, for each epoch, training accuracy and loss *during* it, while the network was
    changing, and the accuracy on the test set after it. Where one backward pass serves several
    environments it has what passes the vote in the last step, too (:func:`studies.masks.passed`).
    ``mask`` takes the place of the method's rule.
    """
    data = draw_spirals(settings.data_config(), seed)
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)
    test = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_labels)
    validation = torch.from_numpy(data.validation_inputs), torch.from_numpy(data.validation_labels)
    model = build_model(settings, seed)
    learner = Learner(settings, model, build_optimizer(settings, model, plain=mask is not None))
    agreement = None
    if mask is not None:
        agreement = am.Agreement(model, am.AndMask(0.0), keep_moments=True)
    elif settings.together and isinstance(learner.optimizer, am.optim.EnvironmentOptimizer):
        agreement = am.Agreement(model, learner.optimizer)
    learner.agreement = agreement
    if settings.pooled:  # as one environment
        inputs, labels = inputs.flatten(0, 1)[None], labels.flatten()[None]
    steps = labels.shape[1] // settings.batch

    history: dict[str, list[float]] = {"train_accuracy": [], "test_accuracy": [], "loss": []}
    parts: dict[str, Stateful] = {"model": model, "optimizer": learner.optimizer}
    if mask is not None:
        parts["mask"] = mask
    if agreement is not None:
        history |= {"kept": [], "least_vote": []}
    masked = [(math.nan, math.nan)]  # share kept and least vote of each step of an epoch

    def before() -> None:
        if agreement is None:
            return
        moments = agreement.moments[0]
        if mask is not None:
            masked.append(mask.apply([*model.parameters()], moments, settings.rescale))
        elif len(masked) == steps:  # the last one; nothing else shows what passes
            masked.append(passed(learner.optimizer.param_groups[0]["rule"], moments))
        else:
            masked.append((math.nan, math.nan))

    for epoch in files.epochs(settings.epochs, seed, history, parts):
        if settings.learning_rate(epoch, history["train_accuracy"]) is None:
            break

        def rate(step: int, epoch: int = epoch) -> float:
            lr = settings.learning_rate(epoch + step / steps, history["train_accuracy"])
            assert lr is not None  # for epoch < settings.epochs
            return lr

        learner.epoch = epoch
        del masked[1:]
        train_accuracy, loss = train_epoch(
            learner, batches(inputs, labels, settings.batch), rate, before
        )
        if agreement is not None:
            for name, value in zip(("kept", "least_vote"), masked[-1], strict=True):
                history[name].append(value)
        history["train_accuracy"].append(train_accuracy)
        history["loss"].append(loss)
        history["test_accuracy"].append(accuracy(model, *test))
        report(
            epoch + 1,
            settings.epochs,
            f"train {100 * train_accuracy:.1f} %  test {100 * history['test_accuracy'][-1]:.1f} %",
        )
    return Outcome(
        {
            "final": {
                "train_accuracy": accuracy(model, inputs, labels),
                "validation_accuracy": accuracy(model, *validation),
                "test_accuracy": history["test_accuracy"][-1],
                "loss": history["loss"][-1],
            },
            "history": history,
            "largest_shortcut_vote": data.largest_vote(),
        },
        model.state_dict(),
    )
