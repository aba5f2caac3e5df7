"""The rule of a group: its checks, and its form in a state."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import rules
from .._vote_test import LEVELS, given_levels
from ..rules import AndMask, Rule

# The options of a group that make an AND-mask, as they are where another rule takes its place.
NO_MASK: dict[str, Any] = {**dict.fromkeys(LEVELS), "zeros": "count", "rescale": False}


def require_one(options: dict[str, Any]) -> None:
    """Raise unless there is a level of an AND-mask or a rule, and not both.

    Args:
        options: those of a group: levels, ``rescale``, ``zeros`` and ``rule``, if it has them.

    Raises:
        ValueError: both are given, or neither; several levels are; or ``rescale`` or ``zeros`` is
            given together with a rule.
    """
    levels, rule = given_levels(options), options.get("rule")
    if not levels and rule is None:
        raise ValueError(
            "tau: expected a threshold in [0, 1] (0 averages, 1 asks for unanimity), fdr=..., "
            "significance=... or rule=..., but got none of them"
        )
    if len(levels) > 1:
        got = ", ".join(f"{name}={level}" for name, level in levels.items())
        raise ValueError(
            f"tau: expected one of tau, fdr and significance, but got {got}; set the others to "
            "None in the param group"
        )
    mask = {name: options[name] for name, value in NO_MASK.items() if options.get(name) not in
            (None, value)}  # fmt: skip
    if rule is not None and mask:
        name, value = next(iter(mask.items()))
        raise ValueError(
            f"{name}: expected an AND-mask by tau, fdr or significance (with rescale and zeros), "
            f"or rule, but got {name}={value} and rule={rule}; put it into the rule, such as "
            "rule=AndMask(tau, rescale), or set the other one to None in the param group"
        )


def rule_of_group(options: dict[str, Any]) -> Rule:
    """Return the rule that the options of a group make, which :func:`require_one` allows."""
    require_one(options)
    rule: Rule | None = options.get("rule")
    if rule is not None:
        return rule
    return AndMask(
        options.get("tau"),
        options.get("rescale", False),
        fdr=options.get("fdr"),
        significance=options.get("significance"),
        zeros=options.get("zeros", "count"),
    )


def check_rule(rule: object) -> None:
    """Raise TypeError unless ``rule`` is a rule that can be computed from moments."""
    if not isinstance(rule, Rule):
        raise TypeError(
            "rule: expected a rule such as andmask_ext.AndMask(tau=0.8), "
            f"but got {rule.__name__ if isinstance(rule, type) else type(rule).__name__}"
        )
    if rule.moments is None:
        raise TypeError(
            f"rule: expected a rule on moments, but {rule} needs the gradients of all "
            "environments at once; use andmask_ext.backward with it"
        )


def with_plain_rules(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups whose rules are dicts of numbers: ``torch.distributed`` gathers only these."""
    return [
        {key: _plain(value) if key == "rule" else value for key, value in group.items()}
        for group in groups
    ]


def with_rules(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups whose rules are objects."""
    return [
        {key: rule_of(value) if key == "rule" else value for key, value in group.items()}
        for group in groups
    ]


def _plain(rule: object) -> object:
    kind = type(rule)
    if isinstance(rule, Rule) and getattr(rules, kind.__name__, None) is kind:
        fields = dataclasses.fields(rule)  # type: ignore[arg-type]
        return {"name": kind.__name__, **{f.name: getattr(rule, f.name) for f in fields}}
    return rule


def rule_of(value: Any) -> Any:
    """Return the rule that a dict describes. Other values stay as they are."""
    if not isinstance(value, dict):
        return value
    options = {key: option for key, option in value.items() if key != "name"}
    try:
        return getattr(rules, str(value["name"]))(**options)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"rule: expected a rule of andmask_ext.rules, but got {value}") from error
