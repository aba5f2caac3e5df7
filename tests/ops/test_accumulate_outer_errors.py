"""Every mistake in the arguments of the ops on weight gradients is named, and nothing changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from .moments import KINDS
from .outer import convolution, outer

F32, F64, I8, I64 = torch.float32, torch.float64, torch.int8, torch.int64


def moment(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"activations": moment(4, 5)}, r"activations of shape \(examples, .* but got \(4, 5\)"),
    ({"order": torch.zeros(3)}, "order of dtype int64 and 1 dim, but got Float"),
    ({"order": torch.zeros(3, 1, dtype=I64)}, r"order of dtype int64 and 1 dim, .* \(3, 1\)"),
    ({"order": torch.tensor([0, 1])}, "order of 3 indices, one for each example, but got 2"),
    ({"order": torch.tensor([0, 1, 3])}, r"indices in \[0, 3\) in order, but got 3"),
    ({"order": torch.tensor([0, 1, -1])}, r"indices in \[0, 3\) in order, but got -1"),
    ({"order": torch.tensor([0, 1, 0])}, "each example once in order, but got 0 twice"),
    ({"offsets": torch.zeros(2)}, "offsets of dtype int64 and 1 dim, but got Float"),
    ({"offsets": torch.tensor([0])}, "offsets of at least 1 environment .* but got 1 indices"),
    ({"offsets": torch.tensor([], dtype=I64)}, "at least 1 environment .* but got 0 indices"),
    ({"offsets": torch.tensor([0, 2])}, "offsets from 0 to 3, .* but got 0 to 2"),
    ({"offsets": torch.tensor([1, 3])}, "offsets from 0 to 3, .* but got 1 to 3"),
    ({"offsets": torch.tensor([0, 2, 2, 3])}, "offsets that rise .* but got 2 after 2"),
    ({"offsets": torch.tensor([0, 5, 3])}, "offsets that rise .* but got 3 after 5"),
    ({"weights": [1.0] * 3}, "2 weights, one for each environment, or one for all, but got 3"),
    ({"weights": [1.0, 0.0]}, "positive finite weights, but got 0"),
    ({"weights": [1.0, float("nan")]}, "positive finite weights, but got nan"),
    ({"weights": [float("inf"), 1.0]}, "positive finite weights, but got inf"),
    ({"count": -1}, "count in .* but got -1"),
    ({"count": 2**31 - 2}, "count in .* but got 2147483646"),
    ({"votes": moment(6, 5)}, "votes of dtype int8, int16 or int32, but got Float"),
    ({"votes": moment(6, 5, dtype=I64)}, "votes of dtype int8, int16 or int32, but got Long"),
]
LINEAR: list[tuple[dict[str, Any], str]] = [
    ({"activations": moment(3, 4, 5, dtype=I64)}, "activations of dtype float16, .* but got Long"),
    ({"grad_outputs": moment(4, 6)}, r"grad_outputs of shape \(examples, .* but got \(4, 6\)"),
    ({"grad_outputs": moment(3, 4, 6, dtype=F64)}, "grad_outputs of dtype Float, .* got Double"),
    ({"grad_outputs": moment(2, 4, 6)}, r"grad_outputs of 3 examples \(dim 0\), .* but got 2"),
    ({"grad_outputs": moment(3, 1, 6)}, r"grad_outputs of 4 rows \(dim 1\), .* but got 1"),
    (
        {"activations": moment(0, 4, 5), "grad_outputs": moment(0, 4, 6)},
        "activations of at least 1 example",
    ),
    ({"sum": moment(5, 6)}, r"sum of shape \(6, 5\), but got \(5, 6\)"),
    ({"sum": moment(30)}, r"sum of shape \(6, 5\), but got \(30\)"),
    ({"sum": moment(6, 5, dtype=F64)}, "sum of dtype Float, but got Double"),
    ({"sum": moment(1, 5).expand(6, 5)}, "sum whose elements lie apart, but got an expanded"),
    ({"votes": moment(6, 1, dtype=I8)}, r"votes of shape \(6, 5\), but got \(6, 1\)"),
    ({"squares": moment(6, 5, dtype=F64)}, "squares of dtype Float, but got Double"),
    ({"squares": moment(6, 4)}, r"squares of shape \(6, 5\), but got \(6, 4\)"),
    ({"logs": moment(6, 5, dtype=torch.float16)}, "logs of dtype Float, but got Half"),
    ({"logs": moment(6)}, r"logs of shape \(6, 5\), but got \(6\)"),
]
WINDOW: list[tuple[dict[str, Any], str]] = [
    ({"activations": moment(3, 4, 7, 8, dtype=I64)}, "activations of dtype float16, .* Long"),
    ({"activations": moment(3, 4, 1, 1, 1, 1)}, r"activations of shape .* \(3, 4, 1, 1, 1, 1\)"),
    ({"grad_outputs": moment(3, 6, 3)}, r"grad_outputs of 4 dims, .* but got \(3, 6, 3\)"),
    ({"grad_outputs": moment(3, 6, 3, 7)}, "grad_outputs of size 8 in dim 3, but got 7"),
    ({"grad_outputs": moment(3, 6, 2, 8)}, "grad_outputs of size 3 in dim 2, but got 2"),
    ({"grad_outputs": moment(2, 6, 3, 8)}, r"grad_outputs of 3 examples \(dim 0\), .* but got 2"),
    ({"stride": [2]}, "stride of 2 ints, one for each spatial dim, but got 1"),
    ({"stride": [2, 0]}, "stride of at least 1, but got 0"),
    ({"padding": [0, -1]}, "padding of at least 0, but got -1"),
    ({"dilation": [0, 1]}, "dilation of at least 1, but got 0"),
    ({"dilation": [1, 1, 1]}, "dilation of 2 ints, .* but got 3"),
    ({"groups": 0}, "groups that divide 4 channels and 6 outputs, but got 0"),
    ({"groups": 4}, "groups that divide 4 channels and 6 outputs, but got 4"),
    ({"groups": 1}, r"sum of shape \(6, 4, 3, 3\), but got \(6, 2, 3, 3\)"),
    ({"sum": moment(6, 2, 9)}, r"sum of 4 dims, as activations has, but got \(6, 2, 9\)"),
    ({"sum": moment(5, 2, 3, 3)}, r"sum of shape \(6, 2, 3, 3\), but got \(5, 2, 3, 3\)"),
    ({"sum": moment(6, 2, 3, 0)}, "sum of at least 1 in dim 3, but got 0"),
    ({"votes": moment(6, 2, 3, 1, dtype=I8)}, r"votes of shape \(6, 2, 3, 3\), but got"),
]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [(outer, *error) for error in COMMON + LINEAR]
    + [(convolution, *error) for error in COMMON + WINDOW],
)
def test_mistakes_are_named_and_change_nothing(
    case: Any, changes: dict[str, Any], message: str
) -> None:
    layer = case()
    moments = dict(zip(KINDS, layer.empty(), strict=True))
    changes = dict(changes)
    count = changes.pop("count", 0)
    for kind in KINDS:
        moments[kind] = changes.pop(kind, moments[kind])
    layer = replace(layer, **changes)
    before = {kind: moment.clone() for kind, moment in moments.items()}
    name = layer.op.default.name()
    with pytest.raises(RuntimeError, match=f"{name}: expected .*{message}"):
        layer.op(*layer.args(list(moments.values()), count))
    for kind in KINDS:
        torch.testing.assert_close(moments[kind], before[kind], rtol=0, atol=0, equal_nan=True)
