"""Every mistake in the arguments of a list op is named, and nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .moments import KINDS, STATE, assert_same, case


def other(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 5)) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype), torch.zeros(7, dtype=dtype)]


F16, F32, F64, I8, I64 = torch.float16, torch.float32, torch.float64, torch.int8, torch.int64
ERRORS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "accumulate": [
        ({"sum": other()[:1]}, "sum of 2 tensors, as grads has, but got 1"),
        ({"sum": []}, "sum of 2 tensors, as grads has, but got 0"),
        ({"votes": other(I8)[:1]}, "votes of 2 tensors, as grads has, but got 1"),
        ({"squares": other()[:1]}, "squares of 2 tensors"),
        ({"logs": other()[:1]}, "logs of 2 tensors"),
        ({"sum": other(F64)}, r"sum\[0\] of dtype Float, but got Double"),
        ({"votes": other(F32)}, r"votes\[0\] of dtype int8, int16 or int32, but got Float"),
        ({"votes": other(I64)}, r"votes\[0\] of dtype int8, int16 or int32, but got Long"),
        ({"squares": other(F16)}, r"squares\[0\] of dtype Float, but got Half"),
        ({"logs": other(F64)}, r"logs\[0\] of dtype Float, but got Double"),
        ({"sum": other(shape=(5, 3))}, r"sum\[0\] of shape \(5, 3\) .*but got \(3, 3, 5\)"),
        ({"squares": other(shape=(3, 4))}, r"squares\[0\] of shape"),
        ({"grads": [torch.zeros(3, 3, 5, dtype=I64)] * 2}, r"grads\[0\] of dtype float16, .* Long"),
        ({"grads": [torch.zeros(3, 3, 5), torch.zeros(2, 7)]}, r"3 environments.*in grads\[1\]"),
        ({"grads": [torch.zeros(0, 3, 5), torch.zeros(0, 7)]}, "at least 1 environment"),
        ({"grads": [torch.zeros(()), torch.zeros(())]}, r"grads\[0\] .* 0-dim"),
        ({"stacked": False}, r"sum\[0\] of shape \(3, 5\) in grads\[0\], but got \(3, 3, 5\)"),
        ({"weights": [1.0] * 2}, "3 weights, one for each environment, or one for all, but got 2"),
        ({"weights": [1.0, 0.0, 1.0]}, "positive finite weights, but got 0"),
        ({"weights": [1.0, -2.0, 1.0]}, "positive finite weights, but got -2"),
        ({"weights": [1.0, float("nan"), 1.0]}, "positive finite weights, but got nan"),
        ({"weights": [1.0, float("inf"), 1.0]}, "positive finite weights, but got inf"),
        ({"added": -1}, "count in .* but got -1"),
        ({"added": 2**31 - 2}, "count in .* but got 2147483646"),
    ],
    "resolve": [
        ({"count": 0}, "count in .* but got 0"),
        ({"count": 2**31}, "count in .* but got 2147483648"),
        ({"rule": "median"}, r"to be one of mean, .* \(the rules on moments\), but got median"),
        ({"arguments": []}, r"1 argument\(s\) of rule and_mask, but got 0"),
        ({"arguments": [1.5]}, r"tau in \[0, 1\] for rule and_mask, but got 1.5"),
        ({"arguments": [float("nan")]}, r"tau in \[0, 1\] .* but got -?nan"),
        ({"rule": "sand_mask", "arguments": [0.5, 0.0]}, "k > 0 for rule sand_mask"),
        ({"votes": []}, r"votes of 2 tensors, as sum has \(rule and_mask needs them\), but got 0"),
        ({"votes": other(I8)[:1]}, "votes of 2 tensors"),
        ({"votes": other(I8, (5, 3))}, r"votes\[0\] of shape \(3, 5\), .* but got \(5, 3\)"),
        ({"votes": other(F32)}, r"votes\[0\] of dtype int8, int16 or int32, but got Float"),
        ({"votes": other(I64)}, r"votes\[0\] of dtype int8, int16 or int32, but got Long"),
        ({"rule": "sand_mask", "arguments": [0.5, 1], "squares": []}, "squares of 2 tensors"),
        (
            {"rule": "sand_mask", "arguments": [0.5, 1], "squares": other(F16)},
            r"squares\[0\] of dtype float32, .* but got Half",
        ),
        ({"rule": "geometric_mean", "logs": []}, "logs of 2 tensors"),
        ({"rule": "geometric_mean", "logs": other(F64)}, r"logs\[0\] of dtype float32, .* Double"),
        ({"sum": other(I64)}, r"sum\[0\] of dtype float16, .* but got Long"),
    ],
    "sgd": [
        ({"params": other()[:1]}, "params of 2 tensors, as sum has, but got 1"),
        ({"params": other(F64)}, r"sum\[0\] of float64 for params\[0\], but got Float"),
        ({"params": other(I64)}, r"params\[0\] of dtype float16"),
        ({"params": other(shape=(5, 3))}, r"sum\[0\] of shape \(5, 3\), .* but got \(3, 5\)"),
        ({"first": other()[:1]}, "momentum_buffers of 2 tensors"),
        ({"first": []}, "momentum_buffers of 2 tensors"),
        ({"first": other(F64)}, r"momentum_buffers\[0\] of dtype Float, but got Double"),
        ({"first": other(shape=(5, 3))}, r"momentum_buffers\[0\] of shape \(3, 5\)"),
        ({"rule": "median"}, "andmask::_sgd_step_: .*but got median"),
    ],
    "adam": [
        ({"params": other()[:1]}, "params of 2 tensors"),
        ({"first": other(F16)}, r"exp_avgs\[0\] of dtype Float, but got Half"),
        ({"second": []}, "exp_avg_sqs of 2 tensors"),
        ({"largest": other()[:1]}, "max_exp_avg_sqs of 2 tensors"),
        ({"steps": []}, "steps of 2 tensors"),
        ({"steps": [torch.tensor(1), torch.tensor(1)]}, r"steps\[0\] of one float32"),
        ({"steps": other()}, r"steps\[0\] of one float32, but got shape \(3, 5\)"),
        ({"beta1": 1.0}, r"beta1 in \[0, 1\), but got 1"),
        ({"beta2": -0.1}, r"beta2 in \[0, 1\), but got -0.1"),
        ({"count": 0}, "andmask::_adam_step_: .*count"),
    ],
    "temporal": [
        ({"tau": 1.5}, r"tau .*\[0, 1\].*1.5"),
        ({"beta3": 1.0}, r"beta3 in \[0, 1\), but got 1"),
        ({"signs": []}, "sign_avgs of 2 tensors"),
        ({"signs": other(shape=(5, 3))}, r"sign_avgs\[0\] of shape"),
        ({"grads": [torch.zeros(1, 3, 5)]}, "params of 1 tensors, as"),
        ({"grads": [g.double() for g in (torch.zeros(1, 3, 5), torch.zeros(1, 7))]}, "float32"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [(op, changes, message) for op, errors in ERRORS.items() for changes, message in errors],
)
def test_mistakes_are_named_and_change_nothing(
    op: str, changes: dict[str, Any], message: str
) -> None:
    c = case(shapes=[(3, 5), (7,)])
    vars(c).update(changes)
    before = c.after("__str__")
    with pytest.raises(RuntimeError, match=message):
        getattr(c, op)()
    assert_same(c, before, *KINDS, *STATE)
