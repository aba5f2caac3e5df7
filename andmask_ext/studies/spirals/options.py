"""The options of ``python -m andmask_ext spirals``, and the runs that they ask for."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .settings import METHODS, OPTIMIZERS, SETTINGS, Settings


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of the command's options.

    Args:
        prog: how the command was called.

    Returns:
        The parser; options that override a setting are None unless given.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a network on spirals with shortcuts, by the AND-mask and in the "
        "ordinary way. Several values for --method, --tau, --revolutions and --seeds mean every "
        "combination of them; with several --tau the figure is a map. What is finished is not run "
        "again, and what was interrupted goes on from its checkpoint.",
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--setting",
        choices=SETTINGS,
        default="paper",
        help="what to start from: the paper's text, the command in the authors' README (released), "
        "that one tuned, or a short version of the first (default: paper)",
    )
    what.add_argument(
        "--quick",
        dest="setting",
        action="store_const",
        const="quick",
        help="the same as --setting quick: done in a minute or two",
    )
    what.add_argument(
        "--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: both"
    )
    what.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2 3 4 (--quick: 0 1 2)"
    )
    what.add_argument(
        "--output",
        type=Path,
        default=Path("runs/spirals"),
        metavar="FOLDER",
        help="default: runs/spirals",
    )
    what.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="default: 1; more gain little, and lose much on a busy machine",
    )
    what.add_argument("--draw-data", action="store_true", help="draw the data set and stop")

    rule = parser.add_argument_group("rule")
    add = _override(rule)
    add("tau", float, "share of net votes that a coordinate needs", nargs="+")
    add(
        "rescale",
        None,
        "divide by the share of kept coordinates",
        action=argparse.BooleanOptionalAction,
    )

    data = parser.add_argument_group("data")
    add = _override(data)
    add("revolutions", float, "turns of the spirals", nargs="+")
    add("environments", int, "training environments")
    add("examples", int, "examples in each environment")
    add("test_examples", int, "examples in the test set")
    add("shortcut_dims", int, "shortcut dimensions")
    add("shortcut_variance", float, "variance of a shortcut's entries")
    add(
        "standardize",
        None,
        "divide mechanism dimensions by their standard deviation",
        action=argparse.BooleanOptionalAction,
    )

    training = parser.add_argument_group("training")
    add = _override(training)
    add("epochs", int, "passes over the data")
    add("batch", int, "examples from each environment in one step")
    add("optimizer", str, "sgd has momentum .9", choices=OPTIMIZERS)
    add("lr", float, "first learning rate")
    add("beta2", float, "memory of Adam's second moment")
    add("decay", float, "shares of the epochs after which the rate falls to a tenth", nargs="*")
    add("fit", float, "training accuracy after which the rate falls once, and training ends soon")
    add("l2", float, "penalty, added to the masked gradient")
    add("width", int, "units in a hidden layer")
    add("layers", int, "hidden layers")
    return parser


def _override(group: Any) -> Any:
    def add(name: str, kind: Any, text: str, **more: Any) -> None:
        if kind is not None:
            more |= {"type": kind}
            more.setdefault("metavar", {int: "N", float: "X", str: None}[kind])
        option = "--" + name.replace("_", "-")
        group.add_argument(option, default=None, help=f"{text} ({_default(name)})", **more)

    return add


def _default(name: str) -> str:
    values = {setting: _shown(getattr(s, name)) for setting, s in SETTINGS.items()}
    paper = values["paper"]
    others = [f"{setting}: {value}" for setting, value in values.items() if value != paper]
    return f"default: {'; '.join([paper, *others])}"


def _shown(value: object) -> str:
    if value is None or value == ():
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def unique(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetitions, in order of their first appearance."""
    return list(dict.fromkeys(values))


def plan(options: argparse.Namespace) -> Iterable[tuple[Settings, int]]:
    """Turn options into runs.

    Args:
        options: what :func:`build_parser` parsed.

    Yields:
        Settings and seed of each run; ordinary training has no tau and appears once for all.

    Raises:
        ValueError: a setting that cannot be meant.
    """
    if options.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {options.threads}")
    base = SETTINGS[options.setting]
    grid = {"tau", "revolutions", "method"}
    given = {
        f.name: getattr(options, f.name)
        for f in fields(Settings)
        if f.name not in grid and getattr(options, f.name) is not None
    }
    if "decay" in given:
        given["decay"] = tuple(given["decay"])
    base = replace(base, **given)
    seeds = options.seeds or ([0, 1, 2] if options.setting == "quick" else [0, 1, 2, 3, 4])
    if min(seeds) < 0:
        raise ValueError(f"seeds: expected numbers >= 0, got {min(seeds)}")
    seen = set()
    for seed, revolutions, method, tau in itertools.product(
        unique(seeds),
        options.revolutions or [base.revolutions],
        unique(options.method),
        options.tau or [base.tau],
    ):
        settings = replace(base, revolutions=revolutions, method=method, tau=tau)
        if method == "mean":
            settings = replace(settings, tau=0.0)
        if (settings, seed) not in seen:
            seen.add((settings, seed))
            yield settings, seed
