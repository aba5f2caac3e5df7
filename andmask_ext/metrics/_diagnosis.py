"""The question whether the AND-mask will help, asked of a model and its environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._norms import scalar_products
from ._input_layer import CannotTellInputsApart, InputLayer, find_input_layer
from ._probe import Probe, examples_in, pairs_of, rows
from ._verdict import Diagnosis

__all__ = ["diagnose"]

# Chosen on seeds that the table in docs/metrics.md does not show.
SURE = 0.01  # the largest p-value that counts as a difference
SHARED = 0.5  # below this, directions of their own are most of what environments have
OWN = 0.4  # so much of an input's gradient is an environment's own

_LOSSES = 16  # parts of an environment whose losses are compared
_PERMUTATIONS = 999
_LARGEST = 1 << 28  # coordinates of inputs that are held, 1 GiB
_CHUNK = 1 << 22


def diagnose(
    model: nn.Module,
    environments: Iterable[tuple[Any, Any]],
    loss_fn: Callable[[Any, Any], Tensor],
) -> Diagnosis:
    r"""Say whether environments pull in different directions, in which case the AND-mask can help.

    Ask a model after some plain training. Each environment is split into parts, which say how far
    its gradient is noise of examples. Against that noise three questions are asked:

    - Do gradients differ, of all parameters together or at some input? With :math:`w` the mean
      scalar product of two parts of one environment, and :math:`b` that of two environments, what
      environments share is :math:`b / w`. If environments differ by more than chance and share less
      than half, the verdict is ``"directions"``. They must share as little where the model does not
      see the inputs in question: once it uses an input, environments that differ in strength pull
      it back and forth.
    - Else, do losses or gradients differ? A shortcut that is more reliable in one environment than
      in another makes losses differ. The verdict is ``"strength"``. It says that the mask does not
      help, and can hurt.
    - Else the verdict is ``"neither"``: nothing was found.

    Differences are compared with those of 999 permutations of the parts over environments. Random
    numbers have a fixed seed.

    What it cannot tell: class frequencies that differ between environments give either verdict, and
    the mask then hurts (a caution says so). Environments of different difficulty look like
    ``"strength"``. A shortcut that is the same everywhere looks like nothing.
    See ``docs/metrics.md`` for how often the verdict was right.

    Args:
        model: the model. It stays as it is, and so do modes, buffers, gradients and random state.
        environments: at least 2 pairs (inputs, targets). A tuple of inputs is passed as several
            arguments. All tensors have examples in dimension 0, so they can be split: into 4 parts,
            or 8 of 2 environments, or 2 of 32 or more. Gradients of all parts are held.
        loss_fn: a function from the model's output and the targets to a 0-dim loss, a mean over
            examples.

    Returns:
        The verdict, and the numbers that led to it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are fewer than 2 environments, an environment has too few examples or
            cannot be split, or a loss is not finite.

    Example:
        >>> import torch, andmask_ext as am
        >>> generator = torch.Generator().manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> environments = []
        >>> for sign in (1, 1, -1, -1):
        ...     x = torch.randn(64, 3, generator=generator)
        ...     environments.append((x, x @ torch.tensor([[0.5], [0.0], [2.0 * sign]])))
        >>> result = am.metrics.diagnose(model, environments, torch.nn.functional.mse_loss)
        >>> result.verdict, result.fought_over
        ('directions', 1)

    Reference:
        Anderson, *A new method for non-parametric multivariate analysis of variance*, Austral
        Ecology 2001, for the permutations.
    """
    probe = Probe(model, loss_fn)
    if not probe.params:
        raise ValueError("model: expected parameters that need a gradient, but got none")
    pairs = list(pairs_of(environments))
    if len(pairs) < 2:
        raise ValueError(f"environments: expected at least 2, but got {len(pairs)}")
    parts = 8 if len(pairs) == 2 else 4 if len(pairs) < 32 else 2
    examples = min(examples_in(inputs) for inputs, _ in pairs)
    if examples < parts:
        raise ValueError(
            f"environments: expected at least {parts} examples in each of {len(pairs)}, to split "
            f"it into {parts} parts, but got {examples}"
        )
    with probe.keeping_random_state(), torch.enable_grad():
        losses = _losses(probe, pairs, max(parts, min(_LOSSES, examples // 4)))
        learned = _learned(probe, pairs)
        at_inputs = _AtInputs.of(probe, pairs, parts)
        gram = _of_all_parameters(probe, pairs, parts)
    within, between = _products(gram[None], len(pairs), parts)
    shared = _ratio(between[0, 0], within[0, 0])
    p_gradients = _p_value((within - between)[:, 0])
    p_losses = _p_value(_variances(losses))
    different = min(p_gradients, p_losses) <= SURE
    apart = p_gradients <= SURE and shared < SHARED
    if at_inputs.p_value is not None and at_inputs.shared_unused is not None:
        different |= at_inputs.p_value <= SURE
        apart |= at_inputs.p_value <= SURE and bool(at_inputs.fought_over)
        # Where a model has learned to use an input, environments pull it back and forth. Whether
        # they disagree on its meaning shows if it is not used.
        apart &= at_inputs.shared_unused < SHARED
    means = gram.unflatten(0, (-1, parts)).unflatten(2, (-1, parts)).mean((1, 3))
    norms = means.diagonal().sqrt()
    return Diagnosis(
        verdict="directions" if apart else "strength" if different else "neither",
        shared=shared,
        p_gradients=p_gradients,
        p_inputs=at_inputs.p_value,
        p_losses=p_losses,
        own=at_inputs.own,
        fought_over=at_inputs.fought_over,
        shared_unused=at_inputs.shared_unused,
        inputs=at_inputs.count,
        learned=learned,
        class_shift=_class_shift(pairs),
        cosines=torch.where(norms[:, None] * norms == 0, 0.0, means / (norms[:, None] * norms)),
        coherence=_ratio(means.sum(), means.trace()),
        losses=tuple(losses.mean(1).tolist()),
        examples=examples,
    )


# ---- what is measured ----


def _part(pair: tuple[Any, Any], part: int, parts: int) -> tuple[Any, Any]:
    examples, index = examples_in(pair[0]), slice(part, None, parts)
    return rows(pair[0], index, examples), rows(pair[1], index, examples)


def _losses(probe: Probe, pairs: Sequence[tuple[Any, Any]], parts: int) -> Tensor:
    """Return the losses of parts, ``[environments, parts]``."""
    with torch.no_grad():
        values = [
            [float(probe.loss(*_part(pair, part, parts))) for part in range(parts)]
            for pair in pairs
        ]
    losses = torch.tensor(values, dtype=torch.float64, device="cpu")
    if not bool(losses.isfinite().all()):
        place = int((~losses.isfinite()).any(1).int().argmax())
        raise ValueError(
            f"loss_fn: expected finite losses, but that of environment {place} is not; diagnose an "
            "earlier state of the model"
        )
    return losses


def _learned(probe: Probe, pairs: Sequence[tuple[Any, Any]]) -> float:
    generator = torch.Generator().manual_seed(0)
    right = permuted = 0.0
    with torch.no_grad():
        for inputs, targets in pairs:
            examples = examples_in(inputs)
            order = torch.randperm(examples, generator=generator)
            outputs = probe.outputs(inputs)
            right += float(probe.loss_of(outputs, targets))
            permuted += float(probe.loss_of(outputs, rows(targets, order, examples)))
    return 1 - right / permuted if permuted > 0 else math.nan


def _of_all_parameters(probe: Probe, pairs: Sequence[tuple[Any, Any]], parts: int) -> Tensor:
    """Return scalar products of the gradients of all parts, ``[n, n]``."""
    for param in probe.params:
        param.requires_grad_()
    grads = [
        torch.autograd.grad(
            probe.loss(*_part(pair, part, parts)),
            probe.params,
            allow_unused=True,
            materialize_grads=True,
        )
        for pair in pairs
        for part in range(parts)
    ]
    return torch.stack(
        [scalar_products(torch.stack(of_one)).cpu() for of_one in zip(*grads, strict=True)]
    ).sum(0)


@dataclass(frozen=True)
class _AtInputs:
    """What environments share at single inputs. All is None if inputs cannot be told apart."""

    count: int | None = None
    p_value: float | None = None
    own: float | None = None
    fought_over: int | None = None
    shared_unused: float | None = None

    @staticmethod
    def of(probe: Probe, pairs: Sequence[tuple[Any, Any]], parts: int) -> _AtInputs:
        try:
            layer = find_input_layer(probe, pairs[0][0], None)
        except CannotTellInputsApart as error:
            if error.instead is None:
                return _AtInputs()
            layer = InputLayer(probe, error.instead, None)  # normalised inputs, say, do as well
        try:
            grams = _by_input(layer, pairs, parts)
        except CannotTellInputsApart:
            return _AtInputs()
        if grams is None:
            return _AtInputs()
        within, between = _products(grams, len(pairs), parts)
        energy = grams.diagonal(dim1=1, dim2=2).mean(1)
        owns = torch.where(energy > 0, (within - between) / energy, 0.0)
        places = (owns[0] >= OWN) & (within[0] > 2 * between[0])
        asked = places if bool(places.any()) else torch.ones_like(places)
        grams = _by_input(layer, pairs, parts, asked)
        assert grams is not None
        within, between = _products(grams.sum(0, keepdim=True), len(pairs), parts, permutations=0)
        return _AtInputs(
            count=len(owns[0]),
            p_value=_p_value(owns.amax(1)),
            own=float(owns[0].max()),
            fought_over=int(places.sum()),
            shared_unused=_ratio(between[0, 0], within[0, 0]),
        )


def _by_input(
    layer: InputLayer,
    pairs: Sequence[tuple[Any, Any]],
    parts: int,
    silenced: Tensor | None = None,
) -> Tensor | None:
    """Return scalar products of the gradients of all parts at each input, ``[inputs, n, n]``.

    With ``silenced`` those of these inputs only, at a model that does not see them. None: too many.
    """
    values: list[Tensor] = []
    for pair in pairs:
        for gradient in layer.gradients(*pair, parts, silenced):
            values.append(gradient.values if silenced is None else gradient.values[silenced])
            if len(pairs) * parts * values[0].numel() > _LARGEST:
                return None
            if values[-1].shape != values[0].shape:
                return None
    size = max(1, _CHUNK // max(1, len(values) * values[0].shape[1]))
    products = []
    for chunk in zip(*(one.split(size) for one in values), strict=True):
        wide = torch.stack(chunk, 1).double()
        products.append((wide @ wide.mT).cpu())
    return torch.cat(products)


def _class_shift(pairs: Sequence[tuple[Any, Any]]) -> float | None:
    """Return Cramer's V of classes and environments, corrected for chance; None: no classes."""
    targets = [target for _, target in pairs]
    for (inputs, _), target in zip(pairs, targets, strict=True):
        if not isinstance(target, Tensor) or target.numel() != examples_in(inputs):
            return None
        if target.is_floating_point() and not bool((target == target.round()).all()):
            return None
    labels = torch.cat([target.detach().flatten().cpu() for target in targets])
    _, places = labels.unique(return_inverse=True)
    count, classes = len(pairs), int(places.max()) + 1
    if classes < 2 or classes > len(labels) // 5:
        return 0.0 if classes < 2 else None
    which = torch.arange(count).repeat_interleave(torch.tensor([t.numel() for t in targets]))
    table = torch.bincount(which * classes + places, minlength=count * classes)
    seen = table.view(count, classes).double()
    expected = seen.sum(1, keepdim=True) * seen.sum(0) / seen.sum()
    excess = float(((seen - expected).square() / expected).sum()) - (count - 1) * (classes - 1)
    return math.sqrt(max(0.0, excess) / (len(labels) * min(count - 1, classes - 1)))


# ---- how often chance does the same ----


def _products(
    grams: Tensor, count: int, parts: int, permutations: int = _PERMUTATIONS
) -> tuple[Tensor, Tensor]:
    """Return mean products of two parts of one environment, and of two environments.

    Args:
        grams: scalar products of parts, ``[g, n, n]``, environment by environment.
        count: the number of environments.
        parts: the number of parts of each.
        permutations: how many.

    Returns:
        Two tensors ``[1 + permutations, g]``, of which the first rows are the truth.
    """
    n = count * parts
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(count).repeat_interleave(parts)
    orders = [torch.arange(n)] + [
        torch.randperm(n, generator=generator) for _ in range(permutations)
    ]
    flat = grams.flatten(1).t()
    inside = torch.cat([
        (labels[:, :, None] == labels[:, None]).double().flatten(1) @ flat
        for labels in truth[torch.stack(orders)].split(max(1, _CHUNK // n**2))
    ])  # fmt: skip
    within = (inside - grams.diagonal(dim1=1, dim2=2).sum(1)) / (n * (parts - 1))
    between = (flat.sum(0) - inside) / (n * (n - parts))
    return within, between


def _variances(losses: Tensor) -> Tensor:
    """Return the variance of the means of environments, ``[1 + permutations]``."""
    generator = torch.Generator().manual_seed(0)
    flat = losses.flatten()
    drawn = [flat] + [
        flat[torch.randperm(len(flat), generator=generator)] for _ in range(_PERMUTATIONS)
    ]
    return torch.stack(drawn).view(-1, *losses.shape).mean(2).var(1)


def _p_value(values: Tensor) -> float:
    """Return the share of values that are at least the first one, up to rounding."""
    return float((values >= values[0] - 1e-9 * values.abs().amax()).double().mean())


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(above / below) if float(below) != 0 else math.nan
