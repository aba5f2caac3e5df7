"""Every kind of layer, in drawn configurations, against the loop over environments."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved
from .exact_loop import check
from .layers import LAYERS, batches, rand

EXAMPLES = max(15, settings().max_examples // 3)


def sand_mask(tau: float) -> am.rules.SandMask:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tau = 1
        return am.rules.SandMask(tau, k=1.0)


TAUS = st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0])
RULES = st.one_of(
    st.just(am.rules.Mean()),
    st.builds(am.AndMask, TAUS, st.booleans()),
    st.builds(am.rules.GeometricMean, TAUS),
    st.builds(sand_mask, TAUS),
    st.builds(am.rules.MaskedAverage, TAUS),
    st.just(am.rules.AgreementSum()),
)


@st.composite
def environments(draw: st.DrawFn, batch: int) -> int | Tensor | None:
    """None, a number of equal groups, or ids: of other sizes, and in another order."""
    divisors = [d for d in range(1, batch + 1) if batch % d == 0]
    kind = draw(st.sampled_from(["each", "equal", "ids"]))
    if kind == "each":
        return None
    if kind == "equal":
        return draw(st.sampled_from(divisors))
    count = draw(st.integers(1, batch))
    ids = draw(st.permutations([*range(count), *[i % 2 % count for i in range(batch - count)]]))
    return torch.tensor(ids)


class Scaled(nn.Module):
    """A layer with parameters before it, which need its data path, and a loss that is curved."""

    def __init__(self, layer: nn.Module, learned: bool) -> None:
        super().__init__()
        self.layer = layer
        if learned:
            self.scale = nn.Parameter(rand() + 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale if hasattr(self, "scale") else x)


@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_a_layer_equals_the_loop(layer: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch = data.draw(batches)
    module, x = LAYERS[layer](data.draw, batch)
    model = Scaled(module, x.is_floating_point() and data.draw(st.booleans())).double()
    rule = data.draw(RULES)
    smooth = isinstance(rule, (am.rules.GeometricMean, am.rules.SandMask))
    check(
        model,
        curved,
        x,
        environments=data.draw(environments(batch)),
        rule=rule,
        total=data.draw(st.booleans()),
        tolerance=1e-7 if smooth else 1e-10,
    )
