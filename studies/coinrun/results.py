"""What the runs come to: tables and claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..study import Finished
from ..summary import Cell, Claim, Table, spread
from .data import States
from .player import Played
from .settings import METHODS, REFERENCES
from .training import CoinRunSettings, divergence

Done = Finished[CoinRunSettings]
Finals = Mapping[str, Sequence[Done]]

EXPERT_SHARE = 0.95  # of levels that an expert should solve


def of(finished: Iterable[Done], role: str, method: str) -> list[Done]:
    """Return the runs of one role and method."""
    return [
        one
        for one in finished
        if (one.run.settings.role, one.run.settings.method) == (role, method)
    ]


def value(one: Done, name: str) -> float:
    """Return a final number of a run; infinity where it is not a number."""
    number = one.record["final"][name]
    return math.inf if number is None else float(number)


def mean(runs: Sequence[Done], name: str) -> float:
    """Return the mean of a final number."""
    return statistics.mean(value(one, name) for one in runs)


def best_trial(finished: Sequence[Done], method: str) -> Done:
    """Return the trial with the lowest loss on validation levels."""
    return min(of(finished, "trial", method), key=lambda one: value(one, "validation_loss"))


def returns(played: Mapping[str, Played]) -> dict[str, dict[str, Any]]:
    """Put what was played into a record."""
    return {
        "final": {f"{split}_return": float(one.rewards.mean()) for split, one in played.items()},
        "played": {
            split: {"returns": one.rewards.tolist(), "decisions": one.decisions.tolist()}
            for split, one in played.items()
        },
    }


def constant_policy(states: States, where: Sequence[States]) -> list[float]:
    """Return the divergence of the expert from its own mean over ``states``.

    No policy that ignores the frame does better on these.
    """
    logits = states.targets.mean(0, keepdim=True).clamp(min=1e-6).log()
    return [divergence(logits.expand_as(one.targets), one.targets).item() for one in where]


def loss_table(final: Finals, constant: Sequence[float]) -> Table:
    """Show how near clones are to the expert."""
    shown = (
        ("train KL", "train_loss", 1, 3),
        ("test KL", "test_loss", 1, 3),
        ("test KL at the best epoch", "best_test_loss", 1, 3),
        ("train accuracy %", "train_accuracy", 100, 1),
        ("test accuracy %", "test_accuracy", 100, 1),
    )
    rows: list[Sequence[Cell]] = [
        (
            name,
            *(
                spread((scale * value(one, key) for one in final[method]), digits)
                for _, key, scale, digits in shown
            ),
        )
        for method, name in METHODS.items()
    ]
    rows.append(("nothing: the expert's mean", *(f"{one:.3f}" for one in constant), *[None] * 3))
    columns = ("trained by", *(heading for heading, *_ in shown))
    return Table("clones on the expert's states", columns, rows)


def return_table(finished: Sequence[Done], final: Finals, train: States, test: States) -> Table:
    """Show what policies reach in the game."""
    rows: list[Sequence[Cell]] = [
        ("expert", f"{test.rewards.mean():.2f}", None, f"{train.rewards.mean():.2f}")
    ]
    everyone = [(name, final[method]) for method, name in METHODS.items()]
    everyone += [(name, of(finished, "reference", key)) for key, name in REFERENCES.items()]
    for name, runs in everyone:
        cells = [
            spread(value(one, key) for one in runs if key in one.record["final"])
            for key in ("test_return", "test_sampled_return", "train_return")
        ]
        rows.append((name, *cells))
    columns = ("policy", f"{len(test.levels)} unseen levels", "drawn by probability")
    return Table(
        "return of a level: 10 for the coin, or 0",
        (*columns, f"{len(train.levels)} training levels"),
        rows,
    )


def search_table(finished: Sequence[Done]) -> Table:
    """Show what the searches found."""
    rows: list[Sequence[Cell]] = []
    for method, name in METHODS.items():
        trials = of(finished, "trial", method)
        best, losses = (
            best_trial(finished, method),
            [value(one, "validation_loss") for one in trials],
        )
        chosen = best.run.settings
        masked = method == "temporal"
        rows.append(
            (
                name,
                len(trials),
                f"{losses[0]:.3f}",
                f"{statistics.median(losses):.3f}",
                f"{min(losses):.3f}",
                f"{chosen.lr:g}",
                f"{chosen.beta1:g}",
                f"{chosen.beta3:g}" if masked else None,
                f"{chosen.tau:g}" if masked else None,
                f"{chosen.weight_decay:g}{'' if chosen.decoupled else ' (penalty)'}",
                ("yes" if chosen.bias_correction else "no") if masked else None,
            )
        )
    columns = ("method", "trials", "given", "median", "best", "lr", "β1", "β3", "τ")
    return Table(
        "search: validation KL, and the settings with the best",
        (*columns, "weight decay", "bias correction"),
        rows,
    )


def beyond_spread(low: Sequence[float], high: Sequence[float]) -> bool:
    """Say whether means differ by more than both standard deviations together.

    Never with a single seed, or where a run diverged.
    """
    if min(len(low), len(high)) < 2 or not all(map(math.isfinite, (*low, *high))):
        return False
    gap = statistics.mean(high) - statistics.mean(low)
    return gap > statistics.stdev(low) + statistics.stdev(high)


def _beside(ours: Sequence[float], adams: Sequence[float], digits: int) -> str:
    """Write the numbers of both, and which difference there is."""
    told = f"{spread(ours, digits)}, Adam {spread(adams, digits)}"
    if not all(map(math.isfinite, (*ours, *adams))):
        return f"{told}: a run diverged"
    if min(len(ours), len(adams)) < 2:
        return f"{told}: one seed has no spread"
    if beyond_spread(ours, adams):
        return f"{told}: lower beyond the spread"
    if beyond_spread(adams, ours):
        return f"{told}: higher beyond the spread"
    return f"{told}: no difference beyond the spread"


def claims(
    finished: Sequence[Done],
    final: Finals,
    train: States,
    test: States,
    constant: Sequence[float],
) -> list[Claim]:
    """Return what the runs can contradict: claims of the paper, and those that they stand on.

    A difference between both methods has to be one :func:`beyond_spread`; a policy without seeds
    has to be surpassed by every run.
    """
    solved = {
        name: (states.rewards > 0) for name, states in (("training", train), ("unseen", test))
    }
    any_action = mean(of(finished, "reference", "random"), "test_return")
    best_reference = max(mean(of(finished, "reference", key), "test_return") for key in REFERENCES)

    def both(name: str) -> tuple[list[float], list[float]]:
        ours, adams = ([value(one, name) for one in final[key]] for key in ("temporal", "adam"))
        return ours, adams

    def looks(split: str, name: str, without: float) -> Claim:
        ours, adams = both(f"{split}_loss")
        return Claim(
            f"both optimizers clone better than the expert's mean, which ignores the frame: {name}",
            max(*ours, *adams) < without,
            f"KL {spread(ours, 3)} (temporal), {spread(adams, 3)} (Adam), {without:.3f}",
        )

    losses, early, reached = both("test_loss"), both("best_test_loss"), both("test_return")
    ours, adams = (
        [
            late - fitted if math.isfinite(late) and math.isfinite(fitted) else math.inf
            for late, fitted in zip(*pair, strict=True)
        ]
        for pair in zip(losses, both("train_loss"), strict=True)
    )
    return [
        Claim(
            "the expert reaches the coin in at least 95 % of levels",
            all(one.mean() >= EXPERT_SHARE for one in solved.values()),
            ", ".join(f"{one.sum()} of {len(one)} {name}" for name, one in solved.items())
            + f"; any action reaches it in {10 * any_action:.0f} % of the unseen ones",
        ),
        looks("train", "on training levels", constant[0]),
        looks("test", "on unseen levels", constant[1]),
        Claim(
            "the temporal AND-mask has the lower loss on unseen levels, beyond the spread over "
            "seeds, at an equal search budget",
            beyond_spread(*losses),
            f"test KL {_beside(*losses, 3)}",
        ),
        Claim(
            "so it has when each stops where its loss on validation levels is lowest",
            beyond_spread(*early),
            f"test KL {_beside(*early, 3)}",
        ),
        Claim(
            "the temporal AND-mask has the smaller gap between training and unseen levels, beyond "
            "the spread over seeds",
            beyond_spread(ours, adams),
            _beside(ours, adams, 3),
        ),
        Claim(
            "its clones reach a higher return on unseen levels than Adam's, beyond the spread over "
            "seeds, and than policies that do not look",
            beyond_spread(reached[1], reached[0]) and min(reached[0]) > best_reference,
            f"{_beside(*reached, 2)}; {best_reference:.2f} without a look",
        ),
        Claim(
            "clones of both play unseen levels better than policies that do not look",
            min(*reached[0], *reached[1]) > best_reference,
            f"return {spread(reached[0])} (temporal), {spread(reached[1])} (Adam), "
            f"{best_reference:.2f}",
        ),
    ]


def length_of_training(final: Finals, states: int) -> str:
    """Say how long final runs were, and whether they ended too early to memorise."""
    runs = [one for its in final.values() for one in its]
    settings = runs[0].run.settings
    passes = settings.epochs * runs[0].record["levels"] * settings.batch / states
    falling = 0
    for one in runs:
        losses = [math.inf if loss is None else loss for loss in one.record["history"]["test_loss"]]
        falling += math.isfinite(min(losses)) and min(losses) < min(losses[:-3], default=math.inf)
    note = (
        f"Final runs make {passes:.1f} passes over the states. The loss on unseen levels was still "
        f"falling in {falling} of {len(runs)} (lowest at one of the last three measurements)"
    )
    ending = ": they say nothing about what longer training memorises."
    return note + (ending if 2 * falling > len(runs) else ".")
