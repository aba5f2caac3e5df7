"""What the tests of the list ops share: arguments that can be replaced one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import andmask_ext  # noqa: F401  # loads the ops
from tests.native.rules import MOMENT_RULES

ops = torch.ops.andmask

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
KINDS = ("sum", "votes", "squares", "logs", "voters")
RULES = MOMENT_RULES
SHAPES = [(3, 5), (), (0, 4), (70,)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Case(SimpleNamespace):
    """Moments of several parameters, and all else that the ops take."""

    def moments(self) -> list[list[Tensor]]:
        return [self.sum, self.votes, self.squares, self.logs, self.voters]

    def after(self, op: str, **changes: Any) -> Case:
        """Call an op on copies, with some arguments replaced; return the copies."""
        copy = Case(**vars(self))
        for name, value in vars(self).items():
            if isinstance(value, list) and value and isinstance(value[0], Tensor):
                setattr(copy, name, [t.clone() for t in value])
        vars(copy).update(changes)
        copy.result = getattr(copy, op)()
        return copy

    def accumulate_args(self) -> tuple[Any, ...]:
        return (*self.moments(), self.grads, self.added, self.weights, self.stacked)

    def accumulate(self) -> None:
        return ops._accumulate_(*self.accumulate_args())

    def rule_args(self) -> tuple[Any, ...]:
        return (*self.moments(), self.count, self.rule, self.arguments, self.rescale)

    def resolve(self) -> list[Tensor]:
        return ops._resolve(*self.rule_args())

    def resolve_(self) -> None:
        return ops._resolve_(*self.rule_args())

    def sgd_args(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {name: getattr(self, name) for name in (*DECAY, *SGD)}
        return (self.params, self.first, *self.rule_args()), kwargs

    def sgd(self) -> None:
        args, kwargs = self.sgd_args()
        ops._sgd_step_(*args, **kwargs)

    def adam_args(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {name: getattr(self, name) for name in (*DECAY, *ADAM)}
        state = (self.first, self.second, self.largest, self.steps)
        return (self.params, *state, *self.rule_args()), kwargs

    def adam(self) -> None:
        args, kwargs = self.adam_args()
        ops._adam_step_(*args, **kwargs)

    def temporal_args(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {name: getattr(self, name) for name in (*DECAY, *ADAM, *TEMPORAL)}
        state = (self.first, self.second, self.signs, self.steps)
        return (self.params, *state, [row[0] for row in self.grads]), kwargs

    def temporal(self) -> None:
        args, kwargs = self.temporal_args()
        ops._temporal_adam_step_(*args, **kwargs)


DECAY = {"lr": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": False, "maximize": False}
SGD = {"momentum": 0.9, "dampening": 0.1, "nesterov": False, "first_step": False}
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
TEMPORAL = {"tau": 0.4, "beta3": 0.7, "bias_correction": True}


def case(
    dtype: torch.dtype = torch.float32,
    rows: int = 3,
    shapes: list[tuple[int, ...]] = SHAPES,
    **changes: Any,
) -> Case:
    """Moments of ``rows`` environments; the same environments are the gradients to add."""
    grads = [torch.randn(rows, *shape).to(dtype) for shape in shapes]
    w = wide(dtype)

    def new(factor: float = 0.0) -> list[Tensor]:
        return [torch.rand(shape, dtype=w) * factor for shape in shapes]

    moments = [new() for _ in KINDS]
    for counted in (1, 4):
        moments[counted] = [t.to(torch.int8) for t in moments[counted]]
    ops._accumulate_(*moments, grads, 0, [], True)
    values = {
        **dict(zip(KINDS, moments, strict=True)),
        "grads": grads,
        "added": rows,
        "weights": [],
        "stacked": True,
        "count": rows,
        "rule": "and_mask",
        "arguments": [0.6],
        "rescale": True,
        "params": [torch.randn(shape).to(dtype) for shape in shapes],
        "first": new(1.0),
        "second": new(1.0),
        "largest": new(1.0),
        "signs": new(1.0),
        "steps": [torch.tensor(4.0) for _ in shapes],
        **DECAY,
        **SGD,
        **ADAM,
        **TEMPORAL,
    }
    return Case(**{**values, **changes})


def assert_same(one: Case, other: Case, *names: str) -> None:
    for name in names:
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


STATE = ("params", "first", "second", "largest", "signs", "steps")
STEPS = {"sgd": STATE, "adam": STATE, "temporal": STATE}
EVERY = {"accumulate": KINDS, "resolve": ("result",), "resolve_": ("sum",), **STEPS}
every_op = pytest.mark.parametrize("op", EVERY)
