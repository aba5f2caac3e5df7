"""What a diagnosis found, in numbers and in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Diagnosis"]

_UNTRAINED = 0.2  # shares of the loss that the model has learned to avoid
_MEMORISED = 0.97
_SHIFT = 0.1  # class frequencies that differ
_SMALL = 100  # examples of an environment

_VERDICTS = {
    "directions": "the environments pull in different directions. The AND-mask can help.",
    "strength": "the environments pull the same way, but not equally hard. The AND-mask does not "
    "help, and can hurt.",
    "neither": "no difference between the environments was found. The AND-mask has nothing to "
    "remove.",
}
_MEANING = {
    "directions": "",
    "strength": "A shortcut of differing reliability looks like this, and so do environments of "
    "differing difficulty.",
    "neither": "A shortcut that is the same everywhere looks like this, and so does one that is "
    "weak or comes with too few examples.",
}
_NEXT = {
    "directions": "Next: train with the AND-mask, and choose tau on an environment left out of "
    "training. A high tau needs more steps.",
    "strength": "Next: keep plain training. Remove the suspect input, or add an environment in "
    "which it points elsewhere.",
    "neither": "Next: keep plain training, unless you know of a shortcut. Then ask again with more "
    "examples, or with environments in which it differs.",
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Whether environments pull in different directions. ``str()`` says it in plain words.

    Attributes:
        verdict: ``"directions"``, ``"strength"`` or ``"neither"``.
        shared: the cosine of the gradients of two environments, without the noise of examples: 1 if
            all pull the same way, 0 or less if each has a direction of its own.
        p_gradients: how often gradients would differ as much if examples had been dealt out to
            environments at random. 0.001 is the smallest value.
        p_inputs: the same for the input that differs most. Where no layer takes the input as it is,
            inputs are what the first layer takes. None if there is no such layer.
        p_losses: the same for the losses of environments.
        own: the largest :attr:`InputAgreement.own` of an input. None as above.
        fought_over: the number of inputs of which an environment's own share is large, see
            :meth:`InputAgreement.fought_over`. None as above.
        shared_unused: what environments share at these inputs, or at all if there are none, where
            the model does not use them: near 1 if all would come to use them the same way, 0 or
            less if each would in its own. None as above.
        inputs: the number of inputs. None as above.
        learned: the share of the loss that the model has learned to avoid, compared with targets
            that are permuted. About 0 for an untrained model, 1 for a perfect one.
        class_shift: how far frequencies of classes differ between environments, from 0 to 1
            (Cramer's V, corrected for chance). None if targets are no classes.
        cosines: the cosines of the gradients of all pairs of environments, float64 ``[d, d]``.
        coherence: the m-coherence of environments, d if all gradients are equal.
        losses: the loss of each environment.
        examples: the number of examples of the smallest environment.
    """

    verdict: str
    shared: float
    p_gradients: float
    p_inputs: float | None
    p_losses: float
    own: float | None
    fought_over: int | None
    shared_unused: float | None
    inputs: int | None
    learned: float
    class_shift: float | None
    cosines: Tensor
    coherence: float
    losses: tuple[float, ...]
    examples: int

    def __str__(self) -> str:
        return _text(self)


def _text(result: Diagnosis) -> str:
    """Return the verdict, what it rests on, how sure it is, and what to do."""
    shifted = result.class_shift is not None and result.class_shift > _SHIFT
    lines = [
        f"Diagnosis: {_VERDICTS[result.verdict]}",
        f"Gradients: without the noise of examples, environments share {_share(result.shared)} of "
        f"them. Chance makes them differ as much with p = {result.p_gradients:.3f}.",
        _inputs(result),
        f"Losses: {min(result.losses):.3g} to {max(result.losses):.3g}. Chance makes them differ "
        f"as much with p = {result.p_losses:.3f}. {_MEANING[result.verdict]}".rstrip(),
        _state(result),
    ]
    if shifted:
        return "\n".join([
            *lines,
            f"Caution: classes are not equally frequent in the environments (Cramer's V = "
            f"{result.class_shift:.2f}). The verdict may come from that, and the mask "
            "hurts then.",
            "Next: balance the classes in each environment, and ask again.",
        ])  # fmt: skip
    return "\n".join([*lines, _NEXT[result.verdict]])


def _share(shared: float) -> str:
    if math.isnan(shared):
        return "nothing measurable"
    return f"{100 * min(max(shared, 0.0), 1.0):.0f} %"


def _inputs(result: Diagnosis) -> str:
    if result.p_inputs is None or result.shared_unused is None:
        return (
            "Inputs: not looked at, as they cannot be told apart or are too many. Then strength "
            "can look like directions once a model uses the shortcut: ask an untrained copy, too."
        )
    chance = f"p = {result.p_inputs:.3f}"
    if not result.fought_over:
        return (
            f"Inputs: environments fight over none of {result.inputs}, {chance}. Of what a model "
            f"that sees no input would learn, they share {_share(result.shared_unused)}."
        )
    return (
        f"Inputs: environments fight over {result.fought_over} of {result.inputs} "
        f"(metrics.input_agreement shows which), {chance}. Of what a model that does not use them "
        f"would learn there, they share {_share(result.shared_unused)}."
    )


def _state(result: Diagnosis) -> str:
    count = len(result.losses)
    basis = f"Basis: {count} environments of {result.examples} examples or more"
    if count < 5 or result.examples < _SMALL:
        basis += ", which is little"
    if math.isnan(result.learned):
        return f"{basis}. How far the model is trained cannot be seen from this loss."
    learned = f"{basis}. The model has learned {100 * max(result.learned, 0.0):.0f} % of the loss"
    if result.learned < _UNTRAINED:
        return (
            f"{learned}: it is hardly trained. Differences in strength do not show yet. Ask again "
            "after some plain training."
        )
    if result.learned > _MEMORISED:
        return (
            f"{learned}: little is left to pull. Ask an earlier state too, or pass examples that "
            "it was not trained on."
        )
    return f"{learned}."
