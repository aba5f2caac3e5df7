"""What became of a step under Agreement: it was exact, or refused for a cause that has a name.

A refusal must not pass for success. A test that allows one says which program is refused, and why:

- Of a program with a name: ``assert outcome(lambda: check(...)) == MIXING``. Where many programs
  share a test, a table names the refused ones; all others have to be `EXACT`. This is strict both
  ways: when Agreement learns to do a program, its line in the table goes.
- Of random programs: a `Tally` counts the outcomes of all that are drawn. It has a list of causes
  that are known, and a share of programs that has to be exact.

A refusal of another kind is an error like any other: give it a name here, and think about whether
it should be. Each name is a part of Agreement's message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

EXACT = "exact"

MIXING = "environments mix in the model"
NO_BATCH = "cannot tell where the batch"
NOT_FROM_OUTPUTS = "a gradient that does not come through the outputs of the model"
PARAMETERS_ONLY = "made of parameters only, so it belongs to no environment"
BATCH_NORM = "takes statistics over all environments"
REENTRANT_ARGUMENT = "a parameter is an argument of a function under reentrant checkpointing"
REENTRANT_INPUT = "no input of a region under reentrant checkpointing requires gradients"
REVERSIBLE = "a function that runs a backward pass inside its backward, as reversible layers do"

CAUSES = (
    MIXING, NO_BATCH, NOT_FROM_OUTPUTS, PARAMETERS_ONLY, BATCH_NORM, REENTRANT_ARGUMENT,
    REENTRANT_INPUT, REVERSIBLE,
)  # fmt: skip


def outcome(step: Callable[[], object]) -> str:
    """Run a step that compares with the loop; return `EXACT` or the cause of its refusal."""
    try:
        step()
    except RuntimeError as error:
        for cause in CAUSES:
            if str(error).startswith("Agreement: ") and cause in str(error):
                return cause
        raise
    return EXACT


def refusal(step: Callable[[], object]) -> str:
    """Run a step; return the message with which Agreement refuses it, or nothing."""
    try:
        step()
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith(("Agreement: ", "environments: ")):
            raise
        return str(error)
    return ""


class Tally:
    """Counts what becomes of random programs.

    Args:
        causes: for which some of them are refused; any other refusal fails.
        exact: the share of programs that has to be exact.
    """

    def __init__(self, *causes: str, exact: float) -> None:
        self.causes = causes
        self.exact = exact
        self.counts: Counter[str] = Counter()

    def add(self, step: Callable[[], object]) -> None:
        """Run a step that compares with the loop, and count its outcome."""
        result = outcome(step)
        assert result in (EXACT, *self.causes), f"refused: {result}"
        self.counts[result] += 1

    def close(self) -> None:
        """Fail if too few of all programs were exact."""
        share = self.counts[EXACT] / self.counts.total()
        assert share >= self.exact, f"{share:.3f} exact, expected {self.exact}: {self.counts}"
