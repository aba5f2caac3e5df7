"""What a diagnosis says, in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._diagnosis import Diagnosis

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


def text_of(result: Diagnosis) -> str:
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
            f"{result.class_shift:.2f}). That alone pulls in different directions, and the mask "
            "hurts then.",
            "Next: balance the classes in each environment, and ask again.",
        ])  # fmt: skip
    return "\n".join([*lines, _NEXT[result.verdict]])


def _share(shared: float) -> str:
    if math.isnan(shared):
        return "nothing measurable"
    return f"{100 * min(max(shared, 0.0), 1.0):.0f} %"


def _inputs(result: Diagnosis) -> str:
    if result.fought_over is None or result.p_inputs is None:
        return "Inputs: not looked at, as they cannot be told apart or are too many."
    some = f"fight over {result.fought_over} of {result.inputs}"
    where = " (metrics.input_agreement shows which)" if result.fought_over else ""
    return f"Inputs: environments {some}{where}, p = {result.p_inputs:.3f}."


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
