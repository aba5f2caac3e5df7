"""The rule of a group: its checks, and its form in a state."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import rules
from ..rules import Rule


def require_one(tau: object, rescale: object, rule: object) -> None:
    """Raise unless there is a threshold or a rule, and not both.

    Raises:
        ValueError: both are given, or neither; or ``rescale`` is given together with a rule.
    """
    if tau is None and rule is None:
        raise ValueError(
            "tau: expected a threshold in [0, 1] (0 averages, 1 asks for unanimity), or rule=..., "
            "but got neither"
        )
    if rule is not None and (tau is not None or rescale is True):
        name, value = ("rescale", rescale) if tau is None else ("tau", tau)
        raise ValueError(
            f"{name}: expected tau (with rescale) or rule, but got {name}={value} and "
            f"rule={rule}; put it into the rule, rule=AndMask(tau, rescale), or set the other one "
            "to None in the param group"
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
