"""What becomes of a sample: exact, refused, or not comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import andmask_ext as am

from ..agreement.exact_loop import RULE, check
from ..agreement.outcomes import EXACT, outcome
from .samples import Batched, Joined, one_by_one, same

# No environment has three examples: `torch.cross` would take them for the axes of space.
STEPS = [(8, "each"), (8, "each"), (4, "2"), (4, "each"), (8, "ids"), (8, "2")]
IDS = torch.tensor([0, 1, 1, 2, 0, 1, 2, 1])

# Outcomes beside those of Agreement: nothing was compared.
NOT_SEPARATE = "data decide whether the batch is separate"
NO_GRADIENT = "no gradient, or one that is sparse or not finite"


def mean_loss(model: nn.Module, *batch: Tensor) -> Tensor:
    """The mean over examples of a curved function of all outputs, or the model's own loss."""
    if isinstance(model, Batched) and model.reduction:
        (loss,) = model.call(model(*batch))
        return loss if model.reduction == "mean" else loss / len(batch[0])
    total = torch.zeros((), dtype=torch.float64)
    for out in model(*batch):
        real = torch.view_as_real(out) if out.is_complex() else out
        each = (real.sin() + 0.3 * real).flatten(1).sum(1) if real.dim() > 1 else real.sin()
        total = total + each.mean()
    return total


def comparable(model: Batched | Joined, batch: Sequence[Tensor]) -> str | None:
    """Return why a batch cannot be compared, or None."""
    if isinstance(model, Batched) and not model.reduction:
        with torch.no_grad():
            whole, parts = model(*batch), one_by_one(model, batch)
        for out, each in zip(whole, zip(*parts, strict=True), strict=True):
            if not same(out, torch.cat(each)):
                return NOT_SEPARATE
    params = [param for param in model.parameters() if param.requires_grad]
    try:
        loss = mean_loss(model, *batch)
        if not params or not loss.requires_grad:
            return NO_GRADIENT
        grads = torch.autograd.grad(loss, params, allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return NO_GRADIENT
    reached = [grad for grad in grads if grad is not None]
    dense = all(grad.layout == torch.strided for grad in reached)
    if not reached or not dense or not all(grad.isfinite().all() for grad in reached):
        return NO_GRADIENT
    return None


def compared(
    model: Batched | Joined, tolerance: float, kinds: Sequence[str] = ("each", "2", "ids")
) -> Counter[str]:
    """Compare several steps of one Agreement with the loop; return their outcomes."""
    outcomes: Counter[str] = Counter()
    agreement = am.Agreement(model, RULE, keep_moments=True)
    for size, kind in STEPS:
        if kind not in kinds:
            continue
        batch = model.batch(size)
        reason = comparable(model, batch)
        if reason is not None:
            outcomes[reason] += 1
            continue
        environments = None if kind == "each" else IDS if kind == "ids" else int(kind)
        result = outcome(
            lambda batch=batch, environments=environments: check(
                model, mean_loss, *batch, environments=environments, agreement=agreement,
                tolerance=tolerance,
            )
        )  # fmt: skip
        outcomes[result] += 1
    return outcomes


def causes_of(outcomes: Counter[str]) -> set[str]:
    """Return why some of the steps were refused."""
    return set(outcomes) - {EXACT, NO_GRADIENT, NOT_SEPARATE}
