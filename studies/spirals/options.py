"""The options of ``python -m studies spirals``, and the settings that they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from .settings import METHODS, OPTIMIZERS, QUICK, SETTINGS, ZEROS, Settings

SEVERAL = ("tau", "revolutions", "environments")  # options that take several values


def add_options(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """Add the study's options; those that override a setting are None unless given."""
    what = parser.add_argument_group("spirals")
    what.add_argument(
        "--part",
        choices=parts,
        default=parts[0],
        help="compare methods in one setting (the default); a random search for every method, and "
        "the best of each again; plain training and the AND-mask on 2 to 1024 environments",
    )
    what.add_argument(
        "--setting",
        choices=SETTINGS,
        default="paper",
        help="what to start from: the paper's text, the command in the authors' README (released), "
        "or that one tuned (default: paper)",
    )
    what.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default: mean and-mask; all of them with --quick and "
        "in the search)",
    )
    what.add_argument("--trials", type=int, metavar="N", help="of each method's search")
    what.add_argument("--draw-data", action="store_true", help="draw the data set and stop")

    add = _override(parser.add_argument_group("methods"))
    add("tau", float, "share of net votes that a coordinate needs", nargs="+")
    add("fdr", float, "false discovery rate that sets the threshold in the place of tau")
    add("significance", float, "level of the sign test that sets it in the place of tau")
    add("zeros", str, "whether an exact zero is a vote against", choices=ZEROS)
    add("together", bool, "all environments in one backward pass: faster, rounds differently")
    add("rescale", bool, "divide by the share of kept coordinates")
    add("sharpness", float, "k of the SAND-mask")
    add("cos_distance", float, "gradient agreement filtering: limit of the cosine distance")
    add("halve", bool, "there: average each gradient half and half with all before it")
    add("dropout", float, "share of hidden units left out")
    add("l1", float, "penalty, a part of the loss")
    add("l2", float, "penalty, added to the masked gradient; mean, l1, dropout, batch-norm: none")
    add("reversal", float, "DANN: factor of the reversed gradient")
    add("penalty", float, "IRM: weight of the penalty")
    add("anneal", int, "IRM: epochs in which that weight is 1")
    add("pooled", bool, "plain training: draw a step's batch from all environments together")

    add = _override(parser.add_argument_group("data"))
    add("revolutions", float, "turns of the spirals", nargs="+")
    add("environments", int, "training environments", nargs="+")
    add("examples", int, "examples in each environment")
    add("test_examples", int, "examples in the test set")
    add("shortcut_dims", int, "shortcut dimensions")
    add("shortcut_variance", float, "variance of a shortcut's entries")
    add("standardize", bool, "divide mechanism dimensions by their standard deviation")

    add = _override(parser.add_argument_group("training"))
    add("epochs", int, "passes over the data")
    add("batch", int, "examples from each environment in one step")
    add("optimizer", str, "sgd has momentum .9", choices=OPTIMIZERS)
    add("lr", float, "first learning rate")
    add("beta2", float, "memory of Adam's second moment")
    add("decay", float, "shares of the epochs after which the rate falls to a tenth", nargs="*")
    add("fit", float, "training accuracy after which the rate falls once, and training ends soon")
    add("width", int, "units in a hidden layer")
    add("layers", int, "hidden layers")


def _override(group: Any) -> Any:
    def add(name: str, kind: Any, text: str, **more: Any) -> None:
        if kind is bool:
            more |= {"action": argparse.BooleanOptionalAction}
        else:
            more |= {"type": kind}
            more.setdefault("metavar", {int: "N", float: "X", str: None}[kind])
        option = "--" + name.replace("_", "-")
        group.add_argument(option, default=None, help=f"{text} ({_default(name)})", **more)

    return add


def _default(name: str) -> str:
    values = {setting: _shown(getattr(s, name)) for setting, s in SETTINGS.items()}
    if name in QUICK:
        values["--quick"] = _shown(QUICK[name])
    paper = values["paper"]
    others = [f"{setting}: {value}" for setting, value in values.items() if value != paper]
    return f"default: {'; '.join([paper, *others])}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if value == ():
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, but the method; a list where an option takes several."""
    values = {
        field.name: getattr(options, field.name)
        for field in fields(Settings)
        if field.name != "method" and getattr(options, field.name) is not None
    }
    if "decay" in values:
        values["decay"] = tuple(values["decay"])
    return values


def base(options: argparse.Namespace, several: Sequence[str] = (), **changes: Any) -> Settings:
    """Return the setting to start from, with all that was given for it.

    Options in ``several`` may have several values; they are left to the caller, and so is the
    method. ``changes`` are what a part of the study has unless options say something else.
    """
    values = given(options)
    for name in SEVERAL:
        if name in values:
            chosen = values.pop(name)
            if name not in several:
                if len(chosen) > 1:
                    raise ValueError(f"{name}: expected one value in this part, got {chosen}")
                values[name] = chosen[0]
    start = replace(SETTINGS[options.setting], method="mean")  # one that allows every setting
    if options.quick:
        start = replace(start, **QUICK)
    return replace(start, **{**changes, **values})
